"""What Hugging Face's own call makes of a checkpoint folder: the other side, which knows nothing of `retain`.

The processor is `AutoProcessor`'s with Pillow back ends; where its class cannot be built for want of torchvision (for
its video part only), the same class is built with that part left out, and `golden/processors.json` holds what the
whole one gives. The model is the class that the config names. A conversation ends with an assistant turn, the one to
answer; its prompt is everything before, rendered with the generation prompt, and is the same in training and at
inference. Labels are on the text of every assistant turn and on the token that ends it, where the template (after the
last turn: or else the tokenizer) has one; PaliGemma's come from its processor's `suffix`.
"""

# B samples, T tokens, V vocabulary, N answer tokens

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from talks import IMAGE, Talk, Turn


@dataclass(frozen=True)
class Learned:
    """One conversation in training."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    loss: float
    logits_NV: Tensor

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """Tokens that are learned."""
        return tuple(i for i in self.labels if i != -100)


@dataclass(frozen=True)
class Answered:
    """One conversation at inference: its prompt, the next token's logits, and the greedy answer."""

    prompt_ids: tuple[int, ...]
    logits_V: Tensor
    answer_ids: tuple[int, ...]
    text: str


def processor_of(folder: Path) -> Any:
    """The folder's processor with Pillow back ends, of its own class; a language model's tokenizer."""
    if not _settings(folder):
        return AutoTokenizer.from_pretrained(folder)
    try:
        return AutoProcessor.from_pretrained(folder, backend="pil")
    except (ImportError, TypeError, ValueError):
        return _without_video(folder)


def _settings(folder: Path) -> dict[str, Any]:
    """What the folder says of its processor besides its parts: its class and its counts of tokens."""
    found: dict[str, Any] = {}
    for file, keys in (("preprocessor_config.json", ["processor_class"]), ("processor_config.json", None)):
        if (folder / file).is_file():
            given = json.loads((folder / file).read_text())
            found |= {k: given[k] for k in keys or given if not k.endswith("_processor")}
    return found


def _template(folder: Path) -> str:
    if (folder / "chat_template.json").is_file():
        return str(json.loads((folder / "chat_template.json").read_text())["chat_template"])
    return (folder / "chat_template.jinja").read_text()


def _without_video(folder: Path) -> Any:
    """The processor's own class around tokenizer and Pillow image processor, and nothing in the video's place."""
    given = _settings(folder)
    name, config = given.pop("processor_class"), AutoConfig.from_pretrained(folder)
    pixtral = (
        "transformers.models.pixtral.image_processing_pixtral"  # wants torchvision; only vLLM asks it sizes
    )
    stub = ModuleType(pixtral)
    stub.get_resize_output_image_size = None  # type: ignore[attr-defined]
    package = {"Pixtral": "pixtral", "Qwen3VL": "qwen3_vl"}.get(
        name.removesuffix("Processor"), config.model_type
    )
    with mock.patch.dict(sys.modules, {pixtral: stub} if "Pixtral" in name else {}):
        module = importlib.import_module(f"transformers.models.{package}.processing_{package}")
    cls = getattr(module, name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    video = {"video_processor": SimpleNamespace(num_frames=None, fps=None)}
    video = video if "video_processor" in cls.get_attributes() else {}
    with (
        mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None),
        mock.patch.object(module, "num2words", str, create=True),  # SmolVLM's counts frames in words
    ):
        return cls(images, tokenizer, **video, chat_template=_template(folder), **given)


@dataclass
class Stock:
    """A checkpoint folder under Hugging Face's own classes, on the CPU in fp32."""

    folder: Path
    model: Any = None  # another model of the folder's class, such as one with an adapter
    processor: Any = field(init=False)

    def __post_init__(self) -> None:
        self.processor = processor_of(self.folder)
        if self.tokenizer.pad_token is None:  # Llama 3: without one it cannot be asked two things at once
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.model is None:
            (name,) = AutoConfig.from_pretrained(self.folder).architectures
            self.model = getattr(transformers, name).from_pretrained(self.folder, dtype=torch.float32)
        self.model.eval()

    # -- text --------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def paired(self) -> bool:
        """PaliGemma: no conversation, a prefix and a suffix."""
        return type(self.processor).__name__ == "PaliGemmaProcessor"

    @property
    def ends(self) -> set[int]:
        """Tokens that end an answer."""
        given = self.model.generation_config.eos_token_id
        given = given if isinstance(given, list) else [given]
        return {int(i) for i in (*given, self.tokenizer.eos_token_id) if i is not None}

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """As the template takes them: lists of parts, or strings (language models; Pixtral's system turn)."""
        plain = self.processor is self.tokenizer
        pixtral = type(self.processor).__name__ == "PixtralProcessor"

        def content(turn: Turn) -> Any:
            if plain or (pixtral and turn.role == "system"):
                return turn.text
            return [{"type": "image"} if p is IMAGE else {"type": "text", "text": p} for p in turn.parts]

        return [{"role": t.role, "content": content(t)} for t in turns]

    def render(self, turns: Sequence[Turn], generate: bool) -> str:
        """The conversation as text, one placeholder per picture."""
        if self.paired:
            assert len(turns) == 1, "PaliGemma answers one question"
            return "".join("<image>" if p is IMAGE else p for p in turns[0].parts)
        text = self.processor.apply_chat_template(
            self.messages(turns), tokenize=False, add_generation_prompt=generate
        )
        assert isinstance(text, str)
        return text

    def encode(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], **more: Any
    ) -> dict[str, Any]:
        """The processor's tensors of rendered texts: BOS as `apply_chat_template(tokenize=True)` has it."""
        more |= {"return_tensors": "pt", "padding": True}
        if self.processor is self.tokenizer:
            return dict(self.tokenizer(list(texts), add_special_tokens=False, **more))
        bos = self.tokenizer.bos_token
        if not self.paired and bos and texts[0].startswith(bos):
            more["add_special_tokens"] = False
        shown = [list(i) for i in images] if any(images) else None
        return dict(self.processor(text=list(texts), images=shown, **more))

    def _ids(self, text: str, images: Sequence[Image.Image]) -> tuple[int, ...]:
        return tuple(self.encode([text], [images])["input_ids"][0].tolist())

    def prompts(self, talks: Sequence[Talk]) -> dict[str, Any]:
        """Prompts without answers, padded on the left."""
        texts = [self.render(t.turns[:-1], True) for t in talks]
        made = self.encode(texts, [t.images for t in talks], padding_side="left")
        made.pop("labels", None)
        return made

    def call(self, talks: Sequence[Talk], **options: Any) -> dict[str, Any]:
        """`apply_chat_template(tokenize=True)`: the call of every model card."""
        shown = [self.messages(t.turns[:-1]) for t in talks]
        for t, messages in zip(talks, shown, strict=True):
            images = iter(t.images)
            for part in (p for m in messages if isinstance(m["content"], list) for p in m["content"]):
                if part["type"] == "image":
                    part["image"] = next(images)
        more: dict[str, Any] = {"padding": True, "padding_side": "left"}
        if self.processor is not self.tokenizer:
            more = {"processor_kwargs": more}
        out = self.processor.apply_chat_template(
            shown,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **more,
            **options,
        )
        return dict(out)

    # -- training ----------------------------------------------------------------------------------------------

    def _after(self, turns: Sequence[Turn]) -> str:
        """The last turn as the template writes it behind the generation prompt, up to the token that ends it."""
        before, full = self.render(turns[:-1], True), self.render(turns, False)
        answer = turns[-1].text
        rest = full[len(before) :] if full.startswith(before) else full[full.rindex(answer) :]
        start = rest.index(answer) + len(answer)
        end = next((t for t in self._end_texts() if rest[start:].lstrip().startswith(t)), None)
        return rest[:start] if end is None else rest[: rest.index(end, start) + len(end)]

    def _asked(self, text: str, turns: Sequence[Turn]) -> tuple[str, str]:
        """The text before the last turn's answer, and the answer with its end, as they stand in `text`."""
        before, after = self.render(turns[:-1], True), self._after(turns)
        if not text.startswith(before):  # LLaVA-OneVision writes a turn otherwise than it asks for one
            full = self.render(turns, False)
            before = full[: full.rindex(turns[-1].text)]
        return before, after

    def _end_texts(self) -> list[str]:
        return [t for t in self.tokenizer.convert_ids_to_tokens(sorted(self.ends)) if t]

    def training(self, t: Talk) -> dict[str, Any]:
        """The processor's tensors of a conversation with its answers, and labels."""
        if self.paired:
            return self.encode([self.render(t.turns[:-1], True)], [t.images], suffix=[t.answer])
        text = self.render(t.turns[:-1], True) + self._after(t.turns)
        made = self.encode([text], [t.images])
        ids = made["input_ids"][0].tolist()
        labels = [-100] * len(ids)
        for k, turn in enumerate(t.turns):
            if turn.role != "assistant":
                continue
            seen = t.images[: sum(len(x.at) for x in t.turns[:k])]
            before, after = self._asked(text, t.turns[: k + 1])
            upto = before + after
            assert text.startswith(upto), f"turn {k} is not where it was: {text!r}"
            a, b = self._ids(before, seen), self._ids(upto, seen)
            assert b[: len(a)] == a and tuple(ids[: len(b)]) == b, "tokens merge across the border"
            labels[len(a) : len(b)] = b[len(a) :]
        if ids[-1] not in self.ends:
            made = self._longer(made, int(self.tokenizer.eos_token_id))
            labels.append(int(self.tokenizer.eos_token_id))
        made["labels"] = torch.tensor([labels])
        return made

    def _longer(self, made: dict[str, Any], token: int) -> dict[str, Any]:
        new = {"input_ids": token, "attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
        return {
            k: torch.cat([v, torch.full_like(v[:, :1], new[k])], 1) if k in new else v
            for k, v in made.items()
        }

    @torch.no_grad()
    def learn(self, t: Talk) -> Learned:
        """A conversation alone: the model's own loss, and logits where an answer token is predicted."""
        made = self.training(t)
        out = self.model(**made)
        labels = made["labels"][0]
        at = (labels[1:] != -100).nonzero().squeeze(1)
        return Learned(
            tuple(made["input_ids"][0].tolist()),
            tuple(labels.tolist()),
            float(out.loss),
            out.logits[0, at].float(),
        )

    # -- inference ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answers(self, talks: Sequence[Talk], n: int, *, neutral: bool = False) -> list[Answered]:
        """A batch padded on the left: the next token's logits, and `generate(do_sample=False)`.

        `neutral` leaves out what the generation config says of repetitions and banned words: greedy alone.
        """
        made = self.prompts(talks)
        logits = self.model(**made).logits[:, -1].float()
        more: dict[str, Any] = {"repetition_penalty": 1.0, "bad_words_ids": None} if neutral else {}
        out = self.model.generate(**made, do_sample=False, max_new_tokens=n, **more)
        found = []
        for i, mask in enumerate(made["attention_mask"].bool()):
            new = out[i, made["input_ids"].shape[1] :].tolist()
            stop = next((k + 1 for k, token in enumerate(new) if token in self.ends), len(new))
            text = self.tokenizer.decode(new[:stop], skip_special_tokens=True).strip()
            found.append(
                Answered(tuple(made["input_ids"][i][mask].tolist()), logits[i], tuple(new[:stop]), text)
            )
        return found

    def answer(self, t: Talk, n: int, **more: Any) -> Answered:
        """A conversation alone."""
        return self.answers([t], n, **more)[0]


def stock(folder: Path, talks: Sequence[Talk], n: int = 6) -> list[tuple[Learned, Answered]]:
    """Every conversation alone, in training and at inference."""
    side = Stock(folder)
    return [(side.learn(t), side.answer(t, n)) for t in talks]
