"""Who is let in: what a client's answer must be before a server looks at its numbers.

    of this recipe and version, of this base model, of this kind, stage and round     (`Expected.words`)
    the tensors that were sent, in their shapes and finite                            (`admitted`)
    not larger than the others' updates by far                                        (`outliers`)

What is refused is named with its reason; the round goes on without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from retain.adapters.bank import Mix
from retain.federated.message import Message, Spooled, words
from retain.method import Method
from retain.methods.disco import Token
from retain.run.sound import broken, wrong_kinds
from retain.run.states import unpacked
from retain.types import RetainError

COUNTED = ("steps", "samples", "tokens", "peak_memory_bytes", "trainable_parameters")


UNREADABLE = (
    RetainError,
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    IndexError,
    AssertionError,
)
"""What a state of a stranger's making may raise where it is read or joined."""


@dataclass(frozen=True)
class Ending:
    """A client's method after the end of a stage, without what stays, and the mix that it leaves on."""

    state: Mapping[str, Any]
    mix: Mapping[str, Any]


@dataclass(frozen=True)
class Expected:
    """What an answer says of itself."""

    recipe: str
    base: str
    kind: str
    stage: str
    round: int

    def words(self, client: str, reply: bytes | str) -> tuple[dict[str, Any] | None, str]:
        """The words of an answer, or None and why it is not used."""
        if isinstance(reply, str):
            return None, reply
        try:
            head = words(reply, f"client {client!r}")
        except RetainError as error:
            return None, str(error)
        wanted = {"client": client, "recipe": self.recipe, "base": self.base, "kind": self.kind, "stage": self.stage,
                  "round": self.round}  # fmt: skip
        says = {
            "client": "it signs as another client", "recipe": "it runs another recipe or version of retain",
            "base": "it has another base model", "kind": "it answers something else", "stage": "it answers an old stage",
            "round": "it answers an old round",
        }  # fmt: skip
        for key, value in wanted.items():
            if head.get(key) != value:
                return None, f"{says[key]} ({head.get(key)!r:.60}, not {value!r:.60})"
        if self.kind == "train" and not _counted(head.get("stats")):
            return None, "it does not say what its fit took"
        return head, ""

    def token(
        self, client: str, reply: bytes | str, n: int, widths: tuple[int, int]
    ) -> tuple[Token | None, str]:
        """An identity token, or None and why. `widths`: of the image's and the text's features."""
        head, why = self.words(client, reply)
        if head is None or not isinstance(reply, bytes):
            return None, why
        try:
            found = Message.from_bytes(reply, f"client {client!r}").tensors
        except RetainError as error:
            return None, str(error)
        image, text = found.get("image"), found.get("text")
        if (
            image is None
            or text is None
            or (tuple(image.shape), tuple(text.shape)) != tuple((w,) for w in widths)
        ):
            return None, f"its token is not two vectors of {widths[0]} and {widths[1]} numbers"
        if not (image.isfinite().all() and text.isfinite().all()):
            return None, "its token is not finite"
        return Token(image.float(), text.float(), n), ""

    def ending(self, client: str, reply: bytes | str, method: Method) -> tuple[Ending | None, str]:
        """What a method learned at a stage's end, or None and why: of its own kinds, finite, and no example or path."""
        head, why = self.words(client, reply)
        if head is None or not isinstance(reply, bytes):
            return None, why
        try:
            if any(f'"${kind}":' in json.dumps(head["state"]) for kind in ("example", "path")):
                return None, "its state holds examples or paths, which may not leave a client"
            told = unpacked(
                head["state"], Message.from_bytes(reply, f"client {client!r}").part("s"), "its state"
            )
            if wrong := wrong_kinds(method, method.whole(told, {})):
                return None, f"its state is of another kind: {wrong}"
            if bad := broken(told):
                return None, f"{bad[0]} of its state is not finite"
            return Ending(told, Mix.from_json(head["mix"]).to_json()), ""
        except UNREADABLE as error:
            return None, f"its state cannot be read ({type(error).__name__}: {error})"


def unlike(endings: Mapping[str, Ending], weights: Mapping[str, float], method: Method) -> dict[str, str]:
    """The clients whose states do not join with those of most others, or that end with another mix, and why.

    RetainError where no more than half of them go together: then nobody can say which are wrong.
    """
    names = list(endings)

    def joins(some: Sequence[str]) -> str:
        if len({json.dumps(endings[c].mix, sort_keys=True) for c in some}) > 1:
            return "they end the stage with different mixes"
        try:
            method.joined([endings[c].state for c in some], [weights[c] for c in some])
        except UNREADABLE as error:
            return str(error)
        return ""

    if not names or not joins(names):
        return {}
    groups = [[b for b in names if b == a or not joins([a, b])] for a in names]
    most = max(groups, key=len)
    if 2 * len(most) <= len(names):
        raise RetainError(f"the clients' states at the stage's end do not go together: {joins(names)}")
    return {
        c: f"its state does not go with the others' ({joins([most[0], c])})" for c in names if c not in most
    }


def admitted(
    path: Path, given: Mapping[str, Tensor], channels: Sequence[str]
) -> tuple[Spooled | None, str, dict[str, float]]:
    """An update that can be used, and the norms of its change ("") and of its channels; else None, and why.

    `given` is what the client was sent. Of every channel there must be a tensor for each of those that train.
    """
    try:
        file = Spooled(path)
    except (SafetensorError, OSError, ValueError) as error:
        return None, f"its message cannot be read ({error})", {}
    trained = [k for k in given if "@" not in k]
    wanted = {f"w/{k}" for k in trained} | {f"w/{c}@{k}" for c in channels for k in trained}
    found = set(file.keys)
    if missing := sorted(wanted - found):
        return None, f"{len(missing)} tensors are missing (first {missing[0][2:]!r})", {}
    if extra := sorted(found - wanted):
        return None, f"{len(extra)} tensors were not asked for (first {extra[0]!r})", {}
    squares = dict.fromkeys(("", *channels), 0.0)
    for key in file.keys:
        name = key.removeprefix("w/")
        channel, _, base = name.rpartition("@")
        sent = given[base]
        if file.shape(key) != sent.shape:
            return None, f"{name!r} has shape {tuple(file.shape(key))}, not {tuple(sent.shape)}", {}
        tensor = file.tensor(key).float()
        if not tensor.isfinite().all():
            return None, f"{name!r} is not finite", {}
        moved = tensor if channel else tensor - sent.float().cpu()
        squares[channel] += float(moved.double().square().sum())
    return file, "", {c: math.sqrt(s) for c, s in squares.items()}


def outliers(norms: Mapping[str, float], bound: float, what: str = "update") -> dict[str, str]:
    """Clients whose update (or channel) is more than `bound` times as large as the median of the others'; 0 is off.

    With fewer than three nobody can say which of them is wrong.
    """
    if not bound or len(norms) < 3:
        return {}
    out = {}
    for client, norm in norms.items():
        usual = median(n for c, n in norms.items() if c != client)
        if norm > bound * usual and usual > 0:
            out[client] = (
                f"its {what} is {norm / usual:.0f} times as large as the others' (federated.outlier {bound:g})"
            )
    return out


def _counted(stats: Any) -> bool:
    if not isinstance(stats, Mapping):
        return False
    whole = all(isinstance(stats.get(k), int) and 0 <= stats[k] < 2**62 for k in COUNTED)
    return (
        whole
        and isinstance(stats.get("last_loss"), float)
        and torch.isfinite(torch.tensor(stats["last_loss"])).item() is True
    )
