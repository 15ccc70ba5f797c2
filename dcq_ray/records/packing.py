"""How many bytes a layer's quantized weights take in a packed file (`export/packed.py`): the one rule of all sizes told."""

from __future__ import annotations

SCALE_BYTES = 4
PER_CHANNEL_SCHEMES = ("xnor", "lsq-channel")
# -1, 0 and 1, where two bits would have a level more; packed files hold five of them in a byte (3^5 = 243).
THREE_LEVELS = (("twn", 2), ("ttq", 2), ("wrpn", 2))
TRITS_PER_BYTE = 5


def weight_num_bytes(count: int, scheme: str, bits: int) -> int:
    """Bytes of so many quantized weights, scales aside."""
    return -(-count // TRITS_PER_BYTE) if (scheme, bits) in THREE_LEVELS else -(-count * bits // 8)


def num_scales(scheme: str, num_channels: int) -> int:
    """How many scales a layer with so many output channels has; ttq has one for each side of zero."""
    if scheme in PER_CHANNEL_SCHEMES:
        return num_channels
    return 2 if scheme == "ttq" else 1
