"""A student's ONNX graph beside its teacher's: bytes counted by hand, and seconds that are there."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("onnxruntime", reason="the export extra is not installed")
from dcq_ray.export import latency  # noqa: E402


def graph(*tensors: Any) -> Any:
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=list(tensors)))


@pytest.mark.parametrize(
    ("kind", "shape", "num_bytes"),
    [
        ("FLOAT", [3, 5], 60),
        ("INT8", [3, 5], 15),
        ("INT4", [3, 5], 8),
        ("UINT4", [2, 5], 5),
        ("INT2", [3, 5], 4),
        ("INT64", [], 8),
        ("FLOAT", [0], 0),
    ],
)
def test_weights_are_counted_as_their_type_packs_them(kind: str, shape: list[int], num_bytes: int) -> None:
    number = getattr(onnx.TensorProto, kind)
    tensor = onnx.TensorProto(name="w", data_type=number, dims=shape)
    assert latency.weight_num_bytes(graph(tensor)) == num_bytes
    assert latency.weight_num_bytes(graph(tensor, tensor)) == 2 * num_bytes


def test_runs_take_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS_PER_BATCH_SIZE", 0.0)
    called: list[str] = []

    def run(name: str, seconds: float) -> latency.Run:
        def one(_: object) -> None:
            called.append(name)
            time.sleep(seconds)

        return one

    found = latency._latency((run("a", 0.02), run("b", 0.0), run("c", 0.0)), np.zeros((4, 1), np.float32))
    count = latency.NUM_WARM_UPS
    assert "".join(called[: 3 * count]) == "a" * count + "b" * count + "c" * count
    assert "".join(called[3 * count :]) == "abcbcacab" * (latency.MIN_RUNS // 3)
    assert (found.batch_size, found.num_runs) == (4, latency.MIN_RUNS)
    assert found.student_seconds >= 0.02 > found.teacher_seconds
