"""The frontier of kept against learned: rules that watch one trajectory end as in a run of their own; the page adds up."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fake_model import FakeModel, context, stream
from retain.method import Method, Stack, build
from retain.report.frontier import mean_interval, write_frontier
from retain.run.train import Optim, fit
from retain.types import RetainError

ROOT = Path(__file__).resolve().parent.parent


def script() -> Any:
    spec = importlib.util.spec_from_file_location("pocket_frontier", ROOT / "scripts" / "pocket_frontier.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def two_tasks(method: Method) -> FakeModel:
    model, names = FakeModel(), [t.name for t in stream()][:2]
    for i, name in enumerate(names):
        ctx = context(model, name)
        ctx.seen = names[:i]
        fit(model, method, ctx, Optim(lr=3e-2, steps=8, batch_size=4, warmup=0.0))
    return model


def test_a_rule_that_watches_ends_as_in_a_run_of_its_own() -> None:
    """Rules that leave the first task as it is: the weights after two tasks, and raw ones that nobody touched."""
    names = ["official 0.5", "means 128", "layer 12", "interpolate 0.75", "interpolate chosen"]
    frontier = script()
    rules = frontier.rules()
    watched = frontier.Watched({name: build(rules[name]) for name in rules})
    raw = two_tasks(Stack(build("lora"), watched))
    assert set(watched.ends) == {"lora", *rules}
    for name in names:
        own = two_tasks(Stack(build("lora"), build(rules[name]))).adapters.state("lora")
        assert all(torch.equal(t, own[k]) for k, t in watched.ends[name].items()), name
    plain = two_tasks(build("lora")).adapters.state("lora")
    for state in (watched.ends["lora"], raw.adapters.state("lora")):
        assert all(torch.equal(t, plain[k]) for k, t in state.items())
    assert "reach" in watched.events["official 0.5"] and "ratio" in watched.events["interpolate chosen"]


def record(seed: int, pair: tuple[str, str], kept: float, steps: int = 80) -> dict[str, Any]:
    rules = {
        "lora": {"kept": kept, "learned": 80.0},
        "official 0.5": {"kept": kept + 10, "learned": 78.0, "reach": 2.0, "gone": 0.9},
    }
    return {
        "pair": list(pair),
        "seed": seed,
        "steps": steps,
        "n_eval": 10,
        "before": [70.0, 5.0],
        "rules": rules,
    }


def test_the_page_has_means_over_pairs_and_intervals_over_seeds(tmp_path: Path) -> None:
    pairs = [("a", "b"), ("b", "a")]
    records = [record(s, p, 40 + 10 * s + 4 * i) for s in range(3) for i, p in enumerate(pairs)]
    records += [
        record(3, pairs[0], 0.0),
        record(0, pairs[0], 50.0, steps=320),
    ]  # a seed that lacks a pair is left out
    text = write_frontier(records, tmp_path / "frontier.md").read_text()
    kept = [42.0, 52.0, 62.0]
    half = stats.t.interval(0.95, 2, np.mean(kept), stats.sem(kept))[1] - np.mean(kept)
    assert f"| lora | – | – | 52.0 ± {half:.1f} | 80.0 ± 0.0 |" in text and "seeds: 3." in text
    row = next(line for line in text.splitlines() if line.startswith("| official 0.5 | 2 | 90% |"))
    assert "| +4.0 ± 0.0 |" in row  # (10 - 2) / 2
    for steps in (80, 320):
        picture = ElementTree.parse(tmp_path / "img" / f"frontier_{steps}.svg").getroot()
        assert f"img/frontier_{steps}.svg" in text
        titles = [e.text or "" for e in picture.iter() if e.tag.endswith("title")]
        assert any(t.startswith("official 0.5: learned 78") for t in titles)
    assert write_frontier(records, tmp_path / "frontier.md").read_text() == text


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    assert mean_interval([3.0]) == (3.0, None)
    with pytest.raises(RetainError, match="no result"):
        write_frontier([], tmp_path / "x.md")
    (tmp_path / "y.md").write_text("# no markers")
    with pytest.raises(RetainError, match="markers"):
        write_frontier([record(0, ("a", "b"), 1.0)], tmp_path / "y.md")
