"""Objectives that are no weighted sum of token log-probs: KL to the original model, and RMU / RR on hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gfast.objectives.base import Objective
from gfast.ops.checks import check_normalizer


@dataclass(frozen=True)
class KL(Objective):
    r"""Keep the original model's predictions: :math:`L = \frac1N \sum_i \mathrm{KL}(p_o(\cdot | s_{<i}) \,\|\, p(\cdot
    | s_{<i}))`, mean over the valid tokens of retain data.

    Source: Maini et al., arXiv 2401.06121; arXiv 2502.19301, appendix. open-unlearning: the retain loss "KL".

    Example:
        >>> KL().key
        'kl'
    """

    key: ClassVar[str] = "kl"
    gradient: ClassVar[str] = "of logits: softmax(z) - p_o"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_hidden", "ref_head"})


@dataclass(frozen=True)
class RMU(Objective):
    r"""Representation misdirection: :math:`L = \frac1N \sum_i \|h_l^{(i)} - c u\|^2 / D` over valid positions.

    ``u`` is drawn once, uniformly from :math:`[0, 1)^D`, from ``seed``: the same seed gives the same direction on
    every device.
    The 1/D is the published code's scale; the paper's equation 8 has none.

    Attributes:
        layer: l, counted as in ``hidden_states[l]`` (0 = embeddings). c: steering coefficient. seed: of u.

    Source: arXiv 2403.03218; arXiv 2502.19301, equation 8. open-unlearning: RMU.

    Example:
        >>> RMU(layer=7, c=5.0).direction(4).shape
        torch.Size([4])
    """

    layer: int
    c: float = 5.0
    seed: int = 0
    key: ClassVar[str] = "rmu"
    gradient: ClassVar[str] = "of hidden states"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layer(self)

    def direction(self, size: int) -> Tensor:
        """u in [0, 1)^D, fp32 on the CPU."""
        return torch.rand(
            size, generator=torch.Generator("cpu").manual_seed(self.seed), dtype=torch.float32, device="cpu"
        )

    def value(self, hidden: Tensor, valid: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        """The loss from hidden states [B, T, D] and the bool mask of valid positions [B, T]."""
        target = self.c * self.direction(hidden.shape[-1]).to(hidden.device)  # [D]
        return _mean_square(self, _wide(hidden) - target, valid, normalizer)


@dataclass(frozen=True)
class RR(Objective):
    r"""Representation retention: :math:`L = \frac1N \sum_i \|h_l^{(i)} - h_{l,o}^{(i)}\|^2 / D` over valid retain
    positions.

    The original's hidden states of that layer come with the batch (``ref_layer_hidden``), from a ReferenceCache.

    Attributes:
        layer: l, counted as in ``hidden_states[l]``.

    Source: arXiv 2403.03218; arXiv 2502.19301, appendix.

    Example:
        >>> sorted(RR(layer=7).needs)
        ['ref_layer_hidden']
    """

    layer: int
    key: ClassVar[str] = "rr"
    gradient: ClassVar[str] = "of hidden states"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_layer_hidden"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layer(self)

    def value(
        self, hidden: Tensor, ref_hidden: Tensor, valid: Tensor, normalizer: float | Tensor | None = None
    ) -> Tensor:
        """The loss from hidden states and the original's [B, T, D], and the bool mask of valid positions [B, T]."""
        return _mean_square(self, _wide(hidden) - _wide(ref_hidden.detach()), valid, normalizer)


def _check_layer(objective: RMU | RR) -> None:
    objective._require(objective.layer >= 0, "layer must be >= 0: hidden states are counted from the embeddings.")


def _wide(hidden: Tensor) -> Tensor:
    """In fp32; fp64 as it is."""
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def _mean_square(objective: Objective, difference: Tensor, valid: Tensor, normalizer: float | Tensor | None) -> Tensor:
    per_position = difference.square().mean(-1)  # [B, T]
    total = torch.where(valid, per_position, 0.0).sum()
    if normalizer is not None:
        check_normalizer(str(objective), normalizer)
    return total / (valid.sum().clamp(min=1) if normalizer is None else normalizer)
