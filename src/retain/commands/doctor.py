"""`retain doctor`: a recipe's data, looked at with its model's processor; no weights are loaded.

What is wrong is found by `retain.data.doctor`; here the processor is made ready for it, and what was found becomes
tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from retain.assemble import build_stream, model_source, without_bars
from retain.commands.plan import encoder, skeleton
from retain.config import Recipe
from retain.data.doctor import Checked, Examination, Lengths, examine, finding_rows
from retain.data.marks import Constant, best_constant, top_answers
from retain.models import guard
from retain.models.encode import Encoder
from retain.models.hf import HFModel
from retain.stream import Stream
from retain.types import Example, RetainError

LOST = 0.02  # share of a side beyond which a picture has lost content
TOP = 3  # most frequent answers that are shown

Rows = list[list[str]]


class ModelReader:
    """A `retain.data.doctor.Reader` of the recipe's model."""

    def __init__(self, encode: Encoder) -> None:
        self.encode = encode
        self._lost: dict[tuple[int, int], tuple[float, float]] = {}  # by size of picture

    def measure(self, example: Example) -> Lengths:
        """Tokens of prompt, images and answer. RetainError: what the processor raises, of whatever class."""
        try:
            encoded = self.encode(example)
        except RetainError:
            raise
        except Exception as error:  # a processor of Hugging Face or a user's own: any class
            raise RetainError(f"{type(error).__name__}: {error}") from error
        images = sum(ref.n_tokens for ref in encoded.images)
        return Lengths(len(encoded.prompt) - images, images, max(0, len(encoded.answer) - 1))

    def cut(self, text: str, n_tokens: int) -> str:
        """The first tokens of an answer, as a model that may not write more leaves it."""
        if len(text.encode()) < n_tokens:  # no tokenizer makes more tokens than bytes
            return text
        tokenizer = self.encode.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return (
            text
            if len(ids) <= n_tokens
            else str(tokenizer.decode(ids[:n_tokens], skip_special_tokens=True)).strip()
        )

    def remarks(self, example: Example) -> Iterable[str]:
        """What the processor cuts off a picture, so that the model never sees it."""
        for source in example.images:
            width, height = self.encode.opened(source, example.told).size
            found = self._lost.get((width, height))
            if found is None:
                found = self._lost[width, height] = cut_off(self.encode, width, height)
            for side, share in zip(("width", "height"), found, strict=True):
                if share >= LOST:
                    yield (
                        f"the processor cuts {share:.0%} of the {side} of a picture of {width} x {height} away; "
                        "model.square: pad shows it whole"
                    )


def cut_off(encode: Encoder, width: int, height: int) -> tuple[float, float]:
    """Shares of a picture's width and height that the processor cuts away, found by changing what stands there."""
    grey = np.full((height, width, 3), 128, dtype=np.uint8)
    plain = encode.pixels_of(grey)

    def unseen(axis: int, n: int) -> bool:
        """Whether `n` lines at both ends of an axis change nothing of what the model is shown."""
        marked = np.moveaxis(grey.copy(), axis, 0)
        marked[:n] = marked[len(marked) - n :] = 255
        return torch.equal(encode.pixels_of(np.moveaxis(marked, 0, axis)), plain)

    def lost(axis: int, size: int) -> float:
        seen, hidden = size // 2 + 1, 0  # lines at an end: so many are seen for sure, so many are not
        while seen - hidden > 1:
            middle = (seen + hidden) // 2
            seen, hidden = (seen, middle) if unseen(axis, middle) else (middle, hidden)
        return 2 * hidden / size

    return lost(1, width), lost(0, height)


@dataclass(frozen=True)
class Report:
    """What the doctor found in a recipe's stream, and why it had no model to ask, if it had none."""

    stream: Stream
    found: Examination
    without_model: str

    @property
    def errors(self) -> int:
        """Findings that make a number meaningless."""
        return sum(f.level == "error" for f in self.found.findings)

    @property
    def summary(self) -> str:
        """The last lines."""
        tasks = self.stream.all
        rows = sum(len(t.train) + len(t.valid) + len(t.test) for t in tasks)
        warnings = len(self.found.findings) - self.errors
        told = f"{rows} rows of {len(tasks)} tasks: {self.errors} errors, {warnings} warnings"
        alone = f"no model to ask, so nothing is said of tokens: {self.without_model}\n"
        return alone * bool(self.without_model) + told


def report(recipe: Recipe) -> Report:
    """Examine a recipe's data, every split as it is."""
    stream = build_stream(recipe)
    reader: ModelReader | None = None
    why = ""
    try:
        reader = ModelReader(encoder(*skeleton(recipe), recipe))
    except (RetainError, ImportError) as error:
        why = str(error).splitlines()[0]
    return Report(stream, examine(stream, reader), why)


def compared(name: str) -> tuple[Rows, bool]:
    """A model beside Hugging Face's own call, as a table; whether all of it agrees. Nothing remembered is used."""
    without_bars()
    model = HFModel.load(model_source(name), guard=False)
    try:
        findings = guard.compare(model)
    except guard.REFUSED as error:
        raise RetainError(f"model {name!r} cannot be driven: {type(error).__name__}: {error}") from error
    return guard.rows(findings), all(f.agrees for f in findings)


# -- tables ----------------------------------------------------------------------------------------------


def tables(made: Report) -> Iterator[tuple[Rows, str]]:
    """Everything that the command prints, with titles."""
    yield task_rows(made), "tasks: answers, and what scores without looking"
    if not made.without_model:
        yield token_rows(made), "tokens: median and largest"
    if made.found.findings:
        yield finding_rows(made.found.findings), "findings"


def task_rows(made: Report) -> Rows:
    """Per task: rows, answers, what the best constant answer scores, and what the references themselves score."""
    head = [
        "task",
        "train / valid / test",
        "scorer",
        "answers",
        "most frequent",
        "majority baseline",
        "references score",
    ]
    return [head, *(_task_row(checked) for checked in made.found.tasks)]


def _task_row(checked: Checked) -> list[str]:
    task = checked.task
    top, different = top_answers(task, TOP)
    shares = ", ".join(f"{_short(text)} {share:.0%}" for text, share in top)
    marks = [f"{m.mean:.1f}" for m in (checked.marks, checked.compat) if m is not None]
    if task.compat is not None and checked.compat is not None:
        marks[-1] += f" ({task.compat.name})"
    return [
        task.name,
        f"{len(task.train)} / {len(task.valid)} / {len(task.test)}",
        task.score.name,
        f"{different} different",
        shares,
        _constant(checked),
        ", ".join(marks) or "not scored",
    ]


def _constant(checked: Checked) -> str:
    """The score of always giving the best constant answer, and that answer."""
    try:
        made: Constant | None = best_constant(checked.task)
    except RetainError:  # told as a finding already
        made = None
    if made is None:
        return ""
    n = len(checked.task.test)
    of = f", on {made.rows:,} of {n:,} rows" if made.rows < n else ""
    return f"{made.score:.1f} (always {_short(made.text)}{of})"


def token_rows(made: Report) -> Rows:
    """Per task: median and largest number of tokens of prompts, images and answers, of the rows that were measured."""
    head = ["task", "prompt tokens", "image tokens", "answer tokens", "max_new_tokens", "rows measured"]
    return [head, *(_token_row(c) for c in made.found.tasks)]


def _token_row(checked: Checked) -> list[str]:
    def told(counts: Sequence[int]) -> str:
        return f"{median(counts):g}, at most {max(counts)}" if counts else ""

    lengths = checked.lengths
    columns = [told([getattr(x, name) for x in lengths]) for name in ("prompt", "image", "answer")]
    return [checked.task.name, *columns, str(checked.task.max_new_tokens), str(len(lengths))]


def _short(text: str) -> str:
    return repr(text if len(text) <= 24 else text[:23] + "\u2026")
