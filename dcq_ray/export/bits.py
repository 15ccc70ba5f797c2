"""Codes 0 … n - 1 packed in bits: as few bits a code as their number needs, and three levels in base 3.

    2^b levels, or fewer    b bits a code; the first code in the lowest bits of the first byte
    3 levels                five codes a byte, sum of code_i 3^i: 1.6 bits a code, where two bits would take 2 and log2 3 is 1.585

The last byte is filled up with zeros.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dcq_ray.records.packing import TRITS_PER_BYTE

Codes = NDArray[np.uint8]

MAX_LEVELS = 256
_TRIT_WEIGHTS = 3 ** np.arange(TRITS_PER_BYTE, dtype=np.uint16)
# The digits of every byte; above 242 there are none.
_TRITS = (np.arange(3**TRITS_PER_BYTE, dtype=np.uint16)[:, None] // _TRIT_WEIGHTS % 3).astype(np.uint8)
# Codes are spread over whole bytes of bits, eight times as large: so many at a time. A multiple of 8, so that bytes are whole.
_CODES_AT_A_TIME = 1 << 20


def packed_size(count: int, num_levels: int) -> int:
    """Bytes that so many codes take."""
    if num_levels == 3:
        return -(-count // TRITS_PER_BYTE)
    return -(-count * _bits(num_levels) // 8)


def pack_codes(codes: Codes, num_levels: int) -> bytes:
    """Codes [N], each below `num_levels` (2 to 256), as bytes."""
    if codes.size and int(codes.max()) >= num_levels:
        raise ValueError(f"got the code {int(codes.max())}, expected 0 to {num_levels - 1}")
    if num_levels == 3:
        filled = np.zeros(packed_size(codes.size, 3) * TRITS_PER_BYTE, np.uint8)
        filled[: codes.size] = codes
        return (filled.reshape(-1, TRITS_PER_BYTE) @ _TRIT_WEIGHTS).astype(np.uint8).tobytes()
    bits = _bits(num_levels)
    parts = []
    for start in range(0, codes.size, _CODES_AT_A_TIME):
        part = codes[start : start + _CODES_AT_A_TIME, None]
        parts.append(np.packbits(np.unpackbits(part, axis=1, count=bits, bitorder="little"), bitorder="little"))
    return b"".join(part.tobytes() for part in parts)


def unpack_codes(content: bytes, num_levels: int, count: int) -> Codes:
    """The codes [count] of these bytes; raises ValueError where there are too few or too many, or one is no level's."""
    if len(content) != packed_size(count, num_levels):
        raise ValueError(f"got {len(content)} bytes, expected {packed_size(count, num_levels)} for {count} codes")
    packed = np.frombuffer(content, np.uint8)
    if num_levels == 3:
        if packed.size and int(packed.max()) >= len(_TRITS):
            raise ValueError(f"got the byte {int(packed.max())}, expected five digits to the base 3")
        return _TRITS[packed].reshape(-1)[:count]
    bits = _bits(num_levels)
    codes = np.empty(count, np.uint8)
    for start in range(0, count, _CODES_AT_A_TIME):
        size = min(_CODES_AT_A_TIME, count - start)
        part = packed[start * bits // 8 : -(-(start + size) * bits // 8)]
        spread = np.unpackbits(part, count=size * bits, bitorder="little").reshape(size, bits)
        codes[start : start + size] = np.packbits(spread, axis=1, bitorder="little")[:, 0]
    if count and int(codes.max()) >= num_levels:
        raise ValueError(f"got the code {int(codes.max())}, expected 0 to {num_levels - 1}")
    return codes


def _bits(num_levels: int) -> int:
    if not 2 <= num_levels <= MAX_LEVELS:
        raise ValueError(f"got {num_levels} levels, expected 2 to {MAX_LEVELS}")
    return (num_levels - 1).bit_length()
