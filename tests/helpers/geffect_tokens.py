"""Models of many families, and their token effects by a backward pass a token."""

from __future__ import annotations

import torch
import transformers

from gfast.geffect import assign, risk_gradients, token_effect
from helpers.geffect_models import batches, exact_norms, logps, tiny

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
