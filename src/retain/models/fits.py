"""Which rows of a long file have to be encoded before a run starts, to know that all of them fit the model.

Encoding a row costs a millisecond, most of it for its picture and the chat template, and two hundred thousand of
them minutes. Most rows can be told to fit without it, by an upper bound on their tokens:

- a chat template writes the same words around all conversations of one shape (roles, pictures, blank or not), so that
  a few of each shape are encoded, and tell how long those words are. A text in which something stands that a template
  may look for (a control token, one of the template's own literals) is encoded itself;
- a tokenizer makes at most one token of every byte of normalised text. Where that is too many, the text's own tokens
  are counted, without the template;
- a processor's image tokens depend on a picture's size alone, so that one blank picture of each size is processed.

A picture is decoded once, up to `DECODED` of them or `PIXELS` of all; of more PNG and JPEG files the head and the end
are looked at, and what is not as it should be there is decoded too. `retain doctor` decodes all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import TemplateError, nodes
from PIL import Image as PILImage

from retain.data.glance import glanced
from retain.data.picture import tried
from retain.models.encode import Encoder
from retain.types import Lazy, Message, Plain, RetainError

DECODED, PIXELS = 1 << 12, 1 << 26
OF_A_SHAPE = 3  # conversations of each shape that are encoded
SLACK = 32  # tokens: BOS, EOS, prefixes of a tokenizer, words that two texts share where they meet
SPREAD = 64  # bytes by which a template's own words may differ within a shape; beyond, nothing is known of it
SIZES = 64  # sizes of which a blank picture is processed, where the processor can tell how many tokens others have
AT_ONCE = 1 << 10


class Sieve:
    """Looks through rows as plain data, and names those that are not sure to fit."""

    def __init__(self, encode: Encoder) -> None:
        self.encode = encode
        self.marks = _marks(encode)
        self.words: dict[
            Any, list[int]
        ] = {}  # of a shape: bytes of the template's own words, of those encoded
        self.pictures: dict[int, int] = {}  # hash of a path -> at most that many tokens; -1: encode the row
        self.sizes: dict[tuple[tuple[int, int], bool], int] = {}
        self.decoded = self.pixels = 0
        backend = getattr(encode.tokenizer, "backend_tokenizer", None)
        self.normal: Callable[[str], str] | None = getattr(
            getattr(backend, "normalizer", None), "normalize_str", None
        )
        self.batch: Callable[..., Any] | None = getattr(backend, "encode_batch", None)
        self.per_byte = _per_byte(encode)

    def suspects(self, examples: Lazy) -> Iterator[int]:
        """Rows, from 0, that the caller encodes; it is certain of all others that they fit."""
        limit = self.encode.max_length
        unsure: list[tuple[int, int, list[str]]] = []  # row, tokens beside the texts, texts
        for i, row in enumerate(examples.plain()):
            turns, texts, shape = self._shape(row)
            words, images = self.words.get(shape), self._images(row)
            if images < 0 or words is None or len(words) < OF_A_SHAPE or self.marks("\n".join(texts)):
                yield i
                self.words.setdefault(shape, []).append(self._around(turns))
                continue
            if max(words) - min(words) > SPREAD:
                yield i
                continue
            rest = max(words) + images + SLACK
            if rest + self._at_most(texts) > limit:
                unsure.append((i, rest, texts))
            if len(unsure) == AT_ONCE:
                yield from self._longer(unsure, limit)
                unsure = []
        yield from self._longer(unsure, limit)

    def _shape(self, row: Plain) -> tuple[Sequence[Any], list[str], Any]:
        """What is compared with `max_length`: turns and their texts; and what a template treats alike."""
        turns = row.turns[:-1] if self.encode.truncate and row.turns[-1][0] == "assistant" else row.turns
        texts = [turn[1] for turn in turns]
        kinds = frozenset([(t[0], not t[1], t[1][:1].isspace(), t[1][-1:].isspace()) for t in row.turns])
        return turns, texts, (tuple([(t[0], t[2], bool(t[3])) for t in row.turns]), len(row.images), kinds)

    def _around(self, turns: Sequence[Any]) -> int:
        """Bytes that the template writes around the texts of a conversation."""
        messages = tuple([Message(*turn) for turn in turns])
        said = sum(_bytes(m.text.strip()) for m in messages)
        found = []
        for k, generate in ((len(messages), False), (len(messages) - 1, True)):
            try:
                found.append(_bytes(self.encode.render(messages[:k], generate)) if k else 0)
            except (TemplateError, TypeError):  # a row that is encoded says it better
                found.append(0)
        return max(found) - said if max(found) else 1 << 40

    # -- tokens ------------------------------------------------------------------------------------------------

    def _at_most(self, texts: Sequence[str]) -> int:
        """Tokens that texts can become: one for each byte."""
        n = 0
        for text in texts:
            if not text.isascii():
                text = self.normal(text) if self.normal else text
                n += len(text.encode(errors="replace"))
            else:
                n += len(text)
        return n * self.per_byte

    def _longer(self, unsure: Sequence[tuple[int, int, list[str]]], limit: int) -> Iterator[int]:
        """Of rows that bytes alone do not acquit, those that their own tokens do not either."""
        if not self.batch:
            yield from (i for i, _, _ in unsure)
            return
        counted = iter(self.batch([t for _, _, texts in unsure for t in texts], add_special_tokens=False))
        for i, rest, texts in unsure:
            n = sum(len(next(counted).ids) + len(_edges(text)) for text in texts)
            if rest + n > limit:
                yield i

    # -- pictures ----------------------------------------------------------------------------------------------

    def _images(self, row: Plain) -> int:
        """Tokens that the pictures of a row become at most; -1: only encoding it can tell."""
        total, several = 0, len(row.images) > 1 and self.encode.family.together
        for image in row.images:
            if not isinstance(image, str):
                return -1
            key = hash((image, several))
            found = self.pictures.get(key)
            if found is None:
                found = self.pictures[key] = self._picture(Path(image), several)
            if found < 0:
                return -1
            total += found
        return total

    def _picture(self, path: Path, several: bool) -> int:
        """Tokens of one picture, looked at as far as the budget allows."""
        within = self.decoded < DECODED and self.pixels < PIXELS
        size = None if within else glanced(path)
        if size is None:
            image, _ = tried(path)
            if image is None:
                return -1
            size = image.size
            image.close()
        width, height = size
        if within:
            self.decoded, self.pixels = self.decoded + 1, self.pixels + width * height
            return self._tokens((width, height), several)
        both = [
            self._tokens(size, several) for size in {(width, height), (height, width)}
        ]  # EXIF may turn it
        return -1 if min(both) < 0 else max(both)

    def _tokens(self, size: tuple[int, int], several: bool) -> int:
        found = self.sizes.get((size, several))
        if found is None:
            told = self._told(size) if len(self.sizes) >= SIZES and not several else -1
            found = self.sizes[size, several] = told if told >= 0 else self._measured(size, several)
        return found

    def _measured(self, size: tuple[int, int], several: bool) -> int:
        """Tokens that stand for a picture of this size, those between its rows included."""
        try:
            _, text = self.encode.reference(PILImage.new("RGB", size), "", several)
        except (RetainError, MemoryError):  # of a row that is encoded it is said in full
            return -1
        return len(self.encode.tokens(text))

    def _told(self, size: tuple[int, int]) -> int:
        """What the processor says of a size without a picture, with room for what it leaves out; -1: it cannot."""
        tell = getattr(self.encode.processor, "_get_num_multimodal_tokens", None)
        if tell is None or self.encode.square == "pad":
            return -1
        try:
            known = [k for k, n in self.sizes.items() if n >= 0 and not k[1]][:8]
            sizes = [s for s, _ in known] + [size]
            n = list(tell(image_sizes=[[h, w] for w, h in sizes]).num_image_tokens)
        except (
            Exception
        ):  # whatever a processor's private helper raises: a blank picture is processed instead
            return -1
        most = [k + k // 8 + 64 for k in n]
        fits = all(self.sizes[k] <= m for k, m in zip(known, most, strict=False))
        return most[-1] if known and fits else -1


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


EDGE = re.compile(r"^\s*\S{0,64}|\S{0,64}\s*$")


def _edges(text: str) -> str:
    """The first and the last word of a text: what its neighbours can change the tokens of."""
    return "".join(EDGE.findall(text[:128] if len(text) < 128 else text[:64] + " " + text[-64:]))


def _marks(encode: Encoder) -> Callable[[str], object]:
    """Finds in a text what a template may look for, or what the tokenizer would read as a control token."""
    own = [
        node.value.strip()
        for node in jinja2.Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
        .parse(encode.template)
        .find_all(nodes.Const)
        if isinstance(node.value, str)
    ]
    special = [*encode.tokenizer.get_added_vocab(), encode.image_token]
    words = {w for w in [*own, *special] if re.search(r"[^\w\s.,:;!?'-]", w)} - set("+-*/()[]{}<>|\"'`")
    return re.compile("|".join(map(re.escape, sorted(words)))).search if words else lambda text: None


def _per_byte(encode: Encoder) -> int:
    """Tokens that one byte of text can become: one, unless a tokenizer's normaliser makes more of it."""
    seen = [len(encode.tokens(f"a{chr(c)}a")) for c in range(32, 127)]
    return max(1, max(seen) - 2)
