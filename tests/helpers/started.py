"""What the ops start on a GPU, compiled where there is none: `python -m helpers.started [--quick]` in tests/.

`gfast.kernels.aot` compiles specialisations that it lists itself. Here the ops choose: tensors of a CPU go through the
launchers and Triton's own JIT, up to the launch, for a driver that says it is an sm_90. Nothing runs, so results are
whatever was in memory. Exit status 2: Triton has no compiler here.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import gfast
from gfast.kernels import aot
from gfast.kernels.kl import kl_rows_grad
from gfast.kernels.scale import scale_
from gfast.objectives import BST, ETW, MASC, NPO, PDU, WGA, WTNPO, SatImp
from gfast.ops import dispatch
from gfast.ops.row_dot import linear_row_dot

SHARED = 227 << 10  # bytes of shared memory that a block may take
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(3, 32000, 32000), (3, 50257, 50257), (300, 50257, 50304), (5, 1000, 1000), (1, 1, 1), (2, 3, 3), (0, 33, 33)]


class Driver:
    """Of an sm_90 on which nothing is ever started."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(found: dict[str, str]) -> None:
    """Launches become compilations; ``found``: a kernel's hash -> its name."""
    run = JITFunction.run

    def compiled(self, *args, grid, warmup, **options):
        assert 0 < grid[0] < 2**31 and all(0 < blocks < 2**16 for blocks in grid[1:]), f"a grid of {grid}"
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.metadata.shared <= SHARED, f"{kernel.metadata.shared} bytes of shared memory"
        found[kernel.hash] = self.__name__
        return kernel

    driver.set_active(Driver())
    JITFunction.run = compiled
    dispatch._interpreting, dispatch.interpreter_fails = lambda: True, lambda: ""  # so that it serves tensors of a CPU


def of_logits(dtype: torch.dtype, rows: int, vocab: int, width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    z = torch.randn(rows, width).to(dtype)[:, :vocab]
    labels, ref = torch.randint(vocab, (rows,)), -torch.rand(rows)
    labels[1:2] = -100

    def differentiated(op: Callable, **options: object) -> None:
        leaf = z.detach().requires_grad_()  # a view of the rows, strides and all
        out = op(leaf, labels=labels, impl="triton", **options)
        out = getattr(out, "loss", getattr(out, "entropy", out)).sum()
        (0.5 * out).backward()

    objectives = [WGA(0.5), SatImp(), WTNPO(), NPO(), ETW()] + (
        [PDU(), MASC(rho=0.5, eta=10.0), BST()] if vocab > 1 else []
    )
    for objective in objectives:
        yield (
            f"unlearn_loss {objective}",
            partial(differentiated, gfast.unlearn_loss, objective=objective, ref_logp=ref),
        )
    yield "token_logp", partial(differentiated, gfast.token_logp)
    yield "token_stats", partial(differentiated, gfast.token_stats)
    yield "token_kl", partial(differentiated, gfast.token_kl, ref_logits=z * 0.5)
    for kind in ("cross_entropy", "js"):
        soft = partial(differentiated, gfast.soft_target_loss, target=None, kind=kind, beta=2.0)
        yield f"soft_target_loss {kind}", soft


def of_a_head(dtype: torch.dtype, width: int, vocab: int) -> Iterator[tuple[str, Callable[[], object]]]:
    hidden, weight, bias = (torch.randn(*size).to(dtype) for size in ((20, width), (vocab, width), (vocab,)))
    labels, ref = torch.randint(vocab, (20,)), -torch.rand(20)
    labels[3] = -100

    def differentiated(op: Callable, **options: object) -> None:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        out = op(*leaves, labels=labels, impl="triton", **options)
        getattr(out, "loss", getattr(out, "entropy", out)).sum().backward()

    for objective, softcap in itertools.product((WGA(), NPO(), PDU()), (None, 30.0)):
        options = dict(objective=objective, ref_logp=ref, bias=bias, softcap=softcap, chunk_rows=7)
        yield f"linear_unlearn_loss {objective}", partial(differentiated, gfast.linear_unlearn_loss, **options)
    yield "linear_token_logp", partial(differentiated, gfast.linear_token_logp, bias=bias)
    yield "linear_token_stats", partial(differentiated, gfast.linear_token_stats)
    yield "linear_token_kl", partial(differentiated, gfast.linear_token_kl, ref_hidden=hidden, ref_weight=weight)


def others(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    rows, one = torch.zeros(3, 1000, dtype=dtype), torch.ones(())
    whole = (rows, rows, torch.zeros(3, dtype=torch.int64), torch.ones(3, 4), one, 1.0, 0.0, 1.0, 0.0, rows)
    yield "kl_rows_grad", partial(kl_rows_grad, *whole)  # of heads that are shared out
    for size, factor in itertools.product((0, 1, 33, 5000), (F32, dtype)):
        yield f"scale_ {size}", partial(scale_, torch.zeros(size, dtype=dtype), torch.ones((), dtype=factor))
    for (n, wide, high), direction in itertools.product(
        [(1, 1, 1), (300, 64, 128), (70, 70, 130), (0, 4, 5), (4, 0, 3), (3, 5, 0)], (dtype, F32)
    ):
        a, b, g = torch.zeros(n, wide, dtype=dtype), torch.zeros(n, high, dtype=dtype), torch.zeros(high, wide)
        yield f"row_dot {n} {wide} {high}", partial(linear_row_dot, a, b, g.to(direction), impl="triton")


def main(arguments: list[str]) -> int:
    if reason := aot.missing():
        print(f"nothing can be compiled: {reason}", file=sys.stderr)
        return 2
    found: dict[str, str] = {}
    compile_only(found)
    quick = "--quick" in arguments
    failed = 0
    for dtype in (F32, BF16) if quick else (F32, BF16, F16):
        calls = [(shape, *call) for shape in (SHAPES[:1] if quick else SHAPES) for call in of_logits(dtype, *shape)]
        calls += [
            (shape, *call) for shape in ((48, 1001),)[quick:] + ((64, 1000),) for call in of_a_head(dtype, *shape)
        ]
        for shape, name, call in calls + [((), *call) for call in others(dtype)]:
            try:
                call()
            except Exception as error:  # a compiler's failure, whatever it is: the others are tried too
                failed += 1
                print(f"{name} {dtype} {shape} FAILED: {type(error).__name__}: {error}")
    if missing := {spec.kernel.__name__ for spec in aot.specs()} - set(found.values()):
        failed += 1
        print(f"never started: {', '.join(sorted(missing))}")
    print(*(f"{name} {count}" for name, count in sorted(Counter(found.values()).items())), sep=", ")
    print(f"{failed} failed" if failed else f"all {len(found)} compiled")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
