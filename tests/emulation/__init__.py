"""A CUDA device that the processor plays, so that what is written for one runs where there is none.

    python -m pytest -p tests.emulation tests/gpu        the tests of the device
    python -m tests.emulation benchmarks/gpu/train.py    any script

Importing this, before torch, builds `device.cpp` and registers it with torch under the type "cuda": operators compute what
the processor does, copies and events are as late as a device's, memory is the device's own, and what nothing orders is
noticed. What torch's Python says of CUDA (`torch.cuda`) is put in its place here. Nothing is known from it about speed, or
about kernels of CUDA's own. Without a C++ compiler there is no such device, and tests of the device are skipped.
"""

import ctypes

import pytest

from tests.emulation.install import install

functions = install()


def race() -> str:
    """What was found out of order since the last time; empty: nothing."""
    message = ctypes.create_string_buffer(1000)
    if functions is not None:
        functions.emulated_race(message, ctypes.c_size_t(1000))
    return message.value.decode()


@pytest.fixture(autouse=True)
def nothing_races():
    yield
    assert not race()
