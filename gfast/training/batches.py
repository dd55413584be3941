# SPDX-License-Identifier: Apache-2.0
"""Forget and retain batches on their way to the loss: sides, reference values, counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from gfast import packed, peft_models
from gfast.data import Collator, ForgetRetainCollator, batches
from gfast.hf import OWN_KEYS
from gfast.objectives import RMU, RR, UNWEIGHTED, Mix, Objective
from gfast.ops.weights import is_pair
from gfast.sides import SETS
from gfast.training.pending import Later, PendingReference
from gfast.training.reference import ReferenceCache
from gfast.training.reference_values import check_labels_attended, check_padding


def sides(batch: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A nested batch by side; a plain batch is a forget batch.

    >>> list(sides({"input_ids": 0}))
    ['forget']
    """
    if any(isinstance(batch.get(name), Mapping) for name in SETS):
        return {name: batch[name] for name in SETS if batch.get(name) is not None}
    return {"forget": batch}


def check_trained(batch: Any, model: nn.Module) -> None:
    """ValueError for a batch that is none, and for a model that nothing, or not its adapters, would be trained of."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch must be a mapping, and the collator made a {type(batch).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model is trained: requires_grad is False for all (adapters loaded without "
            "is_trainable=True, or frozen)"
        )
    peft_models.refuse_merged(model)


class ReferenceJoin:
    """A collator that adds reference values by `sample_id` to what another collator made, for each side that has a
    cache.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], caches: Mapping[str, ReferenceCache]) -> None:
        self.collator = collator
        self.caches = dict(caches)

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        batch = self.collator(items)
        for side, part in sides(batch).items():
            cache = self.caches.get(side)
            if cache is not None:
                joined = join(cache, part)
                if joined.keys() & part.keys():  # what it has is of a precision that the cache does not know
                    joined.pop("ref_precision", None)
                part.update({key: value for key, value in joined.items() if key not in part})
        return batch


class DealtByRows:
    """A collator whose batches one process makes and deals out to all, tensor by tensor, in slices of as many rows as
    the first tensor's: rows that another tensor has beyond those would be lost, or miss in other processes.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        batch = self.collator(items)
        rows = {
            f"{name}'s {key}" if isinstance(part, Mapping) else str(name): len(value)
            for name, part in batch.items()
            for key, value in (part if isinstance(part, Mapping) else {name: part}).items()
            if isinstance(value, Tensor) and value.dim()
        }
        first = next(iter(rows), None)
        for name, count in rows.items():
            if count != rows[first]:
                raise ValueError(
                    f"a batch has {rows[first]} rows of {first} and {count} of {name}, and the main process deals out "
                    f"to all as many of each: {_DEAL}"
                )
        return batch


_DEAL = (
    "let every process make its own batches: accelerator_config={'dispatch_batches': False}, with a stream "
    "(IterableDataset) too"
)


def as_dealt(
    collator: Callable[[list[Any]], dict[str, Any]], objectives: Sequence[Objective], accelerator: Any, dataset: Any
) -> Callable[[list[Any]], dict[str, Any]]:
    """The collator, checked where the main process of several makes the batches, as Accelerate has it for streams.

    Raises ValueError for pairs [2B, T], which slices of rows would tear apart.
    """
    dealt = getattr(accelerator, "dispatch_batches", None)
    dealt = isinstance(dataset, IterableDataset) if dealt is None else dealt
    if accelerator.num_processes == 1 or not dealt:
        return collator
    for objective in objectives:
        if not isinstance(objective, UNWEIGHTED) and is_pair(objective):
            raise ValueError(
                f"{objective} takes pairs, one half of a batch and then the other, and the main process would deal "
                f"out slices of rows to all: {_DEAL}"
            )
    return DealtByRows(collator)


def caches_of(collator: Callable[[list[Any]], dict[str, Any]]) -> dict[str, Any]:
    """What gfast's collators join to the batches of each side."""
    bare = without_references(collator)
    parts = {side: getattr(bare, side) for side in SETS} if isinstance(bare, ForgetRetainCollator) else {"forget": bare}
    return {
        side: part.reference
        for side, part in parts.items()
        if isinstance(part, Collator) and part.reference is not None
    }


def without_references(collator: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """The collator that these are around."""
    while isinstance(collator, (ReferenceJoin, DealtByRows)):
        collator = collator.collator
    return collator


def for_evaluation(collator: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """The collator without the original's values, which an NLL has no use for, and caches have of the training data
    alone; and without the preferred answers of gfast's pairs, whose NLL is no part of that of the forget set.
    """
    bare = without_references(collator)
    of_forget = bare.forget if isinstance(bare, ForgetRetainCollator) else bare
    return AnswersToForget(bare) if isinstance(of_forget, Collator) else bare


class AnswersToForget:
    """A collator that makes of pairs the answers to forget alone."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        return self.collator([_without_preferred(item) for item in items])


def _without_preferred(item: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in item.items() if not str(key).startswith("preferred_")}
    nested = isinstance(rest.get("forget"), Mapping)
    return {**rest, "forget": _without_preferred(rest["forget"])} if nested else rest


def first_batches(
    data: Any, collator: Any, cache: ReferenceCache | None, samples: int, batch_size: int
) -> Sequence[dict[str, Any]]:
    """The first `samples` items (0: all) as batches that carry what `cache` knows."""
    if isinstance(cache, PendingReference) and cache.pending:
        return Later(lambda: first_batches(data, collator, cache, samples, batch_size))
    limited = [data[index] for index in range(min(samples or len(data), len(data)))]
    cut = batches(limited, collator if cache is None else ReferenceJoin(collator, {"forget": cache}), batch_size)
    return cut if cache is None else [{**batch, **cache.head} for batch in cut]


def join(cache: ReferenceCache, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The cached values of a right-padded batch, aligned with it, [B, T, ...]."""
    if "sample_id" not in batch:
        raise ValueError("the batch has no sample_id to look its samples up by; gfast.data.Collator makes such batches")
    check_padding(batch)
    check_labels_attended(batch)
    mask = batch["attention_mask"]
    joined = cache.join(batch["sample_id"], mask.sum(1), mask.shape[1])
    cache.check_texts(batch["sample_id"], batch)
    return joined


def own_numbers(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a batch, weights and reference values, which 16 bits would round."""
    return {key: value for key, value in batch.items() if key in OWN_KEYS and isinstance(value, Tensor)}


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A nested batch on `device`."""
    moved = {}
    for key, value in batch.items():
        if isinstance(value, Mapping):
            moved[key] = to_device(value, device)
        else:
            # to the host it waits: values of a copy that has not arrived yet would be read there
            moved[key] = value.to(device, non_blocking=device.type != "cpu") if isinstance(value, Tensor) else value
    return moved


def require_reference(batch: Mapping[str, Any], objective: Objective, side: str, model: nn.Module, heads: Any) -> None:
    """ValueError, with what to do, when the batch of `side` lacks what `objective` needs."""
    lacking = {need for need in objective.needs if need.startswith("ref_") and need not in batch}
    lacking -= set(heads.get(side, ()))
    if lacking and not peft_models.is_adapted(model):
        raise ValueError(
            f"{objective} needs {', '.join(sorted(lacking))} of the original model in each {side} batch. Build it "
            "once: "
            f"cache = ReferenceCache.build(model, {side}_dataset, collator, "
            f"what={sorted(needed_from_cache(objective))}), "
            f'and pass references={{"{side}": cache}} to the trainer'
        )


def count(objective: Objective, batch: Mapping[str, Any]) -> int:
    """What the default reduction of `objective` divides by in a batch with Hugging Face labels [B, T]."""
    # Objectives on hidden states look at the positions of the labels themselves, those on log-probs at the ones that
    # score them.
    return packed.count(objective, batch, start=0 if isinstance(objective, (RMU, RR)) else 1)


def needed_from_cache(objective: Objective) -> set[str]:
    """What a ReferenceCache must hold for `objective`, out of "logp", "hidden", "layer_hidden".

    >>> from gfast.objectives import GA, KL, NPO
    >>> needed_from_cache(GA()), needed_from_cache(NPO()), needed_from_cache(KL())
    (set(), {'logp'}, {'hidden'})
    """
    names = {"ref_logp": "logp", "ref_hidden": "hidden", "ref_head": "hidden", "ref_layer_hidden": "layer_hidden"}
    return {names[need] for need in objective.needs if need in names}


def check_layers(caches: Mapping[str, ReferenceCache], objective: Mix) -> None:
    """ValueError for a cache of the hidden states of another layer than its side's objective has."""
    for side, cache in caches.items():
        term = getattr(objective, side)
        if term is not None:
            cache.check(what=needed_from_cache(term) & cache.what, layer=getattr(term, "layer", None))
