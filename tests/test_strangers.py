"""Adapters that strangers bring: what merging writes gives, in stock PEFT on the stock base, the logits promised.

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
from retain.adapters.bank import Mix
from retain.adapters.checkpoint import Checkpoint
from retain.adapters.lora import LoraSpec
from retain.adapters.peft_format import load_peft, merge_into_base, save_peft
from retain.merge import available_mergers, merger
from retain.merge.folders import merge_checkpoint, merge_folders
from retain.models.hf import HFModel
from retain.types import RetainError

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
    "vision tower": (
        {"target_modules": r".*vision_tower.*\.(q_proj|fc1)"}, {"target_modules": r".*vision_tower.*\.(q_proj|fc1)"},
    ),
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
NAMES = ("ties", "average", "task_arithmetic")


def paired(kinds: Any, names: tuple[str, ...]) -> list[Any]:
    """Every kind with one merger, in turn; with the others in the slow suite."""
    every = [(k, n, i % len(names) == j) for i, k in enumerate(kinds) for j, n in enumerate(names)]
    return [pytest.param(k, n, id=f"{k}-{n}", marks=() if now else pytest.mark.slow) for k, n, now in every]


@pytest.mark.parametrize(("kind", "name"), paired([k for k in KINDS if k != "saved tables"], NAMES))
def test_without_the_base(kind: str, name: str, tmp_path: Path) -> None:
    given = [stranger(tmp_path / f"a{i}", i, **c) for i, c in enumerate(KINDS[kind])]
    merge_folders([tmp_path / "a0", tmp_path / "a1"], name, tmp_path / "out", weights=TWO, keep="cat")
    want = logits(promised(given, name, TWO, shares=True))
    got = logits(peft_loads(tmp_path / "out", quiet=True))
    assert (want - logits(stock())).abs().max() > 0.05  # or nothing was merged, and the test could not fail
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("kind", "name"), paired(KINDS, NAMES[::2]))
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


def test_a_base_with_the_names_of_transformers_4(tmp_path: Path) -> None:
    """As the published llava-hf files have them: language_model.model, vision_tower.vision_model."""
    base, old = saved(tmp_path), tmp_path / "old"
    base.rename(old)
    tensors = load_file(old / "model.safetensors")
    save_file({k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in tensors.items()},
              old / "model.safetensors", {"format": "pt"})  # fmt: skip
    given = [stranger(tmp_path / f"a{i}", i, target_modules="all-linear") for i in range(2)]
    merge_checkpoint([tmp_path / "a0", tmp_path / "a1"], "ties", tmp_path / "whole", weights=TWO, base=old)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(whole), logits(promised(given, "ties", TWO)), atol=TOLERANCE, rtol=0)
    written, given_names = (load_file(f / "model.safetensors").keys() for f in (tmp_path / "whole", old))
    assert written == given_names


@pytest.mark.parametrize("name", [n for n, m in available_mergers().items() if not m.per_module])
def test_every_merger(name: str, tmp_path: Path) -> None:
    """Language model, tower and projector, unequal scales; the projector as a full copy."""
    base, folders = saved(tmp_path), [tmp_path / f"a{i}" for i in range(2)]
    options: dict[str, Any] = {"target_modules": "all-linear", **PROJECTOR}
    given = [stranger(f, i, lora_alpha=6 + i, **options) for i, f in enumerate(folders)]
    assert len(given[0]) > 30 and sum("projector" in k for k in given[0]) == 4
    params = {"seed": 0} if "seed" in merger(name).params else {}
    want = logits(promised(given, name, TWO, **params))
    how: dict[str, Any] = {"weights": TWO, "params": params, "base": base, "keep": "cat"}
    merge_folders(folders, name, tmp_path / "out", **how)
    torch.testing.assert_close(logits(peft_loads(tmp_path / "out")), want, atol=TOLERANCE, rtol=0)
    merge_checkpoint(folders, name, tmp_path / "whole", **how)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(whole), want, atol=TOLERANCE, rtol=0)


TIED: dict[str, dict[str, Any]] = {
    "a saved table": {"modules_to_save": ["embed_tokens"]},
    "a saved head": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "factors on the head": {"target_modules": ["lm_head", "q_proj"]},
    "factors on the table": {"target_modules": ["embed_tokens", "q_proj"]},
    "neither": {},
}


@pytest.mark.parametrize(
    ("kind", "shards"), [*((k, "1GB") for k in TIED), *((k, "30KB") for k in [*TIED][::3])]
)
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


# -- LLaVA's own scripts -----------------------------------------------------------------------------------


def llava(key: str) -> str:
    """The names of LLaVA's own model class."""
    return key.replace("model.model.language_model.layers", "model.model.layers")


def beside(file: str, prefix: str) -> Callable[[Path], None]:
    """What LLaVA's scripts leave: the language model's factors, and the projector in a file of its own."""

    def edit(folder: Path) -> None:
        stored = load_file(folder / "adapter_model.safetensors")
        own = {"linear_1": "0", "linear_2": "2"}
        projector = {
            f"{prefix}mm_projector.{own[k.split('.')[-2]]}.{k.split('.')[-1]}": v
            for k, v in stored.items()
            if "multi_modal_projector" in k
        }
        assert len(projector) == 4
        rest = {llava(k): v for k, v in stored.items() if "multi_modal_projector" not in k}
        save_file(rest, folder / "adapter_model.safetensors")
        save_file(projector, folder / file)
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"modules_to_save": None, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("file", "prefix"),
    [("non_lora_trainables.safetensors", "base_model.model.model."), ("mm_projector.safetensors", "model.")],
)
@pytest.mark.parametrize("with_base", [False, True])
def test_llavas_projector_beside_the_adapter_is_read(
    with_base: bool, file: str, prefix: str, tmp_path: Path
) -> None:
    base = saved(tmp_path)
    given = [stranger(tmp_path / f"a{i}", i, edit=beside(file, prefix), **PROJECTOR) for i in range(2)]
    folders = [tmp_path / "a0", tmp_path / "a1"]
    how: dict[str, Any] = {"weights": TWO, "base": base if with_base else None}
    merge_folders(folders, "task_arithmetic", tmp_path / "out", **how)
    want = logits(promised(given, "task_arithmetic", TWO, shares=not with_base))
    torch.testing.assert_close(logits(peft_loads(tmp_path / "out")), want, atol=TOLERANCE, rtol=0)
    if with_base:
        merge_checkpoint(folders, "task_arithmetic", tmp_path / "whole", **how)
        whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
        torch.testing.assert_close(logits(whole), want, atol=TOLERANCE, rtol=0)
    model = tiny.model()
    load_peft(model.adapters, "llava", folders[0])
    state = model.adapters.state("llava")
    for key, value in given[0].items():
        if "projector" in key:
            torch.testing.assert_close(state[key], value[0], atol=1e-6, rtol=0)


# -- into our own bank -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["another name", "doubled prefix", "a name in copies", "transformers 4", "negative alpha"]
)
def test_the_bank_reads_what_strangers_bring(kind: str, tmp_path: Path) -> None:
    change = stranger(tmp_path / "a", 0, **{**KINDS[kind][0], "r": 4, "target_modules": LANGUAGE})
    model = tiny.model()
    load_peft(model.adapters, "theirs", tmp_path / "a")
    state, scale = model.adapters.state("theirs"), tiny.SPEC.scale
    found = 0
    for key, parts in change.items():
        path = key.removesuffix(".weight")
        if f"{path}.lora_A" in state:
            torch.testing.assert_close(
                scale * state[f"{path}.lora_B"] @ state[f"{path}.lora_A"], parts[0] @ parts[1]
            )
        else:
            torch.testing.assert_close(state[key], parts[0], atol=1e-6, rtol=0)
        found += 1
    assert found >= 4


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_ours_is_written_for_stock_peft_and_merged(tied: bool, tmp_path: Path) -> None:
    """Sites on the head, in the tower and the projector; head and embeddings that share a weight come apart."""
    _, processor = tiny.BUILDERS["llava"](0)
    spec = LoraSpec(rank=3, alpha=4.0, targets=r"lm_head|q_proj", dense="projector")
    model = HFModel(stock(tied=tied), processor, spec)
    tiny.fill(model.adapters, "a", size=0.5)
    batch = model.collate(tiny.examples(), answers=True)
    with torch.no_grad(), model.adapters.using(Mix({"a": 1.0})):
        want = model(batch).logits_NV
    assert (want - model(batch).logits_NV).abs().max() > 0.5
    save_peft(model.adapters, "a", tmp_path / "peft", "tiny")
    if not tied:  # PEFT's own merge would write into both
        theirs = peft_loads(tmp_path / "peft").merge_and_unload()
        got = HFModel(theirs, processor, LoraSpec(targets="o_proj", dense=""))
        torch.testing.assert_close(got(batch).logits_NV, want, atol=TOLERANCE, rtol=0)
    assert merge_into_base(model, Mix({"a": 1.0}), tmp_path / "whole", [batch]) < TOLERANCE
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(
        logits(whole), logits(peft_loads(tmp_path / "peft", tied=tied)), atol=TOLERANCE, rtol=0
    )


def test_a_small_change_of_a_half_precision_projector_is_kept(tmp_path: Path) -> None:
    """A copy is base + change; in bf16 the change would be gone."""
    _, processor = tiny.BUILDERS["llava"](0)
    model = HFModel(stock(dtype=torch.bfloat16), processor, tiny.SPEC)
    tiny.fill(model.adapters, "a", size=1e-3)
    load_peft(model.adapters, "back", save_peft(model.adapters, "a", tmp_path / "a", "tiny"))
    a, back = model.adapters.state("a"), model.adapters.state("back")
    for key in a:
        torch.testing.assert_close(a[key], back[key], atol=1e-6, rtol=0)


# -- what is refused ---------------------------------------------------------------------------------------

KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
B_KEY = KEY.replace("lora_A", "lora_B")


def broken(tensors: Any = None, config: Any = None, files: Any = None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(tensors(load_file(file)) if tensors else load_file(file), file, {"format": "pt"})
        there = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config(there) if config else there))
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)

    return edit


def field(**change: Any) -> Callable[[Path], None]:
    return broken(config=lambda c: c | change)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tensors": (broken(lambda t: {}), r"adapter_model\.safetensors: it holds no tensor"),
    "zero-size tensors": (
        broken(lambda t: t | {KEY: torch.zeros(0)}), r"q_proj\.lora_A\.weight is empty, its shape is \(0,\); a ZeRO-3"),
    "A without B": (
        broken(lambda t: {k: v for k, v in t.items() if k != B_KEY}), r"q_proj\.lora_A\.weight is no pair: .*has no lora_B"),
    "B without A": (
        broken(lambda t: {k: v for k, v in t.items() if k != KEY}), r"q_proj\.lora_B\.weight is no pair: .*no lora_A"),
    "an unknown key": (
        broken(lambda t: t | {"base_model.model.odd.weight": torch.ones(2)}), r"model\.odd\.weight has no place"),
    "a parameter of another method": (
        broken(lambda t: t | {KEY.replace("lora_A.weight", "lora_diag"): torch.ones(4)}), r"q_proj\.lora_diag has no place"),
    "two adapters": (
        broken(lambda t: {k.replace("A.weight", "A.a.weight").replace("B.weight", "B.b.weight"): v for k, v in t.items()}),
        r"several adapters, \['a', 'b'\]"),
    "the same twice": (
        broken(lambda t: t | {f"module.{KEY}": t[KEY] + 1}), r"are the same tensor of model\.language_model\.layers\.0"),
    "factors that do not fit": (
        broken(lambda t: t | {B_KEY: torch.ones(32, 5)}), r"lora_A \(4, 32\) and lora_B \(32, 5\) are no"),
    "a flat factor": (broken(lambda t: t | {KEY: torch.ones(128)}), r"factors of 1 dimensions"),
    "NaN": (broken(lambda t: t | {KEY: t[KEY] * float("nan")}), r"adapter_model\.saf.*q_proj\.lora_A\.weight holds nan"),
    "infinity": (broken(lambda t: t | {B_KEY: t[B_KEY] / 0}), r"q_proj\.lora_B\.weight holds (-?inf|nan)"),
    "integers": (broken(lambda t: t | {KEY: t[KEY].to(torch.int8)}), r"q_proj\.lora_A\.weight is stored as I8"),
    "a saved module that is not there": (field(modules_to_save=["lm_head"]), r"modules_to_save names 'lm_head', but no"),
    "alpha null": (field(lora_alpha=None), r"adapter_config\.json: lora_alpha: None is no finite number"),
    "alpha absent": (broken(config=lambda c: {k: v for k, v in c.items() if k != "lora_alpha"}), r"lora_alpha is missing"),
    "alpha a word": (field(lora_alpha="16"), r"lora_alpha: '16' is no finite number"),
    "alpha infinite": (field(lora_alpha=float("inf")), r"lora_alpha: inf is no finite number"),
    "alpha without end": (field(lora_alpha=10**400), r"lora_alpha: 10{78}… is no finite number"),
    "r null": (field(r=None), r"r: None is no rank"),
    "r zero": (field(r=0), r"r: 0 is no rank"),
    "r that disagrees": (field(r=7), r"_proj has rank 4, but adapter_config\.json says 7"),
    "a broken rank pattern": (field(rank_pattern={"(": 4}), r"rank_pattern: '\(' is no regular expression"),
    "a pattern of words": (field(alpha_pattern={"q_proj": "high"}), r"alpha_pattern: 'q_proj': 'high' is no finite number"),
    "a pattern that is a list": (field(rank_pattern=[4]), r"rank_pattern: \[4\] is no mapping"),
    "a broken target": (field(target_modules="*q_proj"), r"target_modules: '\*q_proj' is no regular expression"),
    "targets that are numbers": (field(target_modules=[1]), r"target_modules: \[1\] is no list"),
    "layers that are words": (field(layers_to_transform=["last"]), r"layers_to_transform: \['last'\] is no layer"),
    "another method": (field(peft_type="ADALORA"), r"peft_type 'ADALORA' is not LoRA"),
    "DoRA without sizes": (field(use_dora=True), r"(use_dora cannot|_proj has no lora_magnitude_vector)"),
    "quantised adapters": (field(use_qalora=True), r"use_qalora cannot be loaded"),
    "KaSA": (field(kasa_config={"beta": 1}), r"kasa_config cannot be loaded"),
    "biases of the base": (field(bias="lora_only"), r"bias='lora_only' changes the base's biases"),
    "LLaVA's pickle": (broken(files={"non_lora_trainables.bin": b"x"}), r"trainables\.bin.*pickle.*convert it"),
    "a pickled projector": (broken(files={"mm_projector.bin": b"x"}), r"mm_projector\.bin.*convert it"),
    "the tower beside it": (broken(files={"vit.safetensors": b"x"}), r"vit\.safetensors holds weights beside the adapter"),
    "weights of any name": (broken(files={"extra_state.pt": b"x"}), r"extra_state\.pt holds weights beside"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_lost_is_refused(what: str, tmp_path: Path) -> None:
    edit, told = REFUSED[what]
    stranger(tmp_path / "good", 0)
    stranger(tmp_path / "bad", 1)
    edit(tmp_path / "bad")
    before = sorted(tmp_path.iterdir())
    for folders in (["bad"], ["good", "bad"]):
        with pytest.raises(RetainError, match=told) as caught:
            merge_folders([tmp_path / f for f in folders], "average", tmp_path / "out")
        assert "bad" in str(caught.value)
    bank = tiny.model().adapters
    with pytest.raises(RetainError, match=told):
        load_peft(bank, "x", tmp_path / "bad")
    assert not bank.names and sorted(tmp_path.iterdir()) == before


def test_what_a_trainer_leaves_beside_an_adapter_does_no_harm(tmp_path: Path) -> None:
    names = (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "scaler.pt",
        "adapter_model.bin",
        "README.md",
    )
    stranger(tmp_path / "a", 0, edit=broken(files=dict.fromkeys(names, b"x")))
    merge_folders([tmp_path / "a"], "average", tmp_path / "out")


def test_messages_say_what_is_true(tmp_path: Path) -> None:
    """Which name was not found, whose shape differs; never another base where it is the same."""
    base = saved(tmp_path)
    stranger(tmp_path / "a", 0, target_modules=["lm_head", "q_proj"])
    stranger(tmp_path / "b", 1, **SHORT)
    stranger(tmp_path / "c", 2, **PROJECTOR)
    stranger(tmp_path / "v4", 2, edit=keys(transformers4), **PROJECTOR)
    odd, wide = (
        keys(lambda k: k.replace("layers.1.", "layers.9.")),
        broken(lambda t: t | {B_KEY: torch.ones(33, 4)}),
    )
    stranger(tmp_path / "odd", 0, edit=odd, **SHORT)
    stranger(tmp_path / "wide", 0, edit=wide, **SHORT)

    def head(folder: Path) -> None:
        broken(lambda t: {k: v + ("base_layer" in k) for k, v in t.items()})(folder)

    stranger(
        tmp_path / "own less", 1, target_modules=["lm_head", "q_proj"],
        edit=broken(lambda t: {k: v for k, v in t.items() if "base_layer" not in k}),
    )  # fmt: skip
    stranger(tmp_path / "resized", 1, target_modules=["lm_head", "q_proj"], edit=head)
    cases: list[tuple[list[str], Any, dict[str, Any], str]] = [
        (["a", "own less"], merge_folders, {}, r"own less: it has no weights of lm_head itself.*--base DIR"),
        (
            ["odd"],
            merge_folders,
            {"base": base},
            r"odd: .*base: this model has no module 'model.*layers\.9\.[\w.]*_proj'",
        ),
        (["odd"], merge_checkpoint, {"base": base}, r"odd: .*base: this model has no module"),
        (
            ["wide"],
            merge_checkpoint,
            {"base": base},
            r"wide: .*q_proj is \(33, 32\), the base has \(32, 32\)",
        ),
        (["a", "b"], merge_folders, {}, r"b: lm_head is missing"),
        (
            ["a", "resized"],
            merge_folders,
            {},
            r"resized: .*lm_head\.base_layer\.weight holds other weights than .*a: resized",
        ),
        (
            ["resized"],
            merge_folders,
            {"base": base},
            r"lm_head\.base_layer\.weight holds other weights than .*base",
        ),
        (
            ["c", "c"],
            merge_folders,
            {"weights": [1, -0.9]},
            r"full copies with the weights \[1\.0, -0\.9\].*--base DIR",
        ),
        (["v4"], merge_folders, {}, r"v4: multi_modal_projector\.linear_1.*transformers 4.*--base DIR"),
        (["a"], merge_folders, {"base": tmp_path}, r"no model folder"),
    ]
    for names, do, how, told in cases:
        with pytest.raises(RetainError, match=told) as caught:
            do([tmp_path / n for n in names], "task_arithmetic", tmp_path / "out", **how)
        assert "another base" not in str(caught.value)
    (tmp_path / "q").mkdir()
    (tmp_path / "q/config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(RetainError, match=r"quantised .awq."):
        merge_folders([tmp_path / "a"], "average", tmp_path / "out", base=tmp_path / "q")
    nested = tmp_path / "nested"
    stranger(nested / "sft", 0)
    with pytest.raises(RetainError, match=r"nested: no adapter_config\.json.*inside it: \['sft'\]"):
        merge_folders([nested], "average", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_largest_entries_of_the_model_are_those_of_all_shards(tmp_path: Path) -> None:
    """`trim: model` ranks the entries of every module, wherever its weight lies."""
    given = [stranger(tmp_path / f"a{i}", i, lora_alpha=6 + i) for i in range(2)]
    folders, params = [tmp_path / "a0", tmp_path / "a1"], {"trim": "model", "density": 0.1}
    base = saved(tmp_path, max_shard_size="30KB")
    merge_checkpoint(folders, "ties", tmp_path / "whole", weights=TWO, base=base, params=params)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(
        logits(whole), logits(promised(given, "ties", TWO, **params)), atol=TOLERANCE, rtol=0
    )


def test_other_files_of_the_base_are_copied_but_not_its_old_weights(tmp_path: Path) -> None:
    base = saved(tmp_path)
    (base / "guide").mkdir()
    for name in (
        "tokenizer.json",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "guide/model.safetensors",
    ):
        (base / name).write_bytes(b"x")
        (base / name).chmod(0o400)
    stranger(tmp_path / "a", 0)
    merge_checkpoint([tmp_path / "a"], "average", tmp_path / "whole", base=base)
    there = {str(p.relative_to(tmp_path / "whole")) for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    assert there == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "guide/model.safetensors",
    }
    (tmp_path / "mine").write_text("")
    wanted = (tmp_path / "mine").stat().st_mode
    assert {p.stat().st_mode for p in (tmp_path / "whole").rglob("*") if p.is_file()} == {wanted}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "idefics3", "qwen3_vl"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """All linear layers and the projector's family; weights of the merged checkpoint are those that PEFT merges."""
    hf, _ = tiny.BUILDERS[family](0)
    hf.save_pretrained(tmp_path / "base")
    for i in range(2):
        peft = get_peft_model(tiny.BUILDERS[family](0)[0], LoraConfig(r=2 + i, target_modules="all-linear"))
        rng = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in peft.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=rng) * 0.1)
        peft.save_pretrained(tmp_path / f"a{i}")
    folders, how = [tmp_path / "a0", tmp_path / "a1"], {"base": tmp_path / "base", "weights": TWO}
    merge_folders(folders, "task_arithmetic", tmp_path / "out", **how)
    merge_checkpoint(folders, "task_arithmetic", tmp_path / "whole", **how)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        tuned = PeftModel.from_pretrained(tiny.BUILDERS[family](0)[0], tmp_path / "out")
    want = tuned.merge_and_unload().state_dict()
    got = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").state_dict()
    start, moved = hf.state_dict(), 0
    assert got.keys() == want.keys()
    for key, W in want.items():
        torch.testing.assert_close(got[key], W, atol=1e-5, rtol=0)
        moved += not torch.equal(W, start[key])
    assert moved > 14
