"""Many directional derivatives carried through a model's forward pass by PyTorch's own forward mode.

A *stream* is a direction in the space of parameters that is restricted to one group and one side. `tangents_along`
makes a dual tensor (torch.autograd.forward_ad) of a parameter each time a torch function reads it, so that every use
counts, in whatever module, and no module needs an attribution rule. The derivatives are torch's: only what torch takes
for a tangent, `Streams`, is a family of tensors, and an operation on it is done on each of them. So values are computed
once, a stream begins to exist at the first operation that reads one of its parameters, and what a parameter adds to a
stream (G a for a matrix) is computed once whatever the number of streams.

What PyTorch cannot differentiate forward (kernels behind torch.autograd.Function or custom operators, raw memory) is an
error that names the module, never a gap. Tangents stop where gradients would: at detach and under no_grad.
"""

from __future__ import annotations

import re
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gfast.deferred import follow, holds_deferred
from gfast.ops.chunks import row_chunks

Along = Mapping[nn.Parameter, Sequence[tuple[int, Callable[[], Tensor | None]]]]

_SCORES = 2**22  # attention scores held at a time, over all streams
_KEPT = 4  # parameters whose dual is kept: experts that share one read it one after the other
# functions of what a tensor is, not of its value, and attributes that are views of it
_ABOUT = frozenset(
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex detach".split()
)
_LINEAR_GETTERS = frozenset("T mT H mH real".split())
_RAW = frozenset("data_ptr numpy __array__ storage untyped_storage __dlpack__ __cuda_array_interface__".split())
_lock = threading.RLock()  # PyTorch has one level of forward mode for all threads
_NO_RULE = re.compile(r"forward AD|forward.mode|jvp")  # what torch and gfast call it in their errors


class ForwardModeError(ValueError):
    """An operation through which no tangent can be carried."""


_aten = torch.ops.aten
_ASKS = (_aten.is_same_size.default, _aten._has_same_storage_numel.default)  # of what all streams have in common


class Streams(Tensor):
    """The tangents of a tensor in all streams that have reached it: to torch's forward mode, its tangent.

    Attributes:
        parts: by stream, tensors that lie in memory alike; a stream that is missing is 0.
        family: what lies in the same memory, and this itself.
    """

    parts: dict[int, Tensor]
    family: list[weakref.ref[Streams]]

    @staticmethod
    def __new__(cls, parts: dict[int, Tensor], base: Streams | None = None) -> Streams:
        if len({part.stride() for part in parts.values()}) > 1:
            # contiguous() alone keeps the strides of dimensions of one entry, and views would differ by them
            parts = {stream: part.contiguous().view(-1).view(part.shape) for stream, part in parts.items()}
        stream, form = next(iter(parts.items()))
        out = Tensor._make_wrapper_subclass(
            cls,
            form.shape,
            strides=form.stride(),
            storage_offset=form.storage_offset(),
            dtype=form.dtype,
            device=form.device,
        )
        out.parts = parts
        view = base is not None and _memory(base.parts.get(stream)) == _memory(form)
        out.family = base.family if view else []
        out.family.append(weakref.ref(out))
        return out

    def __repr__(self) -> str:
        return f"Streams({tuple(self.shape)}, {sorted(self.parts)})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*_families(args), *_families(kwargs.values())]
        streams = sorted(set().union(*(one.parts for one in given)))
        on_meta = given[0].device.type == "meta" or getattr(kwargs.get("device"), "type", "") == "meta"
        if func in _ASKS or on_meta:  # without numbers PyTorch asks what shape a sum with a zero has
            streams = streams[:1]
        elif func is _aten.add.Tensor and len(given) == len(args) and not kwargs and _same(*args):
            x, y = (one.parts for one in given)
            return Streams({k: x[k] + y[k] if k in x and k in y else x.get(k, y.get(k)).clone() for k in streams})
        elif func._schema.is_mutable:
            if type(args[0]) is not Streams:
                raise ForwardModeError(f"{func} writes tangents into what has none")
            args[0]._grow(streams)

        outs = []
        for stream in streams:
            options = {key: _in_stream(value, stream) for key, value in kwargs.items()}
            outs.append(func(*(_in_stream(value, stream) for value in args), **options))
        if func._schema.is_mutable:
            return args[0]
        base = given[0]
        if isinstance(outs[0], Tensor):
            return Streams(dict(zip(streams, outs, strict=True)), base)
        if isinstance(outs[0], (tuple, list)):
            items = zip(*outs, strict=True)
            return type(outs[0])([Streams(dict(zip(streams, item, strict=True)), base) for item in items])
        return outs[0]

    def _zeros(self) -> Tensor:
        return next(iter(self.parts.values())).new_zeros(()).expand(self.shape)

    def _grow(self, streams: Sequence[int]) -> None:
        """The streams exist from here on, as 0, in all that lies in this memory: it is about to be written to."""
        missing = [stream for stream in streams if stream not in self.parts]
        if not missing:
            return
        first = next(iter(self.parts.values()))
        members = [member for ref in self.family if (member := ref()) is not None]
        if any(member.dtype != self.dtype for member in members):
            raise ForwardModeError("it writes into a tensor of which there are views of another dtype")
        size = first.untyped_storage().nbytes() // first.element_size()
        for stream in missing:
            room = first.new_zeros(size)
            for member in members:
                part = next(iter(member.parts.values()))
                member.parts[stream] = room.as_strided(part.shape, part.stride(), part.storage_offset())


def _families(values: Iterable[Any]) -> Iterator[Streams]:
    """Those among an operation's arguments, and in lists of them."""
    for value in values:
        if type(value) is Streams:
            yield value
        elif type(value) in (list, tuple):
            yield from _families(value)


def _in_stream(value: Any, stream: int) -> Any:
    """What an operation is given in one stream in place of an argument."""
    if type(value) is Streams:
        part = value.parts.get(stream)
        return value._zeros() if part is None else part
    if type(value) in (list, tuple):
        return type(value)(_in_stream(item, stream) for item in value)
    return value


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype


class Tangents(TorchFunctionMode):
    """Context in which reading a parameter gives its dual.

    Args:
        directions: for every parameter that must not be taken for a constant, its streams and the function that gives
            the direction of each, shaped like the parameter, or None for zero; they are asked for when the parameter is
            read.
    """

    def __init__(self, directions: Along) -> None:
        super().__init__()
        self._directions = {id(parameter): (parameter, streams) for parameter, streams in directions.items()}
        self._memory = {_memory(parameter) for parameter in directions}
        self._duals: dict[int, Tensor] = {}  # the last few

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if holds_deferred(args) or holds_deferred(kwargs.values()):
            with self:  # what computes the logits carries tangents too
                return follow(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "requires_grad_" or name == "__set__" and func.__self__.__name__ == "requires_grad":
            return args[0] if name == "requires_grad_" else None  # it would record a graph: checkpoints ask for that
        if name == "register_hook":
            raise ForwardModeError("register_hook() is to change a gradient, and there is no backward")
        if name == "__get__" and func.__self__.__name__ == "requires_grad":
            # as where a backward will follow: a model may register a hook on what requires a gradient
            return func(*args, **kwargs) or _moves(args)
        if name == "__get__" and func.__self__.__name__ not in _LINEAR_GETTERS or name in _ABOUT:
            return func(*args, **kwargs)
        given = tuple(_mapped(value, self._read) for value in args)
        options = {key: _mapped(value, self._read) for key, value in kwargs.items()}
        if name in _RAW and _moves(given):
            raise ForwardModeError(f"{name}() hands out raw memory, as kernels outside of PyTorch read it")
        if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and not str(func).startswith("aten"):
            if _moves(given) or _moves(options.values()):  # torch would drop the tangents in silence
                raise ForwardModeError(f"the custom operator {func} has no forward derivative")
        if _writes(name, options) and given and _memory(given[0]) in self._memory:
            raise ForwardModeError(f"torch function {name!r} writes into a parameter")
        if func is F.scaled_dot_product_attention:
            return attention(*given, **options)
        if func is F.embedding:
            return embedding(*given, **options)
        out = func(*given, **options)
        return out if _writes(name, options) else _of_its_dtype(out)

    def _read(self, tensor: Tensor) -> Tensor:
        """What a torch function reads in place of a tensor: of a parameter its dual."""
        known = self._directions.get(id(tensor))
        if not torch.is_grad_enabled():
            if known is not None and not torch._C._is_fwd_grad_enabled():
                raise ForwardModeError("a torch.autograd.Function reads it")
            value, tangent = forward_ad.unpack_dual(tensor)
            return tensor if tangent is None else value
        if known is None:
            if tensor.requires_grad:  # nothing that is computed in the pass requires any
                raise ForwardModeError(
                    "gfast: it reads a view or a product of parameters that was made before the pass"
                )
            return tensor
        if id(tensor) not in self._duals:
            if len(self._duals) == _KEPT:
                del self._duals[next(iter(self._duals))]
            self._duals[id(tensor)] = _dual(*known)
        return self._duals[id(tensor)]


def _of_its_dtype(out: Any) -> Any:
    """What a torch function gives, with tangents of its own dtype: norms of 16-bit numbers by fp32 weights have fp32
    ones, with which the next function fails.
    """
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return out
    value, tangent = forward_ad.unpack_dual(out)
    if tangent is None or tangent.dtype == out.dtype:
        return out
    return forward_ad.make_dual(value, tangent.to(out.dtype))


def _dual(parameter: nn.Parameter, streams: Sequence[tuple[int, Callable[[], Tensor | None]]]) -> Tensor:
    value = parameter.detach()
    tangents = {stream: direction.to(value.dtype) for stream, along in streams if (direction := along()) is not None}
    return forward_ad.make_dual(value, Streams(tangents)) if tangents else value


_WRITING = frozenset(
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ifloordiv__ __imod__ __ipow__ __imatmul__ __iand__ "
    "__ior__ __ixor__ __ilshift__ __irshift__".split()
)


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Does a torch function change its first argument?"""
    if name.endswith("__"):
        return name in _WRITING
    return name.endswith("_") or bool(kwargs.get("inplace"))


def _memory(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _mapped(value: Any, take: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return take(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, take) for item in value)
    return value


def _moves(values: Any) -> bool:
    """Does any of the tensors carry a tangent?"""
    return any(
        forward_ad.unpack_dual(value).tangent is not None
        if isinstance(value, Tensor)
        else type(value) in (tuple, list) and _moves(value)
        for value in values
    )


def embedding(
    input: Tensor,  # noqa: A002 - its name in torch
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """F.embedding with the tangents of its backward, which is not its derivative: looking up the padding token gives
    no gradient, though a head that shares the matrix may give that row one.
    """
    if scale_grad_by_freq and _moves((weight,)):
        raise ForwardModeError("scale_grad_by_freq divides gradients by counts of tokens, and there is no backward")
    out = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is None or not _moves((weight,)):
        return out
    return torch.where((input == padding_idx % len(weight))[..., None], out.detach(), out)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """F.scaled_dot_product_attention by plain operations, a run of queries at a time: fused kernels have no forward
    mode. The output lies in memory as theirs does, [B, T, H, d], because views of it may be taken.
    """
    rows, keys = query.shape[-2], key.shape[-2]
    tangents = [forward_ad.unpack_dual(x).tangent for x in (query, key, value)]
    streams = max(1, *(0 if tangent is None else len(tangent.parts) for tangent in tangents))
    run = max(1, _SCORES // max(1, streams * query.shape[:-2].numel() * keys))
    if run < rows and is_causal and attn_mask is None:
        attn_mask, is_causal = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(), False
    by_row = attn_mask is not None and attn_mask.dim() > 1 and attn_mask.shape[-2] > 1
    parts = []
    for start, stop in row_chunks(rows, run):
        mask = attn_mask[..., start:stop, :] if by_row else attn_mask
        queries = query[..., start:stop, :]
        parts.append(F.scaled_dot_product_attention(queries, key, value, mask, dropout_p, is_causal, **options))
    out = torch.cat(parts, -2)
    return out.transpose(1, 2).contiguous().transpose(1, 2) if out.dim() == 4 else out


@contextmanager
def _level() -> Iterator[None]:
    """Forward mode, for one thread after the other."""
    with _lock:
        if forward_ad._current_level >= 0:
            raise ForwardModeError(
                "gfast: this is within torch.autograd.forward_ad.dual_level(), and PyTorch nests none: measure tokens "
                "outside of it"
            )
        with forward_ad.dual_level():
            yield


@contextmanager
def tangents_along(directions: Along, model: nn.Module) -> Iterator[None]:
    """Context in which model code carries tangents (see `Tangents`); `model` names modules in errors."""
    running: list[nn.Module] = []  # whose forward has begun and not ended, innermost last

    def end(module: nn.Module, *_: Any) -> None:
        while running and running.pop() is not module:  # one that an error has left
            pass

    with _level():
        hooks = [module.register_forward_pre_hook(lambda m, _: running.append(m)) for module in model.modules()]
        hooks += [module.register_forward_hook(end) for module in model.modules()]
        try:
            # in torch's own functions attention has no forward mode but this, and scripted code may lose tangents
            with Tangents(directions), sdpa_kernel(SDPBackend.MATH), torch.jit.optimized_execution(False):
                yield
        except (ForwardModeError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and _NO_RULE.search(str(error)) is None:
                raise
            raise _explained(error, model, running) from error
        finally:
            for hook in hooks:
                hook.remove()


def _explained(error: Exception, model: nn.Module, running: list[nn.Module]) -> ForwardModeError:
    module = running[-1] if running else model
    name = next(name for name, known in model.named_modules() if known is module)
    where = f"{name!r} ({type(module).__name__})" if name else type(module).__name__
    what = str(error).splitlines()[0].rstrip(".")
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    calls = traceback.extract_tb(error.__traceback__)
    for place, code in enumerate(codes):
        if code is torch.autograd.Function.apply.__func__.__code__:  # named by its forward (Python 3.11), or its call
            inner = getattr(codes[min(place + 1, len(codes) - 1)], "co_qualname", "")
            named = re.search(r"(\w+)\.(?:forward$|apply\()", f"{inner}\n{calls[place - 1].line}", re.MULTILINE)
            function = named[1] if named else calls[place - 1].line
            what = f"the torch.autograd.Function {function!r} says how to go backward, not forward"
    return ForwardModeError(
        f"gfast: the token engine cannot carry tangents through an operation in {where}: {what}. Measure this model "
        f"with g_effect(..., engine='stream') or pg_effect, or let the module use plain PyTorch operations"
    )
