"""From items to padded batches that carry sample ids and reference values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from gfast.data.dataset import IGNORE
from gfast.given import whole


class Reference(Protocol):
    """What the collator needs of a cache of reference values (`gfast.training.ReferenceCache` is one)."""

    def join(self, sample_ids: list[int], lengths: list[int], padded_length: int) -> dict[str, Tensor]:
        """Extra batch entries for these samples, in this order, padded on the right to `padded_length`.

        `lengths[b]` is the unpadded number of tokens of sample b, so that a cache of other data can be refused.
        Per-token values are `[B, padded_length, ...]` with zeros in the padding, for example `{"ref_logp": Tensor [B,
        T]}`.
        """
        ...


class Collator:
    """Pads items on the right into a batch: `input_ids`, `attention_mask`, `labels` [B, T] and `sample_id` [B], all
    int64.

    Items are `input_ids` and `labels` [T], as lists or tensors. An `attention_mask` [T] that they have is kept: what it
    hides stays hidden, and padding behind a text is cut off. Other inputs of a model, such as `position_ids` or
    `token_type_ids`, would be lost here, and are refused by name; texts and single numbers beside them are passed by.

    Items with a `weight`, one number a token or one for all of them (a sample's), give `weight` [B, T] fp32, which
    ``gfast.model_loss`` multiplies an objective's token weights by.

    Items with `preferred_*` entries (`PreferenceDataset`) become one [2B, T] batch: first the B rejected (forget)
    answers, then the B preferred ones in the same order.

    Args:
        tokenizer: a tokenizer, or the padding id itself. Without a padding token EOS pads; either is masked out and its
            label is -100, so the choice changes no result.
        reference: adds what its `join` returns (see `Reference`), such as `ref_logp` [B, T]; needs items with a
            `sample_id`.
        pad_to_multiple_of: round T up, for tensor cores or to bound the number of shapes that get compiled.

    Raises:
        ValueError: an empty batch, a tokenizer with neither padding nor EOS token, items without or with mixed entries,
            rows of other lengths or that are no whole numbers, inputs that a batch would lose.

    Example:
        >>> from gfast.data import Collator, QADataset, bundled_authors, demo_tokenizer
        >>> data = QADataset(bundled_authors()[0], demo_tokenizer())
        >>> batch = Collator(demo_tokenizer(), pad_to_multiple_of=8)([data[0], data[1]])
        >>> batch["input_ids"].shape[1] % 8, batch["sample_id"].tolist()
        (0, [0, 1])
    """

    def __init__(self, tokenizer: Any, reference: Reference | None = None, *, pad_to_multiple_of: int | None = None):
        self.pad_id = tokenizer if isinstance(tokenizer, int) else _pad_id(tokenizer)
        if pad_to_multiple_of is not None:
            pad_to_multiple_of = whole("gfast: pad_to_multiple_of", pad_to_multiple_of, least=1)
        self.reference = reference
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, items: Sequence[dict]) -> dict[str, Tensor]:
        if len(items) == 0:
            raise ValueError("gfast: cannot make a batch of no items")
        with_pairs = ["preferred_input_ids" in item for item in items]
        if any(with_pairs):
            if not all(with_pairs):
                raise ValueError(
                    "gfast: a batch mixes items with and without a preferred answer; use one kind of data set"
                )
            items = [*items, *(_preferred(item) for item in items)]
        texts = [_text(item, b) for b, item in enumerate(items)]
        lengths = [len(row) for row, _, _ in texts]
        multiple = self.pad_to_multiple_of
        padded = (max(lengths) + multiple - 1) // multiple * multiple

        input_ids = torch.full((len(texts), padded), self.pad_id, dtype=torch.int64, device="cpu")  # [B, T]
        labels = torch.full_like(input_ids, IGNORE)
        attention_mask = torch.zeros_like(input_ids)
        for b, text in enumerate(texts):
            for row, values in zip((input_ids, labels, attention_mask), text, strict=True):
                row[b, : len(values)] = values
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if any("weight" in item for item in items):
            batch["weight"] = _weights(items, lengths, padded)

        with_ids = ["sample_id" in item for item in items]
        if all(with_ids):
            sample_ids = [whole(f"gfast: the sample_id of item {b} of a batch", item["sample_id"], least=None)
                          for b, item in enumerate(items)]  # fmt: skip
            batch["sample_id"] = torch.tensor(sample_ids, dtype=torch.int64, device="cpu")  # [B]
            if self.reference is not None:
                joined = self.reference.join(sample_ids, lengths, padded)
                if hasattr(self.reference, "check_texts"):
                    self.reference.check_texts(sample_ids, batch)
                batch.update(joined)
        elif any(with_ids) or self.reference is not None:
            raise ValueError("gfast: every item needs a sample_id to find its reference values, and some have none")
        return batch


class ForgetRetainCollator:
    """Collates the two sides of `ForgetRetain` items: `{"forget": batch, "retain": batch}`.

    Args:
        forget: the collator of the forget side, or a tokenizer to make one from.
        retain: the collator of the retain side; None uses the same one.

    Example:
        >>> from gfast.data import ForgetRetain, ForgetRetainCollator, QADataset, bundled_authors, demo_tokenizer
        >>> forget, retain = (QADataset(rows, demo_tokenizer()) for rows in bundled_authors())
        >>> data = ForgetRetain(forget, retain, seed=0)
        >>> batch = ForgetRetainCollator(demo_tokenizer())([data[0], data[1]])
        >>> sorted(batch), batch["forget"]["sample_id"].tolist()
        (['forget', 'retain'], [0, 1])
    """

    def __init__(self, forget: Any, retain: Any = None):
        self.forget = forget if _is_collator(forget) else Collator(forget)
        self.retain = self.forget if retain is None else retain if _is_collator(retain) else Collator(retain)

    def __call__(self, items: Sequence[dict]) -> dict[str, dict[str, Tensor]]:
        return {
            "forget": self.forget([item["forget"] for item in items]),
            "retain": self.retain([item["retain"] for item in items]),
        }


def batches(dataset: Any, collator: Callable[[list[dict]], dict], batch_size: int) -> list[dict]:
    """All items in order as a list of batches (the last one may be smaller), as `gfast.g_effect` takes them.

    Example:
        >>> from gfast.data import Collator, QADataset, batches, bundled_authors, demo_tokenizer
        >>> data = QADataset(bundled_authors()[0], demo_tokenizer())
        >>> [len(batch["sample_id"]) for batch in batches(data, Collator(demo_tokenizer()), 16)]
        [16, 16, 8]
    """
    if batch_size < 1:
        raise ValueError(f"gfast: batch_size must be positive, got {batch_size}")
    size = len(dataset)
    return [
        collator([dataset[i] for i in range(start, min(start + batch_size, size))])
        for start in range(0, size, batch_size)
    ]


def _is_collator(value: Any) -> bool:
    # A tokenizer is callable too.
    return callable(value) and not hasattr(value, "eos_token_id")


# What a batch takes of an item, and what tokenizers say of a text that no model reads.
_TAKEN = {"input_ids", "labels", "attention_mask", "weight", "sample_id"}
_OF_TEXTS = {"special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length"}


def _text(item: dict, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, labels and attention mask [T] of an item, without padding that it has behind its text."""
    _refuse_what_is_lost(item, b)
    ids = _row(item, "input_ids", b)
    labels, mask = _row(item, "labels", b, len(ids)), torch.ones_like(ids)
    if item.get("attention_mask") is not None:
        mask = _row(item, "attention_mask", b, len(ids))
    seen = ((mask != 0) | (labels != IGNORE)).nonzero()
    end = int(seen[-1]) + 1 if len(seen) else len(ids)
    return ids[:end], labels[:end], mask[:end]


def _refuse_what_is_lost(item: dict, b: int) -> None:
    """ValueError for arrays of numbers that are neither taken nor of the text alone: a model or loss may read them."""
    for key, value in item.items():
        if key in _TAKEN | _OF_TEXTS or key.startswith("preferred_") or value is None:
            continue
        try:
            array = value if isinstance(value, Tensor) else numpy.asarray(value)
        except ValueError:  # rows of several lengths
            continue
        if array.ndim and (isinstance(array, Tensor) or array.dtype.kind in "biuf"):
            raise ValueError(
                f"gfast: item {b} of a batch has {key}, which this collator would leave out of the batch: take it "
                "out of the items if neither the model nor the loss reads it, else give a collator of your own"
            )


def _row(item: dict, key: str, b: int, length: int | None = None) -> Tensor:
    """An item's row of whole numbers, int64 [T]; ValueError, naming it, for anything else."""
    if item.get(key) is None:
        raise ValueError(
            f"gfast: item {b} of a batch has no {key} (it has {', '.join(item)}): an item is input_ids and labels [T], "
            "-100 where no token is scored, as gfast.data.QADataset makes them"
        )
    given = torch.as_tensor(item[key], device="cpu")
    if given.dim() != 1 or not len(given):
        raise ValueError(f"gfast: {key} of item {b} of a batch must be of one text, [T], got {tuple(given.shape)}")
    row = given.to(torch.int64)
    if not torch.equal(row.to(given.dtype), given):
        raise ValueError(f"gfast: {key} of item {b} of a batch must be whole numbers, got {given.tolist()!s:.60}")
    if length is not None and len(row) != length:
        raise ValueError(f"gfast: item {b} of a batch has {length} input_ids but {len(row)} {key}")
    return row


def _weights(items: Sequence[dict], lengths: Sequence[int], padded: int) -> Tensor:
    """[B, T] fp32, 0 in the padding."""
    weight = torch.zeros(len(items), padded, device="cpu")
    for b, (item, length) in enumerate(zip(items, lengths, strict=True)):
        if "weight" not in item:
            raise ValueError(f"gfast: item {b} of a batch has no weight, and others have one: give all or none")
        row, given = torch.as_tensor(item["weight"], dtype=torch.float32, device="cpu"), len(item["input_ids"])
        if row.shape not in ((), (given,)):
            raise ValueError(
                f"gfast: item {b} of a batch has {given} input_ids but a weight of shape {tuple(row.shape)}: give "
                f"one number a token, or one for all"
            )
        weight[b, :length] = row[:length] if row.dim() else row
    return weight


def _pad_id(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    raise ValueError(
        "gfast: the tokenizer has neither a padding nor an EOS token; pass the padding id itself (0 will do)"
    )


def _preferred(item: dict) -> dict:
    prefix = "preferred_"
    return {key[len(prefix) :]: value for key, value in item.items() if key.startswith(prefix)}
