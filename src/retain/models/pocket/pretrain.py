"""Trains the pocket base model from scratch on a CPU: a tiny CLIP, a tiny Llama, then the LLaVA made of both.

    RUN="python -m retain.models.pocket.pretrain --out DIR"
    $RUN --stage clip  --minutes 10             # image and text tower, contrastive
    $RUN --stage text  --minutes 10             # language model, text exercises
    $RUN --stage joint --minutes 44 --ranks 2   # the LLaVA
    $RUN --stage guide --minutes 4              # the text tower, fitted again to the final image tower
    $RUN --stage export --to WEIGHTS

The first two may run side by side. Each stage saves its state every few minutes and goes on from it when
started again. The learning rate follows elapsed time, so a stage takes the minutes it is given on any
machine; the data follow the seed. The joint stage packs several questions behind one image: every question
sees the image and itself only, at the positions it would have alone, so packing changes the cost and not the
arithmetic.
"""

# B images, Q questions per image, T packed tokens, P prefix tokens (USER: and the image), V vocabulary

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, LlavaConfig, LlavaForConditionalGeneration

from retain.models.pocket import lessons
from retain.models.pocket.build import IMAGE_TOKENS, clip_config, export, llava_config, tokenizer

PREFIX = 1 + IMAGE_TOKENS
MEAN, STD = 0.5, 0.25
DIRECT_STEPS = 600
STAGES = ["clip", "text", "joint", "guide"]


# ---- data


class Encoder:
    """Text to token ids, each string once."""

    def __init__(self) -> None:
        self.tok = tokenizer()
        self.cache: dict[str, list[int]] = {}
        self.user, self.assistant, self.image, self.end, self.pad = map(
            self._id, ("USER:", "ASSISTANT:", "<image>", "</s>", "<pad>")
        )

    def _id(self, token: str) -> int:
        return int(self.tok.token_to_id(token))

    def __call__(self, text: str) -> list[int]:
        if text not in self.cache:
            if len(self.cache) > 200_000:
                self.cache.clear()
            self.cache[text] = self.tok.encode(text, add_special_tokens=False).ids
        return self.cache[text]

    def turn(self, question: str, answer: str) -> tuple[list[int], int]:
        """Question, ASSISTANT:, answer, </s>; and how many tokens of it are to be predicted."""
        said = [*self(answer), self.end]
        return [*self(question), self.assistant, *said], len(said)


@dataclass
class Packed:
    """One packed batch; `labels_BT` is -100 except on answers."""

    ids_BT: Tensor  # noqa: N815
    labels_BT: Tensor  # noqa: N815
    position_BT: Tensor  # noqa: N815
    mask_B1TT: Tensor  # noqa: N815
    pixels: Tensor | None


def pixels(images: list[np.ndarray]) -> Tensor:
    """Canvases as the processor makes them: (B, 3, H, W), mean 0.5 and deviation 0.25."""
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255)
    return x.sub_(MEAN).div_(STD).contiguous()


def pack(enc: Encoder, turns: list[list[lessons.QA]], images: list[np.ndarray] | None) -> Packed:
    """Several turns per row behind one prefix, blind to each other."""
    rows = []
    for qas in turns:
        ids = [enc.user, *([enc.image] * IMAGE_TOKENS if images else [])]
        start = len(ids)
        row: list[list[int]] = [ids, [-100] * start, list(range(start)), [0] * start]
        for k, (question, answer) in enumerate(qas, 1):
            said, n = enc.turn(question, answer)
            row[0] += said
            row[1] += [-100] * (len(said) - n) + said[-n:]
            row[2] += range(start, start + len(said))
            row[3] += [k] * len(said)
        rows.append(row)
    width = max(len(r[0]) for r in rows)
    out = np.zeros((4, len(rows), width), np.int64)
    for i, row in enumerate(rows):
        n = len(row[0])
        out[:, i, :n] = row
        out[:, i, n:] = np.array([enc.pad, -100, 0, -1])[:, None]
    ids, labels, position, segment = torch.from_numpy(out)
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    seen = same & torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -1e9)[:, None]
    return Packed(ids, labels, position, mask, pixels(images) if images else None)


def joint_batch(
    enc: Encoder, rng: np.random.Generator, size: int, name: str | None = None, direct: bool = False
) -> Packed:
    """Images with three questions each and two of text only; of a named lesson, four and none.

    `direct` leaves out yes/no and option letters: an answer says little about the picture, so training begins
    without them.
    """
    turns, images = [], []
    for _ in range(size):
        one = lessons.lesson(rng, name)
        qa = [x for x in one.qa if not (direct and x[1] in {"yes", "no", *lessons.LETTERS})]
        turns.append([qa[int(i)] for i in rng.integers(len(qa), size=3 if name is None else 4)])
        if name is None:
            turns[-1] += [lessons.text(rng), lessons.text(rng)]
        images.append(one.image)
    return pack(enc, turns, images)


def text_batch(enc: Encoder, rng: np.random.Generator, size: int, q: int = 5) -> Packed:
    """Text exercises, and lessons' questions with a random answer of the same lesson (formats, not facts)."""
    return pack(enc, [[lessons.text(rng) for _ in range(q)] for _ in range(size)], None)


def clip_batch(enc: Encoder, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, caption ids ending in </s>, and which captions are equal (B, B)."""
    made = [lessons.lesson(rng) for _ in range(size)]
    texts = []
    for one in made:
        question, answer = one.qa[int(rng.integers(len(one.qa)))]
        texts.append(one.caption if rng.integers(10) < 7 else f"{question} {answer}")
    rows = [[*enc(t), enc.end] for t in texts]
    ids = torch.full((size, max(map(len, rows))), enc.pad)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    _, group = np.unique(texts, return_inverse=True)
    return pixels([m.image for m in made]), ids, torch.from_numpy(group[:, None] == group[None, :])


# ---- losses


def logits_of(model: LlavaForConditionalGeneration, batch: Packed) -> tuple[Tensor, Tensor]:
    """Logits (N, V) at the positions that predict an answer token, and those tokens (N,)."""
    core = model.model
    x = core.language_model.embed_tokens(batch.ids_BT)
    if batch.pixels is not None:
        seen = core.vision_tower(batch.pixels, output_hidden_states=True).hidden_states[
            core.config.vision_feature_layer
        ]
        features = core.multi_modal_projector(seen[:, 1:])
        x = torch.cat([x[:, :1], features, x[:, PREFIX:]], 1)
    hidden = core.language_model(
        inputs_embeds=x, attention_mask=batch.mask_B1TT, position_ids=batch.position_BT, use_cache=False
    ).last_hidden_state
    wanted = batch.labels_BT[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][wanted]), batch.labels_BT[:, 1:][wanted]


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
    if args.stage in ("clip", "guide"):
        model = clip_for(args)
        losses = (contrast(model, enc, *clip_batch(enc, rng, args.batch)) for _ in count())
    else:
        model = llava_for(args)
        start = clock_of(path)[0]
        made = (
            text_batch(enc, rng, args.batch)
            if args.stage == "text"
            else joint_batch(enc, rng, args.batch, direct=step < DIRECT_STEPS)
            for step in count(start)
        )
        losses = (F.cross_entropy(*logits_of(model, batch)) for batch in made)
    model.train()
    train(model, losses, args, path, enc, rank)


def clip_for(args: argparse.Namespace) -> CLIPModel:
    """A fresh tiny CLIP; for `guide`, the earlier one with the joint stage's vision tower, frozen."""
    model = CLIPModel(CLIPConfig(**clip_config()))
    if args.stage == "guide":
        old = load_file(args.out / "clip.safetensors")
        model.load_state_dict({k[6:]: v for k, v in old.items() if k.startswith("model.")})
        tower = load_file(args.out / "joint.safetensors")
        start = "model.model.vision_tower."
        moved = {k.removeprefix(start): v for k, v in tower.items() if k.startswith(start)}
        model.vision_model.load_state_dict({k.removeprefix("vision_model."): v for k, v in moved.items()})
        model.vision_model.requires_grad_(False)
        model.vision_model.post_layernorm.requires_grad_(True)
    return model


def llava_for(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """The tiny LLaVA; for `joint` with the tower of `clip` and the language model of `text`."""
    model = LlavaForConditionalGeneration(LlavaConfig(**llava_config()))
    if args.stage == "text":
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(False)
    elif not (args.out / "joint.safetensors").is_file():
        if (args.out / "text.safetensors").is_file():
            text = load_file(args.out / "text.safetensors")
            model.load_state_dict({k[6:]: v for k, v in text.items() if k.startswith("model.")})
        clip = load_file(args.out / "clip.safetensors")
        start = "model.vision_model."
        tower = {k.removeprefix(start): v for k, v in clip.items() if k.startswith(start)}
        model.model.vision_tower.load_state_dict(tower)
    return model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=[*STAGES, "export"], required=True)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--save-every", type=float, default=120)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.batch = args.batch or {"clip": 128, "text": 32, "joint": 12, "guide": 128}.get(args.stage)
    args.rate = args.rate or {"clip": 1e-3, "text": 4e-4, "joint": 4e-4, "guide": 1e-3}.get(args.stage)
    if args.stage == "export":
        export(args.out, args.to)
    elif args.ranks > 1:
        (args.out / "rendezvous").unlink(missing_ok=True)
        torch.multiprocessing.spawn(stage, (args,), args.ranks)
    else:
        stage(0, args)


if __name__ == "__main__":
    main()
