"""One of several processes of `gfast unlearn` whose model Accelerate's own code shards with FSDP2, on the CPU over gloo.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch
from safetensors.torch import save_file

from gfast import cli
from gfast.commands import shards
from gfast.commands import unlearn as command
from gfast.files import write_json
from helpers.training_parallel import join
from helpers.training_sharded import real_fsdp2


def held() -> int:
    """Bytes of this process alone, without the pages of files that processes share."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Watch:
    """What the process has of the model: bytes of parameters with values when it is loaded, and of memory."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def load(self, own):
        def load(self_, *given):
            before = held()
            model = own(self_, *given)
            os.environ.pop("ACCELERATE_USE_FSDP", None)  # with it Accelerate asks for an accelerator
            kept = [p for p in model.parameters() if not p.is_meta]
            self.found["parameters"] = sum(getattr(p, "ds_tensor", p).nbytes for p in kept)
            self.found["all"] = sum(getattr(p, "ds_numel", p.numel()) * p.itemsize for p in model.parameters())
            self.found["held"] = held() - before
            return model

        return load


def run(words: list[str], folder: str, efficient: bool, rank: int, world: int, port: int) -> None:
    """`gfast unlearn` with these words into the folder, and what each process had of the model in a file beside."""
    join(rank, world, port)
    watch = Watch()
    shards.Shards.load = watch.load(shards.Shards.load)
    if world > 1:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(efficient).lower()
        real_fsdp2(efficient)
        shards.is_fsdp2 = lambda config: True
        words = [*words, "--ddp_backend", "gloo"]
    code = cli.main(["unlearn", *words, "--output_dir", folder])
    watch.found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_json(Path(folder) / f"process-{rank}-of-{world}.json", watch.found)
    assert code == 0


def last_parameters(folder: str):
    """Not used by processes."""
