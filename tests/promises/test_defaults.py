"""torch's defaults: whatever type, device or mode the process sets around a call, the numbers are the same."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import outsize
from outsize.errors import ModelError
from tests.running import train
from tests.zoo import ZOO, plain_stack


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


DEFAULTS = {
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp16": lambda: default_dtype(torch.float16),
    "fp64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    ZOO["llama"].build().save_pretrained(path)
    return path


def results(folder, tmp_path, around=None):
    """Losses and weights of a model from a folder and of one from scratch, in which `around` is set for all of it."""
    batches = [ZOO["llama"].batch(seed=seed) for seed in range(2)]
    found = []
    tmp_path.mkdir(exist_ok=True)
    with around() if around is not None else default_dtype(torch.float32):
        for options in ({"dtype": "bfloat16"}, {"dtype": "float32", "from_scratch": True}):
            model = outsize.load(folder, disk=tmp_path, home="disk", **options).train()
            optimizer = outsize.AdamW(model, lr=1e-3, max_grad_norm=0.1)
            found.append(train(model, batches, optimizer))
            found += [value.detach().clone() for value in model.parameters()]
    return found


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    return results(folder, tmp_path_factory.mktemp("disk"))


@pytest.mark.parametrize("name", DEFAULTS)
def test_no_default_changes_a_number(name, folder, expected, tmp_path):
    found = results(folder, tmp_path, DEFAULTS[name])
    assert found[0] == expected[0]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64, torch.int32])
def test_a_parameter_of_another_type_is_refused_by_name(dtype):
    module = plain_stack()
    module.outlet.weight = nn.Parameter(module.outlet.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ModelError, match=rf"parameter outlet\.weight has type {dtype}"):
        outsize.wrap(module)


_FLOATS = {"zeros", "ones", "empty", "full", "rand", "randn", "linspace", "eye", "empty_strided"}
_FACTORIES = _FLOATS | {"tensor", "arange", "randint", "randperm", "scalar_tensor"}


def test_every_tensor_that_is_made_has_a_device_and_a_type():
    """Code that runs in the middle of a model's forward, or in a thread, must not depend on the process's defaults."""
    source = Path(outsize.__file__).parent
    faults = []
    for path in sorted(source.rglob("*.py")):
        if path.name == "build.py" and path.parent.name == "optim":
            continue  # runs in a process of its own
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and ast.unparse(call.func).startswith("torch.")):
                continue
            name = ast.unparse(call.func).removeprefix("torch.")
            given = {keyword.arg for keyword in call.keywords}
            wanted = {"device"} if name in _FACTORIES else set()
            wanted |= {"dtype"} if name in _FLOATS else set()
            if None not in given and wanted - given:
                faults.append(f"{path.relative_to(source)}:{call.lineno} says no {wanted - given}")
    assert not faults, "\n".join(faults)
