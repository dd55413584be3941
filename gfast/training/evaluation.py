# SPDX-License-Identifier: Apache-2.0
"""Evaluation that counts every sample once, over any number of processes and for any batch size."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from gfast import wrappers
from gfast.data import ForgetRetain
from gfast.model_output import model_logp
from gfast.model_state import evaluating
from gfast.objectives import NLL, UNWEIGHTED
from gfast.ops.weights import is_pair
from gfast.packed import first_of_pairs
from gfast.rotary import refuse_cut, stretches_beyond, unstretched
from gfast.training.batches import for_evaluation, to_device
from gfast.training.processes import shares_of

if TYPE_CHECKING:
    from gfast.geffect.results import GEffect

logger = logging.getLogger("gfast")


def own_batches(samples: int, batch_size: int, processes: int, rank: int) -> tuple[list[list[int]], int]:
    """The batches of one process, as indices, and how many of them count.

    The batches of the whole data set are dealt out in turn. Every process gets as many, so that collectives inside the
    model (FSDP, ZeRO-3) stay in step: a process with fewer of its own runs others' once more, which do not count.

    >>> own_batches(5, 2, 2, 0), own_batches(5, 2, 2, 1)
    (([[0, 1], [4]], 2), ([[2, 3], [0, 1]], 1))
    """
    batches = [list(range(start, min(start + batch_size, samples))) for start in range(0, samples, batch_size)]
    share = batches[rank::processes]
    rounds = -(-len(batches) // processes)
    return share + batches[: rounds - len(share)], len(share)


class OwnBatches(DataLoader):
    """The batches that one of several processes evaluates; the first `counted` of them count.

    Accelerate's own sharding would repeat samples at the end of the data set, and they would be counted twice.
    """

    def __init__(self, dataset: Any, collator: Callable[[list[Any]], Any], args: Any, shares: tuple[int, int]) -> None:
        """`shares`: how many there are, and this process's."""
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise ValueError(
                f"the evaluation data set is a {type(dataset).__name__}, which is read in order and not by index: "
                f"{args.world_size} processes cannot share it so that every sample counts once. Give one with indices "
                "and a length, such as list(dataset), or evaluate in one process"
            )
        samples, batch_size = len(dataset), args.eval_batch_size
        if args.dataloader_drop_last:
            samples -= samples % (batch_size * shares[0])
        indices, self.counted = own_batches(samples, batch_size, *shares)
        options = {
            name: getattr(args, f"dataloader_{name}")
            for name in ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
        }
        # New in transformers 5.
        for name in ("multiprocessing_context", "in_order"):
            if hasattr(args, f"dataloader_{name}"):
                options[name] = getattr(args, f"dataloader_{name}")
        super().__init__(dataset, batch_sampler=indices, collate_fn=collator, **options)


def _same_items(one: Any, other: Any) -> bool:
    """Whether two data sets are one, or the same pairs of the same."""
    if not (isinstance(one, ForgetRetain) and isinstance(other, ForgetRetain)):
        return one is other
    return one.forget is other.forget and one.retain is other.retain and one.partners() == other.partners()


class EvaluationNLL:
    """Exact token means over an evaluation data set, per side."""

    def __init__(self, counted: int | None = None) -> None:
        """`counted`: of this process only so many batches count, the first; None: all."""
        self._counted = counted
        self._batches = 0
        self._sums: dict[str, Tensor] = {}
        self._nested = False

    def add(self, sums: Mapping[str, Tensor], nested: bool) -> None:
        """`sums` of one batch: side -> [2], the sum of NLL and the number of tokens."""
        counts = self._counted is None or self._batches < self._counted
        self._batches += 1
        self._nested |= nested
        for side, value in sums.items():
            # A batch that does not count still names its sides, so that all processes sum the same ones. Not 0 * value:
            # that of an infinite NLL is no number.
            value = value if counts else torch.zeros_like(value)
            self._sums[side] = self._sums[side] + value if side in self._sums else value

    def metrics(self, accelerator: Any, prefix: str) -> dict[str, float]:
        """`<prefix>_loss`, and for nested batches `<prefix>_<side>_loss`, over all processes."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        packed = torch.stack([self._sums[name] for name in names])  # [sides, 2]
        if accelerator.num_processes > 1:
            packed = accelerator.reduce(packed, "sum")
        rows = {name: row for name, row in zip(names, packed.tolist(), strict=True)}
        total = [sum(column) for column in zip(*rows.values(), strict=True)]
        losses = {f"{prefix}_loss": total[0] / max(total[1], 1.0)}
        if self._nested:
            losses |= {f"{prefix}_{side}_loss": row[0] / max(row[1], 1.0) for side, row in rows.items()}
        return losses


class ExactEvaluation:
    """Over a Trainer: losses of an evaluation are exact means over the tokens of the data set, in one process or
    several.
    """

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """NLL of a plain or nested batch, token mean, of pairs that of the answers to forget; logits are never made, so
        predictions and labels are None. In the mixed precision of the Trainer's steps, as any Trainer's; what callbacks
        measure is the model as it is saved.
        """
        sides = self._sides(self._prepare_inputs(inputs))
        objective = self.objective.forget
        if "completion_mask" in inputs and not isinstance(objective, UNWEIGHTED) and is_pair(objective):  # TRL's
            sides = {"forget": first_of_pairs(sides["forget"])}
        sums = {}
        with torch.no_grad(), wrappers.autocast_of(self.accelerator):
            for side, batch in sides.items():
                self._say_cut(model, side, batch)
                logp = model_logp(model, batch)  # [B, T]
                tokens = (batch["labels"][..., 1:] != -100).sum()
                sums[side] = torch.stack([-logp.double().sum(), tokens.double()])
        if self._evaluation is not None:
            self._evaluation.add(sums, nested=len(sides) > 1)
        total = sum(sums.values())
        return (total[0] / total[1].clamp(min=1)).float(), None, None

    _evaluation: EvaluationNLL | None = None
    _said_cut = False

    def _say_cut(self, model: Any, side: str, batch: Mapping[str, Any]) -> None:
        """A warning, once, where this Trainer's batches decide what texts are given; what callbacks measure is refused
        then.
        """
        if not self._said_cut:
            try:
                refuse_cut(model, {side: [batch]}, afresh=True)
            except ValueError as error:
                self._said_cut = True
                logger.warning("%s. The loss of this evaluation is of its batches as they are", error)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Trainer's; in one of several processes the batches that are its own. Pairs of forget and retain items stay
        the same along a run.
        """
        if eval_dataset is None and self.eval_dataset is None:
            return super().get_eval_dataloader()  # which says so
        key = eval_dataset if isinstance(eval_dataset, str) else None
        dataset = self.eval_dataset[key] if key is not None else eval_dataset
        dataset = self._held(self.eval_dataset if dataset is None else dataset)
        # As Trainer does: workers that outlive an evaluation are started once a data set. It finds its own by a name,
        # which is one for whatever has none.
        loaders = self.__dict__.setdefault("_kept_loaders", {})
        if key in loaders and _same_items(loaders[key][0], dataset):
            return loaders[key][1]
        getattr(self, "_eval_dataloaders", {}).clear()
        if self.args.world_size == 1:
            with self._plain_collator():
                loader = super().get_eval_dataloader(dataset)
        else:
            loader = self._own_batches(dataset)
        if self.args.dataloader_persistent_workers:
            loaders[key] = dataset, loader
        return loader

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Trainer's; in one of several processes the batches that are its own."""
        test_dataset = self._held(test_dataset)
        if self.args.world_size == 1:
            with self._plain_collator():
                return super().get_test_dataloader(test_dataset)
        return self._own_batches(test_dataset)

    def _held(self, dataset: Any) -> Any:
        """Of forget and retain items, the pairs as they are now; of the data that is trained on those of its beginning.
        Trainings pair anew each epoch, and Accelerate's loaders count evaluations as epochs.
        """
        if not isinstance(dataset, ForgetRetain):
            return dataset
        return dataset.at_epoch(0 if dataset is self.train_dataset else dataset.epoch)

    def _own_batches(self, dataset: Any) -> OwnBatches:
        shares = shares_of(self.model, self.args)
        return OwnBatches(dataset, for_evaluation(self.data_collator), self.args, shares)

    @contextlib.contextmanager
    def _plain_collator(self) -> Iterator[None]:
        joined = self.data_collator
        self.data_collator = for_evaluation(joined)
        try:
            yield
        finally:
            self.data_collator = joined

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's loop, with losses that are exact means over the tokens of the data set, per side for nested
        batches.
        """
        self._evaluation = EvaluationNLL(getattr(dataloader, "counted", None))
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            exact = self._evaluation.metrics(self.accelerator, prefix)
            definer = next(cls for cls in type(self).__mro__ if "prediction_step" in vars(cls))
            if exact and definer is not ExactEvaluation:
                logger.warning(
                    "gfast: %s_loss is the NLL that super().prediction_step found, over the tokens of the data set, "
                    "and not the mean of what prediction_step of %s returns: what that adds goes into metrics of its "
                    "own, in an evaluate() that calls super().evaluate(...)",
                    prefix,
                    definer.__name__,
                )
            output.metrics.update(exact)
        finally:
            self._evaluation = None
        return output


def nll_of_sides(
    effects: Sequence[GEffect],
    model: nn.Module,
    forget: Iterable[Mapping[str, Any]],
    retain: Iterable[Mapping[str, Any]],
) -> dict[str, float]:
    """Mean NLL of both sets: as the effects' passes found it where NLL was their risk, else by forwards."""
    for effect in effects:
        if effect.risk == str(NLL()) and effect.risks:
            return dict(effect.risks)
    return {"unlearn": nll(model, forget), "retain": nll(model, retain)}


def nll(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Mean negative log-likelihood over all valid tokens of the batches, in eval mode."""
    if stretches_beyond(model) is not None:
        batches = list(batches)
        refuse_cut(model, {"measured": batches}, afresh=True)
    total, tokens = nll_sums(model, batches).tolist()
    return total / max(tokens, 1.0)


@torch.no_grad()
def nll_sums(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """[2], fp64: the sum of the negative log-likelihood over the valid tokens of the batches and their number, in eval
    mode.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(model):
        for batch in batches:
            batch = to_device(batch, device)
            with unstretched(model):
                logp = model_logp(model, batch)
            sums[0] -= logp.double().sum()
            sums[1] += (batch["labels"][..., 1:] != -100).sum()
    return sums
