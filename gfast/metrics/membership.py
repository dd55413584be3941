# SPDX-License-Identifier: Apache-2.0
"""Membership inference: scores of single answers, how well they tell two sets apart, and PrivLeak.

Every score grows with the loss: high says that the answer was not trained on.
"""

from __future__ import annotations

import zlib
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from gfast.metrics.values import log_probabilities, numbers, required


class TokenStatistics(NamedTuple):
    """Of N answer tokens: `logp` of the token; mean `mu`, variance `var` of log p over the vocabulary under p; [N]."""

    logp: Any
    mu: Any
    var: Any


def min_k(logp: Any, k: float) -> float:
    r"""Min-K%: minus the mean of the least likely tokens' log-probabilities.

    .. math:: -\frac{1}{n} \sum_{i \in \text{n lowest}} \log p_i, \quad n = \max(1, \lfloor N k \rfloor)

    Args:
        logp: [N], log p of the answer's tokens in nats; open-unlearning leaves the token that ends the answer out.
        k: share of the tokens, in (0, 1]; TOFU's and MUSE's configurations of open-unlearning use 0.4.

    Errors: ValueError for no token, a value that is not finite or above 0, k outside (0, 1].

    Source: Shi et al., arXiv 2310.16789.

    >>> round(min_k([-0.6931472, -1.2039728, -0.2231436], 0.7), 6)
    0.94856
    """
    return _lowest(log_probabilities("logp", logp), k)


def min_k_plus_plus(given: Any, k: float, labels: Any = None) -> float:
    r"""Min-K%++: as `min_k`, of log-probabilities standardised over the vocabulary.

    .. math:: z_i = \frac{\log p_i - \mu_i}{\sqrt{\max(\sigma_i^2, 10^{-6})}}, \quad \mu_i = \sum_v p_v \log p_v, \quad
        \sigma_i^2 = \sum_v p_v (\log p_v)^2 - \mu_i^2

    Args:
        given: logits [N, V] that score the answer's tokens, or their `TokenStatistics` (logp, mu, var).
        k: share of the tokens, in (0, 1].
        labels: [N], the answer's token ids; needed with logits.

    Errors: ValueError for no token, values that are not finite, lengths that differ, a label outside the vocabulary.

    Source: Zhang et al., arXiv 2404.02936; the bound of the variance is open-unlearning's.

    >>> import numpy as np
    >>> p = np.array([[.2, .2, .5, .1], [.3, .6, .05, .05], [.05, .8, .1, .05]])
    >>> round(min_k_plus_plus(np.log(p), 0.7, labels=[2, 0, 1]), 6)
    -0.087753
    """
    if labels is not None and (isinstance(given, TokenStatistics) or hasattr(given, "keys")):
        raise ValueError("gfast: labels choose from logits [N, V], and statistics are of the labels already: give one")
    statistics = _statistics(given) if labels is None else token_statistics(given, labels)
    logp, mu, var = (numbers(name, x) for name, x in zip(statistics._fields, statistics, strict=True))
    log_probabilities("logp", logp)
    if var.min() < -1e-6:
        raise ValueError(f"gfast: var[{int(var.argmin())}] is {var.min():g}, and a variance is at least 0")
    if not logp.shape == mu.shape == var.shape:
        raise ValueError(f"gfast: logp, mu and var must be of the same tokens, got {logp.size}, {mu.size} and "
                         f"{var.size}")  # fmt: skip
    return _lowest((logp - mu) / np.sqrt(np.maximum(var, 1e-6)), k)


def token_statistics(logits: Any, labels: Any) -> TokenStatistics:
    """What Min-K%++ needs of logits [N, V] that score labels [N]; fp64.

    >>> token_statistics([[0.0, 0.0]], [1]).mu.round(4)
    array([-0.6931])
    """
    rows = numbers("logits", logits, 2)
    given = numbers("labels", labels)
    at = given.astype(np.int64)
    if (at != given).any():
        raise ValueError(f"gfast: labels[{int((at != given).argmax())}] is no token id, which is a whole number")
    if at.size != len(rows):
        raise ValueError(f"gfast: {len(rows)} rows of logits score {len(rows)} labels, got {at.size}")
    if at.min() < 0 or at.max() >= rows.shape[1]:
        raise ValueError(f"gfast: a label is outside the vocabulary [0, {rows.shape[1]}): {at.min()} to {at.max()}")
    shifted = rows - rows.max(1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))  # [N, V]
    p = np.exp(logp)
    mu = (p * logp).sum(1)
    return TokenStatistics(logp[np.arange(len(rows)), at], mu, (p * (logp - mu[:, None]) ** 2).sum(1))


def _statistics(given: Any) -> TokenStatistics:
    if hasattr(given, "keys"):
        missing = [name for name in TokenStatistics._fields if name not in given]
        if missing:
            raise ValueError(f"gfast: the statistics lack {', '.join(missing)}")
        return TokenStatistics(*(given[name] for name in TokenStatistics._fields))
    if isinstance(given, (tuple, list)) and len(given) == 3 and all(np.ndim(part) == 1 for part in given):
        return TokenStatistics(*given)
    raise ValueError("gfast: give logits [N, V] with labels=, or statistics (logp, mu, var), [N] each")


def _lowest(values: np.ndarray, k: float) -> float:
    if not (isinstance(k, Real) and 0 < k <= 1):
        raise ValueError(f"gfast: k is {k!r}; give the share of the tokens, above 0 and at most 1")
    return float(-np.sort(values)[: max(1, int(values.size * k))].mean())


def zlib_score(loss: float, text: str) -> float:
    """Mean NLL of an answer over the bytes that zlib makes of its text.

    >>> round(zlib_score(0.9324253, "cab"), 6)
    0.084766
    """
    if not text:
        raise ValueError("gfast: the text of the answer is empty")
    return float(numbers("loss", [loss])[0]) / len(zlib.compress(text.encode()))


def mia_auc(forget: Any, holdout: Any) -> float:
    """Area under the ROC curve of a score that should be higher on the holdout set: P(holdout > forget) + ties / 2.

    Args:
        forget: [S], scores of answers that were trained on, and perhaps forgotten.
        holdout: [H], scores of like answers that no model saw.

    Returns:
        1: the forget set looks trained on; 0.5: the score cannot tell.

    Errors: ValueError for an empty set or a score that is not finite; ImportError without scikit-learn.

    >>> mia_auc([0.1, 0.5, 0.9, 1.2], [0.4, 1.0, 1.5, 2.0])  # doctest: +SKIP
    0.75
    """
    forget, holdout = numbers("forget", forget), numbers("holdout", holdout)
    metrics = required("sklearn.metrics", "scikit-learn", "mia_auc")
    label = np.concatenate([np.zeros(forget.size), np.ones(holdout.size)])
    return float(metrics.roc_auc_score(label, np.concatenate([forget, holdout])))


def privleak(auc: float, auc_retain: float = 0.5) -> float:
    r"""PrivLeak in percent: how far the attack's AUC is from that on a model that never saw the forget set.

    .. math:: 100 \cdot \frac{(1 - AUC) - (1 - AUC_{retain})}{(1 - AUC_{retain}) + 10^{-10}}

    Args:
        auc: `mia_auc` of the unlearned model; MUSE and open-unlearning take Min-K% with k = 0.4.
        auc_retain: that of the model trained without the forget set; without one, 0.5 is what guessing gives.

    Returns:
        0 is best; negative: the set is still remembered, positive: it is avoided more than an unseen set would be.

    Errors: ValueError for an AUC outside [0, 1].

    Source: Shi et al., MUSE, arXiv 2407.06460, in open-unlearning's form.

    >>> round(privleak(0.75), 4), round(privleak(0.95, 0.4), 4)
    (-50.0, -91.6667)
    """
    return _relative(1 - _auc("auc", auc), 1 - _auc("auc_retain", auc_retain))


def relative_difference(auc: float, auc_reference: float = 0.5) -> float:
    """Open-unlearning's `rel_diff` in percent: 100 (AUC - reference) / (reference + 1e-10).

    >>> round(relative_difference(0.95, 0.4), 4)
    137.5
    """
    return _relative(_auc("auc", auc), _auc("auc_reference", auc_reference))


def _relative(value: float, reference: float) -> float:
    return 100 * (value - reference) / (reference + 1e-10)


def _auc(name: str, value: float) -> float:
    auc = float(numbers(name, [value])[0])
    if not 0 <= auc <= 1:
        raise ValueError(f"gfast: {name} is {auc:g}; an AUC lies between 0 and 1 (not in percent)")
    return auc
