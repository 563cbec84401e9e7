"""`HFModel` on the families that people bring, against Hugging Face's own call: ids, loss, logits, answers, exports.

The other side is `stock`: real processors and classes, nothing of `retain`. It is checked first, against itself and
against golden values of the processors that need torchvision.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from typer.testing import CliRunner

import stock
import tiny
import zoo
from retain import config
from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.adapters.peft_format import save_peft
from retain.assemble import build_model
from retain.cli import app
from retain.models.hf import HFModel
from retain.run.store import RunDir, read_jsonl
from retain.types import Batch, Example, Message, RetainError
from stock import Stock
from talks import IMAGE, Talk, picture, talk
from talks import talks as all_talks

TOLERANCE = 1e-3  # fp32: sums in another order, on logits of size 1 to 10
TALKS = all_talks()
WORKING = (*zoo.FAMILIES, *zoo.TEXT_ONLY)
PALIGEMMA = ("paligemma", "paligemma2")
NOT_TAKEN = {(name, case) for name in PALIGEMMA for case in ("text", "system", "turns", "mixed")} | {
    ("gemma2", "system")  # its template says so
}
"""Cases that a family's own processor or template refuses."""
GOLDEN = json.loads((Path(__file__).parent / "golden" / "processors.json").read_text())


def asked(name: str, case: str) -> list[Talk]:
    """The conversations of a case, without pictures for a language model."""
    return [t.bare() for t in TALKS[case]] if name in zoo.TEXT_ONLY else TALKS[case]


def pairs(only: Callable[[str, str], bool] = lambda name, case: True) -> list[Any]:
    """(family, case) of all that must work; a language model is asked the cases that differ without pictures."""
    plain = ("text", "system", "turns", "lengths")
    cases = [(n, c) for n in zoo.FAMILIES for c in TALKS] + [(n, c) for n in zoo.TEXT_ONLY for c in plain]
    return [pytest.param(*p, id="-".join(p)) for p in cases if p not in NOT_TAKEN and only(*p)]


each = pytest.mark.parametrize(("name", "case"), pairs())
together = pytest.mark.parametrize(("name", "case"), pairs(lambda name, case: case in ("lengths", "mixed")))
family = pytest.mark.parametrize("name", WORKING)


# -- the two sides, built once -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's checkpoint."""
    root = tmp_path_factory.mktemp("zoo")
    return lru_cache(None)(lambda name: zoo.build(name, root / name))


@pytest.fixture(scope="session")
def theirs(home: Callable[[str], Path]) -> Callable[[str], Stock]:
    """A family under Hugging Face's classes."""
    return lru_cache(None)(lambda name: Stock(home(name)))


@pytest.fixture(scope="session")
def ours(home: Callable[[str], Path]) -> Callable[[str], HFModel]:
    """A family as `retain` loads it, with an empty adapter bank."""
    return lru_cache(None)(lambda name: HFModel.load(home(name), LoraSpec(rank=2)))


def example(t: Talk, name: str = "x") -> Example:
    """A conversation as `retain` has it: each turn's text, and where its pictures stand."""
    turns = []
    for turn in t.turns:
        where = {"at": turn.at} if any(turn.at) else {}
        turns.append(Message(turn.role, turn.text, len(turn.at), **where))  # type: ignore[arg-type]
    return Example(name, tuple(turns), t.images)


def collated(model: HFModel, each: list[Talk], answers: bool) -> Batch:
    return model.collate([example(t, f"x{i}") for i, t in enumerate(each)], answers=answers)


def ids(batch: Batch, row: int = 0) -> list[int]:
    """A row's tokens without its padding."""
    mask = batch.inputs["attention_mask"][row].bool()
    return batch.inputs["input_ids"][row][mask].tolist()


def labels(batch: Batch, row: int = 0) -> list[int]:
    """A row's labels without its padding."""
    assert batch.labels_BT is not None
    return batch.labels_BT[row][batch.inputs["attention_mask"][row].bool()].tolist()


@torch.no_grad()
def next_logits(model: HFModel, batch: Batch) -> Tensor:
    """The next token's logits behind each prompt: what decoding starts from."""
    model.train(False)
    batch = model.placed(batch)
    cache = model.cache(len(batch), batch.inputs["attention_mask"].shape[1] + 1)
    return model.prefill(batch, cache)


def near(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Equal within TOLERANCE, said with the name of the case."""
    assert ours.shape == theirs.shape, f"{what}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    gap = float((ours.float() - theirs).abs().max())
    assert gap < TOLERANCE, f"{what}: largest difference {gap:.2e}"


# -- the other side, against itself --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), pairs(lambda name, case: name not in PALIGEMMA))
def test_stock_prompts_are_the_model_cards_call(name: str, case: str, theirs: Callable[[str], Stock]) -> None:
    side = theirs(name)
    made, card = side.prompts(asked(name, case)), side.call(asked(name, case))
    assert made.keys() == card.keys()
    assert all(torch.equal(torch.as_tensor(made[k]), torch.as_tensor(card[k])) for k in made)


@together
def test_stock_batched_is_alone(name: str, case: str, theirs: Callable[[str], Stock]) -> None:
    side, talks = theirs(name), asked(name, case)
    for t, found in zip(talks, side.answers(talks, 5), strict=True):
        alone = side.answer(t, 5)
        near(found.logits_V, alone.logits_V, f"{name} {case}")
        assert (found.prompt_ids, found.answer_ids) == (alone.prompt_ids, alone.answer_ids)


@pytest.mark.parametrize("name", zoo.FAMILIES)
@torch.no_grad()
def test_pictures_their_order_and_every_token_matter(name: str, theirs: Callable[[str], Stock]) -> None:
    """Or equal logits would say nothing."""
    side = theirs(name)
    (one,), (two,) = TALKS["one"], TALKS["two"]
    other = Talk(one.turns, (picture(9, 37, 53),))
    assert (side.answer(one, 1).logits_V - side.answer(other, 1).logits_V).abs().max() > 0.05
    turned = Talk(two.turns, two.images[::-1])
    assert (side.answer(two, 1).logits_V - side.answer(turned, 1).logits_V).abs().max() > 0.05
    made = side.prompts([one])
    before = side.model(**made).logits[0, -1]
    other_token = int(side.tokenizer.convert_tokens_to_ids("e"))
    special = side.tokenizer.all_special_ids
    for at in [
        k for k, token in enumerate(made["input_ids"][0].tolist()) if token not in (*special, other_token)
    ]:
        changed = made["input_ids"].clone()
        changed[0, at] = other_token
        after = side.model(**{**made, "input_ids": changed}).logits[0, -1]
        assert (after - before).abs().max() > 0.01, f"{name}: token {at} does not matter"


@pytest.mark.parametrize("name", ["paligemma2", "gemma3"])
@torch.no_grad()
def test_token_types_and_windows_matter(name: str, theirs: Callable[[str], Stock]) -> None:
    """What a processor adds beside ids and pixels, and a window shorter than the prompt."""
    side = theirs(name)
    made = side.training(TALKS["between"][0])
    made.pop("labels")
    logits = side.model(**made).logits[0]
    plain = side.model(**{k: v for k, v in made.items() if k != "token_type_ids"}).logits[0]
    text = side.model.config.get_text_config()
    with mock.patch.object(text, "sliding_window", 512):
        wide = side.model(**made).logits[0]
    assert (logits - plain)[-5:].abs().max() > 0.01 < (logits - wide)[-5:].abs().max()


@family
def test_stock_learns_answers_and_their_ends(name: str, theirs: Callable[[str], Stock]) -> None:
    side = theirs(name)
    for case in ("one", "turns"):
        if (name, case) in NOT_TAKEN:
            continue
        (t,) = asked(name, case)
        learned = side.learn(t)
        said = side.tokenizer.decode(learned.answer_ids, skip_special_tokens=True).split()
        assert said == " ".join(x.text for x in t.turns if x.role == "assistant").split() or case == "turns"
        assert learned.answer_ids[-1] in side.ends and 1 < learned.loss < 20
        prompt = side.answer(t, 1).prompt_ids
        assert learned.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("case", TALKS)
@pytest.mark.parametrize("name", [n for n in GOLDEN if n != "transformers"])
def test_stock_without_its_video_part_is_the_whole_one(
    name: str, case: str, theirs: Callable[[str], Stock]
) -> None:
    """What stands in for a processor that needs torchvision gives what that gives: `golden/make_processors.py`."""
    made, wanted = theirs(name).call(TALKS[case]), dict(GOLDEN[name][case])
    wanted.pop("torchvision_gap", None)
    assert GOLDEN[name]["class"] == type(theirs(name).processor).__name__
    assert made.keys() == wanted.keys()
    for key, value in wanted.items():
        same(torch.as_tensor(made[key]), value, f"{name} {case} {key}")


def same(found: Tensor, golden: Any, what: str) -> None:
    """A tensor is as `golden/make_processors.py` summed it up."""
    if isinstance(golden, list):
        assert found.tolist() == golden, what
        return
    flat = found.double().flatten()
    assert list(found.shape) == golden["shape"], what
    torch.testing.assert_close(
        flat[:: golden["step"]], torch.tensor(golden["values"], dtype=torch.double), atol=1e-3, rtol=0
    )
    assert float(flat.sum()) == pytest.approx(golden["sums"][0], abs=1e-2, rel=1e-5), what
    assert float((flat * flat).sum()) == pytest.approx(golden["sums"][1], abs=1e-2, rel=1e-5), what


# -- ours against the other side -----------------------------------------------------------------------------------


@each
def test_tokens(name: str, case: str, ours: Callable[[str], HFModel], theirs: Callable[[str], Stock]) -> None:
    """Prompt, answers and labels."""
    model, side, talks = ours(name), theirs(name), asked(name, case)
    learning, asking = collated(model, talks, True), collated(model, talks, False)
    for i, t in enumerate(talks):
        decode = side.tokenizer.convert_ids_to_tokens
        wanted, prompt = side.learn(t), side.answer(t, 1).prompt_ids
        assert decode(ids(asking, i)) == decode(prompt), f"{name} {case}: prompt"
        assert decode(ids(learning, i)) == decode(wanted.input_ids), f"{name} {case}: with the answer"
        assert labels(learning, i) == list(wanted.labels), f"{name} {case}: labels"


@each
def test_training(
    name: str, case: str, ours: Callable[[str], HFModel], theirs: Callable[[str], Stock]
) -> None:
    """Loss and logits, each alone and all in one batch."""
    model, side, talks = ours(name), theirs(name), asked(name, case)
    wanted = [side.learn(t) for t in talks]
    with torch.no_grad():
        for t, w in zip(talks, wanted, strict=True):
            out = model(collated(model, [t], True))
            near(out.logits_NV, w.logits_NV, f"{name} {case}: logits")
            assert float(out.loss) == pytest.approx(w.loss, abs=TOLERANCE), f"{name} {case}: loss"
        out = model(collated(model, talks, True))
    for i, w in enumerate(wanted):
        near(out.logits_NV[out.row_N == i], w.logits_NV, f"{name} {case}: logits of row {i} of the batch")
    total = sum(w.loss * len(w.answer_ids) for w in wanted) / sum(len(w.answer_ids) for w in wanted)
    assert float(out.loss) == pytest.approx(total, abs=TOLERANCE), f"{name} {case}: loss of the batch"


@each
def test_inference(
    name: str, case: str, ours: Callable[[str], HFModel], theirs: Callable[[str], Stock]
) -> None:
    """Next-token logits and greedy answers, each alone and all in one batch."""
    model, side, talks = ours(name), theirs(name), asked(name, case)
    wanted = [side.answer(t, 6) for t in talks]
    for batch, rows in [([t], [w]) for t, w in zip(talks, wanted, strict=True)] + [(talks, wanted)]:
        found = collated(model, batch, False)
        logits = next_logits(model, found)
        for i, w in enumerate(rows):
            near(logits[i], w.logits_V, f"{name} {case}: next-token logits of {i} of {len(rows)}")
        assert model.generate(found, 6) == [w.text for w in rows], f"{name} {case}: answers of {len(rows)}"


HOW = {
    "language": (LoraSpec(rank=2), False),
    "everywhere": (LoraSpec(rank=2, targets="all"), False),
    "checkpointed": (LoraSpec(rank=2), True),
}
"""Where adapters are, and whether activations are computed again: the tower live or frozen, its features kept."""


@pytest.mark.parametrize("how", HOW)
@family
def test_adapters_and_gradients_are_those_of_stock_peft(
    name: str, how: str, home: Callable[[str], Path], tmp_path: Path
) -> None:
    """Logits and gradients in training mode of an adapter full of noise, on each of a mixed batch."""
    spec, checkpointing = HOW[how]
    model = HFModel.load(home(name), spec, checkpointing=checkpointing)
    tiny.fill(model.adapters, "a")
    model.adapters.train_only("a")
    save_peft(model.adapters, "a", tmp_path, str(home(name)))
    base = Stock(home(name)).model
    side = Stock(home(name), model=PeftModel.from_pretrained(base, tmp_path, is_trainable=True))
    talks = asked(name, "lengths" if name in PALIGEMMA else "mixed")
    for p in side.model.parameters():  # frozen ones without a gradient, as PEFT has them
        p.grad = None
    side.model.train()
    losses, many, logits = [], [], []
    for t in talks:
        made = side.training(t)
        out = side.model(**made)
        at = made["labels"][0, 1:] != -100
        losses, many = [*losses, out.loss * at.sum()], [*many, int(at.sum())]
        logits.append(out.logits[0, :-1][at].detach())
    (sum(losses) / sum(many)).backward()
    model.train()
    with model.adapters.using(Mix({"a": 1.0})):
        out = model(collated(model, talks, True))
        out.loss.backward()
    for i, wanted in enumerate(logits):
        near(out.logits_NV[out.row_N == i].detach(), wanted, f"{name} {how}: logits of row {i}")
    theirs = {n: p.grad for n, p in side.model.named_parameters() if p.grad is not None}
    found = {k: p.grad for k, p in model.adapters.parameters("a").items() if ".lora_" in k}
    assert found
    for key, grad in found.items():
        wanted = theirs.get(f"base_model.model.{key}.default.weight")
        if wanted is None or not wanted.any():  # a layer of the tower behind the one that is read
            assert grad is None or not grad.any(), f"{name} {how}: {key} gets a gradient"
            continue
        scale = max(float(wanted.abs().max()), 0.1)
        assert grad is not None, f"{name} {how}: {key} gets no gradient"
        assert float((grad - wanted).abs().max()) < TOLERANCE * scale, f"{name} {how}: gradient of {key}"


@family
def test_a_mix_per_sample_reaches_every_layer(name: str, home: Callable[[str], Path]) -> None:
    """Adapters in the tower too: each sample's own mix reaches its own crops and patches. Or it is refused at once."""
    model = HFModel.load(home(name), LoraSpec(rank=2, targets="all"))
    tiny.fill(model.adapters, "a", "b")
    talks = asked(name, "lengths" if name in PALIGEMMA else "mixed")
    weights = [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 0.5}, {"b": 2.0}][: len(talks)]
    with torch.no_grad(), model.adapters.using(tiny.mixture(*weights)):
        batch = collated(model, talks, False)
        learned, logits = model(collated(model, talks, True)), next_logits(model, batch)
        answers = model.generate(batch, 4)
    for i, (t, mix) in enumerate(zip(talks, weights, strict=True)):
        with torch.no_grad(), model.adapters.using(Mix(mix)):
            alone = collated(model, [t], False)
            near(next_logits(model, alone)[0], logits[i], f"{name}: row {i}")
            theirs = model(collated(model, [t], True)).logits_NV
            near(learned.logits_NV[learned.row_N == i], theirs, f"{name}: row {i} in training")
            assert model.generate(alone, 4) == [answers[i]]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_picture_that_the_processor_refuses_is_one_sentence(
    name: str, ours: Callable[[str], HFModel], theirs: Callable[[str], Stock]
) -> None:
    """Qwen-VL's takes sides of up to 200 to 1."""
    strip = Talk(TALKS["one"][0].turns, (picture(0, 1000, 2),))
    with pytest.raises(ValueError):
        theirs(name).prompts([strip])
    with pytest.raises(RetainError, match="x0") as told:
        collated(ours(name), [strip], True)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("case", TALKS)
@pytest.mark.parametrize("name", [n for n in GOLDEN if n != "transformers"])
def test_pixels_are_those_of_the_whole_processor(
    name: str, case: str, ours: Callable[[str], HFModel]
) -> None:
    """Ids, and for one conversation pixels, as the processor gives them that `retain` does without."""
    model, golden = ours(name), GOLDEN[name][case]
    batch = collated(model, TALKS[case], False)
    for i, (row, mask) in enumerate(zip(golden["input_ids"], golden["attention_mask"], strict=True)):
        assert ids(batch, i) == [t for t, m in zip(row, mask, strict=True) if m], f"{name} {case}: ids"
    if len(TALKS[case]) == 1 and "pixel_values" in golden:
        one = example(TALKS[case][0])
        found = [model.encode.image(ref, "x") for ref in model.encode(one).images]
        pixels = [
            f["pixel_values"].flatten(0, 1) if f["pixel_values"].ndim == 5 else f["pixel_values"]
            for f in found
        ]
        if (
            len({p.shape[1:] for p in pixels}) == 1
        ):  # pictures of different size are padded, by the model's rule
            shape = golden["pixel_values"]["shape"]
            same(torch.cat(pixels).reshape(shape), golden["pixel_values"], f"{name} {case}: pixels")


@pytest.mark.parametrize(("name", "case"), sorted(NOT_TAKEN - {(n, "mixed") for n in PALIGEMMA}))
def test_what_a_family_does_not_take_is_refused(name: str, case: str, ours: Callable[[str], HFModel]) -> None:
    """In one sentence, where Hugging Face's own call raises."""
    with pytest.raises(RetainError) as told:
        collated(ours(name), asked(name, case), False)
    assert "x0" in str(told.value) and "\n" not in str(told.value).strip()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "gemma3", "pixtral", "llama"])
def test_special_tokens_in_the_data_are_text(
    name: str, ours: Callable[[str], HFModel], theirs: Callable[[str], Stock]
) -> None:
    """An end token, a turn's mark or an image token in a question or an answer is spelt, as with
    `apply_chat_template(sanitize_control_tokens=True)`.
    """
    side, model = theirs(name), ours(name)
    end = side.tokenizer.convert_ids_to_tokens(max(side.ends))
    mark = getattr(side.processor, "image_token", None) or side.tokenizer.eos_token
    mark = end if name == "idefics3" else mark  # its processor counts images before it looks for marks
    t = talk(("user", f"Is {end} or {mark} an end?"), ("assistant", f"yes {end} no"))
    batch = collated(model, [t], True)
    (wanted,) = side.call([t], sanitize_control_tokens=True)["input_ids"].tolist()
    assert ids(collated(model, [t], False)) == wanted
    learned = [i for i in labels(batch) if i != -100]
    assert [i for i in learned if i in side.ends] == learned[-1:]
    assert side.tokenizer.decode(learned[:-1]).strip() == t.answer


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision", "qwen2"])
def test_the_published_generation_config_is_kept(
    name: str, ours: Callable[[str], HFModel], theirs: Callable[[str], Stock]
) -> None:
    """A repetition penalty changes what `generate(do_sample=False)` answers, and what we do."""
    model, side = ours(name), theirs(name)
    talks = asked(name, "lengths")
    kept = [side.answer(t, 12).text for t in talks]
    assert kept != [side.answer(t, 12, neutral=True).text for t in talks]
    assert model.generate(collated(model, talks, False), 12) == kept


def test_banned_words_are_not_said(theirs: Callable[[str], Stock], tmp_path: Path) -> None:
    """Idefics3 may not write an image token; here it may not write what it would have begun with either."""
    talks = asked("idefics3", "lengths")
    said = {theirs("idefics3").answer(t, 1).answer_ids[0] for t in talks}
    file = zoo.build("idefics3", tmp_path) / "generation_config.json"
    given = json.loads(file.read_text())
    file.write_text(json.dumps({**given, "bad_words_ids": [*given["bad_words_ids"], *([i] for i in said)]}))
    side, model = Stock(tmp_path), HFModel.load(tmp_path, LoraSpec(rank=2))
    wanted = [side.answer(t, 6) for t in talks]
    assert not {w.answer_ids[0] for w in wanted} & said
    assert model.generate(collated(model, talks, False), 6) == [w.text for w in wanted]


# -- a run ---------------------------------------------------------------------------------------------------------

RECIPE = """\
model: {model}
adapter: {{rank: 2, alpha: 8}}
stream:
  name: zoo
  image_root: images
  tasks:
    - {{name: first, train: first.jsonl, test: first.jsonl, max_new_tokens: 4}}
    - {{name: second, train: second.jsonl, test: second.jsonl, max_new_tokens: 4}}
method: {method}
optim: {{lr: 2e-2, steps: 2, batch_size: 2}}
out: {out}
"""
TASKS = {"first": ("one", "sizes", "between"), "second": ("lengths", "text", "system", "turns")}


def tasks(name: str) -> dict[str, list[Talk]]:
    """Two tasks of all conversations that a family takes."""
    return {
        task: [t for case in cases if (name, case) not in NOT_TAKEN for t in asked(name, case)]
        for task, cases in TASKS.items()
    }


def recipe(name: str, model: Path, folder: Path, method: str) -> Path:
    """The tasks as `messages` JSONL with parts, and a recipe."""
    (folder / "images").mkdir(parents=True)
    for task, talks in tasks(name).items():
        rows = [row(t, folder / "images", f"{task}{i}") for i, t in enumerate(talks)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = folder / "mine.yaml"
    path.write_text(RECIPE.format(model=model, method=method, out=folder / "run"))
    return path


def row(t: Talk, folder: Path, name: str) -> dict[str, Any]:
    """A conversation as Hugging Face's data sets have it."""
    files = [f"{name}_{i}.png" for i in range(len(t.images))]
    for file, image in zip(files, t.images, strict=True):
        image.save(folder / file)

    def part(p: Any) -> dict[str, str]:
        return {"type": "image"} if p is IMAGE else {"type": "text", "text": p}

    turns = [{"role": turn.role, "content": [part(p) for p in turn.parts]} for turn in t.turns]
    return {"id": name, "messages": turns, **({"images": files} if files else {})}


def good(*args: object) -> str:
    """A command's output; it succeeds."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.output


def compare(model: HFModel, side: Stock, talks: list[Talk], what: str) -> None:
    """Logits, loss and answers of trained models."""
    with torch.no_grad():
        for t in talks:
            out, wanted = model(collated(model, [t], True)), side.learn(t)
            near(out.logits_NV, wanted.logits_NV, what)
            answer = side.answer(t, 4)
            near(next_logits(model, collated(model, [t], False))[0], answer.logits_V, what)
            assert model.generate(collated(model, [t], False), 4) == [answer.text], what


def said(path: Path) -> dict[str, Any] | None:
    """A configuration file without the release that wrote it; None where there is no such file."""
    return {**json.loads(path.read_text()), "transformers_version": None} if path.is_file() else None


@family
def test_a_lora_run_and_its_exports(
    name: str, home: Callable[[str], Path], theirs: Callable[[str], Stock], tmp_path: Path
) -> None:
    """Two tasks trained; the adapter in stock PEFT on the stock base, and the merged checkpoint, are the run's model."""
    mine = recipe(name, home(name), tmp_path / "data", "lora")
    good("run", mine, "--quiet")
    run = RunDir.read(tmp_path / "data" / "run")
    model: Any = build_model(config.parse(run.config, mine))
    run.rows()[-1].load_model(model.adapters, None)
    model.train(False)
    good("export", run.path, "--to", tmp_path / "peft")
    good("export", run.path, "--merged", "--to", tmp_path / "merged")
    base = Stock(home(name))
    peft = Stock(home(name), model=PeftModel.from_pretrained(base.model, tmp_path / "peft"))
    merged = Stock(tmp_path / "merged")
    talks = [ts[0] for ts in tasks(name).values()] + [tasks(name)["first"][-1]]
    moved = peft.answer(talks[0], 1).logits_V - theirs(name).answer(talks[0], 1).logits_V
    assert moved.abs().max() > 0.01  # the adapter does something
    compare(model, peft, talks, f"{name}: PEFT export")
    compare(model, merged, talks, f"{name}: merged export")
    for file in ("video_preprocessor_config.json", "generation_config.json"):
        assert said(home(name) / file) == said(tmp_path / "merged" / file), f"{name}: merged export, {file}"
    compare(HFModel.load(tmp_path / "merged", LoraSpec(rank=2)), merged, talks[:1], f"{name}: loaded again")
    told = read_jsonl(run.rows()[-1].predictions("first"))
    answers = [peft.answer(t, 4).text for t in tasks(name)["first"]]
    assert [r["prediction"] for r in told] == answers, f"{name}: answers of the run"


@pytest.mark.parametrize("method", ["hide", pytest.param("lora_per_task", marks=pytest.mark.slow)])
@family
def test_a_routed_run(name: str, method: str, home: Callable[[str], Path], tmp_path: Path) -> None:
    """From end to end; what it routes does not depend on the batch."""
    mine = recipe(name, home(name), tmp_path / "data", method)
    good("run", mine, "--quiet")
    run = RunDir.read(tmp_path / "data" / "run")
    assert run.done and [r.name for r in run.rows() if r.trained] == ["first", "second"]
    model: Any = build_model(config.parse(run.config, mine))
    run.rows()[-1].load_model(model.adapters, None)
    model.train(False)
    names = list(model.adapters.names)[:2]
    talks = [t for ts in tasks(name).values() for t in ts]
    rows = {n: torch.tensor([float(i % 2 == k) for i in range(len(talks))]) for k, n in enumerate(names)}
    batch = collated(model, talks, False)
    with torch.no_grad(), model.adapters.using(Mix(rows)):
        logits, answers = next_logits(model, batch), model.generate(batch, 4)
    for i, t in enumerate(talks):
        with torch.no_grad(), model.adapters.using(Mix({names[i % 2]: 1.0} if len(names) > i % 2 else {})):
            alone = collated(model, [t], False)
            near(next_logits(model, alone)[0], logits[i], f"{name}: row {i}")
            assert model.generate(alone, 4) == [answers[i]]


# -- what is refused, or works in part -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_refused_when_loaded(name: str, home: Callable[[str], Path], tmp_path: Path) -> None:
    """One sentence with the family's reason, before anything is trained: an encoder-decoder, or no placeholder."""
    with pytest.raises(RetainError) as told:
        HFModel.load(home(name), LoraSpec(rank=2))
    sentence = str(told.value)
    kind = stock.AutoConfig.from_pretrained(home(name)).model_type.replace("-", "")
    assert kind in sentence.lower() and "\n" not in sentence.strip() and "name a family of" not in sentence, (
        sentence
    )
    assert ("encoder" in sentence) == (name == "florence2"), sentence


def test_plan_tells_which_layers_get_no_adapter(
    home: Callable[[str], Path], theirs: Callable[[str], Stock], tmp_path: Path
) -> None:
    """Qwen3-VL-MoE's experts are stacked tensors: `plan` says so, and names every linear layer that is left as it is."""
    printed = good("plan", recipe("qwen3_vl_moe", home("qwen3_vl_moe"), tmp_path / "data", "lora"))
    table = printed[printed.index("without an adapter") :]
    model = HFModel.load(home("qwen3_vl_moe"), LoraSpec(rank=2))
    left = {
        re.sub(r"\.\d+\.", ".*.", path)
        for path, module in theirs("qwen3_vl_moe").model.named_modules()
        if isinstance(module, torch.nn.Linear) and path not in model.adapters.sites
    }
    assert left and not {path for path in left if path not in table}, table
    assert "model.language_model.layers.*.mlp.experts" in table, table


@pytest.mark.parametrize("case", ["one", "text", "two", "mixed"])
def test_the_partial_family_is_stocks(
    case: str, ours: Callable[[str], HFModel], theirs: Callable[[str], Stock]
) -> None:
    test_training("qwen3_vl_moe", case, ours, theirs)
    test_inference("qwen3_vl_moe", case, ours, theirs)
