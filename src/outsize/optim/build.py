"""Builds one rule's package, in a process of its own: `python -m outsize.optim.build RULE TYPE [PATH]`.

Without a path, and with "" for the machine's own type, the package is put where `compile.py` looks for it, and its path is
printed.

Only here are the exporter and the compiler imported; their memory (some 330 MiB) goes back when the process
ends.
"""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from outsize.config import ComputeType
from outsize.native import native_compute_type
from outsize.optim.compile import is_intact, package_path
from outsize.optim.rule import GROUP, Rule
from outsize.optim.rules import RULES

_OPTIONS = {
    "cpp.dynamic_threads": True,
    "compile_threads": 1,
    # One loop over all planes: an intermediate that is stored costs a second pass over memory.
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
}

_ASKED = "TORCHINDUCTOR_VEC_ISA_OK"
"""Says whether the compiler knows the processor's vector instructions. Where it is not set torch tries them out one by one,
which takes as long as compiling a rule: so it is taken for granted, and tried out only if compiling fails."""


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> tuple[()]:
        self.function(*arguments)
        return ()


def example(rule: Rule, compute_type: ComputeType, num_elements: int = 1 << 12) -> list[Tensor]:
    """Arguments such as the rule's function takes them; what they hold does not matter."""
    sizes = rule.element_bytes(compute_type)
    weight, *state, gradient = (
        torch.zeros(int(num_elements * sizes[plane]) // dtype.itemsize, dtype=dtype)
        for plane, dtype in rule.dtypes(compute_type).items()
    )
    assert num_elements % GROUP == 0, num_elements
    views = rule.views(compute_type, weight, state, gradient)
    # Views of one plane that differ in type cannot be exported: each gets memory of its own, laid out alike.
    own = [torch.empty_strided(view.shape, view.stride(), dtype=view.dtype).zero_() for view in views]
    return [*own, torch.ones(len(rule.scalars))]


def package(function: Callable[..., None], arguments: Sequence[Tensor], path: Path) -> None:
    """Compile `function` over any number of rows of all `arguments` but the last; it works in place."""
    rows = torch.export.Dim("rows", min=2)
    shapes = {"arguments": (*({0: rows} for _ in arguments[:-1]), None)}
    with torch.no_grad():
        program = torch.export.export(_Module(function), tuple(arguments), dynamic_shapes=shapes)
        taken = {} if _ASKED in os.environ else {"cpp.vec_isa_ok": True}
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=_OPTIONS | taken
        )


def build(rule: Rule, compute_type: ComputeType, path: Path) -> None:
    """Put the package at `path`, atomically; of several such processes one compiles, the others wait."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_intact(path):
            return
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        made = Path(scratch) / path.name
        package(rule.function(compute_type), example(rule, compute_type), made)
        made.replace(path)


def main(rule: str, compute_type: str, path: str | None = None) -> None:
    """Build, and print where the package is."""
    own, kind = RULES[rule], ComputeType(compute_type) if compute_type else native_compute_type()
    made = package_path(own, kind) if path is None else Path(path)
    try:
        build(own, kind, made)
    except Exception:
        if _ASKED in os.environ:
            raise
        # Once more, in a process that has not settled for instructions yet.
        command = [sys.executable, "-W", "ignore", "-m", "outsize.optim.build", rule, kind, str(made)]
        os.execve(sys.executable, command, {**os.environ, _ASKED: ""})
    print(made)


if __name__ == "__main__":
    main(*sys.argv[1:])
