"""CKA between the models of a stream: the formula, what it must not notice, and the command on a tiny run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import own_data
import tiny
from retain.adapters.bank import Mix
from retain.cli import app
from retain.commands.analyse import cka

_spec = importlib.util.spec_from_file_location("routes", Path(__file__).parent / "reference" / "routes.py")
assert _spec and _spec.loader
ref: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ref)

RNG = torch.Generator().manual_seed(0)
X = torch.randn(20, 7, generator=RNG)
Y = torch.tanh(X @ torch.randn(7, 9, generator=RNG)) + 0.3 * torch.randn(20, 9, generator=RNG)
BOTH = pytest.mark.parametrize("measure", [cka.kernel_cka, cka.linear_cka])


@BOTH
def test_one_is_like_itself_and_both_sides_are_equal(measure: Any) -> None:
    assert measure(X, X) == pytest.approx(1, abs=1e-12)
    assert measure(X, Y) == pytest.approx(measure(Y, X), abs=1e-12)
    assert 0 < measure(X, Y) < 0.99


@BOTH
def test_independent_rows_have_nothing_in_common(measure: Any) -> None:
    """Few samples of many dimensions: the biased estimate is 0.99 there."""
    rng = torch.Generator().manual_seed(1)
    draws = [measure(*(torch.randn(50, 4096, generator=rng) for _ in "xy")) for _ in range(6)]
    assert all(abs(v) < 0.12 for v in draws) and abs(sum(draws) / 6) < 0.05
    x, noise = torch.randn(50, 4096, generator=rng), torch.randn(50, 4096, generator=rng)
    assert measure(x, x) == pytest.approx(1) and 0.3 < measure(x, x + noise) < 0.7


def test_the_biased_value_and_its_chance_stand_beside() -> None:
    rng = torch.Generator().manual_seed(1)
    x, y = (torch.randn(50, 4096, generator=rng).double() for _ in "xy")
    for kernel in (cka.rbf, cka.linear):
        made = cka.alike(kernel(x), kernel(y))
        assert abs(made.value) < 0.12 and made.biased > 0.97 and abs(made.biased - made.chance) < 0.01
        orders = [torch.randperm(50, generator=rng) for _ in range(200)]
        K, L = kernel(x).numpy(), kernel(y).numpy()
        permuted = [ref.cka(K, L[order][:, order]) for order in orders]
        assert made.chance == pytest.approx(sum(permuted) / 200, abs=2e-3)


def test_the_unbiased_estimate_is_the_formula_of_the_paper() -> None:
    """Song et al. 2012, eq. 5, written down with loops; and its mean over small samples is that of a large one."""
    K, L = cka.rbf(X.double()), cka.linear(Y.double())
    n, a, b = 20, K.clone().fill_diagonal_(0).tolist(), L.clone().fill_diagonal_(0).tolist()
    N = range(n)
    trace = sum(a[i][j] * b[j][i] for i in N for j in N)
    sums = sum(map(sum, a)) * sum(map(sum, b)) / ((n - 1) * (n - 2))
    through = sum(a[i][j] * b[j][q] for i in N for j in N for q in N) * 2 / (n - 2)
    assert float(cka.unbiased_hsic(K, L)) == pytest.approx(trace + sums - through, rel=1e-10)
    few = [float(cka.unbiased_hsic(K[i][:, i], L[i][:, i])) / (5 * 2)
           for i in (torch.randperm(n, generator=torch.Generator().manual_seed(s))[:5] for s in range(4000))]  # fmt: skip
    assert sum(few) / 4000 == pytest.approx(float(cka.unbiased_hsic(K, L)) / (n * (n - 3)), rel=0.1)


def test_many_samples() -> None:
    """Beyond 2^24 entries torch's own quantile gives up."""
    x = torch.randn(4097, 3, generator=RNG)
    kernel = cka.rbf(x)
    assert kernel.shape == (4097, 4097) and float(kernel[0, 0]) == 1 and float(kernel.min()) > 0


@BOTH
def test_turning_scaling_and_shifting_are_not_noticed(measure: Any) -> None:
    Q = torch.linalg.qr(torch.randn(7, 7, generator=RNG, dtype=torch.double))[0]
    for moved in (X.double() @ Q, 3.7 * X.double(), X.double() + torch.arange(7)):
        assert measure(moved, Y) == pytest.approx(measure(X, Y), abs=1e-6)  # X was fp32
    stretched = X * torch.tensor([9.0, 1, 1, 1, 1, 1, 1])  # not a turn, not one scale
    assert abs(measure(stretched, Y) - measure(X, Y)) > 0.01


@BOTH
def test_the_order_of_rows_matters_to_pairs_only(measure: Any) -> None:
    order = torch.randperm(20, generator=RNG)
    assert measure(X[order], Y[order]) == pytest.approx(measure(X, Y), abs=1e-9)
    assert abs(measure(X[order], Y) - measure(X, Y)) > 0.05


def test_equal_to_a_transcription() -> None:
    x, y = X.double().numpy(), Y.double().numpy()
    linear, kernel = ((f(X.double()), f(Y.double())) for f in (cka.linear, cka.rbf))
    assert cka.alike(*linear).biased == pytest.approx(ref.cka(x @ x.T, y @ y.T), abs=1e-10)
    assert cka.alike(*kernel).biased == pytest.approx(ref.cka(ref.rbf(x), ref.rbf(y)), abs=1e-10)


def test_a_layer_that_says_nothing_has_no_value() -> None:
    assert cka.kernel_cka(torch.ones(5, 3), X[:5]) != cka.kernel_cka(torch.ones(5, 3), X[:5])  # nan


def test_activations_are_the_mean_mlp_output_of_each_sample_alone() -> None:
    model = tiny.model()
    tiny.fill(model.adapters, "a")
    model.adapters.mix = Mix({"a": 1.0})
    examples = tiny.examples()
    together = model.mlp_means(model.collate(examples, answers=False))
    assert together.shape == (2, 6, 32)
    seen: list[Tensor] = []
    hook = model.hf.model.language_model.layers[1].mlp.down_proj.register_forward_hook(
        lambda m, x, out: seen.append(out[0].mean(0))
    )
    for i, e in enumerate(examples):
        alone = model.mlp_means(model.collate([e], answers=False))
        torch.testing.assert_close(together[:, i : i + 1], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone[1, 0], seen[-1])
    hook.remove()


# -- the command ---------------------------------------------------------------------------------------------


def call(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cka")
    method = "{hide: {top_k: 1, temperature: 0.5}}"
    recipe = own_data.shop(folder, own_data.model_dir(folder / "base"), method=method, n_train=4, n_test=5)
    result = call("run", str(recipe), "-q", "optim.steps=2", "optim.lr=0.05")
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_the_command_prints_and_writes(run: Path) -> None:
    result = call("analyse", "cka", str(run), "--samples", "8")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert (
        "layer" in lines[1] and len([line for line in lines if line.lstrip().startswith(("0 ", "1 "))]) == 2
    )
    data = json.loads((run / "cka.json").read_text())
    assert data["models"] == ["colour", "paint"] and data["samples"] == 8
    for kind in ("kernel", "linear"):
        for pairing in ("paired", "unpaired"):
            values = torch.tensor(data["cka"][kind][pairing])
            assert values.shape == (2, 2, 2) and (values.abs() <= 1 + 1e-9).all()
            for beside in ("biased", "chance"):
                other = torch.tensor(data[beside]["cka"][kind][pairing])
                assert other.shape == (2, 2, 2) and (other > 0).all() and (other <= 1 + 1e-9).all()
            torch.testing.assert_close(values.diagonal(dim1=1, dim2=2), torch.ones(2, 2))
            assert data["mean"][kind][pairing] == pytest.approx(values[:, 0, 1].tolist())
        paired = data["mean"][kind]["paired"]
        assert all(a < 1 - 1e-9 for a in paired)  # the adapters differ
    assert "unbiased" in data["estimator"] and "biased (by chance)" in lines[1]
    page = (run / "cka.html").read_text()
    assert "Song et al. 2012" in page and "by chance" in page
    assert "<svg" in page and "http" not in page.replace("http-equiv", "") and "Every pair" in page


def test_who_reads_what(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpaired: each model reads its own task alone. Paired: all read the same samples, of every task."""
    whole, read = cka._activations, list[list[str]]()

    def watched(model: Any, examples: Any, batch_size: int) -> Tensor:
        read.append([e.id for e in examples])
        return whole(model, examples, batch_size)

    monkeypatch.setattr(cka, "_activations", watched)
    found = cka.study([run], samples=8)
    ids = {t: [json.loads(x)["id"] for x in next(run.rglob(f"predictions/{t}.jsonl")).read_text().splitlines()]
           for t in ("colour", "paint")}  # fmt: skip
    paired, unpaired = read[::2], read[1::2]
    assert found.models == ["colour", "paint"]
    for task, own in zip(found.models, unpaired, strict=True):
        assert len(own) == found.n["unpaired"] == 5 and sorted(own) == sorted(ids[task])
    assert paired[0] == paired[1] and len(paired[0]) == 8
    assert [sum(i in ids[t] for i in paired[0]) for t in ids] == [4, 4]


def test_two_runs_are_one_study(run: Path, tmp_path: Path) -> None:
    result = call(
        "analyse", "cka", str(run), str(run), "--samples", "6", "--out", str(tmp_path / "both.html")
    )
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "both.json").read_text())
    assert data["models"] == ["run: colour", "run: paint"] * 2
    same = torch.tensor(data["cka"]["kernel"]["paired"])[:, :2, 2:]
    torch.testing.assert_close(same.diagonal(dim1=1, dim2=2), torch.ones(2, 2))


def test_wrong_input_is_told(run: Path, tmp_path: Path) -> None:
    for args, words in (
        ([str(tmp_path)], "run.json"),
        ([str(run), "--samples", "2"], "--samples: at least 4"),
    ):
        result = call("analyse", "cka", *args)
        assert result.exit_code == 2 and words in result.stderr
