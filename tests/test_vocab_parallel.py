"""A head whose vocabulary is split over processes gives what the whole head gives."""

from __future__ import annotations

import socket

import pytest
import torch
import vocab_parallel
from test_ops_losses import problem, run, squared
from torch import nn
from training_tiny import server

import gfast
from gfast.objectives import DPO, NPO, WGA, SatImp
from gfast.ops.head import ChunkedHead


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def gloo_or_skip() -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")


def test_two_processes_give_what_one_gives():
    gloo_or_skip()
    context, port = server(), free_port()
    processes = [context.Process(target=vocab_parallel.check, args=(rank, 2, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.fixture
def mesh():
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    gloo_or_skip()
    init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def test_other_layouts_are_refused(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    hidden, weight, bias, labels, _ = problem()
    for placement in (Replicate(), Shard(1)):
        with pytest.raises(ValueError, match="must be sharded on dim 0"):
            gfast.linear_token_logp(hidden, distribute_tensor(weight, mesh, [placement]), labels)
    head = distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="shard it alike"):
        gfast.linear_unlearn_loss(hidden, head, labels, WGA(), bias=bias)
    with pytest.raises(TypeError, match="not supported"):
        gfast.linear_token_kl(hidden, head, hidden, weight, labels)
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 37\)"):
        gfast.linear_token_logp(hidden, head, labels + 37)
    alone = gfast.linear_token_logp(hidden, head, labels)
    torch.testing.assert_close(alone, gfast.linear_token_logp(hidden, weight, labels))


@pytest.mark.parametrize(
    "objective, scoring", [(WGA(), 0), (SatImp(), 0), (NPO(0.3), 0), (DPO(), 0), (squared, 1)], ids=str
)
def test_logits_are_computed_once(mesh, objective, scoring, monkeypatch):
    """One product with the head a chunk: the backward computes no logits; only a callable takes a first pass."""
    from torch.distributed.tensor import Shard, distribute_tensor

    products, logits = [], ChunkedHead.logits
    monkeypatch.setattr(ChunkedHead, "logits", lambda *a: products.append(a[1:]) or logits(*a))
    hidden, weight, _, labels, ref = problem()
    results = []
    for head in (weight, distribute_tensor(weight, mesh, [Shard(0)])):
        products.clear()

        def loss(h, w):
            return gfast.linear_unlearn_loss(h, w, labels, objective, ref_logp=ref, chunk_rows=14)

        results.append(run(loss, (hidden, head)))
        chunks = len(set(products))
        assert chunks == 2 and len(products) == chunks * (1 + scoring)
    whole, (*rest, grad_weight) = results
    torch.testing.assert_close([*rest, grad_weight.full_tensor()], whole, rtol=1e-10, atol=1e-12)


def test_opcheck(mesh):
    hidden, weight, bias, labels, _ = problem(dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (hidden.reshape(28, -1), weight, bias)]
    group = mesh.get_group().group_name
    arguments = (*leaves, labels.reshape(-1), 0, 37, group, 1.0, 0.0, 9, "auto")
    torch.library.opcheck(torch.ops.gfast.linear_token_logp, arguments)


def test_a_head_under_fsdp_is_not_taken_for_a_vocabulary_parallel_one(mesh):
    from test_model import tiny
    from torch.distributed.fsdp import fully_shard

    from gfast import hf

    model = tiny("llama")
    fully_shard(model)
    assert type(model.lm_head.weight.data).__name__ == "DTensor"
    assert hf.head(model, sharded=True) is None
    assert isinstance(model.lm_head, nn.Linear)
