"""One of several processes that call a wrapped model, and what one process gives on the batches of all of them."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gfast
from gfast.model_output import model_output
from gfast.objectives import GA, KL, NPO, RMU, TNPO
from gfast.wrappers import unwrap, unwrap_name
from helpers.geffect_models import VOCAB, tiny

OBJECTIVES = [GA(), TNPO(), NPO(0.3), KL(), RMU(layer=2)]


def batch_of(seed: int) -> dict:
    """As many labels whatever the seed: a mean over processes is the mean over all labels then."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, 7), generator=generator)
    labels = ids.clone()
    labels[:, :2] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "ref_logp": -4 + torch.randn(2, 7, generator=generator, dtype=torch.float64),
        "ref_hidden": torch.randn(2, 7, 16, generator=generator, dtype=torch.float64),
        "ref_head": torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64),
    }


def joined(batches: list[dict]) -> dict:
    return {k: batches[0][k] if k == "ref_head" else torch.cat([b[k] for b in batches]) for k in batches[0]}


def fsdp(model, root: bool | None = None, head: bool = False, blocks: bool = True):
    for block in unwrap(model).model.layers if blocks else ():
        fully_shard(block)
    if head:
        fully_shard(model.lm_head)
    return fully_shard(model, reshard_after_forward=root)


def by_accelerate(model):
    """Sharded by Accelerate's own code: blocks and embeddings, and the final norm and head as one group."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    layers = [type(unwrap(model).model.layers[0]).__name__]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layers,
        cpu_ram_efficient_loading=False,
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    return fsdp2_prepare_model(SimpleNamespace(state=state, mixed_precision="no", is_main_process=False), model)


def old_fsdp(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def with_adapters(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config).double()


# name -> how the model is made, and how it is wrapped
WRAPPERS = {
    "ddp": (lambda: tiny("llama"), DistributedDataParallel),
    "ddp, tied": (lambda: tiny("tied_llama"), DistributedDataParallel),
    "ddp, unused": (lambda: tiny("llama"), functools.partial(DistributedDataParallel, find_unused_parameters=True)),
    "ddp, static": (lambda: tiny("llama"), functools.partial(DistributedDataParallel, static_graph=True)),
    "ddp, views": (lambda: tiny("llama"), functools.partial(DistributedDataParallel, gradient_as_bucket_view=True)),
    "ddp, compiled": (lambda: tiny("llama"), lambda m: torch.compile(WRAPPERS["ddp, unused"][1](m), backend="eager")),
    "ddp, adapters": (lambda: with_adapters(tiny("llama")), DistributedDataParallel),
    "fsdp2": (lambda: tiny("llama"), fsdp),
    "fsdp2, tied": (lambda: tiny("tied_llama"), fsdp),
    "fsdp2, root alone": (lambda: tiny("llama"), functools.partial(fsdp, blocks=False)),
    "fsdp2, root given back": (lambda: tiny("llama"), functools.partial(fsdp, root=True)),
    "fsdp2, head of its own": (lambda: tiny("llama"), functools.partial(fsdp, head=True)),
    "fsdp2, tied, given back": (lambda: tiny("tied_llama"), functools.partial(fsdp, root=True)),
    "fsdp2, accelerate": (lambda: tiny("llama"), by_accelerate),
    "fsdp2, accelerate, tied": (lambda: tiny("tied_llama"), by_accelerate),
    "fsdp2, adapters": (lambda: with_adapters(tiny("llama")), fsdp),
    "fsdp1": (lambda: tiny("llama"), functools.partial(old_fsdp, use_orig_params=True)),
}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            found[unwrap_name(name)] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def compare(name: str, rank: int, world: int) -> None:
    make, wrap = WRAPPERS[name]
    batches = [batch_of(seed) for seed in range(world)]
    truth = make().eval()
    wrapped = wrap(make().eval())
    assert model_output(truth, batches[rank]).head is not None
    if "fsdp2" in name:
        assert any(type(parameter).__name__ == "DTensor" for parameter in wrapped.parameters()), "not sharded"
        with torch.set_grad_enabled(True):
            assert model_output(wrapped, batches[rank]).head is not None, "logits are computed"
    plain = "fsdp1" in name  # shards of a flat parameter have no gradients by name
    for objective in OBJECTIVES:
        if isinstance(objective, RMU) and name in ("ddp", "ddp, tied", "ddp, adapters", "ddp, static", "ddp, views"):
            continue  # such a loss leaves parameters unused, which these settings of DDP do not allow
        for _ in range(2):  # DDP and FSDP keep state from one step to the next
            wrapped.zero_grad()
            out = gfast.model_loss(wrapped, batches[rank], objective)
            out.loss.backward()
        truth.zero_grad()
        expected = gfast.model_loss(truth, joined(batches), objective)
        expected.loss.backward()
        losses = [torch.zeros_like(out.loss) for _ in range(world)]
        distributed.all_gather(losses, out.loss.detach())
        exact = 1e-6 if isinstance(objective, RMU) else 1e-9  # whose value is fp32 whatever the model is
        torch.testing.assert_close(torch.stack(losses).mean(), expected.loss.detach(), rtol=exact, atol=1e-12)
        if plain:
            with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
                found = copy.deepcopy(gradients(wrapped))
        else:
            found = gradients(wrapped)
        right = gradients(truth)
        right = {key: grad for key, grad in right.items() if key in found or bool(grad.any())}
        assert found.keys() >= right.keys(), (name, objective, right.keys() - found.keys())
        for key, grad in right.items():
            message = f"{name} {objective} {key}"
            torch.testing.assert_close(
                found[key], grad, rtol=10 * exact, atol=exact / 1e3, msg=lambda text, m=message: f"{m}: {text}"
            )
    with torch.no_grad():
        torch.testing.assert_close(gfast.model_logp(wrapped, batches[rank]), gfast.model_logp(truth, batches[rank]))
    if name == "ddp":  # each process measures what it is given
        found, right = (
            gfast.g_effect(m, TNPO(), forget=batches[rank], retain=batches[1 - rank], engine=engine).unlearn
            for m, engine in ((wrapped, "stream"), (truth, "stream"))
        )
        assert all(abs(found[group] - value) <= 1e-9 * abs(value) for group, value in right.items())


def check(name: str, rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        compare(name, rank, world)
    finally:
        distributed.destroy_process_group()
