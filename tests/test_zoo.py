"""torchvision's classifiers from end to end, and its other models refused; `benchmarks/zoo.py` has the run and its checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import zoo

pytestmark = pytest.mark.slow

# One of every way to build a network: fire modules, shuffles, gates, branches with auxiliary heads, dense joins, groups.
SAMPLE = (
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "regnet_y_400mf",
    "efficientnet_b0",
    "googlenet",
    "densenet121",
)
# Legal cuts by name: fewer would mean that a graph got worse.
LEGAL_CUTS = {"squeezenet1_1": 33, "mobilenet_v3_small": 58, "googlenet": 25, "densenet121": 24, "efficientnet_b0": 78}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_zoo_runs_from_end_to_end(name: str, tmp_path: Path) -> None:
    # Every other one in 2 sections with 2-bit weights, the rest in 5 with 4-bit activations too.
    row, _ = run_row(name, (zoo.SECTION_COUNTS[SAMPLE.index(name) % 2],), tmp_path)
    assert row["reason"] is None
    assert row["front_end"] == "torch.fx"
    assert row["legal_cuts"] == LEGAL_CUTS.get(name, row["legal_cuts"])


def run_row(name: str, counts: tuple[int, ...], folder: Path) -> tuple[dict[str, Any], str]:
    """A row of the table, and the table of it alone."""
    row = json.loads(json.dumps(zoo.zoo_row(name, counts, folder)))
    return row, zoo.table([row])


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_sections", zoo.SECTION_COUNTS)
@pytest.mark.parametrize("name", zoo.classifiers())
def test_the_whole_zoo_runs_from_end_to_end(name: str, num_sections: int, tmp_path: Path) -> None:
    plan = zoo.run_and_check(name, num_sections, tmp_path)
    assert len(plan.sections) == num_sections


def test_the_zoo_has_eighty_classifiers_or_more() -> None:
    assert len(zoo.classifiers()) >= 80
    assert len(zoo.others()) >= 29


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ssdlite320_mobilenet_v3_large", "returns a list of 3 (dict), expected one tensor of logits (batch, classes)"),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "returns a list of 3 (dict), expected one tensor of logits"),
        ("lraspp_mobilenet_v3_large", "returns a dict (out), expected one tensor of logits (batch, classes)"),
        ("raft_small", "takes 2 inputs (image1, image2), expected one batch of images"),
        ("r3d_18", "is a network for clips: its stem.0 is three-dimensional and wants (batch, channels, frames, "),
    ],
)
def test_models_that_are_no_classifiers_of_images_are_refused_with_the_reason(name: str, told: str) -> None:
    message = zoo.told_of(name)
    assert message.startswith("PartitionError: the teacher ")
    assert told in message


@pytest.mark.nightly
@pytest.mark.parametrize("name", zoo.others())
def test_all_other_models_are_refused_with_a_reason(name: str) -> None:
    reasons = {
        "detection": "returns a list of 3 (dict), expected one tensor of logits",
        "segmentation": "returns a dict (",
        "optical_flow": "takes 2 inputs (image1, image2)",
        "video": "is a network for clips: its ",
    }
    assert reasons[zoo.others()[name]] in zoo.told_of(name)


def test_a_failure_is_a_row_with_its_reason_and_counts_against_the_zoo(tmp_path: Path) -> None:
    row, table = run_row("squeezenet1_1", (2, 1000), tmp_path)
    assert row["sections"] == [2]
    assert row["reason"].startswith(
        "PartitionError: sections.count: got 1000, but the teacher can be cut into at most "
    )
    assert table.splitlines()[-1].startswith("passed 0 of 1 in ")
