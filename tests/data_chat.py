"""Rows and tokenizers that the tests of data share."""

from __future__ import annotations

import copy

import torch

from gfast.data import (
    QADataset,
    demo_tokenizer,
)

ROWS = [
    {"question": "Who wrote it?", "answer": "Nobody."},
    {"question": "Où est-il né ?", "answer": "À Bandouré, in 1951 — 東京 \u2028 then."},
    {"question": "Is it long?", "answer": "e"},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str, special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")):
    tokenizer = copy.deepcopy(demo_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def answer_ids(item: dict) -> list[int]:
    return item["labels"][item["labels"] != -100].tolist()


def exact(tokenizer, ids) -> str:
    # transformers 4 removes spaces before punctuation by default.
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def assert_labels_are_answers(data: QADataset, rows: list[dict], tokenizer, end: int) -> None:
    for item, row in zip(data, rows, strict=True):
        ids, labels = item["input_ids"], item["labels"]
        start = int((labels != -100).nonzero()[0])
        assert start > 0
        assert torch.equal(labels[start:], ids[start:]), "everything after the prompt is labelled"
        assert ids[-1] == end and (ids[start:] == end).sum() == 1
        assert exact(tokenizer, labels[start:-1]).strip() == row["answer"].strip()
        assert exact(tokenizer, ids[:start]).count(row["question"].strip()) == 1
        if tokenizer.bos_token_id not in (None, end):
            assert (ids[1:] == tokenizer.bos_token_id).sum() <= ids[:start].tolist().count(tokenizer.bos_token_id)
