"""Gradient effects: what a step on an unlearning objective does to the risk of forget and retain data, by layer."""

from gfast.geffect.api import ENGINES, g_effect, gram_effect, pg_effect, risk_gradients, token_effect
from gfast.geffect.conflict import conflict_weights, retain_conflict
from gfast.geffect.directions import Directions
from gfast.geffect.groups import GroupMap, assign
from gfast.geffect.live.monitor import GEffectMonitor
from gfast.geffect.live.surgery import Surgery
from gfast.geffect.results import Effect, EffectHistory, GEffect, GramEffect, SampleEffect, TokenEffect

__all__ = [
    "ENGINES",
    "Directions",
    "Effect",
    "EffectHistory",
    "GEffect",
    "GEffectMonitor",
    "GramEffect",
    "GroupMap",
    "SampleEffect",
    "Surgery",
    "TokenEffect",
    "assign",
    "conflict_weights",
    "g_effect",
    "gram_effect",
    "pg_effect",
    "retain_conflict",
    "risk_gradients",
    "token_effect",
]
