"""What a run has found, for people: the one-file HTML page and the comparison table; and the same of a comparison."""

from spinfold.report.compare_page import build_comparison
from spinfold.report.compare_table import comparison_csv, comparison_markdown, comparison_rows
from spinfold.report.page import build_report, write_report
from spinfold.report.tables import comparison_table

__all__ = [
    "build_comparison",
    "build_report",
    "comparison_csv",
    "comparison_markdown",
    "comparison_rows",
    "comparison_table",
    "write_report",
]
