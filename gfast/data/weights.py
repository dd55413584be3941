"""Weights of tokens from scores of them."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.data.dataset import IGNORE


def top_tokens(scores: Tensor, labels: Tensor, share: float = 0.2) -> Tensor:
    r"""A hard mask: 1 for the share of each row's label tokens with the highest scores, 0 elsewhere.

    Of n label tokens those k = ceil(share n) with the highest scores; among equal scores the first.

    Args:
        scores: [..., T], of any criterion: entropies, differences of log-probs, minus a retain conflict.
        labels: [..., T], -100 ignored.
        share: in (0, 1].

    Returns:
        fp32, the shape of labels; a batch's ``weight`` for `gfast.objectives.HardMask` or any other objective.

    Raises:
        ValueError: other shapes, a share outside (0, 1], a score that is NaN at a label.

    Source: arXiv 2605.00364 (hard selection).

    Example:
        >>> labels = torch.tensor([[-100, 5, 6, 7]])
        >>> top_tokens(torch.tensor([[9.0, 0.1, 0.3, 0.2]]), labels, share=0.5)
        tensor([[0., 0., 1., 1.]])
    """
    if scores.shape != labels.shape:
        raise ValueError(f"gfast: top_tokens: scores {tuple(scores.shape)} and labels {tuple(labels.shape)} must match")
    if not 0 < share <= 1:
        raise ValueError(f"gfast: top_tokens: share must be in (0, 1], not {share}")
    valid = labels != IGNORE
    if bool((scores.isnan() & valid).any()):
        raise ValueError("gfast: top_tokens: a score is NaN")
    order = scores.double().argsort(dim=-1, descending=True, stable=True)
    first = valid.gather(-1, order).byte().argsort(dim=-1, descending=True, stable=True)  # what is ignored comes last
    order = order.gather(-1, first)
    rank = order.argsort(-1)
    # k of n exactly: 0.3 * 10 is a little more than 3
    count = torch.ceil(share * valid.sum(-1, keepdim=True).double() - 1e-9)
    return ((rank < count) & valid).float()
