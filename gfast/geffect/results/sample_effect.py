"""Gradient effects of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gfast.geffect.results.base import Effect, Norms, row_values, rows_by, tensors_by_group
from gfast.geffect.results.g_effect import GEffect
from gfast.geffect.results.weighted import norms_of, sample_ids, spec_on_forget, weighted_effect
from gfast.objectives import Objective
from gfast.ops.weights import weigh
from gfast.sides import SIDES

_NEEDS_SAMPLE_NORMS = (
    "the norms ||grad log p(s)|| of the samples are not known, because pg_effect and token_effect form no gradient of "
    "a sample: use gram_effect(...).samples(), or set sample_norms of these effects to its sample_norms for the same "
    "data, model and groups"
)


@dataclass(repr=False)
class SampleEffect(Effect):
    """The effect of each forget sample's log-probability on the risk of both sets, by layer group.

        e(D, s) = < grad R(D), grad log p(s) >,   log p(s) = sum of the log-probs of the sample's tokens

    Attributes:
        unlearn, retain: group -> fp64 [S]; D is the forget set, or the retain set.
        tokens: int64 [S], labelled tokens of each sample; a sample without any has effect 0.
        logp: fp64 [S], log p(s); None if it was not recorded. ref_logp: the same under the original model.
        norms: "unlearn" and "retain" -> {group: ||grad R(D)||}; only "unlearn" after `GramEffect.samples`.
        risk: readable label of R. counts: what R was averaged over.
        sample_norms: group -> fp64 [S], ||grad log p(s)||, as `GramEffect.samples` gives it; None after `pg_effect`.
    """

    kind: ClassVar[str] = "sample"

    unlearn: dict[str, Tensor]
    retain: dict[str, Tensor]
    tokens: Tensor
    norms: Norms
    risk: str = "NLL()"
    counts: dict[str, int] = field(default_factory=dict)
    logp: Tensor | None = None
    ref_logp: Tensor | None = None
    sample_norms: dict[str, Tensor] | None = None

    def total(self, side: str) -> Tensor:
        """The effects over all parameters, fp64 [S]: the sum over groups."""
        return torch.stack(list(self._side(side).values())).sum(0)

    def per_token(self, side: str, group: str | None = None) -> Tensor:
        """The effect of a sample divided by its labelled tokens, fp64 [S], of a group or of all parameters (None).

        log p(s) sums over tokens, so the effect of a long sample is larger by its length alone; on this scale samples
        compare. A sample without labelled tokens has 0.

        Raises:
            ValueError: an unknown side or group.
        """
        return self._at(side, group) / self.tokens.clamp(min=1)

    def cosine(self, side: str, group: str | None = None) -> Tensor:
        """cos(grad R(D), grad log p(s)) within a group, or over all parameters (None or "total"), fp64 [S]. 0/0 is NaN.

        Raises:
            ValueError: an unknown side or group, or norms that are not known: those of the samples, which only
                `gram_effect` measures, or that of the risk's gradient on the side, with the remedy.

        Example:
            >>> pairs = {"all": -torch.tensor([[4.0, 1.0], [1.0, 9.0]]).double()}
            >>> from gfast.geffect import GramEffect
            >>> gram = GramEffect(pairs, pairs, {"forget": torch.tensor([2, 3]), "retain": torch.tensor([2, 3])})
            >>> [round(value, 4) for value in gram.samples().cosine("unlearn").tolist()]
            [-0.6455, -0.8607]
        """
        effect, group = self._at(side, group), self._group(group)
        if self.sample_norms is None:
            raise ValueError(f"gfast: cosine({side!r}) of samples: {_NEEDS_SAMPLE_NORMS}")
        if side not in self.norms:
            raise ValueError(
                f"gfast: cosine({side!r}) of samples: the norm of the risk's gradient on that side is not known "
                f"(gram_effect has it on the forget set alone, the side 'unlearn'); set norms[{side!r}] to that of "
                f"pg_effect(...), or of risk_gradients(...).norms(), for the same data, model and groups"
            )
        risk = self.norms[side]
        if group != "total" and group not in risk:
            raise ValueError(
                f"gfast: norms[{side!r}] has the groups {', '.join(risk)}, not {group!r}: take it of these groups"
            )
        scale = self._sample_norm(group) * (math.hypot(*risk.values()) if group == "total" else risk[group])  # [S]
        return torch.where(scale > 0, effect / scale, math.nan)

    def _sample_norm(self, group: str) -> Tensor:
        """||grad log p(s)||, fp64 [S], where it is known."""
        if {g: n.shape for g, n in self.sample_norms.items()} != {g: e.shape for g, e in self.unlearn.items()}:
            raise ValueError(
                f"gfast: sample_norms are of other groups or samples: {len(self.tokens)} samples by "
                f"{', '.join(self.groups)} are needed, as gram_effect(...) with the same data and groups has them"
            )
        if group == "total":
            return torch.stack(list(self.sample_norms.values())).norm(dim=0)
        return self.sample_norms[group]

    def weights(self, objective: Objective) -> Tensor:
        """The detached weight that an objective with one weight a sequence gives each sample's log p(s), fp64 [S].

        Raises:
            ValueError: an objective whose weights differ from token to token (except where they are constant), or one
                that needs logp or ref_logp, and they were not recorded.
        """
        spec = spec_on_forget(objective)
        by_token = spec is not None and spec.level == "token" and (spec.p_pow or spec.q_pow or spec.beta)
        if spec is None or by_token or "weight" in objective.needs:
            raise ValueError(
                f"gfast: {objective} does not weigh whole samples of the forget set: measure it with g_effect(...), or "
                f"with token_effect(...) and its g_effect(objective)"
            )
        if spec.level == "token":
            return torch.full((len(self.tokens),), spec.sign, dtype=torch.float64, device="cpu")
        for name in ("logp", "ref_logp") if spec.uses_ref else ("logp",):
            if getattr(self, name) is None:
                raise ValueError(
                    f"gfast: {objective} needs {name} of the samples, which was not recorded: pg_effect(...) records "
                    f"logp, and ref_logp where all batches have it"
                )
        ids = sample_ids(self.tokens)  # [N]

        def spread(values: Tensor) -> Tensor:
            return (values / self.tokens.clamp(min=1))[ids]

        ref = spread(self.ref_logp) if spec.uses_ref else None
        valid = torch.ones(len(ids), dtype=torch.bool, device="cpu")
        weight, _ = weigh(objective, spread(self.logp), ref, valid, ids, len(self.tokens))
        return torch.zeros(len(self.tokens), dtype=torch.float64, device="cpu").index_copy(0, ids, weight)

    def g_effect(self, objective: Objective) -> GEffect:
        """The G-effect of an objective with one weight a sequence, from these samples alone:

            e(D) = sum over s of (w_s / Z) e(D, s)        Z: labelled tokens, or sequences, by the objective's reduction

        Exactly the effects that `gfast.g_effect` measures on the same data, without the objective's norm and the
        risks. Standard errors are over samples.

        Raises:
            ValueError: as `weights`.

        Example:
            >>> from gfast.objectives import GA
            >>> sides = ({"all": torch.tensor([-3.0, -1.0]).double()}, {"all": torch.tensor([0.5, -2.5]).double()})
            >>> samples = SampleEffect(*sides, torch.tensor([3, 1]), {})
            >>> samples.g_effect(GA()).unlearn
            {'all': -1.0}
        """
        weight = self.weights(objective)  # [S]
        sums = {side: {group: values * weight for group, values in self._side(side).items()} for side in SIDES}
        return weighted_effect(self, objective, sums, self.tokens)

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows {quantity, side, group, sample, value}; the quantity is sample_effect, tokens, logp, ref_logp,
        risk_norm, and where they are known sample_norm and cosine. What has groups has the group "total" too.
        """
        rows: list[dict[str, Any]] = []

        def add(values: Tensor, **keys: str) -> None:
            rows.extend({**keys, "sample": s, "value": float(value)} for s, value in enumerate(values.tolist()))

        names = (*self.groups, "total")
        for side in SIDES:
            for group in names:
                add(self._at(side, group), quantity="sample_effect", side=side, group=group)
        for quantity in ("tokens", "logp", "ref_logp"):
            if getattr(self, quantity) is not None:
                add(getattr(self, quantity), quantity=quantity)
        for group in names if self.sample_norms is not None else ():
            add(self._sample_norm(group), quantity="sample_norm", group=group)
            for side in self.norms:
                add(self.cosine(side, group), quantity="cosine", side=side, group=group)
        return rows + self._norm_rows()

    @classmethod
    def _from_rows(cls, rows: Sequence[Mapping[str, Any]], scalars: Mapping[str, Any]) -> SampleEffect:
        by_quantity = rows_by(rows, "quantity")
        effects = rows_by(by_quantity["sample_effect"], "side")

        def column(quantity: str) -> Tensor | None:
            return row_values(by_quantity[quantity]) if quantity in by_quantity else None

        return cls(
            *(tensors_by_group(effects[side]) for side in SIDES),
            tokens=row_values(by_quantity["tokens"]).long(),
            norms=norms_of(by_quantity),
            logp=column("logp"),
            ref_logp=column("ref_logp"),
            sample_norms=tensors_by_group(by_quantity["sample_norm"]) if "sample_norm" in by_quantity else None,
            **scalars,
        )
