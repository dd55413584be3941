"""Objectives by their short names, and from words of a command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from gfast.objectives.base import Objective
from gfast.objectives.given import HardMask, SoftMask
from gfast.objectives.hidden import KL, RMU, RR
from gfast.objectives.logits import BST, ETW, MASC, PDU, TPO
from gfast.objectives.samples import BalDRO, BalDROG
from gfast.objectives.sequence import DPO, NPO, SimNPO
from gfast.objectives.soft import CEU, JSD, SHRED, UNDIAL, JensUn, Unilogit
from gfast.objectives.token import GA, NLL, PO, TNPO, WGA, WTNPO, SatImp, SimImp, SimSat
from gfast.words import did_you_mean

REGISTRY: dict[str, type[Objective]] = {
    cls.key: cls
    for cls in (
        GA,
        WGA,
        SatImp,
        SimSat,
        SimImp,
        TNPO,
        WTNPO,
        HardMask,
        SoftMask,
        NPO,
        SimNPO,
        BalDRO,
        BalDROG,
        DPO,
        PO,
        ETW,
        PDU,
        MASC,
        TPO,
        BST,
        NLL,
        KL,
        RMU,
        RR,
        UNDIAL,
        CEU,
        SHRED,
        Unilogit,
        JensUn,
        JSD,
    )
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


def parse_objective(text: str, more: Mapping[str, Any] | list[str] | str | None = None) -> Objective:
    """An objective from its name and parameters in one word, as on a command line; `more`: parameters beside the word.

    >>> parse_objective("WGA:alpha=0.5"), parse_objective("SatImp(beta1=5,beta2=1)"), parse_objective("ga")
    (WGA(alpha=0.5), SatImp(beta1=5, beta2=1), GA())
    >>> parse_objective("JensUn:target_ids=(2822,4623)")
    JensUn(target_ids=(2822, 4623))
    >>> parse_objective("SatImp:beta1=5", ["beta2=1"])
    SatImp(beta1=5, beta2=1)
    """
    name, opened, parameters = re.match(r"([^(:]*)([(:]?)(.*)", re.sub(r"\s", "", text)).groups()
    parameters = parameters.removesuffix(")") if opened == "(" else parameters
    given = parse_parameters(re.sub(r",(?![^(\[]*[)\]])", " ", parameters))  # not those of a list
    beside = parse_parameters(more)
    twice = sorted(set(given) & set(beside))
    if twice:
        raise ValueError(f"{twice[0]} is given twice, by {text!r} and by objective_args: leave one out")
    return named(name, given | beside)


def named(name: str, parameters: Mapping[str, Any]) -> Objective:
    """As `from_name`, with a message that names the flag where a parameter without a default is missing."""
    cls = REGISTRY.get(name.lower())
    required = [entry.name for entry in fields(cls) if entry.default is MISSING] if cls is not None else []
    missing = [entry for entry in required if entry not in parameters]
    if missing:
        raise ValueError(f"{cls.__name__} needs a value for {', '.join(missing)}: --objective_args {missing[0]}=...")
    return from_name(name, **parameters)


def parse_parameters(parameters: Mapping[str, Any] | list[str] | str | None) -> dict[str, Any]:
    """Objective parameters from "name=value" strings (or a mapping, as YAML gives).

    >>> parse_parameters(["beta1=5", "beta2=0.5"]), parse_parameters({"beta1": "1e-1"})  # YAML reads 1e-1 as text
    ({'beta1': 5, 'beta2': 0.5}, {'beta1': 0.1})
    """
    if isinstance(parameters, Mapping):
        return {n: _value(f"{n}={v}", v) if isinstance(v, str) else v for n, v in parameters.items()}
    parsed: dict[str, Any] = {}
    for entry in parameters.split() if isinstance(parameters, str) else parameters or ():
        name, equals, value = str(entry).partition("=")
        number = _value(entry, value if equals and name.isidentifier() else "")
        if name in parsed:
            raise ValueError(f"objective_args give {name} twice, as {parsed[name]} and as {number}: leave one out")
        parsed[name] = number
    return parsed


def _value(entry: str, text: str) -> Any:
    """A number, a list, True or False (as YAML writes them too), or a word (dual_update_upon=epoch)."""
    text = text.capitalize() if text.lower() in ("true", "false") else text
    try:
        word = text.isidentifier() and text not in ("True", "False", "None")
        return text if word else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ValueError(
            f"objective_args {entry!r} should read name=number, for instance alpha=0.5; in one word WGA:alpha=0.5, "
            "SatImp:beta1=5,beta2=1"
        ) from None
