"""A small Llama that knows a few facts about invented authors by heart: what the notebooks forget from. Ten seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import gfast
from gfast.data import Collator, QADataset, batches, bundled_authors, demo_tokenizer
from gfast.objectives import NLL


@dataclass
class Taught:
    """A model, its tokenizer, and the questions and answers it has learned: some to forget, some to keep."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    forget: QADataset
    retain: QADataset

    def batches(self, data: QADataset, reference: gfast.ReferenceCache | None = None) -> list[dict]:
        """`data` in batches of 8, with what `reference` knows joined."""
        return batches(data, Collator(self.tokenizer, reference), 8)

    def reference(self) -> gfast.ReferenceCache:
        """What the model says now of the forget set, for objectives that compare with it."""
        return gfast.ReferenceCache.build(self.model, self.forget, Collator(self.tokenizer))

    @torch.no_grad()
    def nll(self, data: QADataset) -> float:
        """Mean negative log-likelihood a token, in nats, over all label tokens of `data`."""
        sums = [gfast.model_loss(self.model, batch, NLL(), reduction="sum").loss.item() for batch in self.batches(data)]
        return sum(sums) / sum(int((batch["labels"] != -100).sum()) for batch in self.batches(data))


def taught(seed: int = 0, epochs: int = 40) -> Taught:
    torch.manual_seed(seed)
    tokenizer = demo_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=4,
            num_attention_heads=4,
        )
    )
    forget, retain = bundled_authors()
    result = Taught(
        model, tokenizer, QADataset(forget[:10], tokenizer), QADataset(retain[:20], tokenizer, id_offset=10)
    )
    data = result.batches(result.forget) + result.batches(result.retain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(data))
    for _ in range(epochs):
        for batch in data:
            gfast.model_loss(model, batch, NLL()).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return result
