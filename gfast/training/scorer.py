# SPDX-License-Identifier: Apache-2.0
"""ATWU: weights of the forget tokens by a scorer of hidden states that is trained beside the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from gfast import packed
from gfast.model_output import ModelOutput, output_logp, shifted, unshifted
from gfast.objectives.registry import parse_parameters
from gfast.ops.checks import IGNORE_INDEX
from gfast.tensor_files import TensorFile, write_tensors

FILE = "scorer.safetensors"  # in a checkpoint, and beside the model at the end
_EDGE = 1e-6  # from 0 and 1 where the entropy of a score is taken


@dataclass(frozen=True)
class ATWU:
    r"""Alternating token-weighted unlearning: what its scorer does, and how it learns.

    .. math::
        g_i = \sigma(\phi^\top h_i + b), \qquad w_i = \mathrm{sg}(g_i\, p_i^{\beta g_i})

    .. math::
        \mathcal L(\phi) = \frac1N \sum_i (1 - g_i) (-\log p_i) + \lambda_H \frac1N \sum_i H(g_i)
            + \lambda_B \frac1S \sum_s (m_s - m)^2 + \lambda_2 (\lVert \phi \rVert^2 + b^2)

    over the N label tokens and S texts of a step's forget batches. h_i [D]: what the head reads at token i, constant
    here; H: the entropy of a coin; m_s: the share of a text's tokens with :math:`g_i > 1/2`, with the gradient of their
    mean score in its place. The weights multiply the objective's own: with GA they are ATWU's. A score begins at 1/2.

    Every `every` steps :math:`\phi` takes a step of SGD on the forget batches of that step, after the model's: any
    split into micro-batches and processes gives the same.

    Args:
        beta: how fast a forgotten token's weight falls; 0: not at all.
        every: optimizer steps from one step of the scorer to the next.
        lr: learning rate of its SGD.
        momentum: of its SGD.
        weight_decay: of its SGD, beside :math:`\lambda_2`.
        max_norm: what its gradient's norm is clipped to.
        entropy: :math:`\lambda_H`.
        population: :math:`\lambda_B`.
        l2: :math:`\lambda_2`.
        budget: m, the share of a text's tokens that are to count.

    Raises:
        ValueError: a number outside its range, naming it.

    Source: arXiv 2606.06320, from its authors' code (the paper's text was not read): defaults of their configuration;
    their runs on TOFU have every=5, population=10, l2=1 and a rate that falls to 0. They train the scorer before
    the model in a step, on each micro-batch's own mean.

    Example:
        >>> ATWU.parse("beta=2,every=5").beta
        2
    """

    beta: float = 5.0
    every: int = 10
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    max_norm: float = 1.0
    entropy: float = 1.0
    population: float = 1.0
    l2: float = 0.01
    budget: float = 0.2

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            whole = entry.name == "every"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"ATWU: {entry.name} is {value!r}; give a {'whole ' if whole else ''}number")
            least, most = {"every": (1, math.inf), "budget": (0, 1), "momentum": (0, 1)}.get(entry.name, (0, math.inf))
            if not (math.isfinite(value) and least <= value <= most) or (
                entry.name in ("lr", "max_norm") and not value
            ):
                raise ValueError(
                    f"ATWU: {entry.name} is {value}; it must be in [{least}, {most}], lr and max_norm above 0"
                )

    @classmethod
    def parse(cls, text: str) -> ATWU:
        """From "beta=2,every=5", as behind the colon of ``--weights atwu:...``; "" has the defaults."""
        entries = [entry for entry in text.replace(" ", "").split(",") if entry]
        if bad := [entry for entry in entries if not entry.partition("=")[2]]:
            raise ValueError(f"weights='atwu:{text}': {bad[0]!r} should read name=number, as in atwu:beta=5,every=10")
        given = parse_parameters(entries)
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"weights='atwu' has no {', '.join(unknown)}; it takes {', '.join(known)}")
        return cls(**given)


class ScorerWeights(TrainerCallback):
    """Gives a trainer's forget batches the weights of ATWU, and trains its scorer.

    Attributes:
        settings: what it does.
        phi, bias: the scorer, parameters [D] and [1]; None before the first batch.
    """

    reads_answer = True  # what the model has answered, to weigh it

    def __init__(self, trainer: Any, settings: ATWU) -> None:
        self.trainer, self.settings = trainer, settings
        self._begin()

    def _begin(self) -> None:
        self.phi: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        self._optimizer: torch.optim.SGD | None = None
        self._sums: Tensor | None = None  # of this step: gradients over tokens and over texts [2, D + 1], N, S
        self._saved: TensorFile | None = None

    def scores(self, hidden: Tensor) -> Tensor:
        """g [...] of hidden states [..., D]; differentiable in phi and bias."""
        return torch.sigmoid(hidden.detach().to(self.phi.dtype) @ self.phi + self.bias)

    def of(self, batch: Mapping[str, Any], answer: ModelOutput | None) -> Tensor:
        """[B, T] aligned with the labels of a forget batch, 0 where they are ignored."""
        if batch.get("weight") is not None:
            raise ValueError("weights='atwu' gives the tokens weights, and the data has a 'weight' too")
        if answer.head is None:
            raise ValueError(
                "weights='atwu' scores what the model's head reads, and this model computes its logits in another way "
                "(the log says how): there are no such hidden states. Use weights='retain_conflict'"
            )
        labels, hidden = batch["labels"], answer.value.detach()  # [B, T], [B, T, D]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            logp = unshifted(output_logp(answer._replace(value=hidden), shifted(labels)))  # [B, T]
            self._ready(hidden, logp.dtype)
            g = self.scores(hidden)
            valid = labels != IGNORE_INDEX
            valid[:, 0] = False  # nothing scores the first
            weight = torch.where(valid, g * torch.exp(self.settings.beta * g * logp), 0.0)
            if (self.trainer.state.global_step + 1) % self.settings.every == 0:
                self._add(hidden[valid], -logp[valid], _texts(batch)[valid])
        return weight

    def _ready(self, hidden: Tensor, dtype: torch.dtype) -> None:
        """The scorer on the device and for the width of what it scores."""
        if self.phi is not None:
            return
        size, options = hidden.shape[-1], dict(dtype=dtype, device=hidden.device)
        self.phi, self.bias = (nn.Parameter(torch.zeros(n, **options)) for n in (size, 1))
        s = self.settings
        self._optimizer = torch.optim.SGD(
            [self.phi, self.bias], lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay
        )
        if self._saved is None:
            return
        if tuple(self._saved.get("phi").shape) != (size,):
            raise ValueError(
                f"the scorer of the checkpoint reads {len(self._saved.get('phi'))} hidden units, the model has {size}"
            )
        for name, parameter in self._named():
            parameter.data.copy_(self._saved.get(name))
            if f"{name}_momentum" in self._saved.names:
                buffer = self._saved.get(f"{name}_momentum").to(parameter)
                self._optimizer.state[parameter]["momentum_buffer"] = buffer

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [("phi", self.phi), ("bias", self.bias)]

    @torch.enable_grad()
    def _add(self, hidden: Tensor, nll: Tensor, texts: Tensor) -> None:
        """The gradients of a micro-batch's sums: hidden [N, D], nll [N], texts int64 [N]."""
        g = self.scores(hidden)  # [N]
        sure = g.clamp(_EDGE, 1 - _EDGE)
        entropy = -(sure * sure.log() + (1 - sure) * (1 - sure).log())
        over_tokens = ((1 - g) * nll + self.settings.entropy * entropy).sum()
        _, texts = torch.unique(texts, return_inverse=True)
        lengths = torch.bincount(texts).to(g.dtype)  # [S]
        chosen = (g > 0.5).to(g.dtype) - g.detach() + g  # its value is 0 or 1, its gradient that of g
        shares = g.new_zeros(len(lengths)).index_add(0, texts, chosen) / lengths
        over_texts = ((shares - self.settings.budget) ** 2).sum()
        scorer = (self.phi, self.bias)
        rows = [torch.cat(torch.autograd.grad(x, scorer, retain_graph=True)) for x in (over_tokens, over_texts)]
        counts = torch.stack([lengths.sum(), lengths.new_tensor(float(len(lengths)))])
        sums = torch.cat([*rows, counts]).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._sums is None:
            return
        sums, self._sums = self._sums, None
        if self.trainer.accelerator.num_processes > 1:
            sums = self.trainer.accelerator.reduce(sums, "sum")
        (tokens, texts), (labels, count) = sums[:-2].view(2, -1), sums[-2:].clamp(min=1.0)
        s, parameters = self.settings, [self.phi, self.bias]
        gradient = tokens / labels + s.population * texts / count  # [D + 1]
        gradient = gradient + 2 * s.l2 * torch.cat([self.phi.detach(), self.bias.detach()])
        for parameter, part in zip(parameters, gradient.split([len(self.phi), 1]), strict=True):
            parameter.grad = part.to(parameter.dtype)
        nn.utils.clip_grad_norm_(parameters, s.max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.save(args.output_dir)

    def save(self, folder: str) -> None:
        """Into a checkpoint, or beside the model."""
        if self.phi is None or not self.trainer.args.should_save:
            return
        tensors = dict(self._named())
        for name, parameter in self._named():
            buffer = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            tensors |= {} if buffer is None else {f"{name}_momentum": buffer}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_tensors(Path(folder) / FILE, tensors)

    def load(self, folder: str | None) -> None:
        """From a checkpoint, or from None: a training that begins."""
        self._begin()
        if folder is None:
            return
        if not (Path(folder) / FILE).exists():
            raise ValueError(
                f"the checkpoint {folder} has no {FILE}, the scorer that the run goes on with: it is one of a run "
                f"without; start a run of its own in another output folder"
            )
        self._saved = TensorFile(Path(folder) / FILE, "go on from the checkpoint before it")


def _texts(batch: Mapping[str, Any]) -> Tensor:
    """The number of each token's text, int64 [B, T]."""
    labels, ids = batch["labels"], packed.texts(batch)
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    return rows.expand_as(labels) if ids is None else ids.to(labels.device)
