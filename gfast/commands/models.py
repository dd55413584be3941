# SPDX-License-Identifier: Apache-2.0
"""Models and tokenizers from flags: whole models, and PEFT adapters over the model they were trained on.

`gfast unlearn --lora_r` leaves an adapter in the run folder and in its checkpoints, and the hub has many: wherever a
flag takes a model, it takes an adapter too. Its base is the one that its adapter_config.json names, or `--base_model`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gfast.commands.arguments import ModelArguments
from gfast.commands.common import say
from gfast.files import MANIFEST, check_manifest, read_json
from gfast.objectives import Objective
from gfast.training.batches import needed_from_cache
from gfast.training.resume import last_checkpoint

# What a model is computed from; not what there is to train on, nor the texts that people change in a model's folder (a
# chat template, the base that an adapter names).
DECIDING = ("config.json", "model", "adapter_model", "pytorch_model")


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter, a folder or a name on the hub, and the model it sits on."""

    name: str
    base: str
    revision: str | None = None


def find_adapter(arguments: ModelArguments, name: str | None = None) -> Adapter | None:
    """The adapter that `name` (None: the model of the flags) is, or None where it is a whole model.

    Errors: ValueError for flags that do not go with an adapter, or need one.
    """
    is_model, name = name is None, name or arguments.model
    file = _file(name, "adapter_config.json")
    if file is None:
        if is_model and arguments.base_model:
            raise ValueError(f"--base_model is for adapters, and {name} is none: it has no adapter_config.json")
        return None
    config = read_json(file)
    if is_model and arguments.lora_r:
        raise ValueError(
            f"{name} is an adapter (rank {config.get('r', 'unknown')}), and --lora_r would put a second one over it. "
            "Leave --lora_r out to go on with this one, or merge it into its base first (PEFT's merge_and_unload)"
        )
    base = arguments.base_model or config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"the adapter {name} does not say which model it sits on: give it with --base_model")
    if _file(base, "adapter_config.json") is not None:
        raise ValueError(
            f"the adapter {name} sits on {base}, which is an adapter itself: merge that one into its base "
            "(PEFT's merge_and_unload), and give the result with --base_model"
        )
    return Adapter(name, base, None if arguments.base_model else config.get("revision"))


def require_original(
    arguments: ModelArguments, objectives: Iterable[Objective | None], adapted: str, base: str
) -> None:
    """ValueError where it would be a guess what the original model is that objectives compare with: an adapter may have
    learned the data, or have been unlearning them. adapted, base: the flags for the model with and without it.
    """
    needing = [str(objective) for objective in objectives if objective is not None and needed_from_cache(objective)]
    adapter = find_adapter(arguments) if needing else None
    if adapter is not None:
        adapted, base = (flag.format(name=adapter.name, base=adapter.base) for flag in (adapted, base))
        raise ValueError(
            f"{' and '.join(needing)} compares with the original model, and {adapter.name} is an adapter over "
            f"{adapter.base}: say which is the original, {adapted} (the adapter has learned the data: the model with "
            f"it) or {base} (the adapter has been unlearning: the model without it)"
        )


def check_model(arguments: ModelArguments, name: str | None = None) -> Any:
    """The configuration of the model, or of an adapter's base; None where a GGUF file has it. Fail before any work when
    it cannot be found, or one of them is a run's and not as the run left it.
    """
    adapter = find_adapter(arguments, name)
    for folder in (name or arguments.model, None if adapter is None else adapter.base):
        if folder is not None and Path(folder).is_dir():
            edited = f"or, if you changed it on purpose, delete {Path(folder) / MANIFEST}"
            check_manifest(folder, f"restore it from a copy, {edited}", only=DECIDING)
    return None if arguments.gguf_file else _config(arguments, name or arguments.model, adapter)


def refuse_over_model(folder: Path) -> None:
    """ValueError where a folder that no run has claimed holds a model, over which a training would save its own: the
    original, where it is --model's.
    """
    kinds = ("config.json", "adapter_config.json", "*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
    found = next((path.name for kind in kinds for path in sorted(folder.glob(kind))), None)
    if found is not None:
        raise ValueError(
            f"{folder} holds a model that no run of gfast has made there ({found}), and the trained model would be "
            "written over it. Give another output folder"
        )


def load_tokenizer(arguments: ModelArguments) -> Any:
    """The tokenizer; an adapter's own, else its base's. ValueError, naming it, when there is none."""
    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    name = arguments.tokenizer
    if name is None:
        name, adapter = arguments.model, find_adapter(arguments)
        if adapter is not None:
            if _file(name, "tokenizer_config.json") is None:
                name, options["revision"] = adapter.base, adapter.revision or "main"
            elif not arguments.gguf_file:
                # Beside an adapter there is no config.json to read the kind of the tokenizer from.
                options["config"] = _config(arguments, name, adapter)
        if arguments.gguf_file and (adapter is None or name == adapter.base):
            options["gguf_file"] = arguments.gguf_file
    return _loaded("the tokenizer", name, lambda: AutoTokenizer.from_pretrained(name, **options))


def load_model(arguments: ModelArguments, empty: bool = False) -> nn.Module:
    """The causal language model of the flags, with its adapter or new LoRA adapters: then only those are trainable.

    empty: its parameters without values, on the meta device, for a process that gets its shards of them from another
    one; buffers, and adapters, have theirs.

    Errors: ValueError, naming the model (and an adapter's base), when it cannot be loaded.
    """
    adapter = find_adapter(arguments)
    if adapter is not None:
        model = _with_adapter(arguments, adapter, empty)
    else:
        model = _whole(arguments, arguments.model, None, empty)
        if arguments.lora_r:
            model = _with_lora(model, arguments)
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    over = f" over {adapter.base}" if adapter is not None else ""
    say(f"Model {arguments.model}{over}: {trainable:,} trainable parameters, {next(model.parameters()).dtype}")
    return model


def load_reference(arguments: ModelArguments, name: str) -> nn.Module:
    """An original model to compare with, `name`: of an adapter base and adapter together, as they are. Merged in 16
    bits they would differ from that by rounding.
    """
    adapter = find_adapter(arguments, name)
    say(f"Reference model {name}" + (f" over {adapter.base}" if adapter is not None else ""))
    return _whole(arguments, name, None) if adapter is None else _with_adapter(arguments, adapter)


def _file(name: str, file: str) -> str | None:
    """Where a file of a model is, in its folder or from the hub; None where it has none, or there is no such model."""
    from transformers.utils import cached_file

    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None  # not found, no access, no network, no such name: loading the model says which


def _whole(arguments: ModelArguments, name: str, adapter: Adapter | None, empty: bool = False) -> nn.Module:
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    # transformers 5 renamed the argument.
    options["dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"] = dtype
    for flag in ("attn_implementation", "gguf_file"):
        if getattr(arguments, flag):
            options[flag] = getattr(arguments, flag)
    if adapter is not None and adapter.revision:
        options["revision"] = adapter.revision
    if empty:
        options["device_map"] = {"": "meta"}
    what = "the model" if adapter is None else _base_of(adapter)

    def load() -> nn.Module:
        model, loading = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
        missing = sorted(set(loading["missing_keys"]) & {name for name, _ in model.named_parameters()})
        if missing:
            raise ValueError(
                f"its files have no weights for {missing[0]!r}{f' and {len(missing) - 1} more' if missing[1:] else ''} "
                f"of {type(model).__name__}, which would be random"
            )
        if empty:
            vars(model).pop("hf_device_map", None)  # by which libraries would take it for one on several devices
        return model

    return _loaded(what, name, load)


def _config(arguments: ModelArguments, name: str, adapter: Adapter | None) -> Any:
    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    if adapter is None:
        return _loaded("the model", name, lambda: AutoConfig.from_pretrained(name, **options))
    if adapter.revision:
        options["revision"] = adapter.revision
    return _loaded(_base_of(adapter), adapter.base, lambda: AutoConfig.from_pretrained(adapter.base, **options))


def _base_of(adapter: Adapter) -> str:
    return f"the base model of the adapter {adapter.name!r}, which --base_model can give,"


def _loaded(what: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        # Libraries raise all kinds over a damaged or unknown model; whichever it is, the model is what to look at.
        raise ValueError(f"cannot load {what} {name!r} {_reason(name, error)}") from error


def _reason(name: str, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "(it needs Python code of its own, which is not run unasked): read that code, and if you trust it give "
            "--trust_remote_code true"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    # "Error(s) in loading state_dict:" says nothing without the line after it.
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        reason = f"{type(error).__name__}: {reason}"
    reason = reason if len(reason) <= 400 else f"{reason[:400]} ..."
    if not Path(name).is_dir():
        return f"(there is no such local folder; is it a name on the hub?): {reason}"
    checkpoint = last_checkpoint(name)
    return f"({f'did you mean {checkpoint}?' if checkpoint else 'is it complete?'}): {reason}"


def _with_adapter(arguments: ModelArguments, adapter: Adapter, empty: bool = False) -> nn.Module:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f"{adapter.name} is an adapter, which needs the peft library: pip install peft") from error
    base = _whole(arguments, adapter.base, adapter, empty)
    # Trainable: its parameters require gradients as in training, so an effect is over them.
    what = f"over {adapter.base!r} the adapter"
    with warnings.catch_warnings():
        # PEFT warns alone of an adapter whose weights have other names than this base's: it would be a fresh one.
        warnings.filterwarnings("error", message=".*missing adapter keys")

        def load() -> nn.Module:
            model = PeftModel.from_pretrained(base, adapter.name, is_trainable=True)
            _check_places(model, adapter)
            return model

        model = _loaded(what, adapter.name, load)
    _name_base(model, adapter.base)
    return model.eval()  # as from_pretrained leaves a model


def _check_places(model: nn.Module, adapter: Adapter) -> None:
    """ValueError for weights of an adapter that have no place in the model, which PEFT leaves out without a word: of
    layers that the base lacks.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    found = set_peft_model_state_dict(model, load_peft_weights(adapter.name, device="cpu"))
    left = sorted(found.unexpected_keys)
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        raise ValueError(
            f"its weights {left[0]!r}{more} have no place in the model: {adapter.base} is not the base that it was "
            f"trained on (--base_model)"
        )


def _with_lora(model: nn.Module, arguments: ModelArguments) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("--lora_r needs the peft library: pip install peft") from error
    targets = arguments.lora_targets or "all-linear"
    config = LoraConfig(
        r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    _name_base(model, arguments.model)
    return model


def _name_base(model: Any, name: str) -> None:
    # A whole path: the adapter is found from any folder later, and never put over another model of a relative path.
    model.active_peft_config.base_model_name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
