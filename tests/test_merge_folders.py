"""PEFT folders in, a PEFT folder or a checkpoint out: what PEFT computes with them is what was promised."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retain.merge import merger
from retain.merge.folders import merge_checkpoint, merge_folders
from retain.merge.parts import Low, truncated
from retain.types import RetainError

TOLERANCE = 2e-5  # outputs of size about 1 in fp32: sums in another order


class Net(nn.Module):
    """Four linear layers whose names are paths, as a language model has them."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"q": nn.Linear(16, 20), "v": nn.Linear(20, 16)}) for _ in range(2)]
        )
        self.projector = nn.Linear(16, 16)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.projector(x)
        for layer in self.layers:
            x = x + torch.tanh(layer["v"](layer["q"](x)))
        return x


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(9))


def adapter(tmp: Path, name: str, seed: int, size: float = 0.3, **config: Any) -> Path:
    """A tuned PEFT folder of random numbers."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], **config}
    peft = get_peft_model(Net(), LoraConfig(**options))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in peft.named_parameters():
            if "lora_magnitude" in key:
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=rng))
            elif p.requires_grad:
                p.add_(torch.randn(p.shape, generator=rng) * size)
    peft.save_pretrained(tmp / name)
    return tmp / name


def loaded(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns about a missing key
        return PeftModel.from_pretrained(Net(), folder).eval()


def deltas(folder: Path) -> dict[str, Tensor]:
    """Merged weights minus base weights by PEFT's own arithmetic."""
    base, tuned = Net().state_dict(), loaded(folder).merge_and_unload().state_dict()
    return {k: tuned[k] - base[k] for k in base}


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "ranks and alphas": ({"r": 3, "lora_alpha": 5}, {"r": 6, "lora_alpha": 2}),
    "patterns": ({"rank_pattern": {"layers.1.q": 7}, "alpha_pattern": {"v": 3}}, {"r": 2}),
    "rslora": ({"use_rslora": True}, {}),
    "lora_bias": ({"lora_bias": True}, {"lora_bias": True, "lora_alpha": 4}),
    "a bias and none": ({"lora_bias": True}, {}),
    "projector": ({"modules_to_save": ["projector"]}, {"modules_to_save": ["projector"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_lora_in_stock_peft_out(kind: str, tmp_path: Path) -> None:
    folders = [adapter(tmp_path, f"a{i}", i, **config) for i, config in enumerate(KINDS[kind])]
    for name, weights, factor in (
        ("average", [1, 3], [0.25, 0.75]),
        ("task_arithmetic", [1.0, 0.5], [1.0, 0.5]),
    ):
        merged = tmp_path / name
        merge_folders(folders, name, merged, weights=weights)
        got, given = deltas(merged), [deltas(f) for f in folders]
        for key in got:
            share = [w / sum(weights) for w in weights] if "projector" in key else factor
            want = sum(c * d[key] for c, d in zip(share, given))
            torch.testing.assert_close(got[key], want, atol=TOLERANCE, rtol=0, msg=key)
        assert max(float(d.abs().max()) for d in got.values()) > 0.1
    one = tmp_path / "one"
    merge_folders(folders[:1], "average", one)
    torch.testing.assert_close(loaded(one)(X), loaded(folders[0])(X), atol=TOLERANCE, rtol=0)


def test_dora_needs_the_base_and_then_is_exact(tmp_path: Path) -> None:
    folders = [adapter(tmp_path, "dora", 1, use_dora=True), adapter(tmp_path, "plain", 2)]
    with pytest.raises(RetainError, match=r"dora: DoRA.*--base"):
        merge_folders(folders, "average", tmp_path / "x")
    base = checkpoint(tmp_path)
    merge_folders(folders, "average", tmp_path / "out", base=base, keep="cat")
    got, given = deltas(tmp_path / "out"), [deltas(f) for f in folders]
    for key in got:
        torch.testing.assert_close(got[key], (given[0][key] + given[1][key]) / 2, atol=TOLERANCE, rtol=0)
    with pytest.raises(RetainError, match=r"layers.0.q: copa needs factors"):
        merge_folders(folders, "copa", tmp_path / "y", base=base)
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def checkpoint(tmp: Path, shards: int = 2) -> Path:
    """A base model folder in shards, with a file besides."""
    folder = tmp / "base"
    folder.mkdir()
    state = Net().state_dict()
    for i in range(shards):
        save_file(
            {k: v for j, (k, v) in enumerate(state.items()) if j % shards == i},
            folder / f"model-{i}.safetensors",
        )
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["average", "ties"])
@pytest.mark.parametrize("kind", ["patterns", "lora_bias", "projector"])
def test_a_merged_checkpoint_is_base_plus_change(kind: str, name: str, tmp_path: Path) -> None:
    folders = [adapter(tmp_path, f"a{i}", i, **config) for i, config in enumerate(KINDS[kind])]
    base = checkpoint(tmp_path)
    merge_checkpoint(folders, name, tmp_path / "whole", base=base)
    merge_folders(folders, name, tmp_path / "adapter", keep="cat", base=base)
    state = {
        k: v for f in sorted((tmp_path / "whole").glob("*.safetensors")) for k, v in load_file(f).items()
    }
    want = loaded(tmp_path / "adapter").merge_and_unload().state_dict()
    assert state.keys() == want.keys() and (tmp_path / "whole/config.json").is_file()
    for key in want:
        torch.testing.assert_close(state[key], want[key], atol=TOLERANCE, rtol=0)


# -- beside PEFT's add_weighted_adapter ------------------------------------------------------------------


def theirs(folders: list[Path], kind: str, **options: Any) -> dict[str, Tensor]:
    """dW of PEFT's own merge."""
    model = PeftModel.from_pretrained(Net(), folders[0], adapter_name="0")
    for i, f in enumerate(folders[1:], 1):
        model.load_adapter(f, str(i))
    names = [str(i) for i in range(len(folders))]
    model.add_weighted_adapter(names, [1.0] * len(names), "merged", kind, **options)
    return {
        key: m.get_delta_weight("merged").detach()
        for key, m in model.base_model.model.named_modules()
        if hasattr(m, "get_delta_weight")
    }


def ours(folders: list[Path], name: str, tmp: Path, **how: Any) -> dict[str, Tensor]:
    merge_folders(folders, name, tmp, **how)
    return {
        k.removesuffix(".weight"): v for k, v in deltas(tmp).items() if ".q.weight" in k or ".v.weight" in k
    }


RIGHT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cat": ("task_arithmetic", {}, {}),
    "svd": ("svd", {}, {}),
    "ties_svd": ("ties", {"params": {"density": 0.3}, "keep": "svd"}, {"density": 0.3}),
    "ties_svd frequency": (
        "ties", {"params": {"density": 0.3, "signs": "frequency"}, "keep": "svd"},
        {"density": 0.3, "majority_sign_method": "frequency"},
    ),
    "magnitude_prune_svd": ("magnitude_prune", {"params": {"density": 0.3}, "keep": "svd"}, {"density": 0.3}),
    "dare_linear_svd": ("dare", {"params": {"density": 1.0}, "keep": "svd"}, {"density": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_equal_to_peft_where_peft_is_right(kind: str, tmp_path: Path) -> None:
    folders = [adapter(tmp_path, f"a{i}", i) for i in range(3)]
    name, how, options = RIGHT[kind]
    want, got = (
        theirs(folders, kind.split(maxsplit=1)[0], **options),
        ours(folders, name, tmp_path / "out", **how),
    )
    assert len(want) == 4
    for key, w in want.items():
        torch.testing.assert_close(got[key], w, atol=TOLERANCE, rtol=1e-4)


def test_peft_linear_has_cross_terms_and_ours_has_not(tmp_path: Path) -> None:
    """(B_1 + B_2)(A_1 + A_2) is not B_1 A_1 + B_2 A_2; `space: factors` reproduces it by name."""
    folders = [adapter(tmp_path, f"a{i}", i) for i in range(2)]
    exact = {k: sum(deltas(f)[f"{k}.weight"] for f in folders) for k in theirs(folders, "cat")}
    linear = theirs(folders, "linear")
    factors = ours(folders, "task_arithmetic", tmp_path / "f", params={"space": "factors"})
    sums = ours(folders, "task_arithmetic", tmp_path / "s")
    ties = ours(folders, "ties", tmp_path / "t", params={"space": "factors", "density": 0.5})
    for key, want in exact.items():
        torch.testing.assert_close(sums[key], want, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(factors[key], linear[key], atol=TOLERANCE, rtol=0)
        assert (linear[key] - want).norm() / want.norm() > 0.5
        torch.testing.assert_close(
            ties[key], theirs(folders, "ties", density=0.5)[key], atol=TOLERANCE, rtol=0
        )


def test_peft_scales_rslora_wrongly_and_ours_does_not(tmp_path: Path) -> None:
    """PEFT keeps use_rslora with lora_alpha = r, so its result is sqrt(r) times too large."""
    folders = [adapter(tmp_path, f"a{i}", i, use_rslora=True) for i in range(2)]
    exact = {k: sum(deltas(f)[f"{k}.weight"] for f in folders) for k in theirs(folders, "cat")}
    wrong, right = theirs(folders, "cat"), ours(folders, "task_arithmetic", tmp_path / "s")
    for key, want in exact.items():
        torch.testing.assert_close(right[key], want, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(wrong[key], math.sqrt(8) * want, atol=1e-3, rtol=1e-3)


# -- bad input -------------------------------------------------------------------------------------------


def broken(folder: Path, to: Path, change: Any = None, **config: Any) -> Path:
    """A copy of a folder with another config or other tensors."""
    to.mkdir()
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = change(tensors) if change else tensors
    save_file(tensors, to / "adapter_model.safetensors")
    old = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**old, **config}))
    return to


def test_bad_input_is_one_clear_error_and_nothing_is_left(tmp_path: Path) -> None:
    good = adapter(tmp_path, "good", 1)
    key = "base_model.model.layers.1.v.lora_B.weight"

    def nan(t: dict[str, Tensor]) -> dict[str, Tensor]:
        t[key][2, 1] = math.nan
        return t

    corrupt = broken(good, tmp_path / "corrupt")
    file = corrupt / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    no_json = broken(good, tmp_path / "no_json")
    (no_json / "adapter_config.json").write_text("{")
    pickle = tmp_path / "pickle"
    pickle.mkdir()
    (pickle / "adapter_config.json").write_text("{}")
    (pickle / "adapter_model.bin").write_bytes(b"")
    cases: list[tuple[Path, str, dict[str, Any]]] = [
        (broken(good, tmp_path / "nan", nan), r"nan.adapter_model.*layers\.1\.v\.lora_B\.weight holds nan \(1 of 64", {}),
        (corrupt, r"corrupt.adapter_model\.safetensors: no whole safetensors file", {}),
        (no_json, r"no_json.adapter_config\.json: no valid adapter config", {}),
        (pickle, r"pickle: no adapter_model\.safetensors.*is a pickle", {}),
        (tmp_path / "absent", r"absent: no such folder", {}),
        (adapter(tmp_path, "few", 2, target_modules=["q"]), r"few: layers\.0\.v is missing", {}),
        (broken(good, tmp_path / "extra", lambda t: t | {"base_model.model.odd.lora_A.weight": t[key] + 0}),
         r"extra.*odd\.lora_A\.weight is no pair: odd has no lora_B", {}),
        (broken(good, tmp_path / "shape", lambda t: t | {key: torch.zeros(17, 4)}),
         r"shape: layers\.1\.v is \(17, 20\)", {}),
        (broken(good, tmp_path / "rank", r=5), r"rank: layers\.0\.q has rank 4, but adapter_config\.json says 5", {}),
        (broken(good, tmp_path / "ia3", peft_type="IA3"), r"ia3: peft_type 'IA3'", {}),
        (broken(good, tmp_path / "pissa", init_lora_weights="pissa"), r"pissa: init_lora_weights='pissa'", {}),
        (good, r"weights: 3 numbers for 2 adapters", {"weights": [1, 2, 3]}),
        (good, r"ties: no parameter 'densty'; did you mean 'density'", {"params": {"densty": 1}}),
        (good, r"no dense form", {"keep": "dense"}),
    ]  # fmt: skip
    for bad, told, how in cases:
        with pytest.raises(RetainError, match=told):
            merge_folders([good, bad], "ties", tmp_path / "out", **how)
        assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))
    a = broken(good, tmp_path / "llava", base_model_name_or_path="llava")
    b = broken(good, tmp_path / "qwen", base_model_name_or_path="qwen")
    with pytest.raises(RetainError, match=r"qwen: made for another base model .*qwen.*--any-base"):
        merge_folders([a, b], "ties", tmp_path / "out")
    merge_folders([a, b], "ties", tmp_path / "out", any_base=True)
    with pytest.raises(RetainError, match="not empty"):
        merge_folders([a, a], "ties", tmp_path / "out")


def test_half_precision_stays_and_overflow_is_told(tmp_path: Path) -> None:
    good = adapter(tmp_path, "good", 1)
    half = broken(good, tmp_path / "half", lambda t: {k: v.half() for k, v in t.items()})
    merge_folders([half, half], "average", tmp_path / "out")
    kinds = {v.dtype for v in load_file(tmp_path / "out/adapter_model.safetensors").values()}
    assert kinds == {torch.float16}
    merge_folders([half, good], "average", tmp_path / "mixed")
    assert {v.dtype for v in load_file(tmp_path / "mixed/adapter_model.safetensors").values()} == {
        torch.float32
    }
    with pytest.raises(RetainError, match=r"layers\.0\.q: .*do not fit torch\.float16"):
        merge_folders([half], "task_arithmetic", tmp_path / "x", weights=[1e7])


def test_folders_and_states_merge_alike(tmp_path: Path) -> None:
    folders = [adapter(tmp_path, f"a{i}", i) for i in range(2)]
    states = []
    for f in folders:
        t = load_file(f / "adapter_model.safetensors")
        states.append(
            {
                k.replace("base_model.model.", "").removesuffix(".weight"): 2 * v if "lora_B" in k else v
                for k, v in t.items()
            }
        )
    whole: dict[str, Any] = {"trim": "model"}
    for name, params in [
        *((name, {}) for name in ("ties", "copa", "knots_ties", "dare", "pcb")),
        *((name, whole) for name in ("ties", "knots_ties")),
    ]:
        want = merger(name)(states, keep="cat", **params)
        got = ours(folders, name, tmp_path / f"{name}{len(params)}", keep="cat", params=params)
        for path, delta in got.items():
            low = Low(want[f"{path}.lora_B"], want[f"{path}.lora_A"])
            torch.testing.assert_close(delta, low.dense(), atol=TOLERANCE, rtol=1e-4)
    summary = merge_folders(folders, "ties", tmp_path / "small", keep="svd", rank=2)
    assert "rank 2; truncated: relative error" in summary.text()
    low, error = truncated(Low(torch.eye(3), torch.eye(3)), 2)
    assert error == pytest.approx(math.sqrt(1 / 3)) and low.rank == 2
