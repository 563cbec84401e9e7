"""A user's own folder in small: drawn images, LLaVA JSON, HF messages JSONL, a tiny model, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import tiny

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220)}
QUESTIONS = {"colour": "What colour is it?", "paint": "Name the paint, please."}


def picture(folder: Path, name: str, colour: str, seed: int) -> str:
    """A noisy square of one colour; returns its name."""
    noise = np.random.default_rng(seed).integers(-25, 25, (24, 24, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    return name


def llava_rows(images: Path, task: str, split: str, n: int) -> list[dict[str, Any]]:
    """Rows with `conversations`."""
    rows = []
    for i in range(n):
        colour = list(COLOURS)[i % 3]
        name = picture(
            images, f"{task}_{split}_{i}.png", colour, seed=len(task) * 1000 + len(split) * 100 + i
        )
        turns = [
            {"from": "human", "value": f"<image>\n{QUESTIONS[task]}"},
            {"from": "gpt", "value": colour},
        ]
        rows.append({"id": f"{task}-{split}-{i}", "image": name, "conversations": turns})
    return rows


def messages_row(row: dict[str, Any], parts: bool) -> dict[str, Any]:
    """The same row as HF `messages` + `images`, with content as text or as parts."""
    question, answer = (turn["value"] for turn in row["conversations"])
    text = question.removeprefix("<image>\n")
    content = [{"type": "image"}, {"type": "text", "text": text}] if parts else text
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": row["id"], "images": [row["image"]], "messages": turns}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def model_dir(folder: Path) -> Path:
    """A tiny LLaVA, saved as any Hugging Face checkpoint is."""
    model, processor = tiny.llava()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


RECIPE = """\
model: {model}
adapter: {{rank: 4, alpha: 8}}
stream:
  name: shop
  image_root: images
  tasks:
    - {{name: colour, train: colour_train{end}, test: colour_test{end}, max_new_tokens: 4}}
    - {{name: paint, train: paint_train{end}, test: paint_test{end}, max_new_tokens: 4}}
method: {method}
optim: {{lr: 2e-3, steps: 2, batch_size: 4}}
out: {out}
"""


def shop(
    folder: Path, model: Path, *, jsonl: bool = False, method: str = "lora", n_train: int = 8, n_test: int = 3
) -> Path:
    """Write everything into `folder`; returns the recipe."""
    for task in QUESTIONS:
        for split, n in (("train", n_train), ("test", n_test)):
            rows = llava_rows(folder / "images", task, split, n)
            if jsonl:
                converted = [messages_row(row, parts=i % 2 == 0) for i, row in enumerate(rows)]
                write_jsonl(folder / f"{task}_{split}.jsonl", converted)
            else:
                (folder / f"{task}_{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    recipe = folder / "mine.yaml"
    end = ".jsonl" if jsonl else ".json"
    recipe.write_text(
        RECIPE.format(model=model, end=end, method=method, out=folder / "run"), encoding="utf-8"
    )
    return recipe
