"""The deploy check in words."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dcq_ray.records.deploy import DeployReport, Latency
from dcq_ray.report.deploy import DEPLOY_COLUMNS, deploy_caption, deploy_rows, deploy_verdict, print_deploy


def deploy(*seconds: tuple[float, float, float]) -> DeployReport:
    return DeployReport(
        student_sha256="0" * 64,
        student_num_bytes=2048,
        teacher_num_bytes=20480,
        student_weight_num_bytes=1024,
        teacher_weight_num_bytes=16384,
        latencies=tuple(
            Latency(batch_size=size, num_runs=15, student_seconds=a, unpacked_seconds=b, teacher_seconds=c)
            for size, (a, b, c) in zip((1, 32), seconds, strict=False)
        ),
        num_threads=1,
        processor="[a processor]",
        runtime="ONNX Runtime 1",
    )


def test_rows_have_bytes_and_milliseconds() -> None:
    rows = deploy_rows(deploy((0.004, 0.001, 0.001)))
    assert rows == [
        ("ONNX file", "2.0 KiB", "-", "20.0 KiB"),
        ("weights in the graph", "1.0 KiB", "-", "16.0 KiB"),
        ("batch of 1", "4.00 ms", "1.00 ms", "1.00 ms"),
    ]
    assert {len(row) for row in rows} == {len(DEPLOY_COLUMNS)}


@pytest.mark.parametrize(
    ("seconds", "packed", "unpacked", "size_alone"),
    [
        ((0.004, 0.001, 0.001), "4.00 times slower", "as fast", True),
        ((0.00105, 0.00095, 0.001), "as fast", "as fast", True),
        ((0.0005, 0.002, 0.001), "2.00 times faster", "2.00 times slower", False),
    ],
)
def test_the_verdict_is_honest(
    seconds: tuple[float, float, float], packed: str, unpacked: str, size_alone: bool
) -> None:
    told = deploy_verdict(deploy(seconds))
    assert "10.0 times smaller" in told
    assert f"On this processor it is {packed} at a batch of 1; unpacked" in told
    assert f"weights as floats in memory) {unpacked} at a batch of 1." in told
    assert told.endswith("What is gained here is size, not speed.") is size_alone


def test_how_it_was_measured_is_stated() -> None:
    told = deploy_caption(deploy((0.004, 0.001, 0.001), (0.1, 0.1, 0.1)))
    assert "1 thread, [a processor]; medians of 15, 15 runs in turns" in told


def test_a_processors_name_is_no_markup() -> None:
    stream = io.StringIO()
    print_deploy(deploy((0.004, 0.001, 0.001)), Console(file=stream, width=200))
    assert "[a processor]" in stream.getvalue()
