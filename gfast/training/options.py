# SPDX-License-Identifier: Apache-2.0
"""Options of TrainingArguments and Trainer that could have no effect on unlearning: refused by name, never ignored.

Three things differ from what Trainer expects: batches are nested (forget and retain), logits are never made, and the
loss is the objective's, over its own counts. Options that rest on the opposite are listed here with what to do
instead; all others are Trainer's own work and mean what they always mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from typing import Any

from torch.utils.data import IterableDataset

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
