"""Flower's own processes on loopback: TLS, authenticated nodes, a SuperLink that is killed; and what is refused first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="the extra `federated` is not installed")

import own_data
from loopback import Loop, certificates, node_key, processes_of, rounds
from retain import config
from retain.commands.federate import split
from retain.commands.run import start

FEDERATED = "federated: {clients: 3, per_round: 2, rounds: 2, skew: even, deadline: 600}\n"


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(tmp_path / "loop", certificates(tmp_path / "certs"))
    try:
        yield made
    finally:
        made.close()


@pytest.mark.slow
def test_three_sites_over_tls_write_what_one_process_writes_also_after_a_kill(
    loop: Loop, tmp_path: Path
) -> None:
    """The server's stream has no train rows; the SuperLink dies in the second round with all that it started."""
    recipe = own_data.shop(tmp_path / "shop", own_data.model_dir(tmp_path / "model"), n_train=12)
    text = recipe.read_text() + FEDERATED
    recipe.write_text(text)
    alone = config.load(recipe, [f"out={tmp_path / 'alone'}"])
    start(alone, quiet=True)
    list(split(alone, tmp_path / "sites"))
    server = recipe.with_name("server.yaml")
    server.write_text("".join(
        line.replace("train: colour_train.json, ", "").replace("train: paint_train.json, ", "")
        for line in text.splitlines(keepends=True)
    ))  # fmt: skip

    loop.link()
    run = tmp_path / "run"
    for i in range(3):
        key = node_key(tmp_path / f"node{i}")
        loop.register(key)
        yaml = str(tmp_path / "sites" / f"client-0{i}.yaml")
        loop.start(f"site{i}", loop.retain("client", str(recipe), "--data", yaml, "--key", str(key)))
    loop.start("server", loop.retain("server", str(server), f"out={run}"))
    loop.until("a round is whole", lambda: len(rounds(run)) == 1, "server", "site0", "site1", "site2")
    loop.kill("link")
    loop.until("the command ends", lambda: loop.children["server"].poll() is not None)
    assert loop.children.pop("server").returncode == 2 and "does not answer any more" in loop.log("server")
    loop.link()
    loop.start("again", loop.retain("server", str(server), f"out={run}"))
    loop.until("the run ends", lambda: loop.children["again"].poll() is not None, "site0", "site1", "site2")
    assert loop.children["again"].returncode == 0, loop.log("again")
    assert [e["round"] for e in rounds(run)] == [1, 2, 1, 2]
    assert "paint, round 2 of 2: loss" in loop.log("again") and "Last: " in loop.log("again")
    compared = 0
    for file in sorted((tmp_path / "alone" / "rows").rglob("*.safetensors")):
        here = load_file(run / file.relative_to(tmp_path / "alone"))
        for key, tensor in load_file(file).items():
            assert torch.allclose(tensor, here[key], atol=1e-6, rtol=0), (file, key)
            compared += 1
    assert compared >= 20
    loop.close()
    loop.until("nothing that was started lives on", lambda: not processes_of(tmp_path))
