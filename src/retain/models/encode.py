"""From examples to token ids and pixels: chat template, image tokens, prompt and answer, each computed once.

What the stock processor does to a conversation is done here by its own parts (chat template, layout, image processor,
`replace_image_token`, tokenizer), one image at a time, so that nothing depends on the batch; `retain.models.guard`
holds the result against the processor's own call. The answer is tokenised in the context of the prompt, and the
prompt's tokens in training are those at inference: where a tokenizer would merge across the border, the answer is
tokenised on its own instead. Special tokens in data are text: `</s>` in an answer ends nothing.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image as PILImage
from torch import Tensor
from transformers.utils.chat_template_utils import _get_control_token_patterns, mark_control_tokens

from retain.data.picture import opened
from retain.models.cache import ByteLRU
from retain.models.family import Family
from retain.models.template import looked_at
from retain.types import Example, ImageSource, Message, RetainError

Square = Literal["crop", "pad"]


@dataclass(frozen=True, eq=False)
class ImageRef:
    """One image of an example: digest of pixels, source, and how many tokens and tower rows it becomes."""

    key: str
    source: ImageSource
    n_tokens: int
    n_rows: int
    grid: tuple[int, ...] = ()  # t, h, w in patches, where the family has one
    size: tuple[int, ...] = ()  # height and width as the model is told them, where it is


@dataclass(frozen=True, eq=False)
class Encoded:
    """An example as token ids. Image tokens are in the prompt only; an untruncated answer ends with EOS.

    `earlier` are places (start, stop) in the prompt that hold answers of earlier turns, with what ends them; `unfound`
    says which of them the template does not write as they are, so that they cannot be learned.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    images: tuple[ImageRef, ...]
    earlier: tuple[tuple[int, int], ...] = ()
    unfound: str = ""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def open_image(source: ImageSource, told: str) -> PILImage.Image:
    """RGB pixels of an image, as `data.picture` shows it. Raises RetainError naming the example."""
    return opened(source, told)


class Encoder:
    """Turns examples into `Encoded`, and images into the tensors that the tower takes.

    `max_length` is in tokens. A longer example is an error that names it, or with `truncate` loses the end of
    its answer; prompts and image tokens are never cut. `kept` tokens of the context are soft prompts', not the
    example's: only the message says so. `square` "pad" pads every picture to a square first, as LLaVA-1.5 was
    trained; "crop" leaves it to the processor.
    """

    def __init__(
        self,
        processor: Any,
        eos: frozenset[int],
        image_token_id: int,
        max_length: int,
        truncate: bool = False,
        budget: int = 1 << 28,
        kept: int = 0,
        family: Family | None = None,
        square: Square = "crop",
    ) -> None:
        self.processor, self.eos, self.image_token_id, self.kept = processor, eos, image_token_id, kept
        self.tokenizer = processor.tokenizer
        self.max_length, self.truncate, self.square = max_length, truncate, square
        self.family = family or Family("?", "", "", ())
        self.told = own_template(processor)
        self.template: str = self.told or self.family.template
        small = (Message("user", "What?"), Message("assistant", "Yes"))
        for turns, generate in ((small[:1], True), (small, False)):
            looked_at(self.template, partial(self._templated, self.content(turns), generate))
        self.image_token = placeholder(processor, image_token_id)
        self.pixels: ByteLRU[Mapping[str, Tensor]] = ByteLRU(budget)
        self._control, _ = _get_control_token_patterns(self.tokenizer._get_control_tokens(self.template))
        self._how: dict[str, Any] | None = None  # what the processor tells its image processor
        self._seen: weakref.WeakKeyDictionary[Example, Encoded] = weakref.WeakKeyDictionary()
        self._texts: dict[tuple[tuple[Message, ...], bool], str] = {}  # questions come again and again
        self._ids: dict[tuple[str, bool], tuple[int, ...]] = {}

    def __call__(self, example: Example) -> Encoded:
        """Token ids of prompt and answer, computed once per example.

        Raises RetainError for an example that is too long, that template or processor refuse, or whose image counts
        disagree.
        """
        found = self._seen.get(example)
        if found is None:
            found = self._seen[example] = self._encode(example)
        return found

    def image(self, ref: ImageRef, told: str) -> Mapping[str, Tensor]:
        """The processor's tensors for one image, led by an axis of one image (or of its flat patches)."""
        found = self.pixels.get(ref.key)
        if found is None:
            found = self._process(self.opened(ref.source, told), told, ref.key)
            self.pixels.put(ref.key, found)
        unused = {*COUNTS, *getattr(self.processor, "unused_input_names", ())}
        return {k: v for k, v in found.items() if k not in unused}

    def opened(self, source: ImageSource, told: str) -> PILImage.Image:
        """The picture as the processor is given it."""
        image = open_image(source, told)
        return padded(image, self._background()) if self.square == "pad" else image

    def pixels_of(self, picture: ImageSource) -> Tensor:
        """What the tower is shown of one picture: the processor's pixel values."""
        return self._process(self.opened(picture, ""), "", "")["pixel_values"]

    def types(self, prompt: Sequence[int], answer: Sequence[int]) -> list[int] | None:
        """Token types of a row, for a family whose mask depends on them."""
        if self.family.types is None:
            return None
        return self.family.types([*prompt, *answer], len(prompt), self.image_token_id)

    # -- text ------------------------------------------------------------------------------------------------

    def content(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as a chat template takes them, images in their places; of a language model, plain texts."""
        if not self.family.tower and self.told:
            return [{"role": m.role, "content": m.text} for m in messages]
        return [
            {
                "role": m.role,
                "content": [
                    {"type": "image"} if part is None else {"type": "text", "text": part}
                    for part in m.parts()
                ],
            }
            for m in messages
        ]

    def render(self, messages: tuple[Message, ...], generate: bool) -> str:
        """The conversation as text by the chat template, one placeholder per image.

        Special tokens that the data brings are marked, so that `_tokens` reads them as text.
        """
        found = self._texts.get((messages, generate))
        if found is not None:
            return found
        text = self._templated(self._safe(self.content(messages)), generate)
        _put(self._texts, (messages, generate), text)
        return text

    def _templated(self, turns: list[dict[str, Any]], generate: bool) -> str:
        """The chat template's text. One that wants a turn of words as plain text (Pixtral's system turn) gets it so."""
        how = {
            "chat_template": self.template,
            "tokenize": False,
            "add_generation_prompt": generate,
        }
        try:
            return str(self.tokenizer.apply_chat_template(turns, **how))
        except (TemplateError, TypeError):
            plain = [{**turn, "content": words(turn["content"])} for turn in turns]
            if plain == turns:
                raise
            return str(self.tokenizer.apply_chat_template(plain, **how))

    def _safe(self, content: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Every text with its control tokens marked, and with placeholders of images that are none."""
        for message in content:
            if isinstance(message["content"], str):
                message["content"] = self._marked(message["content"])
                continue
            for part in message["content"]:
                if "text" in part:
                    part["text"] = self._marked(part["text"])
        return content

    def _marked(self, text: str) -> str:
        out: str = mark_control_tokens(text, self._control)
        return out

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered conversation, with BOS where the stock call adds it.

        A processor does unless the template wrote it; a tokenizer leaves it to the template where there is one.
        """
        return self._tokens(text, self.adds_bos(text))

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a piece of text, nothing around it."""
        return self._tokens(text, False)

    def adds_bos(self, text: str) -> bool:
        """Whether the stock call puts special tokens around a rendered conversation."""
        bos = self.tokenizer.bos_token
        leaves = bool(self.told) and not hasattr(self.processor, "image_processor")
        return not leaves and not (bos and text.startswith(bos))

    def _tokens(self, text: str, special: bool) -> tuple[int, ...]:
        found = self._ids.get((text, special))
        if found is None:
            if MARK in text:  # the tokenizer's own way to read marked tokens as text adds no BOS
                bos = self.tokenizer("", add_special_tokens=special)["input_ids"][:1]
                plain = self.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)[
                    "input_ids"
                ]
                found = (*(i for i in bos if i == self.tokenizer.bos_token_id), *plain)
            else:
                found = tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])
            _put(self._ids, (text, special), found)
        return found

    def _encode(self, example: Example) -> Encoded:
        messages = _placed(example)
        prompt_messages = messages[: len(example.prompt)]
        text = self._rendered(prompt_messages, example, generate=True)
        shown = _count(text, self.image_token) if self.image_token else 0
        if shown != len(example.images):
            raise RetainError(
                f"{example.told}: {len(example.images)} images, but the text that the model sees has "
                f"{shown} {self.image_token!r}"
            )
        referred = self._referred(example)
        refs, tokens = [ref for ref, _ in referred], [t for _, t in referred]
        try:
            expanded = self._expanded(text, tokens)
        except ValueError as error:
            raise RetainError(
                f"{example.told}: {type(self.processor).__name__} refuses it: {error}"
            ) from None
        prompt = self.ids(expanded)
        found = prompt.count(self.image_token_id) if refs else 0
        if found != sum(r.n_tokens for r in refs):
            raise RetainError(
                f"{example.told}: {found} image tokens for {sum(r.n_tokens for r in refs)} features"
            )
        answer: tuple[int, ...] = ()
        if example.messages and example.messages[-1].role == "assistant":
            said = self._marked(example.answer)
            before, after = self._around(text, messages, said)
            answer = (*self._answer(prompt, expanded, before + said), self._end(after))
        earlier, unfound = self._earlier(prompt_messages, text, prompt, tokens)
        return self._fit(Encoded(prompt, answer, tuple(refs), earlier, unfound), example)

    def _rendered(self, messages: tuple[Message, ...], example: Example, generate: bool) -> str:
        """`render`; what the template refuses, or drops, is an error that names the example."""
        try:
            text = self.render(messages, generate)
        except (TemplateError, TypeError) as error:
            raise RetainError(f"{example.told}: the chat template refuses it: {error}") from None
        for m in messages:
            said = [self._marked(t) for t in m.parts() if t and m.role != "assistant"]
            lost = next((t for t in said if not _within(t, text)), "")
            if lost:
                raise RetainError(
                    f"{example.told}: the chat template drops the {m.role} turn {lost[:40]!r}; "
                    "move it into another turn, or use a model whose template has that role"
                )
        return text

    def _expanded(self, text: str, tokens: Sequence[str]) -> str:
        """The text as the processor lays it out, every placeholder replaced by the tokens of its image."""
        lay = getattr(self.processor, "prepare_inputs_layout", None)
        if lay is not None:  # with pictures that only have to be there: what it adds is words
            blank = [PILImage.new("RGB", (28, 28))] * len(tokens)
            images, texts, *_ = lay(images=blank or None, text=[text])
            own = [MARKED.sub("", t) for t in texts]  # placeholders in the data's words are none
            self.processor.validate_inputs(images=images, text=own)
            (text,) = texts
        # a marked placeholder is a word of the data and stands for no image
        parts = re.split(f"(?<!{MARK}){re.escape(self.image_token)}", text) if tokens else [text]
        assert len(parts) == len(tokens) + 1
        return "".join(part for pair in zip(parts, [*tokens, ""], strict=True) for part in pair)

    def _earlier(
        self, messages: tuple[Message, ...], text: str, prompt: tuple[int, ...], tokens: Sequence[str]
    ) -> tuple[tuple[tuple[int, int], ...], str]:
        """Where the answers of earlier turns, and the tokens that end them, lie in the prompt; and one that is not found."""
        out, unfound = [], ""
        for k, m in enumerate(messages):
            if m.role != "assistant":
                continue
            said, shown = self._marked(m.text), sum(n.images for n in messages[:k])
            begins, start = self._begins(messages[:k], said, text)
            if start < 0:
                unfound = f"turn {k + 1} ({m.text[:40]!r})"
                continue
            first = _common(self.ids(self._expanded(text[:begins], tokens[:shown])), prompt)
            last = _common(self.ids(self._expanded(text[: start + len(said)], tokens[:shown])), prompt)
            ends = last < len(prompt) and prompt[last] in self.eos
            out.append((first, last + ends))
        return tuple(out), unfound

    def _begins(self, before: tuple[Message, ...], said: str, text: str) -> tuple[int, int]:
        """Where in the text the model begins to speak behind some turns, and where its answer stands; -1: nowhere."""
        asked = self.render(before, generate=True)
        if text.startswith(asked):
            rest = text[len(asked) :]
            blank = len(rest) - len(rest.lstrip())
            for skip in (0, blank):
                if rest[skip:].startswith(said):
                    return len(asked), len(asked) + skip
        plain = self.render(before, generate=False)
        start = text.find(said, len(plain)) if text.startswith(plain) else -1
        return start, start

    def _around(self, prompt: str, messages: tuple[Message, ...], answer: str) -> tuple[str, str]:
        """What the template writes between the prompt and the answer, and after the answer."""
        full = self.render(messages, generate=False)
        rest = full[len(prompt) :] if full.startswith(prompt) else ""
        at = rest.find(answer)
        before = rest[:at] if at > 0 else ""
        return (before, rest[at + len(answer) :]) if not before.strip() and at >= 0 else ("", "")

    def _answer(self, prompt: tuple[int, ...], text: str, answer: str) -> tuple[int, ...]:
        both = self.ids(text + answer)
        return both[len(prompt) :] if both[: len(prompt)] == prompt else self._tokens(answer, False)

    def _end(self, after: str) -> int:
        """The token that ends a turn: what the template writes if it is an EOS, else the tokenizer's own."""
        ids = self._tokens(after.strip(), False) if after.strip() else ()
        if ids and ids[0] in self.eos:
            return int(ids[0])
        own = self.tokenizer.eos_token_id
        return int(own) if own is not None else min(self.eos)

    def _fit(self, encoded: Encoded, example: Example) -> Encoded:
        if len(encoded) <= self.max_length:
            return encoded
        room = self.max_length - len(encoded.prompt)
        if self.truncate and room > 0:
            return replace(encoded, answer=encoded.answer[:room])
        kept = f" ({self.kept} more are kept for soft prompts)" if self.kept else ""
        raise RetainError(
            f"{example.told}: {len(encoded.prompt)} tokens of prompt (of which "
            f"{sum(r.n_tokens for r in encoded.images)} of images) and {len(encoded.answer)} of answer "
            f"exceed max_length {self.max_length}{kept}; shorten it, raise max_length, or set truncate"
        )

    # -- images ----------------------------------------------------------------------------------------------

    def _process(self, image: PILImage.Image, told: str, key: str) -> Mapping[str, Tensor]:
        """The processor's tensors of one picture; `key` says whether it stands in a row with others."""
        shown = [[image, image]] if key.endswith(SEVERAL) else [image]
        try:
            if self._how is None:  # the same for every picture, and slow to put together
                kwargs = self.processor._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs)
                self._how = kwargs["images_kwargs"]
            out, _ = self.processor._process_images(shown, **self._how)
        except (
            ValueError,
            TypeError,
            RuntimeError,
            ArithmeticError,
            LookupError,
            OSError,
            MemoryError,
        ) as error:
            raise RetainError(
                f"{told}: {type(self.processor).__name__} refuses a picture of "
                f"{image.width} x {image.height}: {error}"
            ) from error
        made = {k: torch.as_tensor(np.asarray(v)) for k, v in out.items()}
        return {k: v[:1] for k, v in made.items()} if key.endswith(SEVERAL) else made

    def _referred(self, example: Example) -> list[tuple[ImageRef, str]]:
        if example.images and not hasattr(self.processor, "image_processor"):
            raise RetainError(
                f"{example.told}: the model takes text only, and it has {len(example.images)} images"
            )
        several = len(example.images) > 1 and self.family.together
        return [self.reference(source, example.told, several) for source in example.images]

    def reference(self, source: ImageSource, told: str, several: bool) -> tuple[ImageRef, str]:
        """An image, and the words that stand for it; `several`: it is shown beside others, where that matters."""
        image = self.opened(source, told)
        key = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:24]
        key += SEVERAL if several else ""
        found = self.pixels.get(key)
        if found is None:
            found = self._process(image, told, key)
            self.pixels.put(key, found)
        counts = {k: v.tolist() if k in COUNTS else v.numpy() for k, v in found.items()}
        tokens: str = self.processor.replace_image_token(counts, 0)
        n_tokens = self._tokens(tokens, False).count(self.image_token_id)
        grid = tuple(int(n) for n in found["image_grid_thw"][0]) if "image_grid_thw" in found else ()
        size = tuple(int(n) for n in found["image_sizes"][0]) if "image_sizes" in found else ()
        pixels = found["pixel_values"]
        n_rows = int(pixels.shape[1] if pixels.ndim == 5 else pixels.shape[0])
        return ImageRef(key, source, n_tokens, n_tokens if self.family.flat else n_rows, grid, size), tokens

    def _background(self) -> tuple[int, ...]:
        """The processor's mean colour, which padding becomes zero by."""
        mean = getattr(self.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        return tuple(int(255 * m) for m in mean)


COUNTS = ("rows", "cols", "num_patches", "num_crops", "batch_num_images")
"""What an image processor says about an image besides its tensors: how many image tokens stand for it."""

SEVERAL = "+"
"""Ends the key of an image that stands in a row with others, where its processor treats such images otherwise."""

MARK, UNMARK = "\U000f0000", "\U000f0001"
"""What `mark_control_tokens` puts around a special token that is text."""

MARKED = re.compile(f"{MARK}[^{MARK}{UNMARK}]*{UNMARK}")

DATE = re.compile(r"""\bstrftime_now\(\s*(["'])(.{0,99}?)\1\s*\)""")
SAME_DAY = datetime(2025, 1, 1)
"""What a template that writes the date is told: a run that goes on past midnight is the same run."""

TEXTS = 1 << 11
"""Texts whose rendering and tokens are remembered; beyond that all are forgotten at once."""


def _put(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= TEXTS:
        cache.clear()
    cache[key] = value


def _placed(example: Example) -> tuple[Message, ...]:
    """The messages with every image in a turn: the first user turn where the example does not say."""
    said = sum(m.images for m in example.messages)
    if said == len(example.images):
        return example.messages
    if said:
        raise RetainError(f"{example.told}: {len(example.images)} images, but its messages show {said}")
    first = next((i for i, m in enumerate(example.messages) if m.role == "user"), None)
    if first is None:
        raise RetainError(f"{example.told}: images without a user message to show them in")
    m = example.messages[first]
    shown = Message(m.role, m.text, len(example.images))
    return (*example.messages[:first], shown, *example.messages[first + 1 :])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows have in common from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _count(text: str, token: str) -> int:
    """Placeholders that the template wrote; marked ones are the data's own text."""
    return text.count(token) - text.count(MARK + token)


def placeholder(processor: Any, image_token_id: int) -> str:
    """What stands for an image in a rendered conversation; "" for a model of text only."""
    named = getattr(processor, "image_token", None)
    if named or image_token_id < 0:
        return str(named or "")
    return str(processor.tokenizer.decode([image_token_id]))


def padded(image: PILImage.Image, background: tuple[int, ...]) -> PILImage.Image:
    """Centred on a square of the background colour (LLaVA's `expand2square`)."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    out = PILImage.new("RGB", (side, side), background)
    out.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return out


def _within(part: str, text: str) -> bool:
    """Whether a text holds another, whatever was done to its blanks."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())


def words(content: Any) -> Any:
    """A turn's content as plain text where no image stands in it; else as it is."""
    if isinstance(content, str) or any(part["type"] != "text" for part in content):
        return content
    return "".join(part["text"] for part in content)


def own_template(processor: Any) -> str | None:
    """The checkpoint's chat template, with one date in the place of today's; None where it has none."""
    told = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(told, dict):  # one for tools, one for all else
        told = told.get("default")
    return DATE.sub(lambda m: repr(SAME_DAY.strftime(m[2])), told) if told else None
