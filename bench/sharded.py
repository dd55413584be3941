"""Memory of one process of a G-effect on a model that FSDP2 shards, against one process with the whole model.

    python bench/sharded.py --processes 2 --json sharded.json

What PyTorch's CPU allocator has given out at a time, by its profiler, and the parameters held before; equal effects are
asked first. Law: at 2 processes at most 0.55 of one.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from harness import environment
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import gfast
from gfast.objectives import TNPO

SHAPE = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=8, vocab_size=2048)
LAW = 0.55


def batches(seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, SHAPE["vocab_size"], (1, 32), generator=generator) for _ in range(2)]
    return [{"input_ids": x, "labels": x, "ref_logp": torch.full((1, 32), -7.0)} for x in ids]


def highest(function) -> tuple[int, object]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = function()
    now = top = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top, result


def measured(model: torch.nn.Module) -> dict[str, object]:
    data = {"forget": batches(1), "retain": batches(2)}
    held = sum((p.to_local() if hasattr(p, "to_local") else p).untyped_storage().nbytes() for p in model.parameters())
    top, effect = highest(lambda: gfast.g_effect(model, TNPO(beta=1.0), **data))
    return {"mb": (held + top) / 2**20, "parameters_mb": held / 2**20, "retain": effect.total("retain")}


def one(rank: int, processes: int, port: int, folder: str) -> None:
    os.environ["GFAST_POOL_MIB"] = "0"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    if processes > 1:
        address = f"tcp://127.0.0.1:{port}"
        distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    found = measured(model)
    Path(folder, f"{processes}-{rank}.json").write_text(json.dumps(found))
    if processes > 1:
        distributed.destroy_process_group()


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, *options.processes):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            multiprocessing.spawn(one, args=(processes, port, folder), nprocs=processes)
            found = [json.loads(Path(folder, f"{processes}-{rank}.json").read_text()) for rank in range(processes)]
            worst = max(found, key=lambda row: row["mb"])
            rows.append(
                {"processes": processes, **worst, "ratio": worst["mb"] / (rows[0]["mb"] if rows else worst["mb"])}
            )
            apart = abs(worst["retain"] - rows[0]["retain"]) / abs(rows[0]["retain"])
            assert apart < 1e-4, f"the effect differs by {apart:.1e}"
            says = f", law {LAW}: {'kept' if rows[-1]['ratio'] <= LAW else 'broken'}" if processes == 2 else ""
            print(f"{processes} processes: {worst['mb']:.0f} MB in the largest, {rows[-1]['ratio']:.3f} of one{says}")
    if options.json:
        Path(options.json).write_text(json.dumps({"environment": environment("cpu"), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
