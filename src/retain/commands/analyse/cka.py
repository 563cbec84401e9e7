"""How alike the models of a stream's tasks are in each layer: centred kernel alignment (CKA).

Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019 (arXiv 1905.00414); used by
HiDe-LLaVA (arXiv 2503.12941) to decide which layers to route and which to sum.

    HSIC(K, L) = sum of (H K H) o (H L H),  H = I - 11'/n
    CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))
    kernel: K_ab = exp(-|x_a - x_b|^2 / (2 sigma^2)), sigma^2 the median of X's non-zero squared distances
    linear: K = X X'

X holds a layer's MLP output, averaged over the prompt's tokens, one row per sample. A model here is the run's model
as a row of its matrix left it: the task's own adapter, where a method has one per task.

`unpaired` is the released protocol: each model reads samples of its own task, so rows a of X and Y have nothing to
do with each other and the value compares the shapes of two clouds in an arbitrary order. `paired` lets all models
read the same samples of all tasks: what CKA is defined for, and the one to decide by.
"""

# N samples, D width, L layers, M models

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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

KINDS = ("kernel", "linear")
PAIRINGS = ("paired", "unpaired")
FEWEST = 4


# -- the maths -----------------------------------------------------------------------------------------------


def rbf(x_ND: Tensor) -> Tensor:
    """The Gaussian kernel (N, N) at the median distance; all ones where all rows are equal."""
    squared_NN = torch.cdist(x_ND, x_ND, compute_mode="donot_use_mm_for_euclid_dist").square()
    apart = squared_NN[squared_NN > 0]
    if not len(apart):
        return torch.ones_like(squared_NN)
    return torch.exp(-squared_NN / (2 * apart.quantile(0.5)))


def hsic(k_NN: Tensor, l_NN: Tensor) -> Tensor:
    """Hilbert-Schmidt independence criterion of two kernels, without its constant factor."""
    return (_centred(k_NN) * _centred(l_NN)).sum()


def _centred(k_NN: Tensor) -> Tensor:
    """H K H."""
    return k_NN - k_NN.mean(0, keepdim=True) - k_NN.mean(1, keepdim=True) + k_NN.mean()


def cka(k_NN: Tensor, l_NN: Tensor) -> float:
    """CKA of two kernels: 0 to 1, and nan where one of them is constant."""
    return float(hsic(k_NN, l_NN) / (hsic(k_NN, k_NN) * hsic(l_NN, l_NN)).sqrt())


def kernel_cka(x_ND: Tensor, y_ND: Tensor) -> float:
    """CKA with Gaussian kernels; row a of X belongs to row a of Y."""
    return cka(rbf(x_ND.double()), rbf(y_ND.double()))


def linear_cka(x_ND: Tensor, y_ND: Tensor) -> float:
    """CKA with inner products; row a of X belongs to row a of Y."""
    x_ND, y_ND = x_ND.double(), y_ND.double()
    return cka(x_ND @ x_ND.t(), y_ND @ y_ND.t())


def between(acts: Sequence[Tensor], kind: str) -> list[list[list[float]]]:
    """CKA of every model with every other in every layer, L x M x M, from activations (L, N, D) of each model."""
    kernel = rbf if kind == "kernel" else lambda x: x @ x.t()
    kernels = [[kernel(x_ND.double()) for x_ND in act] for act in acts]
    n_layers = len(acts[0])
    return [[[cka(a[i], b[i]) for b in kernels] for a in kernels] for i in range(n_layers)]


# -- runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """CKA per layer between models: `values[kind][pairing]` is L x M x M."""

    models: list[str]
    tasks: list[str]
    n: int
    values: Mapping[str, Mapping[str, list[list[list[float]]]]]

    def means(self, kind: str, pairing: str) -> list[float]:
        """The mean over pairs of different models, per layer."""
        pairs = list(combinations(range(len(self.models)), 2))
        found = self.values[kind][pairing]
        return [float(np.mean([layer[a][b] for a, b in pairs])) for layer in found]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Kind and pairing of everything that was measured."""
        return [(kind, pairing) for kind in self.values for pairing in self.values[kind]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, the means included; null where there is no value."""
        means = {kind: {p: self.means(kind, p) for p in self.values[kind]} for kind in self.values}
        head = {"models": self.models, "tasks": self.tasks, "samples": self.n}
        whole = json.dumps({**head, "mean": means, "cka": self.values})
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
    values = {kind: {p: between(found, kind) for p, found in kept.items()} for kind in KINDS}
    return Study(names, tasks, n["paired"], values)


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
    """One row per layer: the mean over pairs of models."""
    columns = [found.means(kind, pairing) for kind, pairing in found.columns]
    head = ["layer", *(f"{kind}, {pairing}" for kind, pairing in found.columns)]
    return [head, *([str(i), *(f"{c[i]:.4f}" for c in columns)] for i in range(len(columns[0])))]


def write(found: Study, target: Path) -> tuple[Path, Path]:
    """The numbers as `target.json`, the picture as the self-contained page `target.html`."""
    data, picture = target.with_suffix(".json"), target.with_suffix(".html")
    write_json(data, found.to_json())
    write_text(picture, _page(found))
    return data, picture


def _page(found: Study) -> str:
    lines, names = [], []
    for k, (kind, pairing) in enumerate(found.columns):
        points = [(float(i), v) for i, v in enumerate(found.means(kind, pairing)) if v == v]
        lines.append(figures.Line(points, f"s{k % figures.SERIES + 1}", f"{kind}, {pairing}", dots=True))
        names.append(f"{kind}, {pairing}")
    n_layers = len(found.values["kernel"]["paired"])
    step = max(1, n_layers // 8)
    x = figures.Axis(0, max(1, n_layers - 1), [(i, str(i)) for i in range(0, n_layers, step)])
    y = figures.Axis(0, 1, [(v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1)])
    label = "mean CKA between the models of different tasks, by layer"
    return page(
        "cka.html.j2",
        f"{len(found.models)} models",
        title="CKA between tasks, by layer",
        facts=[f"{len(found.models)} models", f"{found.n} samples", ", ".join(found.tasks)],
        plot=figures.plot(lines, x, y, label),
        legend=figures.legend(names),
        table=rows(found),
        models=found.models,
        layers=list(enumerate(found.values["kernel"]["paired"])),
        shade=figures.shade,
    )
