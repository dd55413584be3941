# SPDX-License-Identifier: Apache-2.0
"""A model that training shards over processes (FSDP2, ZeRO-3): loaded so that no device ever holds the whole of it, and
what is asked of it before.

With FSDP2 a model stays in host memory until training shards it. With `fsdp_cpu_ram_efficient_loading` only the first
process of a machine has its values there; the others have its shapes, and Accelerate hands them their shards. With
ZeRO-3 transformers shards what it loads at once. In both the reference cache is computed by the sharded model, when
training begins (`gfast.training.sharded_start`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.integrations import deepspeed as hf_deepspeed

from gfast import peft_models
from gfast.commands.arguments import ModelArguments
from gfast.commands.models import load_model
from gfast.training.config import UnlearnConfig
from gfast.training.fingerprints import model_fingerprint
from gfast.training.pending import PendingReference
from gfast.training.processes import together
from gfast.training.reference import ReferenceCache

_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


class Shards:
    """How the processes of a training share its model: `kind` is "fsdp2", "zero3" or None, where each has all of it."""

    def __init__(self, config: UnlearnConfig) -> None:
        self.config, self.main = config, config.process_index == 0
        self.kind = None
        if config.world_size > 1 and hf_deepspeed.is_deepspeed_zero3_enabled():
            self.kind = "zero3"
        elif config.world_size > 1 and is_fsdp2(config):
            self.kind = "fsdp2"
        self._fingerprints: dict[bool, str] = {}

    def load(self, arguments: ModelArguments, config: Any) -> nn.Module:
        """The model of the flags, whose configuration was found: whole on the device of each process, or as it is
        before it is sharded.
        """
        if self.kind is None:
            with _loaded_whole(self.config):
                return load_model(arguments).to(self.config.device)
        efficient = self.kind == "fsdp2" and _says_yes(_EFFICIENT)
        if efficient:
            os.environ["ACCELERATE_USE_FSDP"] = "true"  # which Accelerate does too, but later
        # Weights that are packed, or unpacked on the way, are loaded by everybody. transformers 4 does this by itself.
        plain = not arguments.gguf_file and getattr(config, "quantization_config", None) is None
        empty = efficient and plain and int(transformers.__version__.split(".")[0]) >= 5
        empty = empty and self.config.local_process_index != 0
        models: list[nn.Module] = []
        together(lambda: models.append(load_model(arguments, empty)), self.config.world_size)
        model = models[0]
        if efficient:
            _refuse_kept_buffers(model)
        for number, parameter in enumerate(model.parameters()):
            if parameter.is_meta:  # Accelerate tells the optimizer's parameters apart by where they are
                parameter.data_ptr = lambda number=number: -1 - number
        return model

    def check(self, trainer: Any) -> None:
        """ValueError where the model has been loaded for another way of sharding than the trainer's."""
        if self.kind == "fsdp2" and not getattr(trainer.accelerator, "is_fsdp2", False):
            raise ValueError(
                "FSDP2 was asked for, and Accelerate would train without it on this device: leave it out, or take one "
                "that it supports"
            )

    def of_main(self, ask: Callable[[], Any]) -> Any:
        """What the first process finds, in every process."""
        told: list[Any] = []
        together((lambda: told.append(ask())) if self.main else None, self.config.world_size)
        if self.config.world_size == 1:
            return told[0]
        from accelerate.utils import gather_object

        return gather_object(told or [None])[0]

    def fingerprint(self, model: nn.Module, adapters: bool = False) -> str:
        """`model_fingerprint` of the model as it was loaded, before mixed precision has changed its dtype; in every
        process. With FSDP2 the first process has all of it, with ZeRO-3 all gather it.
        """
        if adapters not in self._fingerprints:
            if self.kind == "zero3":
                digest = model_fingerprint(model, adapters)
            else:
                digest = self.of_main(lambda: model_fingerprint(model, adapters))
            self._fingerprints[adapters] = digest
        return self._fingerprints[adapters]

    def reference(
        self, model: nn.Module, data: Any, collator: Any, path: Path, checkpoint: Path | None, **options: Any
    ) -> ReferenceCache:
        """`ReferenceCache.build`: from its file, or when training begins. ValueError where it would have to be computed
        by a model that goes on from a checkpoint.
        """
        adapted = options["reference"] == "adapted" and peft_models.is_adapted(model)
        options |= {"fingerprint": self.fingerprint(model, adapted)}
        if self.of_main(path.exists):
            return ReferenceCache.build(model, data, collator, path, **options)
        if checkpoint is not None:
            raise ValueError(
                f"there is no {path}, and a sharded model computes it before its first step, not in a run that goes on "
                f"from {checkpoint}: restore the file, or start a new run"
            )

        def build(sharded: nn.Module) -> ReferenceCache:
            cache = ReferenceCache.build(sharded, data, collator, **options)
            self.of_main(lambda: cache.save(path))
            return cache

        return PendingReference(options["what"], options["layer"], build)

    def gather_when_saved(self, trainer: Any) -> None:
        """From now on the trainer saves whole weights, as `from_pretrained` takes them, and not shards of them."""
        if trainer.is_fsdp_enabled:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")


def is_fsdp2(config: UnlearnConfig) -> bool:
    """Whether Accelerate will shard the model with FSDP2, by the arguments or by what `accelerate launch` has set."""
    if config.device.type == "cpu":  # where Accelerate takes DDP instead
        return False
    asked = getattr(config, "fsdp_plugin_args", None)
    if asked is not None:
        return int(asked.get("fsdp_version", 1)) == 2
    return _says_yes("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") == "2"


def _says_yes(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes", "y", "on", "t")


def _refuse_kept_buffers(model: nn.Module) -> None:
    saved = set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    name = next((name for name, _ in model.named_buffers() if name in saved), None)
    if name is not None:
        raise ValueError(
            f"{type(model).__name__} saves a buffer, {name!r}, which Accelerate cannot hand from one process to the "
            "others: set fsdp_cpu_ram_efficient_loading to false, so that each loads the model by itself"
        )


@contextlib.contextmanager
def _loaded_whole(config: UnlearnConfig) -> Iterator[None]:
    """A model that is loaded in here has all of its values in every process, whatever FSDP 1 and DeepSpeed say."""
    deepspeed = getattr(config, "hf_deepspeed_config", None)
    efficient = os.environ.pop(_EFFICIENT, None)
    if deepspeed is not None:
        hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if deepspeed is not None:
            hf_deepspeed.set_hf_deepspeed_config(deepspeed)
        if efficient is not None:
            os.environ[_EFFICIENT] = efficient
