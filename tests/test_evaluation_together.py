"""What is asked together is answered as alone: where a model does not, each text runs by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from helpers.training_tiny import TOKENIZER, tiny_model
from test_evaluation import FIELDS, alone, evaluation, model_of, sets

from gfast.evaluation import Evaluation, EvaluationSet, encoded, generation, run
from gfast.evaluation.generation import generate
from gfast.metrics.log import parse_log


def _rwkv():
    sizes = dict(hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=64)
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=40, **sizes))


def _bart():
    sizes = dict(d_model=16, decoder_layers=2, decoder_ffn_dim=32, decoder_attention_heads=2)
    config = transformers.BartConfig(vocab_size=40, is_decoder=True, is_encoder_decoder=False, **sizes)
    return transformers.BartForCausalLM(config)


def _roformer():
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = transformers.RoFormerForCausalLM(transformers.RoFormerConfig(vocab_size=40, is_decoder=True, **sizes))
    positions = model.roformer.encoder.embed_positions.weight
    positions.data.add_(0.01 * torch.randn_like(positions))  # no longer alike wherever a text begins
    return model


def _not_a_number():
    """A softmax of fp32 over masks of fp64 gives NaN where all is masked."""
    return tiny_model(vocab_size=40, attn_implementation="eager").double()


@pytest.mark.parametrize("make", [_rwkv, _bart, _roformer, _not_a_number])
def test_a_generation_is_that_of_its_prompt_alone_where_padding_is_not_masked(make):
    """RWKV's state takes in what is masked, and positions of BART's decoder count it; RoFormer's a little."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    prompts = [torch.randint(2, 40, (length,)).tolist() for length in (3, 9, 5, 9)]
    alone = [generate(model, [prompt], 6, [1], 0)[0] for prompt in prompts]
    assert generate(model, prompts, 6, [1], 0) == alone
    assert not generation._alike[model]


def test_a_model_that_fails_with_padding_answers_one_by_one(monkeypatch):
    run_model, model = transformers.LlamaModel.forward, model_of("llama")

    def whole(self, *given, attention_mask=None, **options):
        if attention_mask is not None and not attention_mask.all():
            raise RuntimeError("no padding here")
        return run_model(self, *given, attention_mask=attention_mask, **options)

    alone = [generate(model, [prompt], 3, [1], 0)[0] for prompt in ([5, 6, 7], [5, 9])]
    monkeypatch.setattr(transformers.LlamaModel, "forward", whole)
    assert generate(model, [[5, 6, 7], [5, 9]], 3, [1], 0) == alone


def test_a_cache_that_gives_no_number_is_not_used():
    model = tiny_model(attn_implementation="eager").double().eval()
    work = evaluation(rows=3, generate=0)
    log = parse_log(work.log(work.run(model), "fp64", {}))
    found = [-float(alone(model, *sample.answers[0])[0].sum()) for sample in work.samples[0]]
    assert log.sets["retain"].values["gt_loss"] == pytest.approx(found, rel=1e-6)


def test_prompts_are_tried_with_a_cache_where_they_would_share_it(monkeypatch):
    """Not alone the row with most answers, nor one whose prompt is too short."""
    rows = [dict(row) for row in sets(4)[1].rows]
    for row in rows[1:]:
        row["perturbed_answer"] = row["perturbed_answer"][:1] * 5
    one = EvaluationSet("forget", "mine", rows, generate=0, **FIELDS)
    samples, tried = encoded(one, TOKENIZER), []
    ids, labels = ((7, 8), (7, 9)), ((-100, 8), (-100, 9))
    samples[1] = replace(samples[1], answers=tuple(zip(ids, labels, strict=True)), fields={"gt": (0,)})
    monkeypatch.setattr(run, "can_share", lambda model, probe, pad: tried.append(probe))
    Evaluation([one], [samples], TOKENIZER)._shares(None, 0)
    lengths = [len(sample.prompt) for sample in (samples[0], *samples[2:])]
    assert {len(sample.prompt) for sample in tried[0]} == {min(lengths), max(lengths)}
    Evaluation([one], [samples[1:2]], TOKENIZER)._shares(None, 0)
    assert len(tried) == 1  # nothing to share, nothing tried


def test_prompts_of_unlike_lengths_are_tried_with_a_cache(monkeypatch):
    """Left padding is what a cache may not bear: two prompts of one length would not show it."""
    tried = []
    monkeypatch.setattr(run, "can_share", lambda model, probe, pad: tried.append({len(s.prompt) for s in probe}))
    one = evaluation()
    one.run(tiny_model())
    prompts = [{len(sample.prompt) for sample in some} for some in one.samples]
    assert tried == [{min(lengths), max(lengths)} for lengths in prompts] and all(len(pair) == 2 for pair in tried)
