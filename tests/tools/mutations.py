"""Small faults that can be put into a source file: each changes one place, as a slip of the hand would.

Comparisons are shifted or negated, integers are off by one, `and` becomes `or`, `min` becomes `max`, signs are swapped,
conditions are negated, statements are left out. Annotations, docstrings, assertions and the texts of messages stay.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_LEFT_OUT = (ast.AugAssign, ast.Raise, ast.Continue, ast.Break)


@dataclass(frozen=True, slots=True)
class Mutation:
    """Replaces `original`, which starts at byte `start` of the file at `path`, inside `function` (a qualified name)."""

    path: str
    function: str
    start: int
    original: str
    replacement: str
    number: int
    """Counts equal replacements inside one function, so that `key` is unique and outlives changes elsewhere in the file."""

    @property
    def key(self) -> str:
        original, replacement = (" ".join(text.split()) for text in (self.original, self.replacement))
        return f"{self.path}::{self.function}: {original} -> {replacement} #{self.number}"

    def apply(self, source: str) -> str:
        """`source` with the fault in it."""
        data, end = source.encode(), self.start + len(self.original.encode())
        assert data[self.start : end].decode() == self.original, self.key
        return (data[: self.start] + self.replacement.encode() + data[end:]).decode()


def mutations(path: str, source: str) -> list[Mutation]:
    """All mutations of a file, in the order of its text."""
    lines = [0]
    for line in source.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    numbers: Counter[tuple[str, str, str]] = Counter()
    found = []
    for node, function, replacement in _places(ast.parse(source), ""):
        original = ast.get_source_segment(source, node)
        assert original is not None and node.lineno is not None
        identity = (function, " ".join(original.split()), replacement)
        numbers[identity] += 1
        start = lines[node.lineno - 1] + node.col_offset
        found.append(Mutation(path, function, start, original, replacement, numbers[identity]))
    return sorted(found, key=lambda mutation: (mutation.start, len(mutation.original), mutation.replacement))


Place = tuple[ast.expr | ast.stmt, str, str]
"""A node, the function around it, and the text that replaces it."""


def _places(node: ast.AST, function: str) -> Iterator[Place]:
    inside = function
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        inside = f"{function}{node.name}.<locals>."
    elif isinstance(node, ast.ClassDef):
        inside = f"{function}{node.name}."
    name = function.removesuffix(".").removesuffix(".<locals>") or "<module>"
    if isinstance(node, ast.If | ast.While) and not isinstance(
        node.test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant
    ):
        yield node.test, name, _text(ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.expr):
        yield from ((node, name, text) for text in _expressions(node))
    elif isinstance(node, ast.stmt) and _can_be_left_out(node):
        yield node, name, "pass"
    for child in _children(node):
        yield from _places(child, inside)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below a node, without annotations, decorators, assertions and texts."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_params", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Assert | ast.JoinedStr):
                yield child


def _expressions(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _COMPARISONS:
            yield _text(ast.Compare(node.left, [_COMPARISONS[type(operator)]()], node.comparators))
        case ast.Compare():
            parts = [node.left, *node.comparators]
            for at, operator in enumerate(node.ops):
                if type(operator) in _COMPARISONS:
                    ops = [*node.ops[:at], _COMPARISONS[type(operator)](), *node.ops[at + 1 :]]
                    yield _text(ast.Compare(parts[0], ops, parts[1:]))
        case ast.BoolOp():
            yield _text(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
        case ast.UnaryOp(op=ast.Not()):
            yield _text(node.operand)
        case ast.BinOp() if type(node.op) in _OPERATORS and not _is_text(node):
            yield _text(ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right))
        case ast.Call(func=ast.Name(id=name)) if name in _FUNCTIONS:
            yield _text(ast.Call(ast.Name(_FUNCTIONS[name]), node.args, node.keywords))
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value)):
            yield str(value + 1)
        case ast.IfExp():
            yield _text(ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse))
    if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
        yield from _filters(node)


def _filters(node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> Iterator[str]:
    """Comprehensions without one of their conditions."""
    for generator in node.generators:
        for at in range(len(generator.ifs)):
            ifs, generator.ifs = generator.ifs, [test for n, test in enumerate(generator.ifs) if n != at]
            yield _text(node)
            generator.ifs = ifs


def _can_be_left_out(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Call()) | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return True
        case ast.Return(value=None | ast.Constant(value=None)):
            return True
    return isinstance(node, _LEFT_OUT)


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def _text(node: ast.expr) -> str:
    return f"({ast.unparse(ast.fix_missing_locations(node))})"
