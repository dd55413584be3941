# SPDX-License-Identifier: Apache-2.0
"""Memorisation from teacher forcing: which tokens of an answer are the model's first choice, given those before."""

from __future__ import annotations

from typing import Any

import numpy as np

from gfast.metrics.values import chosen, right_or_wrong

FLOORS = ("definition", "open-unlearning")


def extraction_strength(correct: Any, floor: str = "definition") -> float:
    r"""Extraction strength of one answer: how little of it must be given for the rest to follow.

    .. math:: ES = 1 - k / N, \quad k = \min \{k : \mathrm{argmax}_i = s_i \ \forall i \ge k\}

    Args:
        correct: [N], for each answer token whether it is the argmax under teacher forcing. open-unlearning leaves the
            token that ends the answer out.
        floor: "definition": k = N where the last token is wrong, so ES is 0. "open-unlearning": its search ends at
            k = N - 1 whatever that token is, so ES is at least 1/N.

    Returns:
        between 0 and 1; 0 for an answer without tokens.

    Errors: ValueError for anything but right and wrong, several answers at once, an unknown floor.

    Source: Carlini et al., arXiv 2012.07805, as in open-unlearning's `extraction_strength`.

    >>> extraction_strength([0, 1, 1, 1]), extraction_strength([1, 0]), extraction_strength([1, 0], "open-unlearning")
    (0.75, 0.0, 0.5)
    """
    chosen("floor", floor, FLOORS)
    right = right_or_wrong("correct", correct)
    if not right.size:
        return 0.0
    wrong = np.flatnonzero(~right)
    start = int(wrong[-1]) + 1 if wrong.size else 0
    if floor == "open-unlearning":
        start = min(start, right.size - 1)
    return 1 - start / right.size


def exact_memorization(correct: Any) -> float | None:
    """Share of an answer's tokens that are the argmax under teacher forcing.

    Args:
        correct: [N] as in `extraction_strength`.

    Returns:
        between 0 and 1; None for an answer without tokens, which a mean leaves out.

    Errors: ValueError for anything but right and wrong.

    Source: Tirumala et al., arXiv 2205.10770, as in open-unlearning's `exact_memorization`.

    >>> exact_memorization([1, 0, 1, 1]), exact_memorization([])
    (0.75, None)
    """
    right = right_or_wrong("correct", correct)
    return float(right.mean()) if right.size else None
