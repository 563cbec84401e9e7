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
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn import functional as F

from retain.adapters.bank import AdapterBank, Mix
from retain.files import read_json, write_json
from retain.models.encode import Encoder
from retain.models.family import Family
from retain.models.stock import Stock
from retain.types import Batch, Example, Message, Output, RetainError

ABSOLUTE = 1e-3  # fp32: the largest difference of a logit or a loss; sums in another order
RELATIVE = 5e-2  # bf16, fp16: root mean square of the difference over that of the logits; eight bits, through all layers

REFUSED = (
    AttributeError,
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
    try:
        findings = compare(model)
    except REFUSED as error:
        raise RetainError(
            f"model {model.name or model.family.name!r} (family {model.family.name}): {type(model.hf).__name__} with "
            f"{type(model.processor).__name__} cannot be driven: {type(error).__name__}: {error}"
        ) from error
    wrong = [f for f in findings if not f.agrees]
    if wrong:
        raise RetainError(_sentence(model, wrong))
    with suppress(RetainError):  # a read-only home costs a second the next time, and nothing else
        write_json(store, {"findings": [asdict(f) for f in findings]}, shared=True)
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


def _picture(seed: int, width: int, height: int) -> np.ndarray:
    """Drawn from a seed in squares of nine pixels, coarse enough that resizing keeps them."""
    squares = np.random.default_rng(seed).integers(
        0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8
    )
    return squares.repeat(9, 0).repeat(9, 1)[:height, :width]


def _taken(model: Probed, example: Example) -> bool:
    try:
        _stock(model).prompt(example)
    except REFUSED:
        return False
    return True


def _stock(model: Probed) -> Stock:
    return Stock(model.hf, model.processor, model.encode, model.autocast)


# -- both sides ------------------------------------------------------------------------------------------------


def compare(model: Probed) -> list[Finding]:
    """Every comparison, whether it agrees or not; the model's adapters are off."""
    was = model.training
    model.train(False)
    try:
        with model.adapters.using(Mix({})), unlimited(model), torch.no_grad():
            return list(_compared(model, probe(model)))
    finally:
        model.train(was)


@contextmanager
def unlimited(model: Probed) -> Iterator[None]:
    """Without the recipe's `max_length`, which is about its own examples."""
    limit = model.encode.max_length
    model.encode.max_length = sys.maxsize
    try:
        yield
    finally:
        model.encode.max_length = limit


def _compared(model: Probed, cases: Mapping[str, Example]) -> Iterator[Finding]:
    encoded = {name: model.encode(e) for name, e in cases.items()}
    theirs = {name: _stock(model).ask(e) for name, e in cases.items()}
    together = model.collate(list(cases.values()), answers=True)
    asked = model.collate(list(cases.values()), answers=False)
    out, (first_BV, then_BV) = (
        model(together),
        _decoded(model, asked, [e.answer[0] for e in encoded.values()]),
    )
    for i, (name, said) in enumerate(theirs.items()):
        ids = encoded[name].prompt
        yield Finding(name, "token ids", _unlike(ids, said.ids), 0.0)
        whole = _stock(model).written(cases[name])
        if (
            whole[: len(ids)] == ids
        ):  # else the template writes a finished turn otherwise than it asks for one
            yield Finding(
                name,
                "token ids of the answer",
                _answered(model, encoded[name].answer, whole[len(ids) :]),
                0.0,
            )
        mine = out.row_N == i
        loss = float(F.cross_entropy(out.logits_NV[mine].float(), out.labels_N[mine]))
        exact = is_exact(model.hf.dtype, model.precision)
        yield Finding(
            name, "loss", abs(loss - said.loss), ABSOLUTE if exact else RELATIVE * max(1.0, said.loss)
        )
        for what, ours, stock in (
            ("logits, training", out.logits_NV[mine], said.answer_NV),
            ("logits, next token", first_BV[i], said.next_V),
            ("logits, token after", then_BV[i], said.answer_NV[1]),
        ):
            yield Finding(name, what, *distance(ours, stock, exact))


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


def _near(ours: Tensor, stock: Tensor, exact: bool) -> bool:
    difference, allowed = distance(ours, stock, exact)
    return difference <= allowed


def _unlike(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Tokens that differ, or that one side has and the other lacks."""
    return float(sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs)))


def _answered(model: Probed, answer: Sequence[int], theirs: Sequence[int]) -> float:
    """Answer tokens that differ; the one that ends it only where the template writes one (LLaVA's writes none)."""
    *words, end = answer
    n = len(words)
    ends = theirs[n : n + 1]
    return _unlike(words, theirs[:n]) + float(bool(ends) and ends[0] in model.encode.eos and ends[0] != end)


def is_exact(dtype: torch.dtype, precision: str = "fp32") -> bool:
    """Whether logits are computed in fp32 throughout."""
    return dtype == torch.float32 and precision == "fp32"


def distance(ours: Tensor, stock: Tensor, exact: bool) -> tuple[float, float]:
    """How far logits are apart, and how far they may be: see `ABSOLUTE` and `RELATIVE`."""
    apart, stock = ours.float().cpu() - stock.float().cpu(), stock.float().cpu()
    if exact:
        return float(apart.abs().max()), ABSOLUTE
    return float(
        apart.pow(2).mean().sqrt() / (stock - stock.mean(-1, keepdim=True)).pow(2).mean().sqrt()
    ), RELATIVE


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
    if any(f.what.startswith("token ids") for f in wrong):
        return "token ids differ"
    example = next(e for name, e in probe(model).items() if name in names)
    if all(f.what in ("loss", "logits, training") for f in wrong):
        return "the mask over the answer, or its positions, differ"
    with model.adapters.using(Mix({})), unlimited(model), torch.no_grad():
        said, exact = _stock(model).ask(example), is_exact(model.hf.dtype, model.precision)
        alone = model.collate([example], answers=False)
        mine, _ = _decoded(model, alone, model.encode(example).answer[:1])
        if _near(mine[0], said.next_V, exact):
            later = all(f.what == "logits, token after" for f in wrong)
            return f"the mask or the positions of {'generated tokens' if later else 'padded rows'} differ"
        hidden = model.hidden(alone)[0, -1] if said.hidden_D is not None else None
    if hidden is not None and said.hidden_D is not None and _near(hidden, said.hidden_D, exact):
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
        sorted(model.adapters.sites), _config(model.hf.config),
    ]  # fmt: skip
    return cache_folder() / "guard" / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]}.json"


def _config(config: Any) -> str:
    """What the arithmetic takes from config.json besides shapes: rotations, scales, masks, which token is an image."""
    told = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _of_processor(model: Probed) -> str:
    """A hash of all that the processor's words and pictures depend on."""
    processor, tokenizer = model.processor, model.processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [type(processor).__name__, model.encode.template, words]
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
