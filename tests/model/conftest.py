import pytest
import torch
import transformers


@pytest.fixture(autouse=True, scope="session")
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
