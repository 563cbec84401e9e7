"""Write `processors.json`: ids and pixels from the stock processors that need torchvision to be built.

    python tests/golden/make_processors.py

It wants what `retain` does not: torchvision (of torch's release; its own operators are not used, so a build for
another device will do) and num2words. For every family of NEEDS and every case of `tests/talks.py` it stores what
`AutoProcessor.from_pretrained(folder)` gives for the prompt with the Pillow image processor in place (ids and grids
whole; of pixels the shape, their sums and some values), and how far torchvision's own resizing is from Pillow's.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

# torchvision registers fake kernels of operators that a build for another device does not have
sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoImageProcessor, AutoProcessor  # noqa: E402

import stock  # noqa: E402
import zoo  # noqa: E402
from talks import talks  # noqa: E402

SAMPLES = 120
NEEDS = (
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "smolvlm",
    "mistral3",
    "pixtral",
)
"""Families whose processor cannot be built without torchvision."""


def summary(value: torch.Tensor) -> Any:
    """Whole numbers as they are; of anything else shape, sum, sum of squares and evenly spaced values."""
    if not value.is_floating_point() and value.numel() <= 2000:
        return value.tolist()
    flat = value.double().flatten()
    step = max(1, flat.numel() // SAMPLES)
    some = [round(float(x), 4) for x in flat[::step]]
    sums = [round(float(flat.sum()), 3), round(float((flat * flat).sum()), 3)]
    return {"shape": list(value.shape), "sums": sums, "step": step, "values": some}


def side(folder: Path) -> tuple[Any, Any]:
    """The stock processor, and an image processor of the other back end."""
    processor = AutoProcessor.from_pretrained(folder)
    own = processor.image_processor
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor, own


def family(name: str, folder: Path) -> dict[str, Any]:
    """What the processor of a family gives, by case."""
    processor, own = side(zoo.build(name, folder))
    asked = stock.Stock.__new__(stock.Stock)
    asked.processor = processor
    asked.folder = folder
    found: dict[str, Any] = {"class": type(processor).__name__}
    for case, each in talks().items():
        made = asked.call(each)
        found[case] = {k: summary(torch.as_tensor(v)) for k, v in sorted(made.items())}
        if "pixel_values" in made:
            pil, processor.image_processor = processor.image_processor, own
            other = asked.call(each)
            processor.image_processor = pil
            same = other["pixel_values"].shape == made["pixel_values"].shape
            gap = float((other["pixel_values"] - made["pixel_values"]).abs().max()) if same else None
            found[case]["torchvision_gap"] = gap and round(gap, 4)
    return found


def main() -> None:
    """Every family of NEEDS."""
    transformers.logging.set_verbosity_error()
    made: dict[str, Any] = {"transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for name in NEEDS:
            made[name] = family(name, Path(folder) / name)
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in made.items()]
    (HERE / "processors.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
