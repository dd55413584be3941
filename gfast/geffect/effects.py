"""Gradient effects of samples, of tokens and of pairs of samples, and what follows from them.

A G-effect is linear in the gradient of its objective, and that gradient is a weighted sum of log-prob gradients. So
effects of tokens, measured once, give the G-effect of every objective with token weights and of every setting of its
hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gfast.geffect.data import OWN_DATA
from gfast.geffect.results import SIDES, Effect, GEffect, standard_error
from gfast.objectives import NLL, Mix, Objective
from gfast.ops.common import coef_scale
from gfast.ops.unlearn_loss import default_reduction, is_pair, weigh

Norms = dict[str, dict[str, float]]


@dataclass(repr=False)
class SampleEffect(Effect):
    """The effect of each forget sample's log-probability on the risk of both sets, by layer group.

        e(D, s) = < grad R(D), grad log p(s) >,   log p(s) = sum of the log-probs of the sample's tokens

    Attributes:
        unlearn, retain: group -> fp64 [S]; D is the forget set, or the retain set.
        tokens: int64 [S], labelled tokens of each sample; a sample without any has effect 0.
        logp: fp64 [S], log p(s); None if it was not recorded. ref_logp: the same under the original model.
        norms: "unlearn" and "retain" -> {group: ||grad R(D)||}.
        risk: readable label of R. counts: what R was averaged over.
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

    def total(self, side: str) -> Tensor:
        """The effects over all parameters, fp64 [S]: the sum over groups."""
        return torch.stack(list(self._side(side).values())).sum(0)

    def weights(self, objective: Objective) -> Tensor:
        """The detached weight that an objective with one weight a sequence gives each sample's log p(s), fp64 [S].

        Raises:
            ValueError: an objective whose weights differ from token to token (except where they are constant), or one
                that needs logp or ref_logp, and they were not recorded.
        """
        spec = getattr(objective, "spec", None)
        found = spec() if callable(spec) and not objective.needs & OWN_DATA else None
        token_weights = found is None or (found.level == "token" and (found.p_pow or found.q_pow or found.beta))
        if token_weights or found.level == "pair":
            raise ValueError(
                f"{objective} does not weigh whole samples of the forget set: measure it with g_effect(...), or with "
                f"token_effect(...) and its g_effect(objective)"
            )
        if found.level == "token":
            return torch.full((len(self.tokens),), found.sign, dtype=torch.float64)
        for name in ("logp", "ref_logp") if found.uses_ref else ("logp",):
            if getattr(self, name) is None:
                raise ValueError(f"{objective} needs {name} of the samples, which was not recorded")
        ids, spread = self._spread()
        ref = spread(self.ref_logp) if found.uses_ref else None
        valid = torch.ones(len(ids), dtype=torch.bool)
        weight, _ = weigh(objective, spread(self.logp), ref, valid, ids, len(self.tokens))
        return torch.zeros(len(self.tokens), dtype=torch.float64).index_copy(0, ids, weight)

    def _spread(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Sample of each token [N], and what spreads a sum over its tokens."""
        ids = torch.repeat_interleave(torch.arange(len(self.tokens)), self.tokens)
        return ids, lambda values: (values / self.tokens.clamp(min=1))[ids]

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows {quantity, side, group, sample, value}; the quantity is sample_effect, tokens, logp, ref_logp or
        risk_norm. Every effect has the group "total" too.
        """
        rows = [
            {"quantity": "sample_effect", "side": side, "group": group, "sample": s, "value": value}
            for side in SIDES
            for group, values in (*self._side(side).items(), ("total", self.total(side)))
            for s, value in enumerate(values.tolist())
        ]
        for quantity in ("tokens", "logp", "ref_logp"):
            values = getattr(self, quantity)
            if values is not None:
                rows += [{"quantity": quantity, "sample": s, "value": float(v)} for s, v in enumerate(values.tolist())]
        return rows + self._norm_rows()

    @classmethod
    def _from_rows(cls, rows: Sequence[Mapping[str, Any]], scalars: Mapping[str, Any]) -> SampleEffect:
        found = _by(rows, "quantity")
        effects = {side: _by(_by(found["sample_effect"], "side")[side], "group") for side in SIDES}

        def column(quantity: str) -> Tensor | None:
            return _values(found[quantity]) if quantity in found else None

        return cls(
            *({g: _values(r) for g, r in effects[side].items() if g != "total"} for side in SIDES),
            tokens=_values(found["tokens"]).long(),
            norms=_norms(found),
            logp=column("logp"),
            ref_logp=column("ref_logp"),
            **scalars,
        )


@dataclass(repr=False)
class TokenEffect(Effect):
    """The effect of each label token's log-probability on the risk of both sets, by layer group.

        e(D, i) = < grad R(D), grad log p(s_i | s_<i) >

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
        weight, _ = self._weigh(objective)
        return list(weight.split([len(one) for one in self.logp]))

    def g_effect(self, objective: Objective) -> GEffect:
        """The G-effect of an objective, from these tokens alone: sum over i of (w_i / Z) e(D, i).

        Exactly what `gfast.g_effect` measures on the same data (without the objective's norm). Standard errors are
        over samples.
        """
        weight, factor = self._weigh(objective)
        sizes = torch.tensor([len(one) for one in self.logp])  # [S]
        sample = torch.repeat_interleave(torch.arange(len(sizes)), sizes)  # [N]
        token_mean = default_reduction(objective) == "token_mean"
        shares = sizes.double() if token_mean else (sizes > 0).double()  # of the count that the objective divides by
        values: dict[str, dict[str, float]] = {}
        errors: dict[str, dict[str, float]] = {}
        for side in SIDES:
            values[side], errors[side] = {}, {}
            parts = {group: torch.cat(tokens) * weight * factor for group, tokens in self._side(side).items()}  # [N]
            for group, part in (*parts.items(), ("total", sum(parts.values()))):
                by_sample = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, sample, part)  # [S]
                errors[side][group] = standard_error(by_sample, shares)
                if group != "total":
                    values[side][group] = float(part.sum())
        counts = self.counts | {"objective": round(1.0 / float(factor)), "objective_tokens": int(sizes.sum())}
        known = all(error == error for side in SIDES for error in errors[side].values())
        return GEffect(str(objective), *values.values(), self.norms, self.risk, counts, errors if known else {})

    def samples(self) -> SampleEffect:
        """The effects of whole samples: sums over their tokens."""

        def summed(tokens: list[Tensor]) -> Tensor:
            return torch.stack([one.sum() for one in tokens])

        sides = ({group: summed(tokens) for group, tokens in self._side(side).items()} for side in SIDES)
        lengths = torch.tensor([len(one) for one in self.logp])
        ref = None if self.ref_logp is None else summed(self.ref_logp)
        return SampleEffect(*sides, lengths, self.norms, self.risk, self.counts, summed(self.logp), ref)

    def _weigh(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """Weights [N] and the factor of the objective's reduction."""
        spec = getattr(objective, "spec", None)
        if isinstance(objective, Mix) or objective.needs & OWN_DATA or not callable(spec):
            raise ValueError(
                f"{objective} is no weighting of the forget set's tokens, so their effects do not give its G-effect: "
                f"measure it with g_effect(..., engine='stream')"
            )
        if "ref_logp" in objective.needs and self.ref_logp is None:
            raise ValueError(
                f"{objective} compares with the original model, and these tokens were measured without ref_logp: give "
                f"token_effect batches with ref_logp (a ReferenceCache and the collator that joins it)"
            )
        logp = torch.cat(self.logp)  # [N]
        ref = None if self.ref_logp is None else torch.cat(self.ref_logp).to(logp.dtype)
        sizes = torch.tensor([len(one) for one in self.logp])
        ids = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        valid = torch.ones(len(logp), dtype=torch.bool)
        pair = is_pair(objective)
        weight, _ = weigh(objective, logp, ref, valid, ids, len(sizes))
        factor = coef_scale(valid, default_reduction(objective), None, ids, len(sizes), pair, torch.float64)
        return weight, factor

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
        found = _by(rows, "quantity")
        sizes = [int(row["value"]) for row in found["tokens"]]

        def split(some: Sequence[Mapping[str, Any]]) -> list[Tensor]:
            return list(_values(some).split(sizes))

        effects = {side: _by(_by(found["token_effect"], "side")[side], "group") for side in SIDES}
        places = torch.tensor([int(row["token"]) for row in found["logp"]], dtype=torch.int64)
        return cls(
            *({g: split(r) for g, r in effects[side].items() if g != "total"} for side in SIDES),
            logp=split(found["logp"]),
            labels=[one.long() for one in split(found["label"])],
            positions=list(places.split(sizes)),
            norms=_norms(found),
            ref_logp=split(found["ref_logp"]) if "ref_logp" in found else None,
            **scalars,
        )


@dataclass(repr=False)
class GramEffect(Effect):
    """Dot products of the gradients of pairs of samples, by layer group; no data set's gradient is involved.

        entry i, j = < grad NLL(s_j), grad log p(s_i) >,   both summed over the tokens of the sample

    Attributes:
        unlearn: group -> fp64 [S_f, S_f], both samples from the forget data.
        retain: group -> fp64 [S_f, S_r], s_j from the retain data.
        tokens: "forget" and "retain" -> int64 [S], labelled tokens of each sample.
    """

    kind: ClassVar[str] = "gram"

    unlearn: dict[str, Tensor]
    retain: dict[str, Tensor]
    tokens: dict[str, Tensor]
    risk: str = "NLL()"
    counts: dict[str, int] = field(default_factory=dict)
    norms: ClassVar[Norms] = {}

    @property
    def matrix(self) -> dict[str, Tensor]:
        """group -> fp64 [S_f, S_r], forget against retain samples."""
        return self.retain

    def total(self, side: str) -> Tensor:
        """The matrix over all parameters: the sum over groups."""
        return torch.stack(list(self._side(side).values())).sum(0)

    def cosine(self) -> Tensor:
        """Cosines of the gradients of log p of pairs of forget samples over all parameters, [S_f, S_f]: 1 on the
        diagonal.
        """
        gram = -self.total("unlearn")
        norm = gram.diagonal().clamp(min=0).sqrt()  # [S_f]
        return gram / (norm[:, None] * norm)

    def samples(self) -> SampleEffect:
        """The effect of each forget sample on the token-mean NLL of both sets, as `pg_effect` measures it."""
        sides = {side: "forget" if side == "unlearn" else "retain" for side in SIDES}
        counts = {side: int(self.tokens[source].sum()) for side, source in sides.items()}
        parts = (
            {group: matrix.sum(1) / max(counts[side], 1) for group, matrix in self._side(side).items()}
            for side in SIDES
        )
        whole = {group: float((-matrix.sum()).clamp(min=0).sqrt()) for group, matrix in self.unlearn.items()}
        norms = {"unlearn": {group: value / max(counts["unlearn"], 1) for group, value in whole.items()}}
        return SampleEffect(*parts, self.tokens["forget"], norms, str(NLL()), counts)

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows {quantity, side, group, sample, other, value}: gram, and the tokens of each sample."""
        rows = [
            {"quantity": "gram", "side": side, "group": group, "sample": i, "other": j, "value": value}
            for side in SIDES
            for group, matrix in (*self._side(side).items(), ("total", self.total(side)))
            for i, line in enumerate(matrix.tolist())
            for j, value in enumerate(line)
        ]
        for source, tokens in self.tokens.items():
            rows += [
                {"quantity": "tokens", "side": source, "sample": s, "value": float(n)}
                for s, n in enumerate(tokens.tolist())
            ]
        return rows

    @classmethod
    def _from_rows(cls, rows: Sequence[Mapping[str, Any]], scalars: Mapping[str, Any]) -> GramEffect:
        found = _by(rows, "quantity")
        tokens = {source: _values(some).long() for source, some in _by(found["tokens"], "side").items()}
        effects = {side: _by(_by(found["gram"], "side")[side], "group") for side in SIDES}
        size = len(tokens["forget"])
        sides = ({g: _values(r).view(size, -1) for g, r in effects[side].items() if g != "total"} for side in SIDES)
        return cls(*sides, tokens, **scalars)


def _by(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row[key], []).append(row)
    return parts


def _values(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.tensor([row["value"] for row in rows], dtype=torch.float64)


def _norms(found: Mapping[str, list[Mapping[str, Any]]]) -> Norms:
    norms: Norms = {}
    for row in found.get("risk_norm", ()):
        if row["group"] != "total":
            norms.setdefault(row["side"], {})[row["group"]] = row["value"]
    return norms
