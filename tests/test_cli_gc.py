"""`dcq-ray gc` says what it removes, and with --dry-run says the same and removes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from dcq_ray.cli import cli
from dcq_ray.errors import UsageError
from dcq_ray.storage import Store, add_use, open_store

DIGEST = "d" * 64


@pytest.fixture
def cache(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "cache"))
    store.child(DIGEST).write_bytes("shard-00000.arrow", bytes(1234))
    return store


def gc(*arguments: str) -> list[str]:
    done = CliRunner().invoke(cli, ["gc", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout.splitlines()


def test_a_dry_run_says_what_the_real_one_does(cache: Store) -> None:
    told = gc(cache.uri, "--dry-run")
    assert cache.child(DIGEST).list_names() == ["shard-00000.arrow"]
    done = gc(cache.uri)
    assert [line.replace("would remove", "removed") for line in told] == done
    assert done == [
        f"removed boundary {DIGEST}, 1,234 bytes: no run uses it",
        "removed 1 in all, 1,234 bytes",
        "kept 0 in all, 0 bytes",
    ]
    assert cache.tree() == ()


def test_what_stays_is_explained_when_asked_and_goes_when_its_run_is_forgotten(cache: Store, tmp_path: Path) -> None:
    run = open_store(str(tmp_path / "run"))
    run.write_bytes("plan.json", b"{}")
    add_use(cache.child(DIGEST), run.uri)
    assert gc(cache.uri)[0] == "removed 0 in all, 0 bytes"
    assert f"kept boundary {DIGEST}" in gc(cache.uri, "--verbose")[0]
    assert f"{run.uri} has not finished" in gc(cache.uri, "--verbose")[0]
    assert gc(cache.uri, "--forget", run.uri)[0].startswith(f"removed boundary {DIGEST}")


@pytest.mark.parametrize("age", ["1", "1d", "24h", "1440m", "0.2w"])
def test_ages_have_units(cache: Store, age: str) -> None:
    assert gc(cache.uri, "--older-than", age)[0] == "removed 0 in all, 0 bytes"


@pytest.mark.parametrize("age", ["", "soon", "-1d", "1y", "1e9"])
def test_ages_that_are_none_are_refused(cache: Store, age: str) -> None:
    with pytest.raises(UsageError, match="expected an age such as 7d"):
        CliRunner().invoke(cli, ["gc", cache.uri, "--older-than", age], catch_exceptions=False, standalone_mode=False)
    assert cache.tree() != ()


def test_a_cache_that_is_not_there_is_empty_and_said_to_be(tmp_path: Path) -> None:
    assert gc(str(tmp_path / "nothing")) == ["removed 0 in all, 0 bytes", "kept 0 in all, 0 bytes"]
    done = CliRunner().invoke(cli, ["gc", str(tmp_path / "nothing")])
    assert f"{tmp_path / 'nothing'}: there is no cache, or an empty one" in done.stderr
    assert not (tmp_path / "nothing").exists()
