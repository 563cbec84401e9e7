"""Splits, stages and rounds of a federated run: laws, FCIT's released draws, files of clients there and back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reference import fcit_split as released
from retain.benchmarks import fcit as bench
from retain.data import read
from retain.data.picture import opened
from retain.federated import cut
from retain.federated.places import sample, seats
from retain.federated.split import PUBLISHED, Split, SplitSpec, Stage, Unit, make, plan, write_partitions
from retain.metrics import score
from retain.stream import Stream, Task
from retain.types import Example, Lazy, Message, RetainError, plain

LABELS = ("red", "green", "blue")


def example(task: str, i: int, **more: Any) -> Example:
    turns = (Message("user", f"{task}: what is {i}?"), Message("assistant", LABELS[i % 3]))
    return Example(f"{task}/{i}", turns, **more)


def stream_of(*names: str, n: int = 120) -> Stream:
    exact = score("exact")
    made = [
        Task(t, [example(t, i) for i in range(n + k)], [example(t, 0)], exact) for k, t in enumerate(names)
    ]
    return Stream("made", tuple(made))


EIGHT = stream_of(*bench.TASKS)
GROUPS = {"one": ["a", "d"], "two": ["b"], "three": ["c"]}
FOUR = stream_of("a", "b", "c", "d")


def spec(**given: Any) -> SplitSpec:
    return SplitSpec(**{"clients": 6, "per_round": 3, "rounds": 2, **given})


def files(split: Split, unit: str) -> list[set[tuple[str, int]]]:
    return [set(split.rows[unit].get(c, ())) for c in split.clients]


SKEWS: list[dict[str, Any]] = [
    {"skew": "dirichlet"}, {"skew": "dirichlet", "beta": 0.5, "min_rows": 3}, {"skew": "label"},
    {"skew": "task", "beta": 0.2}, {"skew": "even"}, {"skew": "dirichlet", "beta": 1e-300, "clients": 1, "per_round": 1},
    {"skew": "dirichlet", "beta": 1e308},
]  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {"setting": "task_hom"}, {"setting": "task_het"},
    {"setting": "capability_hom", "groups": GROUPS}, {"setting": "capability_het", "groups": GROUPS},
]  # fmt: skip


# -- who has what: laws ----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s["setting"])
@pytest.mark.parametrize("skew", SKEWS, ids=str)
def test_every_row_has_one_client_at_most(setting: dict[str, Any], skew: dict[str, Any]) -> None:
    s = spec(**setting, **skew)
    split = make(s, FOUR)
    for unit in split.units:
        rows = [r for found in split.rows[unit.name].values() for r in found]
        own = {(t, i) for t in unit.tasks for i in range(len(FOUR.named(t).train))}
        assert len(rows) == len(set(rows)) and set(rows) <= own
        assert split.left[unit.name] == len(own) - len(rows)
        if s.skew != "dirichlet":
            assert not split.left[unit.name]
        else:
            assert split.left[unit.name] < s.clients
        counts = [n for n in split.counts(unit.name).values() if n or s.skew != "task"]
        assert min(counts) >= s.min_rows
        assert all(list(found) == sorted(found) for found in split.rows[unit.name].values())
    assert all(any(split.counts(u.name)[c] for u in split.units) for c in split.clients)
    again = make(s, FOUR)
    assert again == split and again.digest() == split.digest()
    assert Split.from_data(json.loads(json.dumps(split.to_data()))) == split
    if s.skew != "even" and s.clients > 1:
        assert make(replace(s, split_seed=1), FOUR).digest() != split.digest()


@pytest.mark.parametrize("skew", ["dirichlet", "label", "task", "even"])
def test_one_client_has_the_stream(skew: str) -> None:
    split = make(spec(clients=1, per_round=1, skew=skew), FOUR)
    for task in FOUR:
        assert split.rows[task.name]["client-00"] == tuple((task.name, i) for i in range(len(task.train)))
        assert split.examples(task.name, "client-00", FOUR) == list(task.train)


@pytest.mark.parametrize("skew", ["dirichlet", "label", "even"])
def test_other_units_and_another_order_move_no_row(skew: str) -> None:
    whole, part = make(spec(skew=skew), FOUR), make(spec(skew=skew), FOUR.ordered(["c", "a"]))
    assert all(part.rows[t] == whole.rows[t] for t in ("a", "c"))


def test_shares_are_as_uneven_as_beta_says() -> None:
    """The variance of a share of a symmetric Dirichlet is (K - 1) / (K^2 (K beta + 1))."""
    k, n = 6, 10_000
    for beta in (0.5, 1.0, 5.0):
        rng = np.random.RandomState(0)
        shares = np.array([[len(f) / n for f in cut.by_quantity(n, k, beta, rng)] for _ in range(300)])
        assert shares.var() == pytest.approx((k - 1) / (k * k * (k * beta + 1)), rel=0.15)


def test_labels_are_skewed_and_quantities_follow() -> None:
    stream = stream_of("a", n=600)
    split = make(spec(skew="label", beta=0.3), stream)
    shares = []
    for rows in split.rows["a"].values():
        found = Counter(stream[0].train[i].answer for _, i in rows)
        shares.append(max(found.values()) / len(rows))
    even = make(spec(skew="even"), stream)
    assert max(len(r) for r in even.rows["a"].values()) - min(len(r) for r in even.rows["a"].values()) <= 1
    assert np.mean(shares) > 0.55  # a third of each where labels are mixed


def test_a_label_is_the_first_reference_in_lower_case() -> None:
    rows = [example("a", i, references=(("Yes ", "no")[i % 2], f"other {i}")) for i in range(300)]
    task = replace(FOUR[0], train=rows)
    split = make(spec(skew="label", beta=0.5), replace(FOUR, tasks=(task,)))
    assert sum(split.counts("a").values()) == 300  # two labels, not three hundred


def test_with_a_small_beta_clients_have_few_tasks() -> None:
    held = {}
    for beta in (0.1, 100.0):
        split = make(spec(clients=12, skew="task", beta=beta), FOUR)
        held[beta] = [sum(bool(split.counts(u.name)[c]) for u in split.units) for c in split.clients]
        assert min(held[beta]) >= 1
    assert np.mean(held[0.1]) < 3 and set(held[100.0]) == {4}


def test_rows_of_a_file_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": i, "conversations": turns} for i in range(40)]))
    kept = read.examples(tmp_path / "a.json")
    stream = replace(FOUR, tasks=(replace(FOUR[0], train=kept),))
    split = make(spec(), stream)
    got = split.examples("a", "client-03", stream)
    assert isinstance(got, Lazy) and [e.id for e in got] == [str(i) for _, i in split.rows["a"]["client-03"]]
    assert [p.id for p in plain(got)] == [e.id for e in got] and got[-1].id == list(got)[-1].id


# -- FCIT's arithmetic -----------------------------------------------------------------------------------


def test_clients_are_drawn_as_the_release_draws_them() -> None:
    names = [f"client-{k:02d}" for k in range(50)]
    for s in range(8):
        for r in range(10):
            wanted = released.clients_of(s, r, 50, 0.1)
            assert wanted == released.PRINTED_CLIENTS.get((s, r), wanted)
            drawn = sample(SplitSpec(), s, r, names, 0)
            assert [int(c[-2:]) for c in drawn] == wanted
            assert sample(SplitSpec(), s, r, names[::-1], 0) == drawn
    other = [sample(SplitSpec(), 0, r, names, 1) for r in range(10)]
    assert other != [sample(SplitSpec(), 0, r, names, 0) for r in range(10)]
    assert other == [sample(SplitSpec(), 0, r, names, 1) for r in range(10)]


@pytest.mark.parametrize(("beta", "n"), list(released.PRINTED_SIZES))
def test_rows_are_cut_as_the_release_cuts_them(beta: float, n: int) -> None:
    wanted = released.cut(n, 12, beta, beta, seed=7)
    assert [len(f) for f in wanted] == released.PRINTED_SIZES[beta, n]
    assert wanted[0][:3] == released.PRINTED_FIRST_ROWS[beta, n]
    rng = np.random.RandomState(7)
    while min(map(len, got := cut.by_quantity(n, 12, beta, rng))) < beta:
        pass
    assert [f.tolist() for f in got] == wanted


def test_the_four_settings_are_those_of_fcit() -> None:
    hom = plan(SplitSpec(), EIGHT)[1]
    assert [s.name for s in hom] == list(bench.TASKS) and all(s.units == (s.name,) * 5 for s in hom)
    split = make(SplitSpec(setting="task_het", skew="even"), EIGHT)
    assert [[bench.TASKS.index(u) for u in s.units] for s in split.stages] == [
        list(r) for r in PUBLISHED["task_het", 8]
    ]
    seen: dict[str, None] = {}
    sizes = []
    for stage in split.stages:
        seen |= dict.fromkeys(split.taught(stage))
        sizes.append(len(seen))
    assert sizes == [5, 7, 8, 8, 8, 8, 8, 8]  # as many as the release's script evaluates after each stage
    twelve = stream_of(*(t for names in bench.CAPABILITIES.values() for t in names), n=60)
    groups = {g: list(t) for g, t in bench.CAPABILITIES.items()}
    units, stages = plan(SplitSpec(setting="capability_hom", groups=groups), twelve)
    assert [s.name for s in stages] == ["General", "Other", "Math", "Chart"]
    assert [len(u.tasks) for u in units] == [4, 2, 3, 3]
    het = plan(SplitSpec(setting="capability_het", groups=groups), twelve)[1]
    assert [[list(groups).index(u) for u in s.units] for s in het] == [
        list(r) for r in PUBLISHED["capability_het", 4]
    ]


def test_a_stream_of_another_size_has_the_schedule_that_the_release_draws() -> None:
    six, s = stream_of(*"abcdef"), SplitSpec(setting="task_het")
    stages = plan(s, six)[1]
    assert [["abcdef".index(u) for u in x.units] for x in stages] == [
        released.schedule(i, 6, 50, 0.1) for i in range(6)
    ]
    assert plan(replace(s, split_seed=1), six)[1] != stages
    own = plan(replace(s, schedule=[[0, 0, 1, 2, 5], [4, 4, 4, 4, 4]]), six)[1]
    assert [x.units for x in own] == [tuple("aabcf"), tuple("eeeee")]


# -- places ----------------------------------------------------------------------------------------------


def test_where_all_have_all_places_are_the_draw() -> None:
    split = make(SplitSpec(setting="task_het", skew="even"), EIGHT)
    for s, stage in enumerate(split.stages):
        drawn = [f"client-{k:02d}" for k in released.clients_of(s, 3, 50, 0.1)]
        assert seats(SplitSpec(), split, s, 3, 0) == list(zip(drawn, stage.units, strict=True))


def held(units: dict[str, str], per_round: int = 3) -> tuple[SplitSpec, Split]:
    """A split in which each client holds one row of each unit that its text names; one stage with units a, b, c."""
    rows = {u: {c: ((u, k),) for k, (c, has) in enumerate(units.items()) if u in has} for u in "abc"}
    made = Split(
        tuple(Unit(u, (u,)) for u in "abc"), (Stage("s", tuple("abc")[:per_round]),), tuple(units), rows
    )
    return SplitSpec(clients=len(units), per_round=per_round), made


def test_places_go_to_clients_who_have_the_unit() -> None:
    s, split = held({"p": "ab", "q": "a", "r": "abc", "s": "c"})
    for r in range(30):
        got = seats(s, split, 0, r, 0)
        assert [u for _, u in got] == ["a", "b", "c"] and len({c for c, _ in got}) == 3
        assert all(split.counts(u)[c] for c, u in got)
    s, split = held({"p": "ab", "q": "a"}, per_round=2)  # one way alone, whoever is drawn first
    assert all(seats(s, split, 0, r, 0) == [("q", "a"), ("p", "b")] for r in range(8))
    s, split = held({"p": "b", "q": "ab", "r": "a"})  # one way for two places alone: nobody has c
    assert {u for _, u in seats(s, split, 0, 0, 0)} == {"a", "b"}
    assert seats(s, split, 0, 0, 0, there=["r"]) == [("r", "a")]
    with pytest.raises(RetainError, match=r"stage 's': no client has rows of \['a', 'b', 'c'\]"):
        seats(s, split, 0, 0, 0, there=[])


def test_a_round_of_one_unit_asks_those_who_have_it() -> None:
    split = make(spec(clients=12, per_round=4, skew="task", beta=0.1), FOUR)
    for s, stage in enumerate(split.stages):
        there = [c for c, n in split.counts(stage.name).items() if n]
        for r in range(5):
            got = seats(spec(clients=12, per_round=4), split, s, r, 0)
            assert len(got) == len({c for c, _ in got}) == min(4, len(there))
            assert {c for c, _ in got} <= set(there) and {u for _, u in got} == {stage.name}


# -- files of clients ------------------------------------------------------------------------------------


def pictured(folder: Path | None = None) -> Stream:
    """Tasks with images as files under `folder`, or in memory, and rows of every form."""
    rng = np.random.RandomState(0)

    def one(task: str, i: int) -> Example:
        pixels = rng.randint(0, 255, (5, 6, 3), np.uint8)
        source: Any = pixels if i % 2 else Image.fromarray(pixels)
        if folder is not None:
            source = folder / task / f"{i % 4}.png"
            source.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(source)
        answer, m = Message("assistant", f"answer {i} of <image>"), {"options": ["x", "y"]}
        if i % 5 == 0:
            turn = Message("user", f"before and after {task} {i}", 2, (0, 6))
            return Example(
                f"{task}{i}", (Message("system", "Be brief."), turn, answer), (source, source), (), m
            )
        turn = Message("user", f" what is {i}? " if i % 5 == 1 else f"what is {i}?", 1)
        return Example(f"{task}{i}", (turn, answer), (source,), (f"answer {i}", "other"))

    exact = score("exact")
    return Stream("made", tuple(Task(t, [one(t, i) for i in range(24)], [], exact) for t in "ab"))


def told(e: Example) -> Any:
    """All of an example but where its images lie: those as pixels."""
    turns = [(m.role, m.parts()) for m in e.messages]
    pixels = [np.asarray(opened(v, e.told)).tobytes() for v in e.images]
    return e.id, turns, pixels, e.references, dict(e.meta)


@pytest.mark.parametrize("setting", ["task_hom", "capability_hom"])
@pytest.mark.parametrize("where", ["memory", "files", "copied"])
def test_a_site_reads_what_the_split_gave_it(setting: str, where: str, tmp_path: Path) -> None:
    stream = pictured(None if where == "memory" else tmp_path / "images")
    groups = {"all": ["a", "b"]}
    s = spec(clients=3, setting=setting, groups=groups if setting == "capability_hom" else {})
    split, out = make(s, stream), tmp_path / "out"
    root = write_partitions(split, stream, out, copy=where == "copied")
    assert root == (tmp_path / "images" if where == "files" else out)
    for u, unit in enumerate(split.units, 1):
        for k, client in enumerate(split.clients):
            path = out / f"Task{u}" / f"client_{k}.json"
            site = read.examples(path, root)
            assert list(map(told, site)) == list(map(told, split.examples(unit.name, client, stream)))
            if where != "files":
                assert all(f"images/client_{k}/" in str(v) for e in site for v in e.images)
    # and the same split comes of the files, whatever the recipe would draw
    again = make(replace(s, partitions=str(out), split_seed=5), stream)
    assert again == split


def published(folder: Path, stream: Stream, split: Split, change: Callable[[Any], Any] | None = None) -> Path:
    """The layout of the release, made by hand: ids are row numbers, so that tasks share them."""
    for u, unit in enumerate(split.units, 1):
        for k, client in enumerate(split.clients):
            rows = []
            for task, i in split.rows[unit.name].get(client, ()):
                e = stream.named(task).train[i]
                turns = [
                    {"from": "human", "value": f"<image>\n{e.question}"},
                    {"from": "gpt", "value": e.answer},
                ]
                rows.append({"id": i, "image": f"./{task}/{i % 4}.png", "conversations": turns})
            path = folder / "Task-related" / "seq" / "1.0" / f"Task{u}" / f"client_{k}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows, indent=4))
    return folder


def numbered(folder: Path) -> Stream:
    """A stream of files whose ids are row numbers, as in published files; two tasks ask the same, of other images."""
    tasks = []
    for t in "ab":
        rows = []
        for i in range(24):
            turns = (Message("user", f"what is {i % 6}?", 1), Message("assistant", f"answer {i}"))
            rows.append(Example(str(i), turns, (folder / t / f"{i % 4}.png",)))
        tasks.append(Task(t, rows, [], score("exact")))
    return Stream("made", tuple(tasks))


def test_published_files_are_read_where_they_are(tmp_path: Path) -> None:
    stream = numbered(tmp_path / "images")
    split = make(spec(clients=3), stream)
    root = published(tmp_path / "partitioned_data", stream, split)
    got = make(spec(clients=3, partitions=str(root), split_seed=9, beta=1.0), stream)
    assert got == split
    direct = root / "Task-related" / "seq"
    assert make(spec(clients=3, partitions=str(direct)), stream) == split
    assert make(spec(clients=3, partitions=str(direct / "1.0"), beta=0.5), stream) == split
    # without ids, rows are found by image and question, and rows that are alike by their answer
    for path in direct.rglob("*.json"):
        path.write_text(
            json.dumps([{k: v for k, v in row.items() if k != "id"} for row in json.loads(path.read_text())])
        )
    assert make(spec(clients=3, partitions=str(root)), stream) == split
    # a file of another order keeps its own
    path = direct / "1.0" / "Task1" / "client_0.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    assert (
        make(spec(clients=3, partitions=str(root)), stream).rows["a"]["client-00"]
        == split.rows["a"]["client-00"][::-1]
    )


def spoiled(path: Path, change: Callable[[list[Any]], None]) -> None:
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def test_published_files_that_do_not_fit_are_told(tmp_path: Path) -> None:
    stream = numbered(tmp_path / "images")
    split = make(spec(clients=3), stream)

    def refused(what: str, break_it: Callable[[Path], Any], **more: Any) -> None:
        root = published(tmp_path / f"{len(list(tmp_path.iterdir()))}", stream, split)
        break_it(root / "Task-related" / "seq" / "1.0")
        with pytest.raises(RetainError, match=what) as caught:
            make(spec(**{"clients": 3, "partitions": str(root), **more}), stream)
        assert "\n" not in str(caught.value)

    first = Path("Task1") / "client_1.json"
    refused(
        r"client_1.json, row 2, id 7777: no training row of \['a'\] is this one",
        lambda f: spoiled(f / first, lambda rows: rows[1].update(id=7777, image="z.png")),
    )
    refused(
        r"row 1, id \d+: no training row of \['a'\] is this one; the one with this id asks 'what is",
        lambda f: spoiled(f / first, lambda rows: rows[0]["conversations"][0].update(value="Who?")),
    )
    refused(
        r"client_1.json, row \d+, id \d+: row \d+ of task 'a' is given to client_0.json, row 1, already",
        lambda f: spoiled(
            f / first, lambda rows: rows.append(json.loads((f / "Task1/client_0.json").read_text())[0])
        ),
    )
    refused("client_1.json: no such file; every client needs one", lambda f: (f / first).unlink())
    refused("client_1.json: 0 rows, but federated.min_rows is 1", lambda f: (f / first).write_text("[]"))
    refused(
        "has client_2.json, but federated.clients is 2, counted from 0",
        lambda f: None,
        clients=2,
        per_round=2,
    )
    refused("client_3.json: no such file", lambda f: None, clients=4)
    refused(r"has the files of 3 units \(Task1, …\), and the recipe has 2", lambda f: (f / "Task3").mkdir())
    refused("no folder 'Task1' in", lambda f: None, beta=0.5)
    refused(
        "client_1.json, row 1: the field 'conversations' is missing",
        lambda f: spoiled(f / first, lambda rows: rows[0].pop("conversations")),
    )
    refused("client_1.json", lambda f: (f / first).write_text("[{"))


def test_under_task_a_client_may_lack_a_file(tmp_path: Path) -> None:
    stream = numbered(tmp_path / "images")
    s = spec(clients=4, skew="task", beta=0.2)
    split = make(s, stream)
    assert any(len(split.rows[u]) < 4 for u in "ab")
    write_partitions(split, stream, tmp_path / "out", image_root=tmp_path / "images")
    assert make(replace(s, partitions=str(tmp_path / "out")), stream) == split
    with pytest.raises(RetainError, match=r"every client needs one, unless federated\.skew is 'task'"):
        make(replace(s, partitions=str(tmp_path / "out"), skew="even"), stream)
    for path in (tmp_path / "out" / "Task2").iterdir():
        path.write_text("[]")
    with pytest.raises(RetainError, match=r"federated: no client has rows of \['b'\]"):
        make(replace(s, partitions=str(tmp_path / "out")), stream)


def test_files_are_written_whole_or_not(tmp_path: Path) -> None:
    stream = pictured(tmp_path / "images")
    split, out = make(spec(clients=3), stream), tmp_path / "out"
    with pytest.raises(RetainError, match="is not in the image root"):
        write_partitions(split, stream, out, image_root=tmp_path / "images" / "a")
    word = replace(
        stream[0].train[0],
        messages=(Message("user", "the word <image>"), Message("assistant", "x")),
        images=(),
    )
    bad = replace(stream, tasks=(replace(stream[0], train=[word] * 24), stream[1]))
    with pytest.raises(RetainError, match="as a word of a question cannot be written"):
        write_partitions(split, bad, out)
    (tmp_path / "images" / "a" / "1.png").unlink()
    with pytest.raises(RetainError, match="cannot write"):
        write_partitions(split, stream, out, copy=True)
    assert not out.exists() and not [p for p in tmp_path.iterdir() if ".part" in p.name]
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(RetainError, match=r"exists and is not empty; choose another folder$"):
        write_partitions(split, stream, out)


# -- what cannot be --------------------------------------------------------------------------------------

WORDS = replace(
    FOUR, tasks=(replace(FOUR[0], train=[example("a", i, references=(str(i),)) for i in range(300)]),)
)


@pytest.mark.parametrize(
    ("given", "stream", "what"),
    [
        ({"per_round": 7}, FOUR, r"federated.per_round: 7 clients a round, but federated.clients is 6"),
        ({"schedule": [[0, 0, 0]]}, FOUR, "federated.schedule: 'task_hom' has one unit per stage"),
        ({"schedule": [[0, 0, 0], [0]], "setting": "task_het"}, FOUR, r"schedule\[1\]: 1 units, but .*per_round is 3"),
        ({"schedule": [], "setting": "task_het"}, FOUR, "federated.schedule: must not be empty"),
        ({"schedule": [[0, 4, 0]], "setting": "task_het"}, FOUR, r"schedule\[0\]\[1\]: no unit 4; there are 4"),
        ({"schedule": [[0, -1, 0]], "setting": "task_het"}, FOUR, r"schedule\[0\]\[1\]: must be at least 0"),
        ({"setting": "capability_hom"}, FOUR, "needs groups of tasks, and stream 'made' has none"),
        ({"setting": "capability_hom", "groups": {"g": ["a", "z"]}}, FOUR, r"groups.g: no task 'z'; choose from"),
        ({"setting": "capability_hom", "groups": {"g": ["a", "b"], "h": ["c"]}}, FOUR, "task 'd' is in no group"),
        (
            {"setting": "capability_het", "groups": {"g": ["a", "b"], "h": ["c", "d", "a"]}},
            FOUR,
            "groups.h: task 'a' is in group 'g' already",
        ),
        ({"setting": "capability_het", "groups": {"g": []}}, FOUR, "groups.g: must not be empty"),
        ({"clients": 200}, FOUR, "200 clients with at least 1 rows each need 200 rows, and unit 'a' has 120"),
        ({"clients": 500, "skew": "task"}, FOUR, "need 500 rows, and the stream has 486"),
        ({"min_rows": 19, "beta": 0.1}, FOUR, "in 1,000 draws with beta 0.1, one of 6 clients always had fewer than 19"),
        ({"min_rows": 70, "beta": 0.1, "skew": "task"}, FOUR, "in 1,000 draws over tasks with beta 0.1"),
        ({"skew": "label"}, WORDS, "at most 200 different answers, and task 'a' has 300; choose from"),
        ({"beta": 0.0}, FOUR, "federated.beta: must be above 0"),
        ({"skew": "some"}, FOUR, "federated.skew: 'some' is none of"),
        ({"partitions": "/nowhere/at/all"}, FOUR, "federated.partitions: no folder 'Task1' in /nowhere/at/all"),
        ({}, replace(FOUR, tasks=(replace(FOUR[0], train=[]),)), "federated: task 'a' has no training row"),
    ],
    ids=lambda v: "" if isinstance(v, Stream) else str(v)[:40],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(given: dict[str, Any], stream: Stream, what: str) -> None:
    with pytest.raises(RetainError, match=what) as caught:
        make(spec(**given), stream)
    assert "\n" not in str(caught.value)


def test_a_split_that_is_none_is_refused() -> None:
    unit, stage = (Unit("a", ("a",)),), (Stage("a", ("a",)),)
    with pytest.raises(RetainError, match="two clients are called 'p'"):
        Split(unit, stage, ("p", "q", "p"), {"a": {}})
    with pytest.raises(RetainError, match="row 3 of task 'a' belongs to 'p' and to 'q'"):
        Split(unit, stage, ("p", "q"), {"a": {"p": (("a", 3),), "q": (("a", 3),)}})
    with pytest.raises(RetainError, match="unit 'a' has rows of 'r', which is no client"):
        Split(unit, stage, ("p", "q"), {"a": {"r": ()}})
    with pytest.raises(RetainError, match=r"here\.json: no split: KeyError"):
        Split.from_data({"units": []}, "here.json")


# -- the benchmark ---------------------------------------------------------------------------------------


def fcit_folder(root: Path) -> Path:
    """The release's tree in small: every task with six rows to learn and two to answer."""
    image = root / "datasets" / "any" / "1.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(image)
    for name, part in bench.PARTS.items():
        turns = [{"from": "human", "value": f"<image>\n{name}?"}, {"from": "gpt", "value": "yes"}]
        rows = [{"id": i, "image": "any/1.png", "conversations": turns} for i in range(6)]
        tests = [
            {"question_id": i, "image": "any/1.png", "text": f"{name}?", "answer": "yes"} for i in range(2)
        ]
        if name == "Grounding":
            tests = [{**{k: v for k, v in t.items() if k != "answer"}, "answer": "[0, 0, 1, 1]",
                      "answer_bbox": "[0, 0, 1, 1]", "size": [4, 4]} for t in tests]  # fmt: skip
        for file, content in ((part.train, rows), (part.test, tests)):
            path = root / "instructions" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    notes = [{"id": k, "image_id": 1 + k % 2, "caption": f"c{k}"} for k in range(4)]
    (root / "instructions" / bench.PARTS["Flickr30k"].captions).write_text(json.dumps({"annotations": notes}))
    return root


def test_fcit_reads_the_release_tree(tmp_path: Path) -> None:
    root = str(fcit_folder(tmp_path / "fcit"))
    eight = bench.fcit(root)
    assert [t.name for t in eight] == list(bench.TASKS)
    assert all(t.compat is not None and len(t.train) == 6 and t.max_new_tokens == 128 for t in eight)
    assert eight.named("Flickr30k").test[1].references == ("c1", "c3")  # image_id counts rows from 1
    twelve = bench.fcit(root, "capability")
    split = make(SplitSpec(setting="capability_hom", clients=3, per_round=2), twelve)
    assert {u.name: u.tasks for u in split.units} == bench.CAPABILITIES
    assert sorted(twelve.named("Grounding").test[0].meta) == ["box", "size"]
    with pytest.raises(RetainError, match="fcit: no task 'DVQA' of kind 'task'; choose from"):
        bench.fcit(root, tasks=["DVQA"])
    with pytest.raises(RetainError, match="no folder 'instructions'"):
        bench.fcit(str(tmp_path / "nowhere"))
    captions = tmp_path / "fcit" / "instructions" / bench.PARTS["Flickr30k"].captions
    for data, what in (
        (
            {"annotations": [{"image_id": 3, "caption": "x"}]},
            r"annotations\[0\]: a 'caption' and an 'image_id' of 1 to 2",
        ),
        (
            {"annotations": [{"image_id": 1, "caption": "x"}]},
            "no caption of image_id 2, row 2 of the test file",
        ),
        ({}, "a list 'annotations'"),
    ):
        captions.write_text(json.dumps(data))
        with pytest.raises(RetainError, match=what):
            bench.fcit(root, tasks=["Flickr30k"])
    captions.unlink()
    with pytest.raises(RetainError, match="no such file; it holds the captions"):
        bench.fcit(root, tasks=["Flickr30k"])
