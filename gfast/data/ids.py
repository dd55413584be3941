"""Token ids against a model's vocabulary, and the text of each token of a sequence."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gfast.data.encode import IGNORE
from gfast.embedding_rows import positions_of, rows_of


def check_vocabulary(model: Any, dataset: Any, tokenizer: Any = None, name: str = "the data set") -> None:
    """Refuse, before any pass, token ids that have no row in the model's embedding, labels that its head cannot score,
    and texts that are longer than its table of positions, where it has one: on a GPU they end in an assertion of the
    device that no error message survives.

    A model with more rows than the tokenizer has tokens is fine.

    Args:
        model: a Hugging Face model, also with adapters; or what `vocabulary_sizes` gave of one.
        dataset: items as `QADataset` or `PreferenceDataset` gives them.
        tokenizer: names the token in the message; its padding token is checked too.
        name: what the message calls the data.

    Raises:
        ValueError: the message names the row (from 1) and the token, both sizes, and what to do.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from gfast.data import QADataset, bundled_authors, check_vocabulary, demo_tokenizer
        >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **size))
        >>> data = QADataset(bundled_authors()[0], demo_tokenizer())
        >>> check_vocabulary(model, data, demo_tokenizer())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: gfast: the data set, row 1: the token ...'Question' (id ...) is beyond ... which has 64 rows; ...
    """
    sizes = model if isinstance(model, Mapping) else vocabulary_sizes(model)
    for index in range(len(dataset)):
        item = dataset[index]
        for key, values in item.items():
            size = sizes.get(key.removeprefix("preferred_"))
            if size is None:
                continue
            values = torch.as_tensor(values)
            if (takes := sizes.get("positions")) is not None and len(values) > takes:
                raise ValueError(
                    f"gfast: {name}, row {index + 1} has {len(values)} tokens, and the model has a table of {takes} "
                    f"positions (max_position_embeddings): give max_length={takes}, or leave such rows out"
                )
            beyond = values[(values >= size) | ((values < 0) & (values != IGNORE))]
            if len(beyond):
                where = "vocabulary of the model's head" if key.endswith("labels") else "model's embedding"
                raise ValueError(_message(f"{name}, row {index + 1}", int(beyond[0]), where, size, tokenizer))
    pad, size = getattr(tokenizer, "pad_token_id", None), sizes["input_ids"]
    if pad is not None and size is not None and pad >= size:
        instead = "; or set tokenizer.pad_token = tokenizer.eos_token"
        raise ValueError(_message("the padding", pad, "model's embedding", size, tokenizer) + instead)


def vocabulary_sizes(model: Any) -> dict[str, int | None]:
    """Rows of the embedding, of the head and of a table of positions, None where a model of its own kind does not say
    or has none: what is needed of a model to check data that are made later."""
    rows = {"input_ids": _rows(model, "get_input_embeddings"), "labels": _rows(model, "get_output_embeddings")}
    return {**rows, "positions": None if rows["input_ids"] is None else positions_of(model)}


def _message(where: str, token: int, what: str, size: int, tokenizer: Any) -> str:
    known = tokenizer is not None and 0 <= token < len(tokenizer)
    text = f"the token {tokenizer.convert_ids_to_tokens(token)!r} (id {token})" if known else f"token id {token}"
    message = f"gfast: {where}: {text} is beyond the {what}, which has {size} rows"
    if not known:
        return f"{message}; encode the data with the model's own tokenizer"
    return (
        f"{message}; the tokenizer has {len(tokenizer)} tokens. Use the model's own tokenizer, or resize the model and "
        f"save it before: model.resize_token_embeddings({len(tokenizer)})"
    )


def _rows(model: Any, getter: str) -> int | None:
    try:
        return rows_of(getattr(model, getter)())
    except (NotImplementedError, AttributeError):
        return None


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the text before it: joined, the pieces are the decoded sequence.

    Tokens cannot be decoded one by one: SentencePiece would lose the space in front of each word, and a character of
    several bytes may span tokens. It belongs to the token that completes it; the ones before get "".

    Example:
        >>> from gfast.data import demo_tokenizer, token_pieces
        >>> token_pieces(demo_tokenizer(), demo_tokenizer()(" The 東").input_ids)
        ['<bos>', ' The', ' ', '', '', '東']
    """
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    ids, pieces, done, held = [int(token) for token in ids], [], "", None
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], **options)
        if text.endswith("\ufffd") and count < len(ids):
            pieces.append("")  # a character that is not complete yet
            held = text
            continue
        if held is not None and held.startswith(done) and text.startswith(held):
            pieces[-1], done = held[len(done) :], held  # it was that very character
        held = None
        shared = len(os.path.commonprefix([done, text]))
        # Some decoders change the end of what they wrote before, as WordPiece's does at an apostrophe.
        for at in range(len(pieces) - 1, -1, -1):
            if len(done) == shared:
                break
            shorter = max(len(pieces[at]) - (len(done) - shared), 0)
            pieces[at], done = pieces[at][:shorter], done[: len(done) - len(pieces[at]) + shorter]
        pieces.append(text[shared:])
        done = text
    return pieces
