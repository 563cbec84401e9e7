"""What routers compare: frozen features of a sample's images and of its instruction, unit length, fp32.

With a stock CLIP model (Radford et al. 2021; the folder `guide/` beside the base, or one named in the recipe)
they are its aligned image and text embeddings, as in HiDe-LLaVA, DISCO and ModalPrompt. Without one they are
mean-pooled features of the base's own frozen tower and mean-pooled frozen input embeddings of the
instruction's tokens: not aligned with each other, but each comparable with itself. Every image and text runs
alone, so a route never depends on the batch, and each is computed once.
"""

# B batch, F image features, D text features

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from retain.models.cache import ByteLRU
from retain.models.encode import Encoder, open_image
from retain.models.family import Family
from retain.models.folder import fits, told
from retain.models.load import read_config, weights_of, where
from retain.types import Batch, Example, Guide, RetainError

GuideSource = str | Path | None


class Featured(Protocol):
    """What guide features need of a model."""

    hf: Any
    processor: Any
    device: torch.device
    eos: frozenset[int]
    family: Family
    encode: Encoder

    @property
    def frozen_tower(self) -> bool: ...
    @property
    def embed(self) -> torch.nn.Module: ...
    def collate(self, examples: Sequence[Example], *, answers: bool) -> Batch: ...
    def tower_features(self, batch: Batch) -> list[Tensor]: ...


class Guider:
    """Guide features of a model's examples; a CLIP model is loaded when features are first asked for."""

    def __init__(self, model: Featured, source: GuideSource, budget: int = 1 << 27) -> None:
        self._model = weakref.ref(model)
        self.source = source
        self._clip: _Clip | None = None
        self._kept: ByteLRU[Tensor] = ByteLRU(budget)
        self._seen: weakref.WeakKeyDictionary[Example, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Guide:
        """Image (B, F) and text (B, D) features on the CPU; a zero image row for a sample without images."""
        # fp32, whatever the caller runs in: features are kept, and must not depend on who asked first
        with torch.autocast(self._base().device.type, enabled=False):
            pairs = [self._of(e) for e in batch.examples]
        return Guide(torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]))

    def _of(self, example: Example) -> tuple[Tensor, Tensor]:
        found = self._seen.get(example)
        if found is None:
            found = self._seen[example] = (self._images(example), self._text(example.question))
        return found

    def _images(self, example: Example) -> Tensor:
        """The unit-length mean of the images' unit-length features, or zeros."""
        refs = self._base().encode(example).images
        each = []
        for ref in refs:
            key = f"image {ref.key}"
            found = self._kept.get(key)
            if found is None:
                clip = self._loaded()
                found = unit(
                    clip.image(open_image(ref.source, example.told))
                    if clip
                    else self._pooled(example, ref.key)
                )
                self._kept.put(key, found)
            each.append(found)
        return unit(torch.stack(each).mean(0)) if each else torch.zeros(self._width())

    def _text(self, text: str) -> Tensor:
        key = "text " + hashlib.sha256(text.encode()).hexdigest()[:24]
        found = self._kept.get(key)
        if found is None:
            clip = self._loaded()
            found = unit(clip.text(text) if clip else self._bag(text))
            self._kept.put(key, found)
        return found

    def _width(self) -> int:
        clip = self._loaded()
        return clip.width if clip else _tower_width(self._base().hf)

    # -- without a CLIP model --------------------------------------------------------------------------------

    def _pooled(self, example: Example, key: str) -> Tensor:
        base = self._base()
        if not base.frozen_tower:
            raise RetainError(
                f"the {base.family.name} family gives no frozen tower features on its own; "
                "name a CLIP model for routing features (model.guide)"
            )
        batch = base.collate([example], answers=False)
        features = base.tower_features(batch)
        at = [r.key for r in batch.meta["images"]].index(key)
        value = features[at].float()[..., : _tower_width(base.hf)]  # of the last layer, where there are more
        return value.reshape(-1, value.shape[-1]).mean(0).cpu()

    def _bag(self, text: str) -> Tensor:
        base = self._base()
        ids = base.processor.tokenizer(text or " ", add_special_tokens=False)["input_ids"] or [min(base.eos)]
        table: Any = base.embed
        embedded: Tensor = table(torch.tensor(ids, device=base.device))
        return embedded.float().mean(0).cpu()

    def _base(self) -> Featured:
        model = self._model()
        assert model is not None
        return model

    def _loaded(self) -> _Clip | None:
        if self._clip is None and self.source is not None:
            self._clip = _Clip(self.source, self._base().device)
        return self._clip


class _Clip:
    """A stock CLIPModel folder with tokenizer and (Pillow) image processor."""

    def __init__(self, source: str | Path, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        auto: Any = AutoImageProcessor
        name, local = where(source, "guide")
        who = f"guide {str(source)!r}"
        config = read_config(source, "guide")
        if config.model_type != "clip":
            raise RetainError(f"{who}: config.json: model_type {config.model_type!r} is no CLIP model")
        if local:
            with told(who, "config.json"):
                fits(lambda: CLIPModel(config), Path(name), who)
        model = weights_of(CLIPModel, name, who, local, config=config)
        self.model = model.to(device).eval().requires_grad_(False)
        how: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
        with told(who, "its tokenizer or image processor"):
            self.tokenizer = AutoTokenizer.from_pretrained(name, **how)
            self.processor = auto.from_pretrained(name, backend="pil", **how)
        self.device = device
        self.width = int(self.model.config.projection_dim)
        self.max_tokens = int(self.model.config.text_config.max_position_embeddings)

    def image(self, image: Any) -> Tensor:
        pixels = self.processor(images=[image], return_tensors="pt")["pixel_values"].to(self.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        out: Tensor = self.model.visual_projection(pooled)
        return out[0].float().cpu()

    def text(self, text: str) -> Tensor:
        ids = self.tokenizer(text, truncation=True, max_length=self.max_tokens, return_tensors="pt")[
            "input_ids"
        ]
        pooled = self.model.text_model(input_ids=ids.to(self.device)).pooler_output
        out: Tensor = self.model.text_projection(pooled)
        return out[0].float().cpu()


def _tower_width(hf: Any) -> int:
    if not hasattr(hf.config, "vision_config"):
        return 1  # a model of text only: image rows are zeros
    vision, layers = hf.config.vision_config, getattr(hf.config, "vision_feature_layer", -1)
    width = int(
        getattr(vision, "embed_dim", 0) or vision.hidden_size
    )  # Qwen2-VL's hidden_size is behind the merger
    return width * (len(layers) if isinstance(layers, list) else 1)


def prototype_width(hf: Any, source: GuideSource) -> int:
    """Width of a vector that can be compared with image and text features, from configs alone.

    F where they share CLIP's space; F + D, one part for each, where they are the base's own.
    """
    if source is None:
        return _tower_width(hf) + int(hf.get_input_embeddings().weight.shape[1])
    with told(f"guide {str(source)!r}", "config.json"):
        return int(read_config(source, "guide").projection_dim)


def unit(x: Tensor) -> Tensor:
    """Scaled to length one; zeros stay zeros."""
    return F.normalize(x.float(), dim=-1)
