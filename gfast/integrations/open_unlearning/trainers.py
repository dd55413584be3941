# SPDX-License-Identifier: Apache-2.0
"""open-unlearning's trainers with gfast's losses: UnlearnTrainer over its FinetuneTrainer, whose evaluation is kept."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer

from gfast import peft_models
from gfast.data import batches
from gfast.integrations.open_unlearning.arguments import unlearn_config
from gfast.integrations.open_unlearning.data import Chosen, Items, PlainOrPairs, drawn, paired
from gfast.objectives import (
    BST,
    CEU,
    DPO,
    ETW,
    GA,
    JSD,
    KL,
    MASC,
    NLL,
    NPO,
    PDU,
    SHRED,
    TNPO,
    UNDIAL,
    WGA,
    WTNPO,
    BalDRO,
    BalDROG,
    JensUn,
    Mix,
    Objective,
    SatImp,
    SimImp,
    SimNPO,
    SimSat,
    Unilogit,
)
from gfast.training.batches import ReferenceJoin, needed_from_cache
from gfast.training.callback import GEffectCallback
from gfast.training.dual import moves
from gfast.training.precision import of_training
from gfast.training.reference import ReferenceCache
from gfast.training.trainer import UnlearnTrainer

RETAIN = {"NLL": NLL, "KL": KL, "JensUn": JSD}  # this one by the name in JensUn's fork
LOGGED = ("forget_loss", "retain_loss")
_FIRST = "ignore_first_n_answer_tokens"  # of CEU: labels of the forget items that do not count
_ALONE = ("GradAscent", "CEU")  # without a retain loss
# Name -> what makes the forget objective, and the defaults of open-unlearning's class, or of the fork's that has one
# (gfast's where there is none).
METHODS: dict[str, tuple[Callable[..., Objective], dict[str, Any]]] = {
    "GradAscent": (GA, {}),
    "GradDiff": (GA, {}),
    "NPO": (NPO, {"beta": 1.0}),
    "DPO": (DPO, {"beta": 1.0}),
    "SimNPO": (SimNPO, {"beta": 1.0, "delta": 0.0}),
    "WGA": (lambda beta: WGA(beta), {"beta": 1.0}),
    "SatImp": (SatImp, {"beta1": 5.0, "beta2": 1.0, "alpha": 0.1}),
    "SimSat": (SimSat, {"beta": 5.0}),
    "SimImp": (SimImp, {"beta": 5.0}),
    "DrNPO": (lambda beta, beta_dv_forget: BalDRO(beta, beta_dv_forget), {"beta": 1.0, "beta_dv_forget": 1.0}),
    "GroupNPO": (lambda beta, sampling_ratio: BalDROG(beta, sampling_ratio), {"beta": 1.0, "sampling_ratio": 0.5}),
    "PDU": (
        lambda loss_names, **options: _pdu(loss_names, options),
        {
            "loss_names": None,
            "retain_loss_eps": 0.0,
            "primal_dual": False,
            "dual_step_size": 1.0,
            "dual_update_upon": "step",
            "dual_warmup_epochs": 0,
        },
    ),
    "TNPO": (TNPO, {"beta": 1.0}),
    "WTNPO": (lambda beta, wga_beta: WTNPO(wga_beta, beta), {"beta": 1.0, "wga_beta": 1.0}),
    "BST": (BST, {"lambda_bst": 0.5, "top_k": 20}),
    "UNDIAL": (UNDIAL, {"beta": 1.0}),
    "CEU": (CEU, {_FIRST: 1}),
    "JensUn": (lambda target_ids: JensUn(target_ids or ()), {"target_ids": None, "retain_loss_type": "JensUn"}),
    "ETW": (ETW, {"temperature": 1.0}),
    "MASC": (MASC, {"rho": 0.7, "eta": 0.25, "k": 10, "beta": 1.0}),
    "SHRED": (SHRED, {"share": 0.5}),
    "Unilogit": (Unilogit, {}),
}
# What open-unlearning has and this adapter has not, and why.
LACKING = {
    "RMU": "its EMBED_DIFF retain loss needs hidden states of the original at every step; use gfast unlearn with RMU",
}
REFERENCES = ("auto", "cache", "adapters_off", "adapter:NAME")
_OWN = tuple(
    "reference reference_path geffect_every geffect_samples geffect_live surgery joint_forward weights".split()
)


def make_trainers(base: type) -> dict[str, type]:
    """Classes by the name of open-unlearning's, over its FinetuneTrainer."""
    made = {name: _trainer(name, base, make, defaults) for name, (make, defaults) in METHODS.items()}
    return made | {name: _refusal(name, why) for name, why in LACKING.items()}


def _refusal(name: str, why: str) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"gfast has no {name} for open-unlearning: {why}. Or use open-unlearning's own trainer={name}")

    return type(f"GFast{name}", (), {"__init__": refuse, "lacking": True})


def _trainer(name: str, base: type, make: Callable[..., Objective], defaults: Mapping[str, float]) -> type:
    retains = name not in _ALONE
    shared = {"gamma": 1.0, "alpha": 1.0, "retain_loss_type": "NLL"} if retains else {}
    known = shared | dict(defaults)

    class GFastTrainer(UnlearnTrainer, base):
        def __init__(
            self,
            model: Any = None,
            args: Any = None,
            train_dataset: Any = None,
            eval_dataset: Any = None,
            tokenizer: Any = None,
            data_collator: Any = None,
            evaluators: Any = None,
            template_args: Any = None,
            processing_class: Any = None,
            callbacks: Any = None,
            reference: str = "auto",
            reference_path: Any = None,
            geffect_every: int = 0,
            geffect_samples: int = 0,
            geffect_live: bool = False,
            surgery: str | None = None,
            joint_forward: bool = False,
            weights: str = "none",
            **method: Any,
        ) -> None:
            skipped = method.pop(_FIRST, known.get(_FIRST, 0)) if _FIRST in known else 0
            objective = _objective(name, make, known, method)
            tokenizer = tokenizer if processing_class is None else processing_class
            if tokenizer is None:
                raise ValueError(
                    f"GFast{name} needs the tokenizer (or processing_class), whose padding it collates with"
                )
            _check_collator(data_collator)
            config = unlearn_config(args)
            config.geffect_live, config.surgery = bool(geffect_live), surgery
            config.joint_forward, config.weights = bool(joint_forward), str(weights)
            if config.weights != "none" and geffect_every:
                raise ValueError(
                    f"geffect_every measures the objective as it is, and weights={config.weights!r} weighs its tokens "
                    "anew along the run: leave geffect_every out; geffect_live measures the steps with their weights"
                )
            both = objective.retain is not None or config.geffect_live or surgery is not None
            data, sides = paired(train_dataset, config.seed, isinstance(objective.forget, DPO), both, skipped)
            collator = PlainOrPairs(tokenizer)
            config.reference, caches = _reference(model, reference)
            references = {}
            if caches and data is not None:
                shown = min(geffect_samples or sys.maxsize, len(sides.get("retain", ()))) if geffect_every else 0
                references = _caches(model, objective, data, sides, collator, config, reference_path, range(shown))
            if geffect_every:
                callback = _callback(
                    model, objective, sides, collator, references, config, geffect_every, geffect_samples
                )
                callbacks = [*(callbacks or []), callback]
            # Trainer wants a data set wherever it is to evaluate; open-unlearning's evaluators have their own.
            no_data = eval_dataset is None or (isinstance(eval_dataset, str) and eval_dataset == "dummy")
            super().__init__(
                model=model,
                args=config,
                objective=objective,
                references=references,
                train_dataset=data,
                eval_dataset="dummy" if no_data else eval_dataset,
                data_collator=collator,
                processing_class=tokenizer,
                evaluators=evaluators,
                template_args=template_args,
                callbacks=callbacks,
            )
            if no_data:
                self.eval_dataset = None

        if not hasattr(Trainer, "tokenizer"):  # transformers 5; open-unlearning's evaluation reads it

            @property
            def tokenizer(self) -> Any:
                return self.processing_class

    GFastTrainer.__name__ = GFastTrainer.__qualname__ = f"GFast{name}"
    GFastTrainer.__doc__ = (
        f"open-unlearning's {name} with gfast's losses. method_args: "
        f"{', '.join(f'{key}={value}' for key, value in known.items()) or 'none'}; {', '.join(_OWN)}."
    )
    return GFastTrainer


def _objective(name: str, make: Callable[..., Objective], known: Mapping[str, Any], method: Mapping[str, Any]) -> Mix:
    unknown = sorted(set(method) - set(known))
    if unknown:
        raise ValueError(
            f"GFast{name} has no argument {', '.join(unknown)}; its method_args are {', '.join([*known, *_OWN])}"
        )
    values = {key: value for key, value in {**known, **method}.items() if key != _FIRST}
    gamma, alpha = float(values.pop("gamma", 1.0)), float(values.pop("alpha", 0.0))
    kind = values.pop("retain_loss_type", "NLL")
    if kind not in RETAIN:
        raise ValueError(
            f"retain_loss_type is {kind!r}; GFast{name} has {' and '.join(RETAIN)} (EMBED_DIFF is a loss of RMU's)"
        )
    forget = make(**{key: float(value) if type(known[key]) is float else value for key, value in values.items()})
    if alpha or moves(forget):  # a dual variable moves away from 0, too
        return Mix(forget, RETAIN[kind](), gamma=gamma, alpha=alpha)
    return Mix(forget, None, gamma=gamma)


def _pdu(loss_names: Any, options: Mapping[str, Any]) -> PDU:
    """Its YAML names the losses that are logged, whose names gfast has for all objectives."""
    if loss_names is not None and list(loss_names) != list(LOGGED):
        raise ValueError(
            f"loss_names is {list(loss_names)}, and gfast logs {' and '.join(LOGGED)}: leave loss_names out, or give "
            f"those"
        )
    return PDU(**options)


def _check_collator(collator: Any) -> None:
    """ValueError for a collator that does more than pad: gfast collates the same items by their lengths."""
    kind = type(collator).__name__
    if collator is not None and kind not in ("DataCollatorForSupervisedDataset", "PlainOrPairs"):
        raise ValueError(
            f"the data_collator {kind} would not be run: gfast's trainers collate open-unlearning's items themselves "
            f"(by their lengths, with ids). Leave it out, or put what it does into the data set"
        )


def _reference(model: Any, reference: str) -> tuple[str, bool]:
    """What UnlearnConfig.reference is, and whether caches are built."""
    adapted = peft_models.is_adapted(model) if model is not None else False
    if reference in ("auto", "cache"):
        return "auto", reference == "cache" or not adapted
    if reference == "adapters_off" or (reference.startswith("adapter:") and len(reference) > len("adapter:")):
        if not adapted:
            raise ValueError(f"reference is {reference!r}, and the model has no adapters; use cache")
        return "base" if reference == "adapters_off" else reference, False
    raise ValueError(f"reference is {reference!r}; it can be {', '.join(REFERENCES)}")


def _caches(
    model: Any,
    objective: Mix,
    data: Any,
    sides: Mapping[str, Items],
    collator: PlainOrPairs,
    config: Any,
    path: Any,
    measured: Iterable[int],
) -> dict[str, ReferenceCache]:
    """Values of the original model for the items that will be drawn, built by one process and read by the others."""
    caches = {}
    for side, term in (("forget", objective.forget), ("retain", objective.retain)):
        what = needed_from_cache(term) if term is not None else set()
        if not what:
            continue
        items: Any = sides[side]
        if side == "retain":
            chosen = drawn(data, sides, _epochs(config, len(data)))
            items = chosen if not isinstance(chosen, Chosen) else Chosen(items, [*chosen.indices, *measured])
        precision = of_training(config)
        options = dict(what=what, batch_size=config.per_device_eval_batch_size, mixed_precision=precision)
        file = None
        if path is not None or config.world_size > 1:
            # without a path of the user's own it is one of this run's, whatever an earlier run has left there
            name = _file_name(model, items, side, what, named=path is not None)
            file = Path(path or config.output_dir) / (name if precision == "no" else f"{precision}-{name}")
            file.parent.mkdir(parents=True, exist_ok=True)
        with config.main_process_first(local=False, desc="the original model's values"):
            caches[side] = ReferenceCache.build(model, items, collator.one, file, **options)
    return caches


def _file_name(model: Any, items: Any, side: str, what: set[str], named: bool) -> str:
    if named:
        return f"reference-{side}.safetensors"
    from gfast.data import fingerprint
    from gfast.training.fingerprints import model_fingerprint

    key = hashlib.sha256("".join([model_fingerprint(model), fingerprint(items), *sorted(what)]).encode()).hexdigest()
    return f"reference-{side}-{key[:16]}.safetensors"


def _epochs(config: Any, samples: int) -> int:
    """How often the data set is begun, at most."""
    if config.max_steps <= 0:
        return math.ceil(config.num_train_epochs)
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return math.ceil(config.max_steps / max(1, samples // step)) + 1


def _callback(
    model: Any,
    objective: Mix,
    sides: Mapping[str, Items],
    collator: PlainOrPairs,
    references: Mapping[str, ReferenceCache],
    config: Any,
    every: int,
    samples: int,
) -> GEffectCallback:
    """The G-effect of what is trained, on the first samples of both sides (0: all)."""
    if set(sides) != {"forget", "retain"}:
        raise ValueError("geffect_every needs a forget and a retain set, to measure the effect on both")

    def measured(data: Any, term: Objective | None, cache: ReferenceCache | None = None) -> list[dict[str, Any]]:
        chosen = Chosen(data, range(min(samples or len(data), len(data))))
        what = needed_from_cache(term) if term is not None else set()
        if what and (cache is None or cache.mixed_precision != "no"):
            # of adapters, which a step of training does without; of the model as it is saved, without mixed precision
            options = dict(what=what, batch_size=config.per_device_eval_batch_size, reference=config.reference)
            cache = ReferenceCache.build(model, chosen, collator.one, mixed_precision="no", **options)
        collate = collator.one if cache is None else ReferenceJoin(collator.one, {"forget": cache})
        head = {} if cache is None else cache.head
        return [batch | head for batch in batches(chosen, collate, config.per_device_eval_batch_size)]

    forget, options = sides["forget"], {}
    if forget.pairs:
        options["objective_batches"] = measured(forget, objective.forget, references.get("forget"))
        of_forget = measured(Originals(forget), None)
    else:
        of_forget = measured(forget, objective.forget, references.get("forget"))
    of_retain = measured(sides["retain"], objective.retain, references.get("retain"))
    return GEffectCallback(every, of_forget, of_retain, objective, reference=config.reference, **options)


class Originals:
    """The forget answers of pairs, as items of their own."""

    def __init__(self, pairs: Items) -> None:
        self.data = pairs

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value for key, value in self.data[index].items() if not key.startswith("preferred_")}
