"""Cables that are pulled: what is lost, and that all is put away."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.chaos_network import BRIDGE, BRIDGE_ADDRESS, Namespace, namespaces


@pytest.fixture
def places() -> Iterator[tuple[Namespace, ...]]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(namespaces(2))
        except (OSError, RuntimeError) as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        yield made


def reachable(place: Namespace, port: int) -> bool:
    with place.inside(), contextlib.closing(socket.socket()) as client:
        client.settimeout(1.0)
        return client.connect_ex((BRIDGE_ADDRESS, port)) == 0


def test_a_pulled_cable_cuts_one_node_off_until_it_is_plugged_in(places: tuple[Namespace, ...]) -> None:
    own = socket.if_nameindex()
    with contextlib.closing(socket.create_server((BRIDGE_ADDRESS, 0))) as server:
        port = server.getsockname()[1]
        assert [reachable(place, port) for place in places] == [True, True]
        places[0].plug(False)
        assert [reachable(place, port) for place in places] == [False, True]
        places[0].plug(True)
        # A bridge takes a moment to forward again.
        assert any(reachable(places[0], port) for _ in range(60))
    # This thread is back where it was.
    assert socket.if_nameindex() == own


def test_what_was_made_is_removed() -> None:
    try:
        with namespaces(1) as (place,):
            assert Path(f"/var/run/netns/{place.name}").exists()
    except (OSError, RuntimeError) as error:
        pytest.skip(f"no network namespaces can be made here: {error}")
    assert not Path(f"/var/run/netns/{place.name}").exists()
    assert BRIDGE not in [name for _, name in socket.if_nameindex()]


def test_names_and_addresses_are_legal_and_differ() -> None:
    many = [Namespace(number=number) for number in range(100)]
    # Linux takes interface names of at most 15 characters.
    assert max(len(place.cable) for place in many) <= 15
    assert len({place.address for place in many} | {BRIDGE_ADDRESS}) == 101
