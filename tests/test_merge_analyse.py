"""Direction robustness, MM-MergeBench, and both through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from retain import cli
from retain.analyse.merge import robustness
from retain.benchmarks import mm_mergebench as bench
from retain.merge.parts import Low, scaled, total
from retain.types import RetainError


def low(seed: int, rank: int = 4) -> Low:
    rng = torch.Generator().manual_seed(seed)
    B, A = torch.randn(40, rank, generator=rng), torch.randn(rank, 30, generator=rng)
    return Low(
        torch.linalg.qr(B).Q * torch.tensor([8.0, 4, 2, 1][:rank]), torch.linalg.qr(A.T).Q.T.contiguous()
    )


def call(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def test_robustness_of_itself_of_a_multiple_and_of_nothing() -> None:
    a = low(1)
    for merged in (scaled(a, 3.0), scaled(a, 3.0).dense()):
        r = robustness(a, merged)
        assert r is not None
        assert r.cosine == pytest.approx((1, 1), abs=1e-4) and r.ratio == pytest.approx((3, 3), rel=1e-4)
        assert r.kept == pytest.approx((3, 3), rel=1e-4)
    assert robustness(scaled(a, 0.0), a) is None
    flipped = robustness(a, scaled(a, -1.0))
    assert flipped is not None and flipped.cosine == pytest.approx(
        (1, 1), abs=1e-4
    )  # a direction has no sign


def test_the_tail_turns_before_the_head() -> None:
    """The paper's observation on random adapters: what has a small singular value is turned by the others."""
    adapters = [low(s) for s in range(4)]
    r = robustness(adapters[0], total([scaled(adapters[0], 3.0), *adapters[1:]], [1.0] * 4))
    assert r is not None and r.cosine[0] > 0.9 > 0.6 > r.cosine[1]


def test_a_run_of_merge_tasks_is_analysed(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: pocket\nadapter: {rank: 2, alpha: 4}\n"
        "stream: {pocket_merge: {n_train: 8, n_test: 1, n_valid: 1, seen: [boxes, charts], unseen: [icons]}}\n"
        "method: {merge_tasks: {merger: average}}\noptim: {lr: 1e-3, steps: 3, batch_size: 2}\n"
    )
    run = tmp_path / "run"
    done = call("run", recipe, f"out={run}", "-q")
    assert done.exit_code == 0, done.output
    assert call("analyse", "merge", run).exit_code == 0
    found = json.loads((run / "merge.json").read_text())
    assert found["tasks"] == ["01-boxes", "02-charts"] and len(found["layers"]) == 4
    assert "<svg" in (run / "merge.html").read_text()
    for name, row in (("boxes", 1), ("charts", 2)):
        assert (
            call(
                "export", run, "--after", row, "--adapter", f"0{row}-{name}", "--to", tmp_path / name
            ).exit_code
            == 0
        )
    out = tmp_path / "merged"
    assert call("merge", tmp_path / "boxes", tmp_path / "charts", "--to", out).exit_code == 0
    done = call("analyse", "merge", out, tmp_path / "boxes", tmp_path / "charts")
    assert done.exit_code == 0, done.output
    again = json.loads((tmp_path / "merge.json").read_text())
    for measure in ("cosine", "ratio", "kept"):  # the same merge, made on disk
        assert torch.tensor(again["mean"][measure]) == pytest.approx(
            torch.tensor(found["mean"][measure]), abs=2e-3
        )
    assert "name the merged adapter first" in call("analyse", "merge", out).output


def test_the_published_table_is_whole() -> None:
    for method, cells in bench.PUBLISHED.items():
        seen, unseen = bench.MEANS[method]
        slack = 0.09 if method == "RobustMerge" else 0.011  # one cell of that row is off in our source
        assert bench._mean(cells, bench.SEEN) == pytest.approx(seen, abs=slack), method
        if unseen == unseen:
            assert bench._mean(cells, bench.UNSEEN) == pytest.approx(unseen, abs=0.011), method
    rows = bench.beside({"ScienceQA": 80.0})
    assert len(rows) == 10 and rows[-1][:3] == ["ours", "80.00", "–"] and {len(r) for r in rows} == {15}


def test_mm_mergebench_reads_folders_and_asks_its_way(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Which?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]
    for name in ("ScienceQA", "AOKVQA"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.json").write_text(
                json.dumps([{"id": split, "conversations": turns}])
            )
    s = bench.mm_mergebench(str(tmp_path), seen=["ScienceQA"], unseen=["AOKVQA"])
    assert [t.name for t in s.all] == ["ScienceQA", "AOKVQA"] and len(s[0].train) == 1
    assert s[0].test[0].question.endswith(bench.LETTER) and s[0].compat is not None
    assert bench.asked(s[0].test[0], bench.LETTER) is s[0].test[0]
    with pytest.raises(RetainError, match="no task 'GQA'"):
        bench.mm_mergebench(str(tmp_path), seen=["GQA"])
    with pytest.raises(RetainError, match="no folder"):
        bench.mm_mergebench(str(tmp_path / "nowhere"))
