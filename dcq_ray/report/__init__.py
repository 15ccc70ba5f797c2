"""The report of a run: tables for a terminal, one self-contained page, JSON."""

import json

from dcq_ray.records import RunReport, to_json
from dcq_ray.report.advice import advice
from dcq_ray.report.comparison import compare_reports
from dcq_ray.report.front import print_front, searched_plot
from dcq_ray.report.page import report_html
from dcq_ray.report.tables import layers_table, print_report, work_table
from dcq_ray.report.words import size


def report_json(report: RunReport) -> str:
    """The report as indented JSON, with `advice`: what the other forms recommend."""
    return json.dumps({**json.loads(to_json(report)), "advice": advice(report)}, indent=2, ensure_ascii=False)


__all__ = [
    "compare_reports",
    "layers_table",
    "print_front",
    "print_report",
    "report_html",
    "report_json",
    "searched_plot",
    "size",
    "work_table",
]
