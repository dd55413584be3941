"""Token weights of the built-in objectives, as numbers that kernels and tensors understand alike.

The gradient of these objectives is ``sum_i w_i grad logp_i`` with detached weights. All of them are one of two
families:

    token:     log w_i = p_pow log p_i + q_pow log(1 - p_i) + [beta > 0] (log 2 + log sigmoid(beta (logp_i - ref_i)))
    sequence:  w_i = 2 sigmoid(x_s) / len_s^length_norm,  value_s = (2 / beta) softplus(x_s)

with ``x_s = beta (S_s - S_ref_s)`` (NPO), ``beta (S_s / len_s + delta)`` (SimNPO) or ``beta (D_rejected -
D_preferred)``
(DPO, level "pair"), where ``S_s`` is the summed log-prob of sequence s and ``D = S - S_ref``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class WeightSpec(NamedTuple):
    """A member of the family: see the module docstring for the symbols."""

    level: str = "token"  # "token", "sequence" or "pair"
    sign: float = 1.0
    p_pow: float = 0.0
    q_pow: float = 0.0
    beta: float = 0.0
    delta: float = 0.0
    length_norm: bool = False
    uses_ref: bool = False

    def numbers(self) -> list[float]:
        """The fields behind ``level`` as floats, the form in which they cross the dispatcher."""
        return [float(field) for field in self[1:]]

    @classmethod
    def from_numbers(cls, level: str, numbers: list[float]) -> WeightSpec:
        sign, p_pow, q_pow, beta, delta, length_norm, uses_ref = numbers
        return cls(level, sign, p_pow, q_pow, beta, delta, bool(length_norm), bool(uses_ref))


def token_weights(spec: WeightSpec, logp: Tensor, ref_logp: Tensor | None, log_others: Tensor | None = None) -> Tensor:
    """Token-level weights.

    Args:
        spec: a spec of level "token".
        logp: log-probs [N] of the labels, fp32 or fp64.
        ref_logp: the same under the reference model [N]; only read when ``spec.uses_ref``.
        log_others: log(1 - p) [N], where that is known better than from logp: in fp32, logp is 0 for p within 1e-45
            of 1, and a power of 1 - p with it (the gradient, 1 - p times that power, is 0 either way).

    Returns:
        weights [N], dtype of ``logp``.
    """
    log_w = torch.zeros_like(logp)  # [N]
    if spec.p_pow:
        log_w = log_w + spec.p_pow * logp
    if spec.q_pow:
        log_w = log_w + spec.q_pow * (torch.log(-torch.expm1(logp)) if log_others is None else log_others)
    if spec.beta:
        log_w = log_w + math.log(2.0) + torch.nn.functional.logsigmoid(spec.beta * (logp - ref_logp))
    return spec.sign * torch.exp(log_w)


def sequence_weights(
    spec: WeightSpec,
    logp: Tensor,
    ref_logp: Tensor | None,
    valid: Tensor,
    sequence_id: Tensor,
    num_sequences: int,
) -> tuple[Tensor, Tensor]:
    """Weights that depend on whole sequences.

    Args:
        spec: a spec of level "sequence" or "pair".
        logp, ref_logp: [N], 0 where ignored.
        valid: bool [N], label is not -100.
        sequence_id: int64 [N], values in [0, num_sequences).
        num_sequences: S; for level "pair" sequence s < S/2 is rejected and s + S/2 its preferred partner.

    Returns:
        weights [N] (0 where ignored) and the value of each sequence or pair [S] (0 where it has no valid token).
    """
    # fp64 sums: exact enough that the order in which a GPU adds cannot be seen in the fp32 weights
    delta_logp = logp if not spec.uses_ref else logp - ref_logp  # [N]
    sums = torch.zeros(num_sequences, dtype=torch.float64, device=logp.device)
    sums = sums.index_add(0, sequence_id, torch.where(valid, delta_logp, 0).double())  # [S]
    length = torch.zeros_like(sums).index_add(0, sequence_id, valid.double())  # [S]
    present = length > 0
    side = torch.ones_like(sums)
    if spec.level == "pair":
        half = num_sequences // 2
        x = spec.beta * (sums[:half] - sums[half:])  # [S/2]
        counted = present[:half] | present[half:]
        value = (2.0 / spec.beta) * torch.nn.functional.softplus(x)
        x = torch.cat([x, x])
        side[half:] = -1.0
    else:
        mean_or_sum = sums / length.clamp(min=1.0) if spec.length_norm else sums
        x = spec.beta * (mean_or_sum + spec.delta)  # [S]
        counted = present
        value = (2.0 / spec.beta) * torch.nn.functional.softplus(x)
    per_sequence = spec.sign * side * 2.0 * torch.sigmoid(x)  # [S]
    if spec.length_norm:
        per_sequence = per_sequence / length.clamp(min=1.0)
    weight = torch.where(valid, per_sequence[sequence_id], 0.0).to(logp.dtype)  # [N]
    value = torch.where(counted, value, 0.0).to(logp.dtype)
    return weight, value


def weights_and_values(
    spec: WeightSpec,
    logp: Tensor,
    ref_logp: Tensor | None,
    valid: Tensor,
    sequence_id: Tensor,
    num_sequences: int,
) -> tuple[Tensor, Tensor]:
    """``sequence_weights`` of a spec of any level; at level "token" the values are those of the tokens [N]."""
    if spec.level != "token":
        return sequence_weights(spec, logp, ref_logp, valid, sequence_id, num_sequences)
    weight = torch.where(valid, token_weights(spec, logp, ref_logp), 0.0)
    return weight, weight * logp
