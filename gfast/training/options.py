# SPDX-License-Identifier: Apache-2.0
"""Options of TrainingArguments and Trainer that could have no effect on unlearning: refused by name, never ignored.

Three things differ from what Trainer expects: batches are nested (forget and retain), logits are never made, and the
loss is the objective's, over its own counts. Options that rest on the opposite are listed here with what to do
instead; all others are Trainer's own work and mean what they always mean.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from gfast.geffect.live.hooks import sums
from gfast.given import fits
from gfast.model_state import checkpoints_reentrantly
from gfast.objectives import ETW, SHRED, JensUn, Weights

logger = logging.getLogger("gfast")

_NO_PREDICTIONS = "logits are never made, so there are no predictions"
_INSTEAD = (
    "evaluate() gives the token-mean NLL of each side, and a callback's on_evaluate may measure more on the model"
)

_COMPILED = (
    "the compiled forward makes logits and would never be called. Compile the model's blocks instead, before training: "
    "for block in model.model.layers: block.compile()"
)
# TrainingArguments hands these on through the environment, where they would stay behind a refusal: they come first.
COMPILATION = ("torch_compile", "torch_compile_backend", "torch_compile_mode", "torchdynamo")

# Name -> (whether a value is refused, why and what to do). A name that this version of transformers lacks is skipped.
REFUSED: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "remove_unused_columns": (
        lambda value, _: bool(value),
        "it must be False: it would drop the forget and retain batches",
    ),
    "label_smoothing_factor": (
        lambda value, _: bool(value),
        "it has no meaning for unlearning objectives; leave it 0",
    ),
    "label_names": (
        lambda value, _: value is not None and list(value) != ["labels"],
        "gfast reads the labels of a batch from its key labels; name them so and leave label_names out",
    ),
    "include_inputs_for_metrics": (lambda value, _: bool(value), f"{_NO_PREDICTIONS} to add to; {_INSTEAD}"),
    "include_for_metrics": (lambda value, _: bool(value), f"{_NO_PREDICTIONS} to add to; {_INSTEAD}"),
    "batch_eval_metrics": (lambda value, _: bool(value), f"{_NO_PREDICTIONS} to score; {_INSTEAD}"),
    "eval_do_concat_batches": (lambda value, _: not value, f"{_NO_PREDICTIONS} to concatenate; leave it True"),
    "eval_use_gather_object": (lambda value, _: bool(value), f"{_NO_PREDICTIONS} to gather; leave it False"),
    "past_index": (
        lambda value, _: value is not None and value >= 0,
        "the model's outputs are never made; leave it -1",
    ),
    "use_legacy_prediction_loop": (
        lambda value, _: bool(value),
        "it averages over batches, where the NLL of a data set is a mean over its tokens; leave it False",
    ),
    "jit_mode_eval": (lambda value, _: bool(value), "forget and retain batches cannot be traced; leave it False"),
    **{name: (lambda value, _: bool(value), _COMPILED) for name in COMPILATION},
    "use_liger_kernel": (
        lambda value, args: bool(value) and not _keeps_the_loss(getattr(args, "liger_kernel_config", None)),
        "its fused loss takes the place of the logits, and the loss here is the objective's. Give liger_kernel_config "
        '{"fused_linear_cross_entropy": false, "cross_entropy": false} to use its other kernels (transformers 5), or '
        "leave it False",
    ),
    "average_tokens_across_devices": (
        # transformers sets it to False for a single process, and before version 5 False was the default.
        lambda value, args: (
            not value
            and args.world_size > 1
            and type(args).__dataclass_fields__["average_tokens_across_devices"].default
        ),
        "each term is always divided by its count over all processes; leave it True",
    ),
    "parallelism_config": (
        lambda value, _: bool(getattr(value, "cp_enabled", False) or getattr(value, "sp_enabled", False)),
        "context and sequence parallelism cut plain batches along their tokens, and forget and retain batches are "
        "nested; use data parallelism, FSDP or DeepSpeed",
    ),
}


def check_switches(**switches: Any) -> None:
    """ValueError for a switch that is neither True nor False: the text "false" would be true."""
    for name, value in switches.items():
        if not fits(value, "bool"):
            raise ValueError(f"{name} is {value!r}; give True or False")


def _keeps_the_loss(config: Mapping[str, Any] | None) -> bool:
    return all((config or {}).get(name) is False for name in ("fused_linear_cross_entropy", "cross_entropy"))


def refuse_ignored_options(args: Any, names: Iterable[str] = tuple(REFUSED), trainer: str = "UnlearnTrainer") -> None:
    """ValueError that names an option of TrainingArguments which would have no effect, and says what to do."""
    for name in names:
        refused, reason = REFUSED[name]
        value = getattr(args, name, None)
        if hasattr(args, name) and refused(value, args):
            raise ValueError(f"{name}={value!r} cannot be used with {trainer}: {reason}")


# What the configurations of TRL's trainers say about losses of their own, and of log-probs summed ahead for them.
_OF_THEIR_LOSS = (
    "loss_type loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing use_weighting "
    "discopop_tau rpo_alpha reference_free router_aux_loss_coef precompute_ref_log_probs beta"
).split()


def refuse_another_loss(args: Any, objective: Any, trainer: str) -> None:
    """ValueError that names an option of TRL's which shapes a loss that the objective takes the place of, unless it is
    as it was, or a beta that is the objective's own.
    """
    for name in _OF_THEIR_LOSS:
        owner = next((cls for cls in type(args).__mro__ if name in vars(cls).get("__annotations__", ())), None)
        if owner is None or owner.__module__.partition(".")[0] != "trl":
            continue
        field, value = owner.__dataclass_fields__[name], getattr(args, name)
        usual = field.default if field.default is not MISSING else field.default_factory()
        if value == usual or (isinstance(usual, list) and [value] == usual):
            continue
        if name == "beta" and value == getattr(objective, "beta", None):
            continue
        raise ValueError(
            f"{name}={value!r} of {owner.__name__} cannot be used with {trainer}: it is of a loss in whose place that "
            f"of {objective} stands; leave it {usual!r}, and say in objective= what is to be optimised"
            + ("; own_loss_terms=True adds the balance of experts" if name == "router_aux_loss_coef" else "")
        )


def refuse_cut_texts(args: Any, objectives: Iterable[Any], trainer: str) -> None:
    """ValueError for an objective over whole texts beside TRL's packing that cuts one long text into rows and says
    nothing of what was in it: the only one that versions without a packing_strategy have.
    """
    if not getattr(args, "packing", False) or getattr(args, "packing_strategy", "wrapped") != "wrapped":
        return
    for objective in objectives:
        if objective.default_reduction == "sequence_mean" or isinstance(objective, (ETW, JensUn, SHRED, Weights)):
            raise ValueError(
                f"packing with packing_strategy='wrapped' cannot be used with {trainer}: it cuts texts where rows end "
                f"and does not say where they begin, and {objective} looks at whole texts. Use packing_strategy='bfd', "
                "padding_free=True or no packing"
            )


def refuse_ignored_arguments(
    trainer: str = "UnlearnTrainer",
    *,
    compute_loss_func: Any = None,
    compute_metrics: Any = None,
    preprocess_logits_for_metrics: Any = None,
    **_: Any,
) -> None:
    """The same for the arguments of Trainer."""
    if compute_loss_func is not None:
        raise ValueError(
            f"compute_loss_func cannot be used with {trainer}: its loss is the objective's. Give objective=, or "
            "override compute_loss in a subclass"
        )
    for name, value in (
        ("compute_metrics", compute_metrics),
        ("preprocess_logits_for_metrics", preprocess_logits_for_metrics),
    ):
        if value is not None:
            raise ValueError(f"{name} cannot be used with {trainer}: {_NO_PREDICTIONS}; {_INSTEAD}")


def refuse_search(trainer: str) -> None:
    """ValueError for transformers' search, which keeps its own score where a trainer has its objective, and sets
    options of a trainer whose loss, records and references are made.
    """
    raise ValueError(
        f"hyperparameter_search cannot be used with {trainer}: it writes its score over the trainer's objective, and "
        f"what it sets of an objective would have no effect. Make a trainer for each trial, with a folder of its own "
        f"(optuna: study.optimize(lambda trial: train(trial)), which returns what is to be optimised)"
    )


def refuse_no_step(args: Any, dataset: Any) -> None:
    """ValueError for a training that would end before its first step, as far as that is known of data and options."""
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ValueError(
            f"num_train_epochs is {args.num_train_epochs} and max_steps {args.max_steps}: no step would be taken; "
            "give passes over the data, or steps"
        )
    if not hasattr(dataset, "__len__"):
        return
    rows, whole = len(dataset), args.per_device_train_batch_size
    if not args.accelerator_config.split_batches:
        whole *= args.world_size
    if not rows:
        raise ValueError("the training data set is empty: there is nothing to take a step on")
    if args.dataloader_drop_last and rows < whole:
        raise ValueError(
            f"dataloader_drop_last drops a batch that is not whole, and the {rows} rows of the training data are fewer "
            f"than the {whole} that the processes take at a time: leave it out, or lower per_device_train_batch_size"
        )


def refuse_reentrant(model: Any) -> None:
    """ValueError where PyTorch cannot take both terms of a step in one backward."""
    if isinstance(model, DistributedDataParallel) and not model.static_graph and checkpoints_reentrantly(model):
        raise ValueError(
            "re-entrant checkpoints under DistributedDataParallel take one forward a backward, and a step has one of "
            "the forget and one of the retain batch: give gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


@contextlib.contextmanager
def said_unreached() -> Iterator[None]:
    """ValueError, with what to do, for DDP's error about parameters that a backward has not reached."""
    try:
        yield
    except RuntimeError as error:
        if "Expected to have finished reduction in the prior iteration" not in str(error):
            raise
        raise ValueError(
            "DistributedDataParallel waits for the gradients of parameters that a backward of the step before has not "
            "reached: RMU and RR stop at a layer, and live effects and surgery take the backwards of both sides apart. "
            "Give ddp_find_unused_parameters=True, or train only parameters that every term reaches"
        ) from error


def refuse_ignored_with_data(args: Any, dataset: Any) -> None:
    """The same for options whose effect depends on the training data."""
    strategy = getattr(args, "train_sampling_strategy", None)
    by_length = {"group_by_length": "group_by_length", "batch_rebalance": "batch_rebalance"}.get(strategy)
    by_length = by_length or ("group_by_length" if getattr(args, "group_by_length", False) else None)
    if by_length and dataset is not None and not _has_lengths(dataset, args.length_column_name):
        name = by_length if strategy is None else f"train_sampling_strategy={by_length!r}"
        raise ValueError(
            f"{name} cannot be used with these data: it sorts items by the length of their input_ids, and the items "
            "have none of their own (pairs of a forget and a retain sample, or a stream). Leave it out"
        )
    # transformers 5 has a method that counts tokens, which UnlearnTrainer calls for each side.
    from transformers import Trainer  # not before there are data: flags are read without it

    uncounted = ["include_tokens_per_second"]
    if not hasattr(Trainer, "_track_num_input_tokens"):
        uncounted.append("include_num_input_tokens_seen")
    for name in uncounted:
        if getattr(args, name, False) not in (False, "no") and dataset is not None and not _is_plain(dataset):
            raise ValueError(
                f"{name} cannot be used with forget and retain batches in this version of transformers, which counts "
                "the tokens of plain batches only. Leave it out, or use include_num_input_tokens_seen of transformers 5"
            )


def refuse_compiled(accelerator: Any) -> None:
    """The same for a compilation that `accelerate launch` or the environment asks for."""
    backend = str(getattr(getattr(accelerator.state, "dynamo_plugin", None), "backend", "NO")).rpartition(".")[2]
    if backend.upper() != "NO":
        raise ValueError(f"Accelerate's dynamo_backend={backend} cannot be used with UnlearnTrainer: {_COMPILED}")


def _is_plain(dataset: Any) -> bool:
    """Whether the items are known to be plain samples."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not len(dataset):
        return False
    item = dataset[0]
    return isinstance(item, Mapping) and "input_ids" in item


def _has_lengths(dataset: Any, column: str) -> bool:
    return _is_plain(dataset) or column in (getattr(dataset, "column_names", None) or ())


def say_what_a_batch_is(args: Any, objectives: Iterable[Any], processes: int) -> None:
    """A warning where an objective weighs sequences against each other, and a step's are in several batches."""
    parts = args.gradient_accumulation_steps * processes
    for objective in objectives:
        if getattr(objective, "of_batch", False) and (parts > 1 or args.per_device_train_batch_size == 1):
            logger.warning(
                "gfast: %s weighs the texts of each micro-batch of each process against each other, as its "
                "published code does, and a step has %d of %d rows: this is not the loss of one batch of %d, and "
                "of a single text it is NPO. A larger per_device_train_batch_size comes closer",
                objective,
                parts,
                args.per_device_train_batch_size,
                parts * args.per_device_train_batch_size,
            )


def say_what_is_not_called(trainer: type, mixin: type) -> None:
    """A warning for a base with a loss of its own, in whose place gfast's stands. Libraries' are meant to go."""
    mro = trainer.__mro__
    for base in mro[mro.index(mixin) + 1 :]:
        overridden = [name for name in ("compute_loss", "prediction_step", "get_batch_samples") if name in vars(base)]
        if overridden and base.__module__.partition(".")[0] not in ("transformers", "trl", "gfast"):
            logger.warning(
                "gfast: %s of %s is not called: the loss of %s is gfast's alone. What it adds goes into "
                "a compute_loss of a subclass, beside super().compute_loss(...)",
                ", ".join(overridden),
                base.__name__,
                trainer.__name__,
            )


def ends_within_a_step(came: int, wanted: int, loader: Any, step: int) -> bool:
    """Whether a stream has ended with fewer micro-batches than the next step takes. Trainer would take their backwards,
    but no step, and leave their gradients to the next one, beside its own and divided by another count.

    Raises ValueError for a stream that has not enough for any step.
    """
    from transformers.trainer_utils import has_length  # not before there are data: flags are read without it

    if not 0 < came < wanted or loader is None or has_length(loader):
        return False  # Trainer knows the last step of what has a length, and that it is smaller
    if not step:
        raise ValueError(
            f"the stream of training data ended after {came} of the {wanted} micro-batches of the first step "
            "(gradient_accumulation_steps): no step could be taken"
        )
    _say_left_out(came, wanted)
    return True


@functools.cache
def _say_left_out(came: int, wanted: int) -> None:
    logger.warning(
        "gfast: the stream of training data ended with %d of the %d micro-batches of a step "
        "(gradient_accumulation_steps), which are left out; the next step begins the stream anew",
        came,
        wanted,
    )


def refuse_own_steps(trainer: type, mixin: type) -> None:
    """ValueError for a loss or step of somebody's own beside live effects or surgery, which do not call it."""
    mro = trainer.__mro__
    at = mro.index(mixin)
    above = [(cls, "compute_loss") for cls in mro[:at] if "compute_loss" in vars(cls)]
    below = [
        (cls, "training_step")
        for cls in mro[at + 1 :]
        if "training_step" in vars(cls) and cls.__module__.partition(".")[0] not in ("transformers", "trl", "gfast")
    ]
    for cls, name in above + below:
        raise ValueError(
            f"live effects and surgery take the forget and the retain backward of a step apart, and the {name} of "
            f"{cls.__name__} would not be called: leave geffect_live and surgery out (GEffectCallback measures beside "
            "any step), or take the step in a loop of your own with gfast.GEffectMonitor"
        )


def refuse_summed_again(model: torch.nn.Module, micro_batches: int) -> None:
    """ValueError where a backward would sum over processes again what the one before it has left."""
    for name, parameter in model.named_parameters() if micro_batches > 1 else ():
        if sums(parameter):
            raise ValueError(
                f"gradient_accumulation_steps with this tensor-parallel model: transformers sums the gradient of "
                f"{name!r} over the processes after every backward, with what the micro-batches before have left "
                f"there, so that it would be another gradient. Leave gradient_accumulation_steps 1, with a larger "
                f"per_device_train_batch_size"
            )


def marked(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor, and what is another number once it has been written to."""
    return tensor, 0 if tensor.is_inference() else tensor._version


def say_other_labels(labels: Tensor, counted: dict[str, list[tuple[Tensor, int]]], side: str) -> None:
    """A warning, once, where a loss is of other labels than those, each `marked`, that were counted."""
    unchanged = [counted_labels for counted_labels, version in counted[side] if marked(counted_labels)[1] == version]
    if not any(labels is counted_labels for counted_labels in unchanged) and not any(
        _equal(labels, counted_labels) for counted_labels in unchanged
    ):
        del counted[side]
        logger.warning(
            "gfast: the labels of a %s batch are not those that the collator made, whose number in the whole step the "
            "loss is divided by: mask labels in the collator or in gfast_batch, before they are counted",
            side,
        )


def _equal(labels: Tensor, other: Tensor) -> bool:
    return labels.shape == other.shape and torch.equal(labels, other.to(labels.device))
