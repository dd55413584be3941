"""g_effect gives the model back as it was, holds no more memory than it says, and refuses bad input before any work."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import VOCAB, batches, tiny  # noqa: E402
from helpers.geffect_state import assert_same, snapshot, used_model  # noqa: E402
from helpers.process_group import alone  # noqa: E402

import gfast  # noqa: E402
from gfast import model_state  # noqa: E402
from gfast.geffect import backward  # noqa: E402
from gfast.geffect import directions as directions_of  # noqa: E402
from gfast.geffect.storage import Store  # noqa: E402
from gfast.objectives import DPO, GA, KL, NLL, NPO, PO, RR, TNPO, WGA, Mix  # noqa: E402


def data() -> dict:
    return dict(forget=batches(1), retain=batches(2))


@pytest.mark.parametrize("norms", [None, True])
def test_model_is_left_as_found(norms):
    model = used_model()
    before = snapshot(model)
    gfast.g_effect(model, Mix(WGA(), NLL()), norms=norms, **data())
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [0, 2, 5])
def test_model_is_left_as_found_after_an_exception(monkeypatch, error, fails_at):
    model = used_model()
    before = snapshot(model)
    calls = []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) > fails_at:
            raise error("stop")
        return original(*args, **options)

    original = backward.model_loss
    monkeypatch.setattr(backward, "model_loss", failing)
    with pytest.raises(error, match="stop"):
        gfast.g_effect(model, WGA(), **data())
    assert_same(before, snapshot(model))
    monkeypatch.setattr(backward, "model_loss", original)
    gfast.g_effect(model, WGA(), **data())


def test_measured_without_dropout_and_the_random_state_is_untouched():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_layer=2, n_head=2, n_embd=8, n_positions=32, resid_pdrop=0.5)
    model = transformers.GPT2LMHeadModel(config).train()
    state = torch.get_rng_state()
    effect = gfast.g_effect(model, WGA(), **data())
    assert torch.equal(state, torch.get_rng_state())
    assert effect == gfast.g_effect(model.eval(), WGA(), **data())


def test_optimizer_that_steps_in_the_backward_does_not_step(caplog):
    model = tiny("llama")
    model_state._log_hooks.cache_clear()
    before = [p.detach().clone() for p in model.parameters()]
    steps = []

    def step(parameter):
        steps.append(1)
        parameter.data.add_(1.0)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    gfast.g_effect(model, WGA(), **data())
    assert not steps and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model.lm_head.weight.sum().backward()
    assert len(steps) == 1  # the user's hooks are back
    assert "hooks on accumulated gradients" in caplog.text


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(mode):
    model = tiny("llama")

    def measured():
        effects = [gfast.g_effect(model, WGA(), engine=engine, **data()) for engine in ("stream", "gram")]
        return effects, gfast.gram_effect(model, **data()).unlearn["shallow"]

    expected = measured()
    with mode():
        found = measured()
        assert not torch.is_grad_enabled()
    assert found[0] == expected[0] and torch.equal(found[1], expected[1]) and not found[1].is_inference()


def test_no_gradient_is_held_beside_the_directions(monkeypatch):
    model = tiny("gpt2")
    alive_grads, alive_bytes, seen, dotted = [], [], [], 0
    original = directions_of.dots_of_each

    def watched(xs, directions, *args, **options):
        nonlocal dotted
        if len(directions) == 2:  # the objective's pass
            alive_grads.append(sum(p.grad is not None for p in model.parameters()))
            seen.extend(weakref.ref(x) for x in xs)
            alive_bytes.append(sum(x.nbytes for ref in seen if (x := ref()) is not None))
            dotted += len(xs)
        return original(xs, directions, *args, **options)

    monkeypatch.setattr(directions_of, "dots_of_each", watched)
    gfast.g_effect(model, WGA(), **data())
    assert dotted == 2 * len(list(model.parameters()))
    # the largest gradient, and a sixteenth of it that waits to be dotted together
    assert max(alive_grads) <= 1 and max(alive_bytes) <= 17 / 16 * max(p.nbytes for p in model.parameters())


def test_single_batch_takes_the_gradient_itself_as_direction(monkeypatch):
    model = tiny("llama", dtype=torch.float32)
    pointers = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: pointers.setdefault(name, set()).add(grad.data_ptr()))
    kept = []
    original = Store.finish

    def spied(self):
        kept.extend(tensor.data_ptr() for tensor in self.kept)
        original(self)

    monkeypatch.setattr(Store, "finish", spied)
    gfast.g_effect(model, GA(), forget=batches(1, sizes=(5,)), retain=batches(2, sizes=(5,)))
    assert len(kept) == len(pointers)
    assert all(pointer in set().union(*pointers.values()) for pointer in kept)


@pytest.mark.parametrize("objective, stored", [(GA(), 1), (WGA(), 1), (Mix(WGA(), NLL()), 2), ([WGA(), GA()], 2)])
def test_a_pair_of_single_batches_stores_no_more_gradients_than_needed(monkeypatch, objective, stored):
    model, sizes = tiny("tied_llama"), []
    original = directions_of.dots_of_each

    def watched(xs, directions, *args, **options):
        sizes.append(len(directions))
        return original(xs, directions, *args, **options)

    monkeypatch.setattr(directions_of, "dots_of_each", watched)
    pair = dict(forget=batches(1, sizes=(5,)), retain=batches(2, sizes=(5,)))
    found = gfast.g_effect(model, objective, **pair)
    assert max(sizes) == stored
    split = dict(forget=batches(1), retain=batches(2))
    expected = gfast.g_effect(model, objective, norms=True, **split)
    found, expected = (value if isinstance(value, list) else [value] for value in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert one.unlearn == pytest.approx(other.unlearn, rel=1e-9)
        assert one.retain == pytest.approx(other.retain, rel=1e-9)
        assert {side: pytest.approx(values, rel=1e-9) for side, values in other.norms.items()} == one.norms


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize(("reentrant", "frozen"), [(True, False), (True, True), (False, False)])
def test_gradient_checkpointing_stays_on_and_changes_nothing(reentrant, frozen, around):
    """frozen: nothing below the blocks has a gradient, with which a re-entrant checkpoint gives theirs none either.
    around: transformers' offloading of activations has a function of its own around PyTorch's checkpoint.
    """
    model = tiny("llama")
    model.model.embed_tokens.requires_grad_(not frozen)
    expected = gfast.g_effect(model.eval(), [GA(), WGA()], **data())
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for module in model.modules() if around else ():
        if (function := getattr(module, "_gradient_checkpointing_func", None)) is not None:
            wrapped = functools.partial(lambda *args, **options: checkpoint(*args, **options), **function.keywords)
            module._gradient_checkpointing_func = wrapped
    if frozen and hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()  # which newer versions of transformers enable by themselves
    ran = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    function = model.model.layers[2]._gradient_checkpointing_func
    found = gfast.g_effect(model, [GA(), WGA()], **data())
    assert model.model.layers[2]._gradient_checkpointing_func is function
    for one, other in zip(found, expected, strict=True):
        assert one.unlearn == pytest.approx(other.unlearn, rel=1e-9)
        assert one.unlearn["shallow"] < 0
    assert len(ran) == 2 * 6  # six batches, each with a recomputed forward


def test_a_block_that_drops_by_the_models_settings_does_not_while_it_is_measured():
    """Falcon's blocks do so in their own forward, where they ask whether they are training."""
    options = dict(attention_dropout=0.5, parallel_attn=False, new_decoder_architecture=False)
    config = transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, **options
    )
    model = transformers.FalconForCausalLM(config).double()
    expected = gfast.g_effect(model.eval(), WGA(), **data())
    model.train()
    model.gradient_checkpointing_enable()
    assert gfast.g_effect(model, WGA(), **data()).retain == pytest.approx(expected.retain, rel=1e-9)


def test_autocast():
    model = tiny("llama", dtype=torch.float32)
    plain = gfast.g_effect(model, WGA(), **data())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gfast.g_effect(model, WGA(), **data())
    assert mixed.total("unlearn") == pytest.approx(plain.total("unlearn"), rel=0.05)
    assert mixed.total("unlearn") != plain.total("unlearn")


def test_fp16_gradients_do_not_underflow():
    exact, low = tiny("llama").eval(), tiny("llama").half().double().eval()
    exact.load_state_dict(low.state_dict())
    small = WGA(alpha=3.5)  # at p of about 1/61 its weights are below fp16's smallest number, 6e-8, at many tokens
    truth = gfast.g_effect(exact, small, **data())
    found = gfast.g_effect(low.half(), small, **data())
    lost = gfast.g_effect(low, small, loss_scale=1.0, **data())  # what the scale is there for
    error, without = (abs(one.total("unlearn") / truth.total("unlearn") - 1) for one in (found, lost))
    assert error < 0.05 and without > 0.5, (error, without)
    with pytest.raises(ValueError, match="not finite.*loss scale of 1e.09: try loss_scale=1.0"):
        gfast.g_effect(low, WGA(), loss_scale=1e9, **data())
    with pytest.raises(ValueError, match="loss_scale must be positive"):
        gfast.g_effect(low, WGA(), loss_scale=0.0, **data())


def test_unused_parameters_have_no_effect():
    config = transformers.MixtralConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    model.model.layers[0].unused = torch.nn.Linear(3, 3)
    effect = gfast.g_effect(model, WGA(), groups=lambda name: "unused" if "unused" in name else "rest", **data())
    assert effect.unlearn["unused"] == effect.retain["unused"] == effect.norms["retain"]["unused"] == 0.0
    assert effect.unlearn["rest"] < 0


def test_data_without_labels_gives_zeros_and_is_said(caplog):
    model = tiny("llama")
    empty = batches(2)
    for batch in empty:
        batch["labels"].fill_(-100)
    effect = gfast.g_effect(model, WGA(), forget=batches(1), retain=empty)
    assert set(effect.retain.values()) == {0.0} and effect.total("unlearn") < 0
    assert effect.counts["retain"] == 0
    assert "no token of the retain data has a label" in caplog.text and "forget data" not in caplog.text
    effect = gfast.g_effect(model, [WGA(), GA()], forget=empty, retain=batches(1))[0]
    assert set(effect.unlearn.values()) | set(effect.retain.values()) == {0.0}


def test_not_finite_names_the_parameter_or_the_loss(monkeypatch):
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(ValueError, match=r"NLL\(\) on the forget data.*1 of .*layers\.1\.mlp\.down_proj\.weight"):
        gfast.g_effect(model, WGA(), **data())
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NLL\(\) is nan on batch 0 of the forget data"):
        gfast.g_effect(model, WGA(), **data())


def no_passes(monkeypatch) -> None:
    def never(*args, **options):
        raise AssertionError("a pass was started")

    monkeypatch.setattr(backward, "model_loss", never)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(forget=[]), "forget= holds no batch"),
        (dict(retain=iter(())), "retain= holds no batch"),
        (dict(forget=None), "forget= holds no batch"),
        (dict(retain=[(1, 2)]), "retain: batch 0 is a tuple"),
        (dict(forget=[{"input_ids": torch.zeros(1, 3, dtype=torch.long)}]), "forget: batch 0 has no 'labels'"),
        (
            dict(forget={"input_ids": torch.zeros(1, 3).long(), "labels": torch.zeros(1, 2).long()}),
            r"labels \(1, 2\) but input_ids \(1, 3\)",
        ),
        (dict(engine="jvp"), "no engine 'jvp'.*'stream'"),
        (dict(engine="sample", norms=True), "only the stream engine"),
        (dict(direction_storage="disk"), "direction_storage must be"),
        (dict(directions=3), "takes what gfast.risk_gradients returns"),
        (dict(direction_dtype=torch.float16), "direction_dtype"),
        (dict(direction_storage=""), "direction_storage must be"),
        (dict(direction_storage=None), "direction_storage must be"),
        (dict(reference="adapters_off"), "reference must be one of 'auto', 'base'"),
        (dict(objective_batches=batches(1)), "objective_batches are for objectives with data of their own"),
        (dict(groups="thirds"), "groups must be"),
        (dict(objective=[]), "list of objectives is empty"),
        (dict(objective="ga"), "objective of gfast.objectives is needed"),
        (dict(objective=NPO(), forget=batches(1, with_ref=False)), r"NPO.*'ref_logp', and batch 0 of the forget"),
        (dict(objective=Mix(GA(), RR(layer=1))), "'ref_layer_hidden', and batch 0 of the retain"),
        (dict(objective=Mix(GA(), KL())), "KL.*ref_he"),
        (dict(objective=DPO()), r"DPO\(beta=0\.1\) has data of its own \(pairs"),
        (dict(objective=[DPO(), PO()], objective_batches=batches(1)), "two calls"),
        (dict(risk=Mix(GA(), NLL())), "risk must be one objective"),
        (dict(risk=TNPO(), retain=batches(2, with_ref=False)), "'ref_logp', and batch 0 of the retain"),
    ],
)
def test_bad_input_is_refused_before_any_work(monkeypatch, change, message):
    no_passes(monkeypatch)
    model = tiny("llama")
    before = snapshot(model)
    options = dict(objective=GA()) | data() | change
    with pytest.raises(ValueError, match=message):
        gfast.g_effect(model, options.pop("objective"), **options)
    assert_same(before, snapshot(model))


def test_sharded_parameters_are_refused(monkeypatch):
    no_passes(monkeypatch)
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.ds_id = 3
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight.*sharded"):
        gfast.g_effect(model, GA(), **data())


def test_objectives_with_data_of_their_own():
    model = tiny("llama")
    refused = batches(7)
    po, nll = gfast.g_effect(model, [PO(), NLL()], objective_batches=refused, **data())
    swapped = gfast.g_effect(model, NLL(), forget=refused, retain=data()["retain"])
    assert po.retain == pytest.approx(swapped.retain, rel=1e-9)
    assert po.unlearn != nll.unlearn
    pairs = batches(8, rows=6, sizes=(4, 2))
    dpo = gfast.g_effect(model, DPO(beta=0.2), objective_batches=pairs, **data())
    assert dpo.total("unlearn") != 0.0


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    gfast.g_effect(tiny("llama"), WGA(), progress=True, **data())
    assert "g_effect" in capsys.readouterr().err


def test_distributed_data_parallel():
    def keep(_, bucket):
        """What an all-reduce over a group of one gives; the fake backend's own gives no result."""
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = tiny("llama")
    expected = gfast.g_effect(model, WGA(), **data())
    with alone():
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped.register_comm_hook(None, keep)
        assert gfast.g_effect(wrapped, WGA(), **data()) == expected
        wrapped(**{key: data()["forget"][0][key] for key in ("input_ids", "labels")}).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
