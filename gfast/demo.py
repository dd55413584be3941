# SPDX-License-Identifier: Apache-2.0
"""A whole unlearning study in a few minutes on a laptop, without a download: `gfast demo`.

A small Llama learns facts about fictitious authors until it knows them by heart. From that model five objectives unlearn
four of the authors, and the G-effect of every objective on the forget and the retain set is recorded on the way. The
result is a folder with the records of each run and one page, report.html, that shows them.

The code is also an example: everything it does goes through the public names of gfast.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Subset
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed
from transformers import __version__ as transformers_version

import gfast
from gfast.data import Collator, ForgetRetain, ForgetRetainCollator, QADataset, batches, bundled_authors, demo_tokenizer
from gfast.objectives import GA, KL, NLL, NPO, TNPO, WGA, Mix, Objective
from gfast.report import build_report
from gfast.training import GEffectCallback, ReferenceCache, UnlearnConfig, UnlearnTrainer, write_run_info
from gfast.training.files import write_json

OBJECTIVES: dict[str, Objective] = {
    "ga": GA(),
    "wga": WGA(alpha=1.0),
    "npo": NPO(beta=0.1),
    "tnpo": TNPO(beta=1.0),
    "npo-kl": Mix(NPO(beta=0.1), KL()),
}
TITLE = "Unlearning four fictitious authors: the G-effect of five objectives"


@dataclass(frozen=True)
class Plan:
    """What the demo does; two calls with the same plan make the same numbers on the same machine."""

    seed: int = 0
    steps: int = 25
    every: int = 2
    learning_rate: float = 3e-4
    batch_size: int = 8
    hidden: int = 128
    layers: int = 6
    forget_rows: int = 40
    retain_rows: int = 160
    learned_below: float = 0.05
    learning_epochs: int = 40


QUICK = dict(steps=6, every=3, hidden=64, layers=3, forget_rows=10, retain_rows=30, learned_below=0.3)


class Study:
    """The data, the model before unlearning and the reference values that all runs share."""

    def __init__(self, plan: Plan, out: Path, cpu: bool) -> None:
        self.plan, self.out, self.cpu = plan, out, cpu
        self.tokenizer = demo_tokenizer()
        forget, retain = bundled_authors()
        self.forget = QADataset(forget[: plan.forget_rows], self.tokenizer)
        # Offset ids: a sample keeps its own id when both sets are learned together.
        self.retain = QADataset(retain[: plan.retain_rows], self.tokenizer, id_offset=len(forget))
        self.rows = {"forget": forget[: plan.forget_rows], "retain": retain[: plan.retain_rows]}
        self.collator = Collator(self.tokenizer)

    def learn(self) -> LlamaForCausalLM:
        """A small Llama that knows both sets by heart, read from the folder if an earlier call made it."""
        folder = self.out / "model"
        if folder.exists():
            print(f"Model: {folder} is there already")
            return LlamaForCausalLM.from_pretrained(folder)
        set_seed(self.plan.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=self.plan.hidden,
                intermediate_size=self.plan.hidden * 8 // 3 // 16 * 16,
                num_hidden_layers=self.plan.layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=256,
                pad_token_id=self.tokenizer.pad_token_id,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        )
        everything = ConcatDataset([self.forget, self.retain])
        args = UnlearnConfig(
            output_dir=str(self.out / "learning"),
            num_train_epochs=self.plan.learning_epochs,
            per_device_train_batch_size=20,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            record_every=0,
            **self.common_arguments("epoch"),
        )
        callbacks = [StopBelow(self.plan.learned_below), Bar("learning")]
        train(model, args, NLL(), train_dataset=everything, data_collator=self.collator, callbacks=callbacks)
        # Whole or not at all, so that a folder called model always holds a model.
        partial = self.out / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.cpu().save_pretrained(partial)
        os.replace(partial, folder)
        shutil.rmtree(args.output_dir, ignore_errors=True)
        return model

    def references(self, model: LlamaForCausalLM) -> dict[str, ReferenceCache]:
        """What the model says before unlearning, once: log-probabilities for NPO and TNPO, hidden states for KL."""
        sides = (("forget", self.forget, {"logp"}), ("retain", self.retain, {"hidden"}))
        return {
            side: ReferenceCache.build(
                model, data, self.collator, path=self.out / f"reference-{side}.safetensors", what=what, progress=True
            )
            for side, data, what in sides
        }

    def unlearn(self, name: str, objective: Objective, references: dict[str, ReferenceCache]) -> Path:
        """One run from the learned model, with its G-effects; returns its folder, whose result.json says it is whole."""
        folder = self.out / "runs" / name
        if (folder / "result.json").exists():
            print(f"{objective}: done already")
            return folder
        started = time.perf_counter()
        set_seed(self.plan.seed)
        model = LlamaForCausalLM.from_pretrained(self.out / "model")
        args = UnlearnConfig(
            output_dir=str(folder),
            max_steps=self.plan.steps,
            per_device_train_batch_size=self.plan.batch_size,
            learning_rate=self.plan.learning_rate,
            lr_scheduler_type="constant",
            **self.common_arguments("no"),
        )
        write_run_info(folder, self.describe(objective, model, args))
        # The same fixed batches at every step: the effects of all steps and all runs can be compared.
        measured = Subset(self.retain, range(0, len(self.retain), 4))
        heads = references["retain"].head
        geffect = GEffectCallback(
            every=self.plan.every,
            forget=batches(self.forget, Collator(self.tokenizer, references["forget"]), len(self.forget)),
            retain=[
                batch | heads
                for batch in batches(measured, Collator(self.tokenizer, references["retain"]), len(measured))
            ],
            objectives=objective,
            groups="paper",
            norms=True,
        )
        train(
            model,
            args,
            objective,
            references=references if objective.needs else None,
            train_dataset=ForgetRetain(self.forget, self.retain, seed=self.plan.seed),
            data_collator=ForgetRetainCollator(self.collator),
            callbacks=[geffect, Bar(str(objective))],
        )
        result = {"seconds": round(time.perf_counter() - started, 1), "replies": self.replies(model)}
        write_json(folder / "result.json", result)
        return folder

    def common_arguments(self, logging_strategy: str) -> dict[str, Any]:
        return dict(
            seed=self.plan.seed,
            use_cpu=self.cpu,
            save_strategy="no",
            logging_strategy=logging_strategy,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            weight_decay=0.0,
        )

    def describe(self, objective: Objective, model: LlamaForCausalLM, args: UnlearnConfig) -> dict[str, Any]:
        """What run.json holds, and the page shows as settings."""
        return {
            "objective": str(objective),
            "seed": self.plan.seed,
            "steps": self.plan.steps,
            "batch size": self.plan.batch_size,
            "learning rate": self.plan.learning_rate,
            "optimizer": f"AdamW, {args.lr_scheduler_type.value} rate, gradient norm clipped at {args.max_grad_norm:g}",
            "model": f"Llama, {model.num_parameters():,} parameters, hidden {self.plan.hidden}, {self.plan.layers} layers, "
            f"vocabulary {len(self.tokenizer)}, {model.dtype}".replace("torch.", ""),
            "data": f"bundled authors, {len(self.forget)} questions to forget and {len(self.retain)} to retain",
            "G-effect measured": f"every {self.plan.every} steps on all {len(self.forget)} forget questions and a fixed "
            f"{len(range(0, len(self.retain), 4))} of the retain questions",
            "device": f"{args.device}, {torch.get_num_threads()} threads, {platform.machine()}",
            "versions": f"gfast {gfast.__version__}, torch {torch.__version__}, transformers {transformers_version}, "
            f"Python {platform.python_version()}",
            "created": time.strftime("%Y-%m-%d %H:%M"),
        }  # fmt: skip

    def asked(self) -> list[tuple[str, dict[str, str], torch.Tensor]]:
        """The questions that the page shows answers to: set, row, prompt ids."""
        picked = [
            ("forget", self.forget, 0),
            ("forget", self.forget, 4),
            ("retain", self.retain, 0),
            ("retain", self.retain, 4),
        ]
        return [(side, self.rows[side][i], data[i]["input_ids"][data[i]["labels"] == -100]) for side, data, i in picked]

    @torch.no_grad()
    def replies(self, model: LlamaForCausalLM) -> list[str]:
        """What the model says to each question of `asked`, greedily."""
        prompts = {"input_ids": [prompt.tolist() for _, _, prompt in self.asked()]}
        inputs = self.tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
        model.eval()
        said = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return self.tokenizer.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def report(self, folders: list[Path], before: list[str]) -> Path:
        results = {folder.name: json.loads((folder / "result.json").read_text()) for folder in folders}
        samples = [
            {
                "set": side,
                "question": row["question"],
                "answer": row["answer"],
                "replies": {"before unlearning": before[i].strip()}
                | {f"after {OBJECTIVES[name]}": result["replies"][i].strip() for name, result in results.items()},
            }
            for i, (side, row, _) in enumerate(self.asked())
        ]
        times = {f"time of {OBJECTIVES[name]}": f"{result['seconds']} s" for name, result in results.items()}
        return build_report(folders, self.out, TITLE, samples=samples, settings=times)


class StopBelow(TrainerCallback):
    """Ends training once the logged loss is below a value."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        control.should_training_stop |= (logs or {}).get("loss", float("inf")) < self.value


class Bar(TrainerCallback):
    """A progress bar with a name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.name, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.bar.set_postfix(nll=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def train(model: Any, args: UnlearnConfig, objective: Objective, **arguments: Any) -> None:
    trainer = UnlearnTrainer(model, args, objective=objective, **arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def claim(out: Path, plan: Plan) -> None:
    """Take an empty folder for this plan, or the folder of an earlier call with it. ValueError for anything else."""
    marker, wanted = out / "demo.json", asdict(plan)
    if marker.exists():
        found = json.loads(marker.read_text())
        differ = [f"{k} is {found.get(k)} there and {v} here" for k, v in wanted.items() if found.get(k) != v]
        if differ:
            raise ValueError(f"{out} holds a demo with other settings ({', '.join(differ)}); give another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something else; give another --out, or an empty folder")
    else:
        write_json(marker, wanted)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns an exit status."""
    parser = argparse.ArgumentParser(prog="gfast demo", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--out", type=Path, default=Path("gfast-demo"), help="folder of the result (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=Plan.seed, help="seed of everything (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of each run (default: {Plan.steps})")
    parser.add_argument("--lr", type=float, help=f"learning rate of every run (default: {Plan.learning_rate})")
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer authors and steps: a smoke test")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    options = parser.parse_args(argv)
    chosen = {"steps": options.steps, "learning_rate": options.lr}
    plan = Plan(
        **{"seed": options.seed} | (QUICK if options.quick else {}) | {k: v for k, v in chosen.items() if v is not None}
    )
    if plan.steps < 1 or plan.learning_rate <= 0:
        parser.error("--steps and --lr must be positive")
    started = time.perf_counter()
    try:
        claim(options.out, plan)
    except ValueError as error:
        parser.error(str(error))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        study = Study(plan, options.out, options.cpu)
        model = study.learn()
        before, references = study.replies(model), study.references(model)
        folders = [study.unlearn(name, objective, references) for name, objective in OBJECTIVES.items()]
        page = study.report(folders, before)
    except KeyboardInterrupt:
        print(
            f"\nStopped. What is finished stays in {options.out}; the same command goes on from there.", file=sys.stderr
        )
        return 130
    print(f"Done in {time.perf_counter() - started:.0f} s. The page: {page.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
