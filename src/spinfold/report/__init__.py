"""What a run has found, for people: the one-file HTML page and the comparison table."""

from spinfold.report.page import build_report, write_report
from spinfold.report.tables import comparison_table

__all__ = ["build_report", "comparison_table", "write_report"]
