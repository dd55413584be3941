"""Unlearning objectives as formulas over one primitive: detached weights on token log-prob gradients.

``REGISTRY`` maps the short lower-case name of every objective to its class.
"""

from __future__ import annotations

from gfast.objectives.base import Objective, Weights, as_objective
from gfast.objectives.given import HardMask, SoftMask
from gfast.objectives.hidden import KL, RMU, RR
from gfast.objectives.logits import BST, ETW, MASC, PDU, TPO
from gfast.objectives.mix import Mix
from gfast.objectives.registry import REGISTRY, from_name
from gfast.objectives.samples import BalDRO, BalDROG
from gfast.objectives.sequence import DPO, NPO, SimNPO
from gfast.objectives.soft import CEU, JSD, SHRED, UNDIAL, JensUn, OfLabel, SoftTarget, Unilogit
from gfast.objectives.token import GA, NLL, PO, TNPO, WGA, WTNPO, SatImp, SimImp, SimSat

# Objectives without token weights
UNWEIGHTED = (KL, RMU, RR, SoftTarget, OfLabel)

__all__ = [
    "BST",
    "BalDRO",
    "BalDROG",
    "CEU",
    "DPO",
    "ETW",
    "GA",
    "HardMask",
    "JSD",
    "JensUn",
    "KL",
    "MASC",
    "Mix",
    "NLL",
    "NPO",
    "Objective",
    "PDU",
    "PO",
    "REGISTRY",
    "RMU",
    "RR",
    "SHRED",
    "SatImp",
    "SimImp",
    "SimNPO",
    "SimSat",
    "SoftMask",
    "TNPO",
    "TPO",
    "UNDIAL",
    "Unilogit",
    "WGA",
    "WTNPO",
    "Weights",
    "as_objective",
    "from_name",
]
