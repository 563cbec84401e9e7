"""What differs between model families, in a few lines each: where the parts are, and how an image becomes
tokens.

Paths follow transformers 5.x. A *split* family runs its frozen tower apart from its projector, so that tower
features can be cached. Any other family is called as Hugging Face calls it, one image at a time
(`get_image_features`), with its parts found by their usual names. Whether that is right is not believed but measured,
whenever a model is loaded: `retain.models.guard`.
"""

# I images, R tower rows of an image (crops, or groups of patches), P patches, D width, M image tokens, T tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from retain.types import RetainError

Inputs = Mapping[str, Tensor]
Sizes = Sequence[tuple[int, ...]]
"""Height and width of every image, where the processor tells the model."""

VICUNA_V1 = (
    "{% if messages[0]['role'] == 'system' %}{% for c in messages[0]['content'] %}{{ c['text'] }}{% endfor %}{% else %}"
    "{{ 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ ' USER: ' }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ ' ASSISTANT: ' }}{% endif %}"
    "{% if m['role'] != 'system' %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
"""LLaVA's conversation (github.com/haotian-liu/LLaVA, llava/conversation.py), for its checkpoints without a template."""

LINES = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
)
"""A line for a turn, for base language models without a chat template."""

PREFIX = (
    "{% if messages[0]['role'] != 'user' or messages | length > 2 %}{{ raise_exception("
    "'the checkpoint has no chat template: one question and one answer can be written, and no other turn') }}{% endif %}"
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
"""Pictures and question as they are; what else belongs there is the processor's to add (PaliGemma)."""


@dataclass(frozen=True)
class Family:
    """Module paths, and for split families the two halves of the image path.

    `features` maps one image's inputs to frozen features (R, …); `project` maps the features of all images,
    concatenated along R, to embeddings (M, D), or (M, (1 + n) D) where the first n decoder layers add image features
    of their own (DeepStack, Meng et al. 2024); it is told every image's R and size. `stack` says that images of equal
    size may share one tower call. A family without `tower` takes text only.
    """

    name: str
    language: str
    tower: str
    projector: tuple[str, ...]
    features: Callable[[Any, Inputs], Tensor] | None = None
    project: Callable[[Any, Tensor, Sequence[int], Sizes], Tensor] | None = None
    stack: bool = False
    grid_rope: bool = False  # positions in three dimensions, from the model's own get_rope_index
    flat: bool = False  # the projector sees rows of image tokens, not of images
    together: bool = False  # the processor treats an image with others in its row otherwise than one alone
    template: str = LINES  # where the checkpoint has none
    first: int = 0  # position of the first token
    types: Callable[[Sequence[int], int, int], list[int]] | None = None
    """Token types of a row from its ids, the length of its prompt, and the image token; the mask depends on them."""

    def part(self, model: nn.Module, path: str) -> nn.Module:
        """The module at a path of this family."""
        return model.get_submodule(path)


# -- LLaVA, VipLLaVA, PaliGemma, Gemma 3: one picture of one size -------------------------------------------


def _llava_features(model: Any, inputs: Inputs) -> Tensor:
    sizes = {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}  # Pixtral's tower
    hidden = model.model.vision_tower(
        inputs["pixel_values"], output_hidden_states=True, **sizes
    ).hidden_states
    chosen = _layers(model.config, hidden)
    return chosen[0] if sizes else chosen  # (P, D), or (I, P, D)


def _layers(config: Any, hidden: Sequence[Tensor], select: str | None = None) -> Tensor:
    """The tower layers that the projector reads, side by side; without the class token where the config says so."""
    layers = config.vision_feature_layer
    chosen = [hidden[i] for i in ([layers] if isinstance(layers, int) else layers)]
    if (select or config.vision_feature_select_strategy) == "default":
        chosen = [h[:, 1:] for h in chosen]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)


def _projected(model: Any, features: Tensor, rows: Sequence[int], sizes: Sizes) -> Tensor:
    projected: Tensor = model.model.multi_modal_projector(features)
    return projected.flatten(0, -2)


def _vipllava_features(model: Any, inputs: Inputs) -> Tensor:
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    return _layers(model.config, hidden, "default")


def _last_features(model: Any, inputs: Inputs) -> Tensor:
    hidden: Tensor = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    return hidden


def _prefix_types(ids: Sequence[int], n_prompt: int, image_token: int) -> list[int]:
    """PaliGemma: everything before the answer sees all of itself."""
    return [0] * n_prompt + [1] * (len(ids) - n_prompt)


def _image_types(ids: Sequence[int], n_prompt: int, image_token: int) -> list[int]:
    """Gemma 3: the tokens of an image see one another."""
    return [int(i == image_token) for i in ids]


# -- Mistral 3: one picture of any size ----------------------------------------------------------------------


def _mistral_features(model: Any, inputs: Inputs) -> Tensor:
    tower = model.model.vision_tower
    out = tower(inputs["pixel_values"], image_sizes=inputs["image_sizes"], output_hidden_states=True)
    return _layers(model.config, out.hidden_states, "full").squeeze(0)  # (P, D)


def _mistral_project(model: Any, features: Tensor, rows: Sequence[int], sizes: Sizes) -> Tensor:
    projected: Tensor = model.model.multi_modal_projector(features, sizes)
    return projected


# -- LLaVA-NeXT, LLaVA-OneVision: the picture and R - 1 crops, packed by the model's own rule ----------------


def _anyres_features(model: Any, inputs: Inputs) -> Tensor:
    pixels = inputs["pixel_values"].flatten(0, 1)  # (1, R, 3, H, W)
    return _layers(model.config, model.model.vision_tower(pixels, output_hidden_states=True).hidden_states)


def _packed(model: Any, features: Tensor, rows: Sequence[int], sizes: Sizes, **how: Any) -> Tensor:
    projected = model.model.multi_modal_projector(features).split(list(rows))
    newline = model.model.image_newline
    packed, _ = model.model.pack_image_features(projected, torch.tensor(sizes), image_newline=newline, **how)
    return torch.cat(packed)


def _next_project(model: Any, features: Tensor, rows: Sequence[int], sizes: Sizes) -> Tensor:
    select = model.config.vision_feature_select_strategy
    return _packed(model, features, rows, sizes, vision_feature_select_strategy=select)


def _onevision_project(model: Any, features: Tensor, rows: Sequence[int], sizes: Sizes) -> Tensor:
    return _packed(model, features, rows, sizes, vision_aspect_ratio=model.config.vision_aspect_ratio)


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


def _idefics_project(model: Any, features: Tensor, rows: Sequence[int], sizes: Sizes) -> Tensor:
    projected: Tensor = model.model.connector(features)
    return projected.flatten(0, 1)


# -- InternVL: an image is R crops ---------------------------------------------------------------------------


def _internvl_features(model: Any, inputs: Inputs) -> Tensor:
    config = model.config
    layer = config.vision_feature_layer
    out = model.model.vision_tower(pixel_values=inputs["pixel_values"], output_hidden_states=layer != -1)
    hidden: Tensor = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    return hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden  # (R, P, D)


def _internvl_project(model: Any, features: Tensor, rows: Sequence[int], sizes: Sizes) -> Tensor:
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


def _qwen_project(model: Any, features: Tensor, rows: Sequence[int], sizes: Sizes) -> Tensor:
    visual = model.model.visual
    mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", ())]
    each = features.flatten(0, 1).chunk(len(mergers), dim=-1)
    return torch.cat(
        [merge(x.contiguous()) for merge, x in zip(mergers, each, strict=True)], dim=-1
    )  # (R, (1 + n) D)


# -- the table -----------------------------------------------------------------------------------------------

_PARTS = ("model.language_model", "model.vision_tower", ("model.multi_modal_projector",))
_LLAVA = Family("llava", *_PARTS, _llava_features, _projected, stack=True, template=VICUNA_V1)
_PIXTRAL = replace(_LLAVA, name="pixtral", stack=False, flat=True)
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
    _qwen_features, _qwen_project, grid_rope=True, flat=True,
)  # fmt: skip
_QWEN3 = replace(
    _QWEN, name="qwen3_vl", projector=("model.visual.merger", "model.visual.deepstack_merger_list")
)

FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "pixtral": _PIXTRAL,
    "vipllava": Family("vipllava", *_PARTS, _vipllava_features, _projected, stack=True, template=VICUNA_V1),
    "llava_next": Family("llava_next", *_PARTS, _anyres_features, _next_project, template=VICUNA_V1),
    "llava_onevision": Family(
        "llava_onevision", *_PARTS, _anyres_features, _onevision_project, together=True
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "internvl": Family("internvl", *_PARTS, _internvl_features, _internvl_project),
    "paligemma": Family(
        "paligemma",
        *_PARTS,
        _last_features,
        _projected,
        stack=True,
        template=PREFIX,
        first=1,
        types=_prefix_types,
    ),
    "gemma3": Family("gemma3", *_PARTS, _last_features, _projected, stack=True, types=_image_types),
    "mistral3": Family("mistral3", *_PARTS, _mistral_features, _mistral_project, flat=True),
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

    Raises RetainError when a name is unknown, a part cannot be found, or the model is no decoder of one row of tokens.
    """
    if name is not None and name not in FAMILIES:
        raise RetainError(f"model family {name!r} is unknown; choose from {sorted(FAMILIES)}")
    kind = name or str(getattr(model.config, "model_type", "?"))
    if getattr(model.config, "is_encoder_decoder", False):
        raise RetainError(
            f"model family {kind!r}: an encoder-decoder ({type(model).__name__}) cannot be tuned; images and text must "
            "be one row of tokens of a decoder"
        )
    if kind == "llava" and str(getattr(model.config.vision_config, "model_type", "")) == "pixtral":
        kind = "pixtral"
    if kind in FAMILIES:
        return FAMILIES[kind]
    if not hasattr(model.config, "vision_config") and model.config.get_text_config() is model.config:
        return Family(kind, str(model.base_model_prefix), "", ())
    paths = {path for path, _ in model.named_modules()}

    def find(what: str, names: Sequence[str]) -> str:
        for prefix in ("model.", ""):
            for n in names:
                if prefix + n in paths:
                    return prefix + n
        raise RetainError(
            f"model family {kind!r} ({type(model).__name__}) cannot be tuned: it has no {what} by one of the names "
            f"{list(names)}"
        )

    language, tower = find("language model", _LANGUAGE), find("vision tower", _TOWER)
    grid = hasattr(getattr(model, "model", None), "get_rope_index")
    return Family(kind, language, tower, (find("projector", _PROJECTOR),), grid_rope=grid)
