"""Laws of the servers: what K answers become. Runs with clients, rounds and faults are in test_federated.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import federated as reference
from retain.federated import privacy, rules
from retain.federated import server as servers
from retain.federated.message import Message, Spooled
from retain.federated.server import ClientInfo, Crowd, Server, ServerState, Update, blocks
from retain.federated.servers.scaffold import Control
from retain.method import Method, build
from retain.order import arranged
from retain.run.states import load_state, save_state
from retain.types import RetainError
from test_federated import (
    _quick,  # noqa: F401  a fixture
    changed,
    events,
    files,
    go,
    spoil,
)

ALL = [n for n in servers.known() if n != "disco"]
SHAPES = {"lora/a.lora_A": (2, 5), "lora/a.lora_B": (4, 2), "lora/p.weight": (3, 4), "lora/p.bias": (3,)}
ROBUST: dict[str, Any] = {"median": {}, "trimmed_mean": {"share": 0.3}, "krum": {"byzantine": 3}}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(seed: int, size: float = 1.0, base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    drawn = {k: size * noise(*s, seed=seed * 100 + i) for i, (k, s) in enumerate(SHAPES.items())}
    return drawn if base is None else {k: t + drawn[k] for k, t in base.items()}


class Desk:
    """Answers as the coordinator keeps them: files of which a server reads what it wants."""

    def __init__(self, path: Path) -> None:
        self.path, self.n = path, 0

    def update(
        self, client: str, n: int, weights: dict[str, Tensor], **channels: dict[str, Tensor]
    ) -> Update:
        flat = {f"w/{k}": t for k, t in weights.items()}
        flat |= {f"w/{c}@{k}": t for c, found in channels.items() for k, t in found.items()}
        self.n += 1
        file = self.path / f"{self.n}.safetensors"
        file.write_bytes(Message({"client": client}, flat).to_bytes())
        return Update(client, n, Spooled(file))

    def updates(self, given: Sequence[dict[str, Tensor]], n: Sequence[int] | None = None) -> list[Update]:
        rows = n or [1] * len(given)
        controls = {k: torch.zeros(s) for k, s in SHAPES.items()}
        return [
            self.update(f"c{i}", r, g, control=controls)
            for i, (g, r) in enumerate(zip(given, rows, strict=True))
        ]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


CTX: Any = SimpleNamespace(rng=lambda who: torch.Generator().manual_seed(5))
START = tensors(999)


def placed(server: Server, state: ServerState, names: Sequence[str]) -> ServerState:
    crowd = Crowd(4 * len(names), len(names), len(names))
    return server.place(state, [ClientInfo(n, 1, None, crowd) for n in names], CTX)[0]


def after(server: Server, updates: Sequence[Update], state: ServerState | None = None) -> ServerState:
    state = placed(server, state or ServerState(START), [u.client for u in updates])
    return server.aggregate(state, updates)


def close(a: ServerState, b: ServerState | dict[str, Tensor], **how: Any) -> None:
    wanted = b.weights if isinstance(b, ServerState) else b
    for key, tensor in wanted.items():
        torch.testing.assert_close(a.weights[key], tensor, **{"rtol": 1e-5, "atol": 1e-6, **how})


# -- laws of all servers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_identical_clients_are_one_client(name: str, desk: Desk) -> None:
    server, x = servers.build(name), tensors(1, 0.1, START)
    one, many = after(server, desk.updates([x])), after(server, desk.updates([x] * 5))
    close(many, one)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_answers_changes_nothing(name: str, desk: Desk) -> None:
    server = servers.build(name)
    updates = desk.updates([tensors(i, 0.1, START) for i in range(6)], [3, 1, 4, 1, 5, 9])
    mixed = [updates[i] for i in (4, 2, 0, 5, 1, 3)]
    one, two = after(server, updates), after(server, mixed)
    if name == "svd_avg":  # the same products; in other factors, where the answer's rank is below the mean's
        a, b = (s.weights["lora/a.lora_B"] @ s.weights["lora/a.lora_A"] for s in (one, two))
        torch.testing.assert_close(a, b)
    else:
        close(two, one, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_a_state_that_was_saved_goes_on_as_if_it_had_not_been(name: str, desk: Desk, tmp_path: Path) -> None:
    server = servers.build(name)
    first, second = (desk.updates([tensors(i + r, 0.1, START) for i in range(3)]) for r in (0, 10))
    state = after(server, first)
    save_state(tmp_path / "s", {"weights": dict(state.weights), "memory": dict(state.memory)})
    loaded = ServerState(**load_state(tmp_path / "s"))
    one, two = after(server, second, state), after(server, second, loaded)
    for key, tensor in one.weights.items():
        assert torch.equal(tensor, two.weights[key])
    assert server.told(one) == server.told(two)


@pytest.mark.parametrize("name", ALL)
def test_the_state_that_it_was_given_is_left_as_it_is(name: str, desk: Desk) -> None:
    """A round that fails after it must leave the round before."""
    server = servers.build(name)
    state = after(server, desk.updates([tensors(i, 0.1, START) for i in range(3)]))
    kept = {k: t.clone() for k, t in state.weights.items()}
    memory = repr(state.memory)
    after(server, desk.updates([tensors(i + 10, 0.1, START) for i in range(3)]), state)
    assert all(torch.equal(t, kept[k]) for k, t in state.weights.items()) and repr(state.memory) == memory


OFF: dict[str, dict[str, Any]] = {
    "fedprox": {"mu": 0.0},
    "fedavgm": {"lr": 1.0, "momentum": 0.0},
    "clipped": {"bound": 1e9},
    "scaffold": {},
    "trimmed_mean": {"share": 0.0},
    "krum": {"byzantine": 0, "keep": 5},
    "fedadam": {"lr": 2e6, "tau": 1e6, "beta1": 0.0, "beta2": 0.999999},
    "fedyogi": {"lr": 2e6, "tau": 1e6, "beta1": 0.0, "beta2": 0.999999},
    "fedadagrad": {"lr": 2e6, "tau": 1e6},
}


@pytest.mark.parametrize("name", OFF)
def test_at_its_limit_a_server_is_fedavg(name: str, desk: Desk) -> None:
    """Robust ones count clients alike: equal rows. The adaptive ones divide by sqrt(v) + tau = 2 tau there."""
    rows = None if name in ("trimmed_mean", "krum") else [3, 1, 4, 1, 5]
    given = [tensors(i, 0.1, START) for i in range(5)]
    updates = desk.updates(given, rows)
    found = after(servers.build({name: OFF[name]}), updates)
    n = rows or [1] * 5
    for key, x in found.weights.items():
        want = reference.mean([g[key].flatten().tolist() for g in given], n)
        torch.testing.assert_close(x.flatten(), torch.tensor(want), rtol=1e-5, atol=1e-5)


# -- server optimisers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_moments_last_through_a_stage(name: str, desk: Desk) -> None:
    """Four rounds of one number against the paper's recursion."""
    server, key, x = servers.build({name: {"lr": 0.02}}), "lora/x.weight", 1.0
    state, found, shifts = ServerState({key: torch.tensor([x])}), [], [0.3, -0.02, 1e-4, -0.7]
    for r, shift in enumerate(shifts):
        now = state.weights[key]
        ups = [
            desk.update(f"{c}-{r}", n, {key: now + d})
            for c, n, d in (("a", 1, shift - 0.3), ("b", 3, shift + 0.1))
        ]
        state = after(server, ups, state)
        found.append(state.weights[key].item())
    if name == "fedavgm":
        want = reference.fedavgm(x, shifts, 0.0, 0.02, 0.9)
    else:
        b1, b2 = (0.0, 0.0) if name == "fedadagrad" else (0.9, 0.99)
        want = reference.fedopt(name.removeprefix("fed"), x, shifts, 0.02, 1e-3, b1, b2, 1e-6)
    assert found == pytest.approx(want, rel=1e-5)


# -- robust ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("size", [3.0, 1e4])
def test_three_poisoned_of_ten_move_nothing(name: str, size: float, desk: Desk) -> None:
    """Every entry stays within the honest clients' range, whatever rows the poisoned ones say they have."""
    honest = [tensors(i, 0.1, START) for i in range(7)]
    poison = [{k: t + size for k, t in tensors(50 + i, 0.1, START).items()} for i in range(3)]
    updates = desk.updates(honest + poison, [1] * 7 + [10**6] * 3)
    found = after(servers.build({name: ROBUST[name]}), updates)
    moved = after(servers.build("fedavg"), updates)
    for key, x in found.weights.items():
        low, high = (getattr(torch.stack([h[key] for h in honest]), f)(0).values for f in ("min", "max"))
        assert (x >= low).all() and (x <= high).all(), key
        assert (moved.weights[key] > high).any()


def test_robust_servers_equal_the_formulas(desk: Desk) -> None:
    given = [tensors(i, 0.1, START) for i in range(7)]
    updates, key = desk.updates(given, [9, 1, 1, 1, 1, 1, 1]), "lora/a.lora_A"
    rows = [g[key].flatten().tolist() for g in given]
    want = {
        "median": reference.middle(rows),
        "trimmed_mean": reference.trimmed(rows, 2),
        "krum": rows[_krum(given, 2)[0]],
    }
    for name, options in (("median", {}), ("trimmed_mean", {"share": 0.3}), ("krum", {"byzantine": 2})):
        x = after(servers.build({name: options}), updates).weights[key]
        torch.testing.assert_close(x.flatten(), torch.tensor(want[name]), rtol=1e-6, atol=1e-7)
    state = after(server := servers.build({"krum": {"byzantine": 2, "keep": 3}}), updates)
    chosen = _krum(given, 2)[:3]
    assert server.told(state) == {"chosen": [f"c{i}" for i in chosen], "bears_wrong_clients": 2}
    want_mean = reference.mean([rows[i] for i in chosen], [1.0] * 3)
    torch.testing.assert_close(state.weights[key].flatten(), torch.tensor(want_mean), rtol=1e-6, atol=1e-7)


def _krum(given: Sequence[dict[str, Tensor]], f: int) -> list[int]:
    scores = reference.krum_scores([torch.cat([t.flatten() for t in g.values()]).tolist() for g in given], f)
    return sorted(range(len(given)), key=lambda i: scores[i])


def test_krum_says_how_many_wrong_clients_a_round_bears(desk: Desk) -> None:
    server = servers.build({"krum": {"byzantine": 3}})
    for n, bears in ((1, 0), (2, 0), (4, 0), (5, 1), (9, 3)):
        state = after(server, desk.updates([tensors(i, 0.1, START) for i in range(n)]))
        assert server.told(state)["bears_wrong_clients"] == bears and len(server.told(state)["chosen"]) == 1


def test_what_needs_all_clients_reads_some_rows_of_each(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projector of a hundred clients does not fit into memory: no block is larger than the limit."""
    key, given = "lora/p.weight", [{"lora/p.weight": noise(40, 6, seed=i)} for i in range(5)]
    updates = [desk.update(f"c{i}", 1, g) for i, g in enumerate(given)]
    seen = []
    for rows, parts in blocks(updates, key, entries=5 * 6 * 7):
        seen.append(sum(p.numel() for p in parts))
        assert all(torch.equal(p, g[key][rows]) for p, g in zip(parts, given, strict=True))
    assert len(seen) == 6 and max(seen) == 5 * 6 * 7
    whole = {
        n: after(servers.build({n: o}), updates, ServerState({key: torch.zeros(40, 6)}))
        for n, o in ROBUST.items()
    }

    def small(updates: Sequence[Update], key: str) -> Iterator[Any]:
        return blocks(updates, key, entries=50)

    monkeypatch.setattr("retain.federated.servers.robust.blocks", small)
    monkeypatch.setattr(
        Update, "tensor", lambda self, key, channel="": pytest.fail("a whole tensor was read")
    )
    for name in ("median", "trimmed_mean"):
        again = after(servers.build({name: ROBUST[name]}), updates, ServerState({key: torch.zeros(40, 6)}))
        assert torch.equal(again.weights[key], whole[name].weights[key])


def test_numbers_without_an_axis_have_rules_too(desk: Desk) -> None:
    key = "lora/x.scale"
    updates = [desk.update(f"c{i}", 1, {key: torch.tensor(float(v))}) for i, v in enumerate((1, 2, 9, 3, 2))]
    for name, want in (("median", 2.0), ("trimmed_mean", 7 / 3), ("krum", 2.0), ("clipped", 1.0)):
        state = after(servers.build(name), updates, ServerState({key: torch.tensor(0.0)}))
        assert state.weights[key].item() == pytest.approx(want) and state.weights[key].shape == ()


# -- clipping and noise ------------------------------------------------------------------------------------------


def length(state: ServerState, base: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((t - base[k]).double().square().sum()) for k, t in state.weights.items()))


def test_no_client_moves_the_sum_by_more_than_the_bound(desk: Desk) -> None:
    """The sensitivity that the epsilon is counted with: C with or without a client, 2 C for one in another's place."""
    server = servers.build({"clipped": {"bound": 0.5}})
    usual = [tensors(i, 0.01, START) for i in range(4)]
    base = after(server, desk.updates([*usual, START]))  # the fifth sends nothing new
    for size in (0.1, 10.0, 1e6):
        way = tensors(77, size, START)
        there = after(server, desk.updates([*usual, way]))
        back = after(server, desk.updates([*usual, {k: 2 * START[k] - t for k, t in way.items()}]))
        assert 5 * length(there, dict(base.weights)) <= 0.5 * (1 + 1e-5)
        assert 5 * length(there, dict(back.weights)) <= 1.0 * (1 + 1e-5)
    assert 5 * length(there, dict(base.weights)) == pytest.approx(0.5, rel=1e-5)
    assert server.told(there)["clipped"] == 1


@pytest.fixture
def accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise without the library that counts it."""
    monkeypatch.setattr("retain.federated.servers.robust.accountant", lambda: None)
    monkeypatch.setattr("retain.federated.servers.robust.epsilon", lambda *a: float(len(a)))


@pytest.mark.usefixtures("accountant")
def test_noise_has_the_deviation_that_the_epsilon_is_counted_with(desk: Desk) -> None:
    server, key = servers.build({"clipped": {"bound": 0.5, "noise": 3.0}}), "lora/p.weight"
    start = {key: torch.zeros(200, 100)}
    updates = [desk.update(f"c{i}", n, start) for i, n in enumerate((1, 50))]
    state = after(server, updates, ServerState(start))
    assert float(state.weights[key].std()) == pytest.approx(3.0 * 0.5 / 2, rel=0.03)  # 20,000 draws
    again = after(server, updates, ServerState(start))
    assert torch.equal(again.weights[key], state.weights[key])  # of the run's seed
    second = after(server, updates, state)
    assert (
        abs(float(((second.weights[key] - state.weights[key]) * state.weights[key]).mean())) < 0.03
    )  # not the same again
    secret = servers.build({"clipped": {"bound": 0.5, "noise": 3.0, "secret": True}})
    one, two = (after(secret, updates, ServerState(start)).weights[key] for _ in range(2))
    assert not torch.equal(one, two) and float(one.std()) == pytest.approx(0.75, rel=0.03)


@pytest.mark.usefixtures("accountant")
def test_with_noise_clients_count_alike(desk: Desk) -> None:
    key, start = "lora/x.bias", {"lora/x.bias": torch.zeros(3)}
    updates = [desk.update("a", 1, {key: torch.ones(3) * 0.1}), desk.update("b", 10**6, start)]
    state = after(servers.build({"clipped": {"noise": 0.01}}), updates, ServerState(start))
    torch.testing.assert_close(
        state.weights[key], torch.full((3,), 0.05), atol=0.03, rtol=0
    )  # six deviations


def test_the_epsilon_of_a_stage_is_told(desk: Desk) -> None:
    pytest.importorskip("dp_accounting")
    server, state = servers.build({"clipped": {"noise": 2.0, "delta": 1e-4}}), ServerState(START)
    for r in range(3):
        names = ["c0", "c1"] if r else ["c0", "c2"]
        updates = [desk.update(n, 1, tensors(r, 0.1, START)) for n in names]
        state = after(server, updates, state)
    told = server.told(state)
    one = 2.0 / math.sqrt(3)  # c0 took part three times
    assert reference.gaussian_delta(told["epsilon_of_stage"]["known"], one) == pytest.approx(1e-4, rel=5e-3)
    want = privacy.epsilon(2.0, 1e-4, [privacy.Rounds(3, 8, 2)], "fixed")
    assert told["epsilon_of_stage"]["fixed"] == pytest.approx(want, rel=1e-3)
    assert told["delta"] == 1e-4 and told["noise_is_secret"] is False


def test_noise_without_its_library_is_refused_before_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(privacy.importlib, "import_module", missing)
    with pytest.raises(RetainError, match=r"dp-accounting.*retain\[federated\]"):
        go(tmp_path / "run", server={"clipped": {"noise": 1.0}})
    assert not (tmp_path / "run" / "rows").exists()


@pytest.mark.usefixtures("accountant")
def test_noise_beside_a_method_that_tells_of_the_data_is_refused() -> None:
    server = servers.build({"clipped": {"noise": 1.0}})
    with pytest.raises(RetainError, match=r"'ewc' sends what it learned .* without noise"):
        server.check(build(["lora", "ewc"]))
    for fine in ("lora", ["lora", "replay"], "o_lora", ["lora", "lwf"]):
        server.check(build(fine))
    servers.build({"clipped": {"bound": 1.0}}).check(build(["lora", "ewc"]))


def test_large_updates_are_cut_and_not_left_out(tmp_path: Path) -> None:
    """Who is left out by a median of norms would depend on the others: the bound would not bound what one can change."""
    large = spoil("client-00", lambda d, m: changed(m, lambda t: t * 1000))
    store = go(tmp_path / "run", server={"clipped": {"bound": 0.1}}, per_round=3, rounds=1, tamper=large)
    assert not events(store, "client_left_out")
    assert all(e["clipped"] >= 1 and "client-00" in e["clients"] for e in events(store, "round"))


# -- products ----------------------------------------------------------------------------------------------------


def test_products_are_averaged_and_everything_else_is_fedavg(desk: Desk) -> None:
    keys = {**SHAPES, "lora/e.lora_A": (2, 5), "lora/e.lora_B": (4, 2), "lora/e.lora_router": (2, 5)}
    given = [{k: noise(*s, seed=10 * c + i) for i, (k, s) in enumerate(keys.items())} for c in range(3)]
    n = [1, 2, 5]
    updates = [desk.update(f"c{i}", w, g) for i, (g, w) in enumerate(zip(given, n, strict=True))]
    server = servers.build("svd_avg")
    state = server.aggregate(ServerState({k: torch.zeros(s) for k, s in keys.items()}), updates)
    plain = servers.build("fedavg").aggregate(ServerState({}), updates)
    A, B = "lora/a.lora_A", "lora/a.lora_B"
    for key in keys:
        assert torch.equal(state.weights[key], plain.weights[key]) == (key not in (A, B)), key
    whole = sum(w * g[B].double() @ g[A].double() for w, g in zip(n, given, strict=True)) / 8
    U, S, Vh = torch.linalg.svd(whole)
    ours, theirs = (s.weights[B].double() @ s.weights[A].double() for s in (state, plain))
    torch.testing.assert_close(ours, (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-4, atol=1e-5)
    told = server.told(state)
    assert told["error_of_products"] == pytest.approx(float((whole - ours).norm() / whole.norm()), abs=1e-5)
    assert told["error_of_factors"] == pytest.approx(float((whole - theirs).norm() / whole.norm()), abs=1e-5)


# -- SCAFFOLD ----------------------------------------------------------------------------------------------------

KEY = "lora/x.weight"


def drift(
    desk: Desk, name: str, rounds: int, lost: Any = lambda r, k: False
) -> tuple[float, ServerState, list[Control]]:
    """Two clients with a_k/2 (y - b_k)^2 under SGD, ten local steps each: where the server ends, and what all know.

    `lost`: the answer of client k in round r does not arrive.
    """
    curves, rows, lr = [(1.0, 0.0), (3.0, 4.0)], [1, 1], 0.1
    server, parts = servers.build(name), [Control(), Control()]
    state = ServerState({KEY: torch.tensor([10.0])})
    for r in range(rounds):
        infos = [ClientInfo(f"k{k}", n, None, Crowd(2, 2, sum(rows))) for k, n in enumerate(rows)]
        state, _ = server.place(state, infos, CTX)
        updates = []
        for k, (a, b) in enumerate(curves):
            sent = server.send(state, infos[k], ["lora"])
            p = torch.nn.Parameter(sent[KEY].clone())
            bank = SimpleNamespace(trainable=lambda p=p: {KEY: p}, group=lambda key: "lora")
            ctx: Any = SimpleNamespace(
                model=SimpleNamespace(adapters=bank), task=SimpleNamespace(name="t"), rates={"lora": lr}
            )
            given = {}
            if name == "scaffold":
                channels: dict[str, dict[str, Tensor]] = {}
                for key, t in sent.items():
                    if "@" in key:
                        channels.setdefault(key.split("@")[0], {})[key.split("@")[1]] = t
                parts[k].received(channels)
                parts[k].begin_task(ctx)
            for _ in range(10):
                with torch.no_grad():
                    p.sub_(lr * a * (p - b))
                if name == "scaffold":
                    parts[k].after_step(ctx)
            if name == "scaffold":
                given = parts[k].given(ctx)
            if not lost(r, k):
                updates.append(desk.update(f"k{k}", rows[k], {KEY: p.detach()}, **given))
        state = server.aggregate(state, updates)
    return state.weights[KEY].item(), state, parts


def test_controls_take_the_drift_out(desk: Desk) -> None:
    """The minimum of the sum is at (1 * 0 + 3 * 4) / 4 = 3; ten local steps pull FedAvg to the middle of 0 and 4."""
    avg, _, _ = drift(desk, "fedavg", 40)
    ours, _, _ = drift(desk, "scaffold", 40)
    assert abs(avg - 3) > 0.3
    assert ours == pytest.approx(3.0, abs=1e-3)


def test_scaffold_equals_the_paper(desk: Desk) -> None:
    x, c, own = 10.0, 0.0, [0.0, 0.0]
    for _ in range(3):
        ends, news = [], []
        for k, (a, b) in enumerate([(1.0, 0.0), (3.0, 4.0)]):
            y = x
            for _ in range(10):
                y -= 0.1 * (a * (y - b) - own[k] + c)
            ends.append(y)
            news.append(own[k] - c + (x - y) / (10 * 0.1))
        c += sum(n - o for n, o in zip(news, own, strict=True)) / 2
        x, own = sum(ends) / 2, news
    found, state, parts = drift(desk, "scaffold", 3)
    assert found == pytest.approx(x, rel=1e-5)
    assert state.memory["common"][KEY].item() == pytest.approx(c, rel=1e-5)
    assert [p.new[KEY].item() for p in parts] == pytest.approx(own, rel=1e-5)


def test_an_answer_that_was_lost_takes_its_control_back(desk: Desk) -> None:
    """c is the mean of what the server has counted of each client, whatever did not arrive."""
    _, state, parts = drift(desk, "scaffold", 6, lost=lambda r, k: (r, k) in {(1, 0), (3, 1), (4, 1)})
    assert all(p.round == 5 for p in parts)  # all were counted in the last round
    mean = sum(p.new[KEY] for p in parts) / 2
    torch.testing.assert_close(state.memory["common"][KEY], mean, rtol=1e-5, atol=1e-5)
    ours, _, _ = drift(desk, "scaffold", 60, lost=lambda r, k: (r + k) % 5 == 0)
    assert ours == pytest.approx(3.0, abs=0.05)


def test_a_control_belongs_to_its_stage(desk: Desk) -> None:
    """c begins at zero with a stage, and so does c_k, even where the answer of the last round was counted."""
    _, _, (part, _) = drift(desk, "scaffold", 3)
    bank = SimpleNamespace(trainable=lambda: {KEY: torch.nn.Parameter(torch.zeros(1))})
    for stage, kept in (("t", True), ("u", False)):
        again = Control()
        again.load_state_dict(part.state_dict())
        again.received(
            {"common": {KEY: torch.ones(1)}, "counted": {"last": torch.tensor(2), "now": torch.tensor(3)}}
        )
        again.begin_task(
            SimpleNamespace(model=SimpleNamespace(adapters=bank), task=SimpleNamespace(name=stage))
        )  # type: ignore
        assert bool(again.own) == kept and torch.equal(again.now["shift"][KEY], torch.ones(1)) != kept


def test_the_correction_comes_before_what_holds_the_weights() -> None:
    parts: list[Method] = [build("gpm"), build("ema"), Control()]
    assert [p.name for p in arranged(parts, "after_step")] == ["scaffold", "gpm", "ema"]


def test_the_first_round_of_scaffold_is_fedavg_and_the_second_is_not(tmp_path: Path) -> None:
    same = {n: files(go(tmp_path / n, server=n, rounds=1)) for n in ("fedavg", "scaffold")}
    assert same["fedavg"] == same["scaffold"]
    store = go(tmp_path / "two", server="scaffold")
    assert files(store) != files(go(tmp_path / "avg2"))
    assert all(e["control"] > 0 for e in events(store, "round"))
    # what a client keeps of one stage is nothing in the next: c begins at zero, and so must c_k
    kept = [load_state(p.with_suffix("")) for p in sorted((store.path / "clients").rglob("*.json"))]
    assert kept and {k["part"]["stage"] for k in kept} >= {"letter"}


def test_a_killed_scaffold_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    class Killed(BaseException): ...

    calls = [0]

    def kill(client: str, data: bytes, work: Any) -> bytes:
        calls[0] += 1
        reply: bytes = work()
        if calls[0] == 7:
            raise Killed
        return reply

    whole = go(tmp_path / "whole", server="scaffold")
    with pytest.raises(Killed):
        go(tmp_path / "cut", server="scaffold", tamper=kill)
    assert files(go(tmp_path / "cut", server="scaffold")) == files(whole)


CONTROLS = {
    "scaled": (lambda k, t: t * 1000, "its control is .* times as large"),
    "missing": (lambda k, t: None, "tensors are missing .*control@"),
    "nan": (lambda k, t: t * math.nan, "is not finite"),
    "shape": (lambda k, t: t[:1], "has shape"),
}


@pytest.mark.parametrize("fault", CONTROLS)
def test_a_control_that_is_wrong_is_left_out_with_its_update(fault: str, tmp_path: Path) -> None:
    how, why = CONTROLS[fault]

    def wrong(data: bytes, m: Message) -> bytes:
        made = {k: how(k, t) if "control@" in k else t for k, t in m.tensors.items()}
        return Message(m.head, {k: t for k, t in made.items() if t is not None}).to_bytes()

    store = go(tmp_path / "run", server="scaffold", per_round=3, rounds=1, tamper=spoil("client-00", wrong))
    left = events(store, "client_left_out")
    assert {e["client"] for e in left} == {"client-00"} and len(left) == 3
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(left[0]["why"])


# -- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [({"trimmed_mean": {"share": 0.5}}, "share: must be at least 0 and below 0.5"), ({"krum": {"keep": 0}}, "keep"),
     ({"fedadam": {"tau": 0.0}}, "tau"), ({"clipped": {"delta": 1.0}}, "delta"),
     ({"fedavgm": {"beta": 0.9}}, "no field 'beta'"),
     ({"clipped": {"noise": math.nan}}, "noise"),
     ({"clipped": {"noise": 1e-3}}, "neither 0 nor at least 0.01"), ("fedadm", "fedadam")],
)  # fmt: skip
def test_a_field_out_of_range_is_named(spec: Any, said: str) -> None:
    with pytest.raises(RetainError, match=r"federated\.server") as error:
        servers.build(spec)
    assert said in str(error.value)


def test_rules_and_servers_agree_on_what_is_cut(desk: Desk) -> None:
    server = servers.build({"trimmed_mean": {"share": 0.4}})
    for n in (1, 2, 5):
        told = server.told(after(server, desk.updates([tensors(i, 0.1, START) for i in range(n)])))
        assert told == {"left_out_at_each_end": rules.trimmed(n, 0.4)}
