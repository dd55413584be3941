# SPDX-License-Identifier: Apache-2.0
"""An evaluation: units of work, each kept once it is done, and the log that they make together."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gfast import metrics, wrappers
from gfast.data import check_vocabulary
from gfast.data.encode import IGNORE, special_tokens
from gfast.data.ids import vocabulary_sizes
from gfast.errors import NotFinite
from gfast.evaluation.generation import Generated, generate, text_of
from gfast.evaluation.samples import REWORDED, EvaluationSet, Sample, first_label, say_rows_in_both, tokens_checksum
from gfast.evaluation.scoring import Scored, can_share, common, score
from gfast.files import DamagedFile, read_json, write_json
from gfast.given import whole
from gfast.metrics.answers import OPTION_SETS
from gfast.metrics.log import FORMAT
from gfast.metrics.values import chosen
from gfast.model_settings import settings_of
from gfast.model_state import evaluating
from gfast.training.fingerprints import model_fingerprint

logger = logging.getLogger("gfast")

PARTS = "parts"
# Min-K% of the log: open-unlearning's k for TOFU and MUSE.
MIN_K = 0.4
EXTRACTIONS = ("exact", "similar", "perturbed")
EXTRACTION_SAMPLES = 50
_NAMES = {"gt": "gt_loss", "paraphrased": "paraphrased_loss", "perturb": "perturb_loss"}
_AVERAGES = {"gt": "avg_gt_loss", "paraphrased": "avg_paraphrased_loss", "perturb": "average_perturb_loss"}


@dataclass(frozen=True)
class Unit:
    """Work that is done and kept as a whole: samples of one set, by their places in it."""

    name: str
    at_set: int
    kind: str
    places: tuple[int, ...]


class Evaluation:
    """Sets of samples, asked of a model.

    sets and samples: what to ask, in pairs. batch_size: samples at a time; which samples run together moves results by
    rounding, so it is a part of what an evaluation is. extraction: kinds of `EXTRACTIONS` to measure of the first
    `extraction_samples` samples of each set.
    """

    def __init__(
        self,
        sets: Sequence[EvaluationSet],
        samples: Sequence[Sequence[Sample]],
        tokenizer: Any,
        batch_size: int = 16,
        extraction: Sequence[str] = (),
        extraction_samples: int = EXTRACTION_SAMPLES,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"gfast: batch_size is {batch_size}; give 1 or more")
        names = [eval_set.name for eval_set in sets]
        if len(set(names)) < len(names):
            raise ValueError(f"gfast: two sets have one name: {', '.join(names)}")
        for kind in extraction:
            chosen("extraction", kind, EXTRACTIONS)
        extraction_samples = whole("gfast: extraction_samples", extraction_samples, least=1)
        if extraction_samples != EXTRACTION_SAMPLES and not extraction:
            raise ValueError(
                f"gfast: extraction_samples={extraction_samples} has no effect without extraction, the kinds to "
                f"measure ({', '.join(EXTRACTIONS)})"
            )
        if "perturbed" in extraction and not any(sample.reworded for some in samples for sample in some):
            raise ValueError(
                f"gfast: extraction perturbed asks questions in other words, and no set has rows with {REWORDED}"
            )
        self.sets, self.samples, self.tokenizer = list(sets), [list(some) for some in samples], tokenizer
        self.batch_size, self.extraction, self.extraction_samples = batch_size, tuple(extraction), extraction_samples
        say_rows_in_both(sets)
        self.pad_id = next((int(x) for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)
        self._shared: dict[int, bool] = {}

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer: of sets that are generated. Whole texts and letters end with any token, and so
        do answers of an `encode` that writes no end: those are words, which an answer may go on after.
        """
        added = getattr(self.tokenizer, "get_added_vocab", dict)().values()
        marks = {*special_tokens(self.tokenizer).values(), *added}
        tokens = {x for x in [self.tokenizer.eos_token_id] if x is not None}
        for eval_set, some in zip(self.sets, self.samples, strict=True):
            for sample in some if eval_set.generate else ():
                *said, last = (label for label in sample.right[1] if label != IGNORE)
                if last not in tokens and (last in marks or self._whole(said, sample.truth)):
                    tokens.add(last)
        return tuple(sorted(tokens))

    def _whole(self, said: list[int], truth: str) -> bool:
        """Whether tokens hold all of an answer, but for white space."""
        return "".join(self.tokenizer.decode(said).split()).endswith("".join(truth.split()))

    def ends_for(self, model: nn.Module) -> tuple[int, ...]:
        """`ends`, and those at which the model itself would stop: of its generation settings (a chat model's name
        several) what the tokenizer knows as special tokens. Those of a model made for another vocabulary name words.
        """
        eos = getattr(getattr(wrappers.measured(model), "generation_config", None), "eos_token_id", None)
        special = set(special_tokens(self.tokenizer).values())
        named = [eos] if isinstance(eos, int) else eos or ()
        return tuple(sorted({*self.ends, *(int(token) for token in named if int(token) in special)}))

    def check_model(self, model: nn.Module) -> None:
        """ValueError, naming the row, for a token that the model does not know, or what `check_lengths` finds."""
        self.check_lengths(getattr(model, "config", None))
        sizes = vocabulary_sizes(model)
        for eval_set, samples in zip(self.sets, self.samples, strict=True):
            for sample in samples:
                items = [
                    {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)} for ids, labels in _asked(sample)
                ]
                check_vocabulary(
                    sizes, items, self.tokenizer, f"the answers of row {sample.row} of the set {eval_set.name}"
                )

    def check_lengths(self, config: Any) -> None:
        """ValueError, naming the row, where a sample, or a prompt with what may be generated after it, has more
        positions than a model of this configuration takes.
        """
        takes = _positions(config)
        if takes is None:
            return
        for eval_set, samples in zip(self.sets, self.samples, strict=True):
            for sample in samples:
                longest, prompt = max(len(ids) for ids, _ in _asked(sample)), len(sample.prompt)
                if longest > takes:
                    raise ValueError(
                        f"row {sample.row} of the set {eval_set.name} has {longest} tokens, and the model takes "
                        f"{takes} (max_position_embeddings): leave such rows out"
                    )
                if eval_set.generate and prompt + eval_set.generate > takes:
                    raise ValueError(
                        f"the prompt of row {sample.row} of the set {eval_set.name} has {prompt} tokens, "
                        f"{eval_set.generate} may be generated after it, and the model takes {takes} "
                        f"(max_position_embeddings): give max_new_tokens of {takes - prompt} or less"
                    )

    def units(self) -> list[Unit]:
        """All there is to do: the same in every process and after every start."""
        units = []
        for at_set, (eval_set, samples) in enumerate(zip(self.sets, self.samples, strict=True)):
            places = sorted(range(len(samples)), key=lambda at: (len(samples[at].prompt), at))
            units += self._cut(at_set, "losses", places)
            if eval_set.generate:
                units += self._cut(at_set, "generations", places)
            for kind in self.extraction:
                first = sorted(places)[: self.extraction_samples]
                if kind == "perturbed":
                    first = [at for at in first if samples[at].reworded]
                units += self._cut(at_set, f"extraction-{kind}", first)
        return units

    def _cut(self, at_set: int, kind: str, places: Sequence[int]) -> list[Unit]:
        size = self.batch_size
        return [
            Unit(f"{self.sets[at_set].name}-{kind}-{number:05d}", at_set, kind, tuple(places[start : start + size]))
            for number, start in enumerate(range(0, len(places), size))
        ]

    def run(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str] | None = None,
        units: Iterable[Unit] | None = None,
        done: Callable[[Unit], None] = lambda unit: None,
        weights: str | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        """The results of units (None: all) by their names: of each sample a dict.

        folder: results are kept there as they come, whole or not at all; those that are there already are not
        measured again. done: called after each unit. weights: the fingerprint of the model's, where it is known.

        Raises:
            ValueError: of all units, before any pass, what `check_model` finds; a folder with results of another model
                or of other questions.
        """
        model = wrappers.unreplicated(model)
        if units is None:
            self.check_model(wrappers.measured(model))
        results, deciding = {}, [] if folder is None else self._of(model, weights)
        with evaluating(model):
            for unit in self.units() if units is None else units:
                path = None if folder is None else Path(folder) / PARTS / f"{unit.name}.json"
                rows = [self.samples[unit.at_set][at].index for at in unit.places]
                if path is not None and path.exists():
                    results[unit.name] = _kept(path, rows, deciding[unit.at_set])
                else:
                    results[unit.name] = self._measured(model, unit)
                    if path is not None:
                        write_json(path, {"rows": rows, "results": results[unit.name], "of": deciding[unit.at_set]})
                done(unit)
        return results

    def _of(self, model: nn.Module, weights: str | None) -> list[dict[str, str]]:
        """SHA-256 of what decides the results of each set: the model, and what it is asked."""
        inner, ends = wrappers.measured(model), self.ends_for(model)
        of_model = _sum([weights or model_fingerprint(inner, adapters=True), settings_of(inner)])
        return [
            {"model": of_model, "asked": _sum([tokens_checksum(some), one.name, one.generate, one.stops, ends])}
            for one, some in zip(self.sets, self.samples, strict=True)
        ]

    def _measured(self, model: nn.Module, unit: Unit) -> list[dict[str, Any]]:
        eval_set, samples = self.sets[unit.at_set], [self.samples[unit.at_set][at] for at in unit.places]
        if unit.kind == "losses":
            scored = score(model, samples, self.pad_id, self._shares(model, unit.at_set))
            return [losses(sample, parts, eval_set) for sample, parts in zip(samples, scored, strict=True)]
        if unit.kind == "generations":
            return self._generations(model, eval_set, samples)
        kind = unit.kind.partition("-")[2]
        return [{f"ps_{kind}": value} for value in self._extraction(model, eval_set, samples, kind)]

    def _shares(self, model: nn.Module, at_set: int) -> bool:
        # Asked of the same samples at every start, so that a resumed evaluation runs as it began.
        if at_set not in self._shared:
            # Of those that would share, so that a cache is tried, and of unlike lengths, so that the shorter is padded.
            lengths = [(common(s), len(s.answers), -s.index, at) for at, s in enumerate(self.samples[at_set])]
            sharing = [one for one in lengths if one[0] > 0]
            ends = {at for *_, at in (min(sharing), max(sharing))} if sharing else set()
            probe = [self.samples[at_set][at] for at in sorted(ends)]
            self._shared[at_set] = bool(probe) and can_share(model, probe, self.pad_id)
        return self._shared[at_set]

    def _generations(self, model: nn.Module, eval_set: EvaluationSet, samples: list[Sample]) -> list[dict[str, Any]]:
        said = generate(
            model, [sample.prompt for sample in samples], eval_set.generate, self.ends_for(model), self.pad_id
        )
        rows = []
        for sample, generated in zip(samples, said, strict=True):
            text = text_of(self.tokenizer, generated.ids, eval_set.stops)
            cut = not generated.ended and not any(
                stop in self.tokenizer.decode(generated.ids) for stop in eval_set.stops
            )
            prompt = self.tokenizer.decode(list(sample.prompt), skip_special_tokens=True)
            scores = metrics.rouge_scores(sample.truth, text)
            rows.append({**scores, "generated_tokens": len(generated.ids), "generation_cut": int(cut)})
            rows[-1]["text"] = {"prompt": prompt, "generation": text, "ground_truth": sample.truth}
        return rows

    def _extraction(self, model: nn.Module, eval_set: EvaluationSet, samples: list[Sample], kind: str) -> list[float]:
        asked_as = [sample.reworded if kind == "perturbed" else sample.right for sample in samples]
        prompts = [ids[: first_label(labels)] for ids, labels in asked_as]
        labelled = [[label for label in labels if label != IGNORE] for _, labels in asked_as]
        # Without the end.
        answers = [tokens[: -sample.closing] or tokens for tokens, sample in zip(labelled, samples, strict=True)]
        ends, takes = self.ends_for(model), _positions(getattr(model, "config", None))
        match = "similar" if kind == "similar" else "exact"

        def matches(asked: Mapping[int, int]) -> dict[int, bool]:
            given = {at: [*prompts[at], *answers[at][:prefix]] for at, prefix in asked.items()}
            rest = {at: answers[at][prefix:] for at, prefix in asked.items()}
            # Together all generate as much as the longest rest needs, and the longest prompt may have no place for it.
            fits = takes is None or max(map(len, given.values())) + max(map(len, rest.values())) <= takes
            said: dict[int, Generated] = {}
            for some in [list(asked)] if fits else [[at] for at in asked]:
                limit = max(len(rest[at]) for at in some)
                generations = generate(model, [given[at] for at in some], limit, ends, self.pad_id)
                said |= dict(zip(some, generations, strict=True))
            return {at: metrics.continuation_matches(said[at].ids, rest[at], match) for at in asked}

        return metrics.prefix_extraction([len(answer) for answer in answers], matches)

    def log(self, results: Mapping[str, list[dict[str, Any]]], run: str, source: Mapping[str, Any]) -> dict[str, Any]:
        """The log of all units' results, in the layout that `gfast.metrics.load_log` reads."""
        sets, described = {}, {}
        for at_set, eval_set in enumerate(self.sets):
            rows: list[dict[str, Any]] = [{} for _ in self.samples[at_set]]
            for unit in self.units():
                if unit.at_set == at_set:
                    for at, values in zip(unit.places, results[unit.name], strict=True):
                        rows[at].update(values)
            sets[eval_set.name] = columns([sample.index for sample in self.samples[at_set]], rows, eval_set.name)
            sums = {"sha256": eval_set.checksum(), "tokens_sha256": tokens_checksum(self.samples[at_set])}
            described[eval_set.name] = {"config": eval_set.config, "rows": len(rows), **sums}
        return {"run": run, "source": {"format": FORMAT, **source, "sets": described}, "sets": sets}


def _positions(config: Any) -> int | None:
    """How many positions a model of this configuration takes; None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None


def _asked(sample: Sample) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [*sample.answers, *([sample.reworded] if sample.reworded else [])]


def _sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _kept(path: Path, rows: list[int], deciding: Mapping[str, Any]) -> list[dict[str, Any]]:
    remedy = "delete it, and it is measured again"
    value = read_json(path, remedy)
    if not isinstance(value, dict) or value.get("rows") != rows or len(value.get("results") or ()) != len(rows):
        raise DamagedFile(path, "it is of other samples", remedy)
    there = value.get("of") or deciding  # earlier versions did not say
    for key, what in (("model", "another model"), ("asked", "other rows, another prompt or other settings")):
        if there[key] != deciding[key]:
            raise ValueError(f"gfast: {path} holds results of {what}: give another folder, or delete {path.parent}")
    return value["results"]


def losses(sample: Sample, scored: Sequence[Scored], eval_set: EvaluationSet) -> dict[str, Any]:
    """What the log holds of a sample's losses: nats, the token that ends an answer included.

    Errors: NotFinite, naming set and row, for a loss that is not.
    """
    # log p is at most 0, but for rounding
    totals = [-float(part.logp.double().clamp(max=0).sum()) for part in scored]
    for at, total in enumerate(totals):
        if not math.isfinite(total):
            raise NotFinite(
                f"gfast: the NLL of answer {at + 1} of row {sample.row} of the set {eval_set.name} is {total}: the "
                "model gives no finite log-probability there, and such a sample compares with none. Are the "
                "weights finite?"
            )
    row: dict[str, Any] = {}
    for name, places in sample.fields.items():
        total, count = [totals[at] for at in places], sample.counts(name)
        average = [a / n for a, n in zip(total, count, strict=True)]
        several = name == "perturb"
        for key, values in ((_AVERAGES[name], average), (_NAMES[name], total), (f"num_token_{name}", count)):
            row[key] = values if several else values[0]
    right = scored[sample.fields["gt"][0]]
    # open-unlearning's convention: what ends an answer is no part of it here
    correct, logp = right.correct[: -sample.closing].tolist(), right.logp[: -sample.closing]
    if not eval_set.choices:  # of a letter nothing is left
        row["extraction_strength"] = metrics.extraction_strength(correct)
    if correct and not eval_set.choices:
        row["exact_memorization"] = metrics.exact_memorization(correct)
        row["min_k"] = metrics.min_k(np.minimum(logp.numpy(), 0), MIN_K)
    if eval_set.choices:
        row["right_choice"] = int(row["gt_loss"] < min(row["perturb_loss"]))
    if "perturb" in sample.fields:
        wrong = [row["average_perturb_loss"]]
        if "paraphrased" in sample.fields:
            row["truth_ratio"] = float(metrics.truth_ratios([row["avg_paraphrased_loss"]], wrong)[0])
        if eval_set.name in OPTION_SETS:
            share = metrics.option_probability([row["avg_gt_loss"]], wrong, "tofu")[0]
            row["normalized_gt_loss"] = -math.log(share) if share else math.inf
    return row


def columns(index: list[int], rows: Sequence[Mapping[str, Any]], name: str = "") -> dict[str, Any]:
    """Rows as lists parallel to `index`; a value that not every row has is left out, but for texts, and said of the
    set `name`.
    """
    keys = sorted({key for row in rows for key in row} - {"text"})
    common = [key for key in keys if all(key in row for row in rows)]
    for key in keys:
        if key not in common and not key.startswith("ps_"):
            lacks = [number for number, row in zip(index, rows, strict=True) if key not in row]
            logger.warning(
                "%s of the set %s is not in the log: row %d has none, as its answer has no token but the one that ends "
                "it (%d of %d rows)", key, name, lacks[0] + 1, len(lacks), len(rows),
            )  # fmt: skip
    by_key: dict[str, Any] = {"index": index, **{key: [row[key] for row in rows] for key in common}}
    texts = [{"index": number, **row["text"]} for number, row in zip(index, rows, strict=True) if "text" in row]
    partial = {key for row in rows for key in row if key.startswith("ps_") and key not in common}
    for key in sorted(partial):  # of the first samples only
        by_key.setdefault("extraction", {})[key] = [row[key] for row in rows if key in row]
    return by_key | ({"text": texts} if texts else {})
