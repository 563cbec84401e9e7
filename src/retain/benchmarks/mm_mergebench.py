"""MM-MergeBench: eight tasks to tune an adapter on, each alone, and four that no adapter has seen.

Zeng et al., RobustMerge, NeurIPS 2025 (arXiv 2502.17159), section 4, appendix C, tables 2 to 8. Base
LLaVA-1.5-7B, LoRA of rank 16 on the linear layers, one epoch per task, vision tower frozen, greedy answers;
alpha is not known to us.

Nothing is downloaded. `root` holds a folder per task with `train.json` and `test.json` (LLaVA conversations;
only `test.json` for unseen tasks) and the images that they name:

    ROOT/ScienceQA/train.json   ROOT/ScienceQA/test.json   …   ROOT/images/…

Each task has our strict scorer and, beside it, the released one. Prompts end with the benchmark's own suffix
(a translation of table 8; the exact English is unverified); a question that has it already keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from retain.data import read
from retain.metrics import score
from retain.stream import Published, Stream, Task
from retain.types import Example, Message, RetainError
from retain.values import PathText

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
CAPTION = "Give a brief description of the image."
BOX = "Please provide the bounding box coordinate of the region this sentence describes."


@dataclass(frozen=True)
class Part:
    """One task: how it is asked, how long answers get, and its strict and released scorer."""

    suffix: str
    tokens: int
    strict: str
    compat: str
    about: str


SEEN: dict[str, Part] = {
    "ScienceQA": Part(LETTER, 8, "choice", "compat_mm_scienceqa", "science questions with options"),
    "ImageNet": Part(SHORT, 16, "contains", "compat_mm_imagenet", "classes of photographs"),
    "VQAv2": Part(SHORT, 16, "exact", "compat_vqav2", "questions about photographs"),
    "REC": Part(BOX, 48, "iou", "compat_grounding", "boxes of described objects (RefCOCO)"),
    "OCRVQA": Part(SHORT, 32, "exact", "compat_ocrvqa", "questions about book covers"),
    "VizWiz": Part(CAPTION, 64, "caption", "compat_caption", "captions of blind people's photographs"),
    "Flickr30k": Part(CAPTION, 64, "caption", "compat_caption", "captions of photographs"),
    "IconQA": Part(SHORT, 16, "exact", "compat_vqav2", "questions about icons and diagrams"),
}
UNSEEN: dict[str, Part] = {
    "AOKVQA": Part(LETTER, 8, "exact", "compat_vqav2", "questions that need outside knowledge"),
    "ImageNet-R": Part(SHORT, 16, "contains", "compat_mm_imagenet", "classes of renderings"),
    "Screen2Words": Part(CAPTION, 64, "caption", "compat_caption", "summaries of app screens"),
    "TabMWP": Part(SHORT, 16, "exact", "compat_vqav2", "sums over tables"),
}
"""The release compares VQAv2, IconQA, AOKVQA and TabMWP ignoring case (`compat_vqav2`), OCRVQA too but never accepts
"Unanswerable", and takes an empty answer of ImageNet and ImageNet-R for correct; of a sentence it reads exactly one
"The answer is X." for ScienceQA. Its captions score has METEOR too, which ours lacks."""

_COLUMNS = (*SEEN, *UNSEEN)
PUBLISHED: dict[str, dict[str, float]] = {
    name: {column: value for column, value in zip(_COLUMNS, values) if value == value}
    for name, values in {
        "individual": (83.74, 96.02, 67.58, 43.40, 65.50, 64.80, 57.29, 75.54, *[float("nan")] * 4),
        "zero-shot": (61.73, 40.87, 62.88, 36.10, 41.16, 41.03, 49.07, 14.09, 51.62, 28.27, 5.98, 15.01),
        "multi-task": (76.90, 74.08, 67.05, 35.98, 65.37, 66.67, 56.09, 66.87, 76.33, 41.39, 8.34, 18.20),
        "task arithmetic": (
            71.94,
            57.49,
            67.06,
            38.90,
            62.87,
            44.80,
            49.20,
            39.21,
            74.78,
            37.37,
            7.52,
            13.57,
        ),
        "DARE": (71.59, 57.25, 66.26, 39.38, 62.56, 44.93, 49.13, 39.59, 73.75, 37.67, 7.56, 13.62),
        "TIES": (71.49, 55.88, 66.73, 39.67, 65.12, 44.35, 47.06, 34.46, 73.43, 38.44, 7.47, 13.23),
        "PCB": (71.10, 57.82, 67.59, 38.22, 64.35, 44.58, 48.90, 37.01, 74.57, 36.28, 7.84, 15.44),
        "RobustMerge": (73.43, 65.54, 67.20, 44.80, 62.97, 46.61, 52.80, 45.90, 79.30, 45.79, 9.23, 17.62),
    }.items()
}
"""The paper's table 2 (scores of the released scorers, 0 to 100). Every row's means are the printed ones, except
RobustMerge seen: its cells average 57.41 and 57.33 is printed, so one cell of our source is off."""


def mm_mergebench(
    root: Annotated[PathText, Field(min_length=1)],
    image_root: str = "",
    seen: Annotated[Sequence[str], Field(min_length=1)] | None = None,
    unseen: Sequence[str] | None = None,
) -> Stream:
    """The benchmark from the folders under `root`; `seen` and `unseen` choose fewer tasks."""
    base = Path(root).expanduser()
    if not base.is_dir():
        raise RetainError(
            f"mm_mergebench: no folder {root!r}; it must hold a folder per task: {list(_COLUMNS)}"
        )
    images = Path(image_root).expanduser() if image_root else base
    learned = tuple(_task(base, images, n, _known(n, SEEN), True) for n in (SEEN if seen is None else seen))
    others = tuple(
        _task(base, images, n, _known(n, UNSEEN), False) for n in (UNSEEN if unseen is None else unseen)
    )
    return Stream("mm_mergebench", learned, others, Published("arXiv:2502.17159, table 2", PUBLISHED))


def _known(name: str, parts: Mapping[str, Part]) -> Part:
    if name not in parts:
        raise RetainError(f"mm_mergebench: no task {name!r}; choose from {list(parts)}")
    return parts[name]


def _task(base: Path, images: Path, name: str, part: Part, learned: bool) -> Task:
    def split(file: str) -> list[Example]:
        found = read.examples(base / name / file, images)
        return [asked(e, part.suffix) for e in found]

    return Task(
        name,
        split("train.json") if learned else (),
        split("test.json"),
        score(part.strict),
        max_new_tokens=part.tokens,
        compat=score(part.compat),
        about=part.about,
    )


def asked(example: Example, suffix: str) -> Example:
    """The example with the benchmark's suffix at the end of its last question."""
    last = max((i for i, m in enumerate(example.messages) if m.role == "user"), default=None)
    if last is None or example.messages[last].text.rstrip().endswith(suffix):
        return example
    m = example.messages[last]
    turns = list(example.messages)
    turns[last] = Message(m.role, f"{m.text.rstrip()}\n{suffix}", m.images)
    return replace(example, messages=tuple(turns))
