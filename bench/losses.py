"""Time, memory and error of the unlearning losses, forward and backward, against what users run today.

    python bench/losses.py                                   # both ops, the standard shapes
    python bench/losses.py --shapes llama-3.2-1b --rows 1024 --dtypes bf16 --json losses_cpu.json
    python bench/losses.py --device cuda --rows 4096 --json losses_gpu.json

Providers: ``gfast``; ``eager``, the loss as trainers write it (cross entropy without reduction in the logits'
dtype, weights from it, token mean); ``upcast``, the same on ``logits.float()``; ``compile`` and ``compile_upcast``,
these under torch.compile; ``floor``, a copy of the logits or the three matrix products; ``fresh_copy``, a copy into
new memory, as a gradient needs; ``gfast_out``, the bare op into memory that exists; ``torch_chunked``, ``liger``
and ``cce``, where they are installed and have the objective. Before timing, each provider's loss and gradients are
compared with fp64 on a few rows. gfast is not timed, but reported as wrong, where its error exceeds twice
``upcast``'s plus a rounding; the others are as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from _timing import environment, interleaved, peak_extra_bytes, peak_in_fresh_process, write_json
from torch import Tensor

import gfast
from gfast.objectives import NLL, NPO, TNPO, WGA

HEADS = {  # name: (D, V)
    "small": (1024, 32000),
    "smollm2-135m": (576, 49152),
    "llama-3.2-1b": (2048, 128256),
    "phi-1.5": (2048, 51200),
    "gemma-2-2b": (2304, 256000),
    "llama-2-7b": (4096, 32000),
    "llama-3.1-8b": (4096, 128256),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OBJECTIVES = {"wga": WGA(alpha=1.0), "tnpo": TNPO(beta=1.0), "npo": NPO(beta=0.1), "nll": NLL()}
SEQUENCES = 8
CHECK_ROWS = 64

Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    op: str  # "logits" or "linear"
    objective: str
    head: str
    rows: int
    dtype: str
    device: str

    @property
    def shape(self) -> tuple[int, ...]:
        width, vocab = HEADS[self.head]
        return (self.rows, vocab) if self.op == "logits" else (self.rows, width, vocab)


@dataclass
class Inputs:
    tensors: tuple[Tensor, ...]  # (logits [B, T, V],) or (hidden [B, T, D], weight [V, D])
    labels: Tensor  # [B, T]
    ref_logp: Tensor  # [B, T]

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(t.detach().requires_grad_() for t in self.tensors)


def make_inputs(case: Case) -> Inputs:
    """Random rows with logits of standard deviation 2, every label valid."""
    rng = torch.Generator().manual_seed(0)
    width, vocab = HEADS[case.head]
    batch = (SEQUENCES, case.rows // SEQUENCES)
    dtype = DTYPES[case.dtype]
    if case.op == "logits":
        tensors = ((torch.randn(*batch, vocab, generator=rng) * 2).to(dtype),)
    else:
        hidden = torch.randn(*batch, width, generator=rng).to(dtype)
        tensors = (hidden, (torch.randn(vocab, width, generator=rng) * (2 / width**0.5)).to(dtype))
    labels = torch.randint(0, vocab, batch, generator=rng)
    ref_logp = torch.randn(batch, generator=rng) - 10
    return Inputs(tuple(t.to(case.device) for t in tensors), labels.to(case.device), ref_logp.to(case.device))


def plain_loss(objective: str, logits: Tensor, labels: Tensor, ref_logp: Tensor) -> Tensor:
    """The objective in plain PyTorch from its formula; logits [B, T, V]."""
    vocab = logits.shape[-1]
    if objective == "nll":
        return F.cross_entropy(logits.reshape(-1, vocab), labels.reshape(-1))
    nll = F.cross_entropy(logits.reshape(-1, vocab), labels.reshape(-1), reduction="none").reshape(labels.shape)
    if objective == "npo":
        beta = OBJECTIVES["npo"].beta
        return -2 / beta * F.logsigmoid(beta * (nll.sum(1) + ref_logp.sum(1))).mean()
    if objective == "wga":
        weight = torch.exp(-nll.detach()) ** OBJECTIVES["wga"].alpha
    else:
        weight = 2 * torch.sigmoid(OBJECTIVES["tnpo"].beta * (-nll.detach() - ref_logp))
    return -(weight * nll)[labels != -100].mean()


def backward_step(inputs: Inputs, loss: Callable[..., Tensor]) -> Step:
    """loss(*leaves), its backward, and (loss, *gradients)."""
    leaves = inputs.leaves()

    def step() -> tuple[Tensor, ...]:
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return step


def plain(case: Case, inputs: Inputs, upcast: bool, compiled: bool) -> Step:
    def loss(*leaves: Tensor) -> Tensor:
        logits = leaves[0] if case.op == "logits" else F.linear(*leaves)
        return plain_loss(case.objective, logits.float() if upcast else logits, inputs.labels, inputs.ref_logp)

    return backward_step(inputs, torch.compile(loss, dynamic=False) if compiled else loss)


def open_unlearning(case: Case, inputs: Inputs) -> Step | None:
    """As open-unlearning does: the model is called with labels, so its own loss runs first, upcast, and is dropped."""
    if case.objective not in ("wga", "npo"):
        return None

    def loss(*leaves: Tensor) -> Tensor:
        logits = leaves[0] if case.op == "logits" else F.linear(*leaves)
        F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), inputs.labels.reshape(-1))
        return plain_loss(case.objective, logits, inputs.labels, inputs.ref_logp)

    return backward_step(inputs, loss)


def gfast_step(case: Case, inputs: Inputs) -> Step:
    objective = OBJECTIVES[case.objective]
    ref = inputs.ref_logp if "ref_logp" in objective.needs else None
    op = gfast.unlearn_loss if case.op == "logits" else gfast.linear_unlearn_loss
    return backward_step(inputs, lambda *leaves: op(*leaves, inputs.labels, objective, ref_logp=ref).loss)


def gfast_out(case: Case, inputs: Inputs) -> Step | None:
    """The bare CPU op, the gradient written over and over into the same memory."""
    if case.op != "logits" or case.device != "cpu" or case.objective == "npo":
        return None
    from gfast.ops.backend import extension

    if extension()[0] is None:
        return None
    logits, labels = inputs.tensors[0].flatten(0, 1), inputs.labels.flatten()
    sign, power, beta = {"wga": (1.0, 1.0, 0.0), "tnpo": (1.0, 0.0, 1.0), "nll": (-1.0, 0.0, 0.0)}[case.objective]
    ref, factor, out = inputs.ref_logp.flatten(), torch.tensor(1.0 / labels.numel()), torch.empty_like(logits)

    def step() -> tuple[Tensor, ...]:
        logp, weight = torch.ops.gfast.weighted_rows(logits, labels, ref, sign, power, 0.0, beta, factor, 1.0, 0.0, out)
        return (weight * logp).sum() * factor, out.reshape(inputs.tensors[0].shape)

    return step


def floor(case: Case, inputs: Inputs) -> Step:
    """No loss can do less: read logits and write as much, or multiply three times."""
    if case.op == "logits":
        logits = inputs.tensors[0]
        out = torch.empty_like(logits)
        return lambda: (out.copy_(logits),)
    # Many CPUs multiply bf16 more slowly than fp32: the floor is the faster, its operands converted beforehand.
    native = products(*inputs.tensors)
    if case.device == "cuda" or case.dtype == "fp32":
        return native
    wide = products(*(t.float() for t in inputs.tensors))
    seconds = []
    for step in (native, wide):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return native if seconds[0] < seconds[1] else wide


def products(hidden: Tensor, weight: Tensor) -> Step:
    """The three matrix products of forward and backward, into memory that exists."""
    hidden = hidden.flatten(0, 1)
    logits = hidden @ weight.T
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)
        return d_hidden, d_weight

    return step


def fresh_copy(case: Case, inputs: Inputs) -> Step | None:
    return (lambda: (inputs.tensors[0].clone(),)) if case.op == "logits" else None


def torch_chunked(case: Case, inputs: Inputs) -> Step | None:
    if (case.op, case.objective) != ("linear", "nll") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    options, labels = torch.nn.LinearCrossEntropyOptions(), inputs.labels.flatten()
    return backward_step(
        inputs, lambda hidden, weight: F.linear_cross_entropy(hidden.flatten(0, 1), weight, labels, options=options)
    )


def liger(case: Case, inputs: Inputs) -> Step | None:
    missing = importlib.util.find_spec("liger_kernel") is None
    if missing or case.device != "cuda" or case.op != "linear" or case.objective not in ("nll", "wga"):
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    wga = case.objective == "wga"
    module, labels = LigerFusedLinearCrossEntropyLoss(use_token_scaling=wga), inputs.labels.flatten()
    sign = -1.0 if wga else 1.0
    return backward_step(inputs, lambda hidden, weight: sign * module(weight, hidden.flatten(0, 1), labels))


def cce(case: Case, inputs: Inputs) -> Step | None:
    missing = importlib.util.find_spec("cut_cross_entropy") is None
    if missing or case.device != "cuda" or (case.op, case.objective) != ("linear", "nll"):
        return None
    from cut_cross_entropy import linear_cross_entropy

    return backward_step(inputs, lambda hidden, weight: linear_cross_entropy(hidden, weight, inputs.labels))


PROVIDERS: dict[str, Callable[[Case, Inputs], Step | None]] = {
    "gfast": gfast_step,
    "gfast_out": gfast_out,
    "floor": floor,
    "fresh_copy": fresh_copy,
    "open_unlearning": open_unlearning,
    "eager": lambda case, inputs: plain(case, inputs, upcast=False, compiled=False),
    "upcast": lambda case, inputs: plain(case, inputs, upcast=True, compiled=False),
    "compile": lambda case, inputs: plain(case, inputs, upcast=False, compiled=True),
    "compile_upcast": lambda case, inputs: plain(case, inputs, upcast=True, compiled=True),
    "torch_chunked": torch_chunked,
    "liger": liger,
    "cce": cce,
}
FLOORS = ("floor", "fresh_copy")
DEFAULT = [name for name in PROVIDERS if name != "compile_upcast"]


def errors(case: Case, names: list[str]) -> dict[str, float]:
    """Largest relative error (2-norm) of loss and gradients against fp64, on a few rows."""
    small = replace(case, rows=min(case.rows, CHECK_ROWS))
    inputs = make_inputs(small)
    wide = replace(inputs, tensors=tuple(t.double() for t in inputs.tensors))
    truth = plain(small, wide, upcast=False, compiled=False)()
    found = {}
    for name in names:
        step = None if name in FLOORS else PROVIDERS[name](small, inputs)
        if step is not None:
            pairs = zip(step(), truth, strict=True)
            found[name] = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
    return found


def bench(case: Case, names: list[str], args: argparse.Namespace) -> list[dict[str, object]]:
    found = errors(case, sorted({*names, "upcast"}))
    limit = 2 * found["upcast"] + torch.finfo(DTYPES[case.dtype]).eps
    wrong = [n for n in names if n.startswith("gfast") and found.get(n, 0.0) > limit]
    inputs = make_inputs(case)
    steps = {name: PROVIDERS[name](case, inputs) for name in names if name not in wrong}
    steps = {name: step for name, step in steps.items() if step is not None}
    times = interleaved(steps, case.device, args.repetitions)
    rows = []
    for name in [*steps, *wrong]:
        row = {**asdict(case), "shape": case.shape, "provider": name, "relative_error": found.get(name)}
        if name in wrong:
            row["wrong"] = f"error {found[name]:.2e} exceeds {limit:.2e}: not timed"
        else:
            row.update(times[name])
            if "floor" in times:
                row["times_floor"] = round(times[name]["median_ms"] / times["floor"]["median_ms"], 3)
            if not args.no_memory:
                row["peak_extra_mb"] = memory(case, name, steps[name])
        rows.append(row)
    return rows


def memory(case: Case, name: str, step: Step) -> float | None:
    if case.device == "cuda":
        size = peak_extra_bytes(step, "cuda")
    else:
        size = peak_in_fresh_process(__file__, ["--measure", json.dumps({"provider": name, **asdict(case)})])
    return None if size is None else round(size / 2**20, 1)


def measure(description: str) -> None:
    fields = json.loads(description)
    name = fields.pop("provider")
    case = Case(**fields)
    warm = replace(case, rows=SEQUENCES)
    if not name.startswith("compile"):
        PROVIDERS[name](warm, make_inputs(warm))()  # thread pools and libraries are not the step's memory
    step = PROVIDERS[name](case, make_inputs(case))
    if name.startswith("compile"):
        step()  # the compiler's memory is not the step's either
    print(peak_extra_bytes(step))


def table(rows: list[dict[str, object]]) -> str:
    """One case's providers as text."""
    case, shape = rows[0], " x ".join(map(str, rows[0]["shape"]))
    lines = [
        f"\n{case['op']} {case['objective']}  {case['head']} {shape} {case['dtype']} {case['device']}",
        f"  {'provider':15s} {'ms':>10s} {'min':>10s} {'iqr':>8s} {'x floor':>8s} {'MB':>9s} {'error':>9s}",
    ]
    for row in rows:
        if "wrong" in row:
            lines.append(f"  {row['provider']:15s} WRONG: {row['wrong']}")
            continue
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
        size = row.get("peak_extra_mb")
        lines.append(
            f"  {row['provider']:15s} {row['median_ms']:10.2f} {row['min_ms']:10.2f} {row['iqr_ms']:8.2f} "
            f"{row.get('times_floor', float('nan')):8.2f} {'' if size is None else size:>9} {error:>9s}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--ops", default="logits,linear")
    parser.add_argument("--shapes", default="small", help="'all' or some of " + ", ".join(HEADS))
    parser.add_argument("--objectives", default="wga,tnpo,npo,nll")
    parser.add_argument("--dtypes", default="bf16,fp32", help="some of " + ", ".join(DTYPES))
    parser.add_argument("--rows", type=int, help="default: 1024 for logits and 512 for linear; 4096 on a GPU")
    parser.add_argument("--providers", default=",".join(DEFAULT), help="some of " + ", ".join(PROVIDERS))
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", help="file name under bench/results, or a path")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.measure:
        measure(args.measure)
        return
    heads = list(HEADS) if args.shapes == "all" else args.shapes.split(",")
    names = args.providers.split(",")
    for kind, given, known in (
        ("shape", heads, HEADS),
        ("provider", names, PROVIDERS),
        ("objective", args.objectives.split(","), OBJECTIVES),
        ("dtype", args.dtypes.split(","), DTYPES),
    ):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {kind} {unknown[0]!r}; choose from {', '.join(known)}")
    results: list[dict[str, object]] = []
    for op in args.ops.split(","):
        rows = args.rows or (4096 if args.device == "cuda" else {"logits": 1024, "linear": 512}[op])
        if rows % SEQUENCES:
            parser.error(f"--rows must be a multiple of {SEQUENCES}, the number of sequences")
        for head in heads:
            for dtype in args.dtypes.split(","):
                for objective in args.objectives.split(","):
                    torch.compiler.reset()
                    part = bench(Case(op, objective, head, rows, dtype, args.device), names, args)
                    print(table(part), flush=True)
                    results += part
    if args.json:
        print(f"\nwrote {write_json(args.json, {'environment': environment(args.device), 'rows': results}).name}")


if __name__ == "__main__":
    main()
