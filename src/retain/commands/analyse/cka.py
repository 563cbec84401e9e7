"""How alike the models of a stream's tasks are in each layer: centred kernel alignment (CKA).

Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019 (arXiv 1905.00414); used by
HiDe-LLaVA (arXiv 2503.12941) to decide which layers to route and which to sum. The unbiased estimator of HSIC is that
of Song et al., "Feature Selection via Dependence Maximization", JMLR 2012, for CKA as in Nguyen et al., ICLR 2021.

    CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))
    unbiased: HSIC = (tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2 1'K~L~1 / (n-2)) / (n (n-3)),  K~: K, diagonal 0
    biased:   HSIC = sum of (H K H) o (H L H),  H = I - 11'/n
    by chance: biased CKA, its mean over all n! orders of Y's rows: tr(HKH) tr(HLH) / (n-1) over the same root
    kernel: K_ab = exp(-|x_a - x_b|^2 / (2 sigma^2)), sigma^2 the median of X's non-zero squared distances
    linear: K = X X'

With few samples of many dimensions the biased value says nothing: for independent X and Y of 50 samples and 4,096
dimensions it is 0.99, and so is its value by chance; the unbiased one is 0 there. So the value is the unbiased one, and
the biased one (that of the release) stands with its chance beside it. The unbiased one may fall below 0, by noise.

X holds a layer's MLP output, averaged over the prompt's tokens, one row per sample. A model here is the run's model
as a row of its matrix left it: the task's own adapter, where a method has one per task.

`unpaired` is the released protocol: each model reads samples of its own task, so rows a of X and Y have nothing to
do with each other and the value compares the shapes of two clouds in an arbitrary order: what it is above chance is
noise. `paired` lets all models read the same samples of all tasks: what CKA is defined for, and the one to decide by.
"""

# N samples, D width, L layers, M models

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retain import config
from retain.assemble import build_model, build_stream
from retain.files import write_json, write_text
from retain.report import figures
from retain.report.html import page
from retain.run.store import RunDir
from retain.stream import Stream
from retain.types import Example, RetainError

ESTIMATOR = "unbiased HSIC (Song et al. 2012)"
BESIDE = ("biased", "chance")
PAIRINGS = ("paired", "unpaired")
FEWEST = 4


# -- the maths -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alike:
    """CKA of two sets of rows: the unbiased estimate, the biased one, and what that is by chance."""

    value: float
    biased: float
    chance: float


def rbf(x_ND: Tensor) -> Tensor:
    """The Gaussian kernel (N, N) at the median distance; all ones where all rows are equal."""
    x_ND = x_ND - x_ND.mean(0)  # distances stay, digits are won
    gram_NN = x_ND @ x_ND.t()
    norms_N = gram_NN.diagonal()
    squared_NN = norms_N[:, None] + norms_N - 2 * gram_NN
    squared_NN[squared_NN <= 1e-12 * norms_N.max()] = 0  # rounding between equal rows
    apart = squared_NN[squared_NN > 0].numpy()
    if not len(apart):
        return torch.ones_like(squared_NN)
    return torch.exp(-squared_NN / (2 * float(np.median(apart))))


def linear(x_ND: Tensor) -> Tensor:
    """The kernel of inner products (N, N) of centred rows."""
    x_ND = x_ND - x_ND.mean(0)  # what both estimators do anyway; digits are won
    return x_ND @ x_ND.t()


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"kernel": rbf, "linear": linear}


def unbiased_hsic(k_NN: Tensor, l_NN: Tensor) -> Tensor:
    """Its unbiased estimate (Song et al. 2012, eq. 5), without the factor 1 / (n (n - 3)). At least 4 rows."""
    n = k_NN.shape[0]
    k_NN, l_NN = k_NN.clone().fill_diagonal_(0), l_NN.clone().fill_diagonal_(0)
    k_N, l_N = k_NN.sum(0), l_NN.sum(0)
    return (k_NN * l_NN).sum() + k_N.sum() * l_N.sum() / ((n - 1) * (n - 2)) - 2 * (k_N @ l_N) / (n - 2)


def _centred(k_NN: Tensor) -> Tensor:
    """H K H."""
    return k_NN - k_NN.mean(0, keepdim=True) - k_NN.mean(1, keepdim=True) + k_NN.mean()


def alike(k_NN: Tensor, l_NN: Tensor) -> Alike:
    """CKA of two kernels in all three ways; nan where one of them is constant."""
    k_NN, l_NN = _centred(k_NN), _centred(l_NN)  # neither estimate changes by it
    own = unbiased_hsic(k_NN, k_NN) * unbiased_hsic(l_NN, l_NN)
    root = ((k_NN * k_NN).sum() * (l_NN * l_NN).sum()).sqrt()
    chance = k_NN.diagonal().sum() * l_NN.diagonal().sum() / (len(k_NN) - 1)
    return Alike(
        value=float(unbiased_hsic(k_NN, l_NN) / own.sqrt()) if own > 0 else float("nan"),
        biased=float((k_NN * l_NN).sum() / root),
        chance=float(chance / root),
    )


def cka(k_NN: Tensor, l_NN: Tensor) -> float:
    """CKA of two kernels, unbiased: about 0 for independent rows, 1 for equal ones."""
    return alike(k_NN, l_NN).value


def kernel_cka(x_ND: Tensor, y_ND: Tensor) -> float:
    """CKA with Gaussian kernels, unbiased; row a of X belongs to row a of Y."""
    return cka(rbf(x_ND.double()), rbf(y_ND.double()))


def linear_cka(x_ND: Tensor, y_ND: Tensor) -> float:
    """CKA with inner products, unbiased; row a of X belongs to row a of Y."""
    return cka(linear(x_ND.double()), linear(y_ND.double()))


def between(acts: Sequence[Tensor], kind: str) -> list[list[list[Alike]]]:
    """CKA of every model with every other in every layer, L x M x M, from activations (L, N, D) of each model.

    One layer at a time: a kernel of 4,096 samples is 128 MB.
    """
    out = []
    for layer in zip(*acts, strict=True):
        kernels = [KERNELS[kind](x_ND.double()) for x_ND in layer]
        M = range(len(kernels))
        upper = {(i, j): alike(kernels[i], kernels[j]) for i in M for j in M if i <= j}
        out.append([[upper[min(i, j), max(i, j)] for j in M] for i in M])
    return out


# -- runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """CKA per layer between models: `values[kind][pairing]` is L x M x M. `n`: samples that each model read, by pairing."""

    models: list[str]
    tasks: list[str]
    n: Mapping[str, int]
    values: Mapping[str, Mapping[str, list[list[list[Alike]]]]]

    def means(self, kind: str, pairing: str, which: str = "value") -> list[float]:
        """The mean over pairs of different models, per layer: of the `value`, the `biased` one, or by `chance`."""
        pairs = list(combinations(range(len(self.models)), 2))
        found = self.values[kind][pairing]
        return [float(np.mean([getattr(layer[a][b], which) for a, b in pairs])) for layer in found]

    def numbers(self, kind: str, pairing: str, which: str = "value") -> list[list[list[float]]]:
        """One of the three numbers of every pair, L x M x M."""
        return [[[getattr(x, which) for x in row] for row in layer] for layer in self.values[kind][pairing]]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Kind and pairing of everything that was measured."""
        return [(kind, pairing) for kind in self.values for pairing in self.values[kind]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, the means included; null where there is no value."""

        def all_of(get: Callable[[str, str, str], Any], which: str) -> dict[str, Any]:
            return {kind: {p: get(kind, p, which) for p in self.values[kind]} for kind in self.values}

        head = {
            "models": self.models,
            "tasks": self.tasks,
            "samples": self.n["paired"],
            "estimator": ESTIMATOR,
        }
        body = {"mean": all_of(self.means, "value"), "cka": all_of(self.numbers, "value")}
        beside = {w: {"mean": all_of(self.means, w), "cka": all_of(self.numbers, w)} for w in BESIDE}
        whole = json.dumps({**head, **body, **beside})
        return dict(json.loads(whole, parse_constant=lambda _: None))


def study(folders: Sequence[Path], samples: int = 50, batch_size: int = 16) -> Study:
    """Run every model of the runs over at most `samples` samples, and compare them.

    A model per trained row of each run; several runs must share base and tasks. Where a task has fewer than four
    test samples there is no unpaired value. RetainError: fewer than two models, or too few samples.
    """
    if samples < FEWEST:
        raise RetainError(f"--samples: at least {FEWEST} are needed, not {samples}")
    names: list[str] = []
    acts: dict[str, list[Tensor]] = {pairing: [] for pairing in PAIRINGS}
    tasks: list[str] = []
    base = ""
    for folder in folders:
        run = RunDir.read(folder)
        recipe = config.parse(run.config, run.path / "config.yaml")
        stream, model = build_stream(recipe), build_model(recipe)
        tasks, base = tasks or [t.name for t in stream], base or model.fingerprint()
        if model.fingerprint() != base or [t.name for t in stream] != tasks:
            raise RetainError(f"{folder}: its base model or its tasks are not those of {folders[0]}")
        n_own = min(samples, *(len(t.test) for t in stream))
        before: list[str] = []
        for row in (r for r in run.rows() if r.trained):
            row.load_model(model.adapters, None)
            own = [t for t in row.learned if t not in before] or row.learned
            before = row.learned
            names.append(f"{run.path.name}: {row.name}" if len(folders) > 1 else row.name)
            acts["paired"].append(_activations(model, _spread(stream, tasks, samples), batch_size))
            acts["unpaired"].append(_activations(model, _spread(stream, own, n_own), batch_size))
    if len(names) < 2:
        said = ", ".join(map(str, folders))
        raise RetainError(f"{said}: {len(names)} trained rows; CKA compares at least two models")
    n = {pairing: min(a.shape[1] for a in found) for pairing, found in acts.items()}
    if n["paired"] < FEWEST:
        raise RetainError(
            f"{folders[0]}: the tasks have {n['paired']} test samples, at least {FEWEST} are needed"
        )
    kept = {p: [a[:, : n[p]] for a in found] for p, found in acts.items() if n[p] >= FEWEST}
    values = {kind: {p: between(found, kind) for p, found in kept.items()} for kind in KERNELS}
    return Study(names, tasks, n, values)


def _spread(stream: Stream, tasks: Sequence[str], n: int) -> list[Example]:
    """At most `n` test samples, evenly from the tasks and evenly spaced within each."""
    chosen = []
    for task in map(stream.named, tasks):
        k = min(-(-n // len(tasks)), len(task.test))
        chosen.append([task.test[i * len(task.test) // k] for i in range(k)])
    return [e for ith in zip_longest(*chosen) for e in ith if e is not None][:n]


def _activations(model: Any, examples: Sequence[Example], batch_size: int) -> Tensor:
    """(L, N, D) on the CPU."""
    parts = [
        model.mlp_means(model.collate(examples[i : i + batch_size], answers=False)).cpu()
        for i in range(0, len(examples), batch_size)
    ]
    return torch.cat(parts, dim=1)


# -- words and pictures --------------------------------------------------------------------------------------


def rows(found: Study) -> list[list[str]]:
    """One row per layer: the mean over pairs of models, unbiased; then the biased value, and that by chance."""
    head, columns = ["layer"], []
    for kind, pairing in found.columns:
        columns.append([f"{v:.4f}" for v in found.means(kind, pairing)])
        beside = zip(*(found.means(kind, pairing, which) for which in BESIDE), strict=True)
        columns.append([f"{biased:.4f} ({chance:.4f})" for biased, chance in beside])
        head += [f"{kind}, {pairing}", "biased (by chance)"]
    return [head, *([str(i), *(c[i] for c in columns)] for i in range(len(columns[0])))]


def write(found: Study, target: Path) -> tuple[Path, Path]:
    """The numbers as `target.json`, the picture as the self-contained page `target.html`."""
    data, picture = target.with_suffix(".json"), target.with_suffix(".html")
    write_json(data, found.to_json())
    write_text(picture, _page(found))
    return data, picture


def _page(found: Study) -> str:
    lines, names, lowest = [], [], 0.0
    for k, (kind, pairing) in enumerate(found.columns):
        points = [(float(i), v) for i, v in enumerate(found.means(kind, pairing)) if v == v]
        lines.append(figures.Line(points, f"s{k % figures.SERIES + 1}", f"{kind}, {pairing}", dots=True))
        names.append(f"{kind}, {pairing}")
        lowest = min([lowest, *(v for _, v in points)])
    n_layers = len(found.values["kernel"]["paired"])
    step = max(1, n_layers // 8)
    x = figures.Axis(0, max(1, n_layers - 1), [(i, str(i)) for i in range(0, n_layers, step)])
    quarters = range(math.floor(4 * lowest), 5)  # an unbiased value may be below 0
    y = figures.Axis(quarters[0] / 4, 1, [(q / 4, f"{q / 4:g}") for q in quarters])
    label = "mean CKA between the models of different tasks, by layer"
    return page(
        "cka.html.j2",
        f"{len(found.models)} models",
        title="CKA between tasks, by layer",
        facts=[
            f"{len(found.models)} models",
            f"{found.n['paired']} samples",
            ESTIMATOR,
            ", ".join(found.tasks),
        ],
        plot=figures.plot(lines, x, y, label),
        legend=figures.legend(names),
        table=rows(found),
        models=found.models,
        layers=list(enumerate(found.numbers("kernel", "paired"))),
        shade=figures.shade,
    )
