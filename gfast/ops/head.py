"""The output head a chunk of rows at a time: logits of the chunk, and the products its gradient goes into."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.common import IGNORE_INDEX, check_head, check_like_labels, check_rows, scaled


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to multiply in. A CPU without 16-bit matrix instructions multiplies those dtypes up to 100 times
    slower than fp32."""
    support = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if device.type == "cpu" and dtype in support and not support[dtype]():
        return torch.float32
    return dtype


class ChunkedHead:
    """Logits of compacted rows, one preallocated chunk at a time, and the accumulation of dH, dW and db.

    Args:
        hidden: [N, D], all rows, ignored ones included.
        weight: [V, D]. bias: [V] or None.
        labels: int64 [N]. Rows labelled -100 are left out of every product.
        chunk: rows of logits held at a time.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        order: Tensor | None = None,
    ):
        self.total_rows, self.out_dtype = hidden.shape[0], hidden.dtype
        dtype = product_dtype(hidden.dtype, hidden.device)
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if order is None:
            order = (labels != IGNORE_INDEX).nonzero()[:, 0]  # [n]
            self.index = None if order.shape[0] == hidden.shape[0] else order
        else:
            self.index = order
        kept = hidden if self.index is None else hidden.index_select(0, self.index)
        self.hidden = kept.to(dtype).contiguous()  # [n, D]
        self.labels = labels if self.index is None else labels.index_select(0, self.index)  # [n]
        self.rows = self.hidden.shape[0]
        self.chunk = min(chunk, max(self.rows, 1))
        self.buffer = self.hidden.new_empty(self.chunk, weight.shape[0])  # [chunk, V], the only logits there ever are

    def select(self, values: Tensor | None) -> Tensor | None:
        """Per-row values [N] of the rows that are kept [n]."""
        if values is None or self.index is None:
            return values
        return values.index_select(0, self.index)

    def scatter(self, values: Tensor) -> Tensor:
        """Values of the kept rows [n, ...] at their places among all rows [N, ...], 0 elsewhere."""
        if self.index is None:
            return values
        out = values.new_zeros(self.total_rows, *values.shape[1:])
        return out.index_copy_(0, self.index, values)

    def logits(self, start: int, stop: int) -> Tensor:
        """Logits [stop - start, V] of a chunk, before scale and cap, in the buffer."""
        out = self.buffer[: stop - start]
        torch.mm(self.hidden[start:stop], self.weight.t(), out=out)
        if self.bias is not None:
            out += self.bias
        return out

    def start_gradients(self, need_hidden: bool, need_weight: bool, need_bias: bool) -> None:
        vocab, dim = self.weight.shape
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.grad_hidden = torch.empty_like(self.hidden) if need_hidden else None
        self.grad_weight = self.hidden.new_zeros(vocab, dim, dtype=wide) if need_weight else None
        self.grad_bias = self.hidden.new_zeros(vocab, dtype=wide) if need_bias else None

    def add_gradients(self, start: int, stop: int, grad_logits: Tensor) -> None:
        """The chunk's share of every gradient that is wanted; ``grad_logits`` [stop - start, V]."""
        if self.grad_hidden is not None:
            torch.mm(grad_logits, self.weight, out=self.grad_hidden[start:stop])
        if self.grad_weight is not None:
            _accumulate_product(self.grad_weight, grad_logits, self.hidden[start:stop])
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0, dtype=self.grad_bias.dtype)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """dH [N, D] in hidden's dtype, dW [V, D] and db [V] in at least fp32; an unwanted one is empty."""
        # Each its own tensor: a custom op may not return the same one twice.
        grad_hidden = self.hidden.new_empty(0) if self.grad_hidden is None else self.scatter(self.grad_hidden)
        return (
            grad_hidden,
            self.hidden.new_empty(0) if self.grad_weight is None else self.grad_weight,
            self.hidden.new_empty(0) if self.grad_bias is None else self.grad_bias,
        )


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [V, D] += left.T @ right, with left [n, V] and right [n, D] possibly narrower than total."""
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    elif left.is_cuda:
        # the matrix units accumulate in fp32 anyway: asking for fp32 out avoids rounding every chunk's share
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total += left.t() @ right


def finished_gradients(ctx, grads: list[Tensor], grad_loss: Tensor, late: Tensor | None) -> list[Tensor | None]:
    """Accumulated gradients of hidden, weight and bias times the loss's own, in the dtypes of the inputs.

    ``ctx.dtypes`` holds those dtypes; ``late`` is the reduction's factor where it was left out of the accumulation.
    """
    factor = grad_loss if late is None else grad_loss * late
    return [
        scaled(grad, factor).to(dtype) if wanted else None
        for grad, dtype, wanted in zip(grads, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    ]


def fake_gradients(hidden: Tensor, weight: Tensor, need: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of ``ChunkedHead.gradients`` for tracing."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    shapes = ((hidden.shape, hidden.dtype), (weight.shape, wide), (weight.shape[:1], wide))
    return tuple(
        torch.empty(shape, dtype=dtype, device=hidden.device) if wanted else hidden.new_empty(0)
        for (shape, dtype), wanted in zip(shapes, need, strict=True)
    )


def prepare_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor):
    """Checks, and the casts autocast would make: hidden, weight and bias in one dtype, gradients flow through the
    casts."""
    check_rows(name, hidden, labels, what="hidden")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check_head(name, hidden, weight, bias)
    return hidden, weight, bias


def check_cap(name: str, softcap: float | None) -> float:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"gfast: {name}: softcap must be positive or None, not {softcap}.")
    return float(softcap or 0.0)


def flat_reference(name: str, ref_logp: Tensor | None, labels: Tensor) -> Tensor | None:
    if ref_logp is None:
        return None
    check_like_labels(name, "ref_logp", ref_logp, labels)
    return ref_logp.detach().reshape(-1)
