"""Waiting for an autoscaler: with a double that brings nodes, and with Ray's own, whose nodes are processes of this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from dcq_ray.errors import ClusterError
from dcq_ray.jobfile import resolve_job
from dcq_ray.remote import autoscaling
from dcq_ray.remote.autoscaling import asked_for


class Autoscaler:
    """A cluster without a place for work that gets a node of two CPUs every 10 seconds after it was asked, up to a number."""

    def __init__(self, num_nodes: int) -> None:
        self.now, self.said = 0.0, list[str]()
        self.requests = list[list[dict[str, float]]]()
        self._num_nodes = num_nodes

    def nodes(self) -> list[Mapping[str, float]]:
        arrived = int(self.now // 10) if self.requests else 0
        return [{"memory": 1.0}] + [{"CPU": 2.0}] * min(arrived, self._num_nodes)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def request(self, bundles: list[dict[str, float]]) -> None:
        self.requests.append(bundles)


@pytest.fixture
def open_asking(job_document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Autoscaler, Any]]:
    def make(num_nodes: int, **resources: float) -> tuple[Autoscaler, Any]:
        double = Autoscaler(num_nodes)
        monkeypatch.setattr(autoscaling, "request_resources", double.request)
        job = resolve_job({**job_document, "resources": resources}, source="test")
        asking = asked_for(
            job, say=double.said.append, nodes=double.nodes, clock=lambda: double.now, sleep=double.sleep
        )
        return double, asking

    return make


def test_all_sections_are_asked_for_at_once_and_withdrawn_at_the_end(
    open_asking: Callable[..., tuple[Autoscaler, Any]],
) -> None:
    double, asking = open_asking(8, wait_seconds=100, cpus_per_section=1.5, gpus_per_section=0)
    with asking as share:
        assert share(3, 1).places == 1
        assert double.now == 10
        assert share(3, 3).places == 3
        assert double.now == 30
    assert double.requests == [[{"CPU": 1.5}] * 3] * 2 + [[]]
    assert double.said[0] == "waiting for an autoscaler's nodes: asked for 3 x 1.5 CPU, 0 places are there, 100 s left"
    # One at the start of each wait, and one every 15 seconds: at 0; 10 and 25.
    assert [line.rpartition(", ")[2] for line in double.said] == ["100 s left", "90 s left", "75 s left"]


def test_a_run_goes_on_with_fewer_places_when_the_limit_is_reached(
    open_asking: Callable[..., tuple[Autoscaler, Any]],
) -> None:
    double, asking = open_asking(1, wait_seconds=30)
    with asking as share:
        share(4, 1)
        assert share(4, 4).places == 2
        # Both waits together have that limit, and a third has nothing left of it.
        assert double.now == 30
        assert share(4, 4).places == 2
        assert double.now == 30
    assert double.said[-1] == "the autoscaler brought 2 of 4 places in 30 s; going on with these"


def test_where_nothing_comes_the_error_says_what_was_asked_and_what_is_there(
    open_asking: Callable[..., tuple[Autoscaler, Any]],
) -> None:
    double, asking = open_asking(8, wait_seconds=60, gpus_per_section=0.5)
    with pytest.raises(ClusterError) as caught, asking as share:
        share(4, 1)
    assert "asked for 4 x 1 CPU and 0.5 GPU and brought no place in 60 s" in str(caught.value)
    assert "0 CPUs and 0 GPUs; 2 CPUs and 0 GPUs" in str(caught.value)
    assert double.requests[-1] == []


def test_without_a_limit_nobody_is_asked(open_asking: Callable[..., tuple[Autoscaler, Any]]) -> None:
    double, asking = open_asking(8)
    with asking as share, pytest.raises(ClusterError, match=r"resources\.wait_seconds"):
        share(2, 1)
    assert (double.requests, double.now) == ([], 0)
