"""What a training or a measurement takes, before it runs: memory from a run on tensors without data
(`memory.py`), time from flops and bytes at the rates of a machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gfast import hf, module_kinds
from gfast.planning.memory import Work, build_model, forward_bytes, seeded_bytes, step_bytes, tangent_bytes

ENGINES = ("stream", "sample", "token", "gram")
# Forward units of a measurement of one objective on a batch of each set (a training step is 3): DESIGN's, which the
# engines' own descriptions give.
UNITS = {"stream": 9.0, "sample": 11.0, "token": 6.0 + 9.0, "gram": 4.0}
MARGIN = 0.9  # of a card's memory; the rest is for its context and what its allocator cannot use


@dataclass(frozen=True)
class Machine:
    """What one device does a second, and holds.

    Attributes:
        flops: of a large matrix product, by dtype. bandwidth: bytes read and written. link: bytes that a device sends
            to others, None where unknown. memory: bytes. source: where the figures are from.
        overhead: measured time of whole steps over that of their flops and bytes; errors: what is then left of it, at
            each size that was measured.
    """

    name: str
    source: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: float
    link: float | None = None
    overhead: float = 1.0
    errors: tuple[float, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Machine:
        """What `gfast plan --measure` wrote. ValueError for another file."""
        try:
            profile = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{**profile, "errors": tuple(profile.get("errors", ()))})
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"gfast: {path} is no machine profile ({error}); gfast plan --measure FILE writes one"
            ) from None


def _sheet(name: str, bf16: float, fp32: float, bandwidth: float, memory: float, link: float) -> Machine:
    flops = {"bfloat16": bf16 * 1e12, "float16": bf16 * 1e12, "float32": fp32 * 1e12}
    return Machine(
        name,
        "data sheet: peak rates, of which real runs reach a part",
        flops,
        bandwidth * 1e12,
        memory * 1e9,
        link * 1e9,
    )


# Dense tensor-core rates without sparsity; links in one direction (NVLink, or PCIe 4.0 x16).
SHEETS = {
    "H200": _sheet("NVIDIA H200 SXM", 989, 67, 4.8, 141, 450),
    "H100": _sheet("NVIDIA H100 SXM", 989, 67, 3.35, 80, 450),
    "A100": _sheet("NVIDIA A100 SXM 80 GB", 312, 19.5, 2.039, 80, 300),
    "A100-40": _sheet("NVIDIA A100 SXM 40 GB", 312, 19.5, 1.555, 40, 300),
    "4090": _sheet("NVIDIA GeForce RTX 4090", 165.2, 82.6, 1.008, 24, 32),
}


@dataclass(frozen=True)
class Facts:
    """A model in numbers: parameters in all, in the matrices of its blocks, in its largest block and its largest
    matrix; L blocks, hidden size D, vocabulary V; width of its attention.
    """

    parameters: int
    matrices: int
    block: int
    largest: int
    linear_rims: int  # inputs and outputs of the blocks' matrices, summed: what an adapter of rank 1 has
    layers: int
    hidden: int
    vocab: int
    attention: int

    def forward_flops(self, work: Work) -> float:
        """Of the decoder; causal attention is half a square."""
        return 2.0 * work.tokens * (self.matrices + self.layers * self.attention * work.length)

    def head_flops(self, work: Work) -> float:
        return 2.0 * work.tokens * self.hidden * self.vocab


def read_config(source: str) -> Any:
    """A model's configuration: of a folder, a config.json, or a name on the Hugging Face hub."""
    from transformers import AutoConfig

    path = Path(source)
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.pop("model_type", None)
        if kind is None:
            raise ValueError(f"gfast: {source} is no model's configuration: it has no model_type")
        return AutoConfig.for_model(kind, **settings)
    if not path.is_dir() and (source.startswith((".", "/")) or source.endswith(".json")):
        raise ValueError(f"gfast: there is no file or folder {source}")
    return AutoConfig.from_pretrained(source)


def facts(config: Any) -> Facts:
    """The numbers of a model that is never made."""
    with torch.device("meta"):
        model = build_model(config, torch.bfloat16)
    if any(module_kinds.is_routed(name) for name, _ in model.named_modules()):
        raise ValueError("it is a mixture of experts, and which of them a text takes is not known before it is there")
    head = hf.output_layer(model).weight
    inner = hf.structure.blocks(hf.unwrap(model))
    matrices = [p for block in inner for p in block.parameters() if p.dim() >= 2]
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    parameters = list(model.parameters())
    return Facts(
        parameters=sum(p.numel() for p in parameters),
        matrices=sum(p.numel() for p in matrices),
        block=max(sum(p.numel() for p in block.parameters()) for block in inner),
        largest=max(p.numel() for p in parameters),
        linear_rims=sum(sum(p.shape[-2:]) for p in matrices),
        layers=len(inner),
        hidden=head.shape[1],
        vocab=head.shape[0],
        attention=width,
    )


@dataclass(frozen=True)
class Recipe:
    """One way to train: what is trained by which optimizer, with the original's values from a cache."""

    name: str
    state_bytes: float  # a trained parameter's
    rank: int = 0  # of adapters; 0: all weights


RECIPES = (
    Recipe("all weights, AdamW", 0.0),
    Recipe("all weights, 8-bit AdamW", 2.0),
    Recipe("LoRA of rank 16, AdamW", 0.0, 16),
)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one device by what they are for, and seconds."""

    name: str
    bytes: Mapping[str, float]
    seconds: float
    note: str = ""
    total: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", float(sum(self.bytes.values())))

    def fits(self, memory: float) -> bool:
        return self.total <= MARGIN * memory


class Planner:
    """Estimates for one model, kind of work, machine and number of devices; sharded: by FSDP2, else replicated."""

    def __init__(
        self, config: Any, work: Work, machine: Machine, devices: int = 1, sharded: bool | None = None
    ) -> None:
        self.config, self.work, self.machine, self.devices = config, work, machine, devices
        self.sharded = devices > 1 if sharded is None else sharded and devices > 1
        self.split = devices if self.sharded else 1  # devices that hold a part each
        self._steps: dict[tuple[bool, bool, int, bool], int] = {}
        try:
            self.facts = facts(config)
            self._step(False, not self.sharded)
        except Exception as error:  # transformers', PyTorch's or the model's own, where a part of a model is not known
            raise ValueError(
                f"gfast plan knows decoders of text that transformers' AutoModelForCausalLM makes, and can not count "
                f"{config.model_type!r}: {str(error).splitlines()[0][:200] or type(error).__name__}"
            ) from error

    def training(self, recipe: Recipe, checkpoints: bool) -> Estimate:
        """A step of an objective that needs the original (from a cache): one forward and backward over the tokens."""
        size, model = self.work.dtype.itemsize, self.facts
        trained = recipe.rank * model.linear_rims if recipe.rank else model.parameters
        adapter_size = max(size, 4) if recipe.rank else size  # PEFT keeps adapters in fp32
        states = (recipe.state_bytes or 2.0 * adapter_size) * trained
        split = self.split
        keeps = not recipe.rank and not self.sharded
        held = {
            "weights": (model.parameters * size + (trained * adapter_size if recipe.rank else 0)) / split,
            "optimizer": states / split,
            "gradients": 0.0 if keeps else trained * adapter_size / split,
            "step": float(self._step(checkpoints, keeps, recipe.rank)),
            # DDP copies gradients into buckets of its own, unless gradient_as_bucket_view is asked for
            "buckets": float(trained * adapter_size) if self.devices > 1 and not self.sharded else 0.0,
            "gathered": self._gathered(),
        }
        forward, head = model.forward_flops(self.work), model.head_flops(self.work)
        again = forward if checkpoints else 0.0
        units = 2 if recipe.rank else 3  # frozen weights have no gradient
        seconds = self._seconds(units * forward + again + units * head, passes=units, reduces=trained)
        moved = trained * (3 * adapter_size + 2 * (recipe.state_bytes or 2.0 * adapter_size)) / split
        name = recipe.name + (", checkpoints" if checkpoints else "")
        return Estimate(name, held, seconds + moved / self.machine.bandwidth * self.machine.overhead)

    def reference(self, samples_tokens: int) -> Estimate:
        """Log-probs of the original of so many tokens, once."""
        size, split = self.work.dtype.itemsize, self.split
        batches = -(-samples_tokens // self.work.tokens)
        flops = self.facts.forward_flops(self.work) + self.facts.head_flops(self.work)
        held = {
            "weights": self.facts.parameters * size / split,
            "forward": float(forward_bytes(self.config, self.work, self._kind)),
            "gathered": self._gathered(),
        }
        return Estimate("reference cache", held, batches * self._seconds(flops, passes=1))

    def engine(self, name: str) -> Estimate:
        """A G-effect of one objective on as many tokens of each set, in one batch each."""
        size, model, split = self.work.dtype.itemsize, self.facts, self.split
        if self.sharded and name != "stream":
            return Estimate(f"g_effect, {name}", {}, float("nan"), "refuses models that FSDP2 shards")
        one = float(size) * model.parameters
        # Those of a single batch are kept as they are: the second's gradients are what it is.
        directions = {"stream": 1, "sample": 2, "token": 2, "gram": 0}[name] * one
        if name in ("sample", "token"):
            step = self._step(False, True, training=False) - one
            after = seeded_bytes if name == "sample" else tangent_bytes
            step = max(step, float(after(self.config, self.work, self._kind)))
        else:  # gram's is at most that of two batches: one is kept, another passes by
            step = (2.0 if name == "gram" else 1.0) * self._step(False, False, training=False)
        held = {
            "weights": model.parameters * size / split,
            "directions": directions / split,
            "step": step,
            "gathered": self._gathered(),
        }
        forward = model.forward_flops(self.work) + model.head_flops(self.work)
        note = "at most, down to half of it" if name == "gram" else ""
        return Estimate(f"g_effect, {name}", held, self._seconds(UNITS[name] * forward, passes=3), note)

    def _gathered(self) -> float:
        """What FSDP2 has whole at a time: two blocks and the group of embeddings or head, and a block's gradient."""
        if not self.sharded:
            return 0.0
        return self.work.dtype.itemsize * float(3 * self.facts.block + 2 * self.facts.largest)

    @property
    def _kind(self) -> str:
        return "cpu" if self.machine.name.startswith("CPU") else "cuda"

    def _step(self, checkpoints: bool, keeps: bool, rank: int = 0, training: bool = True) -> int:
        key = (checkpoints, keeps, rank, training)
        if key not in self._steps:
            work = Work(self.work.rows, self.work.length, self.work.dtype, checkpoints)
            self._steps[key] = step_bytes(self.config, work, keeps, self._kind, rank, training)
        return self._steps[key]

    def _seconds(self, flops: float, passes: int, reduces: float = 0.0) -> float:
        """The longest of computing, reading the weights, and sending what has to be sent."""
        size, machine = self.work.dtype.itemsize, self.machine
        name = str(self.work.dtype).removeprefix("torch.")
        if name not in machine.flops:
            raise ValueError(
                f"gfast: the profile of {machine.name} has no rate of {name}, only {sorted(machine.flops)}"
            )
        read = passes * self.facts.parameters * size / machine.bandwidth
        sent = 0.0
        if self.devices > 1 and machine.link:
            share = (self.devices - 1) / self.devices
            amount = passes * self.facts.parameters if self.sharded else 2.0 * reduces
            sent = amount * size * share / machine.link
        return max(flops / machine.flops[name], read, sent) * machine.overhead
