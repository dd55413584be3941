"""Every causal architecture of the installed transformers: losses, gradients, G-effects and groups, against itself.

Both sides run the same model in the same type, so that what a norm computes in fp32 is the same on both.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

import gfast
from gfast import hf
from gfast.geffect.groups import assign
from gfast.hidden_states import layer_hidden
from gfast.objectives import GA, NLL

pytest.importorskip("transformers")

from helpers.architectures import CAUSAL, IMAGE, NOT_CAUSAL, TRANSFORMERS, TRIED, batch_for, build, not_built, run  # noqa: E402
from helpers.marks import slow_when  # noqa: E402

NAMES = [*CAUSAL, *IMAGE]
# in `make test`: heads, norms, positions, experts, states, images and decoders of several kinds, and what is refused
QUICK = """bart blt bloom cohere deepseek_v3 falcon gemma2 gemma3+image gpt2 inkling2_loop_text llama llava+image mamba
mixtral mpt opt phi qwen2 qwen3_next xlm zamba""".split()
beyond_the_quick = slow_when(lambda p: p.name not in QUICK)
# what has no place in the paper's groups, and what the error says of it
NO_GROUPS = {
    "blt": "each of .*local_encoder.* is a list of blocks",
    "hrm_text": "each of .*L_module.*H_module.* is a list of blocks",
    "xlm": "each of .*attentions.*ffns.* is a list of blocks",
    "zamba": r"shared_transf\..* is shared by several parts \(1, 3\)",
    "zamba2": r"shared_transformer\..* is shared by several parts \(1, 3\)",
    "inkling2_loop_text": "'model.message_input.query'.* is in no part",  # read between the blocks
}


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    """Of the module, so that all that is asked of one architecture is asked in turn."""
    return request.param


@pytest.fixture(scope="module")
def model(name):
    try:
        return build(name)
    except Exception as error:
        if TRANSFORMERS <= TRIED:
            raise
        pytest.skip(f"new sizes to make small, since transformers {TRANSFORMERS}: {error}")


def rounding(logits: torch.Tensor) -> float:
    """Both sides add up the same numbers, in the type of the logits."""
    return 1e-10 if logits.dtype == torch.float64 else 5e-6


def close(found, expected, tolerance: float) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def literal(model, batch) -> tuple[torch.Tensor, torch.Tensor, float]:
    """log p [B, T] of every label at its own place, 0 where ignored; the mean of what is not, negated; and rounding."""
    labels, logits = batch["labels"][:, 1:], run(model, batch)[:, :-1]
    logp = F.log_softmax(logits.double(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logp = torch.where(labels != -100, logp, 0.0)
    return F.pad(logp, (1, 0)), -logp.sum() / (labels != -100).sum(), rounding(logits)


def gradient(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


def dot(x: dict, y: dict) -> float:
    return sum((x[name].double() * y[name].double()).sum().item() for name in x)


def close_gradients(found: dict, expected: dict, tolerance: float) -> None:
    whole = dot(expected, expected) ** 0.5
    assert whole > 1e-3
    for name, gradient in expected.items():
        assert (found[name].double() - gradient.double()).norm() <= tolerance * whole, name


@beyond_the_quick
def test_loss_and_logp_are_the_models_own(name, model):
    batch = batch_for(model)
    if name in NOT_CAUSAL:
        with pytest.raises(
            ValueError, match=f"{type(model).__name__} is no causal language model: it is bidirectional"
        ):
            gfast.model_loss(model, batch, NLL())
        return
    logp, loss, tolerance = literal(model, batch)
    expected = gradient(model, loss)
    found = gfast.model_loss(model, batch, NLL())
    close(found.loss, loss, tolerance)
    close(found.logp, logp, tolerance)
    close_gradients(gradient(model, found.loss), expected, tolerance)
    weights = torch.linspace(0.5, 2.0, logp.numel()).view_as(logp)
    scored = gfast.model_logp(model, batch)
    close(scored, logp, tolerance)
    expected = gradient(model, (literal(model, batch)[0] * weights).sum())
    close_gradients(gradient(model, (scored.double() * weights).sum()), expected, tolerance)


@beyond_the_quick
def test_g_effect_is_the_literal_dot_product(name, model):
    forget, retain = batch_for(model, seed=1), batch_for(model, seed=2)
    if name in NOT_CAUSAL:
        with pytest.raises(ValueError, match="no causal language model"):
            gfast.g_effect(model, GA(), forget=forget, retain=retain, groups=lambda parameter: "all")
        return
    on_forget, on_retain = (gradient(model, literal(model, batch)[1]) for batch in (forget, retain))
    tolerance = 2 * literal(model, forget)[2] + 1e-7  # directions and products are fp32
    effect = gfast.g_effect(
        model, GA(), forget=[forget], retain=[retain], engine="stream", groups=lambda parameter: "all"
    )
    size = dot(on_forget, on_forget)
    assert effect.unlearn["all"] == pytest.approx(-size, rel=tolerance)
    scale = (size * dot(on_retain, on_retain)) ** 0.5
    assert abs(effect.retain["all"] + dot(on_forget, on_retain)) <= tolerance * scale


def place_by_use(model, batch) -> tuple[dict[str, str | int], int]:
    """The place of every parameter, from its name where it is in a block and from a run where it is not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    calls: dict[str, list[int]] = {}
    clock = iter(range(10**9))
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.setdefault(name, []).append(next(clock)))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        run(model, batch)
    for hook in hooks:
        hook.remove()

    def index(name: str) -> int | None:
        found = None if TOWER.search(name) else BLOCK.match(name)
        return int(found[2]) if found else None

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = 1 + max(found for name in trained if (found := index(name)) is not None)
    inside = [at for name, times in calls.items() if index(name + ".") is not None for at in times]
    by_module = {embedding: "embed"} | ({} if head is None else {head: "lm"})
    shared = {id(p) for p in embedding.parameters()} & {id(p) for p in head.parameters()} if head else set()
    places: dict[str, str | int] = {}
    for name, parameter in trained.items():
        parts = name.split(".")
        owners = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
        held = [place for module, place in by_module.items() if any(parameter is p for p in module.parameters())]
        called = next((owner for owner in owners if owner in calls), None)
        if id(parameter) in shared:
            places[name] = "embed+lm"
        elif held:
            places[name] = held[0]
        elif TOWER.search(name) or name in BEFORE:
            places[name] = "embed"
        elif (found := index(name)) is not None:
            places[name] = found
        else:
            assert called is not None and not called.endswith("model"), name
            before, after = calls[called][-1] < min(inside), calls[called][0] > max(inside)
            assert before or after, name
            places[name] = "embed" if before else layers
    return places, layers


BLOCK = re.compile(r"(.*\.)?(?:layers|layer|h|blocks)\.(\d+)\.")
TOWER = re.compile("vision|visual|audio|image|multi_modal_projector|connector")
# parameters of the decoder itself, or read as a matrix: no call of theirs shows when
BEFORE = {
    "transformer.mask_emb",
    "model.input_hidden_states_scale",
    "model.input_hidden_states_bias",
    "prophetnet.decoder.ngram_embeddings.weight",
}


@beyond_the_quick
def test_every_parameter_is_in_the_group_of_its_use(name, model):
    if name in NO_GROUPS:
        with pytest.raises(ValueError, match=NO_GROUPS[name]):
            assign(model)
        return
    places, layers = place_by_use(model, batch_for(model))
    for groups in ("paper", "layer"):
        found = assign(model, groups)
        assert found.index.keys() == places.keys()
        for parameter, place in places.items():
            if isinstance(place, int):
                run = ("shallow", "middle", "deep")[3 * place // (layers + 1)]
                place = run if groups == "paper" else f"layer_{place + 1}"
            assert found.names[found.index[parameter]] == place, parameter


@beyond_the_quick
@pytest.mark.parametrize("name", CAUSAL, indirect=True, scope="module")
def test_layer_hidden_counts_as_transformers_does(name, model):
    batch = batch_for(model)
    if name in NOT_CAUSAL:
        pytest.skip("no causal language model")
    if "is a list of blocks" in NO_GROUPS.get(name, ""):
        with pytest.raises(ValueError, match=NO_GROUPS[name]):
            layer_hidden(model, batch, 0)
        return
    with torch.no_grad():
        expected = run(model, batch, output="hidden_states")
        for layer in range(min(hf.num_layers(model) + 1, len(expected))):  # Mllama has L states
            torch.testing.assert_close(layer_hidden(model, batch, layer), expected[layer], rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"use 0 .* to {hf.num_layers(model)}"):
        layer_hidden(model, batch, hf.num_layers(model) + 1)


@beyond_the_quick
def test_which_are_causal(name, model):
    batch = batch_for(model)
    changed = batch["input_ids"].clone()
    changed[0, -1] = 3 + (changed[0, -1] - 2) % 70
    with torch.no_grad():
        logits, other = run(model, batch), run(model, batch | {"input_ids": changed})
    moved = (logits - other)[0, :-1].abs().max().item()
    assert (moved > 1e-4) == (name in NOT_CAUSAL)
    assert moved > 1e-4 or moved <= 20 * rounding(logits)


def test_enough_is_built():
    assert len(CAUSAL) >= (170 if TRANSFORMERS >= TRIED else 95)
    assert not CAUSAL.keys() & not_built().keys() and all(not_built().values())
