"""Compile every Triton kernel ahead of time, without a GPU: `python -m gfast.kernels.aot [--quick] [--jit] [sm ...]`.

Prints registers, spilled bytes and shared memory of each kernel for each target (default sm_80, sm_90, sm_100). Exit
status: 0 well, 1 a kernel does not compile or spills more than MAX_SPILL bytes, 2 there is nothing to compile with.
`--quick` takes one specialisation of each kernel; `--jit` adds those that Triton makes of odd arguments at run time.

Another version of Triton: PYTHONPATH=FOLDER in front, of `pip install --no-deps --target FOLDER triton==3.6.0`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gfast.kernels import head as output_head
from gfast.kernels import kl, labels, row_dot, rows, scale, stats
from gfast.kernels.common import COMPILER, tile

TARGETS = (80, 90, 100)
MAX_SPILL = 32  # bytes a thread: a few values of the row loop, outside the loops over columns
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ITEMSIZE = {name: dtype.itemsize for name, dtype in DTYPES.items()}
LLAMA3, LLAMA2, GPT2, GEMMA2 = 128256, 32000, 50257, 256000


class Spec(NamedTuple):
    """One specialisation: types of the runtime arguments, values of the constexpr ones, launch options."""

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    aligned: bool  # pointers, strides and V divisible by 16, as in every model but those with an odd vocabulary
    odd: tuple[str, ...] = ()  # of aligned ones, the arguments that are not


class Report(NamedTuple):
    spec: Spec
    sm: int
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int
    vector_loads: bool  # 128-bit global loads


def _row_spec(label: str, kernel: Any, dtype: str, vocab: int, types: str, streams: int = 1, **constants: Any) -> Spec:
    launch = dict(tile(vocab, streams * vocab * ITEMSIZE[dtype], ITEMSIZE[dtype], streams, vocab % 16 == 0))
    options = {"num_warps": launch.pop("num_warps"), **COMPILER}
    signature = dict(item.split(":") for item in types.replace("$", dtype).split())
    return Spec(f"{label} {dtype} V={vocab}", kernel, signature, {**constants, **launch}, options, vocab % 16 == 0)


def specs() -> Iterator[Spec]:
    """The kernels as the launchers start them, over dtypes, real vocabularies and every constexpr branch."""
    head = "logits:*$ row_stride:i32 labels:*i64 "
    logp = head + "logp:*fp32 stats:*fp32 N:i32 V:i32"
    grad = head + "logp:*fp32 stats:*fp32 coef:*fp32 out:*$ out_stride:i32 N:i32 V:i32"
    weighted = head + "ref_logp:*fp32 coef_scale:*fp32 logp:*fp32 weight:*fp32 out:*$ out_stride:i32 N:i32 V:i32"
    kl_types = ("logits:*$ row_stride:i32 ref_logits:*$ ref_stride:i32 labels:*i64 lowers:*fp32 "
                "coef_scale:*fp32 kl:*fp32 totals:*fp32 out:*$ out_stride:i32 N:i32 V:i32")
    kl_grad_types = ("logits:*$ row_stride:i32 ref_logits:*$ ref_stride:i32 labels:*i64 totals:*fp32 coef_scale:*fp32 "
                     "out:*$ out_stride:i32 N:i32 V:i32")
    plain = {"scale": 1.0, "softcap": 0.0}
    capped = {"scale": 1.0, "softcap": 30.0}
    wtnpo = {"sign": 1.0, "p_pow": 1.0, "q_pow": 0.5, "beta": 1.0, "has_out": True, "by_row": True}
    for dtype, vocab, form in [("bf16", LLAMA3, plain), ("fp16", LLAMA2, plain), ("fp32", LLAMA2, plain),
                               ("fp32", LLAMA3, plain), ("bf16", GPT2, plain), ("bf16", GEMMA2, capped),
                               ("fp32", GEMMA2, capped)]:
        yield _row_spec("logp_rows", rows.logp_rows_kernel, dtype, vocab, logp, **form)
        yield _row_spec("logp_rows_grad", rows.logp_rows_grad_kernel, dtype, vocab, grad, **form)
        yield _row_spec("weighted_rows", rows.weighted_rows_kernel, dtype, vocab, weighted, **form, **wtnpo)
        yield _row_spec("kl_rows", kl.kl_rows_kernel, dtype, vocab, kl_types, streams=2, **form,
                        ref_scale=form["scale"], ref_softcap=form["softcap"], has_out=True, has_totals=False,
                        lower=False, kind=0)
        yield _row_spec("soft_rows", kl.kl_rows_kernel, dtype, vocab, kl_types, streams=2, **form,
                        ref_scale=form["scale"], ref_softcap=form["softcap"], has_out=True, has_totals=False,
                        lower=True, kind=1)
        yield _row_spec("kl_rows_grad", kl.kl_rows_grad_kernel, dtype, vocab, kl_grad_types, streams=2, **form,
                        ref_scale=form["scale"], ref_softcap=form["softcap"])
    ga = {"sign": 1.0, "p_pow": 0.0, "q_pow": 0.0, "beta": 0.0, "has_out": False, "by_row": False}
    yield _row_spec("weighted_rows forward", rows.weighted_rows_kernel, "bf16", LLAMA3, weighted, **plain, **ga)
    yield _row_spec("kl_rows forward", kl.kl_rows_kernel, "bf16", LLAMA3, kl_types, streams=2, scale=0.5, softcap=0.0,
                    ref_scale=1.0, ref_softcap=0.0, has_out=False, has_totals=True, lower=False, kind=0)
    yield _row_spec("soft_rows js", kl.kl_rows_kernel, "bf16", LLAMA3, kl_types, streams=2, **plain, ref_scale=1.0,
                    ref_softcap=0.0, has_out=True, has_totals=False, lower=True, kind=2)
    for dtype in ITEMSIZE:
        signature = {"x": f"*{dtype}", "scale": "*fp32", "numel": "i64"}
        options = {"num_warps": 8, "enable_fp_fusion": True}
        yield Spec(f"scale_ {dtype}", scale.scale_kernel, signature, {"BLOCK": 4096}, options, True)
    signature = {"labels": "*i64", "factor": "*fp32", "good": "*i1", "N": "i32", "V": "i32"}
    yield Spec("label_factor", labels.label_factor_kernel, signature, {"B": labels.BLOCK}, labels.OPTIONS, False)
    for a, g, aligned in [("bf16", "bf16", True), ("bf16", "fp32", True), ("fp32", "fp32", True),
                          ("fp16", "fp16", True), ("bf16", "bf16", False), ("bf16", "fp32", False)]:
        types = f"a:*{a} a_stride:i32 b:*{a} b_stride:i32 g:*{g} g_stride:i32 out:*fp64"
        signature = dict(item.split(":") for item in f"{types} n:i32 d_in:i32 d_out:i32 splits:i32".split())
        launch = row_dot.tile(DTYPES[a], DTYPES[g], aligned)
        options = {key: launch.pop(key) for key in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
        label = f"row_dot {a} direction {g}{'' if aligned else ' odd'}"
        yield Spec(label, row_dot.row_dot_kernel, signature, launch, options, aligned)
    types = "logits:*$ row_stride:i32 labels:*i64 first:i32 state:*fp64 N:i32 V:i32"
    for dtype, form in [("bf16", plain), ("fp16", capped), ("fp32", plain)]:
        yield _row_spec("fold_rows", output_head.fold_rows_kernel, dtype, 4096, types, **form)
    told = head + "stats:*fp32 values:*fp32 ids:*i64 N:i32 V:i32"
    grad = head + ("stats:*fp32 dense:*fp32 entries:*i64 adds:*fp32 out:*$ out_stride:i32 N:i32 V:i32")
    for dtype, vocab, form, top, soft in [("bf16", LLAMA3, plain, 2, True), ("bf16", LLAMA3, plain, 11, False),
                                          ("fp32", GPT2, capped, 11, True), ("fp32", LLAMA2, plain, 2, True)]:
        spec = _row_spec("stat_rows", stats.stat_rows_kernel, dtype, vocab, told, **form, top=top, soft=soft,
                         sharpness=1.0 if dtype == "bf16" else 0.5)
        options = stats.half_full({**spec.options, "R": spec.constants["R"]})
        constants = {**spec.constants, "R": options.pop("R")}
        constants["B"] = triton.next_power_of_2(triton.cdiv(vocab, constants["R"] * constants["K"]))
        label = f"{spec.label} top {top}{'' if soft else ' hard'}"
        yield spec._replace(label=label, constants=constants, options=options)
        spec = _row_spec("stat_rows_grad", stats.stat_rows_grad_kernel, dtype, vocab, grad, **form, count=top + 1,
                         soft=soft, C=triton.next_power_of_2(top + 2))
        yield spec._replace(label=f"{spec.label} top {top}{'' if soft else ' hard'}")


def first_of_each(every: Iterable[Spec], aligned: bool | None = None) -> list[Spec]:
    """One specialisation of each kernel."""
    return list({spec.kernel: spec for spec in reversed(list(every)) if aligned in (None, spec.aligned)}.values())


def not_specialized(spec: Spec) -> set[str]:
    return {parameter.name for parameter in spec.kernel.params if parameter.do_not_specialize}


def jit_variants(spec: Spec) -> Iterator[Spec]:
    """What else the JIT makes of a specialisation: an integer that is 1, or not divisible by 16, a stride of 64 bits.

    Where a stride or a width of matrices is odd the launchers say that rows are not aligned, and take other tiles.
    """
    for name, kind in spec.signature.items():
        if kind != "i32" or name in not_specialized(spec):
            continue
        if not (spec.aligned and name.endswith(("stride", "V", "d_in", "d_out"))):
            others = {n: t for n, t in spec.signature.items() if n != name}
            constants = {**spec.constants, name: 1}
            yield spec._replace(label=f"{spec.label}, {name} 1", signature=others, constants=constants)
        if spec.aligned and not name.endswith(("stride", "d_in", "d_out")):
            yield spec._replace(label=f"{spec.label}, {name} odd", odd=(name,))
        if name.endswith("stride"):
            wide = {n: "i64" if n == name else t for n, t in spec.signature.items()}
            yield spec._replace(label=f"{spec.label}, {name} i64", signature=wide)


def machine_code(spec: Spec, sm: int) -> Any:
    """One specialisation compiled, as Triton's own object."""
    names = spec.kernel.arg_names
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    fixed = {*not_specialized(spec), *spec.odd}
    divisible = [n for n, t in spec.signature.items() if n not in fixed and (spec.aligned or t.startswith("*"))]
    source = ASTSource(spec.kernel, signature, constexprs={(names.index(n),): v for n, v in spec.constants.items()},
                       attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible})
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=spec.options)


def report(spec: Spec, sm: int, compiled: Any) -> Report:
    """The resources of a compiled specialisation, read out of the binary."""
    text = _cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    registers = re.search(r"REG:(\d+)", text)
    local = re.findall(r"(?:STACK|LOCAL):(\d+)", text)
    if registers is None or not local:
        raise RuntimeError(f"gfast: cuobjdump printed no resource usage: {text!r}")
    vector = re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"]) is not None
    return Report(spec, sm, int(registers[1]), sum(map(int, local)), compiled.metadata.shared, vector)


def disassembled(cubin: bytes) -> str:
    """The machine code in words (SASS)."""
    return _cuobjdump(cubin, "-sass")


def _cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, what, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not isinstance(scale.scale_kernel, triton.JITFunction):
        return "TRITON_INTERPRET is set, so the kernels are interpreted; unset it"
    for tool in ("ptxas", "cuobjdump"):
        try:
            getattr(triton.knobs.nvidia, tool).path  # noqa: B018, a property that looks for the program
        except Exception as error:
            return f"Triton's {tool} is not installed: {error}"
    return None


def main(arguments: list[str]) -> int:
    reason = missing()
    if reason:
        print(f"gfast: cannot compile the Triton kernels: {reason}", file=sys.stderr)
        return 2
    targets = [int(a.removeprefix("sm_")) for a in arguments if not a.startswith("--")] or list(TARGETS)
    chosen = list(specs())
    if "--quick" in arguments:
        chosen = first_of_each(chosen)
    if "--jit" in arguments:
        first = [*first_of_each(specs(), True), *first_of_each(specs(), False)]
        chosen += [variant for spec in first for variant in jit_variants(spec)]
    failures = 0
    print(f"triton {triton.__version__}")
    print(f"{'kernel':50} {'sm':>4} {'warps':>5} {'regs':>4} {'spill':>5} {'shared':>6}  16-byte loads")
    for sm in targets:
        for spec in chosen:
            try:
                r = report(spec, sm, machine_code(spec, sm))
            except Exception as error:  # any compiler failure must be listed beside the others, not stop them
                failures += 1
                print(f"{spec.label:50} {sm:>4} FAILED: {type(error).__name__}: {error}")
                continue
            failures += r.spilled > MAX_SPILL
            print(f"{spec.label:50} {sm:>4} {spec.options['num_warps']:>5} {r.registers:>4} {r.spilled:>5} "
                  f"{r.shared:>6}  {'yes' if r.vector_loads else 'no'}", flush=True)
    print(f"{failures} failed or spilled" if failures else f"all {len(chosen) * len(targets)} compiled")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
