"""A model's folder, looked at before transformers reads it: what is wrong is one sentence with file and field.

Transformers fills a tensor that is not there with random numbers and warns; reads a pickle, which runs what is in it;
builds a thousand million layers where a configuration says so; and loads an adapter that lies beside the model. Here
none of this happens. Only headers are read: a model of 7B takes hundredths of a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retain.adapters.checkpoint import INDEX, SINGLE, shards
from retain.adapters.peft_folder import header, read_object
from retain.types import RetainError

log = logging.getLogger("retain")

LAYERS, LABELS, SIDE = 1_000, 1_000_000, 1 << 14
"""What a configuration may ask for, unless the weights have more tensors: layers, labels, pixels of a side."""

_COUNTED = ("layers", "n_layer", "depth", "blocks", "experts", "stages")
_BIG = {"tokenizer.json", "vocab.json"}  # tens of megabytes: the tokenizers library reads them itself
_JSON = (
    "config.json", "generation_config.json", "tokenizer.json", "vocab.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip
_WEIGHTS = ("F64", "F32", "F16", "BF16")

CONVERT = (
    'python -c "import glob, torch; from safetensors.torch import save_file; w = {k: v.clone().contiguous() '
    "for f in sorted(glob.glob('pytorch_model*.bin')) "
    "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}; "
    "save_file(w, 'model.safetensors', {'format': 'pt'})\""
)
"""Makes safetensors of a pickle, run inside the folder; `weights_only` runs nothing that is in it."""


def looked_at(folder: Path, who: str) -> None:
    """Check the files of a local model. Raises RetainError, which begins with `who`."""
    if (folder / "adapter_config.json").exists():
        raise RetainError(
            f"{who}: the folder holds an adapter (adapter_config.json) beside the model, which would change it unseen; "
            "move it away, or merge it into the model first"
        )
    with told(who, "the folder"):
        entries = [p for p in folder.iterdir() if not p.name.startswith(".")]
    if odd := sorted(p.name for p in entries if not (p.is_file() or p.is_dir())):
        raise RetainError(f"{who}: {odd[0]} is no regular file (a pipe, a device, a broken link)")
    with told(who):
        found = {name: _object(folder / name) for name in _JSON if (folder / name).exists()}
    sizes = _headers(folder, who, quantised="quantization_config" in found["config.json"])
    plain(found["config.json"], f"{who}: config.json", len(sizes))
    for name in ("config.json", "generation_config.json"):
        _ids(found.get(name, {}), f"{who}: {name}")
    for name in ("preprocessor_config.json", "processor_config.json"):
        _sides(found.get(name, {}), f"{who}: {name}")


def _object(file: Path) -> dict[str, Any]:
    if file.name not in _BIG:
        return read_object(file, file.name)
    with file.open("rb") as f:
        if f.read(64).lstrip()[:1] != b"{":
            raise RetainError(f"{file}: it holds no mapping of fields")
    return {}


def _headers(folder: Path, who: str, *, quantised: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors; a pickle alone, a shard that is not there and weights that are no numbers are refused."""
    with told(who):
        files = shards(folder)
    if not files:
        pickles = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
        if pickles:
            raise RetainError(
                f"{who}: {pickles[0]} is a pickle, which runs what is in it when it is read, and is never loaded; "
                f"convert it once, inside the folder: {CONVERT}"
            )
        raise RetainError(f"{who}: the folder holds no weights ({SINGLE}, or shards with {INDEX})")
    out: dict[str, tuple[int, ...]] = {}
    for file in files:
        with told(who):
            shapes, kinds, _ = header(file)
        for key, kind in kinds.items():
            if kind not in _WEIGHTS and not quantised and key.endswith((".weight", ".bias")):
                raise RetainError(
                    f"{who}: {file.name}: {key} is stored as {kind}, but config.json names no quantization_config; "
                    f"weights are {', '.join(_WEIGHTS)}"
                )
        out |= shapes
    return out


def plain(config: Mapping[str, Any], where: str, tensors: int = 0) -> None:
    """Refuse a configuration that asks for code, for kernels from elsewhere, or for more layers than there are tensors."""
    for path, value in _leaves(config):
        key = path.rpartition(".")[2]
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise RetainError(f"{where}: {path}: {value!r} is code from elsewhere, which is never run")
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        most = LABELS if key == "num_labels" else max(LAYERS, tensors)
        counts = key == "num_labels" or any(part in key for part in _COUNTED)
        if counts and value > most:
            raise RetainError(
                f"{where}: {path}: {_short(value)} is more than {most:,}, which no model here has"
            )


def code(config: Mapping[str, Any], known: bool, who: str) -> None:
    """Say that a model's own code is not run; a model of a kind that only its own code knows is refused."""
    if not config.get("auto_map"):
        return
    if not known:
        raise RetainError(
            f"{who}: config.json: model_type {config.get('model_type')!r} is known only to code that the model brings "
            "along (auto_map), which is never run; use a checkpoint of a class that transformers has"
        )
    log.warning(
        "%s: the code that the model brings along (auto_map) is not run; transformers' own class is used", who
    )


def _ids(config: Mapping[str, Any], where: str) -> None:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        many = value if isinstance(value, list) else [value]
        if not all(type(i) is int for i in many) and value is not None:
            raise RetainError(
                f"{where}: {key}: {_short(value)}; the number of a token is needed, or a list of them"
            )


def _sides(config: Mapping[str, Any], where: str) -> None:
    for path, value in _leaves(config):
        side = path.rpartition(".")[2] in ("height", "width")
        if side and isinstance(value, int | float) and not 0 < value <= SIDE:
            raise RetainError(f"{where}: {path}: {_short(value)} pixels; from 1 to {SIDE:,} are taken")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text and nothing in a configuration, by its path."""
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        items = ((f"{path}.{k}" if path else str(k), v) for k, v in value.items())
    elif isinstance(value, list):
        items = ((path, v) for v in value)
    else:
        yield path, value
    for inner, v in items:
        yield from _leaves(v, inner)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


# -- while it is loaded ----------------------------------------------------------------------------------------


@contextmanager
def told(who: str, what: str = "", *, ours: bool = True) -> Iterator[None]:
    """Whatever transformers, tokenizers or jinja raise on a broken file becomes one sentence that begins with `who`.

    `ours`: an error of retain's own begins so too; else it is left as it is.
    """
    try:
        yield
    except RetainError as error:
        if not ours:
            raise
        raise (error if str(error).startswith(who) else RetainError(f"{who}: {error}")) from error
    except Exception as error:  # on a stranger's files they raise nearly every class there is
        said = " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in str(error)).split())
        said = said if len(said) <= 400 else said[:399] + "…"
        kind = "" if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: "
        raise RetainError(f"{who}: {what} cannot be loaded: {kind}{said}") from error


@contextmanager
def silent() -> Iterator[None]:
    """No table of keys from transformers: what is in it is told in one sentence."""
    from transformers.utils import logging as theirs  # slow to import

    before = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(before)


def fits(build: Callable[[], nn.Module], folder: Path, who: str) -> None:
    """Refuse a configuration of a model many times as large as its weights, before memory is asked for it."""
    with torch.device("meta"):
        model = build()
    wanted = sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    there = sum(file.stat().st_size for file in shards(folder))
    if wanted > 16 * there + 2**26:
        raise RetainError(
            f"{who}: config.json describes a model of {wanted:,} numbers, but its weights have {there:,} bytes"
        )


def complete(model: nn.Module, report: Mapping[str, Any], who: str) -> None:
    """Hugging Face's loading report: a tensor that is missing, or of another shape, is an error; tied ones are not in it."""
    where = f"{who}: the weights"
    if report["mismatched_keys"]:
        key, there, wanted = sorted(report["mismatched_keys"])[0]
        raise RetainError(
            f"{where} hold {key} of shape {tuple(there)}, config.json describes one of {tuple(wanted)}"
            f"{_more(report['mismatched_keys'])}"
        )
    if report["missing_keys"]:
        raise RetainError(
            f"{where} lack {_first(report['missing_keys'])}, which would be random numbers; the files are not whole, or "
            f"belong to another class than {type(model).__name__}"
        )
    unread = report["unexpected_keys"]
    if len(unread) > len(list(model.parameters())):
        raise RetainError(
            f"{where} hold {_first(unread)}, which {type(model).__name__} has no place for: config.json is of another model"
        )
    if unread:
        log.warning(
            "%s hold %s, which %s has no place for; not read", where, _first(unread), type(model).__name__
        )


def _first(keys: Iterable[str], n: int = 3) -> str:
    keys = sorted(map(str, keys))
    return ", ".join(keys[:n]) + (f" and {len(keys) - n:,} more" if len(keys) > n else "")


def _more(keys: Any) -> str:
    return f" ({len(keys) - 1:,} more differ)" if len(keys) > 1 else ""


def finite(model: nn.Module, who: str) -> None:
    """Refuse weights with NaN or infinity, by name: one pass, one answer from the device."""
    named = [(n, p.detach()) for n, p in model.named_parameters() if p.is_floating_point() and p.numel()]
    named = [(n, p) for n, p in named if p.element_size() > 1 and p.device.type != "meta"]
    if not named:
        return
    # reads at the speed of memory, makes nothing, and keeps NaN, which a comparison would lose
    ends = torch.stack([torch.stack(torch.aminmax(p)).float().to(named[0][1].device) for _, p in named])
    bad = (~ends.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise RetainError(f"{who}: the weights {_first(named[i][0] for i in bad)} hold NaN or infinity")
