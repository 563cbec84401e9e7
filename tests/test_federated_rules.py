"""The server's rules against the papers' formulas (reference/federated.py), and against Flower where it is installed."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import federated as reference
from retain.federated import privacy, rules
from retain.federated.privacy import Rounds, epsilon
from retain.types import RetainError

K, D = 7, 12


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clients(n: int = K, seed: int = 0) -> list[Tensor]:
    return list(noise(n, D, seed=seed))


def close(a: Tensor, b: Any, **how: Any) -> None:
    torch.testing.assert_close(
        a.double(), torch.as_tensor(b, dtype=torch.float64), **{"rtol": 1e-6, "atol": 1e-7, **how}
    )


# -- averages --------------------------------------------------------------------------------------------


def test_the_mean_is_weighed_by_samples_and_takes_one_tensor_at_a_time() -> None:
    x, n = clients(), [3, 1, 4, 1, 5, 9, 2]
    close(rules.average(iter(x), n), reference.mean([t.tolist() for t in x], n))
    live: list[int] = []

    def lazily() -> Any:
        for t in x:
            live.append(1)
            yield t

    rules.average(lazily(), n)
    assert len(live) == K


def test_sums_are_made_in_fp64() -> None:
    """In fp32 the ones are lost beside 2^25, and the mean of the small would be 0."""
    x = [torch.tensor([2.0**25]), torch.ones(1), torch.ones(1), torch.tensor([-(2.0**25)])]
    assert rules.average(x, [1] * 4).item() == 0.5
    assert (
        rules.trimmed_mean(
            [torch.tensor([v]) for v in (-1e9, -(2.0**25), 1.0, 1.0, 2.0**25, 1e9)], 0.2
        ).item()
        == 0.5
    )


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_the_median_is_the_middle_or_the_mean_of_the_two(n: int) -> None:
    x = clients(n)
    close(rules.median(x), reference.middle([t.tolist() for t in x]))
    close(rules.median(x), np.median(torch.stack(x).double().numpy(), axis=0))


@pytest.mark.parametrize(
    ("n", "share", "cut"),
    [(10, 0.3, 3), (7, 0.2, 1), (100, 0.29, 29), (3, 0.2, 0), (1, 0.4, 0), (5, 0.49, 2)],
)
def test_a_trimmed_mean_leaves_out_the_share_at_both_ends(n: int, share: float, cut: int) -> None:
    x = clients(n)
    assert rules.trimmed(n, share) == cut
    close(rules.trimmed_mean(x, share), reference.trimmed([t.tolist() for t in x], cut))


@pytest.mark.parametrize("share", [0.5, -0.1, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(RetainError, match=r"at least 0 and below 0\.5"):
        rules.trimmed_mean(clients(), share)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [2.0, -1.0], [float("nan"), 1.0]])
def test_weights_must_weigh(weights: list[float]) -> None:
    with pytest.raises(RetainError, match="weights"):
        rules.average(clients(2), weights)


@pytest.mark.parametrize(
    "rule", [rules.median, lambda x: rules.trimmed_mean(x, 0.3), lambda x: rules.average(x, [1] * 10)]
)
def test_the_order_of_clients_changes_nothing(rule: Any) -> None:
    x = clients(10)
    for seed in range(3):
        mixed = [x[i] for i in torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()]
        close(rule(mixed), rule(x), rtol=1e-7, atol=1e-7)


# -- Krum ------------------------------------------------------------------------------------------------


def gram_of(x: list[Tensor], old: Tensor) -> Tensor:
    gram = torch.zeros(len(x), len(x), dtype=torch.float64)
    for a, b in ((0, 5), (5, D)):  # two keys of an adapter
        gram = rules.add_gram(gram, [t[a:b] for t in x], old[a:b])
    return gram


def test_distances_come_from_inner_products_over_all_tensors() -> None:
    x, old = clients(), noise(D, seed=9)
    square = rules.distances(gram_of(x, old))
    for i, j in itertools.product(range(K), repeat=2):
        assert square[i, j].item() == pytest.approx(
            float((x[i].double() - x[j].double()).square().sum()), abs=1e-9
        )
    assert torch.equal(square, square.T)
    assert rules.norms(gram_of(x, old)) == pytest.approx(
        [float((t.double() - old.double()).norm()) for t in x]
    )


def test_small_updates_of_large_weights_keep_their_distances() -> None:
    old = torch.full((D,), 3000.0)
    x = [old + t * 1e-2 for t in clients()]
    want = [[float((a.double() - b.double()).square().sum()) for b in x] for a in x]
    torch.testing.assert_close(rules.distances(gram_of(x, old)).tolist(), want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("f", [0, 1, 2])
def test_krum_takes_the_lowest_score(f: int) -> None:
    x = clients()
    scores = reference.krum_scores([t.tolist() for t in x], f)
    order = sorted(range(K), key=lambda i: scores[i])
    square = rules.distances(gram_of(x, torch.zeros(D)))
    assert rules.krum(square, f) == order[:1]
    assert rules.krum(square, f, keep=4)[0] == order[0]
    assert set(rules.krum(square, f, keep=4)) == set(order[:4])


def test_krum_of_few_and_of_twins() -> None:
    assert rules.krum(torch.zeros(1, 1, dtype=torch.float64), 0) == [0]
    x = [torch.zeros(D), torch.ones(D), torch.full((D,), 9.0)]
    assert rules.krum(rules.distances(gram_of(x, torch.zeros(D))), 0) == [
        0
    ]  # each other's only nearest: the first
    assert [rules.tolerates(n, 3) for n in (1, 3, 4, 5, 7, 9, 20)] == [0, 0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("wrong", [-50.0, 1e3, 1e6])
def test_three_poisoned_of_ten_move_nothing_robust(wrong: float) -> None:
    """The result stays within the honest clients' range in every coordinate; the mean does not."""
    honest = clients(7)
    x = honest + [wrong * torch.ones(D) + t for t in clients(3, seed=5)]
    low, high = torch.stack(honest).min(0).values, torch.stack(honest).max(0).values
    chosen = rules.krum(rules.distances(gram_of(x, torch.zeros(D))), 3, keep=1)
    for found in (rules.median(x), rules.trimmed_mean(x, 0.3), x[chosen[0]]):
        assert (found >= low).all() and (found <= high).all()
    mean = rules.average(x, [1] * 10)
    assert not ((mean >= low) & (mean <= high)).all()


# -- clipping and noise ----------------------------------------------------------------------------------


def test_a_clipped_update_is_no_longer_than_the_bound() -> None:
    assert [rules.clip_factor(n, 2.0) for n in (0.0, 1.0, 2.0, 8.0)] == [1.0, 1.0, 1.0, 0.25]


@pytest.mark.parametrize("seed", [3, None])
def test_noise_is_normal_with_its_standard_deviation(seed: int | None) -> None:
    from scipy import stats

    rng = None if seed is None else torch.Generator().manual_seed(seed)
    x = rules.gaussian((201, 101), 0.3, rng)
    assert x.dtype == torch.float64 and x.shape == (201, 101)
    assert float(x.std()) == pytest.approx(0.3, rel=0.03)  # 20,301 draws: six times its standard error
    # one in a million draws of the operating system would fail
    assert stats.kstest((x / 0.3).flatten().numpy(), "norm").pvalue > 1e-6
    again = rules.gaussian((201, 101), 0.3, None if seed is None else torch.Generator().manual_seed(seed))
    assert torch.equal(x, again) == (seed is not None)
    assert rules.gaussian((), 1.0, rng).shape == ()
    assert float(rules.gaussian((4, 2), 0.0, rng).abs().sum()) == 0.0


# -- server optimisers -----------------------------------------------------------------------------------

SHIFTS = [0.3, -0.02, 0.0, 1e-4, -0.7]


def test_momentum_equals_the_paper() -> None:
    x, m, found = torch.tensor([1.0], dtype=torch.float64), None, []
    for shift in SHIFTS:
        x, m = rules.momentum(x, x + shift, m, lr=0.5, beta=0.9)
        found.append(x.item())
    assert found == pytest.approx(reference.fedavgm(1.0, SHIFTS, 0.0, 0.5, 0.9), rel=1e-12)


@pytest.mark.parametrize("kind", ["adam", "yogi", "adagrad"])
def test_adaptive_servers_equal_the_paper(kind: Any) -> None:
    x = torch.tensor([1.0], dtype=torch.float64)
    m, v = rules.at_rest(x, 1e-3)
    found = []
    for shift in SHIFTS:
        x, m, v = rules.adaptive(kind, x, x + shift, m, v, lr=0.01, tau=1e-3, beta1=0.9, beta2=0.99)
        found.append(x.item())
    want = reference.fedopt(kind, 1.0, SHIFTS, 0.01, 1e-3, 0.9, 0.99, 1e-6)
    assert found == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("kind", ["adam", "yogi", "adagrad"])
def test_far_from_its_moments_an_adaptive_server_is_the_mean(kind: Any) -> None:
    """lr = tau -> infinity and beta1 = 0: x + tau D / (sqrt(v) + tau), v near tau^2 needs lr = 2 tau."""
    old, mean = noise(D), noise(D, seed=1)
    m, v = rules.at_rest(old, 1e6)
    x, _, _ = rules.adaptive(kind, old, mean, m, v, lr=2e6, tau=1e6, beta1=0.0, beta2=1.0)
    close(x, mean, atol=1e-5, rtol=1e-5)
    x, _ = rules.momentum(old, mean, None, lr=1.0, beta=0.0)
    close(x, mean)
    x, _, _ = rules.adaptive(kind, old, old, m, v, lr=2e6, tau=1e6, beta1=0.9, beta2=0.99)
    assert torch.equal(x, old)  # no move, no step


# -- SCAFFOLD --------------------------------------------------------------------------------------------


def test_under_sgd_a_control_is_the_mean_gradient() -> None:
    """y <- y - lr (g - c_k + c) for five steps: (x - y)/(5 lr) + c_k - c is the mean of the g."""
    x, own, common = noise(D).double(), noise(D, seed=1).double(), noise(D, seed=2).double()
    grads, rates, y = [noise(D, seed=10 + i).double() for i in range(5)], [0.1, 0.3, 0.3, 0.2, 0.1], x.clone()
    for g, lr in zip(grads, rates, strict=True):
        y = y - lr * (g - own + common)
    want = sum(lr * g for g, lr in zip(grads, rates, strict=True)) / sum(rates)
    close(rules.control(own, common, x, y, sum(rates)), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(rules.control(own, common, x, x, 0.0), own)


def test_the_common_control_is_the_mean_of_all_clients_controls() -> None:
    """With c = mean c_k at first it stays so, whoever takes part."""
    held = [noise(D, seed=i).double() for i in range(5)]
    common = sum(held) / 5
    new = {k: noise(D, seed=20 + k).double() for k in (1, 3)}
    found = rules.common_control(common, [(1 / 5, new[k] - held[k]) for k in new])
    close(found, sum(new.get(k, held[k]) for k in range(5)) / 5, rtol=1e-12, atol=1e-12)


# -- products --------------------------------------------------------------------------------------------


def factors(n: int, rank: int = 3, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    return [noise(rank, 20, seed=seed + k) for k in range(n)], [
        noise(15, rank, seed=seed + 50 + k) for k in range(n)
    ]


def test_the_mean_of_products_is_the_best_of_its_rank() -> None:
    A, B = factors(4)
    n = [5.0, 1.0, 2.0, 4.0]
    found = rules.product_mean(A, B, n)
    whole = sum(w * b.double() @ a.double() for w, a, b in zip(n, A, B, strict=True)) / sum(n)
    U, S, Vh = np.linalg.svd(whole.numpy())
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    close(found.B_OR.double() @ found.A_RI.double(), best, rtol=1e-5, atol=1e-5)
    assert found.A_RI.shape == (3, 20) and found.B_OR.shape == (15, 3) and found.A_RI.dtype == torch.float32
    assert found.error == pytest.approx(np.linalg.norm(S[3:]) / np.linalg.norm(S), rel=1e-6)
    apart = reference_mean(B, n) @ reference_mean(A, n)
    assert found.error_of_factors == pytest.approx(float((whole - apart).norm() / whole.norm()), rel=1e-6)
    assert found.size == pytest.approx(np.linalg.norm(S), rel=1e-9)


def reference_mean(x: list[Tensor], n: list[float]) -> Tensor:
    return sum(w * t.double() for w, t in zip(n, x, strict=True)) / sum(n)  # type: ignore[return-value]


def test_clients_that_agree_keep_their_factors() -> None:
    (a, *_), (b, *_) = factors(1)
    for n in (1, 2, 5):
        found = rules.product_mean([a] * n, [b] * n, [1.0] * n)
        close(found.A_RI, a, rtol=1e-5, atol=1e-6)
        close(found.B_OR, b, rtol=1e-5, atol=1e-6)
        assert found.error < 1e-6 and found.error_of_factors < 1e-6


def test_products_of_zero_keep_the_mean_of_the_factors() -> None:
    A, _ = factors(3)
    found = rules.product_mean(A, [torch.zeros(15, 3)] * 3, [1.0, 1.0, 2.0])
    close(found.A_RI, reference_mean(A, [1.0, 1.0, 2.0]))
    assert not found.B_OR.any() and (found.error, found.size) == (0.0, 0.0)


def test_a_product_of_lower_rank_and_opposite_factors_stay_finite() -> None:
    A, B = factors(2)
    low = [torch.cat([b[:, :1], torch.zeros(15, 2)], 1) for b in B]  # rank 2 in all
    found = rules.product_mean(A, low, [1.0, 1.0])
    close(
        found.B_OR.double() @ found.A_RI.double(),
        sum(b @ a for a, b in zip(A, low, strict=True)) / 2,
        atol=1e-5,
        rtol=1e-5,
    )
    found = rules.product_mean(
        [A[0], -A[0]], [B[0], -B[0]], [1.0, 1.0]
    )  # the same product, and the factors' mean is 0
    close(found.B_OR.double() @ found.A_RI.double(), B[0].double() @ A[0].double(), atol=1e-5, rtol=1e-5)
    assert found.error < 1e-6 and found.error_of_factors == pytest.approx(1.0)


# -- privacy ---------------------------------------------------------------------------------------------


def test_a_missing_accountant_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(privacy.importlib, "import_module", missing)
    with pytest.raises(RetainError, match=r"dp-accounting.*retain\[federated\]"):
        epsilon(1.0, 1e-5, [Rounds(1)])


@pytest.mark.parametrize(
    ("noise_", "delta", "rounds", "sampling"),
    [(-1.0, 1e-5, (1, 1, 1), "known"), (1.0, 0.0, (1, 1, 1), "known"), (1.0, 1e-5, (1, 3, 4), "fixed"),
     (1.0, 1e-5, (1, 4, 0), "fixed"), (1.0, 1e-5, (1, 1, 1), "secret"), (float("nan"), 1e-5, (1, 1, 1), "known")],
)  # fmt: skip
def test_what_has_no_epsilon_is_refused(noise_: float, delta: float, rounds: Any, sampling: Any) -> None:
    with pytest.raises(RetainError, match="privacy"):
        epsilon(noise_, delta, [Rounds(*rounds)], sampling)


def test_epsilon_of_known_clients_is_that_of_one_gaussian() -> None:
    pytest.importorskip("dp_accounting")
    for z, rounds in ((0.7, 1), (1.0, 4), (3.0, 40), (20.0, 5)):
        eps = epsilon(z, 1e-5, [Rounds(rounds - 1), Rounds(1)])
        assert reference.gaussian_delta(eps, z / math.sqrt(rounds)) == pytest.approx(1e-5, rel=1e-4)
    assert epsilon(0.0, 1e-5, [Rounds(1)]) == epsilon(1e-300, 1e-5, [Rounds(1)], "fixed") == math.inf
    for sampling in ("known", "fixed", "poisson"):
        assert 0 <= epsilon(math.inf, 1e-5, [Rounds(2, 12, 3)], sampling) < 0.01  # type: ignore[arg-type]
    assert epsilon(1.0, 1e-5, []) == epsilon(1.0, 1e-5, [Rounds(0)]) == 0.0


def test_epsilon_of_secret_clients_is_not_below_what_can_be_attacked() -> None:
    """One round: the exact delta of the sampled pair, by hand, is at most the one that is promised."""
    pytest.importorskip("dp_accounting")
    from scipy import integrate, stats

    def delta_of(p: Any, q: Any, eps: float) -> float:
        def more(f: Any, g: Any) -> float:
            xs = np.linspace(-30, 30, 200_001)
            return float(integrate.trapezoid(np.maximum(0.0, f(xs) - math.exp(eps) * g(xs)), xs))

        return max(more(p, q), more(q, p))

    z, share = 1.5, 0.25
    density = stats.norm.pdf
    poisson = epsilon(z, 1e-3, [Rounds(1, 12, 3)], "poisson")
    assert (
        delta_of(
            lambda x: density(x, 0, z),
            lambda x: (1 - share) * density(x, 0, z) + share * density(x, 1, z),
            poisson,
        )
        <= 1e-3
    )
    fixed = epsilon(z, 1e-3, [Rounds(1, 12, 3)], "fixed")  # client +C against client -C, the others 0
    pair = [lambda x, s=s: (1 - share) * density(x, 0, z) + share * density(x, s, z) for s in (1, -1)]
    assert delta_of(*pair, fixed) <= 1e-3
    assert fixed > poisson
    whole = epsilon(
        z, 1e-3, [Rounds(1, 3, 3)], "fixed"
    )  # all take part: sampling gains nothing, and 2 C is what changes
    assert reference.gaussian_delta(whole, z / 2) == pytest.approx(1e-3, rel=1e-4)


# -- the other side --------------------------------------------------------------------------------------

FLOWER_ROUNDS = 4


def flower(
    strategy: Any, seed: int = 0
) -> tuple[list[dict[str, Tensor]], list[list[dict[str, Tensor]]], list[int]]:
    """Rounds of a strategy of Flower without a network: the global arrays after each, and the answers that it got."""
    app = pytest.importorskip("flwr.app")
    n, g = [3, 1, 4, 1, 5, 9, 2], torch.Generator().manual_seed(seed)
    now = {
        "A": torch.randn(4, 3, generator=g, dtype=torch.float64),
        "B": torch.randn(5, generator=g, dtype=torch.float64),
    }
    states, answers = [now], []
    for r in range(1, FLOWER_ROUNDS + 1):
        arrays = app.ArrayRecord(now)
        strategy.current_arrays = (
            {k: v.numpy() for k, v in arrays.items()} if hasattr(strategy, "eta") else arrays
        )
        sent = [
            {k: t + 0.1 * torch.randn(t.shape, generator=g, dtype=t.dtype) for k, t in now.items()} for _ in n
        ]
        replies = []
        for tensors, rows in zip(sent, n, strict=True):
            content = app.RecordDict(
                {"arrays": app.ArrayRecord(tensors), "metrics": app.MetricRecord({"num-examples": rows})}
            )
            replies.append(SimpleNamespace(content=content, has_error=lambda: False))
        arrays, _ = strategy.aggregate_train(r, replies)
        now = {k: v.double() for k, v in arrays.to_torch_state_dict().items()}
        states.append(now)
        answers.append(sent)
    return states, answers, n


def same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for k, tensor in want.items():
        close(found[k], tensor, rtol=1e-9, atol=1e-10)


def mean_of(sent: list[dict[str, Tensor]], n: list[int]) -> dict[str, Tensor]:
    return {k: rules.average([s[k] for s in sent], n) for k in sent[0]}


def flower_strategy(name: str, **options: Any) -> Any:
    return getattr(pytest.importorskip("flwr.serverapp.strategy"), name)(**options)


def test_mean_median_and_trimmed_mean_are_those_of_flower() -> None:
    states, answers, n = flower(flower_strategy("FedAvg"))
    for now, sent in zip(states[1:], answers, strict=True):
        same(mean_of(sent, n), now)
    for strategy, rule in (
        (flower_strategy("FedMedian"), rules.median),
        (flower_strategy("FedTrimmedAvg", beta=0.2), lambda x: rules.trimmed_mean(x, 0.2)),
    ):
        states, answers, _ = flower(strategy)
        for now, sent in zip(states[1:], answers, strict=True):
            same({k: rule([s[k] for s in sent]) for k in now}, now)


@pytest.mark.parametrize(("f", "keep"), [(1, 1), (2, 1), (2, 3)])
def test_krum_is_that_of_flower(f: int, keep: int) -> None:
    if keep == 1:
        strategy = flower_strategy("Krum", num_malicious_nodes=f)
    else:
        strategy = flower_strategy("MultiKrum", num_malicious_nodes=f, num_nodes_to_select=keep)
    states, answers, n = flower(strategy)
    for old, now, sent in zip(states, states[1:], answers, strict=False):
        gram = torch.zeros(len(n), len(n), dtype=torch.float64)
        for k in old:
            gram = rules.add_gram(gram, [s[k] for s in sent], old[k])
        chosen = rules.krum(rules.distances(gram), f, keep)
        same(
            mean_of([sent[i] for i in chosen], [n[i] for i in chosen]), now
        )  # Flower weighs the chosen by samples


@pytest.mark.parametrize(("lr", "beta"), [(1.0, 0.9), (0.5, 0.3)])
def test_momentum_is_that_of_flower(lr: float, beta: float) -> None:
    states, answers, n = flower(flower_strategy("FedAvgM", server_learning_rate=lr, server_momentum=beta))
    m: dict[str, Any] = dict.fromkeys(states[0])
    for old, now, sent in zip(states, states[1:], answers, strict=False):
        mean, found = mean_of(sent, n), {}
        for k in old:
            found[k], m[k] = rules.momentum(old[k], mean[k], m[k], lr, beta)
        same(found, now)


@pytest.mark.parametrize(
    ("kind", "name"), [("adam", "FedAdam"), ("yogi", "FedYogi"), ("adagrad", "FedAdagrad")]
)
def test_adaptive_servers_are_those_of_flower(kind: Any, name: str) -> None:
    """Flower begins with v = 0; its FedAdam corrects the bias with one round too many, its FedAdagrad has beta1 = 0."""
    lr, tau, beta1, beta2 = 0.01, 1e-3, 0.0 if kind == "adagrad" else 0.9, 0.99
    betas = {} if kind == "adagrad" else {"beta_1": beta1, "beta_2": beta2}
    states, answers, n = flower(flower_strategy(name, eta=lr, tau=tau, **betas))
    m, v = ({k: torch.zeros_like(t) for k, t in states[0].items()} for _ in range(2))
    for r, (old, now, sent) in enumerate(zip(states, states[1:], answers, strict=False), 1):
        rate = lr * math.sqrt(1 - beta2 ** (r + 1)) / (1 - beta1 ** (r + 1)) if kind == "adam" else lr
        mean, found = mean_of(sent, n), {}
        for k in old:
            found[k], m[k], v[k] = rules.adaptive(
                kind, old[k], mean[k], m[k], v[k], lr=rate, tau=tau, beta1=beta1, beta2=beta2
            )
        same(found, now)
