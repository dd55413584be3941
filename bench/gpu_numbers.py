"""The numbers that gfast must reach on an H200, beside what was measured; empty where nothing was."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from laws import Data, Result

BF16 = {"dtype": "bf16", "batch": "full", "head": "llama-3.1-8b"}


class Number(NamedTuple):
    what: str
    floor: str
    must: str
    kind: str  # of result
    row: Data  # fields of the row that has it
    value: Callable[[Data], float]
    text: str  # of a value
    meets: Callable[[float], bool]
    kernel: str | None = None  # whose machine code says what share of a copy's bandwidth it can reach

    def predicted(self, code: Data) -> str:
        return f"{code[self.kernel]['share_of_copy']:.0%}" if self.kernel in code else ""


def of_copy(row: Data) -> float:
    return 1 / row["times_floor"]


def milliseconds(row: Data) -> float:
    return row["median_ms"]


def linear(rows: int, most: float) -> Number:
    row = {**BF16, "op": "linear", "provider": "gfast", "mode": "train", "objective": "wga", "rows": rows}
    what = f"`linear_unlearn_loss` WGA, bf16, {rows} x 4096 x 128256"
    return Number(
        what,
        "three cuBLAS products",
        f"under {most} ms",
        "losses",
        row,
        milliseconds,
        "{:.2f} ms",
        lambda ms: ms < most,
    )


NUMBERS = (
    Number(
        "`unlearn_loss` WGA, forward + backward, bf16, 8192 x 128256",
        "a copy",
        "90% of its bandwidth",
        "losses",
        {**BF16, "op": "logits", "provider": "gfast", "mode": "train", "objective": "wga", "rows": 8192},
        of_copy,
        "{:.0%}",
        lambda share: share >= 0.9,
        "weighted_rows bf16 V=128256",
    ),
    linear(2048, 7.96),
    linear(4096, 16.7),
    linear(8192, 34.3),
    Number(
        "`linear_token_logp`, no gradient, bf16, 8192 x 4096 x 128256",
        "one cuBLAS product",
        "1.1 times it",
        "losses",
        {**BF16, "op": "linear", "provider": "gfast_logp", "mode": "nograd", "objective": "nll", "rows": 8192},
        lambda row: row["times_floor"],
        "{:.2f}",
        lambda times: times <= 1.1,
    ),
    Number(
        "`token_kl`, forward + backward, bf16, 8192 x 128256",
        "a copy of as many bytes",
        "85% of its bandwidth",
        "losses",
        {**BF16, "op": "kl", "provider": "gfast", "mode": "train", "rows": 8192},
        of_copy,
        "{:.0%}",
        lambda share: share >= 0.85,
        "kl_rows bf16 V=128256",
    ),
    Number(
        "`grad_dot`, 291 tensors of a 7B model, bf16, from an idle GPU, the host's time included",
        "a sum or copy",
        "85% of the read bandwidth",
        "grad_dot",
        {"case": "bf16:bf16", "directions": 1, "provider": "gfast"},
        lambda row: row["of_read_bandwidth"],
        "{:.0%}",
        lambda share: share >= 0.85,
    ),
)


def cells(number: Number, results: list[Result]) -> list[str]:
    """What was measured, times its floor, the host's part, peak memory; of the newest result that has the row."""
    rows = [
        (result.data["environment"]["date"], row)
        for result in results
        if result.kind == number.kind and not (number.kind == "grad_dot" and result.data["model"] != "llama-2-7b")
        for row in result.data["rows"]
        if "median_ms" in row and all(row.get(key) == value for key, value in number.row.items())
    ]
    if not rows:
        return [""] * 4
    row = max(rows, key=lambda dated: dated[0])[1]
    value = number.value(row)
    text = number.text.format(value)
    host = "" if row.get("host_ms") is None else f"{row['host_ms']:.3g} ms"
    floors = "" if row.get("times_floor") is None else f"{row['times_floor']:.2f}"
    memory = "" if row.get("peak_extra_mb") is None else f"{row['peak_extra_mb']:.0f} MB"
    return [text if number.meets(value) else f"**{text}**", floors, host, memory]
