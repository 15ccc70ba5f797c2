"""The packed form of a student: one file, read by `dcq_ray.load`.

Numbers are little-endian.

    bytes 0 … 7       dcq-pack
    bytes 8 … 11      the format's version, 1
    bytes 12 … 15     h, the bytes of the header
    bytes 16 … 23     d, the bytes of the data
    bytes 24 … 55     SHA-256 of bytes 0 … 23, the header and the data
    bytes 56 …        the header, then the data; 56 + h + d bytes in all

The header is JSON in UTF-8:

    {"model": "dcq_ray:resnet20", "args": {}, "metadata": {"run": "cifar", …},
     "tensors": [{"name": "bn1.bias", "dtype": "float32", "shape": [64], "offset": 0, "num_bytes": 256},
                 {"name": "conv1.weight", …, "first": -1, "stride": 2, "num_levels": 2, "scale_dim": null, "two_sided": false}, …]}

Tensors are those of the network's state, under its own names, and the `dcq.*` ones of `quantizers/placing.py`. The data of one
begin at `offset` of the data. Without `num_levels` they are its numbers as they lie in memory. With it, they are codes
(`export/bits.py`): code c stands for the integer `first + stride * c`, and the weight is that integer times `dcq.<module>.scale`,
rounded once to its dtype; a scale for each index of `scale_dim`, or, where `two_sided`, the first of two for integers above 0 and
the second for those below. Tensors of the same bytes, as tied weights, are stored once.

All that is no quantized weight stays as it is, in float32: folded BatchNorm, or float16, would save a thirtieth of a 1-bit
ResNet-18, and its logits would no longer be those of the student.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dcq_ray.errors import ExportError
from dcq_ray.export.bits import pack_codes, packed_size, unpack_codes
from dcq_ray.export.levels import Levels, decode, encode, layer_levels
from dcq_ray.quantizers.policy import UNQUANTIZED_BITS
from dcq_ray.records import LayerPlan

MAGIC = b"dcq-pack"
VERSION = 1
_PREFIX = struct.Struct("<8sIIQ")
_BEGIN = _PREFIX.size + hashlib.sha256().digest_size
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """A tensor as the header has it."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    offset: int
    num_bytes: int
    levels: Levels | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """A whole packed file, checked, its tensors still packed."""

    model: str
    args: dict[str, Any]
    metadata: dict[str, str]
    tensors: tuple[PackedTensor, ...]
    data: bytes
    source: str


def pack(
    state: Mapping[str, Tensor],
    layers: Sequence[LayerPlan],
    *,
    model: str,
    args: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> bytes:
    """A baked student's state, with its `dcq.*` tensors, as a packed file.

    Args:
        layers: the plan of every layer; a weight of fewer than 32 bits is packed.

    Raises:
        ExportError: a weight is not at its levels.
    """
    quantized = {f"{layer.module}.weight": layer for layer in layers if layer.bits < UNQUANTIZED_BITS}
    # In order of their names, so that a student has one file whoever read its state. A weight's bits are in its levels.
    names = sorted(name for name in state if not (name.startswith("dcq.") and name.endswith(".bits")))
    offsets: dict[bytes, int] = {}
    parts: list[bytes] = []
    tensors, num_bytes = [], 0
    for name in names:
        tensor = state[name]
        levels = layer_levels(quantized[name]) if name in quantized else None
        content = _content(name, tensor, levels, state)
        digest = hashlib.sha256(content).digest()
        if digest not in offsets:
            offsets[digest] = num_bytes
            parts.append(content)
            num_bytes += len(content)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise ExportError(f"{name}: a tensor of {tensor.dtype} cannot be packed; expected {', '.join(_DTYPES)}")
        entry = {"name": name, "dtype": dtype, "shape": list(tensor.shape), "offset": offsets[digest]}
        tensors.append({**entry, "num_bytes": len(content), **({} if levels is None else asdict(levels))})
    document = {"model": model, "args": dict(args), "metadata": dict(metadata), "tensors": tensors}
    header = json.dumps(document, separators=(",", ":")).encode()
    data = b"".join(parts)
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header), len(data))
    return b"".join((prefix, hashlib.sha256(prefix + header + data).digest(), header, data))


def open_packed(content: bytes, *, source: str) -> PackedFile:
    """Check a packed file and read its header; nothing is unpacked.

    Raises:
        ExportError: it is none, of another version, truncated or damaged; `source` is in the message.
    """
    if content[: len(MAGIC)] != MAGIC:
        raise ExportError(
            f"{source}: not a packed student: got {content[: len(MAGIC)]!r} at its beginning, expected {MAGIC!r}; name a file "
            "that `dcq-ray export --format packed` wrote"
        )
    again = "export it again, or copy it again"
    if len(content) < _BEGIN:
        raise ExportError(f"{source}: truncated: got {len(content)} bytes, expected {_BEGIN} at least; {again}")
    _, version, header_bytes, data_bytes = _PREFIX.unpack_from(content)
    if version != VERSION:
        raise ExportError(
            f"{source}: a packed student of version {version}, expected version {VERSION}; read it with the dcq-ray that wrote it"
        )
    expected = _BEGIN + header_bytes + data_bytes
    if len(content) != expected:
        what = "truncated" if len(content) < expected else "damaged"
        raise ExportError(f"{source}: {what}: got {len(content):,} bytes, expected {expected:,}; {again}")
    digest = hashlib.sha256(content[: _PREFIX.size])
    digest.update(memoryview(content)[_BEGIN:])
    if digest.digest() != content[_PREFIX.size : _BEGIN]:
        raise ExportError(f"{source}: damaged: its bytes do not fit the SHA-256 that it holds; {again}")
    try:
        document = json.loads(content[_BEGIN : _BEGIN + header_bytes])
        return PackedFile(
            model=str(document["model"]),
            args=dict(document["args"]),
            metadata=dict(document["metadata"]),
            tensors=tuple(_entry(entry, data_bytes) for entry in document["tensors"]),
            data=content[_BEGIN + header_bytes :],
            source=source,
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(f"{source}: its header is malformed ({type(error).__name__}: {error}); {again}") from error


def unpack(packed: PackedFile) -> dict[str, Tensor]:
    """The tensors of a packed file by name, those of the network and the `dcq.*` ones.

    Raises:
        ExportError: a weight's scale is missing or does not fit it, or a code is none of its levels'.
    """
    state: dict[str, Tensor] = {}
    # Plain tensors first, since the scales are among them.
    for entry in sorted(packed.tensors, key=lambda entry: entry.levels is not None):
        content = packed.data[entry.offset : entry.offset + entry.num_bytes]
        try:
            state[entry.name] = _unpacked(entry, content, state)
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            raise ExportError(
                f"{packed.source}: {entry.name} cannot be unpacked ({type(error).__name__}: {error}); export it again"
            ) from error
    return state


def _content(name: str, tensor: Tensor, levels: Levels | None, state: Mapping[str, Tensor]) -> bytes:
    if levels is None:
        found: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return found
    scale = state.get(_scale_name(name))
    if scale is None:
        raise ExportError(
            f"{name}: the student has no {_scale_name(name)}; run the job again so that it is written anew"
        )
    return pack_codes(encode(tensor, scale, levels, name=name), levels.num_levels)


def _unpacked(entry: PackedTensor, content: bytes, state: Mapping[str, Tensor]) -> Tensor:
    if entry.levels is None:
        # A copy, since the bytes cannot be written to.
        return (
            torch.frombuffer(bytearray(content), dtype=entry.dtype).reshape(entry.shape)
            if content
            else (torch.empty(entry.shape, dtype=entry.dtype))
        )
    codes = unpack_codes(content, entry.levels.num_levels, entry.shape.numel())
    return decode(codes, state[_scale_name(entry.name)], entry.levels, entry.shape, entry.dtype)


def _entry(entry: Mapping[str, Any], data_bytes: int) -> PackedTensor:
    """One tensor of the header; raises ValueError where its sizes do not fit each other, or the data."""
    name, shape = str(entry["name"]), tuple(int(size) for size in entry["shape"])
    offset, num_bytes = int(entry["offset"]), int(entry["num_bytes"])
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name}: got the dtype {entry['dtype']!r}, expected {', '.join(_DTYPES)}")
    dtype, levels = _DTYPES[entry["dtype"]], None
    if "num_levels" in entry:
        levels = Levels(**{key: entry[key] for key in ("first", "stride", "num_levels", "scale_dim", "two_sided")})
    count = math.prod(shape)
    expected = count * dtype.itemsize if levels is None else packed_size(count, levels.num_levels)
    if min(shape, default=0) < 0 or offset < 0 or num_bytes != expected or offset + num_bytes > data_bytes:
        raise ValueError(
            f"{name}: got {num_bytes} bytes at {offset} of {data_bytes}, expected {expected} for the shape {shape}"
        )
    return PackedTensor(
        name=name, dtype=dtype, shape=torch.Size(shape), offset=offset, num_bytes=num_bytes, levels=levels
    )


def _scale_name(weight_name: str) -> str:
    return f"dcq.{weight_name.removesuffix('.weight')}.scale"
