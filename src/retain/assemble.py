"""What a recipe says, made: its model, its stream, its method.

    Recipe ─► build_model(), build_stream(), build_method()

`retain.config` reads and refuses; here nothing is decided. Errors name the recipe's file.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retain import method as methods
from retain.config import FilesSpec, Recipe, TaskSpec, benchmark_call
from retain.data import read
from retain.federated.local import federation
from retain.federated.rounds import Federation
from retain.federated.server import Server
from retain.federated.server import build as build_server
from retain.federated.server import known as known_servers
from retain.federated.spec import FederatedSpec
from retain.method import Method
from retain.metrics import score
from retain.plain import Plain, prefixed, read_small, real_path, short, whole_text
from retain.run.engine import Engine
from retain.run.trainer import Central, Trainer
from retain.stream import Stream, Task
from retain.types import RetainError, digest
from retain.values import fill

if TYPE_CHECKING:
    from retain.models.hf import HFModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_method(recipe: Recipe) -> Method:
    """The stack that `method` describes, plugins registered first."""
    for plugin in recipe.plugins:
        load_plugin(plugin)
    return prefixed(f"{recipe.path}", lambda: methods.build(recipe.method))


def build_stream(recipe: Recipe) -> Stream:
    """The benchmark by name, or the user's own files, read and checked."""
    where = f"{recipe.path}: stream"
    if "tasks" in recipe.stream:
        learned = ("test",) if recipe.federated else ("train", "test")  # rows may be at sites
        stream = _from_files(fill(FilesSpec, recipe.stream, where), where, learned)
    else:
        stream = _benchmark(recipe.stream, where)
    return stream.on_valid() if recipe.eval.split == "valid" else stream


def build_federation(recipe: Recipe, stream: Stream, method: Method, kept: Path) -> Federation:
    """The coordinator with clients in this process; each keeps what stays with it under `kept`."""
    spec = recipe.federated
    assert spec is not None
    server = server_of(spec, method)
    agreed = agreement(recipe, server)
    for task in stream:
        if not len(task.train):
            raise RetainError(
                f"{recipe.path}: stream: task {task.name!r} has no train rows here; name a file under `train`, or deploy "
                "it with `retain federate server`, where sites have them"
            )
    return prefixed(
        f"{recipe.path}: federated",
        lambda: federation(spec, server, stream, kept, agreed=agreed),
    )


def build_trainer(recipe: Recipe, stream: Stream, method: Method) -> Trainer:
    """What trains a stage: the central loop, or the coordinator of clients in this process."""
    if recipe.federated is None:
        return Central()
    return build_federation(recipe, stream, method, recipe.out / "clients")


def server_of(spec: FederatedSpec, method: Method) -> Server:
    """The recipe's server; where it names none, the one that serves the method, else FedAvg."""
    if spec.server:
        return build_server(spec.server)
    parts = {p.name for p in method.parts}
    return build_server(next((n for n, s in known_servers().items() if s.of in parts), "fedavg"))


def agreement(recipe: Recipe, server: Server) -> str:
    """A hash of what a server and its clients must have alike: version, and every part of `agreed`."""
    return digest([version("retain"), *agreed(recipe, server).values()])


def agreed(recipe: Recipe, server: Server) -> dict[str, str]:
    """Hashes of what a server and its clients must have alike, by the recipe's keys, whatever their paths."""
    plain = recipe.resolved()
    model = {k: plain["model"].get(k) for k in ("dtype", "max_length", "truncate", "square")}
    parts = {
        "model": model, **{k: plain[k] for k in ("adapter", "method", "optim")},
        "federated.server": [server.name, asdict(server)],  # type: ignore[call-overload]
    }  # fmt: skip
    return {key: digest(value) for key, value in parts.items()}


def build_model(recipe: Recipe, device: torch.device | None = None) -> HFModel:
    """The base model with this recipe's adapters. A Hub id is the only thing ever downloaded."""
    from retain.models.hf import HFModel  # slow to import

    without_bars()
    spec = recipe.model
    return prefixed(
        f"{recipe.path}",
        lambda: HFModel.load(
            model_source(spec.name),
            recipe.adapter,
            dtype=DTYPES[spec.dtype],
            device=device or Engine.start(spec.device).device,
            family=spec.family,
            guide=spec.guide and model_source(spec.guide, "model.guide"),
            max_length=spec.max_length,
            truncate=spec.truncate,
            square=spec.square,
        ),
    )


def without_bars() -> None:
    """No progress bars of transformers in a pipe or a file."""
    from transformers.utils import logging  # slow to import

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def model_source(name: str, key: str = "model") -> str:
    """What to load: the shipped weights for `pocket`, a directory, or a Hub id (`owner/name`).

    RetainError, naming the recipe's `key`, for a directory that is not there and for what is neither.
    """
    if name == "pocket":
        from retain.pocket import pocket_path

        try:
            return str(pocket_path())
        except FileNotFoundError as error:
            raise RetainError(f"{key}: {error}") from None
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" not in name
    if looks_local and not real_path(name, key).is_dir():
        raise RetainError(
            f"{key}: no directory {short(name)}; write pocket, a model directory, or a Hub id as owner/name"
        )
    return name


def _benchmark(stream: Plain, where: str) -> Stream:
    make, options = benchmark_call(stream, where)
    made: Stream = prefixed(where, lambda: make(**options))
    return made


def _from_files(spec: FilesSpec, where: str, learned: tuple[str, ...]) -> Stream:
    """Read every file of every task; all images are checked before anything is trained.

    `learned`: the splits that a task must have to be learned here.
    """

    def examples(task: TaskSpec, split: str) -> Any:
        name = getattr(task, split)
        root = Path(task.image_root or spec.image_root)
        return read.examples(Path(name), root, max_pixels=spec.max_pixels) if name else ()

    def build(task: TaskSpec, at: str, needed: tuple[str, ...]) -> Task:
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

    tasks = [build(t, f"{where}.tasks[{i}]", learned) for i, t in enumerate(spec.tasks)]
    unseen = [build(t, f"{where}.unseen[{i}]", ("test",)) for i, t in enumerate(spec.unseen)]
    made: Stream = prefixed(where, lambda: Stream(spec.name, tuple(tasks), tuple(unseen)))
    return made


def load_plugin(path: Path) -> None:
    """Run a user's file once, so that its `@register`ed methods can be named.

    RetainError for whatever it raises, and for `sys.exit`: it is for methods, and ends nothing.
    """
    name = f"retain_plugin_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return
    whole_text(read_small(path, "a plugin"), f"plugins: {path}")  # no pipe, no megabytes, text
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise RetainError(f"plugins: {path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up while it is being run
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        del sys.modules[name]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        at = f"{path}:{lines[-1]}" if lines else str(path)
        kind = "" if isinstance(error, RetainError) else f"{type(error).__name__}: "
        told = " ".join(str(error).split()) or "without a word"
        raise RetainError(f"plugins: {at}: {kind}{told}") from None
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name]
    idle = [c.__name__ for c in classes if issubclass(c, Method) and c not in methods.REGISTRY.values()]
    if idle and not any(c in methods.REGISTRY.values() for c in classes):
        del sys.modules[name]  # or a second try would pass over it
        raise RetainError(f"plugins: {path}: class {idle[0]} is not registered; put @register above it")
