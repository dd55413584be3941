"""Every option of TrainingArguments and Trainer: it works with forget and retain batches, or is refused by name."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import fields
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.training_tiny import collator, config, datasets, pairing, parameters, tiny_model
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from gfast.objectives import DPO, GA, KL, NLL, RMU
from gfast.training.batches import as_dealt, to_device
from gfast.training.loss import GFastLossMixin
from gfast.training.options import refuse_ignored_options
from gfast.training.trainer import UnlearnTrainer

NAMES = {entry.name for entry in fields(TrainingArguments)}
V5 = hasattr(Trainer, "_track_num_input_tokens")

# Name -> a value that would have no effect. Of both supported major versions: what this one lacks is skipped.
REFUSED = {
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "include_for_metrics": ["inputs"],
    "include_inputs_for_metrics": True,
    "jit_mode_eval": True,
    "label_names": ["targets"],
    "label_smoothing_factor": 0.1,
    "past_index": 2,
    "remove_unused_columns": True,
    "torch_compile": True,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "torchdynamo": "eager",
    "use_legacy_prediction_loop": True,
    "use_liger_kernel": True,
}
REFUSED_ARGUMENTS = {
    "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
    "compute_metrics": lambda prediction: {"accuracy": 1.0},
    "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
}
# Refused with some data or in some setting, by the tests below.
DEPENDING = set(
    "train_sampling_strategy group_by_length length_column_name include_num_input_tokens_seen "
    "include_tokens_per_second average_tokens_across_devices parallelism_config liger_kernel_config".split()
)
# Shown to work by the tests below, or by those of training, resuming and several processes.
WORKS = set(
    "auto_find_batch_size neftune_noise_alpha gradient_checkpointing gradient_checkpointing_kwargs "
    "activation_checkpointing activation_checkpointing_kwargs load_best_model_at_end metric_for_best_model "
    "greater_is_better eval_strategy eval_on_start eval_accumulation_steps prediction_loss_only bf16 bf16_full_eval "
    "use_cache gradient_accumulation_steps per_device_train_batch_size per_device_eval_batch_size max_steps optim "
    "learning_rate lr_scheduler_type max_grad_norm seed use_cpu output_dir disable_tqdm save_strategy logging_steps "
    "logging_nan_inf_filter ddp_backend dataloader_persistent_workers dataloader_num_workers dataloader_drop_last "
    "report_to resume_from_checkpoint".split()
)
# Trainer's and Accelerate's own work, which neither batches nor losses reach: optimizers and schedules, logs, saving,
# the hub, data loader workers, devices and sharding, switches that only scripts read.
OWN = set(
    "num_train_epochs lr_scheduler_kwargs warmup_steps warmup_ratio optim_args weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon optim_target_modules adafactor fp16 fp16_full_eval fp16_opt_level fp16_backend tf32 "
    "half_precision_backend torch_empty_cache_steps logging_strategy logging_first_step logging_dir log_on_each_node "
    "log_level log_level_replica run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "eval_steps eval_delay save_only_model save_steps save_on_each_node save_total_limit save_safetensors "
    "enable_jit_checkpoint push_to_hub push_to_hub_model_id push_to_hub_organization push_to_hub_token hub_token "
    "hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision ignore_data_skip "
    "restore_callback_states_from_checkpoint full_determinism data_seed no_cuda use_mps_device use_ipex "
    "accelerator_config dataloader_pin_memory dataloader_prefetch_factor dataloader_multiprocessing_context "
    "dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
    "ddp_timeout fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap deepspeed tp_size debug "
    "skip_memory_metrics do_train do_eval do_predict overwrite_output_dir local_rank tpu_num_cores tpu_metrics_debug "
    "per_gpu_train_batch_size per_gpu_eval_batch_size mp_parameters ray_scope _n_gpu".split()
)


def trainer_of(folder, model=None, data=None, collate=None, arguments=None, **options):
    pairs, together = pairing()
    data, collate = (pairs, together) if data is None else (data, collate or collator())
    args = config(folder, **{"retain_term": "nll" if data is pairs else "none"} | options)
    arguments = {"train_dataset": data, "eval_dataset": data, "data_collator": collate, **(arguments or {})}
    return UnlearnTrainer(tiny_model() if model is None else model, args, **arguments)


def test_every_option_is_decided():
    decided = (REFUSED.keys(), DEPENDING, WORKS, OWN)
    assert NAMES <= set().union(*decided), "new options of transformers: do they work with nested batches?"
    assert sum(map(len, decided)) == len(set().union(*decided))
    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self", *REFUSED_ARGUMENTS}
    assert arguments == set(
        "model args data_collator train_dataset eval_dataset processing_class model_init callbacks optimizers "
        "optimizer_cls_and_kwargs".split()
    )


@pytest.mark.parametrize("name", sorted(NAMES & REFUSED.keys()))
def test_an_option_without_effect_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=name) as refusal:
        config(tmp_path, **{name: REFUSED[name]})
    assert not [word for word in os.environ if "DYNAMO" in word]  # nothing stays behind for the next training
    assert "cannot be used with UnlearnTrainer: " in str(refusal.value)
    trainer_of(tmp_path, **{name: getattr(config(tmp_path), name)})  # the default goes through
    late = config(tmp_path)
    setattr(late, name, REFUSED[name])
    with pytest.raises(ValueError, match=name):
        UnlearnTrainer(tiny_model(), late)


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name in ("geffect_every", "nll_every", "record_every", "weights_every")
     for value in (2.5, "2", True, float("nan"), None)]
    + [(name, value) for name in ("gamma", "alpha", "weights_tau", "learning_rate")
       for value in ("0.5", float("nan"), float("inf"), None, True)]
    + [(name, value) for name in ("geffect_live", "joint_forward", "own_loss_terms") for value in ("false", "no", 1)]
    + [("train_sampling_strategy", "shuffled")] * V5
    + [("objective", GA()), ("reference", None), ("gradient_accumulation_steps", 0)],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_by_name(tmp_path, name, value):
    """Flags are converted; in Python "false" would be true, and every 2.5 steps every 5."""
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}; (give|choose) "):
        config(tmp_path, **{name: value})


def test_none_is_a_value_where_transformers_says_so(tmp_path):
    """Of other options it ended in a TypeError, of some after hours of work (dataloader_drop_last, adam_beta1)."""
    refused = set()
    for entry in fields(TrainingArguments):
        if entry.init and entry.name not in REFUSED.keys() | {"fsdp", "tp_size"}:  # version 4 has to be given one
            try:
                config(tmp_path, **{entry.name: None})
            except ValueError as error:  # transformers says the others by name
                assert re.match(f"{entry.name} is None; give|None is not a valid ", str(error))
                refused.add(entry.name)
    assert refused >= set("weight_decay adam_beta1 max_steps optim seed dataloader_drop_last".split())
    assert not refused & set("lr_scheduler_kwargs eval_steps data_seed hub_token max_grad_norm report_to".split())


def test_no_clipping_is_zero_or_none(tmp_path):
    weights = []
    for limit in (None, 0.0, 1e-3):
        trainer = trainer_of(tmp_path, model=tiny_model(), optim="sgd", max_grad_norm=limit)
        trainer.train()
        weights.append(torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name, value", [("reference", "base:"), ("geffect_live", "false"), ("own_loss_terms", "no"),
                                         ("joint_forward", 1), ("geffect_live_update", "")])  # fmt: skip
def test_the_mixins_own_arguments_are_of_their_kind(tmp_path, name, value):
    class Mine(GFastLossMixin, Trainer):
        objective = GA()

    with pytest.raises(ValueError, match=f"{name} (is|must be) .*{re.escape(repr(value))}|{name} is {value!r}; give"):
        Mine(tiny_model(), config(tmp_path), **{name: value})


def test_numbers_of_numpy_and_paths_are_taken(tmp_path):
    args = config(tmp_path, output_dir=tmp_path, nll_every=numpy.int64(2), gamma=numpy.float64(0.5), retain_term="nll")
    assert args.nll_every == 2 and args.build_objective().gamma == 0.5


@pytest.mark.parametrize("name", sorted(REFUSED_ARGUMENTS))
def test_an_argument_without_effect_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} cannot be used with UnlearnTrainer"):
        trainer_of(tmp_path, arguments={name: REFUSED_ARGUMENTS[name]})


def test_a_search_that_writes_over_the_objective_is_refused(tmp_path):
    trainer = UnlearnTrainer(None, config(tmp_path), model_init=lambda: tiny_model())
    with pytest.raises(ValueError, match="hyperparameter_search cannot be used with UnlearnTrainer.*for each trial"):
        trainer.hyperparameter_search(n_trials=1, backend="optuna")
    assert str(trainer.objective.forget) == "GA()"


def test_options_of_several_processes(tmp_path, monkeypatch):
    args = config(tmp_path)
    args.average_tokens_across_devices = False
    refuse_ignored_options(args)
    monkeypatch.setattr(type(args), "world_size", 2)
    if args.__dataclass_fields__["average_tokens_across_devices"].default:
        with pytest.raises(ValueError, match="average_tokens_across_devices=False"):
            refuse_ignored_options(args)
    else:
        refuse_ignored_options(args)  # transformers 4: nobody asked for it
    args.average_tokens_across_devices = True
    for kind, refused in (("cp_enabled", True), ("sp_enabled", True), ("tp_enabled", False)):
        args.parallelism_config = SimpleNamespace(**{kind: True})
        if refused:
            with pytest.raises(ValueError, match="parallelism_config"):
                refuse_ignored_options(args)
        else:
            refuse_ignored_options(args)


def test_liger_kernels_without_its_losses(tmp_path):
    args = config(tmp_path)
    args.use_liger_kernel = True
    for kernels, refused in (
        (None, True),
        ({"fused_linear_cross_entropy": False}, True),
        ({"fused_linear_cross_entropy": False, "cross_entropy": False}, False),
    ):
        args.liger_kernel_config = kernels
        if refused:
            with pytest.raises(ValueError, match="use_liger_kernel"):
                refuse_ignored_options(args)
        else:
            refuse_ignored_options(args)


def test_compilation_asked_of_accelerate(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state()
    try:
        with pytest.raises(ValueError, match="dynamo_backend=EAGER cannot be used"):
            trainer_of(tmp_path)
    finally:
        AcceleratorState._reset_state()


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([self.data[index] for index in range(len(self.data))])


BY_LENGTH = [{"train_sampling_strategy": "group_by_length"}, {"train_sampling_strategy": "batch_rebalance"}]


@pytest.mark.parametrize("options", BY_LENGTH if V5 else [{"group_by_length": True}], ids=str)
def test_sorting_by_length(tmp_path, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name}.* cannot be used with these data"):
        trainer_of(tmp_path, **options)
    forget, _ = datasets()
    with pytest.raises(ValueError, match=f"{name}.* cannot be used with these data"):
        trainer_of(tmp_path, data=Stream(forget), **options)
    seen = []

    def collate(items):
        seen.extend(len(item["input_ids"]) for item in items)
        return collator()(items)

    trainer = trainer_of(
        tmp_path, data=forget, collate=collate, max_steps=-1, num_train_epochs=1, **options,
        arguments={"eval_dataset": None},
    )  # fmt: skip
    trainer.train()
    assert sorted(seen) == sorted(len(forget[index]["input_ids"]) for index in range(len(forget)))
    if "rebalance" not in str(options):
        assert seen[0] == max(seen)


@pytest.mark.parametrize("value", ["all", "non_padding"] if V5 else [True])
def test_tokens_seen_are_those_of_both_sides(tmp_path, value):
    data, collate = pairing()
    if not V5:
        with pytest.raises(ValueError, match="include_num_input_tokens_seen"):
            trainer_of(tmp_path, include_num_input_tokens_seen=value)
        with pytest.raises(ValueError, match="include_tokens_per_second"):
            trainer_of(tmp_path, include_tokens_per_second=True)
        forget, _ = datasets()
        trainer = trainer_of(tmp_path, data=forget, include_num_input_tokens_seen=True)
        trainer.train()
        assert trainer.state.num_input_tokens_seen > 0
        return
    seen = []

    def counting(items):
        batch = collate(items)
        masks = [part["attention_mask"] for part in batch.values()]
        seen.append(sum(int(mask.sum()) if value == "non_padding" else mask.numel() for mask in masks))
        return batch

    arguments = {"train_dataset": data, "data_collator": counting, "eval_dataset": None}
    trainer = trainer_of(tmp_path, include_num_input_tokens_seen=value, arguments=arguments, dataloader_num_workers=0,
                         max_steps=-1, num_train_epochs=1)  # fmt: skip
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(seen)


def test_noise_on_embeddings_reaches_training_and_not_evaluation(tmp_path):
    losses, evaluated = {}, {}
    for alpha in (None, 5.0):
        trainer = trainer_of(
            tmp_path, neftune_noise_alpha=alpha, learning_rate=0.0, eval_strategy="steps", eval_steps=1
        )
        trainer.train()
        logs = trainer.state.log_history
        losses[alpha] = next(log["forget_loss"] for log in logs if "forget_loss" in log)
        evaluated[alpha] = next(log["eval_loss"] for log in logs if "eval_loss" in log)
    assert abs(losses[5.0] - losses[None]) > 1e-4
    assert evaluated[5.0] == evaluated[None]


@pytest.mark.parametrize("name", sorted(NAMES & {"gradient_checkpointing", "activation_checkpointing"}))
def test_checkpointing_gives_the_same_step(tmp_path, name):
    moved = []
    for on in (False, True):
        model = tiny_model()
        recomputed = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=recomputed: calls.append(1))
        trainer_of(tmp_path, model, optim="sgd", arguments={"eval_dataset": None}, **{name: on}).train()
        moved.append((parameters(model), len(recomputed)))
    (expected, once), (found, again) = moved
    assert again == 2 * once
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_tried_again_and_leaves_no_trace(tmp_path):
    pairs, collate = pairing()
    data, logs = [pairs[0]] * 4, []  # every batch has the same mean
    for find in (False, True):
        model, calls = tiny_model(), []

        def crowded(*_, calls=calls):
            calls.append(1)
            if len(calls) == 2:  # the forget side has gone through
                raise RuntimeError("CUDA out of memory.")

        if find:
            model.model.layers[0].register_forward_pre_hook(crowded)
        arguments = {"train_dataset": data, "data_collator": collate, "eval_dataset": None}
        trainer = UnlearnTrainer(model, config(tmp_path, retain_term="nll", auto_find_batch_size=find), **arguments)
        trainer.train()
        assert (trainer._train_batch_size < 2) == find
        logs.append(next(log for log in trainer.state.log_history if "forget_loss" in log))
    for name in ("loss", "forget_loss", "retain_loss", "mean_weight", "mean_inverse_confidence"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5), name


@pytest.mark.slow
def test_optimizers_of_ones_own(tmp_path):
    steps = {}
    for how in ("named", "class", "instance", "model_init"):
        model = tiny_model()
        given = {"train_dataset": datasets()[0], "eval_dataset": None}
        if how == "class":
            given["optimizer_cls_and_kwargs"] = (torch.optim.SGD, {"lr": 1e-2})
        if how == "instance":
            given["optimizers"] = (torch.optim.SGD(model.parameters(), lr=1e-2), None)
        args = config(tmp_path / how, optim="adamw_torch" if how in ("class", "instance") else "sgd")
        if how == "model_init":
            given["model_init"], model = lambda: tiny_model(), None
        trainer = UnlearnTrainer(model, args, data_collator=collator(), **given)
        trainer.train()
        steps[how] = parameters(trainer.model)
    for how, found in steps.items():
        for key, value in steps["named"].items():
            torch.testing.assert_close(found[key], value, msg=lambda text, n=f"{how} {key}": f"{n}: {text}")


def test_the_best_model_by_the_loss_of_one_side(tmp_path):
    trainer = trainer_of(
        tmp_path, max_steps=3, learning_rate=0.1, eval_strategy="steps", eval_steps=1, eval_on_start=True,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_retain_loss",
        greater_is_better=True, eval_accumulation_steps=1, prediction_loss_only=True, gamma=-1.0,
    )  # fmt: skip
    trainer.train()
    losses = {log["step"]: log["eval_retain_loss"] for log in trainer.state.log_history if "eval_retain_loss" in log}
    assert set(losses) == {0, 1, 2, 3}
    best = max((step for step in losses if step), key=losses.__getitem__)
    assert trainer.evaluate()["eval_retain_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_evaluation_in_half_precision(tmp_path):
    exact = trainer_of(tmp_path).evaluate()["eval_loss"]
    for options in (
        {"bf16_full_eval": True},
        {"use_cache": True} if "use_cache" in NAMES else {"bf16_full_eval": True},
    ):
        found = trainer_of(tmp_path, **options).evaluate()["eval_loss"]
        assert found == pytest.approx(exact, rel=0.02)
        assert (found != exact) == ("bf16_full_eval" in options)


@pytest.mark.parametrize("dispatch, data", [(None, Stream([])), (True, [])])
def test_batches_that_one_process_deals_out_to_all(dispatch, data):
    """In slices of rows, which are not those of pairs and lose what one side has more than the other."""
    accelerator = SimpleNamespace(num_processes=2, dispatch_batches=dispatch)
    items, collate = pairing()
    dealt = as_dealt(collate, [GA(), KL(), RMU(layer=1)], accelerator, data)
    assert dealt([items[0]])["forget"]["labels"].equal(collate([items[0]])["forget"]["labels"])
    more = as_dealt(lambda _: {"forget": {"labels": torch.ones(2, 3)}, "retain": {"labels": torch.ones(4, 3)}}, [GA()],
                    accelerator, data)  # fmt: skip
    with pytest.raises(ValueError, match="2 rows of forget's labels and 4 of retain's labels.*dispatch_batches"):
        more([])
    with pytest.raises(ValueError, match="DPO.*takes pairs.*dispatch_batches"):
        as_dealt(collate, [DPO(), NLL()], accelerator, data)
    for own in (SimpleNamespace(num_processes=1), SimpleNamespace(num_processes=2, dispatch_batches=False)):
        assert as_dealt(collate, [DPO()], own, data) is collate


def test_a_batch_on_its_way_to_the_host_is_waited_for(monkeypatch):
    """From a GPU `non_blocking=True` gives memory that the values have not reached yet, and nothing waits for them."""
    asked = {}
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: asked.update({device.type: non_blocking}))
    for kind in ("cpu", "cuda"):
        to_device({"forget": {"labels": torch.ones(1)}}, torch.device(kind))
    assert asked == {"cpu": False, "cuda": True}
