# SPDX-License-Identifier: Apache-2.0
"""A whole unlearning study in a few minutes on a laptop, without a download: `gfast demo`.

A small Llama learns facts about fictitious authors until it knows them by heart. From that model, five objectives
unlearn four of the authors, and on the way the G-effect of each is recorded on the forget and the retain set. The
result is a folder with the records of every run and one page that shows them, report.html.

The code is also an example of the library: everything goes through its public names.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import ConcatDataset, Subset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, set_seed

import gfast
from gfast.data import Collator, ForgetRetain, ForgetRetainCollator, QADataset, batches, bundled_authors, demo_tokenizer
from gfast.demo_plan import Plan
from gfast.files import check_manifest, read_json, write_json, write_manifest
from gfast.objectives import GA, KL, NLL, NPO, TNPO, WGA, Mix, Objective
from gfast.training import GEffectCallback, ReferenceCache, UnlearnConfig, UnlearnTrainer, write_run_info
from gfast.training.progress import Progress
from gfast.training.resume import room_for

OBJECTIVES: dict[str, Objective] = {
    "ga": GA(),
    "wga": WGA(alpha=1.0),
    "npo": NPO(beta=0.1),
    "tnpo": TNPO(beta=1.0),
    "npo-kl": Mix(NPO(beta=0.1), KL()),
}


class Study:
    """The data and the model before unlearning, and the runs that start from it."""

    def __init__(self, plan: Plan, out: Path, cpu: bool = False) -> None:
        self.plan, self.out, self.cpu = plan, out, cpu
        self.tokenizer = demo_tokenizer()
        self.collator = Collator(self.tokenizer)
        forget, retain = bundled_authors()
        self.rows = {"forget": forget[: plan.forget_rows], "retain": retain[: plan.retain_rows]}
        self.forget = QADataset(self.rows["forget"], self.tokenizer)
        # Ids of their own, so that samples stay apart when both sets are learned together.
        self.retain = QADataset(self.rows["retain"], self.tokenizer, id_offset=len(forget))

    def learn(self) -> LlamaForCausalLM:
        """A small Llama that knows both sets by heart; an earlier call's, if the folder holds one."""
        folder = self.out / "model"
        if folder.exists():
            check_manifest(folder, f"delete {self.out} to begin again")
            return LlamaForCausalLM.from_pretrained(folder)
        set_seed(self.plan.seed)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=self.plan.hidden,
            intermediate_size=self.plan.hidden * 11 // 4,
            num_hidden_layers=self.plan.layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            **{name: getattr(self.tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        )
        model = LlamaForCausalLM(config)
        args = self.config(
            self.out / "learning",
            num_train_epochs=self.plan.learning_epochs,
            per_device_train_batch_size=self.plan.learning_batch_size,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            record_every=0,
            logging_strategy="epoch",
        )
        trainer = UnlearnTrainer(
            model,
            args,
            objective=NLL(),
            train_dataset=ConcatDataset([self.forget, self.retain]),
            data_collator=self.collator,
            callbacks=[Progress("learning", self.plan.learned_below)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        # A folder called model is always a whole model: it gets its name last.
        partial = self.out / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with room_for(folder, "the model is taught again"):
            model.cpu().save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
        write_manifest(partial)
        os.replace(partial, folder)
        shutil.rmtree(args.output_dir, ignore_errors=True)
        return model

    def references(self, model: LlamaForCausalLM) -> dict[str, ReferenceCache]:
        """What the model says before unlearning, computed once: log-probs for NPO and TNPO, hidden states for KL."""
        build = ReferenceCache.build
        return {
            "forget": build(model, self.forget, self.collator, self.out / "forget.safetensors", {"logp"}),
            "retain": build(model, self.retain, self.collator, self.out / "retain.safetensors", {"hidden"}),
        }

    def unlearn(self, name: str, objective: Objective, references: dict[str, ReferenceCache]) -> Path:
        """One run from the learned model with its G-effects; its folder has a result.json once it is finished."""
        folder = self.out / "runs" / name
        if (folder / "result.json").exists():
            print(f"{objective}: finished in an earlier call")
            return folder
        started = time.perf_counter()
        set_seed(self.plan.seed)
        model = LlamaForCausalLM.from_pretrained(self.out / "model")
        args = self.config(
            folder,
            max_steps=self.plan.steps,
            per_device_train_batch_size=self.plan.batch_size,
            learning_rate=self.plan.learning_rate,
            lr_scheduler_type="constant",
            logging_strategy="no",
        )
        write_run_info(folder, self.describe(objective, model, args))
        # The same batches at every step, each set in one, so that steps and objectives can be compared.
        forget = batches(self.forget, Collator(self.tokenizer, references["forget"]), len(self.forget))
        some = Subset(self.retain, self.measured)
        retain = batches(some, Collator(self.tokenizer, references["retain"]), len(some))
        retain = [batch | references["retain"].head for batch in retain]
        geffect = GEffectCallback(self.plan.every, forget, retain, objective, groups="paper", norms=True)
        trainer = UnlearnTrainer(
            model,
            args,
            objective=objective,
            references=references if objective.needs else None,
            train_dataset=ForgetRetain(self.forget, self.retain, seed=self.plan.seed),
            data_collator=ForgetRetainCollator(self.collator),
            callbacks=[geffect, Progress(str(objective))],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        replies = self.replies(model)
        write_json(folder / "result.json", {"seconds": time.perf_counter() - started, "replies": replies})
        return folder

    @property
    def measured(self) -> range:
        """The retain questions that G-effects are measured on: every fourth, so some of every author."""
        return range(0, len(self.retain), 4)

    def config(self, folder: Path, **arguments: Any) -> UnlearnConfig:
        return UnlearnConfig(
            output_dir=str(folder),
            seed=self.plan.seed,
            use_cpu=self.cpu,
            save_strategy="no",
            disable_tqdm=True,  # Progress has a name
            dataloader_pin_memory=False,
            **arguments,
        )

    def describe(self, objective: Objective, model: LlamaForCausalLM, args: UnlearnConfig) -> dict[str, Any]:
        """What run.json says, and the page under settings."""
        plan, forget, retain = self.plan, len(self.forget), len(self.retain)
        size, rate = f"{model.num_parameters():,} parameters", f"learning rate {plan.learning_rate:g}"
        cpu = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
        return {
            "objective": str(objective),
            "seed": plan.seed,
            "model": f"Llama, {size}, hidden size {plan.hidden}, {plan.layers} layers, fp32",
            "data": f"bundled authors, {forget} questions to forget, {retain} to retain",
            "training": f"{plan.steps} steps of {plan.batch_size} questions, AdamW, {rate}",
            "measured": f"every {plan.every} steps, on {forget} forget and {len(self.measured)} retain questions",
            "device": cpu if args.device.type == "cpu" else torch.cuda.get_device_name(),
            "versions": {library.__name__: library.__version__ for library in (gfast, torch, transformers)},
            "created": time.strftime("%Y-%m-%d %H:%M"),
        }

    def asked(self) -> list[tuple[str, dict[str, str], list[int]]]:
        """The questions that the page shows answers to: set, row, token ids of the prompt."""
        sides = (("forget", self.forget), ("retain", self.retain))
        items = [(side, self.rows[side][i], data[i]) for side, data in sides for i in (1, 4)]
        return [(side, row, item["input_ids"][item["labels"] == -100].tolist()) for side, row, item in items]

    @torch.no_grad()
    def replies(self, model: LlamaForCausalLM) -> list[str]:
        """What the model says to each question of `asked`."""
        prompts = {"input_ids": [prompt for _, _, prompt in self.asked()]}
        inputs = self.tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
        said = model.eval().generate(**inputs, max_new_tokens=40, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(said, skip_special_tokens=True)]

    def report(self, folders: list[Path], before: list[str]) -> Path:
        """The page, with what the model said before and after each run."""
        from gfast.report import build_report  # draws: seconds of import that only the end needs

        results = {str(OBJECTIVES[folder.name]): read_json(folder / "result.json") for folder in folders}
        samples = []
        for i, (side, row, _) in enumerate(self.asked()):
            replies = {"before unlearning": before[i]} | {f"after {k}": v["replies"][i] for k, v in results.items()}
            samples.append({"set": side, **row, "replies": replies})
        seconds = ", ".join(f"{label} {result['seconds']:.0f} s" for label, result in results.items())
        title = "Unlearning fictitious authors: the G-effect of five objectives"
        return build_report(folders, self.out, title, samples, settings={"time": seconds})


def sentences(summaries: list[dict[str, Any]]) -> list[str]:
    """What the demo shows, to be repeated: who keeps most where all forget as much, and what end points would say."""
    from gfast.report.matched import lesson, matched_sentence

    return [text for text in (matched_sentence(summaries), lesson(summaries)) if text]


def run(plan: Plan, out: Path, cpu: bool) -> int:
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    try:
        study = Study(plan, out, cpu)
        model = study.learn()
        before, references = study.replies(model), study.references(model)
        folders = [study.unlearn(name, objective, references) for name, objective in OBJECTIVES.items()]
        page = study.report(folders, before)
    except KeyboardInterrupt:
        message = f"Stopped. Finished runs stay in {out}; the same command goes on from there."
        raise KeyboardInterrupt(message) from None
    for sentence in sentences(read_json(out / "table.json")):
        print(sentence)
    print(f"Finished in {time.perf_counter() - started:.0f} s. Open {page.resolve()}")
    return 0
