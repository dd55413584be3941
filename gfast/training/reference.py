# SPDX-License-Identifier: Apache-2.0
"""What the original model says about the data, computed once and kept per sample."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gfast import peft_models, wrappers
from gfast.data import fingerprint as dataset_fingerprint
from gfast.files import DamagedFile, undamaged
from gfast.given import whole
from gfast.model_settings import difference, settings_of
from gfast.precision import key_of
from gfast.progress import Bar
from gfast.rotary import unstretched
from gfast.tensor_files import TensorFile, write_tensors
from gfast.training.fingerprints import model_fingerprint
from gfast.training.precision import check_precision, in_precision
from gfast.training.reference_values import (
    BATCH_KEY,
    TEXT_KEYS,
    as_it_is,
    check_layer_asked,
    check_widths,
    checked,
    keep_samples,
    to_model,
    values_of,
)

FORMAT = "gfast-reference-3"
# Of earlier versions: the first has no checksums, and both have log-probs in fp32 of fp64 models too.
OLD_FORMATS = ("gfast-reference-1", "gfast-reference-2")
REMEDY = "delete it and build it again with ReferenceCache.build"
# What all samples share: the output head of the original model, and its scale and soft cap (0: none).
HEAD_KEYS = ("ref_head", "ref_head_bias", "ref_head_form")


class ReferenceCache:
    """Values of the reference model theta_o per sample: what objectives compare with, without a second model.

    | asked for | batch key | shape of one sample | used by |
    |---|---|---|---|
    | `"logp"` | `ref_logp` | [T] fp32, log p(s_i given s_<i; theta_o), 0 at ignored labels | NPO, TNPO, WTNPO, DPO |
    | `"hidden"` | `ref_hidden` | [T, D] after the final norm, and once the head `ref_head` [V, D] | KL |
    | `"layer_hidden"` | `ref_layer_hidden` | [T, D], `hidden_states[layer]` | RR |

    Log-probs of fp64 models are fp64. Samples are found by `sample_id`, never by position in a batch, so the order of
    batches is free. The file is safetensors; it names the model and the data by fingerprints over every byte, and
    loading it for others is a ValueError. A model with PEFT adapters is its own reference with the adapters off, where
    that provably is the original.

    >>> cache = ReferenceCache.build(model, dataset, collator, path="reference.safetensors")    # doctest: +SKIP
    >>> cache = ReferenceCache.load("reference.safetensors", model=model, dataset=dataset)      # doctest: +SKIP
    >>> cache.get(3)["ref_logp"].shape                                                          # doctest: +SKIP
    torch.Size([41])
    """

    def __init__(
        self,
        sample_ids: Sequence[int] | Tensor,
        lengths: Sequence[int] | Tensor,
        values: dict[str, Tensor],
        *,
        head: dict[str, Tensor] | None = None,
        layer: int | None = None,
        model_fingerprint: str = "",
        data_fingerprint: str = "",
        settings: Mapping[str, Any] | None = None,
        texts: Mapping[str, Tensor] | None = None,
        mixed_precision: str | None = None,
    ) -> None:
        """`values` maps batch keys to the rows of all samples one after another, [sum of lengths, ...]; `head` holds
        the batch entries that all samples share: `ref_head` [V, D] and, where there is one, `ref_head_bias` [V];
        `texts` the input_ids and labels that the values are of, [sum of lengths], which batches are held to;
        `mixed_precision` the autocast that they were computed in, None where it is not known.
        """
        self.sample_ids = torch.as_tensor(sample_ids, dtype=torch.int64, device="cpu").reshape(-1)  # [S]
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64, device="cpu").reshape(-1)  # [S]
        self.values = values
        self.head, self.texts = dict(head or {}), dict(texts or {})
        self.layer = layer
        self.model_fingerprint = model_fingerprint
        self.data_fingerprint = data_fingerprint
        self.settings = settings
        self.mixed_precision = mixed_precision
        total = int(self.lengths.sum())
        for key, value in values.items():
            if key not in BATCH_KEY.values() or value.shape[0] != total:
                raise ValueError(
                    f"{key} {tuple(value.shape)} does not fit: the keys are {sorted(BATCH_KEY.values())}, rows {total}"
                )
        ends = self.lengths.cumsum(0).tolist()
        self._span = {
            sample: (end - length, end)
            for sample, length, end in zip(self.sample_ids.tolist(), self.lengths.tolist(), ends, strict=True)
        }
        if len(self._span) != self.sample_ids.numel():
            raise ValueError(
                "two samples of the data set have the same sample_id; give each data set its own id_offset"
            )

    def __len__(self) -> int:
        return len(self._span)

    def __contains__(self, sample_id: int) -> bool:
        return int(sample_id) in self._span

    @property
    def what(self) -> frozenset[str]:
        """The quantities it holds, out of "logp", "hidden", "layer_hidden"."""
        return frozenset(name for name, key in BATCH_KEY.items() if key in self.values)

    def get(self, sample_id: int) -> dict[str, Tensor]:
        """The stored values of one sample, batch key -> [T, ...]. ValueError for a sample the cache does not hold."""
        span = self._span.get(int(sample_id))
        if span is None:
            known = sorted(self._span)
            shown = f"{known[0]}..{known[-1]}" if known else "none"
            raise ValueError(
                f"sample_id {int(sample_id)} is not in the reference cache ({len(known)} samples, ids {shown}); "
                "it was built for other data: build it again with ReferenceCache.build"
            )
        return {key: value[span[0] : span[1]] for key, value in self.values.items()}

    def join(
        self, sample_ids: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor, padded_length: int
    ) -> dict[str, Tensor]:
        """The values of a batch, right-padded with zeros to [B, padded_length, ...], `ref_layer` [B], of which layer
        hidden states are, and `ref_precision`, what they were computed in; what a Collator adds to its batch.

        Errors: ValueError for an unknown sample and for a sample whose token count differs from the one it was built
        with.
        """
        joined = {
            key: value.new_zeros((len(sample_ids), padded_length, *value.shape[1:]))
            for key, value in self.values.items()
        }
        for row, (sample_id, length) in enumerate(zip(_ints(sample_ids), _ints(lengths), strict=True)):
            for key, value in self.get(sample_id).items():
                if value.shape[0] != length:
                    raise ValueError(
                        f"sample {sample_id} has {length} tokens, but the reference cache has {value.shape[0]} for "
                        "it; it was built with another tokenizer, template or max_length: build it again with "
                        "ReferenceCache.build"
                    )
                joined[key][row, :length] = value
        if "ref_layer_hidden" in joined and self.layer is not None:
            joined["ref_layer"] = torch.full((len(sample_ids),), self.layer, device="cpu")
        return joined | key_of(self.mixed_precision, len(sample_ids))

    def check_texts(self, sample_ids: Sequence[int] | Tensor, batch: Mapping[str, Tensor]) -> None:
        """ValueError where a right-padded batch has other tokens than those that the values are of, or a label of
        which there is no log-prob.
        """
        again = "build it again with ReferenceCache.build"
        given = {key: batch[key].cpu() for key in self.texts if isinstance(batch.get(key), Tensor)}
        for row, sample_id in enumerate(_ints(sample_ids)):
            start, end = self._span[sample_id]
            here = {key: value[row, : end - start] for key, value in given.items()}
            differ = {key: value != self.texts[key][start:end] for key, value in here.items()}
            if "input_ids" in differ and bool(differ["input_ids"].any()):
                place = int(differ["input_ids"].nonzero()[0])
                token, cached = int(here["input_ids"][place]), int(self.texts["input_ids"][start + place])
                raise ValueError(
                    f"sample {sample_id} is another text than the one of that sample_id in the reference cache (its "
                    f"token {place} is {token}, not {cached}): give samples the sample_id that they had, or {again}"
                )
            if "labels" in differ and "ref_logp" in self.values:
                bad = differ["labels"] & (here["labels"] != -100)
                bad[:1] = False  # nothing scores the first
                if bool(bad.any()):
                    raise ValueError(
                        f"sample {sample_id} has a label at position {int(bad.nonzero()[0])} of which the reference "
                        f"cache has no log-prob: it was built with other labels; {again}, by the training's collator"
                    )

    @classmethod
    def build(
        cls,
        model: nn.Module,
        dataset: Any,
        collator: Callable[[list[Any]], dict[str, Tensor]],
        path: str | os.PathLike[str] | None = None,
        what: Collection[str] = ("logp",),
        *,
        layer: int | None = None,
        batch_size: int = 8,
        progress: bool = False,
        reference: str = "auto",
        fingerprint: str | None = None,
        mixed_precision: str | None = None,
    ) -> ReferenceCache:
        """Run `model` over `dataset` once and keep what it says; with `path`, save it, or load it if it is there
        already.

        Args:
            model: the original model; with PEFT adapters see ``reference``. Its train/eval modes are kept.
            dataset: indexable items for `collator`; every row of a batch has its own `sample_id`.
            collator: makes batches with input_ids, attention_mask, labels [B, T] and sample_id [B].
            path: a safetensors file, written whole or not at all.
            what: out of "logp", "hidden", "layer_hidden" (this one needs `layer`, counted as in `hidden_states`).
            batch_size: items a forward pass; it changes the values by rounding only.
            reference: what the original is, of a model with PEFT adapters. "adapted": the model as it is, adapters on.
                "base": the model with its adapters off. "auto": the same, refused where the base is not provably the
                original: where something else is trained too, the adapters' initialisation rewrote the base (PiSSA,
                OLoRA, CorDA, LoftQ), or the adapters are not zero, or transformers' own, which gfast cannot switch
                off. "adapter:NAME": the model with that adapter, which
                is frozen, in place of the active one.
            fingerprint: the model's (`model_fingerprint`), where it is known: it is then taken for that, and not
                computed.
            mixed_precision: the autocast to compute in, that of the training ("bf16", "fp16", "no"): else the original
                and the model as it starts differ by rounding. None: what the model is in where this is called.

        Errors: ValueError when the file at `path` is for another model, other data or another precision (where one is
        asked for), or holds too little, for a base that is not the original, and for texts that change each other's
        numbers in a batch (LongRoPE, dynamic NTK).
        """
        from gfast.original import adapter_name, check_reference_name, original

        what, batch_size = checked(what, layer), whole("batch_size", batch_size, least=1)
        check_reference_name(reference)
        check_precision(mixed_precision)
        model = wrappers.unreplicated(model)
        adapted: bool | str = reference == "adapted" and peft_models.is_adapted(model)
        if reference != "adapted":
            peft_models.refuse_inner_adapters(model)
        if adapter_name(reference) is not None:
            peft_models.check_frozen_adapter(model, adapter_name(reference))
            adapted = adapter_name(reference)
        if path is not None and Path(path).exists():
            options = dict(what=what, layer=layer, adapted=adapted, fingerprint=fingerprint)
            return cls.load(path, model=model, dataset=dataset, mixed_precision=mixed_precision, **options)
        if len(dataset) == 0:
            raise ValueError("the data set is empty, so there is nothing to compute a reference for")
        fingerprint = fingerprint or model_fingerprint(model, adapters=adapted)
        parts: dict[int, dict[str, Tensor]] = {}
        # Similar lengths together: less padding, and the result depends on it by rounding only.
        order = sorted(range(len(dataset)), key=lambda index: _length(dataset[index]))
        starts = range(0, len(order), batch_size)
        bar = Bar("Reference", len(starts), show=progress)
        head: dict[str, Tensor] = {}
        first = to_model(model, collator([dataset[order[0]]]))
        longer = to_model(model, collator([dataset[index] for index in {order[0]: 0, order[-1]: 0}]))
        rounds = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())
        as_is = adapted is True or not peft_models.is_adapted(model)
        with (
            in_precision(model, mixed_precision) as precision,
            as_it_is(model) if as_is else original(model, first, reference),
            unstretched(model),
        ):
            rounding = 3e-2 if rounds or precision != "no" else 1e-4
            check_widths(model, (first, longer), rounding, what, layer, head)
            for start in bar.over(starts):
                batch = to_model(model, collator([dataset[index] for index in order[start : start + batch_size]]))
                keep_samples(parts, values_of(model, batch, what, layer, head), batch)
        ids = sorted(parts)
        cache = cls(
            ids,
            [len(next(iter(parts[i].values()))) for i in ids],
            {BATCH_KEY[name]: torch.cat([parts[i][BATCH_KEY[name]] for i in ids]) for name in sorted(what)},
            head=head,
            layer=layer,
            model_fingerprint=fingerprint,
            data_fingerprint=dataset_fingerprint(dataset),
            settings=settings_of(model, adapted),
            texts={key: torch.cat([parts[i][key] for i in ids]) for key in TEXT_KEYS if key in parts[ids[0]]},
            mixed_precision=precision,
        )
        if path is not None:
            cache.save(path)
        return cache

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, whole or not at all. OSError, with the path, when that is not possible."""
        tensors = {"sample_ids": self.sample_ids, "lengths": self.lengths, **self.values, **self.head}
        tensors |= {TEXT_KEYS[key]: value for key, value in self.texts.items()}
        description = {
            "format": FORMAT,
            "what": sorted(self.what),
            "layer": self.layer,
            "model_fingerprint": self.model_fingerprint,
            "data_fingerprint": self.data_fingerprint,
            "settings": self.settings,
            "mixed_precision": self.mixed_precision,
            "torch": torch.__version__,
        }
        write_tensors(path, tensors, description)
        return Path(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        dataset: Any = None,
        what: Collection[str] = (),
        layer: int | None = None,
        adapted: bool | str = False,
        fingerprint: str | None = None,
        mixed_precision: str | None = None,
    ) -> ReferenceCache:
        """Read a cache and check that it belongs to `model` (the original one) and `dataset`, and holds `what`.

        Errors: FileNotFoundError; DamagedFile; ValueError for a file that is no cache, belongs to another model or
        other data, or holds an fp64 model's log-probs in fp32.
        """
        check_layer_asked(what, layer)
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no reference cache {path}; ReferenceCache.build(..., path=...) makes one"
            )
        file = TensorFile(path, REMEDY)
        description = file.description
        if not isinstance(description, dict) or description.get("format") not in (*OLD_FORMATS, FORMAT):
            raise ValueError(f"{path} is not a {FORMAT} file; {REMEDY}")
        if description["format"] != OLD_FORMATS[0] and file.checksum is None:
            raise DamagedFile(path, "its checksums are missing", REMEDY)
        tensors = {name: file.get(name) for name in file.names}
        wide = model is not None and any(p.dtype == torch.float64 for p in model.parameters())
        if wide and "ref_logp" in tensors and description["format"] in OLD_FORMATS:
            raise ValueError(
                f"{path}: an earlier gfast wrote it, which rounded the log-probs of fp64 models to fp32; {REMEDY}"
            )
        with undamaged(path, REMEDY):
            cache = cls(
                tensors.pop("sample_ids"),
                tensors.pop("lengths"),
                head={name: tensors.pop(name) for name in HEAD_KEYS if name in tensors},
                texts={key: tensors.pop(name) for key, name in TEXT_KEYS.items() if name in tensors},
                values=tensors,
                layer=description["layer"],
                model_fingerprint=description["model_fingerprint"],
                data_fingerprint=description["data_fingerprint"],
                settings=description.get("settings"),
                mixed_precision=description.get("mixed_precision"),
            )
        try:
            options = dict(what=what, layer=layer, adapted=adapted, fingerprint=fingerprint)
            cache.check(model=model, dataset=dataset, mixed_precision=mixed_precision, **options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return cache

    def check(
        self,
        *,
        model: nn.Module | None = None,
        dataset: Any = None,
        what: Collection[str] = (),
        layer: int | None = None,
        adapted: bool | str = False,
        fingerprint: str | None = None,
        mixed_precision: str | None = None,
    ) -> None:
        """ValueError unless this cache belongs to `model` and `dataset` (those given) and holds `what` (at `layer`);
        adapted: of the model with its adapters on, or with the one of that name; fingerprint, mixed_precision: as in
        `build`.
        """
        if model is None and (adapted or fingerprint):
            raise ValueError("adapted and fingerprint say which model a cache has to be of: give model= with them")
        check_precision(mixed_precision)
        if None not in (mixed_precision, self.mixed_precision) and mixed_precision != self.mixed_precision:
            raise ValueError(
                f"the reference cache was computed with mixed_precision={self.mixed_precision!r}, not "
                f"{mixed_precision!r}: delete the file to build it again, or give another path"
            )
        lacking = sorted(set(what) - self.what)
        if lacking:
            raise ValueError(
                f"the reference cache holds {sorted(self.what)} and not {lacking}; build it again with "
                f"what={sorted(what)}"
            )
        if "layer_hidden" in what and layer != self.layer:
            raise ValueError(
                f"the reference cache holds hidden states of layer {self.layer}, not {layer}; build it again"
            )
        if dataset is not None:
            actual = dataset_fingerprint(dataset)
            if actual != self.data_fingerprint:
                raise ValueError(
                    f"the reference cache is for other data (fingerprint {self.data_fingerprint[:12]}, this data has "
                    f"{actual[:12]}): "
                    "the rows, the tokenizer, the template or max_length differ. Use that data, or delete the file to "
                    "build it again"
                )
        if model is not None:
            actual = fingerprint or model_fingerprint(model, adapters=adapted)
            if actual != self.model_fingerprint:
                raise ValueError(
                    f"the reference cache is for another model (fingerprint {self.model_fingerprint[:12]}, this model "
                    "has "
                    f"{actual[:12]}): the weights or their dtype differ. Load the original model, or delete the file "
                    "to build it again"
                )
            if (other := difference(self.settings, settings_of(model, adapted))) is not None:
                raise ValueError(
                    f"the reference cache is of this model with other settings: {other}. Load it with those, or delete "
                    f"the file to build it again"
                )


def _length(item: Any) -> int:
    texts = [item[key] for key in ("input_ids", "preferred_input_ids") if key in item] if isinstance(item, dict) else []
    return max(map(len, texts), default=0)


def _ints(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(value) for value in values]
