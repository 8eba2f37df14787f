"""`mirage evaluate`: what a memory is worth, measured on closed loops in synthetic rooms."""

from __future__ import annotations

from ..evaluation.closed_loop import run_evaluate
from ..evaluation.loops import CONTACT, PLOTS, REPORT, TABLE, VIDEO
from ..evaluation.loops import EvaluateOptions as Options
from ..evaluation.report import format_report


def run(options: Options) -> int:
    """Evaluate a model, print the tables and where the report is."""
    print(format_report(run_evaluate(options)))
    print(f"written to {options.out}: {REPORT} {TABLE} {PLOTS}/ {CONTACT} {VIDEO}")
    return 0
