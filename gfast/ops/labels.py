"""Labels before a kernel reads them: whether all are in range, and what a mean over those that count is divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops import checks
from gfast.ops.checks import IGNORE_INDEX, check_label_range
from gfast.ops.dispatch import compiled, why_not


def label_factor_reference(name: str, labels: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """The literal definition; see ``label_factor``."""
    check_label_range(name, labels, vocab)
    return (labels != IGNORE_INDEX).sum().clamp(min=1).to(dtype).reciprocal()


def label_factor(name: str, labels: Tensor, vocab: int, dtype: torch.dtype, impl: str) -> Tensor:
    """1 / max(1, number of labels [N] that count), 0-dim, after a check that every label is in [0, V) or -100.

    One kernel of ``impl`` (Triton's for "cuda") instead of a dozen small ones. On a GPU the check is a device-side
    assertion.
    """
    if impl == "cpp" and compiled("label_factor"):
        return torch.ops.gfast.label_factor(name, labels, vocab)
    if impl != "triton" and (impl != "cuda" or why_not("unlearn_loss", "triton", labels.device)):
        return label_factor_reference(name, labels, vocab, dtype)
    from gfast.kernels.labels import label_factor as launch

    factor, good = launch(labels, vocab)
    if not checks.reads_are_free(labels.device):
        torch._assert_async(good, f"gfast: {name}: a label is outside the vocabulary [0, {vocab})")
    elif not good:
        check_label_range(name, labels, vocab)
    return factor
