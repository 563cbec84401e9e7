"""fit(): one task. The loop that `retain.method` draws, on one screen, and the choices it needs (`Optim`).

A step is `batch_size` samples over all processes and micro-batches. Every micro-batch counts by its share of
the step's answer tokens, so neither accumulation nor the number of processes changes the loss that is
minimised.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from retain.adapters.bank import AdapterBank, Mix
from retain.adapters.prompt import tokens_in_front
from retain.method import Context, Method, answer
from retain.models.base import Model, Turns
from retain.run.engine import Engine, autocast, peak_memory
from retain.run.order import batches
from retain.run.sound import Watchman, is_of, wrong_kinds
from retain.signals import Stop, Stopped
from retain.types import Batch, Examples, RetainError, digest
from retain.values import LATER, Count, CountOrOff, NotNegative, Positive, Share, Size, ranged, written

MOST_SAMPLES = 100_000_000
"""Samples of one task, repeats counted: their order is decided before the first step, in memory."""


@ranged("optim")
@dataclass(frozen=True)
class Optim:
    """How one task is trained: AdamW with linear warm-up and a cosine (or constant) learning rate.

    `steps` fixes the number of optimizer steps per task; otherwise `epochs` does. `batch_size` is samples per
    step, all processes and `accumulate` micro-batches together. `projector_lr` None means `lr`.
    `max_grad_norm` 0 is off. The warm-up counts from zero as in transformers: with `warmup` > 0 the first
    step has learning rate 0, unless it is the only one.
    """

    lr: Positive = 2e-4
    projector_lr: NotNegative | None = None
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    batch_size: Size = 16
    accumulate: Size = 1
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Share = 0.03
    weight_decay: NotNegative = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_grad_norm: NotNegative = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    grad_checkpointing: bool = False
    group_by_length: bool = True
    checkpoint_every: CountOrOff = 0
    log_every: Count = 10
    turns: Turns = field(
        default="all", metadata=LATER
    )  # of a conversation every assistant turn is learned, or the last

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise RetainError(
                f"optim.accumulate: {self.accumulate} does not divide batch_size {self.batch_size}"
            )
        self.n_steps(0)

    def n_steps(self, n_examples: int) -> int:
        """Optimizer steps for a task of that many examples. RetainError for more than `MOST_SAMPLES` in all."""
        if (self.steps or 0) * self.batch_size > MOST_SAMPLES:
            key, told = "steps", f"{self.steps:,} steps of {self.batch_size:,}"
        elif self.steps is None and n_examples * self.epochs > MOST_SAMPLES:
            key, told = "epochs", f"{self.epochs:g} epochs of {n_examples:,}"
        else:
            return self.steps or math.ceil(n_examples * self.epochs / self.batch_size)
        raise RetainError(
            f"optim.{key}: {told} samples are more than the {MOST_SAMPLES:,} that a task may take"
        )

    def rate(self, step: int, n_steps: int) -> float:
        """The factor on the learning rate at a step, counted from 0."""
        warm = min(math.ceil(self.warmup * n_steps), n_steps - 1)
        if step < warm:
            return step / warm
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))


@dataclass
class FitStats:
    """What training one task took, and the adapters it trained.

    `tokens` counts input tokens, image tokens and soft prompts included. `reused`: the steps were another run's,
    and so are the seconds and the memory.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    last_loss: float = math.nan
    trainable_parameters: int = 0
    trained: list[str] = field(default_factory=list)
    peak_memory_bytes: int = 0
    reused: bool = False


class Checkpoints(Protocol):
    """Where `fit` leaves its state every `checkpoint_every` steps; `retain.run.store` gives one."""

    path: Path
    sealed: bool

    def load(self) -> dict[str, Any] | None: ...
    def save(self, state: dict[str, Any]) -> None: ...


class Tuned(Protocol):
    """Where the steps of tasks are kept for other runs, by a hash of all they depend on; `retain.run.store` gives one."""

    def load(self, key: str) -> dict[str, Any] | None: ...
    def save(self, key: str, state: dict[str, Any]) -> None: ...


BETWEEN = ("batch_mix", "loss", "grads", "after_step")
"""The hooks that act between a task's first and last step. Without them the steps do not depend on the method."""


def fit(
    model: Model,
    method: Method,
    ctx: Context,
    optim: Optim,
    engine: Engine | None = None,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    tuned: Tuned | None = None,
    stop: Stop | None = None,
) -> FitStats:
    """Train one task (`ctx.task`), hooks included, and leave the model with the method's mix switched on.

    With `checkpoints` it continues after the last one, bit for bit as if nothing had happened. The caller
    gives it bank and method as they were before the task: the hooks that come before the first step run again
    (they draw from `ctx.rng` only), then the saved state replaces theirs. With `tuned`, steps that another run
    has made from the same start are taken from there, and new ones left there. Before each save, and before it
    returns, all adapters and the method's state are looked at: one that is not finite is a RetainError.
    Where checkpoints are saved, `stop` is asked after each step; when it says so in any process, the state is saved
    and `Stopped` raised in all.
    """
    engine, bank = engine or Engine(), model.adapters
    ctx.step, ctx.batch_size, ctx.turns = 0, optim.batch_size, optim.turns
    ctx.micro_size, ctx.checkpointing = micro_size(optim, engine), partial(_checkpointing, model, optim)
    ctx.before = _before(method, ctx)
    settings = digest(method.config())
    bank.mix = answer(method, "adapt", method.adapt(ctx))
    method.begin_task(ctx)
    examples = answer(method, "data", method.data(ctx, ctx.task.train))
    rates = {"lr": optim.lr} | ({} if optim.projector_lr is None else {"projector_lr": optim.projector_lr})
    watchman = Watchman(ctx, method, rates)
    watchman.look("before its first step")  # also refuses a state that could not be continued
    ctx.n_steps = n_steps = optim.n_steps(len(examples))
    if not len(examples) or not n_steps:
        raise RetainError(
            f"task {ctx.task.name!r}: nothing to train on ({len(examples)} examples, {n_steps} steps)"
        )
    parameters = list(bank.trainable().values())
    if not parameters:
        raise RetainError(f"task {ctx.task.name!r}: method {method.name!r} trains no adapter")
    optimizer = make_optimizer(model, optim)
    order = batches(model, examples, ctx, optim, n_steps)
    saved = checkpoints.load() if checkpoints else None
    key = None if saved or not tuned else tuned_key(model, method, ctx, examples, optim, engine)
    kept = tuned.load(key) if tuned and key else None
    if engine.world > 1 and not all(engine.gather(kept is not None)):
        kept = None
    if kept:
        stats = _reuse(kept, model, ctx)
    else:
        stats = FitStats() if saved is None else _restored(saved, model, method, optimizer, checkpoints)
    if saved:
        watchman.look(f"in its checkpoint after step {stats.steps}", optimizer)
        watchman.kept = f"its checkpoint after step {stats.steps}"
    stats.trainable_parameters = sum(p.numel() for p in parameters)
    stats.trained = sorted({key.split("/", 1)[0] for key in bank.trainable()})
    started = time.perf_counter() - stats.seconds
    losses, every, log, told = list[Tensor](), optim.checkpoint_every, ctx.log, list[dict[str, Any]]()
    ctx.log = partial(_log_and_keep, log, told)
    patience = stop if stop and every and checkpoints else None
    with _training(model, optim), patience or nullcontext():
        for step in range(stats.steps, n_steps):
            ctx.step = step
            _seed_dropout(ctx, engine.rank, model.device)  # of the step: a resume needs no generator state
            optimizer.zero_grad(set_to_none=True)  # here, not at the end: after_step reads .grad
            loss, n_tokens = _backward(model, method, ctx, examples, order[step], optim, engine)
            losses.append(loss)
            engine.sum_grads(parameters)
            if optim.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, optim.max_grad_norm)
            method.grads(ctx)
            for group in optimizer.param_groups:
                group["lr"] = ctx.rates[group["name"]] = group["top_lr"] * optim.rate(step, n_steps)
            optimizer.step()
            method.after_step(ctx)
            stats.steps, stats.samples = step + 1, stats.samples + len(order[step])
            stats.tokens += n_tokens
            asked = patience is not None and any(engine.total(float(patience())))
            save = asked or (every and stats.steps % every == 0 and stats.steps < n_steps)
            if save or stats.steps == n_steps or stats.steps % optim.log_every == 0:
                stats.last_loss = _flush(
                    losses, ctx, engine, optimizer, watchman
                )  # first: saved steps are finite
                on_step(stats.steps, stats.last_loss)
            if save and checkpoints:
                watchman.look(f"after step {stats.steps} of {n_steps}", optimizer)
                stats.seconds = time.perf_counter() - started
                checkpoints.save(_snapshot(stats, model, method, optimizer))
                watchman.kept = f"its checkpoint after step {stats.steps}"
            if asked:
                engine.wait()  # a process that leaves early has the launcher end the one that saves
                raise Stopped(
                    f"a checkpoint of task {ctx.task.name!r} is saved after step {stats.steps} of {n_steps}"
                )
    optimizer.zero_grad(set_to_none=True)
    ctx.log = log
    watchman.look(f"after its last step ({n_steps}{', taken from the folder of reuse' if kept else ''})")
    stats.peak_memory_bytes = max(stats.peak_memory_bytes, peak_memory(model.device))
    if tuned and key and not kept and engine.main:
        stats.seconds = time.perf_counter() - started
        adapters = {name: bank.state(name) for name in stats.trained}
        tuned.save(key, {"stats": asdict(stats), "adapters": adapters, "events": told})
    method.end_task(ctx)
    watchman.look(f"in end_task of {' or '.join(method.owns('end_task')) or method.name}")
    if digest(method.config()) != settings:
        raise RetainError(
            f"method {method.name!r}: a hyper-parameter changed while task {ctx.task.name!r} was learned; what changes "
            "is state: declare it with field(init=False, …), or a continued run would start from the recipe's value"
        )
    stats.seconds = time.perf_counter() - started
    return stats


def tuned_key(
    model: Model, method: Method, ctx: Context, examples: Examples, optim: Optim, engine: Engine
) -> str | None:
    """A hash of all that the steps of this task depend on: base, adapters that are on or train, examples, seed.

    None where a part of the method acts between the steps, or the mix is per sample. The adapters' names count
    too. Threads, devices and the version of torch count because they change the last bits.
    """
    if any(part.owns(hook) for part in method.parts for hook in BETWEEN):
        return None
    bank = model.adapters
    on = sorted({*bank.mix.names, *(k.split("/", 1)[0] for k in bank.trainable())})
    how = {k: v for k, v in written(optim).items() if k not in ("checkpoint_every", "log_every")}
    where = [engine.world, str(model.device), torch.get_num_threads(), torch.__version__]
    return digest(
        [model.fingerprint(), bank.signature, bank.mix.to_json(), {n: bank.state(n) for n in on}, list(bank.trainable()),
         examples, ctx.task.name, ctx.seed, how, where]
    )  # fmt: skip


def _log_and_keep(log: Callable[..., None], told: list[dict[str, Any]], **fields: Any) -> None:
    told.append(fields)
    log(**fields)


def _reuse(kept: Mapping[str, Any], model: Model, ctx: Context) -> FitStats:
    """The end of another run's steps: its adapters, what it logged, what it took."""
    for name, state in kept["adapters"].items():
        model.adapters.load(name, state)
    ctx.log(kind="reused", task=ctx.task.name)
    for event in kept["events"]:
        ctx.log(**event)
    return FitStats(**{**kept["stats"], "reused": True})


def make_optimizer(model: Model, optim: Optim) -> torch.optim.Optimizer:
    """AdamW over the trainable tensors, one group per learning rate; the schedule scales `top_lr`."""
    groups: dict[str, list[Tensor]] = {}
    for key, p in model.adapters.trainable().items():
        groups.setdefault(model.adapters.group(key), []).append(p)
    rates = {"projector": optim.lr if optim.projector_lr is None else optim.projector_lr}
    return torch.optim.AdamW(
        [
            {"params": ps, "lr": 0.0, "top_lr": rates.get(name, optim.lr), "name": name}
            for name, ps in groups.items()
        ],
        betas=(optim.beta1, optim.beta2),
        weight_decay=optim.weight_decay,
        fused=True,
    )


@contextmanager
def _training(model: Model, optim: Optim) -> Iterator[None]:
    """Training mode, gradient checkpointing if asked for, and the global generator given back as it was."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.train(True)
        try:
            with _checkpointing(model, optim):
                yield
        finally:
            model.train(False)


@contextmanager
def _checkpointing(model: Model, optim: Optim) -> Iterator[None]:
    """Gradient checkpointing if asked for, also where dropout is off: for the passes that methods make themselves.

    transformers checkpoints a layer that is in training mode. That flag is set on the layers alone and not on what is
    in them, where dropout and its probabilities are read.
    """
    hf = getattr(model, "hf", None)
    if not optim.grad_checkpointing:
        yield
        return
    if hf is None:
        raise RetainError("optim.grad_checkpointing: this model is no Hugging Face model and cannot")
    # non-reentrant: adapters get gradients although the block inputs need none
    hf.gradient_checkpointing_enable({"use_reentrant": False})
    alone = [] if hf.training else [m for m in hf.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in alone:
        layer.training = True
    try:
        yield
    finally:
        for layer in alone:
            layer.training = False
        hf.gradient_checkpointing_disable()


def _before(method: Method, ctx: Context) -> Callable[[Batch], Mix] | None:
    """How the model answers before the task: its router as it is now, or its mix. None where no part asks."""
    if not any(part.asks_before for part in method.parts):
        return None
    mix, routers = ctx.model.adapters.mix, [p for p in method.parts if p.owns("route")]
    router = copy.deepcopy(routers[0]) if routers else method  # `adapt` may change what it goes by
    return lambda batch: router.route(ctx, batch) or mix


def _backward(
    model: Model,
    method: Method,
    ctx: Context,
    examples: Examples,
    rows: list[int],
    optim: Optim,
    engine: Engine,
) -> tuple[Tensor, int]:
    """The gradients of a step; this process's part of its answer loss and the method's term (2,), and its tokens."""
    micros, bank = _micros(model, examples, rows, optim, engine), model.adapters
    mixes = [method.batch_mix(ctx, b) or bank.mix for b in micros]
    n_answer, n_tokens = engine.total(sum(b.n_answer for b in micros), _tokens(bank, micros, mixes))
    loss = torch.zeros(2, device=model.device)
    for batch, mix in zip(micros, mixes, strict=True):
        with bank.using(mix):  # the backward too: checkpointed layers run again in it
            with autocast(model.device, optim.precision):
                out = model(batch)
                term = answer(method, "loss", method.loss(ctx, batch, out))
                both = torch.stack([out.loss, torch.as_tensor(term, device=model.device)])
            shares = both * (batch.n_answer / n_answer)
            shares.sum().backward()  # type: ignore[no-untyped-call]
        loss += shares.detach()
    return loss, int(n_tokens)


def micro_size(optim: Optim, engine: Engine) -> int:
    """How many samples a forward of this process takes."""
    return max(1, math.ceil(optim.batch_size / optim.accumulate / engine.world))


def _micros(model: Model, examples: Examples, rows: list[int], optim: Optim, engine: Engine) -> list[Batch]:
    """This process's micro-batches of a step; none where a short last batch has no sample left for it."""
    mine, size = rows[engine.rank :: engine.world], micro_size(optim, engine)
    parts = [mine[i : i + size] for i in range(0, len(mine), size)]
    return [model.collate([examples[i] for i in part], answers=True, turns=optim.turns) for part in parts]


def _tokens(bank: AdapterBank, batches: Sequence[Batch], mixes: Sequence[Mix]) -> int:
    """Tokens of a step, soft prompts included."""
    total = 0
    for batch, mix in zip(batches, mixes, strict=True):
        mask = batch.inputs.get("attention_mask")
        total += int(batch.inputs["input_ids"].numel() if mask is None else mask.sum())
        total += tokens_in_front(bank, mix, len(batch))
    return total


def _seed_dropout(ctx: Context, rank: int, device: torch.device) -> None:
    """Seed what dropout draws from (`torch.manual_seed` asks every kind of device: 80 times as long)."""
    text = f"{ctx.seed}/{ctx.task.name}/dropout/{ctx.step}/{rank}".encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _flush(
    losses: list[Tensor], ctx: Context, engine: Engine, optimizer: torch.optim.Optimizer, watchman: Watchman
) -> float:
    """Log the answer losses and the method's terms since the last flush: the only host sync."""
    n = len(losses)
    values = engine.total(*torch.stack(losses, dim=1).flatten().tolist())
    losses.clear()
    answer, terms = values[:n], values[n:]
    first = ctx.step + 1 - n
    bad = next(
        (
            i
            for i, (a, t) in enumerate(zip(answer, terms, strict=True), first + 1)
            if not math.isfinite(a + t)
        ),
        None,
    )
    if bad is not None:
        raise RetainError(watchman.told(f"the loss is not finite at step {bad}"))
    rates = {str(g["name"]): g["lr"] for g in optimizer.param_groups}
    method = {"method": terms[-1]} if any(terms) else {}
    ctx.log(
        kind="step",
        task=ctx.task.name,
        step=ctx.step + 1,
        loss=answer[-1],
        losses=answer,
        first=first,
        lr=rates,
        **method,
    )
    return answer[-1]


def _snapshot(
    stats: FitStats, model: Model, method: Method, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    adapters = {name: model.adapters.state(name) for name in model.adapters.names}
    state = {"adapters": adapters, "method": method.state_dict(), "optimizer": optimizer.state_dict()}
    return {"stats": asdict(stats), **state}


def _restored(
    saved: Mapping[str, Any],
    model: Model,
    method: Method,
    optimizer: torch.optim.Optimizer,
    checkpoints: Checkpoints | None,
) -> FitStats:
    """Go on from a checkpoint. RetainError with its folder where it does not fit what is trained."""
    try:
        if checkpoints and not checkpoints.sealed and (wrong := wrong_kinds(method, saved["method"])):
            raise RetainError(f"not written by retain, or edited: {wrong}")
        return _restore(saved, model, method, optimizer)
    except RetainError as error:
        at = checkpoints.path if checkpoints else "the checkpoint"
        raise RetainError(f"{at}: {error}; remove it to train this task from its start") from error


def _restore(
    saved: Mapping[str, Any], model: Model, method: Method, optimizer: torch.optim.Optimizer
) -> FitStats:
    for name, state in saved["adapters"].items():
        model.adapters.load(name, state)
    method.load_state_dict(saved["method"])
    slots, own = saved["optimizer"].get("state"), optimizer.state_dict()  # the rest of it is said by `optim`
    if not is_of(slots, dict[int, dict[str, Tensor]]):
        raise RetainError("not the state of an optimizer")
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        shapes = {key: t.shape for key, t in slots.get(i, {}).items()}
        if shapes and shapes != {"step": torch.Size([]), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
            raise RetainError(f"the state of the optimizer does not fit tensor {i} of shape {tuple(p.shape)}")
    optimizer.load_state_dict({**own, "state": slots})
    return FitStats(**saved["stats"])
