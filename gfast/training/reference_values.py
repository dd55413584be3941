# SPDX-License-Identifier: Apache-2.0
"""What a model says of batches, and each sample's part of it: what a ReferenceCache is built of."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gfast.model_state import evaluating
from gfast.rotary import change_each_other
from gfast.wrappers import unwrap

# What the values are of, one entry a token; files of earlier versions have none.
TEXT_KEYS = {"input_ids": "text_input_ids", "labels": "text_labels"}
# What can be asked for -> the key in a batch.
BATCH_KEY = {"logp": "ref_logp", "hidden": "ref_hidden", "layer_hidden": "ref_layer_hidden"}


def checked(what: Collection[str], layer: int | None) -> frozenset[str]:
    """What was asked for; ValueError for other quantities, hidden states of no layer, and a layer without them."""
    what = frozenset([what] if isinstance(what, str) else what)
    if not what or what - set(BATCH_KEY):
        raise ValueError(f"what={sorted(what)} must be some of {sorted(BATCH_KEY)}")
    if "layer_hidden" in what and layer is None:
        raise ValueError('what="layer_hidden" needs layer=, counted as in hidden_states')
    check_layer_asked(what, layer)
    return what


def check_layer_asked(what: Collection[str], layer: int | None) -> None:
    """ValueError for a layer of which no hidden states are asked for."""
    if layer is not None and "layer_hidden" not in what:
        raise ValueError(
            f'layer={layer} has no effect with what={sorted(what)}: it is that of what="layer_hidden", RR\'s; leave '
            "one out or give the other"
        )


def to_model(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@contextlib.contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """The model with whatever adapters it has, in evaluation mode, without gradients."""
    with torch.no_grad(), evaluating(model):
        yield


def values_of(
    model: nn.Module, batch: dict[str, Any], what: frozenset[str], layer: int | None, head: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the model says of a batch; its output head goes into ``head`` with the first one."""
    from gfast import hf
    from gfast.hidden_states import layer_hidden
    from gfast.model_output import model_logp, model_output

    check_padding(batch)
    values = {}
    if "hidden" in what:
        output = model_output(model, batch)
        if output.head is None:
            raise ValueError(
                f"KL from a cache needs a model whose logits are a linear map of hidden states (scaled or capped), and "
                f"those of {type(hf.unwrap(model)).__name__} are not"
            )
        if not head:
            head_values = {"ref_head": output.head.weight, "ref_head_bias": output.head.bias}
            head |= output.head.over(
                output.value, lambda _: {n: _copied(x) for n, x in head_values.items() if x is not None}
            )
            form = (output.head.logit_scale, output.head.softcap or 0.0)
            head["ref_head_form"] = torch.tensor(form, dtype=torch.float64, device="cpu")
        values["ref_hidden"] = output.value  # [B, T, D]
    if "logp" in what:
        values["ref_logp"] = model_logp(model, batch)  # [B, T]
    if "layer_hidden" in what:
        values["ref_layer_hidden"] = layer_hidden(model, batch, layer)  # [B, T, D]
    return values


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def keep_samples(parts: dict[int, dict[str, Tensor]], values: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    """Each row of a batch without its padding, by its sample_id; with the texts that the values are of."""
    ids, mask = batch.get("sample_id"), batch["attention_mask"].bool()
    check_labels_attended(batch)
    if ids is None or ids.numel() != mask.shape[0]:
        raise ValueError("the collator's batch has no sample_id for each row; gfast.data.Collator makes such batches")
    for row, sample_id in enumerate(ids.tolist()):
        if sample_id in parts:
            raise ValueError(
                f"sample_id {sample_id} appears twice in the data set; give each data set its own id_offset"
            )
        # A copy: a view would keep the whole padded batch alive.
        texts = {key: batch[key].int() for key in TEXT_KEYS if isinstance(batch.get(key), Tensor)}
        parts[sample_id] = {key: x[row].cpu()[mask[row].cpu()].clone() for key, x in {**values, **texts}.items()}


def check_widths(
    model: nn.Module, batches: tuple[dict[str, Any], dict[str, Any]], rounding: float, *asked: Any
) -> None:
    """Of the shortest text, alone and padded to the longest one's length: ValueError where the model says that a text's
    values are others then, as they are in other batches, and a warning where it does not and they are. asked: as
    ``values_of`` takes it; rounding: relative.
    """
    widths = [batch["input_ids"].shape[1] for batch in batches if batch.get("input_ids") is not None]
    if len(widths) < 2 or widths[0] == widths[1]:
        return
    remedy = f"give the collator a pad_to_multiple_of of at least {widths[1]}"
    limit = change_each_other(unwrap(model), widths)
    if limit is not None:
        raise ValueError(
            f"batches have {widths[0]} to {widths[1]} tokens a text, and beyond {limit} the longest text of a batch "
            f"decides which rotary embeddings all of it have ({type(unwrap(model)).__name__}): values of the original "
            f"would be those of other batches than the training's. Give max_length={limit}, or {remedy}"
        )
    alone: dict[int, dict[str, Tensor]] = {}
    padded: dict[int, dict[str, Tensor]] = {}
    for parts, batch in zip((alone, padded), batches, strict=True):
        keep_samples(parts, values_of(model, batch, *asked), batch)
    pairs = ((i, key, one, padded[i][key]) for i, values in alone.items() for key, one in values.items())
    for sample, key, one, other in pairs:
        if one.shape != other.shape:  # another item at every access, which is found elsewhere
            return
        apart = float((one.double() - other.double()).abs().amax())
        if apart > rounding * max(float(one.abs().amax()), 1.0):
            logging.getLogger("gfast").warning(
                "gfast: %s of sample %d differs by %.3g when the text is padded from %d to %d tokens: the original's "
                "values are those of one length, and ratios to them do not start at 1 in batches of another; %s",
                key,
                sample,
                apart,
                *widths,
                remedy,
            )
            return


def check_padding(batch: Mapping[str, Tensor]) -> None:
    """ValueError for texts without a mask, or padded on the left, from where many models count positions."""
    mask = batch.get("attention_mask")
    if mask is None:
        raise ValueError("the batch has no attention_mask to tell texts from padding by, which reference values need")
    if mask.shape[1] > 1 and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("the batch is padded on the left; reference values are those of right-padded batches")


def check_labels_attended(batch: Mapping[str, Tensor]) -> None:
    """ValueError for a label whose attention mask is 0: values of the original are kept for tokens that the mask tells
    from padding, so that this label would have none.
    """
    bad = (batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, 1:] == 0)  # [B, T - 1]
    if bool(bad.any()):
        row, column = (int(x) for x in bad.nonzero()[0])
        raise ValueError(
            f"row {row} of the batch has a label at position {column + 1}, where its attention_mask is 0: the collator "
            "takes tokens of the text for padding (pad_token_id is a token that texts hold, such as EOS). Make the "
            "mask from the lengths of the texts, as gfast.data.Collator does"
        )
