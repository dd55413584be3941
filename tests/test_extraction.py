"""Extraction by free generation: what is asked for, and that rows of a batch do not get into each other's way."""

from __future__ import annotations

import torch
import transformers
from helpers.data_chat import sentencepiece_tokenizer
from helpers.training_tiny import TOKENIZER, tiny_model

from gfast.evaluation import Evaluation, EvaluationSet, encoded
from gfast.evaluation.generation import generate


def test_extraction_is_of_the_answer_without_what_a_template_writes_behind_it():
    """Llama 2's template writes a space in front of the end: a label, by which the model that is taught comes to the
    end, and nothing that extraction asks for.
    """
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }} A{% else %} {{ m.content }} {{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    one = EvaluationSet("forget", "own", [{"question": "Who?", "answer": "Nobody."}], generate=0)
    samples = encoded(one, tokenizer)
    ids, labels = samples[0].right
    assert labels[-2:] == ids[-2:] and ids[-1] == tokenizer.eos_token_id
    answer = [label for label in labels if label != -100][:-2]
    model = tiny_model(vocab_size=max(len(tokenizer), 300))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    work = Evaluation([one], [samples], tokenizer, extraction=("exact", "similar"))
    found = work.log(work.run(model), "tiny", {})["sets"]["forget"]
    said = generate(model.eval(), [samples[0].prompt], len(answer), work.ends, 0)[0].ids
    assert found["extraction_strength"] == [1.0] and said == answer
    assert found["ps_exact"] == found["ps_similar"] == [1.0]
    whole = generate(model, [samples[0].prompt], len(answer) + 8, work.ends, 0)[0]
    assert whole.ended and list(whole.ids) == [*answer, ids[-2]]


def test_extraction_beside_a_prompt_that_leaves_no_place_for_as_much():
    """Rows of one batch generate alike much, and each row fits by itself: GPT-2 has a table of positions."""
    rows = [{"question": "nobody " * 40, "answer": "Who?"}, {"question": "Who?", "answer": "nobody " * 40}]
    one = EvaluationSet("forget", "own", rows, generate=0)
    samples = encoded(one, TOKENIZER)
    most = max(len(sample.right[0]) for sample in samples)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(TOKENIZER), n_embd=16, n_layer=2, n_head=2, n_positions=most)
    model = transformers.GPT2LMHeadModel(config).eval()
    found = []
    for size in (1, 2):
        work = Evaluation([one], [samples], TOKENIZER, size, extraction=("exact", "similar"))
        work.check_model(model)
        found.append(work.run(model))
    assert [value for name in found[0] if "extraction" in name for value in found[0][name]] == [
        value for name in found[1] if "extraction" in name for value in found[1][name]
    ]
