"""Objectives by their short names."""

from __future__ import annotations

from dataclasses import fields

from gfast.objectives.base import Objective
from gfast.objectives.hidden import KL, RMU, RR
from gfast.objectives.sequence import DPO, NPO, SimNPO
from gfast.objectives.token import GA, NLL, PO, TNPO, WGA, WTNPO, SatImp
from gfast.words import did_you_mean

REGISTRY: dict[str, type[Objective]] = {
    cls.key: cls for cls in (GA, WGA, SatImp, TNPO, WTNPO, NPO, SimNPO, DPO, PO, NLL, KL, RMU, RR)
}


def from_name(name: str, **parameters: float) -> Objective:
    """An objective from its short name.

    Raises:
        ValueError: an unknown name, or a parameter the objective does not have; both list what exists.

    Example:
        >>> from_name("wga", alpha=0.5)
        WGA(alpha=0.5)
    """
    cls = REGISTRY.get(name.lower())
    if cls is None:
        meant = did_you_mean(name, (cls.__name__ for cls in REGISTRY.values()))
        choose = f"{meant} Else choose one of" if meant else "; choose one of"
        raise ValueError(f"gfast: no objective is called {name!r}{choose} {', '.join(sorted(REGISTRY))}.")
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(
            f"gfast: {cls.__name__} has no parameter {', '.join(unknown)}; it takes {', '.join(known) or 'none'}."
        )
    return cls(**parameters)
