# SPDX-License-Identifier: Apache-2.0
"""Rules that end a training: what they say, and the callback that follows them."""

from __future__ import annotations

import logging
import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gfast.training.live import LIVE, RecordLive
from gfast.training.processes import together
from gfast.training.records import read_step, recorded_steps, run_name, write_record
from gfast.training.trajectory import Trajectory, callbacks_of, calling_trainer
from gfast.words import did_you_mean

logger = logging.getLogger("gfast")

_NLL = "the NLL of both sets: --nll_every or --geffect_every; in Python an NLLCallback or GEffectCallback"
_LIVE = "or, of the batches of each step, --geffect_live (--geffect_live_unlearn)"
_EFFECT = f"G-effects: --geffect_every, {_LIVE}; in Python a GEffectCallback"
_NORM = f"norms and cosines: --geffect_every, {_LIVE}; in Python GEffectCallback(..., norms=True)"
# Quantity of a rule -> its quantity, side and group in the records, and what measures it.
QUANTITIES = {
    "forget_nll": ("risk", "unlearn", "", _NLL),
    "retain_nll": ("risk", "retain", "", _NLL),
    "unlearn_effect": ("g_effect", "unlearn", "total", _EFFECT),
    "retain_effect": ("g_effect", "retain", "total", _EFFECT),
    "unlearn_cosine": ("cosine", "unlearn", "total", _NORM),
    "retain_cosine": ("cosine", "retain", "total", _NORM),
    "unlearn_norm": ("risk_norm", "unlearn", "total", _NORM),
    "retain_norm": ("risk_norm", "retain", "total", _NORM),
    "objective_norm": ("objective_norm", "", "total", _NORM),
}
_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_TOKEN = re.compile(r"(?P<number>(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>[<>=!]=?|\S)")

Course = Sequence[tuple[int, Mapping[str, float]]]


@dataclass(frozen=True)
class Rule:
    """One rule: `quantity comparison bound`, held for `times` measurements in a row.

    The bound is `factor`, `factor` times the quantity's first measurement (`of` is "start"), or `factor` times another
    quantity (`of` is its name).
    """

    text: str
    quantity: str
    comparison: str
    factor: float
    of: str | None
    times: int

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.quantity} | ({self.of} if self.of in QUANTITIES else set()))

    def held(self, course: Course) -> list[int]:
        """The steps of the latest measurements in a row at which it held, none if it did not at the last one.

        A value or bound that is no number is worse than any: the rule holds.
        """
        measured = [(step, values) for step, values in course if self.needs <= values.keys()]
        steps: list[int] = []
        for step, values in reversed(measured):
            value, bound = values[self.quantity], self._bound(values, measured)
            if not (math.isnan(value) or math.isnan(bound) or _COMPARISONS[self.comparison](value, bound)):
                break
            steps.append(step)
        return steps[::-1]

    def reason(self, course: Course) -> str:
        """Why the run ends at the last measurement of the course, in one sentence."""
        measured = [(step, values) for step, values in course if self.needs <= values.keys()]
        step, values = measured[-1]
        value, bound = values[self.quantity], self._bound(values, measured)
        if math.isnan(value) or math.isnan(bound):
            text = f"{self.quantity} is {value:.6g} and its bound {bound:.6g}"
        else:
            text = f"{self.quantity} {value:.6g} {self.comparison} {bound:.6g}"
        if self.of == "start":
            first, start = measured[0]
            text += f" ({self.factor:g} times its {start[self.quantity]:.6g} at step {first})"
        elif self.of is not None:
            text += f" ({self.factor:g} times {self.of} {values[self.of]:.6g})"
        if self.times > 1:
            text += f", for {self.times} measurements in a row"
        return f"rule {self.text!r} at step {step}: {text}"

    def _bound(self, values: Mapping[str, float], measured: Course) -> float:
        if self.of is None:
            return self.factor
        return self.factor * (measured[0][1][self.quantity] if self.of == "start" else values[self.of])


def parse_rules(rules: str | Sequence[str] | None) -> tuple[Rule, ...]:
    """Rules of `StopCallback` from their texts.

    Raises:
        ValueError: a text that is no rule, with the place and what was probably meant.

    Example:
        >>> parse_rules("retain_effect < 0.5*unlearn_effect for 3")[0].needs == {"retain_effect", "unlearn_effect"}
        True
        >>> parse_rules("retain_nl>2")
        Traceback (most recent call last):
        ValueError: gfast: stop rule 'retain_nl>2', character 1: ... 'retain_nl'; did you mean retain_nll? ...
    """
    texts = [rules] if isinstance(rules, str) else list(rules or ())
    return tuple(_Reader(str(text)).rule() for text in texts)


class _Reader:
    """Reads one rule from left to right."""

    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split())
        self.tokens = [(match.lastgroup, match[0], match.start() + 1) for match in _TOKEN.finditer(self.text)]
        self.at = 0

    def rule(self) -> Rule:
        quantity = self._quantity()
        _, comparison, _ = self._next()
        if comparison not in _COMPARISONS:
            self._fail("after the quantity comes one of < <= > >=", back=1)
        factor, of = self._bound(quantity)
        times = 1
        if self._peek() is not None:
            if self._next()[1] != "for":
                self._fail("here it ends, or goes on with `for 3`; each rule is an argument of its own", back=1)
            kind, number, _ = self._next()
            if kind != "number" or not number.isdigit() or int(number) < 1:
                self._fail("after `for` comes the number of measurements in a row, 1 or more", back=1)
            times = int(number)
            if self._peek() is not None:
                self._next()
                self._fail("here it ends; each rule is an argument of its own", back=1)
        return Rule(self.text, quantity, comparison, factor, of, times)

    def _bound(self, quantity: str) -> tuple[float, str | None]:
        sign = 1.0
        if self._peek() in ("-", "+"):
            sign = -1.0 if self._next()[1] == "-" else 1.0
        kind, text, _ = self._next()
        if kind == "name":
            self.at -= 1
            return sign, self._other(quantity)
        if kind != "number":
            self._fail(
                "after the comparison comes a number (4), a multiple of the start (1.1x) or of a quantity", back=1
            )
        factor = sign * float(text)
        if not math.isfinite(factor):
            self._fail("this number is too large", back=1)
        if self._peek() in ("x", "X"):
            self.at += 1
            return factor, "start"
        if self._peek() == "*":
            self.at += 1
            return factor, self._other(quantity)
        return factor, None

    def _other(self, quantity: str) -> str:
        other = self._quantity()
        if other == quantity:
            self._fail("a quantity cannot be compared with itself; a multiple of its start is written 1.1x", back=1)
        return other

    def _quantity(self) -> str:
        kind, name, _ = self._next()
        if kind != "name" or name not in QUANTITIES:
            known = f"{did_you_mean(name, QUANTITIES) or '.'} The quantities are {', '.join(QUANTITIES)}"
            self._fail(f"there is no quantity {name!r}{known}", back=1)
        return name

    def _peek(self) -> str | None:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else None

    def _next(self) -> tuple[str | None, str, int]:
        token = self.tokens[self.at] if self.at < len(self.tokens) else (None, "", len(self.text) + 1)
        self.at += 1
        return token

    def _fail(self, why: str, back: int) -> None:
        at = self.at - back
        place = self.tokens[at][2] if at < len(self.tokens) else len(self.text) + 1
        raise ValueError(
            f"gfast: stop rule {self.text!r}, character {place}: {why}. A rule reads retain_nll>1.1x, forget_nll>4 or "
            f"'retain_effect<0.5*unlearn_effect for 3'"
        )


def require_measured(rules: Sequence[Rule], measured: Collection[str]) -> None:
    """ValueError, which says what measures it, for a rule about a quantity that is not among the `measured`."""
    for rule in rules:
        for name in sorted(rule.needs - set(measured)):
            raise ValueError(
                f"gfast: stop rule {rule.text!r} needs {name}, which this run does not measure. What measures "
                f"{QUANTITIES[name][3]}"
            )


class StopCallback(TrainerCallback):
    r"""Ends a training when a rule about its measurements holds, with a checkpoint of that step.

    A rule is ``QUANTITY COMPARISON BOUND [for K]``:

    - quantity: ``forget_nll``, ``retain_nll``, ``unlearn_effect``, ``retain_effect`` (the totals of the G-effect),
      ``unlearn_cosine``, ``retain_cosine``, ``unlearn_norm``, ``retain_norm`` (of the risk's gradients),
      ``objective_norm``;
    - comparison: ``<``, ``<=``, ``>``, ``>=``;
    - bound: a number (``4``), a multiple of the quantity's first measurement (``1.1x``), or of another quantity at the
      same step (``0.5*unlearn_effect``: harm of half the unlearning; ``unlearn_effect``);
    - ``for K``: at K measurements of it in a row; 1 if left out.

    Rules are looked at wherever what they are about is measured (`GEffectCallback`, `NLLCallback`); the first that
    holds ends the run. Each is recorded there, as the quantity "stop" with the rule as its group: the value is the
    number of measurements in a row at which it held. So a run that is killed and resumed counts on, and the reason can
    be read from the records; it is logged, and `reason` has it. All processes end at the same step. A value that is NaN
    is worse than any bound: the rule holds.

    `UnlearnTrainer` has one where its `UnlearnConfig.stop` says so. In another Trainer give it after the callbacks that
    measure; one that goes on from the very checkpoint where it ended takes a step and ends again.

    Args:
        rules: one text, or several.
        run_folder: where the callbacks write their records; None is the Trainer's output_dir.
        objective: the objective's name in the records, where several are recorded.

    Raises:
        ValueError: a text that is no rule, with the place; at the start of training, a quantity that nothing measures,
            with the option that does, a callback that measures after this one, and several recorded objectives.

    Source: arXiv 2502.19301, definition 1 (the G-effect) and its reading.

    Example:
        >>> stop = StopCallback(["retain_nll>1.1x", "retain_effect < 0.5*unlearn_effect for 3"])
        >>> callbacks = [GEffectCallback(10, forget, retain, GA()), stop]    # doctest: +SKIP
    """

    def __init__(
        self, rules: str | Sequence[str], *, run_folder: str | Path | None = None, objective: str | None = None
    ) -> None:
        self.rules = parse_rules(rules)
        if not self.rules:
            raise ValueError("gfast: give StopCallback a rule, such as retain_nll>1.1x")
        self.run_folder, self.objective = run_folder, objective
        self.reason: str | None = None
        self._course: dict[int, dict[str, float]] = {}
        self._sources: dict[
            str, tuple[str, Any]
        ] = {}  # quantity -> the objective it is recorded for, and what measures it

    def check(self, trainer: Any) -> None:
        """Whether everything that the rules are about is measured by the Trainer's callbacks."""
        callbacks = callbacks_of(trainer)
        measuring = [callback for callback in callbacks if isinstance(callback, Trajectory | RecordLive)]
        require_measured(self.rules, frozenset().union(*(callback.measures for callback in measuring)))
        for quantity in sorted(frozenset().union(*(rule.needs for rule in self.rules))):
            able = [callback for callback in measuring if quantity in callback.measures]
            name = self._name(quantity, able, str(getattr(trainer, "objective", "")))
            self._sources[quantity] = name, [callback for callback in able if name in callback.names()]
            late = [
                callback for callback in able if self in callbacks and callbacks.index(callback) > callbacks.index(self)
            ]
            if late:
                raise ValueError(
                    f"gfast: {type(late[0]).__name__} measures after StopCallback has looked: give that after it"
                )

    def _name(self, quantity: str, able: Sequence[Any], own: str) -> str:
        """The objective that a quantity is read from: the Trainer's own before others, and what callbacks measure on
        whole sets before what a step does on its batches.
        """
        live = set().union(*(callback.names() for callback in able if isinstance(callback, RecordLive)))
        names = set().union(*(callback.names() for callback in able)) - live
        if self.objective is None:
            chosen = [own] if own in names else [*(names or live)]
        else:
            chosen = [name for name in (self.objective, f"{self.objective}{LIVE}") if name in names | live][:1]
        if len(chosen) != 1:
            raise ValueError(
                f"gfast: StopCallback(objective=...) must be one of the objectives that {quantity} is recorded for: "
                f"{', '.join(sorted(names | live))}"
            )
        return chosen[0]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check(calling_trainer())
        self.reason, self._course = None, {}
        self._look(args, state, control, range(state.global_step + 1))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sources = [callback for _, several in self._sources.values() for callback in several]
        measured = {callback.step_of(state) for callback in sources if callback.measures_at(state)}
        if measured:
            self._look(args, state, control, measured)

    def _look(self, args: Any, state: Any, control: Any, steps: Collection[int]) -> None:
        """Take in the measurements of these steps, and see whether a rule holds at the last of its own."""
        folder = Path(args.output_dir if self.run_folder is None else self.run_folder)
        decided: list[str | None] = [None]

        def decide() -> None:
            for step in recorded_steps(folder):
                if step in steps:
                    self._course[step] = self._values(folder, step, state)
            decided[0] = self._decide(folder, state, {step for step in steps if step >= state.global_step - 1})

        together(decide if state.is_world_process_zero else None, args.world_size)
        if args.world_size > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(decided)
        if decided[0] is not None:
            self.reason = decided[0]
            logger.warning("gfast: training ends: %s", self.reason)
            control.should_training_stop = control.should_save = True

    def _values(self, folder: Path, step: int, state: Any) -> dict[str, float]:
        values = {}
        for row in read_step(folder, step):
            for quantity, (name, sources) in self._sources.items():
                key = (row["objective"], row["quantity"], row["side"], row["group"])
                last = max(
                    callback.step_of(state) for callback in sources
                )  # beyond are the rows of a run that was killed
                if key == (name, *QUANTITIES[quantity][:3]) and step <= last:
                    values[quantity] = row["value"]
        return values

    def _decide(self, folder: Path, state: Any, now: Collection[int]) -> str | None:
        """The reason to end, if there is one; a record of every rule with a new measurement."""
        course, reasons = sorted(self._course.items()), []
        for rule in self.rules:
            step = max((step for step, values in course if rule.needs <= values.keys()), default=None)
            if step not in now:
                continue
            held = len(rule.held(course))
            row = {"run": run_name(str(folder)), "objective": self._sources[rule.quantity][0], "step": step}
            row |= {"epoch": state.epoch, "quantity": "stop", "group": rule.text, "value": held}
            write_record(folder, [row])
            if held >= rule.times:
                reasons.append(rule.reason(course))
        return "; ".join(reasons) or None
