"""What all row ops share: argument checks, reductions, and the loop over row chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gfast.ops.backend import compiled, why_not

IGNORE_INDEX = -100
REDUCTIONS = ("token_mean", "sequence_mean", "sum", "none")


class LossOutput(NamedTuple):
    """Result of a loss op.

    Attributes:
        loss: 0-dim; with reduction "none" one value a token (shape of labels) or a sequence [S].
        logp: log-prob of each label, shape of labels, fp32, detached, 0 where ignored.
        weight: the weight each token's log-prob gradient got, shape of labels, detached, 0 where ignored.
    """

    loss: Tensor
    logp: Tensor
    weight: Tensor


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
            f"gfast: {name}: labels[{where}] (flattened) = {int(labels[where])} is outside the vocabulary [0, "
            f"{vocab}); "
            f"use {IGNORE_INDEX} for positions to ignore."
        )


def check_reduction(name: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"gfast: {name}: unknown reduction {reduction!r}; choose one of {', '.join(REDUCTIONS)}.")


def sequence_layout(name: str, labels: Tensor, sequence_id: Tensor | None) -> tuple[Tensor, int]:
    """Flat sequence ids [N] and a static bound S on their number: leading dimensions, or the ids given.

    With ids given the bound is the number of labels, so that nothing waits for the device.
    """
    if sequence_id is not None:
        check_like_labels(name, "sequence_id", sequence_id, labels)
        return sequence_id.reshape(-1).long(), labels.numel()
    if labels.dim() <= 1:
        return torch.zeros(labels.numel(), dtype=torch.int64, device=labels.device), 1
    length = labels.shape[-1]
    count = labels.numel() // length if length else 0
    ids = torch.arange(count, device=labels.device)
    return ids[:, None].expand(count, length).reshape(-1), count


def coef_scale(
    valid: Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
    sequence_id: Tensor,
    num_sequences: int,
    pairs: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The 0-dim factor that turns a sum into the reduction: 1/N, 1/S or 1; 0 tokens give 1 (the sum is 0 anyway)."""
    if normalizer is not None:
        if reduction in ("sum", "none"):
            raise ValueError(f"gfast: normalizer has no meaning with reduction {reduction!r}.")
        check_normalizer(normalizer)
        if not isinstance(normalizer, Tensor):  # filled in on the device: a copy from the host would wait
            return torch.full((), 1.0 / normalizer, dtype=dtype, device=valid.device)
        return 1.0 / normalizer.to(valid.device, dtype)
    if reduction == "token_mean":
        return 1.0 / valid.sum().clamp(min=1).to(dtype)
    if reduction == "sequence_mean":
        present = torch.zeros(num_sequences, dtype=torch.float32, device=valid.device)
        present = present.index_add(0, sequence_id, valid.float()) > 0  # [S]
        if pairs:
            present = present[: num_sequences // 2] | present[num_sequences // 2 :]
        return 1.0 / present.sum().clamp(min=1).to(dtype)
    return torch.ones((), dtype=dtype, device=valid.device)


def check_normalizer(normalizer: float | Tensor) -> None:
    """It divides: a positive number. A tensor is looked at where that costs no waiting."""
    if isinstance(normalizer, Tensor) and not (runs_now(normalizer) and reads_are_free(normalizer.device)):
        return
    if not 0 < float(normalizer) < math.inf:
        raise ValueError(f"gfast: normalizer must be a positive number, not {float(normalizer)}.")


def check_chunk_rows(name: str, chunk_rows: Sequence[int]) -> None:
    if min(chunk_rows) < 1:
        raise ValueError(f"gfast: {name}: chunk_rows must be at least 1, not {min(chunk_rows)}.")


def check_pairs(name: str, level: str, num_sequences: int) -> None:
    if level == "pair" and num_sequences % 2:
        raise ValueError(
            f"gfast: {name}: DPO needs pairs: an even number of sequences, the first half the forget answers, the "
            f"second half "
            f"the preferred answers in the same order; got {num_sequences}."
        )


def raise_if_not_finite(name: str, logp: Tensor) -> None:
    """The check behind ``check_finite=True``: a NaN or infinite logit shows in its row's log-prob."""
    bad = ~torch.isfinite(logp.reshape(-1))
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"gfast: {name}: {int(bad.sum())} of {logp.numel()} log-probs are not finite (first at flattened "
            f"position {where}); "
            "the logits hold NaN or infinite values there. Lower the learning rate or use a wider dtype."
        )


def default_chunk_rows(vocab: int, width: int, device: torch.device) -> int:
    """Rows of logits held at a time: enough to feed the matrix units, little enough to stay small beside the model.

    On a CPU a chunk is no larger than the head itself ([rows, V] against [V, D]), within 256 to 1024 rows. Every chunk
    after the first costs one more pass over the fp32 sum of dW, 8 V D bytes for 6 rows V D flops: at 1 TFLOP/s and
    10 GB/s that is 13% of the products with 1024 rows and half of them with 256.
    """
    if device.type == "cpu":
        return min(1024, max(256, width))
    return int(min(4096, max(512, 2**30 // (2 * max(vocab, 1)))))


def rows_at_once(labels: Tensor, order: Tensor | None, chunk_rows: Sequence[int]) -> int:
    """Rows of a chunk. ``order``: those of labels [N] that take part, None: all; ``chunk_rows``: see ``LocalHead``."""
    rows, (several, one) = (labels if order is None else order).shape[0], chunk_rows
    return max(rows, 1) if rows <= one else several


def reads_are_free(device: torch.device) -> bool:
    """Whether the host can look at a value of the device without waiting for it."""
    return device.type == "cpu"


def may_wait(device: torch.device) -> bool:
    """Whether the host may read values back from the device: not while a CUDA graph records."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def runs_now(x: Tensor) -> bool:
    """A plain tensor in plain eager mode: nothing records the call or stands in for the values."""
    return not torch.compiler.is_compiling() and type(x) is Tensor


def graph_is_kept() -> bool:
    """Inside a backward: may this graph be run again (``retain_graph``)? True where torch does not say."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()


def kept_scale(factor: Tensor, dtype: torch.dtype, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """What a gradient of ``dtype`` is kept at until the backward, and what multiplies it there (None: nothing).

    Their product is ``factor`` (0-dim). fp16 has no digits below 6e-8, where 1/N puts most of a gradient before a loss
    scale can lift it: it is kept near the top of its range instead. ``weight`` [N]: of the rows; None: none is above 2.
    """
    if dtype != torch.float16:
        return factor, None
    if weight is None or not weight.numel():
        scale = torch.full_like(factor, 2.0**14)
    else:  # a power of two; a row that is not finite leaves the others as they are
        top = weight.abs().nan_to_num(0.0, posinf=0.0).amax()
        scale = torch.exp2((15.0 - torch.log2(top).ceil()).clamp(-100.0, 100.0))
    return scale, factor / scale


def scaled(ctx, gradient: Tensor, factor: Tensor, late: Tensor | None = None) -> Tensor:
    """``gradient * factor * late`` (0-dim) in the gradient's dtype, in a backward whose ``ctx`` keeps ``gradient``.

    The factors are multiplied in fp32: a loss scale and its counterpart need not be numbers of fp16. The gradient is
    scaled in place where this graph will not be run again, so that ``loss / k`` costs no new [N, V]: on a GPU by a
    kernel that returns at once where the factor is 1. What an earlier backward through a kept graph has returned stays
    as it is.
    """
    if late is not None:
        factor = factor * late
    if torch.compiler.is_compiling():
        return _times(gradient, factor)
    kept = graph_is_kept() or torch.is_grad_enabled()  # or this very backward is recorded
    on_host = reads_are_free(factor.device)
    if on_host and float(factor) == 1.0:
        ctx.lent = kept  # the caller now holds the memory that a later backward starts from
        return gradient
    if kept or getattr(ctx, "lent", False):
        if gradient.dtype.itemsize > 2:
            return gradient * factor
        gradient = gradient.clone()
    if gradient.is_contiguous():
        where = gradient.device, gradient.dtype
        if gradient.is_cuda and not why_not("unlearn_loss", "triton", *where):
            from gfast.kernels.scale import scale_

            scale_(gradient, factor)
            return gradient
        if on_host and not why_not("scale", "cpp", *where):
            torch.ops.gfast.scale_(gradient, factor.float())
            return gradient
    return gradient.copy_(_times(gradient, factor))


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """In fp32 (fp64) before it is rounded: PyTorch would round the factor to 16 bits first."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * factor).to(gradient.dtype)


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for a gradient or a chunk of logits.

    On a CPU 4 MiB and more come from the extension's pool: what a step frees, the next one takes. New memory is zeroed
    by the system first, which takes longer than the kernel or the product that fills it.
    """
    if device.type == "cpu" and math.prod(shape) * dtype.itemsize >= 2**22 and compiled("fresh"):
        return torch.ops.gfast.fresh(list(shape), dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def row_chunks(rows: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Boundaries of the fewest chunks of at most ``chunk`` rows, all of about the same size."""
    pieces = -(-rows // chunk)
    for i in range(pieces):
        yield rows * i // pieces, rows * (i + 1) // pieces
