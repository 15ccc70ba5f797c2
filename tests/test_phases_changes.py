"""What changed under a finished run is said, and done again; nothing else is."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import run_local
from dcq_ray.phases.changes import Earlier, changes, consequence
from dcq_ray.records import Progress, RunReport
from dcq_ray.teacher import state_bytes, state_from_bytes


class Runs:
    """Runs of a job's document in its folder, and what they said of changes."""

    def __init__(self, document: dict[str, Any], folder: Path) -> None:
        self.document, self.folder = document, folder

    def run(self, run_dir: str = "run") -> tuple[RunReport, list[str]]:
        document = copy.deepcopy(self.document)
        document["storage"]["run_dir"] = str(self.folder / run_dir)
        said: list[Progress] = []
        report = run_local(resolve_job(document, source="test"), str(self.folder), emit=said.append, owner="test")
        return report, [line.detail for line in said if line.phase == "changed"]

    def take_fitted_teacher(self) -> None:
        """Run once, and name the weights that were fitted by their file from then on."""
        self.run()
        cached = next((self.folder / "cache" / "teachers").glob("*/weights.safetensors"))
        weights = self.folder / "teacher.safetensors"
        weights.write_bytes(cached.read_bytes())
        self.document["teacher"] = {"model": "user_nets:user_net", "weights": str(weights)}

    def attempts(self, run_dir: str = "run") -> list[str]:
        files = sorted((self.folder / run_dir).glob("sections/*/result.json"))
        return [json.loads(file.read_text())["attempt"] for file in files]


@pytest.fixture
def runs(job_document: dict[str, Any], tmp_path: Path) -> Iterator[Runs]:
    job_document["train"]["epochs"] = 1
    yield Runs(job_document, tmp_path)
    # An edited one would stay for other tests, whose workers read their own.
    for name in ("user_nets", "user_views", "user_sets"):
        sys.modules.pop(name, None)


def new_teacher(runs: Runs) -> None:
    """Other weights in the very file that the job names."""
    path = Path(runs.document["teacher"]["weights"])
    state = state_from_bytes(path.read_bytes(), source=str(path))
    path.write_bytes(state_bytes({name: value * 1.001 for name, value in state.items()}, {}))


def setting(**sections: Any) -> Callable[[Runs], None]:
    def change(runs: Runs) -> None:
        for section, values in sections.items():
            if isinstance(values, dict) and section != "sections":
                runs.document.setdefault(section, {}).update(values)
            else:
                runs.document[section] = values

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said", "num_kept"),
    [
        (
            setting(quantize={"overrides": {"section:1": {"bits": 2}}}),
            "quantize.overrides.section:1.bits: null -> 2",
            2,
        ),
        (setting(quantize={"weights": {"scheme": "xnor", "bits": 1}}), "quantize.weights.scheme: dorefa -> xnor", 0),
        (setting(train={"lr": 0.002}), "train.lr: 0.001 -> 0.002", 0),
        (setting(seed=1), "seed: 0 -> 1", 0),
        (setting(data={"train_samples": 288}), "data.train_samples: 320 -> 288", 0),
        (setting(sections={"cuts": ["relu"]}), "sections.", 1),
    ],
    ids=["overrides", "scheme", "rate", "seed", "samples", "cuts"],
)
def test_a_changed_key_is_said_and_what_depends_on_it_is_done_again(
    runs: Runs, change: Callable[[Runs], None], said: str, num_kept: int
) -> None:
    first, nothing = runs.run()
    assert nothing == []
    before = runs.attempts()
    change(runs)
    report, lines = runs.run()
    assert any(line.startswith(said) for line in lines), lines
    # What a plan of more sections left stays where it is: with those cuts it would be used again.
    kept = [attempt for attempt in runs.attempts()[: len(report.sections)] if attempt in before]
    assert len(kept) == num_kept
    assert lines[-1].startswith("so ")
    note = next(note for note in report.notes if note.startswith("Changed since the run before"))
    assert said in note
    # The student is that of a run which never knew another job.
    fresh, _ = runs.run("fresh")
    assert report.student is not None
    assert fresh.student is not None
    assert report.student.sha256 == fresh.student.sha256
    assert first.run_digest != report.run_digest
    # And the third run has nothing to say.
    again, nothing = runs.run()
    assert nothing == []
    assert again.student == report.student


def test_what_changes_no_result_is_not_said(runs: Runs) -> None:
    runs.run()
    before = runs.attempts()
    runs.document["name"] = "other"
    runs.document.setdefault("resources", {})["cpus_per_section"] = 2
    runs.document["storage"]["checkpoint_seconds"] = 5
    _, lines = runs.run()
    assert lines == []
    assert runs.attempts() == before


@pytest.mark.slow
def test_other_tensors_in_the_teachers_file_are_said(runs: Runs) -> None:
    runs.take_fitted_teacher()
    runs.run()
    before = runs.attempts()
    new_teacher(runs)
    report, lines = runs.run()
    assert lines[0].startswith("the teacher's tensors: ")
    assert not set(before) & set(runs.attempts())
    fresh, _ = runs.run("fresh")
    assert report.student == fresh.student


@pytest.mark.slow
def test_other_library_versions_are_said(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.run()
    before = runs.attempts()
    for name in ("opening", "committed", "prepare", "reporting"):
        module = sys.modules[f"dcq_ray.phases.{name}"]
        monkeypatch.setattr(module, "library_versions", lambda: {"torch": "99.0", "dcq_ray": "99.1", "python": "3.99"})
    report, lines = runs.run()
    assert any(line.startswith("version of torch: ") and line.endswith(" -> 99.0") for line in lines)
    assert not set(before) & set(runs.attempts())
    assert report.versions["torch"] == "99.0"


@pytest.mark.slow
def test_another_network_in_the_users_file_is_said(runs: Runs) -> None:
    runs.take_fitted_teacher()
    runs.run()
    source = runs.folder / "user_nets.py"
    text = source.read_text()
    assert "self.conv1(x)" in text
    source.write_text(text.replace("self.conv1(x)", "self.conv1(0.9 * x)"))
    sys.modules.pop("user_nets", None)
    before = runs.attempts()
    _, lines = runs.run()
    assert lines[0] == "the teacher's code, with the same tensors"
    assert runs.attempts() != before


@pytest.mark.slow
def test_an_edited_transform_of_the_users_is_said(runs: Runs) -> None:
    runs.take_fitted_teacher()
    runs.document["data"]["transform"] = "user_views:dimmer"
    source = runs.folder / "user_views.py"
    source.write_text("def dimmer(images):\n    return 0.9 * images\n")
    runs.run()
    before = runs.attempts()
    source.write_text("def dimmer(images):\n    return 0.85 * images\n")
    sys.modules.pop("user_views", None)
    report, lines = runs.run()
    assert lines[0] == "the images, or how they are preprocessed, though the job names the same"
    assert not set(before) & set(runs.attempts())
    fresh, _ = runs.run("fresh")
    assert report.student == fresh.student


@pytest.mark.slow
def test_other_images_of_the_users_data_set_function_are_said(runs: Runs) -> None:
    runs.take_fitted_teacher()
    runs.document["data"]["dataset"] = "user_sets:digits"
    source = runs.folder / "user_sets.py"
    text = """
import numpy as np
from sklearn.datasets import load_digits
def digits():
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) * 15).astype(np.uint8)
    return {"train": (images[:1500], labels[:1500]), "test": (images[1500:], labels[1500:])}
"""
    source.write_text(text)
    runs.run()
    before = runs.attempts()
    source.write_text(text.replace("* 15)", "* 14.5)"))
    sys.modules.pop("user_sets", None)
    report, lines = runs.run()
    assert lines[0] == "the images, or how they are preprocessed, though the job names the same"
    assert not set(before) & set(runs.attempts())
    fresh, _ = runs.run("fresh")
    assert report.student == fresh.student


def test_nothing_is_said_without_an_earlier_run(runs: Runs) -> None:
    job = resolve_job(runs.document, source="test")
    plan: Any = object()
    assert changes(Earlier(job=None, plan=None, versions=None), job, plan, {"torch": "2"}) == ()


def test_what_follows_in_words() -> None:
    assert consequence(trained=3, again=0, boundaries_kept=4, boundaries=4) == "all 3 trained sections are used again"
    assert consequence(trained=3, again=3, boundaries_kept=0, boundaries=4) == (
        "3 of 3 trained sections are trained again, no trained section is used again; 0 of 4 boundaries stay the same"
    )
    assert consequence(trained=3, again=1, boundaries_kept=4, boundaries=4) == (
        "1 of 3 trained sections are trained again, 2 sections are used again; 4 of 4 boundaries stay the same"
    )
