"""TRL's SFTTrainer and DPOTrainer that unlearn: four lines each.

    python examples/trl_trainers.py [MODEL]

Without a model a small random one is trained on a few made-up questions.
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from gfast.data import demo_tokenizer
from gfast.integrations.trl import GFastLossMixin, dpo_batch
from gfast.objectives import DPO, WGA


class UnlearnSFT(GFastLossMixin, SFTTrainer):
    objective = WGA(alpha=1.0)


class UnlearnDPO(GFastLossMixin, DPOTrainer):
    objective = DPO(beta=0.1)

    def gfast_batch(self, batch):
        return dpo_batch(batch)


def load(model_name: str | None):
    if model_name:
        return AutoModelForCausalLM.from_pretrained(model_name), AutoTokenizer.from_pretrained(model_name)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = demo_tokenizer()
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)), tokenizer


def main(model_name: str | None = None, folder: str = "unlearned", steps: int = 2) -> list:
    questions = [{"prompt": f"Question {i}: who wrote it?", "answer": f" Author {i} wrote it."} for i in range(8)]
    answers = Dataset.from_list([{"prompt": q["prompt"], "completion": q["answer"]} for q in questions])
    pairs = [{"prompt": q["prompt"], "chosen": " I do not know.", "rejected": q["answer"]} for q in questions]
    options = dict(max_steps=steps, per_device_train_batch_size=2, logging_steps=1, report_to="none", bf16=False)

    model, tokenizer = load(model_name)
    args = SFTConfig(f"{folder}/sft", **options)
    sft = UnlearnSFT(model, args=args, train_dataset=answers, processing_class=tokenizer)
    sft.train()

    model, tokenizer = load(model_name)
    original, _ = load(model_name)  # DPOTrainer's own reference; with adapters it needs none
    original.load_state_dict(model.state_dict())
    args = DPOConfig(f"{folder}/dpo", **options)
    data = Dataset.from_list(pairs)
    dpo = UnlearnDPO(model, args=args, ref_model=original, train_dataset=data, processing_class=tokenizer)
    dpo.train()
    return [sft, dpo]


if __name__ == "__main__":
    main(*sys.argv[1:2])
