"""Direction robustness: what merging does to the directions of the adapters it merged.

RobustMerge (Zeng et al., NeurIPS 2025, arXiv 2502.17159, section 3.2 and figure 7). For a module with single-task
change dW_n = U diag(sigma) V^T and merged change M = U' diag(sigma') V'^T, both sorted by size:

    cosine_i = (|<u_i, u'_i>| + |<v_i, v'_i>|) / 2        the i-th direction before and after
    ratio_i  = sigma'_i / sigma_i                          how much it is used after, to before
    kept_i   = |u_i^T M v_i| / sigma_i                     how much of the direction itself is left (ours)

each for the largest singular value and as a mean over the others of the adapter's rank. Directions are paired by
their place in the order, as we read the paper; `kept` does not depend on that pairing.
"""

# R rank of the single-task change

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from retain import config
from retain.adapters.lora import LoraLinear
from retain.adapters.peft_folder import CONFIG
from retain.assemble import build_model
from retain.files import write_json, write_text
from retain.merge.folders import change, open_all
from retain.merge.parts import Low, Part, svd, total
from retain.report import figures
from retain.report.html import page
from retain.run.store import RunDir
from retain.types import RetainError

MEASURES = ("cosine", "ratio", "kept")


@dataclass(frozen=True)
class Robustness:
    """Of one module and one task: (largest, mean of the others) of each measure."""

    cosine: tuple[float, float]
    ratio: tuple[float, float]
    kept: tuple[float, float]


def robustness(single: Part, merged: Part) -> Robustness | None:
    """The three measures; None where the single-task change is zero."""
    rank = single.rank if isinstance(single, Low) else min(single.shape)
    U, S, Vh = svd(single)
    U2, S2, Vh2 = svd(merged)
    k = min(rank, int((1e-6 * S[0] < S).sum()) if S[0] > 0 else 0, len(S2))
    if k == 0:
        return None
    U, S, V, U2, S2, V2 = U[:, :k], S[:k], Vh[:k].T, U2[:, :k], S2[:k], Vh2[:k].T
    cosine = ((U * U2).sum(0).abs() + (V * V2).sum(0).abs()) / 2
    through = merged.B.T @ U if isinstance(merged, Low) else merged.T @ U
    left = (through * (merged.A @ V if isinstance(merged, Low) else V)).sum(0).abs() / S
    found = [(float(m[0]), float(m[1:].mean()) if k > 1 else float("nan")) for m in (cosine, S2 / S, left)]
    return Robustness(*found)


@dataclass(frozen=True)
class Study:
    """Means over modules and tasks, per layer: `values[measure]` is a list of (largest, others)."""

    title: str
    tasks: list[str]
    layers: list[str]
    values: dict[str, list[tuple[float, float]]]
    modules: dict[str, dict[str, Robustness]]  # task -> module -> measures


def study(paths: Sequence[Path]) -> Study:
    """A run of `merge_tasks`, or the merged PEFT folder followed by the folders that were merged."""
    if len(paths) > 1 or (paths[0] / CONFIG).is_file():
        if len(paths) < 2:
            raise RetainError(f"{paths[0]}: name the merged adapter first, then those it was merged from")
        tasks, found = [p.name for p in paths[1:]], list(_folders(paths))
    else:
        tasks, found = _run(paths[0])
    modules: dict[str, dict[str, Robustness]] = {t: {} for t in tasks}
    for path, singles, merged in found:
        for task, single in zip(tasks, singles):
            measured = robustness(single, merged)
            if measured is not None:
                modules[task][path] = measured
    names = list(dict.fromkeys(_layer(path) for task in tasks for path in modules[task]))
    if not names:
        raise RetainError(f"{paths[0]}: no module changed, there is no direction to measure")
    values = {m: [_mean(modules, m, name) for name in names] for m in MEASURES}
    return Study(paths[0].name, tasks, names, values, modules)


def _mean(modules: dict[str, dict[str, Robustness]], measure: str, layer: str) -> tuple[float, float]:
    pairs = [
        getattr(r, measure)
        for by_path in modules.values()
        for path, r in by_path.items()
        if _layer(path) == layer
    ]
    first, rest = [p[0] for p in pairs], [p[1] for p in pairs if p[1] == p[1]]
    return fmean(first), fmean(rest) if rest else float("nan")


def _layer(path: str) -> str:
    found = re.search(r"\.layers\.(\d+)\.", f".{path}.")
    return found[1] if found else path


def _folders(paths: Sequence[Path]) -> Iterator[tuple[str, list[Part], Part]]:
    opened = open_all(paths, any_base=True)
    for path, leaves in opened[0].modules.items():
        if "lora_A" in leaves:
            merged, *singles = (change(a, path, None) for a in opened)
            yield path, singles, merged


def _run(folder: Path) -> tuple[list[str], list[tuple[str, list[Part], Part]]]:
    """The last trained row: adapters that are on are the merge, the others were merged."""
    run = RunDir.read(folder)
    rows = [row for row in run.rows() if row.trained]
    if not rows:
        raise RetainError(f"{folder}: no trained row yet")
    bank = build_model(config.parse(run.config, run.path / "config.yaml")).adapters
    rows[-1].load_model(bank, None)
    on = {n: float(w) for n, w in bank.mix.weights.items()}
    singles = [n for n in bank.names if n not in on]
    if not on or not singles or bank.kind != "lora":
        raise RetainError(
            f"{folder}: its last row holds no merge beside the adapters it was made from "
            "(method merge_tasks leaves that)"
        )

    def part(site: LoraLinear, name: str) -> Low:
        t = site.tensors(name)
        return Low(t["lora_B"].detach().float() * site.spec.scale, t["lora_A"].detach().float())

    found: list[tuple[str, list[Part], Part]] = []
    for path, site in bank.sites.items():
        if isinstance(site, LoraLinear):
            merged = total([part(site, n) for n in on], list(on.values()))
            found.append((path, [part(site, n) for n in singles], merged))
    return singles, found


# -- words and pictures --------------------------------------------------------------------------------------


def rows(found: Study) -> list[list[str]]:
    """One row per layer."""
    head = ["layer", *(f"{m}, {which}" for m in MEASURES for which in ("largest", "others"))]
    body = [
        [name, *(f"{v:.3f}" for m in MEASURES for v in found.values[m][i])]
        for i, name in enumerate(found.layers)
    ]
    return [head, *body]


def write(found: Study, target: Path) -> tuple[Path, Path]:
    """The numbers as `target.json`, the pictures as the self-contained page `target.html`."""
    data, picture = target.with_suffix(".json"), target.with_suffix(".html")
    plain = {
        task: {
            path: {m: [None if v != v else v for v in getattr(r, m)] for m in MEASURES}
            for path, r in by.items()
        }
        for task, by in found.modules.items()
    }
    by_layer = {m: [[None if v != v else v for v in pair] for pair in found.values[m]] for m in MEASURES}
    write_json(data, {"tasks": found.tasks, "layers": found.layers, "mean": by_layer, "modules": plain})
    write_text(picture, _page(found))
    return data, picture


def _page(found: Study) -> str:
    plots = []
    n = len(found.layers)
    x = figures.Axis(0, max(1, n - 1), [(i, found.layers[i]) for i in range(0, n, max(1, n // 8))])
    unit = figures.Axis(0, 1, [(v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1)])
    told = {
        "cosine": "Cosine of matching directions, single task and merged (1: unturned)",
        "ratio": "Singular value merged over single task",
        "kept": "How much of each direction is left in the merge",
    }
    for m, text in told.items():
        lines = [
            figures.Line(
                [(float(i), pair[k]) for i, pair in enumerate(found.values[m]) if pair[k] == pair[k]],
                f"s{k + 1}", which, dots=True,
            )
            for k, which in enumerate(("largest", "others"))
        ]  # fmt: skip
        y = unit if m == "cosine" else figures.axis([v for line in lines for _, v in line.points])
        plots.append((text, figures.plot(lines, x, y, text)))
    return page(
        "merge.html.j2",
        f"{len(found.tasks)} adapters",
        title=f"Directions after merging: {found.title}",
        facts=[f"{len(found.tasks)} adapters", ", ".join(found.tasks)],
        plots=plots,
        legend=figures.legend(["largest singular value", "mean of the others"]),
        table=rows(found),
    )
