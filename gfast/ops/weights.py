"""Token weights of objectives: the protocol of an objective, and the numbers of the built-in ones, which kernels and
tensors understand alike.

The gradient of these objectives is ``sum_i w_i grad logp_i`` with detached weights. All of them are one of two
families:

    token:     log w_i = p_pow log p_i + q_pow log(1 - p_i) + [beta > 0] (log 2 + log sigmoid(beta (logp_i - ref_i)))
    sequence:  w_i = 2 sigmoid(x_s) / len_s^length_norm,  value_s = (2 / beta) softplus(x_s)

with ``x_s = beta (S_s - S_ref_s)`` (NPO), ``beta (S_s / len_s + delta)`` (SimNPO) or ``beta (D_rejected -
D_preferred)`` (DPO, level "pair"), where ``S_s`` is the summed log-prob of sequence s and ``D = S - S_ref``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gfast.ops.checks import (
    IGNORE_INDEX,
    check_like_labels,
    check_reduction,
    check_weight,
    reads_are_free,
    runs_now,
)
from gfast.ops.reductions import LossOutput, Tokens
from gfast.ops.stat_spec import stat_spec_of


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
    """Weights [N] of a spec of level "token" from log-probs [N] of the labels, fp32 or fp64.

    ``log_others`` is log(1 - p) [N], where that is known better than from logp: in fp32, logp is 0 for p within 1e-45
    of 1, and a power of 1 - p with it (the gradient, 1 - p times that power, is 0 either way).
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
    spec: WeightSpec, logp: Tensor, ref_logp: Tensor | None, valid: Tensor, sequence_id: Tensor, num_sequences: int
) -> tuple[Tensor, Tensor]:
    """Weights [N] (0 where ignored) of a spec of level "sequence" or "pair", and the value of each sequence [S] or pair
    [S/2] (0 where it has no valid token); of a pair, sequence s < S/2 is rejected and s + S/2 its preferred partner.

    ``logp``, ``ref_logp`` [N] are 0 where ``valid`` is false; ``sequence_id``: int64 [N], in [0, S).
    """
    # fp64 sums: exact enough that the order in which a GPU adds cannot be seen in the fp32 weights
    delta_logp = logp if not spec.uses_ref else logp - ref_logp  # [N]
    sums = torch.zeros(num_sequences, dtype=torch.float64, device=logp.device)
    sums = sums.index_add(0, sequence_id, torch.where(valid, delta_logp, 0).double())  # [S]
    length = torch.zeros_like(sums).index_add(0, sequence_id, valid.double())  # [S]
    present = length > 0
    if spec.level == "pair":
        half = num_sequences // 2
        x = spec.beta * (sums[:half] - sums[half:])  # [S/2]
        present = present[:half] | present[half:]
    else:
        mean_or_sum = sums / length.clamp(min=1.0) if spec.length_norm else sums
        x = spec.beta * (mean_or_sum + spec.delta)  # [S]
    value = (2.0 / spec.beta) * torch.nn.functional.softplus(x)
    per_sequence = spec.sign * 2.0 * torch.sigmoid(x)  # [S]
    if spec.level == "pair":
        per_sequence = torch.cat([per_sequence, -per_sequence])
    if spec.length_norm:
        per_sequence = per_sequence / length.clamp(min=1.0)
    weight = torch.where(valid, per_sequence[sequence_id], 0.0).to(logp.dtype)  # [N]
    value = torch.where(present, value, 0.0).to(logp.dtype)
    return weight, value


def spec_of(objective) -> WeightSpec | None:
    """The numbers of a built-in objective (which may be given for it); None for a callable of the user's own."""
    if isinstance(objective, WeightSpec):
        return objective
    is_class = isinstance(objective, type)
    spec = getattr(objective, "spec", None)
    if spec is not None and not is_class:
        return spec()
    if not is_class and callable(getattr(objective, "weigh", None)):
        return None
    if not callable(objective) or is_class:
        name = getattr(objective, "__name__", type(objective).__name__)
        raise TypeError(
            f"gfast: {name}: no token-weight objective. Pass an objective such as WGA(alpha=1.0) (an instance) or a "
            f"callable (logp, ref_logp, sequence_id) -> weights; KL goes through token_kl, targets over the vocabulary "
            f"through soft_target_loss, and all of them through model_loss."
        )
    return None


def kernel_spec(objective) -> WeightSpec | None:
    """``spec_of``; None also for a loss of the statistics of rows, which has numbers of its own."""
    return spec_of(objective) if stat_spec_of(objective) is None else None


def is_pair(objective) -> bool:
    spec = kernel_spec(objective)
    return spec is not None and spec.level == "pair"


def default_reduction(objective) -> str:
    return getattr(objective, "default_reduction", "token_mean")


def weigh(objective, logp, ref_logp, valid, sequence_id, num_sequences) -> tuple[Tensor, Tensor]:
    """Detached weights [N] and values (of tokens [N], sequences [S] or pairs [S/2]), by a spec if the objective has
    one; see ``sequence_weights``. Only a level above "token" reads ``sequence_id``."""
    spec = spec_of(objective)
    if spec is None:
        if (whole := getattr(objective, "weigh", None)) is not None:  # of one that is told which tokens count
            weight, value = whole(logp, ref_logp, valid, sequence_id, num_sequences)
            return torch.where(valid, weight.detach(), 0.0), torch.where(valid, value.detach(), 0.0)
        weight = torch.as_tensor(objective(logp, ref_logp, sequence_id), dtype=logp.dtype, device=logp.device)
        if weight.shape != logp.shape:
            shapes = f"{tuple(weight.shape)}, not {tuple(logp.shape)}"
            raise ValueError(f"gfast: objective: the weight callable returned shape {shapes}.")
        weight = torch.where(valid, weight.detach(), 0.0)
    elif spec.level == "token":
        weight = torch.where(valid, token_weights(spec, logp, ref_logp), 0.0)
    else:
        return sequence_weights(spec, logp, ref_logp, valid, sequence_id, num_sequences)
    return weight, weight * logp


def check_reference(name: str, objective, ref_logp: Tensor | None, labels: Tensor) -> None:
    """An objective that needs a reference has one, of the right shape."""
    spec = kernel_spec(objective)
    uses_ref = "ref_logp" in getattr(objective, "needs", ()) if spec is None else spec.uses_ref
    if uses_ref and ref_logp is None:
        raise ValueError(
            f"gfast: {name}: {objective} needs ref_logp, the log-probs of the labels under the original model. Compute "
            f"them once with gfast.ReferenceCache, or with gfast.token_logp under torch.no_grad()."
        )
    if ref_logp is not None:
        check_like_labels(name, "ref_logp", ref_logp, labels)


def check_given(name: str, objective, weight: Tensor | None, labels: Tensor) -> None:
    """Weights beside the objective's own: there where it needs them, like labels, and what it allows."""
    if weight is None:
        if "weight" in getattr(objective, "needs", ()):
            raise ValueError(
                f"gfast: {name}: {objective} needs weight, a number for each label (over a model the batch's 'weight')."
            )
        return
    check_weight(name, weight, labels)
    allowed = getattr(objective, "weight_range", None)
    if allowed is None or not runs_now(weight) or not runs_now(labels):
        return
    checked = torch.where(labels != IGNORE_INDEX, weight, allowed[0])
    good = (checked >= allowed[0]) & (checked <= allowed[1])
    words = f"weights v in [{allowed[0]:g}, {allowed[1]:g}]"
    if objective.whole_weights:
        good, words = good & (checked == checked.round()), f"weights v that are {allowed[0]:g} or {allowed[1]:g}"
    if not reads_are_free(weight.device):
        torch._assert_async(good.all(), f"gfast: {name}: {objective} takes {words}")
    elif not bool(good.all()):
        where = tuple((~good).nonzero()[0].tolist())
        raise ValueError(
            f"gfast: {name}: {objective} takes {words}, and weight{list(where)} is {float(weight[where])}."
        )


class Terms(NamedTuple):
    """An objective and what a loss sums, all but the log-probs.

    Attributes:
        name: of the public op, for messages.
        spec: of the objective; None for a callable, which may look at all tokens, and where there is a StatSpec.
        labels: [...]. sequence_id: [...] or None. ref_logp: [N] or None.
        tokens: the labels, flat, and their sequences where something depends on those.
        given: [N], weights beside the objective's own, 0 where ignored; or None.
    """

    name: str
    objective: object
    spec: WeightSpec | None
    labels: Tensor
    sequence_id: Tensor | None
    ref_logp: Tensor | None
    tokens: Tokens
    reduction: str
    normalizer: float | Tensor | None
    given: Tensor | None

    @classmethod
    def of(cls, name, objective, labels, ref_logp, reduction, sequence_id=None, normalizer=None, weight=None) -> Terms:
        """Of a loss's arguments, after checks."""
        spec, stat = kernel_spec(objective), stat_spec_of(objective)
        if ref_logp is not None or spec is None or spec.uses_ref:
            check_reference(name, objective, ref_logp, labels)
        if weight is not None or spec is None or getattr(objective, "needs", None):
            check_given(name, objective, weight, labels)
        reduction = reduction or default_reduction(objective)
        check_reduction(name, reduction)
        level = stat.level if stat else "any" if spec is None else spec.level
        tokens = Tokens.of(name, labels, sequence_id, level, reduction)
        ref = None if ref_logp is None else ref_logp.detach().reshape(-1)  # the original does not learn
        given = None if weight is None else torch.where(tokens.valid, weight.detach().reshape(-1), 0)
        return cls(name, objective, spec, labels, sequence_id, ref, tokens, reduction, normalizer, given)

    @property
    def by_token(self) -> bool:
        """Whether a weight depends on its own token alone."""
        return self.spec is not None and self.spec.level == "token"

    @property
    def counts_labels(self) -> bool:
        """Whether the sum is divided by the number of labels that count."""
        return self.reduction == "token_mean" and self.normalizer is None

    def factor(self, dtype: torch.dtype) -> Tensor:
        """Of the sum over tokens or sequences, 0-dim."""
        return self.tokens.factor(self.reduction, self.normalizer, dtype)

    def reference(self, dtype: torch.dtype) -> Tensor | None:
        """ref_logp [N] in a dtype, a constant."""
        return None if self.ref_logp is None else self.ref_logp.to(dtype).contiguous()

    @property
    def whole(self) -> bool:
        """Whether values are of whole sequences or pairs."""
        return self.spec is not None and self.spec.level != "token"

    def own(self, logp: Tensor, ref_logp: Tensor | None) -> tuple[Tensor, Tensor]:
        """``weigh`` of all tokens, without the weights that were given."""
        tokens = self.tokens
        return weigh(self.spec or self.objective, logp, ref_logp, tokens.valid, tokens.ids, tokens.count)

    def times_given(self, weight: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N] and values times the weights that were given, if any; the value of a sequence times their mean
        over its tokens."""
        if self.given is None:
            return weight, value
        given = self.given.to(weight.dtype)
        return weight * given, value * (self.tokens.mean(given) if self.whole else given)

    def weigh(self, logp: Tensor, ref_logp: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights [N] of all tokens, and values as of ``weigh``."""
        return self.times_given(*self.own(logp, ref_logp))

    def given_as(self, dtype: torch.dtype) -> Tensor | None:
        """The weights that were given [N] in a dtype."""
        return None if self.given is None else self.given.to(dtype)

    def output(self, loss: Tensor, logp: Tensor, weight: Tensor) -> LossOutput:
        """The result, from logp and weight [N]."""
        return LossOutput(loss, logp.reshape(self.labels.shape), weight.reshape(self.labels.shape))
