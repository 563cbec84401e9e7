"""What runs inside Flower's processes: the ServerApp beside the SuperLink, the ClientApp beside each SuperNode.

    server (one process per run)       recipe ─► the clients at the door ─► `commands.run.start` ─► a RunDir
    client (one process per message)   site.json ─► recipe, model, the site's own rows ─► `Site.answer`

The app that is sent to the SuperLink (`retain.commands.federate`) holds the recipe and two lines that call these two.
A ClientApp reads its site's own recipe and its own files, and nothing that the server names. Flower starts a new
process for every message, so a site loads its model once per message: what a message costs at least.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from retain.assemble import agreed, agreement, build_method, build_model, server_of
from retain.commands.run import check_examples, start
from retain.config import Recipe, load, parse
from retain.data import read
from retain.data.picture import MAX_PIXELS
from retain.federated.door import Card, Terms, units_of
from retain.federated.flower import Station, deployed, flower
from retain.federated.site import Kept, Site
from retain.federated.split import plan
from retain.files import read_record
from retain.method import Method
from retain.metrics import render, score
from retain.models.base import Model
from retain.plain import real_path
from retain.run.engine import Engine
from retain.run.trainer import Trainer
from retain.stream import Stream, Task
from retain.types import Examples, Joined, RetainError
from retain.values import Name, PathText, fill, ranged

SAID = "retain: "
"""What a line begins with that `retain federate server` shows of a run's log."""

NODE = "retain-site"
"""The key of a SuperNode's configuration that names its site.json."""


def say(text: str) -> None:
    """A line for who waits at the other end of Flower's log."""
    print(f"{SAID}{' '.join(text.split())}", flush=True)  # noqa: T201


# -- the server ------------------------------------------------------------------------------------------------


def server_app(recipe_file: Path) -> Any:
    """Flower's ServerApp for the recipe that lies in the app's folder."""
    flower()
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        try:
            serve(grid, recipe_file, float(context.run_config["wait"]))
        except RetainError as error:
            say(f"error: {error}")
            raise

    return app


def serve(grid: Any, recipe_file: Path, wait: float, poll: float = 1.0) -> None:
    """Run the recipe over a grid, or continue it. `wait`: seconds in which the clients must come."""
    given = read_record(recipe_file, "recipe", "path")
    recipe = parse(given["recipe"], Path(given["path"]))

    def federate(recipe: Recipe, stream: Stream, method: Method, model: Model) -> Trainer:
        spec = recipe.federated
        assert spec is not None
        server = server_of(spec, method)
        server.check(method)
        units = units_of(plan(spec, stream)[0])
        terms = Terms(version("retain"), agreed(recipe, server), model.fingerprint(), units)
        say(f"waits for {spec.clients} clients")
        return deployed(
            grid, spec, server, stream, recipe.out, terms, agreement(recipe, server), wait=wait, say=say, poll=poll,
        )  # fmt: skip

    matrix, _ = start(recipe, quiet=True, federate=federate)
    for name, value, *_ in render.metric_rows(matrix.metrics())[1:]:
        if value:
            say(f"{name}: {value}")
    say(f"done: {recipe.out}")


# -- a site ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A site's training rows of one task, or of one group of tasks. Files are relative to the site's YAML."""

    train: PathText
    image_root: PathText | None = None


@ranged("site")
@dataclass(frozen=True)
class SiteSpec:
    """A site's YAML: its rows by task, where its pictures are, and its name unless the command gives one."""

    tasks: dict[str, Rows]
    name: Name | None = None
    image_root: PathText = "."
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class SiteFile:
    """site.json: what `retain federate client` checked and a ClientApp begins with."""

    client: str
    site: str
    recipe: str
    overrides: list[str]
    data: str
    keep: str
    base: str = ""
    rows: dict[str, int] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @staticmethod
    def load(path: Path) -> SiteFile:
        """From a file."""
        return fill(SiteFile, read_record(path, "client", "recipe", "data", "keep"), str(path))


@dataclass
class Workplace:
    """A site's recipe, rows and model, each made when it is asked for."""

    file: SiteFile

    @cached_property
    def recipe(self) -> Recipe:
        """The site's own recipe."""
        recipe = load(self.file.recipe, self.file.overrides)
        if recipe.federated is None:
            raise RetainError(
                f"{recipe.path}: it has no `federated:` block, so there is nothing to take part in"
            )
        return recipe

    @cached_property
    def method(self) -> Method:
        """The client half."""
        method = build_method(self.recipe)
        return server_of(self._spec, method).client(method)

    @cached_property
    def model(self) -> Model:
        """The base model with the recipe's adapters."""
        return build_model(self.recipe)

    @property
    def _spec(self) -> Any:
        return self.recipe.federated

    def agreed(self) -> dict[str, str]:
        """What the server must have alike."""
        return agreed(self.recipe, server_of(self._spec, build_method(self.recipe)))

    def rows(self, name: str) -> Examples:
        """The rows under a name of the site's YAML; none where it has none."""
        spec, where = self._data
        if name not in spec.tasks:
            return ()
        given = spec.tasks[name]
        root = where / Path(given.image_root or spec.image_root).expanduser()
        return read.examples(where / Path(given.train).expanduser(), root, max_pixels=spec.max_pixels)

    @cached_property
    def _data(self) -> tuple[SiteSpec, Path]:
        return site_spec(Path(self.file.data)), Path(self.file.data).resolve().parent

    def counted(self) -> dict[str, int]:
        """Rows by name. Every row is read, and asked of the model whether it fits. RetainError with file and row."""
        tasks = [Task(n, self.rows(n), (), score("exact")) for n in self._data[0].tasks]
        for task in tasks:
            if not len(task.train):
                raise RetainError(
                    f"{self.file.data}: tasks.{task.name}: {self._data[0].tasks[task.name].train} has no row"
                )
        check_examples(self.model, Stream("site", tuple(tasks)), self.recipe.optim.turns)
        return {t.name: len(t.train) for t in tasks}

    def card(self) -> Card:
        """What the site says of itself."""
        f = self.file
        return Card(f.client, f.site, version("retain"), self.agreed(), f.base, f.rows, time.time())

    def site(self, run: str, units: Mapping[str, tuple[str, ...]]) -> Site:
        """The client's half of a run; what it keeps is in a folder by the run's id."""
        if not run.isalnum():
            raise RetainError(f"client {self.file.client!r}: {run!r:.40} is no id of a run")

        def rows_of(unit: str) -> Examples:
            names = [n for n in dict.fromkeys([unit, *units.get(unit, ())]) if n in self._data[0].tasks]
            parts = [self.rows(n) for n in names[: 1 if unit in names else None]]
            return parts[0] if len(parts) == 1 else Joined(*parts)

        server = server_of(self._spec, self.method)
        engine = Engine.start(self.recipe.model.device)
        return Site(
            self.file.client, self.model, self.method, server, self.recipe.optim, rows_of,
            Kept(Path(self.file.keep) / f"run-{run}"), engine, agreement(self.recipe, server),
        )  # fmt: skip


def site_spec(path: Path) -> SiteSpec:
    """A site's YAML. RetainError for one that is not there, or says something else."""
    from retain.plain import plain, read_small, read_yaml

    file = real_path(path, "--data")
    if not file.is_file():
        raise RetainError(f"--data: no such file {file}")
    spec = fill(
        SiteSpec, plain(read_yaml(read_small(file, "a site's YAML"), str(file)), str(file)), str(file)
    )
    if not spec.tasks:
        raise RetainError(
            f"{file}: tasks: there is none; name a file of rows for each task that this site has"
        )
    return spec


def client_app() -> Any:
    """Flower's ClientApp for the site that the SuperNode's configuration names."""
    app = flower()
    from flwr.clientapp import ClientApp

    made = ClientApp()

    def answer(message: Any, context: Any) -> Any:
        place = context.node_config.get(NODE)
        if not isinstance(place, str):
            raise RetainError(f"this SuperNode has no {NODE}; start it with `retain federate client`")
        work = Workplace(SiteFile.load(Path(place)))
        station = Station(work.card, work.site, say)
        return app.Message(station.answered(message.content), reply_to=message)

    made.query()(answer)
    made.train()(answer)
    return made
