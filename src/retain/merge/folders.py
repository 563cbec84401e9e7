"""Merging PEFT folders on disk, module by module: stock PEFT in, stock PEFT or a plain HF checkpoint out.

    merge_folders(["adapters/iconqa", "adapters/flickr"], "copa", "merged", params={"density": 0.2})

Read are plain LoRA, rsLoRA, per-module ranks and alphas, `lora_bias`, full copies (`modules_to_save`), and
DoRA where the base model's weights are given. In memory are one module of every adapter and the result. A
folder is written under a temporary name and renamed when it is whole, so nothing half-written is left.

Two things differ from merging states: a module's scale (alpha / r) is folded into B first, so that adapters
of different scales mix (the result has scale 1); and full copies, whose change is not known without the base,
are averaged: that is base + the mean change, for any merger.
"""

# O out features, I in features, R rank

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retain.adapters.peft_format import CONFIG, WEIGHTS, PeftFolder, aliases, supported
from retain.files import write_json
from retain.merge.base import Keep, Merger, kept, merger, same_modules, same_shape, where
from retain.merge.parts import Low, Part, total
from retain.types import RetainError

_PREFIX = "base_model.model."
HANDLED = ("use_dora", "lora_bias", "fan_in_fan_out")
"""Kinds of LoRA beyond the plain one that merging can read."""


@dataclass(frozen=True)
class Summary:
    """What was written: a folder, its modules, the ranks and the errors of keeping them."""

    folder: Path
    merger: str
    ranks: dict[str, int]
    errors: dict[str, float] = field(default_factory=dict)
    copies: int = 0

    def text(self) -> str:
        """For the terminal."""
        ranks = sorted(set(self.ranks.values()))
        lines = [f"{self.folder}: {len(self.ranks)} modules merged by {self.merger}"]
        if ranks and ranks[-1]:
            lines.append(f"rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[-1] != ranks[0] else ""))
        worst = max(self.errors, key=lambda k: self.errors[k], default=None)
        if worst is not None and self.errors[worst]:
            mean = sum(self.errors.values()) / len(self.errors)
            lines.append(
                f"truncated: relative error {mean:.3f} on average, {self.errors[worst]:.3f} at {worst}"
            )
        if self.copies:
            lines.append(f"{self.copies} full copies (modules_to_save) averaged")
        return "; ".join(lines)


# -- reading ---------------------------------------------------------------------------------------------


class Base:
    """A Hugging Face checkpoint's weights by module path, read one at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shards = sorted(self.folder.glob("*.safetensors"))
        if not self.shards or not (self.folder / "config.json").is_file():
            raise RetainError(
                f"{folder}: no model folder (config.json and safetensors); name one with --base"
            )
        self.files = {}
        for shard in self.shards:
            try:
                file: Any = safe_open(shard, "pt")
                self.files[shard] = file.__enter__()
            except SafetensorError as error:
                raise RetainError(f"{shard}: no whole safetensors file: {error}") from None

    @cached_property
    def keys(self) -> dict[str, tuple[Path, str]]:
        """Every name that a weight goes by, to its shard and key there."""
        return {
            name: (shard, key)
            for shard, f in self.files.items()
            for key in f.keys()  # noqa: SIM118
            for name in aliases(key)
        }

    def weight(self, path: str) -> Tensor:
        """The weight (O, I) of a module in fp32; an error that names it where the base has none."""
        shard, key = self.place(f"{path}.weight")
        value: Tensor = self.files[shard].get_tensor(key)
        if not value.is_floating_point():
            raise RetainError(f"{self.folder}: {path} is quantised ({value.dtype}); give the full base")
        return value.float()

    def place(self, name: str) -> tuple[Path, str]:
        """Shard and key of a tensor by any of its names."""
        for alias in aliases(name):
            if alias in self.keys:
                return self.keys[alias]
        raise RetainError(f"{self.folder}: no weight {name}: the adapters were made for another base model")


def open_all(folders: Sequence[str | Path], *, any_base: bool = False) -> list[PeftFolder]:
    """Open every adapter and refuse what does not belong together, before a tensor is read."""
    opened = [PeftFolder.open(f) for f in folders]
    for a in opened:
        supported(a.config, a.folder, but=HANDLED)
        for path, leaves in a.modules.items():
            kinds = set(leaves)
            if not ({"lora_A", "lora_B"} <= kinds <= {"lora_A", "lora_B", "lora_bias", "magnitude"}) and not (
                kinds <= {"weight", "bias"}
            ):
                raise RetainError(
                    f"{a.folder}: {next(iter(leaves.values()))} is no pair of LoRA factors of a linear layer "
                    "and no full copy; it cannot be merged"
                )
            if "lora_A" in leaves:
                if len(a.shapes[leaves["lora_A"]]) != 2:
                    raise RetainError(
                        f"{a.folder}: {path}: factors of {len(a.shapes[leaves['lora_A']])} dimensions "
                        "(a convolution); only linear layers can be merged"
                    )
                a.scale(path)
    first = opened[0]
    for a in opened[1:] if not any_base else ():
        for told, mine, theirs in (
            ("fingerprint", first.base, a.base),
            ("base_model_name_or_path", _base_name(first), _base_name(a)),
        ):
            if mine and theirs and mine != theirs:
                raise RetainError(
                    f"{a.folder}: made for another base model ({told} {theirs}) than {first.folder} ({mine}); "
                    "--any-base merges them all the same"
                )
            if told == "fingerprint" and mine and theirs:
                break  # equal weights, whatever the folders are called
    names = [str(a.folder) for a in opened]
    same_modules([{_key(path, leaves): 0 for path, leaves in a.modules.items()} for a in opened], names)
    if len({bool(a.config.get("fan_in_fan_out")) for a in opened}) > 1:
        raise RetainError(f"{names[1]}: fan_in_fan_out differs from {names[0]}")
    return opened


def _key(path: str, leaves: Mapping[str, str]) -> str:
    """A module with its kind, for comparing."""
    return path if "lora_A" in leaves else f"{path} (a full copy of {', '.join(sorted(leaves))})"


def _base_name(a: PeftFolder) -> str:
    return str(a.config.get("base_model_name_or_path") or "").rstrip("/")


def change(a: PeftFolder, path: str, base: Base | None) -> Part:
    """A LoRA module's change of its weight, with the scale in B; dense for DoRA.

    DoRA (Liu et al. 2024, arXiv 2402.09353): W' = m (W + s B A) / |W + s B A|, the norm of each output row.
    """
    leaves, s = a.modules[path], a.scale(path)
    A, B = a.tensor(leaves["lora_A"]).float(), a.tensor(leaves["lora_B"]).float()
    if B.ndim != 2 or B.shape[1] != A.shape[0]:
        raise RetainError(
            f"{a.folder}: {path}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit"
        )
    _finite(a, {leaves["lora_A"]: A, leaves["lora_B"]: B})
    low = Low(B * s if s != 1 else B, A)
    if "magnitude" not in leaves:
        return low
    if base is None:
        raise RetainError(
            f"{a.folder}: DoRA's change depends on the base weights; name the base model with --base DIR"
        )
    W, m = base.weight(path), a.tensor(leaves["magnitude"]).float()
    if W.shape != low.shape or m.numel() != W.shape[0]:
        raise RetainError(f"{a.folder}: {path} is {low.shape}, the base has {tuple(W.shape)}")
    _finite(a, {leaves["magnitude"]: m})
    tuned = W + low.dense()
    norm_O1: Tensor = torch.linalg.vector_norm(tuned, dim=1, keepdim=True)
    return m.reshape(-1, 1) / norm_O1 * tuned - W


def _finite(a: PeftFolder, tensors: Mapping[str, Tensor]) -> None:
    for key, t in tensors.items():
        if not torch.isfinite(t).all():
            bad = t[~torch.isfinite(t)]
            raise RetainError(
                f"{a.folder}: {key} holds {float(bad[0])} ({bad.numel()} of {t.numel()} values)"
            )


# -- merging ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """What to merge and how; `modules` yields the results one after another."""

    adapters: list[PeftFolder]
    merger: Merger
    weights: list[float]
    params: dict[str, Any]
    keep: Keep
    rank: int
    base: Base | None

    def modules(self) -> Iterator[tuple[str, str, Part, float]]:
        """path, kind (`lora`, `lora_bias`, `weight`, `bias`), the merged tensor, the error of keeping it."""
        names = [str(a.folder) for a in self.adapters]
        params = self.merger.surveyed(self.params, self._changes)
        for path, leaves in self.adapters[0].modules.items():
            if "lora_A" in leaves:
                parts = [change(a, path, self.base) for a in self.adapters]
                same_shape(parts, path, names)
                ranks = [a.rank(path) for a in self.adapters]
                with where(path):
                    merged = self.merger.part(parts, self.weights, **params)
                    del parts
                    yield path, "lora", *kept(merged, ranks, self.keep, self.rank)
                if any("lora_bias" in a.modules[path] for a in self.adapters):
                    biases = [_bias(a, path) for a in self.adapters]
                    same_shape(biases, path, names)
                    with where(path):
                        yield path, "lora_bias", self.merger.part(biases, self.weights, **params), 0.0
                continue
            for leaf in leaves:
                full = []
                for a in self.adapters:
                    full.append(a.tensor(a.modules[path][leaf]).float())
                    _finite(a, {a.modules[path][leaf]: full[-1]})
                same_shape(full, f"{path}.{leaf}", names)
                share = sum(self.weights)
                if share <= 0:
                    raise RetainError(f"{path}: full copies are averaged: the weights need a positive sum")
                yield path, leaf, total(full, [w / share for w in self.weights]), 0.0

    def _changes(self) -> Iterator[list[Part]]:
        """The LoRA modules of all adapters, one after another: read once more where a merger looks at all first."""
        names = [str(a.folder) for a in self.adapters]
        for path, leaves in self.adapters[0].modules.items():
            if "lora_A" in leaves:
                parts = [change(a, path, self.base) for a in self.adapters]
                same_shape(parts, path, names)
                yield parts


def _bias(a: PeftFolder, path: str) -> Tensor:
    """The bias that B adds, with the scale in it; zero where an adapter has none."""
    leaves = a.modules[path]
    if "lora_bias" not in leaves:
        return torch.zeros(a.shapes[leaves["lora_B"]][0])
    value = a.tensor(leaves["lora_bias"]).float() * a.scale(path)
    _finite(a, {leaves["lora_bias"]: value})
    return value


def plan(
    folders: Sequence[str | Path],
    method: str,
    *,
    params: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    keep: Keep | None = None,
    rank: int = 0,
    base: str | Path | None = None,
    any_base: bool = False,
) -> Plan:
    """Check everything that can be checked from names, numbers and headers."""
    of, params = merger(method), dict(params or {})
    of.check(params)
    w = of.weights(len(folders), weights)
    adapters = open_all(folders, any_base=any_base)
    return Plan(adapters, of, w, params, keep or of.keep, rank, Base(base) if base else None)


def merge_folders(folders: Sequence[str | Path], method: str, to: str | Path, **how: Any) -> Summary:
    """Merge PEFT folders into one PEFT folder; see `plan` for the keywords.

    The result has scale 1 (alpha = r) and ranks per module where they differ; the type is that of the inputs,
    or fp32 where they differ.
    """
    made = plan(folders, method, **how)
    if made.keep == "dense":
        raise RetainError(
            "keep: a PEFT adapter has no dense form; use cat or svd, or write a checkpoint (--merged)"
        )
    first = made.adapters[0]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    copies = 0
    with aside(to) as part:
        for path, kind, merged, error in made.modules():
            dtype = _dtype(made.adapters, path)
            if kind == "lora":
                assert isinstance(merged, Low)
                ranks[path], errors[path] = merged.rank, error
                tensors[f"{_PREFIX}{path}.lora_A.weight"] = _cast(merged.A, dtype, path)
                tensors[f"{_PREFIX}{path}.lora_B.weight"] = _cast(merged.B, dtype, path)
            else:
                assert isinstance(merged, Tensor)
                leaf = "lora_B.bias" if kind == "lora_bias" else kind
                tensors[f"{_PREFIX}{path}.{leaf}"] = _cast(merged, dtype, path)
                copies += kind != "lora_bias"
        save_file(tensors, part / WEIGHTS, {"format": "pt", "retain_base": first.base})
        write_json(part / CONFIG, _config(made, ranks))
    return Summary(Path(to), made.merger.name, ranks, errors, copies)


def _cast(t: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    out = t.to(dtype).contiguous()
    if not torch.isfinite(out).all():
        raise RetainError(f"{path}: the merged values (up to {float(t.abs().max()):.1e}) do not fit {dtype}")
    return out


def _dtype(adapters: Sequence[PeftFolder], path: str) -> torch.dtype:
    kinds = {a.tensor(next(iter(a.modules[path].values()))).dtype for a in adapters}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _config(made: Plan, ranks: Mapping[str, int]) -> dict[str, Any]:
    configs = [a.config for a in made.adapters]
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    other = {path: r for path, r in ranks.items() if r != common}
    targets = {
        json.dumps(sorted(t) if isinstance(t := c.get("target_modules"), list) else t) for c in configs
    }
    return {
        **configs[0],
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_bias": any(c.get("lora_bias") for c in configs),
        "target_modules": configs[0].get("target_modules") if len(targets) == 1 else sorted(ranks),
    }


# -- into the base ---------------------------------------------------------------------------------------


def merge_checkpoint(
    folders: Sequence[str | Path], method: str, to: str | Path, *, base: str | Path, **how: Any
) -> Summary:
    """Merge PEFT folders into the base model's weights: a plain Hugging Face checkpoint, shard by shard.

    Exact unless `keep="svd"` is asked for. Sums are fp32 and rounded once to the base's type. Every other
    file of the base is copied.
    """
    made = plan(folders, method, base=base, **{**how, "keep": how.get("keep") or "dense"})
    assert made.base is not None
    transpose = bool(made.adapters[0].config.get("fan_in_fan_out"))
    targets = _targets(made, made.base)
    errors: dict[str, float] = {}
    copies = 0
    with aside(to) as part:
        _copy_rest(made.base, part)
        for shard, f in made.base.files.items():
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            todo = {what: key for what, (place, key) in targets.items() if place == shard}
            for path, kind, merged, error in _some(made, {path for path, _ in todo}).modules():
                key = todo.get((path, kind), "")
                if not key:
                    continue  # a bias and its weight may lie in two shards
                delta = merged.dense() if isinstance(merged, Low) else merged
                delta = delta.T if transpose and kind == "lora" else delta
                W, copied = tensors[key], kind in ("weight", "bias")
                if W.shape != delta.shape or not W.is_floating_point():
                    told = f"{tuple(W.shape)} {W.dtype}"
                    raise RetainError(f"{key}: the base has {told}, the adapters {tuple(delta.shape)}")
                tensors[key] = _cast(delta if copied else W.float() + delta, W.dtype, key)
                copies += copied
                if kind == "lora":
                    errors[path] = error
            save_file(tensors, part / shard.name, f.metadata() or {"format": "pt"})
    return Summary(Path(to), made.merger.name, dict.fromkeys(errors, 0), errors, copies)


def _targets(made: Plan, base: Base) -> dict[tuple[str, str], tuple[Path, str]]:
    """(path, kind) of everything that is merged to its shard and key in the base."""
    out: dict[tuple[str, str], tuple[Path, str]] = {}
    for path, leaves in made.adapters[0].modules.items():
        if "lora_A" not in leaves:
            out |= {(path, leaf): base.place(f"{path}.{leaf}") for leaf in leaves}
            continue
        out[path, "lora"] = base.place(f"{path}.weight")
        if any("lora_bias" in a.modules[path] for a in made.adapters):
            out[path, "lora_bias"] = base.place(f"{path}.bias")
    return out


def _some(made: Plan, paths: set[str]) -> Plan:
    """The same plan for some modules (a shard's)."""
    chosen = [
        replace(a, modules={path: leaves for path, leaves in a.modules.items() if path in paths})
        for a in made.adapters
    ]
    return replace(made, adapters=chosen)


def _copy_rest(base: Base, part: Path) -> None:
    for item in base.folder.iterdir():
        if item in base.shards or item.name.startswith("."):
            continue
        if item.is_dir():
            shutil.copytree(item, part / item.name)
        else:
            shutil.copy2(item, part / item.name)


@contextmanager
def aside(to: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is whole; after an error nothing is left."""
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RetainError(f"{to} exists and is not empty; choose another folder with --to")
    part = to.parent / f".{to.name}.part-{os.getpid()}"
    part.mkdir(parents=True)
    try:
        yield part
        if to.is_dir():
            to.rmdir()
        part.rename(to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
