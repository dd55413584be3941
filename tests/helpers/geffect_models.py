"""Tiny models, data and the literal G-effect in fp64, written from the definitions and from nothing of gfast."""

from __future__ import annotations

import functools
import re

import torch
import torch.nn.functional as F
import transformers

VOCAB = 61


def tiny(kind: str, layers: int = 4, dtype: torch.dtype = torch.float64):
    sizes = dict(vocab_size=VOCAB, num_hidden_layers=layers, num_attention_heads=4, hidden_size=16)
    torch.manual_seed(0)
    if kind in ("llama", "tied_llama"):
        config = transformers.LlamaConfig(**sizes, intermediate_size=24, tie_word_embeddings=kind == "tied_llama")
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_layer=layers, n_head=4, n_embd=16, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    elif kind == "qwen2":
        config = transformers.Qwen2Config(**sizes, num_key_value_heads=2, intermediate_size=24)
    elif kind == "qwen3":
        config = transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=4, intermediate_size=24)
    elif kind == "gemma3":
        config = transformers.Gemma3TextConfig(
            **sizes, num_key_value_heads=2, head_dim=4, intermediate_size=24, sliding_window=6
        )
    elif kind == "granite":
        config = transformers.GraniteConfig(**sizes, num_key_value_heads=2, intermediate_size=24, logits_scaling=2.0)
    elif kind == "gemma2":
        config = transformers.Gemma2Config(
            **sizes,
            num_key_value_heads=2,
            head_dim=4,
            intermediate_size=24,
            final_logit_softcapping=2.0,
            attn_logit_softcapping=None,
        )
    elif kind == "gpt_neox":
        config = transformers.GPTNeoXConfig(**sizes, intermediate_size=24)
    elif kind == "opt":
        config = transformers.OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32)
    elif kind == "phi":
        config = transformers.PhiConfig(**sizes, intermediate_size=24, pad_token_id=0)
    elif kind == "mistral":
        config = transformers.MistralConfig(**sizes, num_key_value_heads=2, intermediate_size=24)
    elif kind == "mixtral":
        config = transformers.MixtralConfig(
            **sizes, num_key_value_heads=2, intermediate_size=24, num_local_experts=3, num_experts_per_tok=2
        )
    else:
        raise AssertionError(kind)
    # eager attention takes its softmax in fp32 (but for GPT-2), SDPA does not exist for Gemma 2
    attention = "eager" if kind in ("gemma2", "gemma3", "gpt2") else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    if dtype == torch.float64:
        exact_norms(model)
    if kind == "mixtral" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product of transformers 5 takes no fp64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


class Rounded(torch.autograd.Function):
    """Somebody's function that gives no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.round(decimals=2)

    @staticmethod
    def backward(ctx, grad):
        return None


def exact_norms(model) -> None:
    """RMSNorms of transformers compute in fp32 whatever the model's dtype is; these do not."""

    def forward(norm, hidden: torch.Tensor) -> torch.Tensor:
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        weight = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
        return weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(forward, module)


def batches(seed: int, rows: int = 5, sizes: tuple[int, ...] = (2, 3), with_ref: bool = True) -> list[dict]:
    """Rows of different lengths, right padded within each batch; the same rows whatever the batch sizes are."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(rows):
        length = int(torch.randint(5, 11, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(0, 3, (), generator=generator))] = -100
        ref = -4.0 + torch.randn(length, generator=generator)
        ref[0] = 0.0
        samples.append((ids, labels, torch.where(labels == -100, 0.0, ref)))
    assert sum(sizes) == rows
    out, start = [], 0
    for size in sizes:
        out.append(collate(samples[start : start + size], with_ref))
        start += size
    return out


def collate(samples: list, with_ref: bool = True, pad: int = 0) -> dict:
    length = max(len(ids) for ids, _, _ in samples) + pad

    def padded(values: torch.Tensor, fill: float) -> torch.Tensor:
        return F.pad(values, (0, length - len(values)), value=fill)

    batch = {
        "input_ids": torch.stack([padded(ids, 0) for ids, _, _ in samples]),
        "attention_mask": torch.stack([padded(torch.ones_like(ids), 0) for ids, _, _ in samples]),
        "labels": torch.stack([padded(labels, -100) for _, labels, _ in samples]),
    }
    if with_ref:
        batch["ref_logp"] = torch.stack([padded(ref, 0.0) for _, _, ref in samples])
    return batch


def logps(model, batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p of the shifted labels, 0 where ignored; the reference's; validity. All [B, T - 1]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    if logits.dtype.itemsize == 2:
        logits = logits.float()  # as the losses of transformers do
    labels = batch["labels"][:, 1:]
    valid = labels != -100
    logp = F.log_softmax(logits[:, :-1], -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    ref = batch.get("ref_logp")
    ref = torch.zeros_like(logp) if ref is None else ref[:, 1:].to(logp.dtype)
    return torch.where(valid, logp, 0.0), torch.where(valid, ref, 0.0), valid


def literal_loss(model, data: list[dict], name: str) -> torch.Tensor:
    """The data-set loss of the paper's formulas, differentiable."""
    parts = [logps(model, batch) for batch in data]
    tokens = sum(valid.sum() for _, _, valid in parts)
    sequences = sum(valid.any(-1).sum() for _, _, valid in parts)
    total = 0.0
    for logp, ref, valid in parts:
        p, p_ref = logp.detach().exp(), ref.exp()
        if name == "ga":
            total = total + logp.sum() / tokens
        elif name == "nll":
            total = total - logp.sum() / tokens
        elif name == "wga":
            total = total + (p**0.7 * logp * valid).sum() / tokens
        elif name == "tnpo":
            total = total + (2 * p**1.5 / (p**1.5 + p_ref**1.5) * logp * valid).sum() / tokens
        elif name == "npo":
            beta = 0.3
            ratio = (logp - ref).sum(-1)[valid.any(-1)]
            total = total + (2 / beta) * torch.log1p(torch.exp(beta * ratio)).sum() / sequences
        else:
            raise AssertionError(name)
    return total


def gradient(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads, strict=True)}


def literal_group(name: str, layers: int, tied: bool) -> str:
    """The paper's groups from the parameter's name alone."""
    if re.search(r"embed_tokens|wte", name):
        return "embed+lm" if tied else "embed"
    if "wpe" in name:
        return "embed"
    if "lm_head" in name:
        return "lm"
    block = re.search(r"(?:layers|h)\.(\d+)\.", name)
    unit = int(block.group(1)) if block else layers  # what is left is the final norm
    return ["shallow", "middle", "deep"][3 * unit // (layers + 1)]


def dots(model, x: dict, y: dict, layers: int, tied: bool) -> dict[str, float]:
    out: dict[str, float] = {}
    for name in x:
        group = literal_group(name, layers, tied)
        out[group] = out.get(group, 0.0) + (x[name] * y[name]).sum().item()
    return out


def small_tiles(monkeypatch) -> None:
    """No batch is short enough for the head's b as a whole, and chunks, tiles and strips are small beside the tests."""
    from gfast.geffect.contributions import row_pass
    from gfast.geffect.engines import gram_products

    monkeypatch.setattr(row_pass, "_WHOLE", 0.0)
    monkeypatch.setattr(row_pass, "default_chunk_rows", lambda *args: 4)
    for name, value in (("_MIN_TILE", 7), ("_TILES", 0.01), ("_BLOCK_ROWS", 5), ("_BUFFER", 500)):
        monkeypatch.setattr(gram_products, name, value)
