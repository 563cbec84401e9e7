"""fit(): what is minimised does not depend on how the work is cut; hooks, schedule, groups and errors."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from fake_model import FakeModel
from fake_model import context as fake_context
from fake_model import stream as fake_stream
from loop_helpers import Fitted, Spy, close, fitted, model, stream
from retain.adapters.lora import LoraSpec
from retain.method import Context
from retain.models.hf import HFModel
from retain.run.store import CheckpointDir, empty
from retain.run.train import Optim, batches, fit
from retain.stream import Task
from retain.types import RetainError, digest

OPTIM = Optim(lr=1e-3, steps=3, batch_size=8, warmup=0.0, log_every=2)


@pytest.fixture(scope="module")
def plain() -> Fitted:
    return fitted(OPTIM)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_does_not_change_what_is_minimised(plain: Fitted, accumulate: int) -> None:
    """Answers have 2 to 8 tokens, so a mean of means would be off by far more than the tolerance."""
    split = fitted(Optim(**{**vars(OPTIM), "accumulate": accumulate}))
    close(split.spy.grad[0], plain.spy.grad[0], rtol=1e-5)  # fp32 sums in another order: some 1e-7 each
    assert split.losses == pytest.approx(
        plain.losses, rel=1e-4
    )  # Adam's first steps are signs: tiny gradients flip
    assert split.stats.tokens == plain.stats.tokens and split.spy.calls.count("loss") == 3 * accumulate


def test_the_step_is_the_mean_over_the_answer_tokens_of_the_whole_batch(plain: Fitted) -> None:
    m = model()
    empty(m.adapters)
    m.adapters.add("lora", Context(m, stream()[0], stream(), [], 0).rng("lora"))
    examples = plain.spy.labels[0][0]
    assert float(m(m.collate(examples, answers=True)).loss) == pytest.approx(plain.losses[0], rel=1e-6)


def test_loss_is_on_answer_tokens_only(plain: Fitted) -> None:
    for examples, labels in plain.spy.labels:
        assert labels == [token for e in examples for token in model().encode(e).answer]


def test_hooks_are_called_in_the_documented_order() -> None:
    calls = fitted(Optim(**{**vars(OPTIM), "accumulate": 2, "steps": 2})).spy.calls
    step = ["loss", "loss", "grads", "after_step"]
    assert calls == ["adapt", "begin_task", "data", *step, *step, "end_task"]


def test_the_base_is_frozen() -> None:
    m = model()
    empty(m.adapters)
    before = digest(dict(m.hf.state_dict()))
    fitted(Optim(**{**vars(OPTIM), "lr": 0.1}))
    empty(m.adapters)
    assert digest(dict(m.hf.state_dict())) == before


def test_every_step_is_logged_once(plain: Fitted) -> None:
    steps = [e for e in plain.events if e["kind"] == "step"]
    assert [(e["first"], e["step"], len(e["losses"])) for e in steps] == [(0, 2, 2), (2, 3, 1)]
    assert plain.stats.last_loss == plain.losses[-1] and plain.stats.samples == 24


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("n", [2, 7, 100])
def test_schedule_is_that_of_transformers(n: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * n), n)
    for step in range(n):
        assert Optim(warmup=warmup).rate(step, n) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_constant_schedule_warms_up_and_stays() -> None:
    assert Optim(warmup=0.03).rate(0, 1) == 1.0, "transformers would train a task of one step at rate 0"
    optim = Optim(schedule="constant", warmup=0.2)
    assert [optim.rate(i, 10) for i in range(4)] == [0.0, 0.5, 1.0, 1.0]


def test_projector_has_its_own_rate() -> None:
    done = fitted(Optim(**{**vars(OPTIM), "projector_lr": 0.0}))
    moved = {key.split(".")[-1] for key, t in done.state.items() if not key.endswith("lora_A") and t.any()}
    assert moved == {"lora_B"}
    rates = done.events[0]["lr"]
    assert rates["projector"] == 0.0 < rates["lora"]


def test_weight_decay_and_betas_are_adamws() -> None:
    """One step of ours is one step of torch.optim.AdamW on the same gradients."""
    optim = Optim(lr=1e-2, steps=1, batch_size=8, warmup=0.0, weight_decay=0.1, beta1=0.8, beta2=0.9)
    done = fitted(optim)
    m = model()
    empty(m.adapters)
    m.adapters.add("lora", Context(m, stream()[0], stream(), [], 0).rng("lora"))
    start = m.adapters.state("lora")
    for key, grad in done.spy.grad[0].items():
        p = start[key.split("/", 1)[1]].requires_grad_(True)
        p.grad = grad
        torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9)).step()
        torch.testing.assert_close(
            done.state[key.split("/", 1)[1]], p.detach(), rtol=1e-5, atol=1e-7
        )  # fused: fp32 order


def test_gradients_are_clipped_to_the_norm(plain: Fitted) -> None:
    clipped = fitted(Optim(**{**vars(OPTIM), "max_grad_norm": 0.01})).spy.grad[0]
    norm = torch.stack([g.norm() for g in plain.spy.grad[0].values()]).norm()
    assert norm > 0.01
    close(clipped, {k: g * 0.01 / (norm + 1e-6) for k, g in plain.spy.grad[0].items()}, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_changes_no_gradient(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit over Hugging Face's own layers; our faster ones cannot checkpoint and stand aside."""
    spec = LoraSpec(rank=4, alpha=8.0, dropout=dropout)
    monkeypatch.setattr(HFModel, "fast", False)
    with_it, without = (
        fitted(Optim(**{**vars(OPTIM), "steps": 1, "grad_checkpointing": on}), on=model(spec))
        for on in (True, False)
    )
    for key, grad in without.spy.grad[0].items():
        assert torch.equal(with_it.spy.grad[0][key], grad), key  # the same sums again, with the same dropout
    assert not model(spec).hf.is_gradient_checkpointing


def test_dropout_is_owned_by_the_step() -> None:
    spec = LoraSpec(rank=4, alpha=8.0, dropout=0.1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fitted(OPTIM, on=model(spec))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert fitted(OPTIM, on=model(spec)).losses == first.losses


def test_bf16_runs_and_keeps_fp32_weights(plain: Fitted) -> None:
    done = fitted(Optim(**{**vars(OPTIM), "precision": "bf16"}))
    assert all(t.dtype == torch.float32 for t in done.state.values())
    assert done.losses != plain.losses
    assert done.losses == pytest.approx(plain.losses, rel=0.03)  # bf16 has 8 bits: about 0.4 % a product


def test_a_loss_that_is_not_finite_is_named_and_never_checkpointed(tmp_path: Path) -> None:
    model_ = FakeModel()
    spy, seen = Spy(), list[int]()

    def term(out: object) -> torch.Tensor:
        seen.append(1)
        return torch.tensor(math.nan if len(seen) == 3 else 0.0)

    spy.term = term
    slots = CheckpointDir(tmp_path / "checkpoint")
    optim = Optim(steps=8, batch_size=4, checkpoint_every=1, log_every=8)
    with pytest.raises(RetainError, match=r"'colour'.*not finite at step 3"):
        fit(model_, spy, fake_context(model_), optim, checkpoints=slots)
    assert slots.load()["stats"]["steps"] == 2  # type: ignore[index]
    assert not model_.training


def test_what_cannot_be_trained_is_named() -> None:
    m = FakeModel()
    ctx = fake_context(m)
    ctx.task = Task("hollow", [], ctx.task.test, ctx.task.score)
    with pytest.raises(RetainError, match="'hollow': nothing to train on"):
        fit(m, Spy(), ctx, OPTIM)
    with pytest.raises(RetainError, match=r"optim\.accumulate: 3 does not divide batch_size 8"):
        Optim(batch_size=8, accumulate=3)
    with pytest.raises(RetainError, match=r"optim\.schedule: 'linear' is none of \['cosine', 'constant'\]"):
        Optim(schedule="linear")
    with pytest.raises(RetainError, match="grad_checkpointing"):
        fit(m, Spy(), fake_context(m), Optim(steps=1, grad_checkpointing=True))


# -- batches -------------------------------------------------------------------------------------------------


def rows(seed: int = 0, n: int = 50, **optim: object) -> list[list[int]]:
    m = FakeModel()
    ctx = Context(m, fake_stream()[0], fake_stream(), [], seed)
    examples = fake_stream(n)[0].train
    o = Optim(batch_size=8, **optim)  # type: ignore[arg-type]
    return list(batches(m, examples, ctx, o, o.n_steps(n)))


@pytest.mark.parametrize("grouped", [True, False])
def test_an_epoch_is_a_permutation(grouped: bool) -> None:
    made = rows(group_by_length=grouped)
    assert sorted(i for batch in made for i in batch) == list(range(50))
    assert len(made) == 7 and sorted(map(len, made)) == [2, *[8] * 6]
    assert made == rows(group_by_length=grouped) != rows(seed=1, group_by_length=grouped)


def test_grouping_changes_neighbours_not_samples() -> None:
    """The same samples within each run of 8 batches, also where steps cut an epoch."""
    for steps in (3, 20):
        grouped, plain = rows(steps=steps), rows(steps=steps, group_by_length=False)
        assert len(grouped) == len(plain) == steps
        for at in range(0, steps, 8):
            assert sorted(chain(*grouped[at : at + 8])) == sorted(chain(*plain[at : at + 8]))


def test_grouping_saves_padding() -> None:
    m, examples = FakeModel(), fake_stream(50)[0].train

    def padded(made: list[list[int]]) -> int:
        return sum(len(b) * max(m.length(examples[i]) for i in b) for b in made)

    assert padded(rows()) < padded(rows(group_by_length=False))


@pytest.mark.parametrize(("epochs", "n"), [(0.5, 25), (1.0, 50), (2.5, 125)])
def test_epochs_may_be_fractions(epochs: float, n: int) -> None:
    assert sum(map(len, rows(epochs=epochs))) == n
