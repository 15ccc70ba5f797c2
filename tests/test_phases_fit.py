"""Fits of a teacher: their recipe, their checkpoints, and that a killed one goes on to the very same teacher."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killing import Killed, killed
from torch import Tensor

from dcq_ray.callables import importable_from
from dcq_ray.data import Splits, load_splits
from dcq_ray.data.batches import crop_corners, mirrors
from dcq_ray.errors import TeacherError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import obtain_teacher, part_top1
from dcq_ray.phases.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint
from dcq_ray.phases.fit import FitResult, best_epoch, epoch_detail, fit_key, fitted_teacher
from dcq_ray.records import Progress, from_json
from dcq_ray.section import TrainingState, train_module
from dcq_ray.spec import Job
from dcq_ray.storage import Store, open_store
from dcq_ray.storage.local_files import LocalFiles
from dcq_ray.teacher import Teacher, load_teacher

CPU = torch.device("cpu")
RECIPES = {
    "adam": {"optimizer": "adam", "flip": True},
    "sgd": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-3, "crop_padding": 1, "warmup_epochs": 0.5},
}
WRITES_OF_A_CHECKPOINT = 2


@dataclass
class Fits:
    """Fits of one job's teacher, and what they told."""

    document: dict[str, Any]
    folder: Path
    events: list[Progress] = field(default_factory=list)

    def job(self, **fit: Any) -> Job:
        document = copy.deepcopy(self.document)
        document["storage"]["checkpoint_seconds"] = fit.pop("checkpoint_seconds", 1e6)
        document["storage"]["cache_dir"] = str(self.folder / fit.pop("cache", "cache"))
        document["teacher"]["fit"].update(fit)
        return resolve_job(document, source="test")

    def splits(self, job: Job) -> Splits:
        importable_from(str(self.folder))
        return load_splits(job.data, seed=job.seed, job_folder=str(self.folder))

    def fit(self, **fit: Any) -> Teacher:
        self.events.clear()
        job = self.job(**fit)
        cache = open_store(job.storage.cache_dir)
        return obtain_teacher(job, str(self.folder), self.splits(job), cache, device=CPU, emit=self.events.append)

    def killed_fit(self, at_write: int, **fit: Any) -> None:
        with killed(at_write), pytest.raises(Killed):
            self.fit(**fit)

    def key(self, **fit: Any) -> str:
        job = self.job(**fit)
        return fit_key(job, start_of(job, self.folder), self.splits(job), CPU)

    def checkpoints(self, **fit: Any) -> Store:
        return open_store(self.job(**fit).storage.cache_dir).child("fits", self.key(**fit))

    def states(self) -> list[str]:
        return list(dict.fromkeys(event.state for event in self.events))

    def resumed_after(self) -> int | None:
        """The step that the fit went on from."""
        resumed = [event.done for event in self.events if event.detail.startswith("resumed after step")]
        return resumed[0] if resumed else None


def start_of(job: Job, folder: Path) -> Teacher:
    """The teacher before its fit."""
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        return load_teacher(job.teacher, job_folder=str(folder))


@pytest.fixture
def fits(job_document: dict[str, Any], tmp_path: Path) -> Fits:
    """Four epochs of ten steps each."""
    return Fits(job_document, tmp_path)


def equal(one: Teacher, other: Teacher) -> bool:
    ours, theirs = one.module.state_dict(), other.module.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fit_killed_at_any_write_goes_on_to_the_same_teacher(fits: Fits, recipe: str) -> None:
    undisturbed = fits.fit(cache="other", **RECIPES[recipe])
    # Two files after each of four epochs, then the teacher's weights and the result.
    for number in range(4 * WRITES_OF_A_CHECKPOINT + 2):
        cache = f"cache-{number}"
        fits.killed_fit(number, cache=cache, **RECIPES[recipe])
        assert equal(fits.fit(cache=cache, **RECIPES[recipe]), undisturbed)
        finished = min(4, number // WRITES_OF_A_CHECKPOINT)
        assert fits.resumed_after() == (10 * finished or None)
        assert not fits.checkpoints(cache=cache, **RECIPES[recipe]).exists("")


@pytest.mark.slow
def test_a_fit_killed_within_an_epoch_goes_on_from_its_last_timed_checkpoint(fits: Fits) -> None:
    undisturbed = fits.fit(cache="other")
    for step in (3, 14):
        cache = f"cache-{step}"
        fits.killed_fit(WRITES_OF_A_CHECKPOINT * step, cache=cache, checkpoint_seconds=1e-9)
        assert equal(fits.fit(cache=cache), undisturbed)
        assert fits.resumed_after() == step


def test_a_fit_killed_again_and_again_goes_on_to_the_same_teacher(fits: Fits) -> None:
    undisturbed = fits.fit(cache="other")
    for _ in range(4):
        fits.killed_fit(WRITES_OF_A_CHECKPOINT)
    fits.killed_fit(0)
    fits.killed_fit(1)
    assert equal(fits.fit(), undisturbed)
    assert fits.resumed_after() == 40


KILLED_PROCESS = """
import os, signal, sys
import torch
from dcq_ray.data import load_splits
from dcq_ray.jobfile import load_job
from dcq_ray.phases import ignore_progress, obtain_teacher
from dcq_ray.storage import open_store
from dcq_ray.storage.local_files import LocalFiles

torch.set_num_threads(1)
path, folder, at_write = sys.argv[1], sys.argv[2], int(sys.argv[3])
open_output, count = LocalFiles.open_output, 0


class Half:
    def __init__(self, file): self.file = file
    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


class Counting:
    def __init__(self, files, name): self.inner = open_output(files, name)
    def __exit__(self, *error): return self.inner.__exit__(*error)
    def __enter__(self):
        global count
        count += 1
        file = self.inner.__enter__()
        return Half(file) if count - 1 == at_write else file


LocalFiles.open_output = lambda files, name: Counting(files, name)
job = load_job(path, environment={})
splits = load_splits(job.data, seed=job.seed, job_folder=folder)
obtain_teacher(job, folder, splits, open_store(job.storage.cache_dir), device=torch.device("cpu"), emit=ignore_progress)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at_write", [2, 3], ids=["in the tensors", "in the mark"])
def test_a_process_killed_in_the_middle_of_a_file_leaves_nothing_that_counts(fits: Fits, at_write: int) -> None:
    undisturbed = fits.fit(cache="other")
    job = fits.folder / "job.json"
    job.write_text(json.dumps({**fits.document, "storage": fits.job().storage.model_dump(mode="json")}))
    command = [sys.executable, "-c", KILLED_PROCESS, str(job), str(fits.folder), str(at_write)]
    ended = subprocess.run(command, cwd=fits.folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    assert list((fits.folder / "cache" / "fits").glob("*/.tmp-*"))
    fits.killed_fit(0)
    assert not list((fits.folder / "cache" / "fits").glob("*/.tmp-*"))
    assert equal(fits.fit(), undisturbed)
    assert fits.resumed_after() == 10
    assert not list((fits.folder / "cache" / "fits").glob("*/*"))


@pytest.mark.slow
def test_ctrl_c_exits_130_and_the_same_command_goes_on(fits: Fits) -> None:
    job = fits.folder / "job.yaml"
    fits.document["teacher"]["fit"]["epochs"] = 10**6
    job.write_text(json.dumps(fits.document))
    command = [sys.executable, "-m", "dcq_ray", "teacher", str(job), "--log-format", "json"]
    for begins in ("epoch 1/", "resumed after step "):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            messages = filter(None, (json.loads(line).get("message") for line in process.stderr))
            assert next(messages).startswith(f"teacher: {begins}")
            # Once two epochs have ended, the checkpoint of the first is there.
            ended = [
                re.fullmatch(r"teacher: epoch \d+/1000000, held-out [\d.]+ % after \d+.*", next(messages)) for _ in "12"
            ]
            assert all(ended)
            process.send_signal(signal.SIGINT)
            last = process.stderr.read().splitlines()[-1]
        assert process.returncode == 130
        assert last == (
            "dcq-ray: interrupted; run the same command again to resume: what was finished is kept in "
            f"{fits.folder / 'cache'}"
        )


def damage_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_number(path: Path) -> None:
    mark = json.loads(path.read_text())
    mark["held_out_top1s"][0] = 1.0
    path.write_text(json.dumps(mark))


@pytest.mark.parametrize(
    ("file", "damage", "num_damaged"),
    [
        ("safetensors", damage_byte, 1),
        ("safetensors", damage_end, 1),
        ("safetensors", Path.unlink, 1),
        ("json", damage_number, 1),
        ("json", damage_end, 1),
        ("safetensors", damage_byte, 2),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_or_the_start_is_used(
    fits: Fits, file: str, damage: Any, num_damaged: int
) -> None:
    undisturbed = fits.fit(cache="other")
    fits.killed_fit(3 * WRITES_OF_A_CHECKPOINT)
    folder = Path(fits.checkpoints().uri)
    found = sorted(folder.glob(f"*.{file}"), reverse=True)
    assert [path.name.partition("-")[0] for path in found] == ["0000000030", "0000000020"]
    for path in found[:num_damaged]:
        damage(path)
    assert equal(fits.fit(), undisturbed)
    assert fits.resumed_after() == (20 if num_damaged == 1 else None)
    assert sum("passed over a damaged checkpoint" in event.detail for event in fits.events) == num_damaged


def test_a_fit_keeps_its_two_newest_checkpoints_of_tensors_and_json_alone(fits: Fits) -> None:
    fits.killed_fit(4 * WRITES_OF_A_CHECKPOINT)
    names = fits.checkpoints().list_names()
    assert sorted({name.partition("-")[0] for name in names}) == ["0000000030", "0000000040"]
    assert sorted(name.rpartition(".")[2] for name in names) == ["json", "json", "safetensors", "safetensors"]


def test_a_fit_killed_right_after_its_commit_leaves_checkpoints_that_the_next_one_removes(fits: Fits) -> None:
    def kill(_: LocalFiles) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFiles, "delete_tree", kill)
        with pytest.raises(Killed):
            fits.fit()
    assert fits.checkpoints().list_names()
    fits.fit()
    assert fits.states() == ["reused"]
    assert not fits.checkpoints().exists("")


def test_two_fits_of_one_teacher_at_the_same_time_train_it_once(fits: Fits) -> None:
    """The second waits until the first has finished, and takes its teacher."""
    waits, splits = threading.Event(), fits.splits(fits.job())
    job, cache = fits.job(), open_store(fits.job().storage.cache_dir)
    told: dict[str, list[Progress]] = {"first": [], "second": []}

    def fit(name: str, state: str, event: threading.Event, other: threading.Event | None) -> Teacher:
        def emit(progress: Progress) -> None:
            told[name].append(progress)
            if progress.state == state:
                event.set()
                assert other is None or other.wait(60)

        return obtain_teacher(job, str(fits.folder), splits, cache, device=CPU, emit=emit)

    begins = threading.Event()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(fit, "first", "running", begins, waits)
        assert begins.wait(60)
        second = fit("second", "waiting", waits, None)
    assert equal(first.result(), second)
    assert [event.state for event in told["second"]] == ["waiting", "reused"]
    assert told["first"][-1].state == "done"


@given(
    num_steps=st.integers(1, 20),
    top1s=st.lists(st.integers(0, 7).map(lambda right: right / 7), max_size=5),
    seconds=st.floats(0, 1e6),
)
def test_a_checkpoint_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, num_steps: int, top1s: list[float], seconds: float
) -> None:
    store = open_store(str(tmp_path_factory.mktemp("fit")))
    generator = torch.Generator().manual_seed(num_steps)
    tensors = {
        "conv1.weight": torch.randn(2, 3, generator=generator),
        "bn/odd.num_batches_tracked": torch.tensor(num_steps),
    }
    training = TrainingState(
        num_steps=num_steps,
        num_sample_passes=3 * num_steps,
        module=tensors,
        optimizer={"step.conv1.weight": torch.tensor(float(num_steps))},
        losses=tuple(np.random.default_rng(num_steps).random(num_steps).tolist()),
        seconds=seconds,
        input_wait_seconds=seconds / 3,
    )
    state = Checkpoint(training=training, held_out_top1s=tuple(top1s), best={} if not top1s else tensors)
    name = save_checkpoint(store, state, beside=None)
    read, found = newest_checkpoint(store, on_damage=pytest.fail)
    assert found == name
    assert read is not None
    for ours, theirs in (
        (training.module, read.training.module),
        (training.optimizer, read.training.optimizer),
        (state.best, read.best),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read.held_out_top1s == state.held_out_top1s
    plain = ("num_steps", "num_sample_passes", "losses", "seconds", "input_wait_seconds")
    assert [getattr(read.training, key) for key in plain] == [getattr(training, key) for key in plain]


# -- what is fitted ----------------------------------------------------------------------------------------------------


def test_a_fitted_teacher_is_its_best_epoch_and_is_used_again(fits: Fits) -> None:
    fitted = fits.fit()
    job = fits.job()
    splits, cache = fits.splits(job), open_store(job.storage.cache_dir)
    result = from_json(FitResult, cache.child("fits").read_bytes(f"{fits.key()}.json"))
    assert result.teacher_sha256 == fitted.sha256
    assert len(result.held_out_top1s) == 4
    assert result.held_out_top1 == max(result.held_out_top1s) == result.held_out_top1s[result.best_epoch]
    assert part_top1(fitted.module, splits.held_out, 32, CPU) == result.held_out_top1 > 0.7
    assert equal(fits.fit(), fitted)
    assert fits.states() == ["reused"]
    again = fitted_teacher(job, start_of(job, fits.folder), splits, cache, device=CPU)
    assert again is not None
    assert equal(again, fitted)


def test_a_damaged_fitted_teacher_is_fitted_again_and_its_file_mended(fits: Fits) -> None:
    fitted = fits.fit()
    weights = fits.folder / "cache" / "teachers" / fitted.sha256 / "weights.safetensors"
    damage_byte(weights)
    assert equal(fits.fit(), fitted)
    assert fits.states() == ["running", "done"]
    assert equal(fits.fit(), fitted)
    assert fits.states() == ["reused"]


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 5},
        {"lr": 0.02},
        {"warmup_epochs": 1},
        {"label_smoothing": 0.1},
        {"flip": True},
        {"crop_padding": 1},
        {"weight_decay": 1e-3},
    ],
    ids=str,
)
def test_another_recipe_is_another_fit(fits: Fits, changes: dict[str, Any]) -> None:
    assert fits.key(**changes) != fits.key()


def test_where_and_how_often_checkpoints_are_written_makes_no_other_fit(fits: Fits) -> None:
    assert fits.key(cache="other", checkpoint_seconds=1) == fits.key()


def test_the_best_epoch_is_the_later_of_equals() -> None:
    assert best_epoch((0.5, 0.7, 0.7, 0.6)) == 2
    assert best_epoch((0.5,)) == 0


def test_labels_are_needed(fits: Fits, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "train.npz", images=np.zeros((40, 8, 8, 1), dtype=np.uint8))
    root = str(tmp_path / "images")
    fits.document["data"] = {"dataset": "npz", "root": root, "train": "train.npz", "held_out_samples": 10}
    with pytest.raises(TeacherError, match=r"teacher\.fit needs labels"):
        fits.fit()


# -- the recipe reaches the training -----------------------------------------------------------------------------------

ONE_STEP = {"epochs": 1, "batch_size": 320, "optimizer": "sgd", "momentum": 0, "schedule": "constant"}


@pytest.mark.parametrize(("warmup_epochs", "warmup_steps"), [(0, 0), (0.5, 5), (3, 30)])
def test_the_rate_warms_up_for_so_many_epochs_of_ten_steps(
    fits: Fits, monkeypatch: pytest.MonkeyPatch, warmup_epochs: float, warmup_steps: int
) -> None:
    seen = []

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(options["warmup_steps"])
        return train_module(*arguments, **options)

    monkeypatch.setattr("dcq_ray.phases.fit.train_module", watched)
    fits.fit(warmup_epochs=warmup_epochs)
    assert seen == [warmup_steps]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.5])
def test_labels_are_smoothed_as_asked(fits: Fits, label_smoothing: float) -> None:
    """One step on all images moves the head's bias by -lr * mean(softmax - smoothed labels)."""
    job = fits.job(**ONE_STEP, lr=0.1, label_smoothing=label_smoothing)
    module, train = start_of(job, fits.folder).module.train(), fits.splits(job).train
    assert train.labels is not None
    with torch.no_grad():
        softmax = module(train.images(np.arange(320))).softmax(1)
    labels = torch.nn.functional.one_hot(torch.from_numpy(train.labels), 10)
    smoothed = (1 - label_smoothing) * labels + label_smoothing / 10
    expected = module.head.bias - 0.1 * (softmax - smoothed).mean(0)
    fitted = fits.fit(**ONE_STEP, lr=0.1, label_smoothing=label_smoothing)
    assert torch.allclose(fitted.module.head.bias, expected, atol=1e-6)


def test_what_is_done_to_an_image_depends_on_seed_epoch_and_position_alone() -> None:
    draws: list[Tensor] = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        few, many = mirrors(50, seed=seed, epoch=epoch), mirrors(400, seed=seed, epoch=epoch)
        assert (few == many[:50]).all()
        cuts, more = crop_corners(50, 4, seed=seed, epoch=epoch), crop_corners(400, 4, seed=seed, epoch=epoch)
        assert (cuts == more[:, :50]).all()
        assert set(more.flatten().tolist()) == set(range(9))
        # Within four standard deviations, 4 * sqrt(400) / 2.
        assert abs(many.sum() - 200) < 40
        draws.append(torch.from_numpy(np.concatenate([many[None], more])))
    assert not any(torch.equal(draws[one], draws[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


# -- what is told ------------------------------------------------------------------------------------------------------


def test_every_epoch_is_told_with_its_held_out_accuracy(fits: Fits) -> None:
    fits.fit()
    result = from_json(FitResult, open_store(str(fits.folder / "cache")).child("fits").read_bytes(f"{fits.key()}.json"))
    details = list(dict.fromkeys(event.detail for event in fits.events))
    running = [epoch_detail(result.held_out_top1s[:finished], 4) for finished in range(5)]
    told = f"held-out {100 * result.held_out_top1:.2f} % after epoch {result.best_epoch + 1} of 4"
    assert details == [*running, told]
    last = [event for event in fits.events if event.state == "running"][-1]
    assert (last.done, last.total, last.unit, last.seconds_left) == (40, 40, "steps", 0)
    assert last.loss is not None
    assert last.per_second is not None
    assert last.per_second > 0


def test_a_resumed_fit_says_from_where_it_goes_on(fits: Fits) -> None:
    fits.killed_fit(2 * WRITES_OF_A_CHECKPOINT)
    fits.fit()
    first = fits.events[0]
    assert first.detail.startswith("resumed after step 20: epoch 3/4, held-out ")
    assert (first.done, first.total, first.per_second, first.seconds_left) == (20, 40, None, None)
    assert first.loss is not None
    details = list(dict.fromkeys(event.detail.partition(",")[0] for event in fits.events))
    assert details[:2] == ["resumed after step 20: epoch 3/4", "epoch 4/4"]


def test_details_by_hand() -> None:
    assert epoch_detail((), 3) == "epoch 1/3"
    assert epoch_detail((0.5,), 3) == "epoch 2/3, held-out 50.00 % after 1"
    assert epoch_detail((0.5, 0.25), 3) == "epoch 3/3, held-out 25.00 % after 2, best 50.00 % after 1"
    assert epoch_detail((0.5, 0.25, 0.75), 3) == "epoch 3/3, held-out 75.00 % after 3"
