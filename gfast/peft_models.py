# SPDX-License-Identifier: Apache-2.0
"""Models with PEFT adapters: what they are with them off, or with another of them, and whether that is the original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from gfast.wrappers import chain, is_peft, refuse_prompt_learning

# PEFT's initialisations that take from the base's weights what they put into the adapter, by the beginning of their
# name: with the adapter off the model is not what it was before.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options that change the base, whatever the initialisation: KaSA cuts its smallest singular values off.
_REWRITING_OPTIONS = ("loftq_config", "kasa_config", "layer_replication")

# Methods whose adapters, while they are zero, change nothing, to the bit.
_ADD_NOTHING = frozenset(
    "LORA ADALORA LOHA LOKR VERA PVERA IA3 LN_TUNING TRAINABLE_TOKENS MISS HIRA SHIRA BEFT RANDLORA GLORA GRALORA "
    "TINYLORA LILY ADAMSS PEANUT SUPERTUNING DELORA WAVEFT FOURIERFT C3A VBLORA UNILORA".split()
)


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has PEFT adapters that can be switched off."""
    return any(hasattr(module, "peft_config") and hasattr(module, "disable_adapter") for module in chain(model))


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that the model has on; none of a model without."""
    peft = _peft_of(model)
    return () if peft is None else tuple(sorted(peft.active_adapters))


def configs(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Adapters by name, with their configurations: one that is deleted and added anew has another."""
    known = getattr(_peft_of(model), "peft_config", {})
    return {name: known.get(name) for name in names}


def base_module(model: nn.Module) -> nn.Module | None:
    """What the adapters are put into; None for a model without."""
    peft = _peft_of(model)
    if peft is None:
        return None
    return peft.get_base_model() if hasattr(peft, "get_base_model") else peft.model


def adapter_parameters(model: nn.Module) -> frozenset[int] | None:
    """The ids of the parameters that the adapters bring, trained copies too; None for a model without adapters."""
    peft = _peft_of(model)
    if peft is None:
        return None
    prefix = getattr(getattr(peft, "base_model", None), "prefix", None)
    named = {
        id(parameter)
        for name, parameter in peft.named_parameters()
        if prefix and any(part.startswith(prefix) for part in name.split("."))
    }
    return frozenset(named | {id(parameter) for parameter in _vanishing(peft)})


def adapters_on(model: nn.Module) -> list[str] | None:
    """The adapters that count in what the model computes, transformers' own too; None where it has no adapters."""
    layers = [layer for layer in model.modules() if is_peft(layer) and type(_off(layer)) is bool]
    on = {name for layer in layers if not is_off(layer) for name in _counting(layer)}
    return sorted(on) if layers else None


def is_off(layer: nn.Module) -> bool:
    """Whether a module of PEFT's has its adapters switched off."""
    return _off(layer) is True


def _off(layer: nn.Module) -> Any:
    return getattr(layer, "disable_adapters", None)  # of a model around transformers' a method of theirs


def _counting(layer: nn.Module) -> Sequence[str]:
    """The adapters that a layer computes with: those that are merged into it, or else the active ones."""
    return list(getattr(layer, "merged_adapters", None) or _active(layer))


def _active(layer: nn.Module) -> list[str]:
    names = getattr(layer, "active_adapters", ())
    return [names] if isinstance(names, str) else list(names)


def adapted_embeddings(model: nn.Module) -> list[nn.Module]:
    """PEFT's modules around an embedding: what they change shows in batches with the tokens of which they change it."""
    return [m for m in model.modules() if is_peft(m) and isinstance(m, nn.Module) and _base_of(m, nn.Embedding)]


def any_off(model: nn.Module) -> bool:
    """Whether somebody has switched adapters of the model off."""
    return any(is_peft(layer) and is_off(layer) for layer in model.modules())


def embedding_rows(module: nn.Module) -> int:
    """How many rows the embedding inside a module of PEFT's has."""
    return _base_of(module, nn.Embedding).num_embeddings


def _base_of(module: nn.Module, kind: type[nn.Module]) -> Any:
    while is_peft(module):
        inner = getattr(module, "original_module", None)
        module = getattr(module, "base_layer", None) if inner is None else inner
    return module if isinstance(module, kind) else None


def invocations(model: nn.Module, names: Iterable[str]) -> list[list[int]]:
    """The tokens behind which adapters of those names begin (activated LoRA); none for those that are always on."""
    known = getattr(_peft_of(model), "peft_config", {})
    return [list(found) for name in names if (found := getattr(known.get(name), "alora_invocation_tokens", None))]


def own_loss_of_adapters(model: nn.Module) -> str | None:
    """The term that a PEFT method adds to the loss the model computes from labels, in words; None for most methods."""
    peft = _peft_of(model)
    kinds = {} if peft is None else {str(getattr(c, "peft_type", "")) for c in peft.peft_config.values()}
    terms = {"ADALORA": "AdaLoRA's orthogonal regularisation", "SHADOW": "ShadowPEFT's loss of its own path"}
    return next((term for name, term in terms.items() if any(name in kind for kind in kinds)), None)


def round_at_zero(model: nn.Module) -> bool:
    """Whether adapters of the model change its numbers by rounding while they add nothing: DoRA's norms, rotations,
    LoRA whose factors are orthogonal.
    """
    peft = _peft_of(model)
    configs = {} if peft is None else peft.peft_config
    kinds = [str(getattr(config, "peft_type", "")).rpartition(".")[2] for config in configs.values()]
    rounds = any(getattr(c, "use_dora", False) or _start(c) == "orthogonal" for c in configs.values())
    return rounds or any(kind not in _ADD_NOTHING for kind in kinds)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model with its PEFT adapters off, and nothing else changed; as it is if it has none."""
    peft = _peft_of(model)
    if peft is None:
        yield
        return
    # PEFT sets requires_grad of all adapters on the way back, and switches on those that were off before
    _refuse_unmerging(peft)
    flags = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]
    off = [layer for layer in peft.modules() if is_peft(layer) and is_off(layer)]
    try:
        with peft.disable_adapter():
            yield
    finally:
        for layer in off:
            layer.enable_adapters(False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def other_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """The model with another of its adapters active, and nothing else changed."""
    peft = _peft_of(model)
    _refuse_unmerging(peft)
    flags = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]
    active = list(peft.active_adapters)
    try:
        peft.base_model.set_adapter(name)
        yield
    finally:
        peft.base_model.set_adapter(active if len(active) > 1 else active[0])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def merged(model: Any) -> nn.Module:
    """The model with its adapters in its weights. A weight that an adapter changes in one place and another module
    shares (tied embeddings under an adapter) becomes one of each first: merged into both it would be another model.

    Errors: ValueError for adapters that are switched off, that are merged already while others are active, or that lie
    around other ones in one place; what PEFT raises for those that it cannot merge.
    """
    if any_off(model):
        raise ValueError("they are switched off, and PEFT would merge them all the same")
    for name, module in model.named_modules():
        inner = getattr(module, "base_layer", None)
        if isinstance(inner, nn.Module) and is_peft(module) and is_peft(inner):
            raise ValueError(
                f"those of {name!r} lie around others ({type(inner).__name__}: trained tokens of a tied head, say), of "
                f"which PEFT would leave some out. Save the model as it is, and merge by hand"
            )
        done = getattr(module, "merged_adapters", None) if is_peft(module) else None
        if done and set(done) != set(_active(module)):
            raise ValueError(
                f"{sorted(done)} are merged already, with which the model computes, and PEFT would add those that are "
                f"active, {sorted(_active(module))}: call unmerge_adapter() first, or make the merged ones active"
            )
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append((module, name))
    adapted = {module.base_layer for module in model.modules() if hasattr(module, "base_layer")}
    for parameter, places in owners.items():
        if len(places) > 1 and any(module in adapted for module, _ in places):
            for module, name in places[1:]:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            model.config.tie_word_embeddings = False
    return model.merge_and_unload()


def unsaved(model: nn.Module) -> list[str]:
    """Of a model with adapters, the trained parameters that PEFT does not save: those of the base beside them."""
    peft = _peft_of(model)
    if not hasattr(peft, "get_base_model"):  # no adapters, or several kinds of them, which PEFT does not save at all
        return []
    from peft import get_peft_model_state_dict

    # what has no memory here (on the meta device, sharded) is looked at where it has
    here = [(name, p) for name, p in peft.named_parameters() if p.requires_grad and not p.is_meta]
    trained = [(name, place) for name, p in here if (place := p.data_ptr())]
    for embeddings in (False, "auto"):  # "auto", as PEFT saves, may ask the hub
        options = {"save_embedding_layers": embeddings}
        saved = (get_peft_model_state_dict(peft, None, name, **options) for name in peft.peft_config)
        kept = {tensor.data_ptr() for tensors in saved for tensor in tensors.values()}
        trained = [(name, place) for name, place in trained if place not in kept]
        if not trained:
            break
    return [name for name, _ in trained]


def check_frozen_adapter(model: nn.Module, name: str) -> None:
    """ValueError unless the model with the adapter of that name stays as it is, whatever is trained."""
    peft = _peft_of(model)
    known = sorted(getattr(peft, "peft_config", None) or {})
    if name not in known:
        raise ValueError(
            f"gfast: reference='adapter:{name}': the model has no adapter of that name, its adapters are {known}"
        )
    if name in peft.active_adapters:
        raise ValueError(
            f"gfast: reference='adapter:{name}': that is the active adapter, which is trained; the reference must be "
            f"another one, such as a frozen copy of it"
        )
    vanishing = {id(parameter) for parameter in _vanishing(peft)}
    for path, parameter in peft.named_parameters():
        if parameter.requires_grad and (name in path.split(".") or id(parameter) not in vanishing):
            raise ValueError(
                f"gfast: reference='adapter:{name}': the parameter {path!r}, a part of the reference, is trained, so "
                f"that it is not the original any more; freeze it with requires_grad_(False)"
            )


def refuse_inner_adapters(model: nn.Module) -> None:
    """ValueError for adapters that transformers put into a model, with no PeftModel to switch them off."""
    if not is_adapted(model) and any(getattr(module, "_hf_peft_config_loaded", False) for module in chain(model)):
        raise ValueError(
            "gfast: the adapters of this model are transformers' own (add_adapter, load_adapter or from_pretrained of "
            "an adapter), which gfast does not switch off, so that its base is not at hand: load the base, and the "
            "adapters by peft.PeftModel.from_pretrained(base, ...); or take the model as it is, reference='adapted'"
        )


def refuse_merged(model: nn.Module) -> None:
    """ValueError for adapters that are to be trained, or measured, and have been merged into the base: the model runs
    without them, so that they have no gradient.
    """
    peft = _peft_of(model)
    for name, module in () if peft is None else peft.named_modules():
        base_layer = getattr(module, "base_layer", None)
        if not (is_peft(module) and isinstance(base_layer, nn.Module) and getattr(module, "merged", False) is True):
            continue
        base = {id(parameter) for parameter in base_layer.parameters()}
        if any(parameter.requires_grad and id(parameter) not in base for parameter in module.parameters()):
            raise ValueError(
                f"gfast: adapters have been merged into {name!r} (merge_adapter), so that those of it that are trained "
                f"have no gradient: call unmerge_adapter() first, or merge_and_unload() for a model without adapters"
            )


def _refuse_unmerging(peft: nn.Module) -> None:
    """ValueError for merged adapters, which PEFT takes out of the base to switch them off, and does not put back."""
    for name, module in peft.named_modules():
        if is_peft(module) and getattr(module, "merged", False) is True:
            raise ValueError(
                f"gfast: adapters have been merged into {name!r} (merge_adapter), and the original is the model "
                f"without them or with another: PEFT would take them out for good. Call unmerge_adapter() first"
            )


def check_base_is_original(model: nn.Module) -> None:
    """ValueError unless the model with its adapters off is, whatever has been trained, the base as it was loaded.

    Every trainable parameter must vanish with the adapters, and their initialisation must have left the base alone.
    """
    peft = _peft_of(model)
    if peft is None:
        return
    refuse_prompt_learning(peft)
    advice = (
        "compute the original's values once, before training (ReferenceCache.build(..., reference='adapted')), and "
        "give them with the batches"
    )
    for name, config in peft.peft_config.items():
        if (how := _rewrite_of_base(config)) is not None:
            raise ValueError(
                f"the adapter {name!r} was initialised by {how!r}, which rewrote the base: the model with adapters off "
                f"is not the original. {advice[0].upper()}{advice[1:]}, or use init_lora_weights=True without {how}"
            )
    vanishing = {id(parameter) for parameter in _vanishing(peft)}
    left = [name for name, p in peft.named_parameters() if p.requires_grad and id(p) not in vanishing]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(
            f"with adapters off the trainable parameter {left[0]!r}{more} of the base stays, so that the model is not "
            f"the original any more once it is trained. Freeze it (bias='none', no trained norms or embeddings beside "
            f"the adapters), or {advice}"
        )


def _start(config: Any) -> str:
    """How an adapter's weights were initialised, where it has a name."""
    start = getattr(config, "init_lora_weights", None)
    return start.lower() if isinstance(start, str) else ""


def _rewrite_of_base(config: Any) -> str | None:
    """The option of an adapter that has changed weights or layers of the base; None where it is as it was loaded."""
    if _start(config).startswith(_REWRITES_BASE):
        return config.init_lora_weights
    return next((key for key in _REWRITING_OPTIONS if getattr(config, key, None)), None)


def _vanishing(peft: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that nothing reads while the adapters are off."""
    for module in peft.modules():
        # a copy in the place of a module of the base, or an adapter around one
        of_base = getattr(module, "original_module", None)
        of_base = getattr(module, "base_layer", None) if of_base is None else of_base
        if is_peft(module) and isinstance(of_base, nn.Module):
            base = {id(parameter) for parameter in of_base.parameters()}
            yield from (parameter for parameter in module.parameters() if id(parameter) not in base)


def active_module(module: nn.Module | None) -> nn.Module | None:
    """The module that is called where PEFT has put a trained copy in the place of one (``modules_to_save``)."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = [name for name in getattr(module, "active_adapters", ()) if name in copies]
    off = is_off(module) or not active
    return module.original_module if off else copies[active[0]]


def _peft_of(model: nn.Module) -> nn.Module | None:
    return next((m for m in chain(model) if hasattr(m, "peft_config") and hasattr(m, "disable_adapter")), None)
