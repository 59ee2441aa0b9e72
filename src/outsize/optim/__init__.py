"""Update rules and the kernels that run them on slices of a record's planes."""

from outsize.optim.compile import Backend, Compilation, Kernel, compile_rule, gpu_kernel, start_compile
from outsize.optim.rule import (
    CODED_GROUP_BYTES,
    GROUP,
    Algorithm,
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
    ALGORITHMS,
    LION,
    RULES,
    SGD,
)
from outsize.optim.threads import limit_threads, limited_threads

__all__ = [
    "ADAMW",
    "ADAMW8BIT",
    "ADAN",
    "ALGORITHMS",
    "CODED_GROUP_BYTES",
    "GROUP",
    "LION",
    "RULES",
    "SGD",
    "Algorithm",
    "Backend",
    "Compilation",
    "Hyper",
    "Kernel",
    "Rule",
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
