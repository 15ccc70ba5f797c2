"""Noise in the place of images: as many as are said, of the size that the job states, each the same in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dcq_ray.data import stand_in_splits
from dcq_ray.errors import DataError
from dcq_ray.spec import DataSpec


def _data(**changes: object) -> DataSpec:
    document = {"dataset": "imagefolder", "root": "nowhere", "image_size": [6, 4], "channels": 3, "test_samples": 7}
    return DataSpec.model_validate({**document, **changes})


def test_parts_have_the_numbers_that_are_said() -> None:
    found = stand_in_splits(_data(), 1_281_167, job_folder=".")
    assert found.test is not None
    # A tenth of them, but no more than 5,000, is held out where the job does not say.
    assert (len(found.train), len(found.held_out), len(found.test)) == (1_281_167, 5000, 7)
    assert found.input_shape == (3, 6, 4)
    fewer = stand_in_splits(_data(held_out_samples=9, test_samples=None), 20, job_folder=".")
    assert (len(fewer.train), len(fewer.held_out), fewer.test) == (20, 9, None)
    assert fewer.train.sha256 != found.train.sha256


def test_an_image_is_the_same_in_any_batch_and_normalized() -> None:
    data = _data(normalize={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]})
    train = stand_in_splits(data, 100, job_folder=".").train
    both, one = train.images(np.array([3, 99])), train.images(np.array([99]))
    assert torch.equal(both[1:], one)
    assert not torch.equal(both[0], both[1])
    assert -1 <= float(both.min()) < -0.5 < 0.5 < float(both.max()) <= 1


def test_without_a_size_there_is_nothing_to_stand_in() -> None:
    with pytest.raises(DataError, match=r"data\.image_size"):
        stand_in_splits(_data(image_size=None), 10, job_folder=".")
