"""Memory of one process of a G-effect on a model that FSDP2 shards, against one process with the whole model.

    python bench/sharded.py --processes 2 --json sharded.json

What PyTorch's CPU allocator has given out at a time, by its profiler, and the parameters held before; equal effects are
asked first. Law: at 2 processes at most 0.55 of one. Beside it the same for a plain backward: FSDP2 holds the gathered
parameters and the gradients of a few blocks at a time, whoever calls it, so that what is above one half falls with the
number of blocks. Models of as many parameters are measured with 16 and with 64 of them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from machine import environment
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import gfast
from gfast.objectives import TNPO

WIDTHS = {16: 512, 64: 256}  # blocks: hidden size
LAW = 0.55


def shape(blocks: int) -> dict[str, int]:
    hidden = WIDTHS[blocks]
    return dict(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=blocks, num_attention_heads=8)


def batches(seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 2048, (1, 32), generator=generator) for _ in range(2)]
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


def measured(model: torch.nn.Module) -> dict[str, float]:
    data = {"forget": batches(1), "retain": batches(2)}
    held = sum((p.to_local() if hasattr(p, "to_local") else p).untyped_storage().nbytes() for p in model.parameters())
    top, effect = highest(lambda: gfast.g_effect(model, TNPO(beta=1.0), **data))
    batch = data["forget"][0]
    plain, _ = highest(lambda: model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward())
    rows = {"mb": held + top, "plain_mb": held + plain, "parameters_mb": held}
    return {name: size / 2**20 for name, size in rows.items()} | {"retain": effect.total("retain")}


def one(rank: int, processes: int, blocks: int, port: int, folder: str) -> None:
    os.environ["GFAST_POOL_MIB"] = "0"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, **shape(blocks))).eval()
    if processes > 1:
        address = f"tcp://127.0.0.1:{port}"
        distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    measurement = measured(model)
    Path(folder, f"{processes}-{rank}.json").write_text(json.dumps(measurement))
    if processes > 1:
        distributed.destroy_process_group()


def case(blocks: int, processes: int) -> dict[str, float]:
    """The process that holds most."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        multiprocessing.spawn(one, args=(processes, blocks, port, folder), nprocs=processes)
        measurements = [json.loads(Path(folder, f"{processes}-{rank}.json").read_text()) for rank in range(processes)]
    return max(measurements, key=lambda row: row["mb"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--blocks", type=int, nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    rows = []
    for blocks in options.blocks:
        whole = case(blocks, 1)
        for processes in (1, *options.processes):
            measurement = whole if processes == 1 else case(blocks, processes)
            apart = abs(measurement["retain"] - whole["retain"]) / abs(whole["retain"])
            assert apart < 1e-4, f"the effect differs by {apart:.1e}"
            row = {"blocks": blocks, "processes": processes, **measurement}
            row |= {
                "ratio": measurement["mb"] / whole["mb"],
                "plain_ratio": measurement["plain_mb"] / whole["plain_mb"],
            }
            row |= {"law": LAW, "holds": row["ratio"] <= LAW} if processes == 2 else {}
            rows.append(row)
            says = f", law {LAW}: {'kept' if row['holds'] else 'broken'}" if "law" in row else ""
            print(
                f"{blocks} blocks, {processes} processes: {measurement['mb']:.0f} MB in the largest, "
                f"{row['ratio']:.3f} of one (a plain backward {row['plain_ratio']:.3f}){says}"
            )
    if options.json:
        Path(options.json).write_text(json.dumps({"environment": environment("cpu"), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
