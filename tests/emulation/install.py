"""Build the emulated device, register it before torch is imported, and put `torch.cuda` over it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

from tests.builds import builds_folder

SOURCES = [Path(__file__).with_name(name) for name in ("device.cpp", "memory.h")]
TOTAL_BYTES = int(os.environ.get("OUTSIZE_EMULATED_BYTES", 8 << 30))


def install() -> ctypes.CDLL | None:
    """Once in a process, and before it imports torch, whose first look for CUDA is its last. None without a compiler."""
    assert "torch" not in sys.modules, "the emulated device goes before torch"
    if compiler() is None:
        return None
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    for name in ("c10", "torch_cpu"):
        ctypes.CDLL(str(root / "lib" / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
    functions = ctypes.CDLL(str(built(root)), mode=ctypes.RTLD_GLOBAL)
    put_over(functions)
    return functions


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def built(root: Path) -> Path:
    """The compiled device, from an earlier run where nothing has changed since."""
    key = b"".join(path.read_bytes() for path in [*SOURCES, root / "version.py"])
    folder = builds_folder() / "emulation"
    target = folder / f"device-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fresh = Path(scratch) / "device.so"
        options = ["-O1", "-std=c++20", "-fPIC", "-shared", "-w"]
        headers = [f"-I{root / each}" for each in ("include", "include/torch/csrc/api/include")]
        libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        command = [str(compiler()), *options, *headers, str(SOURCES[0]), "-o", str(fresh), *libraries]
        subprocess.run(command, check=True)
        fresh.replace(target)
    return target


def put_over(functions: ctypes.CDLL) -> None:
    """What `torch.cuda` does on a machine with one device."""
    import torch

    cuda = torch.cuda
    device = torch.device("cuda", 0)
    functions.emulated_allow.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    functions.emulated_pin.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    functions.emulated_unpin.argtypes = [ctypes.c_void_p]
    functions.emulated_sleep.argtypes = [ctypes.c_int64]
    functions.emulated_random.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool]
    functions.emulated_allow(TOTAL_BYTES, TOTAL_BYTES)

    def figures() -> list[int]:
        values = (ctypes.c_size_t * 6)()
        functions.emulated_memory(values)
        return list(values)

    class Stream:
        def __new__(cls, chosen=None, priority=0):
            return torch.Stream(device)

    class Event:
        def __new__(cls, enable_timing=False, blocking=False, interprocess=False):
            return torch.Event(device, enable_timing=enable_timing, blocking=blocking)

    @contextlib.contextmanager
    def stream(chosen):
        before = torch.accelerator.current_stream(device)
        torch.accelerator.set_stream(chosen if chosen is not None else before)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    def rng_state(where=None):
        state = torch.empty_like(torch.get_rng_state())
        functions.emulated_random(state.data_ptr(), state.numel(), False)
        return state

    def set_rng_state(state, where=None):
        state = state.cpu().contiguous().clone()
        functions.emulated_random(state.data_ptr(), state.numel(), True)

    def manual_seed(seed):
        set_rng_state(torch.Generator().manual_seed(seed).get_state())

    modes = {"default": 0, "warn": 1, "error": 2}
    status = type("cudaError", (int,), {})
    runtime = types.SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: status(functions.emulated_pin(address, size)),
        cudaHostUnregister=lambda address: status(functions.emulated_unpin(address)),
    )
    properties = types.SimpleNamespace(
        name="emulated", total_memory=TOTAL_BYTES, major=9, minor=0, multi_processor_count=1
    )
    over = {
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda chosen: None,
        "get_device_name": lambda chosen=None: properties.name,
        "get_device_properties": lambda chosen=None: properties,
        "get_device_capability": lambda chosen=None: (9, 0),
        "cudart": lambda: runtime,
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": lambda chosen=None: torch.accelerator.current_stream(device),
        "synchronize": lambda chosen=None: torch.accelerator.synchronize(device),
        "set_sync_debug_mode": lambda mode: functions.emulated_sync_mode(modes[mode]),
        "_sleep": lambda cycles: functions.emulated_sleep(cycles // 2000),
        "mem_get_info": lambda chosen=None: (figures()[0] - figures()[3], figures()[0]),
        "memory_allocated": lambda chosen=None: figures()[1],
        "max_memory_allocated": lambda chosen=None: figures()[2],
        "memory_reserved": lambda chosen=None: figures()[3],
        "max_memory_reserved": lambda chosen=None: figures()[4],
        "memory_stats": lambda chosen=None: {"num_alloc_retries": figures()[5]},
        "reset_peak_memory_stats": lambda chosen=None: functions.emulated_reset_highest(),
        "empty_cache": lambda: functions.emulated_empty_cache(),
        "set_per_process_memory_fraction": lambda fraction, chosen=None: functions.emulated_allow(
            TOTAL_BYTES, int(TOTAL_BYTES * fraction)
        ),
        "get_rng_state": rng_state,
        "set_rng_state": set_rng_state,
        "get_rng_state_all": lambda: [rng_state()],
        "set_rng_state_all": lambda states: set_rng_state(states[0]),
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
    }
    for name, value in over.items():
        setattr(cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(cuda.random, name, over[name])
    cuda.memory._set_allocator_settings = lambda settings: None
    torch._C._cuda_init = lambda: None
    torch._C._cuda_getCurrentRawStream = lambda chosen: 0
    torch.backends.cuda.is_built = lambda: True
    torch.version.cuda = "13.0"
