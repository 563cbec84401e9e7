"""CoFiMA: the model before and after a task are averaged, each entry weighed by its Fisher information.

Marouf et al., "Weighted Ensemble Models Are Strong Continual Learners", ECCV 2024 (arXiv 2312.08977):

    avg_t = [(1 - lam) F_{t-1} avg_{t-1} + lam F_t theta_t] / [(1 - lam) F_{t-1} + lam F_t]

F_t: mean over mini-batches of the squared gradient of the mean answer loss, at theta_t, on task t's data. Only
the last two count; the authors do not accumulate. Where both are 0 it is CoMA. The first task has nothing
before it, and `lam: 1` is off, bit for bit.

LoRA: averaging A and B is not averaging B A. `space: deltas` (default) takes the Fisher of the weight change
itself, a matrix of the layer's size, and truncates the average to the bank's rank (error logged); `space:
factors` is the cheap approximation on A and B.

Differs from the released code: Fishers are not clipped at 1e-4, which makes the method CoMA wherever every F
is larger; `clip: 0.99` clips at that quantile of each tensor. No classifier is re-trained on class Gaussians,
to which the release owes part of its accuracy: a generative model has none. New tensors are copied plainly.
"""

# O out features, I in features, M rows (batch x tokens)

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

import retain.methods._merging as merging
from retain.adapters.lora import LoraLinear
from retain.merge.axes import nth_smallest
from retain.merge.base import merger
from retain.method import FULL_PARAMS, Context, Method, register
from retain.methods._parts import micro_batches, take, trained_names
from retain.models.base import Model
from retain.stream import Stream
from retain.types import RetainError
from retain.values import Count, Share


@register
@dataclass
class CoFiMA(Method):
    """Fisher-weighted averaging of consecutive models. Stands after the part that owns the adapter."""

    name: ClassVar[str] = "cofima"
    about: ClassVar[str] = "before and after each task averaged, entries weighed by Fisher information"
    source: ClassVar[str] = "arXiv:2312.08977"
    needs: ClassVar[frozenset[str]] = frozenset({FULL_PARAMS})
    roles: ClassVar[Mapping[str, str]] = {"end_task": "rewrites"}

    lam: Share = 0.4
    n_samples: Count = 256
    space: Literal["deltas", "factors"] = "deltas"
    clip: Annotated[float, Field(gt=0, le=1)] = 1.0

    before: dict[str, Tensor] = field(init=False, default_factory=dict)  # the adapter before the task
    fisher: dict[str, Tensor] = field(init=False, default_factory=dict)  # F_{t-1}, by the merged state's keys

    def check(self, model: Model, stream: Stream) -> None:
        merging.check_sites(model.adapters, "cofima")

    def begin_task(self, ctx: Context) -> None:
        names = trained_names(ctx.model.adapters)
        if len(names) != 1:
            raise RetainError(f"cofima: one adapter must train, but {names} do")
        self.before = merging.learned(ctx.model.adapters).get(names[0], {})

    def end_task(self, ctx: Context) -> None:
        if self.lam == 1:
            return
        bank, (name,) = ctx.model.adapters, trained_names(ctx.model.adapters)
        new = {k: self._clipped(F) for k, F in self._fisher(ctx, name).items()}
        if self.before and self.lam == 0:
            merging.load_changes(bank, name, self.before)
        elif self.before:
            old = {k: F.to(ctx.model.device) for k, F in self.fisher.items()}
            merged = merger("fisher").run(
                [self.before, merging.changes(bank, name)],
                [1 - self.lam, self.lam],
                fishers=[old, new],
                keep="svd",
                rank=merging.rank(bank),
                names=["before", "after"],
            )
            merging.load_merged(bank, name, merged)
            ctx.log(kind="merge", task=ctx.task.name, merger="cofima", **merging.told(merged))
        self.before, self.fisher = {}, new

    def _clipped(self, F: Tensor) -> Tensor:
        n = F.numel()
        return F if self.clip == 1 else F.clamp(max=nth_smallest(F, min(n - 1, int(self.clip * n))))

    def _fisher(self, ctx: Context, name: str) -> dict[str, Tensor]:
        """Mean over batches of squared gradients; of `path.weight` for LoRA in `deltas`, else of every tensor."""
        bank = ctx.model.adapters
        live = bank.parameters(name)
        dense = {k for k in live if self.space == "deltas" and k.endswith((".lora_A", ".lora_B"))}
        sums = {k: torch.zeros_like(p, dtype=torch.float32) for k, p in live.items() if k not in dense}
        rows = take(len(ctx.task.train), self.n_samples, ctx.rng("cofima"))
        starts = range(0, len(rows), ctx.batch_size)
        for i in starts:
            found: dict[str, Tensor] = {}  # gradients of the batch, over its micro-batches
            for batch, share in micro_batches(ctx, ctx.task.train, rows[i : i + ctx.batch_size]):
                with ctx.checkpointing(), self._weight_gradients(ctx, found):
                    loss = ctx.model(batch).loss * share
                    grads = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
                for k, g in zip(live, grads, strict=True):
                    if g is not None and k not in dense:
                        found[k] = found[k] + g.float() if k in found else g.float()
            for k, g in found.items():
                sums[k] = sums.get(k, torch.zeros_like(g)) + g.square()
        return {k: v / len(starts) for k, v in sums.items()}

    @contextmanager
    def _weight_gradients(self, ctx: Context, found: dict[str, Tensor]) -> Iterator[None]:
        """Within the block a backward adds dL/dW (O, I) of every LoRA layer to `found`: the sum over rows of dy x^T."""
        if self.space == "factors":
            yield
            return

        def watch(path: str) -> Any:
            def forward(_: Any, args: Any, y: Tensor) -> None:
                x_MI = args[0].detach().reshape(-1, args[0].shape[-1]).float()

                def backward(dy: Tensor) -> None:
                    grad = dy.reshape(-1, dy.shape[-1]).float().T @ x_MI
                    key = f"{path}.weight"
                    found[key] = found[key] + grad if key in found else grad

                if y.requires_grad:
                    y.register_hook(backward)

            return forward

        bank = ctx.model.adapters
        layers = [(path, s) for path, s in bank.sites.items() if isinstance(s, LoraLinear)]
        hooks = [site.register_forward_hook(watch(path)) for path, site in layers]
        try:
            with bank.reading(lambda path, x: None):  # every layer as a module of its own
                yield
        finally:
            for hook in hooks:
                hook.remove()
