"""Kinds of recipe and of command line for `fuzz`: every declared field, YAML files, overrides, paths, plugins, words.

What is wrong for a field is taken from its own declaration, read here without the library's reader, so that a field
that somebody adds is among the cases at once.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fuzz import Case, Expected, Registry
from retain import values
from retain.adapters.lora import LoraSpec
from retain.config import ModelSpec
from retain.method import available
from retain.pocket.stream import pocket
from retain.run.evaluate import EvalOptions
from retain.run.train import Optim

RECIPES = Registry()

BASE: dict[str, Any] = {
    "model": {"name": "pocket"},
    "stream": {"pocket": {"order": ["garments"], "n_train": 4, "n_test": 2, "n_valid": 2}},
    "method": ["lora"],
    "optim": {"steps": 2, "batch_size": 4},
}
HUGE = 10**399
CHEAP = (
    "explain"  # reads everything, builds the method, 10 ms; `plan` builds stream and model besides, 150 ms
)


def recipe(home: Path, data: Any = None, name: str = "mine.yaml") -> Path:
    """A recipe file of plain data (JSON is YAML); the healthy one without."""
    path = home / name
    path.write_text(json.dumps(BASE if data is None else data), encoding="utf-8")
    return path


def changed(path: str, value: Any) -> dict[str, Any]:
    """The healthy recipe with one value at a dotted path."""
    data = copy.deepcopy(BASE)
    here = data
    *way, last = path.split(".")
    for step in way:
        here = here.setdefault(step, {})
    here[last] = value
    return data


def _yaml(value: Any) -> str:
    special = {math.inf: ".inf", -math.inf: "-.inf"}
    if isinstance(value, float):
        return ".nan" if value != value else special.get(value, repr(value))
    return json.dumps(value)


@dataclass(frozen=True)
class Of:
    """A declared field: where it stands in a recipe, its type, its bounds and words, as the class declares them."""

    path: str
    hint: Any
    default: Any
    command: str = CHEAP


def declared() -> list[Of]:
    """Every field of every class that a recipe fills: of the options, the adapters, the benchmarks and the methods."""
    found = [Of(f"{at}.{f.name}", values.field_hints(cls, at)[f.name], f.default)
             for at, cls in (("optim", Optim), ("eval", EvalOptions), ("adapter", LoraSpec), ("model", ModelSpec))
             for f in fields(cls) if f.init]  # fmt: skip
    for name, hint in get_type_hints(pocket, include_extras=True).items():
        if name != "return":
            found.append(Of(f"stream.pocket.{name}", hint, MISSING))
    for name, cls in available().items():
        hints = values.field_hints(cls, name)
        found += [Of(f"method.{name}.{f.name}", hints[f.name], f.default) for f in fields(cls) if f.init]
    return found


def bounds(hint: Any) -> dict[str, float]:
    """gt, ge, lt, le of a declaration, read here without the library's own reader."""
    found: dict[str, float] = {}
    for mark in getattr(hint, "__metadata__", ()):
        for one in getattr(mark, "metadata", ()):
            found |= {
                k: getattr(one, k) for k in ("gt", "ge", "lt", "le") if getattr(one, k, None) is not None
            }
    for inner in get_args(hint):
        found |= bounds(inner)
    return found


def base_types(hint: Any) -> set[Any]:
    """The plain types that a declaration allows."""
    if get_origin(hint) is Literal:
        return {Literal}
    if get_origin(hint) is Annotated:
        return base_types(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return set().union(*map(base_types, get_args(hint)))
    return {get_origin(hint) or hint}


def wrong_values(of: Of) -> list[Any]:
    """What such a field can never be."""
    kinds, limit = base_types(of.hint), bounds(of.hint)
    bad: list[Any] = [{"a": 1}, "\ud800", HUGE]
    if not kinds & {str, list, Sequence, dict}:
        bad += ["", "text", "1", [1], [], "0x10"]
    if type(None) not in kinds:
        bad.append(None)
    if str not in kinds:
        bad += ["∞", "nan", "a" * 5000]
    if kinds & {int, float}:
        bad += [math.nan, math.inf, -math.inf, True, 10**30]
        bad += [limit["gt"]] if "gt" in limit else []
        bad += [limit["lt"]] if "lt" in limit else []
        bad += [limit["ge"] - 1, -1e300] if "ge" in limit else []
        bad += [limit["le"] + 1] if "le" in limit else []
    if kinds & {int} and not kinds & {float}:
        bad += [1.5, 1e300]
    if kinds & {bool}:
        bad += [0, 1, "yes"]
    if kinds & {str, Literal}:
        bad += [3, 2.5, True] if of.hint is not Any else []
    if kinds == {dict}:
        bad = [[1], 3, "text"]
    return [b for b in bad if not (Literal in kinds and b in get_args(of.hint))]


@RECIPES.kind
def fields_of_everything(rng: random.Random, home: Path) -> Case:
    """A declared field with what it may not be, or with its own default."""
    of = rng.choice(declared())
    good = rng.random() < 0.25 and of.default is not MISSING and of.default is not None
    value = of.default if good else rng.choice(wrong_values(of))
    key, name = of.path.rpartition(".")[2], "mine.yaml"
    if of.path.startswith("method."):
        _, part, field_name = of.path.split(".")
        data = changed("method", [{part: {field_name: value}}])
        args: tuple[str, ...] = (str(_raw(home, data)),)
    elif rng.random() < 0.4 and "\ud800" not in repr(value) and value != "\ud800":
        args = (str(recipe(home)), f"{of.path}={_yaml(value)}")
        name = of.path  # the override stands for the file
    else:
        args = (str(_raw(home, changed(of.path, value))),)
    if good:
        return Case(f"{of.path} = its default {value!r}", (CHEAP, *args), "good")
    return Case(f"{of.path} = {value!r:.60}", (CHEAP, *args), "bad", words=(name, key))


def _raw(home: Path, data: Any) -> Path:
    """As JSON with NaN as YAML writes it."""
    text = re.sub(
        r"(?<![\w\"])-?(NaN|Infinity)(?![\w\"])",
        lambda m: m[0].replace("NaN", ".nan").replace("Infinity", ".inf"),
        json.dumps(data),
    )
    path = home / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


GOOD = json.dumps(BASE)
DEEP = 400


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n" + GOOD_YAML


GOOD_YAML = (
    "model: pocket\nstream: {pocket: {order: [garments], n_train: 4, n_test: 2, n_valid: 2}}\n"
    "method: lora\noptim: {steps: 2}\n"
)
TEXTS: dict[str, bytes] = {
    "anchor bomb": _bomb(9).encode(),
    "anchor bomb in values": (f"x: &a {['lol'] * 9}\n".replace("'", "") + "".join(
        f"y{i}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)) + GOOD_YAML).encode(),
    "mapping bomb": ("a: &a {k: 1}\n" + "".join(
        f"b{i}: &{'a' * (i + 2)} {{" + ", ".join(f"k{j}: *{'a' * (i + 1)}" for j in range(9)) + "}\n" for i in range(9)
    ) + GOOD_YAML).encode(),
    "deep list": (GOOD_YAML + "x: " + "[" * DEEP + "]" * DEEP).encode(),
    "deep open": (GOOD_YAML + "x: " + "[" * 100_000).encode(),
    "deep mapping": (GOOD_YAML + "x: " + "{a: " * DEEP + "1" + "}" * DEEP).encode(),
    "deep blocks": (GOOD_YAML + "x:\n" + "".join(" " * i + "a:\n" for i in range(1, DEEP))).encode(),
    "deep dashes": (GOOD_YAML + "x:\n" + "- " * 3000 + "1\n").encode(),
    "itself": (GOOD_YAML + "x: &a [*a]\n").encode(),
    "itself in a mapping": (GOOD_YAML + "x: &a {b: *a}\n").encode(),
    "itself as the whole": b"&a [*a]",
    "a key of itself": (GOOD_YAML + "x: &a {*a : 1}\n").encode(),
    "binary": (GOOD_YAML + "out: !!binary aGVsbG8=\n").encode(),
    "python object": (GOOD_YAML + "out: !!python/object/apply:os.system ['touch owned']\n").encode(),
    "python tuple": (GOOD_YAML + "plugins: !!python/tuple [a]\n").encode(),
    "set": (GOOD_YAML + "optim: !!set {steps}\n").encode(),
    "omap": (GOOD_YAML + "track: !!omap [a: 1]\n").encode(),
    "pairs": (GOOD_YAML + "track: !!pairs [a: 1]\n").encode(),
    "timestamp": (GOOD_YAML + "out: !!timestamp 2020-01-01\n").encode(),
    "no int": (GOOD_YAML + "seed: !!int abc\n").encode(),
    "no bool": (GOOD_YAML + "seed: !!bool maybe\n").encode(),
    "empty int": (GOOD_YAML + "seed: !!int ''\n").encode(),
    "own tag": (GOOD_YAML + "seed: !mine 3\n").encode(),
    "odd tag": (GOOD_YAML + "seed: !<tag:x\x1b> 3\n").encode(),
    "undefined alias": (GOOD_YAML + "seed: *nobody\n").encode(),
    "400 digits": (GOOD_YAML + f"seed: {'9' * 400}\n").encode(),
    "5000 digits": (GOOD_YAML + f"seed: {'9' * 5000}\n").encode(),
    "float of 400 digits": (GOOD_YAML + f"seed: 1e{'9' * 400}\n").encode(),
    "surrogate": (GOOD_YAML + 'out: "\\ud800"\n').encode(),
    "surrogate in a key": (GOOD_YAML + '"\\udfff": 1\n').encode(),
    "surrogate pair in halves": (GOOD_YAML + 'out: "\\ud83d\\ude00"\n').encode(),
    "escape sequence": (GOOD_YAML + '"\\e[2J\\a": 1\n').encode(),
    "newline in a key": (GOOD_YAML + '"a\\nb": 1\n').encode(),
    "NUL": (GOOD_YAML + "out: a\0b\n").encode(),
    "NUL escaped": (GOOD_YAML + 'out: "a\\0b"\n').encode(),
    "DEL": (GOOD_YAML + "out: a\x7fb\n").encode(),
    "tab": (GOOD_YAML + "eval:\n\tbatch_size: 3\n").encode(),
    "key twice": (GOOD_YAML + "method: lora\n").encode(),
    "key twice inside": (GOOD_YAML + "eval: {batch_size: 3, batch_size: 4}\n").encode(),
    "key that is a list": (GOOD_YAML + "? [a, b]\n: 1\n").encode(),
    "key that is null": (GOOD_YAML + "~: 1\n").encode(),
    "merge key": (GOOD_YAML + "eval: {<<: {batch_size: 3}}\n").encode(),
    "two documents": (GOOD_YAML + "---\na: 1\n").encode(),
    "directive": b"%YAML 9.9\n---\n" + GOOD_YAML.encode(),
    "bad directive": b"%YAML x\n---\n" + GOOD_YAML.encode(),
    "latin-1": GOOD_YAML.encode() + b"out: caf\xe9\n",
    "UTF-16": GOOD_YAML.encode("utf-16"),
    "empty": b"", "blank": b"\n\n", "comment": b"# nothing\n", "text": b"hello", "number": b"3", "list": b"[]",
    "null": b"null", "brace": b"{", "quote": b"'", "dash": b"- ", "colon": b":", "percent": b"%", "at": b"@",
    "bang": b"!", "star": b"*", "and": b"&", "pipe": b"a: |", "backtick": b"`a`",
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "bytes": bytes(range(256)) * 20,
    "2 MB of blanks": b" " * 2_000_000, "2 MB of dashes": b"- a\n" * 500_000,
    "900 kB of brackets": b"x: [" + b"1," * 450_000 + b"]",
    "900 kB of one word": GOOD_YAML.encode() + b"out: " + b"a" * 900_000,
    "900 kB of quotes": GOOD_YAML.encode() + b"out: '" + b"''" * 450_000 + b"'",
    "50,000 keys": GOOD_YAML.encode() + b"".join(b"k%d: 1\n" % i for i in range(50_000)),
}  # fmt: skip
FINE: dict[str, bytes] = {
    "plain": GOOD_YAML.encode(), "JSON": GOOD.encode(), "CRLF": GOOD_YAML.replace("\n", "\r\n").encode(),
    "BOM": b"\xef\xbb\xbf" + GOOD_YAML.encode(), "comment": b"# \xc3\xa9\n" + GOOD_YAML.encode(),
    "document mark": b"---\n" + GOOD_YAML.encode() + b"...\n", "aliases": b"x".join([b""]) + (
        b"model: pocket\nstream: {pocket: {n_train: &n 4, n_test: *n, n_valid: *n, order: [digits]}}\nmethod: [lora]\n"
    ), "directive": b"%YAML 1.2\n---\n" + GOOD_YAML.encode(), "no end of line": GOOD_YAML.strip().encode(),
    "tagged": GOOD_YAML.replace("lora", "!!str lora").encode(), "umlaut": GOOD_YAML.encode() + "out: läufe\n".encode(),
    "emoji": GOOD_YAML.encode() + "out: läufe-😀\n".encode(), "octal is ten": GOOD_YAML.encode() + b"seed: 010\n",
}  # fmt: skip


@RECIPES.kind
def texts(rng: random.Random, home: Path) -> Case:
    """A file that is no recipe, or a good one written in another way."""
    good = rng.random() < 0.25
    what = rng.choice(sorted(FINE if good else TEXTS))
    (home / "mine.yaml").write_bytes((FINE if good else TEXTS)[what])
    told = ("mine.yaml",) if not good else ()
    return Case(what, (CHEAP, "mine.yaml"), "good" if good else "bad", words=told)


@RECIPES.kind
def damaged(rng: random.Random, home: Path) -> Case:
    """A good file with a few bytes changed, cut or doubled: anything but a bug may come of it."""
    data = bytearray(GOOD_YAML.encode())
    for _ in range(rng.randint(1, 4)):
        at, how = rng.randrange(len(data)), rng.randrange(4)
        if how == 0:
            data[at] = rng.randrange(256)
        elif how == 1:
            data.insert(at, rng.choice(b"{}[]:,&*!|>'\"%@`#-?\t\n \\~<"))
        elif how == 2:
            del data[at : at + rng.randint(1, 20)]
        else:
            data[at:at] = data[at : at + rng.randint(1, 40)]
    (home / "mine.yaml").write_bytes(data)
    return Case("damaged", (CHEAP, "mine.yaml"))


WORDS = (
    "", "=", "seed", "seed=", "=3", "a=b=c", ".=1", "optim.=1", ".lr=1", "optim..lr=1", "optim.lr.x=1",
    "seed.x.y=1", "method.0=lora", "method.9.lora=1", "method.-1=lora", "method.lora.lora=1", "method={}",
    "method=[[]]", "method=[[[lora]]]", "method=[lora, lora]", "method={lora: 3}", "method={lora: [1]}",
    "method={lora: {}, ewc: {}}", "method=null", "method=[null]", "method=3", "stream=null", "stream=[]",
    "stream={}", "stream={pocket: 3}", "stream={pocket: [1]}", "stream={tasks: 3}", "stream={tasks: {}}",
    "stream={tasks: [3]}", "stream={tasks: [{}]}", "stream={tasks: [{name: 3}]}",
    "stream={tasks: [{name: ''}]}", "stream={pocket: {}, tasks: []}", "model=null", "model=[]", "model=3",
    "model={}", "model=''", "model={name: ''}", "adapter=[]", "adapter=null", "adapter={kind: null}",
    "adapter={kind: [1]}", "adapter={kind: {}}", "adapter.kind=lora", "optim=null", "optim=[]", "eval=null",
    "track=[a]", "track=[tensorboard, tensorboard]", "track={}", "track=[1]", "plugins=[]", "plugins=['']",
    "plugins=[.]", "plugins=3", "plugins=[mine.yaml]", "out=''", "out=", "out=mine.yaml", "out=/dev/null",
    "out=/dev/null/x", "out=~nobody/../x\0", "out=~no-such-user-here/run", "reuse=~no-such-user-here/x",
    "reuse=''", "reuse=mine.yaml", "seed=-1", "seed=1e3", "seed=0x10", "seed=1_000", "seed=true",
    "seed=9" + "9" * 400, "seed=" + "[" * 300, "seed=&a [*a]", "seed=!!binary aa", "model.device=",
    "model.device=cuda:99", "model.device=meta", "model.device=tpu", "model.device=CPU",
    "model.device=cuda:-1", "model.device=cuda:0x1", "model.max_length=0", "model.guide=nowhere",
    "model.family=", "model.dtype=float32", "eval.thumbnails=-1", "eval.split=train", "optim.beta1=1",
    "optim.beta2=2", "optim.epochs=1e300", "optim.batch_size=1000000000", "optim.steps=1000000000000",
    "optim.log_every=0", "optim.lr=1e-400", "stream.pocket.order=[]", "stream.pocket.order=[digits,digits]",
    "stream.pocket.order=digits", "stream.pocket.order=[1]", "stream.pocket.order=[nobody]",
    "stream.pocket.n_valid=-1", "stream.pocket.n_train=1000000000", "stream.pocket.seed=-1", "\x1b[2J=1",
    "optim.lr=\x1b]0;x\x07", "a\nb=1", "é=1", "optim.lr=١", "optim.lr=1١", "x" * 5000 + "=1",
    "seed=" + "x" * 5000, ".".join(["a"] * 500) + "=1", "optim.steps=!!float 3", "'optim.lr'=1",
    '"optim".lr=1', "optim[lr]=1", "--=1", "-x=1",
)  # fmt: skip
LEGAL = (
    "seed=3", "seed=0", "optim.lr=1e-3", "optim.lr=1", "optim.steps=null", "optim.projector_lr=0",
    "optim.beta1=0", "method=lora", "method=[lora, ewc]", "method=[lora, {ewc: {lam: 0}}]",
    "method={lwf: null}", "method=[[lora], [ewc]]", "method.lora={}", "eval.thumbnails=0",
    "track=tensorboard", "track=[]", "plugins=[]", "out=elsewhere", "out=a=b", "reuse=shared", "out=~/x",
    "adapter.rank=1", "adapter={kind: moe, rank: 8}", "adapter={kind: prompt}", "adapter.dense=''",
    "model.device=cpu", "out=null", "model.device=auto", "model.device=cuda", "model.device=cuda:1",
    "model.max_length=1", "stream=pocket", "stream=pocket_merge", "stream.pocket.order=null",
    "stream.pocket.order=[words]", "stream.pocket.n_valid=0", "optim.schedule=constant", "eval.split=valid",
    "method=[lora, {replay: {size: 0}}]", "method={hide: {temperature: 0}}", "method={llaca: {kappa: 0}}",
    "optim={}", "eval={}",
)  # fmt: skip


@RECIPES.kind
def overrides(rng: random.Random, home: Path) -> Case:
    """One odd word after a good recipe, or a legal one."""
    path = recipe(home)
    if rng.random() < 0.3:
        word = rng.choice(LEGAL)
        return Case(word, ("explain", str(path), word), "good")
    word = rng.choice(WORDS).replace("\0", "")
    command = "plan" if "device" not in word and rng.random() < 0.3 else "explain"
    return Case(
        f"{word!r:.60}", (command, str(path), word), BAD_IF.get((word, command), BAD_IF.get(word, "any"))
    )


BAD_IF: dict[Any, Expected] = {
    word: "bad"
    for word in WORDS
    if any(
        w in word
        for w in ("[]", "beta", "1e300", "00000000", "-1", "max_length=0", "tpu", "meta", "twice", "''", "99")
    )
    and word not in ("plugins=[]", "reuse=''", "method=[[]]", "model.device=cuda:99", "method.-1=lora")
}
"""Words that are nonsense by declaration, and so must be refused."""

COMMANDS = {
    "run": (), "explain": (), "plan": (), "doctor": (), "evaluate": (), "export": ("--to", "made"),
    "report": (), "compare": (), "merge": ("--to", "made"), "analyse cka": (), "analyse merge": (),
}  # fmt: skip
ODD_PATHS = {
    "nothing": "nothing", "folder": "folder", "fifo": "fifo", "zero": "/dev/zero", "null": "/dev/null",
    "tty": "/dev/tty", "empty": "", "long": "a" * 300, "longer": "/".join(["a" * 200] * 30),
    "escape": "\x1b[2Jx", "newline": "a\nb", "user": "~no-such-user-here/x", "inside a file": "mine.yaml/x",
    "loop": "loop", "dot": ".", "root": "/", "bytes": "a\udcff", "proc": "/proc/self/mem",
    "text": "mine.txt", "image": "a.png", "dangling": "dangling", "empty file": "empty.yaml",
    "broken run": "broken",
}  # fmt: skip


def odd_files(home: Path) -> None:
    """A folder, a pipe, a link to itself, files of several kinds, and a run folder without a run."""
    (home / "folder").mkdir()
    os.mkfifo(home / "fifo")
    (home / "loop").symlink_to(home / "loop")
    (home / "dangling").symlink_to(home / "nowhere")
    (home / "mine.txt").write_text("hello\n")
    (home / "empty.yaml").touch()
    (home / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (home / "broken").mkdir()
    (home / "broken" / "run.json").write_text("[]")
    recipe(home)


@RECIPES.kind
def places(rng: random.Random, home: Path) -> Case:
    """Every command on what is not its input."""
    odd_files(home)
    name, what = rng.choice(sorted(COMMANDS)), rng.choice(sorted(ODD_PATHS))
    place = ODD_PATHS[what]
    return Case(f"{name} on {what}", (*name.split(), place, *COMMANDS[name]), "bad", keep=("made",))


@RECIPES.kind
def targets(rng: random.Random, home: Path) -> Case:
    """Good recipes and bad places to write, in every option that names one."""
    odd_files(home)
    what = rng.choice(("fifo", "zero", "null", "long", "longer", "user", "inside a file", "loop"))
    place = ODD_PATHS[what]
    option = rng.choice(
        ("out", "reuse", "plugins", "image_root", "train", "merge", "export", "report", "cka")
    )
    if option in ("out", "reuse"):
        args: tuple[str, ...] = ("run", "mine.yaml", f"{option}={json.dumps(place)}", "model.family=nobody")
    elif option == "plugins":
        args = ("explain", "mine.yaml", f"plugins=[{json.dumps(place)}]")
    elif option in ("image_root", "train"):
        task = {"name": "a", "train": "t.json", "test": "t.json"} | (
            {option: place} if option == "train" else {}
        )
        (home / "t.json").write_text('[{"id": 1, "text": "x", "answer": "y", "image": "a.png"}]')
        stream = {"tasks": [task]} | ({option: place} if option == "image_root" else {})
        args = ("plan", str(_raw(home, changed("stream", stream))))
    else:
        commands = {"merge": ("merge", "folder", "--to"), "export": ("export", "folder", "--to"),
                    "report": ("report", "folder", "--out"), "cka": ("analyse", "cka", "folder", "--out")}  # fmt: skip
        args = (*commands[option], place)
    return Case(f"{option} = {what}", args, "bad")


ODD_TYPE = """
from dataclasses import dataclass
from typing import ClassVar
from retain.method import *
@register
@dataclass
class A(Method):
    name: ClassVar[str] = 'fuzz_a'
    size: 'Nowhere' = 3
"""
PLUGINS = {
    "raises": "raise ValueError('a\\nb\\x1b[2J')", "exits": "import sys; sys.exit(0)",
    "exits with words": "raise SystemExit('bye')", "raises Exit": "import typer; raise typer.Exit(0)",
    "interrupts no one": "raise KeyError", "recursion": "def f(): f()\nf()", "assertion": "assert 0",
    "not Python": "a b c", "NUL": "a = '\0'", "null bytes": "\0\0\0",
    "empty name": "import nobody_of_this_name",
    "half a method": "from retain.method import *\n@register\nclass A(Method):\n    size: int = 3\n",
    "surrogate": "raise ValueError('\\ud800')", "odd type": ODD_TYPE, "memory": "raise MemoryError",
    "long": "raise ValueError('x' * 100000)", "deep": "x = " + "(" * 300 + ")" * 300,
    "generator": "raise StopIteration", "group": "raise ExceptionGroup('a', [ValueError('b')])",
    "unicode": "'a'.encode().decode('utf-16')",
}  # fmt: skip


@RECIPES.kind
def plugins(rng: random.Random, home: Path) -> Case:
    """A plugin that is broken in some way, or does nothing."""
    path = recipe(home)
    good = rng.random() < 0.2
    what = "harmless" if good else rng.choice(sorted(PLUGINS))
    (home / f"fuzz_{rng.randrange(10**9)}.py").write_text("x = 1\n" if good else PLUGINS[what])
    name = next(home.glob("fuzz_*.py")).name
    data = changed("plugins", [name])
    if what == "odd type":
        data["method"] = ["lora", {"fuzz_a": {"size": 3}}]
    path.write_text(json.dumps(data))
    return Case(
        what,
        ("explain", str(path)),
        "good" if good else "bad",
        words=() if good else (name,) if what != "odd type" else ("fuzz_a",),
    )


USAGE = (
    ("",), ("nobody",), ("--nope",), ("run",), ("run", "--nope"), ("run", "--quiet=3"), ("explain",),
    ("plan",), ("export",), ("export", "x"), ("export", "x", "--to"),
    ("export", "x", "--to", "y", "--after", "many"), ("export", "x", "--to", "y", "--after", "9" * 400),
    ("evaluate", "x", "--after", "1.5"), ("evaluate", "x", "--after", "-" + "9" * 30), ("evaluate",),
    ("report",), ("compare",), ("merge",), ("merge", "--with", "nobody", "folder", "--to", "y"),
    ("merge", "folder", "--weights", "a", "--to", "y"), ("merge", "folder", "--weights", "nan", "--to", "y"),
    ("merge", "folder", "--weights", "1,2", "--to", "y"), ("merge", "folder", "--rank", "-1", "--to", "y"),
    ("merge", "folder", "--rank", "9" * 400, "--to", "y"), ("merge", "folder", "--keep", "all", "--to", "y"),
    ("merge", "folder", "density=.nan", "--to", "y"), ("merge", "folder", "=", "--to", "y"),
    ("merge", "mine.yaml"), ("merge", "fifo.yaml"), ("merge", "folder.yaml", "--to", "y"),
    ("merge", "folder"), ("merge", "folder", "--with", "ties", "density=2", "--to", "y"),
    ("merge", "folder", "--with", "ties", "density=[1]", "--to", "y"), ("analyse", "nobody"),
    ("analyse", "cka"), ("analyse", "cka", "folder", "--samples", "0"),
    ("analyse", "cka", "folder", "--samples", "-3"), ("analyse", "cka", "folder", "--samples", "x"),
    ("analyse", "merge"), ("doctor",), ("doctor", "--model", ""), ("doctor", "--model", "./nowhere"),
    ("doctor", "mine.yaml", "--model", "x"), ("doctor", "--model", "fifo"),
    ("doctor", "--model", "~no-such-user-here/x"), ("methods", "x"), ("run", "mine.yaml", "--", "--quiet"),
    ("compare", "a", "--against"), ("compare", "folder", "--against", "\x1b[2J"),
    ("report", "folder", "--out", ""), ("export", "folder", "--to", ""), ("merge", "", "--to", "y"),
    ("merge", "folder", "--to", ""), ("merge", "x" * 5000, "--to", "y"),
    ("merge", "folder", "--base", "", "--merged", "--to", "y"),
)  # fmt: skip
ASKED = (
    ("--version",), ("--help",), ("methods",), ("run", "--help"), ("merge", "--list"), ("analyse", "--help"),
    ("explain", "mine.yaml"), ("plan", "mine.yaml"), ("doctor", "mine.yaml"),
)  # fmt: skip


@RECIPES.kind
def usage(rng: random.Random, home: Path) -> Case:
    """Missing, unknown and misplaced words."""
    odd_files(home)
    os.mkfifo(home / "fifo.yaml")
    (home / "folder.yaml").mkdir()
    if rng.random() < 0.2:
        words = rng.choice(ASKED)
        return Case("asked well", words, "good", finds=words[0] == "doctor")
    words = rng.choice(USAGE)
    return Case("usage", words, "bad")
