"""A machine's profile for `gfast plan`: rates of products and copies, and training steps at three sizes that say what
those rates miss."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gfast.planning.plan import Machine, Planner, Recipe, Work

# hidden size, blocks, vocabulary, rows and tokens of a row, on a CPU; a GPU takes four times the width
SIZES = ((128, 2, 2048, 4, 64), (256, 4, 4096, 4, 128), (512, 4, 8192, 4, 128))


def config_of(hidden: int, layers: int, vocab: int, wider: int = 1) -> Any:
    """A Llama of a size."""
    from transformers import LlamaConfig

    hidden, vocab = hidden * wider, vocab * wider
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        vocab_size=vocab,
    )


def measure() -> dict[str, Any]:
    """The profile of the device that is there, as `Machine` takes it."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    else:
        import os

        name = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flops = {
        str(dtype).removeprefix("torch."): _product_rate(dtype, device) for dtype in (torch.bfloat16, torch.float32)
    }
    source = "measured by gfast plan --measure"
    bare = Machine(name, source, flops, _copy_rate(device), float(memory))
    dtype, wider = (torch.bfloat16, 4) if cuda else (torch.float32, 1)
    ratios = []
    for hidden, layers, vocab, rows, length in SIZES:
        config, work = config_of(hidden, layers, vocab, wider), Work(rows, length, dtype)
        ratios.append(_step_seconds(config, work, device) / Planner(config, work, bare).training(SGD, False).seconds)
    overhead = math.exp(statistics.fmean(map(math.log, ratios)))
    errors = [overhead / ratio - 1.0 for ratio in ratios]
    return {
        "name": name,
        "source": source,
        "flops": flops,
        "bandwidth": bare.bandwidth,
        "memory": float(memory),
        "link": None,
        "overhead": overhead,
        "errors": errors,
    }


SGD = Recipe("all weights, SGD", 1e-9)  # no states


def _step_seconds(config: Any, work: Work, device: torch.device) -> float:
    from transformers import LlamaForCausalLM

    import gfast
    from gfast.objectives import WGA

    model = LlamaForCausalLM(config).to(device, work.dtype)
    ids = torch.randint(0, config.vocab_size, (work.rows, work.length), device=device)
    batch = {"input_ids": ids, "labels": ids}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        gfast.model_loss(model, batch, WGA()).loss.backward()
        optimizer.step()

    return _seconds(step, device)


def _seconds(function: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The least of several, after one that does not count: what others do on the machine only adds."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    size = 8192 if device.type == "cuda" else 1024
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _seconds(lambda: x @ y, device, 3)


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written a second."""
    x = torch.empty((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2.0 * x.numel() / _seconds(lambda: y.copy_(x), device, 3)
