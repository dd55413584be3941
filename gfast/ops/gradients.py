"""Gradients that come out of the pass that computes the loss: at what scale they are kept, and how a backward ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gfast.ops import checks
from gfast.ops.derivatives import differentiable_once
from gfast.ops.dispatch import why_not


def graph_is_kept() -> bool:
    """Inside a backward: may this graph be run again (``retain_graph``)? True where torch does not say."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()


def kept_scale(
    factor: Tensor, dtype: torch.dtype, weight: Tensor | None = None, times: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """What a gradient of ``dtype`` is kept at until the backward, and what multiplies it there (None: nothing).

    Their product is ``factor`` (0-dim). fp16 has no digits below 6e-8, where 1/N puts most of a gradient before a loss
    scale can lift it: it is kept near the top of its range instead. ``weight`` [N]: of the rows, which are at most so
    many ``times`` that; None: none is above 2.
    """
    if dtype != torch.float16:
        return factor, None
    if weight is None or not weight.numel():
        scale = torch.full_like(factor, 2.0**14)
    else:  # a power of two; a row that is not finite leaves the others as they are
        top = times * weight.abs().nan_to_num(0.0, posinf=0.0).amax()
        scale = torch.exp2((15.0 - torch.log2(top).ceil()).clamp(-100.0, 100.0))
    return scale, factor / scale


def summed_scale(factor: Tensor, dtype: torch.dtype, wide: bool, weight: Tensor | None = None, times: float = 1.0):
    """``kept_scale`` of gradients that are summed over rows. ``wide``: the sums have fp32 at once. Else they pass
    through ``dtype``, whose top they would leave: nothing is kept above its own size."""
    scale, late = kept_scale(factor, dtype, weight, times)
    if late is None or wide:
        return scale, late
    scale = scale.clamp(max=1.0)
    return scale, factor / scale


def scaled(ctx, gradient: Tensor, factor: Tensor, late: Tensor | None = None) -> Tensor:
    """``gradient * factor * late`` (0-dim) in the gradient's dtype, in a backward whose ``ctx`` keeps ``gradient``.

    The factors are multiplied in fp32: a loss scale and its counterpart need not be numbers of fp16. The gradient is
    scaled in place where this graph will not be run again, so that ``loss / k`` costs no new [N, V]: on a GPU by a
    kernel that returns at once where the factor is 1. What an earlier backward through a kept graph has returned stays
    as it is.

    To find out takes a private call of torch's. It is worth that: a step with bf16 logits [1024, 32000] takes 86 ms on
    one thread of an AMD EPYC and 287 ms with a gradient in new memory, one with fp32 [2048, 32000] 250 and 1120 ms.
    """
    if late is not None:
        factor = factor * late
    if torch.compiler.is_compiling():
        return _times(gradient, factor)
    again = graph_is_kept() or torch.is_grad_enabled()  # or this very backward is recorded
    on_host = checks.reads_are_free(factor.device)
    if on_host and float(factor) == 1.0:
        ctx.lent = again  # the caller now holds the memory that a later backward starts from
        return gradient
    if again or getattr(ctx, "lent", False):  # someone else has this memory
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


def with_gradients(
    name: str,
    total: Tensor,
    factor: Tensor,
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    late: Tensor | None,
    literal: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The loss ``total * factor`` (0-dim each) as a function of ``inputs``, whose gradients are known but for a factor
    ``late``.

    Args:
        name: of the public op, for messages.
        gradients: one an input, of any dtype, empty where it is not wanted.
        literal: the loss of the inputs by its definition, which further derivatives are taken of; None: it has none.
    """
    if torch.compiler.is_compiling():  # differentiates no further
        literal = None
    return _Known.apply(*inputs, *gradients, total, factor, late, literal, name)


def _literal(ctx):
    if ctx.literal is None:
        return None
    count = len(ctx.dtypes)
    inputs = ctx.saved_tensors[count + 1 : -1]
    return ctx.literal(*inputs), inputs


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, total, factor, late, ctx.literal, ctx.name = arguments
        count = len(tensors) // 2
        inputs = tensors[:count]
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        loss = total * factor
        ctx.save_for_backward(*tensors[count:], late, *(inputs if ctx.literal else ()), loss)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    @differentiable_once(_literal)
    def backward(ctx, grad_loss):
        count = len(ctx.dtypes)
        finished = [None] * (2 * count + 5)
        if grad_loss is not None:
            saved = ctx.saved_tensors
            for i, dtype in enumerate(ctx.dtypes):
                if ctx.needs_input_grad[i]:
                    gradient = scaled(ctx, saved[i], grad_loss, saved[count])
                    finished[i] = gradient if gradient.dtype == dtype else gradient.to(dtype)
        return tuple(finished)
