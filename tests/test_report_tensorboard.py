"""Event files, read back by TensorBoard itself."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcq_ray.errors import UsageError
from dcq_ray.records import Progress
from dcq_ray.report import tensorboard
from dcq_ray.report.tensorboard import check_tensorboard, drawn, section_scalars
from dcq_ray.storage import open_store

needs_tensorboard = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="TensorBoard is not installed (pip install dcq-ray[tensorboard])"
)


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """A curve's name -> its points, over all event files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_a_line_gives_what_it_states_of_a_section_in_training_alone() -> None:
    line = Progress(phase="train", index=3, done=5, total=20, loss=0.5, per_second=80.0)
    assert section_scalars(line) == {"loss/section-03": 0.5, "images_per_second/section-03": 80.0}
    assert section_scalars(Progress(phase="train", index=3, done=5, total=20, loss=0.0)) == {"loss/section-03": 0.0}
    assert section_scalars(Progress(phase="train", index=3, state="done", loss=0.5)) == {}
    assert section_scalars(Progress(phase="reduce", done=5, total=20, loss=0.5)) == {}


@needs_tensorboard
def test_curves_go_on_in_another_file_when_a_run_is_resumed(tmp_path: Path) -> None:
    shown: list[Progress] = []
    for steps in ((1, 2), (3,)):
        with drawn(open_store(str(tmp_path)), shown.append) as (take, _):
            for step in steps:
                take(Progress(phase="train", index=0, done=step, total=3, loss=1 / step))
    assert [line.done for line in shown] == [1, 2, 3]
    assert read_back(tmp_path / "tensorboard") == {"loss/section-00": [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]}


@needs_tensorboard
def test_a_run_that_starts_over_has_no_curves_of_the_earlier_one(tmp_path: Path) -> None:
    for fresh, steps, loss in ((False, (5, 9), 1.0), (True, (4, 8), 0.5)):
        with drawn(open_store(str(tmp_path)), lambda _: None, fresh=fresh) as (take, _):
            for step in steps:
                take(Progress(phase="train", index=0, done=step, total=9, loss=loss))
    assert read_back(tmp_path / "tensorboard") == {"loss/section-00": [(4, 0.5), (8, 0.5)]}
    # One that is refused before its first step hides nothing.
    with drawn(open_store(str(tmp_path)), lambda _: None, fresh=True):
        pass
    assert read_back(tmp_path / "tensorboard") == {"loss/section-00": [(4, 0.5), (8, 0.5)]}


@needs_tensorboard
@pytest.mark.slow
def test_a_run_leaves_its_curves_and_its_accuracies_beside_it(job_document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_document))
    command = [sys.executable, "-m", "dcq_ray", "run", str(tmp_path / "job.yaml"), "--address", "none", "--tensorboard"]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    curves = read_back(tmp_path / "run" / "tensorboard")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert curves.pop("top1/student") == [(0, pytest.approx(report["student"]["top1"]))]
    assert curves.pop("top1/teacher") == [(0, pytest.approx(report["teacher"]["top1"]))]
    assert curves.pop("top1/untrained") == [(0, pytest.approx(report["untrained_top1"]))]
    assert set(curves) == {f"{name}/section-{i:02d}" for name in ("loss", "images_per_second") for i in range(3)}
    for points in curves.values():
        # 3 epochs of 10 batches.
        assert 0 < points[-1][0] <= 30
        assert all(value > 0 for _, value in points)


def test_where_tensorboard_is_missing_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'dcq-ray\[tensorboard\]'"):
        check_tensorboard()


@needs_tensorboard
def test_a_run_directory_elsewhere_is_refused(s3_uri: str) -> None:
    with pytest.raises(UsageError, match="no folder of this machine"), drawn(open_store(s3_uri), lambda _: None):
        pass
