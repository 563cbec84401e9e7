"""The import direction of the design: every file has a layer and imports only from layers to its left."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import retain

PACKAGE = Path(retain.__file__).parent

# left to right; a module imports from its own layer or from layers to the left
LAYERS = [
    {"types", "files", "plain", "values", "signals"},
    {"stream", "order"},
    {"data", "adapters"},
    {"models"},
    {"method"},
    {"merge", "metrics"},
    {"methods"},
    {"run"},
    {"federated", "benchmarks", "pocket", "report", "serve"},
    {"config"},
    {"assemble"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
ORDER = {name: i for i, layer in enumerate(LAYERS) for name in layer}
APART = {"models": {"method", "methods"}, "methods": {"run", "methods"}}
"""Beyond the order: models know no method; methods import neither each other nor the trainer."""

DOORS = {("retain.method", "retain.methods"), ("retain.federated.server", "retain.federated.servers")}
"""A registry imports the package of what registers when it is asked what there is; it names none of them."""


def layer_of(module: str) -> str:
    """`retain.models.hf` -> `models`."""
    parts = module.split(".")[1:]
    return parts[0] if parts else ""


def imports(path: Path) -> list[str]:
    """Every module of ours that a file imports, at the top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] == "retain"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            if node.module == "retain":
                found += [f"retain.{a.name}" for a in node.names]
            elif node.module and node.module.startswith("retain."):
                inner = [f"{node.module}.{a.name}" for a in node.names]
                parts = [n for n in inner if (PACKAGE.parent / (n.replace(".", "/") + ".py")).is_file()]
                found += parts if len(parts) == len(inner) else [node.module, *parts]
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_left(path: Path) -> None:
    module = module_of(path)
    here = layer_of(module)
    assert here in ORDER, f"{module}: give it a layer in tests/test_layers.py and in docs/design.md"
    for name in imports(path):
        there = layer_of(name)
        if there not in ORDER:  # `from retain import __version__`, or a public name of the package
            assert here in ("cli", "__main__") or name == "retain.__version__", f"{module} imports {name}"
            continue
        if (module, name) in DOORS:
            continue
        assert ORDER[there] <= ORDER[here], (
            f"{module} ({here}) imports {name} ({there}), which lies to its right"
        )
        forbidden = there in APART.get(here, set()) and not _own_part(module, name)
        assert not forbidden, f"{module} may not import {name}"


def _own_part(module: str, name: str) -> bool:
    """Helpers that methods share start with an underscore."""
    return name.startswith("retain.methods._") or module == "retain.methods"


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A chain of modules that ends where it began, or nothing."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        found = next((c for to in sorted(arrows.get(module, ())) if (c := walk(to, [*trail, module]))), [])
        done.add(module)
        return found

    return next((c for module in sorted(arrows) if (c := walk(module, []))), [])


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = {module_of(p) for p in FILES}
    arrows = {module_of(p): {n for n in imports(p) if n in known} for p in FILES}
    for module, name in DOORS:
        arrows[module].discard(name)
    assert circle(arrows) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_it_can_fail() -> None:
    assert ORDER["run"] > ORDER["models"] and ORDER["__main__"] == max(ORDER.values())
    source = "from retain.cli import main\ndef f():\n    import retain.run.train\n"
    found = [n for node in ast.walk(ast.parse(source)) for n in _names(node)]
    assert found == ["retain.cli", "retain.run.train"]


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [a.name for a in node.names] if isinstance(node, ast.Import) else []


def test_only_config_and_cli_name_methods() -> None:
    """No file outside methods/, config and cli compares with a method's name."""
    from retain.method import available

    names = set(available()) - {"lora"}  # `lora` is also the kind of an adapter and a group of learning rates
    for path in FILES:
        if layer_of(module_of(path)) in {"methods", "config", "cli", "benchmarks", "report"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                words = {
                    c.value
                    for c in ast.walk(node)
                    if isinstance(c, ast.Constant) and isinstance(c.value, str)
                }
                assert not words & names, f"{path}: asks for the method {words & names}; a hook is missing"
