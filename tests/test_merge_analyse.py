"""Direction robustness, MM-MergeBench, and both through the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fake_runs import fake_run
from retain import cli
from retain.benchmarks import mm_mergebench as bench
from retain.commands.analyse.merge import robustness
from retain.merge.parts import Low, scaled, total
from retain.report import summary
from retain.report.html import write_report
from retain.report.load import group, load_runs
from retain.report.tables import compare
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
    """The means as printed: every row but one is what its cells average to."""
    printed = {
        "individual": (69.23, None), "zero-shot": (43.37, 25.22), "multi-task": (63.62, 36.06),
        "task arithmetic": (53.93, 33.31), "DARE": (53.84, 33.15), "TIES": (53.09, 33.14), "PCB": (53.70, 33.53),
        "RobustMerge": (57.33, 37.99),
    }  # fmt: skip
    assert list(printed) == list(bench.PUBLISHED)
    for method, cells in bench.PUBLISHED.items():
        seen, unseen = printed[method]
        slack = 0.09 if method == "RobustMerge" else 0.011  # one cell of that row is off in our source
        assert sum(cells[t] for t in bench.SEEN) / 8 == pytest.approx(seen, abs=slack), method
        if unseen is not None:
            assert sum(cells[t] for t in bench.UNSEEN) / 4 == pytest.approx(unseen, abs=0.011), method


def test_the_published_table_stands_beside_a_run(tmp_path: Path) -> None:
    tasks = ("ScienceQA", "VQAv2")
    fake_run(tmp_path / "a", tasks=tasks, n=8, steps=4)
    assert summary.beside_published(group(load_runs([tmp_path / "a"]))) is None
    said = {"source": "a paper", "scores": bench.PUBLISHED}
    (tmp_path / "a" / "published.json").write_text(json.dumps(said))
    runs = load_runs([tmp_path / "a"])
    found = summary.beside_published(group(runs))
    assert found is not None and found[0] == "a paper"
    head, *rows = found[1]
    assert head == ["method", *tasks, "mean"] and len(rows) == len(bench.PUBLISHED) + 1
    assert (
        rows[3] == ["task arithmetic", "71.94", "67.06", "69.50"] and rows[-1][0] == f"ours: {runs[0].label}"
    )
    assert runs[0].matrix is not None and rows[-1][1] == f"{runs[0].matrix.values[-1, 0]:.2f}"
    out = io.StringIO()
    compare(runs, Console(file=out, width=300))
    assert "Published (a paper) and ours" in out.getvalue() and "RobustMerge" in out.getvalue()
    assert "Beside the paper" in write_report([tmp_path / "a"], tmp_path / "r.html").read_text()


def test_mm_mergebench_reads_folders_and_asks_its_way(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Which?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]
    for name in ("ScienceQA", "AOKVQA"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.json").write_text(
                json.dumps([{"id": split, "conversations": turns}])
            )
    s = bench.mm_mergebench(str(tmp_path), seen=["ScienceQA"], unseen=["AOKVQA"])
    assert s.published is not None and s.ordered(["ScienceQA"]).published is s.published
    assert [t.name for t in s.all] == ["ScienceQA", "AOKVQA"] and len(s[0].train) == 1
    assert s[0].test[0].question.endswith(bench.LETTER) and s[0].compat is not None
    assert bench.asked(s[0].test[0], bench.LETTER) is s[0].test[0]
    with pytest.raises(RetainError, match="no task 'GQA'"):
        bench.mm_mergebench(str(tmp_path), seen=["GQA"])
    with pytest.raises(RetainError, match="no folder"):
        bench.mm_mergebench(str(tmp_path / "nowhere"))
