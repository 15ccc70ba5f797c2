"""Shards: bit-exact, in order, and never trusted when damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import s3_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from s3_server import FaultyNetwork

from dcq_ray import shards
from dcq_ray.errors import ShardError, StorageError
from dcq_ray.records import ShardManifest, seal_json
from dcq_ray.shards import (
    check_storable,
    commit_manifest,
    finished_shards,
    load_manifest,
    open_boundary,
    sample_order,
    samples_per_shard,
    write_shard,
)
from dcq_ray.storage import Store, open_store, retries

DIGEST = "d" * 64


def write_boundary(
    store: Store, array: NDArray[Any], *, size: int = 4, dtype: str = "float32", compression: str = "none"
) -> ShardManifest:
    shards = [
        write_shard(
            store, index=index, array=array[start : start + size], dtype=dtype, compression=compression, digest=DIGEST
        )
        for index, start in enumerate(range(0, len(array), size))
    ]
    manifest = ShardManifest(
        digest=DIGEST,
        cut="conv1",
        shape=array.shape[1:],
        dtype=dtype,
        compression=compression,
        num_samples=len(array),
        samples_per_shard=size,
        shards=tuple(shards),
    )
    commit_manifest(store, manifest)
    return manifest


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_samples=st.integers(1, 11),
    shape=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    dtype=st.sampled_from(["float16", "float32"]),
    compression=st.sampled_from(["none", "zstd"]),
    data=st.data(),
)
def test_what_is_written_is_read_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    num_samples: int,
    shape: tuple[int, ...],
    dtype: str,
    compression: str,
    data: st.DataObject,
) -> None:
    store = open_store(str(tmp_path_factory.mktemp("boundary")))
    array = np.random.default_rng(num_samples).normal(size=(num_samples, *shape)).astype(np.float32)
    written = write_boundary(store, array, dtype=dtype, compression=compression)
    manifest = load_manifest(store, digest=DIGEST)
    assert manifest == written
    positions = np.array(data.draw(st.lists(st.integers(0, num_samples - 1), max_size=20)), np.int64)
    with open_boundary(store, manifest) as reader:
        rows = reader.read(positions)
    assert rows.dtype == np.dtype(dtype)
    assert np.array_equal(rows, array.astype(dtype)[positions])
    rows += 1  # fresh and writable


def test_an_array_in_another_layout_is_stored_rightly(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    array = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    assert not array.flags.c_contiguous
    with open_boundary(store, write_boundary(store, array)) as reader:
        assert np.array_equal(reader.read(np.arange(4)), array)


def test_the_same_array_gives_the_same_bytes(tmp_path: Path) -> None:
    array = np.ones((4, 2), np.float32)
    one, other = (write_boundary(open_store(str(tmp_path / name)), array) for name in "ab")
    assert one == other


def test_sidecars_let_a_dump_go_on_and_disappear_with_the_manifest(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = write_shard(
        store, index=0, array=np.ones((2, 2), np.float32), dtype="float32", compression="none", digest=DIGEST
    )
    write_shard(store, index=1, array=np.ones((2, 2), np.float32), dtype="float32", compression="none", digest=DIGEST)
    (tmp_path / "shard-00001.arrow").write_bytes(b"short")
    assert finished_shards(store) == {0: first}
    assert load_manifest(store, digest=DIGEST) is None
    write_boundary(store, np.ones((4, 2), np.float32))
    assert finished_shards(store) == {}


@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_shard_is_noticed_and_named(tmp_path: Path, place: float, damage: str) -> None:
    store = open_store(str(tmp_path))
    manifest = write_boundary(store, np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32))
    path = tmp_path / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    at = int(place * (len(content) - 1))
    if damage == "flip":
        content[at] ^= 0x10
        path.write_bytes(content)
    else:
        path.write_bytes(content[:at])

    def read() -> None:
        load_manifest(store, digest=DIGEST)
        open_boundary(store, manifest)

    with pytest.raises(ShardError, match=r"shard-00001\.arrow"):
        read()


@pytest.mark.parametrize("place", [0.05, 0.3, 0.5, 0.8])
def test_a_damaged_manifest_is_noticed(tmp_path: Path, place: float) -> None:
    store = open_store(str(tmp_path))
    write_boundary(store, np.ones((8, 5), np.float32))
    path = tmp_path / "manifest.json"
    text = path.read_text()
    at = next(index for index in range(int(place * len(text)), len(text)) if text[index].isalnum())
    path.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])
    with pytest.raises(ShardError, match=r"manifest\.json"):
        load_manifest(store, digest=DIGEST)


def test_swapped_missing_and_foreign_shards_are_noticed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest = write_boundary(store, np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32))
    with pytest.raises(ShardError, match="expected eeee"):
        load_manifest(store, digest="e" * 64)
    one, other = tmp_path / "shard-00000.arrow", tmp_path / "shard-00001.arrow"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(ShardError, match=r"shard-00000\.arrow"):
        open_boundary(store, manifest)
    with pytest.raises(ShardError, match="another boundary, or of another place"):
        open_boundary(store, manifest, verify=False)
    other.unlink()
    with pytest.raises(ShardError, match="is missing"):
        load_manifest(store, digest=DIGEST)


def test_values_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))

    def write(values: list[float], dtype: str) -> None:
        array = np.array(values, np.float32).reshape(-1, 1)
        write_shard(store, index=0, array=array, dtype=dtype, compression="none", digest=DIGEST)

    with pytest.raises(ShardError, match="magnitude 70000 does not fit float16"):
        write([1, -70000], "float16")
    with pytest.raises(ShardError, match=r"2 of 3 samples .* first is sample 1"):
        write([1, float("nan"), float("inf")], "float32")
    with pytest.raises(ShardError, match="at least one sample"):
        write([], "float32")
    write([70000], "float32")


@pytest.mark.parametrize(
    ("values", "dtype", "told"),
    [
        ([1.0, float("nan"), 2.0], "float32", "1 of 3 samples .* first is sample 41 "),
        ([1.0, 2.0, float("-inf")], "float16", "1 of 3 samples .* first is sample 42 "),
        ([1.0, -65504.0, 65519.0], "float16", "magnitude 65519 does not fit float16"),
    ],
)
def test_a_part_of_a_shard_is_checked_before_it_is_converted(values: list[float], dtype: str, told: str) -> None:
    array = np.array(values, np.float32).reshape(-1, 1)
    with pytest.raises(ShardError, match=f"^here: .*{told}"):
        check_storable(array, dtype, "here", first_sample=40)
    check_storable(array[:1], dtype, "here")
    check_storable(np.array([[65504.0, -65504.0]], np.float32), dtype, "here")


def test_a_converted_array_is_written_as_one_that_is_converted_there(tmp_path: Path) -> None:
    # Subnormal, ordinary and large numbers, and ties.
    array = np.outer(np.array([1e-8, 3e-6, 0.1, 1.0, 30000.0], np.float32), [1.0, 1.00048828125, 1.00146484375, -2.0])
    converted = torch.from_numpy(array).float().to(torch.float16).numpy()
    infos = [
        write_shard(
            open_store(str(tmp_path / name)), index=0, array=rows, dtype="float16", compression="none", digest=DIGEST
        )
        for name, rows in (("there", array.astype(np.float32)), ("before", converted))
    ]
    assert infos[0] == infos[1]


@pytest.mark.parametrize("row", [(3,), (1024,), (2048,), (5, 7, 31)])
@pytest.mark.parametrize("positions", [[4], [9, 0, 9], [3, 2, 1, 0], [11, 0, 5, 4, 8, 3, 7], list(range(12))])
def test_rows_of_any_size_from_one_shard_or_many_are_those_at_their_positions(
    tmp_path: Path, row: tuple[int, ...], positions: list[int]
) -> None:
    array = np.random.default_rng(0).normal(size=(12, *row)).astype(np.float32)
    store = open_store(str(tmp_path))
    with open_boundary(store, write_boundary(store, array, size=4)) as reader:
        found = reader.read(np.array(positions))
    np.testing.assert_array_equal(found, array[positions])
    assert found.flags.writeable


def test_positions_outside_are_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with open_boundary(store, write_boundary(store, np.ones((5, 2), np.float32))) as reader:
        for positions in ([-1], [5]):
            with pytest.raises(IndexError):
                reader.read(np.array(positions))


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("max_bytes", ["", "0", "1500"])
def test_a_boundary_elsewhere_is_read_through_copies_and_without_them(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, max_bytes: str
) -> None:
    monkeypatch.setenv("DCQ_LOCAL_CACHE", str(tmp_path / "copies"))
    monkeypatch.setenv("DCQ_LOCAL_CACHE_BYTES", max_bytes)
    # Fewer than the shards, so that some are opened again.
    monkeypatch.setattr(shards, "MAX_OPEN_REMOTE_SHARDS", 2)
    store = open_store(s3_uri)
    array = np.random.default_rng(0).normal(size=(19, 5)).astype(np.float32)
    written = write_boundary(store, array, compression=compression)
    manifest = load_manifest(store, digest=DIGEST)
    assert manifest == written
    order = np.random.default_rng(1).permutation(19)
    with open_boundary(store, manifest) as reader:
        rows = reader.read(order)
        assert np.array_equal(rows, array[order])
        rows += 1
        assert np.array_equal(reader.read(order[::-1]), array[order[::-1]])
    kept = [path for path in (tmp_path / "copies").glob("*") if len(path.name) == 64]
    assert len(kept) == {"": 5, "0": 0, "1500": 1500 // max(shard.num_bytes for shard in written.shards)}[max_bytes]


def test_a_damaged_shard_elsewhere_is_told_from_a_network_that_fails(
    s3_uri: str, faulty_network: FaultyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "MAX_TRIES", 1)
    store = open_store(s3_uri)
    manifest = write_boundary(store, np.random.default_rng(7).normal(size=(8, 5)).astype(np.float32))
    faulty_network.decide = lambda number, method, path: "refuse" if "shard-00001.arrow" in path else None
    with pytest.raises(StorageError, match=r"shard-00001\.arrow.*cannot read: .*503") as caught:
        open_boundary(open_store(f"{s3_uri.partition('?')[0]}?{s3_options(faulty_network.port)}"), manifest)
    # Nobody may take the boundary for damaged because of that.
    assert not isinstance(caught.value, ShardError)
    store.write_bytes("shard-00001.arrow", bytes(manifest.shards[1].num_bytes))
    with pytest.raises(ShardError, match=r"shard-00001\.arrow.*sha256 differs"):
        open_boundary(store, manifest)
    store.delete("shard-00001.arrow")
    with pytest.raises(ShardError, match=r"shard-00001\.arrow.*is missing"):
        open_boundary(store, manifest)


def test_shards_hold_whole_batches() -> None:
    assert [samples_per_shard(size) for size in (1, 100, 128, 1024, 3000)] == [1024, 1000, 1024, 1024, 3000]


@given(num_samples=st.integers(0, 300), window=st.integers(1, 100), seed=st.integers(0, 2**40))
def test_order_is_a_permutation_that_keeps_windows(num_samples: int, window: int, seed: int) -> None:
    order = sample_order(num_samples, window=window, seed=seed, section=1, epoch=2)
    assert sorted(order) == list(range(num_samples))
    assert (np.diff(order // window) >= 0).all()


def test_order_depends_on_seed_section_and_epoch_and_never_changes() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    orders = {tuple(sample_order(50, window=50, seed=a, section=b, epoch=c)) for a, b, c in keys}
    assert len(orders) == 4
    assert sample_order(8, window=4, seed=1, section=2, epoch=3).tolist() == GOLDEN


GOLDEN = [2, 1, 3, 0, 7, 6, 4, 5]


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "nan"}, {"dtype": "../../outside"}, {"dtype": "int8"}, {"shards": ()}, {"num_samples": 9}],
    ids=["no dtype", "a path", "another dtype", "no shards", "another number"],
)
def test_a_sealed_manifest_that_nobody_here_wrote_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    store = open_store(str(tmp_path))
    manifest = write_boundary(store, np.ones((8, 3), np.float32))
    store.write_bytes("manifest.json", seal_json(replace(manifest, **changes)))
    with pytest.raises(ShardError, match=r"manifest\.json: it has \d shards of "):
        load_manifest(store, digest=DIGEST)


def test_a_shard_of_another_shape_or_column_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest = write_boundary(store, np.ones((8, 3), np.float32))
    with pytest.raises(ShardError, match=r"its samples have 3 numbers, expected the shape \[4\]"):
        open_boundary(store, replace(manifest, shape=(4,)))
