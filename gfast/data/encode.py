"""From a question and an answer to token ids, and which of them are labels.

The answer's tokens are what unlearning objectives weigh one by one, so the boundary must be exact: the prompt's ids
must be what a model is given at generation time, and the labels are all that it has to write after them: the answer and
what ends the turn.
"""

from __future__ import annotations

import datetime
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

TEMPLATES = ("auto", "chat", "plain")
IGNORE = -100
# What `apply_chat_template` takes and gfast gives itself.
OWN_OPTIONS = ("conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message")
NO_END = (
    "gfast: the tokenizer has no EOS token, so the end of an answer cannot be marked; set tokenizer.eos_token first"
)
ADVICE = 'use template="plain", or chat_kwargs= to pass options to the chat template'


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


def make_encoder(tokenizer: Any, template: str, chat_kwargs: Mapping[str, Any] | None = None) -> Plain | Chat:
    """The encoder for a template that `resolve_template` gave: (question, answer) -> (token ids, labels)."""
    if template == "chat":
        return Chat(tokenizer, chat_kwargs)
    if chat_kwargs:
        raise ValueError(
            f"gfast: chat_kwargs ({', '.join(map(str, chat_kwargs))}) are options of a chat template, but the prompts "
            "are plain text; leave them out"
        )
    return Plain(tokenizer)


class Plain:
    """`[bos] + "Question: ...\\nAnswer: ..." + [eos]`; in front is whatever the tokenizer puts in front of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, question: str, answer: str, ended: bool = True) -> tuple[list[int], list[int]]:
        """Without the end where the answer was cut (`ended` false)."""
        _refuse_markup(self._control, self._read, question, answer)
        prompt, completion = plain_text(question, answer)
        ids, start = join(self.tokenizer, prompt, completion)
        head = self._leading
        end = [_end_id(self.tokenizer)] if ended else []
        return head + ids + end, [IGNORE] * (len(head) + start) + ids[start:] + end

    @cached_property
    def _leading(self) -> list[int]:
        return leading(self.tokenizer)

    @cached_property
    def _control(self) -> dict[str, int]:
        return _control(self.tokenizer, [])

    @cached_property
    def _read(self) -> Callable[[str], str | None]:
        return _reader(self.tokenizer, self._control)


class Chat:
    """One user and one assistant turn under the tokenizer's chat template.

    Where the answer stands is found by rendering the conversation with a placeholder in its place: what comes before
    it is the prompt, what comes after it ends the turn. With the true answer the template must write exactly the same
    around it, or it is refused.

    The sequence ends with the template's end-of-turn token (what it adds after that, such as a newline, is no part of
    an answer and is cut), or with EOS where the template has none. What it writes between the answer and its
    end-of-turn token, such as Llama 2's space, the model has to write too, or it would never come to the end: labels.
    What it writes before the answer, such as empty thoughts, is context, which evaluations give the model; and so are
    words behind the answer of a template without an end-of-turn token, which may be of the next turn. The template
    writes its own BOS, if any.

    Raises:
        ValueError: the template fails, changes the answer, writes it twice or not at all, or the prompt
            (`add_generation_prompt=True`) is not the beginning of the conversation: where the answer begins is then
            unknown. Or the question or the answer holds markup that the template uses itself.
    """

    def __init__(self, tokenizer: Any, chat_kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.options = _options(tokenizer, chat_kwargs)

    def __call__(self, question: str, answer: str, ended: bool = True) -> tuple[list[int], list[int]]:
        """Without the end, and what the template writes before it, where the answer was cut (`ended` false)."""
        _refuse_markup(self._control, self._read, question, answer)
        context, tail = self._around(question, answer)
        prompt = self._render([_user(question)], True)
        if not context.startswith(prompt):
            raise ValueError(
                "gfast: under this chat template the prompt with its generation prompt is not a prefix of the "
                f"conversation, so the answer's beginning is unknown (prompt ends {prompt[-40:]!r}); {ADVICE}"
            )
        if question not in prompt and prompt == self._render([_user(_placeholder(question))], True):
            raise ValueError(f"gfast: the chat template does not write the question {question[:60]!r}; {ADVICE}")
        # White space after the generation prompt, such as Llama 2's, is the model's to write: it may share a token
        # with the answer. Within the generation prompt it is given to the model, and stays as it is given.
        written = context[len(prompt) :]
        movable = len(written) - len(written.rstrip())
        if not ended:
            ids, start = join(self.tokenizer, context, answer, movable)
            return ids, [IGNORE] * start + ids[start:]
        end = _first_marker(self._markers, tail)
        between, closing = (tail.rstrip(), "") if end is None else (tail[: end[0]], end[1])
        ids, start = join(self.tokenizer, context, answer + between + closing, movable)
        if end is None:
            ids = [*ids, _end_id(self.tokenizer)]
        elif ids[-1] != self._markers[closing]:
            raise ValueError(f"gfast: cannot find the end of the answer in the chat template's output; {ADVICE}")
        labels = [IGNORE] * start + ids[start:]
        if end is None and between:
            through, _ = join(self.tokenizer, context, answer, movable)
            if ids[: len(through)] == through:
                labels[len(through) : -1] = [IGNORE] * (len(ids) - 1 - len(through))
        return ids, labels

    def _around(self, question: str, answer: str) -> tuple[str, str]:
        """What the template writes before the answer and after it."""
        place = _placeholder(question + answer)
        before, *after = self._render([_user(question), _assistant(place)]).split(place)
        if len(after) != 1:
            how = f"writes the answer {len(after)} times" if after else "changed the answer, or does not write it"
            raise ValueError(f"gfast: the chat template {how}, so the answer's tokens are unknown; {ADVICE}")
        text = self._render([_user(question), _assistant(answer)])
        if text != before + answer + after[0]:
            raise ValueError(
                f"gfast: the chat template changed the answer {answer[:60]!r}, or writes something else around it "
                f"than around another answer; {ADVICE}"
            )
        return before, after[0]

    def _render(self, messages: list[dict], generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=generation_prompt, tokenize=False, **self.options
            )
        except ImportError:
            raise
        except Exception as error:  # a template is a program of its own and may fail in any way
            reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
            raise ValueError(f"gfast: the chat template failed: {reason}; {ADVICE}") from error

    @cached_property
    def _markers(self) -> dict[str, int]:
        """The tokens that can end a turn. Some vocabularies add plain white space, which does not."""
        tokens = {**self.tokenizer.get_added_vocab(), **special_tokens(self.tokenizer)}
        return {token: index for token, index in tokens.items() if token.strip()}

    @cached_property
    def _control(self) -> dict[str, int]:
        question, answer = _placeholder("question"), _placeholder("answer")
        conversation = self._render([_user(question), _assistant(answer)])
        control = _control(self.tokenizer, [conversation, self._render([_user(question)], True)])
        end = _first_marker(self._markers, conversation.rpartition(answer)[2])
        return control if end is None else {**control, end[1]: self._markers[end[1]]}

    @cached_property
    def _read(self) -> Callable[[str], str | None]:
        return _reader(self.tokenizer, self._control)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _placeholder(text: str) -> str:
    """A word that is not in the text: letters only, so that no template has a reason to change it."""
    place = "qzplaceholderzq"
    while place in text:
        place += "zq"
    return place


def _options(tokenizer: Any, chat_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """chat_kwargs as `apply_chat_template` takes them."""
    options = dict(chat_kwargs or {})
    reserved = [name for name in OWN_OPTIONS if name in options]
    if reserved:
        raise ValueError(f"gfast: chat_kwargs cannot set {', '.join(reserved)}: gfast renders the conversation itself")
    source = chat_source(tokenizer, options)
    unread = [n for n in options if n != "chat_template" and not re.search(rf"\b{re.escape(str(n))}\b", source)]
    if unread:
        warnings.warn(
            f"gfast: the chat template reads no option named {', '.join(map(str, unread))} (chat_kwargs)", stacklevel=4
        )
    day = options.pop("strftime_now", None)
    if day is not None and "strftime_now" not in unread:
        options["chat_template"] = _stop_clock(source, day)
    return options


def chat_source(tokenizer: Any, chat_kwargs: Mapping[str, Any]) -> str:
    """The chat template that is used, of several named ones too; all of them where none is chosen."""
    chosen, template = chat_kwargs.get("chat_template"), tokenizer.chat_template
    if not isinstance(template, Mapping):
        return str(chosen or template)
    return str(template.get(chosen or "default", chosen or template))


def writes_date(tokenizer: Any, template: str, chat_kwargs: Mapping[str, Any]) -> bool:
    """Whether prompts may hold today's date: of a chat template that asks for it, with no day among its options."""
    if resolve_template(tokenizer, template) != "chat" or "strftime_now" in chat_kwargs:
        return False
    return "strftime_now" in chat_source(tokenizer, chat_kwargs)


def _stop_clock(source: str, day: Any) -> str:
    """The template with a `strftime_now` of its own, which writes a date that does not move.

    As a macro in front of it, because transformers passes no functions to templates: it writes for each directive of
    strftime that the template names what it is on that day. The line break is cut by `trim_blocks`.
    """
    try:
        date = datetime.datetime.fromisoformat(str(day))
    except ValueError:
        raise ValueError(f"gfast: chat_kwargs: strftime_now should be a date such as 2026-03-01, got {day!r}") from None
    named = sorted(set(re.findall(r"%[-_#^0]?[aAbBcdDefFGhHIjmMpSTuUVwWxXyYzZ]", source)))
    written = "".join(f"|replace({name!r}, {date.strftime(name)!r})" for name in named)
    return f"{{% macro strftime_now(format) %}}{{{{ format{written}|replace('%%', '%') }}}}{{% endmacro %}}\n{source}"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def leading(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts in front of a text. Not only BOS: [gMASK]<sop>, [CLS], a language tag. What comes
    after the text ends it and is no prompt.
    """
    text = plain_text("Who?", "")[0]
    whole, bare = list(tokenizer(text).input_ids), _ids(tokenizer, text)
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at]
    raise ValueError(
        "gfast: this tokenizer encodes a text differently with its special tokens and without, so what it puts in "
        "front of a prompt is unknown; use a chat template"
    )


def join(tokenizer: Any, context: str, rest: str, movable: int = 0) -> tuple[list[int], int]:
    """The ids of both texts and how many of them are the context's; of white space at its end the last `movable`
    characters go with the rest where they share a token with it."""
    whole = _ids(tokenizer, context + rest)
    for end in range(len(context), len(context) - movable - 1, -1):
        head = _ids(tokenizer, context[:end])
        if whole[: len(head)] == head:
            return whole, len(head)
    # A vocabulary that merges across the boundary: keep the context as generation would see it. A line break in front
    # of the rest keeps SentencePiece from writing the space that begins a text.
    head, anchor = _ids(tokenizer, context), _ids(tokenizer, "\n")
    after = _ids(tokenizer, "\n" + rest)
    after = after[len(anchor) :] if after[: len(anchor)] == anchor else _ids(tokenizer, rest)
    return head + after, len(head)


def _end_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(NO_END)
    return tokenizer.eos_token_id


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Its special tokens and their ids, those that were added later too."""
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {**named, **{str(token): index for index, token in added.items() if getattr(token, "special", False)}}


def _control(tokenizer: Any, written: Iterable[str]) -> dict[str, int]:
    """The special tokens that begin and end texts, and those of a chat template. Others, such as markers that a user
    has added, are words like any other."""
    names = ("bos_token", "eos_token", "sep_token", "cls_token", "pad_token")
    named = {str(getattr(tokenizer, name, None)) for name in names}
    frame = "\0".join([str(getattr(tokenizer, "chat_template", None) or ""), *written])
    return {t: i for t, i in special_tokens(tokenizer).items() if t.strip() and (t in named or t in frame)}


def _reader(tokenizer: Any, control: Mapping[str, int]) -> Callable[[str], str | None]:
    """Which of the tokens a text becomes that does not hold it as it is written: some are looked for in what a
    normalizer (lower case, NFKC) has made of the text.
    """
    added, unknown = getattr(tokenizer, "added_tokens_decoder", {}), getattr(tokenizer, "unk_token_id", None)
    made = {i: token for token, i in control.items() if i != unknown and getattr(added.get(i), "normalized", False)}
    return lambda text: next((made[i] for i in _ids(tokenizer, text) if i in made), None) if made else None


def _refuse_markup(control: Mapping[str, int], read: Callable[[str], str | None], question: str, answer: str) -> None:
    """A special token in the data would end a turn or begin one in the middle of a row."""
    for name, text in (("question", question), ("answer", answer)):
        token = max((token for token in control if token in text), key=len, default=None) or read(text)
        if token is not None:
            raise ValueError(
                f"gfast: the {name} contains {token!r}, which this tokenizer reads as a special token and not as text; "
                "remove it from the row or write it differently"
            )


def _first_marker(markers: Mapping[str, int], text: str) -> tuple[int, str] | None:
    """Where the first of the tokens stands in the text, and which it is: the longest of those that begin there."""
    places = [(text.find(token), -len(token), token) for token in markers if token in text]
    if not places:
        return None
    at, _, token = min(places)
    return at, token
