# SPDX-License-Identifier: Apache-2.0
"""What an UnlearnConfig asks to be measured along a training, as callbacks on the first samples of both sets."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from gfast import peft_models
from gfast.data import ForgetRetain, ForgetRetainCollator
from gfast.geffect.data import OWN_DATA
from gfast.objectives import Objective
from gfast.original import adapter_name
from gfast.sides import SETS
from gfast.training.batches import first_batches, needed_from_cache, without_references
from gfast.training.callback import GEffectCallback
from gfast.training.config import UnlearnConfig
from gfast.training.fingerprints import model_fingerprint
from gfast.training.reference import ReferenceCache
from gfast.training.trajectory import NLLCallback, Trajectory, callbacks_of


def measurements(
    config: UnlearnConfig,
    objective: Objective,
    forget: Any,
    retain: Any,
    collators: tuple[Any, Any],
    references: Mapping[str, ReferenceCache],
    own: Any = None,
) -> list[Trajectory]:
    """The callbacks of `geffect_every` and `nll_every`, all on the same batches.

    Args:
        forget, retain: data sets of the two sets' answers; `collators` makes their batches.
        references: what the objective needs of the original model, for `forget` and `retain`.
        own: the forget data as the objective takes them, where they are other items (DPO's pairs, PO's refusals); the
            reference of the forget set is then theirs.
    """
    samples, size = config.geffect_samples, config.per_device_eval_batch_size
    cache = references.get("forget")
    asked = first_batches(forget, collators[0], cache if own is None else None, samples, size)
    retain_batches = first_batches(retain, collators[1], references.get("retain"), samples, size)
    callbacks: list[Trajectory] = []
    if config.geffect_every:
        # Training has just freed its own gradient: the one that norms need takes its place.
        options: dict[str, Any] = {"norms": True, "groups": config.groups}
        if config.reference not in ("auto", "adapted"):  # the values of the model as it starts are in a cache
            options["reference"] = config.reference
        if own is not None:
            options["objective_batches"] = first_batches(own, collators[0], cache, samples, size)
        callbacks.append(GEffectCallback(config.geffect_every, asked, retain_batches, objective, **options))
    if config.nll_every:
        callbacks.append(NLLCallback(config.nll_every, asked, retain_batches, label=str(objective)))
    return callbacks


def in_own_precision(
    references: Mapping[str, ReferenceCache],
    model: Any,
    items: Mapping[str, Any],
    collators: tuple[Any, Any],
    config: UnlearnConfig,
) -> dict[str, ReferenceCache]:
    """References for measurements, which are made of the model as it is saved: values of a training's mixed precision
    are computed again without it, for the items that are measured, where the model is the original still.
    """
    caches = dict(references)
    for (side, data), collate in zip(items.items(), collators, strict=True):
        cache = references.get(side)
        if not config.geffect_every or cache is None or cache.mixed_precision in (None, "no"):
            continue
        adapted = peft_models.is_adapted(model) and (config.reference == "adapted" or adapter_name(config.reference))
        if model_fingerprint(model, adapted or False) != cache.model_fingerprint:
            logging.getLogger("gfast").warning(
                "gfast: effects are measured of the model as it is saved, without autocast, and the original's values "
                "of the %s set are of %s autocast: give a GEffectCallback batches of a ReferenceCache built without",
                side,
                cache.mixed_precision,
            )
            continue
        limited = [data[index] for index in range(min(config.geffect_samples or len(data), len(data)))]
        options = dict(batch_size=config.per_device_eval_batch_size, reference=config.reference, layer=cache.layer)
        caches[side] = ReferenceCache.build(model, limited, collate, what=cache.what, mixed_precision="no", **options)
    return caches


def asked_of_trainer(trainer: Any, objective: Objective) -> list[Trajectory]:
    """The callbacks that the configuration of an UnlearnTrainer asks for, and that it was not given.

    Raises ValueError where its data do not say what to measure on.
    """
    config: UnlearnConfig = trainer.args
    given = [callback for callback in callbacks_of(trainer) if isinstance(callback, Trajectory)]
    asked = {GEffectCallback: config.geffect_every, NLLCallback: config.nll_every}
    missing = [
        kind for kind, every in asked.items() if every and not any(isinstance(callback, kind) for callback in given)
    ]
    if not missing or trainer.train_dataset is None:
        return []
    data, collator, both = trainer.train_dataset, without_references(trainer.data_collator), trainer.objective
    usual = isinstance(data, ForgetRetain) and isinstance(collator, ForgetRetainCollator)
    if given or not usual or both.forget.needs & OWN_DATA:
        name, more = ("geffect_every", ", objective") if missing[0] is GEffectCallback else ("nll_every", "")
        why = (
            f"{type(given[0]).__name__} has batches of its own"
            if given
            else f"{both.forget} is trained on other items than the answers to forget"
            if usual
            else "the training data are no ForgetRetain with a ForgetRetainCollator (gfast.data)"
        )
        raise ValueError(
            f"{name} is {asked[missing[0]]}, and it is not known what to measure on: {why}. Leave {name} out and pass "
            f"callbacks=[{missing[0].__name__}({asked[missing[0]]}, forget_batches, retain_batches{more})]"
        )
    collators, sides = (collator.forget, collator.retain), (data.forget, data.retain)
    references = dict(trainer.references)
    for side, items, term, collate in zip(SETS, sides, (both.forget, both.retain), collators, strict=True):
        needed = needed_from_cache(term) if term is not None and config.geffect_every else set()
        if "logp" in needed and side not in references:
            # Of adapters: a step finds their original by itself, a measurement is given its log-probs.
            samples = config.geffect_samples or len(items)
            limited = [items[index] for index in range(min(samples, len(items)))]
            options = dict(batch_size=config.per_device_eval_batch_size, reference=config.reference)
            references[side] = ReferenceCache.build(trainer.model, limited, collate, what={"logp"}, **options)
    references = in_own_precision(references, trainer.model, dict(zip(SETS, sides, strict=True)), collators, config)
    return measurements(config, objective, *sides, collators, references)
