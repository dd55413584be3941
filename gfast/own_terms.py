# SPDX-License-Identifier: Apache-2.0
"""What a model adds to the cross-entropy in its own loss: its loss, computed with that cross-entropy taken out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gfast.deferred import DeferredLogits, real_arguments
from gfast.ops.checks import IGNORE_INDEX

_ARGUMENTS = inspect.signature(F.cross_entropy)


class WithoutCrossEntropy(TorchFunctionMode):
    """Inside, one cross-entropy of the labels is 0, whatever the model then makes of it: scaled, or summed and divided
    by a number of its own. Of a smoothed or weighted one what it has beside the plain one is left.

    labels: [B, T], as the batch has them; a cross-entropy of other ones is a term like any other. which: of those of
    these labels that are computed from logits (not deferred), the one that is taken out.
    """

    def __init__(self, labels: Tensor, which: int = 0) -> None:
        super().__init__()
        self.rows, self.which = labels[:, 1:].reshape(-1), which
        self.labels = self.rows[self.rows != IGNORE_INDEX]
        self.means: list[Tensor] = []  # of all of them, the plain token means

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.cross_entropy:
            return func(*args, **kwargs)
        given = _ARGUMENTS.bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        if not self._of_labels(values["target"], values["ignore_index"]):
            args, kwargs = real_arguments(args, kwargs)
            return func(*args, **kwargs)
        value = func(*args, **kwargs)
        if isinstance(values["input"], DeferredLogits) and values["input"].computed is None:
            return value  # left out already
        plain = value
        if values["weight"] is not None or values["label_smoothing"]:
            options = {name: values[name] for name in ("ignore_index", "reduction")}
            plain = func(values["input"], values["target"], **options)
        mean = plain.detach() if values["reduction"] == "mean" else plain.detach().sum() / max(len(self.labels), 1)
        self.means.append(mean)
        if len(self.means) - 1 != self.which:
            return value
        return torch.zeros_like(value) if plain is value else value - plain

    def _of_labels(self, target: Any, ignored: int) -> bool:
        if not isinstance(target, Tensor) or target.is_floating_point():
            return False
        target = target.reshape(-1)
        return torch.equal(target[target != ignored].to(self.labels), self.labels)

    def place_of(self, logits: Tensor) -> int | None:
        """Which of them is that of the logits [B, T, V] that the model answers with; None where it has none."""
        if not len(self.labels):
            return self.which  # of no token
        with torch.no_grad():
            rows = logits[:, :-1].flatten(0, 1)
            rows = rows.float() if rows.dtype.itemsize < 4 else rows
            mean = F.cross_entropy(rows, self.rows)
        rounding = 2e-2 if logits.dtype.itemsize < 4 else 1e-4
        near = [bool((value - mean).abs() <= rounding * max(1.0, float(mean.abs()))) for value in self.means]
        if True not in near:
            return None
        return self.which if self.which < len(near) and near[self.which] else near.index(True)
