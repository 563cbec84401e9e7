"""A PEFT LoRA on disk, as strangers bring it: read module by module, and refused by name where a part would be lost.

The format is that of peft 0.21 (github.com/huggingface/peft, LoraConfig). Read besides what PEFT writes: keys that
carry the adapter's name (whatever it is), doubled or foreign prefixes (`module.`, `_orig_mod.`), the names of
transformers 4, and the projector that LLaVA's scripts save beside the adapter. PEFT only warns about a key that it
cannot place, and then answers with the base model; here every tensor has a place or the folder is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retain.adapters.patterns import matcher
from retain.types import RetainError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
"""The factors of a linear layer and of an embedding."""

_WRAPPED = re.compile(r"^(?:base_model\.model\.|module\.|_orig_mod\.|_fsdp_wrapped_module\.)+")
_INSIDE = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<side>A|B)(?:\.(?P<name>[^.]+))?\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<path>.+)\.(?P<side>lora_embedding_[AB])(?:\.(?P<name>[^.]+))?")
_DORA = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.(?!weight$)(?P<name>[^.]+))?(?:\.weight)?")
_SAVED = re.compile(r"(?P<path>.+?)\.modules_to_save\.(?P<rest>.+)")
_TABLES = {"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_out"}
"""Layers whose own weights PEFT stores beside LoRA factors (`save_embedding_layers`)."""

# Paths that transformers 4 (or LLaVA's own code) used, and what stock transformers 5 calls them.
_RENAMED = (
    (r"^language_model\.lm_head", "lm_head"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^model\.text_model\.model\.", "model.text_model."),
    (r"^(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^model\.mm_projector\.0", "model.multi_modal_projector.linear_1"),
    (r"^model\.mm_projector\.2", "model.multi_modal_projector.linear_2"),
    (r"^(model\.)?vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^vision_tower\.", "model.vision_tower."),
    (r"^model\.(layers\.|embed_tokens|norm(?=\.|$))", r"model.language_model.\1"),
    (r"^visual\.", "model.visual."),
)

_LLAVA = ("non_lora_trainables", "mm_projector")
_OTHERS = re.compile(
    r"(optimizer|scheduler|rng_state|random_states|training_args|scaler|sampler|custom_checkpoint|value_head"
    r"|tokenizer).*|adapter_model\.bin"
)
"""Files beside an adapter that do not change its answers: what a trainer needs to go on, and a pickled double."""
_WEIGHTS_LIKE = {".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".npz", ".pkl"}
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def aliases(path: str) -> list[str]:
    """A module's names: as given, then as transformers 5 calls what transformers 4 named so."""
    renamed = [re.sub(old, new, path) for old, new in _RENAMED if re.match(old, path)]
    return list(dict.fromkeys([path, *renamed]))


@dataclass(frozen=True, eq=False)
class PeftFolder:
    """One adapter; nothing but names and shapes is held in memory.

    `modules` maps a path to its tensors' keys: `lora_A`, `lora_B`, `lora_bias` (the bias of B), `magnitude` (DoRA),
    `lora_embedding_A`, `lora_embedding_B`; or the parameters of a full copy (`modules_to_save`), as a rule `weight`
    and `bias`. `own` are keys of the base's own weights, which PEFT stores beside factors of embeddings and heads.
    `names` has the names by which a module is known, where it has another than its path.
    """

    folder: Path
    config: dict[str, Any]
    base: str  # the fingerprint of the base model, where retain wrote the folder
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]
    types: dict[str, torch.dtype]
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    own: dict[tuple[str, str], str] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def open(folder: str | Path, *, but: Sequence[str] = ()) -> PeftFolder:
        """Open and check a folder: whole files, a config that makes sense, a place for every tensor.

        `but` names what the caller can handle beyond plain LoRA.
        """
        folder = Path(folder)
        config = _config(folder)
        supported(config, folder, but=but)
        numbers(config, folder)
        shapes, types, base = _header(folder / WEIGHTS)
        files = dict.fromkeys(shapes, folder / WEIGHTS)
        for file in _beside(folder):
            more, more_types, _ = _header(file)
            shapes, types = {**shapes, **more}, {**types, **more_types}
            files |= dict.fromkeys(more, file)
        out = PeftFolder(folder, config, base, shapes, files, types)
        _place(out)
        return out

    def tensor(self, key: str) -> Tensor:
        """One tensor, as it is stored; NaN and infinity are an error that names file and key."""
        file = self.files[key]
        try:
            value: Tensor = self._opened(file).get_tensor(key)
        except SafetensorError as error:
            raise RetainError(f"{file}: {key}: {error}") from None
        if not torch.isfinite(value).all():
            bad = value[~torch.isfinite(value)]
            raise RetainError(
                f"{file}: {key} holds {float(bad[0])} ({bad.numel()} of {value.numel()} values)"
            )
        return value

    def _opened(self, file: Path) -> Any:
        if file not in self._handles:
            handle: Any = safe_open(file, "pt")
            self._handles[file] = handle.__enter__()  # closed with this object
        return self._handles[file]

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {}

    def renamed(self, new: Mapping[str, str]) -> PeftFolder:
        """The same adapter with other paths for some modules; patterns still go by the names in the file."""
        named = {new.get(path, path): self.names.get(path, [path]) for path in self.modules}
        modules = {new.get(path, path): leaves for path, leaves in self.modules.items()}
        own = {(new.get(path, path), leaf): key for (path, leaf), key in self.own.items()}
        if len(modules) < len(self.modules):
            raise RetainError(f"{self.folder / WEIGHTS}: two modules have one name in the base model")
        return PeftFolder(
            self.folder, self.config, self.base, self.shapes, self.files, self.types, modules, own, named
        )

    def pair(self, path: str) -> tuple[str, str] | None:
        """The keys of a module's two factors, A's first; none for a full copy."""
        leaves = self.modules[path]
        return next(((leaves[a], leaves[b]) for a, b in PAIRS if a in leaves), None)

    def rank(self, path: str) -> int:
        """The rank of a module, by its tensor; a config that says another is an error."""
        pair = self.pair(path)
        assert pair, "a full copy has no rank"
        rank = self.shapes[pair[0]][0]
        said = self._said("rank_pattern", path, self.config.get("r", rank))
        if said != rank:
            raise RetainError(f"{self.folder}: {path} has rank {rank}, but {CONFIG} says {said}")
        return rank

    def scale(self, path: str) -> float:
        """alpha / r of a module, or alpha / sqrt(r) for rsLoRA, patterns included."""
        rank = self.rank(path)
        alpha = self._said("alpha_pattern", path, self.config["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _said(self, key: str, path: str, default: float) -> float:
        """PEFT's rule for a module, by the name in the file or by the one that transformers 5 gives it."""
        names = dict.fromkeys(a for name in [*self.names.get(path, []), path] for a in aliases(name))
        return pattern(self.config.get(key) or {}, list(names), default, f"{self.folder / CONFIG}: {key}")


def pattern(
    patterns: Mapping[str, float], names: Sequence[str], default: float, where: str = CONFIG
) -> float:
    """PEFT's rule: the first pattern that matches the end of a path, from a dot on. In bounded time."""
    for text, value in patterns.items():
        matches = matcher(_from_a_dot(text), where)
        if any(matches(name) for name in names):
            return value
    return default


def _from_a_dot(text: str) -> str:
    return rf"(?:.*\.)?(?:{text})$"


# -- the config ----------------------------------------------------------------------------------------------


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise RetainError(f"{folder}: no such folder; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    for file in (CONFIG, WEIGHTS):
        if (folder / file).is_file():
            continue
        inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        hint = f"; there are adapters inside it: {inner[:5]}" if inner else ""
        if (folder / "adapter_model.bin").is_file():
            hint = "; adapter_model.bin is a pickle, save it again as safetensors"
        raise RetainError(f"{folder}: no {file}; a PEFT adapter folder has {CONFIG} and {WEIGHTS}{hint}")
    return read_object(folder / CONFIG, "adapter config")


MOST = 64 * 2**20
"""Bytes of a JSON file beside weights: an adapter's configuration has hundreds, an index of shards a few millions."""


def read_object(file: Path, what: str) -> dict[str, Any]:
    """A JSON file that a stranger wrote beside weights; whatever is no object of fields is an error that names the file."""
    try:
        if not file.is_file():
            raise ValueError("it is no regular file")  # a pipe or a device would be read for ever
        if file.stat().st_size > MOST:
            raise ValueError(f"it has {file.stat().st_size:,} bytes, at most {MOST:,} are read")
        value = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # a lone surrogate, which no later file could hold, is found here
    except OSError as error:
        raise RetainError(f"{file}: {error.strerror or error}") from None
    except RecursionError:
        raise RetainError(f"{file}: no valid {what}: it is nested too deep") from None
    except ValueError as error:
        raise RetainError(f"{file}: no valid {what}: {error}") from None
    if not isinstance(value, dict):
        raise RetainError(f"{file}: no valid {what}: it holds no mapping of fields")
    return value


def supported(config: Mapping[str, Any], folder: Path, *, but: Sequence[str] = ()) -> None:
    """Refuse what is not plain LoRA, by name; `but` names what the caller can handle besides."""
    if config.get("peft_type") != "LORA":
        raise RetainError(f"{folder}: peft_type {config.get('peft_type')!r} is not LoRA")
    off = {
        "use_dora", "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices",
        "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
        "kappa_tuner_config", "monteclora_config", "kasa_config", "megatron_config", "ensure_weight_tying",
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


def numbers(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse numbers, patterns and lists of modules that PEFT cannot mean, by field and value."""

    def wrong(key: str, value: object, wanted: str) -> RetainError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:79] + "…"
        return RetainError(f"{folder / CONFIG}: {key}: {shown} is no {wanted}")

    if "lora_alpha" not in config:
        raise RetainError(f"{folder / CONFIG}: lora_alpha is missing, so the scale alpha / r is not known")
    if not _number(config["lora_alpha"]):
        raise wrong("lora_alpha", config["lora_alpha"], "finite number other than 0")
    if "r" in config and not _rank(config["r"]):
        raise wrong("r", config["r"], "rank (a whole number from 1)")
    for key, fits, wanted in (
        ("rank_pattern", _rank, "rank (a whole number from 1)"), ("alpha_pattern", _number, "finite number other than 0"),
    ):  # fmt: skip
        given = {} if config.get(key) is None else config[key]
        if not isinstance(given, dict) or len(given) > MODULES:
            raise wrong(key, given, "mapping of module patterns to numbers")
        for p, value in given.items():
            for text in (p, _from_a_dot(p)):
                matcher(text, f"{folder / CONFIG}: {key}")
            if not fits(value):
                raise wrong(f"{key}: {p!r}", value, wanted)
    for key in ("modules_to_save", "target_modules", "exclude_modules", "layers_pattern"):
        given = config.get(key)
        listed = (
            isinstance(given, list) and len(given) <= MODULES and all(isinstance(m, str) and m for m in given)
        )
        if not (given is None or listed or (isinstance(given, str) and key != "modules_to_save")):
            raise wrong(key, given, "list of module names")
        if isinstance(given, str) and given != "all-linear" and key != "layers_pattern":
            matcher(given, f"{folder / CONFIG}: {key}")
    layers = config.get("layers_to_transform")
    if not all(type(i) is int for i in (layers if isinstance(layers, list) else [layers or 0])):
        raise wrong("layers_to_transform", layers, "layer number or list of them")
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        if not isinstance(config.get(key), bool | None):
            raise wrong(key, config[key], "true or false")
    for key in ("base_model_name_or_path", "bias"):
        if not isinstance(config.get(key), str | None):
            raise wrong(key, config[key], "text")


MODULES = 100_000
"""Modules that a list may name."""


def _number(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) < 1e30
    )  # NaN is not


def _rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= 2**24


LONGEST_KEY = 1_000
"""Characters of a tensor's name."""


# -- the tensors ---------------------------------------------------------------------------------------------


def header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, str]]:
    """Shapes and stored types (such as "BF16") of a safetensors file's tensors, and its metadata."""
    try:
        with safe_open(file, "pt") as f:
            slices = {k: f.get_slice(k) for k in f.keys()}  # noqa: SIM118
            shapes = {k: tuple(s.get_shape()) for k, s in slices.items()}
            return shapes, {k: str(s.get_dtype()) for k, s in slices.items()}, dict(f.metadata() or {})
    except SafetensorError as error:
        raise RetainError(f"{file}: no whole safetensors file: {error}") from None
    except OSError as error:
        raise RetainError(f"{file}: {error.strerror or error}") from None


def _header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype], str]:
    """Shapes and types of a file's tensors, and the fingerprint of the base that retain noted in it."""
    shapes, kinds, metadata = header(file)
    base = metadata.get("retain_base", "")
    if not shapes:
        raise RetainError(
            f"{file}: it holds no tensor; a ZeRO-3 run must gather the weights before it saves them"
        )
    for key, shape in shapes.items():
        if len(key) > LONGEST_KEY or not all(key.split(".")):
            shown = key if len(key) <= 80 else key[:79] + "…"
            raise RetainError(
                f"{file}: {shown!r} is no name of a tensor: parts with dots between them are needed"
            )
        if 0 in shape:
            raise RetainError(
                f"{file}: {key} is empty, its shape is {shape}; a ZeRO-3 run must gather the weights before it saves them"
            )
        if kinds[key] not in _TYPES:
            raise RetainError(f"{file}: {key} is stored as {kinds[key]}; only {list(_TYPES)} can be read")
    return shapes, {k: _TYPES[kind] for k, kind in kinds.items()}, base


def _beside(folder: Path) -> list[Path]:
    """Files with LLaVA's projector; other weights beside an adapter are refused, for without them it is not whole."""
    out = []
    for file in sorted(folder.iterdir()):
        if file.suffix not in _WEIGHTS_LIKE or not file.is_file() or file.name == WEIGHTS:
            continue
        if _OTHERS.fullmatch(file.name):
            continue
        if file.stem in _LLAVA and file.suffix == ".safetensors":
            out.append(file)
        elif file.stem in _LLAVA:
            raise RetainError(
                f"{folder}: {file.name} holds the projector, but it is a pickle, which is never loaded; convert it: "
                f"safetensors.torch.save_file(torch.load({file.name!r}, weights_only=True), '{file.stem}.safetensors')"
            )
        else:
            raise RetainError(
                f"{folder}: {file.name} holds weights beside the adapter, which cannot be read; "
                "move it away only if the adapter is whole without it"
            )
    return out


def _place(a: PeftFolder) -> None:
    """Fill `modules` and `own`: every key has one place, or is named in an error."""
    unwrapped = {key: _INSIDE.sub("", _WRAPPED.sub("", key)) for key in a.shapes}
    name = _adapter_name(a, unwrapped.values())
    for key, inner in unwrapped.items():
        path, leaf = _parsed(inner, name)
        if a.files[key].name != WEIGHTS:
            path = _llava(a, key, path)
        if path.endswith(".base_layer"):
            path, table = path.removesuffix(".base_layer"), a.own
        elif (
            leaf.startswith(("lora", "magnitude"))
            or _is_copy(a.config, path, leaf)
            or a.files[key].name != WEIGHTS
        ):
            there = a.modules.setdefault(path, {})
            if leaf in there:
                raise RetainError(f"{a.files[key]}: {there[leaf]} and {key} are the same tensor of {path}")
            there[leaf] = key
            continue
        elif path.rpartition(".")[2] in _TABLES:
            table = a.own
        else:
            raise RetainError(
                f"{a.files[key]}: {key} has no place: it is no LoRA factor, and modules_to_save "
                f"({a.config.get('modules_to_save')}) does not name its module"
            )
        table[path, leaf] = key
    for path in a.modules:
        _whole(a, path)
    if a.files.keys() != {k for k, f in a.files.items() if f.name == WEIGHTS}:
        llava = {path: aliases(path)[-1] for path in a.modules}
        renamed = a.renamed(llava)
        a.modules.clear()
        a.modules.update(renamed.modules)
        a.names.update(renamed.names)
    for entry in a.config.get("modules_to_save") or []:
        if not any(_is_copy({"modules_to_save": [entry]}, path, "") for path in a.modules):
            raise RetainError(
                f"{a.folder / WEIGHTS}: modules_to_save names {entry!r}, but no tensor of it is there"
            )


def _adapter_name(a: PeftFolder, inner: Iterable[str]) -> str:
    """The adapter's name in the keys, "" where they carry none; two names are two adapters."""
    inner = list(inner)
    found = [f["name"] for k in inner for p in (_LORA, _EMBEDDING, _DORA) if (f := p.fullmatch(k))]
    names = sorted({n for n in found if n})
    if len(names) > 1:
        raise RetainError(
            f"{a.folder / WEIGHTS}: it holds several adapters, {names}; save one of them per folder"
        )
    if names:
        return names[0]
    rests = [f["rest"].split(".") for k in inner if (f := _SAVED.fullmatch(k))]
    same = {r[0] for r in rests}
    return same.pop() if len(same) == 1 and all(len(r) > 1 for r in rests) else ""


def _parsed(inner: str, name: str) -> tuple[str, str]:
    """Path and leaf of a key without its wrappers."""
    if found := _LORA.fullmatch(inner):
        return found["path"], f"lora_{found['side']}" if found["leaf"] == "weight" else "lora_bias"
    if found := _EMBEDDING.fullmatch(inner):
        return found["path"], found["side"]
    if found := _DORA.fullmatch(inner):
        return found["path"], "magnitude"
    if found := _SAVED.fullmatch(inner):
        rest = found["rest"].split(".")
        inner = ".".join(
            [found["path"], *(rest[1:] if rest[0] in (name, "default") and len(rest) > 1 else rest)]
        )
    path, _, leaf = inner.rpartition(".")
    return path, leaf


def _is_copy(config: Mapping[str, Any], path: str, leaf: str) -> bool:
    """Whether `modules_to_save` names this module or one around it (PEFT: by the end of its path)."""
    saved = config.get("modules_to_save") or []
    for name in aliases(path):
        parts = name.split(".")
        around = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        if any(a.endswith(m) or a in aliases(m) for a in around for m in saved):
            return True
    return False


def _llava(a: PeftFolder, key: str, path: str) -> str:
    """The stock name of a layer of LLaVA's own projector; anything else beside the adapter is refused."""
    path = path if path.startswith("model.") else f"model.{path}"
    if not re.fullmatch(r"model\.mm_projector\.[02]", path):
        raise RetainError(
            f"{a.files[key]}: {key} is no layer of a two-layer projector (mm_projector.0, mm_projector.2)"
        )
    return aliases(path)[-1]


def _whole(a: PeftFolder, path: str) -> None:
    """The factors of a module are a pair of matrices that fit, with nothing else beside them."""
    leaves = a.modules[path]
    file = a.folder / WEIGHTS
    first = next(iter(leaves.values()))
    for A, B in PAIRS:
        if A not in leaves and B not in leaves:
            continue
        for here, lacking in ((A, B), (B, A)):
            if lacking not in leaves:
                raise RetainError(f"{file}: {leaves[here]} is no pair: {path} has no {lacking}")
        stray = leaves.keys() - {A, B, "lora_bias", "magnitude"}
        if stray or (A != "lora_A" and len(leaves) > 2):
            raise RetainError(
                f"{file}: {leaves[sorted(stray or leaves)[0]]} has no place beside the factors of {path}"
            )
        shapes = a.shapes[leaves[A]], a.shapes[leaves[B]]
        for shape in shapes:
            if len(shape) != 2:
                raise RetainError(
                    f"{file}: {path}: factors of {len(shape)} dimensions (a convolution?); only linear layers "
                    "and embeddings can be merged"
                )
        if shapes[1][1] != shapes[0][0]:
            raise RetainError(
                f"{file}: {path}: {A} {shapes[0]} and {B} {shapes[1]} are no factors of one matrix"
            )
        if "magnitude" in leaves and not a.config.get("use_dora"):
            raise RetainError(
                f"{file}: {leaves['magnitude']} belongs to DoRA, but {CONFIG} does not say use_dora"
            )
        if a.config.get("use_dora") and "magnitude" not in leaves:
            raise RetainError(f"{file}: {CONFIG} says use_dora, but {path} has no lora_magnitude_vector")
        if "lora_bias" in leaves and not a.config.get("lora_bias"):
            raise RetainError(f"{file}: {leaves['lora_bias']} is there, but {CONFIG} does not say lora_bias")
        a.scale(path)
        return
    if {"lora_bias", "magnitude"} & leaves.keys():
        raise RetainError(f"{file}: {first} is no pair: {path} has no lora_A")
