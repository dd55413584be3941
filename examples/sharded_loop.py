"""A model that FSDP2 shards over processes: a few steps of WGA and NLL, and the G-effect of all processes together.

    torchrun --nproc_per_node 2 examples/sharded_loop.py          # GPUs by NCCL, or CPUs by gloo

The numbered lines are what gfast adds to a loop of one's own.
"""

from __future__ import annotations

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import gfast  # 1
from gfast.objectives import NLL, WGA  # 2


def batch_of(seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "labels": ids}


def main(steps: int = 3) -> list[float]:
    device = (
        torch.device("cuda", distributed.get_rank() % torch.cuda.device_count())
        if torch.cuda.is_available()
        else (torch.device("cpu"))
    )
    torch.manual_seed(0)  # the same weights everywhere
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(device)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # every process has the same batches: gfast deals them out
    sets = {
        "forget": [batch_of(seed, device) for seed in (1, 2)],
        "retain": [batch_of(seed, device) for seed in (3, 4)],
    }
    totals, rank = [], distributed.get_rank()
    for step in range(steps):
        effect = gfast.g_effect(model, WGA(alpha=1.0), **sets)  # 3
        totals.append(effect.total("unlearn"))
        mine = (10 * step + rank) * 2  # of training each process has its own
        loss = gfast.model_loss(model, batch_of(mine, device), WGA(alpha=1.0)).loss  # 4
        loss = loss + gfast.model_loss(model, batch_of(mine + 1, device), NLL()).loss  # 5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {float(loss.detach()):+.4f}, unlearn {totals[-1]:+.4f}")
    return totals


if __name__ == "__main__":
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main()
    distributed.destroy_process_group()
