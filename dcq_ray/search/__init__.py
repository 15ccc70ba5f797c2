"""Mixed precision from a library of sections: every section trained at several bit widths once, then combined at will.

Sections are trained alone on the teacher's activations, so any combination of trained sections is a network that needs no
further training. A *library* holds one run for each choice of quantizer; all have the same cuts, so they share one dump. What
a choice costs in accuracy is measured for each section alone, adds up (`frontier`), and is looked at on held-out images where
it matters (`combining`).
"""

from dcq_ray.search.combining import (
    Candidate,
    Searched,
    combination_overrides,
    search_library,
    take_sections,
)
from dcq_ray.search.frontier import Choice, Combination, best_within, frontier, neighbours, spread
from dcq_ray.search.library import Library, Member, Option, open_library, parse_option

__all__ = [
    "Candidate",
    "Choice",
    "Combination",
    "Library",
    "Member",
    "Option",
    "Searched",
    "best_within",
    "combination_overrides",
    "frontier",
    "neighbours",
    "open_library",
    "parse_option",
    "search_library",
    "spread",
    "take_sections",
]
