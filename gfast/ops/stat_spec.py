"""What the losses of the statistics of rows are (`gfast.ops.stat_loss`), as ops and objectives pass it on."""

from __future__ import annotations

from typing import NamedTuple


class StatSpec(NamedTuple):
    """A loss of this family.

    Attributes:
        kind: "entropy" (ETW), "flat" (PDU), "margin" (MASC), "logit" (TPO) or "beliefs" (BST).
        numbers: its arguments, see ``stat_loss.values``.
    """

    kind: str
    numbers: tuple[float, ...] = ()

    @property
    def weighted(self) -> bool:
        """Whether it is a sum of log-probs with detached weights."""
        return self.kind == "entropy"

    @property
    def soft(self) -> bool:
        """Whether it takes exps: its gradient has log-probs' in it."""
        return self.kind in ("entropy", "beliefs")

    @property
    def level(self) -> str:
        """What a row's part depends on, "token" or "sequence"."""
        return "sequence" if self.kind in ("entropy", "logit") else "token"

    @property
    def temperature(self) -> float:
        return self.numbers[0] if self.weighted else 1.0

    @property
    def largest(self) -> float:
        """What factors of a row's gradient stay below; of entropies and flat ones, what is expected of them."""
        if self.kind == "margin":
            _, _, eta, beta = self.numbers
            return beta / eta
        return 256.0 if self.kind == "flat" else 2.0

    def top(self, vocab: int) -> int:
        """How many of the largest logits it looks at."""
        counts = {"margin": lambda: int(self.numbers[0]) + 1, "beliefs": lambda: int(self.numbers[1])}
        return min(vocab, counts.get(self.kind, lambda: 1)())


def stat_spec_of(objective) -> StatSpec | None:
    """Of an objective of this family; None for any other."""
    make = getattr(objective, "stat_spec", None)
    return None if make is None or isinstance(objective, type) else make()
