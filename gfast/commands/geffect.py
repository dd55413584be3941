# SPDX-License-Identifier: Apache-2.0
"""`gfast geffect`: measure the G-effect of objectives on a model, without training.

    gfast geffect --model MODEL --forget forget01 --retain retain99 --objectives GA WGA:alpha=0.5 NPO:beta=0.1 \
        --reference_model ORIGINAL --output_dir effects

    gfast geffect --model MODEL --per token ...   # every token of every forget answer; or sample: every answer

Objectives that compare with the original model read it from `--reference_model`; without it the model is its own
reference, as at the first step of an unlearning run.

A model may be a PEFT adapter, such as the run folder of `gfast unlearn --lora_r 4`: the effect is then over the
adapter's parameters, as it was in training. What its original model is, `--reference_model` must say.

Several processes (`torchrun --nproc_per_node 2 -m gfast.cli geffect ...`) measure together, each a share of the data.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.hf_argparser import HfArg

from gfast.commands.arguments import CommandParser, DataArguments, ModelArguments
from gfast.commands.common import (
    REFUSED,
    Sides,
    as_text,
    check_refusals,
    device_name,
    first_day,
    load_rows,
    run_info,
    say,
    show_log,
)
from gfast.commands.models import check_model, load_model, load_reference, load_tokenizer, require_original
from gfast.data import fingerprint, token_pieces
from gfast.files import require_writable, write_json
from gfast.geffect import ENGINES
from gfast.objectives import Objective
from gfast.objectives.registry import parse_objective
from gfast.peft_models import is_adapted
from gfast.training.batches import first_batches
from gfast.training.evaluation import nll_of_sides
from gfast.training.fingerprints import model_fingerprint
from gfast.training.processes import together
from gfast.training.records import (
    check_run_folder,
    check_step_model,
    effect_file,
    run_name,
    token_texts_file,
    write_record,
    write_run_info,
    write_step_model,
)


@dataclass
class GEffectArguments:
    """What to measure."""

    _argument_group_name = "measurement"

    objectives: list[str] = HfArg(
        default_factory=lambda: ["GA"],
        help="Objectives, with parameters after a colon: GA WGA:alpha=0.5 SatImp:beta1=5,beta2=1.",
    )
    reference_model: str | None = HfArg(
        default=None, help="The original model (or adapter) for objectives that need it; the model itself if not given."
    )
    groups: str = HfArg(default="paper", help="Parameter groups: paper or layer.")
    per: str = HfArg(
        default="objective",
        help="objective, or sample or token: effects of each forget answer or of each of its tokens.",
    )
    engine: str = HfArg(
        default="auto", help="stream, sample, token or gram: one way of several to the same numbers; auto: stream."
    )
    norms: bool = HfArg(default=False, help="Measure cosines too; holds one more gradient.")
    batch_size: int = HfArg(default=8, help="Samples a forward pass; it changes results by rounding only.")
    device: str | None = HfArg(default=None, help="cpu, cuda, cuda:1; a GPU if there is one.")
    output_dir: str | None = HfArg(
        default=None, help="Run folder for records (Parquet), geffect.json; none: only print."
    )
    step: int = HfArg(default=0, help="The optimizer step to record the effect under, for series of models.")

    def __post_init__(self) -> None:
        if self.per not in ("objective", "sample", "token"):
            raise ValueError(f"per is {self.per!r}; choose objective, sample or token")
        if self.norms and self.per != "objective":
            raise ValueError(f"norms has no meaning with per {self.per}: only whole objectives have a gradient norm")
        if self.per != "objective" and self.engine not in ("auto", self.per):
            raise ValueError(f"engine has no meaning with per {self.per}: the {self.per} engine measures it")
        if self.engine not in ("auto", *ENGINES):
            raise ValueError(f"engine is {self.engine!r}; choose auto, {', '.join(ENGINES)}")
        if self.groups not in ("paper", "layer"):
            raise ValueError(f"groups is {self.groups!r}; choose paper or layer")
        if self.step < 0:
            raise ValueError(f"step is {self.step}; give 0 or more")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give 1 or more")


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        [ModelArguments, DataArguments, GEffectArguments],
        "gfast geffect",
        "Measure the G-effect of objectives on a model, by layer group, without training.",
    )
    model_arguments, data_arguments, arguments = parser.parse(argv)
    objectives = [parse_objective(text) for text in arguments.objectives]
    if arguments.per != "objective" and any(_kind(each) != "plain" for each in objectives):
        raise ValueError("DPO and PO have data of their own: --per sample and --per token look at the forget answers")
    check_refusals(data_arguments, objectives)
    device, rank, world = joined(arguments.device)
    if rank == 0:
        show_log()
    folder = None if arguments.output_dir is None else require_writable(arguments.output_dir)
    rows = load_rows(data_arguments)
    info = as_text(
        {
            "objectives": [str(objective) for objective in objectives],
            **run_info("geffect", model_arguments.model, data_arguments, rows, sys.argv[1:] if argv is None else argv),
            # A folder takes a series of models and steps, of the same data.
            "config": {"command": "geffect", "groups": arguments.groups, **data_arguments.settings()},
        }
    )
    if folder is not None:
        check_run_folder(folder, info)
    check_model(model_arguments)
    if arguments.reference_model is not None:
        check_model(model_arguments, arguments.reference_model)
    else:
        require_original(model_arguments, objectives, "--reference_model {name}", "--reference_model {base}")
    sides = Sides(rows, load_tokenizer(model_arguments), data_arguments, today=first_day(folder, info))
    model, batches, of_step = prepared(objectives, sides, model_arguments, data_arguments, arguments, device)
    measured = {"name": model_arguments.model, **of_step}
    if folder is not None:
        info |= {"tokens_sha256": sides.checksums()}
        check_run_folder(folder, info)
        measured = as_text(measured | {"fingerprint": model_fingerprint(model, adapters=True)})
        check_step_model(folder, arguments.step, measured)
    one_by_one = None
    if arguments.per == "objective":
        effects = by_objective(model, objectives, batches, arguments)
    else:
        one_by_one = by_part(model, batches, arguments)
        effects = [one_by_one.g_effect(each) for each in objectives] if arguments.per == "token" else []

    def show_and_write() -> None:
        if one_by_one is not None:
            print(in_words(one_by_one))
        for effect in effects:
            print(effect)
            if arguments.norms:
                print(cosines(effect))
        if folder is None:
            return
        risks = nll_of_sides(effects, model, batches["forget"], batches["retain"])
        write_run_info(folder, info | {"device": device_name(device)})
        write_step_model(folder, arguments.step, measured)
        if one_by_one is not None:
            one_by_one.to_parquet(effect_file(folder, arguments.per, arguments.step))
            write_json(token_texts_file(folder), {"samples": token_texts(sides, rows)})
        write_record(folder, _rows(objectives, effects, risks, folder, arguments.step))
        if effects:
            write_json(folder / "geffect.json", {"risk": risks, "effects": [effect.to_dict() for effect in effects]})
        say(f"Records and effects: {folder}")

    together(show_and_write if rank == 0 else None, world)
    return 0


def joined(device: str | None) -> tuple[torch.device, int, int]:
    """The device, and which process of how many this is: torchrun starts several, which measure together."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return usable_device(device), 0, 1
    if device is not None and device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: each of several processes takes a GPU of its own; give cuda or cpu")
    from accelerate import PartialState

    state = PartialState(cpu=usable_device(device).type == "cpu")
    return state.device, state.process_index, state.num_processes


def usable_device(name: str | None) -> torch.device:
    """The device of that name, or a GPU if there is one; ValueError before any work when it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the device {name!r} cannot be used here ({reason}); --device cpu always can") from error


def prepared(
    objectives: list[Objective],
    sides: Sides,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: GEffectArguments,
    device: torch.device,
) -> tuple[Any, dict[str, list[dict[str, Any]]], dict[str, str]]:
    """The model; the batches of both sets and of each kind of objective: plain, dpo, po; and checksums, by name, of the
    reference model and of sets that objectives have of their own.
    """
    kinds = {kind: [o for o in objectives if _kind(o) == kind] for kind in ("plain", *REFUSED)}
    cache_folder = None if data_arguments.reference_cache is None else Path(data_arguments.reference_cache)
    batch_size = arguments.batch_size
    first = arguments.reference_model
    model = (load_model(model_arguments) if first is None else load_reference(model_arguments, first)).to(device)
    sides.fit(model)
    caches = {
        kind: sides.reference(
            model, members, "forget", cache_folder, batch_size, "auto" if first is None else "adapted"
        )
        for kind, members in kinds.items()
        if members
    }
    of_step = {}
    if arguments.output_dir is not None:
        of_step = {
            f"set for {kind.upper()}": fingerprint(sides.of(kinds[kind][0])) for kind in caches if kind != "plain"
        }
        if any(caches.values()):  # of adapters that were not given, the model without
            adapters = first is not None and is_adapted(model)
            of_step["reference model"] = model_fingerprint(model, adapters=adapters)
    if arguments.reference_model is not None:
        # The two models are never in memory together.
        del model
        gc.collect()
        model = load_model(model_arguments).to(device)
        sides.fit(model)
    batches = {"retain": first_batches(sides.retain, sides.collator, None, 0, batch_size)}
    batches["forget"] = first_batches(sides.forget, sides.collator, None, 0, batch_size)
    for kind, cache in caches.items():
        batches[kind] = first_batches(sides.of(kinds[kind][0]), sides.collator, cache, 0, batch_size)
    return model, batches, of_step


def by_objective(
    model: Any, objectives: list[Objective], batches: dict[str, list[dict[str, Any]]], arguments: GEffectArguments
) -> list[Any]:
    """The effects in the order of the objectives."""
    from gfast.geffect import g_effect

    options = {"groups": arguments.groups, "engine": arguments.engine, "norms": arguments.norms or None}
    options["processes"] = "all"
    measured = {}
    for kind in ("plain", "dpo", "po"):
        members = [each for each in objectives if _kind(each) == kind]
        if not members:
            continue
        of_kind = batches[kind]
        extra = {"forget": of_kind} if kind == "plain" else {"forget": batches["forget"], "objective_batches": of_kind}
        effects = g_effect(model, members, retain=batches["retain"], progress=True, **extra, **options)
        measured.update(zip(members, effects, strict=True))
    return [measured[objective] for objective in objectives]


def by_part(model: Any, batches: dict[str, list[dict[str, Any]]], arguments: GEffectArguments) -> Any:
    """The effects of each forget answer, or of each of its tokens."""
    from gfast import geffect

    measure = geffect.pg_effect if arguments.per == "sample" else geffect.token_effect
    options = {"groups": arguments.groups, "progress": True, "processes": "all"}
    return measure(model, forget=batches["plain"], retain=batches["retain"], **options)


def cosines(effect: Any) -> str:
    """The cosines of an effect, in the columns of its groups."""
    groups = [*(effect.groups if len(effect.groups) <= 6 else []), "total"]
    lines = [
        f"{name:<8}" + "".join(f"{effect.cosine(side, group):>12.4g}" for group in groups)
        for name, side in (("cos unl.", "unlearn"), ("cos ret.", "retain"))
    ]
    return "\n".join(lines)


def in_words(effect: Any) -> str:
    """How the effects of answers or tokens are spread, in three lines."""
    lines = [f"Effects of {'answers' if effect.kind == 'sample' else 'answer tokens'} on {effect.risk}, all parameters"]
    for side in ("unlearn", "retain"):
        total = effect.total(side)
        values = torch.cat(total) if isinstance(total, list) else total[effect.tokens > 0]
        low, middle, high = torch.quantile(values, values.new_tensor([0.1, 0.5, 0.9])).tolist()
        below = float((values < 0).double().mean())
        lines.append(
            f"{side:<8} {len(values)} values, 10/50/90 %: {low:.4g} {middle:.4g} {high:.4g}; {below:.0%} below zero"
        )
    return "\n".join(lines)


def token_texts(sides: Sides, rows: Any) -> list[dict[str, Any]]:
    """The question and the pieces of the labelled answer of each forget row, for figures."""
    texts = []
    for row, item in zip(rows.forget, sides.forget, strict=True):
        labelled = [at for at, label in enumerate(item["labels"].tolist()) if label != -100 and at > 0]
        pieces = token_pieces(sides.tokenizer, item["input_ids"].tolist())
        texts.append({"question": row.get("question", ""), "pieces": [pieces[at] for at in labelled]})
    return texts


def _kind(objective: Objective) -> str:
    return objective.key if objective.key in REFUSED else "plain"


def _rows(
    objectives: list[Objective], effects: list[Any], risks: dict[str, float], folder: Path, step: int
) -> list[dict[str, Any]]:
    """Records of every objective: its effect, unless only samples were measured, and the risks."""
    rows = []
    for index, objective in enumerate(objectives):
        common = {"run": run_name(str(folder)), "objective": str(objective), "step": step, "epoch": 0.0}
        if effects:
            rows += [{**common, **row} for row in effects[index].rows()]
        rows += [{**common, "quantity": "risk", "side": side, "value": value} for side, value in risks.items()]
    return rows
