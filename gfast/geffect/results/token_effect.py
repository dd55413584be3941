"""Gradient effects of label tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gfast.geffect.results.base import Effect, Norms, row_values, rows_by, tensors_by_group
from gfast.geffect.results.g_effect import GEffect
from gfast.geffect.results.sample_effect import SampleEffect
from gfast.geffect.results.weighted import norms_of, sample_ids, spec_on_forget, weighted_effect
from gfast.objectives import Objective, Weights, as_objective
from gfast.ops.weights import weigh
from gfast.sides import SIDES


@dataclass(repr=False)
class TokenEffect(Effect):
    """The effect of each label token's log-probability on the risk of both sets, by layer group.

        e(D, i) = < grad R(D), grad log p(s_i | s_<i) >

    There are no cosines of tokens: they take the norm of every token's gradient, and forward mode forms the products
    with the directions without any gradient.

    Attributes:
        unlearn, retain: group -> S tensors, fp64 [N_s]: one value a labelled token of sample s.
        logp: S tensors, fp64 [N_s]. labels: the token ids, int64. positions: their places in the rows of input_ids.
        ref_logp: log-probs under the original model, where the batches had them, else None. weight: the batches'
            weights, likewise; an objective's own are multiplied by them, the tokens' effects are not.
        norms: "unlearn" and "retain" -> {group: ||grad R(D)||}.
        risk: readable label of R. counts: what R was averaged over.
    """

    kind: ClassVar[str] = "token"

    unlearn: dict[str, list[Tensor]]
    retain: dict[str, list[Tensor]]
    logp: list[Tensor]
    labels: list[Tensor]
    positions: list[Tensor]
    norms: Norms
    ref_logp: list[Tensor] | None = None
    risk: str = "NLL()"
    counts: dict[str, int] = field(default_factory=dict)
    weight: list[Tensor] | None = None

    def total(self, side: str) -> list[Tensor]:
        """The effects over all parameters, S tensors [N_s]: the sum over groups."""
        return [sum(parts) for parts in zip(*self._side(side).values(), strict=True)]

    def weights(self, objective: Objective | Callable) -> list[Tensor]:
        """The detached weight that an objective (or function, see `objectives.Weights`) gives each token, times the
        batches' weight where they had one, S fp64 [N_s].

        Raises:
            ValueError: an objective that needs ref_logp, and none was recorded; one without token weights.
        """
        objective = as_objective(objective)
        if not isinstance(objective, Weights) and spec_on_forget(objective) is None:
            raise ValueError(
                f"gfast: {objective} is no weighting of the forget set's tokens, so their effects do not give its "
                f"G-effect: measure it with g_effect(..., engine='stream')"
            )
        if "ref_logp" in objective.needs and self.ref_logp is None:
            raise ValueError(
                f"gfast: {objective} compares with the original model, and these tokens were measured without "
                f"ref_logp: give token_effect batches with ref_logp (a ReferenceCache and the collator that joins it)"
            )
        if "weight" in objective.needs and self.weight is None:
            raise ValueError(
                f"gfast: {objective} needs a weight of every token, and these were measured without: give token_effect "
                f"batches with 'weight'"
            )
        logp, sizes = torch.cat(self.logp), self._sizes()  # [N], [S]
        ref = None if self.ref_logp is None else torch.cat(self.ref_logp).to(logp.dtype)
        valid = torch.ones(len(logp), dtype=torch.bool, device="cpu")
        weight, _ = weigh(objective, logp, ref, valid, sample_ids(sizes), len(sizes))
        weight = weight if self.weight is None else weight * torch.cat(self.weight)
        return list(weight.split(sizes.tolist()))

    def g_effect(self, objective: Objective | Callable) -> GEffect:
        """The G-effect of an objective, from these tokens alone: sum over i of (w_i / Z) e(D, i).

        Exactly the effects that `gfast.g_effect` measures on the same data, without the objective's norm and the
        risks. Standard errors are over samples.

        Raises:
            ValueError: as `weights`.
        """
        objective = as_objective(objective)
        weight, sizes = torch.cat(self.weights(objective)), self._sizes()  # [N], [S]
        ids, zeros = sample_ids(sizes), torch.zeros(len(sizes), dtype=torch.float64, device="cpu")
        sums = {
            side: {g: zeros.index_add(0, ids, torch.cat(tokens) * weight) for g, tokens in self._side(side).items()}
            for side in SIDES
        }
        return weighted_effect(self, objective, sums, sizes)

    def samples(self) -> SampleEffect:
        """The effects of whole samples: sums over their tokens.

        Raises:
            ValueError: tokens with weights of their own, which no objective over whole samples would know of.
        """
        if self.weight is not None:
            raise ValueError(
                "gfast: these tokens have weights of their own, and the effect of a sample's log p has none: use "
                "g_effect of the tokens, or measure batches without 'weight'"
            )

        def summed(tokens: list[Tensor]) -> Tensor:
            return torch.stack([values.sum() for values in tokens])

        sides = ({group: summed(tokens) for group, tokens in self._side(side).items()} for side in SIDES)
        ref = None if self.ref_logp is None else summed(self.ref_logp)
        return SampleEffect(*sides, self._sizes(), self.norms, self.risk, self.counts, summed(self.logp), ref)

    def _sizes(self) -> Tensor:
        """Labelled tokens of each sample, int64 [S]."""
        return torch.tensor([len(values) for values in self.logp], device="cpu")

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows {quantity, side, group, sample, token, value}; the quantity is token_effect, logp, ref_logp,
        weight, label or risk_norm, token the place in the row of input_ids.
        """
        rows = []
        for side in SIDES:
            for group, tokens in (*self._side(side).items(), ("total", self.total(side))):
                rows += self._token_rows(tokens, quantity="token_effect", side=side, group=group)
        rows += self._token_rows(self.logp, quantity="logp")
        rows += self._token_rows(self.labels, quantity="label")
        for quantity in ("ref_logp", "weight"):
            if getattr(self, quantity) is not None:
                rows += self._token_rows(getattr(self, quantity), quantity=quantity)
        rows += [{"quantity": "tokens", "sample": s, "value": float(len(values))} for s, values in enumerate(self.logp)]
        return rows + self._norm_rows()

    def _token_rows(self, tokens: list[Tensor], **keys: str) -> Iterator[dict[str, Any]]:
        for sample, (values, places) in enumerate(zip(tokens, self.positions, strict=True)):
            for value, place in zip(values.tolist(), places.tolist(), strict=True):
                yield {**keys, "sample": sample, "token": place, "value": float(value)}

    @classmethod
    def _from_rows(cls, rows: Sequence[Mapping[str, Any]], scalars: Mapping[str, Any]) -> TokenEffect:
        by_quantity = rows_by(rows, "quantity")
        sizes = [int(row["value"]) for row in by_quantity["tokens"]]

        def split(rows: Sequence[Mapping[str, Any]]) -> list[Tensor]:
            return list(row_values(rows).split(sizes))

        effects = rows_by(by_quantity["token_effect"], "side")
        places = torch.tensor([int(row["token"]) for row in by_quantity["logp"]], dtype=torch.int64, device="cpu")
        return cls(
            *({g: list(v.split(sizes)) for g, v in tensors_by_group(effects[side]).items()} for side in SIDES),
            logp=split(by_quantity["logp"]),
            labels=[values.long() for values in split(by_quantity["label"])],
            positions=list(places.split(sizes)),
            norms=norms_of(by_quantity),
            **{key: split(by_quantity[key]) if key in by_quantity else None for key in ("ref_logp", "weight")},
            **scalars,
        )
