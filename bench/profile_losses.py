"""Where the time of an unlearning loss goes: a trace with named ranges for Perfetto, and the top ops.

    python bench/profile_losses.py                                     # linear and logits, WGA, a small head
    python bench/profile_losses.py --op linear --shape llama-3.2-1b --rows 1024 --objective npo --dtype bf16
    python bench/profile_losses.py --device cuda --shape llama-3.1-8b --rows 8192 --json profile_losses.json

Ranges: the whole op, the head's matrix products (logits; dH and dW), the row kernels, the weights of sequences. They
are put around gfast's functions by this script alone.
"""

from __future__ import annotations

from dataclasses import asdict

from _loss_cases import BATCHES, DTYPES, HEADS, MODES, OBJECTIVES, Case, make_inputs
from _loss_providers import PROVIDERS
from _profiling import arguments, parsed, profiled, write

RANGES = {
    "gfast.ops.head:ChunkedHead.logits": "gfast::chunk/head GEMM",
    "gfast.ops.vocab_parallel:Shard.fold": "gfast::head GEMM in tiles, folded",
    "gfast.ops.head:ChunkedHead.add_gradients": "gfast::chunk/dH and dW GEMMs",
    "gfast.ops.head:_accumulate_product": "gfast::chunk/dW GEMM",
    "gfast.ops.head:ChunkedHead.gradients": "gfast::gradients put together",
    "gfast.ops.linear_unlearn_loss:weighted_rows": "gfast::chunk/row kernel",
    "gfast.ops.vocab_parallel:Shard.logp_rows": "gfast::chunk/row kernel, log-probs",
    "gfast.ops.vocab_parallel:Shard.logp_rows_grad": "gfast::chunk/row kernel, gradient",
    "gfast.ops.linear_unlearn_loss:sequence_weights": "gfast::sequence weights",
    "gfast.ops.unlearn_loss:weighted_rows": "gfast::row kernel",
    "gfast.ops.token_logp:logp_rows": "gfast::row kernel, log-probs",
    "gfast.ops.token_logp:logp_rows_grad": "gfast::row kernel, gradient",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--op", default="linear,logits")
    parser.add_argument("--shape", choices=HEADS, default="small")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--objective", choices=OBJECTIVES, default="wga")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--mode", choices=MODES, default="train")
    parser.add_argument("--batch", choices=BATCHES, default="full")
    parser.add_argument("--provider", choices=PROVIDERS, default="gfast", help="another one to compare the trace with")
    args = parsed(parser)
    if (why := PROVIDERS[args.provider].why_not(args.device)) is not None:
        parser.error(f"{args.provider}: {why}")
    runs = []
    for op in args.op.split(","):
        if op not in ("linear", "logits"):
            parser.error(f"unknown op {op!r}; choose from linear, logits")
        sizes = (args.shape, *HEADS[args.shape], args.rows)
        case = Case(op, args.objective, *sizes, args.dtype, args.mode, args.batch, args.device)
        step = PROVIDERS[args.provider].make(case, make_inputs(case))
        if step is None:
            print(f"{args.provider} does not apply to {op} {args.objective} {args.mode}")
            continue
        print(f"\n{args.provider}, {op} {args.objective} {args.mode}, {' x '.join(map(str, case.shape))} {args.dtype}")
        found = profiled(step, RANGES, args, f"losses_{op}_{args.objective}_{args.provider}")
        runs.append({**asdict(case), "shape": case.shape, "provider": args.provider, **found})
    write(args, runs)


if __name__ == "__main__":
    main()
