# SPDX-License-Identifier: Apache-2.0
"""What a model's tables have rows for: token ids, and positions where those are looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gfast.ops.checks import IGNORE_INDEX
from gfast.wrappers import unwrap

# Tables of positions that are no modules (GPT-J, CodeGen).
_POSITION_BUFFERS = ("embed_positions",)


def rows_of(module: nn.Module | None) -> int | None:
    """The rows of an embedding or a head, also below adapters; None where it does not say."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return getattr(module, "num_embeddings", None) or getattr(module, "out_features", None)


def positions_of(model: nn.Module) -> int | None:
    """How many positions a model has a table of; None where none are looked up, as with rotary embeddings, or where
    it does not say.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = getattr(config, "max_position_embeddings", None)
    if not isinstance(known, int):
        return None
    tokens = model.get_input_embeddings()
    tables = [table.weight for table in model.modules() if isinstance(table, nn.Embedding) and table is not tokens]
    sizes = [getattr(table, "ds_shape", table.shape)[0] for table in tables]  # ZeRO-3 holds the shape of the whole
    sizes += [len(table) for name, table in model.named_buffers() if name.rpartition(".")[2] in _POSITION_BUFFERS]
    # some have a row or two in front, for padding
    return known if any(0 <= size - known <= 2 for size in sizes) else None


def called(model: nn.Module, given: Mapping[str, Any], **options: Any) -> Any:
    """``model(**given)``, where an index that is out of range and tensors without values are said by name."""
    try:
        return model(**given, **options)
    except RuntimeError as error:
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        if isinstance(tokens, Tensor) and not tokens.numel():
            raise ValueError(
                f"gfast: the batch has no tokens {tuple(tokens.shape)}, which {type(unwrap(model)).__name__} does not "
                f"take: leave it out (under DDP and FSDP every process has to have a row, which needs no label)"
            ) from error
        if "meta tensor" not in str(error):
            raise
        raise ValueError(no_values(model)) from error
    except IndexError as error:
        why = _beyond(unwrap(model), given)
        if why is None:
            raise
        raise ValueError(f"gfast: {why}") from error


def refuse_beyond(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """ValueError for token ids and labels of a batch that a transformers model has no rows for."""
    if not any(hasattr(type(module), "base_model_prefix") for module in model.modules()):
        return
    inner, labels = unwrap(model), batch["labels"][:, 1:]
    size = rows_of(inner.get_output_embeddings())
    bad = [] if size is None else labels[((labels < 0) | (labels >= size)) & (labels != IGNORE_INDEX)]
    why = f"the batch has the label {int(bad[0])}, and the head has {size} rows" if len(bad) else _beyond(inner, batch)
    if why is not None:
        raise ValueError(f"gfast: {why}")


def no_values(model: nn.Module) -> str:
    """What is wrong with a model, or a batch, on the meta device."""
    return (
        f"gfast: {type(unwrap(model)).__name__} or its batch is on the meta device, where tensors have no values: load "
        f"the weights (from_pretrained), and make batches on the model's device"
    )


def _beyond(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor):
        return None
    size, positions = rows_of(model.get_input_embeddings()), positions_of(model)
    bad = [] if size is None else ids[(ids < 0) | (ids >= size)]
    if len(bad):
        return (
            f"the batch has the token id {int(bad[0])}, and the embedding of {type(model).__name__} has {size} rows: "
            f"encode the data with the model's own tokenizer, or resize the model (resize_token_embeddings)"
        )
    if positions is not None and ids.shape[-1] > positions:
        return (
            f"the batch has texts of {ids.shape[-1]} tokens, and {type(model).__name__} has a table of {positions} "
            f"positions: give shorter texts (max_length)"
        )
    return None
