"""Stacks: every legal one keeps what each of its parts promises (guarantees.py), in whatever order it is listed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import Any, ClassVar

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import tiny
from fake_model import FakeModel, stream
from guarantees import Watch, tensors
from loop_helpers import stream as loop_stream
from retain.adapters.kinds import Spec
from retain.adapters.lora import LoraSpec
from retain.adapters.moe import MoeSpec
from retain.adapters.prompt import PromptSpec
from retain.commands.explain import hook_rows
from retain.method import REGISTRY, Context, Method, Stack, available, build, register
from retain.models.hf import HFModel
from retain.order import APART, ROLES, arranged
from retain.run.train import Optim, fit
from retain.types import Batch, Conflict, Guide, Output, RetainError

OWNERS: dict[str, Any] = {
    "lora": "lora",
    "lora_per_task": {"lora_per_task": {"init": "previous"}},
    "hide": "hide",
    "disco": "disco",
    "instruction_groups": {"instruction_groups": {"init": "previous"}},
    "modal_prompt": "modal_prompt",
    "moe_lora": "moe_lora",
    "o_lora": {"o_lora": {"forward": "current"}},
    "merge_tasks": {"merge_tasks": {"merger": "average"}},
    "lorahub": {"lorahub": {"steps": 4, "shots": 3, "space": "deltas"}},
    "model_tailor": {"model_tailor": {"samples": 3, "sparsity": 0.6}},
}
PARTS: dict[str, Any] = {
    "replay": {"replay": {"size": 5}},
    "ewc": {"ewc": {"n_samples": 5, "anchors": "single", "lam": 10.0}},
    "lwf": "lwf",
    "ema": {"ema": {"beta": 0.7}},
    "llaca": {"llaca": {"first_task": True}},
    "llaca paper": {"llaca": {"variant": "paper"}},
    "llaca bounded": {"llaca": {"variant": "bounded"}},
    "gpm": {"gpm": {"threshold": 0.6, "n_samples": 5}},
    "merge_after_task": {"merge_after_task": {"params": {"new": 0.5}}},
    "cofima": {"cofima": {"n_samples": 6, "lam": 0.5}},
}
OPTIM = Optim(lr=2e-2, steps=3, batch_size=4, accumulate=2, warmup=0.0, weight_decay=0.1)
ADAPTERS: dict[str, Spec] = {
    "lora": LoraSpec(rank=2, alpha=4.0, dropout=0.1),
    "moe": MoeSpec(rank=2, alpha=4.0, dropout=0.1, experts=2),
    "prompt": PromptSpec(tokens=2, at_once=2),
}


def legal(owner: str, parts: tuple[str, ...]) -> Stack | None:
    """The stack, or None where building or checking it is refused."""
    try:
        stack = build([OWNERS[owner], *(PARTS[p] for p in parts)])
        kind = next(p.kinds[0] for p in stack.parts if p.owns("adapt"))
        stack.check(FakeModel(ADAPTERS[kind]), stream())
    except RetainError:
        return None
    return stack if isinstance(stack, Stack) else Stack(stack)


def holds(stack: Stack) -> None:
    """Three tasks with every promise watched."""
    watch = Watch(stack.parts)
    watch.method = Stack(stack, watch)
    kind = next(p.kinds[0] for p in stack.parts if p.owns("adapt"))
    model, s, seen = FakeModel(ADAPTERS[kind]), stream(), list[str]()
    for task in s:
        fit(model, watch.method, Context(model, task, s, list(seen), seed=0), OPTIM)
        seen.append(task.name)


def stacks(owners: list[str], sizes: tuple[int, ...]) -> list[tuple[str, tuple[str, ...]]]:
    return [(o, c) for o in owners for n in sizes for c in combinations(PARTS, n) if legal(o, c)]


def shuffled(owner: str, parts: tuple[str, ...]) -> Stack:
    """The same parts in another order, the owner anywhere among them."""
    names = [owner, *parts]
    random.Random(" ".join(names)).shuffle(names)
    return Stack(*(build(OWNERS.get(n) or PARTS[n]) for n in names))


SINGLE = stacks(list(OWNERS), (0, 1))
PAIRS = stacks(["lora"], (2,))


@pytest.mark.parametrize(
    ("owner", "parts"), [*SINGLE, *PAIRS], ids=lambda x: x if isinstance(x, str) else "+".join(x)
)
def test_a_legal_stack_keeps_what_its_parts_promise(owner: str, parts: tuple[str, ...]) -> None:
    holds(shuffled(owner, parts))


@pytest.mark.slow
@pytest.mark.parametrize("owner", OWNERS)
def test_every_legal_stack_of_three_parts_keeps_what_they_promise(owner: str) -> None:
    """Pairs and triples, as listed and in another order."""
    for _, parts in stacks([owner], (2, 3)):
        for stack in (legal(owner, parts), shuffled(owner, parts)):
            assert stack is not None
            try:
                holds(stack)
            except Exception as error:
                raise AssertionError(f"{[p.name for p in stack.parts]}: {error}") from error


def test_what_is_refused_is_what_cannot_be_kept() -> None:
    alone = [{"gpm", "merge_after_task", "cofima"}, {"ema", "llaca", "llaca paper", "llaca bounded"}]
    # gpm with a merge, two averages, two merges: nothing else of ours excludes each other
    pairs = {frozenset(c) for c in combinations(PARTS, 2) if not legal("lora", c)}
    assert pairs == {frozenset(c) for group in alone for c in combinations(sorted(group), 2)}
    assert not legal("model_tailor", ("cofima",)) and legal("model_tailor", ("ema", "ewc"))


@pytest.mark.parametrize("names", list(permutations(["lora", "llaca", "gpm"])))
def test_the_order_of_a_list_does_not_matter_where_roles_say_it(names: tuple[str, ...]) -> None:
    stack = build(list(names))
    acting = {hook: [p.name for p in stack.order(hook) if p.name != "lora"] for hook in ROLES}
    assert acting["grads"] == acting["after_step"] == ["gpm", "llaca"] and acting["end_task"] == [
        "llaca",
        "gpm",
    ]


def test_conflicts_name_both_parts_and_why() -> None:
    for first, second, why in (
        ("gpm", "cofima", "leave the set"),
        ("llaca", "ema", "overwrite"),
        ("cofima", "merge_after_task", "would not keep"),
        ("gpm", "gpm", "undo"),
    ):
        for names in ([first, ["replay", second]], [second, first]):
            with pytest.raises(Conflict, match=f"(?=.*{first!r})(?=.*{second!r}).*{why}.*one of the two"):
                build(["lora", *names])


@dataclass
class Named(Method):
    """A part of a third party."""

    name = "named"
    about = ""


def third(called: str, **at: str) -> Method:
    part = Named()
    part.name = called  # type: ignore[misc]
    part.roles = at  # type: ignore[misc]
    return part


def test_parts_without_a_role_stay_where_they_are() -> None:
    ema, ewc, cofima = (
        third(n, end_task=r) for n, r in (("a", "settles"), ("b", "reads"), ("c", "rewrites"))
    )
    x, y = third("x"), third("y", grads="writes")
    assert [p.name for p in arranged([x, ewc, y, cofima, ema], "end_task")] == ["x", "a", "y", "c", "b"]
    assert [p.name for p in arranged([ewc, x, ema], "after_step")] == ["b", "x", "a"]
    assert [p.name for p in arranged([ewc, third("d", end_task="reads"), ema], "end_task")] == ["a", "b", "d"]


def test_a_misspelt_role_is_refused_when_a_method_is_registered() -> None:
    for roles, told in (
        ({"end_tsk": "reads"}, "roles: 'end_tsk' is unknown; did you mean 'end_task'"),
        ({"end_task": "read"}, r"roles\['end_task'\]: 'read' is unknown; did you mean 'reads'"),
        ({"loss": "reads"}, "'loss' is unknown"),
    ):

        class Wrong(Method):
            name: ClassVar[str] = "wrong"

        Wrong.roles: Mapping[str, str] = roles  # type: ignore[misc]
        with pytest.raises(RetainError, match=told):
            register(Wrong)
    assert "wrong" not in REGISTRY


def test_every_role_that_ours_declare_is_one() -> None:
    for name, cls in available().items():
        assert all(role in ROLES[hook] for hook, role in cls.roles.items()), name
    assert all(role in ROLES[hook] for pair in APART for hook, role in pair)


def test_explain_shows_who_acts_first_and_as_what() -> None:
    rows = {row[0]: row[1] for row in hook_rows(build(["lora", "ewc", {"llaca": {"kappa": 0.5}}, "gpm"]))}
    assert rows["after_step"] == "gpm writes → llaca(kappa=0.5) reads"
    assert rows["end_task"] == "llaca(kappa=0.5) settles → ewc reads → gpm reads"
    assert rows["adapt"] == "lora"


# -- passes over the data that parts make themselves ----------------------------------------------------------------

PASSES: dict[str, Any] = {
    "ewc": ["lora", {"ewc": {"n_samples": 12, "per_sample": False}}],
    "ewc per sample": ["lora", {"ewc": {"n_samples": 5}}],
    "cofima": ["lora", {"cofima": {"n_samples": 12}}],
    "cofima factors": ["lora", {"cofima": {"n_samples": 12, "space": "factors"}}],
    "gpm": ["lora", {"gpm": {"n_samples": 5}}],
    "lwf": ["lora", "lwf"],
    "model_tailor": {"model_tailor": {"samples": 5}},
    "lorahub": {"lorahub": {"steps": 3, "shots": 5}},
    "hide": "hide",
    "disco": "disco",
    "lora_per_task": "lora_per_task",
    "modal_prompt": "modal_prompt",
    "groups": "instruction_groups",
}


class Counted(FakeModel):
    """Counts the samples of every forward and of every look at frozen features."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.sizes: list[int] = []

    def forward(self, batch: Batch) -> Output:
        self.sizes.append(len(batch))
        return super().forward(batch)

    def guide(self, batch: Batch) -> Guide:
        self.sizes.append(len(batch))
        return super().guide(batch)


@pytest.mark.parametrize("name", PASSES)
def test_no_forward_is_larger_than_those_of_training(name: str) -> None:
    """And what the parts keep, and leave, is the same but for the rounding of sums in another order."""
    left = []
    for accumulate in (1, 4):
        method = build(PASSES[name])
        kind = next(p.kinds[0] for p in method.parts if p.owns("adapt"))
        spec = replace(ADAPTERS[kind], dropout=0.0) if kind == "lora" else ADAPTERS[kind]
        model, s, seen = Counted(spec), stream(), list[str]()
        for task in s[:2]:
            how = replace(OPTIM, steps=2, batch_size=8, accumulate=accumulate, warmup=0.0, lr=1e-3)
            fit(model, method, Context(model, task, s, list(seen), seed=0), how)
            seen.append(task.name)
        assert max(model.sizes) == 8 // accumulate, sorted(set(model.sizes))
        left.append(dict(tensors([model.adapters.state(n) for n in model.adapters.names], "bank")))
        left[-1] |= {at: t for at, t in tensors(method.state_dict(), "state") if "memory" not in at}
    assert list(left[0]) == list(left[1])
    if name not in ("model_tailor", "lorahub"):  # which entries stay, and where a search goes, are jumps
        for at, t in left[0].items():
            torch.testing.assert_close(
                left[1][at], t, rtol=2e-2, atol=2e-4 * float(t.abs().max()) + 1e-9, msg=at
            )


@pytest.mark.parametrize(
    "part", [{"ewc": {"n_samples": 3}}, {"cofima": {"n_samples": 4}}, {"cofima": {"space": "factors"}}]
)
def test_a_fisher_pass_checkpoints_where_training_does(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bytes are kept for the backward, dropout stays off, and not a bit of the result differs."""
    monkeypatch.setattr(HFModel, "fast", False)  # Hugging Face's own layers in both
    found, kept = [], []
    for on in (False, True):
        model, method = tiny.model("llava", LoraSpec(rank=4, alpha=8.0, dropout=0.5)), build(["lora", part])
        s = loop_stream(8, 1)
        ctx = Context(model, s[0], s, [], seed=0)
        fit(model, method, ctx, Optim(steps=1, batch_size=4, accumulate=2, grad_checkpointing=on))
        sizes = list[int]()
        with saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t):
            method.end_task(ctx)
        found.append(method.parts[1].state_dict()["fisher"])
        kept.append(sum(sizes))
        assert not model.hf.training and not any(m.training for m in model.hf.modules())
        assert not model.hf.is_gradient_checkpointing
    assert kept[1] < 0.5 * kept[0], kept
    for key, F in found[0].items():
        assert F.any() and torch.equal(found[1][key], F), key
