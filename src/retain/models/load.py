"""Loading a stock Hugging Face checkpoint: model, tokenizer and a Pillow image processor, without
torchvision.

A local folder is read offline; a Hub id is fetched by transformers. A name that looks like a folder and is
not there is an error here, before anything asks the network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from retain.types import RetainError


class PlainProcessor:
    """Tokenizer and image processor side by side, for processors whose class insists on a video processor.

    Images become tokens by the rule of Qwen-VL (a token per merged group of patches), or of InternVL where `per_crop`
    says how many tokens stand for a crop.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        chat_template: str | None,
        image_token: str,
        per_crop: int = 0,
    ) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.chat_template, self.image_token, self.per_crop = chat_template, image_token, per_crop
        self.images_kwargs = {"crop_to_patches": True} if per_crop else {}  # InternVLProcessor's default

    def replace_image_token(self, image_inputs: dict[str, Any], index: int) -> str:
        """What stands for an image in the text."""
        if self.per_crop:
            many = self.per_crop * image_inputs["num_patches"][index]
            return (
                f"{self.tokenizer.start_image_token}{self.image_token * many}{self.tokenizer.end_image_token}"
            )
        merged = int(image_inputs["image_grid_thw"][index].prod()) // self.image_processor.merge_size**2
        return str(self.image_token * merged)

    def save_pretrained(self, folder: str | Path) -> None:
        """The two parts, as their own classes write them, and the chat template with the tokenizer."""
        if self.chat_template and not self.tokenizer.chat_template:
            self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def where(name_or_dir: str | Path) -> tuple[str, bool]:
    """The checkpoint's folder or Hub id, and whether it is local. A missing folder is a RetainError."""
    name = str(name_or_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RetainError(f"model {name!r}: the folder has no config.json; it holds {_some(path)}")
        return str(path), True
    looks_local = (
        isinstance(name_or_dir, Path)
        or path.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") != 1
    )
    if looks_local or (path.parent.is_dir() and path.parent != Path()):
        raise RetainError(f"model {name!r}: no such folder (a Hub id reads owner/name)")
    return name, False


def load_pretrained(
    name_or_dir: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """The model, in eval mode on its device, and its processor."""
    name, local = where(name_or_dir)
    try:
        auto: Any = AutoModelForImageTextToText
        config = AutoConfig.from_pretrained(name, local_files_only=local)
        model = auto.from_pretrained(name, config=config, dtype=dtype, local_files_only=local)
        processor = load_processor(name, local, config)
    except (OSError, ValueError) as error:
        raise RetainError(f"model {name!r} cannot be loaded: {error}") from error
    return model.to(device).eval(), processor


def load_processor(name: str, local: bool, config: Any = None) -> Any:
    """AutoProcessor; where its class needs torchvision for videos, tokenizer and Pillow image processor."""
    reason: object = "AutoProcessor finds no tokenizer with an image processor"
    auto: Any = AutoProcessor
    try:
        processor = auto.from_pretrained(name, local_files_only=local, backend="pil")
        if hasattr(processor, "tokenizer") and hasattr(processor, "image_processor"):
            return processor
    except (ImportError, TypeError, ValueError, OSError) as error:
        reason = error
    auto = AutoImageProcessor
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    images = auto.from_pretrained(name, local_files_only=local, backend="pil")
    per_crop = int(getattr(config, "image_seq_length", 0) or 0)
    if per_crop and hasattr(images, "crop_to_patches") and hasattr(tokenizer, "context_image_token"):
        return PlainProcessor(tokenizer, images, _template(name), tokenizer.context_image_token, per_crop)
    if not hasattr(images, "merge_size"):
        raise RetainError(f"the processor of {name!r} cannot be loaded: {reason}")
    token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
    return PlainProcessor(tokenizer, images, _template(name), token)


def _template(name: str) -> str | None:
    """A chat template beside the processor, where the tokenizer does not carry it."""
    folder = Path(name)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    if (folder / "chat_template.json").is_file():
        return str(json.loads((folder / "chat_template.json").read_text())["chat_template"])
    return None


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
