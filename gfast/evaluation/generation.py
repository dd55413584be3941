# SPDX-License-Identifier: Apache-2.0
"""Generation for a batch of prompts, padded on the left, with a key-value cache, by the model's `generate`."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gfast import wrappers
from gfast.evaluation.scoring import left_padded, reach
from gfast.rotary import unstretched

logger = logging.getLogger("gfast")


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
    how = {"max_new_tokens": limit, "eos_token_id": list(ends) or None, "pad_token_id": pad_id}
    if temperature is not None:
        how |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    longest = max(map(len, prompts)) + limit
    if len(prompts) * samples == 1 or (longest <= reach(model) and _batches_alike(model, prompts, pad_id)):
        rows = _run(model, prompts, pad_id, how | {"num_return_sequences": samples})
    else:
        rows = [_run(model, [prompt], pad_id, how)[0] for prompt in prompts for _ in range(samples)]
    generations = []
    for row in rows:
        end = next((at for at, token in enumerate(row) if token in ends), None)
        generations.append(Generated(row if end is None else row[:end], end is not None))
    return generations


def _run(model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int, how: Mapping[str, Any]) -> list[list[int]]:
    """What comes after each prompt, padded on the left to the longest."""
    width = max(map(len, prompts))
    return _generated(model, prompts, pad_id, how, width)[:, width:].tolist()


def _generated(
    model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int, how: Mapping[str, Any], width: int
) -> Any:
    ids, mask = left_padded(prompts, pad_id, width, next(model.parameters()).device)
    options = {"synced_gpus": True} if wrappers.has_fsdp(model) else {}
    with _settings(model, how), torch.no_grad(), unstretched(model):
        return wrappers.measured(model).generate(input_ids=ids, attention_mask=mask, **options)


_alike: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _batches_alike(model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int) -> bool:
    """Whether this model answers a prompt in a batch, padded on the left, as it does by itself; tried once. Not so one
    whose state takes in what is masked (RWKV), or whose positions count it (BART's decoder).
    """
    inner = wrappers.measured(model)
    if inner not in _alike:
        reason = _unlike(model, inner, prompts, pad_id)
        _alike[inner] = reason is None
        if reason is not None:
            logger.info("prompts are answered one by one: in a batch %s %s", type(inner).__name__, reason)
    return _alike[inner]


def _unlike(model: nn.Module, inner: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int) -> str | None:
    """How a model answers a prompt beside a longer one otherwise than by itself; None: it does not."""
    how = {"max_new_tokens": 2, "pad_token_id": pad_id, "output_logits": True, "return_dict_in_generate": True}
    short, long = min(prompts, key=len), max(prompts, key=len)

    def first(some: Sequence[Sequence[int]], width: int) -> Tensor:
        logits = _generated(model, some, pad_id, how, width).logits
        return torch.stack([of_step[0].float() for of_step in logits])  # [2, V]

    plain = first([short], len(short))
    try:
        padded = first([short, long], max(len(long), len(short) + 1))
    except Exception as error:  # padding is met in many ways, and fails in as many
        return f"fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    # The second token's are of other texts where a tie fell the other way.
    steps = 2 if plain[0].argmax() == padded[0].argmax() else 1
    apart, size = float((plain - padded)[:steps].abs().max()), float(plain[:steps].abs().max())
    # Of 16 bits, TF32 or 8-bit products rounding is more, and one by one would be slow for nothing.
    coarse = any(p.dtype.itemsize < 4 for p in inner.parameters()) or torch.get_float32_matmul_precision() != "highest"
    alike = apart <= (3e-2 if coarse else 1e-4) * max(size, 1.0)  # not so of NaN
    return None if alike else f"gives logits that differ by {apart:.3g}"


@contextlib.contextmanager
def _settings(model: nn.Module, how: Mapping[str, Any]) -> Iterator[None]:
    from transformers import GenerationConfig

    # Not as an argument of generate: transformers fills a given configuration up with the model's own settings.
    owners = [
        m for m in wrappers.measured(model).modules() if hasattr(m, "generation_config") and hasattr(m, "generate")
    ]
    configs = [owner.generation_config for owner in owners]
    config = GenerationConfig(**{"do_sample": False, "use_cache": True, **how})
    try:
        for owner in owners:
            owner.generation_config = config
        yield
    finally:
        for owner, before in zip(owners, configs, strict=True):
            owner.generation_config = before


def text_of(tokenizer: Any, ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """The text of a generation, up to the first of `stops`, without special tokens and surrounding white space."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()
