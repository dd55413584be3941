"""A Trainer of transformers that unlearns: a mixin and an objective, and the G-effect in its log.

    python examples/transformers_trainer.py [MODEL]

Without a model a small random one is trained on the bundled authors. What gfast adds to a Trainer of one's own is
marked.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gfast import GEffectCallback  # 1
from gfast.data import Collator, QADataset, batches, bundled_authors, demo_tokenizer
from gfast.integrations.transformers import GFastLossMixin  # 2
from gfast.objectives import WGA


class Unlearn(GFastLossMixin, Trainer):  # 3
    objective = WGA(alpha=0.5)  # 4


def main(model_name: str | None = None, folder: str = "unlearned", steps: int = 3) -> Trainer:
    if model_name:
        model, tokenizer = (kind.from_pretrained(model_name) for kind in (AutoModelForCausalLM, AutoTokenizer))
    else:
        tokenizer = demo_tokenizer()
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    forget, retain = (QADataset(rows[:8], tokenizer) for rows in bundled_authors())
    collator = Collator(tokenizer)
    args = TrainingArguments(folder, max_steps=steps, gradient_accumulation_steps=2, logging_steps=1, report_to="none")
    trainer = Unlearn(model, args, train_dataset=forget, data_collator=collator)
    sides = (batches(data, collator, 4) for data in (forget, retain))
    trainer.add_callback(GEffectCallback(2, *sides, Unlearn.objective))  # 5
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:2])
