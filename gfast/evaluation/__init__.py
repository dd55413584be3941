# SPDX-License-Identifier: Apache-2.0
"""Running an evaluation: losses, generations and extractions of a model, into a log that `gfast.metrics` reads."""

from gfast.evaluation.callback import EvaluateCallback
from gfast.evaluation.run import Evaluation
from gfast.evaluation.samples import EvaluationSet, Sample, encoded

__all__ = ["EvaluateCallback", "Evaluation", "EvaluationSet", "Sample", "encoded"]
