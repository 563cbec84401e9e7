"""Reports: one self-contained page, nothing unescaped, honest about unfinished runs and unequal budgets."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from fake_runs import fake_run
from limits import BROWSER, finished
from retain.report import figures, samples, summary
from retain.report.html import write_report
from retain.report.load import group, load_run, load_runs, read_events
from retain.report.tables import compare, results_table
from retain.report.training import smooth, thin, training
from retain.types import RetainError

SMALL = {"tasks": ("garments", "digits", "icons", "boxes"), "n": 16, "steps": 40}
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags close in order; collects attributes that could fetch and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("runs")
    return {
        "lora": fake_run(at / "lora-seed0", **SMALL),
        "lora1": fake_run(at / "lora-seed1", seed=1, **SMALL),
        "llaca": fake_run(at / "llaca-seed0", method=("lora", "llaca"), forgetting=0.02, **SMALL),
        "llaca1": fake_run(at / "llaca-seed1", seed=1, method=("lora", "llaca"), forgetting=0.02, **SMALL),
        "routed": fake_run(
            at / "routed", method=("lora_per_task",), routed=True, parameters=99_000, forgetting=0.02, **SMALL
        ),
        "cut": fake_run(at / "cut", rows=3, method=("lora", "grouping"), **SMALL),
        "zero": fake_run(at / "zero", rows=1, **SMALL),
        "none": fake_run(at / "none", rows=0, **SMALL),
    }


def page(paths: list[Path], tmp_path: Path) -> tuple[str, Page]:
    text = write_report(paths, tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.open == [], "every tag is closed"
    return text, parsed


PAGES = [("lora",), ("routed",), ("cut",), ("zero",), ("none",), ("lora", "lora1", "llaca", "cut", "none")]


@pytest.mark.parametrize("names", PAGES)
def test_one_file_that_parses_and_fetches_nothing(
    names: tuple[str, ...], runs: dict[str, Path], tmp_path: Path
) -> None:
    text, parsed = page([runs[name] for name in names], tmp_path)
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|url\(", text)
    assert all(value.startswith("data:image/") for value in parsed.fetched)
    assert "default-src 'none'" in text and "nan" not in parsed.text.split("Config and environment")[0]


def test_a_report_shows_numbers_intervals_formulas_and_samples(runs: dict[str, Path], tmp_path: Path) -> None:
    run = load_run(runs["lora"])
    text, parsed = page([runs["lora"]], tmp_path)
    for metric in summary.metrics_of(run):
        if metric.value is not None and metric.name in ("Last", "BWT", "Forgetting"):
            assert f"{metric.value:.1f}" in parsed.text and metric.formula in parsed.text
            assert f"{metric.low:.1f} to {metric.high:.1f}" in parsed.text
    sample = samples.forgotten(run)[0]
    assert sample.question in parsed.text and sample.image is not None and sample.image in text
    assert sample.answers[0].right and not sample.answers[-1].right


def test_everything_from_a_run_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>&'
    path = fake_run(
        tmp_path / "evil", method=(evil,), tasks=("garments", "digits"), n=8, steps=10, forgetting=9
    )
    for file in sorted(path.glob("rows/*/predictions/*.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for record in records:
            record |= {"question": evil, "prediction": evil, "references": [evil]}
        file.write_text("".join(json.dumps(r) + "\n" for r in records))
    log = {"kind": "log", "who": evil, "task": evil, evil: evil}
    (path / "events.jsonl").write_text(json.dumps(log) + "\n")
    text, parsed = page([path], tmp_path)
    assert "<script>alert" not in text and text.count("<script>") == 1
    assert evil in parsed.text


def test_an_unfinished_run_says_so_and_counts_what_it_has(runs: dict[str, Path], tmp_path: Path) -> None:
    run = load_run(runs["cut"])
    assert run.matrix is not None and run.matrix.tasks == ("garments", "digits") and not run.done
    assert summary.progress_of(run) == "2 of 4 tasks learned and evaluated"
    _, parsed = page([runs["cut"]], tmp_path)
    assert "This run is not finished: 2 of 4 tasks" in parsed.text
    assert "not finished: no row is complete" in page([runs["none"]], tmp_path)[1].text


def test_several_runs_are_compared_and_differences_in_budget_are_said(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    _, parsed = page([runs[n] for n in ("lora", "lora1", "llaca", "llaca1", "routed", "cut")], tmp_path)
    assert "Budgets of lora_per_task and lora differ by more than 1%" in parsed.text
    assert "Budgets of lora + llaca and lora differ" not in parsed.text
    assert "paired t over seeds (n = 2)" in parsed.text and "cut is not finished" in parsed.text


def test_a_budget_within_one_percent_is_equal(tmp_path: Path) -> None:
    def against_1000(n: int) -> list[str]:
        small = {"tasks": ("garments",), "n": 4, "steps": 4}
        a = fake_run(tmp_path / f"a{n}", parameters=1000, **small)
        b = fake_run(tmp_path / f"b{n}", method=("replay",), parameters=n, **small)
        first, second = group(load_runs([a, b]))
        return summary.differing(second, first)

    assert against_1000(1010) == []
    assert any(text.startswith("trainable parameters 1020 against 1000") for text in against_1000(1020))


def test_runs_that_differ_in_the_seed_only_are_one_group(runs: dict[str, Path]) -> None:
    groups = group(load_runs([runs["lora"], runs["llaca"], runs["lora1"]]))
    assert [(g.label, g.seeds) for g in groups] == [("lora", [0, 1]), ("lora + llaca", [0])]
    two, one = (summary.numbers(g)["Last"] for g in groups)
    assert two.sd is not None and one.sd is None and one.low is not None


def test_groups_of_one_method_get_distinct_names(tmp_path: Path) -> None:
    small = {"tasks": ("garments",), "n": 4, "steps": 4}
    paths = [fake_run(tmp_path / f"lr{k}", lr=10.0**-k, **small) for k in (2, 3)]
    assert [g.label for g in group(load_runs(paths))] == ["lr2", "lr3"]


def test_compare_prints_plain_text_in_a_pipe(runs: dict[str, Path]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=60)
    compare([runs[n] for n in ("lora", "lora1", "llaca", "llaca1", "routed", "cut")], console, "lora-seed1")
    text = out.getvalue()
    assert "\x1b" not in text and "│" not in text and "┃" not in text
    assert "Last = mean_j A[T,j]" in text and "warning: cut is not finished" in text
    assert "Against lora" in text and "paired t over seeds, n = 2" in text
    with pytest.raises(RetainError, match=r"no method or run 'ewc'.*lora-seed0"):
        compare([runs["lora"]], console, "ewc")


def test_the_results_table_is_markdown(runs: dict[str, Path]) -> None:
    loaded = load_runs([runs[n] for n in ("lora", "lora1", "routed")])
    table = results_table(loaded, {"routed": "per task"}).splitlines()
    assert len({line.count("|") for line in table}) == 1 and len(table) == 4
    assert "±" in table[2] and table[2].endswith("| 2 |")
    assert table[3].startswith("| per task |") and table[3].endswith("| 1 |")


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("no folder", shutil.rmtree, r"no such folder"),
    ("no run.json", lambda p: (p / "run.json").unlink(), r"not a run folder: run.json is missing"),
    ("broken json", lambda p: (p / "run.json").write_text("{"), r"run\.json"),
    ("a list", lambda p: (p / "run.json").write_text("[]"), r"run\.json .*a JSON object is needed"),
    ("other format", lambda p: (p / "run.json").write_text('{"format": 9}'), r"format 9.*reads format 1"),
    ("broken matrix", lambda p: (p / "matrix.json").write_text('{"tasks": []}'), r"values"),
]


@pytest.mark.parametrize(("what", "damage", "message"), BROKEN, ids=[b[0] for b in BROKEN])
def test_a_wrong_folder_is_named(
    what: str, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = fake_run(tmp_path / "run", tasks=("garments",), n=2, steps=2)
    damage(path)
    with pytest.raises(RetainError, match=message):
        load_run(path)


def test_a_folder_of_runs_names_them(runs: dict[str, Path]) -> None:
    with pytest.raises(RetainError, match=r"run.json is missing; it holds the runs .*'lora-seed0'"):
        load_run(runs["lora"].parent)
    with pytest.raises(RetainError, match="no run folder given"):
        load_runs([])


def test_cut_lines_and_repeated_steps_of_a_resume(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(runs["lora"], path)
    before = training(load_run(path))
    events = path / "events.jsonl"
    again = next(e for e in read_events(events) if e["kind"] == "step")
    with events.open("a") as f:
        f.write('{"kind": "step", "ta\n' + json.dumps(again) + "\n")
    after = training(load_run(path))
    assert sorted(after.loss) == sorted(before.loss) and after.stages == before.stages


def test_an_image_outside_the_run_is_not_read(runs: dict[str, Path]) -> None:
    run = load_run(runs["lora"])
    assert run.thumbnail({"image": "samples/garments/0000.png"}) is not None
    assert run.thumbnail({"image": "../llaca-seed0/samples/garments/0000.png"}) is None
    assert run.thumbnail({"image": "/etc/hostname"}) is None and run.thumbnail({"image": None}) is None


def test_method_logs_become_curves_and_tables(runs: dict[str, Path]) -> None:
    found = training(load_run(runs["llaca"]))
    assert set(found.logs["llaca"]) == {"rate", "fallback_share"}
    assert set(found.logs["llaca"]["rate"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(found.rates) == {"lora", "projector"} and len(found.loss) == 160
    assert [row["group"] for row in training(load_run(runs["cut"])).tables["grouping"]] == ["0", "0"]


def test_rates_per_tensor_group_as_llaca_logs_them(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(runs["lora"], path)
    groups = {
        "lora.lora_A": {"median": 0.5, "fallback": 0.25},
        "projector.weight": {"median": 1.0, "fallback": 1.0},
    }
    log = {"method": "llaca", "task": "garments", "groups": groups}
    lines = [json.dumps({**log, "step": step}) + "\n" for step in range(10)]
    with (path / "events.jsonl").open("a") as f:
        f.write("".join(lines) + json.dumps({**log, "kind": "rates_of_task"}) + "\n")
    found = training(load_run(path))
    curves = found.logs["llaca"]
    assert set(curves) == {"median", "fallback"} and len(curves["median"]["lora.lora_A"]) == 10
    table = found.tables["llaca, rates of task"]
    assert [row["groups"] for row in table] == list(groups) and table[0]["fallback"] == "0.25"


def test_routing_is_the_mean_weight_per_task(runs: dict[str, Path]) -> None:
    found = samples.routing(load_run(runs["routed"]))
    assert found is not None and found.weights["digits"][1] == pytest.approx(0.9)
    assert samples.routing(load_run(runs["lora"])) is None


def test_smoothing_and_thinning() -> None:
    assert smooth([(0, 2.0), (1, 2.0)]) == [(0, pytest.approx(2.0)), (1, pytest.approx(2.0))]
    assert thin([(float(i), float(i)) for i in range(10)], 5) == [(k + 0.5, k + 0.5) for k in (0, 2, 4, 6, 8)]


def test_ticks_are_round_and_hold_all_values() -> None:
    axis = figures.axis([0.0, 0.0017])
    assert axis.high >= 0.0017 and [text for _, text in axis.ticks] == [
        "0",
        "0.0005",
        "0.001",
        "0.0015",
        "0.002",
    ]
    log = figures.axis([0.002, 3.0], log=True)
    assert log.log and log.low <= 0.002 and log.high >= 3.0 and log.place(3.0) > log.place(0.002)


def test_a_matrix_as_a_picture_is_valid_xml() -> None:
    from xml.etree import ElementTree

    svg = figures.matrix_svg(["zero-shot", "a<b"], ["a<b", "c"], [[1.0, None], [90.0, 5.0]], "t & u")
    root = ElementTree.fromstring(str(svg))
    assert sum(e.text == "90" for e in root.iter()) == 1


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_sideways_scrolling(
    width: int, runs: dict[str, Path], tmp_path: Path
) -> None:
    report = write_report([runs["lora"], runs["llaca"], runs["routed"]], tmp_path / "report.html")
    frame = tmp_path / "frame.html"  # a window cannot be as narrow as a phone, a frame can
    script = "const e = f.contentDocument.documentElement; document.title = e.scrollWidth - e.clientWidth"
    style = f"border:0;width:{width}px;height:3000px"
    frame.write_text(f'<iframe id="f" src="{report.name}" style="{style}" onload="{script}"></iframe>')
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    flags += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = [f"--screenshot={tmp_path / 'shot.png'}", f"--window-size={max(width, 500)},3000"]
    assert CHROMIUM is not None
    dom = finished([CHROMIUM, *flags, "--dump-dom", frame.as_uri()], BROWSER, "BROWSER", check=True).stdout
    assert re.search("<title>0</title>", dom), re.search(r"<title>.*?</title>", dom)
    finished([CHROMIUM, *flags, *shot, frame.as_uri()], BROWSER, "BROWSER", check=True)
    assert (tmp_path / "shot.png").stat().st_size > 20_000
