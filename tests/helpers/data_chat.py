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


def sentencepiece_tokenizer(extra: str = ""):
    """As Llama 2's: a space in front of every text, words with their leading space, bytes for what has no token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = sorted(set("▁ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:.,?!#/[]<>|_-'é" + extra))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("▁", "N"), ("▁N", "o"), ("o", "b"), (":", "▁")]
    for token in [*letters, *("".join(pair) for pair in merges)]:
        vocab.setdefault(token, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def wordpiece_tokenizer():
    """As BERT's, lower case: [CLS] in front of a text, [SEP] behind it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = "[PAD] [UNK] [CLS] [SEP] question answer who ? : nobody ##body no it ' s . cafe".split()
    vocab = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


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
