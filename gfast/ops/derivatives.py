"""Derivatives that the fused ops do not have: second ones, forward mode and torch.func's transforms.

Asked for one, an op raises; with ``impl="reference"`` its literal definition stands in, which plain autograd can
differentiate in every way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gfast.ops.checks import check_label_range, is_wrapped


def wants_literal(name: str, impl: str, *tensors: Tensor | None) -> bool:
    """Whether a call must be the literal definition: a transform that no fused op supports holds one of its tensors.

    Raises:
        RuntimeError: it must, but ``impl`` is not "reference".
    """
    if torch.compiler.is_compiling():
        return False
    given = [x for x in tensors if x is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given):
        transform = "forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad)"
    elif any(map(is_wrapped, given)):
        transform = "a transform of torch.func (grad, vmap, jacrev)"
    else:
        return False
    if impl != "reference":
        raise RuntimeError(
            f'gfast: {name}: the fused op cannot be used in {transform}; pass impl="reference", the literal '
            f"definition, which can."
        )
    return True


def check_literal_labels(name: str, labels: Tensor, vocab: int) -> None:
    """``check_label_range``, unless labels cannot be looked at as they stand for many tensors, in torch.func.vmap."""
    seen = labels.reshape(-1)
    while is_wrapped(seen):
        if torch._C._functorch.is_batchedtensor(seen):
            return
        seen = torch._C._functorch.get_unwrapped(seen)
    check_label_range(name, labels.reshape(-1), vocab)


def differentiable_once(literal: Callable = lambda ctx: None) -> Callable:
    """Decorator of a backward whose result is no differentiable function of anything: a gradient made earlier, say.

    Where the backward is recorded (``create_graph=True``), its gradients refuse to be differentiated: in silence a
    second derivative would lack a part. ``ctx.name`` is the public op's. The tensor that ``ctx`` saved last must be a
    differentiable output of the op: it connects the refusal with the op's inputs.

    Args:
        literal: of ctx, the op's first output by its literal definition and the inputs it is a function of, as many
            as come first among the op's own; None where there is no such definition.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *grads):
            if torch.compiler.is_compiling() or not torch.is_grad_enabled() or grads[0] is None:
                return backward(ctx, *grads)
            defined = literal(ctx)
            if defined is not None:
                return differentiated(*defined, grads[0], ctx.needs_input_grad)
            output = ctx.saved_tensors[-1]
            with torch.no_grad():
                gradients = backward(ctx, *grads)
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            wanted = [x for x in gradients if x is not None]
            refusing = iter(_Refused.apply(ctx.name, len(wanted), *wanted, output, grads[0]))
            return tuple(None if x is None else next(refusing) for x in gradients)

        return once

    return decorate


def differentiated(
    output: Tensor | Sequence[Tensor], inputs: Sequence[Tensor | None], grad, needed: Sequence[bool]
) -> tuple:
    """A recorded backward: the gradients of as many inputs, None for what else is in ``needed``."""
    wanted = [x for x, need in zip(inputs, needed[: len(inputs)], strict=True) if need]
    gradients = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return tuple(next(gradients) if need and i < len(inputs) else None for i, need in enumerate(needed))


class _Refused(torch.autograd.Function):
    """The first tensors as they are; whoever differentiates them, with respect to any of the tensors, gets an error."""

    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.name = name
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"gfast: {ctx.name} has no second derivative: its gradient comes out of a fused kernel. Pass "
            f'impl="reference" (without inplace, and with a head that is not sharded), the literal definition, which '
            f"has."
        )
