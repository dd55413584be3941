"""Which implementation serves which op, and why.

Every op has up to four implementations: ``reference`` (plain PyTorch, always there), ``cpp`` (the compiled CPU kernels
of ``gfast._C``), ``triton`` (NVIDIA GPUs, or CPU tensors in Triton's interpreter) and ``cuda`` (compiled CUDA
kernels). Nothing is probed when gfast is imported; the first call decides, and an automatic choice is logged once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable

import torch
from torch.torch_version import TorchVersion

logger = logging.getLogger("gfast")

IMPLS = ("reference", "cpp", "triton", "cuda")
OPS = {  # and the CPU kernel that a build must hold to serve each
    "token_logp": "logp_rows",
    "linear_token_logp": "fold_rows",
    "unlearn_loss": "weighted_rows",
    "linear_unlearn_loss": "logp_rows",
    "token_kl": "kl_rows",
    "linear_token_kl": "kl_rows",
    "soft_target_loss": "soft_rows",
    "linear_soft_target_loss": "soft_rows",
    "token_stats": "stat_rows",
    "linear_token_stats": "stat_rows",
    "grad_dot": "grad_dots",
    "linear_row_dot": "row_dots",
}
_STEPS = {"sharded_token_kl": "kl_parts", "scale": "scale_"}  # of several ops
# Kernels that Triton has by the same name and with the same arguments, and the modules they are in.
_TRITON_MODULES = {"fold_rows": "head", "kl_rows": "kl", "soft_rows": "kl"}
_TRITON_MODULES |= dict.fromkeys(("logp_rows", "logp_rows_grad", "weighted_rows"), "rows")
_TRITON_MODULES |= dict.fromkeys(("stat_rows", "stat_rows_grad"), "stats")
# Ops with CUDA kernels of their own, and the compute capability that those need: 9.0 has clusters.
_CUDA_KERNELS = {"grad_dot": ("grad_dots", (0, 0)), "unlearn_loss": ("weighted_rows", (9, 0))}
# The variable with which "auto" takes a CUDA kernel that no GPU has run yet, where Triton has one as well.
OPT_IN = {"unlearn_loss": "GFAST_HELD_ROWS"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def extension() -> tuple[object | None, str]:
    """The compiled module ``gfast._C`` and, where it is missing, the reason."""
    try:
        from gfast import _C  # importing it registers the C++ ops with the dispatcher
    except ImportError as error:
        return None, f"gfast._C could not be imported: {error}"
    if built := _built_for_another_torch(_C):
        return None, built
    from gfast.ops import fakes  # noqa: F401

    return _C, ""


def _built_for_another_torch(module: object) -> str:
    """Empty where gfast._C was built for this minor version of torch: another's classes may be laid out otherwise."""
    try:
        built = module.build_info()["torch"]
    except ValueError:  # GFAST_CPU_ISA names a set that this CPU lacks: every call says so
        return ""
    if built.split(".")[:2] == torch.__version__.split(".")[:2]:
        return ""
    return (
        f"gfast._C was built for torch {built}, and this is torch {torch.__version__}: build it again with "
        f"pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps gfast (in a clone: -e .)"
    )


@functools.cache
def compiled(op: str) -> bool:
    """Whether the compiled extension is there and holds ``op`` (an older build may not)."""
    return extension()[0] is not None and hasattr(torch.ops.gfast, op)


@functools.cache
def _triton_missing() -> str:
    """Empty when Triton can be imported, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a Triton without a usable driver or with a foreign NumPy fails in many ways
        return f"triton could not be imported: {error}"
    return ""


def has_cpu_kernel(kernel: str) -> bool:
    """Whether the compiled extension implements ``kernel`` for CPUs (asking about an op that is not defined raises)."""
    return compiled(kernel) and _dispatches(kernel)


@functools.cache
def _dispatches(kernel: str, key: str = "CPU") -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"gfast::{kernel}", key)


def kernel(name: str, impl: str) -> Callable:
    """The kernel of that name of ``impl``, "cpp" or "triton"."""
    if impl == "triton":
        return getattr(importlib.import_module(f"gfast.kernels.{_TRITON_MODULES[name]}"), name)
    extension()
    return getattr(torch.ops.gfast, name)


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def interpreter_fails() -> str:
    """Empty when Triton's interpreter works with the NumPy there is, else the reason. Compiled kernels need neither."""
    import numpy
    import triton

    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy.__version__) >= "2.4":
        return (
            f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__}: it takes Triton 3.7 "
            f"or later, or NumPy before 2.4"
        )
    return ""


def why_not(op: str, impl: str, device: torch.device | str, dtype: torch.dtype | None = None) -> str:
    """Empty when ``impl`` can serve ``op`` on ``device`` (and ``dtype``), else the reason in words."""
    kind = torch.device(device).type
    if impl == "reference":
        return ""
    if impl not in IMPLS:
        return f"no implementation is called {impl!r}; choose 'auto' or one of {', '.join(IMPLS)}"
    if op != "grad_dot" and dtype is not None and dtype not in _DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {dtype}; impl='reference' takes it"
    if impl == "cpp":
        if kind != "cpu":
            return f"the C++ kernels take CPU tensors, not {kind}"
        name, missing = (OPS | _STEPS)[op], extension()[1]
        if missing or has_cpu_kernel(name):
            return missing
        return f"gfast._C holds no CPU kernel {name}; build the package again"
    if impl == "triton":
        if op == "grad_dot":
            return "grad_dot has no Triton kernel"
        if kind == "cuda" and torch.version.hip:
            return f"the Triton kernels are for NVIDIA GPUs, and torch {torch.__version__} is built for AMD's (ROCm)"
        if _triton_missing() or kind == "cuda":
            return _triton_missing()
        if kind == "cpu" and _interpreting():
            return interpreter_fails()
        return f"Triton kernels take CUDA tensors, not {kind} (CPU only with TRITON_INTERPRET=1)"
    if op not in _CUDA_KERNELS:
        return f"{op} has no CUDA kernel of its own; on a GPU Triton serves it"
    if kind != "cuda":
        return f"the CUDA kernel takes CUDA tensors, not {kind}"
    module, reason = extension()
    if module is None:
        return reason
    if not (info := module.build_info()).get("cuda"):
        return f"gfast._C was built without CUDA: {info.get('cuda_reason', 'reason unknown')}"
    name, needed = _CUDA_KERNELS[op]
    if not _dispatches(name, "CUDA"):
        return f"gfast._C holds no CUDA kernel {name}; build the package again"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability(device)) < needed:
        least, here = (f"{major}.{minor}" for major, minor in (needed, capability))
        return f"the CUDA kernel needs compute capability {least}, this GPU has {here}"
    return ""


def opted_in(op: str) -> bool:
    """Whether the environment asks for what "auto" does not take by itself; ValueError for a value that is neither."""
    value = os.environ.get(OPT_IN[op], "")
    if value not in ("", "0", "1"):
        raise ValueError(f"gfast: {OPT_IN[op]}={value!r} is neither 1 nor 0; correct it or unset it")
    return value == "1"


@functools.cache
def _auto(op: str, kind: str, dtype: torch.dtype | None) -> str:
    order = ("cpp",) if kind == "cpu" else ("cuda", "triton")
    reasons = []
    for impl in order:
        reason = why_not(op, impl, kind, dtype)
        if not reason and impl == "cuda" and op in OPT_IN and not opted_in(op):
            reason = f"it has not run on a GPU yet; {OPT_IN[op]}=1 takes it"
        if not reason:
            logger.info("gfast: %s on %s uses impl=%r", op, kind, impl)
            return impl
        reasons.append(f"{impl}: {reason}")
    logger.info("gfast: %s on %s uses impl='reference' (%s)", op, kind, "; ".join(reasons))
    return "reference"


def select(op: str, impl: str, device: torch.device | str, dtype: torch.dtype | None = None) -> str:
    """The implementation of ``op`` (one of ``OPS`` or ``_STEPS``) for tensors there and, of row ops, logits of a dtype.

    Raises:
        ValueError: an explicit choice that is unknown or cannot serve the op here, with the reason.
    """
    if impl == "auto":
        return _auto(op, torch.device(device).type, dtype)
    if reason := why_not(op, impl, device, dtype):
        raise ValueError(f"gfast: {op}: impl={impl!r} cannot serve {op} here: {reason}.")
    return impl


def status() -> list[dict[str, object]]:
    """One row per op, device kind and implementation: is it available, is it what "auto" takes, and why not."""
    rows = []
    for op in OPS:
        for kind in ("cpu", "cuda"):
            if kind == "cuda" and not torch.cuda.is_available():
                rows.append(dict(op=op, device=kind, impl="-", available=False, auto=False, reason="no CUDA device"))
                continue
            chosen = _auto(op, kind, None)
            reasons = {impl: why_not(op, impl, kind) for impl in IMPLS}
            for impl, reason in reasons.items():
                row = dict(op=op, device=kind, impl=impl, available=not reason, auto=impl == chosen, reason=reason)
                rows.append(row)
    return rows
