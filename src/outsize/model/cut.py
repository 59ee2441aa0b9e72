"""Cutting a model into blocks, from its module tree alone: no forward, no data, no knowledge of
architectures.

Decoder layers are found by the classes a model says must not be split (`_no_split_modules`, what accelerate
places by), or by lists of equal modules. Vocabulary tables are cut by rows, so that no block is larger than a
layer. The rest is grouped by the outermost module that holds no other point.

It does not hold where a module's parameters are used without calling the module: such a use meets a
placeholder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from outsize.block import Block, Piece
from outsize.errors import ModelError
from outsize.model.names import full_precision_names
from outsize.model.points import Binding, Cut, Point, PointKind

ROWS = 64
"""Row blocks hold a multiple of this many rows (the last one may hold fewer)."""

_FULL_PRECISION = "_fp32"
"""Ends the name of the block that holds a layer's fp32 parameters, beside the layer's own."""

_Key = tuple[int, ...]
"""Sorts blocks: the first point that uses one, whether points share it or it holds rows, its number there."""


def cut(module: nn.Module, max_rows_elements: int | None = None) -> Cut:
    """Name the blocks of `module` and the points where its forward needs them; `module` is not changed.

    Row blocks hold at most `max_rows_elements` elements (by default, as many as the largest layer), but at
    least 64 rows. Pieces of a table always have rows, even where one block holds the whole table. A block holds either
    parameters that stay in fp32 (`full_precision_names`) or others, never both: a point may have one of each.

    Raises ModelError where a parameter is no floating-point tensor, or the model has no parameters.
    """
    return _Cutter(module, max_rows_elements).cut()


@dataclass
class _Draft:
    """A point while it is being found; `order` is its place in the module tree."""

    path: str
    kind: PointKind
    order: int
    is_layer: bool = False
    bindings: list[Binding] = field(default_factory=list)

    @property
    def parameters(self) -> list[str]:
        return list(dict.fromkeys(binding.parameter for binding in self.bindings))


class _Cutter:
    def __init__(self, root: nn.Module, max_rows_elements: int | None) -> None:
        self.root = root
        self.max_rows_elements = max_rows_elements
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.order = {path: index for index, path in enumerate(self.paths.values())}
        self.first_name: dict[int, str] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in root.named_parameters():
            if not parameter.is_floating_point():
                raise ModelError(
                    f"parameter {name} has type {parameter.dtype}, expected a floating-point type",
                    hint="use the original checkpoint instead of a quantised one",
                )
            self.first_name[id(parameter)] = name
            self.parameters[name] = parameter
        if not self.parameters:
            raise ModelError(f"{type(root).__name__} has no parameters")
        self.full_precision = full_precision_names(root) & self.parameters.keys()

    def cut(self) -> Cut:
        layers = self._layers()
        self.largest = max((self._size(layer) for layer in layers), default=0)
        drafts = {self.paths[id(layer)]: self._subtree_draft(layer, is_layer=True) for layer in layers}
        drafts |= self._tables(drafts)
        self._rest(self.root, "", drafts)
        points = sorted(drafts.values(), key=lambda draft: draft.order)
        row_tables = self._keep_row_tables(points)
        return self._name_blocks(points, row_tables)

    # Layers

    def _layers(self) -> list[nn.Module]:
        inputs = _input_embedding(self.root)
        names = _no_split_classes(self.root)
        found: list[nn.Module] = []

        def visit(module: nn.Module) -> None:
            splits = inputs is not None and any(child is inputs for child in module.modules())
            if (
                module is not self.root
                and type(module).__name__ in names
                and not splits
                and self._size(module)
            ):
                found.append(module)
                return
            for child in module.children():
                visit(child)

        if names:
            visit(self.root)
        found = list({id(module): module for module in found}.values())
        if not any(self._is_listed(module) for module in found):
            listed = self._listed_layers(2, found) or self._listed_layers(1, found)
        else:
            half = max(map(self._size, found)) / 2
            listed = [group for group in self._listed_layers(2, found) if sum(map(self._size, group)) > half]
        found += [module for group in listed for module in group]
        return sorted(found, key=lambda module: self.order[self.paths[id(module)]])

    def _is_listed(self, module: nn.Module) -> bool:
        path = self.paths[id(module)]
        parent = self.root.get_submodule(path.rpartition(".")[0])
        return isinstance(parent, (nn.ModuleList, nn.Sequential))

    def _listed_layers(self, least: int, found: list[nn.Module]) -> list[list[nn.Module]]:
        """Outermost lists with at least `least` members of one class, clear of `found`: every list that
        counts."""
        taken = {id(module) for module in found}
        groups: list[tuple[nn.Module, list[nn.Module], type[nn.Module]]] = []

        def visit(module: nn.Module) -> None:
            if id(module) in taken:
                return
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and _runs_members(module):
                members = [child for child in module.children() if self._size(child)]
                classes = [type(member) for member in members]
                most = max(classes, key=classes.count, default=None)
                inside = {id(child) for child in module.modules()}
                if most is not None and classes.count(most) >= least and not inside & taken:
                    groups.append((module, members, most))
                    return
            for child in module.children():
                visit(child)

        visit(self.root)
        if not groups:
            return []
        longest = max(groups, key=lambda group: len(group[1]))
        return [
            members
            for module, members, kind in groups
            if isinstance(module, nn.ModuleList) or module is longest[0] or kind is longest[2]
        ]

    # Tables

    def _tables(self, layers: dict[str, _Draft]) -> dict[str, _Draft]:
        inside_layers = {id(child) for path in layers for child in self.root.get_submodule(path).modules()}
        inputs, head = _input_embedding(self.root), _output_head(self.root)
        drafts: dict[str, _Draft] = {}
        for path, module in self.root.named_modules():
            if id(module) in inside_layers:
                continue
            if isinstance(module, nn.Embedding):
                plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
                alone = [name for name, _ in module.named_parameters()] == ["weight"]
                if self.first_name[id(module.weight)] in self.full_precision:
                    continue  # rows of a table compute in the type of all other rows
                if plain and alone and (module is inputs or module.weight.numel() > self.largest / 2):
                    drafts[path] = self._subtree_draft(module, PointKind.EMBEDDING)
            elif head is not None and module is head and not self._has_full_precision(head):
                drafts[path] = self._subtree_draft(module, PointKind.HEAD)
        return drafts

    def _keep_row_tables(self, points: list[_Draft]) -> dict[str, str | None]:
        """Tables that are cut by rows, each with its head's bias; other points become plain layers.

        A table that some other module needs whole is not cut. The one exception is a bias that an ancestor of
        the head holds under a second name (BERT's `predictions.bias`): only the head uses it.
        """
        tables: dict[str, str | None] = {}
        for point in points:
            if point.kind in (PointKind.EMBEDDING, PointKind.HEAD):
                by_attribute = {binding.attribute: binding.parameter for binding in point.bindings}
                bias = by_attribute.get("bias")
                if bias is not None:
                    for other in points:
                        if other.kind is PointKind.LOOSE and _is_inside(point.path, other.path):
                            other.bindings = [b for b in other.bindings if b.parameter != bias]
                tables[by_attribute["weight"]] = tables.get(by_attribute["weight"]) or bias
        for point in points:
            if point.kind in (PointKind.LAYER, PointKind.LOOSE):
                for name in point.parameters:
                    tables.pop(name, None)
                    for table in [table for table, bias in tables.items() if bias == name]:
                        tables.pop(table)
        for point in points:
            if point.kind in (PointKind.EMBEDDING, PointKind.HEAD) and not set(point.parameters) & set(
                tables
            ):
                point.kind = PointKind.LAYER
        points[:] = [point for point in points if point.bindings]
        return tables

    # The rest

    def _rest(self, module: nn.Module, path: str, drafts: dict[str, _Draft]) -> None:
        if path in drafts or not self._size(module):
            return
        own = list(_owned(module, path))
        holds_points = any(_is_inside(other, path) for other in drafts)
        callable_ = not _is_container(module)
        whole = callable_ and not holds_points and (own or self._size(module) <= self.largest)
        if whole and path != "":
            drafts[path] = self._subtree_draft(module)
            return
        if own:
            bindings = [self._binding(*entry) for entry in own]
            drafts[path] = _Draft(path, PointKind.LOOSE, self.order[path], bindings=bindings)
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            if isinstance(child, (nn.ParameterList, nn.ParameterDict)) or child_path not in self.order:
                continue
            self._rest(child, child_path, drafts)

    def _subtree_draft(
        self, module: nn.Module, kind: PointKind = PointKind.LAYER, is_layer: bool = False
    ) -> _Draft:
        path = self.paths[id(module)]
        draft = _Draft(path, kind, self.order[path], is_layer)
        for inner_path, inner in module.named_modules(prefix=path):
            for name, parameter in inner._parameters.items():
                if parameter is not None:
                    draft.bindings.append(self._binding(inner_path, name, parameter))
        return draft

    def _binding(self, path: str, attribute: str, parameter: nn.Parameter) -> Binding:
        return Binding(path, attribute, self.first_name[id(parameter)])

    def _has_full_precision(self, module: nn.Module) -> bool:
        return any(self.first_name[id(parameter)] in self.full_precision for parameter in module.parameters())

    def _size(self, module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    # Names

    def _name_blocks(self, points: list[_Draft], tables: dict[str, str | None]) -> Cut:
        users: dict[str, list[int]] = {}
        for index, point in enumerate(points):
            for name in point.parameters:
                users.setdefault(name, []).append(index)
        rows = self._row_blocks(points, tables, users)
        blocks = [entry for row_blocks in rows.values() for entry in row_blocks]
        listing: list[list[tuple[_Key, str]]] = [[] for _ in points]
        for name, row_blocks in rows.items():
            for index in users[name]:
                listing[index] += [(key, block.name) for key, block in row_blocks]

        groups: dict[tuple[tuple[int, ...], bool], list[str]] = {}
        in_rows = set(tables) | {bias for bias in tables.values() if bias is not None}
        for name, indices in users.items():
            if name not in in_rows:
                groups.setdefault((tuple(indices), name in self.full_precision), []).append(name)
        layer_labels = self._layer_labels(points)
        used = {block.name for _, block in blocks} | set(layer_labels.values())
        full_precision: set[str] = set()
        for (members, is_full), names in sorted(groups.items()):
            if len(members) == 1 and members[0] in layer_labels:
                label = layer_labels[members[0]]
                if is_full and (members, False) in groups:
                    label += _FULL_PRECISION
            else:
                label = _unique(points[members[0]].path if len(members) == 1 else _common_path(names), used)
            used.add(label)
            if is_full:
                full_precision.add(label)
            key = (members[0], 0 if len(members) > 1 else 2, len(blocks))
            pieces = tuple(Piece(name, tuple(self.parameters[name].shape)) for name in names)
            blocks.append((key, Block(label, pieces)))
            for index in members:
                listing[index].append((key, label))

        return Cut(
            tuple(block for _, block in sorted(blocks, key=lambda entry: entry[0])),
            tuple(
                Point(
                    point.path, point.kind, tuple(label for _, label in sorted(listed)), tuple(point.bindings)
                )
                for point, listed in zip(points, listing, strict=True)
            ),
            frozenset(full_precision),
        )

    def _row_blocks(
        self, points: list[_Draft], tables: dict[str, str | None], users: dict[str, list[int]]
    ) -> dict[str, list[tuple[_Key, Block]]]:
        """Blocks of rows of each table: E00, E01, ... of those that embed, H00, H01, ... of other heads."""
        embeds = {
            binding.parameter
            for point in points
            if point.kind is PointKind.EMBEDDING
            for binding in point.bindings
        }
        found: dict[str, list[tuple[_Key, Block]]] = {name: [] for name in users if name in tables}
        for letter in "EH":
            rows = [
                (name, number, pieces)
                for name in found
                if (name in embeds) == (letter == "E")
                for number, pieces in enumerate(self._rows(name, tables[name]))
            ]
            labels = _numbered(letter, len(rows))
            for label, (name, number, pieces) in zip(labels, rows, strict=True):
                found[name].append(((users[name][0], 1, number), Block(label, pieces)))
        return found

    def _layer_labels(self, points: list[_Draft]) -> dict[int, str]:
        """L00, L01, ... for layers that a list holds, by the index of their point."""
        layers = [
            index for index, point in enumerate(points) if point.is_layer and self._is_listed_path(point.path)
        ]
        return dict(zip(layers, _numbered("L", len(layers)), strict=True))

    def _is_listed_path(self, path: str) -> bool:
        return path != "" and self._is_listed(self.root.get_submodule(path))

    def _rows(self, table: str, bias: str | None) -> Iterator[tuple[Piece, ...]]:
        shape = tuple(self.parameters[table].shape)
        num_rows = shape[0]
        width = self.parameters[table].numel() // max(num_rows, 1) + (bias is not None)
        limit = self.max_rows_elements or self.largest or self.parameters[table].numel()
        step = max(ROWS, limit // max(width, 1) // ROWS * ROWS)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            pieces = [Piece(table, (stop - start, *shape[1:]), start, stop)]
            if bias is not None:
                pieces.append(Piece(bias, (stop - start,), start, stop))
            yield tuple(pieces)


def _no_split_classes(root: nn.Module) -> set[str]:
    value = getattr(root, "_no_split_modules", None)
    return {value} if isinstance(value, str) else set(value or ())


def _input_embedding(root: nn.Module) -> nn.Module | None:
    found = _ask(root, "get_input_embeddings")
    return found if isinstance(found, nn.Embedding) else None


def _output_head(root: nn.Module) -> nn.Module | None:
    found = _ask(root, "get_output_embeddings")
    return found if type(found) is nn.Linear and found.weight.dim() == 2 else None


def _ask(root: nn.Module, method: str) -> object:
    """What the model answers; None where it has no such method, or says that it has no answer."""
    try:
        return getattr(root, method, lambda: None)()
    except (NotImplementedError, AttributeError):
        return None


def _is_container(module: nn.Module) -> bool:
    """Whether `module` only holds others: nothing calls it, so it cannot be a point."""
    return type(module).forward is nn.Module.forward or isinstance(
        module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    )


def _runs_members(module: nn.Module) -> bool:
    return all(not _is_container(child) for child in module.children())


def _owned(module: nn.Module, path: str) -> Iterable[tuple[str, str, nn.Parameter]]:
    """`(path, attribute, parameter)` of what `module` owns itself, directly or through a parameter list."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield path, name, parameter
    for name, child in module.named_children():
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            yield from _owned(child, f"{path}.{name}" if path else name)


def _is_inside(path: str, outer: str) -> bool:
    return path != outer and (outer == "" or path.startswith(outer + "."))


def _common_path(names: list[str]) -> str:
    """The module that all these parameters are in, or the parameter itself."""
    common = names[0].split(".")
    for name in names[1:]:
        parts = name.split(".")
        while common != parts[: len(common)]:
            common.pop()
    return ".".join(common)


def _numbered(letter: str, count: int) -> list[str]:
    """Names of `count` blocks, their numbers in as many digits as the last one needs, two at least."""
    width = max(2, len(str(count - 1)))
    return [f"{letter}{number:0{width}d}" for number in range(count)]


def _unique(path: str, used: set[str]) -> str:
    """A short name for the module or parameter at `path`: as many of its last parts as make it unique."""
    parts = [re.sub(r"\W", "_", part) for part in path.split(".")] if path else ["root"]
    for count in range(1, len(parts) + 1):
        name = "_".join(parts[-count:])
        if name not in used and not name.isdigit() and not re.fullmatch(r"[ELH]\d+", name):
            return name
    number = 2
    while f"{name}_{number}" in used:
        number += 1
    return f"{name}_{number}"
