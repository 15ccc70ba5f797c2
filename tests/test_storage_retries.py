"""Whole operations are begun again where the network fails, within a bound, and leave no half of a file."""

from __future__ import annotations

import os
import random
import threading

import pytest
from conftest import s3_options
from s3_server import FaultyNetwork

from dcq_ray.errors import StorageError
from dcq_ray.storage import Store, file_systems, hold_run, leases, open_store, retries


@pytest.fixture
def faulty(s3_uri: str, faulty_network: FaultyNetwork, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of `s3_uri` behind the faulty network, quick to try again."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(file_systems, "REQUEST_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(file_systems, "MAX_REQUEST_ATTEMPTS", 1)
    return open_store(f"{s3_uri.partition('?')[0]}?{s3_options(faulty_network.port)}")


@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_fails_now_and_then_changes_nothing(
    faulty: Store, faulty_network: FaultyNetwork, s3_uri: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(retries, "MAX_TRIES", 12)
    draw = random.Random(seed)
    faults = ["refuse", "drop", "cut-request", "cut-answer"]
    faulty_network.decide = lambda number, method, path: draw.choice(faults) if draw.random() < 0.3 else None
    contents = {f"folder/{index}": os.urandom(size) for index, size in enumerate([0, 1, 300, 70_000, 6 * 1024**2])}
    for name, content in contents.items():
        faulty.write_bytes(name, b"older")
        faulty.write_bytes(name, content)
    for name, content in contents.items():
        assert faulty.read_bytes(name) == content
        assert faulty.size(name) == len(content)
    assert faulty.child("folder").list_names() == [str(index) for index in range(len(contents))]
    faulty.delete("folder/0")
    with hold_run(faulty, owner="me") as epoch:
        assert epoch == 1
    assert len(faulty_network.requests) > 40
    straight = open_store(s3_uri)
    del contents["folder/0"]
    assert {name: straight.read_bytes(name) for name in contents} == contents


def test_a_network_that_says_nothing_is_given_up_and_named(
    faulty: Store, faulty_network: FaultyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "MAX_TRIES", 2)
    faulty.write_bytes("f", b"content")
    faulty_network.decide = lambda number, method, path: "hang" if method == "GET" and number < 12 else None
    with pytest.raises(StorageError, match=r"runs/f.*: cannot read: .*tried 2 times"):
        faulty.read_bytes("f")
    faulty_network.decide = lambda number, method, path: None
    assert faulty.read_bytes("f") == b"content"


@pytest.mark.parametrize("fault", ["cut-request", "drop", "refuse"])
def test_an_upload_whose_later_part_fails_leaves_the_older_file(
    faulty: Store, faulty_network: FaultyNetwork, s3_uri: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "MAX_TRIES", 2)
    faulty.write_bytes("f", b"older")
    faulty_network.decide = lambda number, method, path: fault if "partNumber=2" in path else None
    with pytest.raises(StorageError, match=r"runs/f.*: cannot write: .*tried 2 times"):
        faulty.write_bytes("f", bytes(12 * 1024**2))
    assert any("partNumber=2" in path for _, path in faulty_network.requests)
    assert open_store(s3_uri).read_bytes("f") == b"older"


def test_a_lease_that_cannot_be_read_is_not_taken_for_a_free_one(
    faulty: Store, faulty_network: FaultyNetwork, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.05)
    straight = open_store(s3_uri)
    with hold_run(straight, owner="first"):
        before = straight.read_bytes("lease.json")
        faulty_network.decide = lambda number, method, path: "refuse" if method in ("HEAD", "GET") else None
        with pytest.raises(StorageError, match=r"lease\.json.*cannot read"), hold_run(faulty, owner="second"):
            pass
        assert straight.read_bytes("lease.json") == before


def test_a_lease_outlives_a_network_that_fails_for_a_while(
    faulty: Store, faulty_network: FaultyNetwork, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(retries, "MAX_TRIES", 1)
    renewed = threading.Event()

    def decide(number: int, method: str, path: str) -> str | None:
        if number < start + 3:
            return "drop"
        if method == "PUT":
            renewed.set()
        return None

    with hold_run(faulty, owner="first"):
        start = len(faulty_network.requests)
        faulty_network.decide = decide
        assert renewed.wait(20)
        faulty_network.decide = lambda number, method, path: None
    told = [record.getMessage() for record in caplog.records]
    assert any("could not be renewed" in message for message in told)
    assert not any("taken this lease over" in message for message in told)


def test_a_bucket_that_is_not_there_is_told_at_once(s3_uri: str, s3_port: int) -> None:
    with pytest.raises(StorageError, match=r"s3://nobody/x/f.*cannot write: .*NO_SUCH_BUCKET(?!.*tried)"):
        open_store(f"s3://nobody/x?{s3_options(s3_port)}").write_bytes("f", b"1")


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
