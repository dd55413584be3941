"""Every causal language model of the installed transformers, tiny and with random weights.

    for name in CAUSAL: model = build(name); batch = batch_for(model)

A configuration is the architecture's own default with every size that SMALL names made small; EXTRA holds what a family
needs besides. Families of which no causal language model can be made here are in NOT_BUILT, with the reason.
`IMAGE` are models of text and images; their batches hold pixel values.

Models are fp64 where the architecture can compute in it, else fp32. Many norms and routers compute in fp32 whatever the
model's type is, so compare two runs of the same model, never a run with a formula.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

VOCAB, LENGTH, SHORT, PROMPT = 83, 9, 6, 2
TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))
TRIED = (5, 24)  # the newest version whose every architecture is known to be built or in NOT_BUILT


def _all(names: str, value) -> dict:
    return dict.fromkeys(names.split(), value)


SMALL = (
    _all("vocab_size decoder_vocab_size audio_vocab_size unpadded_vocab_size", VOCAB)
    | _all("vocab_size_per_layer_input encoder_hash_byte_group_vocab", VOCAB)
    | _all("hidden_size d_model n_embd emb_dim lru_width embedding_size word_embed_proj_dim", 32)
    | _all("hidden_size_global embed_dim", 32)
    | _all("input_embedding_size attention_hidden_size d_embed pronunciation_embed_dim shape_embed_dim dim_model", 32)
    | _all("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_blocks", 2)
    | _all("num_encoder_layers num_decoder_layers", 2)
    | _all("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4)
    | _all("num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads", 4)
    | _all("num_key_value_heads num_kv_heads num_query_groups swa_num_key_value_heads", 2)
    | _all("head_dim attention_head_dim kv_channels d_head global_head_dim index_head_dim swa_head_dim", 8)
    | _all("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff n_inner", 48)
    | _all("dense_intermediate_size shared_intermediate_size d_inner intermediate_size_mlp feed_forward_size", 48)
    | _all("max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length", 64)
    | _all("max_source_positions", 64)
    | _all("num_experts n_routed_experts num_local_experts moe_num_experts", 4)
    | _all("num_experts_per_tok num_experts_per_token moe_topk moe_k", 2)
    | _all("moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size", 16)
    | _all("expert_ffn_hidden_size moe_shared_expert_intermediate_size", 16)
    | _all("n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups n_shared_experts", 1)
    | _all("num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers", 1)
    | _all("qk_rope_head_dim qk_nope_head_dim v_head_dim q_lora_rank kv_lora_rank o_lora_rank", 8)
    | _all("qk_head_dim router_hidden_size", 16)
    | _all("linear_key_head_dim linear_value_head_dim linear_head_dim hidden_size_per_layer_input laurel_rank", 8)
    | _all("linear_num_key_heads linear_num_value_heads linear_num_heads n_mamba_heads index_n_heads o_groups", 2)
    | _all("mamba_d_state state_size ssm_state_size mamba_dt_rank time_step_rank adapter_rank", 4)
    | _all("mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim mamba_headdim", 8)
    | _all("mamba_chunk_size chunk_size pronunciation_vocab_size shape_vocab_size", 4)
    | dict(mamba_d_ssm=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, rotary_dim=4, is_decoder=True)
)

_LINEAR = dict(layer_types=["linear_attention", "full_attention"])
EXTRA = {
    "bamba": dict(attn_layer_indices=[1]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "mamba2": dict(num_heads=8),
    "zamba": dict(
        num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], use_mamba_kernels=False
    )
    | dict(attention_hidden_size=64, attention_head_dim=16, num_key_value_heads=4),
    "zamba2": dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], n_mamba_heads=8)
    | dict(attention_hidden_size=64, attention_head_dim=16, num_key_value_heads=4),
    "jamba": dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "qwen3_next": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "olmo_hybrid": _LINEAR,
    "zaya": dict(num_experts_per_tok=1),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "gemma3n_text": dict(num_kv_shared_layers=0, intermediate_size=48),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4))
    | dict(ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2)),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]), full_attention=None
        ),
    ),
    "phi4_multimodal": dict(  # 4.51 has no default for the two
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        audio_config=dict(hidden_size=32, intermediate_size=48, num_blocks=2, num_attention_heads=4),
    ),
    "mllama": dict(text_config=dict(cross_attention_layers=[1], rope_scaling=dict(rope_type="default"))),
    "xmod": dict(default_language="en_XX"),
    "dots3_note": dict(num_key_value_heads=4),
    "dots3_note_text": dict(num_key_value_heads=4),
}

# text and images: image_size 8 in patches of 4, or of 2 that are merged by fours, is four tokens an image
IMAGE_TOKEN, IMAGE_TOKENS = VOCAB - 1, 4
_IMAGE_IDS = dict(image_token_index=IMAGE_TOKEN, image_token_id=IMAGE_TOKEN)
_SIGHT = dict(image_size=8, patch_size=4)
_ROPE = dict(rope_scaling=dict(type="mrope", rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]))
_QWEN = (
    _IMAGE_IDS
    | dict(vision_config=dict(patch_size=2, out_hidden_size=32, fullatt_block_indexes=[1], window_size=8))
    | dict(vision_start_token_id=VOCAB - 2, video_token_id=VOCAB - 3)
    | (dict(text_config=_ROPE) if TRANSFORMERS >= (5, 0) else _ROPE)
)
IMAGE_EXTRA = {
    "llava": _IMAGE_IDS | dict(vision_config=_SIGHT),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "gemma3": _IMAGE_IDS | dict(vision_config=_SIGHT, mm_tokens_per_image=4),
    "paligemma": _IMAGE_IDS | dict(vision_config=_SIGHT | dict(projection_dim=32), projection_dim=32),
    "idefics3": _IMAGE_IDS | dict(vision_config=_SIGHT | dict(patch_size=2), scale_factor=2),
    "smolvlm": _IMAGE_IDS | dict(vision_config=_SIGHT | dict(patch_size=2), scale_factor=2),
    "mllama": _IMAGE_IDS
    | dict(vision_config=_SIGHT | dict(num_global_layers=1, vision_output_dim=64, intermediate_layers_indices=[0]))
    | dict(text_config=EXTRA["mllama"]["text_config"]),
}

_DRAFT = "drafts for another model: its input is that model's hidden states"
_CODES = "a model of audio codes: its input has one row of ids a codebook"
NOT_BUILT = {
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "musicgen": _CODES,
    "musicgen_melody": _CODES,
    "gemma3n": "its vision tower needs timm",
    "qdqbert": "needs pytorch-quantization",
    "speech_to_text_2": "its position embeddings do not load with today's torch",
    "reformer": "its reversible layers have gradients in training mode alone",
    "transfo-xl": "an adaptive softmax over word clusters: it has no logits",
}
if TRANSFORMERS < (5, 0):
    _KEPT = "keeps its state, graph and all, from one call to the next in eval mode"
    NOT_BUILT |= {"mega": _KEPT, "recurrent_gemma": _KEPT}

# the last token changes what comes before it: models of both directions or of a prompt seen whole
NOT_CAUSAL = {"cpmant", "xlm", "xlnet"}
if TRANSFORMERS < (5, 0):
    # PaliGemma of 4.51 is causal only while it is given labels; Zamba2's chunks leak into one another
    NOT_CAUSAL |= {"paligemma+image", "zamba2"}


def _small(cls, extra: dict):
    plain = cls()
    known = plain.to_dict()
    sizes = {key: value for key, value in SMALL.items() if key in known}
    if "kv_lora_rank" in known:
        sizes["num_key_value_heads"] = SMALL["num_attention_heads"]
    for key, part in vars(plain).items():
        if isinstance(part, transformers.PretrainedConfig):
            sizes[key] = _accepted(type(part), _small(type(part), extra.get(key, {})).to_dict() | extra.get(key, {}))
            extra = {k: v for k, v in extra.items() if k != key}
    return cls(**_accepted(cls, sizes | extra))


def _accepted(cls, options: dict) -> dict:
    """Dbrx of transformers 4 refuses options that it does not name; the others ignore them."""
    if not cls.__name__.startswith("Dbrx") or TRANSFORMERS >= (5, 0):
        return options
    return {key: value for key, value in options.items() if key in inspect.signature(cls).parameters}


def _names(mapping: dict[str, str]) -> dict[str, str]:
    """One name a model class: the one that the class is called after."""
    best: dict[str, str] = {}

    def fit(name: str, cls: str) -> tuple[bool, int]:
        plain = name.replace("_", "").replace("-", "").removesuffix("text")
        return cls.lower().startswith(plain), len(name)

    for name, cls in mapping.items():
        cls = cls if isinstance(cls, str) else cls[0]
        if cls not in best or fit(name, cls) > fit(best[cls], cls):
            best[cls] = name
    return {name: cls for cls, name in best.items()}


def _model(name: str, dtype: torch.dtype, seed: int) -> nn.Module:
    kind = name.removesuffix("+image")
    classes, extra = (CLASSES, EXTRA) if kind == name else (IMAGE_CLASSES, IMAGE_EXTRA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = _small(transformers.CONFIG_MAPPING[kind], extra.get(kind, {}))
        cls = getattr(transformers, classes[kind])
        if not isinstance(config, cls.config_class):  # the text model of a composite configuration
            config = config.get_text_config()
        model = cls._from_config(config, attn_implementation="eager").to(dtype).eval()
    model.sees_images = kind != name
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product takes no fp64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # some families leave theirs as the memory was
                parameter.normal_(std=0.15)
            else:  # norm weights are not 1 and biases not 0, so that leaving one out shows
                parameter.nan_to_num_().clamp_(-4, 4).add_(0.15 * torch.randn_like(parameter))
    return model


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The architecture in eval mode; fp32 where it cannot compute in `dtype`."""
    if dtype == torch.float64 and not _takes_fp64(name):
        dtype = torch.float32
    return _model(name, dtype, seed)


@functools.cache
def _takes_fp64(name: str) -> bool:
    model = _model(name, torch.float64, 0)
    try:
        with torch.no_grad():
            return bool(run(model, batch_for(model)).isfinite().all())
    except RuntimeError as error:
        if any(word in str(error) for word in ("dtype", "scalar type", "without overflow")):
            return False
        raise


CLASSES = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CAUSAL: dict[str, Callable[[], nn.Module]] = {n: functools.partial(build, n) for n in CLASSES if n not in NOT_BUILT}

IMAGE_CLASSES = {n: c for n, c in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items() if n in IMAGE_EXTRA}
IMAGE: dict[str, Callable[[], nn.Module]] = {
    f"{n}+image": functools.partial(build, f"{n}+image") for n in IMAGE_CLASSES
}


def not_built() -> dict[str, str]:
    """The causal architectures of the installed transformers that are not in CAUSAL, with the reason."""
    return {n: why for n, why in NOT_BUILT.items() if n in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def batch_for(model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two rows of different length, right padded; the prompt and the padding have label -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB - 3, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, SHORT:] = 0
    ids[1, SHORT:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return _with_images(model, batch, generator) if model.sees_images else batch


def _with_images(model: nn.Module, batch: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    kind, rows = model.config.model_type, len(batch["input_ids"])
    front = IMAGE_TOKENS + 1  # a token that says that an image begins, and the image's
    batch = {key: nn.functional.pad(v, (front, 0), value=-100 if key == "labels" else 1) for key, v in batch.items()}
    is_image = torch.zeros_like(batch["input_ids"])
    is_image[:, 1:front] = 1
    batch["input_ids"][:, 0] = VOCAB - 2
    if kind != "mllama":
        batch["input_ids"][:, 1:front] = IMAGE_TOKEN

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)

    if kind.startswith("qwen"):
        more = {"pixel_values": pixels(rows * 16, 24), "image_grid_thw": torch.tensor([[1, 4, 4]] * rows)}
        if TRANSFORMERS >= (5, 0):
            more["mm_token_type_ids"] = is_image
    elif kind in ("idefics3", "smolvlm"):
        more = {"pixel_values": pixels(rows, 1, 3, 8, 8)}
    elif kind == "mllama":
        seen = torch.ones(rows, batch["input_ids"].shape[1], 1, 4, dtype=torch.long)
        seen[0, :3] = 0  # the image comes after the third token
        more = {"pixel_values": pixels(rows, 1, 4, 3, 8, 8), "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long)}
        more |= {"aspect_ratio_mask": torch.ones(rows, 1, 4, dtype=torch.long), "cross_attention_mask": seen}
    else:
        more = {"pixel_values": pixels(rows, 3, 8, 8)}
        if kind == "gemma3":
            more["token_type_ids"] = is_image
        elif kind == "paligemma":  # 0: image and prompt, which see one another; 1: the answer
            more["token_type_ids"] = (torch.arange(is_image.shape[1]) >= front + PROMPT).long().expand(rows, -1)
    return batch | more


def run(model: nn.Module, batch: dict[str, torch.Tensor], output: str = "logits"):
    """The model's own logits [B, T, V], or its hidden_states, on everything of the batch but its labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        inputs["use_cache"] = False
    if output == "hidden_states":
        inputs["output_hidden_states"] = True
    return getattr(model(**inputs), output)
