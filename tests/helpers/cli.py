"""Flags of `gfast unlearn` on a tiny model and its two files, and commands that fail."""

from __future__ import annotations

import json

from gfast import cli
from helpers.training_tiny import FORGET_ROWS, RETAIN_ROWS, TOKENIZER, tiny_model


def write_original(folder):
    """A model, its tokenizer and two JSON lines files."""
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    for name, rows in (("forget", FORGET_ROWS), ("retain", RETAIN_ROWS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def flags(original, out, **options):
    chosen = {
        "model": original,
        "data": "jsonl",
        "data_path": original,
        "forget": "forget.jsonl",
        "retain": "retain.jsonl",
        "output_dir": out,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "objective": "WGA",
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **options,
    }
    words = []
    for name, value in chosen.items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def fails(capsys, words, *argv):
    """The command ends with exit code 2 and one line on stderr that holds `words`."""
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("gfast: error: ") and words in last, last
    assert "Traceback" not in last
