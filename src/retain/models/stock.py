"""The other side: what Hugging Face's own call says of a conversation, with none of our arithmetic in it.

Prompt by the stock processor's own call (chat template, image processor, tokenizer), logits by the forward of the
model's own class, one conversation at a time. `retain.models.guard` and `retain export` compare with it.
"""

# B batch (always 1 here), T tokens, N answer tokens, V vocabulary, D width

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from retain.models.encode import Encoder
from retain.types import Example, Message


@dataclass(frozen=True)
class Said:
    """One conversation: ids of the prompt, logits at the end of the prompt and behind every answer token, the loss."""

    ids: tuple[int, ...]
    next_V: Tensor
    answer_NV: Tensor  # row i predicts answer token i
    loss: float
    hidden_D: Tensor | None  # of the last place of the prompt, where the model gives it


@dataclass(frozen=True)
class Stock:
    """A model of a stock class (bare, or wrapped by stock PEFT) and a stock processor.

    `encode` says what is to be said (texts and pictures in their order, answer tokens), never how.
    """

    hf: Any
    processor: Any
    encode: Encoder
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def prompt(self, example: Example) -> dict[str, Tensor]:
        """The model's inputs for the prompt, by the stock processor's own call."""
        return self._inputs(example, example.prompt, {"add_generation_prompt": True})

    def written(self, example: Example) -> tuple[int, ...]:
        """Token ids of the whole conversation, answer included; empty where the processor has no way to write it."""
        if self.encode.told:
            inputs = self._inputs(example, example.messages, {})
        elif "suffix" in signature(type(self.processor).__call__).parameters:
            inputs = self._inputs(example, example.prompt, {"suffix": [example.answer]})
        else:
            return ()
        return tuple(inputs["input_ids"][0].tolist())

    def _inputs(
        self, example: Example, messages: tuple[Message, ...], how: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        processor, encode = self.processor, self.encode
        pictures = [encode.opened(source, example.told) for source in example.images]
        wanted = {"return_tensors": "pt"}
        if not encode.told:
            text = encode.render(messages, generate=True)
            if not hasattr(processor, "image_processor"):
                return dict(processor.tokenizer(text, **wanted))
            more = {k: v for k, v in how.items() if k == "suffix"}
            if not encode.adds_bos(text):
                more["add_special_tokens"] = False
            return dict(processor(images=[pictures] if pictures else None, text=[text], **wanted, **more))
        turns, shown = encode.content(messages), iter(pictures)
        for turn in turns:
            for part in turn["content"] if isinstance(turn["content"], list) else ():
                if part["type"] == "image":
                    part["image"] = next(shown)
        call: dict[str, Any] = {"tokenize": True, "return_dict": True, **how, **wanted}
        if not hasattr(processor, "image_processor"):
            return dict(processor.tokenizer.apply_chat_template(turns, chat_template=encode.told, **call))
        if processor.chat_template != encode.told:  # it is the tokenizer's, or writes the date
            call["chat_template"] = encode.told
        return dict(processor.apply_chat_template(turns, **call))

    @torch.no_grad()
    def ask(self, example: Example) -> Said:
        """Forward of the prompt alone, and of prompt and answer with labels."""
        answer = self.encode(example).answer
        device, dtype = next(self.hf.parameters()).device, self.hf.dtype
        inputs = {k: v.to(device) for k, v in self.prompt(example).items() if k != "labels"}
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        T = inputs["input_ids"].shape[1]
        whole = self._longer(inputs, answer)
        labels_BT = whole["input_ids"].clone()
        labels_BT[:, :T] = -100
        with self.autocast():
            out = self.hf(**inputs, output_hidden_states=True)
            all_of_it = self.hf(**whole, labels=labels_BT)
        hidden = out.hidden_states[-1][0, -1].float().cpu() if out.hidden_states is not None else None
        return Said(
            tuple(inputs["input_ids"][0].tolist()),
            out.logits[0, -1].float().cpu(),
            all_of_it.logits[0, T - 1 : T - 1 + len(answer)].float().cpu(),
            float(all_of_it.loss),
            hidden,
        )

    def _longer(self, inputs: Mapping[str, Tensor], answer: tuple[int, ...]) -> dict[str, Tensor]:
        """The prompt's inputs with answer tokens behind: seen, and of the type that this family's answers have."""
        n, T = len(answer), inputs["input_ids"].shape[1]
        kinds = self.encode.types([0], [0]) or [0]
        behind = {
            "input_ids": torch.tensor(answer),
            "attention_mask": torch.ones(n),
            "token_type_ids": torch.full((n,), kinds[-1]),
        }
        out = dict(inputs)
        for key, value in inputs.items():
            if value.shape == (1, T) and not value.is_floating_point():
                out[key] = torch.cat([value, behind.get(key, torch.zeros(n)).to(value)[None]], dim=1)
        return out
