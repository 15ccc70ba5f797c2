"""Bytes of packed weights, by hand."""

from __future__ import annotations

import pytest

from dcq_ray.records.packing import num_scales, weight_num_bytes


@pytest.mark.parametrize(
    ("scheme", "bits", "num_bytes"),
    # 11 weights: whole bytes of bits, and of three levels five a byte, where they are three.
    [("dorefa", 1, 2), ("dorefa", 2, 3), ("lsq", 3, 5), ("twn", 2, 3), ("ttq", 2, 3), ("wrpn", 2, 3), ("wrpn", 3, 5)],
)
def test_weights_take_whole_bytes(scheme: str, bits: int, num_bytes: int) -> None:
    assert weight_num_bytes(11, scheme, bits) == num_bytes


def test_three_levels_take_a_fifth_of_a_byte() -> None:
    assert weight_num_bytes(8192, "twn", 2) == 1639
    assert weight_num_bytes(8192, "lsq", 2) == 2048


def test_scales_are_one_two_or_one_a_channel() -> None:
    assert [num_scales(scheme, 16) for scheme in ("dorefa", "ttq", "lsq-channel", "xnor")] == [1, 2, 16, 16]
