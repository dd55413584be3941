# SPDX-License-Identifier: Apache-2.0
"""The beginning of a training that shards its model (FSDP2, ZeRO-3)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from gfast import sharded
from gfast.model_state import rng_kept
from gfast.tensor_files import hash_tensor
from gfast.training.pending import PendingReference
from gfast.training.reference import ReferenceCache


class ShardedStart(TrainerCallback):
    """When the model has been sharded, before the first step and before whatever measures: nothing of it may be without
    values, and references are computed.
    """

    def __init__(self, references: Sequence[ReferenceCache]) -> None:
        self.references = [reference for reference in references if isinstance(reference, PendingReference)]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module = None, **kwargs: Any) -> None:
        check_loaded(model, args.world_size)
        for reference in self.references:
            with rng_kept():
                reference.fill(model)
        sharded.reshard(model)


def check_loaded(model: nn.Module, processes: int) -> None:
    """ValueError unless every parameter and buffer has values, and every process the same buffers, which nobody shards:
    each process makes them by itself, or is handed them.
    """
    digests = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if sharded.local(tensor).is_meta:
            raise ValueError(
                f"gfast: {name!r} has no values after the model has been sharded, so that this training would be of "
                f"something else: load the whole model in every process (fsdp_cpu_ram_efficient_loading: false)"
            )
    for name, buffer in model.named_buffers():
        hash_tensor(digest := hashlib.sha256(), name, buffer)
        digests[name] = digest.hexdigest()
    if processes == 1:
        return
    from accelerate.utils import gather_object

    for rank, other in enumerate(gather_object([digests])):
        for name, value in other.items():
            if digests.get(name) != value:
                raise ValueError(
                    f"gfast: the buffer {name!r} of process {rank} is not that of others, so that they would compute "
                    f"with different models: load the whole model in every process (fsdp_cpu_ram_efficient_loading: "
                    f"false)"
                )
