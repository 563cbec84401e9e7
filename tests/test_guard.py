"""The guard: whatever is made to differ from Hugging Face's own call is refused, by what differs and for which family."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import zoo
from retain.adapters.lora import LoraSpec
from retain.cli import app
from retain.commands.doctor import cut_off
from retain.models import guard
from retain.models.hf import HFModel
from retain.types import Message, RetainError

FOLDERS: dict[str, Path] = {}


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., HFModel]:
    """A tiny model of a family, with nothing remembered of earlier comparisons."""
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path_factory.mktemp("cache")))

    def load(name: str, **more: Any) -> HFModel:
        if name not in FOLDERS:
            FOLDERS[name] = zoo.build(name, tmp_path_factory.mktemp(name))
        return HFModel.load(FOLDERS[name], LoraSpec(rank=2), guard=False, **more)

    return load


def family(**changes: Any) -> Callable[[HFModel], None]:
    def change(model: HFModel) -> None:
        model.family = model.encode.family = replace(model.family, **changes)

    return change


def header(model: HFModel) -> None:
    model.head.plain = True


def template(model: HFModel) -> None:
    """The conversation that another checkpoint would want."""
    was = model.encode._templated
    model.encode._templated = lambda turns, generate: was(turns, generate) + " "  # type: ignore[method-assign]


def pixels(model: HFModel) -> None:
    was = model.encode._process

    def process(*args: Any) -> Any:
        return {k: v + 0.1 if v.is_floating_point() else v for k, v in was(*args).items()}

    model.encode._process = process  # type: ignore[method-assign]


def padding(model: HFModel) -> None:
    """What a mask that is left out does to rows shorter than their neighbours."""
    was = model.collate

    def collate(*args: Any, **kwargs: Any) -> Any:
        batch = was(*args, **kwargs)
        return replace(batch, meta={**batch.meta, "padded": False})

    model.collate = collate  # type: ignore[method-assign]


def not_a_number(model: HFModel) -> None:
    with torch.no_grad():
        model.hf.get_output_embeddings().weight[0, 0] = float("nan")


BROKEN: list[tuple[str, Callable[[HFModel], None], str]] = [
    ("paligemma", family(types=None), "mask"),
    ("gemma3", family(types=None), "mask or positions"),
    ("gemma2", header, "the head differs"),
    ("granite", header, "the head differs"),
    ("cohere", header, "the head differs"),
    ("paligemma2", header, "the head differs"),
    ("llava", template, "token ids differ"),
    ("qwen2_vl", template, "token ids differ"),
    ("llava", pixels, "image features, mask or positions"),
    ("mistral3", pixels, "image features, mask or positions"),
    ("llava_next", padding, "padded rows"),
    ("qwen2_vl", family(grid_rope=False), "(mask|positions)"),
    ("llama", not_a_number, "differ"),
]


@pytest.mark.parametrize(("name", "change", "words"), BROKEN, ids=lambda x: getattr(x, "__name__", str(x)))
def test_what_differs_is_refused(
    name: str, change: Callable[[HFModel], None], words: str, make: Callable[..., HFModel]
) -> None:
    model = make(name)
    assert all(f.agrees for f in guard.compare(model)), "nothing is broken yet"
    model = make(name)
    change(model)
    with pytest.raises(RetainError, match=words) as told:
        guard.check(model)
    assert f"family {model.family.name}" in str(told.value) and "\n" not in str(told.value)


def test_parts_of_another_family_are_refused(make: Callable[..., HFModel]) -> None:
    words = r"family pixtral\): Mistral3ForConditionalGeneration with PixtralProcessor cannot be driven"
    with pytest.raises(RetainError, match=words):
        guard.check(make("mistral3", family="pixtral"))


def test_what_has_passed_is_not_compared_again(
    make: Callable[..., HFModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llava")
    assert not guard.passed(model)
    findings = guard.check(model)
    assert (
        guard.passed(model)
        and findings
        and {f.case for f in findings} == {"a picture", "words", "two pictures"}
    )
    monkeypatch.setattr(guard, "compare", lambda model: pytest.fail("compared twice"))
    assert guard.check(make("llava")) == findings
    other = make("llava")
    with torch.no_grad():
        other.hf.get_output_embeddings().weight.mul_(1.5)
    monkeypatch.undo()
    other = make("llava", square="pad")
    assert not guard.passed(other) and guard.check(other)
    other = make("llava")
    other.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert not guard.passed(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*zoo.FAMILIES, *zoo.TEXT_ONLY])
def test_a_model_in_half_precision_passes_within_what_it_can_say(
    name: str, dtype: torch.dtype, make: Callable[..., HFModel]
) -> None:
    findings = guard.check(make(name, dtype=dtype))
    assert max(f.allowed for f in findings) >= guard.RELATIVE and all(f.agrees for f in findings)
    rows = guard.rows(findings)
    assert rows[0][-1] == "agrees" and {r[-1] for r in rows[1:]} == {"yes"}


def test_a_small_context_does_not_stop_the_comparison(make: Callable[..., HFModel]) -> None:
    model = make("llava", max_length=4)
    assert guard.check(model) and model.encode.max_length == 4


def test_pictures_are_padded_where_the_recipe_says(make: Callable[..., HFModel]) -> None:
    """LLaVA's `expand2square`: the mean colour around, and nothing of the picture lost."""
    model = make("llava", square="pad")
    picture = np.full((10, 30, 3), 200, dtype=np.uint8)
    shown = np.asarray(model.encode.opened(picture, "x"))
    mean = [int(255 * m) for m in model.processor.image_processor.image_mean]
    assert shown.shape == (30, 30, 3) and shown[0, 0].tolist() == mean and (shown[10:20] == 200).all()
    assert model.fingerprint() != make("llava").fingerprint()
    with pytest.raises(RetainError, match="'crop' or 'pad', not 'stretch'"):
        make("llava", square="stretch")


def test_a_template_that_writes_the_date_writes_the_same_every_day(make: Callable[..., HFModel]) -> None:
    """Mistral-Small's and Llama 3.2's do; a resumed run must not see other prompts."""
    model = make("qwen2_vl")
    model.processor.chat_template = "{{ strftime_now('%Y-%m-%d') }} " + model.processor.chat_template
    again = HFModel(model.hf, model.processor, guide=None)
    text = again.encode.render((zoo_message := Message("user", "what?"),), generate=True)
    assert text.startswith("2025-01-01 ") and zoo_message.text in text
    assert all(f.agrees for f in guard.compare(again))


def test_the_doctor_compares_a_model(make: Callable[..., HFModel]) -> None:
    make("llava")
    told = CliRunner().invoke(app, ["doctor", "--model", str(FOLDERS["llava"])])
    assert told.exit_code == 0 and told.stdout.count(" yes") == 18 and "NO" not in told.stdout
    refused = CliRunner().invoke(app, ["doctor"])
    assert refused.exit_code == 2 and "--model" in refused.stderr


@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "qwen2_vl", "internvl", "idefics3", "pixtral", "paligemma"]
)
def test_what_a_processor_cuts_off_is_found_by_looking(name: str, make: Callable[..., HFModel]) -> None:
    """Only LLaVA-1.5's cuts the centre out: of 90 x 60 a third of the width, less what resampling still sees."""
    width, height = cut_off(make(name).encode, 90, 60)
    assert height == 0 and (0.2 < width <= 1 / 3 if name == "llava" else width == 0)
    assert cut_off(make(name).encode, 60, 60) == (0, 0)
    assert cut_off(make(name, square="pad").encode, 90, 90) == (0, 0)


def test_the_doctor_says_what_the_model_will_not_see(make: Callable[..., HFModel], tmp_path: Path) -> None:
    make("llava")
    picture = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    row = {"id": "a", "image": "wide.png", "text": "What?", "answer": "red"}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row | {"id": split}))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{name: {FOLDERS['llava']}}}\nmethod: lora\n"
        "stream: {tasks: [{name: a, train: train.jsonl, test: test.jsonl}]}\n"
    )
    words = "of the width of a picture of 90 x 60 away; model.square: pad"
    assert words in CliRunner().invoke(app, ["doctor", str(recipe)]).stdout
    assert words not in CliRunner().invoke(app, ["doctor", str(recipe), "model.square=pad"]).stdout


def test_a_family_without_a_row_runs_as_hugging_face_drives_it(
    make: Callable[..., HFModel], tmp_path: Path
) -> None:
    """Crops, a window and scaled logits, uncached; a route is refused by method and family before anything is written."""
    model = make("aya_vision")
    assert model.family.features is None and all(f.agrees for f in guard.compare(model))
    own = {"train": "train.jsonl", "test": "train.jsonl"}
    rows = [{"id": f"r{i}", "image": f"{i}.png", "text": "What?", "answer": "red"} for i in range(2)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i, (w, h) in enumerate([(30, 60), (45, 31)]):
        Image.fromarray(np.full((h, w, 3), 90 * i + 30, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    recipe = {
        "model": str(FOLDERS["aya_vision"]), "stream": {"tasks": [{"name": "a", **own}, {"name": "b", **own}]},
        "adapter": {"rank": 2}, "optim": {"steps": 2, "batch_size": 2}, "out": str(tmp_path / "run"),
    }  # fmt: skip
    for method in ("hide", "lora"):
        (tmp_path / f"{method}.yaml").write_text(json.dumps({**recipe, "method": method}))
    refused = CliRunner().invoke(app, ["run", str(tmp_path / "hide.yaml"), "-q"])
    assert refused.exit_code == 2 and "hide" in refused.stderr and "aya_vision family" in refused.stderr
    assert not (tmp_path / "run").exists()
    assert CliRunner().invoke(app, ["run", str(tmp_path / "lora.yaml"), "-q"]).exit_code == 0
    for how in ([], ["--merged"]):
        to = str(tmp_path / f"to{len(how)}")
        told = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--to", to, *how])
        assert told.exit_code == 0 and "logits checked against stock" in told.stdout, told.output
