"""Leases that are lost: their holder stops, and writes over nobody."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import s3_options
from s3_server import FaultyNetwork

from dcq_ray.errors import RunBusyError, StaleRunError, StorageError
from dcq_ray.storage import Store, hold_boundary, hold_run, leases, open_store


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 0.1)
    monkeypatch.setattr(leases, "RETRY_SECONDS", 0.1)


@pytest.fixture
def store(s3_uri: str) -> Store:
    return open_store(s3_uri)


@pytest.fixture
def faulty(s3_uri: str, faulty_network: FaultyNetwork) -> Store:
    return open_store(f"{s3_uri.partition('?')[0]}?{s3_options(faulty_network.port)}")


def another_holder(store: Store) -> dict[str, Any]:
    """Make somebody else the holder, as one that took over an expired lease does; what stands in the file then."""
    lease: dict[str, Any] = json.loads(store.read_bytes("lease.json"))
    lease.update(epoch=lease["epoch"] + 1, owner="the next one", token="other", expires_at=time.time() + 60)
    store.write_bytes("lease.json", json.dumps(lease).encode())
    return lease


def work_until_stopped() -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        # Also a wait is ended.
        time.sleep(30)
    raise AssertionError("nobody stopped it")


def wait_for_the_loss() -> None:
    next(thread for thread in threading.enumerate() if thread.name.startswith("renew")).join(30)


def hold_while(store: Store, *steps: Callable[[], object]) -> None:
    with hold_run(store, owner="first"):
        for step in steps:
            step()


def test_a_driver_whose_lease_was_taken_over_stops_and_leaves_the_new_ones_alone(store: Store) -> None:
    with pytest.raises(RunBusyError, match="taken over by the next one") as raised:
        hold_while(store, lambda: another_holder(store), work_until_stopped)
    assert raised.value.exit_code == 75
    assert json.loads(store.read_bytes("lease.json"))["token"] == "other"


def test_a_driver_that_cannot_renew_in_time_stops_before_another_may_take_over(
    faulty: Store, faulty_network: FaultyNetwork, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 5.0)
    monkeypatch.setattr(leases, "TRY_SECONDS", 2.0)

    def cut_off() -> None:
        faulty_network.decide = lambda number, method, path: "drop"

    with pytest.raises(RunBusyError, match="could not be renewed in time"):
        hold_while(faulty, cut_off, work_until_stopped)
    ended_at = time.time()
    faulty_network.decide = lambda number, method, path: None
    assert ended_at < json.loads(store.read_bytes("lease.json"))["expires_at"]


def test_what_fails_because_another_driver_took_over_is_told_as_that(store: Store) -> None:
    def fail() -> None:
        raise StorageError("a worker wrote nothing")

    def outside_the_main_thread() -> None:
        with pytest.raises(RunBusyError, match="taken over by the next one") as raised:
            hold_while(store, lambda: another_holder(store), wait_for_the_loss, fail)
        assert isinstance(raised.value.__cause__, StorageError)
        done.set()

    done = threading.Event()
    thread = threading.Thread(target=outside_the_main_thread)
    thread.start()
    thread.join(60)
    assert done.is_set()


def test_a_worker_that_notices_the_loss_first_tells_it_as_its_driver_would(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 60.0)

    def refuse() -> None:
        raise StaleRunError("a newer driver has taken over")

    with pytest.raises(RunBusyError, match="taken over by the next one"):
        hold_while(store, lambda: another_holder(store), refuse)
    assert json.loads(store.read_bytes("lease.json"))["token"] == "other"


def test_no_renewal_is_begun_that_might_end_after_the_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "TRY_SECONDS", leases.EXPIRY_SECONDS + 1)
    contents: list[bytes] = []
    with pytest.raises(RunBusyError, match="could not be renewed in time"):
        hold_while(store, lambda: contents.append(store.read_bytes("lease.json")), work_until_stopped)
    assert contents == [store.read_bytes("lease.json")]


def test_in_another_thread_the_block_goes_on_and_the_loss_is_told_at_its_end(store: Store) -> None:
    told: list[Exception] = []
    went_on = threading.Event()

    def hold() -> None:
        try:
            hold_while(store, lambda: another_holder(store), wait_for_the_loss, went_on.set)
        except RunBusyError as error:
            told.append(error)

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join(60)
    assert went_on.is_set()
    assert len(told) == 1


def test_the_loss_of_a_boundary_does_no_harm(store: Store) -> None:
    with hold_boundary(store):
        lease = json.loads(store.read_bytes(".lock"))
        store.write_bytes(".lock", json.dumps({**lease, "token": "other", "owner": "the next one"}).encode())
        wait_for_the_loss()
    assert json.loads(store.read_bytes(".lock"))["owner"] == "the next one"
