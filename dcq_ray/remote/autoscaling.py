"""Places for sections on clusters that grow: asking the autoscaler for all at once, and waiting for its nodes.

A request holds until another takes its place, also beyond the driver that made it: it is withdrawn as the run ends, and what a
killed driver left is replaced and withdrawn by the run that resumes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import ray
from ray.autoscaler.sdk import request_resources

from dcq_ray.errors import ClusterError
from dcq_ray.remote.cluster import Share, node_resources, section_share, wanted_share
from dcq_ray.spec import Job

POLL_SECONDS = 1.0
SECONDS_BETWEEN_WORDS = 15.0
Nodes = Callable[[], Sequence[Mapping[str, float]]]
Sharing = Callable[..., Share]
"""From a number of sections, how many places at least are waited for, and which part of a card each needs at least (0: any), to
what each section gets."""


@contextlib.contextmanager
def asked_for(
    job: Job,
    *,
    say: Callable[[str], None],
    nodes: Nodes = node_resources,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Sharing]:
    """Give what finds shares for sections; with `resources.wait_seconds` it first asks an autoscaler for all, and waits.

    The limit is for all waits of the block together. With some places, but fewer than were waited for, the run goes on; what
    finds shares raises ClusterError where there is none.
    """
    limit = job.resources.wait_seconds
    waited = 0.0

    def share(num_sections: int, at_least: int, least_gpus: float = 0.0) -> Share:
        nonlocal waited
        if limit == 0:
            return section_share(job, num_sections, nodes(), least_gpus)
        num_awaited = max(1, at_least)
        asked = wanted_share(job, num_sections, nodes(), least_gpus).bundle
        request_resources(bundles=[dict(asked) for _ in range(num_sections)])
        told = f"{num_sections} x {' and '.join(f'{amount:g} {name}' for name, amount in asked.items())}"
        started = clock()
        words_at = started
        while True:
            missing = ""
            try:
                found = section_share(job, num_sections, nodes(), least_gpus)
            except ClusterError as error:
                missing, num_places = str(error), 0
            else:
                num_places = found.places
            seconds = waited + clock() - started
            if num_places >= num_awaited or (seconds >= limit and num_places):
                waited = seconds
                if num_places < num_awaited:
                    say(
                        f"the autoscaler brought {num_places} of {num_awaited} places in {limit:g} s; going on with these"
                    )
                return found
            if seconds >= limit:
                raise ClusterError(
                    f"{missing}; an autoscaler was asked for {told} and brought no place in {limit:g} s "
                    "(resources.wait_seconds); `ray status` on the head says what it waits for, or that there is none"
                )
            if clock() >= words_at:
                words_at = clock() + SECONDS_BETWEEN_WORDS
                say(
                    f"waiting for an autoscaler's nodes: asked for {told}, {num_places} places are there, "
                    f"{limit - seconds:.0f} s left"
                )
            sleep(POLL_SECONDS)

    try:
        yield share
    finally:
        if limit:
            # A Ray that is gone holds no request.
            with contextlib.suppress(ConnectionError, RuntimeError, ray.exceptions.RayError):
                request_resources(bundles=[])
