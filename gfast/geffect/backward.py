"""Forward and backward passes over data whose gradients are handed on parameter by parameter and then dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gfast import sharded, wrappers
from gfast.errors import NotFinite
from gfast.geffect.answers import CHANGES
from gfast.geffect.contributions.coverage import repeatable
from gfast.geffect.data import Data, Term, to_device
from gfast.geffect.groups import GroupMap
from gfast.geffect.processes import Processes
from gfast.geffect.storage import sum_dtype
from gfast.model import model_loss, output_loss
from gfast.model_output import model_output
from gfast.objectives import UNWEIGHTED, Objective
from gfast.progress import Bar
from gfast.sides import SETS, SIDES

Job = tuple[tuple[float, Term], ...]  # a linear combination of terms measured in one pass
Consumer = Callable[[int, Tensor, int], None]  # (parameter's index, its gradient, position in the work)


class Backward(NamedTuple):
    """One forward and backward: factor * objective of batch number `index` of its source, over the global count. With
    factor 0 it only keeps this process in step with others.
    """

    factor: float
    term: Term
    count: int
    index: int
    batch: Mapping[str, Any]

    @property
    def needs_forward_alone(self) -> bool:
        """Whether the batch's forward is all that the objective needs of the model."""
        return not isinstance(self.term.objective, UNWEIGHTED)


class Passes:
    """Runs jobs over the data; a hook on every parameter takes its gradient as soon as it is accumulated.

    At most one parameter's gradient is alive beside what the consumers keep. Shared parameters come once, with the sum
    of their uses; under re-entrant checkpointing, which has a backward for each use, they come in parts in the first
    backward and as sums from then on. `values` has the value of every term that was run over all its data.

    Of several processes (`gfast.geffect.processes`) each has its share of the work; where FSDP2 shards the model, what
    it gives of a gradient is this process's shard of the sum over the batches that run at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        groups: GroupMap,
        progress: Bar,
        loss_scale: float | None = None,
        processes: Processes = Processes(),  # noqa: B008 - frozen
    ) -> None:
        self.model, self.data, self.progress, self.processes = model, data, progress, processes
        self.module = wrappers.measured(model)  # what runs
        parameters = dict(model.named_parameters())
        self.names = list(groups.index)
        self.parameters = [parameters[name] for name in self.names]
        self.group_of = torch.tensor([groups.index[name] for name in self.names], device="cpu")  # [P]
        self.num_groups = len(groups.names)
        self.device = self.parameters[0].device
        self.loss_scale = default_loss_scale(self.parameters) if loss_scale is None else float(loss_scale)
        self.values: dict[Term, float] = {}
        self._terms: dict[Term, None] = {}  # all that were ever to be run, in an order that is every process's
        self._in_parts: set[int] = set()  # parameters whose gradient has come in parts

    def risks(self, risk: Objective) -> dict[str, float]:
        """The risk on each side whose gradient was measured."""
        terms = {side: Term(risk, source) for side, source in zip(SIDES, SETS, strict=True)}
        return {side: self.values[term] for side, term in terms.items() if term in self.values}

    def batches(self, job: Job) -> int:
        """The number of forward and backwards that the job takes; of those that run at a time in several processes, if
        what they leave is one gradient.
        """
        count = sum(len(self.data.counted(term)) for _, term in job)
        return -(-count // self.processes.size) if self.processes.sharded else count

    def work(self, job: Job) -> list[Backward]:
        """Every forward and backward of a job that is this process's."""
        self._terms |= {term: None for _, term in job}
        every = [
            Backward(factor, term, self.data.count(term), index, batch)
            for factor, term in job
            for index, batch in self.data.counted(term)
        ]
        share = every[self.processes.rank :: self.processes.size]
        if not self.processes.sharded:
            return share
        return share + [item._replace(factor=0.0) for item in self.processes.rounds(every)[len(share) :]]

    def of_all(self, job: Job, table: Tensor) -> Tensor:
        """A table [work, ...] of a job's work in this process as [batches, ...], which their sum completes."""
        if not self.processes.replicated:
            return table
        every = table.new_zeros(max(self.batches(job), 1), *table.shape[1:])
        share = every[self.processes.rank :: self.processes.size]
        share += table[: len(share)]
        return every

    def shares(self, term: Term) -> list[int]:
        """What each of `batches` contributes to the term's count."""
        shares, at_a_time = self.data.shares(term), self.processes.size if self.processes.sharded else 1
        return [sum(shares[start : start + at_a_time]) for start in range(0, len(shares), at_a_time)]

    def backward(self, work: list[Backward], consume: Consumer, done: Callable[[], None] | None = None) -> None:
        """Run all work; each parameter's gradient goes to `consume`, and `done` is called after each batch.

        Objectives that follow each other on one batch share its forward, and its activations are held until the last:
        as long as both have token weights and the graph is PyTorch's own. Not where FSDP2 shards the model, whose
        weights go and come by one forward and one backward.
        """
        if self.processes.replicated:
            losses = self.processes.together(lambda: self._run(work, consume, done))
        else:
            losses = self._run(work, consume, done)
        # looked at once a pass: a look at every batch would wait for the device each time
        values = torch.stack(losses).tolist() if losses else []
        by_term: dict[Term, dict[int, float]] = {}
        for item, value in zip(work, values, strict=True):
            if item.factor or self.processes.size == 1:
                by_term.setdefault(item.term, {})[item.index] = value  # a term of two jobs comes twice
        each = [[sum(by_term[t].values()), 1.0] if t in by_term else [0.0, 0.0] for t in self._terms]
        each.append([float(self.data.answers.apart()), 0.0])
        sums = self.processes.sum(torch.tensor(each, dtype=torch.float64, device=self.device)).tolist()
        differs, _ = sums.pop()
        for term, (total, ran) in zip(self._terms, sums, strict=True):
            if not math.isfinite(total):
                bad = [index for index, value in by_term.get(term, {}).items() if not math.isfinite(value)]
                where = f"{by_term[term][bad[0]]} on batch {bad[0]}" if bad else "not finite in another process on some"
                raise NotFinite(
                    f"gfast: {term.objective} is {where} of the {term.source} data, so there is no gradient: check the "
                    f"model's weights and, in float16, its range"
                )
            if ran:
                self.values[term] = total
        if differs:
            raise ValueError(CHANGES)

    def _run(self, work: list[Backward], consume: Consumer, done: Callable[[], None] | None) -> list[Tensor]:
        """The losses."""
        position, losses, output = 0, [], None
        came: set[int] = set()  # in this backward
        in_parts = set(self._in_parts)
        sharded_over = self.processes.size if self.processes.sharded else 1
        stream = torch.cuda.current_stream(self.device) if sharded_over > 1 and self.device.type == "cuda" else None
        held: dict[int, Tensor] = {}  # gradients that are known to come in parts, until the backward is through

        def hook(index: int) -> Callable[[Tensor], None]:
            def take(parameter: Tensor) -> None:
                if parameter.grad is None:  # what is between it and the loss has no gradient to give (rounding)
                    return
                if stream is None:
                    taken(parameter)
                else:  # FSDP2 reduces on a stream of its own
                    stream.wait_stream(torch.cuda.current_stream(self.device))
                    sharded.local(parameter.grad).record_stream(stream)
                    with torch.cuda.stream(stream):
                        taken(parameter)

            def taken(parameter: Tensor) -> None:
                grad, parameter.grad = sharded.local(parameter.grad), None
                grad = grad.to_dense() if grad.layout != torch.strided else grad
                if self.loss_scale != 1.0:  # divided out in fp32: in fp16 it would underflow after all
                    grad = grad.to(sum_dtype(grad)) / self.loss_scale
                if index in came:
                    self._in_parts.add(index)
                came.add(index)
                if index in held:
                    held[index] = held[index].to(sum_dtype(grad)).add_(grad)
                elif index in in_parts:
                    held[index] = grad
                else:
                    consume(index, grad, position)

            return take

        handles = [p.register_post_accumulate_grad_hook(hook(index)) for index, p in enumerate(self.parameters)]
        try:
            for position, item in enumerate(work):  # noqa: B007 - read by the hooks
                batch = to_device(item.batch, self.device)
                again = sharded_over == 1 and _share_forward(work[position : position + 2])
                if again or output is not None:
                    output = output or model_output(self.module, batch)
                    again = again and repeatable(output.value)
                    out = output_loss(output, item.term.own(batch), item.term.objective, normalizer=item.count)
                else:
                    objective, options = item.term.objective, dict(normalizer=item.count, reference=self.data.reference)
                    out = model_loss(self.module, item.term.own(batch), objective, **options)
                self.data.answers.add(item.batch, out.logp, self.parameters[0].dtype)
                loss = out.loss
                losses.append(loss.detach())
                if loss.requires_grad:  # a hidden-state objective below every trainable parameter has gradient zero
                    factor = item.factor * self.loss_scale * sharded_over  # FSDP2 takes the mean over processes
                    with torch.autocast(self.device.type, enabled=False):
                        (loss if factor == 1.0 else factor * loss).backward(retain_graph=again)
                for index, grad in held.items():
                    consume(index, grad, position)
                held.clear()
                came.clear()
                in_parts = set(self._in_parts)
                output = output if again else None
                del loss, out
                if done is not None:
                    done()
                self.progress.update()
        finally:
            for handle in handles:
                handle.remove()
        return losses

    def table(self, rows: list[Tensor | None], columns: int) -> Tensor:
        """Rows [columns] of all parameters as one tensor [P, columns] on the device; a missing row is zero."""
        zero = torch.zeros(columns, dtype=torch.float64, device=self.device)
        return torch.stack([zero if row is None else row.to(self.device) for row in rows])

    def by_group(self, table: Tensor, label: str, alone: bool = False) -> Tensor:
        """Group sums on the CPU of a table [..., P, columns], in the parameters' order whatever order hooks ran in;
        summed over the processes, or `alone` this one's.

        Raises:
            NotFinite: a gradient that is not, naming the first parameter.
        """
        table = (table if alone else self.processes.dots(table)).cpu()
        bad = (~torch.isfinite(table)).any(-1)  # [..., P]
        bad = bad.reshape(-1, bad.shape[-1]).any(0).nonzero()
        if len(bad):
            scale = "" if self.loss_scale == 1.0 else f" (with a loss scale of {self.loss_scale:g}: try loss_scale=1.0)"
            raise NotFinite(
                f"gfast: the gradient of {label} is not finite in {len(bad)} of {table.shape[-2]} parameters, first in "
                f"{self.names[int(bad[0])]!r}: check the model's weights and, in float16, its range{scale}"
            )
        out = torch.zeros(*table.shape[:-2], self.num_groups, table.shape[-1], dtype=torch.float64, device="cpu")
        return out.index_add_(-2, self.group_of, table)


def _share_forward(pair: list[Backward]) -> bool:
    """Whether the second of two has the first one's batch, and both objectives need its forward alone."""
    if len(pair) < 2 or pair[0].batch is not pair[1].batch:
        return False
    return all(item.needs_forward_alone for item in pair)


def default_loss_scale(parameters: list[nn.Parameter]) -> float:
    """1, or 1024 where fp16 is at work, whose smallest number is 6e-8: small gradients would become zero."""
    device = parameters[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return 1024.0 if autocast or any(p.dtype == torch.float16 for p in parameters) else 1.0


def job_label(job: Job) -> str:
    """The job in words, for messages."""
    return " + ".join(f"{term.objective} on the {term.source} data" for _, term in job)


def term_label(term: Term | None) -> str:
    """The same of one term; None: the log-probs themselves."""
    return "log p" if term is None else job_label(((1.0, term),))
