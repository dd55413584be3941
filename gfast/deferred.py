"""Logits that are computed when somebody asks for them: how a model is run without those of the whole batch.

For the length of a call the output head returns `DeferredLogits` in place of its product: a tensor that holds what
the head read and follows what the model then does to its logits (multiplies, divides, caps by tanh, casts). Anything
else that looks at them gets the real ones, computed at that moment by the same operations in the same order. So the
model's own code decides what its logits are. What comes back is either still deferred, a linear map with a scale and
a soft cap for the ops over a head, or the model's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gfast import sharded, wrappers
from gfast.forwards import exchanged, forward_in_place
from gfast.ops.linear_inputs import as_autocast


@dataclass(frozen=True)
class Head:
    """A linear output head: logits = softcap * tanh(z / softcap) with z = logit_scale * (hidden @ weight.T + bias).

    `weight` [V, D], `bias` [V] or None, as they were multiplied with: under autocast a cast of the module's own.
    `softcap` None means no soft cap. `module`: the layer whose call was deferred. `gathers`: runs a function of the
    hidden states while the weight is here, which FSDP2 and ZeRO-3 take away when the layer's call ends.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    module: nn.Module | None = None
    gathers: Callable[[Tensor, Callable[[Tensor], Any]], Any] | None = None

    def over(self, hidden: Tensor, compute: Callable[[Tensor], Any]) -> Any:
        """``compute(hidden)`` with the weight in memory."""
        return compute(hidden) if self.gathers is None else self.gathers(hidden, compute)

    @property
    def form(self) -> dict[str, Any]:
        """The keyword arguments of the ops over a head."""
        return dict(bias=self.bias, logit_scale=self.logit_scale, softcap=self.softcap)


class DeferredLogits(Tensor):
    """Logits [..., V] of a head that has not been multiplied yet: a shape, a dtype and a device, but no memory."""

    hidden: Tensor  # [..., D]: what the head reads
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    steps: tuple[tuple[Callable, tuple], ...]  # what has been done to the product since: functions and arguments
    gathers: Callable | None  # see Head
    graded: bool  # whether gradients were on where the head was called
    computed: Tensor | None  # the real logits, once something has asked
    when_real: list[Callable[[Tensor], Tensor | None]]  # each sees the product, and may give another in its place

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        module: nn.Module,
        weight: Tensor,
        bias: Tensor | None,
        steps: tuple[tuple[Callable, tuple], ...] = (),
        dtype: torch.dtype | None = None,
        like: DeferredLogits | None = None,
    ) -> DeferredLogits:
        with torch._C.DisableTorchFunction():
            vocab = getattr(weight, "ds_shape", weight.shape)[0]  # of what ZeRO-3 has not gathered
            shape = (*hidden.shape[:-1], vocab)
            out = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype or hidden.dtype, device=hidden.device)
        out.hidden, out.module, out.weight, out.bias, out.steps = hidden, module, weight, bias, steps
        out.computed, out.when_real, out.gathers, out.graded = None, [], None, torch.is_grad_enabled()
        if like is not None:
            out.gathers, out.graded = like.gathers, like.graded
        return out

    def real(self) -> Tensor:
        """The logits themselves, as the model would have computed them."""
        again = self._watch()  # also of those that are there: a Function after a look has no graph behind it
        if self.computed is None:
            z = Head(self.weight, gathers=self.gathers).over(
                self.hidden, lambda hidden: F.linear(hidden, self.weight, self.bias)
            )
            for watch in () if again else self.when_real:
                seen = watch(z)
                z = z if seen is None else seen
            for function, arguments in self.steps:
                z = function(z, *arguments)
            self.computed, self.hidden = z, z.new_empty(0)
        return self.computed

    def head(self) -> Head | None:
        """The head with the scale and soft cap that the steps amount to; None where they are no such map, or where
        the logits have been computed already.
        """
        if self.computed is not None:
            return None
        scale, cap = 1.0, None  # logits are scale * z, then cap * tanh(scale * z)
        for function, arguments in self.steps:
            if function is torch.tanh:
                if cap is not None:
                    return None
                cap = 1.0
            elif function in (torch.mul, torch.div):
                factor = arguments[0] if function is torch.mul else 1.0 / arguments[0] if arguments[0] else 0.0
                scale, cap = (scale * factor, None) if cap is None else (scale, cap * factor)
        scale = scale if cap is None else scale * cap
        # one that flips the order of the logits, or is no number, is not what the ops over a head take
        if not all(0 < x < float("inf") for x in (scale, 1.0 if cap is None else cap)):
            return None
        return Head(self.weight, self.bias, scale, cap, self.module, self.gathers)

    def same_as(self, other: Any) -> bool:
        """Whether others, maybe as rows [N, V], are the same logits."""
        if not isinstance(other, DeferredLogits) or (one := self.head()) is None or (two := other.head()) is None:
            return False
        alike = (one.logit_scale, one.softcap) == (two.logit_scale, two.softcap) and self.weight is other.weight
        return alike and self.hidden.data_ptr() == other.hidden.data_ptr() and self.numel() == other.numel()

    def _watch(self) -> bool:
        """Whether this is where gradients are off, so that the logits have no graph or it lacks what is done to them:
        the call is then made again without deferring."""
        why = _why.get()
        if why is None or not self.graded:
            return False
        if not torch.is_grad_enabled():
            why.append(WITHOUT_GRADIENTS)
        return WITHOUT_GRADIENTS in why

    def _then(self, function: Callable, *arguments: Any) -> DeferredLogits:
        """With one step more."""
        self._watch()
        dtype = arguments[0] if function is Tensor.to else self.dtype
        out = DeferredLogits(
            self.hidden, self.module, self.weight, self.bias, (*self.steps, (function, arguments)), dtype, self
        )
        out.when_real = self.when_real
        return out

    def _in_place(self, function: Callable, *arguments: Any) -> DeferredLogits:
        self._watch()
        self.steps = (*self.steps, (function, arguments))
        return self

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return follow(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        # reached by what does not ask for torch functions, such as kernels, vmap and autograd: no graph is made below
        _note(func)
        if torch.is_grad_enabled() and (why := _why.get()) is not None:
            why.append(WITHOUT_GRADIENTS)
        return func(*tree_map(_real, args), **tree_map(_real, kwargs or {}))


# A list while a model computes its own loss for the sake of the terms beside the cross-entropy: that of deferred logits
# is then 0, and they go to the list, which tells one that was left out from one that was computed.
_left_out: ContextVar[list[DeferredLogits] | None] = ContextVar("left_out", default=None)
WITHOUT_GRADIENTS = "they are looked at where gradients are off (no_grad, a torch.autograd.Function, vmap)"
# Why the logits of the call that is running are computed: what has asked for them, in words.
_why: ContextVar[list[str] | None] = ContextVar("why", default=None)


def _note(func: Callable) -> None:
    why = _why.get()
    if why is not None:
        why.append(f"{getattr(func, '__name__', func)} looks at them")


def _real(value: Any) -> Any:
    return value.real() if isinstance(value, DeferredLogits) else value


def follow(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a torch function makes of arguments among which there are deferred logits."""
    self = args[0] if args else None
    if isinstance(self, DeferredLogits) and self.computed is None:
        if func in _ABOUT:
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        rule = _RULES.get(func)
        out = NotImplemented if rule is None else rule(self, *args[1:], **kwargs)
        if out is not NotImplemented:
            return out
    _note(func)
    return func(*tree_map(_real, args), **tree_map(_real, kwargs))


def real_arguments(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a function with the logits themselves in the place of deferred ones."""
    return tree_map(_real, args), tree_map(_real, kwargs)


def holds_deferred(values: Any) -> bool:
    """Is any of the arguments of a function, or an item of one, deferred logits?"""
    return any(isinstance(v, DeferredLogits) or (type(v) in (tuple, list) and holds_deferred(v)) for v in values)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _times(function: Callable, in_place: bool) -> Callable:
    def rule(self: DeferredLogits, other: Any = None, **options: Any) -> Any:
        if options or not _number(other):
            return NotImplemented
        return (self._in_place if in_place else self._then)(function, float(other))

    return rule


def _tanh(self: DeferredLogits, *rest: Any, **options: Any) -> Any:
    return NotImplemented if rest or options else self._then(torch.tanh)


def _cast(self: DeferredLogits, *args: Any, **options: Any) -> Any:
    """To the same or a wider dtype, which loses nothing; on the device where they are."""
    known = {"dtype": None, "device": None, "copy": False, "non_blocking": False} | options
    for value in args:
        known["dtype" if isinstance(value, torch.dtype) else "device"] = value
    dtype, device = known["dtype"], known["device"]
    if (
        len(known) > 4
        or known["copy"]
        or isinstance(device, (bool, Tensor))
        or not (dtype is None or isinstance(dtype, torch.dtype))
    ):
        return NotImplemented
    if device is not None and torch.device(device) != self.device:
        return NotImplemented
    if dtype is None or dtype == self.dtype:
        return self
    wider = dtype.is_floating_point and torch.promote_types(dtype, self.dtype) == dtype
    return self._then(Tensor.to, dtype) if wider else NotImplemented


def _requires_grad(self: DeferredLogits) -> bool:
    parts = (self.hidden, self.weight, self.bias)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parts)


def _register_hook(self: DeferredLogits, hook: Callable) -> Any:
    """A gradient hook belongs to real logits; one that only marks the time does as well on what the head reads."""
    if wrappers.only_times_backward(hook) and self.hidden.requires_grad:
        return self.hidden.register_hook(hook)
    return NotImplemented


def _flat(self: DeferredLogits, *shape: Any) -> Any:
    """As rows [N, V], for a cross-entropy that nobody wants."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape
    if _left_out.get() is None or len(sizes) != 2 or sizes[1] != self.shape[-1] or self.when_real:
        return NotImplemented
    flat = self.hidden.flatten(0, -2)
    return DeferredLogits(flat, self.module, self.weight, self.bias, self.steps, self.dtype, self)


_PLAIN = {"weight": None, "ignore_index": -100, "label_smoothing": 0.0, "size_average": None, "reduce": None}


def _cross_entropy(self: DeferredLogits, target: Any, *rest: Any, **options: Any) -> Any:
    left_out, reduction = _left_out.get(), options.pop("reduction", "mean")
    plain = not rest and reduction != "none" and all(_PLAIN.get(key, self) == x for key, x in options.items())
    if left_out is None or not plain:
        return NotImplemented
    left_out.append(self)
    return self.hidden.new_zeros((), dtype=self.dtype)


def _unchanged(self: DeferredLogits, *rest: Any, **options: Any) -> Any:
    return self


_RULES: dict[Callable, Callable] = {
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
    Tensor.to: _cast,
    Tensor.float: lambda self: _cast(self, torch.float32),
    Tensor.double: lambda self: _cast(self, torch.float64),
    Tensor.contiguous: _unchanged,
    Tensor.register_hook: _register_hook,
    Tensor.view: _flat,
    Tensor.reshape: _flat,
    F.cross_entropy: _cross_entropy,
    Tensor.requires_grad.__get__: _requires_grad,
    Tensor._base.__get__: lambda self: None,
    **{f: _times(torch.mul, False) for f in (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__)},
    **{f: _times(torch.mul, False) for f in (Tensor.__rmul__,)},
    **{f: _times(torch.mul, True) for f in (Tensor.mul_, Tensor.__imul__)},
    **{f: _times(torch.div, False) for f in (torch.div, torch.true_divide, Tensor.div, Tensor.true_divide)},
    **{f: _times(torch.div, False) for f in (Tensor.__truediv__, Tensor.__div__)},
    **{f: _times(torch.div, True) for f in (Tensor.div_, Tensor.true_divide_, Tensor.__itruediv__, Tensor.__idiv__)},
}
# of the tensor, not of its entries
_ABOUT = (
    {
        getattr(Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "device",
            "ndim",
            "layout",
            "is_cuda",
            "is_cpu",
            "is_meta",
            "is_sparse",
            "is_nested",
        )
    }
    | {
        getattr(Tensor, name)
        for name in (
            "size dim ndimension numel nelement element_size is_floating_point is_complex get_device __len__ __hash__"
        ).split()
    }
    | {torch.is_floating_point, torch.is_complex, torch.numel}
)


@contextmanager
def deferred(
    model: nn.Module, linear: nn.Module | None, left_out: list[DeferredLogits] | None = None
) -> Iterator[list[str]]:
    """Inside, calls of the model's output head return deferred logits, where its forward is the plain linear map.

    linear: the module that is called for the logits. A subclass, a forward that was put in the place of PyTorch's
    (offloading, quantisation), and a call inside compiled code or by a replica stay as they are. Hooks see the
    deferred logits and get real ones if they look at them. left_out: the cross-entropy of deferred logits is 0, and
    they are added to this list. Gives a list that says, after the call, why logits were computed, if they were.
    """
    why = _not_deferrable(model, linear)
    if why is not None:
        yield [why]
        return
    parallel, zero3 = wrappers.is_vocab_parallel(model, linear), sharded.is_zero3(linear)
    group = sharded.group_of(model, linear)
    reasons: list[str] = []
    graded = torch.is_grad_enabled()

    def forward(input: Tensor) -> Tensor:  # noqa: A002 - its name in nn.Linear
        if zero3:
            weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
        else:
            weight, bias = linear.weight, linear.bias
        here = parallel or zero3 or all(map(wrappers.is_whole, _present(weight, bias)))
        if torch.compiler.is_compiling() or not here:
            reasons.append("the head's weight is sharded, quantised or not here")
            return F.linear(input, weight, bias)
        if torch.is_grad_enabled() != graded:  # what the head reads has no graph, or a part of one
            reasons.append("the head is called where gradients are off (re-entrant checkpointing, no_grad)")
            return F.linear(input, weight, bias)
        if not zero3:
            input, weight, bias = as_autocast(input, weight, bias)
        if len({x.dtype for x in _present(input, weight, bias)}) > 1:
            return F.linear(input, weight, bias)  # for PyTorch to say
        logits = DeferredLogits(input, linear, weight, bias)
        if zero3 or group is not None:
            logits.gathers = partial(sharded.gathered, group, linear, weight)
        return logits

    token, asked = _left_out.set(left_out), _why.set(reasons)
    try:
        alone = sharded.ungathered(model, linear) if zero3 else nullcontext()
        with exchanged(linear, forward), sharded.without_hooks(linear) if parallel else alone:
            yield reasons
    finally:
        _left_out.reset(token)
        _why.reset(asked)


def _not_deferrable(model: nn.Module, linear: nn.Module | None) -> str | None:
    """Why calls of a head are left as they are; None where they can be deferred."""
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        head = "no module that the model names" if linear is None else f"a {type(linear).__name__}"
        return f"the head is {head}, not a plain nn.Linear"
    if torch.compiler.is_compiling() or not wrappers.runs_as_written(model, linear):
        return "the head runs inside compiled code or in a replica of the model"
    if sharded.is_zero3(linear) and (_autocasts() or sharded.foreign_hooks(linear)):
        return "ZeRO-3 shards the head, and autocast or a hook on the head is to see what it computes"
    if set(linear._parameters) - {"weight", "bias"}:
        return "the head's weight is made of other parameters before each call (pruning, weight normalisation)"
    if wrappers.watches_backward(model, linear):
        return "a backward hook on the head is to see the gradient of its logits"
    if forward_in_place(linear) is not None and not wrappers.is_vocab_parallel(model, linear):
        return "something has put a forward of its own in the place of the head's (offloading, another library)"
    return None


def _autocasts() -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]
