# SPDX-License-Identifier: Apache-2.0
"""Another forward in the place of a module's, for as long as a block of code runs and in its thread alone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_lock = threading.Lock()
# Of this thread, what stands in the place of forwards, by the module's id.
_mine: ContextVar[Mapping[int, Callable[..., Any]]] = ContextVar("forwards", default={})  # noqa: B039 - never written to


class _ByThread:
    """Stands in a module while any thread has exchanged its forward."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own, self.threads = weakref.ref(module), vars(module).get("forward"), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        forward = _mine.get().get(id(module), self.own)
        return type(module).forward(module, *args, **kwargs) if forward is None else forward(*args, **kwargs)


def forward_in_place(module: nn.Module) -> Callable[..., Any] | None:
    """What somebody has put in the place of the forward of a module's class, as this thread sees it."""
    forward = vars(module).get("forward")
    if isinstance(forward, _ByThread):
        return _mine.get().get(id(module), forward.own)
    return forward


@contextmanager
def exchanged(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calls of the module by this thread are calls of `forward`; others' are what they were."""
    with _lock:
        by_thread = vars(module).get("forward")
        if not isinstance(by_thread, _ByThread):
            by_thread = module.forward = _ByThread(module)
        by_thread.threads += 1
    token = _mine.set({**_mine.get(), id(module): forward})
    try:
        yield
    finally:
        _mine.reset(token)
        with _lock:
            by_thread.threads -= 1
            if not by_thread.threads and vars(module).get("forward") is by_thread:
                if by_thread.own is None:
                    del module.forward
                else:
                    module.forward = by_thread.own
