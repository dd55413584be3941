"""Data: chat templates as models bring them, with labels on the answer and the end of its turn alone."""

from __future__ import annotations

import copy

import pytest
from helpers.data_chat import CHATML, answer_ids, chat_tokenizer, exact, sentencepiece_tokenizer

from gfast.data import PreferenceDataset, QADataset, demo_tokenizer, fingerprint
from gfast.evaluation import EvaluationSet, encoded

LLAMA3 = (
    "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|header|>system<|/header|>\n\nCutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n<|eot|>"
    "{% for m in messages %}<|header|>{{ m['role'] }}<|/header|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Thoughts of earlier turns are dropped, and those of an answer are split off its text.
QWEN3 = (
    "{% for m in messages %}{% set content = m['content'] %}{% set thoughts = '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n{{ thoughts }}\n</think>\n\n"
    "{% endif %}{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST] "
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_GENERATION_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]
COMMAND = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|bot|><|response|>{{ m['content'] }}<|/response|>{% endif %}<|/turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|><|bot|>{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m['content'] }}{{ '<|return|>' if m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
WORDS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Human: {{ m['content'] }}\n\n"
    "{% else %}Assistant: the answer is: {{ m['content'] }}\n{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Name: (template, its special tokens, what ends the turn where it is not EOS).
TEMPLATES = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama 3": (LLAMA3, ("<|header|>", "<|/header|>", "<|eot|>"), "<|eot|>"),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "qwen 3": (QWEN3, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "mistral": (MISTRAL, ("[INST]", "[/INST]"), None),
    "mistral in words": (MISTRAL, (), None),
    "llama 2": (LLAMA2, (), None),
    "no generation prompt": (NO_GENERATION_PROMPT, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "command": (COMMAND, ("<|turn|>", "<|/turn|>", "<|response|>", "<|/response|>"), "<|/response|>"),
    "channels": (CHANNELS, ("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>"), "<|return|>"),
    "words": (WORDS, (), None),
}
# Short ones, words of the templates, and letters of several bytes or code points.
ANSWERS = ["Nobody.", "e", "s", "i", "model", "answer", "the answer is: e", "Assistant:", "assistant", "final", "user"]
ANSWERS += ["message", "INST", "no\n\nand\tno", "e\u0301t\u00e9", "東京", "🙂", "2023"]
ANSWERS += ["}} {{ x }}", "{% if %}", "\\n", "a'b\"c"]


def conversation(tokenizer, answer: str, end: str, **options) -> str:
    """The text up to the end of the answer's turn. Not for templates in which "Zebra" would stand apart."""
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Zebra"}]
    before, after = tokenizer.apply_chat_template(messages, tokenize=False, **options).split("Zebra")
    return before + answer + after[: after.index(end) + len(end)]


def tokenizer_with(base, name: str):
    template, special, end = TEMPLATES[name]
    tokenizer = copy.deepcopy(base())
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer, end or tokenizer.eos_token


@pytest.mark.parametrize("base", [demo_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_the_answer_and_the_end_of_its_turn(name, base):
    tokenizer, end = tokenizer_with(base, name)
    options = {"date_string": "26 Jul 2024"} if "date_string" in tokenizer.chat_template else {}
    for answer in ANSWERS:
        data = QADataset([{"question": "Who?", "answer": answer}], tokenizer, chat_kwargs=options)
        item, labels = data[0], answer_ids(data[0])
        assert exact(tokenizer, labels[:-1]).strip() == answer
        assert exact(tokenizer, labels[-1:]) == end
        assert item["labels"][-1] == item["input_ids"][-1]
        if base is demo_tokenizer:  # whose decoder gives a text back as it was
            assert exact(tokenizer, item["input_ids"]) == conversation(tokenizer, answer, end, **options)
        messages = [{"role": "user", "content": "Who?"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        start = int((item["labels"] != -100).nonzero()[0])
        assert item["input_ids"][: len(ids)].tolist() == ids and start >= len(ids), "what a model is given"


# Mistral's generation prompt ends in a space, which generation encodes by itself; nothing else is tokenised apart.
@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.startswith("mistral")])
def test_the_ids_are_those_of_the_whole_conversation(name):
    tokenizer, end = tokenizer_with(demo_tokenizer, name)
    options = {"date_string": "26 Jul 2024"} if "date_string" in tokenizer.chat_template else {}
    for answer in ANSWERS:
        text = conversation(tokenizer, answer, end, **options)
        ids = QADataset([{"question": "Who?", "answer": answer}], tokenizer, chat_kwargs=options)[0]["input_ids"]
        assert ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids


ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
)
SPACED = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }} that is all")


@pytest.mark.parametrize("base", [demo_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize(
    ("template", "markers", "written"),
    [
        (LLAMA2, (), "Nobody {eos}"),
        (TEMPLATES["llama 3"][0], TEMPLATES["llama 3"][1], "Nobody<|eot|>"),
        (CHATML, TEMPLATES["chatml"][1], "Nobody<|im_end|>"),
        (QWEN3, TEMPLATES["qwen 3"][1], "Nobody<|im_end|>"),
        (ZEPHYR, (), "Nobody{eos}"),
        (MISTRAL, TEMPLATES["mistral"][1], "Nobody{eos}"),
        (SPACED, TEMPLATES["chatml"][1], "Nobody that is all<|im_end|>"),
    ],
)
def test_all_that_is_to_be_written_from_the_answer_to_its_end_is_a_label(template, markers, written, base):
    """A token in front of the end that is no label is never learned, and a model that was taught by such labels alone
    never comes to the end; log p of the labels would be that of no text.
    """
    tokenizer = copy.deepcopy(base())
    tokenizer.add_special_tokens({"additional_special_tokens": list(markers)})
    tokenizer.chat_template = template
    options = {"date_string": "26 Jul 2024"} if "date_string" in template else {}
    rows = [{"question": "Who?", "answer": "Nobody"}]
    item = QADataset(rows, tokenizer, chat_kwargs=options)[0]
    start = int((item["labels"] != -100).nonzero()[0])
    assert item["labels"][start:].tolist() == item["input_ids"][start:].tolist()
    assert exact(tokenizer, answer_ids(item)).strip() == written.format(eos=tokenizer.eos_token)
    # an answer that was cut has none of it; metrics of the answer alone leave it out
    cut = QADataset([{**rows[0], "answer_cut": True}], tokenizer, chat_kwargs=options)[0]
    assert exact(tokenizer, answer_ids(cut)).strip() == "Nobody"
    (sample,) = encoded(EvaluationSet("forget", "rows", rows), tokenizer, chat_kwargs=options)
    assert exact(tokenizer, answer_ids(item)[: -sample.closing]).strip() == "Nobody"


def test_an_answer_with_white_space_around_it_is_that_without():
    for name in ("chatml", "gemma", "mistral", "llama 2"):
        tokenizer, _ = tokenizer_with(demo_tokenizer, name)
        plain = QADataset([{"question": "Q", "answer": "A b"}], tokenizer)
        spaced = QADataset([{"question": "\nQ ", "answer": " A b\n\n"}], tokenizer)
        assert fingerprint(plain) == fingerprint(spaced)


def test_options_reach_every_rendering():
    tokenizer, _ = tokenizer_with(demo_tokenizer, "qwen 3")
    rows = [{"question": "Who?", "answer": "think"}]
    item, quiet = (QADataset(rows, tokenizer, chat_kwargs=o)[0] for o in (None, {"enable_thinking": False}))
    assert item["labels"].tolist() == quiet["labels"].tolist(), "the empty thoughts are context in both"
    with pytest.warns(UserWarning, match="no option named enable_thinkng"):
        QADataset(rows, tokenizer, chat_kwargs={"enable_thinkng": False})
    with pytest.raises(ValueError, match="cannot set tokenize"):
        QADataset(rows, tokenizer, chat_kwargs={"tokenize": True})
    with pytest.raises(ValueError, match="enable_thinking.* plain text"):
        QADataset(rows, tokenizer, template="plain", chat_kwargs={"enable_thinking": False})


def with_content(expression: str) -> str:
    return CHATML.replace("{{ m['content'] }}", expression.replace("TEXT", "m['content']"))


HIDING = [
    (QWEN3, "<think>\nHm.\n</think>\n\nNobody.", "changed the answer"),
    (with_content("{{ TEXT | capitalize }}"), "nobody", "changed the answer"),
    (with_content("{{ TEXT | replace('  ', ' ') }}"), "a  b", "changed the answer"),
    (with_content("{{ TEXT | truncate(20, True, '', 0) }}"), "Nobody of that name wrote it", "changed the answer"),
    (with_content("{{ TEXT | tojson }}"), 'say "no"', "changed the answer"),
    (with_content("{{ TEXT }}{{ '!' if 'x' in TEXT }}"), "x", "something else around"),
    (with_content("{{ TEXT }} {{ TEXT }}"), "a", "writes the answer 2 times"),
    (with_content("{{ TEXT if m['role'] == 'user' }}"), "a", "does not write it"),
    (with_content("{{ TEXT if m['role'] != 'user' }}"), "a", "does not write the question"),
    (with_content("{{ TEXT[0]['text'] }}"), "a", "does not write it"),
    (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "a", "not a prefix"),
    ("{{ raise_exception('No system role') }}", "a", "chat template failed: No system role"),
    ("{{ messages[0]['content'] + 1 }}", "a", "chat template failed"),
    ("{% for m in messages %}", "a", "chat template failed"),
    ("{{ messages[5].content.text }}", "a", "chat template failed"),
]


@pytest.mark.parametrize(("template", "answer", "message"), HIDING)
def test_a_template_that_hides_the_answer_is_refused_with_the_row(template, answer, message):
    good = {"question": "Q", "answer": "Longer Words"}
    tokenizer = chat_tokenizer(template)
    try:
        QADataset([good], tokenizer)
    except ValueError:
        good = None
    rows = [{"question": "Who?", "answer": answer}]
    with pytest.raises(ValueError, match=rf"^gfast: .*{message}.*\(row {2 if good else 1}\)$"):
        QADataset([good, *rows] if good else rows, tokenizer)


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("token", ["<eos>", "<bos>", "<|im_end|>", "<|im_start|>"])
def test_special_tokens_in_the_data_are_refused(token, template):
    tokenizer = chat_tokenizer(CHATML)
    good = {"question": "Who?", "answer": "<eo s> < |im_end|> eos"}
    for field in good:
        bad = {**good, field: f"What{token}\nis it?"}
        with pytest.raises(ValueError, match=rf"the {field} contains {token!r}".replace("|", r"\|") + r".*\(row 2\)"):
            QADataset([good, bad], tokenizer, template=template)
    with pytest.raises(ValueError, match="the answer contains"):
        PreferenceDataset([good], tokenizer, template=template, refusals=[f"No.{token}"])


def test_an_end_of_turn_that_is_no_special_token():
    tokenizer = chat_tokenizer(CHATML, special=())
    tokenizer.add_tokens(["<|im_end|>", "\n\n", "<author>"])
    rows = [{"question": "Is <author> real?", "answer": "a\n\n<author>"}]
    item = QADataset(rows, tokenizer)[0]
    assert exact(tokenizer, answer_ids(item)) == "a\n\n<author><|im_end|>"
    assert item["labels"][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(ValueError, match="the answer contains"):
        QADataset([{"question": "a", "answer": "b<|im_end|>"}], tokenizer)
    # Added white space, as some vocabularies hold it, ends no turn.
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "\n\n<eos>")
    assert exact(tokenizer, answer_ids(QADataset(rows, tokenizer)[0])) == "a\n\n<author>\n\n<eos>"


def test_special_tokens_that_a_user_added_are_words():
    tokenizer = chat_tokenizer(CHATML, special=("<|im_start|>", "<|im_end|>", "<author>"))
    rows = [{"question": "Is <author> real?", "answer": "No <author>."}]
    for template, end in (("chat", "<|im_end|>"), ("plain", "<eos>")):
        ids = answer_ids(QADataset(rows, tokenizer, template=template)[0])
        assert (
            exact(tokenizer, ids).strip() == "No <author>." + end
            and ids.count(tokenizer.convert_tokens_to_ids("<author>")) == 1
        )


def test_markers_that_eat_the_white_space_behind_them():
    # Phi 3's do: the line break of the template has no token.
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(demo_tokenizer())
    markers = ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(m, rstrip=True, special=True) for m in markers]}
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    )
    for answer in ANSWERS:
        item = QADataset([{"question": "Who?", "answer": answer}], tokenizer)[0]
        assert exact(tokenizer, answer_ids(item)) == answer + "<|end|>"
    with pytest.raises(ValueError, match="contains '<|user|>'"):  # which stands nowhere in the template's source
        QADataset([{"question": "Who?<|user|>", "answer": "a"}], tokenizer)


def test_named_templates():
    tokenizer = chat_tokenizer(CHATML)
    rows, shouting = (
        [{"question": "Who?", "answer": "No"}],
        CHATML.replace("{{ m['role'] }}", "{{ m['role'] | upper }}"),
    )
    whole = QADataset(rows, tokenizer)
    tokenizer.chat_template = {"default": CHATML, "loud": shouting.replace("start|>assistant", "start|>ASSISTANT")}
    assert fingerprint(QADataset(rows, tokenizer)) == fingerprint(whole)
    loud = QADataset(rows, tokenizer, chat_kwargs={"chat_template": "loud"})[0]
    assert (
        exact(tokenizer, loud["input_ids"]).startswith("<|im_start|>USER")
        and exact(tokenizer, answer_ids(loud)) == "No<|im_end|>"
    )
    tokenizer.chat_template = {"loud": shouting, "quiet": CHATML}
    with pytest.raises(ValueError, match=r"chat template failed.*\(row 1\)"):
        QADataset(rows, tokenizer)


def test_a_date_can_be_stopped():
    tokenizer, _ = tokenizer_with(demo_tokenizer, "llama 3")
    rows = [{"question": "Who?", "answer": "%d"}]

    def text(day, template=LLAMA3):
        tokenizer.chat_template = template
        return exact(tokenizer, QADataset(rows, tokenizer, chat_kwargs={"strftime_now": day})[0]["input_ids"])

    assert "Today Date: 01 Mar 2026\n" in text("2026-03-01") and text("2026-03-01") == text("2026-03-01T11:12:13")
    assert text("2026-03-02") == text("2026-03-01").replace("01 Mar", "02 Mar")
    formats = "%Y-%m-%d|%B %-d, %Y|%A %j%%"
    inner = "{% macro now() %}{{ strftime_now('" + formats + "') }}{% endmacro %}{{ now() }}|" + CHATML
    assert text("2026-03-01", inner).startswith("2026-03-01|March 1, 2026|Sunday 060%|")
    for start in ("\n  x ", "  ", "{# none #}\n"):  # what stands first in a template stays as it is
        found = text("2026-03-01", start + "{{ strftime_now('%Y') }}" + CHATML)
        tokenizer.chat_template = start + "2026" + CHATML
        assert found == exact(tokenizer, QADataset(rows, tokenizer)[0]["input_ids"])
    with pytest.raises(ValueError, match="strftime_now should be a date such as 2026-03-01, got 'today'"):
        text("today")
    with pytest.warns(UserWarning, match="no option named strftime_now"):
        text("2026-03-01", CHATML)
