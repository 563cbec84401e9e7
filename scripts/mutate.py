"""Small faults: the syntax tree of a source file with one change (for `scripts/mutants.py`).

No change touches annotations, decorators, docstrings, messages of errors or what a run tells in its events.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "retain"

COMPARE: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}  # fmt: skip
BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
OTHER = {
    "min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmin": "argmax", "argmax": "argmin", "any": "all",
    "all": "any", "floor": "ceil", "ceil": "floor", "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like",
    "ones_like": "zeros_like", "mean": "sum", "sum": "mean", "startswith": "endswith", "endswith": "startswith",
    "sum_": "mean",
}  # fmt: skip
LEFT_OUT = {
    "detach", "abs", "square", "sqrt", "float", "double", "clone", "copy", "clamp", "flip", "lower", "strip", "log",
    "exp", "cumsum", "t", "rstrip", "lstrip", "casefold",
}  # fmt: skip
UNWRAPPED = {"sorted", "reversed", "abs", "set", "round", "as_shadow", "unit"}
SILENT = {"strict", "device", "names", "backend", "local_files_only", "return_tensors"}
"""Keywords whose absence no correct run can show."""
UNTOUCHED = {"log", "field", "RetainError"}
"""Calls that are left as they are: what a run tells, and declarations."""
COMMUTE = {"min", "max", "sdot", "_foreach_mul", "maximum", "minimum", "isclose", "gcd"}


@dataclass(frozen=True)
class Mutant:
    """One change: where, what stood there and what stands there now; `code()` is the changed module."""

    file: str
    line: int
    where: str
    kind: str
    was: str
    now: str
    nth: int
    code: Callable[[], types.CodeType]

    @property
    def key(self) -> str:
        """Its name in reports and in the list of equivalents; it outlives edits elsewhere in the file."""
        more = f" #{self.nth}" if self.nth else ""
        return f"{self.file} {self.where}: {self.was} -> {self.now}{more}"


def mutants(file: str) -> list[Mutant]:
    """All mutants of a source file, `methods/ewc.py`, in the order of the text."""
    path = PACKAGE / file
    tree = ast.parse(path.read_text())
    found, met = [], dict[tuple[str, ...], int]()

    def maker(place: tuple[Any, str, int | None], node: Any, new: Any) -> Callable[[], types.CodeType]:
        def make() -> types.CodeType:
            _put(*place, ast.fix_missing_locations(ast.copy_location(new, node)))
            code = compile(tree, str(path), "exec", dont_inherit=True)
            _put(*place, node)
            return code

        return make

    for parent, name, at, where in _places(tree, ""):
        node = getattr(parent, name) if at is None else getattr(parent, name)[at]
        for kind, new in _changes(node, parent, name):
            was, now = _said(node), _said(new)
            if was == now:
                continue
            same = (where, was, now)
            met[same] = met.get(same, -1) + 1
            code = maker((parent, name, at), node, new)
            found.append(Mutant(file, node.lineno, where, kind, was, now, met[same], code))
    return found


def _put(parent: Any, name: str, at: int | None, node: ast.AST) -> None:
    if at is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[at] = node


def _said(node: ast.AST) -> str:
    if isinstance(node, ast.If | ast.While):
        node = ast.Expr(node.test)
    elif isinstance(node, ast.With):
        node = _like(node, body=[ast.Expr(ast.Constant(...))])
    text = " ".join(ast.unparse(ast.fix_missing_locations(node)).split())
    return text if len(text) <= 90 else f"{text[:60]} … {text[-27:]}"


def _places(node: ast.AST, where: str) -> Iterator[tuple[Any, str, int | None, str]]:
    """Every place of the tree whose node may change: no annotations, messages, decorators or docstrings."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params", "ctx"):
            continue
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Call) and _named(node.func) in UNTOUCHED:
            continue
        for at, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST):
                continue
            if hasattr(child, "lineno") and not _untouched(child):
                yield node, name, at, where
            inner = where
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{where}.{child.name}".lstrip(".")
            yield from _places(child, inner)


def _untouched(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _named(node.func) in UNTOUCHED


def _named(func: ast.AST) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def _like(node: Any, **fields: Any) -> Any:
    """A shallow copy with other fields."""
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})


def _swapped(items: Sequence[Any], i: int, j: int) -> list[Any]:
    out = list(items)
    out[i], out[j] = out[j], out[i]
    return out


def _changes(node: Any, parent: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in a node's place."""
    if isinstance(node, ast.expr):
        yield from _expressions(node, parent, name)
    elif isinstance(node, ast.stmt):
        yield from _statements(node)


def _expressions(node: Any, parent: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for new in COMPARE[type(op)]:
                yield "compare", _like(node, ops=[*node.ops[:i], new(), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BinOp):
        if type(node.op) in BINARY:
            yield "arithmetic", _like(node, op=BINARY[type(node.op)]())
        if isinstance(node.op, ast.Sub) and isinstance(node.left, ast.Constant):
            yield "1 -", node.right
        if isinstance(node.op, ast.MatMult):
            yield "swap", _like(node, left=node.right, right=node.left)
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, ast.Not | ast.USub) and not isinstance(node.operand, ast.Constant):
            yield "not", node.operand
        elif isinstance(node.op, ast.USub):
            yield "constant", ast.Constant(0) if node.operand.value == 1 else node.operand
    elif isinstance(node, ast.BoolOp):
        yield "and/or", _like(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for i in range(len(node.values)):
            rest = [v for j, v in enumerate(node.values) if j != i]
            yield "condition", rest[0] if len(rest) == 1 else _like(node, values=rest)
    elif isinstance(node, ast.IfExp):
        yield "branches", _like(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Constant):
        inside = isinstance(parent, ast.UnaryOp | ast.keyword) and getattr(parent, "arg", "") in SILENT
        if not inside and not isinstance(parent, ast.UnaryOp):
            yield from _constants(node)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        for end in ("lower", "upper"):
            if getattr(node.slice, end) is not None:
                yield "slice", _like(node, slice=_like(node.slice, **{end: None}))
    elif isinstance(node, ast.Subscript):
        if isinstance(node.slice, ast.Constant) and node.slice.value == 0 and type(node.slice.value) is int:
            yield "first/last", _like(node, slice=ast.UnaryOp(ast.USub(), ast.Constant(1)))
        elif ast.unparse(node.slice) == "-1":
            yield "first/last", _like(node, slice=ast.Constant(0))
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield "left out", node.value
    elif isinstance(node, ast.Tuple) and isinstance(parent, ast.Return | ast.Yield) and len(node.elts) > 1:
        yield "swap", _like(node, elts=_swapped(node.elts, 0, 1))
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.DictComp | ast.SetComp):
        for i, gen in enumerate(node.generators):
            for j in range(len(gen.ifs)):
                less = _like(gen, ifs=[c for k, c in enumerate(gen.ifs) if k != j])
                gens = [*node.generators[:i], less, *node.generators[i + 1 :]]
                yield "condition", _like(node, generators=gens)


def _constants(node: ast.Constant) -> Iterator[tuple[str, ast.AST]]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield "constant", ast.Constant(value + 1)
        if value > 1:
            yield "constant", ast.Constant(value - 1)
    elif isinstance(value, float):
        yield "constant", ast.Constant(value * 2 if value else 1.0)


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    called, func = _named(node.func), node.func
    if called in OTHER:
        other = OTHER[called]
        if isinstance(func, ast.Attribute):
            yield "other", _like(node, func=_like(func, attr=other))
        elif hasattr(builtins, other):
            yield "other", _like(node, func=ast.Name(other, ast.Load()))
    if (
        isinstance(func, ast.Attribute)
        and called in LEFT_OUT
        and ast.unparse(func.value) not in ("torch", "math", "np")
    ):
        yield "left out", func.value
    if (
        called in UNWRAPPED
        and len(node.args) == 1
        and not isinstance(node.args[0], ast.GeneratorExp | ast.Starred)
    ):
        inside = node.args[0]
        yield (
            "left out",
            ast.Call(ast.Name("list", ast.Load()), [inside], []) if called == "reversed" else inside,
        )
    if (
        len(node.args) > 1
        and called not in COMMUTE
        and not any(isinstance(a, ast.Starred | ast.Constant) for a in node.args[:2])
    ):
        yield "swap", _like(node, args=_swapped(node.args, 0, 1))
    for i, keyword in enumerate(node.keywords):
        if keyword.arg and keyword.arg not in SILENT:
            yield "keyword", _like(node, keywords=[k for j, k in enumerate(node.keywords) if j != i])
    named = [i for i, k in enumerate(node.keywords) if k.arg and k.arg not in SILENT]
    for i, j in itertools.pairwise(named):
        a, b = node.keywords[i], node.keywords[j]
        both = list(node.keywords)
        both[i], both[j] = _like(a, value=b.value), _like(b, value=a.value)
        yield "swap", _like(node, keywords=both)


def _statements(node: Any) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield "condition", _like(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.AugAssign):
        yield "dropped", ast.Pass()
        if type(node.op) in BINARY:
            yield "arithmetic", _like(node, op=BINARY[type(node.op)]())
        yield "arithmetic", ast.Assign([node.target], node.value)
    elif isinstance(node, ast.Assign):
        target = node.targets[0]
        if isinstance(target, ast.Attribute | ast.Subscript):
            yield "dropped", ast.Pass()
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and len(target.elts) > 1:
            yield "swap", _like(node, value=_like(node.value, elts=_swapped(node.value.elts, 0, 1)))
    elif isinstance(node, ast.Expr):
        if isinstance(node.value, ast.Call) and _named(node.value.func) != "log":
            yield "dropped", ast.Pass()
    elif isinstance(node, ast.Raise | ast.Continue | ast.Break | ast.Delete):
        yield "dropped", ast.Pass()
    elif isinstance(node, ast.With):
        for i in (i for i in node.items if i.optional_vars is None):
            rest = [x for x in node.items if x is not i]
            yield "left out", _like(node, items=rest) if rest else ast.If(ast.Constant(True), node.body, [])
