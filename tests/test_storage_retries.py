"""Whole operations are begun again where the network fails, within a bound, and leave no half of a file."""

from __future__ import annotations

import pytest
from conftest import s3_options
from s3_server import FaultyNetwork

from dcq_ray.errors import StorageError
from dcq_ray.storage import open_store, retries


def test_a_write_that_a_busy_server_refuses_leaves_the_older_file(
    s3_uri: str, faulty_network: FaultyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retries, "MAX_TRIES", 2)
    straight = open_store(s3_uri)
    straight.write_bytes("f", b"older")
    store = open_store(f"{s3_uri.partition('?')[0]}?{s3_options(faulty_network.port)}")
    faulty_network.decide = lambda number, method, path: "refuse" if method in ("PUT", "POST") else None
    with pytest.raises(StorageError, match=r"runs/f.*: cannot write: .*tried 2 times"):
        store.write_bytes("f", b"later")
    assert straight.read_bytes("f") == b"older"
    faulty_network.decide = lambda number, method, path: None
    store.write_bytes("f", b"later")
    assert straight.read_bytes("f") == b"later"


def test_what_lasts_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.0)
    tries: list[str] = []

    def fail(message: str) -> None:
        tries.append(message)
        raise OSError(message)

    for message, number in (("AWS Error ACCESS_DENIED", 1), ("AWS Error SLOW_DOWN", retries.MAX_TRIES)):
        tries.clear()
        with pytest.raises(OSError, match=message):
            retries.tried_again(lambda message=message: fail(message))  # type: ignore[misc]
        assert len(tries) == number
