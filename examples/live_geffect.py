"""The G-effect of every training step, in a plain loop and in transformers' Trainer. What gfast adds is marked.

python examples/live_geffect.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gfast
from gfast.data import ForgetRetain, ForgetRetainCollator, QADataset, bundled_authors, demo_tokenizer
from gfast.integrations.transformers import GFastLossMixin
from gfast.objectives import NLL, WGA, Mix


def small_model(tokenizer) -> LlamaForCausalLM:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))


def data(tokenizer):
    forget, retain = (QADataset(rows[:8], tokenizer) for rows in bundled_authors())
    return ForgetRetain(forget, retain), ForgetRetainCollator(tokenizer)


def plain_loop(steps: int = 4) -> list[gfast.GEffect]:
    tokenizer = demo_tokenizer()
    model, (pairs, collate) = small_model(tokenizer), data(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = gfast.GEffectMonitor(model, objective=WGA(), optimizer=optimizer)  # 1
    effects = []
    while len(effects) < steps:
        for batch in torch.utils.data.DataLoader(pairs, batch_size=4, collate_fn=collate):
            monitor.forget(gfast.model_loss(model, batch["forget"], WGA()))  # 2
            monitor.retain(gfast.model_loss(model, batch["retain"], NLL()))  # 3
            effects.append(monitor.effect())
            optimizer.step()
            optimizer.zero_grad()
    return effects[:steps]


class Unlearn(GFastLossMixin, Trainer):
    objective = Mix(WGA(), NLL())


def transformers_trainer(folder: str = "unlearned", steps: int = 3) -> Trainer:
    tokenizer = demo_tokenizer()
    pairs, collate = data(tokenizer)
    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=4, logging_steps=1, report_to="none",
        remove_unused_columns=False,
    )  # fmt: skip
    live = dict(geffect_live=True, surgery="pcgrad:group")  # all that there is to say
    trainer = Unlearn(small_model(tokenizer), args, train_dataset=pairs, data_collator=collate, **live)
    trainer.train()
    return trainer


if __name__ == "__main__":
    print(*plain_loop(), sep="\n")
    for entry in transformers_trainer().state.log_history:
        print({name: value for name, value in entry.items() if name.startswith("geffect_live")})
