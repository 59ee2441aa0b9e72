"""What the process that builds a package does, with the compiler replaced: only the exporter runs."""

import fcntl
import os
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch

from outsize.config import ComputeType
from outsize.optim import ADAMW, ADAMW8BIT, build, compile
from outsize.optim.rule import GROUP
from tests.hypers import hyper

ASKED = "TORCHINDUCTOR_VEC_ISA_OK"


@pytest.fixture
def compiler(monkeypatch):
    """Records what would be compiled, and writes packages that hold nothing."""
    made = SimpleNamespace(programs=[], configs=[], folders=[])

    def compile_and_package(program, *, package_path, inductor_configs):
        made.programs.append(program)
        made.configs.append(inductor_configs)
        made.folders.append(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
        with zipfile.ZipFile(package_path, "w") as archive:
            archive.writestr("model", "code")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    monkeypatch.delenv(ASKED, raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    return made


def filled(argument):
    """The argument with values that a plane may hold: words are two numbers in bf16."""
    generator = torch.Generator().manual_seed(argument.shape[0])
    if argument.dtype is torch.float32:
        return argument.uniform_(0.1, 1.0, generator=generator)
    if argument.dtype is torch.int32:
        values = torch.randn(argument.shape[0], GROUP, generator=generator)
        return argument.copy_(values.bfloat16().view(torch.int32))
    return argument.random_(1, 100, generator=generator)


@pytest.mark.parametrize(
    ("rule", "compute_type"),
    [(ADAMW, ComputeType.FLOAT32), (ADAMW, ComputeType.BFLOAT16), (ADAMW8BIT, ComputeType.BFLOAT16)],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_is_compiled_updates_any_number_of_rows_in_place(rule, compute_type, compiler, tmp_path):
    build.package(rule.function(compute_type), build.example(rule, compute_type), tmp_path / "one.pt2")
    (program,) = compiler.programs
    for count in (2, 3, 77):
        whole = build.example(rule, compute_type, num_elements=128 * GROUP)[:-1]
        arguments = [filled(argument[:count]) for argument in whole]
        expected = [argument.clone() for argument in arguments]
        scalars = torch.tensor(hyper(lr=0.1))
        program.module()(*arguments, scalars)
        assert not torch.equal(arguments[0], expected[0])
        rule.function(compute_type)(*expected, scalars)
        assert all(torch.equal(own, other) for own, other in zip(arguments, expected, strict=True))


def test_an_example_has_the_layout_of_planes():
    for rule in (ADAMW, ADAMW8BIT):
        for compute_type in ComputeType:
            arguments = build.example(rule, compute_type)
            assert [argument.shape[0] for argument in arguments[:-1]] == [
                4096 // GROUP if rule.needs_groups(compute_type) else 4096
            ] * (len(arguments) - 1)
            assert arguments[-1].shape == (len(rule.scalars),)
    with pytest.raises(AssertionError, match="100"):
        build.example(ADAMW, ComputeType.FLOAT32, num_elements=100)


@pytest.mark.parametrize("asked", [False, True])
def test_vector_instructions_are_taken_for_granted_unless_asked_for(asked, compiler, tmp_path, monkeypatch):
    if asked:
        monkeypatch.setenv(ASKED, "")
    arguments = build.example(ADAMW, ComputeType.FLOAT32)
    build.package(ADAMW.update, arguments, tmp_path / "one.pt2")
    (config,) = compiler.configs
    assert config.get("cpp.vec_isa_ok") is (None if asked else True)
    assert config["cpp.dynamic_threads"] is True and config["compile_threads"] == 1
    assert min(config[name] for name in config if name.startswith("realize")) >= 1000


def test_building_leaves_the_package_alone(compiler, tmp_path):
    """The compiler's files are beside it, where renaming is atomic, and go with the process."""
    path = tmp_path / "cache" / "rules" / "one.pt2"
    build.build(ADAMW, ComputeType.FLOAT32, path)
    assert compile.is_intact(path)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {each.name for each in path.parent.iterdir()} == {"one.pt2", "one.lock"}
    assert os.path.dirname(compiler.folders[0]) == str(path.parent)
    build.build(ADAMW, ComputeType.FLOAT32, path)
    assert len(compiler.programs) == 1, "it is there"
    path.write_bytes(b"damaged")
    build.build(ADAMW, ComputeType.FLOAT32, path)
    assert len(compiler.programs) == 2 and compile.is_intact(path)


def test_building_holds_the_lock(tmp_path, monkeypatch):
    path = tmp_path / "one.pt2"

    def package(function, arguments, made):
        with path.with_suffix(".lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.write_bytes(b"")

    monkeypatch.setattr(build, "package", package)
    build.build(ADAMW, ComputeType.FLOAT32, path)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("compute_type", ["bfloat16", ""])
@pytest.mark.parametrize("has_path", [True, False])
def test_the_command_builds_and_says_where(compute_type, has_path, monkeypatch, capsys, tmp_path):
    built = []
    monkeypatch.setattr(build, "build", lambda *arguments: built.append(arguments))
    monkeypatch.setattr(build, "native_compute_type", lambda: ComputeType.FLOAT32)
    kind = ComputeType(compute_type or "float32")
    path = tmp_path / "one.pt2" if has_path else compile.package_path(ADAMW8BIT, kind)
    build.main("adamw8bit", compute_type, *([str(path)] if has_path else []))
    assert built == [(ADAMW8BIT, kind, path)]
    assert capsys.readouterr().out == f"{path}\n"


def test_a_build_that_fails_is_tried_once_more_and_asks_for_instructions(monkeypatch, capsys, tmp_path):
    commands = []

    class Replaced(Exception):
        pass

    def execve(program, command, environment):
        commands.append((program, command, environment))
        raise Replaced

    def fail(*arguments):
        raise RuntimeError("compiling failed")

    monkeypatch.setattr(build, "build", fail)
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv(ASKED, raising=False)
    path = str(tmp_path / "one.pt2")
    with pytest.raises(Replaced):
        build.main("adamw", "bfloat16", path)
    ((program, command, environment),) = commands
    assert program == command[0] == sys.executable
    assert command[-4:] == ["outsize.optim.build", "adamw", "bfloat16", path]
    assert environment == {**os.environ, ASKED: ""}
    monkeypatch.setenv(ASKED, "")
    with pytest.raises(RuntimeError, match="compiling failed"):
        build.main("adamw", "bfloat16", path)
    assert len(commands) == 1 and not capsys.readouterr().out
