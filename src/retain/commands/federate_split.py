"""A recipe's split as files: a folder per client with its rows, pictures and YAML, as sites of their own have them.

    OUT/client-00/client-00.yaml, TASK.jsonl, images/….png

Rows keep their order, and pictures their pixels (PNG), so that a run of these sites is the run in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from retain.assemble import build_stream
from retain.config import Recipe
from retain.data.picture import opened
from retain.federated.split import make
from retain.files import write_jsonl, write_text
from retain.plain import prefixed
from retain.run.store import safe
from retain.types import Example, RetainError, digest


def split(recipe: Recipe, out: Path) -> Iterator[tuple[Path, str]]:
    """Write every client's folder; yields it with how many rows of what it has."""
    spec = recipe.federated
    if spec is None:
        raise RetainError(f"{recipe.path}: it has no `federated:` block, so there is nothing to split")
    if out.exists() and any(out.iterdir()):
        raise RetainError(f"--out: {out} is not empty; name a new folder")
    stream = build_stream(recipe)
    for task in stream:
        if not len(task.train):
            raise RetainError(f"{recipe.path}: stream: task {task.name!r} has no train rows to split")
    made = prefixed(f"{recipe.path}: federated", lambda: make(spec, stream, recipe.seed))
    for client in made.clients:
        folder, tasks, told = out / client, dict[str, Any](), list[str]()
        for unit in made.units:
            rows = made.examples(unit.name, client, stream)
            if len(rows):
                name = f"{safe(unit.name)}.jsonl"
                write_jsonl(folder / name, (_row(e, folder) for e in rows))
                tasks[unit.name] = {"train": name}
                told.append(f"{len(rows)} of {unit.name}")
        if not tasks:
            yield folder, "no row, so no file"
            continue
        site = {"name": client, "tasks": tasks}
        write_text(folder / f"{client}.yaml", yaml.safe_dump(site, sort_keys=False, allow_unicode=True))
        yield folder, ", ".join(told)


def _row(example: Example, folder: Path) -> dict[str, Any]:
    """As Hugging Face's `messages` and `images`; what a scorer needs goes along."""
    images = []
    for i, source in enumerate(example.images):
        picture = opened(source, example.told)
        name = f"images/{digest([example.id, i])}-{digest(picture.tobytes())}.png"
        if not (folder / name).is_file():
            (folder / "images").mkdir(parents=True, exist_ok=True)
            picture.save(folder / name)
        images.append(name)
    turns = []
    for message in example.messages:
        parts = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in message.parts()]
        turns.append({"role": message.role, "content": parts or ""})
    row: dict[str, Any] = {"id": example.id, "messages": turns}
    more = {"images": images, "answers": list(example.references), "meta": dict(example.meta)}
    return row | {k: v for k, v in more.items() if v}
