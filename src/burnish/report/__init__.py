"""The report of a run: one HTML file that opens from disk."""

from __future__ import annotations

from burnish.report.page import write_report

__all__ = ["write_report"]
