"""A model of a thousand weights that is fast enough for a battery: real sites, real bank, hashed words.

The context of a token is the running mean of what came before it, so it is causal, and padding cannot matter.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain.adapters.kinds import Spec, attach
from retain.adapters.lora import LoraSpec
from retain.adapters.prompt import prompts_of
from retain.method import Context
from retain.stream import Stream, Task
from retain.types import Batch, Example, Guide, Message, Output, digest

EOS, PAD, ANSWERS, VOCAB, WIDTH, PIXELS = 0, 1, 20, 48, 12, 3


def word_id(word: str) -> int:
    """`a7` is answer word 7; every other word is hashed."""
    if word[:1] == "a" and word[1:].isdigit():
        return 2 + int(word[1:]) % ANSWERS
    return 2 + ANSWERS + zlib.crc32(word.encode()) % (VOCAB - 2 - ANSWERS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(PIXELS, WIDTH)
        self.language = nn.Module()
        self.language.embed = nn.Embedding(VOCAB, WIDTH)
        self.language.layers = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH)}) for _ in range(2)]
        )


class FakeModel(nn.Module):
    """The `Model` protocol on a thousand weights."""

    def __init__(self, spec: Spec | None = None) -> None:
        super().__init__()
        net, rng = Net(), torch.Generator().manual_seed(5)
        for p in net.parameters():
            p.data = torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5
        self.probe_image = torch.randn(PIXELS, 5, generator=rng)
        self.probe_text = torch.randn(VOCAB, 7, generator=rng)
        self.net = net
        self.adapters = attach(
            net, spec or LoraSpec(rank=2, alpha=4.0), language="language", projector=("projector",),
            embed=net.language.embed, width=lambda: 5 + 7,
        )  # fmt: skip
        self.n_layers = 2
        self.device = torch.device("cpu")

    def length(self, example: Example) -> int:
        return len(self._prompt(example)) + len(example.answer.split()) + 1

    def _prompt(self, example: Example) -> list[int]:
        return [word_id(w) for m in example.prompt for w in m.text.split()]

    def collate(self, examples: Sequence[Example], *, answers: bool, turns: str = "all") -> Batch:
        rows, labels = [], []
        for e in examples:
            prompt = self._prompt(e)
            answer = [word_id(w) for w in e.answer.split()] + [EOS] if answers else []
            rows.append(prompt + answer)
            labels.append([-100] * len(prompt) + answer)
        longest = max(map(len, rows))
        ids = torch.tensor([r + [PAD] * (longest - len(r)) for r in rows])
        labels_BT = torch.tensor([r + [-100] * (longest - len(r)) for r in labels]) if answers else None
        pixels = torch.tensor(np.array([self._pixels(e) for e in examples]))
        inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixels": pixels}
        return Batch(tuple(examples), inputs, labels_BT, torch.arange(len(rows)))

    @staticmethod
    def _pixels(e: Example) -> np.ndarray:
        return (
            np.asarray(e.images[0], dtype=np.float32).mean((0, 1)) / 255
            if e.images
            else np.zeros(PIXELS, np.float32)
        )

    def hidden(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        with self.adapters.images(torch.arange(len(ids))):
            x = self.net.language.embed(ids) * mask[..., None]
            x = torch.cat([x[:, :1] + self.net.projector(pixels)[:, None], x[:, 1:]], dim=1)
            site, first = prompts_of(self.adapters), torch.ones(len(ids), dtype=torch.long)
            places = site.places(self.adapters.mix, mask.long(), first, left=False) if site else None
            if site and places:  # behind the first token, which stands for BOS
                x, mask = site.fill(x, places), places.real_BS.float()
            h = x.cumsum(1) / mask.cumsum(1).clamp(min=1)[..., None] + x
            for layer in self.net.language.layers:
                h = h + torch.tanh(layer["up"](h))
            if places:  # back to the columns of the ids
                column = torch.arange(ids.shape[1]) + (torch.arange(ids.shape[1]) > 0) * places.n_B[:, None]
                h = h.gather(1, column.clamp(max=h.shape[1] - 1)[..., None].expand(-1, -1, WIDTH))
        return h @ self.net.language.embed.weight.t()

    def forward(self, batch: Batch) -> Output:
        assert batch.labels_BT is not None
        i = batch.inputs
        logits = self.hidden(i["input_ids"], i["attention_mask"].float(), i["pixels"])[:, :-1]
        target = batch.labels_BT[:, 1:]
        keep = target != -100
        return Output(
            F.cross_entropy(logits[keep], target[keep]), logits[keep], target[keep], keep.nonzero()[:, 0]
        )

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int) -> list[str]:
        bank, texts = self.adapters, []
        for k in range(len(batch)):
            n = int(batch.inputs["attention_mask"][k].sum())
            ids, new = batch.inputs["input_ids"][k : k + 1, :n], list[int]()
            with bank.using(bank.mix.select(torch.tensor([k]))):
                while len(new) < max_new_tokens and EOS not in new:
                    logits = self.hidden(ids, torch.ones(ids.shape), batch.inputs["pixels"][k : k + 1])
                    new.append(int(logits[0, -1].argmax()))
                    ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
            texts.append(" ".join(f"a{t - 2}" for t in new if t != EOS))
        return texts

    def guide(self, batch: Batch) -> Guide:
        texts = [F.normalize(self.probe_text[self._prompt(e)].sum(0), dim=-1) for e in batch.examples]
        image = (
            torch.stack([torch.tensor(self._pixels(e)) for e in batch.examples])[:, :, None]
            * self.probe_image
        )
        return Guide(F.normalize(image.sum(1), dim=-1), torch.stack(texts))

    def fingerprint(self) -> str:
        return digest(
            [
                p.detach()
                for n, p in sorted(self.net.named_parameters())
                if "delta_" not in n and "lora_" not in n
            ]
        )

    def n_parameters(self) -> int:
        return 1000

    def flops_per_token(self) -> float:
        return 2000.0


class Exact:
    name, formula = "exact", "100 if equal"

    def __call__(self, predictions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        return [100.0 * (p == e.answer) for p, e in zip(predictions, examples, strict=True)]


REQUESTS = {
    "colour": "Answer the question using a single word or phrase.",
    "letter": "Choose the letter of the right option.",
    "again": "Answer the question using a single word or phrase.",
}


def example(task: str, i: int) -> Example:
    k = list(REQUESTS).index(task)
    image = np.full((2, 2, PIXELS), 40 * k, dtype=np.uint8) + np.array(
        [i % 3, i % 5, 9 * (i % 4)], dtype=np.uint8
    )
    question = f"{task} thing{i % 4}" + " more" * (i % 3) + f"?\n{REQUESTS[task]}"
    messages = (Message("user", question, 1), Message("assistant", f"a{5 * k + i % 4}"))
    return Example(f"{task}-{i}", messages, (image,))


def stream(n: int = 24) -> Stream:
    """Three tasks; the first and the last have the same instruction."""
    return Stream("fake", tuple(
        Task(t, [example(t, i) for i in range(n)], [example(t, 100 + i) for i in range(5)], Exact(), 2)
        for t in REQUESTS
    ))  # fmt: skip


def context(model: FakeModel | None = None, task: str = "colour", seen: Sequence[str] = ()) -> Context:
    """A context as the loop gives it."""
    s = stream()
    return Context(model or FakeModel(), s.named(task), s, list(seen), seed=0, batch_size=4)
