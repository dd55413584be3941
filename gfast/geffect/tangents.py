"""One directional derivative carried through a model's forward pass by PyTorch's own forward mode.

`tangents_along` makes a dual tensor (torch.autograd.forward_ad) of a parameter each time a torch function reads it, so
that every use counts, in whatever module, and no module needs an attribution rule; torch carries the tangents on. What
PyTorch cannot differentiate forward (kernels behind torch.autograd.Function or custom operators, raw memory) is an
error that names the module, never a gap. Tangents stop where gradients would: at detach and under no_grad.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gfast.deferred import follow, holds_deferred
from gfast.geffect.uses import frames_of, function_on_stack, module_on_stack, only_about
from gfast.ops.common import row_chunks

Direction = Callable[[], Tensor | None]

_SCORES = 2**22  # attention scores held at a time
_KEPT = 4  # parameters whose dual is kept: experts that share one read it one after the other
_RAW = frozenset("data_ptr numpy __array__ storage untyped_storage __dlpack__ __cuda_array_interface__".split())
_NO_RULE = re.compile(r"forward AD|forward mode|jvp|does not support it|made before the pass")


class ForwardModeError(ValueError):
    """An operation through which no tangent can be carried."""


class Tangents(TorchFunctionMode):
    """Context in which reading a parameter gives its dual.

    Args:
        directions: for every parameter that must not be taken for a constant, the function that gives its direction,
            shaped like the parameter, or None for zero; it is called when the parameter is read.

    Attributes:
        used: ids of the parameters that were read.
    """

    def __init__(self, directions: Mapping[nn.Parameter, Direction | None]) -> None:
        super().__init__()
        self._directions = {id(parameter): (parameter, along) for parameter, along in directions.items()}
        self._duals: dict[int, Tensor] = {}  # the last few
        self.used: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if holds_deferred(args) or holds_deferred(kwargs.values()):
            with self:  # what computes the logits carries tangents too
                return follow(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "requires_grad_" or name == "__set__" and func.__self__.__name__ == "requires_grad":
            return args[0] if name == "requires_grad_" else None  # it would record a graph: checkpoints ask for that
        if only_about(func):
            return func(*args, **kwargs)
        given = tuple(_mapped(value, self._read) for value in args)
        options = {key: _mapped(value, self._read) for key, value in kwargs.items()}
        if name in _RAW and _moves(given):
            raise ForwardModeError(f"{name}() hands out raw memory, as kernels outside of PyTorch read it")
        if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and not str(func).startswith("aten"):
            if _moves(given) or _moves(options.values()):  # torch would drop the tangents in silence
                raise ForwardModeError(f"the custom operator {func} has no forward derivative")
        if name.endswith("_") and not name.endswith("__") and id(args[0]) in self._directions:
            raise ForwardModeError(f"torch function {name!r} writes into a parameter")
        if func is F.scaled_dot_product_attention:
            return attention(*given, **options)
        return func(*given, **options)

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
                raise ForwardModeError("it reads a view or a product of parameters that was made before the pass")
            return tensor
        self.used.add(id(tensor))
        if id(tensor) not in self._duals:
            parameter, along = known
            dual, direction = parameter.detach(), None if along is None else along()
            if direction is not None:
                dual = forward_ad.make_dual(dual, direction.to(parameter.dtype))
            if len(self._duals) == _KEPT:
                del self._duals[next(iter(self._duals))]
            self._duals[id(tensor)] = dual
        return self._duals[id(tensor)]


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
    run = max(1, _SCORES // max(1, query.shape[:-2].numel() * keys))
    if run < rows and is_causal and attn_mask is None:
        attn_mask, is_causal = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(), False
    by_row = attn_mask is not None and attn_mask.dim() > 1 and attn_mask.shape[-2] > 1
    parts = []
    for start, stop in row_chunks(rows, run):
        mask = attn_mask[..., start:stop, :] if by_row else attn_mask
        some = query[..., start:stop, :]
        parts.append(F.scaled_dot_product_attention(some, key, value, mask, dropout_p, is_causal, **options))
    out = torch.cat(parts, -2)
    return out.transpose(1, 2).contiguous().transpose(1, 2) if out.dim() == 4 else out


@contextmanager
def tangents_along(directions: Mapping[nn.Parameter, Direction | None], model: nn.Module) -> Iterator[Tangents]:
    """Context in which model code carries tangents (see `Tangents`); `model` names modules in errors."""
    mode = Tangents(directions)
    with forward_ad.dual_level():
        try:
            # in torch's own functions attention has no forward mode but this, and scripted code may lose tangents
            with mode, sdpa_kernel(SDPBackend.MATH), torch.jit.optimized_execution(False):
                yield mode
        except (ForwardModeError, NotImplementedError) as error:
            if not isinstance(error, ForwardModeError) and _NO_RULE.search(str(error)) is None:
                raise
            raise _explained(error, model) from error


def _explained(error: Exception, model: nn.Module) -> ForwardModeError:
    frames = frames_of(error)
    function = function_on_stack(frames)
    what = str(error).splitlines()[0].rstrip(".")
    if function is not None:
        what = f"the torch.autograd.Function {function!r} says how to go backward, not forward"
    return ForwardModeError(
        f"the token engine cannot carry tangents through an operation {module_on_stack(model, frames)}: {what}. "
        f"Measure this model with g_effect(..., engine='stream') or pg_effect, or let the module use plain PyTorch "
        f"operations"
    )
