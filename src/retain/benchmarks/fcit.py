"""FCIT: eight tasks, or twelve in four capabilities, that clients learn together without sharing their data.

Guo et al., Federated Continual Instruction Tuning, ICCV 2025 (arXiv 2503.12897); data set and release: Ghy0501/FCIT. Base
LLaVA-1.5-7B, LoRA on the MLP linears only: rank 8 per task or capability, alpha 16; 50 clients, 5 a round, 10 rounds per
stage, one local epoch, greedy answers of at most 128 tokens.

Nothing is downloaded. `root` is laid out as the release's readme has it:

    ROOT/instructions/ArxivQA/train_4w.json   ROOT/instructions/ArxivQA/test_1w.json   …   ROOT/datasets/ArxivQA/images/…

The settings, their clients and their published files are `retain.federated.split`'s (`federated.partitions:
ROOT/partitioned_data`). Tasks say which capability they belong to, so `federated.groups` may stay out. Their order is that
of the release's evaluation scripts. Its script that cuts the files lists capabilities as General, Chart, Math, Other,
which is another order: if the published files follow it, the first row that is in no stream is named, and
`federated.groups` can say so. Each task has our strict scorer and, beside it, the released one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from retain.data import read
from retain.files import read_json
from retain.metrics import score
from retain.stream import Stream, Task
from retain.types import Example, Examples, RetainError
from retain.values import PathText

TOKENS = 128


@dataclass(frozen=True)
class Part:
    """One task: its files under `instructions`, its strict and released scorer, and where more references are."""

    train: str
    test: str
    strict: str
    compat: str
    about: str
    captions: str = ""


PARTS: dict[str, Part] = {
    "ImageNet-R": Part(
        "ImageNet-R/train.json", "ImageNet-R/test.json", "exact", "compat_imagenet_r", "classes of renderings"
    ),
    "ArxivQA": Part(
        "ArxivQA/train_4w.json", "ArxivQA/test_1w.json", "exact", "compat_arxivqa", "figures of papers"
    ),
    "IconQA": Part("IconQA/train.json", "IconQA/val.json", "exact", "compat_iconqa", "icons and diagrams"),
    "CLEVR-Math": Part(
        "CLEVR-Math/train_4w.json",
        "CLEVR-Math/test_1w.json",
        "exact",
        "compat_clevr",
        "sums over drawn scenes",
    ),
    "OCR-VQA": Part("OCRVQA/train_10w.json", "OCRVQA/test_1w.json", "exact", "compat_iconqa", "book covers"),
    "Flickr30k": Part(
        "Flickr30k-cap/train_brief_4w.json",
        "Flickr30k-cap/val_brief.json",
        "caption",
        "compat_caption",
        "captions of photographs",
        "Flickr30k-cap/val_coco_type.json",
    ),
    "FigureQA": Part("FigureQA/train.json", "FigureQA/test.json", "exact", "compat_figureqa", "drawn charts"),
    "super-CLEVR": Part(
        "super-CLEVR/train.json", "super-CLEVR/test.json", "exact", "compat_super_clevr", "drawn vehicles"
    ),
    "AOKVQA": Part("AOKVQA/train.json", "AOKVQA/val.json", "exact", "compat_aokvqa", "outside knowledge"),
    "Grounding": Part(
        "Grounding/train_11w.json", "Grounding/test_6000.json", "iou", "compat_grounding", "boxes of objects"
    ),
    "DVQA": Part("DVQA/train.json", "DVQA/test.json", "exact", "compat_dvqa", "bar charts"),
    "TabMWP": Part("TabMWP/train.json", "TabMWP/test.json", "exact", "compat_tabmwp", "sums over tables"),
}
"""FCIT's scripts: equality ignoring case, without stripping, for all but boxes, captions, and FigureQA and DVQA, where
an answer is right that is inside the reference: the empty one too."""

TASKS = (
    "ImageNet-R", "ArxivQA", "IconQA", "CLEVR-Math", "OCR-VQA", "Flickr30k", "FigureQA", "super-CLEVR",
)  # fmt: skip
"""The task-related settings' eight, in the order of their stages."""

CAPABILITIES: dict[str, tuple[str, ...]] = {
    "General": ("AOKVQA", "IconQA", "Grounding", "ImageNet-R"),
    "Other": ("Flickr30k", "OCR-VQA"),
    "Math": ("CLEVR-Math", "super-CLEVR", "TabMWP"),
    "Chart": ("ArxivQA", "FigureQA", "DVQA"),
}
"""The capability-related settings' four groups, in the order of their stages."""


def fcit(
    root: Annotated[PathText, Field(min_length=1)],
    kind: Literal["task", "capability"] = "task",
    image_root: str = "",
    tasks: Annotated[Sequence[str], Field(min_length=1)] | None = None,
) -> Stream:
    """The eight tasks, or the twelve of the `capability` settings, from the folders under `root`; `tasks`: fewer."""
    base = Path(root).expanduser()
    if not (base / "instructions").is_dir():
        raise RetainError(
            f"fcit: no folder 'instructions' in {root!r}; it must hold the release's folder per task"
        )
    images = Path(image_root).expanduser() if image_root else base / "datasets"
    home = {t: group for group, names in CAPABILITIES.items() for t in names}
    known = list(TASKS) if kind == "task" else list(home)
    for name in tasks or ():
        if name not in known:
            raise RetainError(f"fcit: no task {name!r} of kind {kind!r}; choose from {known}")
    return Stream("fcit", tuple(_task(base, images, n, home[n]) for n in tasks or known))


def _task(base: Path, images: Path, name: str, capability: str) -> Task:
    part, folder = PARTS[name], base / "instructions"
    test: Examples = read.examples(folder / part.test, images)
    if part.captions:
        test = captioned(test, folder / part.captions)
    return Task(
        name,
        read.examples(folder / part.train, images),
        test,
        score(part.strict),
        max_new_tokens=TOKENS,
        compat=score(part.compat),
        about=part.about,
        meta={"capability": capability},
    )


def captioned(test: Examples, path: Path) -> list[Example]:
    """The examples with all captions of a COCO file, in which `image_id` is the place of the row, counted from 1."""
    if not path.is_file():
        raise RetainError(f"{path}: no such file; it holds the captions that answers are compared with")
    data, found = read_json(path), dict[int, list[str]]()
    notes = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(notes, list):
        raise RetainError(f"{path}: a list 'annotations' of captions is needed")
    for i, note in enumerate(notes):
        place = note.get("image_id") if isinstance(note, dict) else None
        if isinstance(place, str) and place.isdecimal():
            place = int(place)
        if (
            not isinstance(place, int)
            or not 1 <= place <= len(test)
            or not isinstance(note.get("caption"), str)
        ):
            raise RetainError(
                f"{path}, annotations[{i}]: a 'caption' and an 'image_id' of 1 to {len(test)} are needed, "
                f"not {str(note)[:80]}"
            )
        found.setdefault(place, []).append(note["caption"])
    without = [i for i in range(1, len(test) + 1) if i not in found]
    if without:
        raise RetainError(f"{path}: no caption of image_id {without[0]}, row {without[0]} of the test file")
    return [replace(e, references=tuple(found[i])) for i, e in enumerate(test, 1)]
