"""Token effects against a backward pass a token, what follows from them, and the state of the model afterwards."""

from __future__ import annotations

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import batches, exact_norms, literal_group, logps, tiny  # noqa: E402

import gfast  # noqa: E402
from gfast import hf  # noqa: E402
from gfast.geffect import assign, risk_gradients  # noqa: E402
from gfast.geffect.data import Term  # noqa: E402
from gfast.geffect.measurement import Measurement  # noqa: E402
from gfast.geffect.token import objective_dots, token_effect  # noqa: E402
from gfast.objectives import DPO, GA, KL, NLL, NPO, PO, RMU, TNPO, WGA, Mix, SatImp, SimNPO  # noqa: E402

SIZES = dict(vocab_size=61, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24)
GROUPED = dict(num_key_value_heads=2)
# class of the configuration, its sizes, attention; softmax of eager attention and of routers is fp32 in transformers
FAMILIES = {
    "qwen3": ("Qwen3Config", SIZES | GROUPED | dict(head_dim=4), "sdpa", 1e-9),
    "mistral_sliding": ("MistralConfig", SIZES | GROUPED | dict(sliding_window=3), "sdpa", 1e-9),
    "mistral_eager": ("MistralConfig", SIZES | GROUPED, "eager", 1e-5),
    "phi3": ("Phi3Config", SIZES | GROUPED | dict(pad_token_id=0), "sdpa", 1e-9),
    "opt_projected": (
        "OPTConfig",
        SIZES | dict(ffn_dim=24, word_embed_proj_dim=8, max_position_embeddings=32, do_layer_norm_before=True),
        "sdpa",
        1e-9,
    ),
    "falcon": ("FalconConfig", SIZES | dict(alibi=False, bias=True, multi_query=True), "sdpa", 1e-9),
    "gemma3_text": ("Gemma3TextConfig", SIZES | GROUPED | dict(head_dim=4, sliding_window=3), "sdpa", 1e-9),
    "cohere": ("CohereConfig", SIZES | GROUPED | dict(use_qk_norm=False), "sdpa", 1e-5),  # its norm computes in fp32
    "granite": ("GraniteConfig", SIZES | GROUPED, "sdpa", 1e-9),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SIZES | GROUPED | dict(head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
        "sdpa",
        1e-6,
    ),
}
TINY = dict.fromkeys(("llama", "tied_llama", "gpt2", "qwen2", "mistral", "phi", "gpt_neox", "opt"), 1e-9)
TINY |= {"gemma2": 1e-5, "mixtral": 1e-6}


def made(kind: str):
    """A model in fp64 with weights far from their initialisation, and the relative error that its own fp32 allows."""
    if kind in TINY:
        return tiny(kind).eval(), TINY[kind]
    name, sizes, attention, rtol = FAMILIES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    exact_norms(model)
    plain_kernels(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model, rtol


def plain_kernels(model) -> None:
    """Attention and experts as operations that exist in fp64."""
    if model.config._attn_implementation not in ("sdpa", "eager"):
        model.config._attn_implementation = "sdpa"
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"


def literal(model, data: list[dict], directions, groups) -> torch.Tensor:
    """[2, G, N] fp64: a backward pass for every label token."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    columns = []
    for batch in data:
        logp, _, valid = logps(model, batch)
        for b, t in valid.nonzero().tolist():
            grads = torch.autograd.grad(logp[b, t], list(named.values()), retain_graph=True, allow_unused=True)
            column = torch.zeros(2, len(groups.names), dtype=torch.float64)
            for name, grad in zip(named, grads, strict=True):
                for side in (0, 1):
                    along = directions.get(side, name)
                    if grad is not None and along is not None:
                        column[side, groups.index[name]] += (grad.double() * along.double()).sum().item()
            columns.append(column)
    return torch.stack(columns, -1)


def stacked(tokens) -> torch.Tensor:
    """[2, G, N] from a TokenEffect."""
    sides = (tokens.unlearn, tokens.retain)
    return torch.stack([torch.stack([torch.cat(values) for values in side.values()]) for side in sides])


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    """Relative to the largest effect of each group and side."""
    assert actual.shape == expected.shape
    scale = expected.abs().amax(-1, keepdim=True)
    assert (scale > 0).all()
    assert ((actual - expected).abs() / scale).max() < rtol


def measured(model, forget, retain, groups="paper"):
    """The token effects, and the same literally."""
    group_map = assign(model, groups)
    with risk_gradients(model, forget=forget, retain=retain, groups=groups, dtype=torch.float64) as directions:
        tokens = token_effect(model, forget=forget, retain=retain, groups=groups, directions=directions)
        return tokens, literal(model, forget, directions, group_map)


def data():
    return batches(1), batches(2, rows=4, sizes=(1, 3))


@pytest.mark.parametrize("kind", [*TINY, *FAMILIES])
def test_every_token_in_fp64(kind):
    model, rtol = made(kind)
    forget, retain = data()
    tokens, expected = measured(model, forget, retain)
    assert_close(stacked(tokens), expected, rtol)
    found = [logps(model, batch) for batch in forget]
    assert torch.allclose(torch.cat(tokens.logp), torch.cat([logp[valid] for logp, _, valid in found]), rtol=1e-6)
    labels = torch.cat([batch["labels"][:, 1:][valid] for batch, (_, _, valid) in zip(forget, found, strict=True)])
    assert torch.equal(torch.cat(tokens.labels), labels)
    assert torch.allclose(torch.cat(tokens.ref_logp), torch.cat([ref[valid] for _, ref, valid in found]), rtol=1e-6)
    rows = [row for batch in forget for row in batch["input_ids"]]
    for row, places, ids in zip(rows, tokens.positions, tokens.labels, strict=True):
        assert torch.equal(row[places], ids)
    assert list(tokens.unlearn) == assign(model).names == list(tokens.retain)


@pytest.mark.parametrize("kind", ["llama", "tied_llama", "gpt2"])
@pytest.mark.parametrize("grouping", ["layer", "literal", "kind of module"])
def test_other_groupings(kind, grouping):
    def by_module(name: str) -> str:
        return "norms" if "norm" in name or "ln_" in name else "biases" if name.endswith("bias") else "matrices"

    tied = kind != "llama"
    groups = {"layer": "layer", "literal": lambda name: literal_group(name, 4, tied), "kind of module": by_module}
    model, rtol = made(kind)
    tokens, expected = measured(model, *data(), groups[grouping])
    assert_close(stacked(tokens), expected, rtol)


def test_partly_frozen():
    model, _ = made("tied_llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name or "layers.2.input_layernorm" in name)
    tokens, expected = measured(model, *data())
    assert list(tokens.unlearn) == ["shallow", "middle"]
    assert_close(stacked(tokens), expected, 1e-9)


@pytest.mark.parametrize("only", ["lm_head", "embed_tokens", "model.norm"])
def test_one_trainable_part(only):
    model, _ = made("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(only in name)
    tokens, expected = measured(model, *data())
    assert_close(stacked(tokens), expected, 1e-9)


@pytest.mark.parametrize("target", [["q_proj", "down_proj"], ["v_proj", "lm_head", "embed_tokens"]])
def test_adapters(target):
    peft = pytest.importorskip("peft")
    base, _ = made("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=target, task_type="CAUSAL_LM")).double()
    exact_norms(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval()
    tokens, expected = measured(model, *data())
    assert_close(stacked(tokens), expected, 1e-9)


def test_a_wrapped_model_gives_the_same():
    model, _ = made("gpt2")
    forget, retain = data()
    plain = token_effect(model, forget=forget, retain=retain, direction_dtype=torch.float64)
    compiled = token_effect(torch.compile(model), forget=forget, retain=retain, direction_dtype=torch.float64)
    assert torch.equal(stacked(plain), stacked(compiled))
    directions = risk_gradients(model, forget=forget, retain=retain, dtype=torch.float64)
    for block in model.transformer.h:
        block.compile()
    assert torch.equal(
        stacked(plain), stacked(token_effect(model, forget=forget, retain=retain, directions=directions))
    )


def test_both_padding_sides_and_any_batches():
    model, _ = made("qwen2")
    retain = batches(2, rows=4, sizes=(4,))
    right = batches(1, sizes=(5,))
    split = batches(1, sizes=(1, 3, 1))
    right[0]["labels"][:, 0] = -100  # nothing scores it; further right the padding would
    lengths = right[0]["attention_mask"].sum(1).tolist()
    left = {
        key: torch.stack([row.roll(len(row) - n) for row, n in zip(value, lengths, strict=True)])
        for key, value in right[0].items()
    }
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    directions = risk_gradients(model, forget=right, retain=retain, dtype=torch.float64)
    found = [
        token_effect(model, forget=forget, retain=retain, directions=directions) for forget in (right, split, [left])
    ]
    for other in found[1:]:
        assert_close(stacked(other), stacked(found[0]), 1e-9)


def test_rows_without_labels():
    model, _ = made("llama")
    forget, retain = data()
    forget[0]["labels"][1] = -100
    tokens, expected = measured(model, forget, retain)
    assert_close(stacked(tokens), expected, 1e-9)
    assert len(tokens.logp[1]) == 0 and len(tokens.logp) == 5
    assert tokens.samples().tokens[1] == 0


GRID = [
    GA(),
    *[WGA(alpha=alpha) for alpha in (0.3, 1.0, 2.0)],
    SatImp(beta1=2.0, beta2=0.5),
    *[TNPO(beta=beta) for beta in (0.5, 2.0)],
    *[NPO(beta=beta) for beta in (0.1, 0.5)],
    *[SimNPO(beta=beta, delta=0.2) for beta in (1.0, 4.5)],
]


def test_one_measurement_gives_every_objective():
    model, _ = made("tied_llama")
    forget, retain = data()
    tokens = token_effect(model, forget=forget, retain=retain, direction_dtype=torch.float64)
    expected = gfast.g_effect(model, GRID, forget=forget, retain=retain, direction_dtype=torch.float64, engine="stream")
    for objective, effect in zip(GRID, expected, strict=True):
        found = tokens.g_effect(objective)
        for side in ("unlearn", "retain"):
            scale = max(abs(value) for value in getattr(effect, side).values())
            for group, value in getattr(effect, side).items():
                assert getattr(found, side)[group] == pytest.approx(value, abs=1e-9 * scale), (objective, side, group)


def dots_of(model, used, forget, retain, objective_batches=None):
    """[G, 2] of every term."""
    measurement = Measurement.of(
        model, forget, retain, used=used, direction_dtype=torch.float64, objective_batches=objective_batches
    )
    with measurement.directions() as directions:
        return objective_dots(measurement, directions, used)


def assert_dots(dots, effect):
    expected = torch.tensor([list(effect.unlearn.values()), list(effect.retain.values())], dtype=torch.float64).t()
    assert (dots - expected).abs().max() < 1e-9 * expected.abs().max()


def test_engine_shares_one_measurement_of_a_set(monkeypatch):
    from gfast.geffect import token

    counted = []
    original = token.measure_tokens
    monkeypatch.setattr(token, "measure_tokens", lambda *args: counted.append(1) or original(*args))
    model, _ = made("llama")
    forget, retain = data()
    found = dots_of(model, [Term(objective, "forget") for objective in GRID], forget, retain)
    assert len(counted) == 1
    expected = gfast.g_effect(model, GRID, forget=forget, retain=retain, direction_dtype=torch.float64, engine="stream")
    for dots, effect in zip(found, expected, strict=True):
        assert_dots(dots, effect)


def test_engine_on_pairs_and_on_retain_data():
    model, _ = made("llama")
    forget, retain = data()
    pairs = batches(5, rows=4, sizes=(4,))
    terms = [Term(NLL(), "retain"), Term(DPO(beta=0.4), "objective")]
    found = dots_of(model, terms, forget, retain, pairs)
    options = dict(forget=forget, retain=retain, objective_batches=pairs, direction_dtype=torch.float64)
    objectives = [Mix(GA(), NLL(), gamma=0.0), DPO(beta=0.4)]
    for dots, effect in zip(found, gfast.g_effect(model, objectives, **options), strict=True):
        assert_dots(dots, effect)


@pytest.mark.parametrize("objective", [KL(), RMU(layer=1)])
def test_engine_refuses_what_has_no_token_weights(objective):
    model, _ = made("llama")
    forget, retain = data()
    with pytest.raises(ValueError, match=r"no token weights.*engine='stream'"):
        objective_dots(Measurement.of(model, forget, retain), None, [Term(objective, "retain")])


def test_sums_are_the_risk_gradients_squares():
    """Summed over all tokens, -e / N is the squared norm of the forget risk's gradient in every group."""
    model, _ = made("gpt2")
    forget, retain = data()
    tokens = token_effect(model, forget=forget, retain=retain, direction_dtype=torch.float64)
    for group, values in tokens.unlearn.items():
        square = -torch.cat(values).sum().item() / tokens.counts["unlearn"]
        assert math.sqrt(square) == pytest.approx(tokens.norms["unlearn"][group], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "autocast"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_error_is_at_most_twice_autograds(kind, dtype):
    narrow = torch.bfloat16 if dtype == "autocast" else dtype
    stored = torch.float32 if dtype == "autocast" else dtype
    model, exact = tiny(kind, dtype=stored).eval(), tiny(kind, dtype=stored).eval().double()
    exact_norms(exact)
    forget, retain = data()
    groups = assign(model)
    with risk_gradients(exact, forget=forget, retain=retain, dtype=torch.float64) as directions:
        truth = literal(exact, forget, directions, groups)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            plain = literal(model, forget, directions, groups)
            found = stacked(token_effect(model, forget=forget, retain=retain, directions=directions))
    scale = truth.square().mean(-1).sqrt()  # [2, G]
    error, allowed = ((x - truth).square().mean(-1).sqrt() / scale for x in (found, plain))
    assert (error <= 2 * allowed + torch.finfo(narrow).eps).all(), (error, allowed)


def test_small_directions_survive_half_precision():
    """2^-30 times the directions give 2^-30 times the effects, bit for bit, far below what float16 can hold."""
    model = tiny("llama", dtype=torch.float16).eval()
    forget, retain = data()
    with risk_gradients(model, forget=forget, retain=retain) as directions:
        whole = stacked(token_effect(model, forget=forget, retain=retain, directions=directions))
        for store in directions.stores:
            store.kept = [None if kept is None else kept * 2.0**-30 for kept in store.kept]
        directions.gram *= 2.0**-60
        small = stacked(token_effect(model, forget=forget, retain=retain, directions=directions))
    assert torch.equal(small, whole * 2.0**-30) and (whole != 0).any()


# ------------------------------------------------------------------------------------------- the model afterwards


def state_of(model):
    return (
        [(name, id(m), m.training, len(m._forward_hooks), "forward" in vars(m)) for name, m in model.named_modules()],
        [(name, id(p), p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()],
        model.config._attn_implementation,
        getattr(model.config, "_experts_implementation", None),
        torch.is_grad_enabled(),
        torch.overrides._get_current_function_mode_stack(),
    )


@pytest.mark.parametrize("failure", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_model_is_left_as_found(failure):
    model, _ = made("mixtral")
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    forget, retain = data()
    directions = risk_gradients(model, forget=forget, retain=retain, dtype=torch.float64)
    model.config._attn_implementation = "flex_attention"
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "grouped_mm"
    model.model.norm.weight.grad = kept = torch.ones_like(model.model.norm.weight)
    weights = [p.detach().clone() for p in model.parameters()]

    def fail(*_):
        if failure is not None:
            raise failure

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    before = state_of(model)
    if failure is None:
        token_effect(model, forget=forget, retain=retain, directions=directions)
    else:
        with pytest.raises(type(failure)):
            token_effect(model, forget=forget, retain=retain, directions=directions)
    assert state_of(model) == before
    handle.remove()
    assert model.model.norm.weight.grad is kept
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_fused_experts_are_switched():
    model = made("mixtral")[0].float()
    if not hasattr(model.config, "_experts_implementation"):
        pytest.skip("this version of transformers has no fused experts")
    forget, retain = data()
    expected = token_effect(model, forget=forget, retain=retain)
    model.config._experts_implementation = "grouped_mm"
    found = token_effect(model, forget=forget, retain=retain)
    assert_close(stacked(found), stacked(expected), 1e-4)
    assert model.config._experts_implementation == "grouped_mm"


def test_other_attention_is_switched_and_said(caplog):
    model, _ = made("llama")
    forget, retain = data()
    expected = token_effect(model, forget=forget, retain=retain, direction_dtype=torch.float64)
    directions = risk_gradients(model, forget=forget, retain=retain, dtype=torch.float64)
    model.config._attn_implementation = "flash_attention_2"
    hf._log_switch.cache_clear()
    found = token_effect(model, forget=forget, retain=retain, directions=directions)
    token_effect(model, forget=forget, retain=retain, directions=directions)
    assert_close(stacked(found), stacked(expected), 1e-9)
    assert sum("flash_attention_2" in record.message for record in caplog.records) == 1
    assert model.config._attn_implementation == "flash_attention_2"


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Rounding(torch.nn.Module):
    def forward(self, x):
        return Straight.apply(x)


class Raw(torch.nn.Module):
    def forward(self, x):
        assert x.data_ptr()
        return x


class ThroughNumpy(torch.nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.detach().numpy() * 2) + x.numpy()


@pytest.mark.parametrize("module,what", [(Rounding, "Straight"), (Raw, "data_ptr"), (ThroughNumpy, "numpy")])
def test_what_has_no_forward_mode_is_named(module, what):
    model, _ = made("llama")
    forget, retain = data()
    directions = risk_gradients(model, forget=forget, retain=retain)
    model.model.layers[1].mlp.act_fn = module()
    with pytest.raises(ValueError, match=rf"(?s){what}.*engine='stream'") as error:
        token_effect(model, forget=forget, retain=retain, directions=directions)
    assert "model.layers.1.mlp.act_fn" in str(error.value)


@pytest.mark.skipif(transformers.__version__ < "5", reason="Bloom evaluates plain operations in transformers 4")
def test_autograd_functions_of_families_are_refused_by_name():
    config = transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    forget, retain = data()
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.gelu_impl' \(BloomGelu\).*GeLUFunction"):
        token_effect(model, forget=forget, retain=retain)


def test_bad_input():
    model, _ = made("llama")
    forget, retain = data()
    with pytest.raises(ValueError, match="forget= holds no batch"):
        token_effect(model, forget=[], retain=retain)
    with pytest.raises(ValueError, match="groups must be"):
        token_effect(model, forget=forget, retain=retain, groups="blocks")
    forget[0]["labels"][0, 2] = 61
    with pytest.raises(ValueError, match="outside the vocabulary"):
        token_effect(model, forget=forget, retain=retain)
    forget[0]["labels"][0, 2] = 4
    directions = risk_gradients(model, forget=forget, retain=retain)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    directions.squares.copy_(torch.stack([p.detach().double().square().sum() for p in model.parameters()]))
    with pytest.raises(ValueError, match=r"not finite at \d+ of \d+ tokens, in the groups .*(shallow|middle)"):
        token_effect(model, forget=forget, retain=retain, directions=directions)


def test_mix_and_refusal_have_their_remedy():
    model, _ = made("llama")
    forget, retain = data()
    tokens = token_effect(model, forget=forget, retain=retain)
    for objective in (Mix(GA(), NLL()), PO()):
        with pytest.raises(ValueError, match="engine='stream'"):
            tokens.g_effect(objective)
