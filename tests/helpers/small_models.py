"""Models with heads of several kinds, a batch for them, and all their gradients."""

import torch
import transformers

SMALL = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)


def tiny(kind: str):
    torch.manual_seed(0)
    configs = {
        "llama": lambda: transformers.LlamaConfig(**SMALL),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=3, n_head=2, n_positions=32),
        "gemma2": lambda: transformers.Gemma2Config(
            **SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0
        ),
        "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
        "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
        "phi": lambda: transformers.PhiConfig(**SMALL),
        # logits = lm_head(transform(hidden)): no plain head, so gfast must fall back to the model's own logits
        "gptj_like": lambda: transformers.BertConfig(**SMALL, is_decoder=True),
    }
    config = configs[kind]()
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


def stretching(kind: str):
    """Of 20 positions, beyond which its rotary embeddings stretch: "longrope" or "dynamic"."""
    torch.manual_seed(0)
    scaling = {"type": kind}
    if kind == "dynamic" or hasattr(transformers.Phi3Config(pad_token_id=0), "rope_parameters"):
        scaling |= {"rope_type": kind, "rope_theta": 1e4}  # as transformers 5 calls it; of Phi-3's 4 wants no more
    scaling |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {"factor": 8.0}
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    limits = {"original_max_position_embeddings": 20, "max_position_embeddings": 99 if kind == "longrope" else 20}
    name = "Phi3" if kind == "longrope" else "Llama"
    more = dict(pad_token_id=0, initializer_range=0.3, rope_scaling=scaling)
    config = getattr(transformers, f"{name}Config")(**sizes, **limits, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def batch_of(seed=0, B=4, T=8, V=61):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 6:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[0, :3] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
