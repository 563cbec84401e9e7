"""Docs that run: the ```python blocks of every page in order, one namespace a page; recipes; YAML blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from retain import config
from retain.assemble import build_method
from retain.method import REGISTRY, available

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of every block of a language."""
    text = page.read_text(encoding="utf-8")
    found = [m for m in BLOCK.finditer(text) if m[1] == language]
    return [(text[: m.start()].count("\n") + 2, m[2]) for m in found]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def own_registry() -> Iterator[None]:
    """Methods that a page registers are gone after it."""
    available()
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    for line, text in blocks(page, "python"):
        source = "\n" * (line - 1) + text  # so that a traceback names the page's own line
        exec(compile(source, str(page), "exec", dont_inherit=True), namespace)


def test_the_method_of_contributing_has_at_most_30_lines() -> None:
    _, text = blocks(ROOT / "CONTRIBUTING.md", "python")[0]
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) <= 30


@pytest.mark.usefixtures("own_registry")
def test_the_recipe_of_contributing_names_the_plugin(tmp_path: Path) -> None:
    (tmp_path / "anchor.py").write_text(blocks(ROOT / "CONTRIBUTING.md", "python")[0][1])
    (tmp_path / "r.yaml").write_text(blocks(ROOT / "CONTRIBUTING.md", "yaml")[0][1])
    parts = build_method(config.load(tmp_path / "r.yaml")).parts
    assert [p.name for p in parts] == ["lora", "anchor"] and parts[1].config() == {"weight": 0.05}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=name)
def test_yaml_blocks_are_recipes(page: Path, tmp_path: Path) -> None:
    """A whole recipe (with `model` and `method`) must load; its own files need not exist."""
    for line, text in blocks(page, "yaml"):
        data = yaml.safe_load(text)
        if not isinstance(data, dict) or not {"model", "method", "stream"} <= set(data):
            continue
        for plugin in data.get("plugins", []):
            (tmp_path / plugin).touch()
        path = tmp_path / "r.yaml"
        path.write_text(text)
        assert config.load(path).method, f"{page}, line {line}"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=name)
def test_every_recipe_loads_and_says_what_to_expect(recipe: Path) -> None:
    loaded = config.load(recipe)
    build_method(loaded)
    head = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("command:", "hardware:", "time:", "seeds:", "expected:"):
        assert any(word in line for line in head), f"{recipe}: its first lines must say {word}"
    assert loaded.out == Path("runs") / f"{recipe.parent.name}-{recipe.stem}"


def test_no_host_and_no_path_of_a_machine_in_what_ci_runs() -> None:
    for page in (".ci/run", "Makefile", ".pre-commit-config.yaml"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert not re.search(r"https?://|--index|--extra-index|/home/|/root/|/work/", text), page
