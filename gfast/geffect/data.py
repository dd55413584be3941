"""The data of a request: batches by the set they come from, checked before any work, and global counts."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gfast import packed
from gfast.geffect.answers import Answers
from gfast.hf import OWN_KEYS
from gfast.model import check_weighs
from gfast.objectives import GA, NLL, RMU, RR, Mix, Objective
from gfast.ops.checks import IGNORE_INDEX, check_weight
from gfast.ops.weights import check_given
from gfast.sides import SETS

_REFERENCE_KEYS = frozenset({"ref_logp", "ref_layer_hidden"})
_REFERENCE_KEYS_WITHOUT_ADAPTERS = _REFERENCE_KEYS | {"ref_hidden", "ref_head"}
OWN_DATA = frozenset({"preferred", "refusal"})
# Tensors of a batch with a value a position, and without.
BY_POSITION = frozenset(
    "input_ids inputs_embeds labels attention_mask position_ids token_type_ids mm_token_type_ids "
    "weight ref_logp ref_hidden ref_layer_hidden".split()
)
NOT_BY_POSITION = frozenset(
    "sample_id ref_head ref_head_bias ref_head_form ref_layer ref_precision pixel_values image_grid_thw".split()
)


@dataclass(frozen=True)
class Term:
    """One objective on one set: `source` is "forget", "retain" or "objective" (data that only the objective has).

    weighted: its token weights are multiplied by the batches' `weight`. A risk's never are.
    """

    objective: Objective
    source: str
    weighted: bool = False

    def own(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the term sees of a batch."""
        return batch if self.weighted or "weight" not in batch else {**batch, "weight": None}


def terms(objective: Objective, weighted: Collection[str] = ()) -> list[tuple[float, Term]]:
    """The objective as a linear combination of terms; factors of 0 are left out. weighted: sources whose batches have
    a `weight`; ValueError for an objective on them that has no token weights."""

    def term(objective: Objective, source: str) -> Term:
        if source in weighted:
            check_weighs(objective, "g_effect")
        return Term(objective, source, source in weighted)

    if not isinstance(objective, Mix):
        return [(1.0, term(objective, _source(objective)))]
    parts = [(float(objective.gamma), objective.forget, _source(objective.forget))]
    if objective.retain is not None:
        parts.append((float(objective.alpha), objective.retain, "retain"))
    return [(factor, term(each, source)) for factor, each, source in parts if factor != 0.0]


def risk_terms(risk: Objective) -> list[Term]:
    """The risk on both sets. Raises ValueError for a Mix and for objectives with data of their own."""
    if not isinstance(risk, Objective) or isinstance(risk, Mix) or risk.needs & (OWN_DATA | {"weight"}):
        raise ValueError(
            f"gfast: risk must be one objective that is evaluated on forget and on retain data, not {risk!r}"
        )
    return [Term(risk, "forget"), Term(risk, "retain")]


def identity_factor(term: Term, risk: Objective) -> float | None:
    """c when the gradient of the term is c times that of the risk on the same set, by construction; else None."""
    if term.source not in SETS or term.weighted or term.objective.default_reduction != risk.default_reduction:
        return None
    if term.objective == risk:
        return 1.0
    return -1.0 if {type(term.objective), type(risk)} == {GA, NLL} else None


def _source(objective: Objective) -> str:
    return "objective" if objective.needs & OWN_DATA else "forget"


def as_batches(batches: Any, name: str) -> list[Mapping[str, Any]]:
    """A list of batches from a batch, a list, a DataLoader or a generator. Raises ValueError for what is not one."""
    listed = [batches] if isinstance(batches, Mapping) else list(batches if batches is not None else ())
    if not listed:
        raise ValueError(f"gfast: {name}= holds no batch: a gradient effect needs at least one")
    for index, batch in enumerate(listed):
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"gfast: {name}: batch {index} is a {type(batch).__name__}, not a dict with input_ids and labels"
            )
        tokens = "inputs_embeds" if batch.get("input_ids") is None and "inputs_embeds" in batch else "input_ids"
        for key, dims in ((tokens, 3 if tokens == "inputs_embeds" else 2), ("labels", 2)):
            if not isinstance(batch.get(key), Tensor) or batch[key].dim() != dims:
                raise ValueError(
                    f"gfast: {name}: batch {index} has no {key!r} of shape [B, T]; its keys are {list(batch)}"
                )
        if batch["labels"].shape != batch[tokens].shape[:2]:
            raise ValueError(
                f"gfast: {name}: batch {index} has labels {tuple(batch['labels'].shape)} but {tokens} "
                f"{tuple(batch[tokens].shape[:2])}; labels are aligned with {tokens} and shifted by gfast"
            )
        if batch.get("weight") is not None:
            check_weight(f"{name}: batch {index}", batch["weight"], batch["labels"])
    with_weight = [batch.get("weight") is not None for batch in listed]
    if any(with_weight) and not all(with_weight):
        raise ValueError(
            f"gfast: {name}: batch {with_weight.index(False)} has no 'weight', and others have one: give all or none"
        )
    return listed


def trimmed(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch without the columns on the right in which no row has a token that is attended to, or a label.

    In a causal model they change nothing before them, and have no loss: padding to a fixed width would only cost time.
    The batch itself where there are none, where no attention_mask [B, T] says what padding is, or with a tensor of
    which it is not known whether its columns are those of the tokens.
    """
    labels, mask, position = batch["labels"], batch.get("attention_mask"), batch.get("position_ids")
    rows, width = labels.shape
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return batch
    if isinstance(position, Tensor) and position.shape not in ((rows, width), (1, width)):
        return batch
    if any(isinstance(x, Tensor) and key not in BY_POSITION | NOT_BY_POSITION for key, x in batch.items()):
        return batch
    needed = ((mask.to(labels.device) != 0) | (labels != IGNORE_INDEX)).any(0).nonzero()  # [columns, 1]
    used = int(needed.max()) + 1 if len(needed) else width
    if used == width:
        return batch
    short = {key: batch[key][:, :used] for key in BY_POSITION if isinstance(batch.get(key), Tensor)}
    return {**batch, **short}


class Data:
    """The batches of a measurement by source, with the global counts that losses are divided by.

    adapters: the model has adapters that can be switched off, which gives the original's hidden states.
    reference: what the original then is, see `gfast.model_loss`.
    fixed_width: what the model computes depends on the width of a batch; else padding that no row needs is cut off.
    """

    def __init__(
        self,
        forget: Any,
        retain: Any,
        objective_batches: Any,
        used: Iterable[Term],
        adapters: bool = False,
        fixed_width: bool = False,
        reference: str = "auto",
    ) -> None:
        used = list(used)
        self.reference, self.answers = reference, Answers()
        self._known_counts: dict[Term, list[int]] = {}
        self.batches = {"forget": as_batches(forget, "forget"), "retain": as_batches(retain, "retain")}
        if objective_batches is not None:
            self.batches["objective"] = as_batches(objective_batches, "objective_batches")
        sources = self.batches.items()
        self.weighted = frozenset(source for source, batches in sources if batches[0].get("weight") is not None)
        self._check(used, _REFERENCE_KEYS if adapters else _REFERENCE_KEYS_WITHOUT_ADAPTERS)
        if not fixed_width:
            self.batches = {source: [trimmed(batch) for batch in batches] for source, batches in self.batches.items()}

    def count(self, term: Term) -> int:
        """The global count that the term's reduction divides by."""
        return sum(self._counts(term))

    def counted(self, term: Term) -> list[tuple[int, Mapping[str, Any]]]:
        """The batches that have something to count, with their indices."""
        batches = self.batches[term.source]
        return [(index, batches[index]) for index, count in enumerate(self._counts(term)) if count]

    def shared(self, terms: Iterable[Term]) -> list[tuple[Mapping[str, Any], list[Term]]]:
        """Every batch that has something to count for one of the terms, with those it has: their forward is one."""
        by_batch: dict[tuple[str, int], list[Term]] = {}
        for term in terms:
            for index, _ in self.counted(term):
                by_batch.setdefault((term.source, index), []).append(term)
        return [(self.batches[source][index], by_batch[source, index]) for source, index in sorted(by_batch)]

    def shares(self, term: Term) -> list[int]:
        """What each batch of `counted` contributes to the count."""
        return [count for count in self._counts(term) if count]

    def tokens(self, term: Term) -> int:
        """Labelled tokens that are predicted, over all batches of the term."""
        return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in self.batches[term.source])

    def fingerprints(self) -> dict[str, str]:
        """Of the forget and of the retain data: the same however their rows are ordered, batched or padded."""
        return {source: _fingerprint(self.batches[source]) for source in SETS}

    def _counts(self, term: Term) -> list[int]:
        if term not in self._known_counts:
            # hidden-state objectives average over the labelled positions themselves, the others over the positions
            # that predict them
            start = 0 if isinstance(term.objective, (RMU, RR)) else 1
            self._known_counts[term] = [
                packed.count(term.objective, batch, start) for batch in self.batches[term.source]
            ]
        return self._known_counts[term]

    def _check(self, used: list[Term], reference_keys: frozenset[str]) -> None:
        needs = {need: term for term in used for need in term.objective.needs & OWN_DATA}
        if needs and "objective" not in self.batches:
            need, term = next(iter(needs.items()))
            data = "pairs (rejected rows, then preferred rows)" if need == "preferred" else "forget questions refused"
            raise ValueError(f"gfast: {term.objective} has data of its own ({data}): pass it as objective_batches=")
        if not needs and "objective" in self.batches:
            raise ValueError(
                "gfast: objective_batches are for objectives with data of their own (DPO, PO), and there is none: the "
                "others are measured on forget=; leave objective_batches out, or give them as forget="
            )
        if len(needs) > 1:
            raise ValueError("gfast: DPO and PO take different objective_batches: measure them in two calls")
        for source in SETS:
            for batch in self.batches[source]:
                packed.check_pairs(batch, f"an effect on {source}=")
        for term in used:
            for index, batch in enumerate(self.batches[term.source]):
                if term.objective.needs & {"weight"} or term.objective.weight_range is not None:
                    name = f"{term.source}: batch {index}"
                    check_given(name, term.objective, batch.get("weight"), batch["labels"])
            for key in sorted(term.objective.needs & reference_keys):
                for index, batch in enumerate(self.batches[term.source]):
                    if batch.get(key) is None:
                        raise ValueError(
                            f"gfast: {term.objective} needs the original model's {key!r}, and batch {index} of the "
                            f"{term.source} data has none; add it with a ReferenceCache and the collator that joins it"
                        )


def _fingerprint(batches: list[Mapping[str, Any]]) -> str:
    """SHA-256 over everything that the model sees of all rows, each without padding and what follows its last label."""
    rows = []
    for batch in batches:
        labels, mask = (None if batch.get(key) is None else batch[key].cpu() for key in ("labels", "attention_mask"))
        labels = labels.clone()
        labels[:, :1] = -100  # nothing scores the first
        labelled = labels != -100  # [B, T]
        scored = labelled.flip(1).cumsum(1).flip(1) > 0
        if mask is not None and mask.shape == labels.shape:
            scored &= mask != 0
        given = {key: value.cpu() for key, value in sorted(batch.items()) if isinstance(value, Tensor)}
        given = {key: value for key, value in given.items() if key not in _NOT_OF_THE_ROW}
        by_token = {key: value for key, value in given.items() if value.shape[:2] == labels.shape}
        by_row = {key: value for key, value in given.items() if key not in by_token and len(value) == len(labels)}
        lists = {key: x for key, x in sorted(batch.items()) if type(x) in (list, tuple) and len(x) == len(labels)}
        # what belongs to the batch as a whole, such as the patches of all its images
        whole = b"".join(_bytes(key, value) for key, value in given.items() if not {key} & {*by_token, *by_row})
        for row, (targets, keep) in enumerate(zip(labels.long(), scored, strict=True)):
            if bool(keep.any()):  # a row without a label adds nothing to a risk
                parts = [_bytes("labels", targets[keep]), whole]
                parts += [_bytes(key, value[row][keep]) for key, value in by_token.items()]
                parts += [_bytes(key, value[row]) for key, value in by_row.items()]
                parts += [f"{key}|{value[row]!r}|".encode() for key, value in lists.items()]  # adapter_names
                rows.append(hashlib.sha256(b"".join(parts)).digest())
    return hashlib.sha256(b"".join(sorted(rows))).hexdigest()


_NOT_OF_THE_ROW = OWN_KEYS | {"attention_mask", "position_ids"}


def _bytes(key: str, value: Tensor) -> bytes:
    """An entry's name and values; whole numbers count as int64."""
    value = (value if value.is_floating_point() else value.long()).contiguous()
    name = f"{key}|{value.dtype}|{tuple(value.shape)}|".encode()
    return name + value.reshape(-1).view(torch.uint8).numpy().tobytes()


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`, usable in a backward wherever they were made."""

    def move(tensor: Tensor) -> Tensor:
        moved = tensor.to(device)
        if moved.dim() == 2:  # models view what embeddings make of tokens, whose layout is theirs
            moved = moved.contiguous()
        return moved.clone() if moved.is_inference() else moved

    return {key: move(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
