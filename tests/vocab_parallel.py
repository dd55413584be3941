"""One of several processes that hold a part of the output head each, and what one process gives."""

from __future__ import annotations

import torch
from test_ops_losses import assert_law, problem, run, squared
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import gfast
from gfast import hf
from gfast.objectives import DPO, NLL, NPO, TNPO, WGA
from gfast.ops.backend import why_not
from gfast.ops.linear_unlearn_loss import linear_unlearn_loss_reference


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

    def loss(h, w, b, objective, reduction):
        out = gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, ref_logp=ref, reduction=reduction, **form)
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
    hidden, weight, bias, labels, ref = problem(T=40, D=16, V=101, dtype=dtype)
    form = dict(logit_scale=0.5, softcap=8.0)
    wide = [x.double() for x in (hidden, weight, bias)]
    for objective in (WGA(), NPO(0.3)):

        def literal(h, w, b):
            return linear_unlearn_loss_reference(h, w, labels, objective, ref_logp=ref, bias=b, **form)  # noqa: B023

        def ours(h, w, b):
            options = dict(ref_logp=ref, bias=b, chunk_rows=64, impl=impl, **form)
            return gfast.linear_unlearn_loss(h, w, labels, objective, **options)  # noqa: B023

        inputs = (hidden, weight, bias)
        found = run(ours, (hidden, split(weight, mesh), split(bias, mesh)))
        assert_law(map(gathered, found), run(literal, inputs), run(literal, wide), dtype, impl)


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


def compare_models(mesh) -> None:
    from test_model import batch_of, gradients, tiny

    for kind in ("llama", "cohere"):  # by torch's tensor parallelism, with its hooks; a bare parameter
        batch = batch_of()
        truth_model, model = tiny(kind), tiny(kind)
        truth = gfast.model_loss(truth_model, batch, WGA())
        exact = gradients(truth_model, truth.loss)
        if kind == "llama":
            parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))
        else:
            model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
        assert hf.head(model) is None and hf.head(model, sharded=True) is not None
        out = gfast.model_loss(model, batch, WGA())
        torch.testing.assert_close(out.loss, truth.loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gfast.model_logp(model, batch), gfast.model_logp(truth_model, batch))
        if kind == "llama":  # the other's embeddings are no longer tied to its head
            for ours, right in zip(gradients(model, out.loss), exact, strict=True):
                ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
                torch.testing.assert_close(ours, right, rtol=1e-8, atol=1e-11)


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
        compare_models(mesh)
    finally:
        destroy_process_group()
