"""The guard: a model is what Hugging Face's own call says it is, or it is refused.

One probe (a picture of odd size with a question; words alone where the processor takes them; two pictures of unlike
size where it does; one answer each) goes twice: through the stock processor and the stock forward of the model's own
class, one conversation at a time, and through ours, all in one padded batch: collate, forward, prefill and decode, with
the adapter bank attached and empty. Token ids, loss, and the logits of the next token and of the one after it must
agree. What has passed is remembered by a fingerprint of model, processor, retain and transformers.
"""

# V vocabulary, N answer tokens

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from retain.adapters.bank import AdapterBank, Mix
from retain.files import read_json, write_json
from retain.models.encode import Encoder
from retain.models.family import Family
from retain.types import Batch, Example, Message, Output, RetainError

ABSOLUTE = 1e-3  # fp32, of logits and loss: sums in another order
RELATIVE = 3e-2  # in bf16 and fp16, of the largest logit: eight bits of a number, through all layers

REFUSED = (
    ValueError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    NotImplementedError,
    TemplateError,
)
"""What stock processors and models raise for a conversation that they do not take."""


class Probed(Protocol):
    """What the guard needs of a model: both its sides."""

    hf: Any
    processor: Any
    name: str
    training: bool
    device: torch.device
    family: Family
    encode: Encoder
    adapters: AdapterBank

    @property
    def precision(self) -> str: ...
    def __call__(self, batch: Batch, /) -> Output: ...
    def train(self, mode: bool = True) -> Any: ...
    def autocast(self) -> AbstractContextManager[Any]: ...
    def fingerprint(self) -> str: ...
    def collate(self, examples: Sequence[Example], *, answers: bool) -> Batch: ...
    def placed(self, batch: Batch) -> Batch: ...
    def cache(self, rows: int, room: int) -> Any: ...
    def prefill(self, batch: Batch, cache: Any) -> Tensor: ...
    def decode(self, token_B: Tensor, position_B: Tensor, mask_BS: Tensor | None, cache: Any) -> Tensor: ...
    def hidden(self, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Finding:
    """One comparison of one conversation: the largest difference, and what is allowed."""

    case: str
    what: str
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether ours is Hugging Face's; NaN is not."""
        return self.difference <= self.allowed


def check(model: Probed) -> list[Finding]:
    """Compare, unless this very model has passed before. Raises RetainError with what differs, for which family."""
    store = _store(model)
    known = _remembered(store)
    if known:
        return known
    findings = compare(model)
    wrong = [f for f in findings if not f.agrees]
    if wrong:
        raise RetainError(_sentence(model, wrong))
    with suppress(RetainError):  # a read-only home costs a second the next time, and nothing else
        write_json(store, {"findings": [asdict(f) for f in findings]})
    return findings


def passed(model: Probed) -> bool:
    """Whether this very model has passed before."""
    return bool(_remembered(_store(model)))


def rows(findings: Sequence[Finding]) -> list[list[str]]:
    """A table as text."""
    head = ["conversation", "compared", "largest difference", "allowed", "agrees"]
    body = [
        [f.case, f.what, f"{f.difference:.1e}", f"{f.allowed:.0e}", "yes" if f.agrees else "NO"]
        for f in findings
    ]
    return [head, *body]


# -- the probe -------------------------------------------------------------------------------------------------


def probe(model: Probed) -> dict[str, Example]:
    """The conversations that this model's processor takes, by name."""
    wide, tall = _picture(0, 53, 37), _picture(1, 44, 75)
    cases = (
        {"words": ()}
        if not model.family.tower
        else {"a picture": (wide,), "words": (), "two pictures": (wide, tall)}
    )
    asked = {
        "a picture": "What is shown?",
        "words": "Name a colour of the rainbow, please.",
        "two pictures": "Alike?",
    }
    made = {
        name: Example(
            f"probe: {name}",
            (Message("user", asked[name], len(pictures)), Message("assistant", "A small red square")),
            tuple(pictures),
        )
        for name, pictures in cases.items()
    }
    taken = {name: e for name, e in made.items() if name == "a picture" or _taken(model, e)}
    if not taken:
        raise RetainError(f"model {model.name!r}: its processor takes neither pictures nor words alone")
    return taken


def _picture(seed: int, width: int, height: int) -> PILImage.Image:
    """Drawn from a seed, coarse enough that resizing keeps it."""
    rng = np.random.default_rng(seed)
    small = PILImage.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), PILImage.Resampling.BILINEAR)


def _taken(model: Probed, example: Example) -> bool:
    try:
        _stock_prompt(model, example)
    except REFUSED:
        return False
    return True


# -- the other side --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stock:
    """What Hugging Face says of one conversation."""

    ids: tuple[int, ...]
    next_V: Tensor
    then_V: Tensor  # after the first answer token
    loss: float
    hidden_D: Tensor | None


def _stock_prompt(model: Probed, example: Example) -> dict[str, Tensor]:
    """The prompt by the stock processor's own call."""
    processor, encode = model.processor, model.encode
    pictures = [encode.opened(source, example.id) for source in example.images]
    if not hasattr(processor, "image_processor"):
        text = encode.render(example.prompt, generate=True)
        return dict(processor.tokenizer(text, add_special_tokens=_bos(model, text), return_tensors="pt"))
    if processor.chat_template or processor.tokenizer.chat_template:
        turns = encode.content(example.prompt)
        shown = iter(pictures)
        for turn in turns:
            for part in turn["content"]:
                if part["type"] == "image":
                    part["image"] = next(shown)
        more = {} if processor.chat_template else {"chat_template": processor.tokenizer.chat_template}
        return dict(
            processor.apply_chat_template(
                turns,
                tokenize=True,
                return_dict=True,
                add_generation_prompt=True,
                return_tensors="pt",
                **more,
            )
        )
    text = encode.render(example.prompt, generate=True)
    more = {} if _bos(model, text) else {"add_special_tokens": False}
    return dict(processor(images=[pictures] if pictures else None, text=[text], return_tensors="pt", **more))


def _bos(model: Probed, text: str) -> bool:
    bos = model.processor.tokenizer.bos_token
    return not (bos and text.startswith(bos))


def _stock(model: Probed, example: Example, answer: tuple[int, ...]) -> _Stock:
    """The model's own forward of prompt, of prompt and first answer token, and of the whole with labels."""
    inputs = {k: v.to(model.device) for k, v in _stock_prompt(model, example).items() if k != "labels"}
    dtype = model.hf.dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    T = inputs["input_ids"].shape[1]
    with torch.no_grad(), model.autocast():
        out = model.hf(**inputs, output_hidden_states=True)
        then = model.hf(**_longer(inputs, answer[:1], model))
        whole = _longer(inputs, answer, model)
        labels = whole["input_ids"].clone()
        labels[:, :T] = -100
        loss = model.hf(**whole, labels=labels).loss
    hidden = out.hidden_states[-1][0, -1].float().cpu() if out.hidden_states is not None else None
    ids = tuple(inputs["input_ids"][0].tolist())
    return _Stock(ids, out.logits[0, -1].float().cpu(), then.logits[0, -1].float().cpu(), float(loss), hidden)


def _longer(inputs: Mapping[str, Tensor], answer: tuple[int, ...], model: Probed) -> dict[str, Tensor]:
    """The prompt's inputs with answer tokens behind: seen, and of the type that this family's answers have."""
    n = len(answer)
    kinds = model.encode.types([0], [0])
    of_answer = {
        "input_ids": torch.tensor(answer),
        "attention_mask": torch.ones(n),
        "token_type_ids": torch.zeros(n),
    }
    if kinds is not None:
        of_answer["token_type_ids"] = torch.full((n,), kinds[-1])
    out = dict(inputs)
    T = inputs["input_ids"].shape[1]
    for key, value in inputs.items():
        if value.ndim == 2 and value.shape == (1, T) and not value.is_floating_point():
            more = of_answer.get(key, torch.zeros(n)).to(value)
            out[key] = torch.cat([value, more[None]], dim=1)
    return out


# -- both sides ------------------------------------------------------------------------------------------------


def compare(model: Probed) -> list[Finding]:
    """Every comparison, whether it agrees or not; the model's adapters are off."""
    cases = probe(model)
    was = model.training
    model.train(False)
    try:
        with model.adapters.using(Mix({})), torch.no_grad():
            return list(_compared(model, cases))
    finally:
        model.train(was)


def _compared(model: Probed, cases: Mapping[str, Example]) -> Iterator[Finding]:
    encoded = {name: model.encode(e) for name, e in cases.items()}
    theirs = {name: _stock(model, e, encoded[name].answer) for name, e in cases.items()}
    together = model.collate(list(cases.values()), answers=True)
    asked = model.collate(list(cases.values()), answers=False)
    out, (first_BV, then_BV) = (
        model(together),
        _decoded(model, asked, [e.answer[0] for e in encoded.values()]),
    )
    for i, (name, stock) in enumerate(theirs.items()):
        ids = encoded[name].prompt
        wrong = sum(a != b for a, b in zip(ids, stock.ids, strict=False)) + abs(len(ids) - len(stock.ids))
        yield Finding(name, "token ids", float(wrong), 0.0)
        allowed = _allowed(model, stock.next_V)
        mine = out.row_N == i
        loss = float(F.cross_entropy(out.logits_NV[mine].float(), out.labels_N[mine]))
        yield Finding(name, "loss", abs(loss - stock.loss), allowed)
        yield Finding(name, "logits, training", _far(out.logits_NV[mine][0], stock.next_V), allowed)
        yield Finding(name, "logits, next token", _far(first_BV[i], stock.next_V), allowed)
        yield Finding(name, "logits, token after", _far(then_BV[i], stock.then_V), allowed)


def _decoded(model: Probed, batch: Any, answers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Prefill, then one step with the answers' first tokens: two times (B, V)."""
    batch = model.placed(batch)
    mask_BT = batch.inputs["attention_mask"].to(model.device)
    B, T = mask_BT.shape
    position_B = torch.tensor(batch.meta["next_position"], device=model.device)
    cache = model.cache(B, T + 1)
    with model.adapters.stacked():
        first_BV = model.prefill(batch, cache)
        seen_BS = F.pad(mask_BT, (0, 1), value=1) if batch.meta["padded"] else None
        then_BV = model.decode(torch.tensor(answers, device=model.device), position_B, seen_BS, cache)
    return first_BV, then_BV


def _far(a: Tensor, b: Tensor) -> float:
    return float((a.float().cpu() - b).abs().max())


def _allowed(model: Probed, logits_V: Tensor) -> float:
    exact = model.hf.dtype == torch.float32 and model.precision == "fp32"
    return ABSOLUTE if exact else RELATIVE * max(1.0, float(logits_V.abs().max()))


def _sentence(model: Probed, wrong: Sequence[Finding]) -> str:
    """What differs, in one sentence; where it comes from, as far as the comparisons tell."""
    f = next((f for f in wrong if f.what == "token ids"), wrong[0])
    many = (
        f"{f.difference:.0f} tokens"
        if f.what == "token ids"
        else f"{f.difference:.2g} (allowed {f.allowed:.2g})"
    )
    return (
        f"model {model.name or model.family.name!r} (family {model.family.name}): {_source(model, wrong)}: for {f.case!r} "
        f"the {f.what} differ by {many} from Hugging Face's own call of {type(model.hf).__name__} with "
        f"{type(model.processor).__name__}; a run would train another model than the one that is deployed, so it is refused"
    )


def _source(model: Probed, wrong: Sequence[Finding]) -> str:
    """Ids, head, padding, mask or positions: which of them, by asking again."""
    names = {f.case for f in wrong}
    if any(f.what == "token ids" for f in wrong):
        return "token ids differ"
    cases = {name: e for name, e in probe(model).items() if name in names}
    example = next(iter(cases.values()))
    with model.adapters.using(Mix({})), torch.no_grad():
        stock = _stock(model, example, model.encode(example).answer)
        allowed = _allowed(model, stock.next_V)
        alone = model.collate([example], answers=False)
        if all(f.what == "loss" or f.what == "logits, training" for f in wrong):
            return "the mask over the answer, or its positions, differ"
        mine, _ = _decoded(model, alone, model.encode(example).answer[:1])
        if _far(mine[0], stock.next_V) <= allowed:
            only = all(f.what == "logits, token after" for f in wrong)
            return (
                "positions or mask of generated tokens differ"
                if only
                else "the mask or the positions of padded rows differ"
            )
        hidden = model.hidden(alone)[0, -1] if stock.hidden_D is not None else None
    if hidden is not None and stock.hidden_D is not None and _far(hidden, stock.hidden_D) <= allowed:
        return "the head differs"
    return "image features, mask or positions differ" if example.images else "mask or positions differ"


# -- what has passed -------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where it is remembered: `$RETAIN_CACHE`, else `retain` in the user's cache folder."""
    own = os.environ.get("RETAIN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "retain"


def _store(model: Probed) -> Path:
    told = [
        model.fingerprint(), str(model.hf.dtype), model.precision, model.family.name, model.device.type,
        type(model.hf).__name__, _of_processor(model), _version("retain"), _version("transformers"), _sources(),
        sorted(model.adapters.sites), model.encode.max_length,
    ]  # fmt: skip
    return cache_folder() / "guard" / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]}.json"


def _of_processor(model: Probed) -> str:
    """A hash of all that the processor's words and pictures depend on."""
    processor, tokenizer = model.processor, model.processor.tokenizer
    parts = [type(processor).__name__, model.encode.template, tokenizer.backend_tokenizer.to_str()]
    images = getattr(processor, "image_processor", None)
    if images is not None:
        parts.append(images.to_json_string())
    own = signature(type(processor).__init__).parameters if images is not None else {}
    parts += [
        f"{name}={getattr(processor, name, None)!r}"
        for name in own
        if not name.endswith(("processor", "tokenizer"))
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sources() -> str:
    """A hash of this package's own files that the comparison runs through: another retain is compared again."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *(here.parent / "adapters").glob("*.py")])
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def _remembered(store: Path) -> list[Finding]:
    if not store.is_file():
        return []
    with suppress(RetainError, TypeError, KeyError):
        return [Finding(**f) for f in read_json(store)["findings"]]
    return []
