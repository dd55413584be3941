"""TOFU, the benchmark of fictitious unlearning (arXiv 2401.06121), from the hub or from a folder."""

from __future__ import annotations

from pathlib import Path

from gfast.data.jsonl import load_jsonl

HUB_NAME = "locuslab/TOFU"
# What is left of TOFU without a forget set.
COMPLEMENTS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


def load_tofu(config: str = "forget01", path: str | Path | None = None) -> list[dict]:
    """The rows of one TOFU configuration: dicts with `question`, `answer` and, by configuration, more.

    Configurations: `full`; `forget01`, `forget05`, `forget10` and the complements `retain99`, `retain95`, `retain90`;
    `real_authors`, `world_facts`; and `*_perturbed` (`forget01_perturbed`, `retain_perturbed`, ...), which add
    `paraphrased_answer` and `perturbed_answer`.

    Args:
        config: the name of the configuration.
        path: a folder with a JSON lines file `<config>.json` for each configuration, as the hub stores them. None
            downloads (or takes from the local cache) `locuslab/TOFU` with the `datasets` library.

    Raises:
        FileNotFoundError: no such file in the folder; the message lists the configurations that are there.
        ImportError: `datasets` is not installed.
        RuntimeError: the hub cannot be reached or does not know the configuration.
        ValueError: a row without text in `question` or `answer`; the message names file, row and field.

    Example:
        >>> from gfast.data import load_tofu
        >>> rows = load_tofu("forget05", path="data/tofu")  # doctest: +SKIP
        >>> len(rows)  # doctest: +SKIP
        200
    """
    if path is not None:
        return _from_folder(config, Path(path))
    advice = f"pass path= (--data_path) with a local folder that holds {config}.json (JSON lines, as on the hub)"
    return from_hub(HUB_NAME, config, "train", advice)


def from_hub(name: str, config: str, split: str, advice: str) -> list[dict]:
    """The rows of a data set on the hub. Errors: ImportError, RuntimeError, with the advice what to do without it."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"gfast: loading {name} from the hub needs the datasets library: pip install datasets; or {advice}"
        ) from error
    try:
        return [dict(row) for row in load_dataset(name, config, split=split)]
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise RuntimeError(
            f"gfast: cannot load {config} ({split}) of {name} from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); {advice}"
        ) from error


def _from_folder(config: str, folder: Path) -> list[dict]:
    if not folder.is_dir():
        raise FileNotFoundError(f"gfast: {folder} is not a folder; load_tofu needs one that holds {config}.json")
    file = folder / f"{config}.json"
    if not file.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
        raise FileNotFoundError(f'gfast: no TOFU configuration "{config}" in {folder}; there are: {there}')
    return load_jsonl(file)
