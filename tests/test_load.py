"""Load: a long file of rows costs little and starts at once, a hundred tasks make a page, a full disk loses nothing."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fake_runs
import retain.data.kept as kept_rows
import retain.models.fits as fits
import tiny
from fake_model import FakeModel
from fake_model import stream as fake_stream
from retain.commands.run import check_examples
from retain.data import read
from retain.data.glance import glanced
from retain.data.kept import Kept
from retain.data.picture import looked_at
from retain.files import read_json, write_json
from retain.method import Context
from retain.metrics import score
from retain.models.hf import HFModel
from retain.pocket import pocket_path
from retain.report.html import write_report
from retain.run.evaluate import Prediction, lengths
from retain.run.order import GROUP, batches
from retain.run.store import TUNED, TunedDir
from retain.run.train import Optim
from retain.stream import Stream, Task
from retain.types import Example, Message, RetainError, digest, joined, plain
from test_resume import Server, same, server, truth  # noqa: F401  # fixtures

# -- rows that are kept small ------------------------------------------------------------------------------------

WORDS = ('what colour is the 🎉 square "left" of', "a\nsmall naïve <red> circle \\ and how many")


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(" ".join(WORDS).split(" "), k=n))


def drawn(folder: Path, n: int, seed: int = 0, long: int = 8) -> Path:
    """A JSONL file of LLaVA rows, HF messages and CoIN items over few pictures."""
    rng = random.Random(seed)
    for k in range(3):
        Image.new("RGB", (40 + 8 * k, 48), (80 * k, 10, 10)).save(folder / f"{k}.{('png', 'jpg')[k % 2]}")
    names = [f"{k}.{('png', 'jpg')[k % 2]}" for k in range(3)]
    rows: list[dict[str, Any]] = []
    for i in range(n):
        asked, said, name = words(rng, rng.randint(1, long)), words(rng, rng.randint(1, 3)), rng.choice(names)
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": said}]
        if i % 5 == 4:
            turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        row: dict[str, Any] = {"id": f"é{i}", "image": name, "conversations": turns}
        if i % 7 == 3:
            row = {
                "id": i,
                "text": asked,
                "answer": [said, "b"],
                "meta": {"options": ["x", 1]},
                "source": "s",
            }
        if i % 7 == 5:
            parts = [{"type": "text", "text": "See"}, {"type": "image"}, {"type": "text", "text": asked}]
            row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]}
            row["images"] = [name]
        rows.append(row)
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "d.jsonl"


def said(e: Example) -> tuple[Any, ...]:
    return (e.id, e.messages, e.images, e.references, dict(e.meta))


def by_hand(examples: list[Example]) -> str:
    """The digest of a list of examples as data.json has had it from the start."""
    h = hashlib.sha256()

    def one(v: Any) -> None:
        if isinstance(v, list):
            h.update(f"[{len(v)}".encode())
            for item in v:
                one(item)
        elif isinstance(v, Path):
            h.update(f"{v}:{v.stat().st_size}".encode())
        else:
            h.update(json.dumps(v, sort_keys=True).encode() + b";")

    turns = [
        [[m.role, m.text, m.images, *([list(m.at)] if m.at else [])] for m in e.messages] for e in examples
    ]
    one([[e.id, t, list(e.images), list(e.references)] for e, t in zip(examples, turns, strict=True)])
    return h.hexdigest()[:16]


@pytest.mark.parametrize("packed", [0, 1 << 26])
def test_rows_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: int) -> None:
    monkeypatch.setattr(kept_rows, "PACKED", packed)
    monkeypatch.setattr(kept_rows, "BLOCK", 1 << 10)
    monkeypatch.setattr(kept_rows, "RECENT", 7)
    path = drawn(tmp_path, 200)
    lazy = read.examples(path)
    file = read._File(path, tmp_path.absolute(), 10**8)
    whole = [read._example(row, n, file) for n, row in read.rows(path)]
    assert len(lazy) == 200 and lazy.answers == 2
    order = random.Random(1).sample(range(200), 200)
    assert [said(lazy[i]) for i in order] == [said(whole[i]) for i in order]
    assert [said(e) for e in lazy] == [said(e) for e in whole]
    assert said(lazy[-1]) == said(whole[-1]) and [e.id for e in lazy[3:9:2]] == [e.id for e in whole[3:9:2]]
    assert lazy[5] is lazy[5]  # or what is remembered of an example is not found again
    with pytest.raises(IndexError):
        lazy[200]
    assert list(plain(lazy)) == [tuple(map(_tupled, row)) for row in plain(whole)]
    assert digest(lazy) == digest(whole) == digest(tuple(whole)) == by_hand(whole)


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def test_what_is_no_plain_data_is_kept_as_it_is() -> None:
    lazy, picture = Kept(), Image.new("RGB", (4, 4))
    turns = (Message("user", "?", 1), Message("assistant", "x"))
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    examples = [
        Example("date", turns[1:], (), (), {"day": date(2020, 1, 1)}),
        Example("picture", turns, (picture,)),
        Example("array", turns, (np.zeros((4, 4, 3), np.uint8),)),
        Example("deep", turns[1:], (), (), {"deep": deep}),
        Example("plain", turns[1:]),
    ]
    for e in examples:
        lazy.add(e)
    assert [e.id for e in lazy] == [row.id for row in plain(lazy)] == [e.id for e in examples]
    assert lazy[1].images[0] is picture and lazy[0].meta["day"] == date(2020, 1, 1)
    assert digest(lazy) == digest(examples)


def test_joined_rows_are_a_list_that_nobody_holds(tmp_path: Path) -> None:
    lazy = read.examples(drawn(tmp_path, 30))
    more = [Example("new", (Message("user", "?"), Message("assistant", "x")))]
    both = joined(lazy, more, lazy)
    whole = [*lazy, *more, *lazy]
    assert len(both) == 61 and digest(both) == digest(whole) == by_hand(whole)
    assert [said(both[i]) for i in range(61)] == [said(e) for e in whole]
    assert isinstance(joined(more, more), list) and len(joined()) == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_json_list_is_read_value_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whatever the blanks and wherever a read ends; what is broken is told as Python's reader of the whole tells it."""
    rng, file = random.Random(seed), tmp_path / "d.json"
    values = [{"id": i, "a": [words(rng, rng.randint(0, 9)), {"b": None}, 1.5e3]} for i in range(20)]
    values += [17, "x]", [], {}, None][: seed + 2]
    monkeypatch.setattr(read._List, "_more", lambda self, n: more_by(self, rng.randint(1, 40)))

    def more_by(self: Any, n: int) -> bool:
        found = self.file.read(n)
        self.text, self.at = self.text[self.at :] + found, 0
        return bool(found)

    text = json.dumps(values, indent=rng.choice([None, 1]), ensure_ascii=False)
    for written in (text, f" \n{text}\n ", "\ufeff" + text, "[]", "[ \n]"):
        file.write_text(written, encoding="utf-8")
        assert list(read._items(file)) == json.loads(written.removeprefix("\ufeff"))
    for broken in (
        text[:-1],
        text[: len(text) // 2],
        text + "x",
        text.replace(",", ";", 5),
        "[1,]",
        "[,1]",
        "[1 2]",
    ):
        file.write_text(broken, encoding="utf-8")
        with pytest.raises(RetainError) as raised:
            list(read._items(file))
        with pytest.raises(json.JSONDecodeError) as theirs:
            json.loads(broken)
        assert theirs.value.msg in str(raised.value) and str(file) in str(raised.value)
    file.write_bytes(text.encode()[:-9] + b"\xff\xfe")
    with pytest.raises(RetainError, match="not UTF-8 text: byte"):
        list(read._items(file))


# -- which rows are encoded before the start ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pocket() -> HFModel:
    return HFModel.load(pocket_path(), guard=False)


def refused(model: HFModel, examples: Any) -> set[int]:
    out = set()
    for i, e in enumerate(examples):
        try:
            model.length(e)
        except RetainError:
            out.add(i)
    return out


@pytest.mark.parametrize("limit", [60, 75, 100, 512])
@pytest.mark.parametrize("truncate", [False, True])
def test_no_row_that_is_too_long_passes(
    tmp_path: Path, pocket: HFModel, monkeypatch: pytest.MonkeyPatch, limit: int, truncate: bool
) -> None:
    """Every row that encoding refuses is among those to be encoded, and far from the limit few others are."""
    examples = read.examples(drawn(tmp_path, 150, seed=limit, long=40))
    monkeypatch.setattr(pocket.encode, "max_length", limit)
    monkeypatch.setattr(pocket.encode, "truncate", truncate)
    pocket.encode._seen.clear()
    asked = set(pocket.suspects(examples))
    wrong = refused(pocket, examples)
    assert wrong <= asked
    assert limit > 75 or wrong or truncate
    shapes = {(e.id, len(e.messages)) for e in examples if "<red>" in str(e.messages)}
    assert limit < 512 or len(asked) <= len(shapes) + 3 * 12


@pytest.mark.parametrize("name", sorted(tiny.BUILDERS))
def test_an_upper_bound_is_one_for_every_processor(tmp_path: Path, name: str, monkeypatch: Any) -> None:
    """Pictures of many sizes through the processors of all families that the tests build."""
    model, rng = tiny.model(name), random.Random(0)
    rows = []
    for i in range(40):
        size = (rng.randint(20, 90), rng.randint(20, 90))
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": "What? " + "left " * rng.randint(0, 9), "answer": "red"})
    (tmp_path / "d.json").write_text(json.dumps(rows))
    examples = read.examples(tmp_path / "d.json")
    longest = max(map(model.length, examples))
    for limit in (longest - 3, longest):
        monkeypatch.setattr(model.encode, "max_length", limit)
        model.encode._seen.clear()
        for decoded in (0, 1 << 12):
            monkeypatch.setattr(fits, "DECODED", decoded)
            assert refused(model, examples) <= set(model.suspects(examples))


def test_a_picture_without_its_end_is_found_at_the_start(
    tmp_path: Path, pocket: HFModel, monkeypatch: Any
) -> None:
    examples = read.examples(drawn(tmp_path, 60))
    task = Task("mine", examples, examples[:1], score("exact"))
    check_examples(pocket, Stream("s", (task,)), "all")
    for decoded, name in ((1 << 12, "2.png"), (0, "2.png"), (0, "1.jpg")):
        monkeypatch.setattr(fits, "DECODED", decoded)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(RetainError, match=rf"task 'mine', train, row \d+.*{re.escape(name)}"):
            check_examples(pocket, Stream("s", (task,)), "all")
        (tmp_path / name).write_bytes(whole)


def written(rng: np.random.Generator) -> dict[str, bytes]:
    """PNG and JPEG files of many kinds, by name."""
    out = {}
    for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "I;16", "CMYK", "YCbCr"):
        wide, high = (int(n) for n in rng.integers(3, 90, 2))
        picture = Image.fromarray(rng.integers(0, 256, (high, wide, 3), dtype=np.uint8))
        picture = Image.new("I;16", (wide, high), 900) if mode == "I;16" else picture.convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6
        ways: tuple[dict[str, Any], ...] = ({}, {"progressive": True}, {"exif": exif}, {"dpi": (72, 72)})
        for k, how in enumerate(ways):
            for kind in ("png", "jpeg"):
                raw = io.BytesIO()
                try:
                    picture.save(raw, kind, **how)
                except OSError:  # a mode that JPEG has not
                    continue
                out[f"{mode}{k}.{kind}"] = raw.getvalue()
    return out


def test_a_glance_sees_what_pillow_sees(tmp_path: Path) -> None:
    """Of whole files the same size; of broken ones nothing that Pillow does not see too."""
    rng, file, seen = np.random.default_rng(0), tmp_path / "x.png", 0
    for name, raw in written(rng).items():
        file.write_bytes(raw)
        with Image.open(file) as theirs:
            size = glanced(file)
            assert size == theirs.size or (size is None and name.startswith("CMYK")), name
            assert glanced(file, size[0] * size[1] - 1 if size else 1) is None
        for _ in range(12):
            bad = bytearray(raw[: int(rng.integers(1, len(raw)))] if rng.random() < 0.3 else raw)
            bad[int(rng.integers(0, min(len(bad), 400)))] ^= int(rng.integers(1, 256))
            file.write_bytes(bad)
            if (size := glanced(file)) is not None:
                image, wrong = looked_at(file)
                assert image is not None and image.size == size, (name, wrong)
                seen += 1
    assert seen > 30
    os.mkfifo(tmp_path / "pipe")
    for odd in ("pipe", ".", "none", "n" * 300, "a\0b"):
        assert glanced(tmp_path / odd) is None


def test_few_rows_are_encoded_before_the_first_step(
    tmp_path: Path, pocket: HFModel, monkeypatch: Any
) -> None:
    """Of three thousand; and a step's neighbours are found when it comes."""
    rng, folder = random.Random(0), tmp_path
    Image.new("RGB", (48, 48)).save(folder / "a.png")
    with (folder / "d.jsonl").open("w") as file:
        for i in range(3000):
            turns = [{"from": "human", "value": f"<image>\n{'left ' * rng.randint(1, 20)}{i}?"}]
            turns.append({"from": "gpt", "value": rng.choice(["red", "blue"])})
            file.write(json.dumps({"id": str(i), "image": "a.png", "conversations": turns}) + "\n")
    counted = []
    encode = type(pocket.encode)._encode
    monkeypatch.setattr(
        type(pocket.encode), "_encode", lambda self, e: counted.append(e.id) or encode(self, e)
    )
    train = read.examples(folder / "d.jsonl")
    stream = Stream("s", (Task("mine", train, train[:4], score("exact")),))
    check_examples(pocket, stream, "all")
    assert len(counted) <= 12
    ctx = Context(pocket, stream[0], stream, [], 0)
    order = batches(pocket, train, ctx, Optim(batch_size=4, epochs=2.0), 1500)
    assert len(order) == 1500 and len(counted) <= 12
    assert len(order[0]) == 4 and len(counted) <= 12 + GROUP * 4


def eager(model: Any, examples: Any, rng: torch.Generator, optim: Optim, n_steps: int) -> list[list[int]]:
    """The order as it was made before it was lazy: epochs, runs of 8 batches sorted by length, batches shuffled."""
    n, size = len(examples), optim.batch_size
    total = n_steps * size if optim.steps is not None else min(n_steps * size, math.ceil(n * optim.epochs))
    stream: list[int] = []
    while len(stream) < total:
        stream += torch.randperm(n, generator=rng).tolist()
    stream = stream[:total]
    if not optim.group_by_length:
        return [stream[i : i + size] for i in range(0, total, size)]
    out: list[list[int]] = []
    for start in range(0, total, 8 * size):
        run = sorted(stream[start : start + 8 * size], key=lambda i: model.length(examples[i]))
        chunk = [run[i : i + size] for i in range(0, len(run), size)]
        out += [chunk[i] for i in torch.randperm(len(chunk), generator=rng).tolist()]
    return out


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(
    "how", [{"steps": 1}, {"steps": 37}, {"epochs": 0.3}, {"epochs": 0.5}, {"epochs": 2.7}, {"epochs": 1.0}]
)
def test_the_order_is_what_it_was(how: dict[str, Any], grouped: bool) -> None:
    m, s = FakeModel(), fake_stream(50)
    ctx, optim = Context(m, s[0], s, [], 3), Optim(batch_size=3, group_by_length=grouped, **how)
    n_steps = optim.n_steps(50)
    made = batches(m, s[0].train, ctx, optim, n_steps)
    wanted = eager(m, s[0].train, ctx.rng("order"), optim, n_steps)
    assert list(made) == wanted and len(made) == len(wanted)
    assert [made[i] for i in reversed(range(len(made)))] == wanted[::-1]  # a continued run begins anywhere


def test_lengths_of_a_file_are_counted_once(tmp_path: Path, pocket: HFModel, monkeypatch: Any) -> None:
    examples = read.examples(drawn(tmp_path, 20))
    first = list(lengths(pocket, examples))
    monkeypatch.setattr(type(pocket), "length", lambda self, e: 1 / 0)
    assert list(lengths(pocket, examples)) == first and len(first) == 20


START = """\
import resource, sys, time
import retain.run.train as train
def first(*args, **kwargs):
    print("START", time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)
    raise SystemExit(0)
train._backward = first
from retain.cli import main
sys.argv = ["retain", "run", sys.argv[1], "-q"]
main()
"""


def started(folder: Path, n: int) -> tuple[float, float]:
    """CPU seconds and peak MB of a real `retain run` over n rows up to its first step."""
    rng = random.Random(0)
    with (folder / "train.jsonl").open("w") as file:
        for i in range(n):
            turns = [
                {"from": "human", "value": f"<image>\n{words(rng, 9)}?"},
                {"from": "gpt", "value": "red"},
            ]
            row = {"id": f"r{i}", "image": f"pics/{i % 2000}.png", "conversations": turns}
            file.write(json.dumps(row) + "\n")
    (folder / "test.jsonl").write_text("".join((folder / "train.jsonl").read_text().splitlines(True)[:8]))
    recipe = folder / f"r{n}.yaml"
    recipe.write_text(
        "model: pocket\nmethod: lora\noptim: {steps: 1, batch_size: 4}\n"
        f"stream: {{tasks: [{{name: mine, train: train.jsonl, test: test.jsonl}}]}}\nout: {folder}/run{n}\n"
    )
    done = subprocess.run([sys.executable, "-c", START, recipe], capture_output=True, text=True, check=False)
    found = re.search(r"START (\S+) (\S+)", done.stdout)
    assert found, done.stderr[-2000:]
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_two_hundred_thousand_rows(tmp_path: Path) -> None:
    """300 MB and 10 s of computing more than a thousand rows (30 MB and 5 s on two cores)."""
    (tmp_path / "pics").mkdir()
    rng = np.random.default_rng(0)
    for k in range(2000):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(tmp_path / f"pics/{k}.png")
    few, many = started(tmp_path, 1000), started(tmp_path, 200_000)
    assert many[1] - few[1] < 300 and many[0] - few[0] < 10, (few, many)


# -- reports -----------------------------------------------------------------------------------------------------


def large_run(path: Path, tasks: int, **how: Any) -> Path:
    return fake_runs.fake_run(
        path, tasks=[f"task-{i:03d}" for i in range(tasks)], steps=20, **{"n": 3, **how}
    )


def test_a_long_stream_makes_a_small_page(tmp_path: Path) -> None:
    run = large_run(tmp_path / "run", 36, routed=True, forgetting=0.4)
    page = write_report([run], tmp_path / "r.html").read_text()
    cells = page.count("<td class=")
    assert cells > 36 * 36 and len(page) < 330_000  # 2.3 kB a cell of the matrix before, 0.1 now
    assert page.count('class="dot') == 0 and "table.heat td" in page
    history = max((len(re.findall("<li>", m)) for m in re.findall(r"<ol>.*?</ol>", page, re.S)), default=0)
    assert 2 < history <= 16
    marks = re.findall(r'class="xs">(.*?)</div>', page, re.S)
    assert marks and all(m.count("<span") <= 17 for m in marks)


def test_a_card_is_as_large_as_a_card(tmp_path: Path) -> None:
    """Endless words and large pictures of a user's own data."""
    run = fake_runs.fake_run(tmp_path / "run", tasks=fake_runs.TASKS[:3], n=8, forgetting=3.0, steps=20)
    for file in run.rglob("predictions/*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        long = {"question": "why " * 50_000, "prediction": "so " * 50_000}
        file.write_text("".join(json.dumps(row | long) + "\n" for row in rows))
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    for file in run.rglob("samples/*/*.png"):
        Image.fromarray(noise).save(file)
    page = write_report([run], tmp_path / "r.html").read_text()
    assert page.count("data:image/jpeg") >= 2 and len(page) < 400_000


def test_what_was_forgotten_of_very_many_samples(tmp_path: Path) -> None:
    """Every right answer another: the choice must not compare each with each."""
    run = fake_runs.fake_run(tmp_path / "run", tasks=fake_runs.TASKS[:2], n=4, forgetting=3.0, steps=20)
    for file in run.rglob("predictions/*.jsonl"):
        row = json.loads(file.read_text().splitlines()[0])
        right = 100.0 if "01-" in str(file) else 0.0
        rows = [
            row | {"id": str(i), "references": [str(i)], "score": right, "image": None} for i in range(20_000)
        ]
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    before = time.process_time()
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "What was forgotten" in page and time.process_time() - before < limits_cpu()


def limits_cpu() -> float:
    import limits

    return float(limits.CPU)


@pytest.mark.slow
def test_a_hundred_tasks_and_five_runs(tmp_path: Path) -> None:
    runs = [large_run(tmp_path / f"r{k}", 100, n=2, lr=1e-3 * (k + 1), routed=k == 0) for k in range(5)]
    one = write_report(runs[:1], tmp_path / "one.html").read_text()
    several = write_report(runs, tmp_path / "all.html").read_text()
    assert len(one) < 5e6 and len(several) < 5e6
    assert (
        one.count("<td") > 10_000 and "data:image/png" in several
    )  # numbers in one, pictures of matrices in all
    assert several.count("<") < 60_000


# -- folders that runs share -------------------------------------------------------------------------------------


def forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def ended(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_processes_that_write_one_file_of_the_cache(tmp_path: Path) -> None:
    """Nobody reads half of it, nobody's write fails, and nothing is left beside it."""
    file, values = tmp_path / "guard" / "k.json", [{"by": k, "fill": "x" * 5000} for k in range(4)]
    write_json(file, values[0], shared=True)
    (tmp_path / "guard" / ".k.json.part-999999999").write_text("of a process that was killed")
    dead = forked(lambda: os.kill(os.getpid(), signal.SIGKILL))
    ended([dead])
    (tmp_path / "guard" / f".k.json.part-{dead}").write_text("of another")

    def write(value: Any) -> Callable[[], None]:
        return lambda: [write_json(file, value, shared=True) for _ in range(60)] and None

    pids = [forked(write(v)) for v in values]
    seen = 0
    while seen < 300:
        assert read_json(file) in values
        seen += 1
    assert ended(pids) == [0, 0, 0, 0]
    assert [p.name for p in file.parent.iterdir()] == ["k.json"]


def state(seed: int) -> dict[str, Any]:
    made = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
    stats = {
        "steps": 1, "samples": 1, "tokens": 1, "seconds": 0.5, "last_loss": 0.25, "trainable_parameters": 12,
        "trained": ["lora"], "peak_memory_bytes": 0, "reused": False,
    }  # fmt: skip
    return {"stats": stats, "adapters": {"lora": {"a": made}}, "events": []}


def test_processes_that_share_a_folder_of_tuned_tasks(tmp_path: Path) -> None:
    """The same keys at once: the first keeps, the others find; all that is there is whole at any moment."""
    folder, keys = tmp_path / "tuned", [f"{k:016x}" for k in range(6)]

    def tune(seed: int) -> Callable[[], None]:
        def work() -> None:
            shared = TunedDir(folder)
            for key in random.Random(seed).sample(keys, len(keys)):
                if shared.load(key) is None:
                    shared.save(key, state(keys.index(key)))
                found = shared.load(key)
                assert found and torch.equal(
                    found["adapters"]["lora"]["a"], state(keys.index(key))["adapters"]["lora"]["a"]
                )

        return work

    assert ended([forked(tune(seed)) for seed in range(4)]) == [0, 0, 0, 0]
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted([TUNED, "lock", *(f"{k}.{end}" for k in keys for end in ("json", "safetensors"))])


def test_a_process_that_is_killed_while_it_keeps_a_task(tmp_path: Path, monkeypatch: Any) -> None:
    """It leaves no lock behind; its half entry is swept, and the task kept by the next."""
    folder, key = tmp_path / "tuned", "0" * 16

    def dies(at: int) -> Callable[[], None]:
        def work() -> None:
            replace, count = os.replace, [0]

            def last(source: Any, target: Any) -> None:
                count[0] += 1
                if count[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)

            os.replace = last  # type: ignore[assignment]
            TunedDir(folder).save(key, state(0))

        return work

    for at in (2, 3):  # before the tensors have their name; between them and the JSON
        assert ended([forked(dies(at - (at == 3 and (folder / TUNED).is_file())))]) == [-signal.SIGKILL]
    assert list(folder.glob("*.safetensors")) or list(folder.glob(".*.part"))
    assert TunedDir(folder).load(key) is None
    TunedDir(folder).save("1" * 16, state(1))  # another task's: sweeps
    assert not list(folder.glob(f"*{key}*")) and not list(folder.glob(".*.part"))
    TunedDir(folder).save(key, state(0))
    assert TunedDir(folder).load(key) is not None


# -- no room -----------------------------------------------------------------------------------------------------


def stopped(server: Server, folder: Path, **order: Any) -> str:  # noqa: F811
    found = server(folder, **order)
    assert found["signal"] == 0 and found.get("clear", True), found
    return str(found["error"])


@pytest.mark.parametrize("first", [1, 2, 5, 19, 33])
def test_a_disk_that_is_full(server: Server, truth: Any, tmp_path: Path, first: int) -> None:  # noqa: F811
    """One sentence that names a file, and the same command ends with the same bytes when there is room."""
    error = stopped(server, tmp_path / "run", full=first)
    assert "No space left on device" in error and str(tmp_path / "run") in error and "\n" not in error
    assert stopped(server, tmp_path / "run") == ""
    same(tmp_path / "run", truth)


@pytest.mark.slow
def test_a_disk_that_is_full_at_every_write(server: Server, truth: Any, tmp_path: Path) -> None:  # noqa: F811
    first = 0
    while True:
        first += 1
        if not stopped(server, tmp_path / str(first), full=first):
            break
        assert stopped(server, tmp_path / str(first)) == ""
        same(tmp_path / str(first), truth)
    assert first > 60


@pytest.mark.parametrize("most", [200, 5_000])
def test_files_that_may_not_grow(server: Server, truth: Any, tmp_path: Path, most: int) -> None:  # noqa: F811
    """What the system itself raises in the middle of a write, of ours and of safetensors'."""
    assert "File too large" in stopped(server, tmp_path / "run", fsize=most)
    assert stopped(server, tmp_path / "run") == ""
    same(tmp_path / "run", truth)


def test_twelve_file_descriptors(server: Server, truth: Any, tmp_path: Path) -> None:  # noqa: F811
    assert stopped(server, tmp_path / "run", files=12) == ""
    same(tmp_path / "run", truth)


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: Any) -> None:
    """What has passed is not remembered, and nothing else is lost."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "file" / "cache"))
    assert HFModel.load(pocket_path()).n_layers > 0


# -- many predictions --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_thousand_predictions_are_read_one_by_one(tmp_path: Path) -> None:
    """The scores of a cell cost their numbers; all of its lines as objects would be 300 MB."""
    work = """
import resource, sys
from pathlib import Path
from retain.report.load import load_run
run = load_run(Path(sys.argv[1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
scores = [r["score"] for r in run.rows[0].each("garments")]
print("READ", len(scores), peak() - before)
"""
    run = fake_runs.fake_run(tmp_path / "run", tasks=fake_runs.TASKS[:1], n=4, steps=20)
    row = Prediction("x", "What is worn here? " * 4, "coat", ("coat",), 100.0).to_json(None)
    file = next(run.rglob("00-zero_shot/predictions/*.jsonl"))
    with file.open("w") as out:
        out.writelines(json.dumps({**row, "id": str(i)}) + "\n" for i in range(200_000))
    done = subprocess.run([sys.executable, "-c", work, run], capture_output=True, text=True, check=True)
    found = re.search(r"READ (\d+) (\S+)", done.stdout)
    assert found and int(found[1]) == 200_000 and float(found[2]) < 150
