"""Everything gfast knows about Hugging Face model internals: their inputs, their parts, and where their logits are.

No other file names a model's attribute, none but `gfast.module_kinds` a class of its modules, and none decides what the
logits are: the model runs by its own call, and `gfast.deferred` follows what it does to the product of its head.
`gfast.structure` finds its parts by place and use. What is put around a model (PEFT, DDP, FSDP, torch.compile) is in
`gfast.wrappers`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gfast import peft_models, sharded, structure, wrappers
from gfast.deferred import WITHOUT_GRADIENTS, DeferredLogits, deferred
from gfast.embedding_rows import called, no_values
from gfast.model_state import evaluating
from gfast.own_terms import WithoutCrossEntropy
from gfast.rotary import stretches_beyond
from gfast.wrappers import unwrap

_log = logging.getLogger("gfast")

# What a batch carries for gfast; the model gets everything else.
OWN_KEYS = frozenset(
    "labels weight ref_logp ref_hidden ref_head ref_head_bias ref_head_form ref_output ref_layer_hidden ref_layer "
    "ref_precision sample_id sequence_id".split()
)

# What transformers' models hand on to attention through **kwargs: where the texts of packed rows begin.
_PACKING = frozenset("cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx".split())


def decoder(model: nn.Module) -> nn.Module:
    """The text decoder without the output head, also through wrappers; its output has `last_hidden_state`."""
    return structure.decoder(unwrap(model))


def num_layers(model: nn.Module) -> int:
    """The number L of decoder blocks. Raises ValueError where they cannot be told."""
    return len(structure.blocks(unwrap(model)))


_causal: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # looked at already


def of_its_own_kind(model: nn.Module) -> nn.Module | None:
    """Of a model that is not transformers' and says by itself what gfast asks, the module inside DDP and torch.compile:
    `hidden(batch)` gives what its `head`, a module, reads. None for any other.
    """
    inner = wrappers.measured(model)
    if hasattr(type(inner), "base_model_prefix") or peft_models.is_adapted(inner):
        return None
    says = callable(getattr(type(inner), "hidden", None)) and isinstance(getattr(inner, "head", None), nn.Module)
    return inner if says else None


def own_hidden(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What the head of a model of its own kind reads [B, T, D], from the batch without what is gfast's."""
    hidden = module.hidden({key: value for key, value in batch.items() if key not in OWN_KEYS})
    expected = batch["labels"].shape
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != expected:
        got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(
            f"gfast: {type(module).__name__}.hidden(batch) must give hidden states [B, T, D] of the labels' "
            f"{tuple(expected)}, one for each token; it gave {got}"
        )
    return hidden


def plain_head(module: nn.Module) -> bool:
    """Whether the head of a model of its own kind is a linear map that nobody has put anything around."""
    head = module.head
    touched = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    touched = touched or wrappers.watches_backward(module, head)
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not touched
    return plain and wrappers.is_whole(head.weight)


def check_causal(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """ValueError, by its name, for a model whose logits do not score the next token: no causal language model.

    Where not every block says that it is causal, or images are involved, it is tried once: another last label in
    `batch` must leave what is answered before it as it was.
    """
    if of_its_own_kind(model) is not None:
        return  # its own word
    inner = unwrap(model)
    if inner in _causal:
        return
    why = None
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        why = "an encoder-decoder, which scores labels by its decoder's own inputs, not by a causal model's shift"
    elif _is_stock(inner) and not inner.can_generate():
        why = "made for another task (its class cannot generate)"
    _causal.add(inner)
    if why is None and not _says_causal(inner):
        try:
            ahead = _sees_ahead(model, batch)
        except BaseException:
            _causal.discard(inner)
            raise
        if ahead is None:
            _causal.discard(inner)  # the next batch may have something to look at
        elif ahead:
            why = "bidirectional: its logits change with the very tokens that they score"
    if why is not None:
        _causal.discard(inner)
        raise ValueError(
            f"gfast: {type(inner).__name__} is no causal language model: it is {why}. Load one with "
            f"transformers.AutoModelForCausalLM (or AutoModelForImageTextToText)"
        )


def _says_causal(inner: nn.Module) -> bool:
    if any(hasattr(inner.config, key) for key in ("vision_config", "audio_config")):
        return False  # what precedes the text may be seen from both sides
    try:
        blocks = structure.blocks(inner)
    except ValueError:
        return False
    return all(any(getattr(module, "is_causal", False) is True for module in block.modules()) for block in blocks)


def _sees_ahead(model: nn.Module, batch: Mapping[str, Any]) -> bool | None:
    """None where no label of the batch is scored by a token that is attended to."""
    key = "inputs_embeds" if batch.get("input_ids") is None else "input_ids"
    tokens, labels, mask = batch.get(key), batch.get("labels"), batch.get("attention_mask")
    if tokens is None or labels is None:
        return None
    valid = labels != -100  # [B, T]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    last = torch.where(valid, places, 0).amax(1, keepdim=True)  # [B, 1]
    scoring = nn.functional.pad(valid[:, 1:], (0, 1)) & (places < last)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        scoring &= mask.to(tokens.device) != 0  # padding on the left may see everything
    if not bool(scoring.any()):
        return None
    if key == "input_ids":
        changed = torch.where(places == last, torch.where(tokens > 0, tokens - 1, 1), tokens)
    else:
        changed = torch.where((places == last)[..., None], -tokens, tokens)
    before, after = _seen(model, [{**batch, key: ids} for ids in (tokens, changed)])
    return _differ(before[scoring], after[scoring])


def _is_stock(model: nn.Module) -> bool:
    """Whether the model's class is one of transformers' own, maybe sharded: FSDP2 makes a class of its own of it."""
    kind = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch."))
    return kind.__module__.startswith("transformers.models.")


def inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of a batch that is the model's: all but labels and what gfast reads itself.

    Raises ValueError, naming the keys, for what the model's forward does not take, and for a batch without tokens.
    """
    sharded.refuse_unrun(model)
    check_causal(model, batch)
    given = {key: value for key, value in batch.items() if key not in OWN_KEYS and value is not None}
    if not given.keys() & {"input_ids", "inputs_embeds"}:
        raise ValueError(f"the batch has no 'input_ids' (its keys are {sorted(batch)})")
    named, anything = _parameters_of_forward(unwrap(model))
    unknown = set() if anything else given.keys() - named - wrappers.accepted_by_wrappers(model)
    if "attention_mask" in unknown and _is_padding_on_the_right(given["attention_mask"]):
        unknown.remove("attention_mask")  # which changes nothing before it in a causal model
        del given["attention_mask"]
    if unknown:
        raise ValueError(
            f"gfast: the batch has {', '.join(map(repr, sorted(unknown)))}, which {type(unwrap(model)).__name__} "
            f"does not take; take it out of the batch (the collator's work). It takes {', '.join(sorted(named))}"
        )
    return given | ({"use_cache": False} if "use_cache" in named and "use_cache" not in given else {})


def _is_padding_on_the_right(mask: Tensor) -> bool:
    return mask.dim() == 2 and not bool((mask[:, 1:] > mask[:, :-1]).any())


def _parameters_of_forward(inner: nn.Module) -> tuple[set[str], bool]:
    """Names that the model's forward takes, and whether it takes any others. What it hands on to that of its base
    class by ``**kwargs`` counts as well, and what transformers' own models hand on to attention by it.
    """
    named: set[str] = set()
    functions = [vars(inner).get("forward"), *(vars(cls).get("forward") for cls in type(inner).__mro__)]
    for function in functions:
        if function is None:
            continue
        parameters = inspect.signature(function).parameters.values()
        named |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return named - {"self"}, False
        if (getattr(function, "__module__", None) or "").startswith("transformers.models."):
            named |= _PACKING
    return named - {"self"}, True


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its key-value cache; ValueError where it takes none."""
    named, _ = _parameters_of_forward(unwrap(model))
    # Renamed in transformers 5.
    for name in ("past_key_values", "cache"):
        if name in named:
            return name
    raise ValueError(f"{type(unwrap(model)).__name__} takes no key-value cache")


def output_layer(model: nn.Module) -> nn.Module | None:
    """The module that is called for the logits, as far as the model says; also through wrappers."""
    return peft_models.active_module(unwrap(model).get_output_embeddings())


def answer(model: nn.Module, batch: Mapping[str, Any], defer: bool = True, own_terms: bool = False) -> Answer:
    """What the model answers to a batch, `model(**batch)`, by its own outermost call; its logits are `DeferredLogits`
    where the head is a linear map that nobody has looked behind (and `defer`), else the model's own.
    """
    given = inputs(model, batch)
    defer = defer and unwrap(model) not in _looked_at_without_gradients
    defer = defer and not (own_terms and unwrap(model) in _several_cross_entropies)
    if torch.is_grad_enabled():
        wrappers.refuse_packed(model)
    if own_terms:
        given["labels"] = batch["labels"].long()  # a cross-entropy takes no int32
    left_out: list[DeferredLogits] = []
    inner = unwrap(model)
    without: Any = nullcontext()
    if own_terms:
        without = WithoutCrossEntropy(given["labels"], _place_of_cross_entropy.get(inner, 0))
    with deferred(model, output_layer(model) if defer else None, left_out if own_terms else None) as why, without:
        out = called(model, given)
    if WITHOUT_GRADIENTS in why and torch.is_grad_enabled():
        # what was computed there would have no gradient: from now on the model's own logits, this once by a second call
        _looked_at_without_gradients.add(unwrap(model))
        log_materialised(model, WITHOUT_GRADIENTS)
        return answer(model, batch, False, own_terms)
    logits = logits_of(out)
    if left_out and not (len(left_out) == 1 and left_out[0].same_as(logits)):
        # a cross-entropy of other logits (an early exit, tokens further on) is a term beside that of these
        _several_cross_entropies.add(unwrap(model))
        log_materialised(model, "its own loss has other logits too")
        return answer(model, batch, False, own_terms)
    is_deferred = isinstance(logits, DeferredLogits) and logits.head() is not None
    if defer and not is_deferred and not torch.compiler.is_compiling():
        log_materialised(model, why[-1] if why else "what the model does to them is no scale or soft cap")
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != shape_of(batch):
        what = (
            f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"that are a {type(logits).__name__}"
        )
        raise ValueError(
            f"gfast: {type(unwrap(model)).__name__} answered a batch of {tuple(shape_of(batch))} tokens with logits "
            f"{what}: they must be [B, T, V], one row a token"
        )
    if logits.is_meta:
        raise ValueError(no_values(model))
    if not own_terms:
        if torch.is_grad_enabled():
            terms = (
                [key for key in out if key.endswith("_loss") and out[key] is not None]
                if isinstance(out, Mapping)
                else []
            )
            adapters = peft_models.own_loss_of_adapters(model)
            if terms or adapters:
                _log_own_terms(type(unwrap(model)).__name__, ", ".join([*terms, *([adapters] if adapters else [])]))
        return Answer(logits, None)
    loss = out[0] if isinstance(out, tuple) else out["loss"]
    if not left_out:  # the model computed the cross-entropy with the others
        place = without.place_of(logits.real() if isinstance(logits, DeferredLogits) else logits)
        if place is None:
            raise ValueError(
                f"gfast: own_terms: the own loss of {type(inner).__name__} has no torch.nn.functional.cross_entropy of "
                f"its logits and the batch's labels, shifted by one, that its other terms could be told from (it is "
                f"of other labels, or computed in another way): leave own_terms out, and add those terms yourself"
            )
        if place != without.which:  # that of an early exit, which the model computes first, was taken out
            _place_of_cross_entropy[inner] = place
            return answer(model, batch, defer, own_terms)
    return Answer(logits, loss)


# Which of those in its own loss is that of its logits, where it is not the first.
_place_of_cross_entropy: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_several_cross_entropies: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # those in whose loss there are
_looked_at_without_gradients: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # their logits, by hooks of theirs


class Answer(NamedTuple):
    """logits: [B, T, V]. own_terms: what the model adds to its loss beside the cross-entropy, or None."""

    logits: Tensor
    own_terms: Tensor | None


def log_materialised(model: nn.Module, why: str) -> None:
    """Say, once for a class and a reason, that the logits of whole batches are computed."""
    _log_materialised(type(of_its_own_kind(model) or unwrap(model)).__name__, why)


@functools.cache
def _log_materialised(model: str, why: str) -> None:
    _log.warning(
        "%s: the logits of whole batches are computed, which takes their memory; losses and gradients are the same: %s",
        model,
        why,
    )


@functools.cache
def _log_own_terms(model: str, terms: str) -> None:
    _log.warning(
        "%s adds terms to its own loss (%s), which objectives of gfast leave out; own_terms=True adds them",
        model,
        terms,
    )


def logits_of(out: Any) -> Any:
    """The logits in a model's output: by their name, or the first of a tuple; None where there are none."""
    if isinstance(out, tuple):
        return next((x for x in out if isinstance(x, Tensor) and x.dim() == 3), None)
    return out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)


def shape_of(batch: Mapping[str, Any]) -> torch.Size:
    """[B, T] of a batch."""
    tokens = batch.get("input_ids")
    return batch["inputs_embeds"].shape[:2] if tokens is None else tokens.shape


def depends_on_width(model: nn.Module) -> bool:
    """Whether padding on the right changes what the model computes left of it: rotary embeddings that stretch with the
    longest position of a batch; of models that do not say that every block is causal it is tried once.
    """
    if of_its_own_kind(model) is not None:
        return True  # nothing is known of it, so nothing is cut off
    inner = unwrap(model)
    if stretches_beyond(inner) is not None:
        return True
    if _is_stock(inner) and _says_causal(inner):
        return False
    if inner not in _by_width:
        _by_width[inner] = _sees_padding(model)
    return _by_width[inner]


_by_width: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # those that were tried


def _sees_padding(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    ids = torch.arange(1, 7, device=device)[None]
    wide = nn.functional.pad(ids, (0, 4))
    batches = [{"input_ids": one, "attention_mask": (one > 0).long(), "labels": one} for one in (ids, wide)]
    try:
        return _differ(*(seen[:, :6] for seen in _seen(model, batches)))
    except (ValueError, RuntimeError, TypeError):  # it does not answer to a text alone
        return True


def _seen(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Of each batch what the head reads, or logits, in evaluation mode."""
    try:
        with torch.no_grad(), evaluating(model):
            answers = [answer(model, batch).logits for batch in batches]
    finally:
        sharded.reshard(model)
    return [x.hidden if isinstance(x, DeferredLogits) and x.computed is None else x for x in answers]


def _differ(one: Tensor, other: Tensor) -> bool:
    """By more than rounding."""
    rounding = 3e-2 if one.dtype.itemsize == 2 else 1e-4
    moved = (one - other).float().abs()
    return bool(moved.numel()) and bool(moved.amax() > rounding * one.float().abs().amax())


def parameter_units(model: nn.Module) -> dict[str, str | int]:
    """Every trainable parameter, by its name in `model.named_parameters()`, with the part of the model that owns it.

    The part is "embed" (all that is used before the first block: token and position embeddings, their norms, vision
    towers and what projects their output), the 0-based index of a block, L for what is used after the last block (the
    final norm), "lm" for the output head, or "embed+lm" for a matrix shared by embeddings and head. Adapter parameters
    belong to the module they adapt. Raises ValueError naming the first parameter that has no such place or several.
    """
    inner = unwrap(model)
    owners = structure.owners(inner)
    units: dict[str, str | int] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        places = owners.get(id(parameter), [])
        if len(places) == 1:
            units[name] = places[0]
        elif set(places) == {"embed", "lm"}:
            units[name] = "embed+lm"
        else:
            why = (
                f"is shared by several parts ({', '.join(map(str, places))})"
                if places
                else "is in no part: no forward on the way to the blocks reads it plainly before them or after them"
            )
            raise ValueError(
                f"cannot attribute trainable parameter {name!r} {tuple(parameter.shape)} of {type(inner).__name__}: "
                f"it {why} (embeddings, one of the {num_layers(model)} blocks, the final norm, the output head). "
                f"Freeze it with requires_grad_(False), or group parameters by name with groups=callable"
            )
    return units
