"""The laws of the benchmarks: every measured case of one, how many are met on which device, and which are missed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Data = dict[str, Any]
LAWS = {  # law: (what is measured, what is demanded of it; {} is the figure in the results)
    "logits": ("`unlearn_loss` from logits, forward + backward", "at most {} copies of the logits"),
    "eager": ("`unlearn_loss` WGA from bf16 logits against open-unlearning's way", "{} times less time"),
    "compile": ("`unlearn_loss` WGA from bf16 logits against torch.compile", "{} times less time"),
    "train": ("`linear_unlearn_loss`, forward + backward", "at most {} times its bare matrix products"),
    "frozen": ("`linear_unlearn_loss`, forward + backward, frozen head", "at most {} times its bare matrix products"),
    "nograd": (
        "`linear_unlearn_loss` and `linear_token_logp`, no gradient",
        "at most {} times the bare matrix product",
    ),
    "memory": ("`linear_unlearn_loss`, peak memory", "at most {} times its gradients and one chunk"),
    "memory_nograd": (
        "`linear_unlearn_loss` and `linear_token_logp`, no gradient, peak memory",
        "at most {} times their outputs and the logits folded at a time",
    ),
    "grad_dot": ("`grad_dot`", "at least {} of the read bandwidth"),
    "g_effect": ("`g_effect`", "at most {} times the plain passes it needs"),
    "pg_effect": ("`pg_effect`", "at most {} times 3 plain passes + 1 forward"),
    "pg_given": ("`pg_effect` with directions given", "at most {} times 1 plain pass + 1 forward"),
    "token_effect": ("`token_effect`", "at most {} times 2 plain passes + 9 forwards"),
    "gram_effect": ("`gram_effect`, and `g_effect` by gram", "at most {} times a training step on both batches"),
    "gram_passes": ("`gram_effect`", "at most {} times two passes without gradients of weights"),
    "overhead": ("a measurement by `GEffectCallback`", "at most {} times 3 plain passes made in the same place"),
    "less_time": ("`g_effect` against the published way", "{} times less time"),
    "less_memory": ("`g_effect` against the published way", "{} times less memory"),
    "ahead_time": ("`g_effect` against the published way without its padding", "ahead in time"),
    "ahead_memory": ("`g_effect` against the published way without its padding", "ahead in memory"),
}
PUBLISHED = {  # (law, times less that is demanded)
    "published way, padded": {"times_less": ("less_time", 4.0), "memory_less": ("less_memory", 3.0)},
    "published way": {"times_less": ("ahead_time", 1.0), "memory_less": ("ahead_memory", 1.0)},
}
PEERS = {"open_unlearning": ("eager", 20.0), "compile": ("compile", 5.0)}  # of `unlearn_loss` WGA from bf16 logits
STEP = "1 training step"  # what gram is measured by; older results are by its two passes alone, which cost less
ENGINES = {"sample": "pg_effect", "token": "token_effect", "gram": "gram_effect", "directions given": "pg_given"}
AT_LEAST = ("eager", "compile", "grad_dot", "less_time", "less_memory", "ahead_time", "ahead_memory")


@dataclass(frozen=True)
class Check:
    """One measured case of a law."""

    law: str
    case: str
    value: float
    demanded: float
    met: bool


def figure(law: str, value: float) -> str:
    return f"{value:.0%}" if law == "grad_dot" else f"{value:.2f}"


def checks(kind: str, data: Data) -> Iterator[Check]:
    """Those of one result file."""
    if kind == "losses":
        yield from (_loss(row) for row in data["rows"] if "law" in row)
        yield from (_memory(row) for row in data["rows"] if "of_memory" in row)
        yield from _against_peers(data)
    elif kind == "grad_dot":
        for row in (row for row in data["rows"] if "law" in row):
            case = f"{row['case']}, {row['directions']} direction{'s' * (row['directions'] > 1)}"
            yield Check("grad_dot", case, row["of_read_bandwidth"], row["law"], row["law_met"])
    elif kind == "overhead":
        for row in (row for row in data["rows"] if "law" in row and "loop_floor_ms" in row):  # else of another floor
            every = f"{row['shape']}, every {row['every']} steps"
            yield Check("overhead", every, row["ratio"], row["law"], row["law_met"])
    elif kind == "geffect":
        yield from _effects(data)


def _loss_case(row: Data) -> str:
    shape = " x ".join(map(str, row["shape"]))
    name = "" if row["provider"] == "gfast" else f"{row['provider']}, "
    return f"{name}{row['objective'].upper()} {row['dtype']} {shape} ({row['head']}, {row['batch']})"


def _loss(row: Data) -> Check:
    law = "logits" if row["op"] == "logits" else row["mode"]
    return Check(law, _loss_case(row), row["times_floor"], row["law"], row["law_met"])


def _memory(row: Data) -> Check:
    found, mode = row["of_memory"], row["mode"]
    law, of = ("memory_nograd", "") if mode == "nograd" else ("memory", f", {mode}")
    return Check(law, _loss_case(row) + of, found["ratio"], found["law"], found["law_met"])


def _against_peers(data: Data) -> Iterator[Check]:
    wanted = {"op": "logits", "objective": "wga", "dtype": "bf16", "mode": "train"}
    rows = [row for row in data["rows"] if "median_ms" in row and all(row[key] == wanted[key] for key in wanted)]
    for row in (row for row in rows if row["provider"] in PEERS):
        law, least = PEERS[row["provider"]]
        same = [own for own in rows if own["provider"] == "gfast" and own["shape"] == row["shape"]]
        for own in (own for own in same if own["batch"] == row["batch"]):
            less, shape = row["median_ms"] / own["median_ms"], " x ".join(map(str, row["shape"]))
            yield Check(law, f"{shape} ({row['head']}, {row['batch']})", less, least, less >= least)


def _effects(data: Data) -> Iterator[Check]:
    used, by = data["settings"], data.get("sweep")
    for row in (row for row in data["rows"] if "law" in row):
        name = row["name"].split("(")[0]
        at = used | ({{"length": "tokens", "depth": "layers"}.get(by, by): row[by]} if by else {})
        if name == "gram_effect" and row["floor"] != STEP:
            if not row["law_met"]:
                continue  # the step, with its update, may have taken longer
            at = at | {"floor": row["floor"]}
        law = ENGINES.get(row["name"].rpartition(", ")[2], name)
        case = f"{row['name']}, {model_name(at)}, {batch_name(at)}" + (f", of {at['floor']}" if "floor" in at else "")
        yield Check(law, case, row["ratio"], row["law"], row["law_met"])
        if passes := row.get("of_passes_without_dw"):
            yield Check("gram_passes", case, passes["ratio"], passes["law"], passes["law_met"])
    for row in data.get("published") or []:
        case = f"{row['against']}, {model_name(used)}, {batch_name(used)}"
        for figure_name, (law, least) in PUBLISHED[row["against"]].items():
            if figure_name in row:
                yield Check(law, case, row[figure_name], least, row[figure_name] >= least)


def model_name(settings: Data) -> str:
    """The shape, and how deep where that is not the shape's own depth."""
    return settings["shape"] + (f" cut to {settings['layers']} blocks" if settings.get("layers") else "")


def batch_name(settings: Data) -> str:
    return f"{settings['dtype']}, {settings['batch']} x {settings['tokens']} tokens a batch"


def demanded(law: str, found: list[Check]) -> str:
    """In words, with the figures of the devices."""
    figures = dict.fromkeys(
        figure(law, check.demanded) if law == "grad_dot" else f"{round(check.demanded, 2):g}" for check in found
    )
    return LAWS[law][1].format(" or ".join(figures))


def cell(law: str, found: list[Check]) -> str:
    """How many of a device's cases meet the law, and the range of the figures."""
    if not found:
        return ""
    values = sorted(check.value for check in found)
    span = "–".join(dict.fromkeys(figure(law, value) for value in (values[0], values[-1])))
    met = sum(check.met for check in found)
    return f"met: {span}" if met == len(found) else f"**{met} of {len(found)} met**: {span}"


def worst_first(law: str, found: list[Check]) -> list[Check]:
    return sorted(found, key=lambda check: check.value, reverse=law not in AT_LEAST)
