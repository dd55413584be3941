# SPDX-License-Identifier: Apache-2.0
"""Running an evaluation: losses, generations and extractions of a model, into a log that `gfast.metrics` reads."""

from typing import Any

from gfast.evaluation.run import Evaluation
from gfast.evaluation.samples import EvaluationSet, Sample, encoded

__all__ = ["EvaluateCallback", "Evaluation", "EvaluationSet", "Sample", "encoded"]


def __getattr__(name: str) -> Any:
    if name == "EvaluateCallback":  # brings transformers' trainer, seconds of import that the command does without
        from gfast.evaluation.callback import EvaluateCallback

        return EvaluateCallback
    raise AttributeError(f"module 'gfast.evaluation' has no attribute {name!r}")
