# SPDX-License-Identifier: Apache-2.0
"""`gfast unlearn`: train a model to forget, with any objective.

All flags of transformers' TrainingArguments work, and a YAML file with their names (`--config`), which flags override.

    gfast unlearn --model ORIGINAL --forget forget01 --retain retain99 --objective WGA:alpha=0.5 \
        --retain_term nll --geffect_every 10 --output_dir run

A model that has never seen the data is first taught it: `--objective NLL --retain_term nll` minimises the negative
log-likelihood of both sets. The same command started again goes on from the last complete checkpoint; a folder that
holds another run is refused.

`--lora_r 4` trains LoRA adapters, and the run folder then holds those. `--model ADAPTER` (such a run folder, a
checkpoint of it or one on the hub) goes on with that adapter; `--lora_r` over it is refused.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed
from transformers.trainer_pt_utils import AcceleratorConfig

from gfast import peft_models
from gfast.commands.arguments import AlongArguments, CommandParser, DataArguments, ModelArguments
from gfast.commands.common import (
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
from gfast.commands.models import check_model, load_tokenizer, refuse_over_model, require_original
from gfast.commands.shards import Shards
from gfast.data import ForgetRetain, ForgetRetainCollator
from gfast.errors import NotFinite
from gfast.files import MANIFEST, read_json, require_writable, write_json, write_manifest
from gfast.geffect.data import OWN_DATA
from gfast.locks import claimed
from gfast.objectives import Mix
from gfast.training.along import in_own_precision, measurements
from gfast.training.batches import needed_from_cache
from gfast.training.clock import Clock
from gfast.training.config import UnlearnConfig
from gfast.training.conflict import check_weights
from gfast.training.joint import refuse_joint
from gfast.training.live import check_live, measured_live
from gfast.training.options import refuse_ignored_with_data, refuse_no_step
from gfast.training.precision import of_training
from gfast.training.processes import together
from gfast.training.progress import Progress
from gfast.training.records import DIVERGED, check_run_folder, write_diverged, write_run_info
from gfast.training.reference import ReferenceCache
from gfast.training.resume import checkpoint_to_resume, room_for
from gfast.training.sharded_start import ShardedStart
from gfast.training.stop import QUANTITIES, StopCallback, parse_rules, require_measured
from gfast.training.trajectory import Trajectory, callbacks_of

# Of TrainingArguments, what decides the course of a run: with these equal it is the same run.
DECISIVE = (
    "objective objective_args retain_term gamma alpha groups geffect_every geffect_samples nll_every stop "
    "geffect_live geffect_live_unlearn geffect_live_update surgery record_every learning_rate "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio weight_decay "
    "adam_beta1 adam_beta2 adam_epsilon optim optim_args max_grad_norm num_train_epochs max_steps "
    "per_device_train_batch_size gradient_accumulation_steps seed data_seed bf16 fp16 gradient_checkpointing "
    "neftune_noise_alpha dataloader_drop_last reference own_loss_terms joint_forward weights weights_every weights_tau "
    "train_sampling_strategy group_by_length auto_find_batch_size optim_target_modules "
    "accelerator_config"
).split()
# Of TrainingArguments, what `--help` shows.
SHOWN = (
    "output_dir learning_rate lr_scheduler_type warmup_steps weight_decay optim max_grad_norm num_train_epochs "
    "max_steps "
    "per_device_train_batch_size gradient_accumulation_steps seed bf16 gradient_checkpointing save_strategy save_steps "
    "save_total_limit logging_steps resume_from_checkpoint use_cpu report_to"
).split()


# Of TrainingArguments, what the command has no use for, unless it is as it was.
WITHOUT_EVALUATION = (
    "eval_strategy eval_on_start load_best_model_at_end do_eval do_predict eval_steps eval_delay "
    "eval_accumulation_steps metric_for_best_model greater_is_better prediction_loss_only bf16_full_eval fp16_full_eval"
).split()


def main(argv: Sequence[str] | None = None) -> int:
    return run(*parsed(argv), list(sys.argv[1:] if argv is None else argv))


def parsed(argv: Sequence[str] | None) -> tuple[ModelArguments, DataArguments, AlongArguments, UnlearnConfig]:
    """The flags; their errors come before any work."""
    hidden = [entry.name for entry in fields(TrainingArguments) if entry.name not in SHOWN]
    parser = CommandParser(
        [ModelArguments, DataArguments, AlongArguments, UnlearnConfig],
        "gfast unlearn",
        "Train a model to forget, with any objective; every flag of transformers' TrainingArguments works too.",
        hidden=hidden,
    )
    parser.set_defaults(disable_tqdm=not sys.stderr.isatty())  # a bar in a log file is one endless line
    return parser.parse(argv)


def run(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    along: AlongArguments,
    config: UnlearnConfig,
    argv: list[str],
) -> int:
    show_log()
    for name in WITHOUT_EVALUATION:
        if getattr(config, name) not in (False, "no", None):
            raise ValueError(
                f"--{name} has no use here: gfast unlearn has no evaluation set. --nll_every records the NLL of both "
                "sides along the run, --geffect_every their G-effect too, --evaluate_every asks what gfast evaluate "
                "asks; UnlearnTrainer in Python takes an eval_dataset"
            )
    if getattr(config, "overwrite_output_dir", False):
        raise ValueError(f"--overwrite_output_dir has no use here: delete {config.output_dir}, or give another folder")
    folder = require_writable(config.output_dir, model=True)
    with contextlib.ExitStack() as stack:
        main = config.process_index == 0
        together((lambda: stack.enter_context(claimed(folder))) if main else None, config.world_size)
        return _train(model_arguments, data_arguments, along, config, argv, folder)


def _train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    along: AlongArguments,
    config: UnlearnConfig,
    argv: list[str],
    folder: Path,
) -> int:
    objective = config.build_objective()
    mix = objective if isinstance(objective, Mix) else Mix(objective)
    check_refusals(data_arguments, [mix.forget])
    require_measured(parse_rules(config.stop), _measured(config, mix))
    need_retain = mix.retain is not None or config.geffect_every > 0 or config.nll_every > 0 or config.live
    rows = load_rows(data_arguments, need_retain)
    info = describe(model_arguments, data_arguments, along, config, rows, argv)
    shards = Shards(config)
    known = shards.of_main(lambda: check_run_folder(folder, info))
    if not known:
        shards.of_main(lambda: refuse_over_model(folder))
    if known and shards.of_main((folder / "result.json").exists):
        done = shards.of_main(lambda: read_json(folder / "result.json"))
        why = f" (it was ended by its {done['stopped']})" if done.get("stopped") else ""
        say(f"This run is finished: {done['steps']} steps{why}, model and records in {folder}")
        return 0
    checkpoint = _checkpoint(config, folder)
    model_config = check_model(model_arguments)
    if config.reference == "auto":
        require_original(model_arguments, (mix.forget, mix.retain), "--reference adapted", "--reference base")
    tokenizer = load_tokenizer(model_arguments)
    seed = config.seed if config.data_seed is None else config.data_seed  # of what is drawn among the data
    sides = Sides(rows, tokenizer, data_arguments, seed, today=first_day(folder, info))
    _refuse_what_the_trainer_would(mix, sides, config)
    evaluations = _evaluations(along, data_arguments, sides, config)
    kept = f"{len(rows.retain)} retain rows" if need_retain else "the retain set has no part: no --retain_term"
    say(f"Data: {len(rows.forget)} forget rows, {kept}")
    set_seed(config.seed)
    model = shards.load(model_arguments, model_config)
    sides.fit(model)

    # The model as it starts and what it reads, which a run goes on with.
    print_of_model = shards.fingerprint(model, peft_models.is_adapted(model))
    info |= {"model_fingerprint": print_of_model, "tokens_sha256": sides.checksums(mix.forget)}
    shards.of_main(lambda: write_run_info(folder, info | {"device": device_name(config.device)}))
    build = ReferenceCache.build if shards.kind is None else partial(shards.reference, checkpoint=checkpoint)
    references = _references(model, mix, sides, data_arguments, config, folder, build)
    data = sides.of(mix.forget)
    collator: Any = sides.collator
    if mix.retain is not None or config.live:
        data, collator = _paired(data, sides.retain, seed), ForgetRetainCollator(sides.collator)
    from gfast.training.trainer import UnlearnTrainer  # seconds of import, which errors of the flags do without

    callbacks: list[Any] = [] if shards.kind is None else [ShardedStart(list(references.values()))]
    callbacks += [*_measurements(objective, mix, sides, references, config, model), *evaluations]
    if not sys.stderr.isatty():  # where transformers' bar would be one endless line
        callbacks.append(Progress(str(objective)))
    trainer = UnlearnTrainer(
        model,
        config,
        objective=objective,
        references=references,
        train_dataset=data,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    shards.check(trainer)
    trainer.add_callback(clock := Clock())
    _train_to_the_end(trainer, shards, folder, checkpoint)
    _save(trainer, shards, folder, clock, str(objective))
    return 0


def _measured(config: UnlearnConfig, mix: Mix) -> set[str]:
    """What rules of --stop can be about."""
    nll = {name for name in QUANTITIES if name.endswith("_nll")}
    measured = set(QUANTITIES) if config.geffect_every else nll if config.nll_every else set()
    if config.live and config.record_every:
        apart = config.own_loss_terms or config.weights != "none"
        measured |= measured_live(mix.forget, config.geffect_live_unlearn, apart)
    return measured


def _train_to_the_end(trainer: Any, shards: Shards, folder: Path, checkpoint: Path | None) -> None:
    """From a checkpoint, if there is one. A run that diverges leaves word of it, and an interrupted one says how far it
    has come.
    """
    if checkpoint is not None:
        say(f"Resuming from {checkpoint}")
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_saved_so_far(folder, trainer.state.global_step)) from None
    except NotFinite as error:
        if shards.main:
            write_diverged(folder, trainer.state.global_step, str(error))
        raise


def _save(trainer: Any, shards: Shards, folder: Path, clock: Clock, objective: str) -> None:
    """The trained model, and what its run came to."""
    main, steps = trainer.is_world_process_zero(), trainer.state.global_step
    last = trainer.terms.of_last_step(trainer.accelerator).get("loss", 0.0)  # Trainer's log leaves NaN out
    if main:
        (folder / MANIFEST).unlink(missing_ok=True)  # of a model that this one replaces
        (folder / DIVERGED).unlink(missing_ok=True)
    shards.gather_when_saved(trainer)
    with room_for(folder, "the run goes on from its last checkpoint"):
        trainer.save_model()
    callbacks = callbacks_of(trainer)
    result = {
        "steps": steps,
        "train_loss": _mean_loss(trainer.state.log_history) if math.isfinite(last) else None,
        "seconds": clock.seconds,
        "measuring_seconds": clock.measuring(callbacks),
        "objective": objective,
        "stopped": next((callback.reason for callback in callbacks if isinstance(callback, StopCallback)), None),
    }
    if main:
        write_manifest(folder, deep=False)
        write_json(folder / "result.json", result)
        if not math.isfinite(last):
            say(f"WARNING: the loss of the last step is {last}: the run has diverged, and its model with it")
        say(f"Finished {steps} steps. Model and records: {folder}. Figures: gfast report {folder}")


def describe(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    along: AlongArguments,
    config: UnlearnConfig,
    rows: Any,
    argv: list[str],
) -> dict[str, Any]:
    """run.json: what the run is. `config` in it decides whether another start is the same run."""
    # Without what came later, as long as it is not used, so that older runs can be resumed.
    unused = {"reference": "auto", "own_loss_terms": False, "nll_every": 0, "stop": None, "joint_forward": False}
    unused |= {"geffect_live": False, "geffect_live_unlearn": False, "geffect_live_update": False, "surgery": None}
    unused |= {"weights": "none", "weights_every": 50, "weights_tau": 1.0}
    unused |= {"train_sampling_strategy": "random", "group_by_length": False, "auto_find_batch_size": False}
    unused |= {"optim_target_modules": None, "accelerator_config": {}}
    given, usual = config.to_dict(), AcceleratorConfig().to_dict()
    given["accelerator_config"] = {k: v for k, v in given["accelerator_config"].items() if v != usual[k]}
    settings = {
        name: value
        for name, value in given.items()
        if name in DECISIVE and not (name in unused and value == unused[name])
    }
    # Whether code may run does not decide what a run is, nor does a base that the adapter names itself.
    model = {
        name: value
        for name, value in asdict(model_arguments).items()
        if name != "trust_remote_code" and (name, value) != ("base_model", None)
    }
    info = run_info("unlearn", model_arguments.model, data_arguments, rows, argv)
    asked = {name: value for name, value in asdict(along).items() if value}
    if config.world_size > 1:  # which each take a batch a step
        asked["processes"] = config.world_size
    config_of_run = {**settings, **asked, **model, **data_arguments.settings(), "samples": info["samples"]}
    info |= {"objective": str(config.build_objective()), "seed": config.seed, "config": config_of_run}
    return as_text(info)


def _paired(forget: Any, retain: Any, seed: int = 0) -> ForgetRetain:
    """Without its warning of texts in both sets: the rows have been looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ForgetRetain(forget, retain, seed=seed)


def _refuse_what_the_trainer_would(mix: Mix, sides: Sides, config: UnlearnConfig) -> None:
    """Its errors of flags and data, which would come once the model is loaded and its reference has been computed."""
    nested = mix.retain is not None or config.live
    refuse_no_step(config, sides.forget)
    refuse_ignored_with_data(config, _paired(sides.forget, sides.retain) if nested else sides.forget)
    if config.weights != "none":
        numbers = config.weights_tau, config.weights_every
        check_weights(config.weights, mix.forget, *numbers, config.own_loss_terms)
    if config.joint_forward:
        refuse_joint(
            [objective for objective in (mix.forget, mix.retain) if objective is not None],
            config.own_loss_terms,
            config.live,
        )
    if config.live:
        check_live(mix, config.geffect_live_unlearn)


def _checkpoint(config: UnlearnConfig, folder: Path) -> Path | None:
    """The checkpoint to go on from: the one that was named, else the newest complete one of this run."""
    asked = config.resume_from_checkpoint
    if asked is None or str(asked).lower() in ("true", "last", "auto", "1"):
        return checkpoint_to_resume(folder)
    if str(asked).lower() in ("false", "none", "0"):
        return None
    if not (Path(asked) / "trainer_state.json").is_file():
        raise ValueError(f"{asked} is not a complete checkpoint: it has no trainer_state.json")
    return Path(asked)


def _references(
    model: Any, mix: Mix, sides: Sides, data_arguments: DataArguments, config: UnlearnConfig, folder: Path, build: Any
) -> dict[str, Any]:
    where = Path(data_arguments.reference_cache or folder / "reference")
    caches = {}
    for side, objective in (("forget", mix.forget), ("retain", mix.retain)):
        if objective is None:
            continue
        # With adapters the original is at hand, and hidden states of a large retain set would fill the disk. What a
        # G-effect measures by batches has to have those of a layer.
        what = needed_from_cache(objective)
        measured = config.geffect_every and "layer_hidden" in what
        if (
            peft_models.is_adapted(model)
            and config.reference != "adapted"
            and what != {"logp"}
            and not data_arguments.reference_cache
            and not measured
        ):
            # A step finds log-probs by itself, as it does hidden states; a measurement is given them.
            what = what & {"logp"} if config.geffect_every else set()
        if not what:
            continue
        size = config.per_device_eval_batch_size
        options = dict(reference=config.reference, build=build, mixed_precision=of_training(config))
        cache = sides.reference(model, [objective], side, where, size, what=what, **options)
        if cache is not None:
            caches[side] = cache
    return caches


def _measurements(
    objective: Any, mix: Mix, sides: Sides, references: dict[str, Any], config: UnlearnConfig, model: Any
) -> list[Trajectory]:
    """The callbacks that measure along the run; all on the same batches."""
    if not config.geffect_every and not config.nll_every:
        return []
    forget_data = sides.of(mix.forget) if mix.forget.needs & OWN_DATA else None
    collators = (sides.collator, sides.collator)
    items = {"forget": sides.forget if forget_data is None else forget_data, "retain": sides.retain}
    references = in_own_precision(references, model, items, collators, config)
    return measurements(config, objective, sides.forget, sides.retain, collators, references, forget_data)


def _evaluations(along: AlongArguments, data: DataArguments, sides: Sides, config: UnlearnConfig) -> list[Any]:
    """The callback that evaluates along the run, if it is wanted; errors of its data come before any model."""
    if not along.evaluate_every:
        return []
    from gfast.evaluation import EvaluateCallback, sources

    limits = dict(max_forget=data.max_forget, max_retain=data.max_retain)
    sets = sources.trained(data.data, data.forget, data.retain, data.data_path, along.evaluate_rows, **limits)
    return [
        EvaluateCallback(
            along.evaluate_every,
            sets,
            sides.tokenizer,
            batch_size=config.per_device_eval_batch_size,
            template=data.template,
            chat_kwargs=sides.chat_kwargs,
        )
    ]


def _mean_loss(log: list[dict[str, Any]]) -> float | None:
    """Of all steps that were logged. Trainer's own mean is of a run's last start, divided by the steps of all."""
    total, before = 0.0, 0
    for entry in log:
        if "loss" in entry:  # the mean since the entry before
            total, before = total + entry["loss"] * (entry["step"] - before), entry["step"]
    return total / before if before else None


def _saved_so_far(folder: Path, step: int) -> str:
    checkpoint = checkpoint_to_resume(folder)
    saved = f"checkpoint {checkpoint}" if checkpoint else "no checkpoint yet (see --save_steps)"
    start = "goes on from there" if checkpoint else "starts again from step 0"
    return (
        f"Interrupted after step {step}. Saved: all records up to that step in {folder / 'records'}; {saved}. "
        f"The same command {start}; no recorded step is lost or doubled."
    )
