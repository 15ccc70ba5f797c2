"""Some of the fuzz benchmark's files; and that the benchmark notices what is not handled."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.fuzz import Target, fuzz, main, mutated, targets


@pytest.mark.slow
def test_mutated_files_are_taken_or_refused_but_never_crash(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    found = targets(tmp_path / "inside")
    outcomes = fuzz(found, num_files=20 * len(found), seed=7, keep=tmp_path / "unhandled")
    total = sum(outcomes.values(), Counter[str]())
    assert total["unhandled"] == 0
    assert total.total() == 20 * len(found)
    assert min(total["taken"], total["absent"], total["refused"]) > 0


def test_what_is_not_handled_is_counted_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "file"
    path.write_bytes(b"content of a file")

    def fragile() -> bytes:
        content = path.read_bytes()
        if content != b"content of a file":
            raise KeyError("a bug")
        return content

    outcomes = fuzz(
        [Target(kind="fragile", path=path, read=fragile)], num_files=30, seed=0, keep=tmp_path / "inside" / "kept"
    )
    assert outcomes["fragile"]["unhandled"] > 20
    assert "fragile, file" in capsys.readouterr().err
    kept = list((tmp_path / "inside" / "kept").iterdir())
    assert len(kept) == outcomes["fragile"]["unhandled"]
    assert path.read_bytes() == b"content of a file"

    def writes_outside() -> str:
        (tmp_path / "outside").write_text("x")
        return "done"

    outcomes = fuzz(
        [Target(kind="writer", path=path, read=writes_outside)], num_files=1, seed=0, keep=tmp_path / "inside" / "kept"
    )
    assert outcomes["writer"]["unhandled"] == 1


def test_mutations_are_many_and_the_same_for_a_seed() -> None:
    content = b'{"a": [1, 2, {"b": "text"}], "content_sha256": "0"}\n'
    first = [mutated(content, random.Random(seed)) for seed in range(200)]
    assert first == [mutated(content, random.Random(seed)) for seed in range(200)]
    assert len(set(first)) > 120
    assert sum(found != content for found in first) > 180


def test_the_exit_code_is_that_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: Path) -> list[Target]:
        return []

    monkeypatch.setattr("benchmarks.fuzz.targets", none)
    monkeypatch.setattr("benchmarks.fuzz.fuzz", lambda *_, **__: {"kind": Counter({"taken": 2})})
    assert main(["--files", "2", "--keep", str(tmp_path)]) == 0
    monkeypatch.setattr("benchmarks.fuzz.fuzz", lambda *_, **__: {"kind": Counter({"taken": 1, "unhandled": 1})})
    assert main(["--files", "2", "--keep", str(tmp_path)]) == 1
