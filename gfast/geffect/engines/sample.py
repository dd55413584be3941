"""The sample engine: effects of samples without any weight gradient.

    e(D, s) = < G, grad log p(s) > = sum over modules and rows t of s of  b_t . (G a_t)        G = grad R(D)

A pass is a forward, the backward of the activations alone, and one product with each stored direction as the gradients
of outputs appear: for both sides a train step and one more forward unit. Memory: the directions, and the inputs of the
modules that own trainable parameters, which training keeps too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gfast.geffect.backward import term_label
from gfast.geffect.contributions.layers import Contribution, OuterProduct, RowLookup, Sites, find_sites
from gfast.geffect.contributions.row_pass import RowPass, check_weighted
from gfast.geffect.data import Term, to_device
from gfast.geffect.directions import Directions
from gfast.geffect.request import Request
from gfast.geffect.results import SampleEffect
from gfast.model_output import shifted
from gfast.model_state import measuring
from gfast.objectives import NLL
from gfast.ops.checks import IGNORE_INDEX
from gfast.ops.row_dot import dots_of_rows, row_sums
from gfast.progress import Bar

_Batch = Mapping[str, Any]
# By how much the samples' effects may miss those of the whole set, as a share of ||G||^2: rounding is far below, a
# module that was used where no hook sees it far above.
_GAP = 0.1


def sample_effects(request: Request) -> SampleEffect:
    """`pg_effect` of a request that is checked."""
    request.refuse_weights("pg_effect")
    request.look_at_texts()
    sites = find_sites(request.model, request.groups, "sample")
    batches = request.data.batches["forget"]
    with request.directions() as directions:
        measured = _measure_batches(request, directions, sites, [(batch, [None]) for batch in batches])
        dots, logp = torch.cat([values for (values,), _ in measured]), torch.cat([logp for _, logp in measured])
        _check_complete(dots, directions)
        norms, counts = directions.norms(), directions.counts
    sides = ({name: dots[:, g, side].clone() for g, name in enumerate(request.groups.names)} for side in (0, 1))
    valid = [batch["labels"][:, 1:].cpu() != IGNORE_INDEX for batch in batches]
    tokens = torch.cat([labelled.sum(1) for labelled in valid])
    ref = None
    if all(batch.get("ref_logp") is not None for batch in batches):
        parts = zip(batches, valid, strict=True)
        ref = torch.cat([(batch["ref_logp"][:, 1:].cpu().double() * labelled).sum(1) for batch, labelled in parts])
    return SampleEffect(*sides, tokens, norms, str(request.risk), counts, logp, ref)


def objective_dots(request: Request, directions: Directions, terms: Sequence[Term]) -> list[Tensor]:
    """< grad L, G > by group and side, fp64 [G, 2], of every term's data-set loss: the sum of its samples' parts.

    Terms on one set share the forward of each batch.

    Raises:
        ValueError: an objective without token weights, with the remedy.
    """
    for term in terms:
        check_weighted(term, "sample")
    sites = find_sites(request.model, request.groups, "sample")
    work = request.data.shared(terms)
    measured = _measure_batches(request, directions, sites, work)
    out = {term: torch.zeros(len(request.groups.names), 2, dtype=torch.float64, device="cpu") for term in terms}
    for (_, batch_terms), (dots, _) in zip(work, measured, strict=True):
        for term, values in zip(batch_terms, dots, strict=True):
            out[term] += values.sum(0)
    return [out[term] / max(request.data.count(term), 1) for term in terms]


def contribution_dots(contribution: Contribution, direction: Tensor) -> Tensor:
    """Dot products of each row's contribution to a gradient with a direction shaped like the parameter, fp64 [n]."""
    if isinstance(contribution, OuterProduct):
        return dots_of_rows(contribution.a, contribution.b, direction)
    if isinstance(contribution, RowLookup):
        wide = torch.promote_types(torch.promote_types(contribution.b.dtype, direction.dtype), torch.float32)
        return row_sums(direction.index_select(0, contribution.ids).to(wide).mul_(contribution.b))
    wide = torch.promote_types(torch.promote_types(contribution.terms.dtype, direction.dtype), torch.float32)
    return row_sums(contribution.terms.to(wide) * direction.reshape(-1))


def _measure_batches(
    request: Request, directions: Directions, sites: Sites, work: Iterable[tuple[_Batch, Sequence[Term | None]]]
) -> list[tuple[list[Tensor], Tensor]]:
    """Of each batch: dots [B, G, 2] of every row's gradient of each term (None: log p), and log p [B]; fp64 CPU."""
    return request.processes.each(list(work), partial(_measure_own, request, directions, sites))


def _measure_own(
    request: Request, directions: Directions, sites: Sites, work: Iterable[tuple[_Batch, Sequence[Term | None]]]
) -> list[tuple[list[Tensor], Tensor]]:
    model = request.model
    position = {name: index for index, name in enumerate(directions.names)}
    tables: list[Tensor] = []  # [P, 2, B] of each term on the batch at hand

    def consume(which: int, name: str, contribution: Contribution, place: Tensor | None) -> None:
        table = tables[which]
        for side in (0, 1):
            direction = directions.get(side, name)
            if direction is None:
                continue
            direction = direction.to(passes.parameters[position[name]].device)  # of a model on several
            values = contribution_dots(contribution, direction)  # [n]
            if place is not None:  # not index_add: its order on a GPU is not fixed
                values = values.new_zeros(size).index_copy_(0, place, values)
            table[position[name], side] += values.view(table.shape[2], -1).sum(1).to(table.device)

    measured = []
    with Bar("sample effects", show=request.options.progress) as bar, measuring(model, checkpoints=False):
        passes = request.passes(bar)
        with RowPass(passes.module, sites, "sample", passes.loss_scale) as seeded:
            for batch, terms in work:
                host_batch, batch = batch, to_device(batch, passes.device)
                size = batch["labels"].numel()
                rows = batch["labels"].shape[0]
                shape = (len(position), 2, rows)
                tables = [torch.zeros(shape, dtype=torch.float64, device=passes.device) for _ in terms]
                if bool((shifted(batch["labels"]) != IGNORE_INDEX).any()):
                    seeds = [(term, partial(consume, which)) for which, term in enumerate(terms)]
                    logp = seeded.run(batch, *seeds)
                    request.data.answers.add(host_batch, logp, passes.parameters[0].dtype)
                    logp = logp.double().sum(1)
                else:
                    logp = torch.zeros(rows, dtype=torch.float64, device="cpu")
                dots = [
                    passes.by_group(table.permute(2, 0, 1) / passes.loss_scale, term_label(term), alone=True)
                    for table, term in zip(tables, terms, strict=True)
                ]
                request.data.answers.check()
                measured.append((dots, logp.cpu()))
                bar.update()
            seeded.finish()
    return measured


def _check_complete(dots: Tensor, directions: Directions) -> None:
    """ValueError where the samples do not add up to the whole forget set: sum_s e(s) = -N ||G||^2 if R is the NLL."""
    if directions.risk != str(NLL()):
        return
    square = directions.gram[:, 0, 0]
    sums = -dots[:, :, 0].sum(0) / max(directions.counts["unlearn"], 1)  # [G]
    # the second term: a group can have a gradient that is zero but for rounding, such as a bias of attention keys
    wrong = ((sums - square).abs() > _GAP * square + 1e-3 * square.sum()).nonzero()
    if len(wrong):
        group = directions.groups.names[int(wrong[0])]
        raise ValueError(
            f"gfast: the samples do not add up to the forget set in the group {group!r}: {float(sums[wrong[0]]):.4g} "
            f"instead of ||grad R||^2 = {float(square[wrong[0]]):.4g}. Either the directions are of other data, or the "
            f"model uses a trainable parameter outside the module that owns it: use token_effect(...).samples()"
        )
