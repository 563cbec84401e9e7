"""A dry run: stages, steps, parameters, FLOPs, and estimates of memory and time, before any weight is loaded.

The model is built from its config on the meta device (shapes without storage), its processor counts the
tokens of a few examples per task, and the speed is that of earlier runs of this model in `runs/`, or else a
share of a matrix product timed on the spot. What is an estimate is called one, with what it rests on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retain.adapters.bank import AdapterBank
from retain.adapters.kinds import attach
from retain.assemble import build_method, build_stream, build_trainer, model_source
from retain.config import Recipe
from retain.models.encode import Encoder
from retain.models.family import Family, family_of
from retain.models.folder import told
from retain.models.guide import GuideSource, prototype_width
from retain.models.hf import image_token
from retain.models.load import eos_ids, load_processor, model_class, read_config, where
from retain.report.summary import count, duration, size
from retain.run.engine import Engine
from retain.run.store import RunDir
from retain.run.train import Optim
from retain.stream import Task
from retain.types import Example, RetainError

SAMPLED = 24  # examples per task whose tokens are counted
USED = (
    0.35  # share of a large matrix product's speed that training reaches; measured 0.3 to 0.5 on small models
)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

Rows = list[list[str]]


@dataclass(frozen=True)
class Shape:
    """What the config alone says about a model with adapters."""

    parameters: int
    trainable: int
    language: int  # parameters that a token passes: layers and head, no embedding table
    layers: int
    hidden: int
    vocabulary: int
    bare: Rows  # kinds of layers that get no adapter: what, how many, why
    kept: int  # numbers that a decoder layer keeps of a token for the backward pass
    dropped: int  # and those that dropout adds


@dataclass(frozen=True)
class Stage:
    """One task to be trained, as far as it is known before: `data` hooks (replay) may add samples."""

    name: str
    samples: int
    steps: int
    tokens: float  # mean per sample
    answer: float  # of which are predicted
    train_flops: float
    eval_flops: float  # one row of the matrix after this stage

    def seconds(self, flops_per_s: float) -> float:
        """Training and evaluation at a speed."""
        return (self.train_flops + self.eval_flops) / flops_per_s


@dataclass(frozen=True)
class RunPlan:
    """Everything that `retain plan` prints."""

    recipe: Recipe
    shape: Shape
    stages: tuple[Stage, ...]
    zero_shot_flops: float
    memory: float
    speed: float
    speed_from: str

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.zero_shot_flops + sum(s.train_flops + s.eval_flops for s in self.stages)


def make_plan(recipe: Recipe, runs: Path = Path("runs")) -> RunPlan:
    """Plan a recipe. Data files are read and checked; of the model only config and processor are."""
    method, stream = build_method(recipe), build_stream(recipe)
    trainer = build_trainer(recipe, stream, method)
    learned = trainer.stages(method, stream)
    hf, processor = skeleton(recipe)
    encode = encoder(hf, processor, recipe)
    lengths = {task.name: _length(encode, task) for task in [*learned, *stream.all]}
    shape = _shape(hf, recipe)

    def row(front: int) -> float:
        return sum(_eval_flops(shape, task, lengths[task.name][0] + front) for task in stream.all)

    stages = tuple(
        _stage(
            shape,
            task,
            front,
            *lengths[task.name],
            recipe.optim,
            row(front),
            trainer.n_steps(task, recipe.optim),
        )
        for i, task in enumerate(learned, 1)
        for front in [recipe.adapter.in_front(i)]  # soft prompts before every sample
    )
    longest = max((s.tokens for s in stages), default=0.0)
    answer = max((s.answer for s in stages), default=0.0)
    speed, origin = _speed(recipe, runs)
    return RunPlan(recipe, shape, stages, row(0), memory(shape, recipe, longest, answer), speed, origin)


# -- the model without its weights -----------------------------------------------------------------------


def skeleton(recipe: Recipe) -> tuple[Any, Any]:
    """The model on the meta device, and its processor."""
    source = model_source(recipe.model.name)
    name, local = where(source)
    config = read_config(source, weights=False)
    with told(f"model {name!r}", "config.json"), torch.device("meta"):
        hf = model_class(config).from_config(config)
    return hf, load_processor(name, local, config)


def encoder(hf: Any, processor: Any, recipe: Recipe) -> Encoder:
    """What turns examples into tokens, as the recipe says."""
    spec = recipe.model
    with told(f"model {spec.name!r}", "what its configuration describes", ours=False):
        return Encoder(
            processor,
            eos_ids(hf, processor.tokenizer),
            image_token(hf.config),
            spec.max_length or 1 << 30,
            spec.truncate,
            family=family_of(hf, spec.family),
            square=spec.square,
        )


def _shape(hf: Any, recipe: Recipe) -> Shape:
    """Counts from shapes alone; an adapter is really attached, so that targets are those of the run."""
    family, text = family_of(hf, recipe.model.family), hf.config.get_text_config()
    parameters = _size(hf)
    language, table, head = (
        family.part(hf, family.language),
        hf.get_input_embeddings(),
        hf.get_output_embeddings(),
    )
    passed = _size(language) - _size(table) + _size(head)
    bank = attach(
        hf, recipe.adapter, language=family.language, projector=family.projector,
        embed=hf.get_input_embeddings(), width=lambda: prototype_width(hf, _guide(recipe)),
    )  # fmt: skip
    bank.add("plan", torch.Generator())
    trainable = sum(p.numel() for p in bank.parameters("plan").values())
    layers, D = int(text.num_hidden_layers), int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * D)
    heads = int(text.num_attention_heads)
    E = int(getattr(text, "head_dim", None) or D // heads)
    queries, keys = heads * E, int(getattr(text, "num_key_value_heads", None) or heads) * E
    # two norms' inputs and outputs; q, attention's output; k, v; gate, silu(gate), up, their product
    kept = 4 * D + 2 * queries + 2 * keys + 4 * inner
    # a mask per input of a group of layers, attention's output once more
    dropped = 2 * D + 2 * queries + inner
    bare = _bare(hf, bank, family)
    return Shape(parameters, trainable, passed, layers, D, int(text.vocab_size), bare, kept, dropped)


def _bare(hf: Any, bank: AdapterBank, family: Family) -> Rows:
    """Layers with a weight matrix that the adapters leave as they are, by kind, and why."""
    head, tables = hf.get_output_embeddings(), (nn.Embedding, nn.Conv2d, nn.Conv3d)
    found: dict[tuple[str, str], int] = {}
    for path, module in hf.named_modules():
        own = [
            n
            for n, p in module.named_parameters(recurse=False)
            if p.ndim > 1 and not n.startswith(("lora_", "delta_"))
        ]
        adapted = (
            path in bank.sites
            or path.removesuffix(".base") in bank.sites
            or any(isinstance(module, t) for t in tables)
        )
        if not own or adapted or any(path.startswith(site + ".") for site in bank.sites):
            continue
        kind = ".".join("*" if part.isdigit() else part for part in path.split(".")) or "(the model itself)"
        why = _why(module, path, own, family, module is head)
        found[kind, why] = found.get((kind, why), 0) + 1
    return [[kind, str(n), why] for (kind, why), n in found.items()]


def _why(module: nn.Module, path: str, own: Sequence[str], family: Family, head: bool) -> str:
    if head:
        return "the head: adapter.targets leaves it out"
    if not (hasattr(module, "in_features") and hasattr(module, "weight")):
        return f"{', '.join(own)}: stacked or bare weights, no linear layer that LoRA could be put around"
    if family.tower and path.startswith(family.tower):
        return "vision tower: frozen, its features are cached; adapter.targets: all adapts it"
    if path.startswith(family.projector):
        return "projector: adapter.dense leaves it out"
    return "adapter.targets does not match it"


def _guide(recipe: Recipe) -> GuideSource:
    """The guide that a run of this recipe has: the named one, else a folder beside the base."""
    beside = Path(model_source(recipe.model.name)) / "guide"
    named = recipe.model.guide and model_source(recipe.model.guide, "model.guide")
    return named or (beside if beside.is_dir() else None)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- work ------------------------------------------------------------------------------------------------


def _length(encode: Encoder, task: Task) -> tuple[float, float]:
    """Mean tokens of a sample, image tokens included, and of its answer, over some examples spread over the split."""
    pool: Sequence[Example] = task.train or task.test
    step = max(1, len(pool) // SAMPLED)
    encoded = [encode(e) for e in pool[::step][:SAMPLED]]
    return statistics.fmean(map(len, encoded)), statistics.fmean(len(e.answer) for e in encoded)


def _stage(
    shape: Shape, task: Task, front: int, tokens: float, answer: float, optim: Optim, row: float, steps: int
) -> Stage:
    central = steps == optim.n_steps(len(task.train)) and optim.steps is None
    samples = round(len(task.train) * optim.epochs) if central else steps * optim.batch_size
    per_token = (
        4 * shape.language + 6 * shape.trainable
    )  # as the budget of a run counts (retain.run.continual)
    whole = tokens + front
    return Stage(task.name, samples, steps, whole, answer, per_token * whole * samples, row)


def _eval_flops(shape: Shape, task: Task, tokens: float) -> float:
    """Prompts once, then at most `max_new_tokens` answer tokens, one by one."""
    return 2 * shape.language * len(task.test) * (tokens + task.max_new_tokens)


def memory(shape: Shape, recipe: Recipe, tokens: float, answer: float) -> float:
    """Bytes: weights; adapters with gradient and two moments in fp32; what a micro-batch keeps for its backward.

    The latter as `retain.models.decoder` runs it, within a quarter of what is measured on the pocket (tests/test_plan.py); a
    family that Hugging Face runs whole keeps more.
    """
    optim, width = recipe.optim, BYTES[recipe.model.dtype]
    compute = 2 if optim.precision == "bf16" else width
    micro = optim.batch_size / optim.accumulate
    layer = shape.kept + (shape.dropped if getattr(recipe.adapter, "dropout", 0) else 0)
    if compute < width:  # under autocast the inputs of norms stay as wide as the weights
        layer += 2 * shape.hidden
    deep = float(shape.layers * layer)
    if optim.grad_checkpointing:  # every layer's input; one layer run again, with gradients
        deep = shape.layers * shape.hidden + 1.25 * layer
    logits = micro * answer * shape.vocabulary * (compute + 3 * 4)
    return shape.parameters * width + 16 * shape.trainable + micro * tokens * deep * compute + logits


def _speed(recipe: Recipe, runs: Path) -> tuple[float, str]:
    """FLOP/s and where the figure is from."""
    rates = []
    for path in sorted(runs.glob("*/run.json")):
        try:
            run = RunDir.read(path.parent)
            config, spent = run.config, next((b for row in reversed(run.rows()) if (b := row.budget())), None)
            if spent and config["model"]["name"] == recipe.model.name and spent["train_s"] > 0:
                rates.append(spent["train_flops"] / spent["train_s"])
        except (RetainError, KeyError, TypeError):
            continue  # another tool's folder, or a broken one: it has nothing to say about speed
    if rates:
        return statistics.median(rates), f"median of {len(rates)} earlier runs of this model in {runs}"
    device = Engine.start(recipe.model.device).device
    bf16 = recipe.optim.precision == "bf16" or recipe.model.dtype != "fp32"
    peak = _timed_product(device, torch.bfloat16 if bf16 else torch.float32)
    return USED * peak, f"assumed: {USED:.0%} of a matrix product timed now ({count(peak)}FLOP/s on {device})"


def _timed_product(device: torch.device, dtype: torch.dtype, n: int = 1024) -> float:
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # reading one value waits for the device
        best = min(best, time.perf_counter() - started)
    return float(2 * n**3 / best)


def bare_rows(plan: RunPlan) -> Rows:
    """One row per kind of layer that gets no adapter; the header alone where there is none."""
    return [["layers without an adapter", "count", "why"], *plan.shape.bare]


# -- words -----------------------------------------------------------------------------------------------


def stage_rows(plan: RunPlan) -> Rows:
    """One row per stage."""
    head = [
        "stage",
        "train samples",
        "steps",
        "tokens per sample",
        "train FLOPs",
        "eval FLOPs",
        "time (estimate)",
    ]
    zero = [
        "(zero-shot)",
        "",
        "",
        "",
        "",
        count(plan.zero_shot_flops),
        duration(plan.zero_shot_flops / plan.speed),
    ]
    body = [
        [s.name, str(s.samples), str(s.steps), f"{s.tokens:.0f}", count(s.train_flops), count(s.eval_flops),
         duration(s.seconds(plan.speed))]
        for s in plan.stages
    ]  # fmt: skip
    return [head, zero, *body]


def _folder(recipe: Recipe) -> str:
    """What `retain run` would find at the recipe's `out`."""
    if not recipe.out.exists():
        return "new"
    try:
        store = RunDir.open(recipe.out, recipe.resolved(), main=False)
    except RetainError as error:
        return f"in the way: {error}"
    return "exists and is finished: it is only read" if store.done else "exists: the run continues"


def _messages(plan: RunPlan) -> Rows:
    """What travels in a federated run."""
    spec = plan.recipe.federated
    if spec is None:
        return []
    fits = spec.per_round * spec.rounds * len(plan.stages)
    each = size(4 * plan.shape.trainable)
    about = f"{spec.per_round} of {spec.clients} clients, {spec.rounds} rounds a stage; {each} for each, and as much back"
    return [["sent to clients", size(4 * plan.shape.trainable * fits), about]]


def total_rows(plan: RunPlan) -> Rows:
    """The whole run, with what every figure rests on."""
    shape, optim = plan.shape, plan.recipe.optim
    steps = sum(s.steps for s in plan.stages)
    stored = 4 * shape.trainable * len(plan.stages)
    body = [
        ["base parameters", count(shape.parameters), f"{plan.recipe.model.name}, {plan.recipe.model.dtype}"],
        [
            "trainable parameters",
            count(shape.trainable),
            f"of one adapter of kind {plan.recipe.adapter.kind}",
        ],
        ["steps", str(steps), f"{optim.batch_size} samples each, in {optim.accumulate} parts"],
        [
            "stored",
            size(stored),
            "adapters of all stages in fp32, if each stage changes one; method state besides",
        ],
        [
            "memory (estimate)",
            size(plan.memory),
            "weights + 16 bytes per trainable + activations of a micro-batch; Python, cached images besides",
        ],
        [
            "FLOPs",
            count(plan.flops),
            "4 per passed parameter and token in training, 2 forward, 6 for adapters",
        ],
        *_messages(plan),
        ["speed", f"{count(plan.speed)}FLOP/s", plan.speed_from],
        [
            "time (estimate)",
            duration(plan.flops / plan.speed),
            "FLOPs / speed; short answers evaluate slower than that",
        ],
        [
            "guard",
            "when loaded",
            "a run compares the model with Hugging Face's own call; `retain doctor --model` does it",
        ],
        [
            "run folder",
            str(plan.recipe.out),
            _folder(plan.recipe),
        ],
    ]
    return [["what", "value", "how"], *body]
