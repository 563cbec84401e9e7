"""The adapter bank: everything that trains lives here, by name, and a `Mix` says how much each name counts.

The bank knows *sites* (modules it put around frozen layers: LoRA on a linear layer, a dense delta on the projector,
later prompts and experts) and *adapters* (one set of tensors per name across all sites). A `Mix` with a number per
adapter is one model; a `Mix` with a (B,) tensor per adapter routes every sample of the batch on its own, at the price
of one pair of matrix products. No method touches a site; no site knows a method.
"""

# B batch, T tokens, K active adapters, I images of the batch

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from retain.types import RetainError

Weight = float | Tensor
T = TypeVar("T")
FOLD_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Mix:
    """How much each adapter counts: a number, or one number per sample (B,). `by_layer` overrides single layers."""

    weights: Mapping[str, Weight] = field(default_factory=dict)
    by_layer: Mapping[int, Mapping[str, Weight]] = field(default_factory=dict)

    def at(self, layer: int | None) -> Mapping[str, Weight]:
        """The weights that hold at a layer (None: a site outside the layers, such as the projector)."""
        return self.weights if layer is None else self.by_layer.get(layer, self.weights)

    def select(self, rows_B: Tensor) -> Mix:
        """The same mix for some samples of the batch, in the given order."""

        def pick(weights: Mapping[str, Weight]) -> dict[str, Weight]:
            return {
                k: w[rows_B.to(w.device)] if isinstance(w, Tensor) and w.ndim else w
                for k, w in weights.items()
            }

        return Mix(pick(self.weights), {layer: pick(w) for layer, w in self.by_layer.items()})

    @property
    def names(self) -> list[str]:
        """Every adapter that the mix mentions."""
        return sorted({n for w in (self.weights, *self.by_layer.values()) for n in w})

    def to_json(self) -> dict[str, object]:
        """Plain numbers, for the run folder. A per-sample mix belongs to one batch and cannot be stored."""
        for weights in (self.weights, *self.by_layer.values()):
            for name, w in weights.items():
                if isinstance(w, Tensor) and w.ndim:
                    raise ValueError(f"the mix of {name!r} is per sample; only numbers are stored")
        plain = {k: float(w) for k, w in self.weights.items()}
        return {
            "weights": plain,
            "by_layer": {str(i): {k: float(w) for k, w in m.items()} for i, m in self.by_layer.items()},
        }

    @staticmethod
    def from_json(data: Mapping[str, object]) -> Mix:
        """The inverse of `to_json`."""
        weights, layers = data["weights"], data.get("by_layer", {})
        assert isinstance(weights, Mapping) and isinstance(layers, Mapping)
        return Mix(dict(weights), {int(i): dict(w) for i, w in layers.items()})


class Site(Protocol):
    """A module of ours around a frozen layer. It holds its tensors per adapter name and reads the bank's mix."""

    layer: int | None
    group: str  # "lora", "projector", …: which learning rate applies

    def create(self, name: str, rng: Generator | None) -> None: ...
    def remove(self, name: str) -> None: ...
    def tensors(self, name: str) -> dict[str, Parameter]: ...


class AdapterBank:
    """Adapters by name over a fixed set of sites.

    `signature` describes the shapes (rank, targets, base model) so that a foreign adapter is refused by name; `kind`
    is what a recipe calls them (lora, moe, prompt).
    """

    def __init__(
        self, sites: Mapping[str, Site], signature: Mapping[str, object], kind: str = "lora"
    ) -> None:
        self.sites = dict(sites)
        self.signature = dict(signature)
        self.kind = kind
        self.names: list[str] = []
        self._training: set[str] = set()  # so that a step costs the same beside fifty frozen adapters
        self.mix = Mix()
        self.image_row_I: Tensor | None = None  # sample of each image, set by the model around a forward
        self.image_tokens_I: Tensor | None = None  # tokens of each image where a family flattens them
        self.read = False  # somebody reads the sites' inputs: each layer must run as a module of its own
        self.folds: dict[object, tuple[object, Tensor, Tensor | None]] | None = None
        self.stacks: dict[Hashable, tuple[Mix | None, Any]] | None = None
        self._dropped: tuple[Tensor, Tensor] | None = None

    # -- adapters -------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        rng: Generator | None = None,
        *,
        like: str | None = None,
        paths: Collection[str] | None = None,
    ) -> None:
        """A fresh adapter (it changes no logit: B is zero), or a copy of the adapter `like`.

        `paths` are the sites that it has tensors at, as far as a site can do without (full deltas can).
        """
        if not re.fullmatch(r"[\w-]+", name):
            raise RetainError(f"adapter name {name!r}: use letters, digits, '_' and '-' only")
        if name in self.names:
            raise RetainError(f"adapter {name!r} exists already; the bank holds {self.names}")
        if like is not None:
            self._known(like)
            paths = {key.rpartition(".")[0] for key in self.parameters(like)}
        for path, site in self.sites.items():
            if paths is None or path in paths or not getattr(site, "optional", False):
                site.create(name, rng)
        self.names.append(name)
        if like is not None:
            self.load(name, self.state(like))
        self.freeze(name)

    def remove(self, name: str) -> None:
        """Forget an adapter; it may not be part of the current mix."""
        self._known(name)
        if name in self.mix.names:
            raise RetainError(f"adapter {name!r} is in use by the current mix")
        for site in self.sites.values():
            site.remove(name)
        self.names.remove(name)
        self._training.discard(name)

    def parameters(self, name: str) -> dict[str, Parameter]:
        """The live tensors of one adapter, `site.tensor` to Parameter, in the order of the sites."""
        self._known(name)
        return {
            f"{path}.{key}": p for path, site in self.sites.items() for key, p in site.tensors(name).items()
        }

    def state(self, name: str) -> dict[str, Tensor]:
        """A detached copy of one adapter."""
        return {key: p.detach().clone() for key, p in self.parameters(name).items()}

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Overwrite an adapter. Missing, extra and misshapen tensors are an error that names them."""
        own = self.parameters(name)
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise RetainError(
                f"adapter {name!r} does not fit this model: {len(missing)} tensors missing (first {missing[:2]}), "
                f"{len(extra)} unknown (first {extra[:2]})"
            )
        for key, p in own.items():
            if p.shape != state[key].shape:
                if key.endswith(".lora_A") and p.shape[1:] == state[key].shape[1:]:
                    ranks = f"rank {len(state[key])}, this model's adapters have rank {len(p)} (adapter.rank)"
                    raise RetainError(f"adapter {name!r} does not fit this model: it has {ranks}")
                raise RetainError(
                    f"adapter {name!r}, tensor {key}: shape {tuple(state[key].shape)}, this model needs {tuple(p.shape)}"
                )
        with torch.no_grad():
            for key, p in own.items():
                p.copy_(state[key])

    # -- training -------------------------------------------------------------------------------------------------

    def freeze(self, *names: str) -> None:
        """No gradient for these adapters."""
        for name in names:
            for p in self.parameters(name).values():
                p.requires_grad_(False)
                p.grad = None
        self._training -= set(names)

    def train_only(self, *names: str) -> None:
        """Gradients for exactly these adapters."""
        self.freeze(*self._training)
        for name in names:
            for p in self.parameters(name).values():
                p.requires_grad_(True)
        self._training |= set(names)

    def trainable(self) -> dict[str, Parameter]:
        """Every tensor that has a gradient, as `adapter/site.tensor`, in a fixed order."""
        return {
            f"{name}/{key}": p
            for name in self.names
            if name in self._training
            for key, p in self.parameters(name).items()
            if p.requires_grad
        }

    def group(self, key: str) -> str:
        """The learning-rate group ("lora", "projector", …) of a key that `trainable` gave."""
        return self.sites[key.split("/", 1)[-1].rsplit(".", 1)[0]].group

    # -- mixing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, mix: Mix) -> Iterator[None]:
        """Another mix for the length of a `with` block."""
        unknown = [n for n in mix.names if n not in self.names]
        if unknown:
            raise RetainError(f"the mix names {unknown}, but the bank holds {self.names}")
        before, self.mix = self.mix, mix
        try:
            yield
        finally:
            self.mix = before

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """A promise: within the block no adapter is written to.

        Sites may then add a mix of plain numbers to a copy of their layer's weight, once, and run the copy. The
        layers themselves are not touched. Without effect where the copies would take more than FOLD_BYTES.
        """
        found = (getattr(site, "base", None) for site in self.sites.values())
        bases = [base for base in found if isinstance(base, nn.Module)]
        size = sum(p.numel() * p.element_size() for base in bases for p in base.parameters())
        before, self.folds = self.folds, {} if size <= FOLD_BYTES else None
        try:
            with self.stacked():
                yield
        finally:
            self.folds = before

    @contextmanager
    def stacked(self) -> Iterator[None]:
        """The same promise: the factors of several adapters are put side by side once, not in every forward."""
        before = self.stacks
        self.stacks = {} if before is None else before
        try:
            yield
        finally:
            self.stacks = before

    def once(self, key: Hashable, make: Callable[[], T], mix: Mix | None = None) -> T:
        """What `make` gives; within `stacked`, without gradients, made once (of a mix: until another one is on)."""
        if self.stacks is None or torch.is_grad_enabled():
            return make()
        found = self.stacks.get(key)
        if found is None or found[0] is not mix:
            found = self.stacks[key] = (mix, make())
        made: T = found[1]
        return made

    @contextmanager
    def reading(self, read: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Within the block `read(path, x)` gets the input of every site that runs, in the order in which they run.

        Layers that read one tensor (q, k, v) hand over the same object, one after the other.
        """
        modules = [(path, site) for path, site in self.sites.items() if isinstance(site, nn.Module)]
        hooks = [m.register_forward_pre_hook(lambda _, x, path=path: read(path, x[0])) for path, m in modules]
        before, self.read = self.read, True
        try:
            yield
        finally:
            self.read = before
            for hook in hooks:
                hook.remove()

    @contextmanager
    def images(self, row_I: Tensor, tokens_I: Tensor | None = None) -> Iterator[None]:
        """Tell sites in front of the language model which sample each image, or flat image token, belongs to."""
        before = self.image_row_I, self.image_tokens_I
        self.image_row_I, self.image_tokens_I = row_I, tokens_I
        try:
            yield
        finally:
            self.image_row_I, self.image_tokens_I = before
            self._dropped = None

    def spread(self, w: Tensor, x: Tensor, *, visual: bool) -> Tensor:
        """A weight per sample (B,) as a factor that broadcasts against `x` (…, D) at a text or an image site."""
        if visual and self.image_row_I is not None:
            w = w[self.image_row_I.to(w.device)]
            if self.image_tokens_I is not None and x.shape[0] != len(w):
                rows = self.image_tokens_I.to(w.device)
                if len(rows):  # in front of a merger, a tower has several rows (patches) for each token
                    rows = rows * max(1, x.shape[0] // int(rows.sum()))
                w = w.repeat_interleave(rows)
            elif len(w) and x.shape[0] != len(w) and x.shape[0] % len(w) == 0:
                w = w.repeat_interleave(x.shape[0] // len(w))
        if x.shape[0] != len(w):
            raise RetainError(f"a mix for {len(w)} samples met an input of shape {tuple(x.shape)}")
        return w.to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def dropped(self, x: Tensor, p: float) -> Tensor:
        """Dropout of a block's input, drawn once for all linear layers that read the same tensor (q, k, v; gate, up)."""
        if self._dropped is None or self._dropped[0] is not x:
            self._dropped = (x, nn.functional.dropout(x, p, training=True))
        return self._dropped[1]

    def _known(self, name: str) -> None:
        if name not in self.names:
            raise RetainError(f"no adapter {name!r}; the bank holds {self.names}")
