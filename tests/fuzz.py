"""Bad inputs by the hundred, from a seed: generators of cases, and a runner that says clear, fine or bug of each.

How to add kinds of input (a file `tests/fuzz_NAME.py` of your own, with its `test_fuzz_NAME.py`):

    import fuzz

    ROWS = fuzz.Registry()                      # your own, so that your numbers do not move when others add kinds

    @ROWS.kind                                  # one function per kind of input; its name is the kind
    def pictures(rng: random.Random, home: Path) -> fuzz.Case:
        recipe = my_healthy_recipe(home)        # `home` is an empty folder of this case alone, and its working folder
        what = rng.choice(sorted(BAD))          # decide by `rng` alone: a case is (seed, i), and made again from them
        BAD[what](home)
        return fuzz.Case(what, ("plan", str(recipe)), "bad", words=("row 3", "a.png"))

    for case in ROWS.cases(seed=0, n=300, root=tmp_path):      # kinds in turn, each with its own generator
        found = fuzz.outcome(case)
        assert found.verdict != "bug", found

A case says what the outcome must be: `bad` (refused, and every one of `words` is in the message), `good` (exit 0),
or `any` (either, but no bug). At least a fifth of what a kind makes should be good: a test by which everything
exits with 2 would pass otherwise.

Verdicts. `clear`: exit 2, one line on stderr, no traceback, it names the thing, and no file is new in `home`.
`fine`: exit 0 (or 1 where the command's own finding is the answer, see `Case.finds`), and that was not declared
bad. `bug`: everything else: a traceback, several lines, control characters, a hang, exit 0 on declared nonsense,
exit 2 on a good input, a file left behind by a refusal.

`keep` in a case names what may be new after a refusal (a folder that the command had to make), as glob patterns.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import limits
from retain import cli

Expected = Literal["bad", "good", "any"]
Verdict = Literal["clear", "fine", "bug"]
LONGEST = 4000
"""Characters of a message: choices are listed in it, a value of a megabyte is not."""
MEMORY = 12 << 30
"""Bytes that a case may reserve beyond what the process has."""


@dataclass(frozen=True)
class Case:
    """One input. `args` are those of the command `retain`, run in `home`."""

    what: str
    args: tuple[str, ...]
    expect: Expected = "any"
    words: tuple[str, ...] = ()
    keep: tuple[str, ...] = ("*/__pycache__*", "__pycache__*")
    finds: bool = False  # exit 1 is an answer (doctor: errors in the data); its words are on stdout
    kind: str = ""
    seed: str = ""
    home: Path = field(default=Path())

    def __str__(self) -> str:
        shown = " ".join(f"{a!r}" if len(a) < 200 else f"{a[:100]!r}…" for a in self.args)
        return f"{self.kind} {self.seed}: {self.what} ({self.expect}): retain {shown}"


@dataclass(frozen=True)
class Outcome:
    """What came of a case, and why that is a bug."""

    case: Case
    verdict: Verdict
    why: str = ""
    code: int | None = None
    out: str = ""
    err: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.verdict}: {self.why}\n  {self.case}\n  exit {self.code}, stderr: {self.err[-1500:]!r}"


Make = Callable[[random.Random, Path], Case]


class Registry:
    """Generators by name; their cases come in turn."""

    def __init__(self) -> None:
        self.kinds: dict[str, Make] = {}

    def kind(self, make: Make) -> Make:
        """Decorator: one kind of input."""
        self.kinds[make.__name__] = make
        return make

    def case(self, name: str, seed: str, root: Path) -> Case:
        """One case, made (again) from its kind and its seed, in a folder of its own under `root`."""
        home = root / f"{name}-{seed.replace('/', '-')}"
        home.mkdir(parents=True)
        made = self.kinds[name](random.Random(f"{name}/{seed}"), home)
        return replace(made, kind=name, seed=seed, home=home)

    def cases(self, seed: int, n: int, root: Path, only: Sequence[str] = ()) -> Iterator[Case]:
        """`n` cases, kinds in turn. A case's folder goes when the next one is asked for."""
        names = list(only or self.kinds)
        for i in range(n):
            made = self.case(names[i % len(names)], f"{seed}/{i // len(names)}", root)
            yield made
            shutil.rmtree(made.home, ignore_errors=True)


# -- the runner ----------------------------------------------------------------------------------------------


class Late(BaseException):
    """The time of a case is over. No Exception: nothing that a command catches."""


def _late(number: int, frame: Any) -> None:
    raise Late(f"hangs: more than {limits.CASE} s, or {limits.CASE_CPU} s of computing")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Time and memory of one case. In the main thread of a process, as tests run."""
    before = {s: signal.signal(s, _late) for s in (signal.SIGALRM, signal.SIGPROF)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, limits.CASE)
    signal.setitimer(signal.ITIMER_PROF, limits.CASE_CPU)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _as_a_command(args: Sequence[str], home: Path) -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    """argv, the working folder and the two streams, encoded as Python encodes those of a pipe under UTF-8."""
    streams, here, argv = (io.BytesIO(), io.BytesIO()), Path.cwd(), sys.argv
    out = io.TextIOWrapper(streams[0], "utf-8", errors="strict", write_through=True)
    err = io.TextIOWrapper(streams[1], "utf-8", errors="backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            os.chdir(home)
            sys.argv = ["retain", *args]
            yield streams
        finally:
            os.chdir(here)
            sys.argv = argv
            out.detach(), err.detach()


def _called(args: Sequence[str], home: Path) -> tuple[int | None, str, str, str]:
    """Exit code, stdout, stderr, and what went wrong with the process itself."""
    code, wrong = None, ""
    with _as_a_command(args, home) as (out, err):
        try:
            with bounded():
                cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except Late as late:
            wrong = str(late)
        except BaseException:
            wrong = f"traceback: {traceback.format_exc(limit=-4)[-1500:]}"
    return code, out.getvalue().decode("utf-8", "replace"), err.getvalue().decode("utf-8", "replace"), wrong


def files(home: Path) -> set[str]:
    """Everything below a folder."""
    return {str(p.relative_to(home)) for p in home.rglob("*")}


def outcome(case: Case) -> Outcome:
    """Run a case and judge it."""
    before, began = files(case.home), time.monotonic()
    code, out, err, wrong = _called(case.args, case.home)
    seconds = time.monotonic() - began
    new = [f for f in sorted(files(case.home) - before) if not any(fnmatch(f, k) for k in case.keep)]
    verdict, why = judged(case, code, out, err, wrong, new)
    return Outcome(case, verdict, why, code, out, err, seconds)


def judged(
    case: Case, code: int | None, out: str, err: str, wrong: str, new: Sequence[str]
) -> tuple[Verdict, str]:
    """The verdict, and why it is a bug."""
    if wrong or "Traceback (most recent" in err + out:
        return "bug", wrong or "traceback"
    if code == 0 or (code == 1 and case.finds):
        lacks = [w for w in case.words if case.finds and code == 1 and w not in out]
        if case.expect == "bad" and code == 0:
            return "bug", "accepted"
        return ("bug", f"found, but {lacks} is not named") if lacks else ("fine", "")
    if code != 2:
        return "bug", f"exit code {code}"
    if case.expect == "good":
        return "bug", "a good input is refused"
    return ("bug", why) if (why := unclear(case, err, new)) else ("clear", "")


def unclear(case: Case, err: str, new: Sequence[str]) -> str:
    """What is wrong with a refusal; "" where it is one sentence that names the thing."""
    if not err.startswith("error: "):
        return "the message does not begin with error:"
    if len(err.splitlines()) != 1 or not err.endswith("\n"):
        return f"{len(err.splitlines())} lines"
    if len(err) > LONGEST:
        return f"a message of {len(err)} characters"
    if odd := sorted({c for c in err[:-1] if unicodedata.category(c) in ("Cc", "Cs")}):
        return f"characters that no terminal should be sent: {odd!r}"
    if lacks := [w for w in case.words if w not in err]:
        return f"{lacks} is not named"
    return f"left behind by a refusal: {list(new)[:5]}" if new else ""


# -- kinds of recipe and command line ------------------------------------------------------------------------

RECIPES = Registry()
