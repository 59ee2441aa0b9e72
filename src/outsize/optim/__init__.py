"""Update rules and the kernels that run them on slices of a record's planes."""

from outsize.optim.compile import Backend, Compilation, Kernel, compile_rule, start_compile
from outsize.optim.rules import ADAMW, RULES, Hyper, Rule, deinterleave, interleave, join, split

__all__ = [
    "ADAMW",
    "RULES",
    "Backend",
    "Compilation",
    "Hyper",
    "Kernel",
    "Rule",
    "compile_rule",
    "deinterleave",
    "interleave",
    "join",
    "split",
    "start_compile",
]
