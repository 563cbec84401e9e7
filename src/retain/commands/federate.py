"""A federated recipe on Flower: submit it to a SuperLink, or join one as a site.

Flower's own programs do the work (`flwr run`, `flower-supernode`). Here is what can be told before they start, in one
sentence: an address where nobody listens, a certificate of another CA, a key of another kind, rows that cannot be read.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import yaml

from retain import __version__
from retain.assemble import build_method, build_stream, server_of
from retain.commands.flower_app import NODE, SAID, SiteFile, Workplace, site_spec
from retain.commands.superlink import PATIENCE, Link, program, surroundings
from retain.config import Recipe
from retain.federated.flower import flower
from retain.federated.split import make, write_partitions
from retain.files import read_record, write_json, write_text
from retain.plain import prefixed
from retain.types import RetainError

WITH_US = """\
import ctypes, os, sys
try:
    ctypes.CDLL(None).prctl(1, 15)
except (OSError, AttributeError):
    pass
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Becomes the program in its arguments; on Linux it is told to end when we do, also by a kill (PR_SET_PDEATHSIG)."""

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "retain-federated"
version = "{version}"
description = "A federated recipe of retain"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "retain"

[tool.flwr.app.components]
serverapp = "retain_app.server:app"
clientapp = "retain_app.client:app"

[tool.flwr.app.config]
wait = 600.0
"""

SERVER = """\
from pathlib import Path

from retain.commands.flower_app import server_app

app = server_app(Path(__file__).with_name("recipe.json"))
"""

CLIENT = """\
from retain.commands.flower_app import client_app

app = client_app()
"""


# -- the server --------------------------------------------------------------------------------------------------


def serve(recipe: Recipe, link: Link, wait: float) -> None:
    """Submit a run and show what it says until it ends. RetainError where it fails."""
    flower()
    spec = recipe.federated
    if spec is None:
        raise RetainError(f"{recipe.path}: it has no `federated:` block; add one, or use `retain run`")
    method = build_method(recipe)
    server_of(spec, method).check(method)
    recipe = replace(recipe, out=recipe.out.absolute())
    link.reach()
    with TemporaryDirectory(prefix="retain-federate-") as folder:
        home, app = Path(folder) / "home", Path(folder) / "app"
        write_app(app, recipe)
        write_text(home / "config.toml", link.toml())
        run = _submitted(home, app, wait)
        print(f"run {run} on {link.address}: {recipe.out}", flush=True)  # noqa: T201
        try:
            error = _shown(home, run)
        except BaseException:  # told to end: the run ends too, and the same command goes on with it
            with suppress(subprocess.TimeoutExpired):
                _flwr(home, "stop", run, "retain", timeout=3 * PATIENCE)
            raise
        status = _status(home, run)
    if error:
        raise RetainError(error)
    if status == "unknown":
        raise RetainError(
            f"{link.address} does not answer any more; what was saved is kept, and the same command goes on"
        )
    if status != "finished:completed":
        raise RetainError(
            f"run {run} ended as {status}; what was saved is kept, and the same command goes on"
        )


def write_app(folder: Path, recipe: Recipe) -> None:
    """The app that Flower sends around: a project file, the recipe, and two lines for each side."""
    write_text(folder / "pyproject.toml", PROJECT.format(version=__version__))
    package = folder / "retain_app"
    for name, text in {"__init__.py": "", "server.py": SERVER, "client.py": CLIENT}.items():
        write_text(package / name, text)
    write_json(package / "recipe.json", {"path": str(recipe.path.resolve()), "recipe": recipe.resolved()})


def _submitted(home: Path, app: Path, wait: float) -> str:
    done = _flwr(home, "run", str(app), "retain", "--run-config", f"wait={wait:f}", "--format", "json")
    answer: object = None
    with suppress(ValueError):
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    if isinstance(answer, dict) and answer.get("success") and answer.get("run-id"):
        return str(answer["run-id"])
    said = str(answer.get("error-message", "")) if isinstance(answer, dict) else ""
    raise RetainError(
        f"the SuperLink did not take the run: {said or (done.stderr or done.stdout).strip()[-500:]}"
    )


def _shown(home: Path, run: str) -> str:
    """Print what a run says of itself; returns the error that it ended with, or nothing."""
    command = [program("flwr"), "log", run, "retain", "--stream"]
    error = ""
    with _child(command, home) as child:
        assert child.stdout is not None
        for line in child.stdout:
            _, found, text = line.rstrip("\n").partition(SAID)
            if found and text.startswith("error: "):
                error = text.removeprefix("error: ")
            elif found:
                print(text, flush=True)  # noqa: T201
    return error


def _status(home: Path, run: str) -> str:
    done = _flwr(home, "list", "retain", "--run-id", run, "--format", "json")
    try:
        return str(json.loads(done.stdout)["runs"][0]["status"])
    except (ValueError, LookupError, TypeError):
        return "unknown"


def _flwr(home: Path, *words: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    command = [program("flwr"), *words]
    return subprocess.run(
        command, env=surroundings(home), capture_output=True, text=True, check=False, timeout=timeout
    )


@contextmanager
def _child(command: list[str], home: Path) -> Iterator[subprocess.Popen[str]]:
    """A program of Flower's, ended with us; it has a group of its own, so that a signal reaches it from us alone."""
    child = subprocess.Popen(
        [sys.executable, "-c", WITH_US, *command], env=surroundings(home), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(PATIENCE)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, 9)
        child.wait()


# -- a site --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joining:
    """What `retain federate client` was told."""

    recipe: Path
    overrides: list[str]
    data: Path
    link: Link
    name: str | None = None
    key: Path | None = None
    keep: Path | None = None
    port: int | None = None


def join(given: Joining) -> None:
    """Check a site's recipe, rows and model, then be its SuperNode until told to end. RetainError where it cannot."""
    command = program("flower-supernode")
    spec = site_spec(given.data)
    name = given.name or spec.name
    if not name:
        raise RetainError(f"{given.data}: it has no `name`; write one, or give --name")
    check_key(given.key, given.link)
    given.link.reach()
    port = _port(given.port)
    keep = (given.keep or given.data.resolve().parent / f"kept-{name}").absolute()
    with _held(keep):
        old = read_record(keep / "site.json", "site") if (keep / "site.json").is_file() else {}
        file = SiteFile(
            name, str(old.get("site") or uuid4().hex), str(given.recipe.absolute()), list(given.overrides),
            str(given.data.absolute()), str(keep),
        )  # fmt: skip
        work = Workplace(file)
        work.agreed()
        rows = work.counted()
        write_json(keep / "site.json", replace(file, base=work.model.fingerprint(), rows=rows).to_data())
        del work
        told = ", ".join(f"{n} of {task}" for task, n in rows.items())
        print(f"{name}: {told}; joins {given.link.address}", flush=True)  # noqa: T201
        arguments = [
            *given.link.arguments(),
            "--port",
            str(port),
            "--node-config",
            f"{NODE}={_quoted(keep / 'site.json')}",
        ]
        if given.key:
            arguments += ["--auth-supernode-private-key", str(given.key.resolve())]
        _follow([command, *arguments], keep / "flower")


def check_key(key: Path | None, link: Link) -> None:
    """A SuperNode's key is OpenSSH's form of an elliptic curve of NIST, and needs TLS."""
    if key is None:
        return
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    make = f"make one with: ssh-keygen -t ecdsa -b 384 -N '' -f {key}"
    if not key.is_file():
        raise RetainError(f"--key: no such file {key}; {make}")
    if link.insecure:
        raise RetainError(
            "--key: a node shows its key over TLS alone; give --root-certificates instead of --insecure"
        )
    try:
        found = load_ssh_private_key(key.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RetainError(
            f"--key: {key} is no private key of OpenSSH without a passphrase ({error}); {make}"
        ) from None
    if not isinstance(found, EllipticCurvePrivateKey):
        raise RetainError(f"--key: {key} is of another kind than ecdsa; {make}")


def _port(asked: int | None) -> int:
    """The port of the SuperNode's own API on this machine: a free one, or the one that was asked for."""
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", asked or 0))
        except OSError as error:
            raise RetainError(
                f"--port: {asked} is taken on this machine ({error.strerror}); leave it out"
            ) from None
        return int(probe.getsockname()[1])


def _quoted(path: Path) -> str:
    """A path for --node-config, which knows no escapes."""
    mark = "'" if "'" not in str(path) else '"'
    if mark in str(path) or "\\" in str(path):
        raise RetainError(
            f"--keep: {path} has quotes or backslashes, which Flower's configuration cannot hold"
        )
    return f"{mark}{path}{mark}"


@contextmanager
def _held(keep: Path) -> Iterator[None]:
    """The site's folder, for one process at a time."""
    try:
        keep.mkdir(parents=True, exist_ok=True)
        handle = (keep / "lock").open("w")
    except OSError as error:
        raise RetainError(f"--keep: cannot write into {keep}: {error.strerror}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RetainError(
                f"--keep: {keep} is in use; this site runs already, or give another folder"
            ) from None
        yield


def _follow(command: list[str], home: Path) -> None:
    """Show what a SuperNode says until it ends. It ends by itself only where it cannot go on."""
    home.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    with _child(command, home) as child:
        reader = threading.Thread(target=_echo, args=(child, said), daemon=True)
        reader.start()
        child.wait()  # not for the end of its output: what it started holds that open
        reader.join(1.0)
    raise RetainError(f"the SuperNode ended: {_why(said)}")


def _echo(child: subprocess.Popen[str], said: list[str]) -> None:
    assert child.stdout is not None
    with suppress(ValueError):  # closed
        for line in child.stdout:
            print(line, end="", flush=True)  # noqa: T201
            if text := re.sub(r"\x1b\[[0-9;]*m", "", line).strip():
                said.append(text)
                del said[:-200]


def _why(said: list[str]) -> str:
    """What Flower says behind its exit code, or the last lines; and what a site can do about a key."""
    at = [i for i, line in enumerate(said) if "Exit Code:" in line]
    end = [i for i, line in enumerate(said) if line.startswith("For more information")]
    lines = said[at[-1] + 1 : end[-1] if end else at[-1] + 4] if at else said[-3:]
    text = " ".join(lines)[:600]
    known = "[code: 2001]", "[code: 2004]"  # nodes must have keys; this one's is not registered
    if any(k in text for k in known):
        text += (
            " Give a key with --key, and have it registered on the server: flwr supernode register KEY.pub"
        )
    return text or "it said nothing"


# -- trials ----------------------------------------------------------------------------------------------------------


def split(recipe: Recipe, out: Path) -> Iterator[str]:
    """Write every client's rows (`retain.federated.split.write_partitions`) and its YAML; yields what each one has.

    A row is what it was, and so are a picture's pixels: a run of these sites is the run in one process.
    """
    spec = recipe.federated
    if spec is None:
        raise RetainError(f"{recipe.path}: it has no `federated:` block, so there is nothing to split")
    stream = build_stream(recipe)
    made = prefixed(f"{recipe.path}: federated", lambda: make(spec, stream))
    write_partitions(made, stream, out, copy=True)
    for k, client in enumerate(made.clients):
        counts = {u.name: made.counts(u.name)[client] for u in made.units}
        tasks = {
            u.name: {"train": f"Task{s}/client_{k}.json"}
            for s, u in enumerate(made.units, 1)
            if counts[u.name]
        }
        site = yaml.safe_dump({"name": client, "tasks": tasks}, sort_keys=False, allow_unicode=True)
        write_text(out / f"{client}.yaml", site)
        yield f"{out / client}.yaml: {', '.join(f'{n} of {u}' for u, n in counts.items() if n)}"
