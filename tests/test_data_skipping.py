"""Images in the middle of a data set that cannot be used: named, or left out and counted."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcq_ray.data import Splits, load_splits
from dcq_ray.errors import DataError
from dcq_ray.jobfile import resolve_job
from dcq_ray.phases import run_local
from dcq_ray.spec import DataSpec

FUNCTIONS = """
import numpy as np
import torch


def floats(bad):
    draw = np.random.default_rng(0)
    images = draw.random((40, 1, 8, 8), dtype=np.float32)
    for index in bad:
        images[index, 0, 3, 3] = np.nan if index % 2 else 7
    return {"train": (images, np.arange(40) % 4), "test": (images[:8], np.arange(8) % 4)}


class Fragile:
    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index in self.bad:
            if index % 2:
                raise OSError("the disk is gone")
            return torch.zeros(1, 5, 5), 0
        return torch.full((1, 8, 8), index / 40), index % 4


class Errors:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise OSError("the disk is gone")


def errors():
    return {"train": Errors(), "test": None}


def dataset(bad):
    return {"train": Fragile(bad), "test": Fragile([])}
"""


def splits(folder: Path, **spec: Any) -> Splits:
    (folder / "broken_sets.py").write_text(FUNCTIONS)
    return load_splits(DataSpec(held_out_samples=8, **spec), seed=0, job_folder=str(folder))


def num_images(found: Splits) -> int:
    return len(found.train) + len(found.held_out)


def skipped(found: Splits) -> str:
    return " ".join((*found.train.skipped, *found.held_out.skipped))


@pytest.mark.parametrize("function", ["floats", "dataset"])
def test_the_bad_images_of_a_users_function_are_named_or_left_out(function: str, tmp_path: Path) -> None:
    broken = {"dataset": f"broken_sets:{function}", "args": {"bad": [16, 21]}}
    with pytest.raises(DataError, match=r"image 16 of data\.dataset"):
        splits(tmp_path, **broken)
    found = splits(tmp_path, **broken, on_error="skip")
    assert num_images(found) == 38
    assert "image 16 of" in skipped(found)
    assert "image 21 of" in skipped(found)
    for part in (found.train, found.held_out):
        assert np.isfinite(part.images(np.arange(len(part))).numpy()).all()
        assert part.labels is not None
        assert len(part.labels) == len(part)
    if function == "dataset":
        # Its labels are not known either, so the choice is another.
        return
    # What is left are the images that a whole set would give, in their order.
    whole = splits(tmp_path, **{**broken, "args": {"bad": []}})
    assert num_images(whole) == 40
    kept = iter(whole.train.images(np.arange(len(whole.train))).numpy())
    assert all(
        any(np.array_equal(image, other) for other in kept)
        for image in found.train.images(np.arange(len(found.train))).numpy()
    )


def jpeg(seed: int, size: int = 8) -> bytes:
    buffer = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("layout", ["npz", "imagefolder"])
def test_undecodable_files_and_other_sizes_are_named_or_left_out(layout: str, tmp_path: Path) -> None:
    files = [jpeg(seed) for seed in range(40)]
    files[16] = b"no image at all"
    files[21] = jpeg(21)[:200]
    files[30] = jpeg(30, size=12)
    if layout == "npz":
        for name in ("train", "test"):
            some = files if name == "train" else [jpeg(seed) for seed in range(8)]
            np.savez(
                tmp_path / f"{name}.npz",
                jpeg=np.frombuffer(b"".join(some), np.uint8),
                offsets=np.cumsum([0, *map(len, some)]),
                labels=np.arange(len(some)) % 4,
            )
        spec = {"dataset": "npz", "root": str(tmp_path), "train": "train.npz", "test": "test.npz"}
    else:
        for index, content in enumerate(files):
            for name in ("train", "test"):
                path = tmp_path / name / str(index % 4) / f"{index:02d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content if name == "train" else jpeg(index))
        (tmp_path / "train" / "0" / "36.jpg").unlink()
        (tmp_path / "train" / "0" / "36.jpg").symlink_to(tmp_path / "nowhere.jpg")
        spec = {"dataset": "imagefolder", "root": str(tmp_path)}

    def read_all() -> object:
        found = splits(tmp_path, **spec)
        return found.train.images(np.arange(len(found.train)))

    with pytest.raises(DataError, match=r"data\.on_error: skip|expected one size"):
        read_all()
    found = splits(tmp_path, **spec, on_error="skip")
    assert num_images(found) == (37 if layout == "npz" else 36)
    assert found.train.images(np.arange(len(found.train))).shape[1:] == (3, 8, 8)
    for told in ("16", "21", "12x12 pixels after one of 8x8"):
        assert told in skipped(found)
    resized = splits(tmp_path, **spec, on_error="skip", image_size=(8, 8))
    assert num_images(resized) == num_images(found) + 1


def test_none_that_can_be_used_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without an image that can be read"):
        splits(tmp_path, dataset="broken_sets:errors", on_error="skip")
    with pytest.raises(DataError, match="none of 32 chosen images can be used"):
        splits(tmp_path, dataset="broken_sets:floats", args={"bad": list(range(40))}, on_error="skip")


@pytest.mark.slow
def test_the_report_counts_what_was_left_out(job_document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken_sets.py").write_text(FUNCTIONS)
    job_document["data"] = {
        "dataset": "broken_sets:floats", "args": {"bad": [16, 21]}, "held_out_samples": 8, "batch_size": 8, "on_error": "skip",
    }  # fmt: skip
    job_document["teacher"] |= {"min_top1": 0}
    job_document["train"] = {"epochs": 1, "batch_size": 8}
    report = run_local(resolve_job(job_document, source="test"), str(tmp_path), emit=lambda _: None, owner="test")
    assert report.num_skipped_images == 2
    assert any(note.startswith("Left out, since they cannot be used: 2 images; the first: ") for note in report.notes)
