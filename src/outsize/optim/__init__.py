"""Update rules and the kernels that run them on slices of a record's planes."""

from outsize.optim.compile import Backend, Compilation, Kernel, compile_rule, gpu_kernel, start_compile
from outsize.optim.rule import Hyper, Rule, deinterleave, interleave, join, part, split
from outsize.optim.rules import (
    ADAMW,
    ADAMW8BIT,
    ADAN,
    LION,
    RULES,
    SGD,
    AdamWHyper,
    AdanHyper,
    LionHyper,
    SGDHyper,
    SGDSaIHyper,
)

__all__ = [
    "ADAMW",
    "ADAMW8BIT",
    "ADAN",
    "LION",
    "RULES",
    "SGD",
    "AdamWHyper",
    "AdanHyper",
    "Backend",
    "Compilation",
    "Hyper",
    "Kernel",
    "LionHyper",
    "Rule",
    "SGDHyper",
    "SGDSaIHyper",
    "compile_rule",
    "deinterleave",
    "gpu_kernel",
    "interleave",
    "join",
    "part",
    "split",
    "start_compile",
]
