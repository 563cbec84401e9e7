"""What the benchmarks share: the models, the data, the Hugging Face baseline, and how time is taken.

The baseline is what a user of `Trainer` and PEFT writes: the dataset holds token ids (tokenised beforehand,
not timed), the collator pads on the right and runs the image processor on the fly, the vision tower is frozen
but runs in every step, LoRA on all linear layers of the language model, the projector in `modules_to_save`,
no gradient checkpointing, fused AdamW, cosine schedule, loss and logits as Hugging Face computes them.
`Trainer` gets our batches in our order.
"""

# B batch, T tokens

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread per process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from torch import Tensor

from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.method import Context, Method
from retain.models.hf import HFModel
from retain.run.train import Optim
from retain.stream import Stream, Task
from retain.types import Example, Message

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "src/retain/pocket/weights"


@dataclass(frozen=True)
class Size:
    """One model to measure on, and its recipe."""

    name: str
    rank: int
    batch: int
    steps: int
    examples: int
    max_new_tokens: int = 16


POCKET = Size("pocket", rank=32, batch=32, steps=10, examples=320)
WIDE = Size("wide", rank=16, batch=16, steps=6, examples=96)
BROAD = Size("broad", rank=16, batch=16, steps=6, examples=96)  # two layers a quarter as wide as 7B's
SMOKE = Size("smoke", rank=4, batch=4, steps=3, examples=12, max_new_tokens=3)
SIZES = {s.name: s for s in (POCKET, WIDE, BROAD, SMOKE)}


# -- models and data ---------------------------------------------------------------------------------------


def base(size: Size) -> tuple[Any, Any]:
    """Model and processor: the shipped pocket if it is there, else its architecture with random weights."""
    if size.name == "pocket" and (WEIGHTS / "model.safetensors").is_file():
        from retain.models.load import load_pretrained

        return load_pretrained(WEIGHTS)
    shape = {
        "pocket": {
            "lm": 192,
            "inter": 512,
            "layers": 4,
            "tower": 128,
            "tower_layers": 4,
            "side": 48,
            "vocab": 1792,
        },
        "wide": {
            "lm": 256,
            "inter": 1024,
            "layers": 4,
            "tower": 128,
            "tower_layers": 3,
            "side": 64,
            "vocab": 1792,
        },
        "broad": {
            "lm": 1024,
            "inter": 2752,
            "layers": 2,
            "tower": 128,
            "tower_layers": 3,
            "side": 64,
            "vocab": 1792,
        },
        "smoke": {
            "lm": 32,
            "inter": 64,
            "layers": 2,
            "tower": 32,
            "tower_layers": 2,
            "side": 16,
            "vocab": 512,
        },
    }[size.name]
    return _random_llava(**shape)


def _random_llava(
    lm: int, inter: int, layers: int, tower: int, tower_layers: int, side: int, vocab: int
) -> tuple[Any, Any]:
    from transformers import (
        AutoModelForImageTextToText,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from retain.pocket.build import CHAT, tokenizer

    tok = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="left", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    vocab = max(vocab, len(tok))
    square = {"height": side, "width": side}
    images = CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False)
    processor = LlavaProcessor(
        images, tok, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT, image_token="<image>",
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower, intermediate_size=3 * tower, num_hidden_layers=tower_layers,
            num_attention_heads=4, image_size=side, patch_size=8, projection_dim=96,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab, hidden_size=lm, intermediate_size=inter, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0,
            bos_token_id=1, eos_token_id=3,
        ),
        image_token_index=tok.convert_tokens_to_ids("<image>"), image_seq_length=(side // 8) ** 2,
        vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():  # wider than 0.02, so that answers differ per sample and adapters matter
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape) / p.shape[1] ** 0.5)
    model.generation_config.update(eos_token_id=3, pad_token_id=0, bos_token_id=1, do_sample=False)
    return model, processor


def task(size: Size, name: str = "garments", n_test: int = 64) -> Task:
    """A task: the pocket's `name` if its weights are there, else pictures with made-up questions."""
    if size.name == "pocket" and (WEIGHTS / "model.safetensors").is_file():
        from retain.pocket.stream import task as pocket_task

        return pocket_task(name, n_train=size.examples, n_valid=1, n_test=n_test)
    rng = np.random.default_rng(0)
    side, words = {"pocket": (48, 10), "wide": (64, 28), "broad": (64, 28), "smoke": (16, 6)}[size.name]
    nouns = [
        "the",
        "red",
        "green",
        "blue",
        "square",
        "circle",
        "left",
        "right",
        "of",
        "two",
        "three",
        "shapes",
    ]
    nouns += ["how", "many", "what", "colour", "is", "a", "number"]

    def one(i: int) -> Example:
        cells = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        image = np.kron(cells, np.ones((side // 8, side // 8, 1), np.uint8))
        n = int(rng.integers(words - 2, words + 3))
        question = " ".join(rng.choice(nouns, n)) + "?"
        answer = " ".join(rng.choice(nouns, int(rng.integers(1, 4))))
        return Example(
            f"{size.name}{i}", (Message("user", question, 1), Message("assistant", answer)), (image,)
        )

    n_test = n_test if size.name != "smoke" else 6
    rows = [one(i) for i in range(size.examples + n_test)]
    return Task(size.name, rows[: size.examples], rows[size.examples :], Exact(), size.max_new_tokens)


@dataclass(frozen=True)
class Exact:
    """Exact match."""

    name: str = "exact"
    formula: str = "100 [y = y*]"

    def __call__(self, predictions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        return [100.0 * (p == e.answer) for p, e in zip(predictions, examples, strict=True)]


@dataclass
class Plain(Method):
    """One adapter, trained: sequential LoRA without its book-keeping."""

    name: ClassVar[str] = "plain"

    def adapt(self, ctx: Context) -> Mix:
        if "main" not in ctx.model.adapters.names:
            ctx.model.adapters.add("main", ctx.rng("init"))
        ctx.model.adapters.train_only("main")
        return Mix({"main": 1.0})


def context(model: HFModel, of: Task, log: Callable[..., None] = lambda **_: None) -> Context:
    """A context for a stream of one task."""
    return Context(model, of, Stream("bench", (of,)), [], seed=0, log=log)


def ours(
    base_model: Any, processor: Any, size: Size, dropout: float = 0.0, precision: str = "fp32"
) -> HFModel:
    """Our model on a copy of the base, with empty caches."""
    spec = LoraSpec(rank=size.rank, alpha=2.0 * size.rank, dropout=dropout)
    return HFModel(deepcopy(base_model), processor, spec, precision="bf16" if precision == "bf16" else "fp32")


def optim(size: Size, precision: str) -> Optim:
    """The recipe, for both sides."""
    return Optim(
        lr=1e-3,
        steps=size.steps,
        batch_size=size.batch,
        precision=precision,
        log_every=size.steps,
        warmup=0.1,
    )


# -- Hugging Face ------------------------------------------------------------------------------------------


def hf_model(base_model: Any, size: Size, dropout: float = 0.0) -> Any:
    """The base with PEFT LoRA on the language model's linear layers and a trained copy of the projector."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=size.rank, lora_alpha=2 * size.rank, lora_dropout=dropout, bias="none",
        target_modules=r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    return get_peft_model(deepcopy(base_model), config)


def copy_adapter(state: Mapping[str, Tensor], peft_model: Any) -> None:
    """Our adapter's tensors into PEFT's: LoRA as it is, the projector as base plus delta."""
    target = dict(peft_model.named_parameters())
    with torch.no_grad():
        for key, value in state.items():
            path, kind = key.rsplit(".", 1)
            if kind.startswith("lora_"):
                target[f"base_model.model.{path}.{kind}.default.weight"].copy_(value)
            else:
                module, leaf = path.rsplit(".", 1)
                frozen = target[f"base_model.model.{module}.original_module.{leaf}.{kind}"]
                target[f"base_model.model.{module}.modules_to_save.default.{leaf}.{kind}"].copy_(
                    frozen + value
                )


@dataclass
class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Token ids, labels and an image per row."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


def tokenised(examples: Sequence[Example], model: HFModel) -> Rows:
    """The user's preparation. The ids are ours: which tokens are learned must not be what differs."""
    rows = []
    for e in examples:
        ids = model.encode(e)
        labels = [-100] * len(ids.prompt) + list(ids.answer)
        rows.append({"input_ids": [*ids.prompt, *ids.answer], "labels": labels, "image": e.images[0]})
    return Rows(rows)


@dataclass
class Collator:
    """Pads on the right and turns the images into pixels."""

    processor: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        pad, width = self.processor.tokenizer.pad_token_id, max(len(r["input_ids"]) for r in rows)
        ids = [r["input_ids"] + [pad] * (width - len(r["input_ids"])) for r in rows]
        labels = [r["labels"] + [-100] * (width - len(r["labels"])) for r in rows]
        mask = [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]
        images = self.processor.image_processor([r["image"] for r in rows], return_tensors="pt")
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(labels),
            "pixel_values": images["pixel_values"],
        }


def trainer(peft_model: Any, processor: Any, rows: Rows, how: Optim, out: str) -> tuple[Any, list[Tensor]]:
    """A `Trainer` of the same recipe over rows in order, and the list that its losses will be put in."""
    from transformers import Trainer, TrainingArguments

    losses: list[Tensor] = []

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    args = TrainingArguments(
        output_dir=out, per_device_train_batch_size=how.batch_size, max_steps=how.steps, learning_rate=how.lr,
        lr_scheduler_type=how.schedule, warmup_steps=math.ceil(how.warmup * how.steps),
        weight_decay=how.weight_decay, adam_beta1=how.beta1, adam_beta2=how.beta2,
        max_grad_norm=how.max_grad_norm, optim="adamw_torch_fused",
        bf16=how.precision == "bf16", use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    return InOrder(peft_model, args, train_dataset=rows, data_collator=Collator(processor)), losses


# -- time --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Took:
    """Seconds of one run: on the clock, and of this process's CPU (a busy neighbour disturbs it far less)."""

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> tuple[Took, Any]:
    """Run once, garbage collected before."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    return Took(time.perf_counter() - wall, time.process_time() - cpu), value


@dataclass(frozen=True)
class Ratio:
    """How many times faster `b` is than `a`: median and range of the ratios within a repetition."""

    name: str
    goal: str
    median: float
    low: float
    high: float
    wall: float  # the median on the clock; the others are in CPU seconds
    a: float  # units per CPU second, median
    b: float
    unit: str = "samples/s"
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the median reaches the goal."""
        sign, number = self.goal.split()
        return self.median >= float(number) if sign == ">=" else self.median <= float(number)


def ratio(name: str, goal: str, a: Sequence[Took], b: Sequence[Took], units: float, **more: Any) -> Ratio:
    """a[i] and b[i] are neighbours in time: their ratio cancels what the machine did meanwhile."""
    each = [x.cpu / y.cpu for x, y in zip(a, b, strict=True)]
    clock = [x.wall / y.wall for x, y in zip(a, b, strict=True)]
    mid = statistics.median
    return Ratio(
        name,
        goal,
        mid(each),
        min(each),
        max(each),
        mid(clock),
        units / mid(t.cpu for t in a),
        units / mid(t.cpu for t in b),
        **more,
    )


def options(doc: str | None) -> argparse.Namespace:
    """The command line that every benchmark has."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, one repetition: does it run at all"
    )
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--sizes", default="pocket,wide")
    args = parser.parse_args()
    if args.smoke:
        args.reps, args.sizes = 1, "smoke"
    if wrong := sorted(set(args.sizes.split(",")) - set(SIZES)):
        parser.error(f"--sizes: no size {wrong}; choose from {sorted(SIZES)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return args


def report(rows: Sequence[Ratio]) -> None:
    """One JSON line per row on stdout; `run.py` gathers them."""
    for r in rows:
        print(json.dumps({**asdict(r), "met": r.met}), flush=True)
