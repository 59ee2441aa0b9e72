import pytest

from tests.train.standin import write_data, write_model


@pytest.fixture(autouse=True)
def own_token_cache(tmp_path_factory, monkeypatch):
    """Tokens go to a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("outsize.train.data.tokens.cache_folder", lambda: folder)
    return folder / "tokens"


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)
