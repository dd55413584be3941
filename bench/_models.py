"""Random models of real shapes, and batches of questions with short answers, for the benchmarks that need a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": dict(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "llama-2-7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=False,
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Batch = dict[str, torch.Tensor]


def random_model(shape: str, dtype: str = "fp32", device: str = "cpu", layers: int | None = None) -> nn.Module:
    """A Llama of the shape with random weights and no dropout, made on its device; `layers` cuts its depth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(DTYPES[dtype]).eval()


def answers(vocab: int, rows: int, tokens: int, seed: int, device: str = "cpu") -> Batch:
    """Rows of different lengths, padded to `tokens`; the first third of each is a question without labels.

    At least one row fills the width, as with padding to the longest.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, tokens), generator=generator)
    lengths = torch.randint(max(2, tokens // 2), tokens + 1, (rows, 1), generator=generator)
    lengths[0] = tokens
    position = torch.arange(tokens)
    mask = (position < lengths).long()
    labels = torch.where((position >= lengths // 3) & (mask == 1), ids, -100)
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def padded(batch: Batch, tokens: int) -> Batch:
    """The batch padded on the right to a fixed width."""
    extra = tokens - batch["input_ids"].shape[1]
    if extra <= 0:
        return batch
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {key: nn.functional.pad(value, (0, extra), value=fill[key]) for key, value in batch.items()}


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    return {key: value[start:stop] for key, value in batch.items()}
