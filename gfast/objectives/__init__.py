"""Unlearning objectives as formulas over one primitive: detached weights on token log-prob gradients.

``REGISTRY`` maps the short lower-case name of every objective to its class.
"""

from __future__ import annotations

from gfast.objectives.base import Objective, from_name
from gfast.objectives.hidden import KL, RMU, RR
from gfast.objectives.mix import Mix
from gfast.objectives.sequence import DPO, NPO, SimNPO
from gfast.objectives.token import GA, NLL, PO, TNPO, WGA, WTNPO, SatImp

REGISTRY: dict[str, type[Objective]] = {
    cls.key: cls for cls in (GA, WGA, SatImp, TNPO, WTNPO, NPO, SimNPO, DPO, PO, NLL, KL, RMU, RR)
}

__all__ = [*(cls.__name__ for cls in REGISTRY.values()), "Mix", "Objective", "REGISTRY", "from_name"]
