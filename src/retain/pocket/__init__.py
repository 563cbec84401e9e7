"""The shipped pocket base: a LLaVA of 2.9 million parameters that learns and forgets on two CPU cores.

`pocket_path()` is a stock Hugging Face folder (`LlavaForConditionalGeneration`, `LlavaProcessor`);
`pocket_path() / "guide"` is the tiny CLIP with the same vision tower. `pretrain.py` made both.
"""

from __future__ import annotations

from pathlib import Path

POCKET_DIR = Path(__file__).parent / "weights"
"""The shipped checkpoint."""


def pocket_path() -> Path:
    """Folder of the shipped checkpoint; an error that says what to do where it is missing."""
    if not (POCKET_DIR / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{POCKET_DIR} has no model.safetensors: reinstall, or train it (pocket/pretrain.py)"
        )
    return POCKET_DIR
