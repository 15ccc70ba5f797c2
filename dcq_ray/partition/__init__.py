"""Partition: a teacher -> its legal cuts -> sections, their costs, and the balanced choice."""

from dcq_ray.partition.choice import balanced_cuts, choose_cuts
from dcq_ray.partition.costs import CutCosts, measure_costs, section_costs
from dcq_ray.partition.sections import (
    assert_composition,
    cut,
    describe_section,
    directly_called,
    prefix_digests,
    quantizable_layers,
    section_multiply_accumulates,
)
from dcq_ray.partition.trace import CutPoint, TracedTeacher, trace_teacher

__all__ = [
    "CutCosts",
    "CutPoint",
    "TracedTeacher",
    "assert_composition",
    "balanced_cuts",
    "choose_cuts",
    "cut",
    "describe_section",
    "directly_called",
    "measure_costs",
    "prefix_digests",
    "quantizable_layers",
    "section_costs",
    "section_multiply_accumulates",
    "trace_teacher",
]
