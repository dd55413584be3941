# SPDX-License-Identifier: Apache-2.0
"""Running an evaluation: losses, generations and extractions of a model, into a log that `gfast.metrics` reads; and a
model's own answers, to be forgotten too.
"""

from typing import Any

from gfast.evaluation.own_answers import own_answers
from gfast.evaluation.run import Evaluation
from gfast.evaluation.samples import EvaluationSet, Sample, encoded

__all__ = ["EvaluateCallback", "Evaluation", "EvaluationSet", "Sample", "encoded", "own_answers"]


def __getattr__(name: str) -> Any:
    if name == "EvaluateCallback":  # brings transformers' trainer, seconds of import that the command does without
        from gfast.evaluation.callback import EvaluateCallback

        return EvaluateCallback
    raise AttributeError(f"module 'gfast.evaluation' has no attribute {name!r}")
