"""Initialising a block from nothing, by the model's own rules.

What runs is what `from_config` runs: each module's `reset_parameters`, then the model's `_init_weights`,
children before parents; but on a copy of the module tree on meta in which only this block's parameters are
real. A rule that touches anything else has no effect. Random numbers come from a generator of our own, put in
place of torch's global one for this thread, so that a block depends on the seed and on itself only.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from outsize.block import Block, Piece
from outsize.errors import ModelError
from outsize.model.names import parameter_aliases, parameter_shapes
from outsize.model.skeleton import constructed_values

_PROBE_ROWS = 8


class InitSource:
    """Initial values by the model's own rules: a function of `seed` and the block alone.

    `module` is copied as a tree, without its data, and not changed. A read uses memory for the block in
    float32. Rows of a table have the table's distribution, not its values. The caller's random state is
    neither used nor changed.

    Raises ModelError, when read, where the model's own code leaves a parameter without a value.
    """

    def __init__(self, module: nn.Module, seed: int) -> None:
        self._seed = seed
        self._lock = threading.Lock()
        self._computed: dict[str, bool] = {}
        self._tree = _meta_copy(module)
        self._shapes = parameter_shapes(module)
        self._constructed = constructed_values(module)
        self._owners = _owners(self._tree, parameter_aliases(module), _tie_sources(module))
        self._order = list(_rules(self._tree))
        self._parents = _ancestors(self._tree)

    def read(self, block: Block, targets: Sequence[torch.Tensor]) -> None:
        """Fill one tensor per piece of `block`."""
        if any(self._is_computed(piece) for piece in block.pieces):
            values = [
                self._initialise(self._whole(piece))[0][piece.row_start : piece.row_stop]
                for piece in block.pieces
            ]
        else:
            values = self._initialise(block)
        for piece, value, target in zip(block.pieces, values, targets, strict=True):
            if bool(value.isnan().any()):
                raise ModelError(
                    f"{type(self._tree).__name__} gives no initial value to {piece.parameter}",
                    hint="load a checkpoint instead, or initialise it in the model's _init_weights",
                )
            target.copy_(value)

    def stored_dtype(self, piece: Piece) -> torch.dtype | None:
        """None: values are computed."""
        return None

    def conversion_bytes(self, piece: Piece) -> int:
        """The parameter in fp32, and what it is computed from."""
        return 8 * piece.num_elements

    def is_random(self, parameter: str) -> bool:
        """Whether the rules draw `parameter`; False where its values follow from the model's config.

        Takes memory for the first rows of it, or for all of it where the rules need it whole.
        """
        drawn = self._draw_twice(self._first_rows(parameter))
        if drawn is None:
            drawn = self._draw_twice(Piece(parameter, self._shapes[parameter]))
        return drawn is None or not torch.equal(*drawn)

    def gives_rows(self, parameter: str) -> bool:
        """Never: rows of a table have values of their own wherever it is cut."""
        return False

    def check(self) -> None:
        """Nothing to check."""

    @property
    def bytes_read(self) -> int:
        """None."""
        return 0

    def close(self) -> None:
        """Nothing to let go of."""

    def _is_computed(self, piece: Piece) -> bool:
        """Whether a table's rows follow from their place (sinusoidal positions), so that it takes the whole
        table.

        Found by drawing its first rows twice: they are random, or all the same, or computed.
        """
        if piece.is_whole:
            return False
        if piece.parameter not in self._computed:
            drawn = self._draw_twice(self._first_rows(piece.parameter))
            self._computed[piece.parameter] = drawn is None or (
                torch.equal(*drawn) and not bool((drawn[0] == drawn[0][:1]).all())
            )
        return self._computed[piece.parameter]

    def _first_rows(self, parameter: str) -> Piece:
        shape = self._shapes[parameter]
        if not shape:
            return Piece(parameter, shape)
        count = min(_PROBE_ROWS, shape[0])
        return Piece(parameter, (count, *shape[1:]), 0, count)

    def _draw_twice(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Values of `piece` from two generators; None where the rules fail on it."""
        try:
            one, other = (self._initialise(Block(name, (piece,)))[0] for name in ("one", "other"))
        except ModelError:
            return None
        return one, other

    def _whole(self, piece: Piece) -> Block:
        return Block(piece.parameter, (Piece(piece.parameter, self._shapes[piece.parameter]),))

    def _initialise(self, block: Block) -> list[torch.Tensor]:
        owners = [self._owners[piece.parameter] for piece in block.pieces]
        wanted = {id(module) for owner, _ in owners for module in self._parents[id(owner)]}
        text = "|".join(
            [str(self._seed), block.name, *(f"{p.parameter}:{p.row_start}" for p in block.pieces)]
        )
        digest = hashlib.sha256(text.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        with (
            self._lock,
            _real(block.pieces, owners, self._constructed) as values,
            _OwnRandom(generator),
            torch.no_grad(),
        ):
            for module, rule in self._order:
                if id(module) not in wanted:
                    continue
                if any(owner is module for owner, _ in owners):
                    _reset(module)
                try:
                    rule(module)
                except Exception as error:
                    raise ModelError(
                        f"{type(self._tree).__name__}: initialising {type(module).__name__} "
                        f"for block {block.name} failed: {error}"
                    ) from error
            return [value.detach() for value in values]


def _reset(module: nn.Module) -> None:
    """What the constructors of torch's layers do, and of the one layer of transformers that draws in its
    own."""
    if isinstance(module, Conv1D):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
        return
    for name in ("reset_parameters", "_reset_parameters"):
        method = getattr(module, name, None)
        if callable(method):
            method()
            return


def _meta_copy(module: nn.Module) -> nn.Module:
    """A deep copy of the tree with fresh meta parameters, none tied, and meta buffers."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = _meta_parameter(parameter.shape)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    return copy.deepcopy(module, memo)


def _meta_parameter(shape: Sequence[int]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"), requires_grad=False)


def _tie_sources(module: nn.Module) -> set[str]:
    return set((getattr(module, "all_tied_weights_keys", None) or {}).values())


def _owners(
    tree: nn.Module, aliases: Mapping[str, Sequence[str]], sources: set[str]
) -> dict[str, tuple[nn.Module, str]]:
    """The module and attribute that rule over each parameter; other places that share it get one of their
    own."""
    modules = dict(tree.named_modules(remove_duplicate=False))
    owners: dict[str, tuple[nn.Module, str]] = {}
    for first, names in aliases.items():
        chosen = next((name for name in names if name in sources), first)
        path, _, attribute = chosen.rpartition(".")
        owners[first] = modules[path], attribute
        for name in names:
            path, _, other = name.rpartition(".")
            if (modules[path], other) != owners[first]:
                shape = modules[path]._parameters[other].shape
                modules[path]._parameters[other] = _meta_parameter(shape)
    return owners


def _rules(tree: nn.Module) -> Iterator[tuple[nn.Module, Callable[[nn.Module], None]]]:
    """Every module, children first, with the `_init_weights` of the innermost Hugging Face model around
    it."""
    seen: set[int] = set()

    def visit(
        module: nn.Module, rule: Callable[[nn.Module], None]
    ) -> Iterator[tuple[nn.Module, Callable[[nn.Module], None]]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, transformers.PreTrainedModel):
            rule = module._init_weights
        for child in module.children():
            yield from visit(child, rule)
        yield module, rule

    yield from visit(tree, lambda module: None)


def _ancestors(tree: nn.Module) -> dict[int, list[nn.Module]]:
    """Each module with all modules around it, over every path that leads to it."""
    found: dict[int, list[nn.Module]] = {}

    def visit(module: nn.Module, above: list[nn.Module]) -> None:
        path = [*above, module]
        known = found.setdefault(id(module), [])
        known += [entry for entry in path if not any(entry is other for other in known)]
        for child in module.children():
            visit(child, path)

    visit(tree, [])
    return found


@contextmanager
def _real(
    pieces: Sequence[Piece], owners: Sequence[tuple[nn.Module, str]], constructed: Mapping[str, torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """Put real float32 parameters in place, with their constructor's values or NaN; meta again afterwards."""
    before = [owner._parameters[attribute] for owner, attribute in owners]
    padding: list[tuple[nn.Embedding, int]] = []
    values: list[torch.Tensor] = []
    try:
        for piece, (owner, attribute) in zip(pieces, owners, strict=True):
            value = nn.Parameter(
                torch.full(piece.shape, float("nan"), dtype=torch.float32, device="cpu"), requires_grad=False
            )
            if piece.parameter in constructed:
                start = constructed[piece.parameter]
                value.data.copy_(start if piece.is_whole else start[piece.row_start : piece.row_stop])
            owner._parameters[attribute] = value
            values.append(value)
            if (
                isinstance(owner, nn.Embedding)
                and owner.padding_idx is not None
                and piece.row_start is not None
            ):
                padding.append((owner, owner.padding_idx))
                inside = piece.row_start <= owner.padding_idx < (piece.row_stop or 0)
                owner.padding_idx = owner.padding_idx - piece.row_start if inside else None
        yield values
    finally:
        for (owner, attribute), parameter in zip(owners, before, strict=True):
            owner._parameters[attribute] = parameter
        for embedding, index in padding:
            embedding.padding_idx = index


_IN_PLACE = {
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.random_,
    torch.Tensor.bernoulli_,
    torch.Tensor.exponential_,
    torch.Tensor.log_normal_,
    torch.Tensor.cauchy_,
    torch.Tensor.geometric_,
}
_NN_INIT = {nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}
"""Functions of torch that reach a mode themselves, before the in-place function that they call."""

_FACTORIES = {
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.normal,
    torch.bernoulli,
    torch.multinomial,
}
_FLOAT_FACTORIES = {torch.rand, torch.randn}
_LIKE = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}


class _OwnRandom(TorchFunctionMode):
    """Random functions draw from `generator`, in this thread only; on a meta tensor they draw nothing."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _IN_PLACE or func in _NN_INIT:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
            kwargs["generator"] = self.generator
        elif func in _LIKE:
            like = args[0]
            kwargs = {"dtype": like.dtype, "device": like.device} | kwargs
            kwargs.pop("memory_format", None)
            func, args = _LIKE[func], (tuple(like.shape),)
        if func in _FACTORIES and str(kwargs.get("device") or "cpu") == "cpu":
            kwargs["generator"] = self.generator
        if func in _FLOAT_FACTORIES:
            kwargs["dtype"] = kwargs.get("dtype") or torch.float32
        return func(*args, **kwargs)
