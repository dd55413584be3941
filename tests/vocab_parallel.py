"""One of several processes that hold a part of the output head each, and what one process gives."""

from __future__ import annotations

import torch
from test_ops_losses import problem
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import gfast
from gfast import hf
from gfast.objectives import DPO, NLL, NPO, TNPO, WGA
from gfast.ops.backend import why_not


def compare(mesh, impl: str, dtype: torch.dtype, V: int, tolerance: dict[str, float]) -> None:
    hidden, weight, bias, labels, ref = problem(V=V, dtype=dtype)
    ref = ref.to(dtype)
    labels[1] = torch.tensor([0, V // 2, V // 2 + 1, V - 1, 0, V - 1, V // 2 - 1])  # both sides of every boundary
    form = dict(logit_scale=0.7, softcap=5.0, chunk_rows=5, impl=impl)

    def loss(h, w, b, objective, reduction):
        out = gfast.linear_unlearn_loss(
            h, w, labels, objective, bias=b, ref_logp=ref, reduction=reduction, **form
        )
        return out, gfast.linear_token_logp(h, w, labels, bias=b, **form)

    for objective, reduction in ((WGA(), None), (TNPO(), "sum"), (NPO(0.3), None), (DPO(0.3), None), (NLL(), "none")):
        whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        truth, truth_logp = loss(*whole, objective, reduction)
        (truth.loss.sum() + truth_logp.sin().sum()).backward()
        for layout in ("plain", "replicated", "split"):
            placement = [Shard(1)] if layout == "split" else [Replicate()]
            h = hidden.clone() if layout == "plain" else distribute_tensor(hidden, mesh, placement)
            parts = [h, distribute_tensor(weight, mesh, [Shard(0)]), distribute_tensor(bias, mesh, [Shard(0)])]
            parts = [x.requires_grad_() for x in parts]
            out, logp = loss(*parts, objective, reduction)
            (out.loss.sum() + logp.sin().sum()).backward()
            for ours, exact in zip((*out, logp), (*truth, truth_logp), strict=True):
                torch.testing.assert_close(ours, exact, **tolerance)
            assert isinstance(parts[1].grad, DTensor) and parts[1].grad.to_local().shape[0] <= V // 2 + 1
            for ours, exact in zip(parts, whole, strict=True):
                grad = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
                torch.testing.assert_close(grad, exact.grad, **tolerance)


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
        compare(mesh, "reference", torch.float64, 37, dict(rtol=1e-9, atol=1e-11))
        for impl in ("reference", "cpp"):
            if not why_not("linear_token_logp", impl, "cpu", torch.float32):
                compare(mesh, impl, torch.float32, 37, dict(rtol=1e-4, atol=2e-6))
        compare_models(mesh)
        hidden, weight, _, labels, _ = problem(V=1)  # fewer rows than processes
        alone = gfast.linear_token_logp(hidden, distribute_tensor(weight, mesh, [Shard(0)]), labels.clamp(max=0))
        assert (alone == 0).all()
    finally:
        destroy_process_group()
