# SPDX-License-Identifier: Apache-2.0
"""Losses of all answers of a question in one scoring pass: the prompt once, and no logits of the vocabulary in memory.

What the answers of a question have in common runs once and stays as a key-value cache, as in generation; each answer
then runs against a copy of it. A model whose cache does not allow that, or with which it gives other numbers, is asked
each answer in full.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfast import hf
from gfast.data.encode import IGNORE
from gfast.evaluation.samples import Sample, first_label
from gfast.model_output import ModelOutput, model_output, output_logp, shifted
from gfast.rotary import stretches_beyond, unstretched
from gfast.wrappers import unwrap

logger = logging.getLogger("gfast")

# Tokens, padding included, that run at a time: enough rows for fast matrix products, and few hidden states in memory.
PASS_TOKENS = 2048
# Rows of logits that exist at a time to tell which token comes first.
_ARGMAX_ROWS = 256


class Scored(NamedTuple):
    """Of an answer's N labelled tokens: logp [N], fp32 (fp64 of fp64 models), and for the right answer whether each is
    the argmax [N].
    """

    logp: Tensor
    correct: Tensor | None


class _Job(NamedTuple):
    sample: int
    answer: int
    ids: tuple[int, ...]  # from `start` on
    labels: tuple[int, ...]
    start: int  # tokens that are in the cache already


def score(model: nn.Module, samples: Sequence[Sample], pad_id: int, shared: bool = True) -> list[list[Scored]]:
    """`Scored` of every answer of every sample, in their order.

    Args:
        model: a causal language model in eval mode.
        samples: of one batch; their common prompts run together, but for models and lengths at which texts of one batch
            change each other's numbers (`reach`).
        pad_id: any token; what is padded is masked out.
        shared: run what a sample's answers have in common once.
    """
    scores: list[list[Any]] = [[None] * len(sample.answers) for sample in samples]
    answers = [(first_label(labels), len(ids)) for sample in samples for ids, labels in sample.answers]
    # Behind the longest prompt the longest answer, padding included.
    apart = max(start for start, _ in answers) + max(end - start for start, end in answers) + 1 > reach(model)
    with torch.no_grad(), unstretched(model):
        starts = [common(sample) if shared and not apart else 0 for sample in samples]
        alone = [at for at, start in enumerate(starts) if start < 1]
        together = [at for at, start in enumerate(starts) if start >= 1]
        cache = _prompts(model, [samples[at].answers[0][0][: starts[at]] for at in together], pad_id)
        width = max((starts[at] for at in together), default=0)
        for group, held in ((together, cache), (alone, None)):
            place = {at: number for number, at in enumerate(group)}
            for jobs in _passes([job for at in group for job in _jobs(at, samples[at], starts[at])], apart):
                batch = _batch(model, jobs, pad_id, width if held is not None else 0)
                if held is not None:
                    batch |= _behind(model, held, [place[job.sample] for job in jobs])
                with unstretched(model):
                    for job, scored in zip(jobs, _scored(model, batch, jobs, samples), strict=True):
                        scores[job.sample][job.answer] = scored
    return scores


def can_share(model: nn.Module, samples: Sequence[Sample], pad_id: int) -> bool:
    """Whether running prompts once gives this model's own losses of `samples`, up to rounding."""
    plain = score(model, samples, pad_id, shared=False)
    try:
        shared = score(model, samples, pad_id)
    except Exception as error:  # caches are of many kinds, and fail in as many ways
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        rounding = 3e-2 if next(model.parameters()).dtype.itemsize == 2 else 1e-4
        pairs = [(a.logp, b.logp) for one, other in zip(plain, shared, strict=True)
                 for a, b in zip(one, other, strict=True)]  # fmt: skip
        # The tensors' maximum is NaN where one of them is, and Python's may not be.
        apart = float(torch.cat([(a - b).abs() for a, b in pairs]).max())
        size = float(torch.cat([a.abs() for a, _ in pairs]).max())
        if apart <= rounding * max(size, 1.0):
            return True
        reason = f"log-probabilities differ by up to {apart:.3g}"
    logger.info(
        "prompts are run with every answer: a cache of them does not serve %s (%s)", type(model).__name__, reason
    )
    return False


def common(sample: Sample) -> int:
    """How many leading tokens all answers have in common. The token before the first label is left out: it scores."""
    if len(sample.answers) < 2:
        return 0
    length = min(first_label(labels) for _, labels in sample.answers) - 1
    first = sample.answers[0][0]
    for ids, _ in sample.answers[1:]:
        length = next((at for at in range(length) if ids[at] != first[at]), length)
    return length


def _jobs(at: int, sample: Sample, start: int) -> Iterator[_Job]:
    for number, (ids, labels) in enumerate(sample.answers):
        yield _Job(at, number, ids[start:], labels[start:], start)


def reach(model: nn.Module) -> float:
    """Up to how many positions what a text is given does not depend on what is beside it in a batch."""
    beyond = stretches_beyond(unwrap(model))
    return beyond if beyond is not None else 0 if hf.depends_on_width(model) else math.inf


def _passes(jobs: list[_Job], apart: bool) -> Iterator[list[_Job]]:
    """Jobs of like length, so that little is padding, and few enough for one pass; apart: each by itself."""
    jobs = sorted(jobs, key=lambda job: (-len(job.ids), job.sample, job.answer))
    while jobs:
        count = 1 if apart else max(1, PASS_TOKENS // len(jobs[0].ids))
        yield jobs[:count]
        jobs = jobs[count:]


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, width], with the padding in front."""
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _prompts(model: nn.Module, prompts: list[tuple[int, ...]], pad_id: int) -> Any:
    """The key-value cache of prompts, padded on the left; None where there are none."""
    if not prompts:
        return None
    from transformers import DynamicCache

    cache, width = DynamicCache(), max(map(len, prompts))
    ids, mask = left_padded(prompts, pad_id, width, next(model.parameters()).device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {hf.cache_argument(model): cache, "use_cache": True}
    model_output(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **given})
    if cache.get_seq_length() != width:
        raise RuntimeError(f"the cache holds {cache.get_seq_length()} of {width} tokens")
    return cache


def _behind(model: nn.Module, cache: Any, places: list[int]) -> dict[str, Any]:
    """What a batch needs to run behind prompts: a copy of the cache with the prompt of each of its rows."""
    copied = copy.deepcopy(cache)
    copied.batch_select_indices(torch.tensor(places, device=next(model.parameters()).device))
    return {hf.cache_argument(model): copied, "use_cache": True}


def _batch(model: nn.Module, jobs: list[_Job], pad_id: int, width: int) -> dict[str, Any]:
    """Jobs padded on the right, behind `width` tokens of a cache that is padded on the left."""
    device = next(model.parameters()).device
    longest = max(len(job.ids) for job in jobs)

    def rows(values: list[list[int]]) -> Tensor:
        return torch.tensor(values, device=device)

    gaps = [longest - len(job.ids) for job in jobs]
    ids = rows([[*job.ids, *[pad_id] * gap] for job, gap in zip(jobs, gaps, strict=True)])  # [J, A]
    labels = rows([[*job.labels, *[IGNORE] * gap] for job, gap in zip(jobs, gaps, strict=True)])
    mask = [[1] * len(job.ids) + [0] * gap for job, gap in zip(jobs, gaps, strict=True)]
    if not width:
        return {"input_ids": ids, "attention_mask": rows(mask), "labels": labels}
    mask = [[0] * (width - job.start) + [1] * job.start + row for job, row in zip(jobs, mask, strict=True)]
    starts = rows([[job.start] for job in jobs])
    positions = starts + torch.arange(longest, device=device)  # [J, A]
    return {"input_ids": ids, "attention_mask": rows(mask), "position_ids": positions, "labels": labels}


def _scored(
    model: nn.Module, batch: Mapping[str, Any], jobs: list[_Job], samples: Sequence[Sample]
) -> Iterator[Scored]:
    output = model_output(model, batch)
    labels = shifted(batch["labels"])  # [J, A], at the positions that score them
    logp = output_logp(output, labels)
    valid = labels != IGNORE
    for row, job in enumerate(jobs):
        at = valid[row].nonzero().squeeze(1)
        correct = None
        if job.answer == samples[job.sample].fields["gt"][0]:
            correct = _argmax(output, row, at) == labels[row, at]
        yield Scored(logp[row, at].cpu(), None if correct is None else correct.cpu())


def _argmax(output: ModelOutput, row: int, at: Tensor) -> Tensor:
    """The most likely token at some positions of a row. A scale or soft cap of the logits changes no order."""
    values = output.value[row, at]
    if output.head is None:
        return values.argmax(-1)
    head = output.head
    return head.over(
        values,
        lambda rows: torch.cat([F.linear(x, head.weight, head.bias).argmax(-1) for x in rows.split(_ARGMAX_ROWS)]),
    )
