# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a study does, as YAML. One file says all of it; a key that nobody knows is an error that names it."""

from __future__ import annotations

import copy
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from gfast.commands.arguments import SOURCES, DataArguments, ModelArguments
from gfast.evaluation.run import EXTRACTION_SAMPLES, EXTRACTIONS
from gfast.objectives.registry import parse_objective
from gfast.training.config import UnlearnConfig
from gfast.words import did_you_mean
from gfast.yaml_text import read_yaml, read_yaml_file

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
# Other names of recipes.
ALIASES = {"paper": "llama2-7b-tofu"}
RETENTION = ("extraction_strength", "probability", "exact_memorization")
# Flags of `gfast unlearn` that a recipe sets by itself, and where it says so.
_OWN_FLAGS = {
    **dict.fromkeys(("model", "base_model", "tokenizer", "gguf_file"), "model and tokenizer"),
    **dict.fromkeys(("data", "data_path", "forget", "retain", "max_forget", "max_retain"), "data"),
    **dict.fromkeys(("template", "chat_kwargs"), "template and chat_kwargs"),
    **dict.fromkeys(("dtype", "attn_implementation", "trust_remote_code"), "load"),
    **dict.fromkeys(("seed", "data_seed"), "seeds"),
    "output_dir": "--out",
    "objective_args": "objectives, as in WGA:alpha=0.5",
}
# Null says that there is none, not that it is left as it is.
_NULLABLE = ("teach", "evaluate")
# Of a training, what a recipe has beside the flags: both in passes over the forget set (or what is taught).
_EPOCHS = ("epochs", "warmup_epochs")


def _choose(where: str, value: Any, known: Any) -> None:
    if value not in known:
        meant = did_you_mean(str(value), known)
        raise ValueError(f"{where} is {value!r}{meant or ';'} choose one of {', '.join(known)}")


def _at_least(where: str, part: Any, **least: int) -> None:
    for name, lowest in least.items():
        value = getattr(part, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
            raise ValueError(f"{where}.{name} is {value!r}; give {lowest} or more")


@dataclass(frozen=True)
class Data:
    """Which data. source: bundled, tofu or jsonl. path: folder of tofu's or jsonl's files; without it tofu comes from
    the hub. forget, retain: tofu's configurations, or files. forget_authors: of the bundled authors. max_forget,
    max_retain: the first so many rows, 0: all.
    """

    source: str = "bundled"
    path: str | None = None
    forget: str = "forget10"
    retain: str = "retain90"
    forget_authors: int = 4
    max_forget: int = 0
    max_retain: int = 0

    def __post_init__(self) -> None:
        _choose("data.source", self.source, SOURCES)
        _at_least("data", self, max_forget=0, max_retain=0, forget_authors=1)

    @property
    def name(self) -> str:
        """What its folder is called."""
        name = f"{self.forget_authors}-authors" if self.source == "bundled" else Path(self.forget).stem
        return name + (f"-first-{self.max_forget}" if self.max_forget else "")


@dataclass(frozen=True)
class Load:
    """How models are loaded: as the flags of `gfast unlearn`."""

    dtype: str = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Evaluated:
    """What is asked of every model. rows: of each set the first so many, 0: all. along: also every so many steps of a
    run, for what it keeps at equal forgetting; 0: at its end only.
    """

    rows: int = 0
    along: int = 0
    max_new_tokens: int | None = None
    extraction: tuple[str, ...] = ()
    extraction_samples: int = EXTRACTION_SAMPLES
    batch_size: int = 16

    def __post_init__(self) -> None:
        _at_least("evaluate", self, rows=0, along=0, extraction_samples=1, batch_size=1, max_new_tokens=1)
        for kind in self.extraction:
            _choose("evaluate.extraction", kind, EXTRACTIONS)
        if self.extraction_samples != EXTRACTION_SAMPLES and not self.extraction:
            raise ValueError("evaluate.extraction_samples has no effect without evaluate.extraction, as in [exact]")


@dataclass(frozen=True)
class Calibration:
    """Unlearning with control (arXiv 2406.09179): unlearned and taught weights are mixed until the retain set's metric
    is at least `keep` of the taught model's; the largest share of the unlearned weights in steps of `resolution`.
    """

    metric: str = "extraction_strength"
    keep: float = 0.95
    resolution: float = 0.05

    def __post_init__(self) -> None:
        _choose("calibrate.metric", self.metric, RETENTION)
        for name in ("keep", "resolution"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"calibrate.{name} is {getattr(self, name)}; give a share, above 0 and at most 1")


@dataclass(frozen=True)
class Grid:
    """Parameters of objectives: their effects by one measurement of token effects, at `step` of the first seed's run
    `run`, beside real runs of the first seed.
    """

    run: str
    step: int
    objectives: tuple[str, ...]

    def __post_init__(self) -> None:
        _at_least("grid", self, step=1)
        for text in self.objectives:
            objective = parse_objective(text)
            if objective.key in ("dpo", "po", "rmu", "rr", "kl", "nll"):
                raise ValueError(f"grid.objectives: {text} is no weighting of the forget answers' tokens")


@dataclass(frozen=True)
class Sizes:
    """Forget sets of other sizes: `data` are changes to the recipe's data, `objectives` names of its objectives."""

    data: tuple[dict[str, Any], ...]
    objectives: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A study: teach -> retain model -> unlearn with every objective and seed -> evaluate -> tables, figures, a page.

    model: a name on the hub, a folder, or a mapping: the sizes of a Llama that starts from random weights, with the
    bundled tokenizer. load: how. data: which. template, chat_kwargs: the prompt's. seeds: of unlearning.
    teach: flags of `gfast unlearn` for teaching both sets to the model, null: it knows them. retain_model: the same on
    the retain set alone, for forget quality. unlearn: flags for every run. objectives: name -> "NPO:beta=0.5" or flags
    with `objective`. figures: title -> names of objectives; without them one figure of all. match_at: the forget NLL at
    which runs are compared; without it the largest that all runs reach. evaluate: what every model is asked, null: runs
    are compared by their NLL alone. keep_models: false deletes the weights of a run
    once it is evaluated. launch: words in front of `gfast unlearn`'s module, to run it in several processes.
    """

    title: str
    model: str | dict[str, Any]
    objectives: dict[str, dict[str, Any]]
    tokenizer: str | None = None
    gguf_file: str | None = None
    load: Load = Load()
    data: Data = Data()
    template: str = "auto"
    chat_kwargs: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    teach: dict[str, Any] | None = field(default_factory=dict)
    retain_model: bool = True
    unlearn: dict[str, Any] = field(default_factory=dict)
    evaluate: Evaluated | None = Evaluated()
    calibrate: Calibration | None = None
    grid: Grid | None = None
    sizes: Sizes | None = None
    figures: dict[str, tuple[str, ...]] = field(default_factory=dict)
    match_at: float | None = None
    keep_models: bool = True
    launch: str | None = None

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("objectives: name at least one, as in objectives: {ga: GA}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(0 <= s < 2**32 for s in self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}; give at least one, each once, from 0 to 2^32 - 1")
        if not (self.unlearn.get("nll_every") or self.unlearn.get("geffect_every")):
            raise ValueError("unlearn: give nll_every or geffect_every; runs are compared along their NLL")
        if self.evaluate is None and (self.calibrate or (self.retain_model and self.teach is not None)):
            part = "calibrate" if self.calibrate else "retain_model: true"
            raise ValueError(f"evaluate is null, and {part} takes evaluations: leave one of them out")
        named = {f"figures.{title}": names for title, names in self.figures.items()}
        named["grid.run"] = [self.grid.run] if self.grid else []
        named["sizes.objectives"] = self.sizes.objectives if self.sizes else []
        for where, names in named.items():
            for name in names:
                _choose(where, name, self.objectives)
        if self.calibrate and any(flags.get("lora_r") for flags in (self.unlearn, *self.objectives.values())):
            raise ValueError("calibrate mixes whole weights, and lora_r trains adapters: leave one of them out")
        named = {self.data.name: "the recipe's own data"}
        for changes in self.sizes.data if self.sizes else ():
            name = self.with_size(changes).name
            if name in named:
                raise ValueError(
                    f"sizes.data: {changes} is called {name}, as {named[name]} is: sizes differ by forget, "
                    "max_forget or forget_authors"
                )
            named[name] = f"{changes}"
        if self.launch and processes_of(self.launch) is None:
            for where, flags in {"teach": self.teach, "unlearn": self.unlearn, **self.objectives}.items():
                if any(name in (flags or {}) for name in _EPOCHS):
                    raise ValueError(
                        f"launch ({self.launch}) does not say how many processes train, and the epochs of {where} are "
                        "steps of them all: give --nproc_per_node (torchrun), --num_processes (accelerate) or "
                        "--num_gpus (deepspeed) as a number, or max_steps and warmup_steps"
                    )
        if self.match_at is not None and not (isinstance(self.match_at, (int, float)) and math.isfinite(self.match_at)):
            raise ValueError(f"match_at is {self.match_at!r}; give a forget NLL")

    def with_size(self, changes: Mapping[str, Any]) -> Data:
        """The data with another forget set."""
        return _built(Data, {**{f.name: getattr(self.data, f.name) for f in fields(Data)}, **changes}, "sizes.data")


def processes_of(launch: str | None) -> int | None:
    """How many processes the words in front of a training start; None where they do not say.

    >>> processes_of("torchrun --nnodes=2 --nproc_per_node 4"), processes_of("accelerate launch"), processes_of(None)
    (8, None, 1)
    """
    if launch is None:
        return 1
    try:
        entries = shlex.split(launch)
    except ValueError as error:
        raise ValueError(f"launch is {launch!r}: {error}") from None
    words = [word.replace("-", "_").lstrip("_") for entry in entries for word in entry.split("=", 1)]
    values = dict(zip(words, words[1:], strict=False))
    of_node = next((values[key] for key in ("nproc_per_node", "num_processes", "num_gpus") if key in values), "")
    # accelerate's number is that of all machines
    nodes = "1" if "num_processes" in values else values.get("nnodes", values.get("num_nodes", "1"))
    return int(of_node) * int(nodes) if of_node.isdecimal() and nodes.isdecimal() else None


def load_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of this package, or of a file, with `key.key=value` changes over it.

    Errors: FileNotFoundError, with a suggestion, for none of that name; ValueError, naming key or value, for one that
    no recipe has.
    """
    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{ALIASES.get(name, name)}.yaml"
    if not path.is_file():
        known = sorted(entry.stem for entry in FOLDER.glob("*.yaml"))
        raise FileNotFoundError(
            f"there is no recipe {name}{did_you_mean(name, [*known, *ALIASES]) or ':'} the recipes are "
            f"{', '.join(known)}, or give a file that ends with .yaml"
        )
    values = read_yaml_file(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} should map names to values, as in `seeds: [0, 1]`")
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} should read key=value, as in seeds=[0,1] or unlearn.max_steps=10")
        if sum(other.partition("=")[0] == key for other in changes) > 1:
            raise ValueError(f"{key} is changed twice on the command line: leave one out")
        try:
            _change(values, key.split("."), read_yaml(text))
        except yaml.YAMLError as error:
            raise ValueError(
                f"{change!r}: the value is not valid YAML ({' '.join(str(error).split())[:100]})"
            ) from error
    try:
        return build(values)
    except ValueError as error:
        raise ValueError(f"{path.name}: {str(error).removeprefix('gfast: ')}") from error


def _change(values: dict[str, Any], keys: list[str], value: Any) -> None:
    if keys == ["objectives"] and isinstance(value, list):
        for name in value:
            _choose("objectives", name, values["objectives"])
        values["figures"] = {t: [n for n in names if n in value] for t, names in (values.get("figures") or {}).items()}
        values["figures"] = {title: names for title, names in values["figures"].items() if names}
        value = {name: values["objectives"][name] for name in value}
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


def build(values: Mapping[str, Any]) -> Recipe:
    """A recipe from what its YAML holds; ValueError that names the key and suggests one."""
    values = copy.deepcopy(dict(values))
    parts = {"load": Load, "data": Data, "evaluate": Evaluated, "calibrate": Calibration, "grid": Grid, "sizes": Sizes}
    for key, kind in parts.items():
        if values.get(key) is not None:
            values[key] = _built(kind, values[key], key)
        elif key not in _NULLABLE:
            values.pop(key, None)
    for key in ("teach", "unlearn"):
        if values.get(key) is not None:
            _check_flags(values[key], key)
        elif key not in _NULLABLE:
            values.pop(key, None)
    if "objectives" in values:
        values["objectives"] = {
            str(name): objective_flags(entry, f"objectives.{name}")
            for name, entry in _mapping(values, "objectives").items()
        }
    if values.get("figures"):
        values["figures"] = {title: tuple(names) for title, names in _mapping(values, "figures").items()}
    return _built(Recipe, {key: value for key, value in values.items() if value is not None or key in _NULLABLE}, "")


def objective_flags(entry: Any, where: str) -> dict[str, Any]:
    """An objective as flags of `gfast unlearn`."""
    flags = {"objective": entry} if isinstance(entry, str) else entry
    if not isinstance(flags, dict) or not isinstance(flags.get("objective"), str):
        raise ValueError(f"{where} should be an objective, as in WGA:alpha=0.5, or a mapping with objective")
    _check_flags({key: value for key, value in flags.items() if key != "objective"}, where)
    objective = parse_objective(flags["objective"])
    values = {entry.name: getattr(objective, entry.name) for entry in fields(objective)}
    arguments = [f"{name}={value!r}" for name, value in values.items()]
    return {**flags, "objective": type(objective).__name__, **({"objective_args": arguments} if arguments else {})}


def _check_flags(flags: Any, where: str) -> None:
    if not isinstance(flags, dict):
        raise ValueError(f"{where} should map flags of gfast unlearn to values, as in learning_rate: 1e-5")
    known = {entry.name for kind in (ModelArguments, DataArguments, UnlearnConfig) for entry in fields(kind)}
    for name in flags:
        if name in _OWN_FLAGS or (name == "objective" and where in ("teach", "unlearn")):
            raise ValueError(f"{where}.{name} is said elsewhere: {_OWN_FLAGS.get(name, 'objectives')}")
        if name in _EPOCHS and flags[name] is not None:
            if not 0 < _number(str(flags[name]), f"{where}.{name}") < math.inf:
                raise ValueError(f"{where}.{name} is {flags[name]!r}; give passes over the data, above 0")
        if name not in known and name not in _EPOCHS:
            meant = did_you_mean(str(name), [*known, *_EPOCHS])
            raise ValueError(f"there is no flag {where}.{name}{meant} (gfast unlearn --help_all lists them)")


def _built(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where} should map names to values")
    known = {entry.name: entry for entry in fields(kind)}
    dot = f"{where}." if where else ""
    for name in values:
        if name not in known:
            raise ValueError(
                f"there is no key {dot}{name}{did_you_mean(str(name), known)} (known are {', '.join(known)})"
            )
    for name, entry in known.items():
        if name not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"the key {dot}{name} is missing")
    made = {}
    for name, value in values.items():
        several = str(known[name].type).startswith("tuple")
        if several and not isinstance(value, (list, tuple)):
            raise ValueError(f"{dot}{name} should be a list, got {value!r}")
        if str(known[name].type).partition(" ")[0] in ("int", "float") and isinstance(value, str):
            value = _number(value, f"{dot}{name}")  # YAML reads 1e-5 as text
        _check_kind(str(known[name].type), value, f"{dot}{name}")
        made[name] = tuple(value) if several else value
    return kind(**made)


# How a field's type is written -> what a value of it is, in YAML and in words.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "text"),
    "dict": ((dict,), "a mapping"),
    "tuple": ((list, tuple), "a list"),
    "None": ((type(None),), "null"),
}


def _check_kind(annotation: str, value: Any, where: str) -> None:
    """ValueError for a value that is none of a field's type; parts of a recipe are checked by themselves."""
    options = [option.partition("[") for option in annotation.split(" | ")]
    if any(base not in _KINDS for base, *_ in options):
        return
    for base, _, inside in options:
        if isinstance(value, _KINDS[base][0]) and (base == "bool" or not isinstance(value, bool)):
            for at, entry in enumerate(value if base == "tuple" else ()):
                _check_kind(inside.partition(",")[0].partition("[")[0], entry, f"{where}[{at}]")
            return
    expected = " or ".join(_KINDS[base][1] for base, *_ in options)
    raise ValueError(f"{where} is {value!r:.80}, and should be {expected}")


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where} is {text!r}, and should be a number") from None


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(values[key], dict):
        raise ValueError(f"{key} should map names to values")
    return values[key]
