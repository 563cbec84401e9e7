"""Loading a stock Hugging Face checkpoint: the model and its own processor, with Pillow image processors where there
is no torchvision.

A local folder is read offline; a Hub id is fetched by transformers. A name that looks like a folder and is
not there is an error here, before anything asks the network.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import processing_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.processing_utils import ProcessorMixin

from retain.models.folder import code, complete, finite, fits, looked_at, plain, silent, told
from retain.types import RetainError


class Words:
    """A tokenizer where a processor is asked for: the model takes text only."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template

    def save_pretrained(self, folder: str | Path) -> None:
        """The tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


class NoVideo(dict[str, Any]):
    """In the place of a video processor, which needs torchvision: pictures and text never ask it anything.

    An empty mapping, so that a processor's config can be written with it.
    """

    num_frames = fps = _auto_class = None
    model_input_names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Nothing to write into a processor's config."""
        return {}

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Nothing to save."""


def where(name_or_dir: str | Path, who: str = "model") -> tuple[str, bool]:
    """The checkpoint's folder or Hub id, and whether it is local. A missing folder is a RetainError."""
    name = str(name_or_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RetainError(f"{who} {name!r}: the folder has no config.json; it holds {_some(path)}")
        return str(path), True
    looks_local = (
        isinstance(name_or_dir, Path)
        or path.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") != 1
    )
    if looks_local or (path.parent.is_dir() and path.parent != Path()):
        raise RetainError(f"{who} {name!r}: no such folder (a Hub id reads owner/name)")
    return name, False


def load_pretrained(
    name_or_dir: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """The model, in eval mode on its device, and its processor."""
    name, local = where(name_or_dir)
    config, who = read_config(name_or_dir), f"model {str(name_or_dir)!r}"
    auto: Any = model_class(config)
    if local:
        with told(who, "config.json"):
            fits(lambda: auto.from_config(config), Path(name), who)
    model = weights_of(auto, name, who, local, config=config, dtype=dtype)
    processor = load_processor(name, local, config)
    return model.to(device).eval(), processor


def read_config(name_or_dir: str | Path, who: str = "model") -> Any:
    """The configuration of a model, by a stock class; a local folder's files are looked at before."""
    name, local = where(name_or_dir, who)
    who = f"{who} {str(name_or_dir)!r}"
    if local:
        looked_at(Path(name), who)
    with told(who, "config.json"), silent():
        raw, _ = PreTrainedConfig.get_config_dict(name, local_files_only=local)
        plain(raw, f"{who}: config.json")
        code(raw, str(raw.get("model_type")) in CONFIG_MAPPING_NAMES, who)
        return AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)


def weights_of(auto: Any, name: str, who: str, local: bool, **how: Any) -> Any:
    """A model of a stock class with all of its weights, every one of them a number, from safetensors alone."""
    with told(who, "it"), silent():
        model, report = auto.from_pretrained(
            name, local_files_only=local, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True, **how,
        )  # fmt: skip
    complete(model, report, who)
    finite(model, who)
    return model


def model_class(config: Any) -> Any:
    """The auto class for a config: image and text to text, or text alone."""
    kind = str(config.model_type)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    raise RetainError(
        f"a model of type {kind!r} cannot be tuned: transformers knows it neither as image-text-to-text nor as a "
        "language model that generates"
    )


def load_processor(name: str, local: bool, config: Any = None) -> Any:
    """The checkpoint's own processor with Pillow image processors; a tokenizer alone for a model of text.

    Where a processor's class insists on a video processor that needs torchvision, it gets a stand-in for that part.
    Raises RetainError for a processor that does not say which tokens stand for an image.
    """
    with told(f"model {name!r}", "its tokenizer or image processor"):
        processor = _processor(name, local, config)
        processor.tokenizer("What?")  # what is wrong with its settings, it says at the first words
        return processor


def _processor(name: str, local: bool, config: Any) -> Any:
    if config is not None and str(config.model_type) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return Words(AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False))
    auto: Any = AutoProcessor
    try:
        processor = auto.from_pretrained(name, local_files_only=local, trust_remote_code=False, backend="pil")
        if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
            raise ValueError("AutoProcessor finds no tokenizer with an image processor")
    except (ImportError, TypeError, ValueError, OSError) as error:
        processor = _without_video(name, local, error)
    cls = type(processor)
    if cls.replace_image_token is ProcessorMixin.replace_image_token:
        kind = getattr(config, "model_type", "?")
        raise RetainError(
            f"model {name!r} (family {kind}): {cls.__name__} does not say which tokens stand for an image "
            "(replace_image_token), so examples cannot be prepared one by one; this family cannot be tuned"
        )
    return processor


def _without_video(name: str, local: bool, reason: Exception) -> Any:
    """The stock processor class from its stock parts, except for the part that reads videos."""
    try:
        given, _ = ProcessorMixin.get_processor_dict(name, local_files_only=local)
    except OSError:
        given = {}
    cls = _processor_class(name, local, given)
    if cls is None:
        raise RetainError(f"the processor of {name!r} cannot be loaded: {reason}") from reason
    loads: dict[str, Any] = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor}
    more: dict[str, Any] = {"image_processor": {"backend": "pil"}}
    parts = [
        NoVideo() if part == "video_processor" else
        loads[part].from_pretrained(name, local_files_only=local, trust_remote_code=False, **more.get(part, {}))
        for part in cls.get_attributes()
    ]  # fmt: skip
    made = without_video(cls).from_args_and_dict(parts, given)
    made.chat_template = made.chat_template or _template(name)
    return made


def _processor_class(name: str, local: bool, given: dict[str, Any]) -> Any:
    """The class of the processor, from its own file: from its package it asks for torchvision. None if there is none."""
    wanted = given.get("processor_class") or _beside(name, "preprocessor_config.json").get("processor_class")
    kinds: dict[str, str] = vars(processing_auto)["PROCESSOR_MAPPING_NAMES"]
    wanted = wanted or kinds.get(
        str(AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False).model_type)
    )
    for kind in [k for k, processor in kinds.items() if processor == wanted]:
        module = _processing(vars(processing_auto)["model_type_to_module_name"](kind))
        found = getattr(module, str(wanted), None)
        if found is not None and {"tokenizer", "image_processor"} <= set(found.get_attributes()):
            return found
    return None


def _processing(of: str) -> ModuleType | None:
    """A family's own file of its processor. Where that asks its torchvision file for a function, its Pillow file has it."""
    place = f"transformers.models.{of}"
    with suppress(ModuleNotFoundError):
        return import_module(f"{place}.processing_{of}")
    with suppress(ModuleNotFoundError):
        sys.modules[f"{place}.image_processing_{of}"] = import_module(f"{place}.image_processing_pil_{of}")
        try:
            return import_module(f"{place}.processing_{of}")
        finally:
            del sys.modules[f"{place}.image_processing_{of}"]
    return None


def _beside(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a local checkpoint; empty where there is none."""
    path = Path(name) / file
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def without_video(cls: Any) -> Any:
    """A stock processor's class that takes `NoVideo` for its video part; all else, its name too, is the stock class's."""
    return type(
        cls.__name__,
        (cls,),
        {"check_argument_for_proper_class": lambda *_: None, "__module__": cls.__module__},
    )


def _template(name: str) -> str | None:
    """A chat template beside the processor, where the tokenizer does not carry it."""
    folder = Path(name)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    if (folder / "chat_template.json").is_file():
        return str(json.loads((folder / "chat_template.json").read_text())["chat_template"])
    return None


PROCESSOR_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json", "*.tiktoken",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template*",
    "additional_chat_templates/*", "generation_config.json",
)  # fmt: skip
"""What a processor is read from."""


def copy_processor(name: str, folder: str | Path) -> bool:
    """Copy a checkpoint's processor files as they are; False where it has no folder on this machine."""
    source = Path(name).expanduser() if name else Path()
    if name and not source.is_dir():
        found = try_to_load_from_cache(name, "config.json")
        source = Path(found).parent if isinstance(found, str) else Path()
    if not (source / "config.json").is_file() or source == Path():
        return False
    for file in sorted({f for pattern in PROCESSOR_FILES for f in source.glob(pattern) if f.is_file()}):
        target = Path(folder) / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return True


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the generation config's, the model config's and the tokenizer's."""
    found: set[int] = set()
    text = model.config.get_text_config()
    for ids in (
        getattr(model.generation_config, "eos_token_id", None),
        text.eos_token_id,
        tokenizer.eos_token_id,
    ):
        found |= {int(i) for i in (ids if isinstance(ids, list | tuple) else [ids]) if i is not None}
    vocabulary = int(text.vocab_size)
    found = {i for i in found if 0 <= i < vocabulary}
    if not found:
        raise RetainError("neither the model nor its tokenizer names an EOS token; answers could not end")
    return frozenset(found)


def _some(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())[:6]
