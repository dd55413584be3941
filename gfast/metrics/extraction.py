# SPDX-License-Identifier: Apache-2.0
"""The extraction strength of arXiv 2502.19301 (PS): free generation after a prefix of the answer, and how short a
prefix will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gfast.metrics.values import chosen

MATCHES = ("exact", "similar")


def prefix_extraction(
    lengths: Sequence[int], matches: Callable[[Mapping[int, int]], Mapping[int, bool]]
) -> list[float]:
    r"""For each answer 1 - k/N, with k the shortest prefix that a binary search finds after which the rest follows.

    .. math:: PS = 1 - k / N, \quad k \in \{0, ..., N\}

    A search halves [0, N] until its ends meet: where a prefix does, no longer one is tried. Where matches are exact, a
    prefix longer than one that does will do too, so k is the least; where answers need only be similar, it is what the
    search finds, as in the paper.

    Args:
        lengths: [S], N of each answer in tokens, at least 1.
        matches: given {answer: length of its prefix} for the answers still searched, {answer: whether what the model
            generates after that prefix matches the rest} (`continuation_matches`); called about log2 N times.

    Returns:
        [S], between 0 (only the whole answer would do) and 1 (nothing need be given).

    Errors: ValueError for an answer without tokens.

    Source: arXiv 2502.19301, section 5, and the code released with it.

    >>> prefix_extraction([4, 3], lambda asked: {i: k >= (1, 3)[i] for i, k in asked.items()})
    [0.75, 0.0]
    """
    for at, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"gfast: answer {at} has no tokens, so there is nothing to extract")
    ends = {at: (0, length) for at, length in enumerate(lengths)}  # a prefix of the upper end does
    searched = set(ends)
    while searched:
        asked = {at: sum(ends[at]) // 2 for at in sorted(searched)}
        for at, extracted in matches(asked).items():
            low, high = ends[at]
            ends[at] = (low, asked[at]) if extracted else (asked[at], high)
            low, high = ends[at]
            if high == 0 or high - low == 1 and (low > 0 or asked[at] == 0):
                searched.discard(at)
    return [1 - ends[at][1] / length for at, length in enumerate(lengths)]


def continuation_matches(generated: Sequence[int], rest: Sequence[int], match: str = "exact") -> bool:
    """Whether what was generated is the rest of the answer.

    Args:
        generated: token ids after the prefix; what is longer than `rest` is not looked at.
        rest: the answer's remaining token ids.
        match: "exact": the same ids. "similar": the longest common subsequence is at least half of `rest`.

    The code released with the paper compares with as much as was generated: there a model that stops at once matches.

    >>> continuation_matches([5, 6, 7], [5, 6]), continuation_matches([5, 9], [5, 6], "similar")
    (True, True)
    >>> continuation_matches([], [5, 6])
    False
    """
    chosen("match", match, MATCHES)
    generated, rest = list(generated)[: len(rest)], list(rest)
    return generated == rest if match == "exact" else 2 * common_subsequence(generated, rest) >= len(rest)


def common_subsequence(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common subsequence.

    >>> common_subsequence([1, 2, 3, 4], [2, 9, 4])
    2
    """
    row = [0] * (len(second) + 1)
    for a in first:
        before = row
        row = [0]
        for at, b in enumerate(second):
            row.append(before[at] + 1 if a == b else max(before[at + 1], row[at]))
    return row[-1]
