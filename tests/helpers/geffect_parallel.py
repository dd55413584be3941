"""One of several processes that measure one effect together, and what one process measures alone."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import distributed
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import gfast
from gfast.geffect.results.base import Effect
from gfast.objectives import GA, KL, NLL, NPO, RMU, TNPO, BalDRO, Mix
from gfast.training.trajectory import _shared_nll
from helpers import architectures
from helpers.geffect_models import tiny
from helpers.wrappers_parallel import batch_of, by_accelerate, fsdp, gradients, with_adapters

OBJECTIVES = [GA(), TNPO(), NPO(0.3), KL(), RMU(layer=2), Mix(NPO(0.5), NLL(), alpha=0.7)]
ENGINES = ("sample", "token", "gram")


def sets() -> dict[str, list[dict]]:
    """More batches than processes and fewer, of several widths, with ignored labels and a row without any."""
    forget, retain = [batch_of(seed) for seed in range(5)], [batch_of(9)]
    forget[1] = {key: value if key == "ref_head" else value[:, :5] for key, value in forget[1].items()}
    forget[2]["labels"][0] = -100
    return {"forget": forget, "retain": retain}


def same(found: dict, expected: dict, what: str, exact: float = 1e-9) -> None:
    """Numbers by name, in any depth, each as large as its scale says."""
    assert found.keys() == expected.keys(), (what, found.keys(), expected.keys())
    for key, right in expected.items():
        if isinstance(right, dict):
            same(found[key], right, f"{what} {key}", exact)
        else:
            right, one = torch.as_tensor(right).double(), torch.as_tensor(found[key]).double()
            torch.testing.assert_close(
                one,
                right,
                rtol=exact,
                atol=exact * float(right.abs().sum()) + 1e-15,
                msg=lambda t, w=(what, key): f"{w}: {t}",
            )


def numbers(effect: Effect) -> dict:
    return {"unlearn": effect.unlearn, "retain": effect.retain, "norms": effect.norms}


def left_as_found(model) -> list:
    return [(parameter.grad, parameter.requires_grad, type(parameter)) for parameter in model.parameters()]


def refused(words: str, function, *args, **options) -> None:
    try:
        function(*args, **options)
    except (ValueError, RuntimeError) as error:  # a RuntimeError where another process has failed
        assert all(word in str(error) for word in words.split()), (words, str(error))
    else:
        raise AssertionError(f"not refused: {words}")


def spoilt(data: dict, key: str, value: int) -> dict:
    """The sets with one number of their second batch, which the second process runs, out of range."""
    batch = data["forget"][1]
    wrong = {**batch, key: batch[key].clone()}
    wrong[key][0, 3] = value
    return {**data, "forget": [data["forget"][0], wrong, *data["forget"][2:]]}


def in_sequence(model):
    """With the final norm on a share of the positions in each process: its gradient is a sum over the processes."""
    mesh, head = init_device_mesh("cpu", (distributed.get_world_size(),)), dict(input_layouts=Shard(1))
    model = parallelize_module(model, mesh, {"model.norm": PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),))})  # fmt: skip
    plan = {"model.norm": SequenceParallel(), "lm_head": ColwiseParallel(**head, output_layouts=Replicate())}
    return parallelize_module(model, mesh, plan)


def in_steps(model, surgery: str | None) -> dict:
    """What a monitor measures of a step of several micro-batches, and the gradients that it leaves."""
    monitor = gfast.GEffectMonitor(model, objective=TNPO(), surgery=surgery)
    for seed in range(2):
        monitor.forget(gfast.model_loss(model, batch_of(seed), TNPO()).loss / 2, factor=0.5)
    for seed in range(2):
        monitor.retain(gfast.model_loss(model, batch_of(7 + seed), NLL()), last=seed == 1)
    effect = monitor.effect()
    return {
        "effect": {"retain": effect.retain, "norms": effect.norms},
        "norm": effect.measured["step_norm"],
        "grads": gradients(model),
    }


def meshed(model, shape: tuple[int, int], dimension: int = 0):
    """FSDP2 over a mesh: of two dimensions the first has copies of the shards (HSDP)."""
    options = dict(
        mesh=init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")),
        shard_placement_fn=lambda p: Shard(dimension % p.dim()),
    )
    for block in model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def sharded(rank: int, world: int) -> None:
    """The stream engine on FSDP2, however it is cut."""
    makes = {
        "copies": (lambda: tiny("llama"), partial(meshed, shape=(world // 2, 2))),
        "columns, all copies": (lambda: tiny("tied_llama"), partial(meshed, shape=(world, 1), dimension=-1)),
        "blocks": (lambda: tiny("llama"), fsdp),
        "accelerate": (lambda: tiny("tied_llama"), by_accelerate),
        "adapters": (lambda: with_adapters(tiny("llama")), fsdp),  # of two rows: some processes have none
    }
    data = sets()
    single = {source: some[0] for source, some in data.items()}
    for name, (make, wrap) in makes.items():
        truth, model = make(), wrap(make())
        assert any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
        before = left_as_found(model)
        for batches in (data, single):
            right = gfast.g_effect(truth, OBJECTIVES, **batches, norms=True)
            for one, other in zip(gfast.g_effect(model, OBJECTIVES, **batches, norms=True), right, strict=True):
                what = f"{name} {one.objective}"
                same(numbers(one), numbers(other), what, 1e-6 if "RMU" in what else 1e-9)
                same(one.risks, other.risks, what)
                assert one.counts == other.counts
            for objective in OBJECTIVES[:2]:  # alone: on single batches its own gradient is what is stored
                one, other = (gfast.g_effect(m, objective, **batches) for m in (model, truth))
                other.norms |= {key: one.norms[key] for key in one.norms if key not in other.norms}
                same(numbers(one), numbers(other), f"{name} {objective} alone")
        assert left_as_found(model) == before
    texts = {
        s: [{k: b[k] for k in ("input_ids", "labels", "attention_mask")} for b in some] for s, some in data.items()
    }
    truth, model = architectures.build("mamba"), fully_shard(architectures.build("mamba"))  # tried: is it causal?
    right = gfast.g_effect(truth, GA(), **texts)
    same(numbers(gfast.g_effect(model, GA(), **texts)), numbers(right), "a model that is tried", 1e-6)
    model = fsdp(tiny("llama"))
    with gfast.risk_gradients(model, **data) as directions:
        held = sum(x.numel() for store in directions.stores for x in store.kept if x is not None)
        whole = 2 * sum(parameter.numel() for parameter in model.parameters())
        assert held <= whole * (1 / world + 0.05), (held, whole)
        found = gfast.g_effect(model, TNPO(), **data, directions=directions)
        same(numbers(found), numbers(gfast.g_effect(tiny("llama"), TNPO(), **data)), "given directions")
        refused("shard of these directions", directions.save, "./directions")
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        refused("other weights", gfast.g_effect, model, TNPO(), **data, directions=directions)
    for engine in ENGINES:
        refused(f"the {engine} engine FSDP2 shards", gfast.g_effect, model, GA(), **data, engine=engine)
    refused("the sample engine", gfast.pg_effect, model, **data)
    refused("folder device", gfast.g_effect, model, TNPO(), **data, direction_storage="./directions")
    refused("processes='own'", gfast.g_effect, model, GA(), **data, processes="own")
    refused("other batches", gfast.g_effect, model, GA(), forget=batch_of(rank), retain=batch_of(9))
    for key, words in (("labels", "the label 66 61 rows"), ("input_ids", "the token id 66 61 rows")):
        refused(words, gfast.g_effect, model, GA(), **spoilt(data, key, 66))
    lacks = {key: value for key, value in data["forget"][1].items() if key != "ref_logp"}
    lacking = {**data, "forget": [data["forget"][0], lacks]}
    refused("'ref_logp' batch 1", gfast.g_effect, model, TNPO(), **lacking)
    ignores = tiny("llama")
    fully_shard(ignores, ignored_params={ignores.lm_head.weight})
    refused("not the trainable parameter 'lm_head.weight'", gfast.g_effect, ignores, GA(), **data)
    refused("not its trainable parameter 'lm_head.weight'", gfast.GEffectMonitor, ignores)
    alike = replicate(tiny("llama"))
    refused("replicate() DistributedDataParallel", gfast.g_effect, alike, GA(), **data)
    refused("replicate() DistributedDataParallel", gfast.GEffectMonitor, alike)
    plans = {"model.layers.0.mlp.up_proj": ColwiseParallel()}
    for surgery in (None, "gru", "sago"):
        right = in_steps(tiny("llama").eval(), surgery)
        same(in_steps(in_sequence(tiny("llama").eval()), surgery), right, f"sequence parallel, {surgery}")
    cut = parallelize_module(tiny("llama"), init_device_mesh("cpu", (world,)), plans)
    nll = [_shared_nll(m, data["forget"], SimpleNamespace(world_size=w, process_index=r))
           for m, w, r in ((in_sequence(tiny("llama")), world, rank), (tiny("llama"), 1, 0))]  # fmt: skip
    assert abs(nll[0] / nll[1] - 1) < 1e-9, nll  # each process all of the batches, which they run together
    refused("tensor parallelism", gfast.g_effect, cut, GA(), **data)
    refused(
        "FSDP1", gfast.g_effect, FullyShardedDataParallel(tiny("llama"), device_id=torch.device("cpu")), GA(), **data
    )


def replicated(rank: int, world: int) -> None:
    """Every engine, the batches divided."""
    data, truth, model = sets(), tiny("llama"), DistributedDataParallel(tiny("llama"))
    single = {source: some[0] for source, some in data.items()}
    before = left_as_found(model)
    # What weighs the texts of a batch against each other has a batch that is not taken apart.
    for batches, objectives in ((data, OBJECTIVES), (single, OBJECTIVES), (single, [BalDRO(0.5), GA()])):
        right = gfast.g_effect(truth, objectives, **batches, norms=True)
        found = gfast.g_effect(model, objectives, **batches, norms=True, processes="all")
        for one, other in zip(found, right, strict=True):
            same(numbers(one), numbers(other), f"{one.objective}", 1e-6 if "RMU" in one.objective else 1e-9)
            same(one.risks, other.risks, f"{one.objective}")
    one, other = (gfast.g_effect(m, TNPO(), **data, processes=who) for m, who in ((model, "all"), (truth, "own")))
    same(numbers(one) | one.errors, {**numbers(other), "norms": one.norms} | other.errors, "errors")
    for engine in ENGINES:
        found, right = (
            gfast.g_effect(m, [TNPO(), NPO(0.3), GA()], **data, engine=engine, processes=who)
            for m, who in ((model, "all"), (truth, "own"))
        )
        for one, other in zip(found, right, strict=True):
            same(numbers(one), numbers(other), f"{engine} {one.objective}")
    samples, right = (gfast.pg_effect(m, **data, processes=w) for m, w in ((model, "all"), (truth, "own")))
    same({**samples.unlearn, "logp": samples.logp}, {**right.unlearn, "logp": right.logp}, "samples")
    tokens, right = (gfast.token_effect(m, **data, processes=w) for m, w in ((model, "all"), (truth, "own")))
    for group, some in right.retain.items():
        same(dict(enumerate(tokens.retain[group])), dict(enumerate(some)), f"tokens {group}")
    gram, right = (gfast.gram_effect(m, **data, processes=w) for m, w in ((model, "all"), (truth, "own")))
    same({"u": gram.unlearn, "r": gram.retain}, {"u": right.unlearn, "r": right.retain}, "gram")
    assert left_as_found(model) == before
    refused("other batches processes='own'", gfast.g_effect, model, GA(), forget=batch_of(rank), retain=batch_of(9),
            processes="all")  # fmt: skip
    empty = data if rank == 0 else {**data, "forget": []}
    refused("forget= holds no batch", gfast.g_effect, model, GA(), **empty, processes="all")
    refused("process 1 measures TNPO(beta=2.0) processes='own'", gfast.g_effect, model,
            TNPO(beta=1.0 + rank), **data, processes="all")  # fmt: skip
    other = tiny("llama")
    with torch.no_grad():
        other.model.norm.weight.mul_(1 + rank)
    refused("another model (model.norm.weight)", gfast.token_effect, other, **data, processes="all")
    other.model.norm.requires_grad_(False)
    refused("another model (model.norm.weight)", gfast.g_effect, other, GA(), **data, processes="all")
    refused("processes must be", gfast.g_effect, model, GA(), **data, processes="both")


CASES = {"sharded": sharded, "replicated": replicated}


def check(name: str, rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        CASES[name](rank, world)
    finally:
        distributed.destroy_process_group()
