"""Run folders as `continual.run` leaves them, invented from a seed, to develop and test reports against."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

from retain.metrics import AccuracyMatrix

ANSWERS = {
    "garments": ("What is worn here?", ["coat", "sandal", "shirt", "dress", "boot", "bag"]),
    "digits": ("Which digit was written?", [str(i) for i in range(10)]),
    "icons": ("Name the icon.", ["rocket", "umbrella", "teapot", "guitar", "tractor"]),
    "words": ("Read the word in the image.", ["harbour", "velvet", "orchard", "lantern", "copper"]),
    "counting": ("How many dots are red?", ["one", "two", "three", "four", "five"]),
    "boxes": ("Where is the blue square?", ["0.12, 0.20, 0.44, 0.51", "0.50, 0.08, 0.88, 0.40"]),
    "charts": ("Which bar is the tallest?", ["A", "B", "C", "D"]),
    "distortion": ("Which distortion do you see?", ["blur", "noise", "blocking", "fading"]),
}
TASKS = tuple(ANSWERS)
HARD = {"garments": 0.0, "digits": 6.0, "icons": -4.0, "words": -12.0, "counting": 3.0, "boxes": -15.0}


def _rng(*parts: object) -> np.random.Generator:
    text = "/".join(map(str, parts)).encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _picture(task: str, i: int, path: Path) -> None:
    rng = _rng("picture", task, i)
    tone = tuple(int(v) for v in rng.integers(190, 250, 3))
    image = Image.new("RGB", (64, 64), tone)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 6))):
        x, y, w, h = (int(v) for v in rng.integers((4, 4, 8, 8), (40, 40, 24, 24)))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=tuple(int(v) for v in rng.integers(20, 220, 3)))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def level(column: int, row: int, task: str, forgetting: float, n_tasks: int, noise: float) -> float:
    """The true score on a task after a row: low before it is learned, high then, decaying after."""
    if row <= column:
        return max(0.0, min(25.0, 6 + 2 * (column % 4) + noise))
    fresh = 82 + HARD.get(task, 0.0)
    kept = fresh * math.exp(-forgetting * (row - column - 1))
    return max(2.0, min(97.0, kept + noise))


def _cell(
    task: str, share: float, n: int, seed: int, row: int, mix: Mapping[str, float] | None
) -> list[dict]:
    question, answers = ANSWERS.get(task, (f"What is asked in {task}?", ["yes", "no", "maybe"]))
    difficulty = _rng("difficulty", task).permutation(n)  # the same samples stay easy in every row
    luck = _rng("luck", task, seed, row).normal(0, 0.08 * n, n)
    right = np.argsort(np.argsort(difficulty + luck)) < round(share / 100 * n)
    out = []
    for i in range(n):
        truth = answers[int(_rng("truth", task, i).integers(len(answers)))]
        others = [a for a in answers if a != truth] + [
            a for _, w in ANSWERS.values() for a in w if a != truth
        ][:9]
        said = truth if right[i] else others[int(_rng("wrong", task, i, seed, row).integers(len(others)))]
        image = f"samples/{task}/{i:04d}.png" if i < 100 else None
        out.append(
            {
                "id": f"{task}-{i:04d}", "question": question, "prediction": said, "references": [truth],
                "score": 100.0 if right[i] else 0.0, "compat": None, "image": image, "mix": mix,
            }
        )  # fmt: skip
    return out


def _events(tasks: Sequence[str], steps: int, seed: int, method: Sequence[str]) -> list[dict[str, Any]]:
    time = 1_760_000_000.0
    out: list[dict[str, Any]] = [
        {"time": time, "kind": "cell", "row": "00-zero_shot", "task": t} for t in TASKS
    ]
    for k, task in enumerate(tasks):
        out.append({"time": time, "kind": "stage", "task": task, "samples": 1500})
        rng = _rng("loss", seed, task)
        for first in range(0, steps, 10):
            at = np.arange(first, first + 10)
            losses = (2.6 * np.exp(-at / (0.25 * steps)) + 0.25 + rng.gamma(2.0, 0.05, 10)).tolist()
            time += 1.3
            rate = 2e-3 * 0.5 * (1 + math.cos(math.pi * (first + 9) / steps))
            out.append(
                {
                    "time": time, "kind": "step", "task": task, "step": first + 10, "loss": losses[-1],
                    "losses": losses, "first": first, "lr": {"lora": rate, "projector": rate / 4},
                }
            )  # fmt: skip
            if "llaca" in method:
                rates = {g: float(0.02 * math.exp(-first / steps) + rng.random() * 0.01) for g in "qkvo"}
                rates = {f"{g}_proj": rate for g, rate in rates.items()}
                share = float(max(0, 0.8 * math.exp(-first / 25) + rng.normal(0, 0.02)))
                log = {"time": time, "kind": "log", "who": "llaca", "task": task, "step": first + 10}
                out.append({**log, "rate": rates, "fallback_share": share})
        if "grouping" in method:
            out.append({"time": time, "kind": "log", "who": "grouping", "task": task, "group": k // 2})
    return out


def _budget(row: int, steps: int, n: int, n_tasks: int, parameters: int) -> dict[str, float]:
    tokens = 34 * 16 * steps * row
    return {
        "trainable_parameters": parameters if row else 0, "stored_parameters": parameters if row else 0,
        "stored_bytes": 4 * parameters if row else 0, "steps": steps * row, "samples": 16 * steps * row,
        "tokens": tokens, "train_flops": 1.2e7 * tokens, "eval_flops": 5e6 * 34 * n * n_tasks * (row + 1),
        "flops": 1.2e7 * tokens + 5e6 * 34 * n * n_tasks * (row + 1), "train_s": 19.4 * row,
        "eval_s": 7.1 * (row + 1), "wall_s": 19.4 * row + 7.1 * (row + 1), "peak_memory_bytes": 812 * 2**20,
    }  # fmt: skip


def fake_run(
    path: Path,
    *,
    method: Sequence[str] = ("lora",),
    seed: int = 0,
    forgetting: float = 0.35,
    tasks: Sequence[str] = TASKS,
    n: int = 60,
    steps: int = 150,
    rows: int | None = None,
    parameters: int = 412_672,
    routed: bool = False,
    lr: float = 2e-3,
) -> Path:
    """A run folder. `rows` complete rows (zero-shot among them; None: all, and the run is DONE)."""
    config = {
        "model": {"name": "pocket", "dtype": "fp32"}, "stream": {"pocket": {}},
        "method": [{part: {}} for part in method], "adapter": {"rank": 16, "alpha": 32},
        "optim": {"lr": lr, "steps": steps, "batch_size": 16}, "seed": seed, "out": str(path), "track": [],
    }  # fmt: skip
    _write(path / "run.json", {"format": 1, "name": path.name, "config": config})
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    packages = {"retain": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"}
    env = {
        "python": "3.11.9",
        "platform": "Linux x86_64",
        "threads": 1,
        "packages": packages,
        "git": "d722f49",
    }
    _write(path / "environment.json", env)
    _write(path / "data.json", {t: {"train": 1500, "test": n, "score": "exact", "digest": t} for t in tasks})
    total = len(tasks) + 1
    complete = total if rows is None else rows
    matrix = AccuracyMatrix.empty(tasks)
    for i in range(min(complete + 1, total)):
        name = tasks[i - 1] if i else "zero_shot"
        folder = path / "rows" / f"{i:02d}-{name}"
        shown = tasks if i < complete else tasks[:2]  # an interrupted row has some of its cells
        for j, task in enumerate(shown):
            noise = float(_rng("noise", seed, i, task).normal(0, 2.0))
            share = level(j, i, task, forgetting, len(tasks), noise)
            mix = (
                {t: round(0.9 if t == task else 0.1 / max(1, i - 1), 4) for t in tasks[:i]}
                if routed and i
                else None
            )
            cell = _cell(task, share, n, seed, i, mix)
            (folder / "predictions").mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(record) + "\n" for record in cell)
            (folder / "predictions" / f"{task}.jsonl").write_text(lines, encoding="utf-8")
            scores = {task: [record["score"] for record in cell]}
            matrix = matrix.with_row(i, scores, {task: [record["id"] for record in cell]})
        if i < complete:
            _write(folder / "budget.json", _budget(i, steps, n, len(tasks), parameters))
            (folder / "DONE").touch()
    for task in tasks:
        for i in range(min(n, 100)):
            _picture(task, i, path / "samples" / task / f"{i:04d}.png")
    events = _events(tasks[: max(0, complete - 1)], steps, seed, method)
    (path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    if rows is None:
        (path / "matrix.json").write_text(matrix.to_json(), encoding="utf-8")
        (path / "DONE").touch()
    return path
