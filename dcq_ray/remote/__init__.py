"""The phases as Ray tasks and actors: the only package that knows Ray.

The dump is tasks over slices of the data; `SectionWorker` actors, one on each place, train section after section, longest first,
and end as soon as none waits; the `Reducer` actor takes results as they come and measures each in a short task, so that it holds
no GPU while sections need it. What travels is the `RunContext` and records; weights, images and activations are opened from
files by who needs them.
"""

from dcq_ray.remote.cluster import Share, answers, connected, section_share
from dcq_ray.remote.driver import run_remote
from dcq_ray.remote.workers import Reducer, SectionWorker

__all__ = ["Reducer", "SectionWorker", "Share", "answers", "connected", "run_remote", "section_share"]
