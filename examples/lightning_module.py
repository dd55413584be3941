"""A LightningModule that unlearns: its training_step returns gfast's loss. What gfast adds is marked.

    pip install lightning
    python examples/lightning_module.py [MODEL]

Without a model a small random one is trained on the bundled authors.
"""

import sys

import pytorch_lightning as pl  # `pip install lightning` brings it; lightning.pytorch is the same
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import gfast  # 1
from gfast.data import Collator, ForgetRetain, ForgetRetainCollator, QADataset, bundled_authors, demo_tokenizer
from gfast.objectives import NLL, WGA  # 2


class Unlearn(pl.LightningModule):
    def __init__(self, model, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.model, self.learning_rate, self.losses = model, learning_rate, []

    def training_step(self, batch, index):
        loss = gfast.model_loss(self.model, batch["forget"], WGA(alpha=1.0)).loss  # 3
        loss = loss + gfast.model_loss(self.model, batch["retain"], NLL()).loss  # 4
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)


def main(model_name: str | None = None, folder: str = "unlearned", steps: int = 4) -> Unlearn:
    if model_name:
        model, tokenizer = (kind.from_pretrained(model_name) for kind in (AutoModelForCausalLM, AutoTokenizer))
    else:
        tokenizer = demo_tokenizer()
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    forget, retain = (QADataset(rows[:8], tokenizer) for rows in bundled_authors())
    collate = ForgetRetainCollator(Collator(tokenizer))
    loader = torch.utils.data.DataLoader(ForgetRetain(forget, retain, seed=0), batch_size=4, collate_fn=collate)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    module = Unlearn(model.train())
    pl.Trainer(max_steps=steps, accelerator="auto", devices=1, default_root_dir=folder, **quiet).fit(module, loader)
    return module


if __name__ == "__main__":
    print(main(*sys.argv[1:2]).losses)
