"""O-LoRA and gradient projection memory against their formulas, transcribed in reference/orthogonal.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from fake_model import FakeModel, context, stream
from loop_helpers import stream as loop_stream
from reference import orthogonal as reference
from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.method import Context, Method, Stack, build
from retain.methods import _projection
from retain.methods._projection import Sketch, guarded, outside, project_grads, project_update
from retain.methods.gpm import GPM, Reader
from retain.methods.o_lora import OLora, overlap
from retain.models.hf import HFModel
from retain.run.train import Optim, fit
from retain.types import RetainError

HOW = Optim(lr=2e-2, steps=8, batch_size=4, warmup=0.0)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learned(method: Method, n: int, how: Optim = HOW, spec: LoraSpec | None = None) -> FakeModel:
    """The fake model after the first n tasks of its stream."""
    model, seen = FakeModel(spec), list[str]()
    for task in stream()[:n]:
        fit(model, method, context(model, task.name, seen), how)
        seen.append(task.name)
    return model


def test_a_step_does_not_look_at_frozen_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step costs may not grow with the number of tasks: each hook asks for the trainable tensors."""
    bank, asked = FakeModel().adapters, list[str]()
    for i in range(5):
        bank.add(f"a{i}", torch.Generator().manual_seed(i))
        bank.train_only(f"a{i}")
    tensors = bank.parameters
    monkeypatch.setattr(bank, "parameters", lambda name: (asked.append(name), tensors(name))[1])
    assert {k.split("/")[0] for k in bank.trainable()} == {"a4"} and asked == ["a4"]
    bank.train_only("a1", "a0")
    assert list(dict.fromkeys(k.split("/")[0] for k in bank.trainable())) == ["a0", "a1"]
    assert not any(p.requires_grad for p in tensors("a4").values())
    bank.freeze("a0")
    bank.remove("a1")
    assert bank.trainable() == {}


# -- O-LoRA ----------------------------------------------------------------------------------------------


def test_overlap_equals_the_formula() -> None:
    new, old = (
        [noise(2, 5, seed=i) for i in range(3)],
        [[noise(2, 5, seed=9 * k + i) for i in range(3)] for k in (1, 2)],
    )
    ours = overlap(torch.stack(new), torch.stack([torch.cat([a[i] for a in old]) for i in range(3)]))
    want = reference.o_lora([A.tolist() for A in new], [[A.tolist() for A in a] for a in old])
    assert ours.item() == pytest.approx(want, rel=1e-5)


def begun(part: OLora) -> tuple[FakeModel, Tensor]:
    """Two tasks learned, the third begun: the model, and the penalty that training would add."""
    model = learned(part, 2)
    ctx = context(model, "again", ["colour", "letter"])
    model.adapters.mix = part.adapt(ctx)
    part.begin_task(ctx)
    batch = model.collate(list(ctx.task.train[:4]), answers=True)
    return model, torch.as_tensor(part.loss(ctx, batch, model(batch)))


def test_the_penalty_is_over_all_layers_and_all_old_adapters() -> None:
    model, term = begun(OLora(weight=0.7, l2_weight=0.3))
    names = ["01-colour", "02-letter", "03-again"]
    states = [model.adapters.state(n) for n in names]
    keys = [k for k in states[0] if k.endswith("lora_A")]
    assert len(keys) == 2
    olds = [[s[k].tolist() for k in keys] for s in states[:2]]
    want = 0.7 * reference.o_lora([states[2][k].tolist() for k in keys], olds)
    want += 0.3 * reference.norms([t.flatten().tolist() for t in states[2].values()])
    assert want > 0 and term.item() == pytest.approx(want, rel=1e-5)
    term.backward()
    for name in names:
        moved = {k for k, p in model.adapters.parameters(name).items() if p.grad is not None and p.grad.any()}
        assert (moved >= set(keys)) if name == names[2] else not moved  # old adapters are frozen


def test_all_adapters_are_on_and_the_old_ones_do_not_move() -> None:
    for forward in ("all", "current"):
        part = OLora(forward=forward)
        model = learned(part, 1)
        before = model.adapters.state("01-colour")
        ctx = context(model, "letter", ["colour"])
        mix = part.adapt(ctx)
        assert mix.names == (["02-letter"] if forward == "current" else ["01-colour", "02-letter"])
        fit(model, part, ctx, HOW)
        assert dict(model.adapters.mix.weights) == {"01-colour": 1.0, "02-letter": 1.0}
        assert all(torch.equal(t, before[k]) for k, t in model.adapters.state("01-colour").items())
        assert part.old == []


def test_the_penalty_makes_directions_orthogonal() -> None:
    found = []
    for weight in (0.0, 0.5):
        part = OLora(weight=weight)
        model = learned(part, 2, Optim(lr=2e-2, steps=25, batch_size=4, warmup=0.0))
        a, b = (model.adapters.state(n) for n in part.adapter_of.values())
        found.append(sum((a[k] @ b[k].T).abs().sum().item() for k in a if k.endswith("lora_A")))
    assert found[1] < 0.3 * found[0]


def test_llaca_averages_the_new_adapter_in_the_stack() -> None:
    spec = [{"replay": {"size": 6}}, {"llaca": {"first_task": True}}, "o_lora"]
    stacked, plain = learned(build(spec), 2), learned(build([spec[0], spec[2]]), 2)
    assert stacked.adapters.names == plain.adapters.names
    a, b = stacked.adapters.state("02-letter"), plain.adapters.state("02-letter")
    assert any(not torch.equal(a[k], b[k]) for k in a)
    size = [sum(s[k].abs().sum() for k in s if k.endswith("lora_B")) for s in (a, b)]
    assert 0 < size[0] < size[1]  # an average that starts from B = 0


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"l2_weight": -1.0}, {"forward": "old"}])
def test_bad_fields_of_o_lora(options: dict[str, object]) -> None:
    with pytest.raises(RetainError, match="o_lora"):
        build({"o_lora": options})


# -- projection ------------------------------------------------------------------------------------------


def basis(D: int, K: int, seed: int) -> Tensor:
    return torch.linalg.qr(noise(D, K, seed=seed)).Q


def grown(M: Tensor | None, rows: Tensor, threshold: float) -> Tensor:
    """The memory after rows that came one after the other."""
    sketch = Sketch(torch.zeros(rows.shape[1], 0) if M is None else M)
    for part in rows.split(7):
        sketch.add(part)
    return sketch.grown(threshold)


def test_outside_equals_the_formula() -> None:
    change, M = noise(3, 6, seed=0), basis(6, 4, 1)
    want = torch.tensor(reference.removed(change.tolist(), M.T.tolist()))
    torch.testing.assert_close(outside(change, M), want)


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("how", ["both", "gradient only", "nothing"])
def test_protected_inputs_keep_their_outputs(optimizer: str, how: str) -> None:
    """The measured law of the specification: 4e-6 with SGD, 0.81 with Adam, 2e-7 once the update is projected."""
    weights = {
        f"a/{i}.w": torch.nn.Parameter(noise(*s, seed=i)) for i, s in enumerate([(5, 12), (9, 12), (5, 12)])
    }
    shared = {"a/0.w": "x", "a/1.w": "y", "a/2.w": "x"}  # the first and the last read one input
    bases = {"x": basis(12, 3, 7), "y": basis(12, 4, 8)}
    old = {
        k: noise(20, 3 + (m == "y"), seed=3) @ bases[m].T for k, m in shared.items()
    }  # inputs that M spans
    before = {k: old[k] @ w.detach().T for k, w in weights.items()}
    groups, opt = guarded(weights, shared), OPTIMIZERS[optimizer](list(weights.values()))
    assert [g["keys"] for g in groups] == [["a/0.w", "a/2.w"], ["a/1.w"]]
    start = {k: w.detach().clone() for k, w in weights.items()}
    for step in range(200):
        opt.zero_grad()
        x = noise(8, 12, seed=1000 + step)
        sum(((x @ w.T - x.sum(1, keepdim=True)) ** 2).mean() for w in weights.values()).backward()
        if how != "nothing":
            project_grads(groups, weights, bases)
        opt.step()
        if how == "both":
            project_update(groups, weights, bases)
    drift = max(
        float((old[k] @ w.detach().T - before[k]).norm() / before[k].norm()) for k, w in weights.items()
    )
    moved = min(float((w.detach() - start[k]).norm() / start[k].norm()) for k, w in weights.items())
    assert moved > 0.1
    if how == "both" or (how == "gradient only" and optimizer == "sgd"):
        assert drift < 1e-5
    else:
        assert drift > 1e-2  # the test can fail: a projected gradient alone does not protect under Adam


def test_a_tensor_without_a_gradient_is_left_alone() -> None:
    weights = {k: torch.nn.Parameter(noise(3, 4, seed=1)) for k in ("a/0.w", "a/1.w")}
    M = basis(4, 3, 3)
    groups = guarded(weights, dict.fromkeys(weights, "x"))
    weights["a/1.w"].grad = noise(3, 4, seed=5)
    project_grads(groups, weights, {"x": M})
    assert weights["a/0.w"].grad is None
    want = reference.removed(noise(3, 4, seed=5).tolist(), M.T.tolist())
    torch.testing.assert_close(weights["a/1.w"].grad, torch.tensor(want))


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_the_memory_grows_by_the_fewest_directions(threshold: float) -> None:
    scale = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    M = None
    for seed in range(4):
        rows = noise(30, 6, seed=seed) * scale.roll(seed)
        before = torch.zeros(6, 0) if M is None else M
        rest = torch.tensor(reference.removed(rows.tolist(), before.T.tolist()))
        sigma = torch.linalg.svdvals(rest).tolist()
        n = reference.n_new_directions(rows.tolist(), before.T.tolist(), sigma, threshold)
        M = grown(M, rows, threshold)
        assert M.shape == (6, min(6, before.shape[1] + n))
        assert torch.equal(M[:, : before.shape[1]], before)  # what is protected stays so
        torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1]), rtol=0, atol=1e-5)
        assert (rows @ M).square().sum() >= threshold * (1 - 1e-5) * rows.square().sum()
    assert (
        grown(M, 3 * noise(5, M.shape[1], seed=9) @ M.T, 1.0).shape == M.shape
    )  # nothing new: nothing added
    assert grown(None, rows, 0.0).shape == (6, 0)


@pytest.mark.parametrize(("D", "n_rows"), [(24, 400), (96, 60), (96, 400)])
def test_a_sketch_is_bounded_and_as_good_as_the_rows(
    D: int, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory as rows grow; against numpy's SVD of all rows; and its basis captures what it says, dropped or not."""
    monkeypatch.setattr(_projection, "SKETCH", 32)
    scale = 0.9 ** torch.arange(D)
    rows = noise(n_rows, D, seed=1) * scale @ basis(D, D, 2)
    M = basis(D, 5, 3)
    sketch, most = Sketch(M), 0
    for part in rows.split(16):
        sketch.add(part)
        most = max(most, sketch.rest_ND.numel())
    assert most <= 2 * 32 * D and (most < n_rows * D) == (n_rows > 64)
    exact = D <= 32 or n_rows <= 64
    assert (sketch.dropped == 0) == exact
    R, P = rows.double().numpy(), M.double().numpy()
    rest = R - R @ P @ P.T
    _, sigma, V = np.linalg.svd(rest, full_matrices=False)
    for threshold in (0.5, 0.9, 0.99):
        captured = ((R @ P) ** 2).sum() + np.cumsum(sigma**2)
        n = int((captured < threshold * (R**2).sum()).sum()) + 1
        got = sketch.grown(threshold).double().numpy()
        assert ((R @ got) ** 2).sum() >= threshold * (1 - 1e-5) * (R**2).sum()
        assert 0 <= got.shape[1] - 5 - n <= (0 if exact else 2)  # what was dropped counts as not captured
        want = np.concatenate([P, V[: got.shape[1] - 5].T], axis=1)
        angle = np.linalg.svd(
            want.T @ got, compute_uv=False
        ).min()  # cosine of the largest angle between the spans
        assert angle > (1 - 1e-6 if exact else 0.99)


def test_a_sketch_loses_nothing_up_to_512_columns() -> None:
    """More rows than are kept at a time; what the documentation promises of GPM's memory."""
    rows = noise(1100, 512, seed=4)
    sketch = Sketch(torch.zeros(512, 0))
    sketch.add(rows)
    assert len(sketch.rest_ND) <= 1024 and sketch.dropped == 0
    torch.testing.assert_close(sketch.rest_ND.T @ sketch.rest_ND, rows.T @ rows, rtol=0, atol=2e-3)
    wide = Sketch(torch.zeros(600, 0))
    wide.add(noise(1100, 600, seed=4))
    assert wide.dropped > 0  # and says where it does


# -- gradient projection memory --------------------------------------------------------------------------


def test_sites_hand_over_their_inputs() -> None:
    model = FakeModel()
    learned_adapter(model)
    batch = model.collate([stream()[0].train[0]], answers=True)
    met: list[tuple[str, Tensor]] = []
    plain = model(batch).logits_NV
    with model.adapters.reading(lambda path, x: met.append((path, x.detach().clone()))):
        read = model(batch).logits_NV
    model(batch)
    assert torch.equal(plain, read) and [path for path, _ in met] == list(model.adapters.sites)
    ups = [layer["up"] for layer in model.net.language.layers]
    torch.testing.assert_close(met[2][1], met[1][1] + torch.tanh(ups[0](met[1][1])))
    torch.testing.assert_close(met[0][1], batch.inputs["pixels"])


def learned_adapter(model: FakeModel) -> None:
    model.adapters.add("lora", torch.Generator().manual_seed(0))
    for p in model.adapters.parameters("lora").values():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    model.adapters.mix = Mix({"lora": 1.0})


def test_layers_that_are_fused_hand_over_one_tensor() -> None:
    model = tiny.model("llava")
    tiny.fill(model.adapters, "lora")
    model.adapters.mix = Mix({"lora": 1.0})
    model.train(False)
    batch = model.collate(tiny.examples()[:1], answers=True)
    sites = model.adapters.sites
    A = {
        p: {"lora": model.adapters.parameters("lora")[f"{p}.lora_A"]}
        for p, s in sites.items()
        if s.group == "lora"
    }
    reader = Reader(10**6, torch.Generator(), {p: ["lora"] for p in sites}, A, {})
    plain = model(batch).logits_NV
    with model.adapters.reading(reader):
        read = model(batch).logits_NV
    torch.testing.assert_close(plain, read)
    assert set(reader.leader) == set(model.adapters.sites)  # no layer is passed by
    path = next(p for p in model.adapters.sites if p.endswith("0.self_attn.v_proj"))
    assert reader.leader[path] == path.replace("v_proj", "q_proj")
    assert reader.leader[path.replace("self_attn.v_proj", "mlp.up_proj")].endswith("gate_proj")
    inputs = {f"lora/{p}" for p in reader.leader.values()}  # once, however many sites read it
    assert set(reader.sketches) == inputs | {f"lora/{p}.lora_B" for p in A}
    assert len(inputs) < len(sites)


@torch.no_grad()
def outputs(model: FakeModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: site(inputs[path]) for path, site in model.adapters.sites.items()}


@pytest.mark.parametrize(("decay", "factors"), [(0.0, "both"), (0.1, "both"), (0.1, "A")])
def test_what_the_memory_spans_is_answered_as_before(decay: float, factors: str) -> None:
    """(B + dB)(A + dA) x = B A x, and the projector with its bias, after AdamW in the loop; not with A alone."""
    part = GPM(threshold=0.9, n_tokens=3, factors=factors)
    model = FakeModel(LoraSpec(rank=6, alpha=4.0))
    method = Stack(build("lora"), part)
    how = Optim(lr=2e-2, steps=15, batch_size=4, warmup=0.0, weight_decay=decay)
    fit(model, method, context(model, "colour"), how)
    assert part.memory and not part.guards
    assert any(key.endswith(".lora_B") for key in part.memory) == (factors == "both")
    sites = model.adapters.sites
    inputs = {
        p: noise(9, part.memory[f"lora/{p}"].shape[1], seed=1) @ part.memory[f"lora/{p}"].T for p in sites
    }
    # B is protected for A x, and x itself is what the memory of A spans only where A x lies in that of B
    for p in sites:
        if (key := f"lora/{p}.lora_B") in part.memory:
            A, M_B = model.adapters.state("lora")[f"{p}.lora_A"], part.memory[key]
            away = torch.eye(A.shape[0]) - M_B @ M_B.T
            null = torch.linalg.svd(away @ A @ part.memory[f"lora/{p}"])[2]
            rank = int(torch.linalg.matrix_rank(away @ A @ part.memory[f"lora/{p}"], atol=1e-5))
            inputs[p] = noise(9, len(null) - rank, seed=1) @ null[rank:] @ part.memory[f"lora/{p}"].T
    assert all(x.norm() > 0.1 for x in inputs.values())
    old = outputs(model, inputs)
    fit(model, method, context(model, "letter", ["colour"]), how)
    new = outputs(model, inputs)
    drift = {p: float((new[p] - old[p]).norm() / old[p].norm()) for p in sites}
    if factors == "both":
        assert max(drift.values()) < 1e-5, drift
    else:
        assert max(drift.values()) > 1e-3, drift


def test_the_memory_is_that_of_the_inputs() -> None:
    part = GPM(threshold=1.0, n_samples=3, n_tokens=100)
    model = FakeModel()
    method = Stack(build("lora"), part)
    ctx = context(model, "colour")
    fit(model, method, ctx, HOW)
    rows: dict[str, list[Tensor]] = {}
    picked = torch.randperm(24, generator=ctx.rng("gpm"))[:3].tolist()
    with model.adapters.reading(
        lambda p, x: rows.setdefault(p, []).append(x.detach().reshape(-1, x.shape[-1]))
    ):
        for i in picked:
            model(model.collate([ctx.task.train[i]], answers=True))
    for path, found in rows.items():
        M = part.memory[f"lora/{path}"]
        R = torch.cat(found)
        torch.testing.assert_close(R @ M @ M.T, R, rtol=0, atol=2e-3 * float(R.abs().max()))


def test_tensors_that_read_one_input_share_one_basis_without_a_copy() -> None:
    model, part = tiny.model("llava"), GPM(n_samples=2)
    method, ctx = Stack(build("lora"), part), loop_context(model)
    fit(model, method, ctx, Optim(steps=1, batch_size=2))
    method.adapt(ctx)
    part.begin_task(ctx)
    q = next(k for k in part.memory if k.endswith("layers.0.self_attn.q_proj"))
    (group,) = [g for g in part.guards if g["basis"] == q]
    assert [k.split(".")[-2] for k in group["keys"]] == ["q_proj", "k_proj", "v_proj"]
    assert {k.split(".")[-1] for g in part.guards if g["basis"] == q for k in g["keys"]} == {"lora_A"}
    of = {
        k.split(".")[-2]: g["basis"]
        for g in part.guards
        for k in g["keys"]
        if "layers.0.mlp" in k and "lora_A" in k
    }
    assert of["gate_proj"] == of["up_proj"] != of["down_proj"]
    kept = sum(t.numel() for g in part.guards for t in g.values() if isinstance(t, Tensor))
    assert kept == sum(p.numel() for k, p in model.adapters.trainable().items() if part._basis(k))


def loop_context(model: HFModel) -> Context:
    s = loop_stream(4, 1)
    return Context(model, s[0], s, [], seed=0)


def test_a_checkpoint_from_before_bases_were_shared_goes_on() -> None:
    """Its groups are of one shape and hold a stack of bases; the weights that a task began with are all we need."""
    part = GPM(threshold=0.6, n_samples=4)
    model = learned(Stack(build("lora"), part), 1)
    part.begin_task(context(model, "letter", ["colour"]))
    new, live = part.guards, model.adapters.trainable()
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for group in new:
        for key in group["keys"]:
            by_shape.setdefault(tuple(live[key].shape), []).append(key)
    old = [
        {
            "keys": keys,
            "start": torch.stack(
                [live[k].detach() if live[k].ndim > 1 else live[k].detach()[:, None] for k in keys]
            ),
            "basis": torch.zeros(len(keys), 1, 1),
        }
        for keys in by_shape.values()
    ]
    other = GPM(threshold=0.6, n_samples=4)
    other.load_state_dict({**part.state_dict(), "guards": old})
    assert {g["basis"]: (sorted(g["keys"]), g["start"].sum().item()) for g in other.guards} == {
        g["basis"]: (sorted(g["keys"]), pytest.approx(g["start"].sum().item(), rel=1e-5)) for g in new
    }
    other.after_step(context(model, "letter", ["colour"]))


@pytest.mark.parametrize(
    "options", [{"threshold": 1.5}, {"threshold": -0.1}, {"n_samples": 0}, {"n_tokens": 0}, {"factors": "B"}]
)
def test_bad_fields_of_gpm(options: dict[str, object]) -> None:
    with pytest.raises(RetainError, match="gpm"):
        build({"gpm": options})
