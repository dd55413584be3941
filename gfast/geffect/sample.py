"""The sample engine: effects of samples without any weight gradient.

    e(D, s) = < G, grad log p(s) > = sum over modules and rows t of s of  b_t . (G a_t)        G = grad R(D)

A pass is a forward, the backward of the activations alone, and one product with each stored direction as the gradients
of outputs appear: for both sides a train step and one more forward unit. Memory: the directions, and the inputs of the
modules that own trainable parameters, which training keeps too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gfast.geffect.data import Term, to_device
from gfast.geffect.directions import Directions
from gfast.geffect.effects import SampleEffect
from gfast.geffect.measurement import Measurement
from gfast.geffect.modules import Lookup, Outer, Share, Sites, find_sites
from gfast.geffect.passes import Passes, Progress, term_label
from gfast.geffect.seeded import SeededPasses, check_weighted, frozen
from gfast.geffect.state import measuring
from gfast.model import shifted
from gfast.objectives import NLL, Objective
from gfast.ops.checks import IGNORE_INDEX
from gfast.ops.row_dot import dots_of_rows, row_sums

_Batch = Mapping[str, Any]
# By how much the samples' effects may miss those of the whole set, as a share of ||G||^2: rounding is far below, a
# module that was used where no hook sees it far above.
_GAP = 0.1


def pg_effect(
    model: nn.Module,
    *,
    forget: Any,
    retain: Any,
    groups: str | Callable[[str], str] = "paper",
    risk: Objective = NLL(),  # noqa: B008 - frozen
    direction_dtype: torch.dtype = torch.float32,
    direction_storage: str | os.PathLike[str] = "device",
    directions: Directions | None = None,
    loss_scale: float | None = None,
    progress: bool = False,
) -> SampleEffect:
    r"""The effect of each forget sample on the risk of forget and retain data, by layer group.

        e(D, s) = < grad R(D), grad log p(s; theta) >,    log p(s) = sum of the log-probs of its labelled tokens

    A step that lowers log p(s) by gradient descent on it changes R(D) by -lr * e(D, s) to first order: e on forget
    data is negative for samples whose removal removes others, and e on retain data not negative for those that can be
    removed without harm.

    Two passes with gradients give the directions grad R(D); then one pass over the forget set with parameters frozen
    gives all samples, all groups and both sides. The model is measured in evaluation mode, without gradient
    checkpointing, and left as found, also after an error.

    Args:
        model: a Hugging Face causal language model, possibly wrapped by PEFT, DDP or torch.compile. Its trainable
            parameters must belong to Linears (or GPT-2's Conv1D), embeddings and norms.
        forget, retain, groups, risk, direction_dtype, direction_storage, directions, progress: as for `g_effect`. With
            bfloat16 directions a bfloat16 model multiplies in bfloat16, with float32 ones in float32.
        loss_scale: as for `g_effect`, in the directions' passes and in that of the samples.

    Returns:
        SampleEffect: samples are the rows of the forget batches in order, or the texts of rows that hold several; one
        without labels has effect 0.

    Raises:
        ValueError: as `g_effect`; before any work for a trainable parameter whose module has no rule (experts of a
            mixture, fused parameters), naming both; later for a module that was not called, or called with rows that
            belong to no sample, for a parameter that is used anywhere else than in a call of its module, and for a
            gradient that is not finite, naming the parameter.

    Source: arXiv 2502.19301, Definition 1, for single samples.

    Example:
        >>> import torch
        >>> from gfast.geffect.sample import pg_effect
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> ids = torch.arange(12).view(2, 6)
        >>> batch = {"input_ids": ids, "labels": ids}
        >>> samples = pg_effect(LlamaForCausalLM(config), forget=batch, retain=batch)
        >>> samples.total("unlearn").shape
        torch.Size([2])
    """
    return sample_effects(
        Measurement.of(
            model,
            forget,
            retain,
            groups=groups,
            risk=risk,
            direction_dtype=direction_dtype,
            direction_storage=direction_storage,
            directions=directions,
            loss_scale=loss_scale,
            progress=progress,
        )
    )


def sample_effects(measurement: Measurement) -> SampleEffect:
    """`pg_effect` of a request that is checked."""
    measurement.look_at_texts()
    sites = find_sites(measurement.model, measurement.groups, "sample")
    batches = measurement.data.batches["forget"]
    with measurement.directions() as directions:
        found = _measure(measurement, directions, sites, [(batch, [None]) for batch in batches])
        dots, logp = torch.cat([values for (values,), _ in found]), torch.cat([logp for _, logp in found])
        _check_complete(dots, directions)
        norms, counts = directions.norms(), directions.counts
    sides = ({name: dots[:, g, side].clone() for g, name in enumerate(measurement.groups.names)} for side in (0, 1))
    valid = [batch["labels"][:, 1:].cpu() != IGNORE_INDEX for batch in batches]
    tokens = torch.cat([one.sum(1) for one in valid])
    ref = None
    if all(batch.get("ref_logp") is not None for batch in batches):
        parts = zip(batches, valid, strict=True)
        ref = torch.cat([(batch["ref_logp"][:, 1:].cpu().double() * one).sum(1) for batch, one in parts])
    return SampleEffect(*sides, tokens, norms, str(measurement.risk), counts, logp, ref)


def objective_dots(measurement: Measurement, directions: Directions, terms: Sequence[Term]) -> list[Tensor]:
    """< grad L, G > by group and side, fp64 [G, 2], of every term's data-set loss: the sum of its samples' parts.

    Terms on one set share the forward of each batch.

    Raises:
        ValueError: an objective without token weights, with the remedy.
    """
    for term in terms:
        check_weighted(term, "sample")
    sites = find_sites(measurement.model, measurement.groups, "sample")
    work = measurement.data.shared(terms)
    found = _measure(measurement, directions, sites, work)
    out = {term: torch.zeros(len(measurement.groups.names), 2, dtype=torch.float64, device="cpu") for term in terms}
    for (_, some), (dots, _) in zip(work, found, strict=True):
        for term, values in zip(some, dots, strict=True):
            out[term] += values.sum(0)
    return [out[term] / max(measurement.data.count(term), 1) for term in terms]


def share_dots(share: Share, direction: Tensor) -> Tensor:
    """Dot products of each row's share of a gradient with a direction shaped like the parameter, fp64 [n]."""
    if isinstance(share, Outer):
        return dots_of_rows(share.a, share.b, direction)
    if isinstance(share, Lookup):
        wide = torch.promote_types(torch.promote_types(share.b.dtype, direction.dtype), torch.float32)
        return row_sums(direction.index_select(0, share.ids).to(wide).mul_(share.b))
    wide = torch.promote_types(torch.promote_types(share.terms.dtype, direction.dtype), torch.float32)
    return row_sums(share.terms.to(wide) * direction.reshape(-1))


def _measure(
    measurement: Measurement,
    directions: Directions,
    sites: Sites,
    work: Iterable[tuple[_Batch, Sequence[Term | None]]],
) -> list[tuple[list[Tensor], Tensor]]:
    """Of each batch: dots [B, G, 2] of every row's gradient of each term (None: log p), and log p [B]; fp64 CPU."""
    model = measurement.model
    position = {name: index for index, name in enumerate(directions.names)}
    tables: list[Tensor] = []  # [P, 2, B] of each term on the batch at hand

    def consume(which: int, name: str, share: Share, place: Tensor | None) -> None:
        table = tables[which]
        for side in (0, 1):
            direction = directions.get(side, name)
            if direction is None:
                continue
            values = share_dots(share, direction)  # [n]
            if place is not None:  # not index_add: its order on a GPU is not fixed
                values = values.new_zeros(size).index_copy_(0, place, values)
            table[position[name], side] += values.view(table.shape[2], -1).sum(1)

    found = []
    with Progress(measurement.progress, "sample effects") as bar, measuring(model), frozen(model):
        passes = Passes(model, measurement.data, measurement.groups, bar, measurement.loss_scale)
        with SeededPasses(passes.module, sites, "sample", passes.loss_scale) as seeded:
            for batch, terms in work:
                batch = to_device(batch, passes.device)
                size = batch["labels"].numel()
                rows = batch["labels"].shape[0]
                shape = (len(position), 2, rows)
                tables = [torch.zeros(shape, dtype=torch.float64, device=passes.device) for _ in terms]
                if bool((shifted(batch["labels"]) != IGNORE_INDEX).any()):
                    seeds = [(t and t.objective, partial(consume, which)) for which, t in enumerate(terms)]
                    logp = seeded.run(batch, *seeds).double().sum(1)
                else:
                    logp = torch.zeros(rows, dtype=torch.float64, device="cpu")
                dots = [
                    passes.by_group(table.permute(2, 0, 1) / passes.loss_scale, term_label(term))
                    for table, term in zip(tables, terms, strict=True)
                ]
                found.append((dots, logp.cpu()))
                bar.update()
            seeded.finish()
    return found


def _check_complete(dots: Tensor, directions: Directions) -> None:
    """ValueError where the samples do not add up to the whole forget set: sum_s e(s) = -N ||G||^2 if R is the NLL."""
    if directions.risk != str(NLL()):
        return
    square = directions.gram[:, 0, 0]
    found = -dots[:, :, 0].sum(0) / max(directions.counts["unlearn"], 1)  # [G]
    # the second term: a group can have a gradient that is zero but for rounding, such as a bias of attention keys
    wrong = ((found - square).abs() > _GAP * square + 1e-3 * square.sum()).nonzero()
    if len(wrong):
        group = directions.groups.names[int(wrong[0])]
        raise ValueError(
            f"the samples do not add up to the forget set in the group {group!r}: {float(found[wrong[0]]):.4g} instead "
            f"of ||grad R||^2 = {float(square[wrong[0]]):.4g}. Either the directions are of other data, or the model "
            f"uses a trainable parameter outside the module that owns it: use token_effect(...).samples()"
        )
