"""A trainer of open-unlearning with gfast's losses, built as its src/train.py builds one. What gfast adds is marked.

    PYTHONPATH=CLONE/src python examples/open_unlearning_trainer.py [MODEL]

CLONE is a clone of github.com/locuslab/open-unlearning. Its own script needs no change at all:
python -m gfast.integrations.open_unlearning src/train.py ... trainer=GFastNPO. Without a model a small random one is
trained on the bundled authors.
"""

import sys

import trainer as open_unlearning
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

import gfast.integrations.open_unlearning as ou  # 1
from gfast.data import ForgetRetain, QADataset, bundled_authors, demo_tokenizer

ou.register()  # 2


def main(model_name: str | None = None, folder: str = "unlearned", steps: int = 3):
    if model_name:
        model, tokenizer = (kind.from_pretrained(model_name) for kind in (AutoModelForCausalLM, AutoTokenizer))
    else:
        tokenizer = demo_tokenizer()
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    forget, retain = (QADataset(rows[:8], tokenizer) for rows in bundled_authors())
    args = TrainingArguments(folder, max_steps=steps, logging_steps=1, report_to="none", remove_unused_columns=False)
    trainer = open_unlearning.TRAINER_REGISTRY["GFastNPO"](  # 3: for NPO
        model=model,
        args=args,
        train_dataset=ForgetRetain(forget, retain, seed=0),
        processing_class=tokenizer,
        template_args=None,
        beta=0.1,
        retain_loss_type="KL",
        geffect_every=2,  # 4
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:2])
