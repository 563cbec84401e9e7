"""The kinds of adapter that a recipe can name, and how a bank of one is put on a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from retain.adapters import lora, prompt
from retain.adapters.bank import AdapterBank
from retain.adapters.lora import LoraSpec
from retain.adapters.moe import MoeSpec
from retain.adapters.prompt import PromptSpec

Spec = LoraSpec | PromptSpec  # MoeSpec is a LoraSpec
KINDS: dict[str, type[Spec]] = {spec.kind: spec for spec in (LoraSpec, MoeSpec, PromptSpec)}


def attach(
    model: nn.Module,
    spec: Spec,
    *,
    language: str,
    projector: Iterable[str] = (),
    embed: nn.Module,
    width: Callable[[], int],
    signature: dict[str, object] | None = None,
) -> AdapterBank:
    """Freeze the model, put the sites of a kind on it, and return their bank.

    `embed` is the table of input embeddings and `width` the length of what a prompt's projection maps to; only
    prompts need them.
    """
    if isinstance(spec, PromptSpec):
        model.requires_grad_(False)
        return prompt.attach(embed, spec, width, signature or {})
    return lora.attach(model, spec, language=language, projector=projector, signature=signature)
