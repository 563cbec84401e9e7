"""Tiny checkpoints of the families that people bring, each a folder as its publisher writes one.

Real transformers classes and real processors: the tokenizer's own class with the family's special tokens, the image
processor's and the processor's configuration, the chat template (it renders the text that the published one renders)
and the generation config. Only sizes and weights are ours: a hidden size of 32, random weights from a seed, larger
than Hugging Face's initialisation, so that a lost token or a wrong mask changes logits by more than 0.01.
`build(name, folder)` writes one; what Hugging Face makes of it is in `stock`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CohereTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer

LINES = [
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: Human Assistant",
    "What colour is the square? red green blue yellow. How many shapes are there? one two three four five",
    "user assistant system model You are a helpful assistant. User: Assistant: yes no left right up down",
    "Before: After: What changed? The left square is green now. Answer in one word. Describe the picture.",
]
SIDE, PATCH = 28, 7
"""Pixels of a crop, and of a patch: 16 patches."""


# -- chat templates: the text of the published ones ------------------------------------------------------------

_IMAGES_FIRST = (
    "{%% for c in m['content'] | selectattr('type', 'equalto', 'image') %%}{{ '%s' }}{%% endfor %%}"
    "{%% for c in m['content'] | selectattr('type', 'equalto', 'text') %%}{{ %s }}{%% endfor %%}"
)
_IN_ORDER = (
    "{%% for c in m['content'] %%}{%% if c['type'] == 'image' %%}{{ '%s' }}{%% else %%}{{ c['text'] }}{%% endif %%}"
    "{%% endfor %%}"
)

LLAVA = (  # llava-1.5-7b-hf: all images first; no BOS, no end token
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    + _IMAGES_FIRST % ("<image>\\n", "c['text'] + ' '")
    + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VIPLLAVA = (  # vip-llava-7b-hf
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'][0]['text'] }}"
    "{% elif m['role'] == 'user' %}{{ '###Human: ' }}{% else %}{{ '###' + m['role'].title() + ': ' }}{% endif %}"
    "{% if m['role'] != 'system' %}"
    + _IMAGES_FIRST % ("<image>\\n", "c['text']")
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '###Assistant:' }}{% endif %}"
)
LLAVA_NEXT = (  # llava-v1.6-mistral-7b-hf
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + m['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' }}"
    + _IMAGES_FIRST % ("<image>\\n", "c['text']")
    + "{{ ' [/INST]' }}{% else %}{{ ' ' + m['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
ONEVISION = (  # llava-onevision-qwen2-7b-ov-hf: a turn is written "assistant \n…", the generation prompt "assistant\n"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    + _IMAGES_FIRST % ("<image>", "'\\n' + c['text']")
    + "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CHATML = (
    "{%% for m in messages %%}%s{{ '<|im_start|>' + m['role'] + '\\n' }}{%% if m['content'] is string %%}"
    "{{ m['content'] }}{%% else %%}"
    + _IN_ORDER
    + "{%% endif %%}{{ '<|im_end|>\\n' }}{%% endfor %%}{%% if add_generation_prompt %%}"
    "{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)
_HELPFUL = (
    "{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
)
QWEN2_VL = _CHATML.replace("%s{{ '<|im_start|>'", _HELPFUL.replace("%", "%%") + "{{ '<|im_start|>'") % (
    "<|vision_start|><|image_pad|><|vision_end|>"
)
QWEN3_VL = (
    _CHATML.replace("%s{{ '<|im_start|>'", "{{ '<|im_start|>'")
    % "<|vision_start|><|image_pad|><|vision_end|>"
)
INTERNVL = _CHATML.replace("%s{{ '<|im_start|>'", "{{ '<|im_start|>'") % "<IMG_CONTEXT>\\n"
SMOLVLM = (  # a turn that begins with an image has no blank behind its colon, and neither has the generation prompt
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    + _IN_ORDER % "<image>"
    + "{{ '<end_of_utterance>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IDEFICS3 = SMOLVLM.replace("<|im_start|>", "<|begin_of_text|>")
IDEFICS2 = SMOLVLM.replace("<|im_start|>", "")
GEMMA = (  # gemma-3-4b-it: text parts lose their outer blanks, the system text goes in front of the first user turn's
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set first = (messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'])"
    " + '\\n\\n' %}{% else %}{% set rest = messages %}{% set first = '' %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{% if loop.first %}{{ first }}{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim"
    " + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL3 = (  # Mistral-Small-3.1-24B-Instruct-2503, whose own default system prompt holds the day's date
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = "
    "messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'] %}"
    "{% else %}{% set rest = messages %}{% set system = 'You are a helpful assistant.' %}{% endif %}"
    "{{ '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ '[INST]' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    + _IN_ORDER
    % "[IMG]"
    + "{% endif %}{{ '[/INST]' }}{% elif m['content'] is string %}{{ m['content'] + eos_token }}"
    "{% else %}{{ m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)
PIXTRAL = (  # pixtral-12b: the system text is a string, and is written only into a user turn that comes last
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{% if loop.last and system is defined %}{{ '[INST]' + system + '\\n\\n' }}"
    "{% else %}{{ '[INST]' }}{% endif %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    + _IN_ORDER
    % "[IMG]"
    + "{% endif %}{{ '[/INST]' }}{% else %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN2 = (
    "{% for m in messages %}"
    + _HELPFUL
    + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
AYA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + "
    "{'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m['role']] + '_TOKEN|>' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
COHERE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + "
    "{'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m['role']] + '_TOKEN|>' + m['content'] | trim"
    " + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)


# -- tokenizers ------------------------------------------------------------------------------------------------


def _trained(pre: Any, alphabet: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of a BPE of about 60 merges over LINES."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre
    size = len(alphabet) + 60
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(LINES, trainer)
    model = json.loads(tok.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(m) for m in model["merges"]]


def _byte_level() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's kind."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces, merges = _trained(pre, sorted(pre_tokenizers.ByteLevel.alphabet()))
    return {p: i for i, p in enumerate(pieces)}, merges


def _sentencepiece(first: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Llama's and Gemma's kind: special tokens, 256 bytes to fall back on, pieces with ▁ for a blank."""
    letters = sorted(set("".join(LINES)) - {" "} | set("▁\n#:<>[]/"))
    pieces, merges = _trained(pre_tokenizers.Metaspace(), letters)
    every = [*first, *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    return {p: i for i, p in enumerate(dict.fromkeys(every))}, merges


def qwen_tokenizer(special: list[str], eos: str = "<|im_end|>", **named: str) -> Any:
    """Qwen2's: no BOS, pad is <|endoftext|>; `named` tokens can be asked for by attribute."""
    vocab, merges = _byte_level()
    every = [s for s in special if s != eos]
    return Qwen2Tokenizer(
        vocab, merges, eos_token=eos, pad_token="<|endoftext|>", padding_side="left",
        extra_special_tokens=every, model_specific_special_tokens=named or None,
    )  # fmt: skip


def llama_tokenizer(special: list[str], **more: Any) -> Any:
    """Llama 2's: BOS in front, a blank before the first word, bytes to fall back on."""
    vocab, merges = _sentencepiece(["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(
        vocab,
        merges,
        **{"pad_token": "<pad>", "padding_side": "left", "extra_special_tokens": special, **more},
    )


def gemma_tokenizer(special: list[str], **named: str) -> Any:
    """Gemma's: BOS in front, no blank before the first word."""
    vocab, merges = _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    return GemmaTokenizer(
        vocab,
        merges,
        padding_side="left",
        extra_special_tokens=special,
        model_specific_special_tokens=named or None,
    )


def backend_tokenizer(
    special: list[str], *, bos: str | None, eos: str, pad: str | None, adds_bos: bool, **more: Any
) -> Any:
    """A byte-level tokenizer without a class of its own (Llama 3, Mistral's tekken, Granite)."""
    vocab, merges = _byte_level()
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own = list(dict.fromkeys(t for t in (bos, eos, pad) if t))
    tok.add_special_tokens([*own, *(s for s in special if s not in own)])
    if adds_bos:
        tok.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tok.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=bos, eos_token=eos, pad_token=pad, padding_side="left",
        extra_special_tokens=[s for s in special if s not in own] or None, **more,
    )  # fmt: skip


# -- parts of configurations -----------------------------------------------------------------------------------


def _vocab(tok: Any) -> int:
    """A few rows more than tokens, as published tables have."""
    return (len(tok) // 8 + 2) * 8


def _text(kind: str, tok: Any, **more: Any) -> dict[str, Any]:
    """A decoder of width 32 and two layers."""
    return {
        "model_type": kind, "vocab_size": _vocab(tok), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id, **more,
    }  # fmt: skip


def _tower(kind: str, **more: Any) -> dict[str, Any]:
    """A vision tower of width 24 over 28 pixels in patches of 7."""
    return {
        "model_type": kind, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH, **more,
    }  # fmt: skip


def _ids(tok: Any, **names: str) -> dict[str, int]:
    return {key: int(tok.convert_tokens_to_ids(token)) for key, token in names.items()}


CLIP = {"image_mean": [0.481, 0.458, 0.408], "image_std": [0.269, 0.261, 0.276], "resample": 3}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


# -- families --------------------------------------------------------------------------------------------------


@dataclass
class Made:
    """A family's parts before they are written."""

    architecture: str
    config: dict[str, Any]
    tokenizer: Any
    images: dict[str, Any] | None = None  # preprocessor_config.json
    processor: dict[str, Any] = field(default_factory=dict)  # processor_config.json
    template: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    video: dict[str, Any] | None = None  # video_preprocessor_config.json


def llava() -> Made:
    """LLaVA-1.5 (llava-1.5-7b-hf): the centre of a picture is cropped."""
    tok = llama_tokenizer(["<image>"])
    config = {
        "model_type": "llava", "vision_config": _tower("clip_vision_model", num_hidden_layers=3, projection_dim=24),
        "text_config": _text("llama", tok), "image_token_index": _ids(tok, i="<image>")["i"], "image_seq_length": 16,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    return Made("LlavaForConditionalGeneration", config, tok, _clip_images(), _llava_processor(), LLAVA)


def _clip_images() -> dict[str, Any]:
    crop = {"height": SIDE, "width": SIDE}
    return {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIDE},
        "do_center_crop": True, "crop_size": crop, "do_convert_rgb": True, **CLIP,
    }  # fmt: skip


def _llava_processor(name: str = "LlavaProcessor", **more: Any) -> dict[str, Any]:
    return {
        "processor_class": name, "patch_size": PATCH, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "image_token": "<image>", **more,
    }  # fmt: skip


def vipllava() -> Made:
    """VipLLaVA (vip-llava-7b-hf): several layers of the tower, a norm before the projector."""
    made = llava()
    config = {
        **made.config, "model_type": "vipllava", "vision_feature_layer": [-2, -3, 1], "projector_layernorm_eps": 1e-5,
    }  # fmt: skip
    del config["vision_feature_select_strategy"]
    return Made(
        "VipLlavaForConditionalGeneration", config, made.tokenizer, made.images, made.processor, VIPLLAVA
    )


def llava_next() -> Made:
    """LLaVA-NeXT (llava-v1.6-mistral-7b-hf): any resolution, tokens by the picture's shape."""
    tok = llama_tokenizer(["<image>"])
    config = {
        "model_type": "llava_next", "image_grid_pinpoints": PINPOINTS, "image_seq_length": 16,
        "vision_config": _tower("clip_vision_model", num_hidden_layers=3, projection_dim=24),
        "text_config": _text("mistral", tok, sliding_window=None), "image_token_index": _ids(tok, i="<image>")["i"],
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    images = {
        **_clip_images(),
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": PINPOINTS,
    }
    processor = _llava_processor("LlavaNextProcessor")
    return Made("LlavaNextForConditionalGeneration", config, tok, images, processor, LLAVA_NEXT)


def llava_onevision() -> Made:
    """LLaVA-OneVision (llava-onevision-qwen2-7b-ov-hf): several images in a sample are not cut, a single one is."""
    tok = qwen_tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>"])
    config = {
        "model_type": "llava_onevision", "vision_config": _tower("siglip_vision_model", vision_use_head=False),
        "text_config": _text("qwen2", tok), "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": PINPOINTS,
        **_ids(tok, image_token_index="<image>", video_token_index="<video>"),
    }  # fmt: skip
    images = {
        "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": SIDE, "width": SIDE},
        "image_grid_pinpoints": PINPOINTS, "do_pad": True, "do_convert_rgb": True, "resample": 3, **HALF,
    }  # fmt: skip
    processor = {
        "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 16, "image_token": "<image>",
        "video_token": "<video>", "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
    }  # fmt: skip
    video = {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "size": {"height": SIDE, "width": SIDE},
        **HALF,
    }
    generation = {"repetition_penalty": 1.1, "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    arch = "LlavaOnevisionForConditionalGeneration"
    return Made(arch, config, tok, images, processor, ONEVISION, generation, video)


QWEN_SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
_QWEN_IDS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip


def _qwen_vl(kind: str, tower: dict[str, Any], *, size: dict[str, Any], processor: str, **text: Any) -> Made:
    tok = qwen_tokenizer(QWEN_SPECIAL)
    config = {
        "model_type": kind, "text_config": _text(f"{kind}_text", tok, **text),
        "vision_config": {"model_type": f"{kind}_vision", "depth": 2, "num_heads": 2, "patch_size": PATCH,
                          "spatial_merge_size": 2, "temporal_patch_size": 2, **tower}, **_ids(tok, **_QWEN_IDS),
    }  # fmt: skip
    images = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": PATCH, "merge_size": 2,
        "temporal_patch_size": 2, **size, **CLIP,
    }  # fmt: skip
    sampled = {"do_sample": True, "top_k": 1, "top_p": 0.001, "temperature": 0.01}
    generation = {**sampled, "eos_token_id": [*_ids(tok, a="<|im_end|>", b="<|endoftext|>").values()]}
    video = {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "patch_size": PATCH,
        "merge_size": 2,
        **size,
        **CLIP,
    }
    return Made("", config, tok, images, {"processor_class": processor}, QWEN2_VL, generation, video)


_PIXELS = {"min_pixels": 14 * 14, "max_pixels": 56 * 56}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}


def qwen2_vl() -> Made:
    """Qwen2-VL (Qwen2-VL-7B-Instruct): native resolution, positions in three dimensions."""
    tower = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    made = _qwen_vl("qwen2_vl", tower, size=_PIXELS, processor="Qwen2VLProcessor", rope_parameters=_MROPE)
    made.architecture = "Qwen2VLForConditionalGeneration"
    return made


def qwen2_5_vl() -> Made:
    """Qwen2.5-VL (Qwen2.5-VL-3B-Instruct): window attention in the tower, tied embeddings, a repetition penalty."""
    tower = {
        "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 28,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    made = _qwen_vl(
        "qwen2_5_vl", tower, size=_PIXELS, processor="Qwen2_5_VLProcessor", rope_parameters=_MROPE
    )
    made.architecture = "Qwen2_5_VLForConditionalGeneration"
    made.config["tie_word_embeddings"] = True
    made.generation |= {"repetition_penalty": 1.05, "temperature": 0.000001}
    return made


def qwen3_vl() -> Made:
    """Qwen3-VL (Qwen3-VL-4B-Instruct): DeepStack, interleaved positions, no default system turn."""
    return _qwen3("qwen3_vl", "Qwen3VLForConditionalGeneration")


def _qwen3(kind: str, architecture: str, **text: Any) -> Made:
    tower = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 5e6}
    size = {"size": {"shortest_edge": 14 * 14, "longest_edge": 56 * 56}}
    more = {"rope_parameters": rope, "head_dim": 8, **text}
    made = _qwen_vl(kind, tower, size=size, processor="Qwen3VLProcessor", **more)
    made.architecture, made.template = architecture, QWEN3_VL
    made.images = {**(made.images or {}), "image_processor_type": "Qwen2VLImageProcessorFast", **HALF}
    made.video = {**(made.video or {}), "video_processor_type": "Qwen3VLVideoProcessor"}
    return made


def qwen3_vl_moe() -> Made:
    """Qwen3-VL-MoE (Qwen3-VL-30B-A3B-Instruct): the experts are one stacked tensor, not linear layers."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return _qwen3("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", **experts)


def internvl() -> Made:
    """InternVL3 (InternVL3-1B-hf): its own tower, pixel shuffle, a picture as several crops."""
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tok = qwen_tokenizer(["<|im_start|>", "<|im_end|>", *named.values()], **named)
    config = {
        "model_type": "internvl", "image_token_id": _ids(tok, i="<IMG_CONTEXT>")["i"], "image_seq_length": 4,
        "vision_config": _tower("internvl_vision", image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
        "text_config": _text("qwen2", tok), "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    images = {
        "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": SIDE, "width": SIDE}, "min_patches": 1,
        "max_patches": 4, "crop_to_patches": False, "do_convert_rgb": True, "resample": 3, **CLIP,
    }  # fmt: skip
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    video = {
        "video_processor_type": "InternVLVideoProcessor",
        "size": {"height": SIDE, "width": SIDE},
        **CLIP,
    }
    arch = "InternVLForConditionalGeneration"
    return Made(arch, config, tok, images, processor, INTERNVL, {}, video)


_ROWS = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]


def smolvlm() -> Made:
    """SmolVLM2 (SmolVLM2-2.2B-Instruct): its processor holds a video processor."""
    special = ["<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<global-img>", *_ROWS]
    vocab, merges = _byte_level()
    named = {
        "fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }  # fmt: skip
    tok = GPT2Tokenizer(
        vocab, merges, unk_token="<|endoftext|>", bos_token="<|im_start|>", eos_token="<end_of_utterance>",
        pad_token="<|im_end|>", padding_side="left", extra_special_tokens=special, model_specific_special_tokens=named,
    )  # fmt: skip
    video = {
        "video_processor_type": "SmolVLMVideoProcessor", "size": {"longest_edge": 2 * SIDE},
        "max_image_size": {"longest_edge": SIDE}, "fps": 1, "num_frames": 8, **HALF,
    }  # fmt: skip
    made = _idefics3(tok, "smolvlm", "SmolVLM", "llama")
    made.template, made.video, made.generation = SMOLVLM, video, {"eos_token_id": tok.eos_token_id}
    return made


def idefics3() -> Made:
    """Idefics3 (Idefics3-8B-Llama3): a picture as rows and columns of crops and the whole; banned words."""
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_ROWS]
    names = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|reserved_special_token_0|>"}
    tok = backend_tokenizer(special, **names, adds_bos=True)
    made = _idefics3(tok, "idefics3", "Idefics3", "llama")
    made.template = IDEFICS3
    made.generation = {
        "eos_token_id": [tok.eos_token_id, _ids(tok, e="<end_of_utterance>")["e"]],
        "bad_words_ids": [[i] for i in _ids(tok, a="<fake_token_around_image>", b="<image>").values()],
    }
    return made


def _idefics3(tok: Any, kind: str, name: str, text: str) -> Made:
    config = {
        "model_type": kind, "vision_config": _tower(f"{kind}_vision"), "text_config": _text(text, tok),
        "image_token_id": _ids(tok, i="<image>")["i"], "scale_factor": 2, "pad_token_id": tok.pad_token_id,
    }  # fmt: skip
    images = {
        "image_processor_type": f"{name}ImageProcessor", "do_image_splitting": True, "do_convert_rgb": True,
        "size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}, "resample": 1, **HALF,
    }  # fmt: skip
    processor = {"processor_class": f"{name}Processor", "image_seq_len": 4}
    return Made(f"{name}ForConditionalGeneration", config, tok, images, processor)


def paligemma() -> Made:
    """PaliGemma (paligemma-3b-mix-224): no chat template, a prefix that sees all of itself, then the answer."""
    return _paligemma(_text("gemma", gemma := _paligemma_tokenizer(), head_dim=8), gemma)


def paligemma2() -> Made:
    """PaliGemma 2 (paligemma2-3b-mix-224): Gemma 2's soft caps on attention and logits, and its sliding window."""
    tok = _paligemma_tokenizer()
    return _paligemma(_text("gemma2", tok, **_GEMMA2), tok)


_GEMMA2 = {
    "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 4.0, "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def _paligemma_tokenizer() -> Any:
    tok = gemma_tokenizer(["<image>"])
    tok.add_tokens([f"<loc{i:0>4}>" for i in range(1024)] + [f"<seg{i:0>3}>" for i in range(128)])
    return tok


def _paligemma(text: dict[str, Any], tok: Any) -> Made:
    config = {
        "model_type": "paligemma", "text_config": text, "projection_dim": 32, "hidden_size": 32,
        "vision_config": _tower("siglip_vision_model", vision_use_head=False, projection_dim=32),
        "image_token_index": _ids(tok, i="<image>")["i"], "vocab_size": text["vocab_size"],
        "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id,
    }  # fmt: skip
    images = {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}, "resample": 3,
        "image_seq_length": 16, "do_convert_rgb": None, **HALF,
    }  # fmt: skip
    processor = {"processor_class": "PaliGemmaProcessor"}
    return Made("PaliGemmaForConditionalGeneration", config, tok, images, processor)


def gemma3() -> Made:
    """Gemma 3 (gemma-3-4b-it): image tokens see each other, most layers a window shorter than the prompts."""
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tok = gemma_tokenizer(["<start_of_turn>", "<end_of_turn>", *named.values()], **named)
    text = _text(
        "gemma3_text", tok, num_hidden_layers=3, head_dim=8, query_pre_attn_scalar=8, sliding_window=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    config = {
        "model_type": "gemma3", "text_config": text, "mm_tokens_per_image": 4,
        "vision_config": _tower("siglip_vision_model", vision_use_head=False),
        "eos_token_id": [*_ids(tok, a="<eos>", b="<end_of_turn>").values()],
        **_ids(tok, boi_token_index="<start_of_image>", eoi_token_index="<end_of_image>",
               image_token_index="<image_soft_token>"),
    }  # fmt: skip
    images = {
        "image_processor_type": "Gemma3ImageProcessor", "size": {"height": SIDE, "width": SIDE}, "resample": 2,
        "do_convert_rgb": None, "do_pan_and_scan": None, "image_seq_length": 4, **HALF,
    }  # fmt: skip
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    generation = {"eos_token_id": config["eos_token_id"], "do_sample": True, "top_k": 64, "top_p": 0.95}
    return Made("Gemma3ForConditionalGeneration", config, tok, images, processor, GEMMA, generation)


_PIXTRAL_SPECIAL = [
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
]


def mistral3() -> Made:
    """Mistral 3 (Mistral-Small-3.1-24B-Instruct-2503): Pixtral's tower, patches merged 2 x 2."""
    made = pixtral()
    made.config |= {"model_type": "mistral3", "spatial_merge_size": 2, "vision_feature_layer": -1}
    del made.config["vision_feature_select_strategy"], made.config["image_seq_length"]
    made.architecture, made.template = "Mistral3ForConditionalGeneration", MISTRAL3
    made.processor |= {"spatial_merge_size": 2}
    made.images = {**(made.images or {}), "patch_size": 2 * PATCH}
    return made


def pixtral() -> Made:
    """Pixtral (pixtral-12b): LLaVA's class around a tower of any size of picture; a row of patches ends in a token."""
    tok = backend_tokenizer(_PIXTRAL_SPECIAL, bos="<s>", eos="</s>", pad="<pad>", adds_bos=True)
    config = {
        "model_type": "llava", "vision_config": _tower("pixtral", image_size=2 * SIDE, head_dim=12),
        "text_config": _text("mistral", tok, head_dim=8, sliding_window=None), "image_seq_length": 1,
        "image_token_index": _ids(tok, i="[IMG]")["i"], "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "tie_word_embeddings": False,
    }  # fmt: skip
    images = {
        "image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 2 * SIDE}, "do_convert_rgb": True,
        "patch_size": {"height": PATCH, "width": PATCH}, "resample": 3, **CLIP,
    }  # fmt: skip
    processor = {
        "processor_class": "PixtralProcessor", "patch_size": PATCH, "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]",
    }  # fmt: skip
    return Made("LlavaForConditionalGeneration", config, tok, images, processor, PIXTRAL)


# -- language models -------------------------------------------------------------------------------------------


def llama() -> Made:
    """Llama 3 (Llama-3.2-1B-Instruct): two tokens end an answer; tied embeddings; no padding token."""
    special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
    tok = backend_tokenizer(special, bos="<|begin_of_text|>", eos="<|eot_id|>", pad=None, adds_bos=True)
    ends = [*_ids(tok, a="<|end_of_text|>", b="<|eot_id|>").values()]
    config = _text("llama", tok, tie_word_embeddings=True, eos_token_id=ends)
    return Made("LlamaForCausalLM", config, tok, None, {}, LLAMA3, {"eos_token_id": ends, "do_sample": True})


def qwen2() -> Made:
    """Qwen2 (Qwen2-7B-Instruct): a system turn where the data has none."""
    tok = qwen_tokenizer(["<|im_start|>", "<|im_end|>"])
    ends = [*_ids(tok, a="<|im_end|>", b="<|endoftext|>").values()]
    generation = {"eos_token_id": ends, "do_sample": True, "repetition_penalty": 1.05}
    return Made("Qwen2ForCausalLM", _text("qwen2", tok), tok, None, {}, QWEN2, generation)


def gemma2() -> Made:
    """Gemma 2 (gemma-2-2b-it): soft caps, a sliding window; a system turn is refused by its template."""
    tok = gemma_tokenizer(["<start_of_turn>", "<end_of_turn>"])
    ends = [*_ids(tok, a="<eos>", b="<end_of_turn>").values()]
    return Made(
        "Gemma2ForCausalLM", _text("gemma2", tok, **_GEMMA2), tok, None, {}, GEMMA2, {"eos_token_id": ends}
    )


def granite() -> Made:
    """Granite (granite-3.1-2b-instruct): embeddings, residuals, attention and logits are scaled."""
    special = ["<|start_of_role|>", "<|end_of_role|>"]
    names = {"bos": "<|end_of_text|>", "eos": "<|end_of_text|>", "pad": "<|end_of_text|>"}
    tok = backend_tokenizer(special, **names, adds_bos=False)
    scales = {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    }
    return Made(
        "GraniteForCausalLM",
        _text("granite", tok, tie_word_embeddings=True, **scales),
        tok,
        None,
        {},
        GRANITE,
    )


def cohere() -> Made:
    """Cohere (c4ai-command-r-v01): logits are scaled, attention and MLP side by side, layer norms."""
    vocab, merges = _byte_level()
    special = ["<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
    tok = CohereTokenizer(vocab, merges, padding_side="left", extra_special_tokens=special)
    return Made("CohereForCausalLM", _text("cohere", tok, logit_scale=0.25), tok, None, {}, COHERE)


# -- a family that `retain` has no row for -------------------------------------------------------------------------


def aya_vision() -> Made:
    """Aya Vision (aya-vision-8b): crops, a projector that shuffles pixels, Cohere 2's window and scaled logits."""
    vocab, merges = _byte_level()
    turns = ["<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
    image = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    tok = CohereTokenizer(vocab, merges, padding_side="left", extra_special_tokens=[*turns, *image])
    config = {
        "model_type": "aya_vision", "image_token_index": _ids(tok, i="<|IMG_PATCH|>")["i"], "downsample_factor": 2,
        "vision_config": _tower("siglip_vision_model", vision_use_head=False), "alignment_intermediate_size": 64,
        "text_config": _text("cohere2", tok, logit_scale=0.25, sliding_window=16), "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "adapter_layer_norm_eps": 1e-6,
    }  # fmt: skip
    images = {
        "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": SIDE, "width": SIDE}, "min_patches": 1,
        "max_patches": 4, "crop_to_patches": True, "do_convert_rgb": True, **CLIP,
    }  # fmt: skip
    processor = {"processor_class": "AyaVisionProcessor", "patch_size": 2 * PATCH, "img_size": SIDE}
    return Made("AyaVisionForConditionalGeneration", config, tok, images, processor, AYA)


# -- families that are refused, or that work in part -----------------------------------------------------------


def idefics2() -> Made:
    """Idefics2 (idefics2-8b): a perceiver, and a processor that rewrites the text around images."""
    tok = llama_tokenizer(["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    config = {
        "model_type": "idefics2", "vision_config": _tower("idefics2_vision"),
        "perceiver_config": {"model_type": "idefics2_perceiver", "hidden_size": 32, "resampler_n_latents": 4,
                             "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8,
                             "num_key_value_heads": 1},
        "text_config": _text("mistral", tok, sliding_window=None), "image_token_id": _ids(tok, i="<image>")["i"],
    }  # fmt: skip
    images = {
        "image_processor_type": "Idefics2ImageProcessor", "do_image_splitting": False, "do_convert_rgb": True,
        "size": {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}, **HALF,
    }  # fmt: skip
    processor = {"processor_class": "Idefics2Processor", "image_seq_len": 4}
    return Made("Idefics2ForConditionalGeneration", config, tok, images, processor, IDEFICS2)


def florence2() -> Made:
    """Florence-2 (Florence-2-base): an encoder and a decoder."""
    named = {"image_token": "<image>"}
    tok = backend_tokenizer(
        ["<image>"], bos="<s>", eos="</s>", pad="<pad>", adds_bos=True, model_specific_special_tokens=named
    )
    text = {
        "model_type": "bart", "vocab_size": _vocab(tok), "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "max_position_embeddings": 256, "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id, "decoder_start_token_id": tok.eos_token_id,
        "forced_eos_token_id": tok.eos_token_id,
    }  # fmt: skip
    tower = {
        "model_type": "florence_vision", "depths": [1], "patch_size": [7], "patch_stride": [4], "patch_padding": [3],
        "patch_prenorm": [False], "embed_dim": [16], "num_heads": [2], "num_groups": [2], "window_size": 7,
        "projection_dim": 32,
    }  # fmt: skip
    config = {
        "model_type": "florence2", "text_config": text, "vision_config": tower, "is_encoder_decoder": True,
        "image_token_id": _ids(tok, i="<image>")["i"],
    }  # fmt: skip
    processor = {"processor_class": "Florence2Processor", "num_additional_image_tokens": 1}
    images = {**_clip_images(), "image_seq_length": 49}
    return Made("Florence2ForConditionalGeneration", config, tok, images, processor)


def blip2() -> Made:
    """BLIP-2 (blip2-opt-2.7b): queries stand for a picture."""
    return _blip("blip-2", "Blip2", {})


def instructblip() -> Made:
    """InstructBLIP (instructblip-vicuna-7b): the question is read by the Q-Former too, by a second tokenizer."""
    return _blip("instructblip", "InstructBlip", {})


def _blip(kind: str, name: str, more: dict[str, Any]) -> Made:
    part = kind.replace("-", "_")
    tok = backend_tokenizer(["<image>"], bos="</s>", eos="</s>", pad="<pad>", adds_bos=True)
    config = {
        "model_type": kind, "num_query_tokens": 4, "image_token_index": _ids(tok, i="<image>")["i"],
        "vision_config": _tower(f"{part}_vision_model"),
        "qformer_config": {"model_type": f"{part}_qformer", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "intermediate_size": 16, "encoder_hidden_size": 24},
        "text_config": {"model_type": "opt", "vocab_size": _vocab(tok), "hidden_size": 32, "word_embed_proj_dim": 32,
                        "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256,
                        "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id,
                        "pad_token_id": tok.pad_token_id}, **more,
    }  # fmt: skip
    images = {"image_processor_type": "BlipImageProcessor", "size": {"height": SIDE, "width": SIDE}, **CLIP}
    processor = {"processor_class": f"{name}Processor", "num_query_tokens": 4}
    return Made(f"{name}ForConditionalGeneration", config, tok, images, processor)


# -- the zoo ---------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[[], Made]] = {
    f.__name__: f
    for f in (
        llava, vipllava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, internvl, smolvlm, idefics3,
        paligemma, paligemma2, gemma3, mistral3, pixtral,
    )
}  # fmt: skip
"""Families of pictures and text that must work."""
TEXT_ONLY: dict[str, Callable[[], Made]] = {f.__name__: f for f in (llama, qwen2, gemma2, granite, cohere)}
"""Language models that must work."""
REFUSED: dict[str, Callable[[], Made]] = {f.__name__: f for f in (idefics2, florence2, blip2, instructblip)}
"""Families that work or are refused when they are loaded."""
PARTIAL: dict[str, Callable[[], Made]] = {"qwen3_vl_moe": qwen3_vl_moe}
"""Families whose linear layers do not all get an adapter."""
OLD = ("qwen2_vl", "qwen2_5_vl")
"""Written as before transformers 4.50: no processor_config.json, the template in a chat_template.json."""
HALVED = ("qwen2_5_vl", "gemma3", "pixtral", "llama")
"""Written in bf16."""
UNKNOWN: dict[str, Callable[[], Made]] = {"aya_vision": aya_vision}
"""Families that `retain` drives as Hugging Face does, without a row of their own."""
ALL = {**FAMILIES, **TEXT_ONLY, **REFUSED, **PARTIAL, **UNKNOWN}


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a family's checkpoint; returns the folder."""
    made = ALL[name]()
    folder.mkdir(parents=True, exist_ok=True)
    model = _model(made, seed)
    for key, value in made.generation.items():
        setattr(model.generation_config, key, value)
    if name in HALVED:
        model.bfloat16()
    model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    written = {
        "preprocessor_config.json": made.images and {**made.images, **_class(made)},
        "processor_config.json": None if name in OLD else made.processor,
        "video_preprocessor_config.json": made.video,
        "chat_template.json": {"chat_template": made.template} if name in OLD else None,
    }
    for file, content in written.items():
        if content:
            (folder / file).write_text(json.dumps(content, indent=1), encoding="utf-8")
    if made.template and name not in OLD:
        (folder / "chat_template.jinja").write_text(made.template, encoding="utf-8")
    return folder


def _class(made: Made) -> dict[str, Any]:
    return {"processor_class": made.processor["processor_class"]} if made.processor else {}


def _model(made: Made, seed: int) -> Any:
    """The family's own class with random weights: large enough to make answers and masks visible."""
    given = {k: v for k, v in made.config.items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(made.config["model_type"], **given)
    config.architectures = [made.architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, made.architecture)(config).float().eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim >= 2:
                    table = "embed_tokens" in name or "position" in name
                    p.copy_(torch.randn(p.shape) * (0.5 if table else 1.5 / p.shape[1:].numel() ** 0.5))
                elif name.endswith("bias"):
                    p.copy_(torch.randn(p.shape) * 0.1)
            _hush(model, made.tokenizer)
    return model


def _hush(model: Any, tok: Any) -> None:
    """Make what is no text an unlikely answer (bytes, specials but the end, rows without a token): answers read."""
    head = model.get_output_embeddings()
    if head is None or len(head.weight) < len(tok):
        return
    tokens = tok.convert_ids_to_tokens(range(len(tok)))
    ends = {tok.eos_token, "<end_of_utterance>", "<end_of_turn>"}
    words = [t.lstrip("▁Ġ") for t in tokens]
    plain = [t in ends or (w.isascii() and w.isalnum()) for t, w in zip(tokens, words, strict=True)]
    head.weight[: len(tok)][~torch.tensor(plain)] *= 0.1
    head.weight[len(tok) :] *= 0.1
