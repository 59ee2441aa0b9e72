import fcntl
import gc
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from outsize.config import ComputeType
from outsize.optim import ADAMW, ALGORITHMS, RULES, Backend, compile, compile_rule, gpu_kernel, start_compile
from tests.hypers import hyper

FLOAT32 = ComputeType.FLOAT32
IS_SOAK = bool(os.environ.get("OUTSIZE_SOAK"))
needs_compiler = pytest.mark.skipif(compile.find_compiler() is None, reason="no C++ compiler here")


def update_once(kernel):
    weight = torch.ones(5)
    kernel(weight, [torch.zeros(5), torch.zeros(5)], torch.ones(5), hyper(lr=0.5, weight_decay=0.0))
    return weight


@pytest.fixture
def own_cache(kernels, tmp_path, monkeypatch):
    """A cache folder of the test's own, with a copy of the fp32 package in it; its path."""
    package = compile.package_path(ADAMW, FLOAT32)
    monkeypatch.setenv("OUTSIZE_CACHE", str(tmp_path))
    copy = compile.package_path(ADAMW, FLOAT32)
    assert copy.parent == tmp_path / "rules" and copy.name == package.name
    copy.parent.mkdir()
    shutil.copy(package, copy)
    return copy


def test_without_a_compiler_it_is_eager_and_says_so_once(monkeypatch, caplog, fresh_messages):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, "outsize"):
        kernels = [compile_rule(ADAMW, compute_type) for compute_type in ComputeType]
    assert [kernel.backend for kernel in kernels] == [Backend.EAGER] * 2
    assert len(caplog.records) == 1 and "CXX" in caplog.text
    torch.testing.assert_close(update_once(kernels[0]), torch.full((5,), 0.5))


@pytest.mark.parametrize(
    "failing",
    [
        pytest.param("compiler", marks=pytest.mark.skipif(not IS_SOAK, reason="OUTSIZE_SOAK=1 runs it")),
        "build process",
    ],
)
def test_a_compiler_that_fails_is_no_error(failing, monkeypatch, caplog, tmp_path, fresh_messages):
    """The process that builds ends with an error; that it does where the compiler fails takes seconds to see."""
    monkeypatch.setenv("OUTSIZE_CACHE", str(tmp_path))
    if failing == "compiler":
        monkeypatch.setenv("CXX", shutil.which("false"))
    else:
        process = tmp_path / "python"
        process.write_text("#!/bin/sh\necho 'cannot compile' >&2\nexit 1\n")
        process.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(process))
        monkeypatch.setattr(compile, "find_compiler", lambda: "any")
    with caplog.at_level(logging.WARNING, "outsize"):
        kernel = compile_rule(ADAMW, FLOAT32)
    failures = [record for record in caplog.records if "without a compiler" in record.getMessage()]
    assert kernel.backend is Backend.EAGER and len(failures) == 1, caplog.records
    assert failing == "compiler" or failures[0].getMessage().endswith("slower: cannot compile")
    assert not list(tmp_path.rglob("*.pt2"))


@needs_compiler
@pytest.mark.skipif(not IS_SOAK, reason="compiles twice; OUTSIZE_SOAK=1 runs it")
def test_a_compiler_that_knows_fewer_instructions_than_the_processor_serves(monkeypatch, tmp_path):
    compiler = tmp_path / "older"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *avx512*|*amx*) exit 1;; esac\nexec {shutil.which("g++")} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("OUTSIZE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    kernel = compile_rule(ADAMW, FLOAT32)
    assert kernel.backend is Backend.COMPILED
    torch.testing.assert_close(update_once(kernel), torch.full((5,), 0.5))


@needs_compiler
def test_a_loaded_package_leaves_nothing_in_the_temporary_folder(own_cache, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    code = """
import threading
import torch
from outsize.config import ComputeType
from outsize.optim import ADAMW, ALGORITHMS, Backend, compile, compile_rule
# A thread that is still there when the process ends lets nothing go by itself.
held = threading.Event()
threading.Thread(target=lambda loaders: held.wait(), args=(compile._loaders,), daemon=True).start()
settings = {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
hyper = ALGORITHMS["AdamW"].hyper(settings, step=1)
kernels = [compile_rule(ADAMW, ComputeType.FLOAT32) for _ in range(2)]
for kernel in kernels:
    assert kernel.backend is Backend.COMPILED
    kernel(torch.ones(5), [torch.zeros(5), torch.zeros(5)], torch.ones(5), hyper)
"""
    environment = {**compile.build_environment(), "TMPDIR": str(folder)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_eager_on_request_is_silent(how, monkeypatch, caplog, fresh_messages):
    if how == "environment":
        monkeypatch.setenv("OUTSIZE_EAGER", "1")
    kernel = compile_rule(ADAMW, FLOAT32, eager=how == "argument")
    assert kernel.backend is Backend.EAGER and not caplog.records


@needs_compiler
def test_a_cached_package_is_loaded_without_a_process(own_cache, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    compilation = start_compile(ADAMW, FLOAT32)
    kernel = compilation.wait()
    assert kernel.backend is Backend.COMPILED and compilation.wait() is kernel
    torch.testing.assert_close(update_once(kernel), torch.full((5,), 0.5))


@needs_compiler
def test_loading_imports_no_compiler(own_cache):
    code = (
        "import sys; from outsize.optim import *; from outsize.config import ComputeType;"
        "assert compile_rule(ADAMW, ComputeType.FLOAT32).backend == 'compiled';"
        "assert 'torch._inductor.graph' not in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "one byte", "empty"])
def test_a_damaged_package_is_built_again(own_cache, damage, monkeypatch, kernels):
    """Building is replaced by copying: what is tested is that it happens, and once."""
    data = bytearray(own_cache.read_bytes())
    good = bytes(data)
    data[len(data) // 2] ^= 1
    own_cache.write_bytes({"truncated": good[:1000], "one byte": data, "empty": b""}[damage])
    built: list[Path] = []

    class Build:
        def __init__(self, rule, compute_type, path):
            built.append(path)
            assert not path.exists()
            path.write_bytes(good)

        def wait(self):
            return None

    monkeypatch.setattr(compile, "_Build", Build)
    kernel = compile_rule(ADAMW, FLOAT32)
    assert kernel.backend is Backend.COMPILED and built == [own_cache]
    torch.testing.assert_close(update_once(kernel), torch.full((5,), 0.5))


@needs_compiler
def test_building_where_a_package_is_intact_leaves_it(own_cache):
    before = own_cache.stat().st_mtime_ns
    command = [sys.executable, "-m", "outsize.optim.build", "adamw", "float32", str(own_cache)]
    subprocess.run(command, check=True, env=compile.build_environment())
    assert own_cache.stat().st_mtime_ns == before
    assert {path.suffix for path in own_cache.parent.iterdir()} == {".pt2", ".lock"}


@needs_compiler
def test_of_two_builders_one_waits_and_finds_the_package(own_cache):
    good = own_cache.read_bytes()
    own_cache.unlink()
    with own_cache.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compilation = start_compile(ADAMW, FLOAT32)
        with pytest.raises(subprocess.TimeoutExpired):
            compilation._build._process.wait(timeout=4)
        own_cache.write_bytes(good)
        stamp = own_cache.stat().st_mtime_ns
    assert compilation.wait().backend is Backend.COMPILED
    assert own_cache.stat().st_mtime_ns == stamp


@needs_compiler
@pytest.mark.filterwarnings("error")
def test_a_build_that_nobody_waits_for_is_joined_by_who_comes_next(own_cache):
    """A model that is dropped before its first update drops the process without a word."""
    good = own_cache.read_bytes()
    own_cache.unlink()
    with own_cache.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start_compile(ADAMW, FLOAT32)._build._process
        gc.collect()
        assert process.poll() is None
        one, other = start_compile(ADAMW, FLOAT32), start_compile(ADAMW, FLOAT32)
        assert one._build._process is process and other._build._process is process
        own_cache.write_bytes(good)
    assert one.wait().backend is other.wait().backend is Backend.COMPILED
    assert own_cache not in compile._builds


def test_the_key_names_rule_and_type():
    names = [compile.package_path(ADAMW, compute_type).name for compute_type in ComputeType]
    assert [name.rsplit("-", 1)[0] for name in names] == ["adamw-float32", "adamw-bfloat16"]


@pytest.fixture
def no_gpu_compiler(monkeypatch):
    """What is given to torch.compile, which returns it as it is."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    monkeypatch.delenv("OUTSIZE_EAGER", raising=False)
    return compiled


@pytest.mark.parametrize("compute_type", ComputeType)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_gpu_kernel_is_compiled_and_has_the_bits_of_the_rule(rule, compute_type, no_gpu_compiler, caplog):
    kernel = gpu_kernel(rule, compute_type, torch.device("cpu"))
    assert kernel.backend is Backend.COMPILED and not caplog.records
    assert no_gpu_compiler == [{"dynamic": True, "fullgraph": True}]
    results = []
    for each in (kernel, compile_rule(rule, compute_type, eager=True)):
        sizes = rule.element_bytes(compute_type)
        weight, *state, gradient = (
            torch.zeros(int(256 * sizes[plane]) // dtype.itemsize, dtype=dtype)
            for plane, dtype in rule.dtypes(compute_type).items()
        )
        name = next(name for name, algorithm in ALGORITHMS.items() if algorithm.rule is rule)
        each(weight.fill_(1.0), state, gradient.fill_(0.5), hyper(name, lr=0.1))
        results.append([weight, *state])
    assert not torch.equal(results[0][0], torch.ones_like(weight))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_gpu_kernel_is_tried_with_sizes_of_whole_groups(no_gpu_compiler, monkeypatch):
    """Two sizes, so that the compiler takes none for the only one."""
    sizes = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: lambda planes, scalars: sizes.append(planes[0].numel())
    )
    gpu_kernel(ADAMW, ComputeType.BFLOAT16, torch.device("cpu"))
    assert len(set(sizes)) == 2 and all(size % 64 == 0 and size > 64 for size in sizes)


def test_where_no_gpu_kernel_compiles_it_is_eager_and_says_so_once(monkeypatch, caplog, fresh_messages):
    def fail(*arguments):
        raise RuntimeError("no compiler for this device")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    monkeypatch.delenv("OUTSIZE_EAGER", raising=False)
    kernels = [gpu_kernel(ADAMW, FLOAT32, torch.device("cpu")) for _ in range(2)]
    assert [kernel.backend for kernel in kernels] == [Backend.EAGER] * 2
    (record,) = caplog.records
    assert (
        "uncompiled on cpu, slower" in record.getMessage() and "no compiler for this" in record.getMessage()
    )
    torch.testing.assert_close(update_once(kernels[0]), torch.full((5,), 0.5))


def test_a_gpu_kernel_is_eager_on_request(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setenv("OUTSIZE_EAGER", "1")
    assert gpu_kernel(ADAMW, FLOAT32, torch.device("cpu")).backend is Backend.EAGER
