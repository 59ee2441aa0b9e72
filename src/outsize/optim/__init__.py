"""Update rules and the kernels that run them on slices of a record's planes."""

from outsize.optim.compile import Backend, Compilation, Kernel, compile_rule, gpu_kernel, start_compile
from outsize.optim.rule import (
    CODED_GROUP_BYTES,
    GROUP,
    Hyper,
    Rule,
    deinterleave,
    interleave,
    join,
    part,
    split,
)
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
from outsize.optim.threads import limit_threads, limited_threads

__all__ = [
    "ADAMW",
    "ADAMW8BIT",
    "ADAN",
    "CODED_GROUP_BYTES",
    "GROUP",
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
    "limit_threads",
    "limited_threads",
    "part",
    "split",
    "start_compile",
]
