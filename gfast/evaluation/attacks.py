# SPDX-License-Identifier: Apache-2.0
"""Does it stay forgotten? Relearning, a short fine-tuning on a part of what was forgotten; and coarser weights.

Both are attacks that studies of evaluations use: what comes back was hidden, not removed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from gfast.data import Collator, QADataset, batches
from gfast.data.rows import as_rows
from gfast.evaluation.samples import EvaluationSet
from gfast.metrics.values import chosen, required
from gfast.module_kinds import kind_of
from gfast.objectives import NLL
from gfast.peft_models import is_adapted, merged

logger = logging.getLogger("gfast")

BITS = ("4bit", "8bit")
QUANTIZERS = ("torchao", "bitsandbytes")
# Of each evaluation along a relearning: what the curve shows.
CURVE = ("nll", "probability", "truth_ratio", "extraction_strength", "exact_memorization", "rougeL_recall")


@dataclass(frozen=True)
class Relearning:
    """How a relearning goes. rows: the first so many of the forget set are learned; or `data`, other rows. lora_r: rank
    of new LoRA adapters, 0: all parameters. every: steps between evaluations. AdamW, constant learning rate, no decay.
    """

    steps: int
    rows: int = 0
    learning_rate: float = 1e-5
    batch_size: int = 4
    lora_r: int = 0
    every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("rows", 0), ("batch_size", 1), ("lora_r", 0), ("every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"gfast: relearning: {name} is {getattr(self, name)}; give {least} or more")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"gfast: relearning: learning_rate is {self.learning_rate}; give one between 0 and 1")


def split(forget: EvaluationSet, plan: Relearning, data: Sequence[Mapping[str, Any]] | None) -> list[EvaluationSet]:
    """What is evaluated along a relearning: `forget`, the rows that it does not see, and `relearned`, the others.

    Errors: ValueError where a part of the forget set would be empty, and for a part of it beside other data.
    """
    if data is not None:
        if plan.rows:
            raise ValueError(
                f"gfast: relearning: rows={plan.rows} of the forget set has no effect beside related data, all of "
                "which are learned: give one of the two"
            )
        return [forget]
    rows = plan.rows or max(1, len(forget.rows) // 10)
    if rows >= len(forget.rows):
        raise ValueError(
            f"gfast: relearning {rows} of the {len(forget.rows)} rows of the forget set leaves none to see whether "
            "others come back: give fewer rows, or related data"
        )
    numbers = forget.index or tuple(range(len(forget.rows)))
    return [
        replace(forget, rows=forget.rows[rows:], index=numbers[rows:]),
        replace(forget, name="relearned", rows=forget.rows[:rows], index=numbers[:rows]),
    ]


def check_trainable(model: nn.Module, plan: Relearning) -> None:
    """ValueError where all parameters would be trained and some have 16 bits: a step of a usual learning rate is less
    than their rounding, most would stay as they are, and the attack would look weaker than it is. Where adapters would
    be merged into such weights: what was learned would be rounded away.
    """
    adapted = _has_adapters(model)
    trained = [p.dtype for p in model.parameters() if p.requires_grad or adapted]
    coarse = next((dtype for dtype in trained if dtype.itemsize < 4), None)
    name = str(coarse).removeprefix("torch.")
    if coarse is not None and adapted:
        raise ValueError(
            f"gfast: relearning merges the model's adapters into its weights, and those are {name}, in whose rounding "
            "a part of the adapters is lost: load the model with --dtype float32"
        )
    if coarse is not None and not plan.lora_r:
        raise ValueError(
            f"gfast: relearning would train weights of {name}, and a step of learning rate {plan.learning_rate:g} is "
            "lost in their rounding: load the model with --dtype float32, or give --relearn_lora_r"
        )


def relearn(
    model: nn.Module,
    tokenizer: Any,
    forget: EvaluationSet,
    plan: Relearning,
    folder: str | os.PathLike[str],
    *,
    data: Sequence[Mapping[str, Any]] | None = None,
    template: str = "auto",
    chat_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Fine-tune `model`, in place, and say what of the forget set comes back. Adapters are merged into its weights
    first: an attacker has all of them, and new adapters come to what the model is with those that it has.

    Args:
        forget: the forget set; data: rows of question and answer to learn instead of a part of it.
        folder: where the logs along the way go.

    Returns:
        `settings`; `curve`: of every evaluation its step and, by set, NLL, probability, truth ratio and what else was
        measured; `g_effect`: before it starts, the dot product of the gradients of the forget set's NLL and of the NLL
        that is descended, by layer group: a gradient step lowers the forget set's NLL by the learning rate times that,
        to first order. A model that is immune has 0 or less.

    Errors: ValueError for rows that cannot be used, a set with prompts of its own, 16-bit weights without LoRA or under
    adapters, or adapters that cannot be merged; ImportError for LoRA without peft.
    """
    check_trainable(model, plan)
    if forget.encode is not None:
        raise ValueError(
            f"gfast: relearning: the set {forget.name} writes its own prompts (encode), and what is learned is written "
            "by the template: other tokens than are measured. Give a set without encode"
        )
    from transformers import PrinterCallback

    from gfast.geffect import g_effect
    from gfast.training import UnlearnConfig, UnlearnTrainer

    sets = split(forget, plan, data)
    fields = {} if data is not None else {"question": forget.question, "answer": forget.answer}
    rows = as_rows(data) if data is not None else sets[1].rows
    # Weights say how a text was to be forgotten, and an attack learns all of it.
    rows = [{key: value for key, value in row.items() if key != "weight"} for row in rows]
    options = {"template": template, "chat_kwargs": dict(chat_kwargs or {}), "max_length": None}
    learned = QADataset(rows, tokenizer, **fields, **options)
    others = QADataset(
        sets[0].rows, tokenizer, question=forget.question, answer=forget.answer, id_offset=len(rows), **options
    )
    collate = Collator(tokenizer)
    if _has_adapters(model):
        model = _merged(model, "are what learns", "--relearn")
        for parameter in model.parameters():  # PEFT has frozen them
            parameter.requires_grad_(parameter.is_floating_point())
    if plan.lora_r:
        peft = required("peft", "peft", "relearning with LoRA")
        torch.manual_seed(plan.seed)
        settings = peft.LoraConfig(r=plan.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, settings)
    effect = g_effect(
        model,
        NLL(),
        forget=batches(learned, collate, plan.batch_size),
        retain=batches(others, collate, plan.batch_size),
    )
    every = plan.every or max(1, plan.steps // 5)
    from gfast.evaluation.callback import EvaluateCallback  # with transformers' trainer: seconds of import

    callback = EvaluateCallback(
        every, sets, tokenizer, batch_size=batch_size, template=template, chat_kwargs=chat_kwargs, folder=folder
    )
    device = next(model.parameters()).device
    args = UnlearnConfig(
        output_dir=str(folder),
        max_steps=plan.steps,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        per_device_train_batch_size=plan.batch_size,
        save_strategy="no",
        logging_strategy="no",
        record_every=0,
        disable_tqdm=True,
        report_to="none",
        seed=plan.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
    )
    trainer = UnlearnTrainer(
        model, args, objective=NLL(), train_dataset=learned, data_collator=collate, callbacks=[callback]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    curve = [
        {
            "step": step,
            **{name: {key: values[key] for key in CURVE if key in values} for name, values in summary["sets"].items()},
        }
        for step, summary in sorted(callback.summaries.items())
    ]
    return {
        "settings": asdict(plan) | {"learned": len(rows), "related_data": data is not None},
        "curve": curve,
        "g_effect": {"total": effect.total("retain"), "groups": dict(effect.retain)},
    }


def curve_table(relearned: Mapping[str, Any]) -> str:
    """The curve of a relearning as Markdown."""
    first = relearned["curve"][0]
    keys = [(name, key) for name in first if name != "step" for key in CURVE if key in first[name]]
    head = " | ".join(f"{name}: {key.replace('_', ' ')}" for name, key in keys)
    lines = [f"| Step | {head} |", "|---" * (len(keys) + 1) + "|"]
    for row in relearned["curve"]:
        lines.append(f"| {row['step']} | " + " | ".join(f"{row[name][key]:.4f}" for name, key in keys) + " |")
    total = relearned["g_effect"]["total"]
    lines += ["", f"G-effect of the relearning on the NLL of forget, before it starts: {total:+.4e} "
              f"({'it will fall' if total > 0 else 'it will not fall'}, to first order)"]  # fmt: skip
    return "\n".join(lines) + "\n"


def require_quantizer(bits: str, by: str) -> Any:
    """The library, loaded; ImportError, saying what to install, without it."""
    chosen("quantize", bits, BITS)
    chosen("quantize_by", by, QUANTIZERS)
    return required("torchao.quantization" if by == "torchao" else by, by, f"--quantize {bits} --quantize_by {by}")


def quantize(model: nn.Module, bits: str, by: str = "torchao") -> nn.Module:
    """Round the weights of every Linear (GPT-2's Conv1D is one) but the output head to 4 or 8 bits, in place. Adapters
    are merged first: what is rounded are the weights that the model computes with, and the model returned is without
    them.

    by: torchao (8 bits a row, 4 bits in groups of 32) or bitsandbytes (LLM.int8, NF4 in blocks of 64).

    Errors: ImportError, saying what to install, without that library; ValueError for sizes that it does not take,
    models whose weights are rounded already or are in other layers (a mixture's experts), and adapters that cannot be
    merged.
    """
    api = require_quantizer(bits, by)
    model = _merged(model, "are what is rounded", "--quantize")
    wanted = _linears(model)
    if bits == "4bit":
        _check_sizes(wanted, by)
    made: dict[nn.Module, nn.Module] = {}
    for name, module in wanted.items():  # one with several names has each
        if module not in made:
            made[module] = _as_linear(module) if kind_of(module) == "conv1d" else module
        _replace(model, name, made[module])
    if by == "torchao":
        if bits == "8bit":
            config = api.Int8WeightOnlyConfig()
        else:
            granularity = required("torchao.quantization.granularity", "torchao", f"--quantize {bits}")
            config = api.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity.PerGroup(32))
        once = {name for name, _ in model.named_modules()} & wanted.keys()
        api.quantize_(model, config, filter_fn=lambda module, name: name in once)
    else:
        rounded = {module: _by_bitsandbytes(api, module, bits) for module in made.values()}
        for name, module in wanted.items():
            _replace(model, name, rounded[made[module]])
    logger.info("%d Linear layers hold weights of %s, by %s", len(made), bits, by)
    return model


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """What is rounded, by its names. ValueError where that is not nearly all of the matrices that the model multiplies
    with, or was rounded before.
    """
    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if (isinstance(module, nn.Linear) or kind_of(module) == "conv1d") and module is not head
    }
    for name, module in found.items():
        if type(module.weight.data) is not torch.Tensor or not module.weight.is_floating_point():
            raise ValueError(f"gfast: {name} is rounded already ({type(module).__name__}): evaluate without --quantize")
    looked_up = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    known = {p for module in (*looked_up, *found.values()) for p in module.parameters(recurse=False)}
    others = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1 and p not in known}
    rest, rounded = sum(others.values()), sum(module.weight.numel() for module in {*found.values()})
    if 10 * rest > rounded:  # a router, a convolution and the like are less
        name = max(others, key=others.__getitem__)
        raise ValueError(
            f"gfast: --quantize rounds Linear layers, and {rest / (rest + rounded):.0%} of the weights of this model's "
            f"layers are in others ({name}): most of it would be measured as it is. Evaluate without --quantize"
        )
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _as_linear(module: nn.Module) -> nn.Linear:
    """The Linear that computes what a Conv1D does."""
    inputs, outputs = module.weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=module.weight.requires_grad)
    linear.bias = module.bias
    return linear


def _has_adapters(model: nn.Module) -> bool:
    return is_adapted(model) or any(hasattr(module, "base_layer") for module in model.modules())


def _merged(model: nn.Module, why: str, instead: str) -> nn.Module:
    """The model with its adapters in its weights."""
    if not _has_adapters(model):
        return model
    try:
        return merged(model)
    except Exception as error:  # adapters are of many kinds, and fail in as many ways
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"gfast: the model's adapters cannot be merged into its weights, which {why} "
            f"({type(error).__name__}: {reason}): merge them first, or evaluate without {instead}"
        ) from error


def _check_sizes(layers: Mapping[str, nn.Module], by: str) -> None:
    """ValueError, naming the layer, for a number of inputs that `by` does not round to 4 bits."""
    for name, layer in layers.items():
        inputs = layer.weight.shape[0 if kind_of(layer) == "conv1d" else 1]
        if by == "torchao" and inputs % 32:
            raise ValueError(
                f"gfast: {name} has {inputs} inputs, and torchao takes multiples of 32 for 4 bits: --quantize 8bit"
            )
        if by == "bitsandbytes" and inputs % 64 and layer.weight.device.type == "cpu":
            raise ValueError(
                f"gfast: {name} has {inputs} inputs, and bitsandbytes on a CPU takes multiples of 64 for 4 "
                "bits: --quantize_by torchao (multiples of 32), or --quantize 8bit"
            )


def _by_bitsandbytes(api: Any, module: nn.Linear, bits: str) -> nn.Module:
    sizes, weight = (module.in_features, module.out_features, module.bias is not None), module.weight.data.cpu()
    if bits == "8bit":
        # LLM.int8 keeps inputs from 6 on apart, which the layer by itself does not.
        made = api.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        made.weight = api.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        made = api.nn.Linear4bit(*sizes, compute_dtype=module.weight.dtype, quant_type="nf4")
        made.weight = api.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    made.bias = module.bias
    return made.to(module.weight.device).eval()  # the move rounds
