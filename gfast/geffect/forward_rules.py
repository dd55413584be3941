"""What forward mode does with each torch function: special forms for those that cost, one general form for the rest.

Letters: K streams, an argument's value x and its tangents dx [K, *x.shape]. Rules take the function and its arguments
with `Pair` in place of tensors that carry tangents, and return pairs or plain tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gfast.geffect.forward import Dual, ForwardMode, ForwardModeError, Pair, Streams, places, union
from gfast.ops.common import row_chunks

_SCORES = 2**22  # attention scores held at a time for one stream

# functions of what a tensor is, of its value without a derivative, or that make a new tensor like it
_ABOUT = frozenset(
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex is_signed get_device "
    "element_size storage_offset __len__ __hash__ __repr__ __format__ is_same_size is_inference is_tensor result_type "
    "promote_types requires_grad_ retain_grad register_hook "
    "item tolist __bool__ __float__ __int__ __index__ __contains__ eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ "
    "__gt__ __ge__ equal allclose isclose isnan isinf isfinite isneginf isposinf argmax argmin argsort nonzero any all "
    "count_nonzero one_hot logical_not logical_and logical_or logical_xor bincount unique searchsorted bucketize isin "
    "int long short char byte bool detach zeros_like ones_like empty_like full_like rand_like randn_like new_zeros "
    "new_ones new_empty new_full new_tensor".split()
)
_RAW = frozenset("data_ptr numpy __array__ storage untyped_storage __dlpack__ __cuda_array_interface__".split())
_LINEAR_GETTERS = frozenset("T mT H mH real".split())

# f(x, ...) linear in its one argument with tangents, which comes first unless listed in _WEIGHT_SECOND
_LINEAR = frozenset(
    "view reshape transpose permute t expand contiguous clone to float double half bfloat16 unsqueeze squeeze flatten "
    "unflatten chunk split split_with_sizes tensor_split unbind narrow select repeat repeat_interleave flip roll "
    "movedim moveaxis swapaxes swapdims sum mean cumsum neg negative tril triu index_select gather embedding unfold "
    "diagonal diff rot90 alias cpu cuda positive atleast_1d ravel unsafe_chunk unsafe_split".split()
)
_LIKE = frozenset("expand_as view_as reshape_as type_as".split())  # linear in the first, about the second

# y = f(x) element by element: dy = f'(x) dx, with f'(x) computed once for all streams
_ELEMENTWISE = frozenset(
    "silu gelu relu sigmoid tanh exp expm1 log log1p log2 sqrt rsqrt reciprocal square pow abs sin cos erf elu selu "
    "celu leaky_relu hardswish hardsigmoid hardtanh relu6 mish softplus softsign logsigmoid clamp clamp_min clamp_max "
    "clip threshold tanhshrink softshrink".split()
)


def apply(mode: ForwardMode, func: Callable, args: tuple, kwargs: dict, originals: tuple) -> Any:
    """The function's value with tangents."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = func.__self__.__name__
        if name not in _LINEAR_GETTERS:
            return func(*primals(originals_or(args, originals)))
    elif name == "__set__":
        raise ForwardModeError(f"it sets the attribute {func.__self__.__name__!r} of a tensor that carries tangents")
    if name in _RAW:
        raise ForwardModeError(f"{name}() hands out raw memory, as kernels outside of PyTorch read it")
    if name in _ABOUT:
        return func(*primals(originals_or(args, originals)), **primals(kwargs))
    if not any(isinstance(leaf, Pair) for leaf in pytree.tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and not str(func).startswith("aten"):
        raise ForwardModeError(f"the custom operator {func} has no forward derivative")
    try:
        if _writes(name, kwargs):
            return _in_place(mode, func, name, args, kwargs, originals)
        if name in _RULES:
            out = _RULES[name](func, *args, **kwargs)
            if out is not NotImplemented:
                return out
        if name in _LINEAR or name in _LIKE or name in _LINEAR_GETTERS:
            out = _linear_in_one(func, name, args, kwargs)
            if out is not NotImplemented:
                return out
        if name in _ELEMENTWISE and isinstance(args[0], Pair) and _pairs((args[1:], kwargs)) == 0:
            return _elementwise(func, args, kwargs)
        return _general(func, args, kwargs)
    except ForwardModeError:
        raise
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ForwardModeError(f"torch function {name!r}: {str(error).splitlines()[0]}") from error


def originals_or(args: tuple, originals: tuple) -> tuple:
    """Arguments as the caller gave them where they are parameters: `requires_grad` is asked of the parameter itself."""
    return tuple(o if isinstance(o, torch.nn.Parameter) else a for a, o in zip(args, originals, strict=True))


def primals(values: Any) -> Any:
    """The same with values in place of pairs."""
    return pytree.tree_map(lambda leaf: leaf.primal if isinstance(leaf, Pair) else leaf, values)


def primal(value: Any) -> Any:
    return value.primal if isinstance(value, Pair) else value


def _pairs(values: Any) -> int:
    return sum(isinstance(leaf, Pair) for leaf in pytree.tree_leaves(values))


def _writes(name: str, kwargs: dict) -> bool:
    if kwargs.get("out") is not None:
        raise ForwardModeError(f"torch function {name!r} with out=")
    if name.startswith("__"):
        return name == "__setitem__" or name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return name.endswith("_") or bool(kwargs.get("inplace"))


# ---------------------------------------------------------------------------------------------- general forms


def _general(func: Callable, args: tuple, kwargs: dict) -> Any:
    """vmap over streams of jvp: any function that PyTorch can differentiate forward."""
    leaves, layout = pytree.tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Pair)]
    pairs = [leaves[i] for i in where]
    streams = union(*(pair.streams for pair in pairs))

    def call(*inputs: Tensor) -> Any:
        filled = list(leaves)
        for i, value in zip(where, inputs, strict=True):
            filled[i] = value
        some_args, some_kwargs = pytree.tree_unflatten(filled, layout)
        return func(*some_args, **some_kwargs)

    values = tuple(pair.primal.contiguous() for pair in pairs)  # jvp cannot take expanded ones
    out = func(*primals(args), **primals(kwargs))
    results, shape = pytree.tree_flatten(out)
    differentiable = [i for i, r in enumerate(results) if isinstance(r, Tensor) and r.is_floating_point()]
    if not differentiable:
        return out

    def tangents(*directions: Tensor) -> list[Tensor]:
        def wanted(*inputs: Tensor) -> list[Tensor]:
            found = pytree.tree_leaves(call(*inputs))
            return [found[i] for i in differentiable]

        return torch.func.jvp(wanted, values, directions)[1]

    for i, tangent in zip(differentiable, torch.func.vmap(tangents)(*(p.on(streams) for p in pairs)), strict=True):
        results[i] = Pair(results[i], streams, tangent)
    return pytree.tree_unflatten(results, shape)


def _linear_in_one(func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    leaves, layout = pytree.tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Pair)]
    if name in _LIKE or name == "to":
        leaves[1:] = [primal(leaf) for leaf in leaves[1:]]
        where = where[:1]
    if len(where) != 1 or not isinstance(leaves[where[0]], Pair):
        return NotImplemented
    pair, at = leaves[where[0]], where[0]
    if at != (1 if name == "embedding" else 0):
        return NotImplemented

    def call(value: Tensor) -> Any:
        filled = [*leaves[:at], value, *leaves[at + 1 :]]
        some_args, some_kwargs = pytree.tree_unflatten(filled, layout)
        return func(*some_args, **some_kwargs)

    out = call(pair.primal)
    if out is pair.primal:
        return pair
    if isinstance(out, Tensor):
        if not out.is_floating_point():
            return out
        tangent = [call(one) for one in pair.each()] if pair.apart else torch.func.vmap(call)(pair.stacked())
        return _view_of(pair, Pair(out, pair.streams, tangent))
    if pair.apart:
        columns = zip(*(call(one) for one in pair.each()), strict=True)
        tangents = [list(column) for column in columns]
    else:
        tangents = torch.func.vmap(lambda value: tuple(call(value)))(pair.stacked())
    return tuple(_view_of(pair, Pair(o, pair.streams, t)) for o, t in zip(out, tangents, strict=True))


def _view_of(base: Pair, pair: Pair) -> Pair:
    """Marks both where the new pair's values are in the base's memory."""
    if pair.primal._is_view() or pair.primal.untyped_storage()._cdata == base.primal.untyped_storage()._cdata:
        base.viewed = pair.viewed = True
        pair.shared = base.shared
    return pair


def _elementwise(func: Callable, args: tuple, kwargs: dict) -> Pair:
    pair: Pair = args[0]
    x = pair.primal.contiguous()
    value, slope = torch.func.jvp(lambda x: func(x, *args[1:], **kwargs), (x,), (torch.ones_like(x),))
    return Pair(value, pair.streams, pair.stacked() * slope)


def _in_place(mode: ForwardMode, func: Callable, name: str, args: tuple, kwargs: dict, originals: tuple) -> Any:
    """x.f_(...): the values are written into x and its tangents into those of x, so that views of both stay right."""
    target, original = args[0], originals[0]
    streams = union(*(leaf.streams for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Pair)))
    if isinstance(original, torch.nn.Parameter):
        raise ForwardModeError(f"torch function {name!r} writes into a parameter")
    if not isinstance(target, Pair):
        target = mode.promote(target, streams)
    elif target.streams != streams or target.shared:
        if target.viewed:
            raise ForwardModeError(f"torch function {name!r} writes into a tensor of which there are views")
        target.set_tangent(streams, target.on(streams).clone())
        target.shared = False
    plain = {key: value for key, value in kwargs.items() if key != "inplace"}

    def changed(x: Tensor, *others: Any, **options: Any) -> Tensor:
        x = x.clone()
        func(x, *others, **options)
        return x

    out = _general(changed if "inplace" not in kwargs else func, (target, *args[1:]), plain)
    target.primal.copy_(out.primal)
    target.stacked().copy_(out.stacked())
    return None if name == "__setitem__" else original


# ---------------------------------------------------------------------------------------------- sums and products


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


def _add(func: Callable, a: Any, b: Any, *, alpha: float = 1) -> Any:
    out = func(primal(a), primal(b)) if alpha == 1 else func(primal(a), primal(b), alpha=alpha)
    sign = -alpha if func.__name__ == "sub" else alpha
    if isinstance(a, Pair) and isinstance(b, Pair):
        left, right = lifted(a, out.dim()), lifted(b, out.dim())
        if a.streams == b.streams:
            return Pair(out, a.streams, torch.add(left, right, alpha=sign))
        if set(a.streams) < set(b.streams):
            return total(out, [(b.streams, right * sign if sign != 1 else right.clone()), (a.streams, left)])
        return total(out, [(a.streams, left.clone()), (b.streams, right * sign if sign != 1 else right)])
    pair = a if isinstance(a, Pair) else b
    tangent = lifted(pair, out.dim())
    if pair is b and sign != 1:
        tangent = tangent * sign
    same = tangent.shape[1:] == out.shape and tangent.dtype == out.dtype
    result = Pair(out, pair.streams, tangent if same else tangent.expand(-1, *out.shape).to(out.dtype))
    result.shared = pair.shared = True
    return result


def _mul(func: Callable, a: Any, b: Any) -> Any:
    x, y = primal(a), primal(b)
    out = func(x, y)
    if not (isinstance(a, Pair) and isinstance(b, Pair)):
        pair, factor = (a, y) if isinstance(a, Pair) else (b, x)
        return total(out, [(pair.streams, lifted(pair, out.dim()) * factor)])
    if set(a.streams) < set(b.streams):
        a, b, x, y = b, a, y, x
    left = lifted(a, out.dim()) * y  # [K, *out.shape]
    if set(b.streams) <= set(a.streams) and left.dtype == out.dtype and left.shape[1:] == out.shape:
        where = places(b.streams, a.streams)
        if isinstance(where, slice):
            left[where].addcmul_(lifted(b, out.dim()), x)
            return Pair(out, a.streams, left)
    return total(out, [(a.streams, left), (b.streams, lifted(b, out.dim()) * x)])


def _div(func: Callable, a: Any, b: Any, **options: Any) -> Any:
    if isinstance(b, Pair) or options:
        return NotImplemented
    out = func(a.primal, b)
    return total(out, [(a.streams, lifted(a, out.dim()) / b)])


def _joined(func: Callable, tensors: Any, dim: int = 0) -> Any:
    """cat and stack."""
    out = func(primals(tensors), dim)
    streams = union(*(item.streams for item in tensors if isinstance(item, Pair)))
    parts = [
        item.on(streams) if isinstance(item, Pair) else item.new_zeros(()).expand(len(streams), *item.shape)
        for item in tensors
    ]
    return Pair(out, streams, func([part.to(out.dtype) for part in parts], dim + 1 if dim >= 0 else dim))


def _getitem(func: Callable, x: Any, index: Any) -> Any:
    if not isinstance(x, Pair) or _pairs(index):
        return NotImplemented
    out = x.primal[index]
    index = index if isinstance(index, tuple) else (index,)
    advanced = [i for i, item in enumerate(index) if isinstance(item, (Tensor, list))]
    if x.apart or len(advanced) > 1:  # with several index tensors the place of their dimension depends on all of them
        tangent: Any = [one[index] for one in x.each()]
        tangent = tangent if x.apart else torch.stack(tangent)
    else:
        tangent = x.stacked()[(slice(None), *index)]
    return _view_of(x, Pair(out, x.streams, tangent))


def _affine(out: Tensor, x: Any, weight: Any, bias: Any, transposed: bool) -> Pair:
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


def _linear(func: Callable, input: Any, weight: Any, bias: Any = None) -> Any:
    if primal(weight).dim() != 2:
        return NotImplemented
    return _affine(func(primal(input), primal(weight), primal(bias)), input, weight, bias, transposed=True)


def _addmm(func: Callable, bias: Any, x: Any, weight: Any, **options: Any) -> Any:
    if options or primal(bias).dim() != 1:
        return NotImplemented
    return _affine(func(primal(bias), primal(x), primal(weight)), x, weight, bias, transposed=False)


def _matmul(func: Callable, a: Any, b: Any) -> Any:
    """Stream by stream: a batched product would copy the operand without tangents K times."""
    x, y = primal(a), primal(b)
    if x.dim() < 2 or y.dim() < 2:
        return NotImplemented
    out = func(x, y)
    if y.dim() == 2 and (x.dim() > 2 or not isinstance(a, Pair)):
        return _affine(out, a, b, None, transposed=False)
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


# ---------------------------------------------------------------------------------------------- norms, attention


def _dropout(func: Callable, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise ForwardModeError(f"torch function {func.__name__!r} is random: put the module in evaluation mode")
    return input


def _softmax(func: Callable, input: Any, dim: Any = None, *rest: Any, **options: Any) -> Any:
    """p = softmax(x): dp = p (dx - <p, dx>)."""
    if dim is None or rest and func.__module__ != "torch.nn.functional":
        return NotImplemented
    out = func(input.primal, dim, *rest, **options)
    at = dim if dim < 0 else dim + 1
    tangent = input.stacked().to(out.dtype) * out
    return Pair(out, input.streams, tangent.addcmul_(out, tangent.sum(at, keepdim=True), value=-1))


def _layer_norm(
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


def _attention(
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
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused ones have no forward mode
            options = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
            return _general(func, (query, key, value), dict(attn_mask=attn_mask, **options))
    out = func(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    (batch, heads, length, depth), (kv_heads, keys) = q.shape, k.shape[1:3]
    share = heads // kv_heads  # query heads that share a key head
    scale = 1.0 / math.sqrt(depth) if scale is None else scale
    streams = union(*(item.streams for item in (query, key, value) if isinstance(item, Pair)))
    moved = [dict(zip(i.streams, i.each(), strict=True)) if isinstance(i, Pair) else {} for i in (query, key, value)]
    tangent = out.new_empty((len(streams), *out.shape))

    def rows(x: Tensor, start: int, stop: int) -> Tensor:  # [B, H, T, d] -> [B H_kv, share n, d]
        return x[:, :, start:stop].reshape(batch * kv_heads, share * (stop - start), -1)

    def flat(x: Tensor) -> Tensor:  # [B, H_kv, S, d] -> [B H_kv, S, d]
        return x.reshape(batch * kv_heads, keys, -1)

    mask = None if attn_mask is None else attn_mask.expand(batch, heads, length, keys)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
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
        probs = torch.where(seen, torch.softmax(scores, -1), 0.0).to(q.dtype).view(len(flat_k), -1, keys)
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


def _iter(func: Callable, x: Pair) -> Any:
    return iter([Dual(item) for item in _linear_in_one(torch.unbind, "unbind", (x,), {})])


_RULES: dict[str, Callable] = {
    "add": _add,
    "sub": _add,
    "mul": _mul,
    "multiply": _mul,
    "div": _div,
    "true_divide": _div,
    "cat": _joined,
    "concat": _joined,
    "stack": _joined,
    "__getitem__": _getitem,
    "__iter__": _iter,
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "dropout": _dropout,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
}
