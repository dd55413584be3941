"""Files as TOFU has them, a few rows each, so that recipes for TOFU run anywhere."""

from __future__ import annotations

import json
from pathlib import Path

from gfast.data import bundled_perturbed


def write_tofu_like(folder: Path, forget: int = 6, retain: int = 8) -> Path:
    """Every split and configuration that an evaluation or a recipe asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    to_forget, to_keep = ([_short(row) for row in rows] for rows in bundled_perturbed())
    plain = [{key: row[key] for key in ("question", "answer")} for row in (*to_keep[:retain], *to_forget[:forget])]
    sets = {"full": plain, "retain_perturbed": to_keep[:retain]}
    for split, kept, rows in (
        ("forget01", "retain99", 2),
        ("forget05", "retain95", forget),
        ("forget10", "retain90", 4),
    ):
        sets |= {split: plain[-rows:], kept: plain[:-rows], f"{split}_perturbed": to_forget[forget - rows : forget]}
    for at, name in enumerate(("real_authors_perturbed", "world_facts_perturbed")):
        sets[name] = to_keep[-3 * (at + 1) :][:3]
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def _short(row: dict) -> dict:
    """A row whose answers are a few words, with the question in other words, as TOFU has it."""
    texts = {key: _words(value) for key, value in row.items() if key in ("answer", "paraphrased_answer")}
    wrong = [f"{_words(text)} {at}" for at, text in enumerate(row["perturbed_answer"])]
    return {**row, **texts, "perturbed_answer": wrong, "paraphrased_question": f"Tell me: {row['question']}"}


def _words(text: str) -> str:
    return " ".join(text.split()[:3])
