"""Objectives whose weight depends on one token: GA, WGA, SatImp, TNPO, WTNPO, and the likelihood terms NLL and PO.

Symbols: p_i = p(s_i | s_<i; theta), p_o,i the same under the original model, logp = log p, sg = stop-gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gfast.objectives.base import WeightedObjective
from gfast.ops.weights import WeightSpec


@dataclass(frozen=True)
class GA(WeightedObjective):
    r"""Gradient ascent: :math:`L = \frac1N \sum_i \log p_i`, weight 1.

    Source: arXiv 2502.19301, equation 2 (and Jang et al., 2023). Its code: ga. open-unlearning: GradAscent.

    Example:
        >>> GA().spec().sign
        1.0
    """

    key: ClassVar[str] = "ga"

    def spec(self) -> WeightSpec:
        return WeightSpec()


@dataclass(frozen=True)
class WGA(WeightedObjective):
    r"""Weighted gradient ascent: :math:`L = \frac1N \sum_i \mathrm{sg}(p_i^\alpha) \log p_i`.

    Attributes:
        alpha: >= 0; 0 is GA. Larger values spare tokens that are already forgotten.

    Source: arXiv 2502.19301, section 4. Its code: wga. open-unlearning: WGA (its ``beta`` is this alpha).

    Example:
        >>> WGA(alpha=0.5)
        WGA(alpha=0.5)
    """

    alpha: float = 1.0
    key: ClassVar[str] = "wga"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.alpha >= 0, "alpha must be >= 0; a negative power gives forgotten tokens unbounded weight.")

    def spec(self) -> WeightSpec:
        return WeightSpec(p_pow=float(self.alpha))


@dataclass(frozen=True)
class SatImp(WeightedObjective):
    r"""Saturation-importance weights: :math:`w_i = \mathrm{sg}(p_i^{\beta_1} (1 - p_i)^{\beta_2})`.

    Attributes:
        beta1: >= 0, saturation. beta2: >= 0, importance. The defaults are open-unlearning's; the authors' own code now
            recommends beta2 = 0.1.

    Source: arXiv 2505.11953. open-unlearning: SatImp.

    Example:
        >>> SatImp(beta1=5.0, beta2=1.0).spec().q_pow
        1.0
    """

    beta1: float = 5.0
    beta2: float = 1.0
    key: ClassVar[str] = "satimp"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.beta1 >= 0 and self.beta2 >= 0, "beta1 and beta2 must be >= 0.")

    def spec(self) -> WeightSpec:
        return WeightSpec(p_pow=float(self.beta1), q_pow=float(self.beta2))


@dataclass(frozen=True)
class SimSat(WeightedObjective):
    r"""Saturation alone: :math:`w_i = \mathrm{sg}(p_i^\beta)`, WGA's weight under another name.

    The published code takes the exponent 1 without a retain term, whatever beta is, and beta with one.

    Attributes:
        beta: >= 0.

    Source: arXiv 2505.11953 and its code, github.com/tmlr-group/SatImp. Its code: simsat_gd.

    Example:
        >>> SimSat(beta=2.0).spec() == WGA(alpha=2.0).spec()
        True
    """

    beta: float = 5.0
    key: ClassVar[str] = "simsat"
    not_negative: ClassVar[tuple[str, ...]] = ("beta",)

    def spec(self) -> WeightSpec:
        return WeightSpec(p_pow=float(self.beta))


@dataclass(frozen=True)
class SimImp(WeightedObjective):
    r"""Importance alone: :math:`w_i = \mathrm{sg}((1 - p_i)^\beta)`.

    Attributes:
        beta: >= 0.

    Source: arXiv 2505.11953 and its code, github.com/tmlr-group/SatImp. Its code: simimp_ga.

    Example:
        >>> SimImp().spec().q_pow
        5.0
    """

    beta: float = 5.0
    key: ClassVar[str] = "simimp"
    not_negative: ClassVar[tuple[str, ...]] = ("beta",)

    def spec(self) -> WeightSpec:
        return WeightSpec(q_pow=float(self.beta))


@dataclass(frozen=True)
class TNPO(WeightedObjective):
    r"""Token-wise NPO: :math:`w_i = \mathrm{sg}\, 2 p_i^\beta / (p_i^\beta + p_{o,i}^\beta)
    = 2 \sigma(\beta (\log p_i - \log p_{o,i}))`.

    The published code adds 1e-5 to the denominator; here there is no epsilon, and the weight is 1 on the original
    model.

    Attributes:
        beta: > 0, inverse temperature.

    Source: arXiv 2502.19301, section 4. Its code: tnpo, ins_npo.

    Example:
        >>> sorted(TNPO(beta=1.0).needs)
        ['ref_logp']
    """

    beta: float = 1.0
    key: ClassVar[str] = "tnpo"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logp"})
    positive: ClassVar[tuple[str, ...]] = ("beta",)

    def spec(self) -> WeightSpec:
        return WeightSpec(beta=float(self.beta), uses_ref=True)


@dataclass(frozen=True)
class WTNPO(WeightedObjective):
    r"""Weighted TNPO: :math:`w_i = \mathrm{sg}(p_i^\alpha)` times TNPO's weight.

    Attributes:
        alpha: >= 0. beta: > 0.

    Source: arXiv 2502.19301, section 4 and appendix. Its code: wtnpo, w_ins_npo.

    Example:
        >>> WTNPO(alpha=0.5, beta=1.0).spec().p_pow
        0.5
    """

    alpha: float = 1.0
    beta: float = 1.0
    key: ClassVar[str] = "wtnpo"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logp"})
    not_negative: ClassVar[tuple[str, ...]] = ("alpha",)
    positive: ClassVar[tuple[str, ...]] = ("beta",)

    def spec(self) -> WeightSpec:
        return WeightSpec(p_pow=float(self.alpha), beta=float(self.beta), uses_ref=True)


@dataclass(frozen=True)
class NLL(WeightedObjective):
    r"""Negative log-likelihood: :math:`L = -\frac1N \sum_i \log p_i`, weight -1: the risk R, and the retain term of GD.

    Source: arXiv 2502.19301, section 2. Its code: gd. open-unlearning: the retain loss "NLL" of GradDiff.

    Example:
        >>> NLL().spec().sign
        -1.0
    """

    key: ClassVar[str] = "nll"

    def spec(self) -> WeightSpec:
        return WeightSpec(sign=-1.0)


@dataclass(frozen=True)
class PO(WeightedObjective):
    r"""Preference optimisation by refusal: NLL of a refusal ("I don't know") that replaces the forget answer.

    The labels of the batch must be those of the refusal; ``gfast.data.RefusalDataset`` makes such batches.

    Source: Maini et al., arXiv 2401.06121 (IDK); arXiv 2502.19301, section 3. Its code: idk.

    Example:
        >>> sorted(PO().needs)
        ['refusal']
    """

    key: ClassVar[str] = "po"
    needs: ClassVar[frozenset[str]] = frozenset({"refusal"})

    def spec(self) -> WeightSpec:
        return WeightSpec(sign=-1.0)
