"""Scoring, generating and extracting: the same numbers as by the model's own logits, one sample at a time."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pandas
import pytest
import torch
import transformers
from helpers.data_chat import sentencepiece_tokenizer, wordpiece_tokenizer
from helpers.training_tiny import TOKENIZER, tiny_model

from gfast import metrics
from gfast.data import bundled_perturbed
from gfast.data.encode import make_encoder
from gfast.deferred import DeferredLogits
from gfast.evaluation import Evaluation, EvaluationSet, encoded, sources
from gfast.evaluation.generation import generate
from gfast.evaluation.results import samples_table, summarize
from gfast.evaluation.scoring import can_share, score
from gfast.metrics.log import parse_log

FIELDS = {"paraphrase": "paraphrased_answer", "perturbed": "perturbed_answer"}
SMALL = dict(
    vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0, sliding_window=16
    ),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=len(TOKENIZER), n_embd=16, n_layer=2, n_head=2),
    "phi": lambda: transformers.PhiConfig(**SMALL),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, num_hidden_layers=2, state_size=4
    ),
    "no plain head": lambda: transformers.BertConfig(**SMALL, is_decoder=True),
}


def model_of(kind: str):
    torch.manual_seed(0)
    config = MODELS[kind]()
    config.initializer_range = 0.3
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def sets(rows: int = 5, generate: int = 6):
    forget, retain = bundled_perturbed()
    return [
        EvaluationSet("retain", "bundled", retain[:rows], generate=generate, **FIELDS),
        EvaluationSet("forget", "bundled", forget[:rows], generate=generate, **FIELDS),
    ]


def evaluation(rows: int = 5, generate: int = 6, **options) -> Evaluation:
    chosen = sets(rows, generate)
    options = {"batch_size": 2, **options}
    return Evaluation(chosen, [encoded(one, TOKENIZER) for one in chosen], TOKENIZER, **options)


def alone(model, ids, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """logp of the labels and whether each is the argmax, from the model's own logits of one sequence."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    target = torch.tensor(labels[1:])
    at = (target != -100).nonzero().squeeze(1)
    logp = logits.log_softmax(-1)
    return logp[at, target[at]], logits[at].argmax(-1) == target[at]


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_those_of_the_models_own_logits(kind):
    model = model_of(kind)
    samples = encoded(sets()[1], TOKENIZER)
    shared = can_share(model, samples[:2], 0)
    assert shared == (kind != "mamba")
    for sample, scored in zip(samples, score(model, samples, 0, shared), strict=True):
        assert len(scored) == len(sample.answers) == 7
        for number, ((ids, labels), one) in enumerate(zip(sample.answers, scored, strict=True)):
            logp, correct = alone(model, ids, labels)
            torch.testing.assert_close(one.logp.double(), logp, rtol=1e-4, atol=1e-4)
            assert (one.correct is None) == (number > 0)
            assert number or one.correct.tolist() == correct.tolist()


def test_scores_of_fp64_models_are_fp64():
    model, samples = tiny_model().double(), encoded(sets()[0], TOKENIZER)
    for sample, (scored, *_) in zip(samples, score(model, samples, 0, False), strict=True):
        logp, _ = alone(model, *sample.answers[0])
        assert scored.logp.dtype == torch.float64
        torch.testing.assert_close(scored.logp, logp.double(), rtol=1e-6, atol=0)


def test_texts_that_stretch_each_others_rotary_embeddings_run_apart():
    """Beyond a length the longest text of a batch decides which embeddings all have (LongRoPE)."""
    scaling = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4, "rope_type": "longrope"}
    positions = {"max_position_embeddings": 256, "original_max_position_embeddings": 40}
    scaling |= {"type": "longrope"}  # as transformers 4 calls it
    config = transformers.Phi3Config(**SMALL, **positions, pad_token_id=0, initializer_range=0.3, rope_scaling=scaling)
    model, rows = transformers.Phi3ForCausalLM(config).eval(), bundled_perturbed()[0][:4]
    rows[0] = {**rows[0], "answer": " ".join([rows[0]["answer"]] * 3)}
    samples = encoded(EvaluationSet("forget", "bundled", rows, **FIELDS), TOKENIZER)
    lengths = [len(ids) for sample in samples for ids, _ in sample.answers]
    assert min(lengths) < 40 < max(lengths)
    for sample, found in zip(samples, score(model, samples, 0), strict=True):
        for answer, scored in zip(sample.answers, found, strict=True):
            torch.testing.assert_close(scored.logp, alone(model, *answer)[0].float(), rtol=1e-4, atol=1e-4)
    prompts = [samples[1].prompt, samples[0].right[0]]
    assert generate(model, prompts, 4, [1], 0) == [generate(model, [one], 4, [1], 0)[0] for one in prompts]


def test_a_cache_that_gives_other_numbers_is_not_used(monkeypatch, caplog):
    model, samples = model_of("llama"), encoded(sets()[0], TOKENIZER)
    caplog.set_level("INFO", "gfast")
    from gfast.evaluation import scoring

    behind = scoring._behind

    def shifted(model, cache, places):
        return behind(model, cache, places[1:] + places[:1])  # each answer behind another's prompt

    monkeypatch.setattr(scoring, "_behind", shifted)
    assert not can_share(model, samples[:2], 0) and "log-probabilities differ" in caplog.text


def test_no_logits_of_the_vocabulary(monkeypatch):
    def real(self):
        raise AssertionError("the model's logits were computed")

    monkeypatch.setattr(DeferredLogits, "real", real)
    model, samples = model_of("llama"), encoded(sets()[0], TOKENIZER)
    score(model, samples, 0), score(model, samples, 0, shared=False)


def test_generation_is_greedy_whatever_the_models_settings():
    model = model_of("llama")
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=4.0, min_new_tokens=4)
    before = model.generation_config
    prompts = [sample.prompt for sample in encoded(sets()[0], TOKENIZER)]
    ends = (TOKENIZER.eos_token_id, 77)
    for prompt, found in zip(prompts, generate(model, prompts, 9, ends, 0), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 9:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
        said = ids[len(prompt) :]
        assert found.ended == (said[-1] in ends)
        assert found.ids == (said[:-1] if found.ended else said)
    assert model.generation_config is before


def test_the_log_holds_what_was_measured():
    model = taught()
    work = evaluation(extraction=("exact", "similar"))
    log = parse_log(json.loads(json.dumps(work.log(work.run(model), "tiny", {}))))
    for one, samples in zip(work.sets, work.samples, strict=True):
        values = log.sets[one.name].values
        for at, sample in enumerate(samples):
            logp, correct = alone(model, *sample.answers[0])
            assert values["gt_loss"][at] == pytest.approx(-float(logp.sum()), rel=1e-4)
            assert values["num_token_gt"][at] == len(logp)
            assert values["avg_gt_loss"][at] == pytest.approx(-float(logp.mean()), rel=1e-4)
            assert values["extraction_strength"][at] == metrics.extraction_strength(correct[:-1])
            assert values["exact_memorization"][at] == pytest.approx(float(correct[:-1].double().mean()))
            assert values["min_k"][at] == pytest.approx(metrics.min_k(logp[:-1].clamp(max=0), 0.4), rel=1e-4)
            wrong = [-float(alone(model, *sample.answers[place])[0].mean()) for place in sample.fields["perturb"]]
            assert values["average_perturb_loss"][at] == pytest.approx(wrong, rel=1e-4)
            right = values["avg_paraphrased_loss"][at]
            assert values["truth_ratio"][at] == pytest.approx(math.exp(right - sum(wrong) / 5), rel=1e-3)
        # what is generated freely after a prefix is right exactly where teacher forcing is right to the end
        assert values["ps_exact"] == pytest.approx(values["extraction_strength"])
        assert (values["ps_similar"] >= values["ps_exact"] - 1e-9).all()
        texts = log.sets[one.name].text
        assert [text["ground_truth"] for text in texts] == [row["answer"] for row in one.rows]
        recalls = [metrics.rouge_scores(text["ground_truth"], text["generation"])["rougeL_recall"] for text in texts]
        assert values["rougeL_recall"] == pytest.approx(recalls)
    assert 0 < log.sets["retain"].values["extraction_strength"].mean()


_taught = []


def taught():
    """A tiny model that knows some of the answers."""
    if not _taught:
        torch.manual_seed(0)
        model = tiny_model(hidden_size=48, intermediate_size=96, initializer_range=0.05)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        answers = [sample.answers[0] for one in sets() for sample in encoded(one, TOKENIZER)]
        width = max(len(ids) for ids, _ in answers)
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in answers])
        labels = torch.tensor([[*labels, *[-100] * (width - len(labels))] for _, labels in answers])
        for _ in range(30):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
        _taught.append(model.eval())
    return _taught[0]


def test_what_was_stopped_goes_on_to_the_same_bits(tmp_path):
    model = taught()
    whole = evaluation(extraction=("exact",)).run(model, tmp_path / "whole")
    for stop in (1, 4, 9):
        folder, count = tmp_path / f"stopped{stop}", 0

        def done(unit, stop=stop):
            nonlocal count
            count += 1
            if count == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluation(extraction=("exact",)).run(model, folder, done=done)
        kept = {path.name: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()}
        assert len(kept) == stop
        again = evaluation(extraction=("exact",)).run(model, folder)
        assert json.dumps(again, sort_keys=True) == json.dumps(whole, sort_keys=True)
        tables = [samples_table(evaluation(extraction=("exact",)).log(one, "run", {})) for one in (again, whole)]
        assert tables[0].equals(tables[1])  # its columns in one order too
        assert kept == {name: (folder / "parts" / name).stat().st_mtime_ns for name in kept}


def test_what_ends_a_generation():
    whole = EvaluationSet("holdout", "texts", sets()[0].rows, generate=0, encode=sources.WholeText(TOKENIZER))
    chosen = [*sets(), whole]
    work = Evaluation(chosen, [encoded(one, TOKENIZER) for one in chosen], TOKENIZER)
    assert work.samples[2][0].right[1][-1] != TOKENIZER.eos_token_id
    assert work.ends == (TOKENIZER.eos_token_id,)  # not the last word of a text
    # and what the model's own settings end at, if the tokenizer knows it as a special token
    model = tiny_model()
    for named in (TOKENIZER.bos_token_id, [TOKENIZER.bos_token_id, 77], None, 77):
        model.generation_config.eos_token_id = named
        more = [] if named in (None, 77) else [TOKENIZER.bos_token_id]
        assert work.ends_for(model) == tuple(sorted([TOKENIZER.eos_token_id, *more]))
    endless = copy.deepcopy(TOKENIZER)
    endless.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        sources.Continuation(endless)("Who?", "Nobody.")


def test_a_continuation_is_what_a_plain_prompt_is():
    """Also where the vocabulary merges across the boundary, or the tokenizer puts something behind a text."""
    for tokenizer in (TOKENIZER, sentencepiece_tokenizer()):
        plain, going_on = make_encoder(tokenizer, "plain"), sources.Continuation(tokenizer)
        for question, answer in (("Who?", "Nobody."), ("Who wrote the ", "the book"), ("N", "é")):
            assert going_on(f"Question: {question}\nAnswer:", answer) == plain(question, answer)
    ids, labels = sources.Continuation(wordpiece_tokenizer(), ends=False)("question?", "answer")
    assert 3 not in ids and labels == [-100] * (len(ids) - 1) + ids[-1:]  # no [SEP] between them


def test_a_letter_is_all_there_is_of_a_choice(caplog):
    """Also where it takes two tokens, and others one: nothing is left of it without the last."""
    tokenizer = sentencepiece_tokenizer()
    encode = sources.Continuation(tokenizer, ends=False)
    lengths = {len([x for x in encode("Who?\nAnswer:", letter)[1] if x != -100]) for letter in "ABN"}
    rows = [{"question": "Who?\nAnswer:", "answer": one, "perturbed_answer": ["B"]} for one in ("A", "N")]
    one = EvaluationSet("mmlu", "all test", rows, perturbed="perturbed_answer", generate=0, choices=True, encode=encode)
    work = Evaluation([one], [encoded(one, tokenizer)], tokenizer)
    found = work.log(work.run(tiny_model(vocab_size=max(len(tokenizer), 300))), "tiny", {})["sets"]["mmlu"]
    assert max(lengths) > 1
    assert (
        not {"extraction_strength", "exact_memorization", "min_k"} & found.keys()
        and "not in the log" not in caplog.text
    )


def test_perturbed_extraction_asks_in_other_words():
    (one, *_), model = sets(4), taught()
    rows = [dict(row, paraphrased_question=f"Tell me: {row['question']}") for row in one.rows[:3]] + [dict(one.rows[3])]
    one = EvaluationSet("retain", "bundled", rows, generate=0, **FIELDS)
    work = Evaluation([one], [encoded(one, TOKENIZER)], TOKENIZER, extraction=("perturbed",), extraction_samples=4)
    found = work.log(work.run(model), "tiny", {})["sets"]["retain"]["extraction"]["ps_perturbed"]
    asked = EvaluationSet("retain", "bundled", rows[:3], question="paraphrased_question", generate=0)
    for sample, strength in zip(encoded(asked, TOKENIZER), found, strict=True):
        _, correct = alone(model, *sample.answers[0])
        assert strength == pytest.approx(metrics.extraction_strength(correct[:-1]))
    read = parse_log(json.loads(json.dumps(work.log(work.run(model), "tiny", {}))))
    assert summarize(read)["sets"]["retain"]["ps_perturbed"] == pytest.approx(sum(found) / 3)
    with pytest.raises(ValueError, match="rows with paraphrased_question"):
        evaluation(extraction=("perturbed",))


def test_a_part_that_is_damaged_or_of_other_samples(tmp_path):
    work, model = evaluation(), taught()
    work.run(model, tmp_path)
    path = sorted((tmp_path / "parts").iterdir())[0]
    text = path.read_text()
    path.write_text(text.replace("0.", "1.", 1))
    with pytest.raises(ValueError, match="checksum"):
        work.run(model, tmp_path)
    path.write_text(text)
    with pytest.raises(ValueError, match="other samples"):
        evaluation(batch_size=3).run(model, tmp_path)


def test_a_checksum_is_of_the_rows_whatever_holds_them():
    rows = [{"question": "Who?", "answer": answer} for answer in ("Nobody.", "All.")]
    sums = {EvaluationSet("forget", "mine", held).checksum() for held in (rows, pandas.DataFrame(rows))}
    assert len(sums) == 1 and EvaluationSet("forget", "mine", pandas.DataFrame(rows[::-1])).checksum() not in sums


def test_a_folder_goes_on_with_its_own_model_and_questions(tmp_path):
    work, model = evaluation(), taught()
    found = work.run(model, tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    settings = copy.deepcopy(model)
    settings.config.rope_theta = 1.0
    for wrong in (other, settings):
        with pytest.raises(ValueError, match="holds results of another model"):
            work.run(wrong, tmp_path)
    turned = [
        replace(one, rows=[{**row, "answer": row["paraphrased_answer"]} for row in one.rows]) for one in work.sets
    ]
    for asked in (turned, [replace(one, generate=2) for one in work.sets]):
        samples = [encoded(one, TOKENIZER) for one in asked]
        with pytest.raises(ValueError, match="holds results of other rows"):
            Evaluation(asked, samples, TOKENIZER, work.batch_size).run(model, tmp_path)
    assert work.run(model, tmp_path) == found


def test_a_model_without_finite_log_probabilities():
    model = model_of("llama")
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(ValueError, match="row 3 of the set retain is nan: .*Are the weights finite"):
        evaluation().run(model)


def test_generations_that_never_end_are_cut_and_counted():
    """Every logit the same: greedy says token 0 for ever. It stops at the limit, and the log and the summary say so."""
    model, one = tiny_model(), evaluation(rows=3, generate=4)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert 0 not in one.ends
    log = parse_log(one.log(one.run(model), "endless", {}))
    for name, found in summarize(log)["sets"].items():
        assert found["generations_cut"] == found["samples"] == 3, name
        assert list(log.sets[name].values["generated_tokens"]) == [4, 4, 4]


def test_losses_that_exploded_are_still_a_log():
    model, one = tiny_model(), evaluation(rows=4, generate=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(3e4)
    log = parse_log(json.loads(json.dumps(one.log(one.run(model), "exploded", {}))))
    values = log.sets["retain"].values
    assert (values["avg_paraphrased_loss"] - values["average_perturb_loss"].mean(1)).max() > 709
    assert 0 <= summarize(log, log)["sets"]["forget"]["truth_ratio"] <= 1
