"""One of several processes that train together over gloo on the CPU."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import IterableDataset, Subset

from gfast.data import batches
from gfast.files import write_json
from gfast.geffect import g_effect
from gfast.objectives import GA, NLL, WGA, Mix
from gfast.sides import SETS
from gfast.training.callback import GEffectCallback
from gfast.training.reference import ReferenceCache
from gfast.training.trainer import UnlearnTrainer
from gfast.training.trajectory import NLLCallback
from helpers.training_tiny import TOKENIZER, collator, config, copied, datasets, pairing, parameters, tiny_model


def join(rank: int, world: int, port: int) -> None:
    if world > 1:
        settings = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in settings.items()})
    torch.set_num_threads(1)


def train(folder: str, rank: int, world: int, port: int) -> None:
    join(rank, world, port)
    model = tiny_model()
    data, collate = pairing()
    forget, retain = datasets()
    reference = ReferenceCache.build(model, forget, collator())
    watch = NLLCallback(1, batches(forget, collator(), 4), batches(retain, collator(), 2))
    args = config(
        folder,
        objective="NPO",
        retain_term="nll",
        optim="sgd",
        per_device_train_batch_size=6 // world // 3,
        gradient_accumulation_steps=3,
        max_steps=4,
        stop="forget_nll>0 for 3",
        per_device_eval_batch_size=1,
        ddp_backend="gloo" if world > 1 else None,
    )
    items = [collate([data[row] for row in rows]) for rows in ((0, 1), (2, 3, 4))]  # dealt out by gfast
    measure = GEffectCallback(1, *([item[side] for item in items] for side in SETS), GA())
    trainer = UnlearnTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        references={"forget": reference},
        callbacks=[watch, measure],
    )
    trainer.train()
    metrics = trainer.evaluate()
    metrics = {name: torch.tensor(value) for name, value in metrics.items() if name.endswith("loss")}
    # Of a batch by itself, in no step: as many processes as there are have nothing to do with it.
    data.set_epoch(0)
    batch = trainer.data_collator([data[0], data[1]])
    for name, module in (("wrapped", trainer.model_wrapped), ("bare", model)):
        metrics[f"after/{name}"] = trainer.compute_loss(module, batch).detach()
    scored = tiny_model()
    options = dict(objective="GA", retain_term="nll", optim="sgd", weights="atwu:every=1,beta=0.1,lr=0.5", max_steps=2)
    options |= dict(per_device_train_batch_size=6 // world, ddp_backend="gloo" if world > 1 else None)
    again = UnlearnTrainer(scored, config(f"{folder}-atwu", **options), train_dataset=data, data_collator=collate)
    again.train()
    metrics |= {f"atwu/{name}": value for name, value in parameters(scored).items()}
    metrics["atwu/phi"] = again.token_weights.phi.detach()
    # Every process saves what it has: they must agree.
    save_file(parameters(model) | metrics, f"{folder}/process-{rank}.safetensors")


def one_job(folder: str, rank: int, world: int, port: int) -> None:
    """Train and save; then the checkpoint is damaged, then the folder is another process's: what each process says."""
    join(rank, world, port)
    data, collate = pairing()

    def trainer(where):
        args = config(
            where, max_steps=2, save_strategy="steps", save_steps=1, ddp_backend="gloo" if world > 1 else None
        )
        return UnlearnTrainer(tiny_model(), args, train_dataset=data, data_collator=collate)

    trainer(folder).train()
    path = Path(folder) / "checkpoint-2" / f"rng_state_{rank}.pth"
    path.write_bytes(path.read_bytes()[:-1])
    torch.distributed.barrier()
    said = []
    for where in (folder, Path(folder).parent / "held"):
        try:
            trainer(where).train(resume_from_checkpoint=True)
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    write_json(Path(folder) / f"process-{rank}.json", {"said": said})


def live(folder: str, rank: int, world: int, port: int) -> None:
    """The live effect of a step of two micro-batches a process, with risks of their own, by g_effect on its batches.
    Tokens may have weights in one process alone.
    """
    join(rank, world, port)
    start = tiny_model().double()
    for mix in (Mix(WGA(), gamma=0.5), Mix(WGA(), WGA(0.5)), Mix(GA(), NLL())):
        model, seen = copied(start), []

        class Seeing(UnlearnTrainer):
            def training_step(self, model, inputs, *args, **kwargs):
                seen.append(inputs)  # noqa: B023
                return super().training_step(model, inputs, *args, **kwargs)

        data, collate = pairing()
        weighed = isinstance(mix.forget, GA)

        def weighing(items, collate=collate, mine=weighed and rank == 1):
            batch = collate(items)
            for part in batch.values() if mine else ():
                part["weight"] = 0.5 * torch.ones_like(part["labels"])
            return batch

        args = config(folder, per_device_train_batch_size=1, gradient_accumulation_steps=2, geffect_live_unlearn=True,
                      ddp_backend="gloo", optim="sgd")  # fmt: skip
        trainer = Seeing(model, args, objective=mix, train_dataset=data, data_collator=weighing)
        trainer.train()
        every = [None] * world
        torch.distributed.all_gather_object(every, seen)
        firsts, lasts = [own[0]["retain"] for own in every], [own[-1]["forget"] for own in every]
        assert len({int((batch["labels"] != -100).sum()) for batch in firsts}) == world  # of unlike counts
        forgets = [batch["forget"] for own in every for batch in own]
        if weighed:
            forgets = [{"weight": torch.ones_like(batch["labels"]), **batch} for batch in forgets]
            firsts, lasts = ([{**batch, "weight": None} for batch in batches] for batches in (firsts, lasts))
        found = trainer.live.effect
        for side, rows in (("retain", firsts), ("unlearn", lasts)):
            truth = g_effect(start.eval(), mix.forget, forget=forgets, retain=rows)
            assert found.total(side) == pytest.approx(truth.total("retain"), rel=1e-6), (str(mix), side)
            assert found.risks[side] == pytest.approx(truth.risks["retain"], rel=1e-6), (str(mix), side)


KINDS = ("plain", "nested", "several rows an item")


def evaluation_data(kind: str, samples: int):
    """Data set and collator; an item of the last kind is a pack of one, two or three rows."""
    forget, _ = datasets()
    if kind == "plain":
        return Subset(forget, range(samples)), collator()
    if kind == "nested":
        data, collate = pairing()
        return Subset(data, range(samples)), collate
    plain = collator()
    packs = [[forget[(index + row) % len(forget)] for row in range(1 + index % 3)] for index in range(samples)]
    return packs, lambda items: plain(list(chain.from_iterable(items)))


def evaluate(folder: str, rank: int, world: int, port: int) -> None:
    """The metrics of every kind, number of samples and batch size, and how many forwards each took."""
    join(rank, world, port)
    model = tiny_model()
    forwards = []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    found = {}
    for kind in KINDS:
        for samples in (1, 3, 5):
            for batch_size in (1, 2, 4):
                data, collate = evaluation_data(kind, samples)
                args = config(folder, per_device_eval_batch_size=batch_size, ddp_backend="gloo" if world > 1 else None)
                trainer = UnlearnTrainer(model, args, eval_dataset=data, data_collator=collate)
                name = f"{kind}, {samples} by {batch_size}"
                for which, metrics in (("eval", trainer.evaluate()), ("test", trainer.predict(data).metrics)):
                    losses = {key: value for key, value in metrics.items() if key.endswith("loss")}
                    found |= {f"{name}: {which}: {key.removeprefix(which + '_')}": v for key, v in losses.items()}
                found[f"{name}: forwards"] = len(forwards)
                forwards.clear()
    if world > 1:

        class Stream(IterableDataset):
            def __iter__(self):
                return iter(data)

        try:
            trainer.evaluate(Stream())
        except ValueError as refusal:
            found["refused"] = float("Stream" in str(refusal) and "counts once" in str(refusal))
    save_file({key: torch.tensor(float(value)) for key, value in found.items()}, f"{folder}/process-{rank}.safetensors")


def evaluated(folder: str, rank: int, world: int, port: int) -> None:
    """Train with an EvaluateCallback; what every process has of it, and the log."""
    from gfast.evaluation import EvaluateCallback, sources

    join(rank, world, port)
    data, collate = pairing()
    args = config(folder, max_steps=2, per_device_train_batch_size=2 // world, optim="sgd",
                  ddp_backend="gloo" if world > 1 else None)  # fmt: skip
    sets = [replace(one, generate=3) for one in sources.bundled(5)]
    callback = EvaluateCallback(1, sets, TOKENIZER, batch_size=2)
    trainer = UnlearnTrainer(tiny_model(), args, train_dataset=data, data_collator=collate, callbacks=[callback])
    trainer.train()
    if rank == 0:  # alone, while the others are elsewhere
        callback.evaluation.run(trainer.model_wrapped)
        ReferenceCache.build(trainer.model_wrapped, datasets()[0], collator())
    write_json(Path(folder) / f"process-{rank}.json", {str(step): one for step, one in callback.summaries.items()})


def measure(model: str, folder: str, rank: int, world: int, port: int) -> None:
    """`gfast geffect` of objectives that process 0 writes, of every token, and into a folder of something else."""
    from gfast import cli

    join(rank, world, port)
    words = ["geffect", "--model", model, "--data", "bundled", "--max_forget", "5", "--max_retain", "4", "--device"]
    words += ["cpu", "--batch_size", "4", "--objectives", "WGA"]
    whole = [*words, "NPO", "PO", "BalDRO:beta=0.5", "--batch_size", "8", "--norms", "true"]
    assert cli.main([*whole, "--output_dir", f"{folder}/whole"]) == 0
    for per in ("sample", "token"):
        assert cli.main([*words, "--per", per, "--output_dir", f"{folder}/{per}"]) == 0
    assert cli.main([*whole, "--groups", "layer", "--output_dir", f"{folder}/whole"]) == 2
