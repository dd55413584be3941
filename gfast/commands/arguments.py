# SPDX-License-Identifier: Apache-2.0
"""Flags of the commands as dataclasses, read by transformers' HfArgumentParser from flags and a YAML file."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg, string_to_bool

from gfast.commands.parser import OneLineErrors, Parser
from gfast.data.tofu import COMPLEMENTS
from gfast.words import did_you_mean
from gfast.yaml_text import read_yaml_file

DTYPES = ("auto", "float32", "bfloat16", "float16")
SOURCES = ("tofu", "jsonl", "bundled")


@dataclass
class ModelArguments:
    """Which model to work on."""

    _argument_group_name = "model"

    model: str | None = HfArg(
        default=None,
        help="The original model: a name on the hub or a local folder; or a PEFT adapter, such as the folder "
        "of a LoRA run. Required.",
    )
    base_model: str | None = HfArg(
        default=None, help="Of an adapter: the model it sits on; that of its adapter_config.json if not given."
    )
    tokenizer: str | None = HfArg(default=None, help="Its tokenizer; the model's own if not given.")
    dtype: str = HfArg(default="float32", help="Precision of the parameters.", metadata={"choices": DTYPES})
    attn_implementation: str | None = HfArg(
        default=None, help="Attention of transformers: sdpa, eager, flash_attention_2."
    )
    trust_remote_code: bool = HfArg(default=False, help="Run Python code that the model or its tokenizer brings along.")
    gguf_file: str | None = HfArg(default=None, help="The GGUF file in the model's folder to load from.")
    lora_r: int = HfArg(default=0, help="Put new LoRA adapters of this rank over the model; 0: none.")
    lora_alpha: int = HfArg(default=16, help="Scale of the LoRA adapters.")
    lora_targets: list[str] | None = HfArg(
        default=None, help="Modules that get an adapter; all linear layers if not given."
    )

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("no model given: --model NAME_OR_FOLDER")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.lora_r < 0:
            raise ValueError(f"lora_r is {self.lora_r}; give 0 (no new adapters) or a rank")
        if self.lora_r and self.lora_alpha < 1:
            raise ValueError(f"lora_alpha is {self.lora_alpha}, with which adapters change nothing; give 1 or more")
        if not self.lora_r and (self.lora_targets or self.lora_alpha != ModelArguments.lora_alpha):
            raise ValueError("lora_alpha and lora_targets are for new LoRA adapters: give their rank with --lora_r")


@dataclass
class DataArguments:
    """Which data to forget and to retain."""

    _argument_group_name = "data"

    data: str = HfArg(
        default="tofu",
        help="tofu (forget and retain are its configurations), jsonl (they are files of question/answer lines) "
        "or bundled (a small set of fictitious authors).",
        metadata={"choices": SOURCES},
    )
    data_path: str | None = HfArg(
        default=None, help="Local folder with the TOFU or JSON lines files; without it TOFU comes from the hub."
    )
    forget: str = HfArg(default="forget01", help="The forget set: TOFU configuration or JSON lines file.")
    retain: str | None = HfArg(
        default=None,
        help="The retain set: TOFU configuration (if not given, what is left without the forget set: retain99 "
        "of forget01) or JSON lines file.",
    )
    max_forget: int = HfArg(default=0, help="Use only the first so many forget rows; 0: all.")
    max_retain: int = HfArg(default=0, help="Use only the first so many retain rows; 0: all.")
    max_length: int = HfArg(default=512, help="Longest sample in tokens; longer answers are cut.")
    template: str = HfArg(default="auto", help="Prompt format: chat, plain, or auto (chat if the tokenizer has one).")
    chat_kwargs: list[str] | None = HfArg(
        default=None,
        help="Options of the chat template, as name=value or JSON (enable_thinking=false); in YAML a mapping "
        "will do. strftime_now=2026-03-01 is the date of a template that writes today's; without it the day of the "
        "run's first start.",
    )
    refusals: str | None = HfArg(
        default=None, help="File of refusal lines for PO and DPO; a bundled list if not given."
    )
    reference_cache: str | None = HfArg(
        default=None, help="Folder to keep the original model's values in; OUTPUT_DIR/reference if not given."
    )

    def __post_init__(self) -> None:
        if self.data not in SOURCES:
            raise ValueError(f"data is {self.data!r}; choose one of {', '.join(SOURCES)}")
        if self.data == "bundled":
            named = {"data_path": None, "retain": None, "forget": type(self).forget}
            for name, default in named.items():
                if getattr(self, name) != default:
                    raise ValueError(f"--{name} has no use with the data bundled, which have their own two sets")
        if self.retain is None and self.data != "jsonl":
            self.retain = COMPLEMENTS.get(self.forget.removesuffix("_perturbed"), COMPLEMENTS["forget01"])
        for name in ("max_forget", "max_retain"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number of rows, or 0 for all")
        self.chat_kwargs = parse_options(self.chat_kwargs)

    def settings(self) -> dict[str, Any]:
        """What decides the data, for run.json: not where they lie. Without options of the chat template the same as
        before there were any, so that older runs can be resumed."""
        unneeded = {"reference_cache", "data_path"} | (set() if self.chat_kwargs else {"chat_kwargs"})
        return {name: value for name, value in asdict(self).items() if name not in unneeded}


def parse_options(options: Mapping[str, Any] | Sequence[str] | str | None) -> dict[str, Any]:
    """Options of a chat template from name=value words, JSON or a mapping, as YAML gives.

    >>> parse_options(["enable_thinking=False", "date_string=26 Jul 2024"]), parse_options('{"n": 1}')
    ({'enable_thinking': False, 'date_string': '26 Jul 2024'}, {'n': 1})
    """
    if isinstance(options, str):
        options = [options]
    if not isinstance(options, Mapping):
        words, options = list(options or []), {}
        for word in words:
            name, equals, value = str(word).partition("=")
            if str(word).lstrip().startswith("{"):
                options.update(_json_object(word))
            elif equals and name.isidentifier():
                options[name] = _value(value)
            else:
                raise ValueError(f"chat_kwargs {word!r} should read name=value or be JSON, as in enable_thinking=false")
    # YAML reads 2026-03-01 as a date.
    return {str(n): v.isoformat() if isinstance(v, datetime.date) else v for n, v in options.items()}


def _json_object(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise ValueError(f"chat_kwargs {text!r} is not valid JSON ({error})") from None


def _value(text: str) -> Any:
    # As JSON reads it, and True, False and None as Python writes them: the text "False" would be true in a template.
    try:
        parsed = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text
    # 1.10 and 1e5 as they were written: a template prints them.
    return text if isinstance(parsed, float) or str(parsed) != text and type(parsed) is int else parsed


class CommandParser(OneLineErrors, HfArgumentParser):
    """HfArgumentParser with short help, one-line errors, and a YAML file whose values flags override."""

    def __init__(self, types: Sequence[type], prog: str, description: str, hidden: Sequence[str] = ()) -> None:
        super().__init__(list(types), prog=prog, description=description, usage=f"{prog} [options]", allow_abbrev=False)
        self._hidden = frozenset(hidden)
        # Of TrainingArguments, what takes a mapping: JSON in a flag, a mapping in a YAML file. Importing them takes
        # seconds, so only a command that has them in its types does.
        self._mappings = [name for kind in types for name in getattr(kind, "_VALID_DICT_FIELDS", ())]
        self.add_argument("--config", metavar="FILE.yaml", help="Settings by name in YAML; flags override them.")
        self.add_argument("--help_all", action="store_true", help="Show every flag, those of TrainingArguments too.")

    def parse(self, argv: Sequence[str] | None) -> tuple[Any, ...]:
        """The dataclasses, from `argv` over the file of --config over the defaults."""
        first = Parser(add_help=False, prog=self.prog)
        first.add_argument("--config")
        first.add_argument("--help_all", action="store_true")
        known, rest = first.parse_known_args(argv)
        if known.help_all:
            self.print_help()
            raise SystemExit(0)
        if known.config is not None:
            self.set_defaults(**self._from_yaml(Path(known.config)))
        if {"-h", "--help"} & set(rest):
            self._shorten()
        # First of all: what is missing may be what was mistyped.
        given, unknown = self.parse_known_args(rest)
        self.refuse_unknown(unknown)
        self.refuse_twice(sys.argv[1:] if argv is None else argv)
        for name in self._mappings:
            self._require_json(name, getattr(given, name, None))
        *parsed, _ = self.parse_args_into_dataclasses(rest, look_for_args_file=False)
        return tuple(parsed)

    def _require_json(self, name: str, value: Any) -> None:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                json.loads(value)
            except json.JSONDecodeError as error:
                self.error(f"argument --{name}: {value!r} is not valid JSON: {error}")

    def _shorten(self) -> None:
        """One spelling a flag, short values, and our own settings before those of TrainingArguments."""
        inherited = set()
        if self._mappings:
            from transformers import TrainingArguments

            inherited = {entry.name for entry in fields(TrainingArguments)} - {"output_dir"}
        for action in self._actions:
            if action.dest in self._hidden or action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS
            elif action.dest not in ("help", "config"):
                action.option_strings = action.option_strings[:1]
                few = action.choices is not None and len(action.choices) <= 4
                action.metavar = "{" + ",".join(map(str, action.choices)) + "}" if few else "..."
        for group in self._action_groups:
            group._group_actions.sort(key=lambda action: action.dest in inherited)

    def _from_yaml(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            raise FileNotFoundError(f"there is no configuration file {path}")
        values = read_yaml_file(path)
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise ValueError(f"{path} should map names to values, as in `learning_rate: 1e-5`")
        known = {entry.name: entry for kind in self.dataclass_types for entry in fields(kind) if entry.init}
        for name in values:
            if name not in known:
                raise ValueError(
                    f"{path}: there is no setting {name}{did_you_mean(str(name), known)} (settings are named like the "
                    f"flags without --; {self.prog} --help lists them)"
                )
        try:
            return {name: self._as_flag(known[name], value) for name, value in values.items()}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _as_flag(self, entry: Any, value: Any) -> Any:
        """A value of the file as argparse would have it from a flag."""
        action = next(action for action in self._actions if action.dest == entry.name)
        several = action.nargs in ("+", "*")
        if value is None:
            if action.default is not None:
                raise ValueError(f"{entry.name} has no value; give one, or take the line out")
            return None
        if isinstance(value, dict) and entry.name in (*self._mappings, "objective_args", "chat_kwargs"):
            return value
        if isinstance(value, list) and several:
            return [_text(action, entry_of_list) for entry_of_list in value]
        if isinstance(value, (dict, list)):
            kind = "list" if isinstance(value, list) else "mapping"
            raise ValueError(f"{entry.name} takes {'a list' if several else 'one value'}, and not the {kind} {value}")
        if entry.name == "stop":
            return [str(value)]  # one rule, with blanks in it
        # As text, argparse converts and checks it like a flag: YAML reads 1e-5 as text, 1 as an integer, and no as
        # False.
        return str(value).split() if several else _text(action, value)


def _text(action: Any, value: Any) -> str:
    if isinstance(value, bool) and action.type is not string_to_bool:
        return "yes" if value else "no"
    return str(value)


@dataclass
class AlongArguments:
    """What is asked of the model along the run."""

    _argument_group_name = "evaluation"

    evaluate_every: int = HfArg(
        default=0,
        help="Evaluate (gfast evaluate) before training, every so many steps and at the end; 0: never. gfast "
        "report then has what the model keeps at equal forgetting.",
    )
    evaluate_rows: int = HfArg(default=0, help="Of the forget and retain sets only the first so many rows; 0: all.")

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "evaluate_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number, or 0")
        if self.evaluate_rows and not self.evaluate_every:
            raise ValueError("--evaluate_rows is of evaluations: give the steps between evaluations, --evaluate_every")
