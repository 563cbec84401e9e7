"""Tiny random models of five families, built from configs in memory: LLaVA-1.5, Qwen2.5-VL, SmolVLM/Idefics3,
Qwen3-VL, InternVL.

Real transformers classes, real Pillow image processors, a byte-level tokenizer trained on a few lines;
nothing is read from disk or the network. Weights are larger than a default initialisation, so that greedy
answers differ per sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from retain.adapters.bank import Mix
from retain.adapters.kinds import Spec
from retain.adapters.lora import LoraSpec
from retain.models.hf import HFModel
from retain.models.load import NoVideo, without_video
from retain.types import Example, Message

FAMILIES = ("llava", "qwen2_5_vl", "idefics3", "qwen3_vl", "internvl")
SPEC = LoraSpec(rank=4, alpha=8.0)
LINES = [
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:",
    "What colour is the square? red green blue yellow. How many shapes are there? one two three",
    "<|im_start|>user\nassistant\nsystem You are a helpful assistant. User: Assistant: yes no left right",
]

LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image>\n{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTERNVL_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer(
    special: list[str], eos: str, pad: str = "<pad>", named: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens; `named` ones can be asked for by attribute."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[pad, eos, *special], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=special or None,
        model_specific_special_tokens=named,
    )


def _text(tok: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tok), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "eos_token_id": tok.eos_token_id, "bos_token_id": None, "pad_token_id": tok.pad_token_id, **more,
    }  # fmt: skip


def _build(config: Any, seed: int) -> Any:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                # larger than HF's 0.02, so that images and adapters visibly change the answers
                p.copy_(
                    torch.randn(p.shape)
                    * (0.5 if "embed_tokens" in name else 1.5 / p.shape[1:].numel() ** 0.5)
                )
    torch.set_rng_state(state)
    model.generation_config.eos_token_id = config.get_text_config().eos_token_id
    return model


def llava(
    seed: int = 0,
    *,
    vision: int = 24,
    layers: int = 2,
    image: int = 24,
    patch: int = 8,
    text: dict[str, Any] | None = None,
    chat: bool = True,
) -> tuple[Any, Any]:
    """LLaVA-1.5: CLIP tower, two-layer projector, Llama; `chat=False`: no template, as in old checkpoints."""
    tok = tokenizer(["<image>"], "</s>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision, intermediate_size=2 * vision, num_hidden_layers=layers + 1,
            num_attention_heads=4, image_size=image, patch_size=patch, projection_dim=vision,
        ),
        text_config=LlamaConfig(**_text(tok, **(text or {}))),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=(image // patch) ** 2,
    )  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": image}, crop_size={"height": image, "width": image}),
        tok, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE if chat else None,
    )  # fmt: skip
    return _build(config, seed), processor


def _qwen_processor(tok: PreTrainedTokenizerFast, kind: Any) -> Any:
    images = Qwen2VLImageProcessorPil(
        patch_size=7,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56},
    )
    return without_video(kind)(images, tok, NoVideo(), chat_template=QWEN_TEMPLATE)


def qwen2_5_vl(seed: int = 0) -> tuple[Any, Any]:
    """Qwen2.5-VL: window attention in the tower, 2 x 2 merger, three-dimensional rotary positions."""
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tok = tokenizer(special, "<|im_end|>")
    ids = {t: tok.convert_tokens_to_ids(t) for t in special}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 28,
            "fullatt_block_indexes": [1],
        },
        text_config=_text(tok, rope_parameters=rope),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return _build(config, seed), _qwen_processor(tok, Qwen2_5_VLProcessor)


def qwen3_vl(seed: int = 0, layers: int = 2) -> tuple[Any, Any]:
    """Qwen3-VL: DeepStack (the first decoder layer adds features of an earlier tower layer), interleaved positions."""
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tok = tokenizer(special, "<|im_end|>")
    ids = {t: tok.convert_tokens_to_ids(t) for t in special}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e4}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [1],
        },
        text_config=_text(tok, rope_parameters=rope, head_dim=8, num_hidden_layers=layers),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return _build(config, seed), _qwen_processor(tok, Qwen3VLProcessor)


def qwen2_vl(seed: int = 0) -> tuple[Any, Any]:
    """Qwen2-VL: the decoder of Qwen2.5-VL behind an older tower."""
    _, processor = qwen2_5_vl(seed)
    tok = processor.tokenizer
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 7,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        text_config=_text(
            tok, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        ),
        image_token_id=tok.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tok.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tok.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tok.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    return _build(config, seed), processor


def internvl3_5(seed: int = 0) -> tuple[Any, Any]:
    """InternVL3.5: InternVL with Qwen3's decoder."""
    return internvl(seed, text="qwen3", head_dim=8)


def internvl(seed: int = 0, text: str = "qwen2", **more: Any) -> tuple[Any, Any]:
    """InternVL: its own ViT, pixel shuffle, Qwen2 text model, an image as several crops."""
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    tok = tokenizer(["<|im_start|>", *named.values()], "<|im_end|>", named=named)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [16, 16], "patch_size": [4, 4],
        },
        text_config={"model_type": text, **_text(tok, **more)},
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, min_patches=1, max_patches=4)
    make = without_video(InternVLProcessor)
    return _build(config, seed), make(
        images, tok, NoVideo(), image_seq_length=4, chat_template=INTERNVL_TEMPLATE
    )


def idefics3(seed: int = 0) -> tuple[Any, Any]:
    """Idefics3 (SmolVLM's architecture): SigLIP tower, pixel shuffle, an image as several crops."""
    rows = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    special = [
        "<|im_start|>",
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
        "<global-img>",
        *rows,
    ]
    tok = tokenizer([s for s in special if s != "<end_of_utterance>"], "<end_of_utterance>")
    config = Idefics3Config(
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8,
        },
        text_config=LlamaConfig(**_text(tok)),
        image_token_id=tok.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return _build(config, seed), Idefics3Processor(
        images, tok, image_seq_len=4, chat_template=IDEFICS_TEMPLATE
    )


BUILDERS = {
    "llava": llava,
    "qwen2_5_vl": qwen2_5_vl,
    "idefics3": idefics3,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "qwen2_vl": qwen2_vl,
    "internvl3_5": internvl3_5,
}


def model(family: str = "llava", spec: Spec = SPEC, seed: int = 0, **kwargs: Any) -> HFModel:
    """A tiny `HFModel` of a family."""
    return HFModel(*BUILDERS[family](seed), spec, name=f"tiny-{family}", **kwargs)


def picture(seed: int, height: int = 24, width: int = 24) -> np.ndarray:
    """Smooth coloured noise, HWC uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((height // 4, width // 4, 1), dtype=np.uint8))


def example(
    i: int, images: int = 1, question: str = "What colour is the square?", answer: str = "red"
) -> Example:
    """One example; `i` names it and seeds its pictures (of differing shapes where there are several)."""
    messages = (Message("user", question, images), Message("assistant", answer))
    pictures = tuple(picture(10 * i + k, 24 + 8 * k, 24 + 4 * k) for k in range(images))
    return Example(f"e{i}", messages, pictures)


def examples() -> list[Example]:
    """Six examples that differ in length and images: one, two and no image; a short and a long answer."""
    return [
        example(0),
        example(1, 2, "How many shapes are there?", "three yellow"),
        example(2, 0, "yes or no?", "no"),
        example(3, 1, "left?", "right"),
        example(4, 1, "What colour is the square and how many shapes are there? one two three", "green blue"),
        example(5, 0, "red", "yes"),
    ]


def fill(bank: Any, *names: str, seed: int = 0, size: float = 0.3) -> None:
    """Add adapters whose every tensor is noise, so that each of them changes the answers."""
    for k, name in enumerate(names):
        rng = torch.Generator().manual_seed(1000 * seed + k)
        bank.add(name, rng)
        with torch.no_grad():
            for p in bank.parameters(name).values():
                p.copy_(torch.randn(p.shape, generator=rng) * size / max(1, p.shape[-1]) ** 0.5)


def mixture(*rows: dict[str, float]) -> Mix:
    """A mix per sample: one mapping per sample, absent names count zero."""
    names = sorted({n for row in rows for n in row})
    return Mix({n: torch.tensor([row.get(n, 0.0) for row in rows]) for n in names})
