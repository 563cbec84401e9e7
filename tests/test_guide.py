"""Guide features are fp32, whatever asks for them and whatever they come from: against stock CLIP and plain means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import tiny
from retain.models.guide import prototype_width
from retain.models.hf import HFModel
from retain.types import RetainError


def clip_folder(folder: Path, dtype: torch.dtype) -> CLIPModel:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 340, "max_position_embeddings": 8, "eos_token_id": 1}
    vision = {**small, "image_size": 24, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = (
            CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).to(dtype).eval()
        )
    clip.save_pretrained(folder)
    tiny.llava()[1].tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 24}, {"height": 24, "width": 24}
    CLIPImageProcessorPil(size=size[0], crop_size=size[1]).save_pretrained(folder)
    return clip.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_a_clip_are_fp32_whoever_asks(dtype: torch.dtype, tmp_path: Path) -> None:
    """Under autocast, and from a checkpoint in bf16: the numbers of stock CLIP in fp32."""
    clip = clip_folder(tmp_path, dtype)
    model = HFModel(*tiny.llava(), tiny.SPEC, guide=tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guide = model.guide(model.collate(tiny.examples(), answers=False))
    tokenizer = model.processor.tokenizer
    images = CLIPImageProcessorPil.from_pretrained(tmp_path)
    with torch.no_grad():
        for i, e in enumerate(tiny.examples()):
            ids = tokenizer(e.question, truncation=True, max_length=8, return_tensors="pt")["input_ids"]
            text = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)[0]
            torch.testing.assert_close(guide.text_BD[i], F.normalize(text, dim=0), atol=1e-5, rtol=1e-5)
            if not e.images:
                continue
            pixels = images(images=list(e.images), return_tensors="pt")["pixel_values"]
            each = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
            want = F.normalize(F.normalize(each, dim=-1).mean(0), dim=0)
            torch.testing.assert_close(guide.image_BF[i], want, atol=1e-5, rtol=1e-5)


def test_features_of_the_base_are_pooled_in_fp32() -> None:
    """Of a base in bf16: means in double of its own bf16 numbers, not means in bf16."""
    hf, processor = tiny.llava()
    model = HFModel(hf.to(torch.bfloat16), processor, tiny.SPEC, precision="bf16")
    examples = [tiny.examples()[0], tiny.examples()[4]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guide = model.guide(model.collate(examples, answers=False))
    assert guide.image_BF.dtype == guide.text_BD.dtype == torch.float32
    for i, e in enumerate(examples):
        ids = model.processor.tokenizer(e.question, add_special_tokens=False)["input_ids"]
        text = model.hf.get_input_embeddings().weight[ids].double().mean(0)
        torch.testing.assert_close(guide.text_BD[i], F.normalize(text, dim=0).float(), atol=1e-6, rtol=1e-6)
        assert model.hf.get_input_embeddings().weight.dtype == torch.bfloat16
        (rows,) = model.tower_features(model.collate([e], answers=False))
        assert rows.dtype == torch.bfloat16
        image = rows.reshape(-1, rows.shape[-1]).double().mean(0)
        torch.testing.assert_close(guide.image_BF[i], F.normalize(image, dim=0).float(), atol=1e-6, rtol=1e-6)


def test_the_width_of_a_prototype_is_that_of_what_it_is_compared_with(tmp_path: Path) -> None:
    """From configs alone: CLIP's shared space, or both of the base's own."""
    clip_folder(tmp_path, torch.float32)
    hf, processor = tiny.llava()
    assert prototype_width(hf, tmp_path) == 12
    guide = HFModel(hf, processor, tiny.SPEC)
    features = guide.guide(guide.collate(tiny.examples()[:1], answers=False))
    assert prototype_width(hf, None) == features.image_BF.shape[1] + features.text_BD.shape[1]


def test_a_guide_that_is_no_clip_is_named(tmp_path: Path) -> None:
    tiny.llava()[0].save_pretrained(tmp_path)
    model = HFModel(*tiny.llava(), tiny.SPEC, guide=tmp_path)
    with pytest.raises(RetainError, match=r"config\.json: model_type 'llava' is no CLIP model"):
        model.guide(model.collate(tiny.examples()[:1], answers=False))
    with pytest.raises(RetainError, match=r"guide '.*config\.json"):
        prototype_width(model.hf, tmp_path)
