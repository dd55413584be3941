"""Ops written in Python: known to the dispatcher, for whoever traces, and called directly by everyone else.

A call through the dispatcher takes 0.1 ms, and the first of a process imports torch's compiler, which takes seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gfast.ops.checks import PLAIN


def python_op(
    name: str, fake: Callable, setup_context: Callable | None = None, backward: Callable | None = None
) -> Callable[[Callable], Callable]:
    """Decorator that makes a function the op ``gfast::name``. Calls of the function take positional arguments, and go
    through the dispatcher where something traces or stands in for values; else to the function itself, not recorded.

    Args:
        fake: what the op returns for tensors without values.
        setup_context, backward: its derivative, as of ``torch.library.register_autograd``; None: it has none, and its
            results are constants.
    """

    def decorate(function: Callable) -> Callable:
        registered = torch.library.custom_op(f"gfast::{name}", function, mutates_args=())
        registered.register_fake(fake)
        if backward is not None:
            registered.register_autograd(backward, setup_context=setup_context)
        traced = getattr(torch.ops.gfast, name)

        class Recorded(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):
                output = function(*args)
                setup_context(ctx, args, output)
                return output

        if backward is not None:
            Recorded.backward = staticmethod(backward)

        @functools.wraps(function)
        def call(*args):
            if torch.compiler.is_compiling() or _traced() or not _plain(args):
                return traced(*args)
            if backward is not None and torch.is_grad_enabled() and _recorded(args):
                return Recorded.apply(*args)
            with torch.no_grad():
                return function(*args)

        call.registered = registered
        return call

    return decorate


def _traced() -> bool:
    """Whether make_fx or fake tensors see every call, plain tensors' too."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


def _plain(args: Iterable) -> bool:
    """Whether all tensors, also those in lists, hold their own values."""
    for arg in args:
        if type(arg) is list:
            if not _plain(arg):
                return False
        elif isinstance(arg, Tensor) and type(arg) not in PLAIN:
            return False
    return True


def _recorded(args: Iterable) -> bool:
    return any(x.requires_grad for x in args if isinstance(x, Tensor))
