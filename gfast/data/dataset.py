"""Tokenised data sets: answers with labels, refusals, pairs, and forget/retain pairing."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset

from gfast.data.bundled import refusals as load_refusals
from gfast.data.encode import IGNORE, make_encoder, resolve_template
from gfast.data.rows import CUT, as_rows, field_text, is_cut
from gfast.given import whole


def seeded(*numbers: int) -> torch.Generator:
    """A generator by the numbers alone: NumPy's draw as Python's, whatever version prints them."""
    digest = hashlib.sha256(repr(tuple(map(int, numbers))).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


class QADataset(Dataset):
    """Question/answer rows as token ids with answer-only labels.

    Item i is `{"input_ids": LongTensor [T], "labels": LongTensor [T], "sample_id": i + id_offset}`. Labels are Hugging
    Face labels (unshifted): -100 on the prompt, the token's own id on the answer and on what ends it. Rows
    are tokenised once, here, so that a bad row is an error before training and not in the middle of it.

    The prompt is the tokenizer's chat template where it has one, else `Question: ...\\nAnswer:`. In front of it stands
    what the tokenizer (plain: BOS, `[gMASK]<sop>`, `[CLS]`) or the chat template (chat) puts there, never twice. The
    answer ends with EOS, or the template's end-of-turn token. What a template writes between the answer and that token,
    such as Llama 2's space, has labels too: a model comes to no end without it. What it writes before the answer, such
    as an empty block of thoughts, is context that gfast's evaluations give the model: its labels are -100.

    Args:
        rows: dicts with at least the two fields below: a list, a generator or stream of them, a `datasets.Dataset`, a
            DataFrame. Surrounding white space of both texts is dropped.
        tokenizer: a Hugging Face tokenizer.
        template: `"auto"`, `"chat"` or `"plain"`.
        max_length: longer rows lose the end of their answer, with one warning that counts them; a row that would lose
            its whole answer is an error. None: no limit.
        id_offset: added to the row index to give the sample id; use it to keep the ids of several data sets apart.
        question, answer: the fields to read (for instance `answer="paraphrased_answer"`). A third is read where rows
            have it: `weight`, a number for all tokens of the text, which the item then has too. A row with `answer_cut`
            true has an answer that was cut: nothing ends it, and no label is of an end.
        chat_kwargs: further arguments for the chat template, such as `{"enable_thinking": False}` or a fixed
            `date_string`. `{"strftime_now": "2026-03-01"}` stops the clock of a template that writes today's date;
            `{"chat_template": "name"}` chooses one of several named templates.

    Raises:
        TypeError: rows that are no dicts, or a container that holds no rows, such as a path or one dict.
        ValueError: no rows, a missing, empty or non-text field, a weight that is no finite number or that only some
            rows have, half a character (a lone surrogate), an answer that
            does not fit, a tokenizer without EOS, markup in a text that the tokenizer reads as one of the special
            tokens around it, or a chat template under which the answer's tokens are unknown. The message names the
            row, counted from 1.

    Example:
        >>> from gfast.data import QADataset, demo_tokenizer
        >>> tokenizer = demo_tokenizer()
        >>> item = QADataset([{"question": "Who?", "answer": "Nobody."}], tokenizer)[0]
        >>> tokenizer.decode(item["labels"][item["labels"] != -100])
        ' Nobody.<eos>'
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        template: str = "auto",
        max_length: int | None = 512,
        id_offset: int = 0,
        question: str = "question",
        answer: str = "answer",
        chat_kwargs: dict | None = None,
    ):
        rows = as_rows(rows)
        if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
            raise ValueError(f"gfast: max_length must be at least 2 (a prompt and an answer token), got {max_length!r}")
        self.template = resolve_template(tokenizer, template)
        self.id_offset = whole("gfast: id_offset", id_offset, least=None)
        self._items: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._weights = _weights(rows)
        encode = make_encoder(tokenizer, self.template, chat_kwargs)
        cut: list[tuple[int, int]] = []
        for number, row in enumerate(rows, start=1):
            try:
                texts = [field_text(row, field) for field in (question, answer)]
                ends = answer != "answer" or not is_cut(row)
            except ValueError as error:
                raise ValueError(f"gfast: row {number}: {error}") from None
            try:
                ids, marked = encode(*texts, ends)
            except ValueError as error:
                raise ValueError(f"{error} (row {number})") from error
            if max_length is not None and len(ids) > max_length:
                start = next(at for at, label in enumerate(marked) if label != IGNORE)
                if start >= max_length:
                    raise ValueError(
                        f"gfast: row {number}: the prompt alone has {start} tokens, so max_length={max_length} leaves "
                        f"no token of the answer; raise max_length to at least {len(ids)} or remove the row"
                    )
                cut.append((number, len(ids)))
                ids, marked = ids[:max_length], marked[:max_length]
            input_ids = torch.tensor(ids, dtype=torch.int64, device="cpu")  # [T]
            self._items.append((input_ids, torch.tensor(marked, dtype=torch.int64, device="cpu")))
        if cut:
            warnings.warn(
                f"gfast: {len(cut)} of {len(rows)} rows are longer than max_length={max_length} and lost the end of "
                f"their answer (the first is row {cut[0][0]} with {cut[0][1]} tokens)",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict:
        input_ids, labels = self._items[index]
        if index < 0:
            index += len(self)
        item = {"input_ids": input_ids, "labels": labels, "sample_id": index + self.id_offset}
        return item if self._weights is None else {**item, "weight": self._weights[index]}


def _weights(rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """The weight of each row; None where there is none."""
    if not any("weight" in row for row in rows):
        return None
    for number, row in enumerate(rows, start=1):
        value = row.get("weight")
        if value is None:
            raise ValueError(f'gfast: row {number} has no "weight", and others have one: give all or none')
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(
                f'gfast: row {number}: field "weight" must be a finite number, by which the loss of the text\'s tokens '
                f"is multiplied, got {value!r:.60}; rename the field if it is something else"
            )
    return [float(row["weight"]) for row in rows]


def refused(
    rows: Iterable[Mapping[str, Any]], refusals: Sequence[str] | None = None, seed: int = 0, answer: str = "answer"
) -> list[dict]:
    """Copies of the rows with the answer replaced by a refusal; which one depends on `seed` and the row's index only.

    Example:
        >>> from gfast.data.dataset import refused
        >>> refused([{"question": "Who?", "answer": "Nobody."}], ["I don't know."])
        [{'question': 'Who?', 'answer': "I don't know."}]
    """
    rows, seed = as_rows(rows), whole("gfast: seed", seed, least=None)
    if isinstance(refusals, (str, PathLike)):
        raise ValueError(
            f"gfast: refusals is {str(refusals)!r}, and a list of texts is needed: [{str(refusals)!r}], or those of a "
            "file by gfast.data.refusals(path)"
        )
    lines = load_refusals() if refusals is None else list(refusals)
    if not lines:
        raise ValueError("gfast: no refusals to choose from; pass at least one or None for the bundled list")
    choices = [int(torch.randint(len(lines), (), generator=seeded(seed, i), device="cpu")) for i in range(len(rows))]
    uncut = [{key: value for key, value in row.items() if key != CUT} for row in rows]
    return [{**row, answer: lines[choice]} for row, choice in zip(uncut, choices, strict=True)]


class RefusalDataset(QADataset):
    """The rows' questions answered by refusals: the data of PO (`gfast.objectives.PO`).

    Each row keeps one refusal, drawn from `refusals` (None: `gfast.data.refusals()`) by `seed` and the row's index, so
    that reference values cached per sample stay valid. Everything else is as in `QADataset`.

    Example:
        >>> from gfast.data import RefusalDataset, bundled_authors, demo_tokenizer
        >>> len(RefusalDataset(bundled_authors()[0], demo_tokenizer()))
        40
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        refusals: Sequence[str] | None = None,
        seed: int = 0,
        **options,
    ):
        super().__init__(refused(rows, refusals, seed, options.get("answer", "answer")), tokenizer, **options)


class PreferenceDataset(Dataset):
    """Pairs for DPO: the row's own answer is rejected; a refusal of the same question is preferred (IdkDPO), or the
    answer in another field of the row (AltPO: plausible other answers, made beforehand; a row for each of several).

    Item i holds the forget answer as `input_ids`, `labels`, `sample_id` (as in `QADataset`) and the preferred one as
    `preferred_input_ids`, `preferred_labels`, `preferred_sample_id` = i + len(rows) + id_offset: 2 len(rows) distinct
    ids, so that reference values can be cached for both halves. Arguments as in `RefusalDataset`, and

    Args:
        preferred: the field of the preferred answers; None: refusals.

    Raises:
        ValueError: as `QADataset`; refusals beside preferred answers.

    Source: Maini et al., arXiv 2401.06121 (refusals); arXiv 2409.13474 (AltPO).

    Example:
        >>> from gfast.data import Collator, PreferenceDataset, bundled_authors, demo_tokenizer
        >>> pairs = PreferenceDataset(bundled_authors()[0], demo_tokenizer())
        >>> batch = Collator(demo_tokenizer())([pairs[0], pairs[1]])
        >>> batch["sample_id"].tolist()
        [0, 1, 40, 41]
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        refusals: Sequence[str] | None = None,
        seed: int = 0,
        id_offset: int = 0,
        preferred: str | None = None,
        **options,
    ):
        rows = as_rows(rows)
        self.rejected = QADataset(rows, tokenizer, id_offset=id_offset, **options)
        options["id_offset"] = id_offset + len(rows)
        if preferred is None:
            self.preferred = RefusalDataset(rows, tokenizer, refusals=refusals, seed=seed, **options)
        elif refusals is not None:
            raise ValueError(
                "gfast: refusals would have no effect beside preferred, the field of the preferred answers"
            )
        else:
            self.preferred = QADataset(rows, tokenizer, **options | {"answer": preferred})

    def __len__(self) -> int:
        return len(self.rejected)

    def __getitem__(self, index: int) -> dict:
        preferred = {f"preferred_{key}": value for key, value in self.preferred[index].items()}
        return {**self.rejected[index], **preferred}


class ForgetRetain(Dataset):
    """Every forget item with one retain item: `{"forget": item, "retain": item}`, as long as the forget set.

    The retain partner of item i is entry i of a shuffle of the retain set seeded by (seed, epoch): no retain item comes
    twice before all have come once, each epoch pairs anew, and the same (seed, epoch) always gives the same pairs, also
    in worker processes and after a resume. Call `set_epoch` at the start of an epoch; `epoch_callback` does it in a
    Hugging Face Trainer. A warning says how many items of a QADataset (and those like it) are in both sets.

    Example:
        >>> from gfast.data import ForgetRetain
        >>> data = ForgetRetain(["f0", "f1"], ["r0", "r1", "r2"], seed=1)
        >>> data[0]["forget"], data[0] == data[0]
        ('f0', True)
    """

    def __init__(self, forget: Any, retain: Any, seed: int = 0):
        for name, data in (("forget", forget), ("retain", retain)):
            if len(data) == 0:
                raise ValueError(f"gfast: the {name} set is empty; forget/retain training needs both sets")
        self.forget, self.retain, self.seed = forget, retain, whole("gfast: seed", seed, least=None)
        _say_items_in_both(forget, retain)
        # Shared memory, so that persistent data loader workers see the new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        self._partners: tuple[int, list[int]] | None = None
        self._held = False

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Pair anew for this epoch (counted from 0), unless the epoch is held."""
        if not self._held:
            self._epoch.fill_(int(epoch))

    def hold_epoch(self, epoch: int) -> None:
        """As `set_epoch`, and later calls of it change nothing until `release_epoch`: whoever trains knows best."""
        self._epoch.fill_(int(epoch))
        self._held = True

    def release_epoch(self) -> None:
        """Let `set_epoch` set the epoch again."""
        self._held = False

    def at_epoch(self, epoch: int) -> ForgetRetain:
        """The pairs of an epoch, whatever becomes of this data set's own epoch: a data set over the same items, held.

        Example:
            >>> from gfast.data import ForgetRetain
            >>> data = ForgetRetain(["f0"], ["r0", "r1", "r2"])
            >>> first = data.at_epoch(0)
            >>> data.set_epoch(2)
            >>> first.partners() == data.at_epoch(0).partners(), data.epoch
            (True, 2)
        """
        held = copy.copy(self)
        held._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        held.hold_epoch(epoch)
        return held

    def partners(self) -> list[int]:
        """For each forget index, the retain index it is paired with in the current epoch."""
        epoch = self.epoch
        if self._partners is None or self._partners[0] != epoch:
            generator, order = seeded(self.seed, epoch), []
            while len(order) < len(self.forget):
                order += torch.randperm(len(self.retain), generator=generator, device="cpu").tolist()
            self._partners = (epoch, order[: len(self.forget)])
        return self._partners[1]

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict:
        return {"forget": self.forget[index], "retain": self.retain[self.partners()[index]]}


def _say_items_in_both(forget: Any, retain: Any) -> None:
    """A warning for texts that are to be forgotten and kept; of data sets whose items are made already."""
    forget = getattr(forget, "rejected", forget)
    if not (isinstance(forget, QADataset) and isinstance(retain, QADataset)):
        return
    places = {tuple(ids.tolist()): number for number, (ids, _) in reversed([*enumerate(retain._items, start=1)])}
    texts = [tuple(ids.tolist()) for ids, _ in forget._items]
    both = [(number, text) for number, text in enumerate(texts, start=1) if text in places]
    if both:
        number, text = both[0]
        warnings.warn(
            f"gfast: {len(both)} of {len(texts)} forget items are in the retain set too, the first as item {number} of "
            f"the forget set and {places[text]} of the retain set: they are forgotten and kept at once; take them out "
            f"of one",
            stacklevel=3,
        )


def epoch_callback(dataset: Any):
    """A `transformers.TrainerCallback` that sets the data set's epoch at the start of every epoch, and holds it where
    the data set can be held.

    Accelerate forwards an epoch to a data set by itself in some set-ups only (not when it shards batches over
    processes), and older versions forward a wrong one: after a resume within an epoch they count from 0 again.

    Example:
        >>> from gfast.data import ForgetRetain, epoch_callback
        >>> callback = epoch_callback(ForgetRetain(["f0"], ["r0", "r1"]))  # Trainer(..., callbacks=[callback])
    """
    from transformers import TrainerCallback

    class SetEpoch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            # state.epoch is a quotient of step counts; a tick below 2.0 still means that epoch 2 begins.
            getattr(dataset, "hold_epoch", dataset.set_epoch)(int((state.epoch or 0.0) + 1e-6))

        def on_train_end(self, args, state, control, **kwargs):
            getattr(dataset, "release_epoch", lambda: None)()

    return SetEpoch()


def fingerprint(dataset: Any) -> str:
    """SHA-256 over everything that a model sees of a data set: token ids, labels, sample ids and whatever else its
    items hold, such as pixel values, item by item.

    Stable over processes, machines and versions; equal exactly when all items are. For caches that must not be used
    with other data.

    Example:
        >>> from gfast.data import QADataset, demo_tokenizer, fingerprint
        >>> rows = [{"question": "Who?", "answer": "Nobody."}]
        >>> fingerprint(QADataset(rows, demo_tokenizer())) == fingerprint(QADataset(rows, demo_tokenizer()))
        True
    """
    digest = hashlib.sha256(b"gfast data 1")

    def add(item: dict) -> None:
        for key in sorted(item):
            value = item[key]
            digest.update(f"{len(key)}:{key}".encode())
            if isinstance(value, dict):
                add(value)
            else:
                values = value.cpu() if isinstance(value, torch.Tensor) else _numbers(value)
                if values is None:  # texts and the like
                    digest.update(json.dumps(value, sort_keys=True, default=str).encode())
                    continue
                if values.is_floating_point():  # such as pixel values
                    digest.update(f"[{tuple(values.shape)} {values.dtype}]".encode())
                    digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
                    continue
                values = values.long().reshape(-1)
                digest.update(f"[{values.numel()}]".encode() + values.numpy().astype("<i8").tobytes())

    for index in range(len(dataset)):
        digest.update(b"item")
        add(dataset[index])
    return digest.hexdigest()


def _numbers(value: Any) -> torch.Tensor | None:
    """By way of NumPy: PyTorch's default dtype would decide what a list of numbers is. None for anything else."""
    try:
        return torch.from_numpy(numpy.asarray(value))
    except (TypeError, ValueError):
        return None
