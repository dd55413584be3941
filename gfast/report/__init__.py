# SPDX-License-Identifier: Apache-2.0
"""Figures, tables and one self-contained HTML page from the recorded runs of any number of objectives."""

__all__ = ["build_report"]


def __getattr__(name: str):
    # matplotlib, pandas and jinja2 are only needed once a report is asked for.
    if name == "build_report":
        from gfast.report.html import build_report

        return build_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
