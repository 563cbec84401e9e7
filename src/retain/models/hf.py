"""A Hugging Face model that reads images and text, or text alone, as a `Model`: frozen, with everything that trains
in its adapter bank.

The forward is Hugging Face's own arithmetic with the frozen part taken out: vision-tower features are
computed once per image and cached, the projector and the language model run with their adapters, and logits
are taken only where an answer token is predicted. Features are computed in calls of one fixed shape, so they
do not depend on the batch and a cold cache gives the same bits as a warm one. Families:
`retain.models.family`; whether all this is Hugging Face's own call: `retain.models.guard`.
"""

# B batch, T tokens, N answer tokens, V vocabulary, D width, I images, M image tokens, R rows of an image

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from retain.adapters.bank import AdapterBank
from retain.adapters.kinds import Spec, attach
from retain.adapters.lora import LoraSpec
from retain.adapters.prompt import Prompts, placed, prompts_of
from retain.models import decoder
from retain.models.base import Turns
from retain.models.cache import ByteLRU
from retain.models.encode import Encoder, ImageRef, Square
from retain.models.family import Family, family_of
from retain.models.fits import Sieve
from retain.models.folder import told
from retain.models.generate import greedy, next_logits
from retain.models.guard import check
from retain.models.guide import Guider, GuideSource, prototype_width
from retain.models.head import Head
from retain.models.load import copy_processor, eos_ids, load_pretrained
from retain.types import Batch, Example, Examples, Guide, Lazy, Output, RetainError, digest

Precision = Literal["fp32", "bf16"]
CHUNKS = (32, 8)  # images per tower call, where they give the same bits as each other; else one by one
WORKING_SET = 1 << 19  # numbers: 2 MB in fp32, the second-level cache of a core


class HFModel:
    """A frozen model with adapters. See `retain.models.base.Model` for the protocol.

    `precision="bf16"` runs forwards under autocast. `max_length` defaults to the language model's positions;
    longer examples are an error, or lose the end of their answer with `truncate`. `feature_cache` is in
    bytes. `guide` names a stock CLIP folder or Hub id for routing features; without one, and without a
    `guide/` folder beside the model, they are mean-pooled tower features and mean-pooled input embeddings of
    the instruction.
    """

    def __init__(
        self,
        hf_model: Any,
        processor: Any,
        spec: Spec | None = None,
        *,
        family: str | None = None,
        name: str = "",
        precision: Precision = "fp32",
        max_length: int | None = None,
        truncate: bool = False,
        feature_cache: int = 1 << 30,
        guide: GuideSource = None,
        checkpointing: bool = False,
        square: Square = "crop",
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise RetainError(f"model: precision must be 'fp32' or 'bf16', not {precision!r}")
        if square not in ("crop", "pad"):
            raise RetainError(f"model: square must be 'crop' or 'pad', not {square!r}")
        self.hf, self.processor, self.name, self.precision = hf_model, processor, name, precision
        self.spec: Spec = spec or LoraSpec()
        self.family: Family = family_of(hf_model, family)
        self.text_config = hf_model.config.get_text_config()
        self.n_layers = int(self.text_config.num_hidden_layers)
        self.device: torch.device = next(hf_model.parameters()).device
        self.eos = eos_ids(hf_model, processor.tokenizer)
        self._fingerprint = fingerprint(hf_model)
        self._n_parameters = int(sum(p.numel() for p in hf_model.parameters()))
        signature: dict[str, object] = {"base": self._fingerprint, "family": self.family.name}
        self.adapters: AdapterBank = attach(
            hf_model,
            self.spec,
            language=self.family.language,
            projector=self.family.projector,
            embed=hf_model.get_input_embeddings(),
            width=partial(prototype_width, hf_model, guide),
            signature=signature,
        )
        self.prompts: Prompts | None = prompts_of(self.adapters)
        if self.prompts and self.family.types:
            raise RetainError(
                f"adapter: kind prompt puts embeddings before the text, and in the {self.family.name} family the mask "
                "depends on what stands where; use kind lora"
            )
        self.frozen_tower = self.family.features is not None and not any(
            path.startswith(self.family.tower + ".") and not path.startswith(self.family.projector)
            for path in self.adapters.sites
        )
        self.language: Any = self.family.part(hf_model, self.family.language)
        self.embed: nn.Module = hf_model.get_input_embeddings()
        self.head = Head(hf_model)
        limit, kept = self._limits(max_length)
        self.encode = Encoder(
            processor,
            self.eos,
            image_token(hf_model.config),
            limit,
            truncate,
            kept=kept,
            family=self.family,
            square=square,
        )
        self.features: ByteLRU[Tensor] = ByteLRU(feature_cache)
        self._sizes: tuple[int, ...] | None = None
        self._greedy: Any = None  # the generation config without sampling
        self.guider = Guider(self, guide)
        self.checkpointing = checkpointing
        if checkpointing:
            # non-reentrant: adapters get gradients although the block inputs need none
            hf_model.gradient_checkpointing_enable({"use_reentrant": False})
        self.training = False
        hf_model.eval()

    @classmethod
    def load(
        cls,
        name_or_dir: str | Path,
        spec: Spec | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        guide: GuideSource = None,
        guard: bool = True,
        **kwargs: Any,
    ) -> HFModel:
        """From a local folder, or a Hub id (downloaded). `kwargs` as for the constructor.

        With `guard` it is compared with Hugging Face's own call, once per model and version (`retain.models.guard`).
        Raises RetainError for a folder that does not exist, holds no such model, or differs from that call.
        """
        hf_model, processor = load_pretrained(name_or_dir, dtype, device)
        beside = Path(name_or_dir) / "guide"
        source = guide if guide is not None else (beside if beside.is_dir() else None)
        with told(f"model {str(name_or_dir)!r}", "what its configuration describes", ours=False):
            model = cls(hf_model, processor, spec, name=str(name_or_dir), guide=source, **kwargs)
            if guard:
                check(model)
        return model

    def _limits(self, max_length: int | None) -> tuple[int, int]:
        """Tokens that an example may have, and tokens of the context that are kept for prompts."""
        positions = int(getattr(self.text_config, "max_position_embeddings", 0) or 1 << 30)
        if self.prompts is None:
            return max_length or positions, 0
        spec = self.prompts.spec
        if spec.room >= positions:
            raise RetainError(
                f"adapter: {spec.at_once} prompts of {spec.tokens} tokens leave no room for an example in the "
                f"model's {positions} positions; lower adapter.tokens or adapter.at_once"
            )
        return min(max_length or positions, positions - spec.room), spec.room

    # -- batches ---------------------------------------------------------------------------------------------

    def length(self, example: Example) -> int:
        """Tokens of prompt and answer, image tokens included."""
        return len(self.encode(example))

    def suspects(self, examples: Examples) -> Iterable[int]:
        """Rows, from 0, that have to be encoded to know whether all fit: of a file's rows few (`retain.models.fits`)."""
        return Sieve(self.encode).suspects(examples) if isinstance(examples, Lazy) else range(len(examples))

    def collate(self, examples: Sequence[Example], *, answers: bool, turns: Turns = "all") -> Batch:
        """On the CPU. With answers: padded right, labels on answer tokens and EOS. Without: padded left.

        `turns` says which answers of a conversation are learned: of all assistant turns, or of the last.
        """
        if not examples:
            raise RetainError("collate: an empty batch")
        encoded = [self.encode(e) for e in examples]
        rows = [e.prompt + e.answer if answers else e.prompt for e in encoded]
        B, T = len(rows), max(map(len, rows))
        ids_BT = torch.full((B, T), self._pad(), dtype=torch.long)
        mask_BT = torch.zeros((B, T), dtype=torch.long)
        labels_BT = torch.full((B, T), -100, dtype=torch.long)
        types_BT = torch.zeros((B, T), dtype=torch.long)
        for i, (row, e) in enumerate(zip(rows, encoded, strict=True)):
            at = 0 if answers else T - len(row)
            ids_BT[i, at : at + len(row)] = torch.tensor(row)
            mask_BT[i, at : at + len(row)] = 1
            if answers:
                if turns == "all" and e.unfound:
                    raise RetainError(
                        f"{examples[i].told}: the chat template does not write {e.unfound} as it is, so it cannot "
                        "be learned; set optim.turns to last, or give one turn to a row"
                    )
                spans = [(len(e.prompt), len(row)), *(e.earlier if turns == "all" else ())]
                for first, last in spans:
                    labels_BT[i, first:last] = torch.tensor(row[first:last], dtype=torch.long)
            types = self.encode.types(e.prompt, e.answer if answers else ())
            if types is not None:
                types_BT[i, at : at + len(row)] = torch.tensor(types)
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if self.family.types:
            inputs["token_type_ids"] = types_BT
        refs = [ref for e in encoded for ref in e.images]
        row_I = torch.tensor([i for i, e in enumerate(encoded) for _ in e.images], dtype=torch.long)
        grids = torch.tensor([r.grid for r in refs if r.grid], dtype=torch.long)
        following = [len(e.prompt) + self.family.first for e in encoded]
        if self.family.grid_rope:
            inputs["position_ids"], delta_B = self._grid_positions(ids_BT, mask_BT, grids)
            following = (mask_BT.sum(1) + delta_B).tolist()
        elif not answers:
            inputs["position_ids"] = (mask_BT.cumsum(1) - 1).clamp(min=0) + self.family.first
        meta = {
            "images": tuple(refs),
            "image_ids": tuple(examples[i].told for i in row_I.tolist()),
            "padded": int(mask_BT.sum()) < B * T,
            "left": not answers,
            "next_position": following,
            "image_index": (ids_BT.flatten() == self.encode.image_token_id).nonzero().squeeze(1),
        }
        if not self.frozen_tower:
            shown = [(r, x.told) for e, x in zip(encoded, examples, strict=True) for r in e.images]
            meta["pixels"] = tuple(self.encode.image(ref, name) for ref, name in shown)
        return Batch(tuple(examples), inputs, labels_BT if answers else None, row_I, meta)

    def _pad(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return int(pad) if pad is not None and pad != self.encode.image_token_id else min(self.eos)

    def _grid_positions(self, ids_BT: Tensor, mask_BT: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (3, B, T) by the model's own rule, and each row's next position less its length."""
        if not len(grids):
            positions = (mask_BT.cumsum(1) - 1).clamp(min=0)
            return positions.expand(3, -1, -1), torch.zeros(len(ids_BT), dtype=torch.long)
        kinds_BT = (ids_BT == self.encode.image_token_id).int()
        positions, delta = self.hf.model.get_rope_index(
            ids_BT, mm_token_type_ids=kinds_BT, image_grid_thw=grids, attention_mask=mask_BT
        )
        return positions, delta.flatten()

    def placed(self, batch: Batch) -> Batch:
        """The batch behind the prompts of the bank's mix; the batch itself where there are none."""
        if self.prompts is None or "places" in batch.meta:
            return batch
        bos, ids_BT = self.processor.tokenizer.bos_token_id, batch.inputs["input_ids"]
        first_B1 = batch.inputs["attention_mask"].argmax(1)[:, None]
        starts_B = (ids_BT.gather(1, first_B1) == (-1 if bos is None else bos)).squeeze(1).long()
        return placed(batch, self.prompts, starts_B)

    # -- forward ---------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that forwards run in: bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def __call__(self, batch: Batch) -> Output:
        """Mean cross entropy (fp32) over the answer tokens and their logits; no other logit is computed."""
        if batch.labels_BT is None:
            raise RetainError("a batch collated with answers=False has nothing to learn from")
        batch = self.placed(batch)
        assert batch.labels_BT is not None
        next_BT = F.pad(batch.labels_BT[:, 1:], (0, 1), value=-100)
        at_N = (next_BT.flatten() != -100).nonzero().squeeze(1)
        labels_N = next_BT.flatten()[at_N].to(self.device)
        row_N, column_N = at_N // next_BT.shape[1], at_N % next_BT.shape[1]
        with self._images(batch), self.autocast():
            if self.fast:
                hidden_ND = self._hidden_at(batch, row_N, column_N)
            else:
                hidden_ND = self.hidden(batch).flatten(0, 1)[at_N.to(self.device)]
            logits_NV: Tensor = self.head(hidden_ND)
        row_N = row_N.to(self.device)
        return Output(F.cross_entropy(logits_NV.float(), labels_N), logits_NV, labels_N, row_N)

    def _images(self, batch: Batch) -> AbstractContextManager[None]:
        """Tell projector and tower sites which sample each of their rows belongs to."""
        refs = batch.meta["images"]
        rows = torch.tensor([r.n_rows for r in refs], dtype=torch.long, device=self.device)
        return self.adapters.images(batch.image_row_I.to(self.device), rows)

    @property
    def fast(self) -> bool:
        """Whether the language model runs through `retain.models.decoder` instead of Hugging Face's forward."""
        whole = bool(self.family.tower) and self.family.features is None
        return not whole and self.family.types is None and decoder.supports(self.language)

    def _hidden_at(self, batch: Batch, row_N: Tensor, column_N: Tensor) -> Tensor:
        """Last hidden states (N, D) at places of a right-padded batch, rows ascending; only there."""
        many_B = row_N.bincount(minlength=len(batch))
        place_N = torch.arange(len(row_N)) - (many_B.cumsum(0) - many_B)[row_N]
        at_BN = torch.zeros(len(batch), int(many_B.max()), dtype=torch.long)
        at_BN[row_N, place_N] = column_N
        hidden_BND = self._short(batch, at_BN=at_BN.to(self.device))
        return hidden_BND[row_N.to(self.device), place_N.to(self.device)]

    def _last(self, batch: Batch, cache: Any) -> Tensor:
        """Hidden states (B, 1, D) of the last place of a left-padded batch; keys and values to the cache."""
        return self._short(batch, at_BN=decoder.LAST, cache=cache)

    def _short(self, batch: Batch, **more: Any) -> Tensor:
        """Hidden states of `retain.models.decoder`."""
        inputs = {k: v.to(self.device, non_blocking=True) for k, v in batch.inputs.items()}
        embeds_BTD, deep, at_M = self._embedded(batch, inputs)
        padded = batch.meta["left"] and batch.meta["padded"]  # on the right nothing real can see the padding
        if padded:
            more["mask_BS"] = inputs["attention_mask"]
        if padded or self.family.grid_rope:
            more["positions_BT"] = inputs["position_ids"]
        return decoder.forward(self.language, embeds_BTD, deep=deep, deep_at_M=at_M, **more)

    def hidden(self, batch: Batch, cache: Any = None) -> Tensor:
        """Last hidden states (B, T, D) of the language model."""
        inputs = {k: v.to(self.device, non_blocking=True) for k, v in batch.inputs.items()}
        # Right padding follows every real token, so a causal model needs no mask for it.
        seen = self.family.types or (batch.meta["left"] and batch.meta["padded"])
        mask = inputs["attention_mask"] if seen else None
        call: dict[str, Any] = {
            "attention_mask": mask,
            "cache": cache,
            "use_cache": cache is not None,
        }
        if "position_ids" in inputs and (self.family.grid_rope or mask is not None):
            call["position_ids"] = inputs["position_ids"]
        embeds_BTD, deep, at_M = self._embedded(batch, inputs)
        if deep:
            at_BT = torch.zeros(embeds_BTD.shape[:2], dtype=torch.bool, device=self.device)
            at_BT.view(-1)[at_M] = True
            call |= {"visual_pos_masks": at_BT, "deepstack_visual_embeds": deep}
        if self.family.types:  # the mask over images or prefix is made by the model around its language model
            out = self.hf.model(inputs_embeds=embeds_BTD, token_type_ids=inputs["token_type_ids"], **call)
        else:
            out = self.language(inputs_embeds=embeds_BTD, **call)
        hidden: Tensor = out.last_hidden_state
        return hidden

    @torch.no_grad()
    def mlp_means(self, batch: Batch) -> Tensor:
        """Every layer's MLP output, averaged over each sample's tokens: (L, B, D), fp32.

        Hugging Face's own forward of a batch collated with answers=False.
        """
        batch = self.placed(batch)
        mask_BT1 = batch.inputs["attention_mask"].to(self.device)[..., None].float()
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, out: Any) -> None:
            out_BTD = out[0] if isinstance(out, tuple) else out
            kept.append((out_BTD.float() * mask_BT1).sum(1) / mask_BT1.sum(1))

        hooks = [layer.mlp.register_forward_hook(keep) for layer in self.language.layers]
        try:
            with self._images(batch), self.autocast():
                self.hidden(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(kept)

    def _embedded(self, batch: Batch, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Token embeddings with the projected image features, and prompts, in their places: (B, T, D).

        Then the features (M, D) that the first layers add on their own, and the flat places of image tokens (M,).
        """
        embeds_BTD: Tensor = self.embed(inputs["input_ids"])
        D, places, at_M = embeds_BTD.shape[-1], batch.meta.get("places"), batch.meta["image_index"]
        deep: list[Tensor] = []
        if batch.meta["images"]:
            shown = self._shown(batch).to(embeds_BTD.dtype)
            image_MD, *deep = shown.split(D, dim=-1)
            flat = embeds_BTD.flatten(0, 1).index_copy(0, at_M.to(self.device), image_MD)
            embeds_BTD = flat.view_as(embeds_BTD)
        if self.prompts and places:
            embeds_BTD = self.prompts.fill(embeds_BTD, places)
            at_M = places.moved(at_M) if deep else at_M
        return embeds_BTD, deep, at_M.to(self.device)

    def _shown(self, batch: Batch) -> Tensor:
        """Embeddings (M, D) of all image tokens of the batch, or (M, (1 + n) D) with those of early layers."""
        refs: Sequence[ImageRef] = batch.meta["images"]
        if self.family.features is None:
            return torch.cat(
                [
                    self._stock_features(*of)
                    for of in zip(batch.meta["pixels"], batch.image_row_I, strict=True)
                ]
            )
        assert self.family.project is not None
        each = self.tower_features(batch) if self.frozen_tower else self._live_features(batch)
        rows = [len(f) for f in each] if not self.family.stack else [1] * len(refs)
        return self.family.project(self.hf, torch.cat(each), rows, [r.size for r in refs])

    def _live_features(self, batch: Batch) -> list[Tensor]:
        """Tower features with adapters in the tower: together where the family allows it, else one by one."""
        assert self.family.features is not None
        pixels = [self._moved(p) for p in batch.meta["pixels"]]
        if self.family.stack:
            return [self.family.features(self.hf, {k: torch.cat([p[k] for p in pixels]) for k in pixels[0]})]
        out = []
        for inputs, ref, row in zip(pixels, batch.meta["images"], batch.image_row_I, strict=True):
            with self.adapters.images(
                row[None].to(self.device), torch.tensor([ref.n_rows], device=self.device)
            ):
                out.append(self.family.features(self.hf, inputs))
        return out

    def _moved(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """To the model's device, and what is no whole number to its type."""
        return {
            k: v.to(self.device, self.hf.dtype) if v.is_floating_point() else v.to(self.device)
            for k, v in inputs.items()
        }

    def _stock_features(self, inputs: Mapping[str, Tensor], row: Tensor) -> Tensor:
        """What the model itself makes of one picture: (M, D). Adapters in front see the sample it belongs to."""
        with self.adapters.images(row[None].to(self.device)):
            out = self.hf.model.get_image_features(**self._moved(inputs))
        made = getattr(out, "pooler_output", out)
        return torch.cat([m.flatten(0, -2) for m in ([made] if isinstance(made, Tensor) else made)])

    # -- the frozen tower ------------------------------------------------------------------------------------

    @torch.no_grad()
    def tower_features(self, batch: Batch) -> list[Tensor]:
        """Frozen features (R, …), one tensor per image of the batch; needs a family that splits."""
        refs = batch.meta["images"]
        found: dict[str, Tensor | None] = {r.key: self.features.get(r.key) for r in refs}
        missing = {
            r.key: (r, x) for r, x in zip(refs, batch.meta["image_ids"], strict=True) if found[r.key] is None
        }
        sizes = self._chunks() if missing and self.family.stack else (1,)
        todo = list(missing.values())
        while todo:
            size = next((n for n in sizes if n <= len(todo)), sizes[-1])
            part, todo = todo[:size], todo[size:]
            pixels = [self.encode.image(ref, told) for ref, told in part]
            for (ref, _), made in zip(part, self._tower(pixels, size), strict=True):
                found[ref.key] = made
                self.features.put(ref.key, made)
                self.encode.pixels.pop(ref.key)  # the features stand for it from now on
        return [value for r in refs if (value := found[r.key]) is not None]

    def _tower(self, pixels: Sequence[Mapping[str, Tensor]], size: int) -> list[Tensor]:
        """One tower call of exactly `size` images (repeating the last): every call has the same shape."""
        assert self.family.features is not None
        full = [*pixels, *[pixels[-1]] * (size - len(pixels))]
        inputs = self._moved({k: torch.cat([p[k] for p in full]) for k in full[0]})
        # The model's own precision, whatever the caller's: features must not depend on who asked first.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            out = self.family.features(self.hf, inputs)
        return [out] if size == 1 else [row.clone()[None] for row in out[: len(pixels)]]

    def _chunks(self) -> tuple[int, ...]:
        """The call sizes that give an image the same bits in every call and at every place of it, largest first.

        Decided once, on noise: the order of a sum depends on shapes and places, not on values.
        """
        if self._sizes is None:
            few, side = min(CHUNKS), self.hf.config.vision_config.image_size
            noise = torch.randn(few, 3, side, side, generator=torch.Generator().manual_seed(0))
            images = [{"pixel_values": n[None]} for n in noise]
            first = self._tower(images, few)

            def same(size: int, turn: int = 0) -> bool:
                shown = [(i + turn) % few for i in range(size)]
                made = self._tower([images[i] for i in shown], size)
                return all(torch.equal(m, first[i]) for m, i in zip(made, shown, strict=True))

            whole = all(same(few, turn) for turn in range(1, few))
            self._sizes = tuple(n for n in CHUNKS if n == few or same(n)) if whole else (1,)
        return self._sizes

    # -- inference -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int) -> list[str]:
        """Greedy answers under the bank's mix, one per sample, equal to generating each sample alone."""
        if not batch.meta["left"]:
            raise RetainError("generate needs a batch collated with answers=False (padded left, prompt only)")
        was = self.training
        self.train(False)
        try:
            with self.adapters.stacked():
                tokens = greedy(self, batch, max_new_tokens)
        finally:
            self.train(was)
        texts: list[str] = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def cache(self, rows: int, room: int) -> Any:
        """What keeps the keys and values of a batch of so many rows and, at most, so many tokens."""
        if not self.fast:
            return DynamicCache(config=self.text_config)
        like = cast(Tensor, self.head.layer.weight)
        with self.autocast():
            if torch.is_autocast_enabled(self.device.type):
                like = like[:0].to(torch.get_autocast_dtype(self.device.type))
        return decoder.Keys.empty(self.language, rows, room, like)

    def prefill(self, batch: Batch, cache: Any) -> Tensor:
        """Run the prompts into the cache; logits of the next token (B, V)."""
        if not self.fast:
            with self._images(batch), self.autocast():
                return next_logits(self.hidden(batch, cache), self.head)
        T, mix = batch.inputs["attention_mask"].shape[1], self.adapters.mix
        if self.frozen_tower:
            self.tower_features(batch)  # in large calls; the parts find them in the cache
        hidden = []
        for rows in self._parts(batch, T):
            part = batch
            if len(rows) < len(batch):
                part = self.collate([batch.examples[i] for i in rows], answers=False)
            place = cache.part(rows[0], rows[-1] + 1, T - part.inputs["attention_mask"].shape[1])
            with self.adapters.using(mix.select(torch.tensor(rows))), self._images(part), self.autocast():
                hidden.append(self._last(part, place))
        cache.length = T
        with self.autocast():
            return next_logits(torch.cat(hidden), self.head)

    def _parts(self, batch: Batch, T: int) -> list[range]:
        """Rows whose prompts run together: on a CPU so few that what a layer makes stays in its cache."""
        B = size = len(batch)
        if self.device.type == "cpu" and "places" not in batch.meta:  # soft prompts: for the batch as a whole
            size = max(1, WORKING_SET // (2 * T * int(self.text_config.intermediate_size)))
        return [range(a, min(a + size, B)) for a in range(0, B, size)]

    def processors(self, prompt: int) -> Any:
        """What the generation config asks of greedy decoding behind so many tokens: Hugging Face's own list, often empty."""
        if self._greedy is None:
            config, _ = self.hf._prepare_generation_config(None, do_sample=False, num_beams=1)
            self.hf._prepare_special_tokens(config, device=self.device)
            asks = len(self.hf._get_logits_processor(config, input_ids_seq_length=1, device=self.device))
            self._greedy = config if asks else ()
        if not self._greedy:
            return ()
        return self.hf._get_logits_processor(self._greedy, input_ids_seq_length=prompt, device=self.device)

    def decode(self, token_B: Tensor, position_B: Tensor, mask_BS: Tensor | None, cache: Any) -> Tensor:
        """One token per row onto the cache; logits of the next token (B, V)."""
        positions = position_B[:, None]
        if self.family.grid_rope:
            positions = positions.expand(3, -1, -1)
        with self.autocast():
            if self.fast:
                embeds = self.embed(token_B[:, None])
                hidden = decoder.forward(
                    self.language, embeds, mask_BS=mask_BS, positions_BT=positions, cache=cache
                )
                return next_logits(hidden, self.head)
            out = self.language(
                inputs_embeds=self.embed(token_B[:, None]), attention_mask=mask_BS, position_ids=positions,
                cache=cache, use_cache=True,
            )  # fmt: skip
            return next_logits(out.last_hidden_state, self.head)

    def guide(self, batch: Batch) -> Guide:
        """Frozen, unit-length fp32 features of each sample's images (mean) and instruction; cached."""
        return self.guider(batch)

    def save_processor(self, folder: str | Path) -> None:
        """The checkpoint's own files of processor, tokenizer and chat template; written anew where it came from memory."""
        if not copy_processor(self.name, folder):
            self.processor.save_pretrained(folder)

    # -- about the model -------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> HFModel:
        """Training mode: adapter dropout on. A frozen tower stays in eval mode."""
        if mode != self.training:
            self.training = mode
            self.hf.train(mode)
            if self.frozen_tower:
                self.family.part(self.hf, self.family.tower).eval()
        return self

    def fingerprint(self) -> str:
        """A short hash of the base: config and a strided sample of every weight, taken before adapters.

        Then what else changes answers: pictures that are padded, and what the generation config asks of greedy decoding.
        """
        asked = [type(p).__name__ + str(sorted(vars(p).items(), key=str)) for p in self.processors(1)]
        more = [self.encode.square] * (self.encode.square != "crop") + [digest(asked)[:6]] * bool(asked)
        return "-".join([self._fingerprint, *more])

    def n_parameters(self) -> int:
        """Parameters of the frozen base."""
        return self._n_parameters

    def flops_per_token(self) -> float:
        """Forward FLOPs of a token in the language model: 2 x its parameters, head included, table not."""
        of_language = sum(p.numel() for n, p in self.language.named_parameters() if not _is_adapter(n))
        table = sum(p.numel() for p in self.embed.parameters())
        head = sum(p.numel() for p in self.head.layer.parameters())
        return float(2 * (of_language - table + head))


def _is_adapter(name: str) -> bool:
    parts = (".lora_A.", ".lora_B.", ".lora_router.", ".delta_weight.", ".delta_bias.")
    return any(part in name for part in parts)


def image_token(config: Any) -> int:
    """The id that stands for a piece of an image; -1 for a model of text only."""
    for key in ("image_token_id", "image_token_index"):
        if getattr(config, key, None) is not None:
            return int(getattr(config, key))
    if hasattr(config, "vision_config"):
        raise RetainError(
            f"a model of type {config.model_type!r} cannot be tuned: its config names no token that stands for an image "
            "(image_token_id), so pictures are no part of its row of tokens"
        )
    return -1


def fingerprint(model: nn.Module, sample: int = 64) -> str:
    """A hash of a model's type, tensor names, shapes and up to `sample` evenly spaced entries of each tensor.

    Equal weights in another dtype give another fingerprint: their logits differ too.
    """
    h = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    tensors: Iterable[tuple[str, Tensor]] = sorted(model.state_dict().items())
    picked = []
    for name, t in tensors:
        h.update(f"{name}:{tuple(t.shape)}:{t.dtype};".encode())
        flat = t.detach().reshape(-1)
        picked.append(flat[:: max(1, flat.numel() // sample)][:sample].float())
    h.update(torch.cat([p.cpu() for p in picked]).numpy().tobytes())
    return h.hexdigest()[:16]
