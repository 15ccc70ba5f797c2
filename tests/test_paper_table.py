"""The batch of the paper's table: what it asks for, in which order, and what it leaves out when it is run again."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.paper_page import page
from benchmarks.paper_results import Run, read_runs, table_rows
from benchmarks.paper_table import FOLDER, Batch, Cell, Plan, cells, main, run_batch, steps, take_over, told

from dcq_ray.jobfile import job_yaml, load_job

# What a cell does, in order: the job's own rate pays for the dump, and rivals stand beside it.
ALL_STEPS = [
    *("stitched-x1", "stitched-x1-dorefa-passes", "stitched-x1-dorefa-cpu-seconds", "stitched-x0.3", "stitched-x3"),
    *("recipe-x1", "recipe-x1-dorefa-cpu-seconds", "recipe-x0.3", "recipe-x3"),
]


class FakeBatch(Batch):
    """Commands that leave at once what `dcq-ray` would leave, fail where they are told to, and are remembered."""

    def __init__(self, *, failing: Sequence[str] = (), interrupted_at: str | None = None) -> None:
        super().__init__()
        self.done: list[str] = []
        self.jobs: dict[str, Any] = {}
        self._failing, self._interrupted_at = failing, interrupted_at

    def run(self, arguments: Sequence[str]) -> tuple[int, str, str]:
        command, job_file, *rest = arguments
        overrides = [value for option, value in itertools.pairwise(rest) if option == "--set"]
        job = load_job(job_file, overrides=overrides, environment=os.environ)
        run_dir = Path(job.storage.run_dir)
        asked = dict(itertools.pairwise(rest))
        parts = [run_dir.name, asked.get("--method"), asked.get("--budget")]
        name = "teacher" if command == "teacher" else "-".join(part for part in parts if part)
        if name == self._interrupted_at:
            raise KeyboardInterrupt
        self.done.append(name)
        self.jobs[name] = job
        if name in self._failing:
            return 1, "", '{"phase": "train"}\ndcq-ray: the loss is nan\nlower the rate\n'
        if command == "teacher":
            cache = Path(job.storage.cache_dir)
            cache.mkdir(parents=True)
            (cache / "fitted").write_text("weights")
            return 0, '{"held_out_top1": 0.9}\n', ""
        report_file = run_dir / "report.json"
        report = {"status": "succeeded", "validation": {"top1": 0.5}, "baselines": []}
        if command == "baseline":
            report = json.loads(report_file.read_text())
            rival = {"method": asked["--method"], "budget": asked["--budget"], "held_out_top1": 0.5}
            report["baselines"] = [*report["baselines"], rival]
        else:
            (run_dir / "sections").mkdir(parents=True, exist_ok=True)
            (run_dir / "sections" / "made").write_text(run_dir.name)
            (run_dir / "job.yaml").write_text(job_yaml(job))
        report_file.write_text(json.dumps(report))
        return 0, "", ""


@pytest.fixture
def job_file(tmp_path: Path, job_document: dict[str, Any]) -> Path:
    """The small job in a file, without places: the batch gives them."""
    document = {key: value for key, value in job_document.items() if key != "storage"}
    document["teacher"] = {"model": "user_nets:user_net", "min_top1": 0}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _work(job_file: Path, *, seeds: Sequence[int] = (0,), **changes: Any) -> tuple[list[Cell], Plan]:
    plan = Plan(root=job_file.parent / "table", **changes)
    return cells([job_file], seeds, plan), plan


def test_a_cell_does_everything_in_order_at_three_rates_of_both_sides(job_file: Path) -> None:
    work, plan = _work(job_file, settings=("train.epochs=2",), seeds=(7,))
    batch = FakeBatch()
    assert run_batch(work, plan, batch) == 0
    assert batch.done == ALL_STEPS
    rates = {name: job.train.lr for name, job in batch.jobs.items() if "dorefa" not in name}
    assert rates == {
        f"{variant}-{factor}": pytest.approx(rate)
        for variant in ("stitched", "recipe")
        for factor, rate in (("x1", 1e-3), ("x0.3", 3e-4), ("x3", 3e-3))
    }
    assert {(job.seed, job.train.epochs) for job in batch.jobs.values()} == {(7, 2)}
    assert {name: job.reduce.polish_epochs for name, job in batch.jobs.items()} == {
        name: int(name.startswith("recipe")) for name in ALL_STEPS
    }
    assert work[0].folder == plan.root / "small+train.epochs=2" / "seed-7"


def test_what_is_finished_is_not_done_again(job_file: Path) -> None:
    work, plan = _work(job_file)
    run_batch(work, plan, FakeBatch())
    again = FakeBatch()
    assert (run_batch(work, plan, again), again.done) == (0, [])


@pytest.mark.parametrize("step", ALL_STEPS)
def test_an_interruption_loses_one_step_at_most(step: str, job_file: Path) -> None:
    work, plan = _work(job_file)
    first, second = FakeBatch(interrupted_at=step), FakeBatch()
    assert run_batch(work, plan, first) == 130
    assert run_batch(work, plan, second) == 0
    assert [*first.done, *second.done] == ALL_STEPS


def test_a_failure_is_kept_with_its_message_and_the_batch_goes_on(job_file: Path) -> None:
    work, plan = _work(job_file)
    batch = FakeBatch(failing=["stitched-x3"])
    assert run_batch(work, plan, batch) == 1
    assert batch.done == ALL_STEPS
    message = work[0].folder / "stitched-x3.failed"
    assert message.read_text() == "dcq-ray: the loss is nan\nlower the rate\n"
    again = FakeBatch()
    assert (run_batch(work, plan, again), again.done, message.exists()) == (0, ["stitched-x3"], False)


def test_a_changed_job_is_done_anew(job_file: Path) -> None:
    work, plan = _work(job_file, recipe=(), methods=())
    run_batch(work, plan, FakeBatch())
    job_file.write_text(job_file.read_text().replace("epochs: 3", "epochs: 4"))
    again = FakeBatch()
    run_batch(work, plan, again)
    assert again.done == ["stitched-x1", "stitched-x0.3", "stitched-x3"]


def test_a_wrong_job_is_a_failure_of_its_cells_alone(job_file: Path) -> None:
    wrong = job_file.with_name("wrong.yaml")
    wrong.write_text("name: wrong\n")
    plan = Plan(root=job_file.parent / "table")
    work, batch = cells([wrong, job_file], (0,), plan), FakeBatch()
    assert run_batch(work, plan, batch) == 1
    assert batch.done == ALL_STEPS
    assert "teacher" in (work[0].folder / "job.failed").read_text()


def test_the_recipe_takes_the_sections_over(job_file: Path) -> None:
    work, plan = _work(job_file)
    run_batch(work, plan, FakeBatch(interrupted_at="recipe-x3"))
    origin, copied = (work[0].folder / name for name in ("stitched-x3", "recipe-x3"))
    assert (copied / "sections" / "made").read_text() == "stitched-x3"
    assert not (copied / "report.json").exists()
    (origin / "dump.json").write_text("{}")
    take_over(origin, origin.with_name("other"))
    assert sorted(path.name for path in origin.with_name("other").iterdir()) == ["dump.json", "sections"]


def test_a_teacher_is_fitted_once_for_the_cells_that_share_it(job_file: Path) -> None:
    document = yaml.safe_load(job_file.read_text())
    document["teacher"]["fit"] = {"epochs": 1}
    for name, bits in (("one", 1), ("two", 2)):
        document |= {"name": name, "quantize": {"weights": {"bits": bits}}}
        job_file.with_name(f"{name}.yaml").write_text(yaml.safe_dump(document))
    plan = Plan(root=job_file.parent / "table")
    work = cells([job_file.with_name(f"{name}.yaml") for name in ("one", "two")], (0, 1), plan)
    batch = FakeBatch(interrupted_at="stitched-x0.3")
    run_batch(work[:1], plan, batch)
    assert batch.done[0] == "teacher"
    assert (work[0].folder / "cache" / "fitted").read_text() == "weights"
    batch = FakeBatch()
    assert run_batch(work, plan, batch, num_workers=2) == 0
    # Seed 0 has its teacher; the two cells of seed 1 share one.
    assert batch.done.count("teacher") == 1
    # Boundaries of finished cells are gone.
    assert not any((cell.folder / "cache").exists() for cell in work)


def test_lenet_and_resnet20_have_three_seeds_and_the_others_one() -> None:
    plan = Plan(root=Path("table"))
    files = [FOLDER / f"{name}.yaml" for name in ("lenet-mnist-w1", "resnet20-cifar10-w1", "vgg11-cifar10-w1")]
    assert [cell.seed for cell in cells(files, None, plan)] == [0, 1, 2, 0, 1, 2, 0]
    assert [cell.seed for cell in cells(files[:1], [5], plan)] == [5]


def test_every_paper_job_has_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALEXNET_BN_WEIGHTS", "weights.safetensors")
    plan = Plan(root=Path("table"))
    for cell in cells(sorted(FOLDER.glob("*.yaml")), [0], plan):
        assert [step.name for step in steps(cell, plan)] == ALL_STEPS


def test_the_message_of_a_failure_is_the_last_paragraph_without_progress() -> None:
    assert told('{"a": 1}\nwarning\ndcq-ray: one\nmore\n{"b": 2}\n') == "dcq-ray: one\nmore"
    assert told("Traceback\nValueError: x") == "Traceback\nValueError: x"
    assert told('{"a": 1}\n') == "it ended without a word"


def test_no_fitting_job_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--jobs", "nothing-*"])
    assert "no job" in capsys.readouterr().err


def _cpu_seconds(run: Run) -> dict[str, float]:
    found: dict[str, float] = run.report["timings"]["cpu_seconds"]
    return found


@pytest.mark.slow
def test_real_runs_make_rows_and_are_not_made_again(job_file: Path) -> None:
    root = job_file.parent / "table"
    arguments = ["--jobs", str(job_file), "--root", str(root), "--seeds", "0", "--budgets", "passes"]
    arguments += ["--set", "train.epochs=1"]
    assert main(arguments) == 0
    runs = read_runs(root)
    (row,) = table_rows(runs)
    students = row.seeds[0].students
    assert {name: len(found.tried_lrs) for name, found in students.items()} == {"stitched": 3, "recipe": 3}
    rival = row.seeds[0].rivals["stitched", "dorefa", "passes"]
    assert rival.tried_lrs == pytest.approx(students["stitched"].tried_lrs)
    # The recipe took sections over: it is charged for their very seconds.
    recipes = {run.job["train"]["lr"]: _cpu_seconds(run) for run in runs if run.variant == "recipe"}
    for run in runs:
        assert _cpu_seconds(run)["train"] == recipes[run.job["train"]["lr"]]["train"] > 0
    dumps = {Path(run.path).name: _cpu_seconds(run)["dump"] for run in runs}
    assert {name for name, seconds in dumps.items() if seconds > 0} == {"stitched-x1", "recipe-x1"}
    assert "| user_net | digits | 1 bit (dorefa) | 320 x 1 |" in page(runs)
    before = {run.path: run.report for run in runs}
    assert main(arguments) == 0
    assert {run.path: run.report for run in read_runs(root)} == before
