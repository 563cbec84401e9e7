"""retain: tune a multimodal language model on one task after another and keep what it already knew.

The public names, loaded when they are first used so that `retain --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retain.adapters.bank import AdapterBank, Mix
    from retain.adapters.lora import LoraSpec
    from retain.method import Context, Method, Stack, available, build, register
    from retain.metrics.matrix import AccuracyMatrix
    from retain.models.hf import HFModel
    from retain.run.continual import run
    from retain.run.evaluate import EvalOptions
    from retain.run.store import RunDir
    from retain.run.train import Optim, fit
    from retain.stream import Stream, Task
    from retain.types import Batch, Conflict, Example, Guide, Message, Output, RetainError

__version__ = "0.1.0"

_HOME = {
    "adapters.bank": ("AdapterBank", "Mix"),
    "adapters.lora": ("LoraSpec",),
    "run.continual": ("run",),
    "run.evaluate": ("EvalOptions",),
    "method": ("Context", "Method", "Stack", "available", "build", "register"),
    "metrics.matrix": ("AccuracyMatrix",),
    "models.hf": ("HFModel",),
    "run.store": ("RunDir",),
    "stream": ("Stream", "Task"),
    "run.train": ("Optim", "fit"),
    "types": ("Batch", "Conflict", "Example", "Guide", "Message", "Output", "RetainError"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AccuracyMatrix", "AdapterBank", "Batch", "Conflict", "Context", "EvalOptions", "Example", "Guide",
    "HFModel", "LoraSpec", "Message", "Method", "Mix", "Optim", "Output", "RetainError", "RunDir", "Stack",
    "Stream", "Task",
    "__version__", "available", "build", "fit", "register", "run",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'retain' has no attribute {name!r}")
    return getattr(import_module(f"retain.{_WHERE[name]}"), name)
