"""Sums, products, norms and attention with tangents: the rules of forward mode that carry its cost.

Letters and arguments as in `forward_rules`. Tangents are added where they are made: a product of all streams at once,
and what a parameter adds to its own streams on top, in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gfast.geffect.forward import ForwardModeError, Pair, Streams, places, primal, union
from gfast.ops.chunks import row_chunks

_SCORES = 2**22  # attention scores held at a time for one stream


def lifted(pair: Pair, dim: int) -> Tensor:
    """Tangents [K, 1, ..., *shape] that broadcast with values of `dim` dimensions."""
    tangent = pair.stacked()
    missing = dim - pair.primal.dim()
    return tangent.reshape(tangent.shape[0], *[1] * missing, *pair.primal.shape) if missing else tangent


def total(out: Tensor, terms: list[tuple[Streams, Tensor]]) -> Pair:
    """The pair of `out` with the sum of tangents; every term may be overwritten."""
    streams = union(*(some for some, _ in terms))
    full = (len(streams), *out.shape)
    first = next((i for i, (some, t) in enumerate(terms) if some == streams and t.shape == full), None)
    if first is None:
        tangent = out.new_zeros(full)
    else:
        tangent = terms.pop(first)[1]
        tangent = tangent if tangent.dtype == out.dtype else tangent.to(out.dtype)
    for some, term in terms:
        where = places(some, streams)
        if isinstance(where, slice):
            tangent[where] += term
        else:
            tangent.index_add_(0, torch.tensor(where, device=out.device), term.expand(len(some), *out.shape))
    return Pair(out, streams, tangent)


def add(func: Callable, a: Any, b: Any, *, alpha: float = 1) -> Any:
    out = func(primal(a), primal(b)) if alpha == 1 else func(primal(a), primal(b), alpha=alpha)
    sign = -alpha if func.__name__ == "sub" else alpha
    if isinstance(a, Pair) and isinstance(b, Pair):
        if a.streams == b.streams and (a.lazy or b.lazy):
            terms = a.terms(out.dim()) + b.terms(out.dim(), None if sign == 1 else sign)
            return Pair(out, a.streams, terms=terms)
        left, right = lifted(a, out.dim()), lifted(b, out.dim())
        if a.streams == b.streams:
            return Pair(out, a.streams, torch.add(left, right, alpha=sign))
        if set(a.streams) < set(b.streams):
            return total(out, [(b.streams, right * sign if sign != 1 else right.clone()), (a.streams, left)])
        return total(out, [(a.streams, left.clone()), (b.streams, right * sign if sign != 1 else right)])
    pair = a if isinstance(a, Pair) else b
    if pair.lazy or pair is b and sign != 1:
        return Pair(out, pair.streams, terms=pair.terms(out.dim(), sign if pair is b and sign != 1 else None))
    tangent = lifted(pair, out.dim())
    same = tangent.shape[1:] == out.shape and tangent.dtype == out.dtype
    result = Pair(out, pair.streams, tangent if same else tangent.expand(-1, *out.shape).to(out.dtype))
    result.memory = pair.memory
    pair.memory.shared = True
    return result


def mul(func: Callable, a: Any, b: Any) -> Any:
    x, y = primal(a), primal(b)
    out = func(x, y)
    if not (isinstance(a, Pair) and isinstance(b, Pair)):
        pair, factor = (a, y) if isinstance(a, Pair) else (b, x)
        return Pair(out, pair.streams, terms=pair.terms(out.dim(), factor))
    if a.streams == b.streams:
        return Pair(out, a.streams, terms=a.terms(out.dim(), y) + b.terms(out.dim(), x))
    if set(a.streams) < set(b.streams):
        a, b, x, y = b, a, y, x
    left = Pair(out, a.streams, terms=a.terms(out.dim(), y)).stacked()  # [K, *out.shape], its own: there is a factor
    if set(b.streams) <= set(a.streams):
        where = places(b.streams, a.streams)
        if isinstance(where, slice) and left.dtype == x.dtype == b.primal.dtype:
            left[where].addcmul_(lifted(b, out.dim()), x)
            return Pair(out, a.streams, left)
    return total(out, [(a.streams, left), (b.streams, lifted(b, out.dim()) * x)])


def div(func: Callable, a: Any, b: Any, **options: Any) -> Any:
    if isinstance(b, Pair) or options:
        return NotImplemented
    out = func(a.primal, b)
    return Pair(out, a.streams, terms=a.terms(out.dim(), 1.0 / b))


def neg(func: Callable, x: Pair) -> Pair:
    return Pair(func(x.primal), x.streams, terms=x.terms(x.primal.dim(), -1.0))


def cast(func: Callable, x: Any, *args: Any, **kwargs: Any) -> Any:
    """to, float and their like: the tangents are cast when they are added up."""
    if not isinstance(x, Pair) or x.apart:
        return NotImplemented
    out = func(x.primal, *(primal(arg) for arg in args), **kwargs)
    if out is x.primal:
        return x
    if not out.is_floating_point():
        return out
    if out.device != x.primal.device:
        return NotImplemented
    return Pair(out, x.streams, terms=x.terms(out.dim()))


def mean(func: Callable, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A mean over the last dimension of a product that nobody has computed: a matrix product for every row."""
    dims = args[0] if args else kwargs.get("dim")
    if not isinstance(x, Pair) or not x.lazy or dims not in (-1, [-1], (-1,)) or "dtype" in kwargs:
        return NotImplemented
    ((base, factor), *rest), shape = x.terms(x.primal.dim()), x.primal.shape
    full = (len(x.streams), *shape)
    if rest or not isinstance(factor, Tensor) or factor.shape != shape or base.shape != full:
        return NotImplemented
    if not base.dtype == factor.dtype == x.primal.dtype:
        return NotImplemented
    rows = base.reshape(len(x.streams), -1, shape[-1]).transpose(0, 1)  # [n, K, D]
    dots = torch.bmm(rows, factor.reshape(-1, shape[-1], 1)).div_(shape[-1])  # [n, K, 1]
    out = func(x.primal, *args, **kwargs)
    return Pair(out, x.streams, dots.transpose(0, 1).reshape(len(x.streams), *out.shape))


def joined(func: Callable, tensors: Any, dim: int = 0) -> Any:
    """cat and stack."""
    out = func([primal(item) for item in tensors], dim)
    streams = union(*(item.streams for item in tensors if isinstance(item, Pair)))
    parts = [
        item.on(streams) if isinstance(item, Pair) else item.new_zeros(()).expand(len(streams), *item.shape)
        for item in tensors
    ]
    return Pair(out, streams, func([part.to(out.dtype) for part in parts], dim + 1 if dim >= 0 else dim))


def getitem(func: Callable, x: Any, index: Any) -> Any:
    if not isinstance(x, Pair) or any(isinstance(leaf, Pair) for leaf in pytree.tree_leaves(index)):
        return NotImplemented
    out = x.primal[index]
    index = index if isinstance(index, tuple) else (index,)
    advanced = [i for i, item in enumerate(index) if isinstance(item, (Tensor, list))]
    if x.apart or len(advanced) > 1:  # with several index tensors the place of their dimension depends on all of them
        tangent: Any = [one[index] for one in x.each()]
        tangent = tangent if x.apart else torch.stack(tangent)
    else:
        tangent = x.stacked()[(slice(None), *index)]
    return view_of(x, Pair(out, x.streams, tangent))


def affine(out: Tensor, x: Any, weight: Any, bias: Any, transposed: bool) -> Pair:
    """Tangents of x W (+ bias), W [D_in, D_out] or its transpose: one product for all streams of x, and one for each
    stream of the weight, added in place.
    """
    streams = union(*(item.streams for item in (x, weight, bias) if isinstance(item, Pair)))
    matrix = primal(weight).t() if transposed else primal(weight)  # [D_in, D_out]
    wide = matrix.shape[1]
    tangent = out.new_empty((len(streams), *out.shape))
    flat = tangent.view(len(streams), -1, wide)  # [K, n, D_out]
    reached: Streams = x.streams if isinstance(x, Pair) else ()
    if reached:
        moved = x.stacked().reshape(-1, matrix.shape[0]).to(out.dtype)  # [K_x n, D_in]
        where = places(reached, streams)
        if isinstance(where, slice):
            torch.mm(moved, matrix.to(out.dtype), out=flat[where].view(-1, wide))
        else:
            flat[where] = torch.mm(moved, matrix.to(out.dtype)).view(len(reached), -1, wide)
    started = set(reached)
    if isinstance(weight, Pair):
        rows = primal(x).reshape(-1, matrix.shape[0]).to(out.dtype)  # [n, D_in]
        for stream, direction in zip(weight.streams, weight.each(), strict=True):
            direction = (direction.t() if transposed else direction).to(out.dtype)
            row = flat[streams.index(stream)]
            if stream in started:
                row.addmm_(rows, direction)
            else:
                torch.mm(rows, direction, out=row)
        started.update(weight.streams)
    for stream in set(streams) - started:
        flat[streams.index(stream)].zero_()
    if isinstance(bias, Pair):
        for stream, direction in zip(bias.streams, bias.each(), strict=True):
            flat[streams.index(stream)] += direction.to(out.dtype)
    return Pair(out, streams, tangent)


def linear(func: Callable, input: Any, weight: Any, bias: Any = None) -> Any:
    if primal(weight).dim() != 2:
        return NotImplemented
    return affine(func(primal(input), primal(weight), primal(bias)), input, weight, bias, transposed=True)


def addmm(func: Callable, bias: Any, x: Any, weight: Any, **options: Any) -> Any:
    if options or primal(bias).dim() != 1:
        return NotImplemented
    return affine(func(primal(bias), primal(x), primal(weight)), x, weight, bias, transposed=False)


def matmul(func: Callable, a: Any, b: Any) -> Any:
    """Stream by stream: a batched product would copy the operand without tangents K times."""
    x, y = primal(a), primal(b)
    if x.dim() < 2 or y.dim() < 2:
        return NotImplemented
    out = func(x, y)
    if y.dim() == 2 and (x.dim() > 2 or not isinstance(a, Pair)):
        return affine(out, a, b, None, transposed=False)
    streams = union(*(item.streams for item in (a, b) if isinstance(item, Pair)))
    tangent = out.new_empty((len(streams), *out.shape))
    left = dict(zip(a.streams, a.each(), strict=True)) if isinstance(a, Pair) else {}
    right = dict(zip(b.streams, b.each(), strict=True)) if isinstance(b, Pair) else {}
    for row, stream in zip(tangent, streams, strict=True):
        if stream in left:
            torch.matmul(left[stream].to(out.dtype), y.to(out.dtype), out=row)
            if stream in right:
                row += torch.matmul(x.to(out.dtype), right[stream].to(out.dtype))
        else:
            torch.matmul(x.to(out.dtype), right[stream].to(out.dtype), out=row)
    return Pair(out, streams, tangent)


def dropout(func: Callable, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise ForwardModeError(f"torch function {func.__name__!r} is random: put the module in evaluation mode")
    return input


def softmax(func: Callable, input: Any, dim: Any = None, *rest: Any, **options: Any) -> Any:
    """p = softmax(x): dp = p (dx - <p, dx>)."""
    if dim is None or rest and func.__module__ != "torch.nn.functional":
        return NotImplemented
    out = func(input.primal, dim, *rest, **options)
    at = dim if dim < 0 else dim + 1
    tangent = input.stacked().to(out.dtype) * out
    return Pair(out, input.streams, tangent.addcmul_(out, tangent.sum(at, keepdim=True), value=-1))


def layer_norm(
    func: Callable, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """h = (x - mean) r, r = 1 / std: dh = r (dx - mean(dx) - h mean(h dx)), y = h w + b."""
    x = primal(input)
    out = func(x, normalized_shape, primal(weight), primal(bias), eps)
    axes = list(range(-len(normalized_shape), 0))
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.var(axes, correction=0, keepdim=True) + eps)
    normal = (wide - wide.mean(axes, keepdim=True)) * scale
    terms = []
    if isinstance(input, Pair):
        moved = input.stacked().to(wide.dtype)
        tangent = moved - moved.mean(axes, keepdim=True)
        tangent.addcmul_(normal, (moved * normal).mean(axes, keepdim=True), value=-1)
        tangent *= scale if weight is None else scale * primal(weight)
        terms.append((input.streams, tangent.to(out.dtype)))
    if isinstance(weight, Pair):
        terms.append((weight.streams, (lifted(weight, out.dim()) * normal).to(out.dtype)))
    if isinstance(bias, Pair):
        terms.append((bias.streams, lifted(bias, out.dim()).to(out.dtype)))
    return total(out, terms)


def attention(
    func: Callable,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """O = P V, P = softmax(S), S = scale Q K' + mask:

        dO = (P dS) V - rowsum(P dS) O + P dV,   dS = scale (dQ K' + Q dK')

    where P dS is elementwise. The value is the fused kernel's; scores exist for one stream and a run of queries.
    """
    q, k, v = primal(query), primal(key), primal(value)
    if dropout_p > 0:
        raise ForwardModeError("scaled_dot_product_attention with dropout is random: use evaluation mode")
    if isinstance(attn_mask, Pair) or not q.dim() == k.dim() == v.dim() == 4 or q.shape[0] != k.shape[0]:
        return NotImplemented
    out = func(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    (batch, heads, length, depth), (kv_heads, keys) = q.shape, k.shape[1:3]
    share = heads // kv_heads  # query heads that share a key head
    scale = 1.0 / math.sqrt(depth) if scale is None else scale
    streams = union(*(item.streams for item in (query, key, value) if isinstance(item, Pair)))
    moved = [dict(zip(i.streams, i.each(), strict=True)) if isinstance(i, Pair) else {} for i in (query, key, value)]
    tangent = empty_like(out, streams)

    def rows(x: Tensor, start: int, stop: int) -> Tensor:  # [B, H, T, d] -> [B H_kv, share n, d]
        return x[:, :, start:stop].reshape(batch * kv_heads, share * (stop - start), -1).to(out.dtype)

    def flat(x: Tensor) -> Tensor:  # [B, H_kv, S, d] -> [B H_kv, S, d]
        return x.reshape(batch * kv_heads, keys, -1).to(out.dtype)

    mask = None if attn_mask is None else attn_mask.expand(batch, heads, length, keys)
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    flat_k, flat_v = flat(k), flat(v)
    for start, stop in row_chunks(length, max(1, _SCORES // (batch * heads * keys))):
        some_q = rows(q, start, stop)
        scores = torch.bmm(some_q.to(wide), flat_k.to(wide).mT).mul_(scale).view(batch, heads, stop - start, keys)
        if is_causal:
            order = torch.arange(keys, device=q.device)
            scores.masked_fill_(order > order[start:stop, None], -math.inf)
        if mask is not None and mask.dtype == torch.bool:
            scores.masked_fill_(~mask[:, :, start:stop], -math.inf)
        elif mask is not None:
            scores += mask[:, :, start:stop]
        seen = scores.amax(-1, keepdim=True) != -math.inf  # a query that sees no key has output 0
        probs = torch.where(seen, torch.softmax(scores, -1), 0.0).to(out.dtype).view(len(flat_k), -1, keys)
        scaled_probs, some_out = probs * scale, rows(out, start, stop)
        for index, stream in enumerate(streams):
            dq, dk, dv = (found.get(stream) for found in moved)
            part = None
            if dq is not None or dk is not None:
                if dq is None:
                    change = torch.bmm(some_q, flat(dk).mT)
                else:
                    change = torch.bmm(rows(dq, start, stop), flat_k.mT)
                    if dk is not None:
                        change.baddbmm_(some_q, flat(dk).mT)
                change *= scaled_probs  # P dS [B H_kv, share n, S]
                part = torch.bmm(change, flat_v)
                part.addcmul_(change.sum(-1, keepdim=True), some_out, value=-1)
            if dv is not None:
                part = torch.bmm(probs, flat(dv)) if part is None else part.baddbmm_(probs, flat(dv))
            tangent[index, :, :, start:stop] = part.view(batch, heads, stop - start, -1)
    return Pair(out, streams, tangent)


def empty_like(out: Tensor, streams: Streams) -> Tensor:
    """Room for tangents [K, *shape] in the order in memory that the value has: what views it must view them too."""
    order = sorted(range(out.dim()), key=out.stride, reverse=True)
    room = out.new_empty((len(streams), *(out.shape[i] for i in order)))
    return room.permute(0, *(order.index(i) + 1 for i in range(out.dim())))


def overlap(a: Pair, b: Pair) -> bool:
    """Are the values in the same memory?"""
    return a.primal.untyped_storage()._cdata == b.primal.untyped_storage()._cdata


def view_of(base: Pair, pair: Pair) -> Pair:
    """The pair; if its values are in the base's memory, so are its tangents, and both know it."""
    if overlap(base, pair):
        pair.memory = base.memory
        base.memory.viewed = True
    return pair
