"""Data: what a tokenizer puts in front of a prompt, ids beyond a model's vocabulary, and the text of each token."""

from __future__ import annotations

import copy

import pytest
from helpers.data_chat import ROWS, answer_ids, exact, sentencepiece_tokenizer, wordpiece_tokenizer

from gfast.data import Collator, PreferenceDataset, QADataset, check_vocabulary, demo_tokenizer, token_pieces
from gfast.data.encode import plain_text


def tokenizer_that_adds(single: str, declared: bool = True):
    from tokenizers import processors

    tokenizer = copy.deepcopy(demo_tokenizer())
    names = [word for word in single.split() if not word.startswith("$")]
    tokenizer.add_special_tokens({"additional_special_tokens": [n for n in names if n not in tokenizer.get_vocab()]})
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in dict.fromkeys(names)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    if not declared:
        tokenizer.bos_token = None
    return tokenizer


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    ("single", "front"),
    [
        ("$A", []),
        ("<bos> $A", ["<bos>"]),
        ("<bos> $A <eos>", ["<bos>"]),
        ("$A <eos>", []),
        ("[gMASK] <sop> $A", ["[gMASK]", "<sop>"]),
        ("<bos> <fr> $A <eos>", ["<bos>", "<fr>"]),
        ("[CLS] $A [SEP]", ["[CLS]"]),
        ("<bos> <bos> $A <bos>", ["<bos>", "<bos>"]),
    ],
)
def test_a_plain_prompt_begins_as_the_tokenizer_begins_a_text(single, front, declared):
    tokenizer = tokenizer_that_adds(single, declared)
    data = QADataset(ROWS, tokenizer, template="plain")
    for item, row in zip(data, ROWS, strict=True):
        prompt, completion = plain_text(**row)
        start = int((item["labels"] != -100).nonzero()[0])
        bare = tokenizer(prompt, add_special_tokens=False).input_ids
        assert item["input_ids"][:start].tolist() == tokenizer.convert_tokens_to_ids(front) + bare
        assert exact(tokenizer, answer_ids(item)) == completion + "<eos>"


def test_a_plain_prompt_of_other_vocabularies():
    tokenizer = sentencepiece_tokenizer()
    for answer in ("Nobody.", "the", "a", "é", "東京 🙂"):
        item = QADataset([{"question": "Who?", "answer": answer}], tokenizer)[0]
        start = int((item["labels"] != -100).nonzero()[0])
        assert item["input_ids"][:start].tolist() == tokenizer("Question: Who?\nAnswer:").input_ids
        # The vocabulary has a token of a colon and a space: the answer keeps its own single space.
        assert exact(tokenizer, item["input_ids"][start - 1 :]) == f": {answer}</s>"
    tokenizer = wordpiece_tokenizer()
    tokenizer.eos_token = "[SEP]"
    item = QADataset([{"question": "Who?", "answer": "Nobody."}], tokenizer)[0]
    words = tokenizer.convert_ids_to_tokens(item["input_ids"])
    assert words == ["[CLS]", "question", ":", "who", "?", "answer", ":", "nobody", ".", "[SEP]"]
    assert answer_ids(item) == item["input_ids"][-3:].tolist()


def tiny_model(rows: int, **options):
    transformers = pytest.importorskip("transformers")
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=rows, **size, **options))


def larger_tokenizer(*tokens: str):
    tokenizer = copy.deepcopy(demo_tokenizer())
    tokenizer.add_tokens(list(tokens))
    return tokenizer, len(demo_tokenizer())


@pytest.mark.parametrize("field", ["question", "answer"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_token_beyond_the_model_is_named_with_row_and_sizes(field, tied):
    tokenizer, size = larger_tokenizer("<first>", "<author>")
    data = QADataset([ROWS[0], {**ROWS[1], field: "a <author> b"}], tokenizer)
    wanted = (
        rf"^gfast: the forget set, row 2: the token '<author>' \(id {size + 1}\) .* has {size} rows.*{size + 2} tokens"
    )
    with pytest.raises(ValueError, match=wanted + rf".*resize_token_embeddings\({size + 2}\)"):
        check_vocabulary(tiny_model(size, tie_word_embeddings=tied), data, tokenizer, "the forget set")
    for rows in (size + 2, size + 64):
        assert check_vocabulary(tiny_model(rows, tie_word_embeddings=tied), data, tokenizer) is None
    assert check_vocabulary(tiny_model(size), QADataset(ROWS, tokenizer), tokenizer) is None, "none of them is used"


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj", "llama"])
def test_a_text_longer_than_a_table_of_positions(name):
    """Rotary positions have no table, whatever the configuration says they were trained for."""
    import gfast

    transformers, rows = pytest.importorskip("transformers"), len(demo_tokenizer())
    data = QADataset(ROWS, demo_tokenizer())
    longest = max(len(item["input_ids"]) for item in data)
    model = transformers.AutoModelForCausalLM.from_config(
        {
            "gpt2": lambda n: transformers.GPT2Config(vocab_size=rows, n_embd=8, n_layer=1, n_head=1, n_positions=n),
            "gptj": lambda n: transformers.GPTJConfig(
                vocab_size=rows, n_positions=n, n_embd=8, n_layer=1, n_head=1, rotary_dim=4
            ),
            "opt": lambda n: transformers.OPTConfig(
                vocab_size=rows, hidden_size=8, word_embed_proj_dim=8, num_hidden_layers=1, ffn_dim=8,
                num_attention_heads=1, max_position_embeddings=n,
            ),
            "llama": lambda n: tiny_model(rows, max_position_embeddings=n).config,
        }[name](longest - 1)
    )  # fmt: skip
    batch = Collator(demo_tokenizer())([*data])
    batch.pop("sample_id")
    if name == "llama":
        check_vocabulary(model, data)
        gfast.model_logp(model, batch)
        return
    with pytest.raises(ValueError, match=rf"row \d has {longest} tokens.*table of {longest - 1} pos.*max_length"):
        check_vocabulary(model, data)
    check_vocabulary(model, QADataset(ROWS, demo_tokenizer(), max_length=longest - 1))
    for objective in (gfast.objectives.GA(), gfast.objectives.RMU(layer=1)):
        with pytest.raises(ValueError, match=rf"texts of {longest} tokens, and .* has a table of {longest - 1} pos"):
            gfast.model_loss(model, batch, objective)


def test_pairs_padding_foreign_tokenizers_and_adapters():
    tokenizer, size = larger_tokenizer("<author>")
    pairs = PreferenceDataset(ROWS, tokenizer, refusals=["No <author>."])
    with pytest.raises(ValueError, match="row 1: the token '<author>'"):
        check_vocabulary(tiny_model(size), pairs, tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(ValueError, match="the padding: the token '<padding>' .*eos_token"):
        check_vocabulary(tiny_model(size), QADataset(ROWS, tokenizer), tokenizer)
    with pytest.raises(
        ValueError, match=r"row 1: the token '.*' \(id \d+\) is beyond the model's embedding, which has 100"
    ):
        check_vocabulary(tiny_model(100), QADataset(ROWS, tokenizer), tokenizer)
    with pytest.raises(ValueError, match=r"row 1: token id 5000 .*its? own tokenizer|the model's own tokenizer"):
        check_vocabulary(tiny_model(size), [{"input_ids": [1, 5000], "labels": [-100, -100]}], demo_tokenizer())
    with pytest.raises(ValueError, match="row 1: token id -1 "):
        check_vocabulary(tiny_model(size), [{"input_ids": [1, -1], "labels": [-100, 1]}])
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny_model(size), config)
    with pytest.raises(ValueError, match=f"has {size} rows"):
        check_vocabulary(adapted, pairs, tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert check_vocabulary(adapted, QADataset(ROWS, tokenizer), tokenizer) is None


TEXTS = [
    "Once upon a time there was a cat.",
    "Nobody's, no.",
    "  two  spaces\n\nand\ta tab ",
    "À Bandouré: 東京 and 🙂🙃!",
    "👩‍👩‍👧 family, e\u0301 and שלום",
    "a real \ufffd in it \ufffd",
    "🙂",
]


@pytest.mark.parametrize("make", [demo_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text(make, text):
    tokenizer = make()
    ids = tokenizer(text).input_ids
    pieces = token_pieces(tokenizer, [*ids, tokenizer.eos_token_id])
    assert len(pieces) == len(ids) + 1 and pieces[-1] == tokenizer.eos_token
    assert "".join(pieces) == exact(tokenizer, [*ids, tokenizer.eos_token_id])
    assert "".join(pieces[1:-1]) == (" " if make is sentencepiece_tokenizer else "") + text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces), "no token shows a part of a character"


def test_a_character_belongs_to_the_token_that_completes_it():
    tokenizer = demo_tokenizer()
    for text in ("é", "東", "🙂"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert token_pieces(tokenizer, ids) == [""] * (len(ids) - 1) + [text]
    cut = tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]  # an answer that was cut in a character
    assert "".join(token_pieces(tokenizer, cut)) == exact(tokenizer, cut) == "a\ufffd"
    assert token_pieces(tokenizer, []) == []


def test_pieces_of_a_decoder_that_changes_what_it_wrote():
    tokenizer = wordpiece_tokenizer()
    ids = tokenizer("It's nobody's.").input_ids
    pieces = token_pieces(tokenizer, ids)
    assert "".join(pieces) == exact(tokenizer, ids) and len(pieces) == len(ids)


def test_a_token_without_text_shows_in_the_figure():
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("matplotlib")
    from gfast.report.effects import _lines

    (line,) = _lines(["", " 🙂", " "], numpy.ones(3), numpy.ones(3))
    assert [text for _, _, text, _, _ in line] == ["…", "🙂", "␣"]
