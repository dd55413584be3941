"""``linear_row_dot``: for each row, the product of its share of a Linear's gradient with a stored direction."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.chunks import row_chunks
from gfast.ops.dispatch import select
from gfast.ops.head import add_mm, product_dtype
from gfast.ops.registration import python_op
from gfast.ops.token_logp import stats_dtype

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BLOCK = 256  # rows of the product held at a time on a CPU: [256, D] stays in the cache until it is dotted


def linear_row_dot_reference(a: Tensor, b: Tensor, direction: Tensor) -> Tensor:
    """The literal definition in fp64: each row's outer product b_t a_t^T dotted with the direction, [n]."""
    return torch.einsum("no,oi,ni->n", b.double(), direction.double(), a.double())


def _blocks(a: Tensor, b: Tensor, direction: Tensor) -> Tensor:
    """A library GEMM of a block of rows at a time, and its row dots in fp64.

    The product is taken to the narrower side, so it is never [n, V] for an output head.
    """
    dtype = _product(a, b, direction)
    direction = direction.to(dtype)
    left, right, factor = (b, a, direction) if a.shape[1] < b.shape[1] else (a, b, direction.t())
    out = torch.empty(a.shape[0], dtype=torch.float64, device=a.device)
    wide = stats_dtype(dtype)
    for start, stop in row_chunks(a.shape[0], _BLOCK if a.device.type == "cpu" else 8192):
        product = a.new_empty(stop - start, factor.shape[1], dtype=dtype)  # [rows, min(D_in, D_out)]
        add_mm(product, left[start:stop].to(dtype), factor, first=True)
        out[start:stop] = row_sums(product.to(wide).mul_(right[start:stop]))
    return out


def _product(a: Tensor, b: Tensor, direction: Tensor) -> torch.dtype:
    """What to multiply in."""
    return product_dtype(torch.promote_types(torch.promote_types(a.dtype, b.dtype), direction.dtype), a.device)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous rows apart from each other, of a dtype that is not narrower than x's own."""
    apart = x.stride(-1) == 1 and x.stride(0) >= x.shape[1]
    return x.to(dtype) if apart else x.to(dtype).contiguous()


def row_sums(terms: Tensor) -> Tensor:
    """Sums of the rows of [n, D] in fp64: 32 fp32 terms at a time first, which a CPU adds four times faster."""
    whole = terms.shape[1] // 32 * 32
    sums = terms[:, whole:].sum(-1, dtype=torch.float64)
    if whole and terms.dtype == torch.float32:
        return sums + terms[:, :whole].unflatten(1, (32, -1)).sum(1).sum(-1, dtype=torch.float64)
    return sums + terms[:, :whole].sum(-1, dtype=torch.float64)


def _fake_dots(a: Tensor, *_) -> Tensor:
    return a.new_empty(a.shape[0], dtype=torch.float64)


@python_op("linear_row_dot", _fake_dots)
def dots_of_rows(a: Tensor, b: Tensor, direction: Tensor, impl: str = "auto") -> Tensor:
    """`linear_row_dot` of arguments that are checked."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), direction.dtype)
    chosen = select("linear_row_dot", impl, a.device, dtype)
    if chosen == "triton":
        from gfast.kernels import row_dot

        return row_dot.linear_row_dot(a, b, direction)
    # 16-bit products, where the CPU has them, are the library's; the kernel multiplies in fp32
    taken = _product(a, b, direction) == torch.float32 and torch.backends.mkldnn.enabled
    if impl == "cpp" and not torch.backends.mkldnn.enabled:
        raise ValueError("gfast: linear_row_dot: impl='cpp' cannot serve it here: torch.backends.mkldnn is turned off.")
    if chosen == "cpp" and (taken or impl == "cpp"):
        wide = (_rows(x, torch.float32) for x in (a, b))
        return torch.ops.gfast.row_dots(*wide, _rows(direction, direction.dtype))
    return _blocks(a, b, direction)


def linear_row_dot(a: Tensor, b: Tensor, direction: Tensor, *, impl: str = "auto") -> Tensor:
    r"""Dots of each row's share of a Linear's weight gradient with a direction, without forming any gradient.

    .. math:: \mathrm{out}_t = \langle b_t a_t^T, G \rangle = b_t \cdot (G a_t)

    Products are as exact as in the widest of the three dtypes (fp32 where a CPU has no fast 16-bit matrix product),
    accumulated in fp32 or wider; sums over rows are fp64, in an order that depends on shapes (on a CPU on the number of
    threads too). On a CPU blocks of the direction are multiplied in the cache and dotted there: b G exists nowhere. On
    a GPU bf16 inputs and an fp32 direction, multiplied as the sum of three bf16 numbers, go to the matrix units.

    Args:
        a: [n, D_in], inputs of the Linear.
        b: [n, D_out], gradients of its outputs.
        direction: G, [D_out, D_in], such as the gradient of a risk. All of fp32, bf16, fp16 or fp64, mixed.
        impl: "auto", "reference" (library GEMMs), "cpp" or "triton".

    Returns:
        fp64 [n]. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an ``impl`` that is not available here.

    Source: arXiv 2502.19301, Definition 1, for one token.

    Example:
        >>> import torch, gfast
        >>> from gfast.ops.row_dot import linear_row_dot
        >>> linear_row_dot(torch.ones(2, 3), torch.tensor([[1.0], [2.0]]), torch.ones(1, 3))
        tensor([3., 6.], dtype=torch.float64)
    """
    name = "linear_row_dot"
    for what, tensor in (("a", a), ("b", b), ("direction", direction)):
        if tensor.dim() != 2:
            raise ValueError(f"gfast: {name}: {what} must be a matrix, not {tuple(tensor.shape)}.")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"gfast: {name}: {what} is {tensor.dtype}; take one of {', '.join(map(str, _DTYPES))}.")
        if tensor.device != a.device:
            raise ValueError(f"gfast: {name}: a is on {a.device} but {what} on {tensor.device}.")
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"gfast: {name}: a has {a.shape[0]} rows but b {b.shape[0]}.")
    if direction.shape != (b.shape[1], a.shape[1]):
        raise ValueError(
            f"gfast: {name}: direction must be [{b.shape[1]}, {a.shape[1]}] for a of width {a.shape[1]} and b of "
            f"width {b.shape[1]}, not {tuple(direction.shape)}."
        )
    return dots_of_rows(a.detach(), b.detach(), direction.detach(), impl)
