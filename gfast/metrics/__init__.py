# SPDX-License-Identifier: Apache-2.0
"""What unlearning is judged by: forget quality, model utility, extraction, membership inference; from logs and numbers.

Every function is pure: it reads a log (`load_log`) or numbers, and runs no model. `docs/evaluation.md` says which
convention is whose.
"""

from gfast.metrics.answers import (
    aggregate,
    knowledge,
    model_utility,
    option_probability,
    probability,
    rouge,
    rouge_scores,
    truth_ratio,
    truth_ratios,
)
from gfast.metrics.extraction import continuation_matches, prefix_extraction
from gfast.metrics.log import EvaluationLog, LogSet, load_log
from gfast.metrics.membership import (
    TokenStatistics,
    mia_auc,
    min_k,
    min_k_plus_plus,
    privleak,
    relative_difference,
    token_statistics,
    zlib_score,
)
from gfast.metrics.memorization import exact_memorization, extraction_strength
from gfast.metrics.quality import ForgetQuality, forget_quality, same_distribution

__all__ = [
    "EvaluationLog",
    "ForgetQuality",
    "LogSet",
    "TokenStatistics",
    "aggregate",
    "continuation_matches",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "knowledge",
    "load_log",
    "mia_auc",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "option_probability",
    "prefix_extraction",
    "privleak",
    "probability",
    "relative_difference",
    "rouge",
    "rouge_scores",
    "same_distribution",
    "token_statistics",
    "truth_ratio",
    "truth_ratios",
    "zlib_score",
]
