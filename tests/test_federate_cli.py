"""`retain federate`: what is wrong is said in one sentence, with exit code 2, before anything long and before a process."""

from __future__ import annotations

import datetime
import fcntl
import io
import json
import os
import socket
import ssl
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import limits

pytest.importorskip("flwr", reason="the extra `federated` is not installed")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from flwr.common.config import parse_config_args
from typer.testing import CliRunner

import own_data
from loopback import certificates, free_port, node_key
from retain import config
from retain.assemble import build_stream
from retain.cli import app
from retain.commands import federate
from retain.commands.flower_app import NODE, SiteFile, Workplace, client_app, serve
from retain.commands.run import start
from retain.commands.superlink import Link
from retain.data.picture import opened
from retain.federated.split import make
from retain.run.store import RunDir
from retain.types import RetainError
from test_federated import events, files
from test_flower import LocalGrid

FEDERATED = "federated: {clients: 3, per_round: 2, rounds: 2, skew: even}\n"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federated recipe of own files, and three sites' files beside it in `sites`."""
    folder = tmp_path_factory.mktemp("shop")
    recipe = own_data.shop(folder, own_data.model_dir(folder / "model"), n_train=9)
    recipe.write_text(recipe.read_text() + FEDERATED)
    list(federate.split(config.load(recipe), folder / "sites"))
    return recipe


@contextmanager
def listening(certs: Path | None) -> Iterator[int]:
    """A server that greets, with TLS or as plain HTTP, and says nothing more."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    plain, _ = server.accept()
                except OSError:
                    return
                with plain:
                    try:
                        if certs:
                            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                            context.load_cert_chain(certs / "server.pem", certs / "server.key")
                            context.wrap_socket(plain, server_side=True).close()
                        else:
                            plain.recv(10)
                            plain.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    except OSError:
                        pass

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.close()


def refused(*words: Any) -> str:
    """The one line that a command says, with exit code 2; no process is started."""
    result = CliRunner().invoke(app, ["federate", *map(str, words)])
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


FOLLOW = federate._follow


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*words: Any, **more: Any) -> Any:
        raise AssertionError(f"a process was started: {words}")

    monkeypatch.setattr(federate, "_follow", started)
    monkeypatch.setattr(federate, "_flwr", started)


# -- the connection ------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_connection(shop: Path, tmp_path: Path) -> None:
    ours, theirs = certificates(tmp_path / "ours"), certificates(tmp_path / "theirs")
    year = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=400)
    future = certificates(tmp_path / "future", now=year)
    (tmp_path / "noise.crt").write_text("no certificate")
    port = free_port()
    here = ("server", shop)
    assert f"127.0.0.1:{port} cannot be reached (Connection refused)" in refused(
        *here, "--superlink", f"127.0.0.1:{port}", "--insecure"
    )
    for bad in ("localhost", "localhost:", "localhost:0", ":80", "http://x"):
        assert "write host:port" in refused(*here, "--superlink", bad, "--insecure"), bad
    with listening(ours) as tls:
        at = ("--superlink", f"127.0.0.1:{tls}")
        said = refused(*here, *at, "--root-certificates", theirs / "ca.crt")
        assert f"is not one that {theirs}/ca.crt vouches for (" in said and "clock" not in said
        assert "is not one that this machine vouches for" in refused(*here, *at)
        assert "speaks TLS; give its CA with --root-certificates" in refused(*here, *at, "--insecure")
        assert "no such file" in refused(*here, *at, "--root-certificates", tmp_path / "nothing")
        assert "holds no certificate in PEM" in refused(
            *here, *at, "--root-certificates", tmp_path / "noise.crt"
        )
        both = refused(*here, *at, "--insecure", "--root-certificates", ours / "ca.crt")
        assert "leave out --root-certificates" in both
        Link("127.0.0.1", tls, ours / "ca.crt", False).reach()
    with listening(future) as tls:
        said = refused(*here, "--superlink", f"127.0.0.1:{tls}", "--root-certificates", future / "ca.crt")
        assert "is this machine's clock right?" in said
    with listening(None) as plain:
        at = ("--superlink", f"127.0.0.1:{plain}")
        assert "speaks no TLS" in refused(*here, *at, "--root-certificates", ours / "ca.crt")
        Link("127.0.0.1", plain, None, True).reach()


def test_what_is_wrong_with_a_node(shop: Path, tmp_path: Path) -> None:
    site = shop.parent / "sites" / "client-00.yaml"
    other = tmp_path / "ed"
    other.write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    ))  # fmt: skip
    (tmp_path / "noise").write_text("no key")
    with listening(certificates(tmp_path / "certs")) as tls, listening(None) as plain:
        trust = ("--root-certificates", tmp_path / "certs" / "ca.crt")
        here = (
            "client",
            shop,
            "--data",
            site,
            "--keep",
            tmp_path / "kept",
            "--superlink",
            f"127.0.0.1:{tls}",
            *trust,
        )
        assert "no such file" in refused(*here, "--key", tmp_path / "nothing")
        assert "of another kind than ecdsa" in refused(*here, "--key", other)
        assert "is no private key of OpenSSH" in refused(*here, "--key", tmp_path / "noise")
        without = ("client", shop, "--data", site, "--superlink", f"127.0.0.1:{plain}", "--insecure")
        assert "over TLS alone" in refused(*without, "--key", node_key(tmp_path / "good"))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert f"--port: {port} is taken on this machine" in refused(*here, "--port", port)
        (tmp_path / "kept").mkdir()
        with (tmp_path / "kept" / "lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert "is in use; this site runs already" in refused(*here)
        (tmp_path / "file").write_text("")
        assert "is no folder" in refused(*here[:4], "--keep", tmp_path / "file", *here[6:])


# -- data and recipe ---------------------------------------------------------------------------------------------


SITES: dict[str, tuple[str, str]] = {
    "key": ("name: a\ntask: {}\n", "no key 'task'; did you mean 'tasks'?"),
    "no tasks": ("name: a\ntasks: {}\n", "tasks: there is none"),
    "no name": ("tasks: {colour: {train: colour.json}}\n", "it has no `name`; write one, or give --name"),
    "no file": ("name: a\ntasks: {colour: {train: nothing.json}}\n", "nothing.json: no such file"),
    "no row": ("name: a\ntasks: {colour: {train: empty.json}}\n", "tasks.colour: empty.json has no row"),
    "bad row": ("name: a\ntasks: {colour: {train: bad.json}}\n", "bad.json, row 1: fields"),
    "no train": ("name: a\ntasks: {colour: {test: x}}\n", "tasks.colour"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SITES)
def test_what_is_wrong_with_a_sites_rows(fault: str, shop: Path, tmp_path: Path) -> None:
    text, why = SITES[fault]
    (tmp_path / "site.yaml").write_text(text)
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "bad.json").write_text('[{"x": 1}]')
    with listening(None) as plain:
        at = ("--superlink", f"127.0.0.1:{plain}", "--insecure")
        said = refused("client", shop, "--data", tmp_path / "site.yaml", *at)
    assert why in said and str(tmp_path) in said, said


def test_what_is_wrong_with_a_recipe(shop: Path, tmp_path: Path) -> None:
    central = tmp_path / "central.yaml"
    central.write_text(shop.read_text().replace(FEDERATED, ""))
    site = shop.parent / "sites" / "client-00.yaml"
    with listening(None) as plain:
        at = ("--superlink", f"127.0.0.1:{plain}", "--insecure")
        assert "it has no `federated:` block" in refused("server", central, *at)
        assert "it has no `federated:` block" in refused("client", central, "--data", site, *at)
        assert "'hide' has no federated form" in refused("server", shop, "method=hide", *at)
        assert "no such file" in refused("client", shop, "--data", tmp_path / "nothing.yaml", *at)
    assert "it has no `federated:` block" in refused("split", central, "--out", tmp_path / "x")
    assert "is not empty; choose another folder" in refused("split", shop, "--out", shop.parent)


def test_a_recipe_without_train_rows_is_for_a_server(shop: Path, tmp_path: Path) -> None:
    bare = shop.with_name("bare.yaml")
    bare.write_text(shop.read_text().replace("train: colour_train.json, ", ""))
    result = CliRunner().invoke(app, ["run", str(bare), f"out={tmp_path / 'run'}"])
    assert result.exit_code == 2 and "task 'colour' has no train rows here" in result.output
    assert not (tmp_path / "run").exists()
    assert len(build_stream(config.load(bare))[0].train) == 0


@pytest.mark.parametrize("command", ["server", "client"])
def test_without_the_extra_its_name_is_said(
    command: str, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    more = ["--data", shop.parent / "sites" / "client-00.yaml"] if command == "client" else []
    assert "pip install 'retain[federated]'" in refused(
        command, shop, *more, "--superlink", "127.0.0.1:1", "--insecure"
    )


# -- what goes right -----------------------------------------------------------------------------------------------


def test_a_site_says_what_it_has_and_keeps_its_id(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that would be followed names site.json, from which a ClientApp makes the same card."""
    followed: list[list[str]] = []
    monkeypatch.setattr(federate, "_follow", lambda command, home: followed.append(command))
    site, keep = shop.parent / "sites" / "client-01.yaml", tmp_path / "it's kept"
    with listening(None) as plain:
        words = ["client", str(shop), "--data", str(site), "--superlink", f"127.0.0.1:{plain}", "--insecure"]
        words += ["--keep", str(keep)]
        for _ in range(2):
            result = CliRunner().invoke(app, ["federate", *words])
            assert result.exit_code == 0, result.output
    assert f"client-01: 3 of colour, 3 of paint; joins 127.0.0.1:{plain}" in result.output
    assert f'retain-site="{keep}/site.json"' in followed[0]
    config_of = parse_config_args([followed[0][followed[0].index("--node-config") + 1]])
    file = SiteFile.load(Path(config_of["retain-site"]))
    card = Workplace(file).card()
    assert (card.client, card.rows) == (
        "client-01",
        {"colour": 3, "paint": 3},
    ) and card.base == file.base != ""
    assert len(followed) == 2 and json.loads((keep / "site.json").read_text())["site"] == file.site


def test_a_split_is_what_the_sites_read(shop: Path) -> None:
    """Row for row and pixel for pixel, from the folder of each client."""
    recipe = config.load(shop)
    stream = build_stream(recipe)
    assert recipe.federated is not None
    made = make(recipe.federated, stream)
    for k, client in enumerate(made.clients):
        work = Workplace(
            SiteFile(client, "x", str(shop), [], str(shop.parent / "sites" / f"{client}.yaml"), "k")
        )
        for unit in made.units:
            wanted, found = made.examples(unit.name, client, stream), work.rows(unit.name)
            assert [(e.id, e.messages, e.targets) for e in found] == [
                (e.id, e.messages, e.targets) for e in wanted
            ], k
            for a, b in zip(found, wanted, strict=True):
                assert a.images and len(a.images) == len(b.images)
                for x, y in zip(a.images, b.images, strict=True):
                    assert np.array_equal(np.asarray(opened(x, "a")), np.asarray(opened(y, "b")))


def test_a_node_that_is_not_let_in_ends_with_its_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its helper process lives on and holds its output: it is ended, and not waited for."""
    node = tmp_path / "node.py"
    node.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('Starting Flower SuperNode')\n"
        "print('\\x1b[91mERROR \\x1b[0m:     Exit Code: 305')\n"
        "print('Failed to initialize the connection to the SuperLink.\\n[code: 2004] Failed to activate SuperNode.')\n"
        "print('\\nFor more information, visit: <x>\\nINFO:     Shutting down')\n"
        "sys.exit(1)\n"
    )
    with pytest.raises(RetainError) as error:
        FOLLOW([sys.executable, str(node)], tmp_path / "home")
    assert str(error.value) == (
        "the SuperNode ended: Failed to initialize the connection to the SuperLink. [code: 2004] Failed to activate "
        "SuperNode. Give a key with --key, and have it registered on the server: flwr supernode register KEY.pub"
    )
    assert "Starting Flower SuperNode" in capfd.readouterr().out
    helper = int((tmp_path / "pid").read_text())
    limits.until(lambda: not _lives(helper), limits.CASE, "CASE", lambda: "the helper of the node lives on")


def _lives(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text() and Path(f"/proc/{pid}").exists()
    except OSError:
        return False


def test_the_two_apps_write_what_one_process_writes(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app that is sent around, with each site's own site.json; the second run finds nothing of the first one's."""
    monkeypatch.setattr(federate, "_follow", lambda command, home: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    changes = ["method=[lora, {replay: {size: 3}}]", "optim.steps=1", "federated.rounds=1"]
    with listening(None) as plain:
        link = Link("127.0.0.1", plain, None, True)
        for k in range(3):
            site = shop.parent / "sites" / f"client-0{k}.yaml"
            federate.join(federate.Joining(shop, changes, site, link, keep=tmp_path / f"kept{k}"))
    net = LocalGrid({10 + k: client_app() for k in range(3)})
    for k in range(3):
        net.contexts[10 + k].node_config[NODE] = str(tmp_path / f"kept{k}" / "site.json")
    for seed in range(2):
        given = [*changes, f"seed={seed}"]
        start(config.load(shop, [*given, f"out={tmp_path / f'alone{seed}'}"]), quiet=True)
        federate.write_app(
            tmp_path / f"app{seed}", config.load(shop, [*given, f"out={tmp_path / f'run{seed}'}"])
        )
        serve(net, tmp_path / f"app{seed}" / "retain_app" / "recipe.json", wait=0.0, poll=0.01)
        there, alone = (RunDir.read(tmp_path / f"{name}{seed}") for name in ("run", "alone"))
        assert files(there) == files(alone) and not events(there, "client_left_out")
    kept = {p.parent.name for p in tmp_path.glob("kept*/run-*/*.json")}
    assert len(kept) == 2 and all("$example" in p.read_text() for p in tmp_path.glob("kept*/run-*/*.json"))


def test_the_app_that_is_sent_is_one_that_flower_takes(shop: Path, tmp_path: Path) -> None:
    """By Flower's own checks of the project file and its build of the bundle; it holds the recipe and no rows."""
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    federate.write_app(tmp_path / "app", config.load(shop))
    made, warnings = load_and_validate(tmp_path / "app" / "pyproject.toml")
    assert made["tool"]["flwr"]["app"]["config"] == {"wait": 600.0} and not warnings
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path / "app"))) as bundle:
        names = {n for n in bundle.namelist() if n.startswith("retain_app/")}
    assert names == {f"retain_app/{n}" for n in ("__init__.py", "server.py", "client.py", "recipe.json")}
