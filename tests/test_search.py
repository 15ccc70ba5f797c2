"""A search from end to end on real digits: what it finds is a run like any other, and nothing is trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from dcq_ray.cli import cli
from dcq_ray.cli.search import parse_budget
from dcq_ray.errors import UsageError
from dcq_ray.phases import reduce
from dcq_ray.records import RunContext
from dcq_ray.search import Option, parse_option

OPTIONS = ("dorefa-1", "dorefa-2", "dorefa-4")


@pytest.fixture
def job_file(job_document: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_document))
    return path


def search(job_file: Path, *arguments: str) -> Any:
    command = ["search", str(job_file), "--address", "none", "--options", "1,2,4", *arguments]
    return CliRunner().invoke(cli, command, catch_exceptions=False, standalone_mode=False)


def attempts(run: Path) -> list[str]:
    return [json.loads(path.read_text())["attempt"] for path in sorted(run.glob("sections/*/result.json"))]


def modified(root: Path, pattern: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(root.glob(pattern))}


@pytest.mark.slow
def test_a_search_combines_what_is_trained_and_another_budget_trains_nothing(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, merged = tmp_path / "run", []

    def merge(context: RunContext, *arguments: Any, **named: Any) -> Any:
        merged.append(Path(context.run_dir))
        return real_merge(context, *arguments, **named)

    real_merge = reduce.merge
    # Of runs; the search's own merges are not among them.
    monkeypatch.setattr(reduce, "merge", merge)
    search(job_file, "--budget", "dorefa:2")
    library = {name: run / "library" / name for name in OPTIONS}
    found = json.loads((run / "search.json").read_text())
    report = json.loads((run / "report.json").read_text())

    # The network is within the budget and at least as good on held-out images as the uniform one of that size.
    uniform = {candidate["options"][0]: candidate for candidate in found["uniform"]}
    assert set(uniform) == set(OPTIONS)
    assert found["budget_bytes"] == uniform["dorefa-2"]["num_bytes"]
    chosen = found["chosen"]
    assert chosen["num_bytes"] <= found["budget_bytes"]
    assert chosen["score"] >= uniform["dorefa-2"]["score"]
    within = [candidate for candidate in found["front"] if candidate["num_bytes"] <= found["budget_bytes"]]
    assert chosen["score"] >= max(candidate["score"] for candidate in within)
    assert len(within) < found["num_looked_at"] <= 4 + len(within) + len(uniform)
    # It became the run of the run directory: the very attempts of the library, nothing trained again.
    assert report["status"] == "succeeded"
    assert report["student"]["num_bytes_packed"] == chosen["num_bytes"]
    assert attempts(run) == [attempts(library[name])[index] for index, name in enumerate(chosen["options"])]
    assert report["validation"]["top1"] == pytest.approx(chosen["score"])
    bits = {"dorefa-1": 1, "dorefa-2": 2, "dorefa-4": 4}
    assert [section["bits"] for section in report["sections"]] == [bits[name] for name in chosen["options"]]
    assert (run / "search.svg").read_text().startswith("<svg")
    # The report shows the front, in a terminal and on its page.
    shown = CliRunner().invoke(cli, ["report", str(run)], catch_exceptions=False)
    assert f"{chosen['num_bytes']:,}" in shown.stdout
    page = (run / "report.html").read_text()
    assert "<h2>Search</h2>" in page
    assert f"within {found['budget_bytes']:,} bytes" in page
    # Test images are for what was chosen: members never see them, and the untrained student is left out.
    assert report["student"]["top1"] > 0.5
    assert report["teacher"]["top1"] > 0.5
    assert report["untrained_top1"] is None
    for name in OPTIONS:
        member = json.loads((library[name] / "report.json").read_text())
        assert (member["student"]["top1"], member["teacher"]["top1"], member["untrained_top1"]) == (None, None, None)
    # Uniform networks score as their own runs say, and take as many bytes.
    for name, candidate in uniform.items():
        own = json.loads((library[name] / "report.json").read_text())
        assert candidate["num_bytes"] == own["student"]["num_bytes_packed"]
        assert candidate["score"] == pytest.approx(own["validation"]["top1"])
    # Less predicted divergence goes with more bytes all along the front.
    sizes = [candidate["num_bytes"] for candidate in found["front"]]
    costs = [candidate["predicted_divergence"] for candidate in found["front"]]
    assert sizes == sorted(sizes)
    assert costs == sorted(costs, reverse=True)

    trained = modified(run, "library/*/sections/*/*/weights.safetensors")
    scores = modified(run, "library/combinations/*.json")
    assert len(trained) == 3 * len(attempts(run))
    search(job_file, "--max-drop", "2")
    assert modified(run, "library/*/sections/*/*/weights.safetensors") == trained
    assert scores.items() <= modified(run, "library/combinations/*.json").items()
    again = json.loads((run / "search.json").read_text())
    chosen_report = (run / "report.json").read_text()
    teacher = json.loads((run / "report.json").read_text())["validation"]["teacher_top1"]
    assert again["chosen"]["score"] >= teacher - 0.02

    # What was chosen is merged once, for its score; a run that finds no merge makes the very same student.
    assert merged == [run / "library" / name for name in OPTIONS]
    for path in (*run.glob("library/combinations/*/*"), *run.glob("merged.*"), run / "student.safetensors"):
        path.unlink()
    search(job_file, "--max-drop", "2")
    assert merged[len(OPTIONS) :] == [run]
    anew = json.loads((run / "report.json").read_text())
    assert anew["student"] == json.loads(chosen_report)["student"]
    assert anew["merge_steps"] == json.loads(chosen_report)["merge_steps"]

    # The network is exported as any run's is, in as many bytes as were told, a header aside.
    file = tmp_path / "student.dcq"
    CliRunner().invoke(
        cli, ["export", str(run), "--format", "packed", "-o", str(file)], catch_exceptions=False, standalone_mode=False
    )
    assert 0 < file.stat().st_size - again["chosen"]["num_bytes"] < 4096

    # Another run shares the library, and extends it: what is new is trained, nothing else.
    other = tmp_path / "other"
    shared = ("--run-dir", str(other), "--library", str(run / "library"), "--options", "1,2,4,twn:2/section:1=lsq:3")
    search(job_file, "--budget", "twn:2/section:1=lsq:3", *shared)
    with_more = modified(run, "library/*/sections/*/*/weights.safetensors")
    assert trained.items() <= with_more.items()
    assert len(with_more) == 4 * len(attempts(run))
    assert not (other / "library").exists()
    found = json.loads((other / "search.json").read_text())
    assert {candidate["options"][0] for candidate in found["uniform"]} == {*OPTIONS, "twn-2-section-1-lsq-3"}
    plan = json.loads((run / "library" / "twn-2-section-1-lsq-3" / "plan.json").read_text())
    schemes = [(layer["scheme"], layer["bits"]) for section in plan["sections"] for layer in section["layers"]]
    assert schemes == [("twn", 2), ("lsq", 3), *[("twn", 2)] * (len(schemes) - 2)]
    assert (
        json.loads((other / "report.json").read_text())["student"]["num_bytes_packed"] == found["chosen"]["num_bytes"]
    )

    with pytest.raises(UsageError, match=r"smallest combination of this library takes [\d,]+ bytes"):
        search(job_file, "--budget", "10")


def test_wrong_arguments_are_told_before_anything_is_trained(job_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="either --budget BYTES or --max-drop PTS"):
        search(job_file)
    with pytest.raises(UsageError, match="either --budget BYTES or --max-drop PTS"):
        search(job_file, "--budget", "10kB", "--max-drop", "1")
    with pytest.raises(UsageError, match="a section depends on those before it"):
        search(job_file, "--budget", "10kB", "--set", "train.inputs=student")
    with pytest.raises(UsageError, match="one of the options: dorefa:1, dorefa:2, dorefa:4"):
        search(job_file, "--budget", "many")
    with pytest.raises(UsageError, match="one of the options: dorefa:1, dorefa:2, dorefa:4"):
        search(job_file, "--budget", "dorefa:3")
    with pytest.raises(UsageError, match="one folder of the library"):
        search(job_file, "--budget", "10kB", "--options", "2/a*=3,2/a=3")
    with pytest.raises(click.BadParameter, match="not in the range x>=0"):
        search(job_file, "--max-drop", "-1")
    assert not (tmp_path / "run").exists()


def test_options_and_budgets_are_read() -> None:
    assert parse_option("2", "lsq") == Option(scheme="lsq", bits=2)
    assert parse_option(" twn:2", "lsq") == Option(scheme="twn", bits=2)
    mixed = Option(scheme="twn", bits=2, exceptions=(("*.conv1", "lsq", 3), ("section:4", "dorefa", 1)))
    assert parse_option("twn:2/*.conv1=3/section:4=dorefa:1", "lsq") == mixed
    assert parse_option(mixed.text, "dorefa") == mixed
    assert mixed.name == "twn-2-conv1-lsq-3-section-4-dorefa-1"
    for text in ("twn:2/*.conv1", "twn:2/", "twn:2/=lsq:3"):
        with pytest.raises(UsageError, match="expected PATTERN=SCHEME:BITS"):
            parse_option(text, "dorefa")
    for text in ("two", "9", "twn:", "", "twn:2/*.conv1=lsq"):
        with pytest.raises(UsageError, match="expected bits from 1 to 8"):
            parse_option(text, "dorefa")
    sizes = {Option(scheme="twn", bits=2): 777}
    assert [parse_budget(text, sizes, "dorefa") for text in ("60000", "60kB", "1.5MiB", "60_000 B", "twn:2")] == [
        60000,
        60000,
        1572864,
        60000,
        777,
    ]
    for text in ("many", "lsq:2", "-3", "3 parsecs"):
        with pytest.raises(UsageError, match="one of the options: twn:2"):
            parse_budget(text, sizes, "dorefa")
