"""The G-effect of an objective from effects of samples or tokens.

A G-effect is linear in the gradient of its objective, and that gradient is a weighted sum of log-prob gradients. So
effects of tokens, measured once, give the G-effect of every objective with token weights and of every setting of its
hyper-parameters; effects of samples give it where every token of a sample has the same weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gfast.geffect.data import OWN_DATA
from gfast.geffect.results.base import Effect, Norms, standard_error
from gfast.geffect.results.g_effect import GEffect
from gfast.objectives import Objective
from gfast.ops.weights import WeightSpec, default_reduction, kernel_spec
from gfast.sides import SIDES


def sample_ids(tokens: Tensor) -> Tensor:
    """The sample of each token, int64 [N], from the number of tokens of each sample [S]."""
    return torch.repeat_interleave(torch.arange(len(tokens), device="cpu"), tokens)


def spec_on_forget(objective: Objective) -> WeightSpec | None:
    """The weights of an objective on the log-probs of the forget set; None where they are no such formula."""
    spec = getattr(objective, "spec", None)
    if not callable(spec) or objective.needs & OWN_DATA:
        return None
    spec_found = kernel_spec(objective)
    return None if spec_found.level == "pair" else spec_found


def weighted_effect(
    effect: Effect, objective: Objective, sums: dict[str, dict[str, Tensor]], tokens: Tensor
) -> GEffect:
    """The G-effect of an objective from the effects of samples, weighted but not yet divided by its count.

    Args:
        sums: side -> group -> fp64 [S], sum over the tokens i of s of w_i e(D, i). tokens: int64 [S].
    """
    # what each sample adds to the count that the objective divides by, [S]
    shares = tokens > 0 if default_reduction(objective) == "sequence_mean" else tokens
    count = max(int(shares.sum()), 1)  # without a token every sum is 0
    values: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for side in SIDES:
        parts = {group: part / count for group, part in sums[side].items()}  # [S]
        values[side] = {group: float(part.sum()) for group, part in parts.items()}
        parts["total"] = sum(parts.values())
        errors[side] = {group: standard_error(part, shares) for group, part in parts.items()}
    counts = effect.counts | {"objective": count, "objective_tokens": int(tokens.sum())}
    known = all(error == error for side in SIDES for error in errors[side].values())
    return GEffect(str(objective), *values.values(), effect.norms, effect.risk, counts, errors if known else {})


def norms_of(by_quantity: Mapping[str, list[Mapping[str, Any]]]) -> Norms:
    norms: Norms = {}
    for row in by_quantity.get("risk_norm", ()):
        if row["group"] != "total":
            norms.setdefault(row["side"], {})[row["group"]] = row["value"]
    return norms
