# SPDX-License-Identifier: Apache-2.0
"""Exact fingerprints of models and data sets: equal if and only if (up to SHA-256) the contents are equal."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

CHUNK_BYTES = 64 << 20


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the name, dtype, shape and every byte of the parameters, in the order of their names.

    Adapter weights are left out and wrapper prefixes are stripped, so that a PEFT model has the fingerprint of its base
    model: the reference of an adapter run is the model with its adapters off. Reads the parameters in pieces of 64 MiB.

    >>> a = nn.Linear(2, 2)
    >>> before = model_fingerprint(a)
    >>> with torch.no_grad():
    ...     _ = a.weight[0, 0].add_(1e-3)
    >>> model_fingerprint(a) == before
    False
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(_base_parameters(model)):
        digest.update(f"{name}|{parameter.dtype}|{tuple(parameter.shape)}|".encode())
        flat = parameter.detach().contiguous().reshape(-1).view(torch.uint8)  # [bytes]
        for start in range(0, flat.numel(), CHUNK_BYTES):
            digest.update(flat[start : start + CHUNK_BYTES].cpu().numpy())
    return digest.hexdigest()


def data_fingerprint(items: Iterable[Any]) -> str:
    """SHA-256 over all items of a data set (dicts of tensors, numbers and strings, nested), in the data set's order.

    >>> data_fingerprint([{"input_ids": [1, 2]}]) == data_fingerprint([{"input_ids": torch.tensor([1, 2])}])
    True
    """
    digest = hashlib.sha256()
    count = 0
    for item in items:
        _update(digest, item)
        count += 1
    digest.update(f"|{count}".encode())
    return digest.hexdigest()


def _base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    from gfast.hf import unwrap_name

    adapter_prefix = (
        getattr(getattr(model, "base_model", None), "prefix", None) if hasattr(model, "peft_config") else None
    )
    chosen = []
    for name, parameter in model.named_parameters():
        if adapter_prefix is not None:
            if adapter_prefix in name or ".modules_to_save." in name:
                continue
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        chosen.append((unwrap_name(name), parameter))
    return chosen


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{{{key}:".encode())
            _update(digest, value[key])
        digest.update(b"}")
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}:".encode())
        if all(type(entry) is int for entry in value):
            digest.update(",".join(map(str, value)).encode())
        else:
            for entry in value:
                _update(digest, entry)
    elif value is None or isinstance(value, (bool, int, str)):
        digest.update(f"{value!r};".encode())
    elif isinstance(value, float):
        digest.update(("nan;" if math.isnan(value) else f"{value.hex()};").encode())
    else:
        raise ValueError(
            f"cannot fingerprint a {type(value).__name__} in a data set item; use tensors, numbers, strings, lists, "
            "dicts"
        )
