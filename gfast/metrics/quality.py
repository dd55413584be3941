# SPDX-License-Identifier: Apache-2.0
"""Forget quality: can the unlearned model be told from one that never saw the forget set?"""

from __future__ import annotations

import logging
import math
import re
import warnings
from typing import Any, NamedTuple

import numpy as np

from gfast.metrics.answers import ratios_of
from gfast.metrics.log import LOSSES, EvaluationLog, LogSet
from gfast.metrics.values import numbers, required

logger = logging.getLogger("gfast")

# Beyond so many samples SciPy's own p is an approximation, and the exact one of no use.
_EXACT = 10_000


class ForgetQuality(NamedTuple):
    """p of the two-sided two-sample Kolmogorov-Smirnov test, its statistic D, and log10 p, right where p underflows."""

    pvalue: float
    statistic: float
    log10_p: float


def forget_quality(
    log: EvaluationLog, retain_log: EvaluationLog, mean: str = "geometric", *, convention: str = "tofu"
) -> ForgetQuality:
    """p of the hypothesis that the forget set's truth ratios of a model and of a retain model are distributed alike.

    High (near 1): no difference is seen. Whatever both logs share, the test does not see: any monotone function of R
    gives the same p, so 1/R does as well.

    Args:
        log: of the unlearned model. retain_log: of the model trained without the forget set, on the same rows.
        mean, convention: of the truth ratio, see `truth_ratio`.

    Errors: ValueError where the two cannot be compared: other rows, another split, another number of perturbed answers,
    another tokenizer. ImportError without SciPy.

    Source: TOFU, arXiv 2401.06121, section 2.2.1; `scipy.stats.ks_2samp`, exact up to 10,000 samples, and where p
    underflows.

    >>> forget_quality(load_log("phi_full_wd0.01.json.gz"), load_log("phi_retain90_wd0.01.json.gz"))  # doctest: +SKIP
    ForgetQuality(pvalue=2.194e-16, statistic=0.346667, log10_p=-15.6587)
    """
    one, other = (which.of("forget", "forget_quality") for which in (log, retain_log))
    check_comparable(one, other, log.path or "the log", retain_log.path or "the retain log")
    _check_sources(log, retain_log)
    say_other_tokens("forget", log.tokens_of("forget"), log.path or "the log", retain_log)
    # The log of R, which keeps apart what R as a float would not.
    return same_distribution(ratios_of(one, mean, convention), ratios_of(other, mean, convention))


def same_distribution(values: Any, reference: Any) -> ForgetQuality:
    """The two-sample test itself.

    Errors: ValueError for an empty sample or a value that is not finite; ImportError without SciPy.

    >>> same_distribution([.2, .5, .6, .9], [.7, .95, 1.1, 1.3]).statistic  # doctest: +SKIP
    0.75
    """
    values, reference = numbers("the model's values", values), numbers("the retain model's values", reference)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning)
        test = required("scipy.stats", "scipy", "forget_quality").ks_2samp(values, reference)
    pvalue, statistic = min(float(test.pvalue), 1.0), float(test.statistic)
    if values.size == reference.size and (values.size <= _EXACT or pvalue < 1e-300):
        logarithm = log10_p(statistic, values.size)
        # SciPy's exact sum fails at times for a p near 1, and it turns to an approximation.
        if not math.isclose(pvalue, 10**logarithm, rel_tol=1e-6, abs_tol=1e-300):
            pvalue = 10**logarithm
        return ForgetQuality(pvalue, statistic, logarithm)
    if pvalue <= 0:
        raise ValueError(
            f"gfast: p of samples of {values.size} and {reference.size} underflows (D = {statistic:g}), and its "
            "logarithm is known for two samples of one size alone"
        )
    return ForgetQuality(pvalue, statistic, math.log10(pvalue))


def log10_p(statistic: float, size: int) -> float:
    r"""log10 of the exact two-sided p of two samples of one size n, in integers: it never underflows.

    .. math:: P(D \ge h/n) = 2 \sum_{k \ge 1} (-1)^{k-1} \binom{2n}{n - kh} / \binom{2n}{n}

    Source: Gnedenko and Korolyuk 1951; Hodges 1958, equation 2.3.

    >>> round(10 ** log10_p(0.75, 4), 7)
    0.2285714
    """
    steps = round(statistic * size)
    if steps == 0:
        return 0.0
    paths = sum((-1) ** (k - 1) * math.comb(2 * size, size - k * steps) for k in range(1, size // steps + 1))
    every = math.comb(2 * size, size)
    # The quotient is rounded once; the difference of two logarithms would lose digits of a p near 1.
    p = 2 * paths / every
    return math.log10(p) if p > 1e-300 else _log10(2 * paths) - _log10(every)


def _log10(value: int) -> float:
    # Of an integer of any size, in fp64.
    bits = max(value.bit_length() - 1000, 0)
    return math.log10(value >> bits) + bits * math.log10(2)


def check_comparable(one: LogSet, other: LogSet, path: str, other_path: str) -> None:
    """ValueError where two logs of a set are not of the same rows, answers and tokenizer."""
    where = f"gfast: {path} and {other_path} cannot be compared"
    if set(one.index) != set(other.index):
        odd = min(set(one.index) ^ set(other.index))
        raise ValueError(
            f"{where}: they are of {len(one)} and {len(other)} rows of the {one.name} set (index {odd} is in one "
            "of them only). A p-value depends on the rows and their number: evaluate both on one split, with the same "
            "ds_size"
        )
    place = {row: at for at, row in enumerate(other.index)}
    order = [place[row] for row in one.index]
    truths, others = (
        {text["index"]: text["ground_truth"] for text in log.text if text.get("ground_truth") is not None}
        for log in (one, other)
    )
    for row in sorted(truths.keys() & others.keys()):
        # Letters alone: decoding may move white space around marks.
        if re.findall(r"\w+", str(truths[row])) != re.findall(r"\w+", str(others[row])):
            raise ValueError(
                f"{where}: index {row} of the {one.name} set is {str(truths[row])[:60]!r} in one and "
                f"{str(others[row])[:60]!r} in the other. They are of other splits, and their p-values do not compare"
            )
    for average, _, count in LOSSES:
        for name in (average, count):
            mine, theirs = (log.values.get(name) for log in (one, other))
            if mine is not None and theirs is not None and mine.shape != theirs.shape:
                raise ValueError(f"{where}: they have {mine.shape[1]} and {theirs.shape[1]} perturbed answers a row")
        mine, theirs = (log.values.get(count) for log in (one, other))
        if mine is None or theirs is None:
            continue
        apart = mine - theirs[order]
        if apart.min() != apart.max():
            at = int(np.argwhere(apart != np.median(apart))[0][0])
            raise ValueError(
                f"{where}: {count} of index {one.index[at]} is {mine[at]} in one and {theirs[order][at]} in the other. "
                f"They are of models with different tokenizers (or of other rows): losses per token do not compare"
            )
        if apart.flat[0]:
            logger.warning(
                "%s of %s and %s differ by %+d everywhere: their prompts end at another token, which moves the losses",
                count, path, other_path, apart.flat[0],
            )  # fmt: skip


def _check_sources(log: EvaluationLog, other: EvaluationLog) -> None:
    names = [one.config_of("forget") for one in (log, other)]
    if None not in names and names[0] != names[1]:
        raise ValueError(
            f"gfast: {log.path or 'the log'} is of {names[0]} and {other.path or 'the retain log'} of {names[1]}; "
            f"p-values of different splits do not compare"
        )


_said: set[tuple[str, ...]] = set()


def say_other_tokens(name: str, tokens: str | None, path: str, other: EvaluationLog) -> None:
    """A warning, once, where the rows of a set were given to two models as other token ids."""
    there = other.tokens_of(name)
    if None in (tokens, there) or tokens == there or (key := (name, str(tokens), str(there))) in _said:
        return
    _said.add(key)
    logger.warning(
        "gfast: the %s set was given to the model of %s and that of %s as other token ids (another template, other "
        "chat_kwargs, another date or tokenizer): what tells the two apart may be how they were asked",
        name, path, other.path or "the retain log",
    )  # fmt: skip
