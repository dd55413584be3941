"""Forward mode with stacked tangents: run a model once and carry many directional derivatives along.

A *stream* is a direction in the space of parameters that is restricted to one group and one side. `ForwardMode` runs
ordinary model code; every tensor that depends on a parameter with a direction becomes a `Dual`: its value, computed
once, and the tangents [K, *shape] of the K streams that have reached it. A stream begins to exist at the first
operation that reads one of its parameters, so layers before it cost nothing for it, and what a parameter adds to a
stream (G a for a matrix) is computed once whatever the number of streams.

Every use of a parameter is seen, because every call of a torch function is: no kind of module needs an attribution
rule. Operations that carry most of the cost have rules of their own (`forward_rules`), everything else goes through
`torch.func.vmap` over `torch.func.jvp`, one operation at a time. What PyTorch cannot differentiate forward (kernels
behind torch.autograd.Function or custom operators, raw memory) is an error that names the module, never a gap.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gfast.deferred import follow, holds_deferred
from gfast.geffect.contributions.coverage import function_on_stack, module_on_stack

Streams = tuple[int, ...]


class ForwardModeError(ValueError):
    """An operation through which no tangent can be carried."""


Term = tuple[Tensor, Any]  # tangents [K, ...] and a factor without streams (a tensor, a number or None)
_TERMS = 3  # more than this are added up: each costs a read of its tangents


class Memory:
    """What views of the same tangents have in common.

    Attributes:
        shared: other pairs count on the tangents as they are, so that writing in place copies them first.
        viewed: there are views, so that they cannot be copied.
    """

    __slots__ = ("shared", "viewed")

    def __init__(self) -> None:
        self.shared = self.viewed = False


class Pair:
    """A value and its tangents.

    Tangents may be a sum of products that nobody has computed yet: sum_j base_j * factor_j, where the bases have K
    streams and the factors none. Chains of elementwise operations so take one pass over memory for all of them.

    Attributes:
        primal: [*shape].
        streams: ids of the K streams that have a tangent here, ascending.
        memory: common to a pair and its views.
    """

    __slots__ = ("__weakref__", "_tangent", "_terms", "memory", "primal", "streams")

    def __init__(
        self,
        primal: Tensor,
        streams: Streams,
        tangent: Tensor | list[Tensor] | None = None,
        terms: list[Term] | None = None,
    ) -> None:
        self.primal, self.streams, self._tangent, self._terms = primal, streams, tangent, terms
        self.memory = Memory()
        if terms is not None and len(terms) > _TERMS:
            self.stacked()

    def stacked(self) -> Tensor:
        """The tangents as one tensor [K, *shape]."""
        if self._terms is not None:
            self._tangent, self._terms = self._added_up(), None
        if isinstance(self._tangent, list):
            self._tangent = torch.stack(self._tangent)
        return self._tangent

    def each(self) -> Sequence[Tensor]:
        """K tangents [*shape]; those of a parameter are not copied together for it."""
        return self._tangent if self.apart else self.stacked().unbind(0)

    @property
    def apart(self) -> bool:
        """The tangents are separate tensors, as those of parameters and of views of parameters are."""
        return isinstance(self._tangent, list)

    @property
    def lazy(self) -> bool:
        return self._terms is not None

    def terms(self, dim: int, factor: Any = None) -> list[Term]:
        """The tangents times a factor as terms that broadcast with values of `dim` dimensions; nothing is computed."""
        found: list[Term] = [(self.stacked(), None)] if self._terms is None else self._terms
        missing = dim - self.primal.dim()
        out = []
        for base, own in found:
            if missing:
                base = base.reshape(base.shape[0], *[1] * missing, *base.shape[1:])
            out.append((base, own if factor is None else factor if own is None else own * factor))
        return out

    def _added_up(self) -> Tensor:
        full = (len(self.streams), *self.primal.shape)
        products = sorted(self._terms, key=lambda term: term[1] is None)
        (base, factor), rest = products[0], products[1:]
        out = base if factor is None else base * factor
        if factor is None:
            self.memory.shared = True
            if rest or out.shape != full:
                out = out.expand(full).clone()
        elif out.shape != full:
            out = out.expand(full).contiguous()
        for base, factor in rest:
            if factor is None:
                out += base
            elif isinstance(factor, Tensor) and factor.dtype == base.dtype == out.dtype:
                out.addcmul_(base, factor)
            elif isinstance(factor, Tensor):
                out += base * factor
            else:
                out.add_(base, alpha=factor)
        return out.to(self.primal.dtype)

    def set_tangent(self, streams: Streams, tangent: Tensor) -> None:
        self.streams, self._tangent, self._terms, self.memory = streams, tangent, None, Memory()

    def on(self, streams: Streams) -> Tensor:
        """The tangents on a superset of the pair's streams [len(streams), *shape], 0 where it has none."""
        if streams == self.streams:
            return self.stacked()
        out = self.primal.new_zeros((len(streams), *self.primal.shape))
        out[places(self.streams, streams)] = self.stacked()
        return out


def primal(value: Any) -> Any:
    """The value of a pair, or what is none as it is."""
    return value.primal if isinstance(value, Pair) else value


class Dual(Tensor):
    """What model code holds in place of a tensor with tangents. It has no memory of its own: code that bypasses
    torch functions cannot read the value and lose the tangents."""

    pair: Pair

    @staticmethod
    def __new__(cls, pair: Pair) -> Dual:
        primal = pair.primal
        out = Tensor._make_wrapper_subclass(
            cls, primal.shape, strides=primal.stride(), dtype=primal.dtype, device=primal.device
        )
        out.pair = pair
        return out

    def __repr__(self) -> str:
        return f"Dual({tuple(self.shape)}, {len(self.pair.streams)} streams)"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # reached by what does not ask for torch functions, such as kernels
        raise ForwardModeError(f"{func} met a tensor of a forward-mode pass outside of the pass, or inside a kernel")


def places(part: Streams, whole: Streams) -> slice | list[int]:
    """Where the streams `part` are in `whole`: a slice where they are adjacent."""
    index = [whole.index(stream) for stream in part]
    if index == list(range(index[0], index[0] + len(index))):
        return slice(index[0], index[0] + len(index))
    return index


def union(*several: Streams) -> Streams:
    if all(streams == several[0] for streams in several):
        return several[0]
    return tuple(sorted(set().union(*several)))


_WRITING = frozenset(
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ifloordiv__ __imod__ __ipow__ __imatmul__ __iand__ "
    "__ior__ __ixor__ __ilshift__ __irshift__".split()
)


def writes(func: Callable, kwargs: Mapping[str, Any]) -> bool:
    """Does a torch function change one of its arguments?"""
    name = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name in _WRITING
    return name.endswith("_") or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


def _asks_for_gradients(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return name == "requires_grad_" or name == "__set__" and func.__self__.__name__ == "requires_grad"


class ForwardMode(TorchFunctionMode):
    """Context in which model code carries tangents.

    Args:
        directions: for every parameter that must not be taken for a constant, its streams and the function that gives
            the direction of each, shaped like the parameter, or None for zero; they are asked for when the parameter is
            used.
        model: names modules in errors.

    Inside, gradients must be enabled: where model code disables them, tangents stop as gradients do.
    """

    def __init__(
        self, directions: Mapping[nn.Parameter, Sequence[tuple[int, Callable[[], Tensor | None]]]], model: nn.Module
    ) -> None:
        super().__init__()
        self._parameters = {id(parameter): (parameter, streams) for parameter, streams in directions.items()}
        self._pending: weakref.WeakSet[Pair] = weakref.WeakSet()  # with tangents that are not added up
        self._promoted: dict[int, tuple[Tensor, Pair]] = {}  # plain tensors that got tangents by an in-place write
        self._model = model
        self.kind = next(iter(directions)).device.type if directions else "cpu"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if holds_deferred(args) or holds_deferred(kwargs.values()):
            with self:  # what computes the logits carries tangents too
                return follow(func, args, kwargs)
        if _asks_for_gradients(func):  # as hooks for checkpointed training do: it would record a graph
            return args[0] if func.__name__ == "requires_grad_" else None
        if self._pending and writes(func, kwargs):
            self._add_up()  # before what they are made of changes
        if not self._concerned(args) and not (kwargs and self._concerned(kwargs.values())):
            return func(*args, **kwargs)
        from gfast.geffect.forward_rules import apply

        try:
            paired_args = tuple(self._paired(value) for value in args)
            paired = {key: self._paired(value) for key, value in kwargs.items()}
            return self._wrapped(apply(self, func, paired_args, paired, args))
        except ForwardModeError as error:
            raise self._named(error) from error.__cause__

    def _add_up(self) -> None:
        for pair in list(self._pending):
            pair.stacked()
        self._pending.clear()

    def _concerned(self, values: Any) -> bool:
        """Does any argument carry a tangent, or is it a parameter, or made of parameters?"""
        for value in values:
            if isinstance(value, Tensor):
                known = type(value) is Dual or id(value) in self._parameters or id(value) in self._promoted
                if known or value.requires_grad:
                    return True
            elif isinstance(value, (tuple, list)) and self._concerned(value):
                return True
        return False

    def _paired(self, value: Any) -> Any:
        """The argument with pairs in place of tensors that carry tangents, and plain tensors for other parameters."""
        if isinstance(value, Tensor):
            return self.pair_of(value)
        if type(value) in (tuple, list):
            return type(value)(self._paired(item) for item in value)
        return value

    def pair_of(self, tensor: Tensor) -> Pair | Tensor:
        """The pair behind a tensor, or the tensor itself if it carries no tangent."""
        pair = tensor.pair if type(tensor) is Dual else None
        if id(tensor) in self._promoted:
            pair = self._promoted[id(tensor)][1]
        parameter, streams = self._parameters.get(id(tensor), (None, ()))
        if pair is None and parameter is None:
            if tensor.requires_grad and torch.is_grad_enabled():  # nothing that is computed in the pass requires any
                raise ForwardModeError("it reads a view or a product of parameters that was made before the pass")
            return tensor
        if not torch.is_grad_enabled():
            _refuse_autograd_functions()
            return parameter.detach() if pair is None else pair.primal
        if pair is not None:
            return pair
        # detached: gradients are enabled, and no graph shall be recorded
        found = [(stream, direction()) for stream, direction in streams]
        found = [(stream, tangent) for stream, tangent in found if tangent is not None]
        if not found:
            return parameter.detach()
        pair = Pair(parameter.detach(), tuple(stream for stream, _ in found), [tangent for _, tangent in found])
        pair.memory.shared = pair.memory.viewed = True  # nothing may write into a parameter
        return pair

    def directions_of(self, parameter: Tensor | None) -> list[tuple[int, Tensor]]:
        """Streams and directions of a parameter; none for a constant."""
        pair = None if parameter is None else self.pair_of(parameter)
        return list(zip(pair.streams, pair.each(), strict=True)) if isinstance(pair, Pair) else []

    def promote(self, tensor: Tensor, streams: Streams) -> Pair:
        """Tangents (of 0) for a plain tensor that an operation is about to write to."""
        if tensor._is_view() or isinstance(tensor, nn.Parameter):
            raise ForwardModeError("it writes into a view (or a parameter) whose base carries no tangent")
        pair = Pair(tensor, streams, tensor.new_zeros((len(streams), *tensor.shape)))
        self._promoted[id(tensor)] = (tensor, pair)  # held, so that the id stays taken
        return pair

    def _wrapped(self, out: Any) -> Any:
        if isinstance(out, Pair):
            if out.lazy:
                self._pending.add(out)
            return Dual(out)
        if isinstance(out, tuple) and any(isinstance(item, Pair) for item in out):
            items = [Dual(item) if isinstance(item, Pair) else item for item in out]
            if type(out) is tuple:
                return tuple(items)
            return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)  # named tuples of torch
        if isinstance(out, list):
            return [Dual(item) if isinstance(item, Pair) else item for item in out]
        return out

    def _named(self, error: ForwardModeError) -> ForwardModeError:
        return ForwardModeError(
            f"the token engine cannot carry tangents through an operation {module_on_stack(self._model)}: {error}. "
            f"Measure this model with g_effect(..., engine='stream') or pg_effect, or let the module use plain PyTorch "
            f"operations"
        )


def _refuse_autograd_functions() -> None:
    """Inside of torch.autograd.Function.forward gradients are disabled, and not because they shall stop there."""
    name = function_on_stack()
    if name is not None:
        raise ForwardModeError(f"the torch.autograd.Function {name!r} says how to go backward, not forward")
