# SPDX-License-Identifier: Apache-2.0
"""Numbers as a reader of a page sees them."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """Three significant digits with a real minus sign; large and small numbers as powers of ten; a dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
    return text.replace("-", "−")
