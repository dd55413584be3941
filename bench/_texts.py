"""What people wrote for docs/benchmarks.md: how to reproduce it, what the columns mean, why laws are missed.

No figure stands here: those come from the results.
"""

INTRODUCTION = """# Benchmarks

Tables and pictures are made from the JSON in `bench/results/DEVICE/` by `python bench/plots.py` and
`python bench/render.py`; nothing on this page is typed by hand but the words.

## Reproduce it

```
bench/on_cpu.sh                    # measures, draws and renders all of a CPU's part
bench/on_cpu.sh linear modes pages # some steps of it
bench/on_gpu.sh FOLDER             # builds, measures and tests on an NVIDIA GPU; copy FOLDER/DEVICE to bench/results
```

Results go to a folder named after the CPU's family and widest instructions, or after the GPU, so that several devices
live beside each other (`GFAST_BENCH_DEVICE` chooses another name). `PYTHON` chooses the interpreter; it needs the
packages of `requirements.txt`, and measures TRL, Liger, Cut Cross-Entropy, kronfluence and bergson where they are
importable (`bench/requirements.txt` says how to install them; results record their versions). The machine must be
quiet: every step says how long it took, every result what the load was.

## What the columns mean

- **provider**: who computes it. `python bench/losses.py --list` describes all of them. `open_unlearning` computes the
  model's own loss first and drops it, as that project does; `eager` is plain PyTorch in the logits' dtype, `upcast` on
  logits in fp32; `torch_chunked` is `F.linear_cross_entropy` with its own choice of chunks, `torch_chunked_rows` with
  large ones.
- **ms**, **IQR ms**, **times**: median, interquartile range and number of timed calls. The calls of all providers are
  interleaved, so that a change of the machine's speed hits all alike. Who is slow is called less often, at least once;
  who takes longer than its budget is timed by its first, cold call (times 1), which flatters the others.
- **speed**: bytes of the logits read and of the gradient written, or operations of the matrix products that the mode
  needs over rows with a label, by the time.
- **floors**: the time in multiples of what nobody can do without: the median over the rounds of the ratio within one
  round (of results without the times of their rounds: the ratio of the medians). From logits: a copy of them into
  memory that is there (half a copy where nothing is written). From hidden states: the bare matrix products of the mode,
  over the rows that have a label, in the case's dtype or in fp32, whichever is faster. Of gradient effects: plain
  forward and backward passes (`g_effect` of one objective on single batches shares a forward of them, of several
  objectives all but one of the objectives' own); of `gram_effect` a training step on both batches (gradients
  accumulated, plain SGD), and two passes that compute no gradient of a weight; all timed right before each call (in
  results without `beside_ms` in the JSON once a round, which lasts up to a minute there).
- **law**: how many floors gfast may take (of `grad_dot`: the share of the read bandwidth it must reach). Of memory: how
  many times what its gradients (dW in fp32 too, where it has 16 bits and several chunks are summed) and one chunk need:
  the chunk's logits, the rows that take part where they are copies, and what converting takes: tiles of W and dW, or
  sums of dH by parts of the vocabulary.
  Without gradient: its outputs and the logits that are folded at a time.
- **peak MB**: memory a call needs at its peak beyond what is held before it, its results included, measured in a fresh
  process; of a loss on a CPU in a second call, because a matrix library keeps from the first what it packs operands in.
- **error**: of loss and gradients against fp64, relative (2-norm), on fewer rows before anything is timed. gfast beyond
  twice the error of plain PyTorch on upcast logits plus one rounding is refused and not timed; others beyond it are
  timed and marked "not the same numbers" (≠). Of gradient effects: against plain autograd, relative to the product of
  the norms. The published way in micro-batches takes dot products of moving averages, which is no effect of the batch:
  it is timed whatever its error, and marked with how far its totals are from the exact ones,
  on two micro-batches (of a large model its first blocks).
- **mode** of a case: forward + backward; forward of a loss that will be differentiated (gfast computes the gradients
  there, the floor is the forward's own product); frozen head (no gradient of its weight); without gradient. **batch**:
  full (every label valid), tofu (short answers, most positions ignored), long (sequences of up to 2048 positions)."""

_NOT_QUIET = (
    "Few calls of seconds each, on a machine that others slow down for seconds at a time: the interquartile range of "
    "the calls is wider than what is missed. In the sweeps the plain pass itself does not grow evenly."
)
REASONS = {  # only what is known
    "g_effect": _NOT_QUIET,
    "pg_effect": _NOT_QUIET,
    "logits": "The copy is into memory that is there; `unlearn_loss` returns a new gradient, whose pages the system "
    "may have to provide first (`fresh_copy` is a copy with that; `inplace=True` needs none). Objectives with a "
    "weight a sequence (NPO) need all rows of a sequence before its first gradient can be written: they read "
    "the logits twice.",
    "train": "gfast multiplies chunk by chunk: several products, and dW added up over the chunks, against three large "
    "products into memory that is there. In 16 bits on a CPU without instructions for them, W is widened and dW "
    "rounded on their way through the cache, while the floor's operands are converted beforehand: the fewer rows, the "
    "more that weighs. On `cpu-xeon-amx` 1024 rows were still two chunks (one since commit `3308ab3`). Where an "
    "objective has a weight a sequence (NPO), the sequences longer than a chunk have their logits computed twice, all "
    "but the first of a batch (the first too in results before commit `850ae22`): four products.",
    "frozen": "Two products only, in batches of short answers over few rows: what does not shrink with the rows "
    "(converting or packing W, starting the threads) weighs more beside them.",
    "nograd": "One product only, in batches of short answers over few rows: what does not shrink with the rows "
    "(converting or packing W, starting the threads) weighs more beside it, and so does the fold, two passes over "
    "cached tiles of logits with an exponential an entry.",
    "eager": "How many times less depends on how much slower a machine computes than it copies: gfast itself stands at "
    "the copies of the logits that its law above names.",
    "gram_effect": "`g_effect` by gram takes two forwards and three backwards without gradients of weights, the forget "
    "batch's with the objective's seeds and with the risk's (GA alone takes two), where `gram_effect` takes two of "
    "each: five sixths of a training step's products, and those of the pairs besides.",
    "gram_passes": "Besides the two passes every Linear takes products of token pairs, about 2 n^2 (D_in + D_out) "
    "flops a pair of batches of n tokens, or a temporary gradient of its weight, 2 n D_in D_out. Beside the "
    "4 n D_in D_out of a pass the products of pairs are little in a wide model, and the gradient is half in any.",
    "overhead": "A measurement is the difference of two training runs, and so is its floor: their noise is that of "
    "both. Every measurement also writes its record.",
}
UNKNOWN = "Not explained yet."
