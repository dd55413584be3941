"""Gradient surgery: what becomes of a forget and a retain gradient that pull against each other.

Every rule works on one unit at a time (a tensor, a group, or all parameters), from that unit's dot products alone, so
that a step holds no more gradients than its largest unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCOPES = ("tensor", "group", "global")
# Kind -> the scope it has where none is given: the one of its source.
KINDS = {"pcgrad": "global", "retain": "tensor", "gru": "global", "sago": "tensor"}
MOVING = 0.8
_KNOWN = (
    f"there is {', '.join(KINDS)}, each but sago with :{' or :'.join(SCOPES)}, and gru:SCOPE:SHARE with the share of "
    f"the newest gradient in its average"
)


@dataclass(frozen=True)
class Surgery:
    r"""A rule that makes one gradient of the forget gradient u and the retain gradient r of a unit.

        pcgrad:  if <u, r> < 0:  m = (u - <u, r>/<r, r> r) + (r - <u, r>/<u, u> u)
        retain:  if <u, r> < 0:  m = (u - <u, r>/<r, r> r) + r
        gru:     v = moving r + (1 - moving) v_before;  if <u, v> < 0:  m = (u - <u, v>/<v, v> v) + r
        sago:    m_i = r_i where u_i r_i < 0, else u_i

    and m = u + r where no condition is met. Where the step has no retain loss, only a risk, its gradient is the r of
    the conditions, and neither it nor what pcgrad makes of it is added.

    Args:
        kind: "pcgrad" (Yu et al., arXiv 2001.06782: both gradients are projected), "retain" (only the forget gradient
            is; arXiv 2604.14808 calls this PCGrad), "gru" (arXiv 2503.09117, as its published code has it: `moving` is
            the share of the newest retain gradient) or "sago" (arXiv 2604.14808).
        scope: the unit: "tensor", "group" (of the monitor) or "global". sago compares single numbers and has none.
        moving: of gru, in (0, 1]. Its average is one gradient's memory.

    Raises:
        ValueError: an unknown kind or scope, a share outside (0, 1].

    >>> str(Surgery.parse("pcgrad:group")), str(Surgery.parse("gru:global:0.9")), str(Surgery.parse("sago"))
    ('pcgrad:group', 'gru:global:0.9', 'sago')
    """

    kind: str
    scope: str
    moving: float = MOVING

    @classmethod
    def parse(cls, text: str | Surgery) -> Surgery:
        """From KIND, KIND:SCOPE or gru:SCOPE:MOVING. Raises ValueError that says what there is."""
        if isinstance(text, cls):
            return text
        kind, _, rest = str(text).partition(":")
        scope, _, moving = rest.partition(":")
        if (kind == "sago" and rest) or (moving and kind != "gru"):
            raise ValueError(f"gfast: unknown surgery {text!r}; {_KNOWN}")
        try:
            share = float(moving) if moving else MOVING
        except ValueError:
            share = 0.0
        return cls(kind, scope or KINDS.get(kind, ""), share)

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.scope not in SCOPES:
            raise ValueError(f"gfast: unknown surgery {f'{self.kind}:{self.scope}'.rstrip(':')!r}; {_KNOWN}")
        if not 0.0 < self.moving <= 1.0:
            raise ValueError(
                f"gfast: surgery {self.kind}:{self.scope}: the share of the newest gradient must be in (0, 1]; {_KNOWN}"
            )

    def __str__(self) -> str:
        if self.kind == "sago":
            return "sago"
        return f"{self.kind}:{self.scope}" + (f":{self.moving:g}" if self.kind == "gru" else "")

    def factors(self, uv: Tensor, vv: Tensor, uu: Tensor, adds: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, c) of m = a u + b r + c v from a unit's dots (fp64); v is gru's average, else r."""
        ones, zero = torch.ones_like(uv), torch.zeros_like(uv)
        harm = torch.where((uv < 0) & (vv > 0), uv / vv.clamp(min=torch.finfo(vv.dtype).tiny), zero)
        if self.kind == "pcgrad" and adds:
            back = torch.where((uv < 0) & (uu > 0), uv / uu.clamp(min=torch.finfo(uu.dtype).tiny), zero)
            return ones - back, ones, -harm
        return ones, ones, -harm


def average(before: Tensor | None, newest: Tensor, moving: float, scale: float = 1.0) -> Tensor:
    """moving / scale * newest + (1 - moving) * before."""
    share = moving / scale
    return newest * share if before is None else (before * (1.0 - moving)).add_(newest, alpha=share)


def sign_aligned(u: Tensor, r: Tensor, adds: bool) -> Tensor:
    """Sago: r (0 without `adds`) where the signs of u and r are opposite, else u. Signs: small products underflow."""
    return _into(u, torch.where(u.sign() * r.sign() < 0, r if adds else torch.zeros_like(r), u))


def combined(u: Tensor | None, r: Tensor, v: Tensor, factors: tuple[Tensor, Tensor, Tensor], adds: bool) -> Tensor:
    """a u + b r + c v in the gradient's own dtype, from products in fp32 (fp64 for fp64); without `adds` no b r.

    Where nothing is removed it is u + r bit for bit.
    """
    wide = torch.float64 if r.dtype == torch.float64 else torch.float32
    a, b, c = (factor.to(r.device, wide) for factor in factors)  # of a unit that may lie on several devices
    if v is r:
        b, v = (b + c if adds else c), None
    elif not adds:
        b = torch.zeros_like(b)
    out = r.to(wide) * b
    if u is not None:
        out += u.to(wide) * a
    if v is not None:
        out += v.to(wide) * c
    return out.to(r.dtype) if u is None else _into(u, out)


def _into(u: Tensor, out: Tensor) -> Tensor:
    """`out` in the memory of u, which nobody needs any more: a global unit holds two gradients and not three."""
    return u.copy_(out) if u.layout == torch.strided else out.to(u.dtype)


def units_of(surgery: Surgery, group_of: list[int]) -> list[int]:
    """The unit of every parameter, by the group of each."""
    if surgery.scope == "group":
        return list(group_of)
    return list(range(len(group_of))) if surgery.scope == "tensor" else [0] * len(group_of)
