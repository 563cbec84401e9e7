"""Adapters on disk as stock PEFT writes them, and merging into a plain Hugging Face checkpoint.

`adapter_config.json` and `adapter_model.safetensors`: LoRA factors per layer, the projector as
`modules_to_save` with full weights (base + delta). A mix of K adapters is one adapter of rank K r with
concatenated factors, exactly:

    sum_k w_k s B_k A_k = s [w_1 B_1 … w_K B_K] [A_1; …; A_K]

PEFT's `add_weighted_adapter` is not used: it adds cross terms or truncates. Nothing here imports peft; what a folder
holds is read by `peft_folder`. PEFT only warns about a missing key; here it is an error.
"""

# r rank, K adapters

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from retain.adapters.bank import AdapterBank, Mix
from retain.adapters.checkpoint import untied
from retain.adapters.lora import DenseLinear, LoraLinear
from retain.adapters.patterns import matcher
from retain.adapters.peft_folder import CONFIG, PREFIX, WEIGHTS, PeftFolder, aliases
from retain.files import aside, write_atomic, write_text
from retain.types import Batch, RetainError

# -- writing -------------------------------------------------------------------------------------------------


def save_peft(bank: AdapterBank, what: str | Mix, folder: str | Path, base_name: str) -> Path:
    """Write one adapter, or a mix of several by plain numbers, as a stock PEFT folder; returns the folder.

    `base_name` is the model that users of the adapter will load. Full copies are stored in fp32, whatever the base's
    type: a small change would be lost in the rounding. Raises RetainError for a mix per sample.
    """
    mix = Mix({what: 1.0}) if isinstance(what, str) else what
    config, tensors = export(bank, mix, base_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "retain_base": str(bank.signature.get("base", ""))}
    write_atomic(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata))
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def export(bank: AdapterBank, mix: Mix, base_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The PEFT config and tensors of a mix (numbers only), without touching the disk."""
    exportable(bank)
    names = _numbers(bank, mix)
    if not names:
        raise RetainError(f"the mix is empty: nothing to export; the bank holds {bank.names}")
    K = len(names)
    tensors: dict[str, Tensor] = {}
    targets, saved = [], []
    config: dict[str, Any] = {}
    for path, site in bank.sites.items():
        weights = mix.at(site.layer)
        if isinstance(site, LoraLinear):
            factors = [(site.tensors(n), float(weights.get(n, 0.0))) for n in names]
            A = torch.cat([t["lora_A"].detach() for t, _ in factors])
            B = torch.cat(
                [t["lora_B"].detach() if w == 1.0 else t["lora_B"].detach() * w for t, w in factors], dim=1
            )
            tensors[f"{PREFIX}{path}.lora_A.weight"] = A.contiguous().cpu().clone()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = B.contiguous().cpu().clone()
            targets.append(path)
            if not config:
                config = _config(site, K, base_name)
        elif isinstance(site, DenseLinear):
            for key, full in _dense(site, weights, names).items():
                tensors[f"{PREFIX}{path}.{key}"] = full.cpu()
            saved.append(path)
    for key, tensor in tensors.items():
        _finite(tensor, key)
    return {**config, "target_modules": sorted(targets), "modules_to_save": sorted(saved) or None}, tensors


def exportable(bank: AdapterBank) -> None:
    """Raise RetainError for a kind of adapters that has neither a PEFT LoRA form nor weights to merge into."""
    for site in bank.sites.values():
        if not isinstance(site, LoraLinear | DenseLinear):
            why = getattr(site, "no_peft", f"a {type(site).__name__} is no LoRA and no dense delta")
            raise RetainError(f"these adapters cannot be exported or merged: {why}")


def _config(site: LoraLinear, K: int, base_name: str) -> dict[str, Any]:
    spec = site.spec
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": spec.rank * K,
        "lora_alpha": spec.alpha * (math.sqrt(K) if spec.rslora else K),  # the same scale at K times the rank
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _numbers(bank: AdapterBank, mix: Mix) -> list[str]:
    """The mix's adapters, every one known and weighted by a number."""
    for weights in (mix.weights, *mix.by_layer.values()):
        for name, w in weights.items():
            if name not in bank.names:
                raise RetainError(f"no adapter {name!r}; the bank holds {bank.names}")
            if isinstance(w, Tensor) and w.ndim:
                raise RetainError(
                    f"the weight of {name!r} is per sample; only a mix of numbers is one adapter"
                )
    return mix.names


def _dense(site: DenseLinear, weights: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Base plus deltas of a dense site in fp32: weight, and bias where there is one."""
    out = {}
    for key in ("weight", "bias"):
        base = getattr(site.base, key)
        if base is None:
            continue
        _plain(base, key)
        total = base.detach().float()
        for name in names:
            w, delta = float(weights.get(name, 0.0)), site.tensors(name).get(key)
            if w and delta is not None:
                total = total + w * delta.detach().float()
        out[key] = total.contiguous().clone()
    return out


def _finite(tensor: Tensor, where: str) -> Tensor:
    """The tensor; NaN and infinity, as after a diverged run or an overflow, are an error that names it."""
    if not torch.isfinite(tensor).all():
        raise RetainError(f"{where}: values that are not finite, in {tensor.dtype}; nothing was written")
    return tensor


def _plain(weight: Tensor, where: str) -> None:
    if not weight.is_floating_point():
        raise RetainError(
            f"{where}: the base is quantised ({weight.dtype}); load it in bf16 or fp32 to merge or export it"
        )


# -- reading -------------------------------------------------------------------------------------------------


def load_peft(bank: AdapterBank, name: str, folder: str | Path) -> None:
    """Load any PEFT LoRA folder into the bank as `name`, added when it is new.

    Layers that the adapter's config does not target keep B = 0, as in PEFT. Another alpha or rsLoRA is folded
    into B. Raises RetainError for another base or rank (both values), other kinds of adapter (by name),
    missing or unknown keys.
    """
    folder = Path(folder)
    if bank.kind != "lora":
        raise RetainError(f"{folder}: a PEFT LoRA fits adapters of kind 'lora', these are {bank.kind!r}")
    stored = PeftFolder.open(folder)
    own_base = str(bank.signature.get("base", ""))
    if stored.base and own_base and stored.base != own_base:
        raise RetainError(
            f"{folder}: the adapter was trained on base {stored.base}, this model is {own_base}"
        )
    stored = _at_sites(stored, bank)
    fresh = name not in bank.names
    state = dict(bank.state(name)) if not fresh else None
    if fresh:
        bank.add(name, Generator().manual_seed(0))
    try:
        bank.load(name, _state(bank, name, stored))
    except (RetainError, RuntimeError):
        if fresh:
            bank.remove(name)
        elif state is not None:
            bank.load(name, state)
        raise


def _at_sites(stored: PeftFolder, bank: AdapterBank) -> PeftFolder:
    """The adapter with the paths of the bank's sites; a module that fits none is an error."""
    names, unknown = dict[str, str](), list[str]()
    for path, leaves in stored.modules.items():
        site = _site(path, bank)
        kinds = {"lora_A", "lora_B"} if isinstance(bank.sites.get(site), LoraLinear) else {"weight", "bias"}
        if site in bank.sites and leaves.keys() <= kinds:
            names[path] = site
        else:
            unknown += leaves.values()
    if unknown:
        raise RetainError(
            f"{stored.folder}: {len(unknown)} keys fit no adapter of this model, first {sorted(unknown)[0]!r}; "
            f"the model adapts {list(bank.sites)[:2]} … (adapter targets and dense decide which)"
        )
    for (path, leaf), key in stored.own.items():
        base = getattr(getattr(bank.sites.get(_site(path, bank)), "base", None), leaf, None)
        if base is None or not torch.equal(stored.tensor(key).to(base), base):
            raise RetainError(
                f"{stored.folder}: {key} holds weights of the base that this model does not have "
                "(resized or trained embeddings?); only the adapter itself can be loaded"
            )
    return stored.renamed(names)


def _site(path: str, bank: AdapterBank) -> str:
    """A site's path by the name it has in the file: as it is, or as transformers 4 called it."""
    return next((name for name in aliases(path) if name in bank.sites), path)


def _state(bank: AdapterBank, name: str, stored: PeftFolder) -> dict[str, Tensor]:
    """The bank's own tensors from the file's: rescaled factors, deltas against the base."""
    state, folder = bank.state(name), stored.folder
    out: dict[str, Tensor] = {}
    for path, site in bank.sites.items():
        got = stored.modules.get(path, {})
        own = list(site.tensors(name))
        if not got and not _targeted(path, site, stored.config):
            out |= {f"{path}.{k}": state[f"{path}.{k}"] for k in own}
            for k in own:
                if k != "lora_A":
                    out[f"{path}.{k}"] = torch.zeros_like(out[f"{path}.{k}"])
            continue
        missing = [k for k in own if k not in got]
        if missing:
            raise RetainError(f"{folder}: key {PREFIX}{path}.{missing[0]} is missing")
        if isinstance(site, LoraLinear):
            out |= _factors(site, path, stored)
        elif isinstance(site, DenseLinear):
            for k in own:
                base = getattr(site.base, k)
                _plain(base, path)
                full = stored.tensor(got[k])
                if full.shape != base.shape:
                    raise RetainError(
                        f"{folder}: {path}.{k} is {tuple(full.shape)}, this base has {tuple(base.shape)}"
                    )
                out[f"{path}.{k}"] = full.float().to(base.device) - base.detach().float()
    return out


def _factors(site: LoraLinear, path: str, stored: PeftFolder) -> dict[str, Tensor]:
    A, B = (stored.tensor(stored.modules[path][k]).float() for k in ("lora_A", "lora_B"))
    folder = stored.folder
    n_in, n_out = site.features
    if A.shape[0] != site.spec.rank:
        raise RetainError(f"{folder}: {path} has rank {A.shape[0]}, this bank has rank {site.spec.rank}")
    if A.shape[1] != n_in or B.shape[0] != n_out:
        raise RetainError(
            f"{folder}: {path} maps {A.shape[1]} to {B.shape[0]} features, this base {n_in} to {n_out}"
        )
    theirs = stored.scale(path)
    if theirs != site.spec.scale:
        B = B * (theirs / site.spec.scale)
    return {f"{path}.lora_A": A, f"{path}.lora_B": B}


def _targeted(path: str, site: object, config: Mapping[str, Any]) -> bool:
    """Whether the config claims this site, so that its tensors must be in the file."""
    if not isinstance(site, LoraLinear):
        return any(
            path == m or f".{path}".endswith(f".{m}") or f".{m}." in f".{path}"
            for m in config.get("modules_to_save") or []
        )
    targets = config.get("target_modules") or []
    layers = config.get("layers_to_transform")
    if layers is not None and site.layer not in ([layers] if isinstance(layers, int) else layers):
        return False
    excluded = config.get("exclude_modules") or []
    return _matches(path, targets) and not _matches(path, excluded)


def _matches(path: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or (bool(targets) and matcher(targets, "target_modules")(path))
    return any(path == t or path.endswith(f".{t}") for t in targets)


# -- merging into the base -----------------------------------------------------------------------------------


def merged_state(model: Any, mix: Mix) -> dict[str, Tensor]:
    """The base's state dict under its own names, a mix of numbers added to its weights (sums in fp32)."""
    bank: AdapterBank = model.adapters
    exportable(bank)
    names = _numbers(bank, mix)
    out: dict[str, Tensor] = {}
    for key, value in model.hf.state_dict().items():
        path, _, leaf = key.rpartition(".")
        if path.rpartition(".")[2] in ("lora_A", "lora_B", "delta_weight", "delta_bias"):
            continue
        site_path = path.removesuffix(".base")
        site = bank.sites.get(site_path) if path.endswith(".base") else None
        if site is None:
            out[key] = value
            continue
        _plain(value, site_path)
        weights = mix.at(site.layer)
        if isinstance(site, DenseLinear):
            value = _dense(site, weights, names)[leaf].to(value.dtype)
        elif isinstance(site, LoraLinear) and leaf == "weight":
            dtype = value.dtype
            value = value.float()
            for n in names:
                w = float(weights.get(n, 0.0))
                if w:
                    t = site.tensors(n)
                    value = value + w * site.spec.scale * (
                        t["lora_B"].detach().float() @ t["lora_A"].detach().float()
                    )
            value = value.to(dtype)
        out[f"{site_path}.{leaf}"] = _finite(value, f"{site_path}.{leaf}")
    return out


def merge_into_base(model: Any, mix: Mix, folder: str | Path, batches: Sequence[Batch] = ()) -> float:
    """Write a plain Hugging Face checkpoint with the mix merged in; returns the largest logit difference on
    `batches`.

    The checkpoint is read back from disk and run without adapters, so the difference is that of what was
    written (NaN without batches: nothing was compared). `model` is an `HFModel`; its `guide/` folder is
    copied along. `folder` may not exist or is empty, and appears when it is whole.
    """
    state = {k: v.contiguous() for k, v in merged_state(model, mix).items()}
    with aside(folder) as part:
        _save(model, state, part)
        return _read_back(model, mix, part, batches) if batches else float("nan")


def _save(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """The checkpoint, its processor and guide; a head that differs from the embeddings now has a weight of its own."""
    tied = getattr(model.hf, "all_tied_weights_keys", {}).items()
    apart = any(head in state and not torch.equal(state[head], state[table]) for head, table in tied)
    model.hf.save_pretrained(folder, state_dict=state)
    if apart:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_text(folder / "config.json", json.dumps(untied(config), indent=2) + "\n")
    model.save_processor(folder)
    guide = Path(model.name) / "guide" if model.name else Path()
    if model.name and guide.is_dir():
        shutil.copytree(guide, folder / "guide")


def _read_back(model: Any, mix: Mix, folder: Path, batches: Sequence[Batch]) -> float:
    """The largest difference of logits between the adapters' and those of what was written."""
    was = model.training
    model.train(False)
    back = (
        type(model.hf).from_pretrained(folder, dtype=model.hf.dtype, local_files_only=True).to(model.device)
    )
    plain = type(model)(back, model.processor, model.spec, precision=model.precision)
    worst = 0.0
    with torch.no_grad():
        for batch in batches:
            with model.adapters.using(mix):
                ours = model(batch).logits_NV.float()
            worst = max(worst, float((ours - plain(batch).logits_NV.float()).abs().max()))
    model.train(was)
    return worst
