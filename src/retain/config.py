"""A YAML recipe and `key=value` overrides as typed values; an unknown key is an error that names the nearest.

    recipe.yaml ─► plain dict ─► overrides ─► Recipe ─► retain.assemble

Every message starts with the file (or the override) and the path of the key. Paths in a recipe are relative
to the recipe. The reading itself, strict and by YAML 1.2, is in `retain.plain`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field

from retain import benchmarks
from retain.adapters.kinds import KINDS, Spec
from retain.data.picture import MAX_PIXELS
from retain.federated.server import build as build_server
from retain.federated.spec import FederatedSpec
from retain.metrics import score
from retain.plain import Plain, kind, near, override, plain, prefixed, read_small, read_yaml, real_path, short
from retain.run.engine import Device
from retain.run.evaluate import EvalOptions
from retain.run.track import TRACKERS
from retain.run.train import Optim
from retain.types import RetainError
from retain.values import LATER, Count, Name, PathText, Seed, fill, ranged, typed, written


@ranged("model")
@dataclass(frozen=True)
class ModelSpec:
    """Which base model: `pocket` (in the package), a directory, or a Hub id; and how it is loaded.

    `guide` names a second model directory whose frozen features routers compare; None: the model's own. `square`:
    `pad` pads pictures to a square before the processor sees them, as LLaVA-1.5 was trained; `crop` leaves them to
    the processor, which for LLaVA-1.5 cuts the longer sides off.
    """

    name: Annotated[PathText, Field(min_length=1)]
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    family: str | None = None
    guide: PathText | None = None
    device: Device = "auto"
    max_length: Count | None = None
    truncate: bool = False
    square: Literal["crop", "pad"] = field(default="crop", metadata=LATER)


@ranged("task")
@dataclass(frozen=True)
class TaskSpec:
    """One task of a user's own stream. Files are relative to the recipe."""

    name: Name
    train: PathText | None = None
    test: str = ""
    valid: PathText | None = None
    score: str = "exact"
    compat: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 32
    image_root: PathText | None = None
    about: str = ""


@ranged("stream")
@dataclass(frozen=True)
class FilesSpec:
    """A user's own stream: tasks in order, tasks that are only evaluated, and where the images are."""

    tasks: list[TaskSpec]
    name: Name = "mine"
    image_root: PathText = "."
    unseen: list[TaskSpec] = field(default_factory=list)
    max_pixels: Annotated[int, Field(ge=1, lt=2**40)] = MAX_PIXELS


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
    federated: FederatedSpec | None = None

    def resolved(self) -> Plain:
        """Every value as plain data with absolute paths: `parse` makes the same recipe from it anywhere."""
        kind = self.adapter.kind
        return {
            "model": written(self.model),
            "adapter": ({} if kind == "lora" else {"kind": kind}) | asdict(self.adapter),
            "stream": self.stream,
            "method": self.method,
            "optim": written(self.optim),
            "eval": asdict(self.eval),
            "seed": self.seed,
            "out": str(self.out),
            "plugins": [str(p) for p in self.plugins],
            "track": list(self.track),
            "reuse": str(self.reuse) if self.reuse else "",
            **({"federated": asdict(self.federated)} if self.federated else {}),
        }


# -- reading ---------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key=value` overrides in order, check every key and type."""
    path = real_path(path, "the recipe")
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise RetainError(f"{path}: no such recipe{hint}")
    data = read_yaml(read_small(path, "a recipe"), str(path))
    if not isinstance(data, dict):
        raise RetainError(
            f"{path}: a recipe is a mapping of keys (model, stream, method, …), not {kind(data)}"
        )
    return parse(data, path, overrides)


def parse(data: Mapping[str, Any], path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from plain data; `path` is where relative paths start and what messages name."""
    told = _normal(json.loads(json.dumps(plain(data, str(path)))), str(path))
    for text in overrides:
        override(told, text)
        told = _normal(plain(told, f"override {short(text)}"), f"override {short(text)}")
    try:
        return _recipe(told, path)
    except RetainError as error:
        said = re.split(r"; did you mean|Choose from", str(error).removeprefix(str(path)))[0]
        words = set(re.findall(r"\w+", said))
        guilty = [text for text in overrides if words.issuperset(re.findall(r"\w+", text.partition("=")[0]))]
        raise type(error)(f"{error} (override {short(guilty[-1])})" if guilty else str(error)) from None


def _recipe(plain: Plain, path: Path) -> Recipe:
    base = path.resolve().parent
    top = fill(_Top, plain, str(path))
    if not top.method:
        raise RetainError(f"{path}: method: name at least one, such as lora; `retain methods` lists them")
    for tracker in top.track:
        if tracker not in TRACKERS:
            raise RetainError(f"{path}: track: no tracker {short(tracker)}{near(tracker, TRACKERS)}")
        if top.track.count(tracker) > 1:
            raise RetainError(f"{path}: track: {tracker!r} is named twice")
    _check_stream(top.stream, path)
    out = default_out(path, top.seed) if top.out is None else real_path(top.out, f"{path}: out")
    if out.exists() and not out.is_dir():
        raise RetainError(f"{path}: out: {short(str(out))} is no folder; a run is written into one")
    guide = _place(top.model.guide, base) if top.model.guide else None
    model = replace(top.model, name=_place(top.model.name, base), guide=guide)
    return Recipe(
        path=path,
        model=model,
        stream=_absolute(top.stream, base),
        method=top.method,
        adapter=_adapter(top.adapter, f"{path}: adapter"),
        optim=top.optim,
        eval=_precision(top.eval, top.model),
        seed=top.seed,
        out=out,
        plugins=tuple(_existing(base, p, f"{path}: plugins") for p in top.plugins),
        track=tuple(top.track),
        reuse=real_path(top.reuse, f"{path}: reuse") if top.reuse else None,
        federated=_federated(top.federated, path, base),
    )


def _federated(data: Plain | None, path: Path, base: Path) -> FederatedSpec | None:
    """The `federated:` block; its server is built once, so that a wrong one is told now."""
    if data is None:
        return None
    where = f"{path}: federated"
    spec = fill(FederatedSpec, data, where)
    if spec.server:
        build_server(spec.server, f"{where}.server")
    return replace(spec, partitions=str(base / spec.partitions)) if spec.partitions else spec


@dataclass(frozen=True)
class _Top:
    """The recipe's keys."""

    model: ModelSpec
    stream: dict[str, Any]
    method: list[Any]
    adapter: dict[str, Any] = field(default_factory=dict)  # `kind` says which keys it may have
    optim: Optim = field(default_factory=Optim)
    eval: EvalOptions = field(default_factory=EvalOptions)
    seed: Seed = 0
    out: PathText | None = None
    plugins: list[PathText] = field(default_factory=list)
    track: list[str] = field(default_factory=list)
    federated: dict[str, Any] | None = None
    reuse: str = (
        ""  # off; a folder that runs share: tasks tuned there from the same start are not tuned again
    )


def _precision(options: EvalOptions, model: ModelSpec) -> EvalOptions:
    """A model in fp32 answers in fp32 as it is: said as folders from before the choice `model` say it."""
    own = options.precision == "model" and model.dtype == "fp32"
    return replace(options, precision="fp32") if own else options


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
    if isinstance(out.get("federated"), Mapping) and isinstance(out["federated"].get("server"), str):
        name = out["federated"]["server"]
        out["federated"] = {**out["federated"], "server": {name: {}} if name else {}}
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
                prefixed(f"{where}.tasks[{i}] ({task.name})", partial(score, name))
    else:
        benchmark_call(stream, where)


def _adapter(data: Plain, where: str) -> Spec:
    """The adapters' kind and shape; without `kind` they are LoRA."""
    name = data.get("kind", "lora")
    if not isinstance(name, str) or name not in KINDS:
        raise RetainError(f"{where}.kind: no adapter kind {short(name)}{near(short(name), KINDS)}")
    return fill(KINDS[name], {k: v for k, v in data.items() if k != "kind"}, where)


# -- paths -----------------------------------------------------------------------------------------------


def _place(name: str, base: Path) -> str:
    """A model directory (beside the recipe, else here) as an absolute path; any other name as it is."""
    for root in (base, Path.cwd()):
        candidate = root / Path(name).expanduser()
        if name != "pocket" and candidate.is_dir():
            return str(candidate.resolve())
    return name


def _existing(base: Path, name: str, where: str) -> Path:
    path = base / real_path(name, where)
    if not path.is_file():
        raise RetainError(f"{where}: no such file {short(str(path))}")
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


def benchmark_call(stream: Plain, where: str) -> tuple[Any, Plain]:
    """The benchmark's function and its checked options."""
    names = benchmarks.names()
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
    make = benchmarks.find(name)
    parameters, hints = inspect.signature(make).parameters, get_type_hints(make, include_extras=True)
    if not isinstance(options, Mapping):
        raise RetainError(f"{where}.{name}: a mapping of options is needed, not {kind(options)}")
    for key in options:
        if key not in parameters:
            raise RetainError(f"{where}.{name}: no option {key!r}{near(key, parameters)}")
    return make, {k: typed(hints[k], v, f"{where}.{name}.{k}") for k, v in options.items()}
