"""Arrow shards: a boundary's activations as checksummed IPC files with a manifest; speaks numpy, knows no tensors.

A shard is one IPC *file* with one fixed-shape-tensor column, so an uncompressed one is read from its memory map without a
copy. Arrow notices a truncated file but not a flipped byte: every shard's sha256 is in the manifest, and the manifest holds
its own. A boundary counts once `manifest.json` is there; until then each finished shard has a sidecar, `shard-NNNNN.json`,
by which an interrupted dump goes on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dcq_ray.errors import ShardError, StorageError
from dcq_ray.records import FORMAT_VERSION, ShardInfo, ShardManifest, seal_json, unseal_json
from dcq_ray.storage import Copies, Store, copied, local_copies

MAX_SAMPLES_PER_SHARD = 1024
# Of a boundary that is not on this machine: more than the shards within which training shuffles.
MAX_OPEN_REMOTE_SHARDS = 16
# From here on a loop over rows is faster than numpy's indexing, which copies each of them twice.
MIN_ROW_BYTES = 4096
MANIFEST_FILE = "manifest.json"
COLUMN = "activation"
DTYPES = ("float16", "float32")
FLOAT16_MAX = float(np.finfo(np.float16).max)

Array = NDArray[Any]


def samples_per_shard(batch_size: int) -> int:
    """Samples in a shard: the most whole batches within 1,024 samples, and at least one batch."""
    return batch_size * max(1, MAX_SAMPLES_PER_SHARD // batch_size)


def write_shard(store: Store, *, index: int, array: Array, dtype: str, compression: str, digest: str) -> ShardInfo:
    """Write one shard of a boundary, and its sidecar; the file is there whole or not at all.

    Args:
        array: [N, ...], N >= 1: float32, or in `dtype` where `check_storable` has seen it before it was converted.
        dtype: float16 or float32, as stored.
        compression: none or zstd.
        digest: of the boundary.

    Raises:
        ShardError: an activation is not finite, or too large for float16.
    """
    if array.dtype == np.float32:
        check_storable(array, dtype, store.location(shard_name(index)))
    stored = array.astype(dtype, copy=False)
    samples = np.ascontiguousarray(stored.reshape(len(stored), *(stored.shape[1:] or (1,))))
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(samples)
    metadata = {"format_version": str(FORMAT_VERSION), "digest": digest, "index": str(index)}
    schema = pa.schema([pa.field(COLUMN, column.type)], metadata=metadata)
    options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)
    name = shard_name(index)
    with store.open_output(name, num_bytes=samples.nbytes) as file:
        hashing = _HashingFile(file)
        with pa.ipc.new_file(hashing, schema, options=options) as writer:
            writer.write_batch(pa.record_batch([column], schema=schema))
    info = ShardInfo(
        index=index,
        file_name=name,
        num_samples=len(array),
        num_bytes=hashing.num_bytes,
        sha256=hashing.hexdigest(),
    )
    store.write_bytes(_sidecar_name(index), seal_json(info))
    return info


def _gather(part: Array, local: NDArray[np.int64], rows: Array, places: NDArray[np.int64]) -> None:
    """Copy the rows of a shard at `local` to `places` of the batch, each once where rows are large enough for that to pay."""
    if len(places) == len(rows):
        # All positions are inside; to clip them spares numpy a copy by which it would keep `out` whole until it knows.
        np.take(part, local, axis=0, out=rows, mode="clip")
    elif part[:1].nbytes >= MIN_ROW_BYTES:
        for place, row in zip(places, local, strict=True):
            rows[place] = part[row]
    else:
        rows[places] = part[local]


def check_storable(array: Array, dtype: str, where: str, first_sample: int = 0) -> None:
    """Refuse float32 activations [N, ...] that are not finite, or that `dtype` cannot hold.

    Args:
        where: their shard's file, as errors name it.
        first_sample: of the shard, which is the first of these.

    Raises:
        ShardError: it names the first of the samples, or the largest magnitude.
    """
    if len(array) == 0:
        raise ShardError(f"{where}: a shard needs at least one sample")
    limit = FLOAT16_MAX if dtype == "float16" else float(np.finfo(np.float32).max)
    # Both are NaN where there is one. One look at each number, since nearly always that is all there is to say.
    if array.size == 0 or (-limit <= array.min() and array.max() <= limit):
        return
    finite = np.isfinite(array)
    if not finite.all():
        rows = np.flatnonzero(~finite.reshape(len(array), -1).all(axis=1))
        raise ShardError(
            f"{where}: {len(rows)} of {len(array)} samples have activations that are not finite, the first is sample "
            f"{first_sample + rows[0]} of the shard; look for NaN in the images or the teacher's weights"
        )
    raise ShardError(
        f"{where}: an activation of magnitude {float(np.abs(array).max()):g} does not fit float16 (at most "
        f"{FLOAT16_MAX:g}); set storage.dtype: float32"
    )


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:05d}.arrow"


def finished_shards(store: Store) -> dict[int, ShardInfo]:
    """The shards that an unfinished dump has written, by index; sidecars that are damaged or lack their file do not count."""
    found = {}
    for name in store.list_names():
        if name.startswith("shard-") and name.endswith(".json"):
            with contextlib.suppress(ValueError, StorageError):
                info = unseal_json(ShardInfo, store.read_bytes(name))
                if store.size(info.file_name) == info.num_bytes and name == _sidecar_name(info.index):
                    found[info.index] = info
    return found


def commit_manifest(store: Store, manifest: ShardManifest) -> None:
    """Make a boundary's shards count, and remove the sidecars."""
    store.write_bytes(MANIFEST_FILE, seal_json(manifest))
    for shard in manifest.shards:
        store.delete(_sidecar_name(shard.index))


def load_manifest(store: Store, *, digest: str) -> ShardManifest | None:
    """The manifest of a boundary, or None where there is none.

    Raises:
        ShardError: it is damaged, of another boundary or format, or a shard is missing or has another size.
    """
    content = store.read_bytes_or_none(MANIFEST_FILE)
    if content is None:
        return None
    where = store.location(MANIFEST_FILE)
    try:
        manifest = unseal_json(ShardManifest, content)
    except ValueError as error:
        raise _damaged(where, f"it is damaged ({str(error).splitlines()[0]})") from error
    if manifest.format_version != FORMAT_VERSION or manifest.digest != digest:
        raise _damaged(
            where,
            f"it is of boundary {manifest.digest[:12]}, format {manifest.format_version}; expected {digest[:12]}, "
            f"format {FORMAT_VERSION}",
        )
    counts = [shard.num_samples for shard in manifest.shards]
    if manifest.dtype not in DTYPES or not counts or min(counts) < 1 or sum(counts) != manifest.num_samples:
        raise _damaged(where, f"it has {len(counts)} shards of {manifest.dtype} for {manifest.num_samples} samples")
    sizes = {file.name: file.num_bytes for file in store.tree()}
    for shard in manifest.shards:
        size = sizes.get(shard.file_name)
        if size != shard.num_bytes:
            got = "is missing" if size is None else f"has {size:,} bytes, expected {shard.num_bytes:,}"
            raise _damaged(store.location(shard.file_name), f"it {got}")
    return manifest


class BoundaryReader:
    """Rows of a boundary by position; what it gives are fresh, writable copies."""

    def __init__(self, manifest: ShardManifest, open_part: Callable[[int], Array], stack: contextlib.ExitStack) -> None:
        self._open_part = open_part
        self._stack = stack
        self._ends = np.cumsum([shard.num_samples for shard in manifest.shards])
        self.num_samples = int(self._ends[-1])
        self.shape = manifest.shape
        self.dtype = np.dtype(manifest.dtype)

    def read(self, positions: NDArray[np.int64]) -> Array:
        """The rows [B, ...] at positions [B], in the stored dtype; raises IndexError outside 0 … num_samples - 1."""
        if len(positions) and not (positions.min() >= 0 and positions.max() < self.num_samples):
            raise IndexError(
                f"positions {positions.min()} … {positions.max()} are not all within {self.num_samples} samples"
            )
        rows = np.empty((len(positions), *self.shape), self.dtype)
        owners = np.searchsorted(self._ends, positions, side="right")
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            part = self._open_part(int(owner))
            _gather(part, positions[places] - (self._ends[owner] - len(part)), rows, places)
        return rows

    def close(self) -> None:
        """Let go of the files; the reader gives nothing afterwards."""
        self._stack.close()

    def __enter__(self) -> BoundaryReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_boundary(store: Store, manifest: ShardManifest, *, verify: bool = True) -> BoundaryReader:
    """Open a boundary for reading: memory maps where the storage is local and uncompressed, else in memory.

    Of a boundary elsewhere a few shards are open at a time: maps of local copies (`storage.copies`) where there is room.

    Raises:
        ShardError: a shard is missing, damaged, or another's; it is named.
        StorageError: a shard elsewhere cannot be read now.
    """
    with contextlib.ExitStack() as stack:
        if store.local_path(MANIFEST_FILE) is not None:
            parts = [_open_shard(store, manifest, shard, stack, verify, None) for shard in manifest.shards]
            stack.callback(parts.clear)
            return BoundaryReader(manifest, parts.__getitem__, stack.pop_all())
        copies = local_copies(os.environ)

        def open_part(index: int) -> Array:
            return _open_shard(store, manifest, manifest.shards[index], stack, verify, copies)

        cached = functools.lru_cache(maxsize=MAX_OPEN_REMOTE_SHARDS)(open_part)
        stack.callback(cached.cache_clear)
        # All are looked at before anybody trains on them; from the last, so that the first are open when training begins.
        for index in reversed(range(len(manifest.shards))):
            cached(index)
        return BoundaryReader(manifest, cached, stack.pop_all())


def sample_order(num_samples: int, *, window: int, seed: int, section: int, epoch: int) -> NDArray[np.int64]:
    """The order [num_samples] in which a section sees samples in an epoch: windows in order, shuffled within each.

    A fixed function of its arguments, so that it depends neither on who trains nor on when; and since no sample comes before
    its window, training may start while the dump goes on.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, section, epoch])))
    parts = [start + generator.permutation(min(window, num_samples - start)) for start in range(0, num_samples, window)]
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def _buffer(store: Store, shard: ShardInfo, stack: contextlib.ExitStack, copies: Copies | None) -> pa.Buffer:
    """The bytes of a shard; the map of a local file is closed with the stack, that of a copy lives as long as the buffer."""
    path = store.local_path(shard.file_name)
    if path is None and copies is not None:
        path = copied(copies, store, shard.file_name, sha256=shard.sha256, num_bytes=shard.num_bytes)
        # Another process may just have removed it.
        with contextlib.suppress(FileNotFoundError):
            if path is not None:
                return pa.memory_map(str(path), "r").read_buffer()
        path = None
    if path is None:
        content = store.read_bytes_or_none(shard.file_name)
        if content is None:
            raise FileNotFoundError("it is missing")
        return pa.py_buffer(content)
    return stack.enter_context(pa.memory_map(str(path), "r")).read_buffer()


def _open_shard(
    store: Store,
    manifest: ShardManifest,
    shard: ShardInfo,
    stack: contextlib.ExitStack,
    verify: bool,
    copies: Copies | None,
) -> Array:
    where = store.location(shard.file_name)
    try:
        buffer = _buffer(store, shard, stack, copies)
        if verify and hashlib.sha256(buffer).hexdigest() != shard.sha256:
            raise _damaged(where, "its bytes are not those that were written (sha256 differs)")
        table = pa.ipc.open_file(buffer)
        metadata = table.schema.metadata or {}
        if metadata.get(b"digest") != manifest.digest.encode() or metadata.get(b"index") != str(shard.index).encode():
            raise _damaged(where, "it is a shard of another boundary, or of another place")
        if table.num_record_batches != 1:
            raise _damaged(where, f"it has {table.num_record_batches} batches of samples, expected one")
        column = table.get_batch(0).column(COLUMN)
        if not isinstance(column, pa.FixedShapeTensorArray):
            raise _damaged(where, f"its column is a {column.type}, expected tensors of one shape")
        rows: Array = column.to_numpy_ndarray()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _damaged(where, f"it cannot be read ({str(error).splitlines()[0]})") from error
    if len(rows) != shard.num_samples or rows.dtype != np.dtype(manifest.dtype):
        raise _damaged(
            where, f"it has {len(rows)} samples of {rows.dtype}, expected {shard.num_samples} of {manifest.dtype}"
        )
    if rows.size != len(rows) * math.prod(manifest.shape):
        raise _damaged(where, f"its samples have {rows[0].size} numbers, expected the shape {list(manifest.shape)}")
    return rows.reshape(len(rows), *manifest.shape)


def _damaged(where: str, what: str) -> ShardError:
    return ShardError(f"{where}: {what}; run again: what is damaged is dumped again")


def _sidecar_name(index: int) -> str:
    return f"shard-{index:05d}.json"


class _HashingFile:
    """Hashes and counts what is written through it, so that a shard is not read again for its checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        self.closed = False

    def write(self, content: Any) -> int:
        self._hash.update(content)
        size = memoryview(content).nbytes
        self.num_bytes += size
        self._file.write(content)
        return size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The file is closed by who opened it."""
        self.closed = True

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
