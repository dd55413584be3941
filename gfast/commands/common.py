# SPDX-License-Identifier: Apache-2.0
"""What the commands share: rows, data sets and reference caches from flags, and what they tell the user."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from gfast.commands.arguments import DataArguments
from gfast.data import (
    Collator,
    PreferenceDataset,
    QADataset,
    RefusalDataset,
    bundled_authors,
    check_vocabulary,
    fingerprint,
    load_jsonl,
    load_tofu,
    refusals,
)
from gfast.data.encode import writes_date
from gfast.data.ids import vocabulary_sizes
from gfast.data.rows import in_both
from gfast.files import readable
from gfast.objectives import Objective
from gfast.training.batches import needed_from_cache
from gfast.training.records import read_run_info
from gfast.training.reference import ReferenceCache

# Sample ids of the retain set start here, so that those of the two sets never meet.
RETAIN_IDS = 1 << 32


def say(text: str) -> None:
    """A line about progress, on stderr so that results can be piped."""
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)


def show_log() -> None:
    """Let gfast's own log lines be seen, between progress bars."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    logger = logging.getLogger("gfast")
    if not logger.handlers:
        logger.addHandler(Lines())
        logger.propagate = False
    logger.setLevel(logging.INFO)


# objectives whose forget data hold refusals
REFUSED = {"dpo": PreferenceDataset, "po": RefusalDataset}


@dataclass
class Rows:
    """Question/answer rows of both sides."""

    forget: list[dict[str, Any]]
    retain: list[dict[str, Any]]

    def checksums(self, arguments: DataArguments) -> dict[str, str]:
        """Name of a set -> SHA-256 of its rows, for run.json: a run goes on with the data that it was begun with.

        Of the rows that are used and not of their file, which may be moved, or written in another way.
        """
        sums = {}
        for side in ("forget", "retain"):
            if rows := getattr(self, side):
                name = "bundled" if arguments.data == "bundled" else getattr(arguments, side)
                text = json.dumps(rows, sort_keys=True, default=str)
                sums[f"the {side} set ({name})"] = hashlib.sha256(text.encode()).hexdigest()
        return sums


def load_rows(arguments: DataArguments, need_retain: bool = True) -> Rows:
    """The rows that the flags name. ValueError for an empty set; errors of the files say where."""
    if arguments.data == "bundled":
        forget, retain = bundled_authors()
    elif need_retain and arguments.retain is None:
        raise ValueError(
            "no retain set given, which the retain term or a measurement needs: with --data jsonl it is a file of "
            "question/answer lines, --retain FILE"
        )
    else:
        forget = rows_of(arguments.data, arguments.data_path, arguments.forget)
        retain = rows_of(arguments.data, arguments.data_path, arguments.retain) if need_retain else []
    forget = forget[: arguments.max_forget or None]
    retain = retain[: arguments.max_retain or None] if need_retain else []
    for name, rows, wanted in (("forget", forget, True), ("retain", retain, need_retain)):
        if wanted and not rows:
            raise ValueError(f"the {name} set ({getattr(arguments, name)}) is empty: it has no rows to train on")
    if overlap := in_both(forget, retain, "retain"):
        say(f"WARNING: {overlap}. What is said of the retain set is said of them as well")
    return Rows(forget, retain)


def check_refusals(arguments: DataArguments, objectives: Iterable[Objective]) -> None:
    """ValueError for a file of refusals that no objective reads."""
    objectives = list(objectives)
    if arguments.refusals is not None and not any(objective.key in REFUSED for objective in objectives):
        raise ValueError(
            f"--refusals has no use with {', '.join(map(str, objectives))}: PO and DPO read refusals; leave it out"
        )


def rows_of(source: str, path: str | None, name: str) -> list[dict[str, Any]]:
    """The rows of a TOFU configuration, or of a JSON lines file; `path`: the folder, if it is given."""
    return load_tofu(name, path) if source == "tofu" else load_jsonl(Path(path or "") / name)


class Sides:
    """Tokenised data sets for an objective and for risks, collators, and the original model's values.

    A chat template that writes today's date writes `today` (YYYY-MM-DD): the data of a run must not change while it is
    interrupted.
    """

    def __init__(
        self, rows: Rows, tokenizer: Any, arguments: DataArguments, seed: int = 0, today: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.arguments = arguments
        self._rows, self._seed = rows, seed
        self._sizes: dict[str, int | None] | None = None
        options = dict(arguments.chat_kwargs)
        if writes_date(tokenizer, arguments.template, options) and today:
            options["strftime_now"] = today
            say(f"The chat template may write a date: it is {today}. --chat_kwargs strftime_now={today} fixes it")
        self.chat_kwargs = options
        self._options = {"template": arguments.template, "max_length": arguments.max_length, "chat_kwargs": options}
        self.forget = self._encoded("forget", QADataset, rows.forget)
        self.retain = self._encoded("retain", QADataset, rows.retain, id_offset=RETAIN_IDS) if rows.retain else None
        self.collator = Collator(tokenizer)

    def _encoded(self, side: str, kind: type, rows: list[dict[str, Any]], **options: Any) -> Any:
        name = "" if self.arguments.data == "bundled" else f" ({getattr(self.arguments, side)})"
        try:
            return kind(rows, self.tokenizer, **self._options, **options)
        except ValueError as error:
            raise ValueError(f"the {side} set{name}: {str(error).removeprefix('gfast: ')}") from error

    def fit(self, model: nn.Module) -> None:
        """ValueError, naming set, row and token, where the data have token ids that the model does not know."""
        self._sizes = vocabulary_sizes(model)
        for side, data in (("forget", self.forget), ("retain", self.retain)):
            if data is not None:
                check_vocabulary(self._sizes, data, self.tokenizer, f"the {side} set")

    def checksums(self, objective: Objective | None = None) -> dict[str, str]:
        """Name of a set -> SHA-256 of its token ids, labels and weights, for run.json: the same rows are others under
        another tokenizer, template or file of refusals. With an objective, the forget set as that wants it.
        """
        sets = {"forget": self.forget if objective is None else self.of(objective), "retain": self.retain}
        return {f"the {side} set": fingerprint(data) for side, data in sets.items() if data is not None}

    def of(self, objective: Objective) -> Any:
        """The forget data as `objective` wants it: pairs for DPO, refused questions for PO, else as it is."""
        kind = REFUSED.get(objective.key)
        if kind is None:
            return self.forget
        lines = refusals(self.arguments.refusals)
        data = self._encoded("forget", kind, self._rows.forget, refusals=lines, seed=self._seed)
        if self._sizes is not None:
            check_vocabulary(self._sizes, data, self.tokenizer, "the forget set with refusals")
        return data

    def reference(
        self,
        model: nn.Module,
        objectives: Iterable[Objective],
        side: str,
        folder: Path | None,
        batch_size: int,
        reference: str = "auto",
        build: Callable[..., ReferenceCache] = ReferenceCache.build,
        mixed_precision: str = "no",
        what: Iterable[str] | None = None,
    ) -> ReferenceCache | None:
        """What `objectives` need of the original model on one side, from `folder` or computed and kept there.

        what: of that, what a cache is to hold; reference, mixed_precision: as `ReferenceCache.build`; build: what
        stands in for that.
        """
        objectives = list(objectives)
        needed = set().union(*(needed_from_cache(objective) for objective in objectives))
        what = needed if what is None else set(what)
        if not what:
            return None
        data = self.retain if side == "retain" else self.of(objectives[0])
        layers = {objective.layer for objective in objectives if "layer_hidden" in what & needed_from_cache(objective)}
        if len(layers) > 1:  # a batch holds the hidden states of one
            raise ValueError(f"RR of the layers {', '.join(map(str, sorted(layers)))}: give one layer at a time")
        # pairs are other samples than the answers alone
        parts = [side, *(["pairs"] if isinstance(data, PreferenceDataset) else []), *sorted(what)]
        parts += [] if mixed_precision == "no" else [mixed_precision]
        path = None if folder is None else folder / f"{'-'.join(parts)}.safetensors"
        exists = path is not None and path.exists()
        say(f"Reference of the {side} set: {'checking ' + str(path) if exists else f'computing {len(data)} samples'}")
        return build(
            model,
            data,
            self.collator,
            path,
            what=what,
            layer=max(layers, default=None),
            batch_size=batch_size,
            progress=True,
            reference=reference,
            mixed_precision=mixed_precision,
        )


def run_info(command: str, model: str, arguments: DataArguments, rows: Rows, argv: Sequence[str]) -> dict[str, Any]:
    """What run.json says of every command's run."""
    files = [] if arguments.data == "bundled" else [arguments.forget, *([arguments.retain] if rows.retain else [])]
    return {
        "model": model,
        "data": f"{arguments.data}: {' / '.join(files)}" if files else arguments.data,
        "samples": {"forget": len(rows.forget), "retain": len(rows.retain)},
        "data_sha256": rows.checksums(arguments),
        "argv": ["gfast", command, *argv],
        "versions": versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def first_day(folder: Path | None, info: dict[str, Any]) -> str:
    """The date, YYYY-MM-DD, on which the run of the folder was first started: today, for a new one."""
    known = folder is not None and (folder / "run.json").exists()
    return str((read_run_info(folder).get("created") if known else None) or info["created"])[:10]


def as_text(value: Any) -> Any:
    """JSON-like `value` with text that every file can hold, in whatever locale the command was typed."""
    if isinstance(value, dict):
        return {name: as_text(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_text(entry) for entry in value]
    return readable(value) if isinstance(value, str) else value


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import gfast

    numbers = {"gfast": gfast.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return numbers | {"python": sys.version.split()[0]}


def device_name(device: torch.device) -> str:
    """The name of a GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
