"""The pocket's tokenizer, configurations and shipped folder: everything about the base model but its
training.

The model is LLaVA-1.5 (Liu et al., CVPR 2024, arXiv:2310.03744) in miniature: a CLIP vision tower whose patch
tokens, less the class token, pass through a two-layer projector into a Llama. The prompt is `USER:<image>
question ASSISTANT: answer</s>`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from retain.pocket import lessons, pictures

PATCH = 8
IMAGE_TOKENS = (pictures.SIZE // PATCH) ** 2
SPECIAL = ["<pad>", "<s>", "<image>", "</s>", "<unk>", "USER:", "ASSISTANT:"]
VOCABULARY = 1792
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} ASSISTANT: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] "
    "}}{% endfor %}{% endif %}</s>"
    "{% else %}{% if m['role'] == 'user' %}USER:{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %} "
    "{{ c['text'] | replace('\\n', ' ') }}{% endfor %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def corpus() -> list[str]:
    """Text to learn the byte-pair merges from: the lexicon, numbers and letters often, then lessons."""
    rng = np.random.default_rng(0)
    words = lessons.lexicon()
    lines = [" " + " ".join(words[int(i)] for i in rng.permutation(len(words))) for _ in range(60)]
    lines += [" " + " ".join(w.capitalize() for w in words if w in lessons.TEXT_ONLY) for _ in range(50)]
    lines += [" " + " ".join(lessons.NUMBERS) for _ in range(150)]
    lines += [" " + " ".join("abcdefghijklmnopqrstuvwxyzABCDEFGH") for _ in range(60)]
    for _ in range(3000):
        one = lessons.lesson(rng)
        lines += [f" {one.caption}", *(f" {q} {a}" for q, a in one.qa), " ".join(lessons.text(rng))]
    return lines


def tokenizer() -> Tokenizer:
    """The pocket's tokenizer: kept in a file, since a changed lesson would change its merges."""
    path = Path(__file__).parent / "weights" / "tokenizer.json"
    return Tokenizer.from_str(path.read_text() if path.is_file() else train_tokenizer())


def train_tokenizer() -> str:
    """Byte-level BPE trained on `corpus`, as JSON."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(corpus(), trainer)
    tok.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL[:5]])
    tok.add_tokens([AddedToken(t, lstrip=True, special=False) for t in SPECIAL[5:]])
    text: str = tok.to_str()
    return text


def clip_config() -> dict[str, Any]:
    """Arguments of CLIPConfig."""
    vision = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
              "image_size": pictures.SIZE, "patch_size": PATCH, "projection_dim": 96,
              "hidden_act": "gelu"}  # fmt: skip
    text = {"vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 128, "projection_dim": 96,
            "hidden_act": "gelu",
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}  # fmt: skip
    return {"vision_config": vision, "text_config": text, "projection_dim": 96}


def llava_config() -> dict[str, Any]:
    """Arguments of LlavaConfig."""
    vision = {**clip_config()["vision_config"], "model_type": "clip_vision_model"}
    text = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}  # fmt: skip
    return {"vision_config": vision, "text_config": text, "image_token_index": 2, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default", "image_seq_length": IMAGE_TOKENS,
            "tie_word_embeddings": True,
            "pad_token_id": 0}  # fmt: skip


def export(states: Path, to: Path) -> None:
    """Write the stock Hugging Face folder from the last states of `joint` and of `guide` (or `clip`)."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.processing_llava import LlavaProcessor

    to.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    raw = tokenizer()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, **names, model_max_length=512, padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    side = {"height": pictures.SIZE, "width": pictures.SIZE}
    images = CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        do_center_crop=False,
        resample=2,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    processor = LlavaProcessor(
        images, fast, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=CHAT,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(to)
    model = LlavaForConditionalGeneration(LlavaConfig(**llava_config()))
    model.load_state_dict(_weights(states / "joint.safetensors"))
    model.generation_config.update(eos_token_id=3, pad_token_id=0, bos_token_id=1, do_sample=False)
    model.half().save_pretrained(to)
    guide = CLIPModel(CLIPConfig(**clip_config()))
    refit = states / "guide.safetensors"
    guide.load_state_dict(_weights(refit if refit.is_file() else states / "clip.safetensors"))
    guide.half().save_pretrained(to / "guide")
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    PreTrainedTokenizerFast(tokenizer_object=raw, **names, model_max_length=128).save_pretrained(to / "guide")
    images.save_pretrained(to / "guide")


def _weights(path: Path) -> dict[str, torch.Tensor]:
    state = {k.removeprefix("model."): v for k, v in load_file(path).items() if k.startswith("model.")}
    return {k: v for k, v in state.items() if not k.startswith("marks_head.")}
