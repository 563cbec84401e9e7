"""What differs between model families, in a few lines each: where the parts are, and how an image becomes
tokens.

Paths follow transformers 5.x. A *split* family runs its frozen tower apart from its projector, so that tower
features can be cached: LLaVA (Liu et al. 2023), Idefics3/SmolVLM (Laurençon et al. 2024), Qwen2-VL, Qwen2.5-VL and
Qwen3-VL (Bai et al. 2025), InternVL (Zhu et al. 2025). Any other family is called whole, as Hugging Face does, with
its parts found by their usual names.
"""

# I images, R tower rows of an image (crops, or groups of patches), P patches, D width, M image tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retain.types import RetainError

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Module paths, and for split families the two halves of the image path.

    `features` maps one image's inputs to frozen features (R, …); `project` maps the features of all images,
    concatenated along R, to embeddings (M, D), or (M, (1 + n) D) where the first n decoder layers add image features
    of their own (DeepStack, Meng et al. 2024). `stack` says that images of equal size may share one tower call.
    """

    name: str
    language: str
    tower: str
    projector: tuple[str, ...]
    features: Callable[[Any, Inputs], Tensor] | None = None
    project: Callable[[Any, Tensor], Tensor] | None = None
    stack: bool = False
    grid_rope: bool = False  # positions in three dimensions, from the model's own get_rope_index

    def part(self, model: nn.Module, path: str) -> nn.Module:
        """The module at a path of this family."""
        return model.get_submodule(path)


# -- LLaVA ---------------------------------------------------------------------------------------------------


def _llava_features(model: Any, inputs: Inputs) -> Tensor:
    config = model.config
    layers = config.vision_feature_layer
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    chosen = [hidden[i] for i in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [h[:, 1:] for h in chosen]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)  # (I, P, D)


def _llava_project(model: Any, features: Tensor) -> Tensor:
    projected: Tensor = model.model.multi_modal_projector(features)
    return projected.flatten(0, 1)


# -- Idefics3, SmolVLM: an image is R crops ------------------------------------------------------------------


def _idefics_features(model: Any, inputs: Inputs) -> Tensor:
    pixels = inputs["pixel_values"].flatten(0, 1)  # (1, R, 3, H, W)
    size = model.config.vision_config.patch_size
    mask = inputs.get("pixel_attention_mask")
    if mask is None:
        mask = torch.ones(len(pixels), *pixels.shape[-2:], device=pixels.device)
    patches = mask.flatten(0, -3).unfold(1, size, size).unfold(2, size, size).sum((-1, -2)) > 0
    hidden: Tensor = model.model.vision_model(
        pixel_values=pixels, patch_attention_mask=patches
    ).last_hidden_state
    return hidden  # (R, P, D)


def _idefics_project(model: Any, features: Tensor) -> Tensor:
    projected: Tensor = model.model.connector(features)
    return projected.flatten(0, 1)


# -- InternVL: an image is R crops ---------------------------------------------------------------------------


def _internvl_features(model: Any, inputs: Inputs) -> Tensor:
    config = model.config
    layer = config.vision_feature_layer
    out = model.model.vision_tower(pixel_values=inputs["pixel_values"], output_hidden_states=layer != -1)
    hidden: Tensor = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    return hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden  # (R, P, D)


def _internvl_project(model: Any, features: Tensor) -> Tensor:
    side = int(features.shape[1] ** 0.5)
    square = features.unflatten(1, (side, side))
    shuffled = model.model.pixel_shuffle(square, scale_factor=model.config.downsample_ratio).flatten(1, 2)
    projected: Tensor = model.model.multi_modal_projector(shuffled)
    return projected.flatten(0, 1)


# -- Qwen2-VL, Qwen2.5-VL, Qwen3-VL: patches of any number, merged 2 x 2 by the projector --------------------


class _Keep(nn.Module):
    """Stands in for a merger: groups the patches as it would, and leaves them unmerged."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, self.group, x.shape[-1])


@contextmanager
def _without_mergers(visual: Any) -> Iterator[None]:
    merger, deep = visual.merger, getattr(visual, "deepstack_merger_list", ())
    keep = _Keep(visual.spatial_merge_size**2)
    visual.merger = keep
    if deep:
        visual.deepstack_merger_list = nn.ModuleList([keep] * len(deep))
    try:
        yield
    finally:
        visual.merger = merger
        if deep:
            visual.deepstack_merger_list = deep


def _qwen_features(model: Any, inputs: Inputs) -> Tensor:
    visual = model.model.visual
    with _without_mergers(visual):
        out = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    kept: Tensor = torch.cat([out.pooler_output, *getattr(out, "deepstack_features", ())], dim=-1)
    return kept  # (R, 4, D), or (R, 4, (1 + n) D): the last layer's patches, then those of n earlier ones


def _qwen_project(model: Any, features: Tensor) -> Tensor:
    visual = model.model.visual
    mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", ())]
    each = features.flatten(0, 1).chunk(len(mergers), dim=-1)
    return torch.cat(
        [merge(x.contiguous()) for merge, x in zip(mergers, each, strict=True)], dim=-1
    )  # (R, (1 + n) D)


# -- the table -----------------------------------------------------------------------------------------------

_LLAVA = Family(
    "llava", "model.language_model", "model.vision_tower", ("model.multi_modal_projector",),
    _llava_features, _llava_project, stack=True,
)  # fmt: skip
_IDEFICS = Family(
    "idefics3",
    "model.text_model",
    "model.vision_model",
    ("model.connector",),
    _idefics_features,
    _idefics_project,
)
_QWEN = Family(
    "qwen2_vl", "model.language_model", "model.visual", ("model.visual.merger",),
    _qwen_features, _qwen_project, grid_rope=True,
)  # fmt: skip
_QWEN3 = Family(
    "qwen3_vl", "model.language_model", "model.visual",
    ("model.visual.merger", "model.visual.deepstack_merger_list"),
    _qwen_features, _qwen_project, grid_rope=True,
)  # fmt: skip
_INTERNVL = Family(
    "internvl", "model.language_model", "model.vision_tower", ("model.multi_modal_projector",),
    _internvl_features, _internvl_project,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN3,
    "internvl": _INTERNVL,
}
"""Family by `config.model_type`."""

_LANGUAGE = ("language_model", "text_model")
_TOWER = ("vision_tower", "vision_model", "visual", "vision_encoder")
_PROJECTOR = (
    "multi_modal_projector",
    "connector",
    "mm_projector",
    "embed_vision",
    "aligner",
    "visual.merger",
)


def family_of(model: Any, name: str | None = None) -> Family:
    """The family by name, else by `config.model_type`, else found by the usual names of its parts.

    Raises RetainError when a name is unknown or a part cannot be found.
    """
    if name is not None and name not in FAMILIES:
        raise RetainError(f"model family {name!r} is unknown; choose from {sorted(FAMILIES)}")
    kind = name or str(getattr(model.config, "model_type", "?"))
    if kind in FAMILIES:
        return FAMILIES[kind]
    paths = {path for path, _ in model.named_modules()}

    def find(what: str, names: Sequence[str]) -> str:
        for prefix in ("model.", ""):
            for n in names:
                if prefix + n in paths:
                    return prefix + n
        raise RetainError(
            f"model family {kind!r}: found no {what} among {list(names)}; name a family of {sorted(FAMILIES)}"
        )

    language, tower = find("language model", _LANGUAGE), find("vision tower", _TOWER)
    grid = hasattr(getattr(model, "model", None), "get_rope_index")
    return Family(kind, language, tower, (find("projector", _PROJECTOR),), grid_rope=grid)
