"""G-effect against the plain forward/backward passes it needs, and against how the paper's published code measures it.

    python bench/geffect.py                 # a SmolLM2-135M-shaped Llama, fp32, 4 x 72 tokens a batch
    python bench/geffect.py --shape tiny    # seconds, to see that it runs
    python bench/geffect.py --json geffect_cpu.json
    python bench/geffect.py --device cuda --shape llama-3.2-1b --dtype bf16 --tokens 512 --json geffect_gpu.json

Times are medians over interleaved rounds in one run, after a correctness check. The ratio is to as many plain passes
(logits, cross-entropy, backward into .grad) on the same batches as the measurement needs: two for GA, whose gradient is
minus that of the risk, three for another objective. Peak memory is what a call needs beyond the model and its data.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _timing import environment, interleaved, peak_extra_bytes, peak_in_fresh_process, write_json

import gfast
from gfast.geffect import assign
from gfast.objectives import GA, WGA

SHAPES = {
    "smollm2-135m": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": dict(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "tiny": dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative to the product of the norms; bf16: plain autograd's own error
LAW = 1.05


def plain_loss(model, batch: dict, objective: str) -> torch.Tensor:
    """Token mean from full logits, written out: NLL, GA or WGA with alpha 1."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:].reshape(-1)
    nll = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets, reduction="none")
    if objective == "wga":
        return (-(-nll).detach().exp() * nll).mean()
    return -nll.mean() if objective == "ga" else nll.mean()


def plain_passes(model, work: list[tuple[dict, str]]) -> None:
    """Forward and backward for each (batch, objective), gradients dropped after each."""
    for batch, objective in work:
        plain_loss(model, batch, objective).backward()
        model.zero_grad(set_to_none=True)


def published_way(model, forget: list[dict], retain: list[dict], objective: str) -> dict[str, dict[str, float]]:
    """As the published code is described: four forward/backwards for each micro-batch, gradients copied to host lists.

    For each side the objective's and the risk's gradient are computed anew, every parameter's gradient is copied to the
    CPU, the risk's is mixed into a moving average (0.6 old, 0.4 new), and dot products are summed over groups that are
    matched by name (blocks 0-9, 10-19, 20 and more).
    """

    def to_host(batch: dict, kind: str) -> list[torch.Tensor]:
        plain_loss(model, batch, kind).backward()
        grads = [p.grad.detach().cpu().clone() for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        return grads

    def mixed(old: list[torch.Tensor], new: list[torch.Tensor]) -> list[torch.Tensor]:
        return [0.6 * a + 0.4 * b for a, b in zip(old, new, strict=True)]

    names = [name for name, _ in model.named_parameters()]
    out: dict[str, dict[str, float]] = {}
    for side, data in (("unlearn", forget), ("retain", retain)):
        average_own = average_risk = None
        for forget_batch, batch in zip(forget, data, strict=True):
            own, risk = to_host(forget_batch, objective), to_host(batch, "nll")
            average_own = own if average_own is None else mixed(average_own, own)
            average_risk = risk if average_risk is None else mixed(average_risk, risk)
        groups: dict[str, float] = {}
        for name, a, b in zip(names, average_own, average_risk, strict=True):
            block = re.search(r"layers\.(\d+)\.", name)
            group = "other" if block is None else ("0-9", "10-19", "20+")[min(int(block.group(1)) // 10, 2)]
            groups[group] = groups.get(group, 0.0) + float((a * b).sum())
        out[side] = groups
    return out


def check(model, forget: dict, retain: dict, tolerance: float) -> float:
    """Largest error of a group's G-effect against plain autograd, relative to the norms. Exits when too large."""
    groups = assign(model)
    effects = gfast.g_effect(model, [GA(), WGA()], forget=forget, retain=retain, norms=True)
    worst = 0.0
    for side, batch in (("unlearn", forget), ("retain", retain)):
        plain_loss(model, batch, "nll").backward()
        risk = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        for kind, effect in zip(("ga", "wga"), effects, strict=True):
            plain_loss(model, forget, kind).backward()
            expected = dict.fromkeys(groups.names, 0.0)
            for name, p in model.named_parameters():
                expected[groups.names[groups.index[name]]] += float((p.grad.double() * risk[name].double()).sum())
            model.zero_grad(set_to_none=True)
            for group, value in expected.items():
                scale = effect.norms["objective"][group] * effect.norms[side][group]
                worst = max(worst, abs(getattr(effect, side)[group] - value) / scale)
    if worst > tolerance:
        sys.exit(f"g_effect is wrong: relative error {worst:.2e} against plain autograd; nothing was timed")
    return worst


def make_batch(vocab: int, rows: int, tokens: int, seed: int, device: str) -> dict:
    ids = torch.randint(0, vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def setup(args: argparse.Namespace) -> tuple[torch.nn.Module, dict, dict]:
    """A random model of the shape (no dropout), a forget batch and a retain batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[args.shape])).to(args.device, DTYPES[args.dtype]).eval()
    vocab = SHAPES[args.shape]["vocab_size"]
    forget, retain = (make_batch(vocab, args.batch, args.tokens, seed, args.device) for seed in (1, 2))
    return model, forget, retain


def cases(model, forget: dict, retain: dict) -> dict[str, Callable[[], object]]:
    pair = [(forget, "nll"), (retain, "nll")]
    return {
        "2 plain passes": lambda: plain_passes(model, pair),
        "3 plain passes": lambda: plain_passes(model, [*pair, (forget, "wga")]),
        "g_effect(GA)": lambda: gfast.g_effect(model, GA(), forget=forget, retain=retain),
        "g_effect(WGA)": lambda: gfast.g_effect(model, WGA(), forget=forget, retain=retain),
        "published way, GA": lambda: published_way(model, [forget], [retain], "ga"),
        "published way, WGA": lambda: published_way(model, [forget], [retain], "wga"),
    }


def peak_mb(name: str, args: argparse.Namespace) -> float | None:
    """Peak extra memory of a case; on a CPU in a fresh process, where no freed memory is there to be reused."""
    arguments = ["--measure", name]
    for key in ("shape", "dtype", "batch", "tokens", "device", "threads"):
        if getattr(args, key) is not None:
            arguments += [f"--{key}", str(getattr(args, key))]
    size = peak_in_fresh_process(__file__, arguments)
    return None if size is None else round(size / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=72)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--budget", type=float, default=90.0, help="seconds per case; at least 3 repetitions are made")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", help="file name under bench/results, or a path")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, forget, retain = setup(args)
    steps = cases(model, forget, retain)
    if args.measure:
        print(peak_extra_bytes(steps[args.measure], args.device))
        return

    error = check(model, forget, retain, TOLERANCE[args.dtype])
    print(f"{args.shape}, {args.dtype}, {args.batch} x {args.tokens} tokens; error {error:.1e} of the norms' product")
    times = interleaved(steps, args.device, args.repetitions, warmup=1, budget_s=args.budget)
    rows = []
    print(f"{'':<20}{'ms':>10}{'ratio':>8}{'peak MB':>10}")
    for name, time in times.items():
        floor = "3 plain passes" if "3" in name or "WGA" in name else "2 plain passes"
        ratio = round(time["median_ms"] / times[floor]["median_ms"], 4)
        peak = peak_mb(name, args)
        rows.append({"name": name, **time, "floor": floor, "ratio": ratio, "peak_extra_mb": peak})
        met = "" if not name.startswith("g_effect") else "  law met" if ratio <= LAW else "  law MISSED"
        shown = "?" if peak is None else peak
        print(f"{name:<20}{time['median_ms']:>10.1f}{ratio:>8.3f}{shown:>10}{met}", flush=True)
    if args.json:
        settings = {key: getattr(args, key) for key in ("shape", "dtype", "batch", "tokens")}
        settings["parameters"] = sum(p.numel() for p in model.parameters())
        record = {"environment": environment(args.device), "settings": settings}
        payload = record | {"law": LAW, "error": error, "rows": rows}
        print(f"wrote {write_json(args.json, payload).name}")


if __name__ == "__main__":
    main()
