"""From examples to token ids and pixels: chat template, image tokens, prompt and answer, each computed once.

The answer is tokenised in the context of the prompt, and the prompt's tokens in training are those at
inference: where a tokenizer would merge across the border, the answer is tokenised on its own instead. Image
placeholders are expanded by the processor's own `replace_image_token`, one image at a time, so nothing
depends on the batch. Without a chat template the conversation is LLaVA's `vicuna_v1`
(github.com/haotian-liu/LLaVA, llava/conversation.py).
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from retain.data.picture import opened
from retain.models.cache import ByteLRU
from retain.types import Example, ImageSource, Message, RetainError

VICUNA_V1 = (
    "{{ 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ ' USER: ' }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ ' ASSISTANT: ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True, eq=False)
class ImageRef:
    """One image of an example: digest of pixels, source, and how many tokens and tower rows it becomes."""

    key: str
    source: ImageSource
    n_tokens: int
    n_rows: int
    grid: tuple[int, ...] = ()  # t, h, w in patches, where the family has one


@dataclass(frozen=True, eq=False)
class Encoded:
    """An example as token ids. Image tokens are in the prompt only; an untruncated answer ends with EOS."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    images: tuple[ImageRef, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def open_image(source: ImageSource, example_id: str) -> PILImage.Image:
    """RGB pixels of an image, as `data.picture` shows it. Raises RetainError naming the example."""
    return opened(source, f"example {example_id!r}")


class Encoder:
    """Turns examples into `Encoded`, and images into the tensors that the tower takes.

    `max_length` is in tokens. A longer example is an error that names it, or with `truncate` loses the end of
    its answer; prompts and image tokens are never cut. `kept` tokens of the context are soft prompts', not the
    example's: only the message says so.
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
    ) -> None:
        self.processor, self.eos, self.image_token_id, self.kept = processor, eos, image_token_id, kept
        self.tokenizer = processor.tokenizer
        self.max_length, self.truncate = max_length, truncate
        self.template: str = processor.chat_template or self.tokenizer.chat_template or VICUNA_V1
        self.image_token: str = getattr(processor, "image_token", None) or self.tokenizer.decode(
            [image_token_id]
        )
        self.pixels: ByteLRU[Mapping[str, Tensor]] = ByteLRU(budget)
        self._seen: weakref.WeakKeyDictionary[Example, Encoded] = weakref.WeakKeyDictionary()
        self._texts: dict[tuple[tuple[Message, ...], bool], str] = {}  # questions come again and again
        self._ids: dict[tuple[str, bool], tuple[int, ...]] = {}

    def __call__(self, example: Example) -> Encoded:
        """Token ids of prompt and answer, computed once per example.

        Raises RetainError for an example that is too long, or whose image counts disagree.
        """
        found = self._seen.get(example)
        if found is None:
            found = self._seen[example] = self._encode(example)
        return found

    def image(self, ref: ImageRef, example_id: str) -> Mapping[str, Tensor]:
        """The processor's tensors for one image, led by an axis of one image (or of its flat patches)."""
        found = self.pixels.get(ref.key)
        if found is None:
            found = self._process(open_image(ref.source, example_id))
            self.pixels.put(ref.key, found)
        return {k: v for k, v in found.items() if k not in COUNTS}

    # -- text ------------------------------------------------------------------------------------------------

    def render(self, messages: tuple[Message, ...], generate: bool) -> str:
        """The conversation as text by the chat template, one placeholder per image."""
        found = self._texts.get((messages, generate))
        if found is not None:
            return found
        content = [
            {"role": m.role, "content": [{"type": "image"}] * m.images + [{"type": "text", "text": m.text}]}
            for m in messages
        ]
        text = self.tokenizer.apply_chat_template(
            content, chat_template=self.template, tokenize=False, add_generation_prompt=generate
        )
        assert isinstance(text, str)
        _put(self._texts, (messages, generate), text)
        return text

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered conversation; BOS is added unless the template wrote it."""
        bos = self.tokenizer.bos_token
        return self._tokens(text, not (bos and text.startswith(bos)))

    def _tokens(self, text: str, special: bool) -> tuple[int, ...]:
        found = self._ids.get((text, special))
        if found is None:
            found = tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])
            _put(self._ids, (text, special), found)
        return found

    def _encode(self, example: Example) -> Encoded:
        messages = _placed(example)
        prompt_messages = messages[: len(example.prompt)]
        text = self.render(prompt_messages, generate=True)
        if text.count(self.image_token) != len(example.images):
            raise RetainError(
                f"example {example.id!r}: {len(example.images)} images, but the text that the model sees has "
                f"{text.count(self.image_token)} {self.image_token!r}"
            )
        refs, parts = [], text.split(self.image_token)
        expanded = parts[0]
        for source, part in zip(example.images, parts[1:], strict=True):
            ref, tokens = self._refer(source, example.id)
            refs.append(ref)
            expanded += tokens + part
        prompt = self.ids(expanded)
        found = prompt.count(self.image_token_id)
        if found != sum(r.n_tokens for r in refs):
            raise RetainError(
                f"example {example.id!r}: {found} image tokens for {sum(r.n_tokens for r in refs)} features"
            )
        answer: tuple[int, ...] = ()
        if example.messages and example.messages[-1].role == "assistant":
            before, after = self._around(text, messages, example.answer)
            answer = (*self._answer(prompt, expanded, before + example.answer), self._end(after))
        return self._fit(Encoded(prompt, answer, tuple(refs)), example)

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
            return Encoded(encoded.prompt, encoded.answer[:room], encoded.images)
        kept = f" ({self.kept} more are kept for soft prompts)" if self.kept else ""
        raise RetainError(
            f"example {example.id!r}: {len(encoded.prompt)} tokens of prompt (of which "
            f"{sum(r.n_tokens for r in encoded.images)} of images) and {len(encoded.answer)} of answer "
            f"exceed max_length {self.max_length}{kept}; shorten it, raise max_length, or set truncate"
        )

    # -- images ----------------------------------------------------------------------------------------------

    def _process(self, image: PILImage.Image) -> Mapping[str, Tensor]:
        out = self.processor.image_processor(
            images=[image], **(getattr(self.processor, "images_kwargs", None) or {})
        )
        return {k: torch.as_tensor(np.asarray(v)) for k, v in out.items()}

    def _refer(self, source: ImageSource, example_id: str) -> tuple[ImageRef, str]:
        image = open_image(source, example_id)
        key = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:24]
        found = self.pixels.get(key)
        if found is None:
            found = self._process(image)
            self.pixels.put(key, found)
        as_lists = {k: v.tolist() if k in COUNTS else v for k, v in found.items()}
        tokens: str = self.processor.replace_image_token(as_lists, 0)
        grid = tuple(int(n) for n in found["image_grid_thw"][0]) if "image_grid_thw" in found else ()
        pixels = found["pixel_values"]
        n_tokens = tokens.count(self.image_token)
        n_rows = n_tokens if grid else int(pixels.shape[1] if pixels.ndim == 5 else pixels.shape[0])
        return ImageRef(key, source, n_tokens, n_rows, grid), tokens


COUNTS = ("rows", "cols", "num_patches")
"""What an image processor says about an image besides its tensors: how many image tokens stand for it."""

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
        raise RetainError(
            f"example {example.id!r}: {len(example.images)} images, but its messages show {said}"
        )
    first = next((i for i, m in enumerate(example.messages) if m.role == "user"), None)
    if first is None:
        raise RetainError(f"example {example.id!r}: images without a user message to show them in")
    m = example.messages[first]
    shown = Message(m.role, m.text, len(example.images))
    return (*example.messages[:first], shown, *example.messages[first + 1 :])
