"""Checks of what ops are given, and what the host may ask of a device while it checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

IGNORE_INDEX = -100
PLAIN = (Tensor, torch.nn.Parameter)  # types of tensors that hold their own values
REDUCTIONS = ("token_mean", "sequence_mean", "sum", "none")


def check_rows(name: str, scores: Tensor, labels: Tensor, what: str = "logits") -> None:
    """Shapes, dtypes and devices of ``scores`` [..., V or D] and ``labels`` [...]; metadata only, no device sync."""
    if scores.dim() < 1 or scores.shape[:-1] != labels.shape:
        raise ValueError(
            f"gfast: {name}: {what} of shape {tuple(scores.shape)} need labels of shape {tuple(scores.shape[:-1])}, "
            f"not {tuple(labels.shape)}."
        )
    if what == "logits" and scores.shape[-1] == 0:
        raise ValueError(f"gfast: {name}: logits of shape {tuple(scores.shape)} have an empty vocabulary.")
    if not scores.is_floating_point():
        raise TypeError(f"gfast: {name}: {what} must be floating point, not {scores.dtype}.")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"gfast: {name}: labels must be int64 (or int32), not {labels.dtype}.")
    if scores.device != labels.device:
        raise ValueError(f"gfast: {name}: {what} are on {scores.device} but labels on {labels.device}.")


def check_like_labels(name: str, what: str, value: Tensor, labels: Tensor) -> None:
    """``value`` must have the shape and device of ``labels``."""
    if value.shape != labels.shape:
        raise ValueError(
            f"gfast: {name}: {what} has shape {tuple(value.shape)} but labels {tuple(labels.shape)}; it needs one "
            f"value a label."
        )
    if value.is_complex():
        raise TypeError(f"gfast: {name}: {what} must be real numbers, not {value.dtype}.")
    if value.device != labels.device:
        raise ValueError(f"gfast: {name}: {what} is on {value.device} but labels on {labels.device}.")


def check_weight(name: str, weight: Tensor, labels: Tensor) -> None:
    """Weights of the tokens, as labels in shape and device, without a graph; finite where a label counts, which on a
    GPU is a device-side assertion."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"gfast: {name}: weight must be a tensor like labels, not a {type(weight).__name__}.")
    check_like_labels(name, "weight", weight, labels)
    if weight.requires_grad:
        raise ValueError(
            f"gfast: {name}: weight requires grad, but token weights are constants of the loss: pass weight.detach()."
        )
    if not runs_now(weight) or not runs_now(labels):
        return
    bad = ~torch.isfinite(weight) & (labels != IGNORE_INDEX)
    if not reads_are_free(weight.device):
        torch._assert_async(~bad.any(), f"gfast: {name}: a weight is not finite")
    elif bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"gfast: {name}: {int(bad.sum())} of {weight.numel()} weights are not finite, first weight{list(where)} = "
            f"{float(weight[where])}."
        )


def check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden [..., D], weight [V, D], bias [V] of one dtype and device."""
    if hidden.shape[-1] == 0:
        raise ValueError(f"gfast: {name}: hidden is {tuple(hidden.shape)}: hidden states of width 0 make no logits.")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"gfast: {name}: the head's weight must be [V, D] with D = {hidden.shape[-1]} as in hidden, not "
            f"{tuple(weight.shape)}."
        )
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(f"gfast: {name}: hidden is on {hidden.device} but {what} on {tensor.device}.")
        if tensor.dtype != hidden.dtype:
            raise TypeError(
                f"gfast: {name}: hidden is {hidden.dtype} but {what} {tensor.dtype}; cast one, or run under "
                f"torch.autocast."
            )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"gfast: {name}: bias must be [{weight.shape[0]}], not {tuple(bias.shape)}.")


def check_label_range(name: str, labels: Tensor, vocab: int) -> None:
    """Every label is in [0, V) or -100. On a GPU the check is a device-side assertion: it costs no synchronisation."""
    bad = ((labels < 0) | (labels >= vocab)) & (labels != IGNORE_INDEX)  # [N]
    if not reads_are_free(labels.device):
        torch._assert_async(~bad.any(), f"gfast: {name}: a label is outside the vocabulary [0, {vocab})")
    elif bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"gfast: {name}: labels[{where}] (flattened) = {int(labels[where])} is outside the vocabulary "
            f"[0, {vocab}); use {IGNORE_INDEX} for positions to ignore."
        )


def check_reduction(name: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"gfast: {name}: unknown reduction {reduction!r}; choose one of {', '.join(REDUCTIONS)}.")


def check_normalizer(name: str, normalizer: float | Tensor) -> None:
    """It divides: one positive number. A tensor is looked at where that costs no waiting."""
    shape = tuple(normalizer.shape) if isinstance(normalizer, Tensor) else ()
    if shape or not isinstance(normalizer, (Tensor, Real)):
        got = f"a tensor of shape {shape}" if shape else repr(normalizer)
        raise ValueError(f"gfast: {name}: normalizer must be one number, as a 0-dim tensor is, not {got}.")
    if isinstance(normalizer, Tensor) and not (runs_now(normalizer) and reads_are_free(normalizer.device)):
        return
    if not 0 < float(normalizer) < math.inf:
        raise ValueError(f"gfast: {name}: normalizer must be a positive number, not {float(normalizer)}.")


def check_chunk_rows(name: str, chunk_rows: Sequence[int]) -> None:
    if not all(hasattr(rows, "__index__") for rows in chunk_rows):
        raise ValueError(f"gfast: {name}: chunk_rows must be whole numbers, not {list(chunk_rows)}.")
    if min(chunk_rows) < 1:
        raise ValueError(f"gfast: {name}: chunk_rows must be at least 1, not {min(chunk_rows)}.")


def check_sequence_range(name: str, sequence_id: Tensor) -> None:
    """Numbers of sequences are whole and below the number of labels, which is how many sums are kept. On a GPU the
    range is left to the device's own assertion."""
    if sequence_id.is_floating_point():
        raise TypeError(f"gfast: {name}: sequence_id must be whole numbers (int64), not {sequence_id.dtype}.")
    if not (runs_now(sequence_id) and reads_are_free(sequence_id.device)) or not sequence_id.numel():
        return
    least, most = (int(x) for x in sequence_id.aminmax())
    if least < 0 or most >= sequence_id.numel():
        raise ValueError(
            f"gfast: {name}: sequence_id must be in [0, {sequence_id.numel()}), the number of labels, and holds "
            f"{least if least < 0 else most}: number the sequences 0, 1, ..."
        )


def check_pairs(name: str, level: str, num_sequences: int, labels: Tensor, sequence_id: Tensor | None) -> None:
    """Sequences of a loss of pairs, which are s and s + S/2: an even number S and, where they are numbered by the
    caller, no half without its other, which would be scored alone (looked at where that costs no waiting)."""
    if level != "pair":
        return
    half = num_sequences // 2
    if num_sequences % 2:
        raise ValueError(
            f"gfast: {name}: DPO needs pairs: an even number of sequences, the first half the forget answers, the "
            f"second half the preferred answers in the same order; got {num_sequences}."
        )
    if sequence_id is None or not (runs_now(sequence_id) and runs_now(labels) and reads_are_free(labels.device)):
        return
    present = torch.zeros(num_sequences, dtype=torch.bool).index_fill_(0, sequence_id[labels != IGNORE_INDEX], True)
    alone = (present[:half] != present[half:]).nonzero()
    if alone.numel():
        raise ValueError(
            f"gfast: {name}: DPO needs pairs: with sequence_id the forget answer s and its preferred answer "
            f"s + {half} (half the number of labels) are one, and of pair {int(alone[0])} one half has no label."
        )


def raise_if_not_finite(name: str, logp: Tensor) -> None:
    """The check behind ``check_finite=True``: a NaN or infinite logit shows in its row's log-prob."""
    bad = ~torch.isfinite(logp.reshape(-1))
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"gfast: {name}: {int(bad.sum())} of {logp.numel()} log-probs are not finite (first at flattened position "
            f"{where}); the logits hold NaN or infinite values there. Lower the learning rate or use a wider dtype."
        )


def reads_are_free(device: torch.device) -> bool:
    """Whether the host can look at a value of the device without waiting for it."""
    return device.type == "cpu"


def may_wait(device: torch.device) -> bool:
    """Whether the host may read values back from the device: not while a CUDA graph records."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def runs_now(x: Tensor) -> bool:
    """A plain tensor in plain eager mode: nothing records the call or stands in for the values."""
    return not torch.compiler.is_compiling() and type(x) in PLAIN and not is_wrapped(x)


def is_wrapped(x: Tensor) -> bool:
    """Whether ``x`` stands for another tensor in torch.func.grad, jvp, vmap and the like."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_gradtrackingtensor(x)
