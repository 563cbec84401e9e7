"""A model's folder as strangers bring it: what is lacking, broken or a program is one sentence, by file and key."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import limits
import zoo
from retain.adapters.patterns import matcher
from retain.models.folder import CONVERT
from retain.models.guide import _Clip
from retain.models.hf import HFModel
from retain.models.load import load_pretrained
from retain.models.template import looked_at
from retain.types import RetainError

KEY = "model.language_model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.build("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(base, tmp_path / "model"))


def weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """Change the tensors of a folder; the key of the one that is changed, as the file has it."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return file.name


def stored(folder: Path) -> str:
    """How the file calls the layer that is changed."""
    return next(
        k for k in load_file(folder / "model.safetensors") if k.endswith("layers.0.mlp.down_proj.weight")
    )


def config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(RetainError) as raised:
        load_pretrained(folder)
    said = str(raised.value)
    assert "\n" not in said
    for word in (str(folder), *words):
        assert word in said, said
    return said


def test_a_tensor_that_is_not_there(folder: Path) -> None:
    """Stock transformers fills it with random numbers and warns."""
    key = stored(folder)
    weights(folder, lambda t: t.pop(key))
    AutoModelForImageTextToText.from_pretrained(folder)  # the other side: it loads
    refused(folder, "layers.0.mlp.down_proj.weight", "random")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    key = stored(folder)
    weights(folder, lambda t: t.update({key: torch.ones(3, 5)}))
    refused(folder, "layers.0.mlp.down_proj.weight", "(3, 5)", "config.json")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_number_that_is_none(folder: Path, value: float, kind: torch.dtype) -> None:
    key = stored(folder)

    def change(tensors: dict[str, Any]) -> None:
        tensors |= {k: v.to(kind) for k, v in tensors.items()}
        tensors[key][-1, -1] = value

    weights(folder, change)
    refused(folder, "layers.0.mlp.down_proj.weight", "NaN or infinity")


def test_a_tensor_of_integers(folder: Path) -> None:
    key = stored(folder)
    weights(folder, lambda t: t.update({key: t[key].to(torch.int8)}))
    refused(folder, key, "I8", "quantization_config")


def test_tensors_of_another_model_and_a_tensor_more(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights(folder, lambda t: t.update({"unknown.weight": torch.ones(2)}))
    with caplog.at_level(logging.WARNING, "retain"):
        load_pretrained(folder)
    assert "unknown.weight" in caplog.text and "no place" in caplog.text
    save_file(
        {f"x.{k}": v for k, v in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
    )
    refused(folder, "the weights lack")


def test_a_pickle_is_never_loaded_and_the_sentence_converts_it(folder: Path) -> None:
    """The command that is printed, run as it is printed, in the folder: the same weights."""
    before, _ = load_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(
        {k: v for k, v in tensors.items() if "layers.0" in k}, folder / "pytorch_model-00001-of-00002.bin"
    )
    torch.save(
        {k: v for k, v in tensors.items() if "layers.0" not in k}, folder / "pytorch_model-00002-of-00002.bin"
    )
    said = refused(folder, "pytorch_model-00001-of-00002.bin", "pickle", CONVERT)
    command = shlex.split(said[said.index("python -c") :])
    limits.finished([sys.executable, *command[1:]], limits.LAUNCH, "LAUNCH", check=True, cwd=folder)
    after, _ = load_pretrained(folder)
    for (name, a), (_, b) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


class Shout:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_pickle_beside_safetensors_is_not_read(folder: Path, tmp_path: Path) -> None:
    torch.save({"x": Shout(str(tmp_path / "ran"))}, folder / "pytorch_model.bin")
    load_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../a.safetensors"}}, ["'../a.safetensors'", "this folder"]),
        ({"weight_map": {"a": "/etc/passwd"}}, ["'/etc/passwd'"]),
        ({"weight_map": {"a": "b.safetensors"}}, ["b.safetensors", "not there"]),
        ({"weight_map": ["a"]}, ["weight_map", "mapping"]),
        ({}, ["weight_map"]),
        ([], ["no mapping"]),
    ],
)
def test_an_index_that_leads_nowhere(folder: Path, index: Any, words: list[str]) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model.safetensors.index.json", *words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text_config": None}, []),
        ({"vision_config": 3}, []),
        ({"text_config": {"model_type": "llama", "hidden_size": "x"}}, ["hidden_size"]),
        (
            {"text_config": {"model_type": "llama", "num_hidden_layers": 10**9}},
            ["num_hidden_layers", "1000000000"],
        ),
        ({"text_config": {"model_type": "llama", "vocab_size": 10**9}}, ["config.json describes a model of"]),
        ({"num_labels": 10**12}, ["num_labels"]),
        ({"_attn_implementation": "somebody/kernel"}, ["somebody/kernel", "never run"]),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
            ["auto_map", "'mine'", "never run"],
        ),
        ({"model_type": ["llava"]}, []),
    ],
)
def test_a_config_that_makes_no_model(folder: Path, fields: dict[str, Any], words: list[str]) -> None:
    config(folder, **fields)
    refused(folder, *words)


def test_code_that_a_model_brings_along_is_not_run(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "mine.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})\nclass Config: pass\n")
    config(folder, auto_map={"AutoConfig": "mine.Config", "AutoModelForImageTextToText": "mine.Config"})
    with caplog.at_level(logging.WARNING, "retain"):
        load_pretrained(folder)
    assert "auto_map" in caplog.text and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "config.json"]
)
@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{", "[" * 100_000, '{"size": {"height": 1000000000}}']
)
def test_a_file_of_another_shape(folder: Path, file: str, content: str) -> None:
    if file in ("tokenizer_config.json", "config.json") and "size" in content:
        return
    (folder / file).write_text(content)
    refused(folder, file if content[:1] != "{" or file != "tokenizer.json" else "tokenizer")


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "generation_config.json")
    refused(folder, "generation_config.json", "no regular file")


@pytest.mark.parametrize("value", ["2", [2, None], [[2]], 2.5, {"a": 2}, True])
def test_a_token_that_is_no_number(folder: Path, value: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    refused(folder, "generation_config.json", "eos_token_id")


def test_an_adapter_beside_the_model(folder: Path) -> None:
    """Stock transformers would load it, and take the base from its configuration."""
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter_config.json")


def test_the_guide_is_looked_at_as_the_model_is(folder: Path) -> None:
    with pytest.raises(RetainError, match=r"guide .* no CLIP model"):
        _Clip(folder, torch.device("cpu"))
    with pytest.raises(RetainError, match=r"guide .*no such folder"):
        _Clip(str(folder / "gone"), torch.device("cpu"))


def test_the_guard_forgets_a_model_whose_config_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal weights with another rotation are another model."""
    from retain.models import guard

    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    assert guard.passed(HFModel.load(folder))
    said = json.loads((folder / "config.json").read_text())
    said["text_config"]["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(said))
    assert not guard.passed(HFModel.load(folder, guard=False))


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubles": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "calls itself": "{% macro f(n) %}{% for i in [1, 2] %}{% if n %}{{ f(n - 1) }}{% endif %}"
    "{% endfor %}{% endmacro %}{{ f(90) }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a product": "{{ 'x' * 9999999999 }}",
    "a long product": "{{ 'x' * 99999 * 99999 }}",
    "half": "{% for m in messages %}{{ m['content']",
    "no such filter": "{{ messages | nofilter }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end(folder: Path, name: str) -> None:
    (folder / "chat_template.jinja").write_text(ENDLESS[name])
    with pytest.raises(RetainError, match="the model's chat template"):
        HFModel.load(folder, guard=False)


@pytest.mark.parametrize(
    "name",
    [n for n in dir(zoo) if n.isupper() and isinstance(getattr(zoo, n), str) and "{%" in getattr(zoo, n)],
)
def test_published_templates_pass(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Yes"}]
    template = getattr(zoo, name)
    if "%s" in template or template.startswith("_"):
        return
    looked_at(template, lambda: render_jinja_template([turns], chat_template=template))


# -- expressions -------------------------------------------------------------------------------------------------


def _expression(rng: Any, depth: int) -> str:
    r = rng.random()
    if depth <= 0 or r < 0.35:
        return str(
            rng.choice(
                [
                    "a",
                    "b",
                    r"\.",
                    ".",
                    r"\d",
                    "[ab]",
                    "[^a]",
                    r"\w",
                    "1",
                    "^",
                    "$",
                    r"\b",
                    r"\B",
                    r"\Z",
                    r"[\d_]",
                ]
            )
        )
    one, two = _expression(rng, depth - 1), _expression(rng, depth - 1)
    if r < 0.55:
        return one + two
    if r < 0.75:
        return f"(?:{one}|{two})"
    return f"({one})" + str(rng.choice(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?"]))


def test_expressions_say_what_re_says() -> None:
    """Of random expressions and names, whole and anywhere; the other side is Python's own `re`."""
    import random
    import re

    rng, n = random.Random(0), 0
    while n < 4000:
        text = _expression(rng, 4)
        try:
            stock = re.compile(text)
        except re.error:
            continue
        for whole in (True, False):
            ours = matcher(text, "x", whole=whole)
            for _ in range(4):
                name = "".join(rng.choice("ab.1c_\n") for _ in range(rng.randint(0, 7)))
                assert ours(name) == ((stock.fullmatch if whole else stock.search)(name) is not None), (
                    text,
                    name,
                )
                n += 1


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+$",
        "(a|a)*b",
        "(.*)*x",
        ".*.*.*.*.*.*.*.*x",
        "(a|aa)" * 40 + "x",
        "a?" * 60 + "a" * 60,
        r"(\w+\.?)+\d$",
    ],
)
def test_no_expression_takes_for_ever(text: str) -> None:
    """Each takes `re` longer than anybody waits on this name."""
    assert matcher(text, "x")("a" * 50 + "!") is False


@pytest.mark.parametrize(
    "text", ["(", r"(a|b)*\1+", "(?=(a+)+)(b+)+(c+)+", "(a{1,999}){1,999}", "a" * 200_000, 3]
)
def test_what_is_no_expression_or_cannot_be_bounded(text: object) -> None:
    with pytest.raises(RetainError, match=r"^here: "):
        matcher(text, "here")


def test_patterns_are_those_of_stock_peft() -> None:
    from peft.utils.other import get_pattern_key

    from retain.adapters.peft_folder import pattern

    names = [
        f"model.layers.{i}.{part}.{p}"
        for i in (0, 1, 11)
        for part, p in (("self_attn", "q_proj"), ("mlp", "up_proj"))
    ]
    patterns = {
        r"layers\.(0|1)\..*(q|k)_proj": 4.0, r".*\.mlp\.(up|down)_proj": 8.0, "^model.layers.11.self_attn.q_proj": 16.0,
        r"(?:\w+\.)+q_proj": 2.0, "proj": 1.0,
    }  # fmt: skip
    for name in names:
        stock = get_pattern_key(list(patterns), name)
        assert pattern(patterns, [name], -1.0) == patterns.get(stock, -1.0), name
