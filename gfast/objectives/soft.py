"""Objectives that move the model to another distribution over the vocabulary: UNDIAL, CE-U, SHRED, JSD, and, through
the probability of one token alone, Unilogit and JensUn.

Symbols: p_i = p(. | s_<i; theta) over the vocabulary, z_i its logits, p_o,i and z_o,i the same under the original
model, y = s_i the label, e_y one at the label and zero elsewhere, V the size of the vocabulary, sg = stop-gradient, N
valid tokens. A target q is constant: the gradient of each but JSD is (p - q) / N with respect to the logits, or a
weight times grad log p of one token.

Not here: DiPO (arXiv 2510.04773), whose loss could not be read; and the smoothed gradient ascent of arXiv 2510.22376,
which smooths over samples, not over the vocabulary: Mix(GA(), NLL(), gamma, alpha) with its normal data as retain set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gfast.objectives.base import Objective
from gfast.ops.checks import IGNORE_INDEX


def _texts(labels: Tensor, sequence_id: Tensor | None) -> Tensor:
    """The text of each label [B T], or B T where it is ignored."""
    if sequence_id is None:
        sequence_id = torch.arange(labels.shape[0], device=labels.device)[:, None].expand(labels.shape)
    return torch.where(labels != IGNORE_INDEX, sequence_id, labels.numel()).reshape(-1)


def _places(texts: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The rank of each label among those of its text, in a given order, and their number: int64 [B T] each."""
    order = order[texts[order].argsort(stable=True)]
    size = torch.zeros(texts.numel() + 1, dtype=torch.long, device=texts.device)
    size.index_add_(0, texts, torch.ones_like(texts))
    begin = size.cumsum(0) - size
    rank = torch.empty_like(texts)
    rank[order] = torch.arange(texts.numel(), device=texts.device) - begin[texts[order]]
    return rank, size[texts]


@dataclass(frozen=True)
class SoftTarget(Objective):
    """Base of objectives against q = softmax(x - beta e_y): see ``gfast.soft_target_loss``.

    Class attributes:
        kind: of divergence. own: x are the model's own logits, detached, not the original's.
    """

    kind: ClassVar[str] = "cross_entropy"
    own: ClassVar[bool] = False
    gradient: ClassVar[str] = "of logits, against targets q"

    def lowering(self, labels: Tensor, ref_logp: Tensor | None, sequence_id: Tensor | None) -> float | Tensor:
        """beta, one number or one a label.

        Args:
            labels: [B, T], -100 ignored. ref_logp: [B, T], aligned with labels. sequence_id: [B, T], of the texts where
                rows hold several; None: a row is a text.
        """
        return 0.0


@dataclass(frozen=True)
class UNDIAL(SoftTarget):
    r"""Self-distillation from adjusted logits: :math:`L = -\frac1N \sum_i \sum_v q_{iv} \log p_{iv}`,
    :math:`q_i = \mathrm{softmax}(z_{o,i} - \beta e_y)`.

    The published code takes the mean over all positions, those of the question and of padding as well; here, as in all
    objectives, over the valid tokens.

    Attributes:
        beta: >= 0, what is taken off the label's logit; 0 keeps the original model. 10 in open-unlearning's
            configuration (1 in its class), 3 to 30 in the paper.

    Source: arXiv 2402.10052. open-unlearning: UNDIAL.

    Example:
        >>> sorted(UNDIAL(beta=10.0).needs)
        ['ref_head', 'ref_hidden']
    """

    beta: float = 10.0
    key: ClassVar[str] = "undial"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_hidden", "ref_head"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.beta >= 0, "beta must be >= 0; a negative one would teach the label.")

    def lowering(self, labels: Tensor, ref_logp: Tensor | None, sequence_id: Tensor | None) -> float | Tensor:
        return float(self.beta)


@dataclass(frozen=True)
class CEU(SoftTarget):
    r"""Cross-entropy unlearning: :math:`L = -\frac1N \sum_i \sum_v q_{iv} \log p_{iv}`, with q the model's own
    distribution without the label, :math:`q_i = \mathrm{sg}\,\mathrm{softmax}(z_i - \infty e_y)`.

    Its gradient is that of :math:`-\log(1 - p_y)`: bounded, and zero once the label has no probability.

    The published code leaves out the first token of every answer. Here every label counts: set those to -100 in the
    batch (open-unlearning's trainer does, also with gfast's losses: ``ignore_first_n_answer_tokens``).

    Source: arXiv 2503.01224. open-unlearning: CEU.

    Example:
        >>> CEU().needs
        frozenset()
    """

    key: ClassVar[str] = "ceu"
    own: ClassVar[bool] = True

    def lowering(self, labels: Tensor, ref_logp: Tensor | None, sequence_id: Tensor | None) -> float | Tensor:
        return math.inf


@dataclass(frozen=True)
class SHRED(SoftTarget):
    r"""Self-distillation with demoted logits: :math:`L = \frac1N \sum_i \mathrm{KL}(q_i \,\|\, p_i)`, where
    :math:`q_i = p_{o,i}` without the label, divided by what is left, at the tokens of each text that the original model
    gives the lowest probabilities, and :math:`q_i = p_{o,i}` at all others, which needs no retain set.

    From the paper's figure of the method, variant A; its text and code could not be read. There the sum over tokens
    stands for their mean, and the original's distributions are stored by their top-K entries: here they come from
    hidden states and are whole.

    Attributes:
        share: in (0, 1], of a text's tokens that are forgotten, the lowest; rounded up.

    Source: arXiv 2605.07482.

    Example:
        >>> import torch
        >>> ref_logp = torch.tensor([[-1.0, -9.0, -2.0, -0.1]])
        >>> SHRED(share=0.5).lowering(torch.tensor([[5, 6, 7, 8]]), ref_logp, None)
        tensor([[0., inf, inf, 0.]])
    """

    share: float = 0.5
    key: ClassVar[str] = "shred"
    kind: ClassVar[str] = "kl"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_hidden", "ref_head", "ref_logp"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.share <= 1, "share must be in (0, 1]: of a text's tokens.")

    def lowering(self, labels: Tensor, ref_logp: Tensor | None, sequence_id: Tensor | None) -> float | Tensor:
        texts = _texts(labels, sequence_id)
        rank, size = _places(texts, ref_logp.reshape(-1).argsort(stable=True))
        chosen = (rank < torch.ceil(self.share * size.double() - 1e-9)) & (texts < labels.numel())
        return ref_logp.new_zeros(labels.numel()).masked_fill_(chosen, math.inf).view(labels.shape)


@dataclass(frozen=True)
class JSD(SoftTarget):
    r"""Keep the original model's predictions, bounded: the Jensen-Shannon divergence :math:`L = \frac1N \sum_i
    \frac12 \mathrm{KL}(p_{o,i} \,\|\, m_i) + \frac12 \mathrm{KL}(p_i \,\|\, m_i)`, :math:`m_i = (p_{o,i} + p_i) / 2`,
    at most log 2.

    JensUn's retain term. Its gradient is :math:`p (h - \sum_v p_v h_v)`, :math:`h = \frac12 \log(p/m)`. The published
    code raises m to 1e-10; here there is no epsilon.

    Source: arXiv 2509.02820. JensUn's code: retain_loss_type JensUn.

    Example:
        >>> JSD().key
        'jsd'
    """

    key: ClassVar[str] = "jsd"
    kind: ClassVar[str] = "js"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_hidden", "ref_head"})


@dataclass(frozen=True)
class OfLabel(Objective):
    """Base of objectives that are the mean of a function of the log-prob of one token a position."""

    gradient: ClassVar[str] = "of a function of log p"

    def target(self, labels: Tensor, sequence_id: Tensor | None) -> Tensor:
        """The token of each position [B, T], -100 where ignored; see ``SoftTarget.lowering``."""
        return labels

    def check(self, vocab: int) -> None:
        """ValueError for tokens that a vocabulary does not have."""

    def value(self, logp: Tensor, vocab: int) -> Tensor:
        """L_i, differentiable, of log-probs in at least fp32; finite and without NaN in its gradient at logp = 0."""
        raise TypeError(f"gfast: {type(self).__name__} defines no value.")


@dataclass(frozen=True)
class Unilogit(OfLabel):
    r"""Self-distillation to a uniform label: :math:`L = \frac1N \sum_i \mathrm{KL}(p_i \,\|\, q_i)`, with q the model's
    own distribution, detached, whose label's logit is set so that :math:`q_y = 1/V`.

    The other entries of q are those of p times one factor, so that L depends on the label's probability alone:
    :math:`p_y \log(V p_y) + (1 - p_y) \log\frac{1 - p_y}{1 - 1/V}`, and its gradient is
    :math:`\mathrm{sg}(p_y (\log\frac{p_y}{1 - p_y} + \log(V - 1))) \nabla \log p_y`.

    The direction of the divergence, from the model to its target, is that of two open implementations that follow the
    authors' code; the paper's own text could not be read.

    Source: arXiv 2505.06027.

    Example:
        >>> import torch
        >>> round(Unilogit().value(torch.tensor(0.5).log(), 4).item(), 4)
        0.1438
    """

    key: ClassVar[str] = "unilogit"

    def value(self, logp: Tensor, vocab: int) -> Tensor:
        p, rest = logp.exp(), (-torch.expm1(logp)).clamp(min=torch.finfo(logp.dtype).tiny)
        return p * (logp + math.log(vocab)) + rest * (rest.log() - math.log1p(-1.0 / vocab))


@dataclass(frozen=True)
class JensUn(OfLabel):
    r"""Forget by a fixed answer, bounded: :math:`L = \frac1N \sum_i \mathrm{JS}(p_i, e_{c_i})`, the Jensen-Shannon
    divergence from tokens c of a refusal, over and over again, in the place of the labels of each text.

    It depends on the probability of c alone: :math:`\log 2 + \frac12 p_c \log p_c - \frac12 (1 + p_c) \log(1 + p_c)`,
    with the gradient :math:`\frac12 p_c \log\frac{p_c}{1 + p_c} \nabla \log p_c`. Its retain term is ``JSD``.

    The published code raises probabilities to 1e-9; here there is no epsilon.

    Attributes:
        target_ids: token ids of the refusal. The code takes those of " No idea", 2822 and 4623 for Llama 3, 1939 and
            2969 for Phi.

    Source: arXiv 2509.02820. JensUn's code: JensUn.

    Example:
        >>> import torch
        >>> JensUn(target_ids=(2, 3)).target(torch.tensor([[-100, 7, 8, 9]]), None)
        tensor([[-100,    2,    3,    2]])
    """

    target_ids: tuple[int, ...]
    key: ClassVar[str] = "jensun"

    def __post_init__(self) -> None:
        given = self.target_ids
        object.__setattr__(self, "target_ids", (given,) if isinstance(given, int) else tuple(given))
        super().__post_init__()
        fine = self.target_ids and all(
            isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in self.target_ids
        )
        self._require(bool(fine), "target_ids must be token ids (whole numbers >= 0), at least one.")

    def check(self, vocab: int) -> None:
        self._require(max(self.target_ids) < vocab, f"target_ids must be token ids of the model, below {vocab}.")

    def target(self, labels: Tensor, sequence_id: Tensor | None) -> Tensor:
        texts = _texts(labels, sequence_id)
        place, _ = _places(texts, torch.arange(texts.numel(), device=texts.device))
        tokens = torch.tensor(self.target_ids, device=labels.device)[place % len(self.target_ids)]
        return torch.where(labels != IGNORE_INDEX, tokens.view(labels.shape), IGNORE_INDEX)

    def value(self, logp: Tensor, vocab: int) -> Tensor:
        p = logp.exp()
        return math.log(2.0) + 0.5 * p * logp - 0.5 * (1 + p) * torch.log1p(p)
