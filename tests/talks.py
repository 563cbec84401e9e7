"""The conversations that every family of the zoo is asked: pictures of odd sizes, none, two, between texts, turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

IMAGE = object()
"""Stands for a picture among the parts of a turn."""


@dataclass(frozen=True)
class Turn:
    """Who speaks, and texts and IMAGEs in their order."""

    role: str
    parts: tuple[Any, ...]

    @property
    def text(self) -> str:
        """The text without its pictures."""
        return "".join(p for p in self.parts if p is not IMAGE)

    @property
    def at(self) -> tuple[int, ...]:
        """Offsets in `text` of the pictures."""
        texts = ["" if p is IMAGE else p for p in self.parts]
        return tuple(len("".join(texts[:i])) for i, p in enumerate(self.parts) if p is IMAGE)


@dataclass(frozen=True)
class Talk:
    """A conversation that ends with an assistant turn, and its pictures in order."""

    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...] = ()

    @property
    def answer(self) -> str:
        """The text to learn, or to find."""
        return self.turns[-1].text

    def bare(self) -> Talk:
        """The same without its pictures."""
        return Talk(tuple(Turn(t.role, tuple(p for p in t.parts if p is not IMAGE)) for t in self.turns))


def talk(*turns: tuple[Any, ...], images: Sequence[Image.Image] = ()) -> Talk:
    """`talk(("user", IMAGE, "What?"), ("assistant", "red"), images=[...])`."""
    return Talk(tuple(Turn(role, tuple(parts)) for role, *parts in turns), tuple(images))


def picture(k: int, width: int, height: int) -> Image.Image:
    """Coloured squares of 5 pixels in whole numbers only: the same bits on every machine."""
    y, x, c = np.ogrid[:height, :width, :3]
    return Image.fromarray(((x // 5 * 53 + y // 5 * 97 + c * 71 + k * 29) ** 2 % 251).astype(np.uint8))


def talks() -> dict[str, list[Talk]]:
    """By case: what is collated together, after each was asked alone."""
    odd, tall, wide, even = picture(0, 37, 53), picture(1, 28, 64), picture(2, 61, 30), picture(3, 40, 40)
    colour = talk(("user", IMAGE, "What colour is the square?"), ("assistant", "red"), images=[odd])
    short = talk(("user", IMAGE, "left?"), ("assistant", "three yellow squares"), images=[even])
    long = talk(
        ("user", IMAGE, "How many shapes are there? Answer in one word."), ("assistant", "two"), images=[wide]
    )
    words = talk(("user", "yes or no?"), ("assistant", "no"))
    two = talk(
        ("user", IMAGE, IMAGE, "What changed?"), ("assistant", "green now"), images=[odd, picture(4, 37, 53)]
    )
    sizes = talk(("user", IMAGE, IMAGE, "What changed?"), ("assistant", "green"), images=[tall, wide])
    between = talk(
        ("user", "Before:", IMAGE, "After:", IMAGE, "What changed?"),
        ("assistant", "blue"),
        images=[tall, odd],
    )
    system = talk(
        ("system", "Answer in one word."), ("user", IMAGE, "What is up?"), ("assistant", "yes"), images=[even]
    )
    turns = talk(
        ("user", IMAGE, "What is left?"), ("assistant", "red"), ("user", "And right?"), ("assistant", "blue square"),
        images=[odd],
    )  # fmt: skip
    return {
        "one": [colour],
        "text": [words],
        "two": [two],
        "sizes": [sizes],
        "between": [between],
        "system": [system],
        "turns": [turns],
        "lengths": [short, long, colour],
        "mixed": [colour, words, sizes, turns],
    }


CASES = tuple(talks())
