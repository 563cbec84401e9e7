"""Turns the pocket's lessons into tensors: packed text, pixels, captions, and what is marked at each patch.

Several questions share one image: every question sees the image and itself only, at the positions it would
have alone, so packing changes the cost and not the arithmetic.
"""

# B images, T packed tokens

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retain.pocket import lessons
from retain.pocket.build import IMAGE_TOKENS, PATCH, tokenizer
from retain.pocket.pictures import SIZE

MEAN, STD = 0.5, 0.25


class Encoder:
    """Text to token ids, each string once."""

    def __init__(self) -> None:
        self.tok = tokenizer()
        self.cache: dict[str, list[int]] = {}
        self.user, self.assistant, self.image, self.end, self.pad = map(
            self._id, ("USER:", "ASSISTANT:", "<image>", "</s>", "<pad>")
        )

    def _id(self, token: str) -> int:
        found = self.tok.token_to_id(token)
        assert found is not None, token
        return int(found)

    def __call__(self, text: str) -> list[int]:
        if text not in self.cache:
            if len(self.cache) > 200_000:
                self.cache.clear()
            self.cache[text] = self.tok.encode(text, add_special_tokens=False).ids
        return self.cache[text]

    def turn(self, question: str, answer: str) -> tuple[list[int], int]:
        """Question, ASSISTANT:, answer, </s>; and how many tokens of it are to be predicted."""
        said = [*self(answer), self.end]
        return [*self(question), self.assistant, *said], len(said)


@dataclass
class Packed:
    """One packed batch; `labels_BT` is -100 except on answers."""

    ids_BT: Tensor
    labels_BT: Tensor
    position_BT: Tensor
    mask_B1TT: Tensor
    pixels: Tensor | None
    marks: Tensor | None = None


def pixels(images: list[np.ndarray]) -> Tensor:
    """Canvases as the processor makes them: (B, 3, H, W), mean 0.5 and deviation 0.25."""
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255)
    return x.sub_(MEAN).div_(STD).contiguous()


def pack(enc: Encoder, turns: list[list[lessons.QA]], images: list[np.ndarray] | None) -> Packed:
    """Several turns per row behind one prefix, blind to each other."""
    rows = []
    for qas in turns:
        ids = [enc.user, *([enc.image] * IMAGE_TOKENS if images else [])]
        start = len(ids)
        row: list[list[int]] = [ids, [-100] * start, list(range(start)), [0] * start]
        for k, (question, answer) in enumerate(qas, 1):
            said, n = enc.turn(question, answer)
            row[0] += said
            row[1] += [-100] * (len(said) - n) + said[-n:]
            row[2] += range(start, start + len(said))
            row[3] += [k] * len(said)
        rows.append(row)
    width = max(len(r[0]) for r in rows)
    out = np.zeros((4, len(rows), width), np.int64)
    for i, row in enumerate(rows):
        n = len(row[0])
        out[:, i, :n] = row
        out[:, i, n:] = np.array([enc.pad, -100, 0, -1])[:, None]
    ids, labels, position, segment = torch.from_numpy(out)
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    seen = same & torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -1e9)[:, None]
    return Packed(ids, labels, position, mask, pixels(images) if images else None)


def joint_batch(
    enc: Encoder, rng: np.random.Generator, size: int, name: str | None = None, direct: bool = False
) -> Packed:
    """Images with four questions each and one of text only; of a named lesson, four and none.

    Option letters and yes/no say little about the picture per answer: they are asked less often, and with
    `direct` not at all. The examination of a named lesson asks all alike.
    """
    turns: list[list[lessons.QA]] = []
    made = [lessons.lesson(rng, name) for _ in range(size)]
    for one in made:
        share = np.array([_weight(answer, direct) if name is None else 1.0 for _, answer in one.qa])
        turns.append([one.qa[int(i)] for i in rng.choice(len(one.qa), 4, p=share / share.sum())])
        if name is None:
            turns[-1].append(lessons.text(rng))
    batch = pack(enc, turns, [m.image for m in made])
    batch.marks = targets(made)
    return batch


def _weight(answer: str, direct: bool) -> float:
    indirect = 0.2 if answer in {"yes", "no"} else 0.3 if answer in lessons.LETTERS else None
    return 1.0 if indirect is None else indirect * (not direct)


def text_batch(enc: Encoder, rng: np.random.Generator, size: int, q: int = 5) -> Packed:
    """Text exercises, and lessons' questions with a random answer of the same lesson (formats, not facts)."""
    return pack(enc, [[lessons.text(rng) for _ in range(q)] for _ in range(size)], None)


def clip_batch(enc: Encoder, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, caption ids ending in </s>, and which captions are equal (B, B)."""
    made = [lessons.lesson(rng) for _ in range(size)]
    texts = []
    for one in made:
        question, answer = one.qa[int(rng.integers(len(one.qa)))]
        texts.append(one.caption if rng.integers(10) < 7 else f"{question} {answer}")
    rows = [[*enc(t), enc.end] for t in texts]
    ids = torch.full((size, max(map(len, rows))), enc.pad)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    _, group = np.unique(texts, return_inverse=True)
    return pixels([m.image for m in made]), ids, torch.from_numpy(group[:, None] == group[None, :])


def tower_batch(rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Pixels and what is marked in them."""
    made = [lessons.lesson(rng) for _ in range(size)]
    return pixels([m.image for m in made]), targets(made)


def targets(made: list[lessons.Lesson]) -> Tensor:
    """Marks as zeros and ones (B, 26, words): row 0 is the whole picture, with the number of marks."""
    index = {w: i for i, w in enumerate(lessons.mark_words())}
    side, patch = PATCH, 1 / (PATCH * PATCH)
    target = np.zeros((len(made), 1 + IMAGE_TOKENS, len(index)), np.float32)
    edge = np.arange(0, SIZE, side)
    for b, one in enumerate(made):
        target[b, 0, index[f"count{min(len(one.marks), 9)}"]] = 1
        for (x0, y0, x1, y1), words in one.marks:
            wide = np.clip(np.minimum(edge + side, x1) - np.maximum(edge, x0), 0, None)
            high = np.clip(np.minimum(edge + side, y1) - np.maximum(edge, y0), 0, None)
            area = (high[:, None] * wide[None, :]).reshape(-1)
            here = np.flatnonzero((area * patch >= 0.5) | (area >= 0.25 * (x1 - x0) * (y1 - y0)))
            for word in words.split():
                target[b, 0, index[word]] = 1
                target[b, here + 1, index[word]] = 1
    return torch.from_numpy(target)


def mark_tokens(enc: Encoder) -> Tensor:
    """The token of every mark word, `digit3` being 3 and `icon_cat` cat; -1 where it is not one token."""
    found = []
    for word in lessons.mark_words():
        ids = enc(re.sub(r"^(digit|value|letter_|word_|icon_|kind_|photo_)", "", word))
        found.append(ids[0] if len(ids) == 1 else -1)
    return torch.tensor(found)
