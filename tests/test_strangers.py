"""Adapters that strangers bring: for every folder that merging writes, stock PEFT on the stock base gives the logits promised.

What goes in is made by stock PEFT on a stock model. What is promised is computed in plain torch from the live modules
of that model: dense changes per weight, merged, added to a stock model's weights. What is compared are logits.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import tiny
from retain.adapters.checkpoint import Checkpoint
from retain.merge import available_mergers, merger
from retain.merge.folders import merge_checkpoint, merge_folders

TOLERANCE = 2e-4  # logits of size about 5 in fp32: sums in another order
LANGUAGE = r"model\.language_model\..*\.(q_proj|v_proj|down_proj)"
Change = dict[str, tuple[Tensor, ...]]
"""Parameter to its change: (B, A) with the scale in B, or (dense,)."""


def stock(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny LLaVA as transformers has it."""
    hf, _ = tiny.BUILDERS["llava"](0)
    if tied:
        config = copy.deepcopy(hf.config)
        config.tie_word_embeddings = True
        one = type(hf)(config)
        one.load_state_dict({k: v for k, v in hf.state_dict().items() if k != "lm_head.weight"}, strict=False)
        one.tie_weights()
        hf = one
    return hf.to(dtype).eval()


def logits(model: Any) -> Tensor:
    """Two samples with a picture each, of different length."""
    ids = model.get_input_embeddings().weight.shape[0]
    rng = torch.Generator().manual_seed(3)
    image = model.config.image_token_id
    words = torch.randint(10, ids, (2, 8), generator=rng)
    words[words == image] = 11
    tokens = torch.cat([words[:, :2], torch.full((2, 9), image), words[:, 2:]], 1)
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    pixels = torch.randn(2, 3, 24, 24, generator=rng).to(next(model.parameters()).dtype)
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask, pixel_values=pixels).logits.float()
    return out[mask.bool()]


def stranger(folder: Path, seed: int, *, tied: bool = False, edit: Any = None, **config: Any) -> Change:
    """A folder by stock PEFT, with noise for training; `edit` is what its owner did to it. Its changes in plain torch."""
    hf = stock(tied=tied)
    table, head = hf.get_input_embeddings().weight, hf.lm_head.weight
    before = {k: v.clone() for k, v in hf.state_dict().items()}
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": LANGUAGE, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(hf, LoraConfig(**options)).eval()
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, p in peft.named_parameters():
                if "lora_magnitude" in key:
                    p.mul_(1 + 0.2 * torch.rand(p.shape, generator=rng))
                elif p.requires_grad:
                    assert p is not table and p is not head
                    p.add_(torch.randn(p.shape, generator=rng) * 0.4 / p.shape[-1] ** 0.5)
        peft.save_pretrained(folder)
    if edit:
        edit(folder)
    return changes(peft.base_model.model, before)


@torch.no_grad()
def changes(model: Any, before: dict[str, Tensor]) -> Change:
    """What PEFT's live modules do to each parameter of the base."""
    out: Change = {}
    for path, m in model.named_modules():
        if getattr(m, "lora_embedding_A", None):
            B, A = m.lora_embedding_B["default"], m.lora_embedding_A["default"]
            out[f"{path}.weight"] = (m.scaling["default"] * B, A)
        elif getattr(m, "lora_A", None):
            B, A = m.lora_B["default"].weight * m.scaling["default"], m.lora_A["default"].weight
            out[f"{path}.weight"] = (B, A)
            if "default" in m.lora_magnitude_vector:
                W, size = before[f"{path}.weight"], m.lora_magnitude_vector["default"].weight
                tuned = W + B @ A
                out[f"{path}.weight"] = (size[:, None] * tuned / tuned.norm(dim=1, keepdim=True) - W,)
            if m.lora_B["default"].bias is not None:
                out[f"{path}.bias"] = (m.lora_B["default"].bias * m.scaling["default"],)
        elif type(m).__name__ == "ModulesToSaveWrapper":
            for key, value in m.modules_to_save["default"].state_dict().items():
                out[f"{path}.{key}"] = (value - before[f"{path}.{key}"],)
    return out


@torch.no_grad()
def promised(
    given: list[Change],
    name: str,
    weights: list[float],
    *,
    tied: bool = False,
    shares: bool = False,
    **params: Any,
) -> Any:
    """A stock model with the merged changes in its weights; `shares`: full copies averaged, as without the base."""
    hf = stock(tied=tied)
    if tied:
        hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.clone())
    given = [
        {**{k: (torch.zeros_like(c[0]),) for k, c in given[0].items() if k.endswith("bias")}, **g}
        for g in given
    ]
    keys = {k: len(given[0][k]) for k in given[0]}
    states = [
        {
            n: t
            for k, c in g.items()
            for n, t in zip((f"{k}.lora_B", f"{k}.lora_A") if keys[k] == 2 else (k,), c)
        }
        for g in given
    ]
    merged = merger(name)(states, weights, keep="cat", **params)
    own = dict(hf.named_parameters(remove_duplicate=False))
    for key, count in keys.items():
        if count == 2:
            dense = merged[f"{key}.lora_B"] @ merged[f"{key}.lora_A"]
        elif shares and "projector" in key:
            dense = sum(w / sum(weights) * g[key][0] for w, g in zip(weights, given))
        else:
            dense = merged.get(key, merged.get(f"{key}.weight"))
        own[key].add_(dense.T if "embed_tokens" in key and count == 2 else dense)
    return hf


def saved(tmp: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    stock(tied=tied, dtype=dtype).save_pretrained(tmp / "base", **how)
    return tmp / "base"


def peft_loads(folder: Path, *, tied: bool = False, quiet: bool = False) -> Any:
    with warnings.catch_warnings():
        if not quiet:
            warnings.filterwarnings("error", message=".*missing.*")
        return PeftModel.from_pretrained(stock(tied=tied), folder).eval()


# -- what owners did to their folders ----------------------------------------------------------------------


def keys(rename: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({rename(k): v for k, v in tensors.items()}, file, {"format": "pt"})

    return edit


def named(name: str) -> Callable[[Path], None]:
    return keys(lambda k: k.replace(".weight", f".{name}.weight") if ".lora_" in k else k)


def transformers4(key: str) -> str:
    """The names of LLaVA up to transformers 4.51."""
    for new, old in (
        ("model.model.language_model.", "model.language_model.model."),
        ("model.model.vision_tower.", "model.vision_tower.vision_model."),
        ("model.model.multi_modal_projector.", "model.multi_modal_projector."),
    ):
        key = key.replace(new, old)
    return key.replace("base_model.model.lm_head", "base_model.model.language_model.lm_head")


def config_too(change: dict[str, Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        keys(transformers4)(folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))

    return edit


PROJECTOR = {"modules_to_save": ["multi_modal_projector"]}
SHORT = {"target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "ranks": ({"r": 2}, {"r": 5, "lora_alpha": 3}),
    "rslora": ({"use_rslora": True}, {"r": 6}),
    "patterns": (
        {"rank_pattern": {"layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"rank_pattern": {r".*down_proj": 2}, "use_rslora": True},
    ),
    "negative alpha": ({"lora_alpha": -4}, {}),
    "another name": ({"edit": named("sft")}, {"edit": named("policy")}),
    "a name in copies": (
        {**PROJECTOR, "edit": keys(lambda k: k.replace(
            "projector.", "projector.modules_to_save.sft.").replace(".lora_A.", ".lora_A.sft.").replace(
            ".lora_B.", ".lora_B.sft."))},
        {**PROJECTOR},
    ),
    "doubled prefix": (
        {"edit": keys(lambda k: f"base_model.model.{k}")},
        {"edit": keys(lambda k: "module." + k.replace(".self_attn", "._orig_mod.self_attn"))},
    ),
    "projector": (PROJECTOR, PROJECTOR),
    "vision tower": ({"target_modules": r".*vision_tower.*\.(q_proj|fc1)"}, {"target_modules": r".*vision_tower.*\.(q_proj|fc1)"}),
    "lm_head": ({"target_modules": ["lm_head", "q_proj"]}, {"target_modules": ["lm_head", "q_proj"], "r": 3}),
    "all-linear": ({"target_modules": "all-linear"}, {"target_modules": "all-linear", "r": 2}),
    "embed_tokens": ({"target_modules": ["embed_tokens", "v_proj"]}, {"target_modules": ["embed_tokens", "v_proj"], "r": 2}),
    "one layer": ({**SHORT, "layers_to_transform": [1]}, {**SHORT, "layers_to_transform": [1]}),
    "bias": ({"target_modules": r".*vision_tower.*fc1", "lora_bias": True}, {"target_modules": r".*vision_tower.*fc1"}),
    "saved tables": (
        {"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "transformers 4": (
        {**SHORT, "r": 2, "edit": keys(transformers4)},
        {**SHORT, "rank_pattern": {"layers.1.self_attn.v_proj": 5}, "edit": keys(transformers4)},
    ),
    "4 beside 5": ({**SHORT, "edit": keys(transformers4)}, {**SHORT, "r": 2}),
}  # fmt: skip
TWO = [1.0, 0.5]
NO_BASE = [k for k in KINDS if k != "saved tables"]


@pytest.mark.parametrize("kind", NO_BASE)
@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties"])
def test_without_the_base(kind: str, name: str, tmp_path: Path) -> None:
    given = [stranger(tmp_path / f"a{i}", i, **c) for i, c in enumerate(KINDS[kind])]
    merge_folders([tmp_path / "a0", tmp_path / "a1"], name, tmp_path / "out", weights=TWO, keep="cat")
    want = logits(promised(given, name, TWO, shares=True))
    got = logits(peft_loads(tmp_path / "out", quiet=True))
    assert (want - logits(stock())).abs().max() > 0.05  # or nothing was merged, and the test could not fail
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_with_the_base_and_merged_into_it(kind: str, name: str, tmp_path: Path) -> None:
    base, weights = saved(tmp_path, max_shard_size="40KB"), [1.0, -0.4]
    given = [stranger(tmp_path / f"a{i}", i, **c) for i, c in enumerate(KINDS[kind])]
    folders = [tmp_path / "a0", tmp_path / "a1"]
    want = logits(promised(given, name, weights))
    assert (want - logits(stock())).abs().max() > 0.05
    merge_folders(folders, name, tmp_path / "out", weights=weights, keep="cat", base=base)
    torch.testing.assert_close(logits(peft_loads(tmp_path / "out")), want, atol=TOLERANCE, rtol=0)
    merge_checkpoint(folders, name, tmp_path / "whole", weights=weights, base=base)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(whole), want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [n for n, m in available_mergers().items() if not m.per_module])
def test_every_merger(name: str, tmp_path: Path) -> None:
    """Language model, tower and projector, unequal scales; the projector once as factors, once as a full copy."""
    base = saved(tmp_path)
    for kind, config in (
        ("all", {"target_modules": "all-linear"}),
        ("copy", {"target_modules": LANGUAGE, **PROJECTOR}),
    ):
        folders = [tmp_path / f"{kind}{i}" for i in range(2)]
        given = [stranger(f, i, lora_alpha=6 + i, **config) for i, f in enumerate(folders)]
        if kind == "all":
            promised_by = {k: given[0][k] for k in given[0]}
            assert len(promised_by) > 20
        params = {"seed": 0} if "seed" in merger(name).params else {}
        want = logits(promised(given, name, TWO, **params))
        how: dict[str, Any] = {"weights": TWO, "params": params, "base": base}
        merge_folders(folders, name, tmp_path / f"{kind}-out", keep="cat", **how)
        torch.testing.assert_close(logits(peft_loads(tmp_path / f"{kind}-out")), want, atol=TOLERANCE, rtol=0)
        merge_checkpoint(folders, name, tmp_path / f"{kind}-whole", **how | {"keep": "cat"})
        whole = AutoModelForImageTextToText.from_pretrained(tmp_path / f"{kind}-whole").eval()
        torch.testing.assert_close(logits(whole), want, atol=TOLERANCE, rtol=0)


TIED: dict[str, dict[str, Any]] = {
    "a saved table": {"modules_to_save": ["embed_tokens"]},
    "a saved head": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "factors on the head": {"target_modules": ["lm_head", "q_proj"]},
    "factors on the table": {"target_modules": ["embed_tokens", "q_proj"]},
    "neither": {},
}


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("shards", ["1GB", "30KB"])
def test_embeddings_and_head_that_share_a_weight(kind: str, shards: str, tmp_path: Path) -> None:
    """PEFT changes one of the two; so does the merged checkpoint, which then says that they are two."""
    base = saved(tmp_path, tied=True, max_shard_size=shards)
    assert "lm_head.weight" not in Checkpoint(base).keys
    given = [stranger(tmp_path / f"a{i}", i, tied=True, **TIED[kind]) for i in range(2)]
    folders, weights = [tmp_path / "a0", tmp_path / "a1"], [1.0, -0.5]
    want = logits(promised(given, "task_arithmetic", weights, tied=True))
    how: dict[str, Any] = {"weights": weights, "base": base}
    merge_folders(folders, "task_arithmetic", tmp_path / "out", **how)
    torch.testing.assert_close(logits(peft_loads(tmp_path / "out", tied=True)), want, atol=TOLERANCE, rtol=0)
    merge_checkpoint(folders, "task_arithmetic", tmp_path / "whole", **how)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    assert (whole.lm_head.weight is whole.get_input_embeddings().weight) == (kind == "neither")
    torch.testing.assert_close(logits(whole), want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties"])
def test_dora(name: str, tmp_path: Path) -> None:
    base = saved(tmp_path)
    given = [stranger(tmp_path / f"a{i}", i, use_dora=not i, r=3 + i) for i in range(2)]
    given[1] = {k: (B @ A,) for k, (B, A) in given[1].items()}
    folders = [tmp_path / "a0", tmp_path / "a1"]
    want = logits(promised(given, name, TWO))
    merge_folders(folders, name, tmp_path / "out", weights=TWO, base=base, keep="cat")
    torch.testing.assert_close(logits(peft_loads(tmp_path / "out")), want, atol=TOLERANCE, rtol=0)
    merge_checkpoint(folders, name, tmp_path / "whole", weights=TWO, base=base)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(whole), want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Factors, copies and base in half precision: what is written is the fp32 sum, rounded once."""
    base = saved(tmp_path, dtype=dtype)

    def half(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, {"format": "pt"})

    folders = [tmp_path / "a0", tmp_path / "a1"]
    for i, folder in enumerate(folders):
        stranger(folder, i, edit=half, **PROJECTOR)
    merge_checkpoint(folders, "task_arithmetic", tmp_path / "whole", weights=TWO, base=base)
    merge_folders(folders, "task_arithmetic", tmp_path / "out", weights=TWO, base=base)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").state_dict()
    start = stock(dtype=dtype).state_dict()
    tensors = [load_file(f / "adapter_model.safetensors") for f in folders]
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {v.dtype for v in written.values()} == {dtype} == {v.dtype for v in whole.values()}
    for key, W in start.items():
        path = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in tensors[0]:
            pairs = [
                (t[f"{path}.lora_B.weight"].float(), t[f"{path}.lora_A.weight"].float()) for t in tensors
            ]
            delta = sum(w * 1.5 * B @ A for w, (B, A) in zip(TWO, pairs))
        elif "projector" in key:
            delta = sum(w * (t[f"base_model.model.{key}"].float() - W.float()) for w, t in zip(TWO, tensors))
            torch.testing.assert_close(written[f"base_model.model.{key}"], (W.float() + delta).to(dtype))
        else:
            assert torch.equal(whole[key], W)
            continue
        torch.testing.assert_close(
            whole[key], (W.float() + delta).to(dtype), atol=0, rtol=torch.finfo(dtype).eps
        )
