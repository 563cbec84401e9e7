"""Merging PEFT folders on disk, module by module: stock PEFT in, stock PEFT or a plain HF checkpoint out.

    merge_folders(["adapters/iconqa", "adapters/flickr"], "copa", "merged", params={"density": 0.2})

Read are plain LoRA, rsLoRA, per-module ranks and alphas, embeddings, `lora_bias`, full copies (`modules_to_save`), and
DoRA where the base model's weights are given. In memory are one module of every adapter and the result. A folder is
written under a temporary name and renamed when it is whole, so nothing half-written is left.

Two things differ from merging states: a module's scale (alpha / r) is folded into B first, so that adapters of
different scales mix (the result has scale 1). And a full copy's change is known only where the base is given: then it
is merged like any other change; without the base copies are averaged by weight (base + the mean change, for any
merger), and a negative weight is refused.
"""

# O out features, I in features, R rank

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from retain.adapters.checkpoint import INDEX, Checkpoint, bare, untied
from retain.adapters.peft_folder import CONFIG, PREFIX, WEIGHTS, PeftFolder, aliases
from retain.files import aside, write_json
from retain.merge.base import Keep, Merger, kept, merger, same_modules, same_shape, where
from retain.merge.parts import Low, Part, total
from retain.types import RetainError

HANDLED = ("use_dora", "lora_bias", "fan_in_fan_out")
"""Kinds of LoRA beyond the plain one that merging can read."""

_OTHER_WEIGHTS = re.compile(
    r"(pytorch_model|tf_model|flax_model|consolidated|model).*\.(bin|pth|pt|h5|msgpack|safetensors|gguf)(\.index\.json)?"
)
"""The base's weights once more, in files that `from_pretrained` does not read: they would be the unmerged ones."""


@dataclass(frozen=True)
class Summary:
    """What was written: a folder, its modules, the ranks and the errors of keeping them."""

    folder: Path
    merger: str
    ranks: dict[str, int]
    errors: dict[str, float] = field(default_factory=dict)
    copies: int = 0
    averaged: bool = False  # full copies: their changes are not known without the base

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
            how = (
                f"averaged (with --base their changes are merged by {self.merger})"
                if self.averaged
                else "merged"
            )
            lines.append(f"{self.copies} full copies (modules_to_save) {how}")
        return "; ".join(lines)


# -- reading ---------------------------------------------------------------------------------------------


def open_all(
    folders: Sequence[str | Path], *, any_base: bool = False, base: Checkpoint | None = None
) -> list[PeftFolder]:
    """Open every adapter and refuse what does not belong together, before a tensor is read.

    Modules go by the base's names where it is given, else by those of the first adapter.
    """
    opened = [PeftFolder.open(f, but=HANDLED) for f in folders]
    _one_base(opened, any_base)
    if base is not None:
        opened = [_fitted(a, base) for a in opened]
    else:
        known = {name: path for path in opened[0].modules for name in reversed(aliases(path))}
        known |= {path: path for path in opened[0].modules}
        opened = [opened[0], *(a.renamed(_found(a, known)) for a in opened[1:])]
    names = [str(a.folder) for a in opened]
    same_modules([{_key(path, leaves): 0 for path, leaves in a.modules.items()} for a in opened], names)
    if len({bool(a.config.get("fan_in_fan_out")) for a in opened}) > 1:
        raise RetainError(f"{names[1]}: fan_in_fan_out differs from {names[0]}")
    _own_weights(opened, base)
    return opened


def _one_base(opened: Sequence[PeftFolder], any_base: bool) -> None:
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


def _base_name(a: PeftFolder) -> str:
    return str(a.config.get("base_model_name_or_path") or "").rstrip("/")


def _found(a: PeftFolder, known: Mapping[str, str]) -> dict[str, str]:
    """This adapter's paths to those of the first, where only the version of transformers differs."""
    return {path: next((known[n] for n in aliases(path) if n in known), path) for path in a.modules}


def _key(path: str, leaves: Mapping[str, str]) -> str:
    """A module with its kind, for comparing."""
    if any(leaf.startswith("lora_embedding") for leaf in leaves):
        return f"{path} (an embedding)"
    return path if "lora_A" in leaves else f"{path} (a full copy of {', '.join(sorted(leaves))})"


def _fitted(a: PeftFolder, base: Checkpoint) -> PeftFolder:
    """The adapter with the base's names; a module that the base has not, or of another shape, is named."""
    paths = [*a.modules, *(path for path, _ in a.own)]
    try:
        a = a.renamed({path: base.find(path) for path in dict.fromkeys(paths)})
    except RetainError as error:
        raise RetainError(f"{a.folder}: {error}") from None
    for path in a.modules:
        pair, module = a.pair(path), base.modules.get(path)
        if not pair or module is None:
            continue
        kinds = (nn.Embedding,) if "lora_embedding_A" in a.modules[path] else (nn.Linear,)
        if not isinstance(module, kinds) and type(module).__name__ != "Conv1D":
            raise RetainError(
                f"{a.folder}: {path} is a {type(module).__name__} in {base.folder}, which has no such factors"
            )
        ours = a.shapes[pair[1]][0], a.shapes[pair[0]][1]
        theirs = tuple(module.state_dict()["weight"].shape)
        if ours != (theirs[::-1] if base.transposed(path) else theirs):
            raise RetainError(f"{a.folder}: {path} is {ours}, the base has {theirs}")
    return a


def _own_weights(opened: Sequence[PeftFolder], base: Checkpoint | None) -> None:
    """Weights of the base that PEFT stored beside factors are the base's, or at least the same in every adapter."""
    every = dict.fromkeys(name for a in opened for name in a.own)
    for path, leaf in every:
        wanted = base.tensor(f"{path}.{leaf}") if base else None
        for a in opened:
            if (path, leaf) not in a.own and base is None:
                raise RetainError(
                    f"{a.folder}: it has no weights of {path} itself, but another adapter has; name the base model "
                    "with --base DIR"
                )
            if (path, leaf) not in a.own:
                continue
            got = a.tensor(a.own[path, leaf])
            wanted = got if wanted is None else wanted
            same = torch.equal(got.to(wanted.dtype), wanted) or torch.equal(got, wanted.to(got.dtype))
            if not same:  # not even but for rounding
                raise RetainError(
                    f"{a.folder}: {a.own[path, leaf]} holds other weights than "
                    f"{base.folder if base else opened[0].folder}: resized or trained embeddings cannot be merged"
                )


def change(a: PeftFolder, path: str, base: Checkpoint | None) -> Part:
    """A module's change of its weight (O, I), with the scale in B; dense for DoRA.

    DoRA (Liu et al. 2024, arXiv 2402.09353): W' = m (W + s B A) / |W + s B A|, the norm of each output row. An
    embedding is a layer whose inputs are the words: (width, words).
    """
    leaves, s, pair = a.modules[path], a.scale(path), a.pair(path)
    assert pair, "a full copy has no factors"
    A, B = a.tensor(pair[0]).float(), a.tensor(pair[1]).float()
    low = Low(B * s if s != 1 else B, A)
    if not torch.isfinite(low.B).all():
        raise RetainError(f"{a.folder}: {path}: lora_B times its scale {s:g} is too large for fp32")
    if "magnitude" not in leaves:
        return low
    if base is None:
        raise RetainError(
            f"{a.folder}: DoRA's change depends on the base weights; name the base model with --base DIR"
        )
    W, m = base.weight(path), a.tensor(leaves["magnitude"]).float()
    if W.shape != low.shape or m.numel() != W.shape[0]:
        raise RetainError(f"{a.folder}: {path} is {low.shape}, the base has {tuple(W.shape)}")
    tuned = W + low.dense()
    norm_O1: Tensor = torch.linalg.vector_norm(tuned, dim=1, keepdim=True)
    if not norm_O1.all():
        raise RetainError(f"{a.folder}: {path}: a row of base + change is zero, which DoRA divides by")
    return m.reshape(-1, 1) / norm_O1 * tuned - W


# -- merging ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unit:
    """What is merged at a time: one tensor of all adapters, as changes, or as full copies where those are not known."""

    path: str
    kind: str  # lora, lora_bias, or the name of a copied parameter (weight, bias)
    parts: list[Part]
    ranks: list[int]
    changes: bool = True

    @property
    def copied(self) -> bool:
        """A full copy of the base's parameter, not an addition to it."""
        return self.kind not in ("lora", "lora_bias")


@dataclass(frozen=True, eq=False)
class Plan:
    """What to merge and how; `modules` yields the results one after another."""

    adapters: list[PeftFolder]
    merger: Merger
    weights: list[float]
    params: dict[str, Any]
    keep: Keep
    rank: int
    base: Checkpoint | None

    def units(self) -> Iterator[Unit]:
        """Everything that there is to merge, read one after the other."""
        names = [str(a.folder) for a in self.adapters]
        for path, leaves in self.adapters[0].modules.items():
            if self.adapters[0].pair(path):
                parts = [change(a, path, self.base) for a in self.adapters]
                same_shape(parts, path, names)
                yield Unit(path, "lora", parts, [a.rank(path) for a in self.adapters])
                del parts
                if any("lora_bias" in a.modules[path] for a in self.adapters):
                    biases: list[Part] = [_bias(a, path) for a in self.adapters]
                    same_shape(biases, path, names)
                    yield Unit(path, "lora_bias", biases, [])
                continue
            for leaf in leaves:
                full: list[Part] = [a.tensor(a.modules[path][leaf]).float() for a in self.adapters]
                same_shape(full, f"{path}.{leaf}", names)
                if self.base is not None:
                    W = self.base.tensor(f"{path}.{leaf}").float()
                    same_shape([*full, W], f"{path}.{leaf}", [*names, str(self.base.folder)])
                    full = [t - W for t in full if isinstance(t, Tensor)]
                yield Unit(path, leaf, full, [], changes=self.base is not None)

    def modules(self) -> Iterator[tuple[str, str, Part, float]]:
        """path, kind (`lora`, `lora_bias`, `weight`, `bias`), the merged tensor, the error of keeping it.

        A full copy is its merged change where the base is given, else the averaged copy.
        """
        params = self.params if "borders" in self.params else self.surveyed().params
        for unit in self.units():
            with where(unit.path):
                merged = (
                    self.merger.part(unit.parts, self.weights, **params) if unit.changes else self._mean(unit)
                )
                yield unit.path, unit.kind, *kept(merged, unit.ranks, self.keep, self.rank)

    def _mean(self, unit: Unit) -> Part:
        share = sum(self.weights)
        if min(self.weights) < 0 or share <= 0:
            raise RetainError(
                f"{unit.path}: full copies with the weights {self.weights}: their changes are not known without the "
                "base; name it with --base DIR"
            )
        return total(unit.parts, [w / share for w in self.weights])

    def surveyed(self) -> Plan:
        """The same plan with what must be known of all changes before the first is merged."""
        params = self.merger.surveyed(self.params, lambda: (u.parts for u in self.units() if u.changes))
        return replace(self, params=params)


def _bias(a: PeftFolder, path: str) -> Tensor:
    """The bias that B adds, with the scale in it; zero where an adapter has none."""
    leaves = a.modules[path]
    if "lora_bias" not in leaves:
        return torch.zeros(a.shapes[leaves["lora_B"]][0])
    return a.tensor(leaves["lora_bias"]).float() * a.scale(path)


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
    opened = Checkpoint(base) if base else None
    adapters = open_all(folders, any_base=any_base, base=opened)
    return Plan(adapters, of, w, params, keep or of.keep, rank, opened)


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
    saved = _saved(made)
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
                for key, factor in zip(_factor_keys(first, path), (merged.A, merged.B)):
                    tensors[f"{PREFIX}{key}"] = _cast(factor, dtype, path)
            else:
                assert isinstance(merged, Tensor)
                if kind != "lora_bias" and made.base is not None:
                    merged = merged + made.base.tensor(f"{path}.{kind}").float()
                leaf = "lora_B.bias" if kind == "lora_bias" else kind
                tensors[f"{PREFIX}{path}.{leaf}"] = _cast(merged, dtype, path)
                copies += kind != "lora_bias"
        for (path, leaf), key in first.own.items() if made.base is None else ():  # else the base has them
            inner = f"{path}.base_layer.{leaf}" if path in ranks else f"{path}.{leaf}"
            tensors[f"{PREFIX}{inner}"] = first.tensor(key)
        save_file(tensors, part / WEIGHTS, {"format": "pt", "retain_base": first.base})
        write_json(part / CONFIG, _config(made, ranks, saved))
    return Summary(Path(to), made.merger.name, ranks, errors, copies, made.base is None)


def _factor_keys(a: PeftFolder, path: str) -> tuple[str, str]:
    """How stock PEFT names a module's factors."""
    if "lora_embedding_A" in a.modules[path]:
        return f"{path}.lora_embedding_A", f"{path}.lora_embedding_B"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def _cast(t: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    out = t.to(dtype).contiguous()
    if not torch.isfinite(out).all():
        raise RetainError(f"{path}: the merged values (up to {float(t.abs().max()):.1e}) do not fit {dtype}")
    return out


def _dtype(adapters: Sequence[PeftFolder], path: str) -> torch.dtype:
    kinds = {a.types[key] for a in adapters for key in a.modules[path].values()}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _saved(made: Plan) -> list[str]:
    """What `modules_to_save` must name, so that stock PEFT finds every full copy under its name in the model."""
    first = made.adapters[0]
    copies = {f"{p}.{leaf}" for p, leaves in first.modules.items() if not first.pair(p) for leaf in leaves}
    entries = list(first.config.get("modules_to_save") or [])
    if any(f.name != WEIGHTS for f in first.files.values()):
        entries.append("multi_modal_projector")
    entries = list(dict.fromkeys(entries))
    if made.base is None or made.base.model is None:
        old = next((c for c in sorted(copies) if len(aliases(c)) > 1 and not c.startswith("model.")), None)
        if old and made.base is None:
            raise RetainError(
                f"{first.folder}: {old} is a full copy under the name that transformers 4 gave it, where PEFT does "
                "not find it any more; name the base model with --base DIR"
            )
        return entries
    modules = made.base.modules
    entries = [e if any(m.endswith(e) for m in modules if m) else made.base.find(e) for e in entries]
    held = {
        f"{m}.{n}"
        for m, of in modules.items()
        for n in of.state_dict()
        if m and any(m.endswith(e) for e in entries)
    }
    if held != copies:
        lacking, extra = sorted(held - copies), sorted(copies - held)
        told = (
            f"{lacking[0]} is missing"
            if lacking
            else f"{extra[0]} is in no such module of {made.base.folder}"
        )
        raise RetainError(f"{first.folder}: modules_to_save {entries}: {told}")
    return entries


def _config(made: Plan, ranks: Mapping[str, int], saved: Sequence[str]) -> dict[str, Any]:
    configs = [a.config for a in made.adapters]
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    known = made.base is not None and made.base.model is not None
    names = {path: [path] if known else aliases(path) for path in ranks}
    other = {"|".join(f"^{n}" for n in names[path]): r for path, r in ranks.items() if r != common}
    config = {
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
        "modules_to_save": list(saved) or None,
    }
    if known or made.adapters[0].names or any(len(n) > 1 for n in names.values()):
        # name every module: the config's own words may be names that transformers 4 (or LLaVA) used
        config["target_modules"] = sorted({n for given in names.values() for n in given})
        config |= {
            k: None for k in ("layers_to_transform", "layers_pattern", "exclude_modules") if k in config
        }
    return config


# -- into the base ---------------------------------------------------------------------------------------


def merge_checkpoint(
    folders: Sequence[str | Path], method: str, to: str | Path, *, base: str | Path, **how: Any
) -> Summary:
    """Merge PEFT folders into the base model's weights: a plain Hugging Face checkpoint, shard by shard.

    Exact unless `keep="svd"` is asked for. Sums are fp32 and rounded once to the base's type. Where embeddings and
    head share a weight and only one of them changes, each gets its own. Every other file of the base is copied.
    """
    made = plan(folders, method, base=base, **{**how, "keep": how.get("keep") or "dense"})
    whole = made.base
    assert whole is not None
    _saved(made)
    made, targets = made.surveyed(), _targets(made)
    apart = _apart(whole, set(targets.values()))
    lone = {name: whole.place(name) for name in apart if name not in whole.keys}
    errors: dict[str, float] = {}
    copies = 0
    with aside(to) as part:
        _copy_rest(whole, part)
        for shard, f in whole.files.items():
            stored = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            tensors = stored | {
                new: stored[key].clone() for new, (place, key) in lone.items() if place == shard
            }
            todo = {what: name for what, name in targets.items() if whole.place(name)[0] == shard}
            for path, kind, merged, error in _some(made, {path for path, _ in todo}).modules():
                name = todo.get((path, kind), "")
                if not name:
                    continue  # a bias and its weight may lie in two shards
                key = whole.place(name)[1]
                delta = merged.dense() if isinstance(merged, Low) else merged
                delta = delta.T if kind == "lora" and _turned(made, path) else delta
                tensors[name if name in lone else key] = _added(stored[key], delta, key)
                copies += kind not in ("lora", "lora_bias")
                if kind == "lora":
                    errors[path] = error
            save_file(tensors, part / shard.name, f.metadata() or {"format": "pt"})
        if apart:
            _untie(whole, part, lone)
    return Summary(Path(to), made.merger.name, dict.fromkeys(errors, 0), errors, copies)


def _added(W: Tensor, delta: Tensor, key: str) -> Tensor:
    """Base plus change, summed in fp32 (or the base's type, if it is wider) and rounded once."""
    if W.shape != delta.shape:
        raise RetainError(f"{key}: the base has {tuple(W.shape)}, the adapters {tuple(delta.shape)}")
    return _cast(W.to(torch.promote_types(W.dtype, torch.float32)) + delta, W.dtype, key)


def _turned(made: Plan, path: str) -> bool:
    """Whether the base stores this module's weight as (in, out)."""
    assert made.base is not None
    first = made.adapters[0]
    if made.base.model is not None:
        return made.base.transposed(path)
    return "lora_embedding_A" in first.modules[path] or bool(first.config.get("fan_in_fan_out"))


def _targets(made: Plan) -> dict[tuple[str, str], str]:
    """(path, kind) of everything that is merged to the base's parameter; every one is there and can be added to."""
    assert made.base is not None
    out: dict[tuple[str, str], str] = {}
    for path, leaves in made.adapters[0].modules.items():
        if not made.adapters[0].pair(path):
            out |= {(path, leaf): f"{path}.{leaf}" for leaf in leaves}
            continue
        out[path, "lora"] = f"{path}.weight"
        if any("lora_bias" in a.modules[path] for a in made.adapters):
            out[path, "lora_bias"] = f"{path}.bias"
    for name in out.values():
        made.base.tensor(name)
    return out


def _apart(base: Checkpoint, changed: set[str]) -> list[str]:
    """Parameters that share a weight in the base of which one changes, so that each needs a weight of its own."""
    if (
        base.model is None
        and base.says_tied
        and any(re.search(r"(embed_tokens|lm_head)\.", n) for n in changed)
    ):
        raise RetainError(
            f"{base.folder}: embeddings and head share a weight, in a model class that transformers does not have; "
            "they cannot be changed apart (merge into an adapter instead, without --merged)"
        )
    return [name for pair in base.tied.items() if set(pair) & changed for name in pair]


def _untie(base: Checkpoint, part: Path, lone: Mapping[str, tuple[Path, str]]) -> None:
    """Say in the written folder that embeddings and head have a weight each, and where the new ones are."""
    config = untied(base.config)
    model = bare(config, base.folder)
    if model is None or model.all_tied_weights_keys:
        raise RetainError(
            f"{base.folder}: {type(model).__name__} cannot be written with {[*lone]} of their own"
        )
    write_json(part / "config.json", config)
    if (part / INDEX).is_file():
        index = json.loads((part / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] |= {name: shard.name for name, (shard, _) in lone.items()}
        size = sum(base.tensor(name).numel() * base.tensor(name).element_size() for name in lone)
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += size
        write_json(part / INDEX, index)


def _some(made: Plan, paths: set[str]) -> Plan:
    """The same plan for some modules (a shard's)."""
    chosen = [
        replace(a, modules={path: leaves for path, leaves in a.modules.items() if path in paths})
        for a in made.adapters
    ]
    return replace(made, adapters=chosen)


def _copy_rest(base: Checkpoint, part: Path) -> None:
    """Everything but the weights, with the user's own permissions."""
    for item in sorted(base.folder.iterdir()):
        stale = _OTHER_WEIGHTS.fullmatch(item.name) and item.name != INDEX
        if item in base.shards or item.name.startswith(".") or stale:
            continue
        if item.is_dir():
            shutil.copytree(item, part / item.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(item, part / item.name)
