"""Adapters on disk as stock PEFT writes them, and merging into a plain Hugging Face checkpoint.

`adapter_config.json` and `adapter_model.safetensors`: LoRA factors per layer, the projector as
`modules_to_save` with full weights (base + delta). A mix of K adapters is one adapter of rank K r with
concatenated factors, exactly:

    sum_k w_k s B_k A_k = s [w_1 B_1 … w_K B_K] [A_1; …; A_K]

PEFT's `add_weighted_adapter` is not used: it adds cross terms or truncates. Nothing here imports peft; the
format is that of peft 0.21 (github.com/huggingface/peft, LoraConfig). PEFT only warns about a missing key;
here it is an error.
"""

# r rank, K adapters

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from retain.adapters.bank import AdapterBank, Mix
from retain.adapters.lora import DenseLinear, LoraLinear
from retain.types import Batch, RetainError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Paths that transformers 4 used, and what they are called since 5.
_RENAMED = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^model\.text_model\.model\.", "model.text_model."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^model\.layers\.", "model.language_model.layers."),
    (r"^visual\.", "model.visual."),
)


# -- writing -------------------------------------------------------------------------------------------------


def save_peft(bank: AdapterBank, what: str | Mix, folder: str | Path, base_name: str) -> Path:
    """Write one adapter, or a mix of several by plain numbers, as a stock PEFT folder; returns the folder.

    `base_name` is the model that users of the adapter will load. Raises RetainError for a mix per sample.
    """
    mix = Mix({what: 1.0}) if isinstance(what, str) else what
    config, tensors = export(bank, mix, base_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "retain_base": str(bank.signature.get("base", ""))}
    _write(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata))
    _write(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n"))
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
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = A.contiguous().cpu().clone()
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = B.contiguous().cpu().clone()
            targets.append(path)
            if not config:
                config = _config(site, K, base_name)
        elif isinstance(site, DenseLinear):
            for key, full in _dense(site, weights, names).items():
                tensors[f"{_PREFIX}{path}.{key}"] = full.cpu()
            saved.append(path)
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
    """Base plus deltas of a dense site: weight, and bias where there is one."""
    out = {}
    for key in ("weight", "bias"):
        base = getattr(site.base, key)
        if base is None:
            continue
        _plain(base, key)
        total = base.detach().float()
        for name in names:
            w = float(weights.get(name, 0.0))
            if w:
                total = total + w * site.tensors(name)[key].detach().float()
        out[key] = total.to(base.dtype).contiguous().clone()
    return out


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
    config, tensors, base = _read(folder)
    supported(config, folder)
    own_base = str(bank.signature.get("base", ""))
    if base and own_base and base != own_base:
        raise RetainError(f"{folder}: the adapter was trained on base {base}, this model is {own_base}")
    by_path = _by_path(tensors, bank, folder)
    fresh = name not in bank.names
    state = dict(bank.state(name)) if not fresh else None
    if fresh:
        bank.add(name, Generator().manual_seed(0))
    try:
        bank.load(name, _state(bank, name, by_path, config, folder))
    except (RetainError, RuntimeError):
        if fresh:
            bank.remove(name)
        elif state is not None:
            bank.load(name, state)
        raise


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    stored = PeftFolder.open(folder)
    return stored.config, {k: stored.tensor(k) for k in stored.shapes}, stored.base


@dataclass(frozen=True, eq=False)
class PeftFolder:
    """A PEFT LoRA on disk, read module by module. Nothing but names and shapes is held in memory.

    `modules` maps a path to its tensors' keys: `lora_A`, `lora_B`, `lora_bias` (the bias of B), `magnitude`
    (DoRA), or `weight` and `bias` of a full copy (`modules_to_save`).
    """

    folder: Path
    config: dict[str, Any]
    base: str  # the fingerprint of the base model, where retain wrote the folder
    shapes: dict[str, tuple[int, ...]]
    modules: dict[str, dict[str, str]] = field(default_factory=dict)

    @staticmethod
    def open(folder: str | Path) -> PeftFolder:
        """Open and check a folder: both files whole, and a config that is a mapping."""
        folder = Path(folder)
        if not folder.is_dir():
            raise RetainError(f"{folder}: no such folder; an adapter is a folder with {CONFIG} and {WEIGHTS}")
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                pickled = (folder / "adapter_model.bin").is_file()
                hint = "; adapter_model.bin is a pickle, save it again as safetensors" if pickled else ""
                raise RetainError(
                    f"{folder}: no {file}; a PEFT adapter folder has {CONFIG} and {WEIGHTS}{hint}"
                )
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("it holds no mapping")
        except ValueError as error:
            raise RetainError(f"{folder / CONFIG}: no valid adapter config: {error}") from None
        try:
            with safe_open(folder / WEIGHTS, "pt") as f:
                shapes = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
                base = (f.metadata() or {}).get("retain_base", "")
        except SafetensorError as error:
            raise RetainError(f"{folder / WEIGHTS}: no whole safetensors file: {error}") from None
        return PeftFolder(folder, config, base, shapes, _modules(shapes))

    def tensor(self, key: str) -> Tensor:
        """One tensor, as it is stored."""
        try:
            value: Tensor = self._file.get_tensor(key)
            return value
        except SafetensorError as error:
            raise RetainError(f"{self.folder / WEIGHTS}: {key}: {error}") from None

    @cached_property
    def _file(self) -> Any:
        file: Any = safe_open(self.folder / WEIGHTS, "pt")
        return file.__enter__()  # closed with this object

    def rank(self, path: str) -> int:
        """The rank of a module, by its tensor; a config that says another is an error."""
        rank = self.shapes[self.modules[path]["lora_A"]][0]
        said = _pattern(self.config.get("rank_pattern") or {}, path, self.config.get("r", rank))
        if said != rank:
            raise RetainError(f"{self.folder}: {path} has rank {rank}, but {CONFIG} says {said}")
        return rank

    def scale(self, path: str) -> float:
        """alpha / r of a module, or alpha / sqrt(r) for rsLoRA, patterns included."""
        if "lora_alpha" not in self.config:
            raise RetainError(f"{self.folder}: {CONFIG} has no lora_alpha")
        alpha = _pattern(self.config.get("alpha_pattern") or {}, path, self.config["lora_alpha"])
        rank = self.rank(path)
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _modules(keys: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Path to leaf to key, in the order of the file."""
    out: dict[str, dict[str, str]] = {}
    for key in keys:
        inner = key.removeprefix(_PREFIX)
        lora = re.fullmatch(r"(.+)\.lora_(A|B)(?:\.default)?\.(weight|bias)", inner)
        dora = re.fullmatch(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", inner)
        copy = re.fullmatch(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)", inner)
        if lora:
            path, leaf = lora[1], f"lora_{lora[2]}" if lora[3] == "weight" else "lora_bias"
        elif dora:
            path, leaf = dora[1], "magnitude"
        elif copy:
            path, leaf = copy[1], copy[2]
        else:
            path, leaf = inner, ""
        out.setdefault(path, {})[leaf] = key
    return out


def supported(config: Mapping[str, Any], folder: Path, *, but: Sequence[str] = ()) -> None:
    """Refuse what is not plain LoRA, by name; `but` names what the caller can handle besides."""
    if config.get("peft_type") != "LORA":
        raise RetainError(f"{folder}: peft_type {config.get('peft_type')!r} is not LoRA")
    off = {
        "use_dora", "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices",
        "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
        "kappa_tuner_config", "monteclora_config",
    }  # fmt: skip
    used = sorted(k for k in off if config.get(k) and k not in but)
    if used:
        raise RetainError(f"{folder}: {', '.join(used)} cannot be loaded; plain LoRA and rsLoRA can")
    if config.get("bias", "none") != "none":
        raise RetainError(
            f"{folder}: bias={config['bias']!r} changes the base's biases; only bias='none' can be loaded"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal"):
        raise RetainError(
            f"{folder}: init_lora_weights={init!r} changes the base's weights; convert it to plain LoRA first"
        )


def _by_path(tensors: Mapping[str, Tensor], bank: AdapterBank, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Site path to its tensors: lora_A and lora_B, or weight and bias. An unknown key is an error."""
    out: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in tensors.items():
        inner = key.removeprefix(_PREFIX)
        found = re.fullmatch(r"(.+)\.(lora_A|lora_B)(?:\.default)?\.weight", inner)
        found = found or re.fullmatch(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)", inner)
        path = _own(found[1], bank) if found else None
        if (
            found is None
            or path is None
            or (found[2].startswith("lora_") != isinstance(bank.sites[path], LoraLinear))
        ):
            unknown.append(key)
            continue
        out.setdefault(path, {})[found[2]] = value
    if unknown:
        raise RetainError(
            f"{folder}: {len(unknown)} keys fit no adapter of this model, first {sorted(unknown)[0]!r}; "
            f"the model adapts {list(bank.sites)[:2]} … (adapter targets and dense decide which)"
        )
    return out


def _own(path: str, bank: AdapterBank) -> str | None:
    """A site's path by the name it has in the file: as it is, or as transformers 4 called it."""
    return next((name for name in aliases(path) if name in bank.sites), None)


def aliases(path: str) -> list[str]:
    """A module's names: as given, then as transformers 5 calls what transformers 4 named so."""
    return [path, *(re.sub(old, new, path) for old, new in _RENAMED if re.match(old, path))]


def _state(
    bank: AdapterBank,
    name: str,
    by_path: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    folder: Path,
) -> dict[str, Tensor]:
    """The bank's own tensors from the file's: rescaled factors, deltas against the base."""
    state = bank.state(name)
    out: dict[str, Tensor] = {}
    for path, site in bank.sites.items():
        got = by_path.get(path, {})
        own = list(site.tensors(name))
        if not got and not _targeted(path, site, config):
            out |= {f"{path}.{k}": state[f"{path}.{k}"] for k in own}
            for k in own:
                if k != "lora_A":
                    out[f"{path}.{k}"] = torch.zeros_like(out[f"{path}.{k}"])
            continue
        missing = [k for k in own if k not in got]
        if missing:
            raise RetainError(f"{folder}: key {_PREFIX}{path}.{missing[0]} is missing")
        if isinstance(site, LoraLinear):
            out |= _factors(site, path, got, config, folder)
        elif isinstance(site, DenseLinear):
            for k in own:
                base = getattr(site.base, k)
                _plain(base, path)
                if got[k].shape != base.shape:
                    raise RetainError(
                        f"{folder}: {path}.{k} is {tuple(got[k].shape)}, this base has {tuple(base.shape)}"
                    )
                out[f"{path}.{k}"] = got[k].float().to(base.device) - base.detach().float()
    return out


def _factors(
    site: LoraLinear, path: str, got: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> dict[str, Tensor]:
    A, B = got["lora_A"].float(), got["lora_B"].float()
    n_in, n_out = site.features
    if A.shape[0] != site.spec.rank:
        raise RetainError(f"{folder}: {path} has rank {A.shape[0]}, this bank has rank {site.spec.rank}")
    if A.shape[1] != n_in or B.shape[0] != n_out:
        raise RetainError(
            f"{folder}: {path} maps {A.shape[1]} to {B.shape[0]} features, this base {n_in} to {n_out}"
        )
    alpha = _pattern(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    theirs = alpha / (math.sqrt(A.shape[0]) if config.get("use_rslora") else A.shape[0])
    if theirs != site.spec.scale:
        B = B * (theirs / site.spec.scale)
    return {f"{path}.lora_A": A, f"{path}.lora_B": B}


def _pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the path, from a dot on."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", path)), default)


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
        return targets == "all-linear" or (bool(targets) and re.fullmatch(targets, path) is not None)
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
            value = _dense(site, weights, names)[leaf]
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
        out[f"{site_path}.{leaf}"] = value
    return out


def merge_into_base(model: Any, mix: Mix, folder: str | Path, batches: Sequence[Batch] = ()) -> float:
    """Write a plain Hugging Face checkpoint with the mix merged in; returns the largest logit difference on
    `batches`.

    The checkpoint is read back from disk and run without adapters, so the difference is that of what was
    written (NaN without batches: nothing was compared). `model` is an `HFModel`; its `guide/` folder is
    copied along.
    """
    folder = Path(folder)
    state = {k: v.contiguous() for k, v in merged_state(model, mix).items()}
    model.hf.save_pretrained(folder, state_dict=state)
    model.save_processor(folder)
    guide = Path(model.name) / "guide" if model.name else Path()
    if model.name and guide.is_dir() and guide.resolve() != (folder / "guide").resolve():
        shutil.copytree(guide, folder / "guide", dirs_exist_ok=True)
    if not batches:
        return float("nan")
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


def _write(path: Path, write: Any) -> None:
    """To a temporary name in the same folder, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)
