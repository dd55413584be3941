# SPDX-License-Identifier: Apache-2.0
"""An exact fingerprint of a model: equal if and only if (up to SHA-256) the parameters are equal."""

from __future__ import annotations

import hashlib
import re

from torch import nn

from gfast import peft_models, sharded, wrappers
from gfast.tensor_files import hash_tensor

# What PEFT puts into the name of a parameter of the base.
_OF_BASE = re.compile(r"\.(?:(?:base_layer|original_module|token_adapter)\.)+")


def model_fingerprint(model: nn.Module, adapters: bool | str = False) -> str:
    """SHA-256 over the name, dtype, shape and every byte of the parameters, in the order of their names.

    Adapter weights are left out and wrapper prefixes are stripped, so that a PEFT model has the fingerprint of its base
    model: the reference of an adapter run is the model with its adapters off. With ``adapters`` they count too, with
    the name of one its own weights. Reads the parameters in pieces of 64 MiB. Those that FSDP2 or ZeRO-3 have sharded
    are gathered one at a time, so that the fingerprint is that of the whole model: every process must ask for it.
    ValueError, naming it, for a parameter that has no values here (offloaded, on the meta device).

    >>> import torch
    >>> a = nn.Linear(2, 2)
    >>> before = model_fingerprint(a)
    >>> with torch.no_grad():
    ...     _ = a.weight[0, 0].add_(1e-3)
    >>> model_fingerprint(a) == before
    False
    """
    sharded.reshard(model)
    digest = hashlib.sha256()
    for name, parameter in sorted(_parameters(model, adapters)):
        if sharded.local(parameter).is_meta:
            wrappers.refuse_offloaded(model, "A fingerprint, by which a reference cache is known, is of every value")
        with sharded.whole(parameter) as values:
            hash_tensor(digest, name, values)
    return digest.hexdigest()


def _parameters(model: nn.Module, adapters: bool | str) -> list[tuple[str, nn.Parameter]]:
    own = None if adapters is True else peft_models.adapter_parameters(model)
    chosen = []
    for name, parameter in model.named_parameters():
        if own is not None:
            if isinstance(adapters, str) and adapters in name.split("."):
                chosen.append((name, parameter))
                continue
            if id(parameter) in own:
                continue
            name = _OF_BASE.sub(".", name)
        chosen.append((name if adapters is True else wrappers.unwrap_name(name), parameter))
    return chosen
