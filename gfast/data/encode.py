"""From a question and an answer to token ids, and where in them the answer begins.

The answer's tokens are what unlearning objectives weigh one by one, so the boundary must be exact: the prompt's ids
must be what a model is given at generation time, and everything after them, up to the token that ends the turn, is the
answer.
"""

from __future__ import annotations

from typing import Any

TEMPLATES = ("auto", "chat", "plain")


def plain_text(question: str, answer: str) -> tuple[str, str]:
    """The prompt without a chat template, and what follows it: `"Question: ...\\nAnswer:"` and `" ..."`.

    The space belongs to the answer, because most vocabularies hold words with their leading space.
    """
    return f"Question: {question}\nAnswer:", f" {answer}"


def resolve_template(tokenizer: Any, template: str) -> str:
    """`"chat"` or `"plain"`; `"auto"` means chat where the tokenizer has a chat template."""
    if template not in TEMPLATES:
        raise ValueError(f"gfast: template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise ValueError(
            'gfast: template="chat" needs a tokenizer with a chat template, and this one has none; use template="plain"'
        )
    return "chat" if has_chat and template != "plain" else "plain"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts in front of a text: `[bos]` or `[]`."""
    ids = list(tokenizer("").input_ids)
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def end_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "gfast: the tokenizer has no EOS token, so the end of an answer cannot be marked; "
            "set tokenizer.eos_token first"
        )
    return tokenizer.eos_token_id


def encode_plain(tokenizer: Any, question: str, answer: str) -> tuple[list[int], int]:
    """`[bos] + "Question: ...\\nAnswer: ..." + [eos]` and the number of prompt ids (BOS included)."""
    prompt, completion = plain_text(question, answer)
    head = leading_ids(tokenizer)
    prompt_ids, ids = _ids(tokenizer, prompt), _ids(tokenizer, prompt + completion)
    if ids[: len(prompt_ids)] != prompt_ids:
        # A vocabulary that merges across the boundary: keep the prompt as generation would see it.
        ids = prompt_ids + _ids(tokenizer, completion)
    return head + ids + [end_id(tokenizer)], len(head) + len(prompt_ids)


def encode_chat(tokenizer: Any, question: str, answer: str, chat_kwargs: dict | None = None) -> tuple[list[int], int]:
    """One user and one assistant turn under the tokenizer's chat template, and the number of prompt ids.

    The sequence ends with the template's end-of-turn token (what it adds after that, such as a newline, is no part of
    an answer and is cut), or with EOS where the template has none. The template writes its own BOS, if any.

    Raises:
        ValueError: the prompt (`add_generation_prompt=True`) is not a prefix of the whole conversation, or the answer
            is not found in it; the boundary between the two is then unknown.
    """
    kwargs = {**(chat_kwargs or {}), "tokenize": False}
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, **kwargs)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False, **kwargs)
    advice = 'use template="plain", or chat_kwargs= to pass options to the chat template'
    if not text.startswith(prompt):
        raise ValueError(
            "gfast: under this chat template the prompt with its generation prompt is not a prefix of the "
            f"conversation, so the answer's beginning is unknown (prompt ends {prompt[-40:]!r}); {advice}"
        )
    start = len(text) - len(text[len(prompt) :].lstrip())
    if not text.startswith(answer, start):
        start = text.find(answer, len(prompt))
    if start < 0:
        raise ValueError(
            f"gfast: the chat template changed the answer {answer[:60]!r}: it is not in its output; {advice}"
        )

    if text[len(prompt) : start].strip():
        # The template writes more before the answer, such as an empty block of thoughts: context, not answer.
        prompt = text[:start]
    tail = text[start + len(answer) :]
    added = {i for token, i in tokenizer.get_added_vocab().items() if token in tail}
    tail_ids = _ids(tokenizer, tail)
    end = next((n for n, i in enumerate(tail_ids) if i in added), None)
    if end is None:
        ids = _ids(tokenizer, text.rstrip()) + [end_id(tokenizer)]
    else:
        # Added tokens split the text before anything else does, so the ids from the end-of-turn token on are those of
        # the tail.
        ids = _ids(tokenizer, text)
        ids = ids[: len(ids) - (len(tail_ids) - end - 1)]
        if ids[-1] != tail_ids[end]:
            raise ValueError(f"gfast: cannot find the end of the answer in the chat template's output; {advice}")
    prompt_ids = _ids(tokenizer, prompt)
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(
            "gfast: under this chat template the prompt's token ids are not a prefix of the conversation's, "
            f"so the answer's first token is unknown (prompt ends {prompt[-40:]!r}); {advice}"
        )
    return ids, len(prompt_ids)
