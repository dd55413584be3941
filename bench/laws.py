"""The laws of the benchmarks: every measured case of one, how many are met, and which are missed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Data = dict[str, Any]
COPIES = {"cpu": 2.0, "cuda": 1 / 0.85}  # of the logits
PRODUCTS = 1.15  # of bare matrix products
LIKE_WGA = 1.15  # of the time that WGA takes, of objectives of a row's statistics
# For what is measured beyond the tensors of a call: on a GPU the allocator rounds each up to 512 bytes; on a CPU it is
# the resident memory of the process, in pages, with a MiB or so of interpreter, thread stacks and heap. What a matrix
# library takes anew in every call is no part of this: where it weighs more, the law is missed.
MEMORY = 1.1
READ = 0.85  # of the read bandwidth
MEASUREMENT = 1.15  # of plain passes in the same place
SOFT = 1.3  # of token_kl
LIVE = {"retain side": 1.05, "retain side, update": 1.05, "both sides": 1.25}  # of the plain step; of the retain side
SCORING = 2.0  # times less time than open-unlearning's evaluator
EVERY_FIFTH = 1.4  # of plain training, with a measurement of 8 + 8 samples at every 5 steps
HOST_US, DOTS_US = 60.0, 300.0  # a call with nothing to compute; the dots of a model's tensors


class Law(NamedTuple):
    what: str
    demanded: str  # {} is the figure in the results
    at_least: bool = False


LAWS = {
    "logits": Law("`unlearn_loss`, forward + backward", "at most {} copies of the logits"),
    "kl": Law("`token_kl` on a GPU, forward + backward", "at most {} copies of as many bytes"),
    "soft": Law("`soft_target_loss`, `linear_soft_target_loss`, forward + backward", "at most {} times `token_kl`"),
    "soft_memory": Law("`soft_target_loss`, `linear_soft_target_loss`, peak memory", "at most {} times `token_kl`'s"),
    "eager": Law("`unlearn_loss` WGA bf16 against open-unlearning's way", "{} times less time", True),
    "compile": Law("`unlearn_loss` WGA bf16 against torch.compile", "{} times less time", True),
    "train": Law("`linear_unlearn_loss`, forward + backward", "at most {} times its bare matrix products"),
    "frozen": Law("`linear_unlearn_loss`, frozen head", "at most {} times its bare matrix products"),
    "nograd": Law(
        "`linear_unlearn_loss`, `linear_token_logp`, no gradient", "at most {} times the bare matrix product"
    ),
    "memory": Law("`linear_unlearn_loss`, peak memory", "at most {} times its gradients and one chunk of logits"),
    "memory_nograd": Law(
        "`linear_unlearn_loss`, `linear_token_logp`, no gradient, peak memory",
        "at most {} times their outputs and the logits folded at a time",
    ),
    "margins": Law("ETW, PDU, MASC and BST against WGA", "at most {} times its time"),
    "host": Law("`unlearn_loss`, Python and launch alone", "at most {} µs a call"),
    "grad_dot": Law("`grad_dot`", "at least {} of the read bandwidth", True),
    "host_dots": Law("`grad_dot` of 291 small tensors", "at most {} µs a call"),
    "g_effect": Law("`g_effect`", "at most {} times the plain passes it needs"),
    "pg_effect": Law("`pg_effect`", "at most {} times 3 plain passes + 1 forward"),
    "pg_given": Law("`pg_effect`, directions given", "at most {} times 1 plain pass + 1 forward"),
    "token_effect": Law("`token_effect`", "at most {} times 2 plain passes + 9 forwards"),
    "gram_effect": Law("`gram_effect`, `g_effect` by gram", "at most {} times a training step on both batches"),
    "gram_passes": Law("`gram_effect` alone", "at most {} times two passes without gradients of weights"),
    "overhead": Law("a measurement by `GEffectCallback`", "at most {} times 3 plain passes made in the same place"),
    "every_fifth": Law("training with `GEffectCallback(every=5)`, 8 + 8 samples", "at most {} times plain training"),
    "live": Law("`GEffectMonitor`, retain side at every step", "at most {} times the plain step"),
    "live_update": Law("`GEffectMonitor`, the update's effect on top", "at most {} times the step without it"),
    "live_both": Law("`GEffectMonitor`, both sides at every step", "at most {} times the plain step"),
    "live_memory": Law("`GEffectMonitor`, retain side, memory beside the plain step's", "at most {} largest gradients"),
    "less_time": Law("`g_effect` against the published way, time", "{} times less", True),
    "less_memory": Law("`g_effect` against the published way, memory", "{} times less", True),
    "ahead_time": Law("`g_effect` against the published way unpadded, time", "ahead", True),
    "ahead_memory": Law("`g_effect` against the published way unpadded, memory", "ahead", True),
    "trainer": Law("a step of gfast's trainers in open-unlearning, time", "at most {} times open-unlearning's"),
    "trainer_memory": Law(
        "a step of gfast's trainers in open-unlearning, memory", "at most {} times open-unlearning's"
    ),
    "sharded": Law("`g_effect` over 2 processes of FSDP2, memory of one", "at most {} times one process's"),
    "scoring": Law("`gfast evaluate`, losses, against open-unlearning's evaluator", "{} times less time", True),
}
FAMILIES = (  # the rows of the README: laws, and what is said of them together
    (("logits",), LAWS["logits"]),
    (("eager",), LAWS["eager"]),
    (
        ("train", "frozen", "nograd"),
        Law("`linear_unlearn_loss`, in every mode", "at most {} times its bare matrix products"),
    ),
    (("memory", "memory_nograd"), Law("`linear_unlearn_loss`, peak memory", "at most {} times what it has to hold")),
    (("g_effect",), LAWS["g_effect"]),
    (("less_time", "less_memory"), Law("`g_effect` against the published way", "{} times less, in time or memory")),
    (
        ("trainer", "trainer_memory"),
        Law("gfast's trainers in open-unlearning's place", "at most {} times its time or memory"),
    ),
)
PUBLISHED = {  # provider: (law of time, times less, law of memory, times less)
    "published way, padded": ("less_time", 4.0, "less_memory", 3.0),
    "published way": ("ahead_time", 1.0, "ahead_memory", 1.0),
}
LESS = {"open_unlearning": ("eager", 20.0), "compile": ("compile", 5.0)}  # of `unlearn_loss` WGA from bf16 logits
STEP = "1 training step"  # what gram is measured by; older results are by its two passes alone, which cost less
ENGINES = {"sample": "pg_effect", "token": "token_effect", "gram": "gram_effect", "directions given": "pg_given"}


@dataclass(frozen=True)
class Result:
    """A file of bench/results."""

    device: str
    kind: str  # "losses", "geffect", ...: KINDS of report.py
    name: str
    data: Data


@dataclass(frozen=True)
class Check:
    """One measured case of a law."""

    law: str
    case: str
    value: float
    demanded: float
    met: bool

    @property
    def share(self) -> float:
        """Of what is allowed, or of what is demanded the other way round: at most 1 where the law is met."""
        return self.demanded / self.value if LAWS[self.law].at_least else self.value / self.demanded


def verdict(value: float, law: float, at_least: bool = False) -> Data:
    """Fields of a row: its law, and whether it is met."""
    return {"law": law, "law_met": value >= law if at_least else value <= law}


def figure(law: str, value: float) -> str:
    return f"{value:.0%}" if law == "grad_dot" else f"{value:.2f}"


def checks(kind: str, data: Data) -> Iterator[Check]:
    """Those of one result file."""
    if kind == "losses":
        for row in data["rows"]:
            yield from _loss(row)
        yield from _against_peers(data)
        yield from _against_wga(data)
    elif kind == "grad_dot":
        for row in (row for row in data["rows"] if "law" in row):
            case = f"{row['case']}, {row['directions']} direction{'s' * (row['directions'] > 1)}"
            yield Check("grad_dot", case, row["of_read_bandwidth"], row["law"], row["law_met"])
    elif kind == "overhead":
        for row in (row for row in data["rows"] if "law" in row and "loop_floor_ms" in row):  # else of another floor
            every = f"{row['shape']}, every {row['every']} steps"
            yield Check("overhead", every, row["ratio"], row["law"], row["law_met"])
        for row in (row for row in data["rows"] if row["every"] == 5 and data["settings"]["batch"] == 8):
            ratio, case = row["of_plain_step"], f"{row['shape']}, {batch_name(data['settings'])}"
            if row["shape"] != "tiny":  # whose steps are Python
                yield Check("every_fifth", case, ratio, EVERY_FIFTH, ratio <= EVERY_FIFTH)
    elif kind == "live":
        yield from _live(data)
    elif kind == "evaluate":
        for row in (row for row in data["rows"] if "law" in row):
            case = f"{data['settings']['config']}, {row['samples']} rows, {data['settings']['dtype']}"
            yield Check("scoring", case, row["less_time"], row["law"], row["law_met"])
    elif kind == "trainer":
        yield from _trainers(data)
    elif kind == "sharded":
        for row in (row for row in data["rows"] if "law" in row):
            yield Check("sharded", f"{row['blocks']} blocks", row["ratio"], row["law"], row["holds"])
    elif kind == "host":
        yield from _host(data)
    elif kind == "soft_targets":
        for row in (row for row in data["rows"] if "law" in row):
            case = f"{row['provider']} {row['dtype']} {' x '.join(map(str, row['shape']))} ({row['head']}, {row['op']})"
            yield Check("soft", case, row["ratio"], row["law"], row["law_met"])
            if memory := row.get("of_memory"):
                yield Check("soft_memory", case, memory["ratio"], memory["law"], memory["law_met"])
    elif kind == "geffect":
        yield from _effects(data)
        if not data.get("sweep"):
            yield from _against_published(data)


def _loss(row: Data) -> Iterator[Check]:
    shape, mode = " x ".join(map(str, row["shape"])), row["mode"] if "mode" in row else "train"
    name = "" if row["provider"] == "gfast" else f"{row['provider']}, "
    case = f"{name}{row['objective'].upper()} {row['dtype']} {shape} ({row['head']}, {row.get('batch', 'full')})"
    if "law" in row:
        law = mode if row["op"] == "linear" else row["op"]
        yield Check(law, case, row["times_floor"], row["law"], row["law_met"])
    if memory := row.get("of_memory"):
        law, of = ("memory_nograd", "") if mode == "nograd" else ("memory", f", {mode}")
        yield Check(law, case + of, memory["ratio"], memory["law"], memory["law_met"])


def _live(data: Data) -> Iterator[Check]:
    used = data["settings"]
    case = f"{used['objective'].upper()}, {model_name(used)}, {batch_name(used)}"
    laws = dict(zip(LIVE, ("live", "live_update", "live_both"), strict=True))
    for row in (row for row in data["rows"] if "law" in row):
        yield Check(laws[row["name"]], case, row["ratio"], row["law"], row["law_met"])
        if memory := row.get("of_memory"):
            yield Check("live_memory", case, memory["ratio"], memory["law"], memory["law_met"])


def _trainers(data: Data) -> Iterator[Check]:
    """gfast's trainers as they come, and with the two sides in one call."""
    for case in data["cases"]:
        for prefix, way in (("", ""), ("joint_", ", both sides in one call")):
            for law, field in (("trainer", "step_ratio"), ("trainer_memory", "memory_ratio")):
                if (ratio := case.get(prefix + field)) is not None:
                    yield Check(law, case["method"] + way, ratio, case["law"], ratio <= case["law"])


def _host(data: Data) -> Iterator[Check]:
    for row in data["rows"]:
        if row["provider"].startswith("grad_dot"):
            yield Check("host_dots", row["provider"], row["us_a_call"], DOTS_US, row["us_a_call"] <= DOTS_US)
        elif row["provider"] == "unlearn_loss, triton":
            case = "the kernel a stub" if data["environment"]["name"].startswith("cpu-") else "on the device"
            yield Check("host", case, row["us_a_call"], HOST_US, row["us_a_call"] <= HOST_US)


def _against_peers(data: Data) -> Iterator[Check]:
    wanted = {"op": "logits", "objective": "wga", "dtype": "bf16", "mode": "train"}
    rows = [row for row in data["rows"] if "median_ms" in row and all(row[key] == wanted[key] for key in wanted)]
    for row in (row for row in rows if row["provider"] in LESS):
        law, least = LESS[row["provider"]]
        for own in (own for own in rows if own["provider"] == "gfast"):
            if (own["shape"], own["batch"]) == (row["shape"], row["batch"]):
                less, shape = row["median_ms"] / own["median_ms"], " x ".join(map(str, row["shape"]))
                yield Check(law, f"{shape} ({row['head']}, {row['batch']})", less, least, less >= least)


def _against_wga(data: Data) -> Iterator[Check]:
    """ETW, PDU, MASC and BST, each in turns with WGA on the same case."""
    for row in (row for row in data["rows"] if "times_wga" in row):
        ratio, shape = row["times_wga"], " x ".join(map(str, row["shape"]))
        case = f"{row['objective'].upper()} {row['dtype']} {shape} ({row['head']}, {row['batch']}), {row['mode']}"
        yield Check("margins", f"{case}, from {row['op']}", ratio, LIKE_WGA, ratio <= LIKE_WGA)


def _effects(data: Data) -> Iterator[Check]:
    used, by = data["settings"], data.get("sweep")
    for row in (row for row in data["rows"] if "law" in row):
        name = row["name"].split("(")[0]
        at = used | ({{"length": "tokens", "depth": "layers"}.get(by, by): row[by]} if by else {})
        floor = ""
        if name == "gram_effect" and row["floor"] != STEP:
            if not row["law_met"]:
                continue  # the step, with its update, may have taken longer
            floor = f", of {row['floor']}"
        law = ENGINES.get(row["name"].rpartition(", ")[2], name)
        case = f"{row['name']}, {model_name(at)}, {batch_name(at)}{floor}"
        yield Check(law, case, row["ratio"], row["law"], row["law_met"])
        if passes := row.get("of_passes_without_dw"):
            yield Check("gram_passes", case, passes["ratio"], passes["law"], passes["law_met"])


def _against_published(data: Data) -> Iterator[Check]:
    """g_effect(WGA) against the published way, both paddings: how many times less time and memory it takes."""
    rows = {row["name"]: row for row in data["rows"] if "median_ms" in row}
    if (ours := rows.get("g_effect(WGA)")) is None:
        return
    for name, (time, less, memory, smaller) in PUBLISHED.items():
        if name in rows:
            case = f"{name}, {model_name(data['settings'])}, {batch_name(data['settings'])}"
            for law, least, field in ((time, less, "median_ms"), (memory, smaller, "peak_extra_mb")):
                if rows[name].get(field) and ours.get(field):
                    ratio = rows[name][field] / ours[field]
                    yield Check(law, case, ratio, least, ratio >= least)


def law_checks(results: list[Result]) -> dict[str, dict[str, list[Check]]]:
    """law -> device -> its cases."""
    out: dict[str, dict[str, list[Check]]] = {law: {} for law in LAWS}
    for result in results:
        for check in checks(result.kind, result.data):
            out[check.law].setdefault(result.device, []).append(check)
    return out


def model_name(settings: Data) -> str:
    """The shape, and how deep where that is not the shape's own depth."""
    return settings["shape"] + (f" cut to {settings['layers']} blocks" if settings.get("layers") else "")


def batch_name(settings: Data) -> str:
    return f"{settings['dtype']}, {settings['batch']} x {settings['tokens']} tokens a batch"


def demanded(law: Law, checks: list[Check]) -> str:
    """In words, with the figures of the results."""
    figures = dict.fromkeys(
        figure(check.law, check.demanded) if check.law == "grad_dot" else f"{round(check.demanded, 2):g}"
        for check in checks
    )
    return law.demanded.format(" or ".join(figures))


def cell(checks: list[Check]) -> str:
    """How many of a device's cases meet the law, and the range of the figures."""
    if not checks:
        return ""
    law, values = checks[0].law, sorted(check.value for check in checks)
    met = sum(check.met for check in checks)
    span = "–".join(dict.fromkeys(figure(law, value) for value in (values[0], values[-1])))
    return f"{met} of {len(checks)}: {span}" if met == len(checks) else f"**{met} of {len(checks)}**: {span}"
