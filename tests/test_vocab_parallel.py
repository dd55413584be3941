"""A head whose vocabulary is split over processes gives what the whole head gives."""

from __future__ import annotations

import socket

import pytest
import torch
from helpers import vocab_parallel
from helpers.losses import IMPLS, assert_law, label, need, problem, run, squared
from helpers.process_group import alone, alone_with
from helpers.training_tiny import server
from torch import nn

import gfast
from gfast.objectives import DPO, NPO, WGA, SatImp
from gfast.ops import dispatch, linear_token_kl, token_kl
from gfast.ops.head import ChunkedHead
from gfast.ops.token_logp import capped


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_give_what_one_gives():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    context, port = server(), free_port()
    processes = [context.Process(target=vocab_parallel.check, args=(rank, 2, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.fixture
def mesh():
    with alone():
        from torch.distributed.device_mesh import init_device_mesh

        yield init_device_mesh("cpu", (1,))


def test_other_layouts_are_refused(mesh):
    from torch.distributed.tensor import Replicate, Shard

    hidden, weight, bias, labels, _ = problem()
    for placement in (Replicate(), Shard(1)):
        with pytest.raises(ValueError, match="must be sharded on dim 0"):
            gfast.linear_token_logp(hidden, alone_with(weight, mesh, placement), labels)
    head = alone_with(weight, mesh, Shard(0))
    with pytest.raises(ValueError, match="shard it alike"):
        gfast.linear_unlearn_loss(hidden, head, labels, WGA(), bias=bias)
    for pair in ((head, weight), (weight, head)):
        with pytest.raises(TypeError, match=r"is a DTensor but .* a plain tensor. Shard it alike"):
            gfast.linear_token_kl(hidden, pair[0], hidden, pair[1], labels)
    with pytest.raises(ValueError, match="shard them alike"):
        gfast.linear_token_kl(hidden, head, hidden, alone_with(weight, mesh, Shard(1)), labels)
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 37\)"):
        gfast.linear_token_logp(hidden, head, labels + 37)
    for pair in ((head, head), (head, None)):
        with pytest.raises(ValueError, match="sharded over the vocabulary.*full_tensor"):
            gfast.linear_soft_target_loss(hidden, pair[0], None if pair[1] is None else hidden, pair[1], labels)
    alone = gfast.linear_token_logp(hidden, head, labels)
    torch.testing.assert_close(alone, gfast.linear_token_logp(hidden, weight, labels))


@pytest.mark.parametrize(
    "objective, times",
    [(WGA(), 1), (SatImp(), 1), (NPO(0.3), 1), (DPO(), 1), (squared, 2), ("KL", 2)],
    ids=label,
)
def test_logits_are_computed_once(mesh, objective, times, monkeypatch):
    """One product with the head a chunk: the backward computes no logits. A callable takes a first pass, KL two heads;
    a sharded head no more than a whole one."""
    from torch.distributed.tensor import Shard

    products, logits = [], ChunkedHead.logits
    monkeypatch.setattr(ChunkedHead, "logits", lambda *a: products.append(a[1:]) or logits(*a))
    hidden, weight, _, labels, ref = problem()

    def loss(h, w):
        if objective == "KL":
            return gfast.linear_token_kl(h, w, hidden * 0.5, w * 2, labels, chunk_rows=14)
        return gfast.linear_unlearn_loss(h, w, labels, objective, ref_logp=ref, chunk_rows=14)

    results = []
    for head in (weight, alone_with(weight, mesh, Shard(0))):
        products.clear()
        results.append(run(loss, (hidden, head)))
        chunks = len(set(products))
        assert chunks == 2 and len(products) == chunks * times
    whole, (*rest, grad_weight) = results
    torch.testing.assert_close([*rest, grad_weight.full_tensor()], whole, rtol=1e-10, atol=1e-12)


def test_an_older_build_falls_back(monkeypatch):
    """A build that lacks an op is told in words, and the other ops go on."""
    monkeypatch.setattr(dispatch, "compiled", lambda op: op != "kl_parts")
    if dispatch.extension()[0] is None:
        pytest.skip("nothing is compiled")
    assert "no CPU kernel kl_parts" in dispatch.why_not("sharded_token_kl", "cpp", "cpu", torch.float32)
    assert dispatch.why_not("token_kl", "cpp", "cpu", torch.float32) == ""


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("near", [1.0, 1e-3])
def test_kl_of_parts_of_rows_by_the_law(dtype, impl, near):
    """What two processes do with their halves of the logits, without the processes."""
    need("sharded_token_kl", impl, "cpu", dtype)
    if impl == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates when it casts to bfloat16; compiled Triton rounds")
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 301, generator=g) * 3
    logits[:4] += 200
    ref_logits = (logits + near * torch.randn(9, 301, generator=g)).to(dtype)
    logits, labels = logits.to(dtype), torch.arange(9)
    labels[2] = -100
    ref_logits[5, 11] = -torch.inf
    logits[6, 150:] = ref_logits[6, 150:] = -torch.inf  # one part is masked altogether
    form, factor = (0.7, 5.0, 1.3, 0.0) if near == 1.0 else (1.0, 0.0, 1.0, 0.0), torch.tensor(0.3)
    if form[1]:
        logits[6, 150:] = -1e4  # the cap of -inf is finite

    def literal(z, r):
        out = torch.empty_like(z)
        return token_kl._kl_rows_reference(z, r, labels, factor, *form, out), out

    def plain(z, r):
        """PyTorch's own functions in fp32; the reference computes in fp64."""
        leaf = z.clone().requires_grad_()
        log_p = torch.log_softmax(capped(leaf, *form[:2]), -1)
        log_q = torch.log_softmax(capped(r, *form[2:]), -1)
        terms = torch.where(log_q == -torch.inf, 0.0, log_q.exp() * (log_q - log_p))
        kl = torch.where(labels >= 0, terms.sum(-1), 0.0)
        return kl.detach(), torch.autograd.grad(kl.sum() * factor, leaf)[0]

    cuts = [(0, 150), (150, 301)]
    found = [linear_token_kl._kl_parts(logits[:, a:b], ref_logits[:, a:b], labels, form, impl) for a, b in cuts]
    kl, totals = linear_token_kl.merged_kl(*(torch.stack(parts).double() for parts in zip(*found, strict=True)))
    kl = torch.where(labels >= 0, kl, 0.0)
    out = torch.full_like(logits, torch.nan)
    for a, b in cuts:
        linear_token_kl._kl_rows_grad(
            logits[:, a:b], ref_logits[:, a:b], labels, totals, factor, form, out[:, a:b], impl
        )
    assert kl[2] == 0 and (out[2] == 0).all()
    truth = literal(logits.double(), ref_logits.double())
    assert_law([kl, out], plain(logits, ref_logits), truth, dtype, impl)


def test_a_small_kl_of_parts_keeps_its_digits():
    need("sharded_token_kl", "cpp", "cpu", torch.float32)
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    near = logits + 1e-4 * torch.randn(4, 3000, generator=torch.Generator().manual_seed(3))
    form, labels = (1.0, 0.0, 1.0, 0.0), torch.zeros(4, dtype=torch.int64)

    def of_parts(ref):
        halves = zip(logits.split(1000, 1), ref.split(1000, 1), strict=True)
        found = [linear_token_kl._kl_parts(z.contiguous(), r.contiguous(), labels, form, "cpp") for z, r in halves]
        return linear_token_kl.merged_kl(*(torch.stack(parts).double() for parts in zip(*found, strict=True)))[0]

    truth = token_kl.token_kl_reference(logits.double(), near.double(), labels)  # about 5e-9
    torch.testing.assert_close(of_parts(near), truth, rtol=1e-2, atol=0)
    assert (of_parts(logits.clone()) == 0).all()


def test_opcheck(mesh):
    hidden, weight, bias, labels, _ = problem(dtype=torch.float32)
    h, flat, factor = hidden.reshape(28, -1), labels.reshape(-1), torch.tensor(0.25)
    ids, numbers, need_all = torch.arange(28) // 7, WGA().spec().numbers(), [True] * 3
    shard = ([0, 37, 9, 9], [1.0, 0.0], mesh.get_group().group_name, "auto")
    ops = torch.ops.gfast
    leaves = [x.clone().requires_grad_() for x in (h, weight, bias)]
    torch.library.opcheck(ops.linear_token_logp, (*leaves, flat, *shard))
    torch.library.opcheck(
        ops.linear_unlearn,
        ([h, weight, bias], flat, [None, None, ids], factor, "token", numbers, [4, 7], *shard, need_all),
    )
    torch.library.opcheck(
        ops.linear_token_kl, ([h, weight, bias], [h + 1, weight, bias], flat, factor, *shard, need_all)
    )


def test_a_head_under_fsdp_is_gathered_and_whole(mesh):
    from helpers.small_models import batch_of, tiny
    from torch.distributed.fsdp import fully_shard

    from gfast.model_output import model_output

    model, batch = tiny("llama"), batch_of()
    expected = gfast.model_logp(model, batch)
    fully_shard(model)
    assert type(model.lm_head.weight.data).__name__ == "DTensor"
    head = model_output(model, batch).head
    assert type(head.weight) is nn.Parameter  # not a part of the vocabulary
    torch.testing.assert_close(gfast.model_logp(model, batch), expected, rtol=0, atol=0)
