"""A tokenizer made from the bundled text, for demos and tests that must not download one."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from gfast.data.bundled import bundled_authors, refusals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1800


@lru_cache(maxsize=1)
def demo_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the bundled authors and refusals: the same 1800 tokens every time, in well under a
    second.

    Special tokens: `<pad>` = 0, `<bos>` = 1 (put in front of every text), `<eos>` = 2. There is no unknown token and no
    chat template: any text can be encoded and comes back as it was. The object is made once and shared: copy it before
    changing it.

    Example:
        >>> from gfast.data import demo_tokenizer
        >>> tokenizer = demo_tokenizer()
        >>> tokenizer.decode(tokenizer("Thessaly Wrenmoor writes.").input_ids, skip_special_tokens=True)
        'Thessaly Wrenmoor writes.'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from gfast.data.encode import plain_text

    forget, retain = bundled_authors()
    lines = refusals()
    texts = ["".join(plain_text(row["question"], row["answer"])) for row in forget + retain]
    texts += ["".join(plain_text(row["question"], lines[i % len(lines)])) for i, row in enumerate(forget)]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
