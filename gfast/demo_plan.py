# SPDX-License-Identifier: Apache-2.0
"""The settings of `gfast demo`; imported without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What the demo does: the same plan gives the same numbers on the same machine."""

    seed: int = 0
    steps: int = 30
    every: int = 3
    learning_rate: float = 2.5e-4
    batch_size: int = 8
    hidden: int = 128
    layers: int = 6
    forget_rows: int = 40
    retain_rows: int = 160
    learning_batch_size: int = 20
    learning_epochs: int = 40
    learned_below: float = 0.05


SMALL = dict(hidden=64, layers=3, forget_rows=10, retain_rows=20, learning_batch_size=6, learned_below=0.2)
QUICK = SMALL | dict(steps=6, every=3, learning_rate=5e-4)
