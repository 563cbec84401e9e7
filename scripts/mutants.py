"""Do the tests notice? Small faults, one at a time, in methods, mergers, metrics and decoding; which survive is the answer.

    python scripts/mutants.py                              all of them (hours); what is known is not run again
    python scripts/mutants.py --file methods/ewc --list    what would be tried
    python scripts/mutants.py --sample 150 --seed 1        a draw
    python scripts/mutants.py --again                      the survivors once more, after tests were written
    python scripts/mutants.py --report                     what is known, without running anything

A mutant is the syntax tree of a file with one change: a comparison flipped or moved by one, + and - swapped, a `not`
or a `1 -` gone, a constant off by one, first for last, min for max, a call such as `.detach()` or `.abs()` left out, a
statement dropped, two arguments, branches or returned values swapped. It survives when every test that concerns the
file (`CONCERNS`) passes. One warm process has all imported that is not ours and forks for each mutant, whose process
gets the changed module from memory: no file of the tree is written. Tests that start processes of their own see the
unchanged package there.

Outcomes are kept in a JSON file after every mutant, by the text of the source file: a later call goes on where this
one ended, and forgets what an edit made void. Survivors that no test can see are listed with the reason in
`scripts/equivalent.json`, and count as such.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutate import PACKAGE, Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("methods", "merge", "metrics")
FILES = ("models/guide.py", "models/generate.py", "models/decoder.py", "order.py", "run/order.py")
EQUIVALENT = ROOT / "scripts" / "equivalent.json"

ROUTES = ("tests/test_methods_hide_disco.py", "tests/test_methods_data_routes.py")
ORTHOGONAL = ("tests/test_methods_orthogonal.py",)
MERGING = ("tests/test_methods_merging.py",)
MERGE = ("tests/test_merge.py", "tests/test_merge_analyse.py", "tests/test_merge_folders.py", *MERGING)
METRICS = ("tests/test_metrics.py", "tests/test_scores.py")
CONCERNS: dict[str, tuple[str, ...]] = {
    "methods/_llaca": ("tests/test_methods_llaca.py", "tests/test_laws.py::llaca"),
    "methods/_merging": (*MERGING, "tests/test_methods_model_tailor.py"),
    "methods/_parts": (*ROUTES, "tests/test_methods_penalties.py", "tests/test_laws.py::disco"),
    "methods/_projection": ORTHOGONAL,
    "methods/cofima": (*MERGING, "tests/test_laws.py::cofima"),
    "methods/disco": (*ROUTES, "tests/test_laws.py::disco"),
    "methods/ema": ("tests/test_methods_penalties.py", "tests/test_laws.py::ema"),
    "methods/ewc": ("tests/test_methods_penalties.py", "tests/test_laws.py::ewc"),
    "methods/gpm": (*ORTHOGONAL, "tests/test_laws.py::gpm"),
    "methods/hide": (*ROUTES, "tests/test_laws.py::hide"),
    "methods/instruction_groups": ("tests/test_methods_data_routes.py", "tests/test_laws.py::groups"),
    "methods/interpolate": ("tests/test_methods_interpolate.py", "tests/test_laws.py::interpolate"),
    "methods/llaca": ("tests/test_methods_llaca.py", "tests/test_laws.py::llaca"),
    "methods/lora": ("tests/test_methods_penalties.py", "tests/test_laws.py::lora]"),
    "methods/lora_per_task": (*ROUTES, "tests/test_laws.py::lora_per_task"),
    "methods/lorahub": (*MERGING, "tests/test_laws.py::lorahub"),
    "methods/lwf": ("tests/test_methods_penalties.py", "tests/test_laws.py::lwf"),
    "methods/merge_after_task": (*MERGING, "tests/test_laws.py::merge_after_task"),
    "methods/merge_tasks": (*MERGING, "tests/test_laws.py::merge_tasks"),
    "methods/modal_prompt": ("tests/test_methods_modal_prompt.py", "tests/test_laws.py::modal_prompt"),
    "methods/model_tailor": ("tests/test_methods_model_tailor.py", "tests/test_laws.py::model_tailor"),
    "methods/moe_lora": ("tests/test_moe.py", "tests/test_laws.py::moe_lora"),
    "methods/multitask": ("tests/test_methods_data_routes.py", "tests/test_laws.py::multitask"),
    "methods/o_lora": ("tests/test_methods_orthogonal.py", "tests/test_laws.py::o_lora"),
    "methods/replay": ("tests/test_methods_data_routes.py", "tests/test_laws.py::replay"),
    "methods/zero_shot": ("tests/test_laws.py::zero_shot",),
    "merge/folders": ("tests/test_merge_folders.py", "tests/test_merge_cli.py"),
    "merge/patch": (
        "tests/test_faults.py",
        "tests/test_model_tailor.py",
        "tests/test_methods_model_tailor.py",
    ),
    "merge/search": ("tests/test_merge.py", *MERGING),
    "metrics/grammar": ("tests/test_grammar.py", *METRICS),
    "metrics/numerals": ("tests/test_grammar.py", *METRICS),
    "metrics/choices": ("tests/test_grammar.py", *METRICS),
    "metrics/text": ("tests/test_grammar.py", *METRICS),
    "metrics/scores": ("tests/test_scores.py", "tests/test_grammar.py", "tests/test_data.py"),
    "metrics/render": ("tests/test_metrics.py", "tests/test_report.py"),
    "order": ("tests/test_stacks.py",),
    "run/order": ("tests/test_load.py",),
    "models/guide": ("tests/test_guide.py", "tests/test_hf.py", "tests/test_methods_modal_prompt.py"),
    "models/generate": ("tests/test_decoder.py", "tests/test_hf.py", "tests/test_stacked.py"),
    "models/decoder": ("tests/test_decoder.py", "tests/test_hf.py", "tests/test_stacked.py"),
}
"""Source file -> test files, those that know it best first; `::word` keeps the laws whose name has the word."""
REST = {"merge": MERGE, "metrics": METRICS}

LIMIT = 30.0
"""Seconds that a mutant may take beside three times what the unchanged source takes."""


def concerns(file: str) -> tuple[str, ...]:
    """The tests of a source file, `methods/ewc.py`."""
    stem = file.removesuffix(".py")
    folder = stem.partition("/")[0]
    first = ("tests/test_faults.py", "tests/test_method_fields.py") if folder == "methods" else ()
    return first + (CONCERNS.get(stem) or REST[folder])


# -- one mutant in one process -------------------------------------------------------------------------------


class Memory(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module: from its changed code."""

    def __init__(self, file: str, code: types.CodeType) -> None:
        self.path, self.code = PACKAGE / file, code
        self.name = "retain." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        inside = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        spec = importlib.machinery.ModuleSpec(
            name, self, origin=str(self.path), is_package=inside is not None
        )
        spec.has_location, spec.submodule_search_locations = True, inside
        return spec

    def exec_module(self, module: types.ModuleType) -> None:
        exec(self.code, module.__dict__)


class Eye:
    """A plugin of pytest: keeps the laws of one word, and the first test that fails."""

    def __init__(self, words: dict[str, str]) -> None:
        self.words, self.first = words, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        def wanted(item: Any) -> bool:
            word = self.words.get(item.path.name)
            return word is None or "[" not in item.name or word in item.name

        items[:] = [i for i in items if wanted(i)]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.first:
            self.first = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.first:
            self.first = f"{report.nodeid} (import)"


def _inside(folder: Path, tests: Sequence[str], file: str, code: types.CodeType | None) -> None:
    """What the forked process does: it writes `folder/result.json` and never returns."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    out = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    if code is not None:
        sys.meta_path.insert(0, Memory(file, code))
    import pytest

    named = [t.partition("::") for t in tests]
    eye = Eye({Path(f).name: word for f, _, word in named if word})
    how = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(folder / "pytest"), "--rootdir", str(ROOT)]
    rc = int(pytest.main([*how, *(str(ROOT / f) for f, _, _ in named)], plugins=[eye]))
    ours = str(ROOT)
    loaded = [
        n for n, m in list(sys.modules.items())
        if not str(getattr(m, "__file__", None) or ours).startswith(ours) and not n.startswith("__")
    ]  # fmt: skip
    (folder / "result.json").write_text(json.dumps({"rc": rc, "test": eye.first, "modules": loaded}))
    sys.stdout.flush()
    os._exit(0)


@dataclass
class Job:
    """A process at work on one mutant."""

    mutant: Mutant | None
    pid: int
    folder: Path
    start: float
    limit: float

    @classmethod
    def begin(cls, tests: Sequence[str], mutant: Mutant | None, limit: float) -> Job:
        folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        pid = os.fork()
        if pid == 0:
            try:
                _inside(folder, tests, mutant.file if mutant else "", mutant.code() if mutant else None)
            finally:
                os._exit(9)
        return cls(mutant, pid, folder, time.monotonic(), limit)

    def ended(self) -> dict[str, Any] | None:
        """The outcome, or None while it runs."""
        seconds = time.monotonic() - self.start
        done, _ = os.waitpid(self.pid, os.WNOHANG)
        if not done and seconds < self.limit:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # also what it started itself
        if not done:
            os.waitpid(self.pid, 0)
        result = self.folder / "result.json"
        made = json.loads(result.read_text()) if result.exists() else {"rc": -1, "test": "", "modules": []}
        made["output"] = (self.folder / "output").read_text(errors="replace")[-3000:]
        shutil.rmtree(self.folder, ignore_errors=True)
        word = "timeout" if not done else "survived" if made["rc"] == 0 else "killed"
        return {**made, "outcome": word, "seconds": round(seconds, 1)}

    def wait(self) -> dict[str, Any]:
        """The outcome, when it comes."""
        while (made := self.ended()) is None:
            time.sleep(0.02)
        return made


# -- the run -------------------------------------------------------------------------------------------------


class Book:
    """What is known, on disk after every mutant; what belongs to another text of a source file is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        self.known = {k: v for k, v in kept.items() if v["source"] == digest(v["file"])}

    def add(self, mutant: Mutant, made: dict[str, Any]) -> None:
        self.known[mutant.key] = {
            "file": mutant.file, "line": mutant.line, "kind": mutant.kind, "source": digest(mutant.file),
            "outcome": made["outcome"], "test": made["test"], "seconds": made["seconds"],
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.known, indent=1, ensure_ascii=False))
        part.replace(self.path)


def digest(file: str) -> str:
    """Of a source file's text."""
    path = PACKAGE / file
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def files(words: Sequence[str]) -> list[str]:
    """The source files whose name contains one of the words; all without words."""
    found = [str(p.relative_to(PACKAGE)) for f in FOLDERS for p in sorted((PACKAGE / f).glob("*.py"))]
    every = [f for f in found if not f.endswith(("__init__.py", "_stop_words.py"))] + list(FILES)
    kept = [f for f in every if not words or any(w in f for w in words)]
    if not kept:
        raise SystemExit(f"no source file has {' or '.join(words)} in its name; there are {every}")
    return kept


def equivalents() -> dict[str, str]:
    """Mutants that no test can see, with the reason."""
    return dict(json.loads(EQUIVALENT.read_text())) if EQUIVALENT.exists() else {}


def warm(tests: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """Import what the tests need and is not ours; seconds that they take on the unchanged source."""
    first = Job.begin(tests, None, 3600).wait()
    for name in first["modules"]:
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:
                continue  # a module that only exists in company of others
    return first["seconds"], first


def work(todo: Sequence[Mutant], book: Book, jobs: int) -> None:
    """Every mutant in a process of its own, `jobs` at a time."""
    limits: dict[tuple[str, ...], float] = {}
    for tests in dict.fromkeys(concerns(m.file) for m in todo):
        seconds, made = warm(tests)
        if made["outcome"] != "survived":
            raise SystemExit(f"the tests fail without any fault: {made['test']}\n{made['output']}")
        limits[tests] = 3 * seconds + LIMIT
        print(f"unchanged, {seconds:5.1f} s: {' '.join(tests)}", flush=True)
    queue, running, n = list(todo), list[Job](), 0
    while queue or running:
        while queue and len(running) < jobs:
            mutant = queue.pop(0)
            tests = concerns(mutant.file)
            running.append(Job.begin(tests, mutant, limits[tests]))
        time.sleep(0.02)
        for job in list(running):
            made = job.ended()
            if made is None or job.mutant is None:
                continue
            running.remove(job)
            book.add(job.mutant, made)
            n += 1
            said = f"{made['outcome']:8} {made['seconds']:5.1f} s  {job.mutant.line:4} {job.mutant.key}"
            print(f"{n}/{len(todo)} {said}  {made['test'].rpartition('/')[2]}", flush=True)


def report(book: Book, of: Sequence[str]) -> str:
    """Counts by file, then the survivors."""
    same, lines, survivors, there = equivalents(), [], [], set[str]()
    every = dict.fromkeys(("killed", "timeout", "survived", "equivalent", "untried"), 0)
    for file in of:
        counts = dict.fromkeys(every, 0)
        for m in mutants(file):
            there.add(m.key)
            outcome = book.known.get(m.key, {}).get("outcome", "untried")
            outcome = "equivalent" if outcome == "survived" and m.key in same else outcome
            counts[outcome] += 1
            every[outcome] += 1
            if outcome == "survived":
                survivors.append(f"{m.line:5} {m.key}")
        lines.append(f"{file:32}" + "".join(f"{counts[k]:11}" for k in counts))
    head = f"{'':32}" + "".join(f"{k:>11}" for k in every)
    total = f"{'all':32}" + "".join(f"{v:11}" for v in every.values())
    if stale := [k for k in same if k.split()[0] in of and k not in there]:
        survivors += ["", f"{EQUIVALENT.name} names what is not there any more", *stale]
    return "\n".join([head, *lines, total, "", "survivors", *survivors])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--file", action="append", default=[], help="part of a source file's name; may be repeated"
    )
    parser.add_argument("--sample", type=int, help="draw so many of those that are not known yet")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--again", action="store_true", help="run the survivors and timeouts once more")
    parser.add_argument("--list", action="store_true", help="what would be tried")
    parser.add_argument("--report", action="store_true", help="what is known")
    parser.add_argument(
        "--book", type=Path, default=ROOT / "runs" / "mutants.json", help="where outcomes are kept"
    )
    args = parser.parse_args()
    of, book, same = files(args.file), Book(args.book), equivalents()
    if args.report:
        print(report(book, of))
        return
    every = [m for f in of for m in mutants(f)]
    if args.again:
        todo = [m for m in every if book.known.get(m.key, {}).get("outcome") in ("survived", "timeout")]
        todo = [m for m in todo if m.key not in same]
    else:
        todo = [m for m in every if m.key not in book.known and m.key not in same]
    if args.sample is not None:
        todo = random.Random(args.seed).sample(todo, min(args.sample, len(todo)))
        todo.sort(key=lambda m: (m.file, m.line))
    if args.list:
        print("\n".join(f"{m.line:5} {m.kind:10} {m.key}" for m in todo))
        print(f"{len(todo)} of {len(every)} mutants in {len(of)} files")
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = str(ROOT / "src")  # for the processes that tests start
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    work(todo, book, args.jobs)
    print(report(book, of))


if __name__ == "__main__":
    main()
