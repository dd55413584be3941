# SPDX-License-Identifier: Apache-2.0
"""gfast in a Trainer of transformers: a mixin for any objective, a loss function for those over single tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from gfast.objectives import BST, MASC, PDU, UNWEIGHTED, Mix
from gfast.ops.checks import IGNORE_INDEX
from gfast.ops.unlearn_loss import unlearn_loss
from gfast.ops.weights import default_reduction, kernel_spec
from gfast.training.dual import check_dual
from gfast.training.loss import GFastLossMixin
from gfast.training.trajectory import calling_trainer

__all__ = ["GFastLossMixin", "gfast_loss_func"]


def gfast_loss_func(objective: Any, args: Any = None) -> Callable[..., Tensor]:
    r"""An objective as `compute_loss_func` of a Trainer: :math:`\frac1Z \sum_i w_i \log p_i`, Z = num_items_in_batch.

    Trainer counts the labels of an optimizer step over its micro-batches (and, with average_tokens_across_devices, over
    all processes), so that the gradient is that of one big batch, for objectives whose weight is a token's own. It
    makes the logits of the whole batch. `GFastLossMixin` does neither need that count nor those logits, and takes every
    objective.

    Args:
        objective: GA, WGA, SatImp, SimSat, SimImp, ETW, PDU (without a dual variable), MASC, BST, NLL or PO, or a
            callable ``(logp, ref_logp, sequence_id) -> weights``. PO as NLL of the batch's labels, which must be those
            of a refusal.
        args: the Trainer's arguments; needed in several processes, where average_tokens_across_devices decides what
            num_items_in_batch counts.

    Returns:
        ``(outputs, labels, num_items_in_batch=None) -> loss``: outputs.logits [B, T, V], labels [B, T], not shifted,
        -100 ignored. Without num_items_in_batch the mean over the batch's own tokens.

    Raises:
        ValueError: here, for an objective over sequences (its mean is not over num_items_in_batch) or one that needs
            values of the original model, which a loss function never sees, and for label smoothing in the arguments; at
            the first batch, for a model that is not causal, in several processes whose counts are not summed, for
            DataParallel, and for labels of first tokens where Trainer counts them.

    Source: arXiv 2502.19301.

    Example:
        >>> from transformers import Trainer
        >>> from gfast.objectives import WGA
        >>> loss = gfast_loss_func(WGA(alpha=1.0))
        >>> trainer = Trainer(model, args, train_dataset=data, compute_loss_func=loss)    # doctest: +SKIP
    """
    instead = "use gfast.integrations.transformers.GFastLossMixin, which counts for itself and takes every objective"
    if isinstance(objective, (Mix, *UNWEIGHTED)):
        raise ValueError(
            f"gfast: {objective} needs more than the logits of one batch, all that a loss func sees; {instead}"
        )
    check_dual(objective)
    spec = kernel_spec(objective)
    if default_reduction(objective) != "token_mean" or (spec is not None and spec.level != "token"):
        raise ValueError(
            f"gfast: {objective} is a mean over sequences, and the num_items_in_batch that Trainer hands a loss func "
            f"counts tokens; {instead}"
        )
    lacking = sorted(getattr(objective, "needs", frozenset()) & {"ref_logp", "weight"})
    if lacking:
        raise ValueError(f"gfast: {objective} needs {lacking[0]}, which Trainer does not hand a loss func; {instead}")

    _refuse_smoothing(args)
    whole_texts = spec is None and not isinstance(objective, (BST, MASC, PDU))  # ETW, and callables may

    def loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        if args is None:
            _refuse_smoothing(getattr(calling_trainer(), "args", None))
        if (kind := type(outputs).__name__).startswith(_NOT_CAUSAL):
            raise ValueError(f"gfast: the model's {kind} is not of a causal language model, whose labels are shifted")
        logits = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
        if labels is None or logits is None:
            gone = "a tuple" if isinstance(outputs, tuple) else "a fused loss such as Liger's"
            lacking = "labels" if labels is None else f"logits ({gone} took their place)"
            raise ValueError(f"gfast: the batch has no {lacking} for {objective}")
        if whole_texts and labels.shape[0] == 1 and _in_one_row(calling_trainer()):
            raise ValueError(
                f"gfast: {objective} looks at whole texts, and the Trainer puts several into one row (packing, padding "
                f"free), of which a loss func learns nothing; {instead}"
            )
        if num_items_in_batch is not None:
            _check_count(labels, num_items_in_batch, args, instead)
            num_items_in_batch = num_items_in_batch + (num_items_in_batch == 0)  # no label in a whole step: a loss of 0
        target = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).to(logits.device)
        out = unlearn_loss(logits, target, objective, reduction="token_mean", normalizer=num_items_in_batch)
        return out.loss.clone()  # Trainer multiplies it in place

    return loss


def _in_one_row(trainer: Any) -> bool:
    """Whether the Trainer that is running puts texts one after another into a row."""
    options = "padding_free packing return_position_ids return_flash_attn_kwargs".split()
    places = getattr(trainer, "args", None), getattr(trainer, "data_collator", None)
    return any(getattr(place, name, False) is True for place in places for name in options)


def _refuse_smoothing(args: Any) -> None:
    if getattr(args, "label_smoothing_factor", 0):
        raise ValueError("gfast: label_smoothing_factor has no meaning for unlearning objectives; leave it 0")


def _check_count(labels: Tensor, count: Any, args: Any, instead: str) -> None:
    """ValueError where num_items_in_batch is not the number of labels that are scored in the whole step."""
    if isinstance(count, Tensor) and count.dim() > 0:
        raise ValueError(
            f"gfast: several GPUs in one process (DataParallel) share no count of tokens; start one process a GPU with "
            f"torchrun, or {instead}"
        )
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.distributed.get_world_size() > 1:
        if args is None:
            raise ValueError("gfast: in several processes give the Trainer's arguments too: gfast_loss_func(..., args)")
        if not args.average_tokens_across_devices:
            raise ValueError(
                f"gfast: average_tokens_across_devices is off, so that each process divides by its own tokens and the "
                f"mean over processes is not that of one big batch; turn it on, or {instead}"
            )
    if bool((labels[:, 0] != IGNORE_INDEX).any()) and _counts_first():
        raise ValueError(
            f"gfast: Trainer counts the labels of this model's first tokens, which nothing scores, among "
            f"num_items_in_batch: let the collator set labels[:, 0] = -100, or {instead}"
        )


_NOT_CAUSAL = ("MaskedLM", "Seq2Seq")  # by the beginning of the name of an output's class


def _counts_first() -> bool:
    """Whether the Trainer that is running counts the labels of first tokens. Later versions do so only where they do
    not know the model's loss, which they look up by the name of its class: of GPT2LMHeadModel, or of one's own.
    """
    shifts = getattr(calling_trainer(), "_loss_shifts_labels", None)
    return _COUNTS_FIRST if shifts is None else not shifts


# transformers 5 counts labels[..., 1:] of causal models
_COUNTS_FIRST = "1:]" not in inspect.getsource(getattr(Trainer, "_get_num_items_in_batch", Trainer.get_batch_samples))
