"""That every use of a trainable parameter is one that the sample and gram engines see.

Hooks tell them of calls of the modules that own parameters. A weight that something else reads (F.linear(x, a.weight)
in another module, a.forward(x) past the hooks, a product of several weights at once) adds to the gradient what no hook
reports. So the torch functions of the forward pass are watched for parameters, and the graph it leaves for paths to
them that began before the pass: either is an error that names the parameter and the place, never a gap.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from gfast.deferred import computing

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
_LINEAR_GETTERS = frozenset("T mT H mH real".split())


def only_about(func: Callable) -> bool:
    """Does a torch function ask what its arguments are, or take their values without a derivative?"""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return func.__self__.__name__ not in _LINEAR_GETTERS
    return name in _ABOUT


def _stack() -> Iterator[Any]:
    """The frames of the call stack, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def frames_of(error: BaseException) -> list[Any]:
    """The frames that an error came through, innermost first."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]


def module_on_stack(model: nn.Module, frames: Iterable[Any] | None = None) -> str:
    """The innermost module of the model whose forward is running, in words, found on the call stack."""
    names = {id(module): name for name, module in model.named_modules()}
    for frame in _stack() if frames is None else frames:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            name = names.get(id(module))
            return f"in {name!r} ({type(module).__name__})" if name else f"in {type(module).__name__}"
    return f"in {type(model).__name__}"


def function_on_stack(frames: Iterable[Any] | None = None) -> str | None:
    """The torch.autograd.Function whose forward is running, if any: there gradients are disabled, and do not stop."""
    code = torch.autograd.Function.apply.__func__.__code__
    for frame in _stack() if frames is None else frames:
        if frame.f_code is code:
            return frame.f_locals["cls"].__qualname__
    return None


def _nodes(output: Tensor) -> Iterator[Any]:
    """The nodes of the graph that an output has left."""
    todo, seen = [output.grad_fn], {None}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo.extend(next_node for next_node, _ in node.next_functions)


def repeatable(output: Tensor) -> bool:
    """Whether a second backward through the graph is as good as the first: all of it is PyTorch's own.

    Functions that others wrote may overwrite in their backward what they had saved, as fused activations do.
    """
    return not any(
        isinstance(node, BackwardCFunction) or type(node).__name__ == "CppFunction" for node in _nodes(output)
    )


class UseWatch(TorchFunctionMode):
    """Context around a forward pass with frozen parameters.

    Args:
        owners: id of a trainable parameter -> its name, and names of the modules in whose forward it may be used.
        running: names of the modules with parameters whose forward is running, innermost last; kept up by hooks.
    """

    def __init__(
        self, model: nn.Module, owners: Mapping[int, tuple[str, frozenset[str]]], running: list[str], engine: str
    ) -> None:
        super().__init__()
        self.model, self.owners, self.running, self.engine = model, owners, running, engine

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owners = self.owners
        if computing.get():  # it belongs to the head's call, which hooks see
            return func(*args, **(kwargs or {}))
        for value in args:  # written out, because this is all that most of some hundred calls a layer need
            if id(value) in owners or type(value) in (tuple, list):
                self._check(self._foreign(args), func)
                break
        if not kwargs:
            return func(*args)
        self._check(self._foreign(kwargs.values()), func)
        return func(*args, **kwargs)

    def _foreign(self, values: Iterable[Any]) -> str | None:
        """The name of a parameter among the arguments that does not belong to the module that is running."""
        for value in values:
            found = self.owners.get(id(value))
            if found is not None:
                if not self.running or self.running[-1] not in found[1]:
                    return found[0]
            elif type(value) in (tuple, list):
                name = self._foreign(value)
                if name is not None:
                    return name
        return None

    def _check(self, name: str | None, func: Any) -> None:
        if name is None:
            return
        if only_about(func) or not torch.is_grad_enabled() and function_on_stack() is None:
            return
        what = getattr(func, "__name__", str(func))
        what = func.__self__.__name__ if what == "__get__" else what
        why = f"torch function {what!r} reads it {module_on_stack(self.model)}, outside its own module"
        self._refuse(name, why, "engine='stream' or 'token', which take any use")

    def check_graph(self, output: Tensor) -> None:
        """ValueError if the output's graph leads to a parameter: something computed before the pass holds it."""
        for node in _nodes(output):
            found = self.owners.get(id(getattr(node, "variable", None)))
            if found is not None:
                why = "the model reads a view of it, or a product, that was made before the pass"
                self._refuse(found[0], why, "engine='stream', which takes any use")

    def _refuse(self, name: str, why: str, instead: str) -> None:
        raise ValueError(
            f"the {self.engine} engine cannot attribute the trainable parameter {name!r}: {why}, where no hook sees "
            f"what that adds to its gradient. Freeze it with requires_grad_(False), or use {instead}"
        )
