"""Hooks on accumulated gradients: what they do to a sum, they would do to the parts of a step that it is taken from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gfast.geffect.live.losses import refuse


def added(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in x's memory where it can be."""
    return x.add_(y) if x.layout == y.layout == torch.strided else x + y


def sums(parameter: nn.Parameter) -> bool:
    """Whether transformers' tensor parallelism sums a parameter's gradient, of which each process has a part (norms of
    heads, as Qwen3's and Gemma 3's), in a hook: anew with what is there from backwards before.
    """
    return any(_module(hook) == "transformers.distributed.tensor_parallel" for hook in _hooks(parameter))


def _hooks(parameter: nn.Parameter) -> list[Any]:
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


def _module(hook: Any) -> str:
    return getattr(hook, "__module__", None) or ""


def _known(hook: Any) -> bool:
    """gfast's; that sum; and Trainer's mean over processes, which beside it have the same gradient."""
    return _module(hook).startswith(("gfast.", "transformers.distributed.tensor_parallel")) or (
        _module(hook) == "transformers.trainer" and "_sync_replicated" in hook.__qualname__
    )


@contextmanager
def each_alone(names: Sequence[str], parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """For a backward: where gradients are summed over processes by a hook, it sees the new ones alone, to which those
    that are there are added afterwards.

    Raises ValueError for any other hook.
    """
    there: dict[nn.Parameter, Tensor] = {}

    def add(parameter: nn.Parameter) -> None:
        if parameter in there and parameter.grad is not None:
            parameter.grad = added(there.pop(parameter), parameter.grad)

    handles = []
    for name, parameter in zip(names, parameters, strict=True):
        if other := next((hook for hook in _hooks(parameter) if not _known(hook)), None):
            refuse(
                f"{name!r} has a hook on its accumulated gradient ({getattr(other, '__qualname__', repr(other))}: an "
                f"optimizer that steps within the backward, a clamp, a mask?), which would be given the two gradients "
                f"of a step apart and not their sum: take it off, and do so after the last retain(). A mask by "
                f"register_hook counts"
            )
        if parameter.grad is not None and sums(parameter):
            there[parameter], parameter.grad = parameter.grad, None
            handles.append(parameter.register_post_accumulate_grad_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in there.items():
            parameter.grad = gradient
