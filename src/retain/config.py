"""A YAML recipe and `key=value` overrides as typed values; an unknown key is an error that names the nearest.

    recipe.yaml ─► plain dict ─► overrides ─► Recipe ─► build_model(), build_stream(), build_method()

Every message starts with the file (or the override) and the path of the key. Paths in a recipe are relative
to the recipe. The reading itself, strict and by YAML 1.2, is in `retain.values`.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, get_type_hints

import torch

from retain import benchmarks
from retain import method as methods
from retain.adapters.kinds import KINDS, Spec
from retain.data import read
from retain.engine import Engine
from retain.evaluate import EvalOptions
from retain.method import Method
from retain.metrics import score
from retain.models.base import Model
from retain.stream import Stream, Task
from retain.track import TRACKERS
from retain.train import Optim
from retain.types import RetainError
from retain.values import Plain, fill, kind, near, override, read_yaml, typed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """Which base model: `pocket` (in the package), a directory, or a Hub id; and how it is loaded.

    `guide` names a second model directory whose frozen features routers compare; None: the model's own.
    """

    name: str
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    family: str | None = None
    guide: str | None = None
    device: str = "auto"
    max_length: int | None = None
    truncate: bool = False


@dataclass(frozen=True)
class TaskSpec:
    """One task of a user's own stream. Files are relative to the recipe."""

    name: str
    train: str | None = None
    test: str = ""
    valid: str | None = None
    score: str = "exact"
    compat: str | None = None
    max_new_tokens: int = 32
    image_root: str | None = None
    about: str = ""


@dataclass(frozen=True)
class FilesSpec:
    """A user's own stream: tasks in order, tasks that are only evaluated, and where the images are."""

    tasks: list[TaskSpec]
    name: str = "mine"
    image_root: str = "."
    unseen: list[TaskSpec] = field(default_factory=list)
    max_pixels: int = read.MAX_PIXELS


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made from. `stream` and `method` stay plain data until they are built."""

    path: Path
    model: ModelSpec
    stream: Plain
    method: list[Any]
    adapter: Spec
    optim: Optim
    eval: EvalOptions
    seed: int
    out: Path
    plugins: tuple[Path, ...] = ()
    track: tuple[str, ...] = ()
    reuse: Path | None = None

    def resolved(self) -> Plain:
        """Every value as plain data with absolute paths: `parse` makes the same recipe from it anywhere."""
        kind = self.adapter.kind
        return {
            "model": asdict(self.model),
            "adapter": ({} if kind == "lora" else {"kind": kind}) | asdict(self.adapter),
            "stream": self.stream,
            "method": self.method,
            "optim": asdict(self.optim),
            "eval": asdict(self.eval),
            "seed": self.seed,
            "out": str(self.out),
            "plugins": [str(p) for p in self.plugins],
            "track": list(self.track),
            "reuse": str(self.reuse) if self.reuse else "",
        }

    def build_method(self) -> Method:
        """The stack that `method` describes, plugins registered first."""
        for plugin in self.plugins:
            load_plugin(plugin)
        try:
            return methods.build(self.method)
        except RetainError as error:
            raise type(error)(f"{self.path}: {error}") from None

    def build_stream(self) -> Stream:
        """The benchmark by name, or the user's own files, read and checked."""
        where = f"{self.path}: stream"
        if "tasks" in self.stream:
            stream = _from_files(fill(FilesSpec, self.stream, where), where)
        else:
            stream = _benchmark(self.stream, where)
        return stream.on_valid() if self.eval.split == "valid" else stream

    def build_model(self, device: torch.device | None = None) -> Model:
        """The base model with this recipe's adapters. A Hub id is the only thing ever downloaded."""
        from transformers.utils import logging  # slow to import, and so is the next

        from retain.models.hf import HFModel

        if not sys.stderr.isatty():
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        spec = self.model
        try:
            return HFModel.load(
                model_source(spec.name),
                self.adapter,
                dtype=DTYPES[spec.dtype],
                device=device or Engine.start(spec.device).device,
                family=spec.family,
                guide=spec.guide,
                max_length=spec.max_length,
                truncate=spec.truncate,
            )
        except RetainError as error:
            raise type(error)(f"{self.path}: {error}") from None


# -- reading ---------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key=value` overrides in order, check every key and type."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        what = "is a folder, a recipe is a YAML file" if path.is_dir() else f"no such recipe{hint}"
        raise RetainError(f"{path}: {what}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RetainError(f"{path}: not UTF-8 text (byte {error.start})") from None
    data = read_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RetainError(
            f"{path}: a recipe is a mapping of keys (model, stream, method, …), not {kind(data)}"
        )
    return parse(data, path, overrides)


def parse(data: Mapping[str, Any], path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from plain data; `path` is where relative paths start and what messages name."""
    plain = _normal(json.loads(json.dumps(data)), str(path))
    for text in overrides:
        override(plain, text)
        plain = _normal(plain, f"override {text!r}")
    try:
        return _recipe(plain, path)
    except RetainError as error:
        said = re.split(r"; did you mean|Choose from", str(error).removeprefix(str(path)))[0]
        words = set(re.findall(r"\w+", said))
        guilty = [text for text in overrides if words.issuperset(re.findall(r"\w+", text.partition("=")[0]))]
        raise type(error)(f"{error} (override {guilty[-1]!r})" if guilty else str(error)) from None


def _recipe(plain: Plain, path: Path) -> Recipe:
    base = path.resolve().parent
    top = fill(_Top, plain, str(path))
    if not top.method:
        raise RetainError(f"{path}: method: name at least one, such as lora; `retain methods` lists them")
    for tracker in top.track:
        if tracker not in TRACKERS:
            raise RetainError(f"{path}: track: no tracker {tracker!r}{near(tracker, TRACKERS)}")
    if top.optim.steps == 0:
        raise RetainError(f"{path}: optim.steps: must be at least 1, or null to count epochs; not 0")
    _check_stream(top.stream, path)
    out = Path(top.out).expanduser() if top.out else default_out(path, top.seed)
    guide = _place(top.model.guide, base) if top.model.guide else None
    model = replace(top.model, name=_place(top.model.name, base), guide=guide)
    return Recipe(
        path=path,
        model=model,
        stream=_absolute(top.stream, base),
        method=top.method,
        adapter=_adapter(top.adapter, f"{path}: adapter"),
        optim=top.optim,
        eval=top.eval,
        seed=top.seed,
        out=out,
        plugins=tuple(_existing(base / Path(p).expanduser(), f"{path}: plugins") for p in top.plugins),
        track=tuple(top.track),
        reuse=Path(top.reuse).expanduser() if top.reuse else None,
    )


@dataclass(frozen=True)
class _Top:
    """The recipe's keys."""

    model: ModelSpec
    stream: dict[str, Any]
    method: list[Any]
    adapter: dict[str, Any] = field(default_factory=dict)  # `kind` says which keys it may have
    optim: Optim = field(default_factory=Optim)
    eval: EvalOptions = field(default_factory=EvalOptions)
    seed: int = 0
    out: str = ""
    plugins: list[str] = field(default_factory=list)
    track: list[str] = field(default_factory=list)
    reuse: str = ""  # a folder that runs share: tasks tuned there from the same start are not tuned again


def default_out(path: Path, seed: int) -> Path:
    """runs/<folder>-<stem> (runs/<stem> for a recipe in the current folder); -seedN for a seed but 0."""
    folder = path.resolve().parent
    stem = path.stem if folder == Path.cwd() else f"{folder.name}-{path.stem}"
    return Path("runs") / (stem + (f"-seed{seed}" if seed else ""))


def _normal(data: Plain, where: str) -> Plain:
    """Short forms to long ones, so that overrides find a place: names become mappings and lists."""
    out = dict(data)
    if isinstance(out.get("model"), str):
        out["model"] = {"name": out["model"]}
    if isinstance(out.get("stream"), str):
        out["stream"] = {out["stream"]: {}}
    if isinstance(out.get("track"), str):
        out["track"] = [out["track"]]
    if "method" in out:
        out["method"] = _method_list(out["method"], where)
    return out


def _method_list(spec: Any, where: str) -> list[Any]:
    parts = spec if isinstance(spec, list) else [spec]
    out: list[Any] = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            out.append({part: {}})
        elif isinstance(part, list):
            out.append(_method_list(part, where))
        elif isinstance(part, Mapping) and len(part) == 1:
            out.append({name: options or {} for name, options in part.items()})
        else:
            raise RetainError(
                f"{where}: method[{i}]: write a name, or {{name: {{field: value}}}} with one, not {part!r}"
            )
    return out


def _check_stream(stream: Plain, path: Path) -> None:
    """Names and types of the stream's keys, before anything is read."""
    where = f"{path}: stream"
    if "tasks" in stream:
        spec = fill(FilesSpec, stream, where)
        if not spec.tasks:
            raise RetainError(f"{where}.tasks: the list is empty; name at least one task")
        for i, task in enumerate([*spec.tasks, *spec.unseen]):
            for name in filter(None, (task.score, task.compat)):
                _prefixed(f"{where}.tasks[{i}] ({task.name})", lambda name=name: score(name))
            if task.max_new_tokens < 1:
                raise RetainError(
                    f"{where}.tasks[{i}].max_new_tokens: must be at least 1, not {task.max_new_tokens}"
                )
    else:
        _benchmark_call(stream, where)


def _adapter(data: Plain, where: str) -> Spec:
    """The adapters' kind and shape; without `kind` they are LoRA."""
    name = data.get("kind", "lora")
    if name not in KINDS:
        raise RetainError(f"{where}.kind: no adapter kind {name!r}{near(str(name), KINDS)}")
    return fill(KINDS[name], {k: v for k, v in data.items() if k != "kind"}, where)


def _prefixed(where: str, call: Any) -> Any:
    try:
        return call()
    except RetainError as error:
        raise type(error)(f"{where}: {error}") from None


# -- paths -----------------------------------------------------------------------------------------------


def _place(name: str, base: Path) -> str:
    """A model directory (beside the recipe, else here) as an absolute path; any other name as it is."""
    for root in (base, Path.cwd()):
        candidate = root / Path(name).expanduser()
        if name != "pocket" and candidate.is_dir():
            return str(candidate.resolve())
    return name


def model_source(name: str) -> str:
    """What to load: the shipped weights for `pocket`, a directory, or a Hub id (`owner/name`)."""
    if name == "pocket":
        from retain.models.pocket import pocket_path

        try:
            return str(pocket_path())
        except FileNotFoundError as error:
            raise RetainError(f"model: {error}") from None
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" not in name
    if looks_local and not Path(name).expanduser().is_dir():
        raise RetainError(
            f"model: no directory {name!r}; write pocket, a model directory, or a Hub id as owner/name"
        )
    return name


def _existing(path: Path, where: str) -> Path:
    if not path.is_file():
        raise RetainError(f"{where}: no such file {str(path)!r}")
    return path.resolve()


def _absolute(stream: Plain, base: Path) -> Plain:
    """A stream of files with absolute paths; a benchmark as it is."""
    if "tasks" not in stream:
        return stream
    root = str(base / Path(stream.get("image_root", ".")).expanduser())

    def task(spec: Plain) -> Plain:
        keys = [k for k in ("train", "test", "valid", "image_root") if spec.get(k)]
        return {**spec, **{k: str(base / Path(spec[k]).expanduser()) for k in keys}}

    lists: Plain = {key: [task(t) for t in stream[key]] for key in ("tasks", "unseen") if key in stream}
    return {**stream, **lists, "image_root": root}


# -- building --------------------------------------------------------------------------------------------


def benchmark_names() -> list[str]:
    """Modules of `retain.benchmarks` with a function of their own name, which returns a Stream."""
    found = [m.name for m in iter_modules(benchmarks.__path__) if not m.name.startswith("_")]
    return sorted(n for n in found if callable(getattr(import_module(f"retain.benchmarks.{n}"), n, None)))


def _benchmark_call(stream: Plain, where: str) -> tuple[Any, Plain]:
    """The benchmark's function and its checked options."""
    names = benchmark_names()
    if len(stream) != 1:
        known, others = [n for n in stream if n in names], [k for k in stream if k not in names]
        hint = f"; an option of {known[0]} is stream.{known[0]}.{others[0]}" if known and others else ""
        raise RetainError(
            f"{where}: one benchmark of {names}, or a mapping with `tasks`, not the keys {list(stream)}{hint}"
        )
    name, options = next(iter(stream.items()))
    if name not in names:
        raise RetainError(
            f"{where}: no benchmark {name!r}{near(name, names)} (or give `tasks`: your own files)"
        )
    options = options or {}
    make = getattr(import_module(f"retain.benchmarks.{name}"), name)
    parameters, hints = inspect.signature(make).parameters, get_type_hints(make)
    if not isinstance(options, Mapping):
        raise RetainError(f"{where}.{name}: a mapping of options is needed, not {kind(options)}")
    for key in options:
        if key not in parameters:
            raise RetainError(f"{where}.{name}: no option {key!r}{near(key, parameters)}")
    return make, {k: typed(hints[k], v, f"{where}.{name}.{k}") for k, v in options.items()}


def _benchmark(stream: Plain, where: str) -> Stream:
    make, options = _benchmark_call(stream, where)
    made: Stream = _prefixed(where, lambda: make(**options))
    return made


def _from_files(spec: FilesSpec, where: str) -> Stream:
    """Read every file of every task; all images are checked before anything is trained."""

    def examples(task: TaskSpec, split: str) -> Any:
        name = getattr(task, split)
        root = Path(task.image_root or spec.image_root)
        return read.examples(Path(name), root, max_pixels=spec.max_pixels) if name else ()

    def build(task: TaskSpec, at: str, learned: bool) -> Task:
        needed = ("train", "test") if learned else ("test",)
        for split in needed:
            if not getattr(task, split):
                raise RetainError(f"{at} ({task.name}): the key {split!r} is missing")
        parts = {split: examples(task, split) for split in ("train", "test", "valid")}
        for split in needed:
            if not parts[split]:
                raise RetainError(f"{at} ({task.name}): {split}: {getattr(task, split)} has no row")
        compat = score(task.compat) if task.compat else None
        return Task(
            task.name,
            **parts,
            score=score(task.score),
            max_new_tokens=task.max_new_tokens,
            compat=compat,
            about=task.about,
        )

    learned = [build(t, f"{where}.tasks[{i}]", True) for i, t in enumerate(spec.tasks)]
    unseen = [build(t, f"{where}.unseen[{i}]", False) for i, t in enumerate(spec.unseen)]
    made: Stream = _prefixed(where, lambda: Stream(spec.name, tuple(learned), tuple(unseen)))
    return made


def load_plugin(path: Path) -> None:
    """Run a user's file once, so that its `@register`ed methods can be named."""
    name = f"retain_plugin_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise RetainError(f"plugins: {path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up while it is being run
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        del sys.modules[name]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        at = f"{path}:{lines[-1]}" if lines else str(path)
        kind = "" if isinstance(error, RetainError) else f"{type(error).__name__}: "
        raise RetainError(f"plugins: {at}: {kind}{error}") from None
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name]
    idle = [c.__name__ for c in classes if issubclass(c, Method) and c not in methods.REGISTRY.values()]
    if idle and not any(c in methods.REGISTRY.values() for c in classes):
        del sys.modules[name]  # or a second try would pass over it
        raise RetainError(f"plugins: {path}: class {idle[0]} is not registered; put @register above it")
