"""A loop of one's own: NPO on the forget set beside NLL on the retain set, the original's log-probs computed once.

python examples/plain_loop.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gfast  # 1
from gfast.data import Collator, ForgetRetain, ForgetRetainCollator, QADataset, bundled_authors, demo_tokenizer
from gfast.objectives import NLL, NPO  # 2


def main(steps: int = 4) -> list[float]:
    tokenizer = demo_tokenizer()
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    forget, retain = (QADataset(rows[:8], tokenizer) for rows in bundled_authors())
    cache = gfast.ReferenceCache.build(model, forget, Collator(tokenizer))  # 3
    collate = ForgetRetainCollator(Collator(tokenizer, reference=cache), Collator(tokenizer))
    loader = torch.utils.data.DataLoader(ForgetRetain(forget, retain), batch_size=4, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    while len(losses) < steps:
        for batch in loader:
            loss = gfast.model_loss(model, batch["forget"], NPO(beta=0.1)).loss  # 4
            loss = loss + gfast.model_loss(model, batch["retain"], NLL()).loss  # 5
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses[:steps]


if __name__ == "__main__":
    print(main())
