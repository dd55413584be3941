"""What forward mode does with each torch function: special forms for those that cost, one general form for the rest.

Letters: K streams, an argument's value x and its tangents dx [K, *x.shape]. Rules take the function and its arguments
with `Pair` in place of tensors that carry tangents, and return pairs or plain tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gfast.geffect import forward_layers as layers
from gfast.geffect.forward import Dual, ForwardMode, ForwardModeError, Pair, primal, union, writes

# functions of what a tensor is, of its value without a derivative, or that make a new tensor like it
_ABOUT = frozenset(
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex is_signed get_device "
    "element_size storage_offset __len__ __hash__ __repr__ __format__ is_same_size is_inference is_tensor result_type "
    "promote_types retain_grad register_hook "
    "item tolist __bool__ __float__ __int__ __index__ __contains__ eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ "
    "__gt__ __ge__ equal allclose isclose isnan isinf isfinite isneginf isposinf argmax argmin argsort nonzero any all "
    "count_nonzero one_hot logical_not logical_and logical_or logical_xor bincount unique searchsorted bucketize isin "
    "int long short char byte bool detach zeros_like ones_like empty_like full_like rand_like randn_like new_zeros "
    "new_ones new_empty new_full new_tensor".split()
)
_RAW = frozenset("data_ptr numpy __array__ storage untyped_storage __dlpack__ __cuda_array_interface__".split())
_LINEAR_GETTERS = frozenset("T mT H mH real".split())

# f(x, ...) linear in its one argument with tangents, which comes first (second for embedding)
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


def only_about(func: Callable) -> bool:
    """Does a torch function ask what its arguments are, or take their values without a derivative?"""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return func.__self__.__name__ not in _LINEAR_GETTERS
    return name in _ABOUT


def apply(mode: ForwardMode, func: Callable, args: tuple, kwargs: dict, originals: tuple) -> Any:
    """The function's value with tangents."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = func.__self__.__name__
    elif name == "__set__":
        raise ForwardModeError(f"it sets the attribute {func.__self__.__name__!r} of a tensor that carries tangents")
    if name in _RAW:
        raise ForwardModeError(f"{name}() hands out raw memory, as kernels outside of PyTorch read it")
    if only_about(func):
        return func(*primals(originals_or(args, originals)), **primals(kwargs))
    if not any(isinstance(leaf, Pair) for leaf in pytree.tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and not str(func).startswith("aten"):
        raise ForwardModeError(f"the custom operator {func} has no forward derivative")
    try:
        if kwargs.get("out") is not None:
            raise ForwardModeError(f"torch function {name!r} with out=")
        if writes(func, kwargs):
            return _in_place(mode, func, name, args, kwargs, originals)
        if name in _RULES:
            out = _by_rule(_RULES[name], func, args, kwargs, mode.kind)
            if out is not NotImplemented:
                return out
        if name in _LINEAR or name in _LIKE or name in _LINEAR_GETTERS:
            out = _linear_in_one(func, name, args, kwargs)
            if out is not NotImplemented:
                return out
        if name in _ELEMENTWISE and isinstance(args[0], Pair) and _pairs((args[1:], kwargs)) == 0:
            return _elementwise(func, args, kwargs)
        if name == "scaled_dot_product_attention":
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the one with a forward mode
                return _general(func, args, kwargs)
        return _general(func, args, kwargs)
    except ForwardModeError:
        raise
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ForwardModeError(f"torch function {name!r}: {str(error).splitlines()[0]}") from error


def _by_rule(rule: Callable, func: Callable, args: tuple, kwargs: dict, kind: str) -> Any:
    """Autocast chooses the dtype of the value; what a rule does with tangents follows that one, without autocast."""
    if not torch.is_autocast_enabled(kind):
        return rule(func, *args, **kwargs)
    dtype = torch.get_autocast_dtype(kind)

    @functools.wraps(func)
    def under_autocast(*some: Any, **options: Any) -> Any:
        with torch.autocast(kind, dtype=dtype):
            return func(*some, **options)

    with torch.autocast(kind, enabled=False):
        return rule(under_autocast, *args, **kwargs)


def originals_or(args: tuple, originals: tuple) -> tuple:
    """Arguments as the caller gave them where they are parameters: `requires_grad` is asked of the parameter itself."""
    return tuple(o if isinstance(o, torch.nn.Parameter) else a for a, o in zip(args, originals, strict=True))


def primals(values: Any) -> Any:
    """The same with values in place of pairs."""
    return pytree.tree_map(lambda leaf: leaf.primal if isinstance(leaf, Pair) else leaf, values)


def _pairs(values: Any) -> int:
    return sum(isinstance(leaf, Pair) for leaf in pytree.tree_leaves(values))


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
        for pair in pairs:
            if layers.overlap(pair, results[i]):
                _lock(pair, results[i])
    return pytree.tree_unflatten(results, shape)


def _lock(*pairs: Pair) -> None:
    """The values of these share memory and their tangents do not: nothing may write into them."""
    for pair in pairs:
        pair.memory.shared = pair.memory.viewed = True


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
        try:
            tangent = [call(one) for one in pair.each()] if pair.apart else torch.func.vmap(call)(pair.stacked())
        except RuntimeError:
            if name != "view" or pair.apart:
                raise
            # the tangents lie in memory in another order than the value: a copy
            result = Pair(out, pair.streams, pair.stacked().reshape(-1, *out.shape))
            _lock(pair, result)
            return result
        return layers.view_of(pair, Pair(out, pair.streams, tangent))
    if pair.apart:
        columns = zip(*(call(one) for one in pair.each()), strict=True)
        tangents = [list(column) for column in columns]
    else:
        tangents = torch.func.vmap(lambda value: tuple(call(value)))(pair.stacked())
    return tuple(layers.view_of(pair, Pair(o, pair.streams, t)) for o, t in zip(out, tangents, strict=True))


def _elementwise(func: Callable, args: tuple, kwargs: dict) -> Any:
    pair: Pair = args[0]
    x = pair.primal.contiguous()
    value, slope = torch.func.jvp(lambda x: func(x, *args[1:], **kwargs), (x,), (torch.ones_like(x),))
    if value.shape != x.shape:  # another argument is larger
        return _general(func, args, kwargs)
    return Pair(value, pair.streams, terms=pair.terms(x.dim(), slope))


def _in_place(mode: ForwardMode, func: Callable, name: str, args: tuple, kwargs: dict, originals: tuple) -> Any:
    """x.f_(...): the values are written into x and its tangents into those of x, so that views of both stay right."""
    target, original = args[0], originals[0]
    streams = union(*(leaf.streams for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Pair)))
    if isinstance(original, torch.nn.Parameter):
        raise ForwardModeError(f"torch function {name!r} writes into a parameter")
    if not isinstance(target, Pair):
        target = mode.promote(target, streams)
    elif target.streams != streams or target.memory.shared:
        if target.memory.viewed:
            raise ForwardModeError(f"torch function {name!r} writes into a tensor of which there are views")
        target.set_tangent(streams, target.on(streams).clone())
    plain = {key: value for key, value in kwargs.items() if key != "inplace"}

    def changed(x: Tensor, *others: Any, **options: Any) -> Tensor:
        x = x.clone()
        func(x, *others, **options)
        return x

    out = _general(changed if "inplace" not in kwargs else func, (target, *args[1:]), plain)
    target.primal.copy_(out.primal)
    target.stacked().copy_(out.stacked())
    return None if name == "__setitem__" else original


def _iter(func: Callable, x: Pair) -> Any:
    return iter([Dual(item) for item in _linear_in_one(torch.unbind, "unbind", (x,), {})])


_RULES: dict[str, Callable] = {
    "add": layers.add,
    "sub": layers.add,
    "mul": layers.mul,
    "multiply": layers.mul,
    "div": layers.div,
    "true_divide": layers.div,
    "neg": layers.neg,
    "negative": layers.neg,
    "mean": layers.mean,
    **dict.fromkeys(("to", "float", "double", "half", "bfloat16", "type_as"), layers.cast),
    "cat": layers.joined,
    "concat": layers.joined,
    "stack": layers.joined,
    "__getitem__": layers.getitem,
    "__iter__": _iter,
    "linear": layers.linear,
    "addmm": layers.addmm,
    "matmul": layers.matmul,
    "__matmul__": layers.matmul,
    "mm": layers.matmul,
    "bmm": layers.matmul,
    "dropout": layers.dropout,
    "softmax": layers.softmax,
    "layer_norm": layers.layer_norm,
    "scaled_dot_product_attention": layers.attention,
}
