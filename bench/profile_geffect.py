"""Where the time of a gradient effect goes: a trace with named ranges for Perfetto, and the top ops.

    python bench/profile_geffect.py                                # g_effect of WGA, a SmolLM2-135M-shaped Llama
    python bench/profile_geffect.py --provider pg_effect --shape tiny
    python bench/profile_geffect.py --device cuda --shape llama-2-7b --dtype bf16 --json profile_geffect.json

Ranges: a pass over the data, a batch's forward, its backward, the dot products of the hooks, and the storing of
directions. They are put around gfast's functions by this script alone.
"""

from __future__ import annotations

import functools

from _effect_providers import PROVIDERS
from _models import DTYPES, SHAPES, answers, random_model
from _profiling import arguments, parsed, profiled, write

RANGES = {
    "gfast.geffect.backward:Passes.backward": "gfast::pass",
    "gfast.geffect.backward:model_loss": "gfast::batch/forward",
    "torch:Tensor.backward": "gfast::batch/backward",
    "gfast.geffect.directions:dots": "gfast::hook/dots of a direction",
    "gfast.geffect.engines.stream:dots": "gfast::hook/dots of an objective",
    "gfast.geffect.storage:Store.add": "gfast::hook/direction storage",
    "gfast.geffect.storage:Store.finish": "gfast::direction storage/finish",
    "gfast.geffect.directions:parameter_squares": "gfast::fingerprint of the weights",
    "gfast.geffect.engines.sample:objective_dots": "gfast::sample engine",
    "gfast.geffect.engines.gram:objective_dots": "gfast::gram engine",
    "gfast.geffect.engines.token:objective_dots": "gfast::token engine",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--provider", choices=PROVIDERS, default="g_effect(WGA)")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=72)
    parser.add_argument("--layers", type=int, help="cut the model to this depth")
    args = parsed(parser)
    model = random_model(args.shape, args.dtype, args.device, args.layers)
    vocab = SHAPES[args.shape]["vocab_size"]
    forget, retain = (answers(vocab, args.batch, args.tokens, seed, args.device) for seed in (1, 2))
    provider = PROVIDERS[args.provider]
    if (why := provider.why_not(model, forget)) is not None:
        parser.error(f"{args.provider}: {why}")
    print(f"{args.provider}, {args.shape}, {args.dtype}, {args.batch} x {args.tokens} tokens")
    words = "".join(letter if letter.isalnum() else "_" for letter in args.provider).strip("_")
    step = functools.partial(provider.run, model, forget, retain)
    found = profiled(step, RANGES, args, f"geffect_{words}_{args.shape}")
    settings = {key: getattr(args, key) for key in ("shape", "dtype", "batch", "tokens", "layers", "provider")}
    write(args, [{**settings, **found}])


if __name__ == "__main__":
    main()
