"""One of several processes of `gfast unlearn` that FSDP2 makes share a model, by Accelerate's own code, over gloo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from gfast import cli
from gfast.commands import shards
from gfast.files import write_json
from gfast.training import sharded_start
from helpers.training_parallel import join
from helpers.training_sharded import real_fsdp2


def words(model: Any, **options: Any) -> list[str]:
    """Flags of three steps on four texts of each side."""
    usual = dict(
        model=model,
        data="bundled",
        max_forget=4,
        max_retain=4,
        objective="NPO",
        retain_term="kl",
        learning_rate=1e-3,
        adam_epsilon=1e-2,  # where a gradient is all rounding its sign decides nothing
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_steps=3,
        per_device_train_batch_size=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    return [word for name, value in (usual | options).items() for word in (f"--{name}", str(value))]


def private() -> int:
    """Bytes of memory that are this process's alone, without the pages of files, which all share."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def watched(found: dict[str, int]) -> None:
    """Count what this process holds of the model: once it is loaded, and once it is sharded."""
    load, check = shards.Shards.load, sharded_start.check_loaded

    def loading(self, *given):
        before = private()
        model = load(self, *given)
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # with it Accelerate asks for an accelerator
        found["memory"] = private() - before
        found["whole"] = sum(getattr(p, "ds_numel", p.numel()) * p.itemsize for p in model.parameters())
        held = [getattr(p, "ds_tensor", p) for p in model.parameters()]
        found["loaded"] = sum(p.nbytes for p in held if not p.is_meta)
        return model

    def checking(model, processes):
        check(model, processes)
        parts = {p.to_local().untyped_storage() for p in model.parameters() if hasattr(p, "to_local")}
        found["sharded"] = sum(part.nbytes() for part in parts)

    shards.Shards.load, sharded_start.check_loaded = loading, checking


def run(flags: list[str], folder: str, sharding: str, rank: int, world: int, port: int) -> None:
    """`gfast unlearn` into the folder; what each process held of the model goes to a file beside it.

    sharding: "", "fsdp2", or "efficient": FSDP2 with fsdp_cpu_ram_efficient_loading.
    """
    join(rank, world, port)
    found: dict[str, int] = {}
    watched(found)
    if sharding:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(sharding == "efficient").lower()
        real_fsdp2(sharding == "efficient")
        shards.is_fsdp2 = lambda config: True
        flags = [*flags, "--ddp_backend", "gloo"]
        torch.manual_seed(rank)  # what a process drew for itself would differ
    code = cli.main(["unlearn", *flags, "--output_dir", folder])
    write_json(Path(f"{folder}-{rank}.json"), found | {"code": code})
