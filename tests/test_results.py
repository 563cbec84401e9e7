"""docs/results.md and what it adds to a comparison: orders of the tasks, routing accuracy, bytes of method state."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fake_runs import fake_run
from retain.method import available, build
from retain.pocket.stream import ORDER
from retain.report import summary
from retain.report.load import group, load_run, load_runs
from retain.report.results import write_results
from retain.report.tables import compare, state_rows

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("garments", "digits", "icons")


def made(
    path: Path, trained: dict[str, list[str]] | None = None, tasks: tuple[str, ...] = TASKS, **more: Any
) -> Path:
    """A run; `trained` says which adapters each task trained. Rows keep 100 bytes of method state per task."""
    fake_run(path, tasks=tasks, n=8, steps=4, **more)
    for i, row in enumerate(sorted((path / "rows").iterdir())):
        budget = json.loads((row / "budget.json").read_text())
        (row / "budget.json").write_text(json.dumps({**budget, "method_state_bytes": 100 * i}))
        if trained and i:
            (row / "fit.json").write_text(
                json.dumps({"learned": list(tasks[:i]), "trained": trained[tasks[i - 1]]})
            )
    return path


def rewrite(run: Path, task: str, mixes: list[dict[str, float]]) -> None:
    """Other routes in the last row."""
    file = sorted((run / "rows").iterdir())[-1] / "predictions" / f"{task}.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [json.dumps({**r, "mix": m}) + "\n" for r, m in zip(records, mixes, strict=True)]
    file.write_text("".join(lines))


def test_routing_counts_the_heaviest_adapter_by_the_task_that_trained_it(tmp_path: Path) -> None:
    own = {t: [t] for t in TASKS}
    run = made(tmp_path / "a", own, routed=True)
    assert summary.routing(load_run(run)) == 100
    rewrite(run, "digits", [{"digits": 0.6, "icons": 0.4}] * 2 + [{"digits": 0.2, "icons": 0.8}] * 5 + [{}])
    assert summary.routing(load_run(run)) == pytest.approx(100 * (8 + 2 + 8) / 24)
    # two tasks share an adapter: either is right for both
    shared = made(tmp_path / "b", {"garments": ["g"], "digits": ["d"], "icons": ["g", "fused"]}, routed=True)
    for task, name in (("garments", "g"), ("digits", "d"), ("icons", "g")):
        rewrite(shared, task, [{name: 1.0}] * 8)
    assert summary.routing(load_run(shared)) == 100


def test_what_does_not_route_has_no_routing_accuracy(tmp_path: Path) -> None:
    one = made(tmp_path / "one", {t: ["lora"] for t in TASKS}, routed=True)
    unknown = made(tmp_path / "unknown", routed=True)  # a run of an earlier version
    summed = made(tmp_path / "sum", {t: [t] for t in TASKS}, routed=True)
    for task in TASKS:
        rewrite(summed, task, [dict.fromkeys(TASKS, 1.0)] * 8)
    merged = made(tmp_path / "merged", {t: [t] for t in TASKS}, routed=True)
    for task in TASKS:
        rewrite(merged, task, [{"merged-1": 1.0}] * 8)
    assert [summary.routing(load_run(r)) for r in (one, unknown, summed, merged)] == [None] * 4


def test_method_state_is_told_at_the_end_and_task_by_task(tmp_path: Path) -> None:
    runs = [made(tmp_path / "a"), made(tmp_path / "b", method=("lora", "ewc"))]
    head, first, second = state_rows(group(load_runs(runs)))
    assert head == ["method", "1", "2", "3"]
    assert [cell.split(" / ")[0] for cell in first[1:]] == ["100 B", "200 B", "300 B"]
    assert second[0] == "lora + ewc" and all("MiB" in cell for cell in second[1:])
    out = io.StringIO()
    compare(runs, Console(file=out, width=400))
    assert "of it method state" in out.getvalue() and "300 B" in out.getvalue()


def test_orders_have_sections_of_their_own(tmp_path: Path) -> None:
    runs, back = tmp_path / "table", tuple(reversed(TASKS))
    for name, method in (("lora", ("lora",)), ("replay", ("lora", "replay")), ("routed", ("lora_per_task",))):
        own = {t: [t] for t in TASKS} if name == "routed" else None
        for seed in (0, 1):
            made(runs / f"{name}-{seed}", own, method=method, seed=seed, routed=name == "routed")
        made(runs / f"{name}.reversed-0", own, back, method=method, routed=name == "routed")
    text = write_results(runs, tmp_path / "results.md").read_text()
    default, other = text.split("## Order `reversed`\n\nTasks: icons, digits, garments.")
    for part, test in ((default, "paired t over seeds, n = 2"), (other, "paired permutation over samples")):
        assert (
            part.count("<!-- table -->") == 1
            and "**Against `lora`**" in part
            and "**Against `replay`**" in part
        )
        assert test in part
        head, _, *body = [
            line.strip("|").split("|") for line in part.split("<!-- table -->\n")[1].splitlines()[:5]
        ]
        cells = {
            row[0].strip(): dict(zip(map(str.strip, head), map(str.strip, row), strict=True)) for row in body
        }
        assert cells["lora"]["Routed"] == cells["replay"]["Routed"] == "–"
        assert cells["routed"]["Routed"].startswith("100.0")
        assert all("iB" in row["Stored"] and "iB" in row["Peak memory"] for row in cells.values())
        kept = next(
            line for line in part.split("**Method state")[1].splitlines() if line.startswith("| lora |")
        )
        assert [cell.split(" / ")[0].strip() for cell in kept.split("|")[2:-1]] == ["100 B", "200 B", "300 B"]
    assert "Made from 9 runs" in default


def test_a_stream_with_unseen_tasks_has_its_section_with_their_scores(tmp_path: Path) -> None:
    runs = tmp_path / "table"
    made(runs / "lora-0")
    for name, merger in (("merge_ties", "ties"), ("merge_task_arithmetic", "task_arithmetic")):
        for seed in (0, 1):
            folder = made(runs / f"{name}-{seed}", method=("merge_tasks",), seed=seed)
            head = json.loads((folder / "run.json").read_text())
            head["config"]["stream"] = {"pocket_merge": {}}
            head["config"]["method"] = [{"merge_tasks": {"merger": merger}}]
            (folder / "run.json").write_text(json.dumps(head))
            m = json.loads((folder / "matrix.json").read_text())
            m |= {"tasks": m["tasks"][:2], "unseen": m["tasks"][2:], "values": m["values"][:3]}
            if "samples" in m:
                m["samples"] = {k: v[:3] for k, v in m["samples"].items()}
            (folder / "matrix.json").write_text(json.dumps(m))
    text = write_results(runs, tmp_path / "results.md").read_text()
    default, other = text.split(
        "## Stream `pocket_merge`\n\nTasks: garments, digits; never trained on: icons."
    )
    assert "| Unseen |" not in default and "| Method | Last | Unseen |" in other
    assert "**Against `merge_task_arithmetic`**" in other and "| merge_ties |" in other


def script() -> Any:
    spec = importlib.util.spec_from_file_location("pocket_table", ROOT / "scripts" / "pocket_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_knows_every_recipe_and_real_orders() -> None:
    table = script()
    names = table.recipes()
    assert names[: len(table.FIRST)] == table.FIRST and len(set(names)) == len(names)
    parts = set()
    for name in names:
        recipe = yaml.safe_load((ROOT / "recipes" / "pocket" / f"{name}.yaml").read_text())
        parts |= {p.name for p in build(recipe["method"]).parts}
    ours = {n for n, cls in available().items() if cls.__module__.startswith("retain.methods.")}
    assert ours <= parts, f"no recipe in recipes/pocket uses {sorted(ours - parts)}"
    for order in filter(None, table.ORDERS.values()):
        assert sorted(order.split()) == sorted(ORDER)
    assert table.ORDERS["reversed"].split() == list(reversed(ORDER))


def test_every_setting_has_its_recipes_orders_and_page(tmp_path: Path) -> None:
    table = script()
    for name, setting in table.SETTINGS.items():
        assert sorted(table.recipes(setting)) == sorted(
            p.stem for p in (ROOT / "recipes" / name).glob("*.yaml")
        )
    long = table.SETTINGS["pocket_long"]
    tasks = yaml.safe_load((ROOT / "recipes" / "pocket_long" / "lora.yaml").read_text())["stream"]["pocket"][
        "order"
    ]
    assert long.orders["reversed"].split() == tasks[::-1]
    steps = {
        yaml.safe_load(p.read_text())["optim"]["steps"]
        for p in (ROOT / "recipes" / "pocket_long").glob("*.yaml")
    }
    assert steps == {320}
    out, args = table.arguments("ema_099", 1, "reversed", tmp_path, [], long)
    assert out == tmp_path / "ema_099.reversed-1" and args[1].endswith("recipes/pocket_long/ema_099.yaml")
    assert "stream.pocket.order=[digits, counting, garments, charts]" in args


def test_the_folder_says_recipe_order_and_seed(tmp_path: Path) -> None:
    table = script()
    out, plain = table.arguments("lora", 3, "default", tmp_path, [])
    assert out == tmp_path / "lora-3" and plain[2:] == ["seed=3", f"out={out}", f"reuse={tmp_path / 'tuned'}"]
    out, other = table.arguments("lora", 3, "reversed", tmp_path, ["optim.steps=2"])
    assert out == tmp_path / "lora.reversed-3" and other[3] == f"out={out}"
    assert other[-2:] == [
        "stream.pocket.order=[distortion, digits, counting, garments, icons, charts, boxes, captions]",
        "optim.steps=2",
    ]


@pytest.mark.slow
def test_the_script_runs_and_writes(tmp_path: Path) -> None:
    small = ["stream.pocket.n_test=2", "stream.pocket.n_train=16", "stream.pocket.order=[digits, charts]"]
    command = [
        sys.executable,
        ROOT / "scripts" / "pocket_table.py",
        "--only",
        "zero_shot",
        "lora",
        "--seeds",
        "0",
    ]
    command += ["--folder", tmp_path, "--out", tmp_path / "t.md", "--jobs", "2", *small, "optim.steps=2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "lora-0" in done and "ok" in done and "| lora |" in (tmp_path / "t.md").read_text()
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "lora-0" not in again
    wrong = subprocess.run(
        [*command, "no.such=1", "--seeds", "1"], check=False, capture_output=True, text=True
    )
    assert wrong.returncode == 1 and "exit 2" in wrong.stdout


@pytest.mark.slow
def test_a_merge_is_scaled_on_validation_data(tmp_path: Path) -> None:
    recipe = tmp_path / "merged.yaml"
    small = "{seen: [digits, charts], unseen: [icons], n_train: 16, n_test: 2, n_valid: 4}"
    recipe.write_text(
        f"model: pocket\nadapter: {{rank: 4}}\nstream: {{pocket_merge: {small}}}\n"
        "method: {merge_tasks: {merger: average}}\noptim: {lr: 1e-3, steps: 2, batch_size: 4}\n"
    )
    retain = [sys.executable, "-m", "retain.cli", "run", recipe, f"out={tmp_path / 'run'}"]
    subprocess.run(retain, check=True, capture_output=True)
    script = [
        sys.executable,
        ROOT / "scripts" / "merge_lam.py",
        tmp_path / "run",
        "--mergers",
        "ties",
        "copa",
    ]
    command = [*script, "--lams", "0.5", "1", "--params", '{"density": 0.5}']
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [line.strip("| ").split(" | ") for line in told if line.startswith("|")]
    assert rows[0] == ["merger", "0.5", "1"] and [r[0] for r in rows[2:]] == ["ties", "copa"]
    assert all(len(cell.split(" / ")) == 2 for row in rows[2:] for cell in row[1:])
