from collections.abc import Callable, Iterator

import pytest

from outsize.config import ComputeType
from outsize.optim import ADAMW, Backend, Kernel, compile, compile_rule, start_compile

Kernels = dict[tuple[ComputeType, Backend], Kernel]


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """All kernels; both packages are built at once where the cache is cold."""
    started = [start_compile(ADAMW, compute_type) for compute_type in ComputeType]
    made = [compilation.wait() for compilation in started]
    made += [compile_rule(ADAMW, compute_type, eager=True) for compute_type in ComputeType]
    return {(kernel.compute_type, kernel.backend): kernel for kernel in made}


@pytest.fixture(params=[(t, b) for t in ComputeType for b in Backend], ids=lambda p: f"{p[0]}-{p[1]}")
def kernel(request: pytest.FixtureRequest, kernels: Kernels) -> Kernel:
    if request.param not in kernels:
        pytest.skip("no C++ compiler here")
    return kernels[request.param]


@pytest.fixture
def fresh_messages() -> Iterator[Callable[[], None]]:
    """Forget what was said once, before and after."""
    compile._say_once.cache_clear()
    yield compile._say_once.cache_clear
    compile._say_once.cache_clear()
