"""What the short way through the decoder saves in each family: `retain.models.decoder` over Hugging Face's own forward.

The language model alone, random weights, LoRA on all its linear layers: a training step (forward and backward, hidden
states wanted at four answer tokens a row) and a prefill (hidden states wanted at the last token). Both sides run the
same adapted modules, so that what is saved is the decoder's: HF's forward runs each LoRA layer as a node of its own,
and the last layer at every token. Outputs and gradients must be equal, else the run fails.
"""

# B batch, T tokens, D width, N answer tokens

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import torch
from common import Ratio, Size, Took
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextModel

from retain.adapters.bank import AdapterBank, Mix
from retain.adapters.lora import LoraSpec, attach
from retain.models import decoder

ANSWER = 4
SHAPES = {
    "pocket": (192, 512, 4, 41),
    "wide": (256, 1024, 4, 99),
    "broad": (1024, 2752, 2, 99),
    "smoke": (32, 64, 2, 9),
}
"""Width, inner width, layers, tokens."""
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def language(family: str, size: Size) -> tuple[Any, AdapterBank]:
    """A decoder with one adapter whose every tensor is drawn."""
    D, inner, layers, _ = SHAPES[size.name]
    shape = {
        "vocab_size": 64, "hidden_size": D, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    half = D // 8
    three = {**ROPE, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    kinds: dict[str, Callable[[], Any]] = {
        "Llama": lambda: LlamaModel(LlamaConfig(**shape)),
        "Qwen2 (InternVL)": lambda: Qwen2Model(Qwen2Config(**shape)),
        "Qwen2.5-VL": lambda: Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**shape, rope_parameters=three)),
        "Qwen3-VL": lambda: Qwen3VLTextModel(
            Qwen3VLTextConfig(**shape, head_dim=D // 4, rope_parameters={**three, "mrope_interleaved": True})
        ),
    }
    torch.manual_seed(0)
    holder = nn.Module()
    holder.language = kinds[family]().eval()
    bank = attach(holder, LoraSpec(rank=size.rank, alpha=2.0 * size.rank, dense=""), language="language")
    bank.add("one", torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in bank.parameters("one").values():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.3 / p.shape[-1] ** 0.5)
    bank.mix = Mix({"one": 1.0})
    assert decoder.supports(holder.language)
    return holder.language, bank


def compare(family: str, size: Size, reps: int) -> list[Ratio]:
    """A step of theirs, a step of ours, …"""
    lm, bank = language(family, size)
    D, _, _, T = SHAPES[size.name]
    embeds_BTD = torch.randn(size.batch, T, D, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(T).expand(size.batch, T)
    positions = positions.expand(3, -1, -1) if "VL" in family and "(" not in family else positions
    at_BN = torch.arange(T - ANSWER, T).expand(size.batch, -1)

    def theirs(at: Any) -> Tensor:
        out = lm(inputs_embeds=embeds_BTD, position_ids=positions, use_cache=False).last_hidden_state
        return decoder._rows(out, at)

    def ours(at: Any) -> Tensor:
        return decoder.forward(lm, embeds_BTD, positions_BT=positions, at_BN=at)

    def train(side: Callable[[Any], Tensor]) -> list[Tensor]:
        bank.train_only("one")
        hidden = side(at_BN)
        hidden.square().mean().backward()
        grads = [p.grad for p in bank.trainable().values() if p.grad is not None]
        bank.freeze("one")
        return [hidden.detach(), *grads]

    def prefill(side: Callable[[Any], Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [side(decoder.LAST)]

    rows = []
    for what, run in (("training step", train), ("prefill", prefill)):
        for a, b in zip(run(theirs), run(ours), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
        took: tuple[list[Took], list[Took]] = ([], [])
        for rep in range(reps + 1):  # the first is thrown away
            for side, times in zip((theirs, ours), took, strict=True):
                one, _ = common.timed(lambda run=run, side=side: [run(side) for _ in range(size.steps)])
                if rep:
                    times.append(one)
        title = f"{what}, {family}, over Hugging Face's forward, {size.name}"
        rows.append(common.ratio(title, ">= 1.0", *took, size.steps, unit="steps/s"))
    return rows


if __name__ == "__main__":
    args = common.options(__doc__)
    for name in args.sizes.split(","):
        for family in ("Llama", "Qwen2 (InternVL)", "Qwen2.5-VL", "Qwen3-VL"):
            common.report(compare(family, common.SIZES[name], args.reps))
