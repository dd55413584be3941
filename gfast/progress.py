# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal or in a notebook, and in a log file a whole line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SECONDS = 30  # between two lines of a log


class Bar:
    """Counts units of work on stderr; use it with `with`.

    Args:
        text: what is done. total: units in all, or None. unit: what is counted. show: False counts in silence.
    """

    def __init__(self, text: str = "", total: int | None = None, unit: str = "batch", show: bool = True) -> None:
        self._bar: Any = None
        if show and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            from tqdm.auto import tqdm

            self._bar = tqdm(desc=text, total=total, unit=unit, dynamic_ncols=True)
        elif show:
            self._bar = _Lines(text, total, unit)

    def update(self, units: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(units)

    def say(self, text: str) -> None:
        """What is done now."""
        if self._bar is not None:
            self._bar.set_description(text)

    def note(self, **values: Any) -> None:
        """Values to show beside the count."""
        if self._bar is not None:
            self._bar.set_postfix(**values)

    def over(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, counted once each is done with."""
        with self:
            for item in items:
                yield item
                self.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Lines:
    """As tqdm, for a file, where a carriage return starts no line over: a line every half minute, and a last one."""

    def __init__(self, text: str, total: int | None, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.text, self.total, self.unit, self.values = text, total, unit, ""
        self.count, self.said, self.clock = 0, 0, clock
        self.begun = self.last = clock()

    def update(self, units: int) -> None:
        self.count += units
        if self.clock() - self.last >= SECONDS:
            self._print()

    def set_description(self, text: str) -> None:
        self.text = text

    def set_postfix(self, **values: Any) -> None:
        self.values = ", ".join(f"{name} {value}" for name, value in values.items())

    def close(self) -> None:
        if self.count > self.said:
            self._print()

    def _print(self) -> None:
        self.last, self.said = self.clock(), self.count
        lead = f"{self.text}: " if self.text else ""
        done = f"{self.count} of {self.total}" if self.total else f"{self.count}"
        took = round(self.last - self.begun)
        rest = f", {self.values}" if self.values else ""
        print(f"{lead}{done} ({self.unit}), {took // 60}:{took % 60:02d} min{rest}", file=sys.stderr, flush=True)
