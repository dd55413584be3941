"""One of two processes that step with a GEffectMonitor under DeepSpeed's own engine, and what one process measures."""

from __future__ import annotations

import math
import os

import torch
from accelerate.state import AcceleratorState
from torch import distributed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import gfast
from gfast.geffect.live.zero import check_config
from gfast.objectives import NLL, WGA
from gfast.training.trainer import UnlearnTrainer
from gfast.wrappers import inside, unwrap_name
from helpers import deepspeed_parallel, live_parallel
from helpers.deepspeed_parallel import engine_with, narrow
from helpers.geffect_models import tiny
from helpers.geffect_parallel import refused
from helpers.live_parallel import OBJECTIVE
from helpers.training_parallel import join
from helpers.training_tiny import config, pairing, tiny_model
from helpers.wrappers_parallel import batch_of, joined, with_adapters

MODELS = {
    "whole": lambda: tiny("llama").float(),
    "tied": lambda: tiny("tied_llama").float(),
    "adapters": lambda: with_adapters(tiny("llama")).float(),
}
CASES = [case for case in live_parallel.CASES if case != "no_sync"]
EXACT = 1e-5  # fp32
LIVE = dict(geffect_live=True, geffect_live_update=True)
RUNS = {
    "plain": {},
    "live": LIVE,
    "unlearn": LIVE | dict(geffect_live_unlearn=True, gradient_accumulation_steps=1),
    "surgery": dict(surgery="gru:group", save_strategy="steps", save_steps=2),
    "resumed": dict(surgery="gru:group"),  # from the checkpoint of that
}


def gradients(model) -> dict[str, torch.Tensor]:
    """What an optimizer gets."""
    trained = {unwrap_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    if not hasattr(model, "step"):
        return {name: p.grad.clone() for name, p in trained.items()}
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(p).clone() for name, p in trained.items()}


def weights(engine) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    trained = {name: p for name, p in engine.named_parameters() if p.requires_grad}
    return {name: safe_get_full_fp32_param(p).clone() for name, p in trained.items()}


def run(model, forget, retain, case: str) -> tuple[list, dict[str, torch.Tensor]]:
    options = dict(unlearn=case == "unlearn", accumulate="exact" if case == "exact" else "first")
    surgery = case.partition(",")[0]
    surgery = surgery if surgery.partition(":")[0] in ("pcgrad", "gru", "sago") else None
    monitor = gfast.GEffectMonitor(model, objective=OBJECTIVE, surgery=surgery, **options)
    effects = []
    for _ in range(2):
        live_parallel.step(monitor, model, forget, retain, case, alone=False)
        effects += [monitor.effect()] + ([monitor.effect(of="step")] if not case.endswith("risk") else [])
        found = gradients(model)
        model.step() if hasattr(model, "step") else model.zero_grad()
    return effects, found


def same_effects(effects: list, expected: list, case: str) -> None:
    for effect, truth in zip(effects, expected, strict=True):
        for side in truth.sides:
            a, b = getattr(effect, side), getattr(truth, side)
            if side in truth.norms:  # a dot that is small beside |u| |r| has lost as many digits
                scale = max(
                    u * r for u, r in zip(truth.norms["objective"].values(), truth.norms[side].values(), strict=True)
                )
                assert abs(effect.cosine(side) - truth.cosine(side)) < EXACT / 10, (case, side)
                for group in b:
                    assert abs(a[group] - b[group]) <= EXACT / 10 * scale, (case, side, group, a, b)
        assert effect.norms.keys() == truth.norms.keys(), case
        assert abs(effect.measured["step_norm"] / truth.measured["step_norm"] - 1) < EXACT, case
        assert abs(effect.risks["retain"] / truth.risks["retain"] - 1) < EXACT, case


def check(stage: int, kind: str, rank: int, world: int, port: int) -> None:
    """Effects and gradients are those of one process on the batches of both, and of g_effect."""
    deepspeed_parallel.begin(rank, world, port)
    single, model = MODELS[kind]().eval(), engine_with(stage, MODELS[kind]().eval())
    batches = [(narrow(batch_of(one)), narrow(batch_of(10 + one))) for one in range(world)]
    forget, retain = (joined(list(some)) for some in zip(*batches, strict=True))
    for case in CASES if kind == "whole" else ("plain", "pcgrad:group"):
        expected, merged = run(single, forget, retain, case)
        effects, found = run(model, *batches[rank], case)
        same_effects(effects, expected, case)
        assert found.keys() == merged.keys()
        for key, grad in merged.items():
            close = dict(rtol=0, atol=EXACT * float(grad.abs().max()))
            torch.testing.assert_close(found[key], grad, **close, msg=lambda t: f"{case}: {t}")  # noqa: B023
        if case == "unlearn":
            truth = gfast.g_effect(single, OBJECTIVE, forget=forget, retain=retain)
            for side in ("unlearn", "retain"):
                for group, value in getattr(truth, side).items():
                    assert abs(getattr(effects[0], side)[group] - value) <= EXACT * abs(truth.total(side))
    distributed.destroy_process_group()


def plain(engine, forget, retain) -> None:
    """The two backwards of a step without a monitor."""
    for boundary, batch, objective in ((False, forget, OBJECTIVE), (True, retain, NLL())):
        engine.set_gradient_accumulation_boundary(boundary)
        engine.backward(gfast.model_loss(engine, batch, objective).loss, scale_wrt_gas=False)


def steps(stage: int, rank: int, world: int, port: int) -> None:
    """Steps of an engine with a monitor are those of one without, in whatever changes how it keeps gradients."""
    deepspeed_parallel.begin(rank, world, port)
    sixteen, wide = {"bf16": {"enabled": True}}, {"data_types": {"grad_accum_dtype": "fp32"}}
    settings = [dict(gradient_clipping=0.1), dict(zero={"reduce_bucket_size": 600, "sub_group_size": 1000}), sixteen]
    settings += [dict(zero={"reduce_scatter": False, "contiguous_gradients": False, "overlap_comm": True})]
    settings += [sixteen | wide] if stage > 1 else []
    settings += [dict(gradient_clipping=0.1, zero={"offload_optimizer": {"device": "cpu"}})] if stage == 3 else []
    for options in settings:
        model, other = (engine_with(stage, lr=0.01, **options) for _ in range(2))
        dtype = next(model.parameters()).dtype
        forget, retain = (
            {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch_of(seed).items()}
            for seed in (rank, 10 + rank)
        )
        for engine in (model, other):  # as in fp16, which DeepSpeed refuses on a CPU
            engine.optimizer.override_loss_scale(64.0)
        monitor = gfast.GEffectMonitor(model, objective=OBJECTIVE)
        for _ in range(3):
            losses = gfast.model_loss(model, forget, OBJECTIVE), gfast.model_loss(model, retain, NLL())
            monitor.forget(losses[0])
            monitor.retain(losses[1])
            refused("has made no step since", monitor.forget, losses[1])
            plain(other, forget, retain)
            same(stage, gradients(model), gradients(other), dtype)
            model.step(), other.step()
            same(stage, weights(model), weights(other), dtype)
            norm = monitor.effect().measured["step_norm"]
            assert abs(float(model.get_global_grad_norm()) / norm - 1) < (1e-6 if dtype == torch.float32 else 1e-3)
    distributed.destroy_process_group()


def same(stage: int, found: dict[str, torch.Tensor], right: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """ZeRO-1 adds the step's gradients up before it reduces them, and rounds otherwise; the others are alike to the
    bit."""
    for name, value in right.items():
        bound = max(EXACT, 4 * torch.finfo(dtype).eps) if stage == 1 else 0.0
        exact = dict(rtol=0, atol=bound * float(value.abs().max()))
        torch.testing.assert_close(found[name], value, **exact, msg=lambda text, n=name: f"{n}: {text}")


def refusals(rank: int, world: int, port: int) -> None:
    """What cannot be measured is refused by name, and a step that is not finite changes nothing."""
    deepspeed_parallel.begin(rank, world, port)
    forget, retain = narrow(batch_of(rank)), narrow(batch_of(10 + rank))
    offload = {"offload_optimizer": {"device": "cpu"}}
    for words, stage, options in (
        ("without ZeRO", 0, {}),
        ("with offload_optimizer ZeRO-1 and 2", 2, dict(zero=offload)),
        ("with round_robin_gradients", 1, dict(zero={"round_robin_gradients": True})),
        ("BF16_Optimizer", 1, dict(bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})),
    ):
        refused(words, gfast.GEffectMonitor, engine_with(stage, **options))
    for words, zero in (
        ("without ZeRO", {}),
        ("ZeRO-1 and 2", {"stage": 2} | offload),
        ("on disk", {"stage": 3, "offload_optimizer": {"device": "nvme"}}),
    ):
        refused(words, check_config, {"zero_optimization": zero})
    check_config({"zero_optimization": {"stage": 3} | offload})
    for stage in (2, 3):
        engine = engine_with(stage, lr=0.5)
        refused("give GEffectMonitor the engine", gfast.GEffectMonitor, engine.module)
        refused("scales losses itself", gfast.GEffectMonitor, engine, scaler=torch.amp.GradScaler("cpu"))
        not_finite_and_unreached(engine, forget, retain)
    distributed.destroy_process_group()


def not_finite_and_unreached(engine, forget, retain) -> None:
    """A step that is not finite, one after it, and one whose forget loss does not reach all parameters."""
    monitor, before = gfast.GEffectMonitor(engine, unlearn=True, objective=WGA()), weights(engine)
    shared = gfast.model_loss(engine, forget, NLL()).loss
    refused("FSDP2 and ZeRO free", monitor.forget, shared, risk=shared)
    for _ in range(2):  # the second without the engine's step, which would have skipped it too
        monitor.forget(gfast.model_loss(engine, forget, WGA()), risk=lambda: gfast.model_loss(engine, forget, NLL()))
        monitor.retain(gfast.model_loss(engine, retain, NLL()).loss * math.inf)
        assert monitor.dropped is not None
    engine.step()
    after = weights(engine)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    monitor.forget(gfast.model_loss(engine, forget, WGA()))
    monitor.retain(gfast.model_loss(engine, retain, NLL()))
    assert monitor.dropped is None and math.isfinite(monitor.effect().total("retain"))
    # of what a loss does not reach there is no gradient, whatever the engine had of it in the step before
    engine.step()
    monitor.forget(lambda: inside(engine, lambda model: model.model.embed_tokens(forget["input_ids"]).square().mean()))
    monitor.retain(gfast.model_loss(engine, retain, NLL()))
    norms = monitor.effect().norms["objective"]
    assert norms.pop("embed") > 0 and not any(norms.values())


def train(stage: int, folder: str, rank: int, world: int, port: int) -> None:
    """Three steps of UnlearnTrainer; in one process without DeepSpeed."""
    join(rank, world, port)
    os.environ["DS_ACCELERATOR"] = "cpu"
    own = {}
    if world > 1:
        import deepspeed as library

        deepspeed_parallel.without_shared_memory()
        distributed.init_process_group("gloo")
        library.init_distributed("gloo")
        sizes = "train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping train_batch_size".split()
        zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
        own = {"deepspeed": dict.fromkeys(sizes, "auto") | {"zero_optimization": zero}, "ddp_backend": "gloo"}
    options = dict(max_steps=3, optim="adamw_torch", adam_epsilon=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    options |= dict(per_device_train_batch_size=2 // world, gradient_accumulation_steps=2, retain_term="nll", **own)
    data, collate = pairing()
    for name, live in RUNS.items():
        args = config(f"{folder}/{name}", objective="WGA", **options | live)
        trainer = UnlearnTrainer(tiny_model(), args, train_dataset=data, data_collator=collate)
        trainer.train(resume_from_checkpoint=f"{folder}/surgery/checkpoint-2" if name == "resumed" else None)
        assert world == 1 or type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
        trainer.save_model(f"{folder}/{name}")
        AcceleratorState._reset_state()
        unset_hf_deepspeed_config()
