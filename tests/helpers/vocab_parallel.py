"""One of several processes that hold a part of the output head each, and what one process gives."""

from __future__ import annotations

import functools
import os
import tempfile

import torch
from torch import distributed, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import gfast
from gfast.model_output import model_output
from gfast.objectives import DPO, KL, NLL, NPO, TNPO, WGA
from gfast.ops.dispatch import why_not
from gfast.ops.linear_unlearn_loss import linear_unlearn_loss_reference
from gfast.ops.token_kl import token_kl_reference
from helpers.losses import DRAWS, assert_law_of_draws, problem, run, squared


def split(x, mesh):
    return distribute_tensor(x, mesh, [Shard(0)])


def gathered(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(mesh, impl: str, dtype: torch.dtype, V: int, tolerance: dict[str, float]) -> None:
    hidden, weight, bias, labels, ref = problem(V=V, dtype=dtype)
    ref = ref.to(dtype)
    if V > 1:  # both sides of every boundary
        labels[1] = torch.tensor([0, V // 2, V // 2 + 1, V - 1, 0, V - 1, V // 2 - 1])
    form = dict(logit_scale=0.7, softcap=5.0, chunk_rows=5, impl=impl)

    times = torch.linspace(-1.0, 2.0, labels.numel(), dtype=dtype).view(labels.shape)

    def loss(h, w, b, objective, reduction):
        given = dict(ref_logp=ref, reduction=reduction, weight=None if objective == NLL() else times)
        out = gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, **given, **form)
        return out, gfast.linear_token_logp(h, w, labels, bias=b, **form)

    for objective, reduction in (
        (WGA(), None), (TNPO(), "sum"), (NPO(0.3), None), (DPO(0.3), None), (NLL(), "none"), (squared, None)
    ):  # fmt: skip
        whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        truth, truth_logp = loss(*whole, objective, reduction)
        (truth.loss.sum() + truth_logp.sin().sum()).backward()
        for layout in ("plain", "replicated", "split") if objective == WGA() else ("plain",):
            placement = [Shard(1)] if layout == "split" else [Replicate()]
            h = hidden.clone() if layout == "plain" else distribute_tensor(hidden, mesh, placement)
            parts = [x.requires_grad_() for x in (h, split(weight, mesh), split(bias, mesh))]
            out, logp = loss(*parts, objective, reduction)
            (out.loss.sum() + logp.sin().sum()).backward()
            for ours, exact in zip((*out, logp), (*truth, truth_logp), strict=True):
                torch.testing.assert_close(ours, exact, **tolerance)
            if V > 1:
                assert isinstance(parts[1].grad, DTensor) and parts[1].grad.to_local().shape[0] <= V // 2 + 1
            for ours, exact in zip(parts, whole, strict=True):
                torch.testing.assert_close(gathered(ours.grad), exact.grad, **tolerance)


def by_the_law(mesh, impl: str, dtype: torch.dtype) -> None:
    """Each process's error is at most twice that of plain PyTorch with the whole head in one process."""
    form = dict(logit_scale=0.5, softcap=8.0)
    for objective in (WGA(), NPO(0.3)):
        draws = []
        for seed in range(DRAWS):
            hidden, weight, bias, labels, ref = problem(seed, T=40, D=16, V=101, dtype=dtype)

            def literal(h, w, b):
                return linear_unlearn_loss_reference(h, w, labels, objective, ref_logp=ref, bias=b, **form)  # noqa: B023

            def ours(h, w, b):
                options = dict(ref_logp=ref, bias=b, chunk_rows=64, impl=impl, **form)  # noqa: B023
                return gfast.linear_unlearn_loss(h, w, labels, objective, **options)  # noqa: B023

            inputs = (hidden, weight, bias)
            found = run(ours, (hidden, split(weight, mesh), split(bias, mesh)))
            plain, truth = run(literal, inputs), run(literal, [x.double() for x in inputs])
            draws.append(([gathered(x) for x in found], plain, truth))
        assert_law_of_draws(draws, dtype, impl)


def compare_kl(mesh, impl: str, dtype: torch.dtype, V: int) -> None:
    """Both heads split: value and gradients as of whole ones; fp64 exactly, else by the law."""
    draws = []
    for seed in range(1 if dtype == torch.float64 else DRAWS):
        hidden, weight, bias, labels, _ = problem(2 * seed, T=9, V=V)
        reference = problem(2 * seed + 1, T=9, V=V)[:3]
        valid = int((labels != -100).sum())

        def logits_of(h, w, b):
            return 7 * torch.tanh(0.8 * torch.nn.functional.linear(h, w, b) / 7)

        def literal(h, w, b):
            ref_logits = logits_of(*(x.to(h.dtype) for x in reference))  # noqa: B023
            return token_kl_reference(logits_of(h, w, b), ref_logits, labels).sum() / valid  # noqa: B023

        def ours(h, w, b):
            ref_hidden, ref_weight, ref_bias = (x.to(dtype) for x in reference)  # noqa: B023
            refs = dict(bias=b, ref_bias=split(ref_bias, mesh), logit_scale=0.8, softcap=7.0)
            refs |= dict(chunk_rows=5, impl=impl)
            return gfast.linear_token_kl(h, w, ref_hidden, split(ref_weight, mesh), labels, **refs)  # noqa: B023

        inputs = [x.to(dtype) for x in (hidden, weight, bias)]
        found = run(ours, (inputs[0], split(inputs[1], mesh), split(inputs[2], mesh)))
        draws.append(([gathered(x) for x in found], run(literal, inputs), run(literal, (hidden, weight, bias))))
    if dtype == torch.float64:
        torch.testing.assert_close(draws[0][0], draws[0][2], rtol=1e-11, atol=1e-13)
    else:
        assert_law_of_draws(draws, dtype, impl)


def masked(mesh, impl: str, dtype: torch.dtype) -> None:
    """A shard of nothing but masked logits (a padded vocabulary) adds nothing, also to labels that lie in it."""
    hidden, weight, bias, labels, _ = problem(dtype=dtype)
    bias[19:] = -torch.inf

    def logp(h, w, b):
        return gfast.linear_token_logp(h, w, labels % 19, bias=b, impl=impl)

    truth = run(logp, (hidden, weight, bias))
    ours = [gathered(x) for x in run(logp, (hidden, split(weight, mesh), split(bias, mesh)))]
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
    outside = gfast.linear_token_logp(
        hidden, split(weight, mesh), labels.clamp(min=19), bias=split(bias, mesh), impl=impl
    )
    assert (outside == -torch.inf).all()


def same_as_whole(model, truth_model) -> None:
    """Losses and log-probs of a model with a sharded head, and all gradients, are those of the whole model."""
    from helpers.small_models import batch_of, gradients

    batch = batch_of()
    generator = torch.Generator().manual_seed(5)
    shape = (*batch["input_ids"].shape, truth_model.config.hidden_size)
    whole = truth_model.get_output_embeddings().weight.detach()
    cached = dict(ref_hidden=torch.randn(shape, generator=generator, dtype=torch.float64), ref_head=whole * 0.5)
    assert model_output(model, batch).head is not None
    torch.testing.assert_close(gfast.model_logp(model, batch), gfast.model_logp(truth_model, batch))
    for objective in (WGA(), KL()):
        truth = gfast.model_loss(truth_model, {**batch, **cached}, objective)
        out = gfast.model_loss(model, {**batch, **cached}, objective)
        torch.testing.assert_close(out.loss, truth.loss, rtol=1e-9, atol=1e-12)
        if len(list(model.parameters())) == len(list(truth_model.parameters())):
            for ours, right in zip(gradients(model, out.loss), gradients(truth_model, truth.loss), strict=True):
                torch.testing.assert_close(gathered(ours), right, rtol=1e-8, atol=1e-11)


def compare_models(mesh) -> None:
    from helpers.small_models import tiny

    for kind in ("llama", "cohere"):  # by torch's tensor parallelism, with its hooks; a bare parameter
        truth_model, model = tiny(kind), tiny(kind)
        if kind == "llama":
            parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))
        else:  # the embeddings are no longer tied to the head then: gradients are not compared
            model.lm_head.weight = nn.Parameter(split(model.lm_head.weight.detach(), mesh))
        same_as_whole(model, truth_model)


def compare_hugging_face(rank: int, world: int) -> None:
    """Models that Hugging Face loads by their tensor-parallel plan, where its version keeps DTensors."""
    try:
        from transformers.distributed import DistributedConfig, tensor_parallel
    except ImportError:
        return
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from helpers.small_models import SMALL

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    llama, qwen = (LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)
    for (settings, kind), tied, check in (
        (llama, False, same_as_whole),
        (llama, True, same_as_whole),
        (qwen, False, same_steps),
    ):
        if check is same_steps and not hasattr(tensor_parallel, "ReplicatedWithGradAllReduce"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            shared = [folder]
            if rank == 0:
                kind(settings(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)).save_pretrained(folder)
            distributed.broadcast_object_list(shared)
            load = functools.partial(kind.from_pretrained, shared[0], dtype=torch.float64)
            truth_model, model = load(), load(distributed_config=DistributedConfig(tp_plan="auto"))
            distributed.barrier()  # before the folder goes
        assert isinstance(model.lm_head.weight.data, DTensor)
        check(model, truth_model)


def same_steps(model, truth_model) -> None:
    """Of two micro-batches a side, where hooks sum the gradients of the heads' norms over the processes."""
    from helpers.small_models import batch_of

    effects, batch = [], batch_of()
    for each in (model, truth_model):
        each.zero_grad()
        monitor = gfast.GEffectMonitor(each)
        for factor in (0.25, 0.75):
            monitor.forget(factor * gfast.model_loss(each, batch, WGA()).loss)
        for last in (False, True):
            monitor.retain(0.5 * gfast.model_loss(each, batch, NLL()).loss, factor=0.5, last=last)
        effects.append(monitor.effect().retain)
    assert all(abs(effects[0][group] / right - 1) < 1e-8 for group, right in effects[1].items()), effects
    for ours, right in zip(model.parameters(), truth_model.parameters(), strict=True):
        torch.testing.assert_close(gathered(ours.grad), right.grad, rtol=1e-8, atol=1e-11)


def check(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        for V in (37, 1):  # 1: fewer rows than processes
            compare(mesh, "reference", torch.float64, V, dict(rtol=1e-9, atol=1e-11))
        for impl in ("reference", "cpp"):
            if why_not("linear_token_logp", impl, "cpu", torch.float32):
                continue
            compare(mesh, impl, torch.float32, 37, dict(rtol=1e-4, atol=2e-6))
            compare(mesh, impl, torch.float32, 1, dict(rtol=1e-4, atol=2e-6))
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                by_the_law(mesh, impl, dtype)
            masked(mesh, impl, torch.float32)
        for V in (37, 1):
            compare_kl(mesh, "reference", torch.float64, V)
        for impl in ("reference", "cpp"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                if not why_not("sharded_token_kl", impl, "cpu", dtype):
                    compare_kl(mesh, impl, dtype, 37)
                    compare_kl(mesh, impl, dtype, 1)
        compare_models(mesh)
        compare_hugging_face(rank, world)
    finally:
        destroy_process_group()
