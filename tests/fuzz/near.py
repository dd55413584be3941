"""What counts as the same: within the error that the arithmetic may have."""

from __future__ import annotations

import torch
from draw import ROUNDING
from torch import Tensor

EPS = ROUNDING[torch.float32]


def near(found: Tensor, expected: Tensor, slack: Tensor | float, what: str) -> None:
    """Within the error that the arithmetic may have; not a number, or infinite, where the definition is."""
    assert found.shape == expected.shape, f"{what} has shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    found, expected = found.double(), expected.double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    bad = ~(same | ((found - expected).abs() <= slack))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}{list(at)} = {float(found[at])!r}, not {float(expected[at])!r}; {int(bad.sum())} bad"
        )
