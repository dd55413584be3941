"""Other projects that score samples by gradient dot products, where they are installed.

Both see the Linear layers only, no embedding and no norm; they are compared with plain autograd over the Linear layers
of the blocks, so that a tied head, of which they would see one use of two, takes no part.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from cases import Batch
from torch import Tensor, nn
from truth import Sides, linear_parameters, token_losses


def _samples(batch: Batch) -> list[Batch]:
    return [{key: value[row] for key, value in batch.items()} for row in range(batch["labels"].shape[0])]


@functools.lru_cache(maxsize=1)
def _wrapped_for_kronfluence(model: nn.Module) -> tuple[nn.Module, object]:
    # it replaces the model's layers, so it gets a copy; made once, as a user would, and not timed again
    from kronfluence.analyzer import prepare_model
    from kronfluence.task import Task

    class LogProb(Task):
        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            return token_losses(model, batch).sum()

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return token_losses(model, batch).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return sorted(name.removesuffix(".weight") for name in names)

        def get_attention_mask(self, batch: Batch) -> Tensor:
            return batch["attention_mask"]

    names = linear_parameters(model)
    task = LogProb()
    return prepare_model(copy.deepcopy(model), task), task


def kronfluence(model: nn.Module, forget: Batch, retain: Batch) -> Sides:
    """Pairwise scores with the identity in place of the curvature, the query gradients summed."""
    from kronfluence.analyzer import Analyzer
    from kronfluence.arguments import FactorArguments, ScoreArguments

    wrapped, task = _wrapped_for_kronfluence(model)
    rows, out = forget["labels"].shape[0], {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        analyzer = Analyzer(
            "bench", wrapped, task, cpu=forget["labels"].device.type == "cpu", disable_tqdm=True, output_dir=folder
        )
        analyzer.fit_all_factors(
            "identity", _samples(forget), factor_args=FactorArguments(strategy="identity"), per_device_batch_size=rows
        )
        for side, batch in (("unlearn", forget), ("retain", retain)):
            analyzer.compute_pairwise_scores(
                side,
                "identity",
                query_dataset=_samples(batch),
                train_dataset=_samples(forget),
                per_device_query_batch_size=batch["labels"].shape[0],
                per_device_train_batch_size=rows,
                score_args=ScoreArguments(aggregate_query_gradients=True),
            )
            scores = analyzer.load_pairwise_scores(side)["all_modules"]  # [1, S]: sums of NLL on both sides
            count = (batch["labels"][:, 1:] != -100).sum().cpu()
            out[side] = {"total": -scores[0].double() / count}
    return out


def bergson(model: nn.Module, forget: Batch, retain: Batch) -> Sides:
    """Risk gradients of the modules as queries, samples scored against them as they are collected."""
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector, PreprocessConfig, Scorer
    from bergson.score.score_writer import InMemorySequenceScoreWriter
    from datasets import Dataset as Table

    modules = {name.removesuffix(".weight").removeprefix("model.") for name in linear_parameters(model)}

    def table(batch: Batch) -> Table:
        kept = batch["attention_mask"].sum(1).tolist()
        ids, labels = (
            [row[:n].tolist() for row, n in zip(batch[key], kept, strict=True)] for key in ("input_ids", "labels")
        )
        return Table.from_dict({"input_ids": ids, "labels": labels, "length": kept})

    def collect(batch: Batch, scorer: object = None) -> InMemoryCollector:
        data = table(batch)
        with tempfile.TemporaryDirectory() as folder:
            config = IndexConfig(run_path=f"{folder}/run", projection_dim=0)
            Path(f"{folder}/run.part").mkdir()
            collector = InMemoryCollector(
                model=model.base_model,
                target_modules=modules,
                processor=GradientProcessor(projection_dim=None),
                data=data,
                cfg=config,
                scorer=scorer,
                preprocess_cfg=PreprocessConfig(),
            )
            computer = CollectorComputer(
                model=model, data=data, collector=collector, batches=[list(range(len(data)))], cfg=config
            )
            computer.run_with_collector_hooks(desc="bench")
        return collector

    with _quiet():
        queries = []
        for batch in (forget, retain):
            gradients = collect(batch).gradients
            count = (batch["labels"][:, 1:] != -100).sum().cpu()
            queries.append({name: -g.float().sum(0, keepdim=True) / count for name, g in gradients.items()})
        stacked = {name: torch.cat([query[name] for query in queries]) for name in queries[0]}  # [2, parameters]
        rows = forget["labels"].shape[0]
        writer = InMemorySequenceScoreWriter(rows, 2)
        scorer = Scorer(stacked, list(stacked), writer, model.device, torch.float32)
        collect(forget, scorer)
        scores = torch.as_tensor(writer.scores).double()  # [S, 2]
    return {"unlearn": {"total": scores[:, 0]}, "retain": {"total": scores[:, 1]}}


@contextlib.contextmanager
def _quiet():
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
