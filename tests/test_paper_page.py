"""The figures and the page of the paper's table, from reports made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.paper_page import mean_and_spread, page
from benchmarks.paper_results import Run, compare, read_runs, standard_error, table_rows

from dcq_ray.jobfile import job_yaml, resolve_job


def _job(**changes: Any) -> dict[str, Any]:
    """A job as a run keeps it; a change is `section__key=value`."""
    document: dict[str, Any] = {
        "name": "lenet-mnist-w1",
        "teacher": {"model": "dcq_ray:lenet", "weights": "/data/lenet.safetensors"},
        "data": {"dataset": "mnist", "root": "/data", "train_samples": 20000},
        "quantize": {"weights": {"scheme": "dorefa", "bits": 1}, "first_last_bits": None},
        "train": {"epochs": 2, "lr": 1e-3, "start": "nearest"},
        "reduce": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            document[section] = {**document[section], name: value}
        else:
            document[section] = value
    return resolve_job(document, source="a test").model_dump(mode="json")


def _rival(top1: float, *, budget: str = "passes", method: str = "dorefa", lr: float = 3e-4) -> dict[str, Any]:
    return {
        "method": method,
        "budget": budget,
        "top1": top1,
        "lr": lr,
        "tried_lrs": [3e-4, 1e-3, 3e-3],
        "cpu_seconds": 77.0,
    }


def _run(
    top1: float,
    *rivals: dict[str, Any],
    seed: int = 0,
    held_out: float = 0.5,
    teacher_top1: float = 0.9,
    dump_seconds: float = 20.0,
    **changes: Any,
) -> Run:
    report = {
        "status": "succeeded",
        "teacher": {"top1": teacher_top1},
        "untrained_top1": 0.3,
        "student": {"top1": top1},
        "validation": {"top1": held_out},
        "sections": [{}, {}, {}],
        "timings": {"cpu_seconds": {"teacher": 1.0, "dump": dump_seconds, "train": 100.0, "reduce": 5.0}},
        "baselines": list(rivals),
        "versions": {"torch": "2.14"},
        "started_at": "2026-11-25T05:00:00+00:00",
    }
    job = _job(seed=seed, **changes)
    return Run(path=f"run-{seed}-{job['train']['lr']}-{top1}", job=job, report=report)


def _compared(students: list[float], rivals: list[float], variant: Any = "stitched", budget: str = "passes") -> Any:
    polish = 1 if variant == "recipe" else 0
    runs = [
        _run(student, _rival(rival, budget=budget), seed=seed, reduce__polish_epochs=polish)
        for seed, (student, rival) in enumerate(zip(students, rivals, strict=True))
    ]
    (row,) = table_rows(runs)
    found = compare(row, variant, "dorefa", budget)
    assert found is not None
    return found


# -- figures -----------------------------------------------------------------------------------------------------------


def test_a_comparison_is_what_one_computes_by_hand() -> None:
    # teacher 90; DoReFa 80, 81, 82 loses 10, 9, 8; DCQ 88, 88.5, 89 loses 2, 1.5, 1; differences 8, 7.5, 7.
    found = _compared([0.88, 0.885, 0.89], [0.80, 0.81, 0.82])
    assert (found.num_seeds, found.rival_loss, found.student_loss) == (3, pytest.approx(9), pytest.approx(1.5))
    assert found.difference == pytest.approx(7.5)
    # Their standard deviation is 0.5; over the root of 3.
    assert found.standard_error == pytest.approx(0.288675, abs=1e-6)
    assert found.share_left == pytest.approx(1.5 / 9)
    assert not found.is_none


def test_the_bar_of_stitched_is_a_share_of_0_15_beyond_two_standard_errors() -> None:
    # 0.15 x (10, 9, 8) - (2, 1.5, 1) = -0.5, -0.15, 0.2: mean -0.15.
    assert _compared([0.88, 0.885, 0.89], [0.80, 0.81, 0.82]).reached is False
    # 0.15 x (10, 9, 8) - (0.5, 0.4, 0.3) = 1, 0.95, 0.9: mean 0.95, standard error 0.05 / sqrt 3.
    assert _compared([0.895, 0.896, 0.897], [0.80, 0.81, 0.82]).reached is True
    # 0.15 x 10 - (0.5, 1.4, 2) = 1, 0.1, -0.5: mean 0.2, standard error 0.755 / sqrt 3 = 0.436.
    assert _compared([0.895, 0.886, 0.88], [0.80, 0.80, 0.80]).reached is False


def test_the_bar_of_the_recipe_is_a_share_of_0_05_at_equal_seconds() -> None:
    # 0.05 x 10 - 0.4 = 0.1; of 0.6: -0.1.
    assert _compared([0.896, 0.896], [0.80, 0.80], "recipe", "cpu-seconds").reached is True
    assert _compared([0.894, 0.894], [0.80, 0.80], "recipe", "cpu-seconds").reached is False
    # There is none for the recipe at equal passes where DoReFa loses so much.
    assert _compared([0.896, 0.896], [0.80, 0.80], "recipe", "passes").reached is None


def test_where_dorefa_loses_less_than_two_points_dcq_must_not_be_worse() -> None:
    # DoReFa loses 1; differences 0.2, -0.1, 0.1: mean 0.0667, standard deviation sqrt(0.0233) = 0.1528, error 0.0882.
    close = _compared([0.892, 0.889, 0.891], [0.89, 0.89, 0.89])
    assert close.standard_error == pytest.approx(0.08819, abs=1e-5)
    assert (close.is_none, close.reached) == (True, True)
    # Differences -0.5, -0.6, -0.4: mean -0.5, error 0.0577.
    worse = _compared([0.885, 0.884, 0.886], [0.89, 0.89, 0.89])
    assert (worse.is_none, worse.reached) == (False, False)


def test_one_seed_has_no_spread_and_reaches_no_bar() -> None:
    found = _compared([0.899], [0.80])
    assert (found.standard_error, found.reached, found.is_none) == (None, None, False)
    assert found.difference == pytest.approx(9.9)


def test_nothing_is_left_of_a_loss_that_is_not_there() -> None:
    assert _compared([0.89, 0.89], [0.91, 0.91]).share_left is None


def test_means_spreads_and_errors() -> None:
    assert mean_and_spread([]) == "-"
    assert mean_and_spread([0.8811]) == "88.11"
    assert mean_and_spread([0.80, 0.81, 0.82]) == "81.00 ± 1.00"
    assert standard_error([1.0]) is None
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)


# -- reports -> rows ---------------------------------------------------------------------------------------------------


def test_held_out_images_choose_the_rate_and_test_images_do_not() -> None:
    runs = [
        _run(0.95, held_out=0.70, train__lr=1e-3),
        _run(0.60, held_out=0.71, train__lr=3e-3, dump_seconds=0.0),
        _run(0.80, held_out=0.69, train__lr=3e-4, dump_seconds=0.0),
    ]
    (row,) = table_rows(runs)
    student = row.seeds[0].students["stitched"]
    assert (student.top1, student.lr, student.tried_lrs) == (0.60, 3e-3, (3e-4, 1e-3, 3e-3))
    # 1 + 100 + 5 of its own, and 20 for the dump that another rate's run made.
    assert student.cpu_seconds == 126


def test_a_run_with_a_polish_is_the_recipe_and_has_its_own_rival_of_seconds() -> None:
    stitched = _run(0.8, _rival(0.5), _rival(0.6, budget="cpu-seconds"))
    recipe = _run(0.85, _rival(0.7, budget="cpu-seconds"), reduce__polish_epochs=2)
    (row,) = table_rows([recipe, stitched])
    (result,) = row.seeds
    assert {name: found.top1 for name, found in result.students.items()} == {"stitched": 0.8, "recipe": 0.85}
    assert {key: found.top1 for key, found in result.rivals.items()} == {
        ("stitched", "dorefa", "passes"): 0.5,
        ("recipe", "dorefa", "passes"): 0.5,
        ("stitched", "dorefa", "cpu-seconds"): 0.6,
        ("recipe", "dorefa", "cpu-seconds"): 0.7,
    }
    assert row.switches == {"recipe": "polish_epochs 2", "stitched": "plain"}


def test_bits_budgets_and_data_make_rows_and_seeds_and_switches_do_not() -> None:
    plain = _run(0.8)
    others = [
        _run(0.8, quantize__weights={"scheme": "twn", "bits": 2}),
        _run(0.8, train__epochs=1),
        _run(0.8, data__train_samples=100),
    ]
    assert len(table_rows([plain, *others])) == 4
    (row,) = table_rows([plain, _run(0.8, seed=1), _run(0.8, reduce__polish_epochs=1, train__look_ahead=1)])
    assert [result.seed for result in row.seeds] == [0, 1]
    assert row.switches["recipe"] == "look_ahead 1, polish_epochs 1"


def test_two_runs_for_one_place_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two stitched runs of seed 0 at learning rate 0\.001"):
        table_rows([_run(0.8), _run(0.81, train__look_ahead=1)])


def test_a_stand_in_is_called_one() -> None:
    cifar = {"dataset": "npz", "root": "/data/cifar10-jpeg", "train": "train.npz", "train_samples": 100}
    names = {
        model: table_rows([_run(0.8, teacher={"model": model}, data=cifar)])[0]
        for model in ("torchvision:resnet18", "small_alexnet:alexnet_bn_48", "dcq_ray:resnet20", "dcq_ray:svhn")
    }
    assert {row.network: row.data for row in names.values()} == {
        "ResNet-18": "CIFAR-10 (JPEG), stand-in for ImageNet",
        "AlexNet": "CIFAR-10 (JPEG), stand-in for ImageNet",
        "ResNet-20": "CIFAR-10 (JPEG)",
        "SVHN net": "CIFAR-10 (JPEG), stand-in for SVHN",
    }


def test_only_finished_runs_are_read(tmp_path: Path) -> None:
    for name, status in (("a", "succeeded"), ("b", "failed"), ("c/d", "succeeded")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps({**_run(0.8).report, "status": status}))
        document = {"name": "x", "teacher": {"model": "dcq_ray:lenet"}, "data": {"dataset": "digits"}}
        (folder / "job.yaml").write_text(job_yaml(resolve_job(document, source="a test")))
    runs = read_runs(tmp_path)
    assert [Path(run.path).relative_to(tmp_path).as_posix() for run in runs] == ["a", "c/d"]
    assert len(runs[0].job["data"]) > 2


# -- rows -> Markdown --------------------------------------------------------------------------------------------------


def _lines(text: str, title: str) -> list[list[str]]:
    """The cells of the table below a title, without its head."""
    section = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert len({len(line) for line in found}) == 1
    return found[2:]


def test_the_page_shows_the_figures() -> None:
    rivals = [0.80, 0.81, 0.82]
    stitched = [
        _run(top1, _rival(rival), _rival(0.85, budget="cpu-seconds"), seed=seed)
        for seed, (top1, rival) in enumerate(zip([0.88, 0.885, 0.89], rivals, strict=True))
    ]
    text = page([*stitched, _run(0.895, seed=0, reduce__polish_epochs=1)])
    ((*names, sections, seeds, teacher, untrained, passes, seconds, dcq, recipe, closed),) = _lines(text, "Accuracy")
    assert names == ["LeNet", "MNIST", "1 bit (dorefa)", "20,000 x 2"]
    assert (sections, seeds, teacher, untrained) == ("3", "3", "90.00 ± 0.00", "30.00 ± 0.00")
    assert (passes, seconds) == ("81.00 ± 1.00", "85.00 ± 0.00")
    # Gap closed: 1 - 1.5 / 9.
    assert (dcq, recipe, closed) == ("88.50 ± 0.50", "89.50", "83 %")
    comparisons = {(line[4], line[5]): line[6:] for line in _lines(text, "DCQ against its rivals")}
    assert comparisons["stitched", "DoReFa, equal passes"] == ["3", "9.00", "1.50", "0.17", "+7.50", "0.29", "missed"]
    assert comparisons["default recipe", "DoReFa, equal passes"] == ["1", "10.00", "0.50", "0.05", "+9.50", "-", "-"]
    assert ("default recipe", "DoReFa, equal seconds") not in comparisons
    costs = {line[4]: line[5:] for line in _lines(text, "Costs")}
    assert costs["DCQ stitched"] == ["plain", "0.001, 0.001, 0.001", "0.001", "126"]
    assert costs["DoReFa, equal passes"] == ["", "0.0003, 0.0003, 0.0003", "0.0003, 0.001, 0.003", "77"]
    assert "Runs of 2026-11-25; torch 2.14." in text


def test_a_difference_inside_its_spread_is_called_none() -> None:
    runs = [_run(top1, _rival(0.89), seed=seed) for seed, top1 in enumerate([0.892, 0.889, 0.891])]
    ((*_, difference, error, bar),) = _lines(page(runs), "DCQ against its rivals")
    assert (difference, error, bar) == ("none", "0.09", "reached")


def test_only_networks_that_ran_have_rows_and_literature_is_marked() -> None:
    text = page([_run(0.8)])
    ((network, *_, passes, seconds, _, recipe, closed),) = _lines(text, "Accuracy")
    assert (network, passes, seconds, recipe, closed) == ("LeNet", "-", "-", "-", "-")
    assert "AlexNet" not in text
    assert all(line[-1].startswith("literature: ") for line in _lines(text, "From the literature"))
