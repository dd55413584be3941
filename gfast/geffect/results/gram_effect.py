"""Gradient effects of pairs of samples, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gfast.geffect.results.base import Effect, Norms, row_values, rows_by, tensors_by_group
from gfast.geffect.results.sample_effect import SampleEffect
from gfast.objectives import NLL
from gfast.sides import SIDES


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
        unlearn = self.total("unlearn")
        norm = _norms(unlearn)  # [S_f]
        return -unlearn / (norm[:, None] * norm)

    def samples(self) -> SampleEffect:
        """The effect of each forget sample on the token-mean NLL of both sets, as `pg_effect` measures it, with the
        norms ||grad log p(s)|| that `pg_effect` does not have.

        Of the risk's gradients only the norm on the forget set follows from the pairs.
        """
        sides = {side: "forget" if side == "unlearn" else "retain" for side in SIDES}
        counts = {side: int(self.tokens[source].sum()) for side, source in sides.items()}
        parts = (
            {group: matrix.sum(1) / max(counts[side], 1) for group, matrix in self._side(side).items()}
            for side in SIDES
        )
        whole = {group: float((-matrix.sum()).clamp(min=0).sqrt()) for group, matrix in self.unlearn.items()}
        norms = {"unlearn": {group: value / max(counts["unlearn"], 1) for group, value in whole.items()}}
        unlearn_norms = {group: _norms(matrix) for group, matrix in self.unlearn.items()}
        return SampleEffect(*parts, self.tokens["forget"], norms, str(NLL()), counts, sample_norms=unlearn_norms)

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
        by_quantity = rows_by(rows, "quantity")
        counted = rows_by(by_quantity["tokens"], "side")
        tokens = {source: row_values(set_rows).long() for source, set_rows in counted.items()}
        effects = rows_by(by_quantity["gram"], "side")
        size = len(tokens["forget"])
        sides = ({g: v.view(size, -1) for g, v in tensors_by_group(effects[side]).items()} for side in SIDES)
        return cls(*sides, tokens, **scalars)


def _norms(matrix: Tensor) -> Tensor:
    """||grad log p(s)|| of each sample [S] from products [S, S] of grad NLL = -grad log p and grad log p."""
    return (-matrix.diagonal()).clamp(min=0).sqrt()
