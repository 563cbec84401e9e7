"""A plain Hugging Face checkpoint on disk: its weights by module, read one at a time, and which of them are tied.

    base = Checkpoint("models/llava-1.5-7b");   base.find("language_model.lm_head");   base.weight("lm_head")

Names come from the model's own class, built without memory, and from transformers' own table of renamed weights
(`transformers.conversion_mapping`); where the class is not a stock one they are those of the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from retain.adapters.peft_folder import aliases, read_object
from retain.types import RetainError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """A model folder. Nothing is read but headers until a weight is asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = self._config()
        quantised = self.config.get("quantization_config")
        if quantised:
            kind = quantised.get("quant_method", "quantised") if isinstance(quantised, dict) else quantised
            raise RetainError(f"{folder}: the weights are quantised ({kind}); give the full base")
        self.shards = self._shards()
        self.files: dict[Path, Any] = {}
        for shard in self.shards:
            try:
                file: Any = safe_open(shard, "pt")
                self.files[shard] = file.__enter__()  # closed with this object
            except SafetensorError as error:
                raise RetainError(f"{shard}: no whole safetensors file: {error}") from None
            except OSError as error:
                raise RetainError(f"{shard}: {error.strerror or error}") from None

    def _config(self) -> dict[str, Any]:
        if not (self.folder / "config.json").is_file():
            raise self._no_model()
        return read_object(self.folder / "config.json", "model config")

    def _shards(self) -> list[Path]:
        """What `from_pretrained` reads: one file, or those of the index; copies under other names are left alone."""
        found = shards(self.folder) or sorted(self.folder.glob("*.safetensors"))
        if not found:
            raise self._no_model()
        return found

    def _no_model(self) -> RetainError:
        return RetainError(
            f"{self.folder}: no model folder (config.json and safetensors); name one with --base"
        )

    @cached_property
    def model(self) -> Any:
        """The model of the stock class without weights (on the meta device); none where the class is not stock."""
        return bare(self.config, self.folder)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The model's modules by path; empty where the class is not stock."""
        return {} if self.model is None else dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def keys(self) -> dict[str, tuple[Path, str]]:
        """Every name of a parameter to its shard and its key there."""
        stored = [(shard, key) for shard, f in self.files.items() for key in f.keys()]  # noqa: SIM118
        if self.model is not None:
            return {self._loaded(key): (shard, key) for shard, key in stored}
        return {name: (shard, key) for shard, key in reversed(stored) for name in reversed(aliases(key))}

    def _loaded(self, key: str) -> str:
        """The parameter that `from_pretrained` loads a key of the file into."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters, state = self._conversions
        name, converter = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
        return f"{name} (in pieces: {key})" if converter else name

    @cached_property
    def _conversions(self) -> tuple[list[Any], list[Any], dict[str, Tensor]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        every = get_model_conversion_mapping(self.model)
        converters = [c for c in every if isinstance(c, WeightConverter)]
        return [c for c in every if not isinstance(c, WeightConverter)], converters, self.model.state_dict()

    @cached_property
    def tied(self) -> dict[str, str]:
        """Parameters that have no weight of their own, to those whose weight they use (a head, the embeddings).

        As `from_pretrained` does it: what the files hold twice, and differently, is not tied, whatever the config says.
        """
        pairs = {} if self.model is None else dict(self.model.all_tied_weights_keys)
        return {head: table for head, table in pairs.items() if not self._differ(head, table)}

    def _differ(self, *names: str) -> bool:
        places = [self.keys[name] for name in names if name in self.keys]
        stored = [self.files[shard].get_tensor(key) for shard, key in places]
        return len(stored) == 2 and not torch.equal(*stored)

    @property
    def says_tied(self) -> bool:
        """Whether the config asks for one weight for embeddings and head."""
        inner = self.config.get("text_config")
        return any(isinstance(c, dict) and c.get("tie_word_embeddings") is True for c in (self.config, inner))

    def find(self, path: str) -> str:
        """The module's path in the model by any name that it goes by; an error names what was not found."""
        names = aliases(path)
        there = {name.rpartition(".")[0] for name in self.keys}
        if self.model is not None:
            names.append(self._loaded(f"{path}.weight").removesuffix(".weight"))
            there = set(self.modules)
        for name in names:
            if name in there:
                return name
        raise RetainError(f"{self.folder}: this model has no module {path!r}{self._known_as(path)}")

    def _known_as(self, path: str) -> str:
        others = aliases(path)[1:]
        return f" (nor {others[0]!r}, as transformers 5 would call it)" if others else ""

    def place(self, name: str) -> tuple[Path, str]:
        """Shard and key of a parameter; of a tied one, of the weight that it uses."""
        for known in (name, self.tied.get(name), next((t for t, s in self.tied.items() if s == name), None)):
            if known in self.keys:
                return self.keys[known]
        pieces = next((k for k in self.keys if k.startswith(f"{name} (in pieces")), None)
        told = (
            f"{pieces}, which transformers puts together; merge into an adapter instead"
            if pieces
            else f"no weight {name!r}"
        )
        raise RetainError(f"{self.folder}: {told}")

    def tensor(self, name: str) -> Tensor:
        """A parameter as it is stored; a quantised one is refused by name."""
        shard, key = self.place(name)
        value: Tensor = self.files[shard].get_tensor(key)
        if not value.is_floating_point() or value.element_size() == 1:
            raise RetainError(f"{self.folder}: {name} is quantised ({value.dtype}); give the full base")
        return value

    def weight(self, path: str) -> Tensor:
        """The weight of a module as (out, in), in fp32."""
        value = self.tensor(f"{path}.weight").float()
        return value.T if self.transposed(path) else value

    def transposed(self, path: str) -> bool:
        """Whether the module stores its weight as (in, out), as embeddings and GPT-2's layers do."""
        module = self.modules.get(path)
        return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"


def shards(folder: Path) -> list[Path]:
    """The files that `from_pretrained` reads weights from: one, or those of the index; none where there is neither.

    Raises RetainError for an index that names a file outside of the folder, or one that is not there.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    named = read_object(folder / INDEX, "index of shards").get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(n, str) for n in named.values()):
        raise RetainError(f"{folder / INDEX}: weight_map: a mapping of tensors to files is needed")
    names = sorted(set(named.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise RetainError(f"{folder / INDEX}: weight_map: {name!r} is no safetensors file of this folder")
        if not (folder / name).is_file():
            raise RetainError(f"{folder / INDEX}: weight_map names {name}, which is not there")
    return [folder / name for name in names]


def bare(config: Mapping[str, Any], folder: Path) -> Any:
    """A model of the stock class that a config.json names, on the meta device; none where there is no such class."""
    import transformers
    from transformers import AutoConfig

    names = config.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if kind is None or not config.get("model_type"):
        return None
    fields = {k: v for k, v in config.items() if k != "model_type"}
    try:
        made = AutoConfig.for_model(config["model_type"], **fields)
        with torch.device("meta"):
            return kind(made)
    except Exception as error:  # whatever a config that no stock class accepts raises
        raise RetainError(f"{folder / 'config.json'}: no {names[0]} can be built from it: {error}") from None


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model whose head and embeddings have a weight each."""
    inner = {
        k: untied(v) if isinstance(v, dict) and v.get("tie_word_embeddings") else v for k, v in config.items()
    }
    return {**inner, "tie_word_embeddings": False}
