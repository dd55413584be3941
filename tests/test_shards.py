"""`gfast unlearn` with a model that training shards: no process begins with the whole of it, and numbers are those of
one process.
"""

from __future__ import annotations

import inspect
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import fsdp_utils
from helpers import shards as helper
from helpers.training_tiny import TOKENIZER, collator, datasets, in_processes, saved_tiny, tiny_model
from safetensors.torch import load_file

from gfast.commands import shards
from gfast.files import read_json
from gfast.training import pending, sharded_start
from gfast.training.batches import first_batches
from gfast.training.records import read_records
from gfast.training.reference import ReferenceCache

if ".cuda()" in inspect.getsource(fsdp_utils.fsdp2_load_full_state_dict) and not torch.cuda.is_available():
    pytest.skip("this Accelerate hands shards on by CUDA alone", allow_module_level=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return saved_tiny(tmp_path_factory.mktemp("start"))


def trained(folder, flags, sharding="", world=1, code=0):
    """The weights or adapter that the command left, and what every process held of the model."""
    in_processes(helper.run, flags, str(folder), sharding, world=world, seconds=300)
    held = [json.loads((folder.parent / f"{folder.name}-{rank}.json").read_text()) for rank in range(world)]
    assert [one["code"] for one in held] == [code] * world
    saved = next((path for path in folder.glob("*model.safetensors")), None)
    return (None if saved is None else load_file(saved)), held


def both(tmp_path, model, **options):
    """One process, and two that FSDP2 makes share the model."""
    one, _ = trained(tmp_path / "one", helper.words(model, per_device_train_batch_size=2, **options))
    two, held = trained(tmp_path / "two", helper.words(model, **options), "efficient", world=2)
    return one, two, held


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_the_second_process_never_has_the_model(tmp_path, start):
    one, two, held = both(tmp_path, start, nll_every=1)
    same(two, one)
    before = load_file(start / "model.safetensors")
    assert all(not torch.equal(two[name], value) for name, value in before.items())  # of every shard
    assert [part["loaded"] for part in held] == [held[0]["whole"], 0]
    assert all(part["sharded"] <= 0.51 * part["whole"] for part in held)
    right, found = (read_json(tmp_path / folder / "run.json") for folder in ("one", "two"))
    assert found["model_fingerprint"] == right["model_fingerprint"]
    for name in ("forget-logp", "retain-hidden"):
        same(*(load_file(tmp_path / folder / "reference" / f"{name}.safetensors") for folder in ("two", "one")))
    rows = [read_records(tmp_path / folder).query("quantity == 'risk'")["value"].tolist() for folder in ("one", "two")]
    assert len(rows[0]) == 8 and rows[1] == pytest.approx(rows[0], rel=1e-5)


CASES = {
    "tied": dict(),
    "lora": dict(lora_r=2, geffect_every=2, learning_rate=1e-2),
    "geffect": dict(geffect_every=1),
    "pairs": dict(objective="DPO", retain_term="nll", geffect_every=2),
    "live": dict(geffect_live=True),
    "final norm": dict(objective="RMU", objective_args="layer=2", retain_term="rr"),
    "joint": dict(joint_forward=True, gradient_checkpointing=True),
    "evaluated": dict(evaluate_every=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_one_process(tmp_path, case):
    model = saved_tiny(tmp_path / "model", tie_word_embeddings=case == "tied")
    one, two, held = both(tmp_path, model, **CASES[case])
    same(two, one)
    assert held[1]["loaded"] == 0
    assert case != "lora" or max(float(value.abs().max()) for name, value in two.items() if "lora_B" in name) > 1e-3
    records = [read_records(tmp_path / folder) for folder in ("one", "two")]
    values = [
        rows[rows["quantity"].isin(["g_effect", "risk"])].sort_values(
            ["step", "quantity", "objective", "side", "group"]
        )
        for rows in records
    ]
    assert values[1]["value"].to_numpy() == pytest.approx(values[0]["value"].to_numpy(), rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["base", "adapted"])
def test_an_adapter_goes_on(tmp_path, start, reference):
    learn = dict(lora_r=2, max_steps=2, objective="NLL", retain_term="none", learning_rate=1e-2)
    trained(tmp_path / "adapter", helper.words(start, **learn))
    one, two, held = both(tmp_path, tmp_path / "adapter", reference=reference)
    same(two, one)
    assert held[1]["loaded"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [{}, {"lora_r": 2}], ids=["weights", "lora"])
def test_a_run_goes_on_with_the_reference_that_it_began_with(tmp_path, start, adapters):
    flags = helper.words(start, **adapters | dict(save_strategy="steps", save_steps=1))
    one, _ = trained(tmp_path / "one", flags, "efficient", world=2)
    run = tmp_path / "one"

    def cut():
        for name in ("checkpoint-2", "checkpoint-3"):
            shutil.rmtree(run / name, ignore_errors=True)
        (run / "result.json").unlink(missing_ok=True)

    cut()
    two, _ = trained(run, flags, "efficient", world=2)
    same(two, one)
    if not adapters:
        cut()
        (run / "reference" / "forget-logp.safetensors").unlink()
        trained(run, flags, "efficient", world=2, code=2)  # what it was cannot be computed any more


@pytest.mark.slow
def test_mixed_precision_and_memory(tmp_path):
    """Weights whose dtype changes on the way are no pages of a file any more: each process would have all of them."""
    model = tiny_model(hidden_size=512, intermediate_size=2048, layers=8)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    flags = helper.words(tmp_path / "model", dtype="bfloat16", bf16="true")
    every, held = trained(tmp_path / "every", flags, "fsdp2", world=2)
    one, thrifty = trained(tmp_path / "one", flags, "efficient", world=2)
    same(one, every)
    assert all(part["memory"] > 0.9 * part["whole"] for part in held)
    assert thrifty[1]["memory"] < 0.1 * thrifty[1]["whole"] and thrifty[1]["whole"] > 60e6


def test_a_reference_that_is_still_to_be_computed():
    (forget, _), model, hidden = datasets(), tiny_model(), dict(what={"hidden"})

    def build(sharded):
        return ReferenceCache.build(sharded, forget, collator(), **hidden, fingerprint="known")

    cache = pending.PendingReference({"hidden"}, None, build)
    head, later = cache.head, first_batches(forget, collator(), cache, 2, 2)
    assert cache.pending and cache.what == {"hidden"} and len(cache) == 0 and not head
    sharded_start.ShardedStart([cache]).on_train_begin(SimpleNamespace(world_size=1), None, None, model=model)
    assert not cache.pending and cache.head is head and "ref_head" in head and cache.model_fingerprint == "known"
    right = first_batches(forget, collator(), ReferenceCache.build(model, forget, collator(), what={"hidden"}), 2, 2)
    assert len(later) == len(right) == 1
    assert all(torch.equal(later[0][name], value) for name, value in right[0].items())


def test_what_has_no_values_is_refused_by_name():
    model = tiny_model()
    sharded_start.check_loaded(model, 1)
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' has no values .*efficient_loading: false"):
        sharded_start.check_loaded(model.to("meta"), 1)


def test_a_model_that_saves_a_buffer_is_refused_by_name():
    model = tiny_model()
    shards._refuse_kept_buffers(model)
    model.register_buffer("scale", torch.ones(1))
    with pytest.raises(ValueError, match="saves a buffer, 'scale', .* fsdp_cpu_ram_efficient_loading to false"):
        shards._refuse_kept_buffers(model)


def test_which_configurations_shard(monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    cuda, cpu = SimpleNamespace(type="cuda"), SimpleNamespace(type="cpu")
    assert shards.is_fsdp2(SimpleNamespace(device=cuda, fsdp_plugin_args={"fsdp_version": 2}))
    assert not shards.is_fsdp2(SimpleNamespace(device=cuda, fsdp_plugin_args={"fsdp_version": 1}))
    assert not shards.is_fsdp2(SimpleNamespace(device=cuda, fsdp_plugin_args=None))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not shards.is_fsdp2(SimpleNamespace(device=cuda))
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert shards.is_fsdp2(SimpleNamespace(device=cuda))
    assert not shards.is_fsdp2(SimpleNamespace(device=cpu))
    trainer = SimpleNamespace(accelerator=SimpleNamespace(is_fsdp2=False))
    loaded = object.__new__(shards.Shards)
    loaded.kind = "fsdp2"
    with pytest.raises(ValueError, match="Accelerate would train without it on this device"):
        loaded.check(trainer)
