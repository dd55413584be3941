"""What a training or a measurement takes, before it runs: memory from a run on tensors without data, time from flops
and bytes at the rates of a machine.

The model is built from its configuration on fake tensors, and its decoder runs forward and backward there: what would
be allocated is counted, operation by operation. The head is gfast's: gradients and one chunk of logits.
"""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gfast import hf, module_kinds
from gfast.ops.chunks import default_chunk_rows

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
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{**found, "errors": tuple(found.get("errors", ()))})
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
class Work:
    """What is done at a time on one device: rows of texts, tokens each, in a dtype; with activation checkpoints."""

    rows: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    checkpoints: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


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
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found.pop("model_type", None)
        if kind is None:
            raise ValueError(f"gfast: {source} is no model's configuration: it has no model_type")
        return AutoConfig.for_model(kind, **found)
    if not path.is_dir() and (source.startswith((".", "/")) or source.endswith(".json")):
        raise ValueError(f"gfast: there is no file or folder {source}")
    return AutoConfig.from_pretrained(source)


def _model(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def facts(config: Any) -> Facts:
    """The numbers of a model that is never made."""
    with torch.device("meta"):
        model = _model(config, torch.bfloat16)
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


class _Counted(TorchDispatchMode):
    """Bytes of what operations return and is still referenced: now, and at their highest."""

    def __init__(self) -> None:
        super().__init__()
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.now = self.highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes()).atexit = False
        self.highest = max(self.highest, self.now)
        return out

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


def step_bytes(config: Any, work: Work, keep_gradients: bool = True, device: str = "cuda", rank: int = 0) -> int:
    """The most that a forward and backward of gfast's losses hold beside weights and optimizer states: activations,
    the head's chunk, gradients (as they come and go, or kept). rank: of LoRA adapters, which alone are trained.

    Of a deep model with blocks that are alike it is measured with 4 and with 6 of them. Memory is highest in the
    first or in the second half of the backward, and each half's highest is linear in the number of blocks.
    """
    text = config.get_text_config()
    layers, kinds = text.num_hidden_layers, set(getattr(text, "layer_types", None) or ())
    if layers <= 8 or len(kinds) > 1:
        return max(_halves(config, work, keep_gradients, device, rank))
    few, more = (_halves(_with_blocks(config, count), work, keep_gradients, device, rank) for count in (4, 6))
    return max(y + (y - x) * (layers - 6) // 2 for x, y in zip(few, more, strict=True))


def _with_blocks(config: Any, count: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return config


def _adapt(model: nn.Module, rank: int) -> None:
    """LoRA over the matrices of the blocks as PEFT has it: in fp32, and computed in that."""

    def added(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = given[0].to(module.lora_a.dtype)
        return (output + (x @ module.lora_a @ module.lora_b) * 2.0).to(output.dtype)

    model.requires_grad_(False)
    for block in hf.structure.blocks(hf.unwrap(model)):
        for module in list(block.modules()):
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 2:
                wide = torch.promote_types(weight.dtype, torch.float32)
                # GPT-2's Conv1D has its inputs first
                rims = weight.shape[::-1] if isinstance(module, nn.Linear) else weight.shape
                module.lora_a = nn.Parameter(torch.empty(rims[0], rank, dtype=wide))
                module.lora_b = nn.Parameter(torch.empty(rank, rims[1], dtype=wide))
                module.register_forward_hook(added)


def _halves(config: Any, work: Work, keep_gradients: bool, device: str, rank: int = 0) -> tuple[int, int]:
    """The highest of the forward and the backward of the upper half of the blocks, and of that of the lower half."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = _model(config, work.dtype)
        if work.checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if rank:
            _adapt(model, rank)
        model.train()
        head, blocks = hf.output_layer(model).weight, hf.structure.blocks(hf.unwrap(model))
        if not keep_gradients:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        ids = torch.zeros(work.rows, work.length, dtype=torch.int64)
        upper: list[int] = []
        with _Counted() as counted:
            for parameter in (*model.parameters(), *model.buffers()):
                counted.known.add(parameter.untyped_storage())

            def half(_: Tensor) -> None:
                upper.append(counted.highest)
                counted.highest = counted.now

            def watch(_: nn.Module, __: Any, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                if not upper and states.requires_grad:
                    states.register_hook(half)

            watched = blocks[len(blocks) // 2].register_forward_hook(watch)
            hidden = hf.decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
            watched.remove()
            grad, own = _head_step(hidden, head, device)
            if keep_gradients:
                head.grad = own if head.grad is None else head.grad
            del own
            hidden.backward(grad)
    return (upper[0] if upper else 0, counted.highest)


def _head_step(hidden: Tensor, weight: Tensor, device: str) -> tuple[Tensor, Tensor | None]:
    """What the fused loss allocates: dH, dW (in fp32 until it is whole; none of a frozen head), a chunk of logits."""
    tokens, (vocab, size) = hidden.shape[0] * hidden.shape[1], weight.shape
    rows = min(default_chunk_rows(vocab, size, torch.device(device)), tokens)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    of_hidden = torch.empty_like(hidden)
    own = weight.requires_grad
    total = torch.empty(vocab, size, dtype=wide if rows < tokens else weight.dtype) if own else None
    logits = torch.empty(rows, vocab, dtype=hidden.dtype)
    del logits
    return of_hidden, total.to(weight.dtype) if own else None


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
        self._steps: dict[tuple[bool, bool, int], int] = {}
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
        own = max(size, 4) if recipe.rank else size  # PEFT keeps adapters in fp32
        states = (recipe.state_bytes or 2.0 * own) * trained
        split = self.devices if self.sharded else 1
        keeps = not recipe.rank and not self.sharded
        held = {
            "weights": (model.parameters * size + (trained * own if recipe.rank else 0)) / split,
            "optimizer": states / split,
            "gradients": 0.0 if keeps else trained * own / split,
            "step": float(self._step(checkpoints, keeps, recipe.rank)),
            "gathered": self._gathered() if self.sharded else 0.0,
        }
        forward, head = model.forward_flops(self.work), model.head_flops(self.work)
        again = forward if checkpoints else 0.0
        units = 2 if recipe.rank else 3  # frozen weights have no gradient
        seconds = self._seconds(units * forward + again + units * head, passes=units, reduces=trained)
        moved = trained * (3 * own + 2 * (recipe.state_bytes or 2.0 * own)) / split
        name = recipe.name + (", checkpoints" if checkpoints else "")
        return Estimate(name, held, seconds + moved / self.machine.bandwidth * self.machine.overhead)

    def reference(self, samples_tokens: int) -> Estimate:
        """Log-probs of the original of so many tokens, once."""
        size, split = self.work.dtype.itemsize, self.devices if self.sharded else 1
        batches = -(-samples_tokens // self.work.tokens)
        flops = self.facts.forward_flops(self.work) + self.facts.head_flops(self.work)
        held = {"weights": self.facts.parameters * size / split, "gathered": self._gathered() if self.sharded else 0.0}
        return Estimate("reference cache", held, batches * self._seconds(flops, passes=1))

    def engine(self, name: str) -> Estimate:
        """A G-effect of one objective on as many tokens of each set, in one batch each."""
        size, model, split = self.work.dtype.itemsize, self.facts, self.devices if self.sharded else 1
        if self.sharded and name != "stream":
            return Estimate(f"g_effect, {name}", {}, float("nan"), "refuses models that FSDP2 shards")
        # Those of a single batch are kept as they are.
        directions = {"stream": 1, "sample": 2, "token": 2, "gram": 0}[name] * float(size) * model.parameters
        # token's is that of its directions: what its tangents take is less but for small models
        step = float(self._step(False, False)) * (2.0 if name == "gram" else 1.0)
        held = {
            "weights": model.parameters * size / split,
            "directions": directions / split,
            "step": step,
            "gathered": self._gathered() if self.sharded else 0.0,
        }
        forward = model.forward_flops(self.work) + model.head_flops(self.work)
        return Estimate(f"g_effect, {name}", held, self._seconds(UNITS[name] * forward, passes=3))

    def _gathered(self) -> float:
        """What FSDP2 has whole at a time: two blocks and the group of embeddings or head, and a block's gradient."""
        return self.work.dtype.itemsize * float(3 * self.facts.block + 2 * self.facts.largest)

    def _step(self, checkpoints: bool, keeps: bool, rank: int = 0) -> int:
        key = (checkpoints, keeps, rank)
        if key not in self._steps:
            work = Work(self.work.rows, self.work.length, self.work.dtype, checkpoints)
            kind = "cpu" if self.machine.name.startswith("CPU") else "cuda"
            self._steps[key] = step_bytes(self.config, work, keeps, kind, rank)
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
