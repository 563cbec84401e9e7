"""Adapters on disk are stock PEFT: what we write loads in plain peft with equal logits, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.adapters.peft_folder import PeftFolder
from retain.adapters.peft_format import load_peft, merge_into_base, save_peft
from retain.models.hf import HFModel
from retain.types import RetainError

TOLERANCE = 1e-4  # logits of size ~5 in fp32: sums in another order


def plain_logits(hf: Any, model: HFModel, batch: Any) -> torch.Tensor:
    """Logits of a plain (or PEFT-wrapped) Hugging Face model at the answer positions, by its own forward."""
    each = [
        model.encode.image(ref, name)
        for ref, name in zip(batch.meta["images"], batch.meta["image_ids"], strict=True)
    ]
    inputs = dict(batch.inputs) | {k: torch.cat([p[k] for p in each]) for k in each[0]}
    inputs.pop("position_ids", None)
    if model.family.grid_rope:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.encode.image_token_id).int()
        inputs["image_grid_thw"] = inputs["image_grid_thw"].long()
    if model.family.name == "idefics3":
        inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)[None]
        inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].flatten(0, 1)[None]
    dtype = next(hf.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        logits = hf(**inputs).logits
    chosen = torch.nn.functional.pad(batch.labels_BT[:, 1:], (0, 1), value=-100) != -100
    return logits[chosen]


def equal_sized() -> list[Any]:
    """Examples whose images give pixel tensors that can be stacked, as Hugging Face wants them."""
    return [
        tiny.example(0),
        tiny.example(3, 1, "left?", "right"),
        tiny.example(4, 1, "How many shapes?", "three"),
    ]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_adapter_equals_ours_in_plain_peft(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    tiny.fill(model.adapters, "a")
    batch = model.collate(equal_sized(), answers=True)
    with model.adapters.using(Mix({"a": 1.0})):
        ours = model(batch).logits_NV
    off = model(batch).logits_NV
    assert (ours - off).abs().max() > 0.1  # the adapter does something, or the test could not fail
    save_peft(model.adapters, "a", tmp_path, "tiny")
    hf, _ = tiny.BUILDERS[family](0)
    theirs = plain_logits(PeftModel.from_pretrained(hf, tmp_path).eval(), model, batch)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_mix_exports_as_one_adapter(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    tiny.fill(model.adapters, "a", "b", "c")
    mix = Mix({"a": 0.5, "b": -0.25}, by_layer={1: {"c": 1.5}})
    batch = model.collate(equal_sized(), answers=True)
    with model.adapters.using(mix):
        ours = model(batch).logits_NV
    save_peft(model.adapters, mix, tmp_path, "tiny")
    hf, _ = tiny.BUILDERS[family](0)
    peft = PeftModel.from_pretrained(hf, tmp_path).eval()
    assert peft.peft_config["default"].r == 3 * tiny.SPEC.rank
    torch.testing.assert_close(ours, plain_logits(peft, model, batch), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_adapter_loads_in_ours(family: str, rslora: bool, tmp_path: Path) -> None:
    """Other alpha, rsLoRA or not, only some layers, projector or not: logits equal PEFT's own."""
    model = tiny.model(family)
    hf, _ = tiny.BUILDERS[family](0)
    targets = rf"{model.family.language}.*\.(q_proj|v_proj|down_proj)"
    saved = None if rslora else [path for path, s in model.adapters.sites.items() if s.group == "projector"]
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, use_rslora=rslora, modules_to_save=saved,
        alpha_pattern={"v_proj": 3},
    )  # fmt: skip
    peft = get_peft_model(hf, config).eval()
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in peft.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=rng) * 0.1)
    peft.save_pretrained(tmp_path)
    batch = model.collate(equal_sized(), answers=True)
    load_peft(model.adapters, "foreign", tmp_path)
    with model.adapters.using(Mix({"foreign": 1.0})):
        ours = model(batch).logits_NV
    assert (ours - model(batch).logits_NV).abs().max() > 0.05
    torch.testing.assert_close(ours, plain_logits(peft, model, batch), atol=TOLERANCE, rtol=0)


def test_saving_and_loading_gives_the_same_bits(tmp_path: Path) -> None:
    model = tiny.model()
    tiny.fill(model.adapters, "a")
    load_peft(model.adapters, "back", save_peft(model.adapters, "a", tmp_path, "tiny"))
    a, back = model.adapters.state("a"), model.adapters.state("back")
    for key in a:
        if "projector" not in key:  # the projector is stored as base + delta: one rounding
            assert torch.equal(a[key], back[key]), key
        torch.testing.assert_close(a[key], back[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merged_checkpoint_is_plain_and_equal(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    tiny.fill(model.adapters, "a", "b")
    batches = [model.collate(tiny.examples(), answers=True)]
    mix = Mix({"a": 1.0, "b": 0.5})
    assert merge_into_base(model, mix, tmp_path, batches) < TOLERANCE
    assert merge_into_base(model, Mix(), tmp_path / "base", batches) == 0
    again = HFModel.load(tmp_path, tiny.SPEC)
    with model.adapters.using(mix):
        ours = model.generate(model.collate(tiny.examples(), answers=False), 6)
    assert again.generate(again.collate(tiny.examples(), answers=False), 6) == ours


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    model = tiny.model()
    tiny.fill(model.adapters, "a")
    save_peft(model.adapters, "a", tmp_path, "tiny")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    def folder(name: str, tensors: dict[str, torch.Tensor] = tensors, **change: Any) -> Path:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | change))
        return tmp_path / name

    gone = sorted(tensors)[-1]
    cases = {
        folder("dora", use_dora=True): "use_dora",
        folder("kind", peft_type="IA3"): "IA3",
        folder("bias", bias="all"): "bias='all'",
        folder("pissa", init_lora_weights="pissa"): "pissa",
        folder("missing", {k: v for k, v in tensors.items() if k != gone}): gone.removesuffix(".weight"),
        folder("extra", tensors | {"base_model.model.nowhere.lora_A.weight": torch.zeros(1)}): "nowhere",
        tmp_path / "absent": "adapter_config.json",
    }
    for place, text in cases.items():
        with pytest.raises(RetainError, match=text.replace(".", r"\.")):
            load_peft(model.adapters, "x", place)
        assert "x" not in model.adapters.names
    with pytest.raises(RetainError, match="rank 4, this bank has rank 8"):
        load_peft(tiny.model(spec=LoraSpec(rank=8)).adapters, "x", tmp_path)
    other = tiny.model(seed=1)
    with pytest.raises(RetainError, match=f"{model.fingerprint()}.*{other.fingerprint()}"):
        load_peft(other.adapters, "x", tmp_path)
    with pytest.raises(RetainError, match="per sample"):
        save_peft(model.adapters, Mix({"a": torch.ones(2)}), tmp_path, "tiny")


# -- configurations and tensors that PEFT cannot mean --------------------------------------------------------------

CONFIGS: dict[str, Any] = {
    "lora_alpha": ["many", [4], None, float("nan"), 0, True, 10**40, "4"],
    "r": ["many", [4], -1, 0, 1.5, True, 10**40],
    "rank_pattern": [[], "x", {"(": 4}, {"a": "b"}, {"a": 0}, {"(a+)+(?=b)": 4}, {"a" * 200_000: 4}],
    "alpha_pattern": [[1], {"a": None}, {"a": float("inf")}, {"(x|y)*\\1": 4}],
    "target_modules": [3, {"a": 1}, [1], [""], ["x"] * 100_001, "("],
    "exclude_modules": [3, [None]],
    "modules_to_save": ["all", [""], [3]],
    "layers_to_transform": ["all", [1.5], True],
    "use_rslora": ["false", 1],
    "use_dora": ["no"],
    "bias": [3, ["none"]],
    "peft_type": ["OFT", None, ["LORA"], 3],
    "base_model_name_or_path": [3],
}
"""Values of a field that are refused by its name."""


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.model("llava")
    tiny.fill(model.adapters, "a")
    return save_peft(model.adapters, "a", tmp_path_factory.mktemp("healthy"), "tiny")


def opened(healthy: Path, folder: Path, config: dict[str, Any], change: Any = None) -> PeftFolder:
    """The adapter with another config and other tensors, read whole."""
    folder.mkdir()
    said = json.loads((healthy / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, **config}))
    tensors = load_file(healthy / "adapter_model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    found = PeftFolder.open(folder)
    for key in found.shapes:
        found.tensor(key)
    return found


@pytest.mark.parametrize(("key", "i"), [(k, i) for k, v in CONFIGS.items() for i in range(len(v))])
def test_a_config_that_peft_cannot_mean(key: str, i: int, healthy: Path, tmp_path: Path) -> None:
    with pytest.raises(RetainError) as raised:
        opened(healthy, tmp_path / "x", {key: CONFIGS[key][i]})
    said = str(raised.value)
    assert key in said and str(tmp_path / "x") in said and "\n" not in said and len(said) < 600


def test_a_config_that_peft_can_mean(healthy: Path, tmp_path: Path) -> None:
    more = {
        "lora_alpha": 3.5, "alpha_pattern": {r"layers\.(0|1)\..*q_proj": 2, "^model.x": 1.0}, "exclude_modules": "vision.*",
        "layers_to_transform": None, "a_field_of_peft_99": {"x": 1},
    }  # fmt: skip
    assert opened(healthy, tmp_path / "x", more).config["lora_alpha"] == 3.5


def _instead(tensors: dict[str, Any], new: Any, rename: str = "{}") -> None:
    key = next(k for k in sorted(tensors) if "lora_A" in k)
    tensors[rename.format(key)] = new(tensors.pop(key))


TENSORS: dict[str, tuple[Any, str]] = {
    "integers": (lambda t: _instead(t, lambda x: x.int()), "I32"),
    "bytes": (lambda t: _instead(t, lambda x: x.to(torch.uint8)), "U8"),
    "yes and no": (lambda t: _instead(t, lambda x: x > 0), "BOOL"),
    "NaN": (lambda t: _instead(t, lambda x: x * float("nan")), "nan"),
    "empty": (lambda t: _instead(t, lambda x: x[:0].contiguous()), "empty"),
    "flat": (lambda t: _instead(t, lambda x: x.flatten()), "dimensions"),
    "a path": (lambda t: _instead(t, lambda x: x, "../../{}"), "no name of a tensor"),
    "dots": (lambda t: _instead(t, lambda x: x, "a..{}"), "no name of a tensor"),
    "a long name": (lambda t: _instead(t, lambda x: x, "a" * 2000 + ".{}"), "no name of a tensor"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_no_factors(name: str, healthy: Path, tmp_path: Path) -> None:
    change, word = TENSORS[name]
    with pytest.raises(RetainError, match=word) as raised:
        opened(healthy, tmp_path / "x", {}, change)
    assert "adapter_model.safetensors" in str(raised.value)
