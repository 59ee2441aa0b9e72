"""What a layer's forward changes beside its outputs: objects among its arguments, and recordings of the running call.

A forward runs more often than it is called: in the dry run, once per tile, and again in the backward. That is invisible
only while it is a function of its tensors. An object that it may change (a cache, a recorder, a generator) is therefore
copied for the dry run, never cut into tiles, and refused where a recomputation would change it a second time.

transformers records router logits, attentions and the like with forward hooks on modules inside a block, into lists of
the running call. A recording made while a block runs without a graph would have no gradient (an auxiliary loss would
train nothing), and one made during recomputation would be a second copy. So they are caught, declared outputs of the
visit, and handed on to the recorder from outside. Source: transformers, `utils/output_capturing.py`.
"""

from __future__ import annotations

import copy
import enum
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from transformers import Cache, PreTrainedConfig
from transformers.utils import output_capturing

from outsize.engine.rng_autocast import versions
from outsize.errors import UsageError
from outsize.store.recovery import undone_by


class Repeatable:
    """Base of arguments that may be used again: a forward that is given one repeatedly has the effect of one forward.

    The dry run uses the object itself.
    """

    @property
    def pages_bytes(self) -> int:
        """Bytes of KV pages that a forward reads and writes; the plan counts them beside its activations."""
        return 0


_IMMUTABLE = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    frozenset,
    enum.Enum,
    type,
    types.BuiltinFunctionType,
    types.EllipsisType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    nn.Module,
    PreTrainedConfig,
    Repeatable,
)
"""Types of arguments that a forward does not change, or whose changes do no harm."""

_CONTAINERS = (list, dict, OrderedDict, defaultdict, deque)


def is_cache(value: Any) -> bool:
    """Whether `value` is a cache of transformers, which stays whole even where it is registered as a pytree."""
    return isinstance(value, Cache)


def flatten(arguments: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves of nested arguments, and their structure."""
    return tree_flatten(arguments, is_leaf=is_cache)


def is_stateful(leaf: Any) -> bool:
    """Whether a forward may change `leaf`, an argument that is not a tensor, or read a batch from it."""
    if isinstance(leaf, types.FunctionType):
        return leaf.__closure__ is not None
    return not isinstance(leaf, (Tensor, *_IMMUTABLE))


def without_empty_caches(arguments: Any) -> Any:
    """`arguments` with None in place of each cache of transformers that holds no tokens yet."""

    def without(leaf: Any) -> Any:
        return None if is_cache(leaf) and _is_empty(leaf) else leaf

    return tree_map(without, arguments, is_leaf=is_cache)


def _is_empty(cache: Cache) -> bool:
    try:
        return not int(cache.get_seq_length())
    except ValueError:  # none of its layers counts tokens: all are of linear attention
        return not cache.has_previous_state()


def copied(arguments: Any, rows: Tensor | None = None) -> Any:
    """`arguments` with copies of the objects that a forward may change; tensors are shared.

    Of a cache the copy has only the rows of the batch with the indices `rows`. Raises UsageError where an object cannot be
    copied.
    """

    def copied_leaf(leaf: Any) -> Any:
        if not is_stateful(leaf) or isinstance(leaf, types.FunctionType):
            return leaf
        if isinstance(leaf, torch.Generator):
            return leaf.clone_state()
        try:
            made = copy.deepcopy(leaf)
        except Exception as error:
            raise UsageError(
                f"an argument of type {type(leaf).__name__} cannot be copied, and the dry run before the first call "
                f"would change it: {error}",
                hint=f"give {type(leaf).__name__} a __deepcopy__, or pass its tensors instead",
            ) from error
        if rows is not None and is_cache(made):
            made.batch_select_indices(rows)
        return made

    return tree_map(copied_leaf, arguments, is_leaf=is_cache)


def has_containers(spec: TreeSpec) -> bool:
    """Whether lists or dicts are among the arguments `(args, kwargs)` of this structure."""
    return any(_is_container(child) for part in spec.children() for child in part.children())


def _is_container(spec: TreeSpec) -> bool:
    return spec.type in _CONTAINERS or any(_is_container(child) for child in spec.children())


def state_of(value: Any) -> Any:
    """A value that differs after `value`, an object among the arguments, was changed."""
    return _state_of(value, set())


def _state_of(value: Any, seen: set[int]) -> Any:
    if isinstance(value, Tensor):
        return id(value), versions([value])
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if not is_stateful(value):
        return value if isinstance(value, int | float | str | bytes) else id(value)
    if id(value) in seen:
        return None
    seen.add(id(value))
    if isinstance(value, Mapping):
        return [(_state_of(key, seen), _state_of(each, seen)) for key, each in value.items()]
    if isinstance(value, list | tuple | set | deque):
        return [_state_of(each, seen) for each in value]
    if isinstance(value, types.FunctionType):
        return [_state_of(cell.cell_contents, seen) for cell in value.__closure__ or ()]
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    held = {name: getattr(value, name) for name in slots if name in dir(value)}
    return _state_of({**held, **getattr(value, "__dict__", {})}, seen)


@final
@dataclass(frozen=True, slots=True)
class Nested:
    """The structure of a nested value and its leaves, with None in the places of tensors."""

    spec: TreeSpec
    leaves: list[Any]
    positions: list[int]
    """Where among the leaves tensors belong."""

    @classmethod
    def apart(
        cls, value: Any, flatten: Callable[[Any], tuple[list[Any], TreeSpec]] = tree_flatten
    ) -> tuple[Nested, list[Tensor]]:
        """Take `value` apart; the tensors in it, in order."""
        leaves, spec = flatten(value)
        positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[position] for position in positions]
        for position in positions:
            leaves[position] = None
        return cls(spec, leaves, positions), tensors

    def filled(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The leaves with `tensors` in their places."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        return leaves

    def whole(self, tensors: Sequence[Tensor]) -> Any:
        """The value with `tensors` in their places."""
        return tree_unflatten(self.filled(tensors), self.spec)


@dataclass(slots=True)
class Caught:
    """Recordings made inside a block, by key."""

    lists: dict[str, list[Tensor]] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All recordings, in a fixed order."""
        return [tensor for key in sorted(self.lists) for tensor in self.lists[key]]


@dataclass(slots=True)
class CapturedOutputs:
    """The keys that the running call records (`hidden_states` are recorded outside of blocks)."""

    keys: tuple[str, ...]
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def current(cls) -> CapturedOutputs:
        """What the call in progress records."""
        collector = output_capturing._active_collector.get()
        return cls(tuple(sorted(key for key, value in (collector or {}).items() if isinstance(value, list))))

    @contextmanager
    def catch(self) -> Iterator[Caught]:
        """Record into lists of our own inside the context."""
        caught = Caught({key: [] for key in self.keys})
        if not self.keys:
            yield caught
            return
        before = output_capturing._active_collector.get()
        with undone_by(partial(output_capturing._active_collector.set, before)):
            output_capturing._active_collector.set(caught.lists)
            yield caught
        self.counts = {key: len(values) for key, values in caught.lists.items()}

    def pass_on(self, tensors: Sequence[Tensor]) -> None:
        """Give `tensors`, in the order of `Caught.tensors`, to the recorder of the call in progress."""
        collector = output_capturing._active_collector.get()
        rest = list(tensors)
        for key in self.keys:
            count = self.counts.get(key, 0)
            if collector is not None and key in collector:
                collector[key].extend(rest[:count])
            rest = rest[count:]
