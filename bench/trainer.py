"""A training by open-unlearning's own trainers and by gfast's in their place: time a step, memory, loss curves.

    GFAST_OPEN_UNLEARNING=CLONE python bench/trainer.py

Same model, rows, order and optimizer. Each training runs in a process of its own; memory is the most that the process
held beyond what it had after its imports: weights, gradients, a reference model or cached values, logits, and the pool
that gfast keeps freed gradients in; "lean" is gfast without that pool (GFAST_POOL_MIB=0), "joint" is that with both
sides in one call of the model (joint_forward). Whoever trains so holds
parameters, gradients and the optimizer's state: the floor, which is given beside, with the ratio of what is above it.
Steps after the first are timed. KL is another number in open-unlearning (a mean over prompts and padding too), so its
curves are shown and not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAW, SAME = 0.6, 1e-5
WAYS = ("open-unlearning", "gfast", "lean", "joint")
METHODS = {"NPO": {"beta": 0.1}, "GradDiff": {"retain_loss_type": "KL"}}


def rows(count: int, tokens: int, vocab: int, seed: int) -> list[dict]:
    """Items as open-unlearning's QADataset gives them; the first two fifths of each are its prompt."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        length = tokens - int(torch.randint(0, tokens // 4, (), generator=generator))
        ids = torch.randint(4, vocab, (length,), generator=generator)
        labels = torch.where(torch.arange(length) < 2 * length // 5, -100, ids)
        items.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "index": index})
    return items


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def highest() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def one(way: str, method: str, args: argparse.Namespace) -> dict:
    """One training, in this process."""
    sys.path.insert(0, str(Path(os.environ["GFAST_OPEN_UNLEARNING"]) / "src"))
    import torch
    import trainer as theirs
    from data.collators import DataCollatorForSupervisedDataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

    from gfast.data import ForgetRetain
    from gfast.integrations.open_unlearning import register

    class Tokenizer:
        pad_token_id = eos_token_id = 0

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.start)

    register()
    before = resident()
    torch.manual_seed(0)
    sizes = dict(hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers)
    heads = dict(num_attention_heads=args.hidden // 64, num_key_value_heads=max(1, args.hidden // 128))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=args.vocab, pad_token_id=0, **sizes, **heads))
    forget, retain = (rows(args.batch * args.steps, args.tokens, args.vocab, seed) for seed in (1, 2))
    partners = ForgetRetain(forget, retain, seed=0).partners()
    pairs = [{"forget": item, "retain": retain[partner]} for item, partner in zip(forget, partners, strict=True)]
    options = dict(
        learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd", max_steps=args.steps
    )
    options |= dict(
        seed=0, per_device_train_batch_size=args.batch, save_strategy="no", report_to="none", logging_steps=1
    )
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        training = TrainingArguments(folder, use_cpu=True, remove_unused_columns=False, disable_tqdm=True, **options)
        if way != "open-unlearning":
            from types import SimpleNamespace

            data = SimpleNamespace(forget=forget, retain=retain, anchor="forget")
            made = theirs.TRAINER_REGISTRY[f"GFast{method}"](
                model=model, args=training, train_dataset=data, processing_class=Tokenizer(), **METHODS[method],
                joint_forward=way == "joint",
            )  # fmt: skip
        else:
            made = theirs.TRAINER_REGISTRY[method](
                model=model,
                args=training,
                train_dataset=pairs,
                data_collator=DataCollatorForSupervisedDataset(Tokenizer()),
                **METHODS[method],
            )
            made.compute_loss = without_counts(made.compute_loss)
            made.model_accepts_loss_kwargs = False  # else Trainer counts labels of a batch that has two sides
        setup = time.perf_counter() - begun
        made.add_callback(Clock())
        made.train()
    losses = [log["loss"] for log in made.state.log_history if "loss" in log]
    median = statistics.median(Clock.seconds[1:])
    return {
        "way": way,
        "step_s": median,
        "setup_s": setup,
        "memory_mb": (highest() - before) / 2**20,
        "losses": losses,
        "floor_mb": floor(made) / 2**20,
    }


def floor(made) -> int:
    """Bytes of parameters, of their gradients, and of what the optimizer keeps (nothing, for SGD)."""
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    kept = [value for state in made.optimizer.state.values() for value in state.values()]
    held = [p for p in made.model.parameters()] + parameters + [x for x in kept if hasattr(x, "nbytes")]
    return sum(tensor.nbytes for tensor in held)


def without_counts(compute_loss):
    """Their compute_loss as Trainer calls it since 4.46, with one argument more."""

    def called(model, inputs, return_outputs=False, num_items_in_batch=None):
        return compute_loss(model, inputs, return_outputs)

    return called


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(vocab=128256, hidden=1024, layers=2, batch=4, tokens=64, steps=4, repeats=1).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "GFAST_OPEN_UNLEARNING" not in os.environ:
        sys.exit("set GFAST_OPEN_UNLEARNING to a clone of github.com/locuslab/open-unlearning")
    if args.way:
        print(json.dumps(one(args.way, args.methods[0], args)))
        return
    from machine import environment, write_json

    cases = []
    for method in args.methods:
        by_way: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way, runs in by_way.items():
                command = [sys.executable, __file__, "--way", way, "--methods", method]
                for name in ("vocab", "hidden", "layers", "batch", "tokens", "steps"):
                    command += [f"--{name}", str(getattr(args, name))]
                own = os.environ | ({"GFAST_POOL_MIB": "0"} if way in ("lean", "joint") else {})
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=own).stdout
                runs.append(json.loads(out.splitlines()[-1]))
        cases.append(compared(method, by_way))
        print(json.dumps(cases[-1]))
    settings = {
        name: getattr(args, name) for name in ("vocab", "hidden", "layers", "batch", "tokens", "steps", "repeats")
    }
    write_json("trainer.json", {"environment": environment(), "settings": settings, "cases": cases})


def compared(method: str, by_way: dict[str, list[dict]]) -> dict:
    """Medians of all ways, the ratios of gfast's to the other, and how far apart the loss curves are."""
    row: dict = {"method": method, "law": LAW, "floor_mb": round(by_way["gfast"][0]["floor_mb"], 1)}
    for key in ("step_s", "memory_mb", "setup_s"):
        values = {way: statistics.median(run[key] for run in runs) for way, runs in by_way.items()}
        row |= {f"{way.replace('-', '_')}_{key}": round(value, 3) for way, value in values.items()}
        for way, name in (("gfast", ""), ("lean", "lean_"), ("joint", "joint_")):
            if key != "setup_s":
                row[f"{name}{key.split('_')[0]}_ratio"] = round(values[way] / values["open-unlearning"], 3)
            if key == "memory_mb":
                above = [values[each] - row["floor_mb"] for each in (way, "open-unlearning")]
                row[f"{name}above_floor_ratio"] = round(above[0] / above[1], 3)
    curves = [runs[0]["losses"] for runs in by_way.values()]
    row["losses"] = dict(zip((way.replace("-", "_") for way in by_way), curves, strict=True))
    if method == "NPO":
        pairs = [pair for curve in curves[1:] for pair in zip(curves[0], curve, strict=True)]
        apart = max(abs(a - b) / max(abs(a), abs(b)) for a, b in pairs)
        row["losses_apart"] = apart
        if apart > SAME:
            raise SystemExit(f"{method}: the loss curves are {apart:.2e} apart, so that nothing is compared: {curves}")
    holds = {f"{name}holds": row[f"{name}step_ratio"] <= LAW >= row[f"{name}memory_ratio"] for name in ("", "joint_")}
    return row | holds


if __name__ == "__main__":
    main()
