"""Gradient effects of samples and of tokens, and what follows from them.

A G-effect is linear in the gradient of its objective, and that gradient is a weighted sum of log-prob gradients. So
effects of tokens, measured once, give the G-effect of every objective with token weights and of every setting of its
hyper-parameters; effects of samples give it where every token of a sample has the same weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gfast.geffect.data import OWN_DATA
from gfast.geffect.results import (
    SIDES,
    Effect,
    GEffect,
    Norms,
    row_values,
    rows_by,
    standard_error,
    tensors_by_group,
)
from gfast.objectives import Objective
from gfast.ops.weights import WeightSpec, default_reduction, spec_of, weigh

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
            raise ValueError(f"cosine({side!r}) of samples: {_NEEDS_SAMPLE_NORMS}")
        if side not in self.norms:
            raise ValueError(
                f"cosine({side!r}) of samples: the norm of the risk's gradient on that side is not known (gram_effect "
                f"has it on the forget set alone, the side 'unlearn'); set norms[{side!r}] to that of pg_effect(...), "
                f"or of risk_gradients(...).norms(), for the same data, model and groups"
            )
        risk = self.norms[side]
        if group != "total" and group not in risk:
            raise ValueError(
                f"norms[{side!r}] has the groups {', '.join(risk)}, not {group!r}: take it of these groups"
            )
        scale = self._sample_norm(group) * (math.hypot(*risk.values()) if group == "total" else risk[group])  # [S]
        return torch.where(scale > 0, effect / scale, math.nan)

    def _sample_norm(self, group: str) -> Tensor:
        """||grad log p(s)||, fp64 [S], where it is known."""
        if {g: n.shape for g, n in self.sample_norms.items()} != {g: e.shape for g, e in self.unlearn.items()}:
            raise ValueError(
                f"sample_norms are of other groups or samples: {len(self.tokens)} samples by {', '.join(self.groups)} "
                f"are needed, as gram_effect(...) with the same data and groups has them"
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
        found = _spec_on_forget(objective)
        if found is None or (found.level == "token" and (found.p_pow or found.q_pow or found.beta)):
            raise ValueError(
                f"{objective} does not weigh whole samples of the forget set: measure it with g_effect(...), or with "
                f"token_effect(...) and its g_effect(objective)"
            )
        if found.level == "token":
            return torch.full((len(self.tokens),), found.sign, dtype=torch.float64, device="cpu")
        for name in ("logp", "ref_logp") if found.uses_ref else ("logp",):
            if getattr(self, name) is None:
                raise ValueError(
                    f"{objective} needs {name} of the samples, which was not recorded: pg_effect(...) records logp, "
                    f"and ref_logp where all batches have it"
                )
        ids = _sample_ids(self.tokens)  # [N]

        def spread(values: Tensor) -> Tensor:
            return (values / self.tokens.clamp(min=1))[ids]

        ref = spread(self.ref_logp) if found.uses_ref else None
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
        return _g_effect(self, objective, sums, self.tokens)

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
        found = rows_by(rows, "quantity")
        effects = rows_by(found["sample_effect"], "side")

        def column(quantity: str) -> Tensor | None:
            return row_values(found[quantity]) if quantity in found else None

        return cls(
            *(tensors_by_group(effects[side]) for side in SIDES),
            tokens=row_values(found["tokens"]).long(),
            norms=_norms(found),
            logp=column("logp"),
            ref_logp=column("ref_logp"),
            sample_norms=tensors_by_group(found["sample_norm"]) if "sample_norm" in found else None,
            **scalars,
        )


@dataclass(repr=False)
class TokenEffect(Effect):
    """The effect of each label token's log-probability on the risk of both sets, by layer group.

        e(D, i) = < grad R(D), grad log p(s_i | s_<i) >

    There are no cosines of tokens: they take the norm of every token's gradient, and forward mode forms the products
    with the directions without any gradient.

    Attributes:
        unlearn, retain: group -> S tensors, fp64 [N_s]: one value a labelled token of sample s.
        logp: S tensors, fp64 [N_s]. labels: the token ids, int64. positions: their places in the rows of input_ids.
        ref_logp: log-probs under the original model, where the batches had them, else None.
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

    def total(self, side: str) -> list[Tensor]:
        """The effects over all parameters, S tensors [N_s]: the sum over groups."""
        return [sum(parts) for parts in zip(*self._side(side).values(), strict=True)]

    def weights(self, objective: Objective) -> list[Tensor]:
        """The detached weight that an objective gives each token, S tensors [N_s] fp64.

        Raises:
            ValueError: an objective that needs ref_logp, and none was recorded; one without token weights.
        """
        if _spec_on_forget(objective) is None:
            raise ValueError(
                f"{objective} is no weighting of the forget set's tokens, so their effects do not give its G-effect: "
                f"measure it with g_effect(..., engine='stream')"
            )
        if "ref_logp" in objective.needs and self.ref_logp is None:
            raise ValueError(
                f"{objective} compares with the original model, and these tokens were measured without ref_logp: give "
                f"token_effect batches with ref_logp (a ReferenceCache and the collator that joins it)"
            )
        logp, sizes = torch.cat(self.logp), self._sizes()  # [N], [S]
        ref = None if self.ref_logp is None else torch.cat(self.ref_logp).to(logp.dtype)
        valid = torch.ones(len(logp), dtype=torch.bool, device="cpu")
        weight, _ = weigh(objective, logp, ref, valid, _sample_ids(sizes), len(sizes))
        return list(weight.split(sizes.tolist()))

    def g_effect(self, objective: Objective) -> GEffect:
        """The G-effect of an objective, from these tokens alone: sum over i of (w_i / Z) e(D, i).

        Exactly the effects that `gfast.g_effect` measures on the same data, without the objective's norm and the
        risks. Standard errors are over samples.

        Raises:
            ValueError: as `weights`.
        """
        weight, sizes = torch.cat(self.weights(objective)), self._sizes()  # [N], [S]
        ids, zeros = _sample_ids(sizes), torch.zeros(len(sizes), dtype=torch.float64, device="cpu")
        sums = {
            side: {g: zeros.index_add(0, ids, torch.cat(tokens) * weight) for g, tokens in self._side(side).items()}
            for side in SIDES
        }
        return _g_effect(self, objective, sums, sizes)

    def samples(self) -> SampleEffect:
        """The effects of whole samples: sums over their tokens."""

        def summed(tokens: list[Tensor]) -> Tensor:
            return torch.stack([one.sum() for one in tokens])

        sides = ({group: summed(tokens) for group, tokens in self._side(side).items()} for side in SIDES)
        ref = None if self.ref_logp is None else summed(self.ref_logp)
        return SampleEffect(*sides, self._sizes(), self.norms, self.risk, self.counts, summed(self.logp), ref)

    def _sizes(self) -> Tensor:
        """Labelled tokens of each sample, int64 [S]."""
        return torch.tensor([len(one) for one in self.logp], device="cpu")

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows {quantity, side, group, sample, token, value}; the quantity is token_effect, logp, ref_logp, label
        or risk_norm, token the place in the row of input_ids.
        """
        rows = []
        for side in SIDES:
            for group, tokens in (*self._side(side).items(), ("total", self.total(side))):
                rows += self._token_rows(tokens, quantity="token_effect", side=side, group=group)
        rows += self._token_rows(self.logp, quantity="logp")
        rows += self._token_rows(self.labels, quantity="label")
        if self.ref_logp is not None:
            rows += self._token_rows(self.ref_logp, quantity="ref_logp")
        rows += [{"quantity": "tokens", "sample": s, "value": float(len(one))} for s, one in enumerate(self.logp)]
        return rows + self._norm_rows()

    def _token_rows(self, tokens: list[Tensor], **keys: str) -> Iterator[dict[str, Any]]:
        for sample, (values, places) in enumerate(zip(tokens, self.positions, strict=True)):
            for value, place in zip(values.tolist(), places.tolist(), strict=True):
                yield {**keys, "sample": sample, "token": place, "value": float(value)}

    @classmethod
    def _from_rows(cls, rows: Sequence[Mapping[str, Any]], scalars: Mapping[str, Any]) -> TokenEffect:
        found = rows_by(rows, "quantity")
        sizes = [int(row["value"]) for row in found["tokens"]]

        def split(some: Sequence[Mapping[str, Any]]) -> list[Tensor]:
            return list(row_values(some).split(sizes))

        effects = rows_by(found["token_effect"], "side")
        places = torch.tensor([int(row["token"]) for row in found["logp"]], dtype=torch.int64, device="cpu")
        return cls(
            *({g: list(v.split(sizes)) for g, v in tensors_by_group(effects[side]).items()} for side in SIDES),
            logp=split(found["logp"]),
            labels=[one.long() for one in split(found["label"])],
            positions=list(places.split(sizes)),
            norms=_norms(found),
            ref_logp=split(found["ref_logp"]) if "ref_logp" in found else None,
            **scalars,
        )


def _sample_ids(tokens: Tensor) -> Tensor:
    """The sample of each token, int64 [N], from the number of tokens of each sample [S]."""
    return torch.repeat_interleave(torch.arange(len(tokens), device="cpu"), tokens)


def _spec_on_forget(objective: Any) -> WeightSpec | None:
    """The weights of an objective on the log-probs of the forget set; None where its gradient is no such sum."""
    spec = getattr(objective, "spec", None)
    if not callable(spec) or objective.needs & OWN_DATA:
        return None
    found = spec_of(objective)
    return None if found.level == "pair" else found


def _g_effect(
    effect: SampleEffect | TokenEffect, objective: Objective, sums: dict[str, dict[str, Tensor]], tokens: Tensor
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


def _norms(found: Mapping[str, list[Mapping[str, Any]]]) -> Norms:
    norms: Norms = {}
    for row in found.get("risk_norm", ()):
        if row["group"] != "total":
            norms.setdefault(row["side"], {})[row["group"]] = row["value"]
    return norms
