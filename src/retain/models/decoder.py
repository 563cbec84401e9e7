"""Hugging Face's decoders of the Llama kind, run with the same modules in fewer passes over memory.

The arithmetic is that of the models in `DECODERS` (transformers 5.x); only the order of sums differs. Linear layers
that read one tensor (q, k, v; gate, up) run together, norm and rotary embedding are one autograd node each,
no mask is built where nothing is padded, and in the last layer queries, output projection and MLP run only at
the positions whose hidden state is asked for. Qwen's three-dimensional positions are its own rotary module's
affair, Qwen3's norms of queries and keys are applied where they are, and image features that early layers add
(DeepStack) are added. Every other decoder runs as Hugging Face wrote it.
"""

# B batch, T tokens, S tokens so far, D width, H heads, K key heads, N positions asked for, E head width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from retain.adapters.fused import together

DECODERS = {
    "LlamaModel",  # LLaVA-1.5, SmolVLM/Idefics3
    "Qwen2Model",  # InternVL3
    "Qwen3Model",  # InternVL3.5
    "Qwen2VLTextModel",
    "Qwen2_5_VLTextModel",
    "Qwen3VLTextModel",
}


def supports(language: Any) -> bool:
    """Whether it is one of DECODERS with SDPA over all tokens, no attention dropout and no gradient checkpointing."""
    config, kind = language.config, type(language)
    return (
        kind.__name__ in DECODERS
        and kind.__module__.startswith("transformers.models.")
        and config._attn_implementation == "sdpa"
        and not config.attention_dropout
        and config.hidden_act == "silu"
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not any(layer.gradient_checkpointing for layer in language.layers)
    )


class Keys:
    """Keys and values of all layers, in memory taken once: a step writes its column and copies nothing else.

    `kv` holds two tensors (B, K, room, E) per layer. Columns that no token was written to are zero.
    """

    def __init__(self, kv: Sequence[tuple[Tensor, Tensor]], length: int = 0) -> None:
        self.kv, self.length = list(kv), length

    @staticmethod
    def empty(language: Any, rows: int, room: int, like: Tensor) -> Keys:
        """For a batch of `rows` and up to `room` tokens each, in the type and place of `like`."""
        config, E = language.config, language.layers[0].self_attn.head_dim
        shape = (rows, config.num_key_value_heads, room, E)
        return Keys([(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_hidden_layers)])

    def part(self, first: int, last: int, start: int) -> Keys:
        """Rows `first` to `last` from column `start` on, as an empty store of its own in the same memory."""
        return Keys([(k[first:last, :, start:], v[first:last, :, start:]) for k, v in self.kv])

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def update(self, k_BKTE: Tensor, v_BKTE: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; all of them so far. The last layer ends the step."""
        k, v = self.kv[layer]
        end = self.length + k_BKTE.shape[2]
        k[:, :, self.length : end], v[:, :, self.length : end] = k_BKTE, v_BKTE
        if layer + 1 == len(self.kv):
            self.length = end
        return k[:, :, :end], v[:, :, :end]

    def batch_select_indices(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.kv = [(k[rows], v[rows]) for k, v in self.kv]


LAST = slice(-1, None)  # as `at_BN`: the last place of every row


def forward(
    language: Any,
    embeds_BTD: Tensor,
    *,
    mask_BS: Tensor | None = None,
    positions_BT: Tensor | None = None,
    cache: Any = None,
    at_BN: Tensor | slice | None = None,
    deep: Sequence[Tensor] = (),
    deep_at_M: Tensor | None = None,
) -> Tensor:
    """Last hidden states (B, T, D), or (B, N, D) at `at_BN` only.

    `mask_BS` is needed where a row is padded on the left; right padding follows every real token. Positions are
    (B, T), or (3, B, T) where the model's are. `deep[i]` (M, D) is added behind layer i at the flat places `deep_at_M`.
    """
    B, T, _ = embeds_BTD.shape
    before = cache.get_seq_length() if cache is not None else 0
    if positions_BT is None:
        positions_BT = torch.arange(before, before + T, device=embeds_BTD.device)[None]
    cos, sin = language.rotary_emb(embeds_BTD, positions_BT)
    mask = _mask(mask_BS, B, T, before, embeds_BTD.device)
    hidden = embeds_BTD
    layers = language.layers[: language.config.num_hidden_layers]
    for i, layer in enumerate(layers):
        last = i + 1 == len(layers)
        short = last and i >= len(deep)  # where image features are added behind it, a layer runs whole
        hidden = _layer(layer, hidden, cos, sin, mask, cache, at_BN if short else None, T > 1)
        if i < len(deep):
            assert deep_at_M is not None
            flat = hidden.flatten(0, 1)
            hidden = flat.index_add(0, deep_at_M, deep[i].to(flat.dtype)).view_as(hidden)
            hidden = _rows(hidden, at_BN) if last and at_BN is not None else hidden
    return rms_norm(language.norm, hidden)


def _layer(
    layer: Any,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    cache: Any,
    at_BN: Tensor | slice | None,
    causal: bool,
) -> Tensor:
    attn, E = layer.self_attn, layer.self_attn.head_dim
    x = rms_norm(layer.input_layernorm, hidden)
    B = len(x)
    if at_BN is None:
        q, k, v = together((attn.q_proj, attn.k_proj, attn.v_proj), x)
        cos_q, sin_q = cos, sin
    else:
        k, v = together((attn.k_proj, attn.v_proj), x)
        (q,) = together((attn.q_proj,), _rows(x, at_BN))
        hidden = _rows(hidden, at_BN)
        cos_q, sin_q = _rows(cos.expand(B, -1, -1), at_BN), _rows(sin.expand(B, -1, -1), at_BN)
        if mask is not None:
            mask = _rows(mask.expand(B, 1, x.shape[1], -1)[:, 0], at_BN)[:, None]
        elif isinstance(at_BN, Tensor):
            mask = torch.arange(x.shape[1], device=x.device) <= at_BN[:, None, :, None]
        causal = False
    q, k = q.view(B, -1, q.shape[-1] // E, E), k.view(B, -1, k.shape[-1] // E, E)
    if hasattr(attn, "q_norm"):
        q, k = rms_norm(attn.q_norm, q), rms_norm(attn.k_norm, k)
    q_BHTE, k_BKTE = rotate(q, cos_q, sin_q).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
    v_BKTE = v.view(B, -1, v.shape[-1] // E, E).transpose(1, 2)
    if cache is not None:
        k_BKTE, v_BKTE = cache.update(k_BKTE, v_BKTE, attn.layer_idx)
    grouped = q_BHTE.shape[1] != k_BKTE.shape[1]
    if grouped:
        k_BKTE = k_BKTE.repeat_interleave(attn.num_key_value_groups, dim=1)
        v_BKTE = v_BKTE.repeat_interleave(attn.num_key_value_groups, dim=1)
    seen = F.scaled_dot_product_attention(
        q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, is_causal=causal and mask is None, scale=attn.scaling
    )
    (mixed,) = together((attn.o_proj,), seen.transpose(1, 2).flatten(2))
    hidden = _sum(hidden, mixed)
    gate, up = together(
        (layer.mlp.gate_proj, layer.mlp.up_proj), rms_norm(layer.post_attention_layernorm, hidden)
    )
    inner = F.silu(gate) * up if torch.is_grad_enabled() else F.silu(gate, inplace=True).mul_(up)
    (down,) = together((layer.mlp.down_proj,), inner)
    return _sum(hidden, down)


def _sum(hidden: Tensor, new: Tensor) -> Tensor:
    """In place where nothing is learned; never in the smaller of two types."""
    return hidden + new if torch.is_grad_enabled() or new.dtype != hidden.dtype else new.add_(hidden)


def _mask(mask_BS: Tensor | None, B: int, T: int, before: int, device: torch.device) -> Tensor | None:
    """True where a query (T) may look at a key (S): (B, 1, T, S). None: causal and nothing padded."""
    if mask_BS is None:
        return None
    keys = mask_BS.bool()[:, None, None, :]
    if T == 1:
        return keys
    q = torch.arange(before, before + T, device=device)[:, None]
    s = torch.arange(before + T, device=device)
    return (keys & (s <= q)) | (s == q)  # the diagonal: a padded query must see something, else it is NaN


def _rows(x_BTD: Tensor, at_BN: Tensor | slice) -> Tensor:
    if isinstance(at_BN, slice):
        return x_BTD[:, at_BN]
    return x_BTD.gather(1, at_BN[..., None].expand(-1, -1, x_BTD.shape[-1]))


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """`LlamaRMSNorm` with its frozen weight, as one node that keeps its input and one number per row."""
    if not torch.is_grad_enabled():
        return _normed(x, norm.weight, norm.variance_epsilon)[0]
    out: Tensor = _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rate = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    out = (wide * rate).to(x.dtype)
    return out.mul_(weight) if out.dtype == weight.dtype else out * weight, rate


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rate = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, rate)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rate = ctx.saved_tensors
        wide, g = x.float(), (grad * weight).float()
        along = (g * wide).sum(-1, keepdim=True).mul_(rate**3 / -x.shape[-1])
        return g.mul_(rate).addcmul_(wide, along).to(x.dtype), None, None


def rotate(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves as in Llama; `cos`, `sin` (B or 1, T, E)."""
    cos, sin = cos[:, :, None].to(x_BTHE.dtype), sin[:, :, None].to(x_BTHE.dtype)
    if not torch.is_grad_enabled():
        return _turned(x_BTHE, cos, sin)
    out: Tensor = _Rotate.apply(x_BTHE, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
