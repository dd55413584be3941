"""What cases are drawn from: tensors of hostile values and layouts, and arguments that no op should take."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDE, NARROW = torch.float32, (torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
INTS = (-1, 0, 2**63 - 1, -(2**63), 2**62, 2**60, 2**32 + 1)
FLOATS = (float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1e-300, 1e-46, -1.0, 0.0)
LABELS = (-1, -99, -101, 2**63 - 1, -(2**63), 2**31)
DTYPES = (torch.float64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.bfloat16, torch.float32)


class Draw(random.Random):
    """Everything of a case follows from its seed and number."""

    def __init__(self, seed: int, case: int):
        super().__init__(f"gfast {seed} {case}")
        self.torch = torch.Generator("cpu").manual_seed(self.getrandbits(63))

    def maybe(self, chance: float) -> bool:
        return self.random() < chance

    def size(self, *often: int) -> int:
        """Mostly small; now and then at the edge of a vector, panel or block."""
        return self.choice((0, 1, 2, 3, 5, 8, 15, 16, 17, 33, 63, 64, 65, *often))

    def laid_out(self, x: Tensor, expand: bool = False) -> Tensor:
        """The same [n, m] or [n] in other memory: at an odd address, inside something larger, as an expanded row."""
        kind = self.randrange(5)
        if kind == 0 or x.dim() not in (1, 2):
            return x
        if kind == 1 and expand and x.dim() == 2 and len(x) > 1:
            return x[:1].expand(len(x), -1)
        before, after = self.randrange(4), self.randrange(4)
        width = x.shape[-1] + (before + after if x.dim() == 2 or kind < 3 else 0)
        around = torch.full((*x.shape[:-1], width + self.randrange(3)), 7, dtype=x.dtype)
        view = around[..., before : before + x.shape[-1]] if width > x.shape[-1] else around[..., : x.shape[-1]]
        view.copy_(x)
        return view

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = WIDE) -> Tensor:
        return (torch.randn(shape, generator=self.torch) * scale).to(dtype)

    def matrix(self, n: int, m: int, dtype: torch.dtype = WIDE, expand: bool = False) -> Tensor:
        """A factor of a product: any size of numbers whose products are numbers, zeros, now and then a NaN."""
        x = self.normal(n, m, scale=self.choice((1.0, 1.0, 1e-6, 1e3)), dtype=dtype)
        if x.numel() and self.maybe(0.1):
            x[self.randrange(n)] = 0
        if x.numel() and self.maybe(0.05):
            x[self.randrange(n), self.randrange(m)] = torch.nan
        return self.laid_out(x, expand)

    def logits(self, n: int, vocab: int, dtype: torch.dtype, expand: bool = True) -> Tensor:
        x = self.normal(n, vocab, scale=self.choice((0.0, 0.3, 3.0, 3.0, 30.0)), dtype=dtype)
        kind = self.randrange(10) if n and vocab else 9
        if kind < 2:  # masked vocabulary
            x.masked_fill_(torch.rand(x.shape, generator=self.torch) < 0.3, -torch.inf)
        elif kind == 2:
            x += self.choice((-1e4, 1e4, 6e4))
        elif kind == 3:
            x[self.randrange(n), self.randrange(vocab)] = self.choice((torch.nan, torch.inf, 3e4, -6e4))
        return self.laid_out(x, expand)

    def labels(self, n: int, vocab: int) -> Tensor:
        y = torch.randint(0, max(vocab, 1), (n,), generator=self.torch)
        return self.laid_out(torch.where(torch.rand(n, generator=self.torch) < 0.2, -100, y))

    def counts(self, size: int) -> list[int]:
        """Sizes of samples that make up ``size``, some empty."""
        out = []
        while size > 0:
            out.append(min(size, self.choice((0, 1, 3, 20, 70))))
            size -= out[-1]
        return out + [0] * self.randrange(2)

    def guarded(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An output inside memory of which nothing else may change, full of NaN."""
        return self.laid_out(torch.full(shape, torch.nan, dtype=dtype))


class Raw(NamedTuple):
    """A call of torch.ops.gfast.``name``: ``written`` is the index of the argument it writes, ``check`` compares."""

    name: str
    args: list[Any]
    written: int | None
    check: Any  # of the arguments before the call, what came back, the written argument afterwards


def hostile(r: Draw, args: list[Any], written: int | None) -> str:
    """Changes one argument to what most ops refuse, and says how. What is taken all the same must come out right."""
    place = r.randrange(len(args))
    value = args[place]
    if isinstance(value, float):
        args[place] = r.choice(FLOATS)
    elif isinstance(value, bool):
        args[place] = not value
    elif isinstance(value, int):
        args[place] = r.choice(INTS)
    elif isinstance(value, list) and (not value or isinstance(value[0], int)):
        args[place] = value = list(value)
        for _ in range(r.choice((1, 2))):
            value.insert(r.randrange(len(value) + 1), r.choice(INTS))
    elif isinstance(value, list):
        args[place] = value = list(value)
        k = r.randrange(len(value))
        value[k] = _spoiled(r, value[k])
    elif isinstance(value, Tensor):
        if written is not None and r.maybe(0.5):
            args[place], args[written] = _overlapping(r, value, args[written])
            return f"argument {place} and the output overlap"
        args[place] = _spoiled(r, value)
    return f"argument {place} = {described(args[place])}"


def described(x: Any) -> str:
    """In words, without a look at memory that may be gone."""
    if isinstance(x, list):
        return f"[{', '.join(map(described, x))}]"
    if not isinstance(x, Tensor):
        return str(x)
    strides = x.stride() if x.layout == torch.strided else x.layout
    return f"{x.dtype} {tuple(x.shape)} strides {strides} {x.device} requires_grad={x.requires_grad}"


def _spoiled(r: Draw, x: Tensor) -> Any:
    kind = r.randrange(11)
    if kind == 0:
        return x.to(r.choice([d for d in DTYPES if d != x.dtype]))
    if kind == 1:
        return x.to("meta")
    if kind == 2:
        return x.to_sparse() if x.dtype != torch.float8_e4m3fn else x
    if kind == 3:
        return None
    if kind == 4 and x.numel():
        gone = x.clone()
        gone.untyped_storage().resize_(r.choice((0, gone.nbytes - 1)))
        return gone
    if kind == 5 and x.is_floating_point():
        return x.clone().requires_grad_()
    if kind == 6 and x.dim() > 0:
        return x.narrow(r.randrange(x.dim()), 0, 0)
    if kind == 7 and x.dim() > 0 and x.shape[0] > 1:
        return x[1:]
    if kind == 8:
        return x[None]
    if kind == 9 and x.dim() == 2:
        return x.t().contiguous().t()
    if kind == 10 and x.dim() == 2:
        return x.new_empty(0, 2**62)
    if x.dtype == torch.int64 and x.numel():
        x = x.clone()
        x[r.randrange(len(x))] = r.choice(LABELS)
        return x
    return x[:1].expand(x.shape) if x.dim() == 2 and len(x) else x


def _overlapping(r: Draw, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Both again in one memory, the output over some part of the input (all of it, a byte range, just its end)."""
    if out is None or x is out or not x.numel() or not out.numel():
        return x, out
    step = max(x.element_size(), out.element_size())
    room = torch.zeros(x.nbytes + out.nbytes + 2 * step, dtype=torch.uint8)
    shift = r.choice((0, 0, step, x.nbytes // step // 2 * step, (x.nbytes - 1) // step * step))
    first = room[: x.nbytes].view(x.dtype).view(x.shape)
    second = room[shift : shift + out.nbytes].view(out.dtype).view(out.shape)
    first.copy_(x)
    return first, second
