"""Tests, or parameters of one, that are long and prove again what quicker ones prove: see CONTRIBUTING.md."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest


def slow_when(condition: Callable[[SimpleNamespace], object]) -> pytest.MarkDecorator:
    """Marks a test `slow` with those of its parameters for which ``condition`` holds; conftest.py asks it."""
    return pytest.mark.slow_when.with_args(condition)


def mark_slow(item: pytest.Item) -> None:
    for mark in item.iter_markers("slow_when"):
        if mark.args[0](SimpleNamespace(**item.callspec.params)):
            item.add_marker(pytest.mark.slow)
            return
