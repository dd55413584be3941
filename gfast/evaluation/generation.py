# SPDX-License-Identifier: Apache-2.0
"""Generation for a batch of prompts, padded on the left, with a key-value cache, by the model's `generate`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gfast import wrappers


class Generated(NamedTuple):
    """ids: what came after the prompt, without the token that ended it. ended: whether one did."""

    ids: list[int]
    ended: bool


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    limit: int,
    ends: Sequence[int],
    pad_id: int,
    samples: int = 1,
    temperature: float | None = None,
) -> list[Generated]:
    """The greedy continuation of each prompt, up to `limit` tokens or the first of the tokens `ends`; with a
    temperature `samples` draws for each, one prompt after the other, from softmax(z / temperature).

    The model's own generation settings (sampling, penalties, minimal lengths) are put aside: the same model and prompt
    give the same text.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)  # [B, P]
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    how = {"max_new_tokens": limit, "eos_token_id": list(ends), "pad_token_id": pad_id, "num_return_sequences": samples}
    if temperature is not None:
        how |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with _settings(model, how), torch.no_grad():
        options = {"synced_gpus": True} if wrappers.has_fsdp(model) else {}
        out = wrappers.measured(model).generate(input_ids=ids, attention_mask=mask, **options)[:, width:].tolist()
    found = []
    for row in out:
        end = next((at for at, token in enumerate(row) if token in ends), None)
        found.append(Generated(row if end is None else row[:end], end is not None))
    return found


@contextlib.contextmanager
def _settings(model: nn.Module, how: Mapping[str, Any]) -> Iterator[None]:
    from transformers import GenerationConfig

    # Not as an argument of generate: transformers fills a given configuration up with the model's own settings.
    owners = [
        m for m in wrappers.measured(model).modules() if hasattr(m, "generation_config") and hasattr(m, "generate")
    ]
    kept = [owner.generation_config for owner in owners]
    config = GenerationConfig(**{"do_sample": False, "use_cache": True, **how})
    try:
        for owner in owners:
            owner.generation_config = config
        yield
    finally:
        for owner, before in zip(owners, kept, strict=True):
            owner.generation_config = before


def text_of(tokenizer: Any, ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """The text of a generation, up to the first of `stops`, without special tokens and surrounding white space."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()
