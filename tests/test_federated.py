"""Federated runs: laws of servers and rounds, faults, and the same bytes after a kill."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fake_model import FakeModel, stream
from retain.adapters.lora import LoraSpec
from retain.federated import server as servers
from retain.federated.local import Tamper, federation
from retain.federated.message import Message
from retain.federated.spec import FederatedSpec
from retain.method import REGISTRY, Context, Method, build
from retain.metrics.stages import last_and_avg
from retain.report.federated import stages_of
from retain.report.html import write_report
from retain.report.load import load_runs
from retain.run import continual
from retain.run.continual import run
from retain.run.store import RunDir
from retain.run.train import Optim
from retain.types import RetainError

OPTIM = Optim(lr=2e-2, steps=3, batch_size=4, warmup=0.0, log_every=1)
SPEC = LoraSpec(rank=2, alpha=4.0, dropout=0.1)
METHODS: dict[str, Any] = {
    "lora": "lora",
    "o_lora": {"o_lora": {"weight": 0.1}},
    "ewc": ["lora", {"ewc": {"n_samples": 4}}],
    "lwf": ["lora", "lwf"],
    "replay": ["lora", {"replay": {"size": 5}}],
    "gpm": ["lora", {"gpm": {"threshold": 0.6, "n_samples": 4}}],
    "disco": {"disco": {"tau": 0.8}},
    "all": ["lora", "lwf", {"ewc": {"n_samples": 3}}, {"replay": {"size": 5}}],
}
SERVERS = [
    "fedavg",
    "fedprox",
    "scaffold",
]  # those whose clients differ; all rules: test_federated_servers.py


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(continual, "environment", dict)
        yield


def go(
    path: Path,
    method: Any = "lora",
    server: Any = None,
    tamper: Tamper | None = None,
    optim: Optim = OPTIM,
    stop: Callable[[], bool] | None = None,
    **spec: Any,
) -> RunDir:
    """A federated run of the small stream, or its continuation."""
    made, model, tasks = build(method), FakeModel(SPEC), stream()
    chosen = servers.build(server or ("disco" if "disco" in str(method) else "fedavg"))
    given: dict[str, Any] = {"clients": 3, "per_round": 2, "rounds": 2, "skew": "even", **spec}
    trainer = federation(FederatedSpec(**given), chosen, tasks, path / "clients", tamper=tamper)
    store = RunDir.open(path, {"x": 1})
    run(model, tasks, made, optim, store, trainer=trainer)
    return store


def central(path: Path, method: Any = "lora", optim: Optim = OPTIM) -> RunDir:
    store = RunDir.open(path, {"x": 1})
    run(FakeModel(SPEC), stream(), build(method), optim, store)
    return store


def last(store: RunDir) -> dict[str, dict[str, Tensor]]:
    """The adapters at the end."""
    model, row = FakeModel(SPEC), store.rows()[-1]
    row.load_model(model.adapters, None)
    return {n: model.adapters.state(n) for n in model.adapters.names}


def files(store: RunDir) -> dict[str, bytes]:
    """Everything that a run says of its models and answers, without times."""
    names = ("*.safetensors", "bank.json", "method.json", "*.jsonl")
    found = sorted(p for n in names for p in (store.path / "rows").rglob(n))
    return {str(p.relative_to(store.path)): p.read_bytes() for p in found}


def events(store: RunDir, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (store.path / "events.jsonl").read_text().splitlines()]
    return [e for e in lines if e["kind"] == kind]


# -- laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m != "gpm"])
def test_one_client_with_one_round_is_the_central_run(method: str, tmp_path: Path) -> None:
    fed = go(tmp_path / "fed", METHODS[method], clients=1, per_round=1, rounds=1)
    alone = central(tmp_path / "central", METHODS[method])
    there, here = last(alone), last(fed)
    assert list(there) == list(here)
    for name, state in there.items():
        for key, tensor in state.items():
            if method == "disco" and key.startswith("projector"):
                continue  # one for all subspaces there, and only the newest's is read here
            assert torch.equal(tensor, here[name][key]), (name, key)
    for task in stream():
        answers = [p["prediction"] for p in alone.rows()[-1].answers(task.name)]
        assert [p["prediction"] for p in fed.rows()[-1].answers(task.name)] == answers


@pytest.mark.parametrize("method", METHODS)
def test_a_federated_run_of_each_method_ends(method: str, tmp_path: Path) -> None:
    store = go(tmp_path / "fed", METHODS[method])
    assert store.done and len(events(store, "round")) == 2 * len(stream())
    assert not events(store, "client_left_out")


class Killed(BaseException):
    """As SIGKILL: nothing of ours runs after it."""


@pytest.mark.parametrize("method", ["all", "disco"])
@pytest.mark.parametrize("after", [3, 7])
def test_a_killed_run_ends_with_the_same_bytes(method: str, after: int, tmp_path: Path) -> None:
    whole = go(tmp_path / "whole", METHODS[method])
    calls = [0]

    def kill(client: str, data: bytes, work: Callable[[], bytes]) -> bytes:
        calls[0] += 1
        reply = work()
        if calls[0] == after:
            raise Killed
        return reply

    with pytest.raises(Killed):
        go(tmp_path / "cut", METHODS[method], tamper=kill)
    again = go(tmp_path / "cut", METHODS[method])
    assert files(whole) == files(again)


# -- laws of servers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
def test_permuting_clients_changes_nothing(server: str, tmp_path: Path) -> None:
    """Their order in a round decides no more than the last bits of a sum."""

    def backwards(self: Any, calls: Any) -> Any:
        replies = [(c, self._work(c, d)()) for c, d in calls]
        yield from reversed(replies)

    one = last(go(tmp_path / "one", server=server, per_round=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retain.federated.local.InProcess.ask", backwards)
        two = last(go(tmp_path / "two", server=server, per_round=3))
    for name, state in one.items():
        for key, tensor in state.items():
            assert torch.allclose(tensor, two[name][key], atol=1e-6), (name, key)


def test_off_is_fedavg(tmp_path: Path) -> None:
    wanted = files(go(tmp_path / "avg"))
    assert files(go(tmp_path / "prox", server={"fedprox": {"mu": 0.0}})) == wanted
    assert files(go(tmp_path / "prox2", server={"fedprox": {"mu": 10.0}})) != wanted


def test_disco_with_one_subspace_is_fedavg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tau = -1: every client trains the first one, and its weight is 1."""
    draw = Context.rng
    monkeypatch.setattr(Context, "rng", lambda self, who: draw(self, "lora" if who == "disco" else who))
    (a,), (b,) = (
        last(go(tmp_path / "avg")).values(),
        last(go(tmp_path / "disco", {"disco": {"tau": -1.0}})).values(),
    )
    for key, tensor in a.items():
        assert torch.equal(tensor, b[key]), key


# -- faults ----------------------------------------------------------------------------------------------------


def spoil(
    who: str,
    how: Callable[[bytes, Message], bytes | str],
    when: Callable[[dict[str, Any]], bool] | None = None,
) -> Tamper:
    """One client's answers, changed."""

    def tamper(client: str, data: bytes, work: Callable[[], bytes]) -> bytes | str:
        head = Message.from_bytes(data, "server").head
        if client != who or head["kind"] != "train" or (when and not when(dict(head))):
            return work()
        return how(data, Message.from_bytes(work(), client))

    return tamper


def changed(message: Message, each: Callable[[Tensor], Tensor], **head: Any) -> bytes:
    return Message({**message.head, **head}, {k: each(t) for k, t in message.tensors.items()}).to_bytes()


FAULTS: dict[str, tuple[Callable[[bytes, Message], bytes | str], str]] = {
    "silent": (lambda d, m: "no answer within 3600 s", "no answer"),
    "nan": (lambda d, m: changed(m, lambda t: t * float("nan")), "is not finite"),
    "shape": (lambda d, m: changed(m, lambda t: t[:1]), "has shape"),
    "missing": (lambda d, m: Message(m.head, dict(list(m.tensors.items())[1:])).to_bytes(), "missing"),
    "more": (lambda d, m: Message(m.head, {**m.tensors, "w/x": torch.ones(1)}).to_bytes(), "not asked for"),
    "base": (lambda d, m: changed(m, lambda t: t, base="another"), "another base model"),
    "recipe": (lambda d, m: changed(m, lambda t: t, recipe="another"), "another recipe"),
    "scaled": (lambda d, m: changed(m, lambda t: t * 1000), "times as large"),
    "old": (lambda d, m: changed(m, lambda t: t, round=m.head["round"] - 1), "an old round"),
    "other": (lambda d, m: changed(m, lambda t: t, client="client-01"), "signs as another"),
    "noise": (lambda d, m: b"\x00" * 100, "no words"),
    "text": (lambda d, m: b"GET / HTTP/1.1", "no safetensors"),
    "torn": (lambda d, m: m.to_bytes()[:-8], "cannot be read"),
    "stats": (lambda d, m: changed(m, lambda t: t, stats={"steps": -1}), "what its fit took"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_goes_on_without_who_fails(fault: str, tmp_path: Path) -> None:
    how, why = FAULTS[fault]
    store = go(tmp_path / "run", per_round=3, tamper=spoil("client-00", how))
    left = events(store, "client_left_out")
    assert {e["client"] for e in left} == {"client-00"} and len(left) == 2 * len(stream())
    assert all(why in e["why"] for e in left), left[0]["why"]
    assert all(set(e["clients"]) == {"client-01", "client-02"} for e in events(store, "round"))
    alone = go(
        tmp_path / "two", per_round=3, tamper=lambda c, d, work: "away" if c == "client-00" else work()
    )
    assert files(store) == files(alone)


def test_a_third_of_the_clients_may_drop_out(tmp_path: Path) -> None:
    """Who drops out is drawn; every round is made of the others, and the run ends."""
    rng, gone = random.Random(3), list[str]()

    def tamper(client: str, data: bytes, work: Callable[[], bytes]) -> bytes | str:
        if rng.random() < 0.3:
            gone.append(client)
            return "the connection was lost"
        return work()

    store = go(tmp_path / "run", clients=6, per_round=6, tamper=tamper)
    left = events(store, "client_left_out")
    assert [e["client"] for e in left] == gone and len(gone) > 3
    assert sum(len(e["clients"]) for e in events(store, "round")) + len(gone) == 6 * 2 * len(stream())


def test_what_is_sent_and_received_is_counted_to_the_byte(tmp_path: Path) -> None:
    lengths = [0, 0]

    def watch(client: str, data: bytes, work: Callable[[], bytes]) -> bytes:
        reply = work()
        lengths[0], lengths[1] = lengths[0] + len(data), lengths[1] + len(reply)
        return reply

    store = go(tmp_path / "run", METHODS["ewc"], tamper=watch)  # with messages at a stage's end
    budget = store.rows()[-1].budget()
    assert (budget["sent_bytes"], budget["received_bytes"]) == tuple(lengths)


def test_bfloat16_travels_as_it_is() -> None:
    sent = {
        "w/a": torch.randn(3, 2).bfloat16(),
        "w/b": torch.ones(2, dtype=torch.float16),
        "w/c": torch.tensor(3),
    }
    there = Message.from_bytes(Message({"kind": "train"}, sent).to_bytes(), "a client").tensors
    assert {k: t.dtype for k, t in there.items()} == {k: t.dtype for k, t in sent.items()}
    assert all(torch.equal(t, sent[k]) for k, t in there.items())


def test_a_stage_of_several_tasks_is_scored_by_stage(tmp_path: Path) -> None:
    """Heterogeneous: the tasks seen so far, and FCIT's Last and Avg of them by hand."""
    store = go(tmp_path / "run", setting="task_het", schedule=[[0, 1], [2, 2]])
    (run,) = load_runs([store.path])
    first, second = stages_of(run)
    names = [t.name for t in stream()]
    assert (first.name, set(first.seen), set(second.seen)) == ("stage-1", set(names[:2]), set(names))
    own = {t: [p["score"] for p in store.rows()[1].answers(t)] for t in names}
    assert first.mean == pytest.approx(sum(sum(own[t]) / len(own[t]) for t in names[:2]) / 2)
    last, avg = last_and_avg([first, second])
    assert (last, avg) == (second.mean, pytest.approx((first.mean + second.mean) / 2))
    assert "Stages and rounds" in write_report([store.path], tmp_path / "r.html").read_text()


def test_an_empty_round_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    away = lambda head: head["stage"] == "letter" and head["round"] == 1  # noqa: E731

    def nobody(client: str, data: bytes, work: Callable[[], bytes]) -> bytes | str:
        return "away" if away(Message.from_bytes(data, "x").head) else work()

    with pytest.raises(
        RetainError, match=r"stage 'letter', round 2 of 2: no client's answer could be used .*away"
    ):
        go(tmp_path / "run", tamper=nobody)
    store = go(tmp_path / "run")
    assert files(store) == files(go(tmp_path / "whole"))


def test_a_method_without_a_federated_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetainError, match="'hide' has no federated form"):
        go(tmp_path / "run", "hide", server="fedavg")
    with pytest.raises(RetainError, match="serves the method 'disco'"):
        go(tmp_path / "run", "lora", server="disco")
    assert not (tmp_path / "run" / "rows").exists()


@dataclass
class Shrinks(Method):
    """Changes the final weights, without state."""

    name: ClassVar[str] = "shrinks"

    def end_task(self, ctx: Context) -> None:
        for p in ctx.model.adapters.trainable().values():
            p.data.mul_(0.5)


def test_weights_that_end_task_changes_are_not_lost_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, "shrinks", Shrinks)
    with pytest.raises(RetainError, match="no client answered at its end"):
        go(tmp_path / "run", ["lora", "shrinks"])
    (why, *_) = {e["why"] for e in events(RunDir.read(tmp_path / "run"), "client_left_out")}
    assert "end_task changes adapters" in why
    monkeypatch.setattr(Shrinks, "ends_alone", True)
    halved, whole = (
        last(go(tmp_path / "alone", ["lora", "shrinks"], rounds=1)),
        last(go(tmp_path / "lora", rounds=1)),
    )
    assert not torch.equal(halved["lora"]["projector.weight"], whole["lora"]["projector.weight"])


ENDINGS: dict[str, tuple[Callable[[Message], bytes], str]] = {
    "nothing": (lambda m: changed(m, lambda t: t, state=None), "cannot be read|another kind"),
    "nan": (lambda m: changed(m, lambda t: t * float("nan")), "is not finite"),
    "shape": (lambda m: changed(m, lambda t: t[:1].clone()), "does not go with the others"),
    "other kind": (lambda m: Message({**m.head, "state": {"$list": []}}, m.tensors).to_bytes(), "cannot be read"),
    "fields": (lambda m: Message({**m.head, "state": {"$dict": []}}, {}).to_bytes(), "another kind|cannot be read"),
    "path": (lambda m: Message({**m.head, "state": {"$path": "/etc/passwd"}}, {}).to_bytes(), "examples or paths"),
    "mix": (lambda m: changed(m, lambda t: t, mix={"weights": {"lora": 2.0}}), "different mixes"),
}  # fmt: skip


def only(kind: str, how: Callable[[Message], bytes]) -> Tamper:
    """What client-00 answers to one kind of message, changed."""

    def tamper(client: str, data: bytes, work: Callable[[], bytes]) -> bytes | str:
        if client != "client-00" or Message.from_bytes(data, "server").head["kind"] != kind:
            return work()
        return how(Message.from_bytes(work(), client))

    return tamper


@pytest.mark.parametrize("fault", ENDINGS)
def test_a_stage_ends_without_whose_state_is_wrong(fault: str, tmp_path: Path) -> None:
    how, why = ENDINGS[fault]
    method = ["lora", {"ewc": {"n_samples": 4}}]
    store = go(tmp_path / "run", method, per_round=3, rounds=1, tamper=only("close", how))
    left = events(store, "client_left_out")
    assert store.done and {e["client"] for e in left} == {"client-00"} and len(left) == len(stream())
    assert all(re.search(why, e["why"]) and e["round"] == "close" for e in left), left[0]["why"]


@pytest.mark.parametrize("how", [lambda t: t[:1].clone(), lambda t: t * float("inf"), lambda t: t[None]])
def test_a_token_that_is_none_is_left_out(how: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    spoilt = only("token", lambda m: changed(m, how))
    store = go(tmp_path / "run", METHODS["disco"], per_round=3, tamper=spoilt)
    assert store.done and all("its token is not" in e["why"] for e in events(store, "client_left_out"))
    assert all(set(e["clients"]) == {"client-01", "client-02"} for e in events(store, "round"))


def test_a_new_subspace_whose_client_drops_out_is_made_again(tmp_path: Path) -> None:
    """tau = 2: a subspace for every client. One is lost in the first round, and the next round has a new one."""

    def lost(client: str, data: bytes, work: Callable[[], bytes]) -> bytes | str:
        head = Message.from_bytes(data, "server").head
        return "lost" if client == "client-00" and (head["kind"], head["round"]) == ("train", 0) else work()

    store = go(tmp_path / "run", {"disco": {"tau": 2.0}}, per_round=3, tamper=lost)
    assert store.done and len(events(store, "client_left_out")) == len(stream())
    assert all("client-00" in e["clients"] for e in events(store, "round") if e["round"] == 2)


def test_no_example_leaves_a_client(tmp_path: Path) -> None:
    """A replay buffer is in the client's folder, and neither in a message nor in a row."""
    sent: list[bytes] = []

    def watch(client: str, data: bytes, work: Callable[[], bytes]) -> bytes:
        sent.extend([data, reply := work()])
        return reply

    store = go(tmp_path / "run", METHODS["replay"], tamper=watch)
    assert any("$example" in p.read_text() for p in (store.path / "clients").rglob("*.json"))
    assert not any(b"$example" in data for data in sent)
    assert not any("$example" in p.read_text() for p in (store.path / "rows").rglob("method.json"))
