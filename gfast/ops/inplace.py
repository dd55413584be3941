"""Gradients that overwrite the logits they belong to, without autograd ever reading one for the other."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.derivatives import differentiable_once
from gfast.ops.gradients import graph_is_kept, scaled
from gfast.ops.token_logp import stats_dtype


class Overwritten:
    """Logits whose memory a loss may fill with their gradient.

    ``start`` puts the loss in the logits' place in the graph and makes the logits themselves the result of an operation
    without a derivative: whoever saved them for a backward finds them modified, and whoever uses them later gets an
    error in the backward. Then the logits may be written, and ``finished`` gives the loss its value.
    """

    def __init__(self, name: str, logits: Tensor):
        if logits.is_leaf:
            raise ValueError(
                f"gfast: {name}: inplace=True would overwrite a leaf that requires grad; only computed logits may be "
                f"overwritten."
            )
        if not _lie_evenly(logits.detach()):
            raise ValueError(
                f"gfast: {name}: inplace=True needs contiguous rows that lie evenly in memory and do not overlap, not "
                f"strides {logits.stride()} of shape {tuple(logits.shape)}. Instead of cutting the logits along the "
                f"sequence, give all of them and pad the labels with -100."
            )
        self.name, self.logits = name, logits

    def start(self) -> None:
        logits, self.logits = self.logits, None  # kept, they would hold this object in a cycle
        self.grad: Tensor | None = logits.detach()
        self.loss, _ = _Loss.apply(logits, self)
        _Gone.apply(logits, self.name)

    def finished(self, loss: Tensor, late: Tensor | None) -> Tensor:
        """The logits hold the gradient now, but for a factor ``late``, and ``loss`` (0-dim) is its value; returns the
        loss that autograd knows."""
        self.late = late
        self.version = self.grad._version
        value, self.loss = self.loss, None
        with torch.no_grad():
            value.copy_(loss)
        return value

    def take(self, ctx, grad_loss: Tensor) -> Tensor:
        """The gradient times the upstream one."""
        grad = self.grad
        if grad is None:
            raise RuntimeError(f"gfast: {self.name}: backward a second time: pass retain_graph=True to the first.")
        if self.version != grad._version:
            raise RuntimeError(
                f"gfast: {self.name}: the logits were modified after inplace=True had put their gradient there."
            )
        if not graph_is_kept():
            self.grad = None
        return scaled(ctx, grad, grad_loss, self.late)


def _lie_evenly(logits: Tensor) -> bool:
    """Whether [..., V] is a view of contiguous rows [N, V] at one distance, none over another."""
    try:
        rows = logits.view(-1, logits.shape[-1])
    except RuntimeError:
        return False
    count, width = rows.shape
    return (width <= 1 or rows.stride(1) == 1) and (count <= 1 or rows.stride(0) >= width)


class _Loss(torch.autograd.Function):
    """A scalar whose gradient ``memory`` will hold. Autograd's own way to keep a tensor would refuse it, as it is
    written to after this."""

    @staticmethod
    def forward(ctx, logits, memory):
        ctx.memory, ctx.name = memory, memory.name
        ctx.set_materialize_grads(False)
        anchor = logits.new_empty(0)  # the loss itself is written to after this
        ctx.save_for_backward(anchor)
        return logits.new_empty((), dtype=stats_dtype(logits.dtype)), anchor

    @staticmethod
    @differentiable_once()
    def backward(ctx, grad_loss, _):
        return None if grad_loss is None else ctx.memory.take(ctx, grad_loss), None


class _Gone(torch.autograd.Function):
    """The logits after the call: a result of them that has no derivative."""

    @staticmethod
    def forward(ctx, logits, name):
        ctx.name = name
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        return logits

    @staticmethod
    def backward(ctx, grad):
        if grad is not None:
            raise RuntimeError(
                f"gfast: {ctx.name}: the logits were used after {ctx.name}(inplace=True), when they held their "
                f"gradient: use them before that call, or leave inplace off."
            )
        return None, None
