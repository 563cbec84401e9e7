"""Optional trackers: TensorBoard, Trackio, Weights & Biases. Off by default, imported only when asked for.

`events.jsonl` in the run folder is the record; a tracker is a copy for people who already watch one.
None uploads by itself: wandb starts offline unless WANDB_MODE says otherwise, the others write to disk.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from retain.types import RetainError


class Tracker(Protocol):
    """Where numbers of a run go besides events.jsonl."""

    def log(self, step: int, **numbers: float) -> None:
        """Numbers of one optimizer step of the stream; names are free, e.g. `loss`, `score/boxes`."""

    def close(self) -> None:
        """Write out what is pending. Nothing may be logged after it."""


class Off:
    """The default: nothing is tracked."""

    def log(self, step: int, **numbers: float) -> None:
        """Drop the numbers."""

    def close(self) -> None:
        """Nothing is pending."""


class Several:
    """Every number to each of several trackers."""

    def __init__(self, parts: Sequence[Tracker]) -> None:
        self.parts = tuple(parts)

    def log(self, step: int, **numbers: float) -> None:
        """Pass on."""
        for part in self.parts:
            part.log(step, **numbers)

    def close(self) -> None:
        """Close each."""
        for part in self.parts:
            part.close()


def _load(module: str, tracker: str) -> ModuleType:
    """The tracker's package, or an error that says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        needs = f"tracker {tracker!r} needs a package that is missing ({error.name})"
        raise RetainError(f"{needs}: pip install 'retain[track]'") from error


class _TensorBoard:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        writer: Any = _load("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(log_dir=str(folder / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()), 0)

    def log(self, step: int, **numbers: float) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._run: Any = _load("trackio", "trackio").init(project="retain", name=name, config=dict(config))

    def log(self, step: int, **numbers: float) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class _Wandb:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        wandb: Any = _load("wandb", "wandb")
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(project="retain", name=name, config=dict(config), dir=str(folder), mode=mode)

    def log(self, step: int, **numbers: float) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}


def open_tracker(
    names: str | Sequence[str] | None, folder: Path, name: str, config: Mapping[str, Any] | None = None
) -> Tracker:
    """The trackers of these names (none: `Off`), for the run `name` in `folder`.

    Raises RetainError for an unknown name (lists the choices) and for a missing package (names the extra).
    """
    wanted = [names] if isinstance(names, str) else list(names or ())
    for each in wanted:
        if each not in TRACKERS:
            raise RetainError(f"track: {each!r} is not a tracker; choose from {sorted(TRACKERS)}")
    parts = [TRACKERS[each](folder, name, config or {}) for each in wanted]
    return parts[0] if len(parts) == 1 else Several(parts) if parts else Off()
