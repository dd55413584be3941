# SPDX-License-Identifier: Apache-2.0
"""Errors that somebody tells from others."""


class NotFinite(ValueError):
    """A model gave NaN or an infinite number where it was measured: along a training, what became of it."""
