r"""Objectives that look at a whole row of logits: ETW, PDU, MASC, TPO and BST.

Symbols: z_ij logits after scale and soft cap, p = softmax(z), y_i the label, N the label tokens, sg = stop-gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from gfast.objectives.base import Objective
from gfast.ops.stat_spec import StatSpec
from gfast.ops.token_stats import MOST_TOP


@dataclass(frozen=True)
class StatObjective(Objective):
    """An objective of the statistics of a row of logits."""

    gradient: ClassVar[str] = "of logits, by their statistics"

    def stat_spec(self) -> StatSpec:
        """The numbers that ops take: see ``gfast.ops.stat_loss``."""
        raise TypeError(f"gfast: {type(self).__name__} defines no statistics.")


@dataclass(frozen=True)
class ETW(StatObjective):
    r"""Entropy-guided token weights: :math:`L = \frac1N \sum_i \mathrm{sg}(w_i) \log p_i`, :math:`w_i = n_s H_i /
    \sum_{j \in s} H_j`.

    :math:`H_i = -\sum_j q_{ij} \log q_{ij}`, :math:`q_i = \mathrm{softmax}(z_i / T)`, is the entropy of the prediction,
    s the sequence of token i and :math:`n_s` its number of label tokens: the weights of a sequence sum to it, as GA's
    do. They are 1 where every entropy of the sequence is 0. The paper sums over tokens, and leaves the scale to the
    factor of the forget loss; here it is the mean, as for GA.

    Attributes:
        temperature: T > 0, of the entropies alone.

    Source: arXiv 2604.17785, in the notation of two published summaries of it; no code was found, nor a value of T.

    Example:
        >>> import torch, gfast
        >>> logits = torch.tensor([[[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
        >>> out = gfast.unlearn_loss(logits, torch.tensor([[0, 1]]), ETW())
        >>> [round(w, 3) for w in out.weight[0].tolist()]    # the sure token is spared
        [0.278, 1.722]
    """

    temperature: float = 1.0
    key: ClassVar[str] = "etw"
    gradient: ClassVar[str] = "one weight a token, from its sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.temperature > 0, "temperature T must be > 0.")

    def stat_spec(self) -> StatSpec:
        return StatSpec("entropy", (float(self.temperature),))


@dataclass(frozen=True)
class PDU(StatObjective):
    r"""Logit-margin flattening with a dual variable: :math:`L = \frac1N \sum_i (\max_j z_{ij} - \frac1V \sum_j
    z_{ij})^2`.

    It drives the prediction towards the uniform one, without a softmax. With ``primal_dual`` `UnlearnTrainer` holds the
    retain loss at ``retain_loss_eps``: its factor, which starts as alpha, becomes :math:`\max(0, \lambda +
    \eta (L_{retain} - \epsilon))` after each step (or epoch). The dual variable is in the checkpoints.

    open-unlearning takes the margins at the places of the labels, of what follows each (its first version at every
    place of a batch, questions and padding too); here those that predict the labels, as in all objectives.
    It updates after every micro-batch of a process; here once an optimizer step, by the retain loss of all of it, which
    is the same without accumulation in one process. With ``dual_update_upon="epoch"`` it measures the retain loss of
    the whole data once more after each epoch; here it is the mean of the retain losses of the epoch's steps.

    Attributes:
        retain_loss_eps: :math:`\epsilon`, the level of the retain loss. primal_dual: whether the dual variable moves.
        dual_step_size: :math:`\eta` >= 0. dual_update_upon: "step" or "epoch". dual_warmup_epochs: it moves from the
            end of that many epochs on.

    Source: arXiv 2506.05314; its arguments and defaults are those of open-unlearning's PDU.

    Example:
        >>> import torch, gfast
        >>> gfast.unlearn_loss(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([1]), PDU()).loss.item()
        4.0
    """

    retain_loss_eps: float = 0.0
    primal_dual: bool = False
    dual_step_size: float = 1.0
    dual_update_upon: str = "step"
    dual_warmup_epochs: int = 0
    key: ClassVar[str] = "pdu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.dual_step_size >= 0, "dual_step_size must be >= 0.")
        self._require(self.dual_update_upon in ("step", "epoch"), "dual_update_upon must be 'step' or 'epoch'.")
        self._require(self.dual_warmup_epochs >= 0, "dual_warmup_epochs must be >= 0.")

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"PDU({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def stat_spec(self) -> StatSpec:
        return StatSpec("flat")


@dataclass(frozen=True)
class MASC(StatObjective):
    r"""Margin self-correction: :math:`L = \frac1N \sum_i \frac1\eta \max(0, m_i - (\tau - \eta))`, :math:`m_i = \beta
    z_{i y_i} - \log \sum_{j \in K_i} e^{\beta z_{ij}}`, :math:`\tau = \log \frac{\rho}{1 - \rho}`.

    :math:`K_i` are the k largest logits but the label's, so that :math:`\sigma(m_i)` is the label's probability among
    these (at :math:`\beta = 1`): a token stops to count once that is a little below rho. With k = 1 the margin is the
    logit gap to the best alternative, times beta.

    This is the loss with alternatives that the model itself names. The published code also takes them from the original
    model, and draws the part of each answer that counts anew in each step; here every label token counts, and with
    labels of -100 any part of an answer may be left out. Its stop, once the loss is below a threshold, is not part of
    the objective.

    Attributes:
        rho: in (0, 1), the probability among the alternatives that is aimed at. eta: > 0, buffer below tau. k: 1 to 127
            alternatives. beta: > 0, sharpness.

    Source: arXiv 2606.02920 and its published code; the defaults are those of its TOFU runs.

    Example:
        >>> import torch, gfast
        >>> loss = gfast.unlearn_loss(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]), MASC(rho=0.5, eta=1.0, k=1))
        >>> loss.loss.item()
        3.0
    """

    rho: float = 0.7
    eta: float = 0.25
    k: int = 10
    beta: float = 1.0
    key: ClassVar[str] = "masc"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.rho < 1, "rho must be between 0 and 1.")
        self._require(self.eta > 0, "eta must be > 0.")
        self._require(1 <= self.k < MOST_TOP, f"k must be 1 to {MOST_TOP - 1}.")
        self._require(self.beta > 0, "beta must be > 0.")

    def stat_spec(self) -> StatSpec:
        tau = math.log(self.rho / (1 - self.rho))
        return StatSpec("margin", (float(self.k), tau, float(self.eta), float(self.beta)))


@dataclass(frozen=True)
class TPO(StatObjective):
    r"""Logit preference loss of targeted preference optimisation: :math:`L = -\frac{2}{\beta} \log \sigma(\beta (z_o
    - \bar z_s))`, :math:`\bar z_s = \frac1{n_s} \sum_{i \in s} z_{i y_i}`, mean over sequences.

    The labels must be those of the words to forget, -100 elsewhere. The other words of an answer have a loss of their
    own, the preservation loss: ``NLL()`` over their labels, with ``reduction="sequence_mean"``, in a call of its own.

    This is the published code's loss: there the logit of the original model that a label's is compared with is
    overwritten with -1e4 first, so that :math:`z_o` is that constant, the sigmoid is saturated and the gradient is
    :math:`2 \nabla \bar z_s`. It takes the sigmoid of the mean over the sequences of a batch, which is the same as long
    as it is saturated. The paper's own formula could not be read.

    Attributes:
        beta: > 0. floor: z_o.

    Source: the published code of arXiv 2506.03142; beta is that of its TOFU runs.

    Example:
        >>> import torch, gfast
        >>> out = gfast.unlearn_loss(torch.tensor([[[3.0, 0.0], [1.0, 0.0]]]), torch.tensor([[0, 0]]), TPO(floor=0.0))
        >>> round(out.loss.item(), 3)    # (2 / 0.32) log(1 + exp(0.32 * 2))
        6.647
    """

    beta: float = 0.32
    floor: float = -1e4
    key: ClassVar[str] = "tpo"
    default_reduction: ClassVar[str] = "sequence_mean"
    positive: ClassVar[tuple[str, ...]] = ("beta",)

    def stat_spec(self) -> StatSpec:
        return StatSpec("logit", (float(self.beta), float(self.floor)))


@dataclass(frozen=True)
class BST(StatObjective):
    r"""Bootstrapping by tokens (BS-T): :math:`L = \frac1N \sum_i \sum_j t_{ij} \log p_{ij}`, :math:`t_i = \lambda\,
    \mathrm{sg}(q_i) + (1 - \lambda) e_{y_i}`.

    :math:`q_i = \mathrm{softmax}(z_i)` over the k largest logits alone: what the model believes beside the label, where
    the probability goes that ascent takes from it. :math:`\lambda = 0` is GA; with k = V the second term's gradient is
    none. The paper sums over the tokens of an answer; its code takes the mean of each answer, then of the answers; here
    it is the mean over the tokens, as for GA.

    Attributes:
        lambda_bst: :math:`\lambda`, in [0, 1). top_k: 1 to 128 logits.

    Source: arXiv 2510.19422 (equations 6 and 7), as in its published code; the defaults are those of its configuration.

    Example:
        >>> import torch, gfast
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
        >>> gfast.unlearn_loss(logits, torch.tensor([1]), BST(lambda_bst=0.5, top_k=1)).loss.backward()
        >>> [round(x, 3) for x in logits.grad[0].tolist()]    # t - p: both the label and the belief 0 go down
        [-0.165, 0.255, -0.09]
    """

    lambda_bst: float = 0.2
    top_k: int = 20
    key: ClassVar[str] = "bst"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.lambda_bst < 1, "lambda_bst must be in [0, 1).")
        self._require(1 <= self.top_k <= MOST_TOP, f"top_k must be 1 to {MOST_TOP}.")

    def stat_spec(self) -> StatSpec:
        return StatSpec("beliefs", (float(self.lambda_bst), float(self.top_k)))
