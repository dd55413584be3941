"""What measurements return: one base, and a class for effects of objectives, samples, tokens, pairs and steps."""

from gfast.geffect.results.base import Effect, standard_error
from gfast.geffect.results.effect_history import EffectHistory
from gfast.geffect.results.g_effect import GEffect
from gfast.geffect.results.gram_effect import GramEffect
from gfast.geffect.results.sample_effect import SampleEffect
from gfast.geffect.results.token_effect import TokenEffect

__all__ = ["Effect", "EffectHistory", "GEffect", "GramEffect", "SampleEffect", "TokenEffect", "standard_error"]
