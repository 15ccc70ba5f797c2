"""Codes in bits: the bytes are those written by hand, and every code comes back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcq_ray.export.bits import pack_codes, packed_size, unpack_codes


@pytest.mark.parametrize(
    ("codes", "num_levels", "expected"),
    [
        # 1 + 4 + 8 = 13 of the first eight, 1 of the ninth.
        ([1, 0, 1, 1, 0, 0, 0, 0, 1], 2, "0d01"),
        # 5 + 2 * 8 + 7 * 64 = 0x1d5, the low byte first.
        ([5, 2, 7], 8, "d501"),
        # 3 + 0 * 4 + 1 * 16 + 2 * 64.
        ([3, 0, 1, 2], 4, "93"),
        # 2 + 0 * 3 + 1 * 9 + 2 * 27 + 2 * 81 = 227, and 1.
        ([2, 0, 1, 2, 2, 1], 3, "e301"),
        ([2, 2, 2, 2, 2], 3, "f2"),
        ([9, 255], 256, "09ff"),
        # Seven levels, of WRPN at 3 bits, take the bits of eight.
        ([6, 1], 7, "0e"),
        ([], 2, ""),
    ],
)
def test_bytes_by_hand(codes: list[int], num_levels: int, expected: str) -> None:
    content = pack_codes(np.array(codes, np.uint8), num_levels)
    assert content.hex() == expected
    assert unpack_codes(content, num_levels, len(codes)).tolist() == codes


@settings(max_examples=200, deadline=None)
@given(num_levels=st.integers(2, 256), count=st.integers(0, 300), seed=st.integers(0, 2**32 - 1))
def test_every_code_comes_back_and_sizes_are_near_the_limit(num_levels: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, num_levels, count).astype(np.uint8)
    content = pack_codes(codes, num_levels)
    assert np.array_equal(unpack_codes(content, num_levels, count), codes)
    assert len(content) == packed_size(count, num_levels)
    bits = 1.6 if num_levels == 3 else math.ceil(math.log2(num_levels))
    assert count * bits / 8 <= len(content) + 1e-9
    assert len(content) < count * bits / 8 + 1


@pytest.mark.parametrize("num_levels", [2, 3, 5, 8, 256])
def test_pieces_join_without_a_seam(num_levels: int) -> None:
    codes = np.random.default_rng(0).integers(0, num_levels, (1 << 20) + 5).astype(np.uint8)
    assert np.array_equal(unpack_codes(pack_codes(codes, num_levels), num_levels, codes.size), codes)


@pytest.mark.parametrize(
    ("content", "num_levels", "count", "told"),
    [
        (b"\x00", 2, 9, "expected 2 for 9 codes"),
        (b"\x00\x00", 2, 8, "expected 1 for 8 codes"),
        (b"\xf3", 3, 5, "got the byte 243"),
        (b"\x07", 7, 1, "got the code 7, expected 0 to 6"),
        (b"\x00", 1, 8, "got 1 levels"),
        (b"\x00", 257, 1, "got 257 levels"),
    ],
)
def test_what_are_no_codes_is_refused(content: bytes, num_levels: int, count: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        unpack_codes(content, num_levels, count)


def test_a_code_beyond_the_levels_is_not_packed() -> None:
    with pytest.raises(ValueError, match="got the code 3, expected 0 to 2"):
        pack_codes(np.array([0, 3], np.uint8), 3)
