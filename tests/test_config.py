"""Recipes: strict values, overrides, paths; a mistake is answered with key, nearest name and choices."""

from __future__ import annotations

from pathlib import Path

import pytest

from retain import config
from retain.assemble import build_method, build_stream
from retain.plain import read_yaml
from retain.types import RetainError
from retain.values import fill

RECIPE = """
model: pocket
adapter: {rank: 8}
stream:
  image_root: images
  tasks:
    - {name: one, train: one.json, test: one_test.json}
    - {name: two, train: two.json, test: two_test.json, score: choice, max_new_tokens: 4}
method: [lora, {replay: {size: 20}}]
optim: {lr: 2e-3, steps: 5}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "shop" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(RECIPE)
    return path


def test_values_are_typed(recipe: Path) -> None:
    r = config.load(recipe)
    assert (r.model.name, r.adapter.rank, r.adapter.alpha) == ("pocket", 8, 32.0)
    assert r.optim.lr == 2e-3 and isinstance(r.optim.lr, float) and r.optim.steps == 5
    assert r.method == [{"lora": {}}, {"replay": {"size": 20}}]
    assert r.out == Path("runs/shop-mine")


def test_paths_are_relative_to_the_recipe(recipe: Path) -> None:
    stream = config.load(recipe).stream
    assert stream["image_root"] == str(recipe.parent / "images")
    assert stream["tasks"][0]["train"] == str(recipe.parent / "one.json")


def test_the_resolved_recipe_makes_the_same_recipe(recipe: Path, tmp_path: Path) -> None:
    r = config.load(recipe, ["seed=3", "method.replay.size=7"])
    again = config.parse(r.resolved(), tmp_path / "elsewhere" / "config.yaml")
    assert again.resolved() == r.resolved()


def test_a_model_directory_is_found_beside_the_recipe(recipe: Path) -> None:
    (recipe.parent / "base").mkdir()
    assert config.load(recipe, ["model=base"]).model.name == str(recipe.parent / "base")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=3", lambda r: r.seed == 3 and r.out == Path("runs/shop-mine-seed3")),
        ("optim.lr=1e-4", lambda r: r.optim.lr == 1e-4),
        ("optim.lr=1", lambda r: r.optim.lr == 1.0),
        ("optim.steps=null", lambda r: r.optim.steps is None),
        ("method=ewc", lambda r: r.method == [{"ewc": {}}]),
        ("method=[lora, {ewc: {weight: 2.0}}]", lambda r: r.method[1] == {"ewc": {"weight": 2.0}}),
        ("method.replay.size=7", lambda r: r.method[1] == {"replay": {"size": 7}}),
        ("method.replay={size: 7}", lambda r: r.method[1] == {"replay": {"size": 7}}),
        ("method.replay=ewc", lambda r: r.method[1] == {"ewc": {}}),
        ("out=null", lambda r: r.out == Path("runs/shop-mine")),
        ("method.1.replay.size=7", lambda r: r.method[1] == {"replay": {"size": 7}}),
        ("stream.tasks.two.max_new_tokens=9", lambda r: r.stream["tasks"][1]["max_new_tokens"] == 9),
        ("stream.tasks.0.score=vqa", lambda r: r.stream["tasks"][0]["score"] == "vqa"),
        ("model.dtype=bf16", lambda r: (r.model.name, r.model.dtype) == ("pocket", "bf16")),
        ("out=runs/x=y", lambda r: r.out == Path("runs/x=y")),
        ("track=tensorboard", lambda r: r.track == ("tensorboard",)),
    ],
)
def test_overrides(recipe: Path, override: str, read) -> None:
    assert read(config.load(recipe, [override]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optm.lr=1", ["no key 'optm'", "did you mean 'optim'", "Choose from ['model'"]),
        ("optim.lrr=1", ["optim", "'lrr'", "did you mean 'lr'", "weight_decay", "override 'optim.lrr=1'"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "number"]),
        ("optim.lr='1'", ["optim.lr", "'1'", "number"]),
        ("optim.lr=-1", ["optim.lr", "-1"]),
        ("optim.batch_size=1.5", ["optim.batch_size", "1.5", "integer"]),
        ("optim.group_by_length=1", ["optim.group_by_length", "bool"]),
        ("optim.schedule=linear", ["optim.schedule", "linear", "cosine", "constant"]),
        ("optim=3", ["optim", "mapping"]),
        ("adapter.rank=0", ["adapter", "rank", "0"]),
        ("adapter.rank=true", ["adapter.rank", "True"]),
        ("model.dtype=fp8", ["model.dtype", "fp8", "fp32", "bf16"]),
        ("seed=one", ["seed", "'one'", "integer"]),
        ("method.rplay.size=1", ["rplay", "did you mean 'replay'"]),
        ("method=[]", ["method", "at least one"]),
        ("method=[3]", ["method[0]", "3"]),
        ("stream=pokcet", ["stream", "no benchmark 'pokcet'", "pocket"]),
        ("stream={pocket: {n_trian: 3}}", ["stream.pocket", "n_trian", "did you mean 'n_train'"]),
        ("stream={pocket: {n_train: many}}", ["stream.pocket.n_train", "'many'", "integer"]),
        ("stream.tasks.one.score=exat", ["stream.tasks[0] (one)", "exat", "exact"]),
        ("stream.tasks.one.scor=exact", ["stream.tasks[0]", "scor", "did you mean 'score'"]),
        ("stream.tasks.three.score=exact", ["three", "one", "two"]),
        ("stream.tasks=[]", ["stream.tasks", "at least one"]),
        ("stream.tasks=[{train: a.json}]", ["stream.tasks[0]", "'name' is missing"]),
        ("track=[tensorbord]", ["track", "tensorbord", "did you mean 'tensorboard'"]),
        ("plugins=[nope.py]", ["plugins", "nope.py"]),
        ("seed", ["key=value", "'seed'"]),
        ("=3", ["key=value"]),
        ("adapter={rank: 3", ["adapter", "no valid YAML"]),
        ("seed.x=3", ["seed", "integer"]),
    ],
)
def test_a_wrong_override_is_named(recipe: Path, override: str, words: list[str]) -> None:
    with pytest.raises(RetainError) as caught:
        config.load(recipe, [override])
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"
    assert str(recipe) in str(caught.value) or override in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", ["line 1", "no valid YAML"]),
        ("model: pocket\nmodel: pocket\nstream: pocket\nmethod: lora", ["'model' occurs twice", "line 2"]),
        ("- a\n- b", ["a mapping of keys", "a list"]),
        ("", ["a mapping of keys", "nothing"]),
        ("model: pocket\nstream: pocket", ["'method' is missing"]),
        ("stream: pocket\nmethod: lora", ["'model' is missing"]),
        ("model: pocket\nmethod: lora\nstream: {pocket: {}, coin: {}}", ["stream", "one benchmark"]),
        ("model: {nam: pocket}\nstream: pocket\nmethod: lora", ["model", "nam", "did you mean 'name'"]),
        ("model: pocket\nstream: pocket\nmethod: lora\n1: 2", ["no key '1'"]),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RetainError) as caught:
        config.load(path)
    for word in [*words, str(path)]:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_a_missing_recipe_names_a_near_one(recipe: Path) -> None:
    with pytest.raises(RetainError, match=r"no such recipe; did you mean .*mine\.yaml"):
        config.load(recipe.with_name("mime.yaml"))
    with pytest.raises(RetainError, match="folder"):
        config.load(recipe.parent)
    recipe.write_bytes(b"model: \xff")
    with pytest.raises(RetainError, match="UTF-8"):
        config.load(recipe)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-3", 2e-3), ("1E5", 1e5), ("3", 3), ("-3", -3), ("1.5", 1.5), (".5", 0.5), ("1.", 1.0),
        ("true", True), ("on", "on"), ("no", "no"), ("null", None), ("~", None), ("", None),
        ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("'3'", "3"), ("0x10", "0x10"), ("1e", "1e"),
        ("010", 10), ("09", 9), ("!!str 3", "3"), ("!!float 3", 3.0),
    ],
)  # fmt: skip
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    read = read_yaml(text, "here")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", [
    "!!bool maybe", "!!int ''", "!!int abc", "!!binary aa", "!!set {a}", "!!python/tuple [a]", "!!omap [a: 1]", "!mine 3",
    "!!timestamp 2020-01-01", "&a [*a]", "&a {b: *a}", "[" * 400, "{a: " * 400, '"\\ud800"', '"\\0"', "9" * 400, "9" * 5000,
    "[" + "1," * 60_000 + "]", "\x00", "\ud800",
], ids=lambda text: text[:12].encode("unicode_escape").decode())  # fmt: skip
def test_what_is_no_plain_value_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(RetainError, match=r"^here\b[^\n]{1,300}$"):
        read_yaml(text, "here")


def test_fill_names_nested_keys() -> None:
    with pytest.raises(RetainError, match=r"f: tasks\[1\]: no key 'nam'; did you mean 'name'"):
        fill(config.FilesSpec, {"tasks": [{"name": "a"}, {"nam": "b"}]}, "f")


def test_a_plugin_registers_its_method(recipe: Path) -> None:
    (recipe.parent / "extra_plugin_for_test.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from retain.method import Method, register\n\n"
        "@register\n@dataclass\nclass Extra(Method):\n"
        "    name: ClassVar[str] = 'extra_of_test'\n    size: int = 3\n"
    )
    overrides = ["plugins=[extra_plugin_for_test.py]", "method=[lora, {extra_of_test: {size: 5}}]"]
    try:
        for _ in range(2):  # a second load registers nothing new and is no conflict
            parts = build_method(config.load(recipe, overrides)).parts
            assert [p.name for p in parts] == ["lora", "extra_of_test"] and parts[1].config() == {"size": 5}
    finally:
        from retain.method import REGISTRY

        REGISTRY.pop("extra_of_test", None)


def test_a_broken_plugin_is_named(recipe: Path) -> None:
    (recipe.parent / "broken_plugin.py").write_text("import nothing_of_that_name")
    with pytest.raises(RetainError, match=r"broken_plugin\.py:1: ModuleNotFoundError"):
        build_method(config.load(recipe, ["plugins=[broken_plugin.py]"]))


def test_a_choice_is_scored_on_the_validation_split(tmp_path: Path) -> None:
    path = tmp_path / "choose.yaml"
    path.write_text(
        "model: pocket\nstream: {pocket: {order: [digits], n_train: 4, n_test: 3, n_valid: 2}}\nmethod: lora\n"
    )
    plain, chosen = build_stream(config.load(path)), build_stream(config.load(path, ["eval.split=valid"]))
    assert [e.id for e in chosen[0].test] == [e.id for e in plain[0].valid] != [e.id for e in plain[0].test]
    assert chosen.name == "pocket (valid)" and not chosen[0].valid
    with pytest.raises(RetainError, match=r"no validation examples in \['digits'\]"):
        build_stream(config.load(path, ["eval.split=valid", "stream.pocket.n_valid=0"]))


def test_an_option_beside_its_benchmark_is_told_where_it_belongs(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: pocket\nstream: pocket\nmethod: lora\n")
    with pytest.raises(RetainError, match=r"an option of pocket is stream\.pocket\.n_test"):
        build_stream(config.load(path, ["stream.n_test=8"]))


def test_a_run_folder_written_before_a_key_came_is_that_of_the_same_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("{model: pocket, stream: pocket, method: lora}")
    told = config.load(path).resolved()
    assert "turns" not in told["optim"] and "square" not in told["model"]
    last = config.load(path, ["optim.turns=last", "model.square=pad"]).resolved()
    assert last["optim"]["turns"] == "last" and last["model"]["square"] == "pad"
    for resolved in (told, last):
        assert config.parse(resolved, path).resolved() == resolved
    with pytest.raises(RetainError, match=r"optim\.turns"):
        config.load(path, ["optim.turns=first"])
    with pytest.raises(RetainError, match=r"model\.square"):
        config.load(path, ["model.square=stretch"])
