"""Metrics: what lines of progress mean, what Ray's Prometheus endpoint shows of a run, and that the dashboard asks for no other."""

from __future__ import annotations

import json
import math
import os
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import DumpedSlice, ignore_progress, run_local
from dcq_ray.records import Boundary, Progress
from dcq_ray.remote import run_remote
from dcq_ray.remote.metrics import RUN_COUNTERS, SECTION_COUNTERS, SECTION_GAUGES, section_values, waits

DASHBOARD = Path(__file__).parents[1] / "cluster" / "grafana" / "dashboard.json"
DEADLINE_SECONDS = 120.0


def train(**fields: Any) -> Progress:
    return Progress(phase="train", index=3, **fields)


def test_a_line_gives_what_it_states_of_a_section_and_no_more() -> None:
    line = train(done=5, total=20, unit="steps", loss=0.5, per_second=80.0)
    assert section_values(line) == {
        "dcq_ray_section_loss": 0.5,
        "dcq_ray_section_images_per_second": 80.0,
        "dcq_ray_section_progress_ratio": 0.25,
    }
    assert section_values(train(state="waiting")) == {}
    assert section_values(train(state="reused")) == {"dcq_ray_section_progress_ratio": 1.0}
    assert section_values(train(state="failed", detail="why")) == {}
    assert section_values(Progress(phase="reduce", done=1, total=4, loss=1.0)) == {}
    assert section_values(train(loss=0.0)) == {"dcq_ray_section_loss": 0.0}
    assert set(section_values(line)) == set(SECTION_GAUGES)


def test_the_wait_of_a_section_lasts_from_its_first_line_that_waits_until_it_runs_and_counts_again() -> None:
    now = 100.0
    waited = waits(lambda: now)
    assert waited(train(state="waiting")) == 0
    now = 103.0
    assert waited(train(state="waiting")) == 0
    assert waited(Progress(phase="train", index=4)) == 0
    now = 107.0
    assert waited(train(done=1, total=2)) == 7.0
    now = 109.0
    assert waited(train(done=2, total=2)) == 0
    assert waited(train(state="waiting")) == 0
    now = 110.0
    assert waited(train(state="failed")) == 1.0
    assert waited(Progress(phase="dump", state="waiting")) == 0


def boundary(index: int, view: int | None) -> Boundary:
    return Boundary(
        index=index, cut="input", shape=(2, 3), num_samples=10, dtype="float16", digest=f"{index}{view}", view=view
    )


@pytest.mark.slow
@pytest.mark.ray
def test_rays_endpoint_shows_a_run_whose_student_is_the_same(
    job_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from dcq_ray.remote.metrics import counted

    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    local = run_local(resolve_job(job_document, source="test"), str(tmp_path), emit=ignore_progress, owner="test")
    storage = {"run_dir": str(tmp_path / "ray-run"), "cache_dir": str(tmp_path / "ray-cache")}
    job = resolve_job({**job_document, "storage": storage}, source="test")
    seen: dict[str, float] = {}
    names: set[str] = set()

    def emit(progress: Progress) -> None:
        if progress.phase == "train":
            names.update(ray.util.list_named_actors())
        # The end of the training: the run's Ray is still there.
        if progress.phase != "reduce" or seen:
            return
        slices = [DumpedSlice(index=0, num_samples=num, cpu_seconds=0.0) for num in (4, 6)]
        # Two boundaries of two views: each slice, which is of one view, is 2 x 12 bytes a sample.
        missing = [boundary(index, view) for index in (0, 1) for view in (0, 1)]
        assert list(counted(slices, missing, "by hand")) == slices
        wanted = {"small dumped", "by hand dumped"}
        wanted |= {f"small {word} {index}" for word in ("loss", "progress", "images", "wait") for index in range(3)}
        deadline = time.monotonic() + DEADLINE_SECONDS
        # What the endpoint shows first may be older than the last lines.
        while not wanted <= set(seen) or any(seen[f"small progress {index}"] < 1 for index in range(3)):
            assert time.monotonic() < deadline, f"only {seen}"
            time.sleep(0.5)
            seen.update(scraped(ray.nodes()[0]))

    remote = run_remote(
        job, str(tmp_path), address="local", environment=os.environ, emit=emit, say=lambda _: None, owner="test"
    )
    assert remote.student == local.student
    # Ray's dashboard shows workers by name.
    workers = {f"dcq:small:worker-{place}:try-1" for place in range(1, 4)}
    assert names & workers
    assert names <= {"dcq:small:reducer:try-1", *workers}
    assert seen["by hand dumped"] == (4 + 6) * 2 * 12
    for section in remote.sections:
        index = section.index
        assert seen[f"small loss {index}"] == pytest.approx(section.final_loss)
        assert seen[f"small progress {index}"] == 1.0
        assert seen[f"small images {index}"] > 0
        assert seen[f"small wait {index}"] > 0
    boundaries = json.loads((tmp_path / "ray-run" / "plan.json").read_text())["boundaries"]
    num_values = [math.prod(part["shape"]) * part["num_samples"] for part in boundaries]
    assert [part["dtype"] for part in boundaries] == ["float16"] * len(boundaries)
    assert 0 < seen["small dumped"] <= 2 * sum(num_values)


def scraped(node: dict[str, Any]) -> dict[str, float]:
    """What a node's endpoint shows: "RUN WORD [SECTION]" -> value."""
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^ray_(dcq_ray_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        word = name.removeprefix("dcq_ray_").removeprefix("section_").split("_")[0]
        found[" ".join(filter(None, (tags["run"], word, tags.get("section", ""))))] = float(value)
    return found


def test_the_dashboard_asks_for_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    exported = {f"ray_{name}" for name in SECTION_GAUGES}
    exported |= {f"ray_{name}_total" for name in (*SECTION_COUNTERS, *RUN_COUNTERS)}
    asked: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = set(re.findall(r"\bray_\w+", target["expr"]))
            assert names, panel["title"]
            assert '{run=~"$run"}' in target["expr"], panel["title"]
            asked |= names
    assert asked == exported
    for variable in dashboard["templating"]["list"]:
        assert set(re.findall(r"\bray_\w+", variable["query"])) <= exported


def test_the_dashboard_has_what_grafana_needs_and_no_panel_over_another() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["uid"]
    assert dashboard["title"]
    assert dashboard["schemaVersion"] >= 36
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) == variables
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells
        assert {target["refId"] for target in panel["targets"]} == {"A"}
