"""`retain merge`: what is merged, from words on the command line or from a YAML recipe, checked before anything is read.

retain merge adapters/iconqa adapters/flickr --with ties density=0.2 --weights 1,0.5 --to merged
retain merge recipe.yaml

models:                          # the same as a recipe; paths are relative to it
  - {model: adapters/iconqa, weight: 1.0}
  - adapters/flickr
method: ties
parameters: {density: 0.2}
to: merged
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from retain.assemble import model_source
from retain.merge.base import KEEP, Keep, available_mergers, merger
from retain.merge.folders import Summary, merge_checkpoint, merge_folders
from retain.plain import read_small, read_yaml, real_path
from retain.types import RetainError
from retain.values import CountOrOff, PathText, fill, ranged

GREEK = {"lambda": "lam"}
"""What people call a parameter whose name Python does not allow."""


@ranged("models")
@dataclass(frozen=True)
class ModelEntry:
    """One adapter of a recipe."""

    model: Annotated[PathText, Field(min_length=1)]
    weight: float = 1.0


@ranged("merge")
@dataclass(frozen=True)
class MergeSpec:
    """A recipe of `retain merge`."""

    models: list[ModelEntry]
    method: str
    to: PathText | Literal[""] = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    keep: str | None = None
    rank: CountOrOff = 0
    merged: bool = False
    base: PathText | None = None
    any_base: bool = False


def from_file(path: Path, to: Path | None = None, merged: bool = False) -> MergeSpec:
    """A recipe with absolute paths; `to` and `merged` of the command line win."""
    data = read_yaml(read_small(path, "a recipe"), str(path))
    if isinstance(data, dict) and isinstance(data.get("models"), list):
        data["models"] = [{"model": m} if isinstance(m, str) else m for m in data["models"]]
    spec = fill(MergeSpec, data, str(path))
    if not spec.models:
        raise RetainError(f"{path}: models: the list is empty; name at least one adapter")
    base = path.resolve().parent
    target = str(to) if to else str(base / real_path(spec.to, "to")) if spec.to else ""
    models = [ModelEntry(str(base / real_path(m.model, "models")), m.weight) for m in spec.models]
    folder = str(base / real_path(spec.base, "base")) if spec.base and spec.base != "pocket" else spec.base
    whole = merged or spec.merged
    return MergeSpec(
        models, spec.method, target, spec.parameters, spec.keep, spec.rank, whole, folder, spec.any_base
    )


def from_words(
    words: Sequence[str], method: str, weights: str | None = None, to: Path | None = None, **more: Any
) -> MergeSpec:
    """Folders and `key=value` parameters in any order, weights as `1,0.5`."""
    folders = [w for w in words if "=" not in w or (len(w) < 4000 and Path(w).is_dir())]
    params = {}
    for word in words:
        if word not in folders:
            key, _, value = word.partition("=")
            params[GREEK.get(key, key)] = read_yaml(value, f"parameter {word!r}")
    if not folders:
        raise RetainError("name at least one adapter folder (or a recipe.yaml)")
    numbers = [1.0] * len(folders)
    if weights is not None:
        try:
            numbers = [float(w) for w in weights.replace(",", " ").split()]
        except ValueError:
            raise RetainError(f"--weights {weights!r}: write numbers such as 1,0.5") from None
        if len(numbers) != len(folders):
            raise RetainError(f"--weights: {len(numbers)} numbers for {len(folders)} adapters")
    models = [ModelEntry(f, w) for f, w in zip(folders, numbers)]
    return MergeSpec(models, method, str(to or ""), params, **more)


def merge(spec: MergeSpec) -> Summary:
    """Check a recipe and carry it out."""
    keep = _keep(spec.keep)
    params = {GREEK.get(k, k): v for k, v in spec.parameters.items()}
    merger(spec.method).check(params)
    if not spec.to:
        raise RetainError("where to? name a folder with --to DIR (or `to:` in the recipe)")
    bad = next((m for m in spec.models if not math.isfinite(m.weight)), None)
    if bad:
        raise RetainError(f"{bad.model}: the weight {bad.weight} is no finite number")
    folders = [m.model for m in spec.models]
    how: dict[str, Any] = {
        "params": params,
        "weights": [m.weight for m in spec.models],
        "keep": keep,
        "rank": spec.rank,
        "any_base": spec.any_base,
        "base": model_source(spec.base) if spec.base else None,
    }
    if not spec.merged:
        return merge_folders(folders, spec.method, spec.to, **how)
    if how["base"] is None:
        raise RetainError("--merged writes the base model with the change inside: name it with --base DIR")
    return merge_checkpoint(folders, spec.method, spec.to, **how)


def _keep(value: str | None) -> Keep | None:
    for keep in KEEP:
        if keep == value:
            return keep
    if value is not None:
        raise RetainError(f"keep: {value!r} is none of {list(KEEP)}")
    return None


def merger_rows() -> list[list[str]]:
    """Every merger with its parameters, for a table."""
    head = ["merger", "what it does", "parameters", "source"]
    body = [
        [m.name, m.about, ", ".join(f"{k}={v}" for k, v in m.params.items()), m.source]
        for m in available_mergers().values()
    ]
    return [head, *body]
