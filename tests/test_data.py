"""The parts of a data set: which images they hold, in what form, and in what order."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcq_ray.data import Part, Splits, augmented_batches, load_splits, ordered_batches
from dcq_ray.data.batches import cropped, flipped
from dcq_ray.data.choice import balanced_choice, balanced_counts, generator_of
from dcq_ray.data.pixels import resize, to_grey
from dcq_ray.errors import DataError
from dcq_ray.spec import DataSpec

SETS = '''
"""Synthetic data sets: an image of one row and two pixels holds its own index."""

import numpy as np

def _images(first, count):
    index = np.arange(first, first + count)
    return np.stack([index // 256, index % 256], 1).astype(np.uint8)[:, None, :]

def indexed(labels, test_labels=None, labelled=True):
    sets = {"train": (_images(0, len(labels)), labels if labelled else None)}
    if test_labels is not None:
        sets["test"] = (_images(len(labels), len(test_labels)), test_labels)
    return sets

def colour(count=12, size=6):
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return {"train": (images, np.arange(count) % 3), "test": (images[:5], [0, 1, 2, 0, 1])}
'''

TRANSFORMS = """
import torch

def double(x):
    return x.mul_(2)

def corner(x):
    return x[:, :, :2, :2]

def mixes(x):
    return x - x.mean()

def random(x):
    return x + torch.rand_like(x)

def divides(x):
    return x / 0

def halves(x):
    return x.half()

def as_list(x):
    return list(x)

def raises(x):
    raise KeyError("colour")
"""


@pytest.fixture(scope="module")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("job")
    (folder / "data_sets.py").write_text(SETS)
    (folder / "data_transforms.py").write_text(TRANSFORMS)
    return str(folder)


@pytest.fixture(autouse=True)
def _own_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def colour(job_folder: str) -> Callable[..., Splits]:
    """Loads the synthetic colour images with the settings given."""

    def load(**spec: Any) -> Splits:
        return load_splits(DataSpec(dataset="data_sets:colour", **spec), seed=0, job_folder=job_folder)

    return load


def _indices(part: Part) -> list[int]:
    """Of synthetic images, what index each holds."""
    pixels = (part.images(np.arange(len(part))) * 255).round().to(torch.int64)[:, 0, 0]
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


# -- the choice --------------------------------------------------------------------------------------------------------


@st.composite
def _choices(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    labels = draw(st.lists(st.sampled_from([0, 1, 2, 5, 9]), min_size=1, max_size=80))
    return np.array(labels), draw(st.integers(1, len(labels))), draw(st.integers(0, 2**63 - 1))


def _per_class(labels: np.ndarray, chosen: np.ndarray) -> dict[int, tuple[int, int]]:
    return {int(c): (int((labels[chosen] == c).sum()), int((labels == c).sum())) for c in np.unique(labels)}


@settings(deadline=None)
@given(_choices())
def test_a_choice_is_never_short_and_as_even_as_there_are_images(case: tuple[np.ndarray, int, int]) -> None:
    labels, total, seed = case
    chosen = balanced_choice(labels, len(labels), total, generator_of(seed))
    assert len(chosen) == len(set(chosen.tolist())) == total
    counts = _per_class(labels, chosen).values()
    most = max(count for count, _ in counts)
    assert all(count >= most - 1 or count == available for count, available in counts)


@settings(deadline=None)
@given(_choices())
def test_every_prefix_of_a_choice_has_nearly_its_proportions(case: tuple[np.ndarray, int, int]) -> None:
    labels, total, seed = case
    chosen = labels[balanced_choice(labels, len(labels), total, generator_of(seed))]
    classes, counts = np.unique(chosen, return_counts=True)
    for length in range(1, total + 1):
        for label, count in zip(classes, counts, strict=True):
            share = count / total
            assert abs((chosen[:length] == label).sum() - length * share) <= 1 + len(classes) * share


@settings(deadline=None)
@given(_choices(), st.integers(1, 80))
def test_a_smaller_choice_is_part_of_a_larger_one(case: tuple[np.ndarray, int, int], smaller: int) -> None:
    labels, total, seed = case
    few, many = (
        set(balanced_choice(labels, len(labels), number, generator_of(seed)).tolist())
        for number in (min(smaller, total), total)
    )
    assert few <= many


@settings(deadline=None)
@given(_choices())
def test_half_of_each_class_is_left_where_the_total_allows(case: tuple[np.ndarray, int, int]) -> None:
    labels, total, seed = case
    chosen = balanced_choice(labels, len(labels), total, generator_of(seed), leave_half=True)
    assert len(chosen) == total
    counts = _per_class(labels, chosen).values()
    if sum(available // 2 for _, available in counts) >= total:
        assert all(count <= available // 2 for count, available in counts)


def test_counts_computed_by_hand() -> None:
    favourites = np.array([2, 0, 1])
    assert balanced_counts(np.array([9, 9, 9]), 7, favourites).tolist() == [2, 2, 3]
    assert balanced_counts(np.array([1, 9, 9]), 10, favourites).tolist() == [1, 4, 5]
    assert balanced_counts(np.array([1, 9, 0]), 10, favourites).tolist() == [1, 9, 0]


# -- the parts ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    labels=st.lists(st.integers(0, 3), min_size=6, max_size=60).filter(lambda labels: len(set(labels)) > 1),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_parts_never_overlap_and_held_out_images_do_not_depend_on_train_samples(
    job_folder: str, labels: list[int], seed: int, data: st.DataObject
) -> None:
    num_held_out = data.draw(st.integers(1, len(labels) - 2))
    num_train = data.draw(st.integers(1, len(labels) - num_held_out))

    def load(**spec: Any) -> Splits:
        args = {"labels": labels, "test_labels": [0, 1, 1]}
        job = DataSpec(dataset="data_sets:indexed", args=args, held_out_samples=num_held_out, **spec)
        return load_splits(job, seed=seed, job_folder=job_folder)

    some, everything = load(train_samples=num_train), load()
    assert _indices(some.held_out) == _indices(everything.held_out)
    assert some.held_out.sha256 == everything.held_out.sha256
    train, held_out = _indices(some.train), _indices(some.held_out)
    assert (len(train), len(held_out)) == (num_train, num_held_out)
    assert set(train).isdisjoint(held_out)
    assert set(train) <= set(_indices(everything.train))
    assert sorted(_indices(everything.train) + held_out) == list(range(len(labels)))
    assert some.train.labels is not None
    assert some.train.labels.tolist() == [labels[index] for index in train]
    assert some.test is not None
    assert _indices(some.test) == [len(labels), len(labels) + 1, len(labels) + 2]


def test_images_without_labels_are_split_too(job_folder: str) -> None:
    job = DataSpec(dataset="data_sets:indexed", args={"labels": [0] * 30, "labelled": False}, train_samples=12)
    splits = load_splits(job, seed=0, job_folder=job_folder)
    assert (splits.train.labels, splits.test, splits.num_classes) == (None, None, None)
    train, held_out = _indices(splits.train), _indices(splits.held_out)
    assert (len(train), len(held_out), len(set(train + held_out))) == (12, 3, 15)
    assert [labels for _, labels in ordered_batches(splits.train, 5)] == [None] * 3


def test_held_out_is_a_tenth_and_a_seed_chooses(job_folder: str) -> None:
    job = DataSpec(dataset="data_sets:indexed", args={"labels": [0, 1] * 50, "test_labels": [3, 1]})
    first, again, other = (load_splits(job, seed=seed, job_folder=job_folder) for seed in (1, 1, 2))
    assert (len(first.train), len(first.held_out), first.num_classes) == (90, 10, 4)
    assert _indices(first.train) == _indices(again.train) != _indices(other.train)
    assert first.train.sha256 == again.train.sha256 != other.train.sha256
    assert first.test is not None
    assert other.test is not None
    assert first.test.sha256 == other.test.sha256


def test_a_test_choice_is_balanced(job_folder: str) -> None:
    args = {"labels": [0, 1] * 5, "test_labels": [0] * 20 + [1] * 20}
    job = DataSpec(dataset="data_sets:indexed", args=args, test_samples=6)
    test = load_splits(job, seed=0, job_folder=job_folder).test
    assert test is not None
    assert test.labels is not None
    assert np.bincount(test.labels).tolist() == [3, 3]
    assert len(set(_indices(test)) & set(range(10, 50))) == 6


@pytest.mark.parametrize(
    ("args", "spec", "message"),
    [
        ({"labels": [0, 1] * 5}, {"train_samples": 8, "held_out_samples": 3}, "got 10 images .*expected 11"),
        ({"labels": [0, 1] * 5}, {"held_out_samples": 10}, "got 10 images .*expected 11"),
        ({"labels": [0, 1], "test_labels": [0, 1]}, {"test_samples": 3}, "got 2 images in the test set.*3"),
        ({"labels": [0, 1]}, {"test_samples": 1}, "data.test_samples: got 1, but .*without a test set"),
        ({"labels": [0], "labelled": False}, {}, "got 1 images .*expected 2"),
        ({"labels": [4] * 9}, {}, "9 images of one class, 4, .*accuracy would mean nothing"),
        ({"labels": [0, 1] * 5, "test_labels": [1, 1]}, {}, "2 images of one class, 1"),
        ({"labels": []}, {}, "expected at least one image"),
    ],
)
def test_too_few_images_or_classes_are_refused_with_both_numbers(
    args: dict[str, Any], spec: dict[str, Any], message: str, job_folder: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_splits(DataSpec(dataset="data_sets:indexed", args=args, **spec), seed=0, job_folder=job_folder)


# -- preprocessing -----------------------------------------------------------------------------------------------------

PREPROCESSINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "grey": {"channels": 1},
    "smaller and normalized": {"image_size": (4, 5), "normalize": {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}},
    "transformed": {"transform": "data_transforms:corner"},
    "transformed in place": {"transform": "data_transforms:double", "normalize": {"mean": (0.5,), "std": (0.5,)}},
}


@pytest.mark.parametrize("spec", PREPROCESSINGS.values(), ids=PREPROCESSINGS)
def test_an_image_is_the_same_in_any_batch_bit_for_bit(spec: dict[str, Any], colour: Callable[..., Splits]) -> None:
    splits = colour(**spec)
    together = splits.train.images(np.arange(len(splits.train)))
    assert together.dtype == torch.float32
    assert together.is_contiguous()
    assert tuple(together.shape[1:]) == splits.input_shape
    for position in range(len(splits.train)):
        assert torch.equal(splits.train.images(np.array([position]))[0], together[position])
    mixed = np.array([3, 0, 3, 7])
    assert torch.equal(splits.train.images(mixed), together[mixed])
    assert torch.equal(splits.train.images(mixed), together[mixed])


def test_pixels_become_normalized_numbers(colour: Callable[..., Splits]) -> None:
    plain = colour().train.images(np.arange(3))
    assert plain.shape == (3, 3, 6, 6)
    assert torch.equal(plain, (plain * 255).round() / 255)
    normalized = colour(normalize={"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0)}).train.images(np.arange(3))
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 1.0), (0.3, 2.0)]):
        assert torch.allclose(normalized[:, channel], (plain[:, channel] - mean) / std)
    doubled = colour(transform="data_transforms:double", normalize={"mean": (1.0,), "std": (4.0,)})
    assert torch.allclose(doubled.train.images(np.arange(3)), (2 * plain - 1) / 4)


def test_grey_images_are_repeated_where_colour_is_asked_for(job_folder: str) -> None:
    job = DataSpec(dataset="data_sets:indexed", args={"labels": [0, 1] * 5}, channels=3)
    splits = load_splits(job, seed=0, job_folder=job_folder)
    images = splits.train.images(np.arange(4))
    assert splits.input_shape == (3, 1, 2)
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


def test_grey_is_what_pillow_makes_of_colour() -> None:
    colours = np.array(list(itertools.product(range(0, 256, 15), repeat=3)), np.uint8)[None]  # an image one row high
    images = colours[None].transpose(0, 3, 1, 2)
    grey = to_grey(images)
    assert np.array_equal(grey[0, 0], np.asarray(Image.fromarray(colours).convert("L")))
    as_float = to_grey(images.astype(np.float32) / 255)
    assert as_float.max() <= 1
    assert np.abs(as_float - grey / 255).max() <= 0.51 / 255


def test_resizing_keeps_flat_images_flat_and_crops_to_the_middle() -> None:
    image = np.zeros((1, 1, 4, 8), np.uint8)
    image[..., 2:6] = 200
    assert resize(image, (2, 2)).tolist() == [[[[200, 200], [200, 200]]]]
    assert resize(image.transpose(0, 1, 3, 2), (6, 6)).tolist() == np.full((1, 1, 6, 6), 200).tolist()
    bright = resize(np.ones((2, 3, 5, 5), np.float32), (3, 7))
    assert bright.dtype == np.float32
    assert bright.shape == (2, 3, 3, 7)
    assert np.allclose(bright, 1)


def test_resized_bytes_are_the_rounded_floats() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 9, 9), dtype=np.uint8)
    as_float = resize(images.astype(np.float32) / 255, (5, 5))
    assert np.abs(resize(images, (5, 5)) - as_float * 255).max() <= 0.501


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"transform": "data_transforms:divides"}, "got 216 values that are not finite among 216"),
        ({"transform": "data_transforms:halves"}, r"returned torch.float16 \[2, 3, 6, 6\], expected a float32 tensor"),
        ({"transform": "data_transforms:as_list"}, "returned a list, expected a float32 tensor"),
        ({"transform": "data_transforms:raises"}, "it raised KeyError: 'colour' .*data_transforms.py, line"),
        ({"transform": "data_transforms:mixes"}, "another result than the same image alone"),
        ({"transform": "data_transforms:random"}, "another result than the same image alone"),
        ({"transform": "data_transforms:doubel"}, "data.transform .*did you mean 'double'"),
        ({"normalize": {"mean": (0.5, 0.5), "std": (0.5,)}}, "normalize.mean: got 2 values for images of 3 channel"),
        ({"normalize": {"mean": (0.5,), "std": (0.5, 0.5)}, "channels": 1}, "normalize.std: got 2 values .* 1 channel"),
    ],
)
def test_preprocessing_that_fails_is_named(spec: dict[str, Any], message: str, colour: Callable[..., Splits]) -> None:
    with pytest.raises(DataError, match=message):
        colour(**spec)


# -- identity ----------------------------------------------------------------------------------------------------------


def test_identity_covers_preprocessing_and_not_the_batch_size(colour: Callable[..., Splits]) -> None:
    plain = colour()
    assert colour(batch_size=7).train.sha256 == plain.train.sha256
    parts = [plain.train, plain.held_out, plain.test, colour(train_samples=10).train]
    parts += [colour(**spec).train for spec in PREPROCESSINGS.values() if spec]
    parts.append(colour(normalize={"mean": (0.0,), "std": (1.0,)}).train)
    assert len({part.sha256 for part in parts if part is not None}) == len(parts)


def test_identity_covers_labels(job_folder: str) -> None:
    def identity(labels: list[int]) -> str:
        # Held out is one of the first class either way, so that only a label of the train part changes.
        job = DataSpec(dataset="data_sets:indexed", args={"labels": labels, "test_labels": labels}, held_out_samples=1)
        test = load_splits(job, seed=0, job_folder=job_folder).test
        assert test is not None
        return test.sha256

    assert identity([0, 0, 0, 1, 1]) != identity([0, 0, 0, 1, 2])


def test_identity_covers_the_source_of_a_transform(tmp_path: Path) -> None:
    (tmp_path / "data_own.py").write_text(SETS + "\ndef own(x):\n    return x / 2\n")
    job = DataSpec(dataset="data_own:colour", transform="data_own:own")
    before = load_splits(job, seed=0, job_folder=str(tmp_path)).train.sha256
    (tmp_path / "data_own.py").write_text(SETS + "\ndef own(x):\n    return x / 4\n")
    assert load_splits(job, seed=0, job_folder=str(tmp_path)).train.sha256 != before


# -- batches -----------------------------------------------------------------------------------------------------------


def test_ordered_batches_go_through_a_part_once(colour: Callable[..., Splits]) -> None:
    train = colour(train_samples=8).train
    batches = list(ordered_batches(train, 3))
    assert [len(images) for images, _ in batches] == [3, 3, 2]
    assert torch.equal(torch.cat([images for images, _ in batches]), train.images(np.arange(8)))
    assert train.labels is not None
    assert [label for _, labels in batches if labels is not None for label in labels.tolist()] == train.labels.tolist()


def _epoch(part: Part, *, epoch: int = 0, seed: int = 0, batch_size: int = 3, **spec: Any) -> list[Any]:
    spec = {"flip": False, "crop_padding": 0, **spec}
    return list(augmented_batches(part, batch_size=batch_size, seed=seed, epoch=epoch, **spec))


def test_augmented_batches_are_shuffled_by_seed_and_epoch(job_folder: str) -> None:
    job = DataSpec(dataset="data_sets:indexed", args={"labels": [index % 7 for index in range(50)]}, train_samples=40)
    part = load_splits(job, seed=0, job_folder=job_folder).train

    def order(**spec: Any) -> list[int]:
        images = torch.cat([images for images, _ in _epoch(part, **spec)])[:, 0, 0]
        return (images * 255).round().to(torch.int64)[:, 1].tolist()

    assert order() == order() != order(epoch=1)
    assert order(seed=1) not in (order(), order(epoch=1))
    assert len(set(order())) == 39  # the last partial batch is dropped
    assert set(order()) <= set(_indices(part))
    assert [len(images) for images, _ in _epoch(part, batch_size=64)] == [40]  # unless it is the only one
    for images, labels in _epoch(part):
        assert labels.dtype == torch.int64
        assert [(image[0, 0, 1] * 255).round().item() % 7 for image in images] == labels.tolist()


def test_an_augmented_image_is_a_shifted_and_perhaps_mirrored_one(colour: Callable[..., Splits]) -> None:
    part = colour(train_samples=9).train
    originals = part.images(np.arange(9))
    padded = torch.nn.functional.pad(torch.stack([originals, originals.flip(3)]), (1, 1, 1, 1))
    cuts = padded.unfold(3, 6, 1).unfold(4, 6, 1)  # [mirrored, N, C, top, left, 6, 6]
    seen = set()
    for epoch in range(6):
        for images, _ in _epoch(part, epoch=epoch, flip=True, crop_padding=1):
            for image in images:
                same = (cuts == image[None, None, :, None, None]).flatten(5).all(5).all(2)
                assert same.sum() == 1
                seen.add(tuple(same.nonzero()[0].tolist()[i] for i in (0, 2, 3)))
    assert len(seen) > 12  # of two times three times three


def test_flips_and_crops_computed_by_hand() -> None:
    images = torch.arange(1.0, 5.0).reshape(1, 1, 2, 2).repeat(2, 1, 1, 1)  # 1 2 / 3 4
    assert flipped(images, np.array([True, False])).flatten(1).tolist() == [[2, 1, 4, 3], [1, 2, 3, 4]]
    # Top left of the padded image, and one down of its middle.
    assert cropped(images, 1, np.array([[0, 2], [0, 1]])).flatten(1).tolist() == [[0, 0, 0, 1], [3, 4, 0, 0]]


def test_training_batches_need_labels(job_folder: str) -> None:
    job = DataSpec(dataset="data_sets:indexed", args={"labels": [0] * 9, "labelled": False})
    part = load_splits(job, seed=0, job_folder=job_folder).train
    with pytest.raises(DataError, match="train images: got no labels"):
        augmented_batches(part, batch_size=2, flip=False, crop_padding=0, seed=0, epoch=0)
