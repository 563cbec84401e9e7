"""Trains the pocket base model from scratch on a CPU: a tower, a language model, then a LLaVA of both.

    RUN="python -m retain.pocket.pretrain --out DIR"
    $RUN --stage tower --minutes 16 --ranks 2   # which words are marked at each patch
    $RUN --stage text  --minutes 8              # text exercises
    $RUN --stage joint --minutes 73 --ranks 2   # the LLaVA
    $RUN --stage guide --minutes 2              # a CLIP text tower, fitted to the final image tower
    $RUN --stage export --to WEIGHTS

Each stage saves its state every few minutes and goes on from it when started again. The learning rate
follows elapsed time, so a stage takes the minutes it is given on any machine; the data follow the seed. The
README beside the weights says how the shipped ones were made.

LLaVA first aligns its projector with image-caption pairs (Liu et al. 2023, arXiv:2304.08485). Here the same
is done more directly: a projected patch is drawn to the sum of the embeddings of the words that it shows.
"""

# B images, N answer tokens, V vocabulary

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from retain.pocket import lessons
from retain.pocket.batches import (
    Encoder,
    Packed,
    clip_batch,
    joint_batch,
    mark_tokens,
    text_batch,
    tower_batch,
)
from retain.pocket.build import IMAGE_TOKENS, clip_config, export, llava_config

PREFIX = 1 + IMAGE_TOKENS
MARKS = 0.2
STAGES = ["tower", "text", "joint", "guide"]


class Tower(nn.Module):
    """The image tower with a linear head: which words are marked at each patch, and in the whole picture."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_model = CLIPVisionModel(CLIPVisionConfig(**clip_config()["vision_config"]))
        self.head = nn.Linear(128, len(lessons.mark_words()))
        nn.init.constant_(self.head.bias, -4.0)

    def forward(self, pixel: Tensor, target: Tensor) -> Tensor:
        """Binary cross entropy with target (B, 26, words): sum over words, mean over all tokens."""
        seen = self.vision_model(pixel, output_hidden_states=True).hidden_states[-1]
        return marked(self.head(seen), target)


def marked(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy, summed over words, mean over pictures and tokens."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / target.shape[:2].numel()


# ---- losses


def look(model: LlavaForConditionalGeneration, batch: Packed) -> Tensor | None:
    """The image tower's output that the projector reads, class token first: (B, 26, 128)."""
    if batch.pixels is None:
        return None
    states = model.model.vision_tower(batch.pixels, output_hidden_states=True).hidden_states
    seen: Tensor = states[model.config.vision_feature_layer]
    return seen


def logits_of(
    model: LlavaForConditionalGeneration, batch: Packed, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (N, V) at the positions that predict an answer token, and those tokens (N,)."""
    core = model.model
    x = core.language_model.embed_tokens(batch.ids_BT)
    seen = look(model, batch) if seen is None else seen
    if seen is not None:
        x = torch.cat([x[:, :1], core.multi_modal_projector(seen[:, 1:]), x[:, PREFIX:]], 1)
    hidden = core.language_model(
        inputs_embeds=x, attention_mask=batch.mask_B1TT, position_ids=batch.position_BT, use_cache=False
    ).last_hidden_state
    wanted = batch.labels_BT[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][wanted]), batch.labels_BT[:, 1:][wanted]


def aligned(
    model: LlavaForConditionalGeneration, seen: Tensor, marks: Tensor, tokens: Tensor, blank: int
) -> Tensor:
    """1 - cosine between a projected patch and the sum of the embeddings of the words marked there."""
    table = model.model.language_model.embed_tokens.weight.detach()
    words = table[tokens.clamp(min=0)] * (tokens >= 0)[:, None]
    here = marks[:, 1:] @ words
    here = torch.where((here == 0).all(-1, keepdim=True), table[blank], here)
    return 1 - F.cosine_similarity(model.model.multi_modal_projector(seen[:, 1:]), here, dim=-1).mean()


def joint_loss(
    model: LlavaForConditionalGeneration, batch: Packed, tokens: Tensor, blank: int, see_only: bool
) -> Tensor:
    """Cross entropy of the answers; and on the same pictures the tower's lesson and the alignment.

    `see_only` leaves the language model out: so the stage begins, until patches look like what they show.
    """
    seen = look(model, batch)
    if seen is None or batch.marks is None:
        return F.cross_entropy(*logits_of(model, batch, seen))
    loss = aligned(model, seen, batch.marks, tokens, blank)
    loss = loss + MARKS * marked(cast(nn.Module, model.marks_head)(seen), batch.marks)
    return loss if see_only else loss + F.cross_entropy(*logits_of(model, batch, seen))


def contrast(model: CLIPModel, enc: Encoder, pixel: Tensor, ids: Tensor, equal: Tensor) -> Tensor:
    """CLIP's symmetric loss; equal captions share the target."""
    out = model(input_ids=ids, pixel_values=pixel, attention_mask=(ids != enc.pad).long())
    target = equal / equal.sum(1, keepdim=True)
    per_image = out.logits_per_image
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_image.T, target)) / 2


@torch.no_grad()
def examine(model: LlavaForConditionalGeneration, enc: Encoder, size: int = 24) -> dict[str, float]:
    """Exact match per lesson on fresh draws (teacher-forced), in percent."""
    result = {}
    for name in lessons.LESSONS:
        batch = joint_batch(enc, np.random.default_rng(99), size, name)
        logits, labels = logits_of(model, batch)
        ends = (labels == enc.end).nonzero().flatten().tolist()
        right = logits.argmax(-1) == labels
        starts = [0, *[e + 1 for e in ends[:-1]]]
        hits = [bool(right[a : e + 1].all()) for a, e in zip(starts, ends, strict=True)]
        result[name] = round(100 * sum(hits) / len(hits), 1)
    return result


# ---- loop


@dataclass
class Clock:
    """Elapsed training seconds over all starts, as a share of the stage."""

    minutes: float
    before: float = 0.0
    started: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds trained so far."""
        return self.before + time.monotonic() - self.started

    @property
    def share(self) -> float:
        """0 at the start of a stage, 1 at its end."""
        return self.seconds / (60 * self.minutes)


def rate(share: float, peak: float) -> float:
    """Linear warm-up over 2 %, then a cosine to 2 % of the peak."""
    if share < 0.02:
        return peak * (share / 0.02)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - 0.02) / 0.98))))


def optimiser(model: nn.Module, peak: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    The rate matters more than anything else here. A step has only some 300 answer tokens; at 1e-3 and above
    the language model never learned to look at the picture (the projector's output grew to 300 times the
    embeddings' scale, the same for all pictures), at 4e-4 it did within a hundred steps.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=peak,
        betas=(0.9, 0.99),
        fused=True,
    )


def average(params: list[nn.Parameter], share: float, ranks: int) -> float:
    """Mean gradient over the ranks in one message; the clocks go along, so that all ranks stop together."""
    if ranks == 1:
        return share
    import torch.distributed as dist

    flat = torch.cat([p.grad.flatten() for p in params if p.grad is not None] + [torch.tensor([share])])
    dist.all_reduce(flat)
    flat /= ranks
    at = 0
    for p in params:
        if p.grad is not None:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()
    return float(flat[-1])


def keep(path: Path, model: nn.Module, optim: torch.optim.AdamW, step: int, seconds: float) -> None:
    """Weights, moments and clock, written aside and renamed."""
    state = {f"model.{k}": v.contiguous().clone() for k, v in model.state_dict().items()}
    for i, p in enumerate(p for g in optim.param_groups for p in g["params"]):
        for k, v in optim.state.get(p, {}).items():
            state[f"optim.{i}.{k}"] = torch.as_tensor(v).contiguous().clone()
    aside = path.with_suffix(".part")
    save_file(state, aside, {"step": str(step), "seconds": str(seconds)})
    aside.replace(path)


def resume(path: Path, model: nn.Module, optim: torch.optim.AdamW) -> tuple[int, float]:
    """Go on from `keep`; (0, 0.0) where there is nothing yet."""
    if not path.is_file():
        return 0, 0.0
    state = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    for i, p in enumerate(p for g in optim.param_groups for p in g["params"]):
        optim.state[p] = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"optim.{i}.")}
    return clock_of(path)


def clock_of(path: Path) -> tuple[int, float]:
    """Steps and seconds trained so far, from the header of a kept state."""
    if not path.is_file():
        return 0, 0.0
    with safe_open(path, "pt") as handle:
        meta = handle.metadata()
    return int(meta["step"]), float(meta["seconds"])


def train(
    model: nn.Module, losses: Iterator[Tensor], args: argparse.Namespace, path: Path, enc: Encoder, rank: int
) -> None:
    """Steps until the stage's minutes are spent."""
    params = [p for p in model.parameters() if p.requires_grad]
    optim = optimiser(model, args.rate)
    step, before = resume(path, model, optim)
    clock = Clock(args.minutes, before, time.monotonic())
    share, saved, shown = clock.share, clock.seconds, 0.0
    while share < 1:
        for group in optim.param_groups:
            group["lr"] = rate(share, args.rate)
        optim.zero_grad(set_to_none=True)
        loss = next(losses)
        loss.backward()
        share = average(params, clock.share, args.ranks)
        nn.utils.clip_grad_norm_(params, 1.0)
        optim.step()
        step += 1
        shown = 0.98 * shown + 0.02 * float(loss.detach()) if shown else float(loss.detach())
        if rank == 0 and step % 50 == 0:
            note: dict[str, Any] = {
                "step": step,
                "share": round(share, 4),
                "s": round(clock.seconds),
                "loss": round(shown, 4),
            }
            if isinstance(model, LlavaForConditionalGeneration) and args.stage == "joint" and step % 500 == 0:
                note |= examine(model, enc)
            print(json.dumps(note), flush=True)  # noqa: T201
        if rank == 0 and clock.seconds - saved > args.save_every:
            keep(path, model, optim, step, clock.seconds)
            saved = clock.seconds
    if rank == 0:
        keep(path, model, optim, step, clock.seconds)


def stage(rank: int, args: argparse.Namespace) -> None:
    """Run one stage in this process."""
    torch.set_num_threads(1)
    if args.ranks > 1:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", init_method=f"file://{args.out}/rendezvous", rank=rank, world_size=args.ranks
        )
    enc = Encoder()
    path = args.out / f"{args.stage}.safetensors"
    rng = np.random.default_rng([args.seed, rank, STAGES.index(args.stage), clock_of(path)[0]])
    torch.manual_seed(args.seed)
    model: Any
    if args.stage == "tower":
        model = Tower()
        if args.init and not path.is_file():
            prefix = "model.model.vision_tower."
            old = load_file(args.init)
            model.vision_model.load_state_dict(
                {k[len(prefix) :]: v for k, v in old.items() if k.startswith(prefix)}
            )
        losses = (model(*tower_batch(rng, args.batch)) for _ in count())
    elif args.stage == "guide":
        model = clip_for(args)
        losses = (contrast(model, enc, *clip_batch(enc, rng, args.batch)) for _ in count())
    else:
        model = llava_for(args)
        start = clock_of(path)[0]
        made = (
            text_batch(enc, rng, args.batch)
            if args.stage == "text"
            else joint_batch(
                enc, rng, args.batch * (3 if step < args.see_steps else 1), direct=step < args.direct_steps
            )
            for step in count(start)
        )
        tokens, blank = mark_tokens(enc), enc("paper")[0]
        losses = (
            joint_loss(model, batch, tokens, blank, step < args.see_steps)
            for step, batch in zip(count(start), made, strict=False)
        )
    model.train()
    train(model, losses, args, path, enc, rank)


def clip_for(args: argparse.Namespace) -> CLIPModel:
    """A fresh tiny CLIP around the joint stage's image tower, which stays as it is but for its last norm."""
    model = CLIPModel(CLIPConfig(**clip_config()))
    start = "model.model.vision_tower."
    tower = load_file(args.out / "joint.safetensors")
    model.vision_model.load_state_dict({k[len(start) :]: v for k, v in tower.items() if k.startswith(start)})
    model.vision_model.requires_grad_(False)
    model.vision_model.post_layernorm.requires_grad_(True)
    return model


def llava_for(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """The tiny LLaVA; for `joint` with the tower of `tower` and the language model of `text`."""
    model = LlavaForConditionalGeneration(LlavaConfig(**llava_config()))
    if args.stage == "joint":  # a head that only training uses; `export` leaves it out
        model.marks_head = nn.Linear(128, len(lessons.mark_words()))
    if args.stage == "text":
        if args.init:
            old = load_file(args.init)
            model.load_state_dict({k[6:]: v for k, v in old.items() if k.startswith("model.")})
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(False)
    elif not (args.out / "joint.safetensors").is_file():
        text = load_file(args.out / "text.safetensors")
        tower = load_file(args.out / "tower.safetensors")
        state = {k[6:]: v for k, v in text.items() if k.startswith("model.")}
        for k, v in tower.items():
            if k.startswith("model.vision_model."):
                state["model.vision_tower." + k.removeprefix("model.vision_model.")] = v
            elif k.startswith("model.head."):
                state["marks_head." + k.removeprefix("model.head.")] = v
        model.load_state_dict(state)
    return model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=[*STAGES, "export"], required=True)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--init", type=Path, help="a state of `joint` that `tower` and `text` begin from")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--see-steps", type=int, default=400, help="joint: steps without the language model")
    parser.add_argument(
        "--direct-steps", type=int, default=800, help="joint: steps without yes/no and letters"
    )
    parser.add_argument("--save-every", type=float, default=120)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.batch = args.batch or {"tower": 64, "text": 32, "joint": 12, "guide": 128}.get(args.stage)
    args.rate = args.rate or {"tower": 8e-4, "text": 4e-4, "joint": 4e-4, "guide": 1e-3}.get(args.stage)
    if args.stage == "export":
        export(args.out, args.to)
    elif args.ranks > 1:
        (args.out / "rendezvous").unlink(missing_ok=True)
        from torch.multiprocessing.spawn import spawn

        spawn(stage, (args,), args.ranks)
    else:
        stage(0, args)


if __name__ == "__main__":
    main()
