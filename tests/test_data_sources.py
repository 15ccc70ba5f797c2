"""Every kind of data set: what is read from its files, and what is said when they are missing or wrong."""

from __future__ import annotations

import gzip
import io
import os
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from dcq_ray.data import Part, Splits, load_splits
from dcq_ray.errors import DataError
from dcq_ray.spec import DataSpec


@pytest.fixture(autouse=True)
def _own_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def _load(dataset: str, root: Path | None = None, job_folder: str = ".", **spec: Any) -> Splits:
    data = DataSpec(dataset=dataset, root=None if root is None else str(root), **spec)
    return load_splits(data, seed=0, job_folder=job_folder)


def _test_part(splits: Splits) -> Part:
    assert splits.test is not None
    return splits.test


def _pixels(part: Part) -> np.ndarray:
    """All pixels [N, C, H, W] as bytes."""
    return (part.images(np.arange(len(part))) * 255).round().to(torch.uint8).numpy()


def _random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _listing(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits_have_a_test_part_of_their_own() -> None:
    splits = _load("digits", train_samples=1000, held_out_samples=200)
    test = _test_part(splits)
    assert (len(splits.train), len(splits.held_out), len(test)) == (1000, 200, 360)
    assert (splits.num_classes, splits.input_shape) == (10, (1, 8, 8))
    for part in (splits.train, splits.held_out, test):
        assert part.labels is not None
        assert np.ptp(np.bincount(part.labels)) <= 1
    pixels = _pixels(splits.train)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert len(np.unique(pixels)) == 17
    other_seed = load_splits(DataSpec(dataset="digits"), seed=5, job_folder=".")
    assert _test_part(other_seed).sha256 == test.sha256


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'dcq-ray\[digits\]'"):
        _load("digits")


# -- MNIST and Fashion-MNIST -------------------------------------------------------------------------------------------


def _idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def _write_mnist(root: Path, name: str = "MNIST", *, compressed: bool = True) -> dict[str, np.ndarray]:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    arrays = {
        "train-images-idx3-ubyte": _random_images(20, 5, 4),
        "train-labels-idx1-ubyte": np.arange(20, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": _random_images(8, 5, 4)[::-1],
        "t10k-labels-idx1-ubyte": np.arange(8, dtype=np.uint8),
    }
    for file, array in arrays.items():
        if compressed:
            (folder / f"{file}.gz").write_bytes(gzip.compress(_idx(array)))
        else:
            (folder / file).write_bytes(_idx(array))
    return arrays


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(("dataset", "name"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files_are_read_in_place(dataset: str, name: str, compressed: bool, tmp_path: Path) -> None:
    arrays = _write_mnist(tmp_path, name, compressed=compressed)
    before = _listing(tmp_path)
    splits = _load(dataset, tmp_path)
    test = _test_part(splits)
    assert np.array_equal(_pixels(test)[:, 0], arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(test.labels, arrays["t10k-labels-idx1-ubyte"])
    assert (splits.num_classes, splits.input_shape) == (10, (1, 5, 4))
    assert _listing(tmp_path) == before


def test_identity_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    _write_mnist(tmp_path / "a")
    _write_mnist(tmp_path / "b", compressed=False)
    first, second = _load("mnist", tmp_path / "a"), _load("mnist", tmp_path / "b")
    assert first.train.sha256 == second.train.sha256
    assert _test_part(first).sha256 == _test_part(second).sha256


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"\0\0\x08\x01" + b"\0" * 30, "begins with 00000801, expected 00000803"),
        ("train-labels-idx1-ubyte", b"\0\0", "begins with 0000, expected 00000801"),
        ("train-images-idx3-ubyte", _idx(np.zeros((20, 5, 4), np.uint8))[:-1], "got 399 bytes of data, expected 400"),
        ("t10k-labels-idx1-ubyte", _idx(np.zeros(7, np.uint8)), "got 8 t10k images and 7 labels"),
    ],
)
def test_damaged_idx_files_are_named(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    _write_mnist(tmp_path, compressed=False)
    (tmp_path / "MNIST" / "raw" / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        _load("mnist", tmp_path)


def test_a_truncated_gz_file_is_named(tmp_path: Path) -> None:
    _write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: it cannot be read \(EOFError"):
        _load("mnist", tmp_path)


# -- torchvision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("mnist", "train-images-idx3-ubyte.gz, .* in .*MNIST/raw"),
        ("fashion-mnist", ".*t10k-labels-idx1-ubyte.gz in .*FashionMNIST/raw"),
        ("cifar10", "the folder .*/cifar-10-batches-py with data_batch_1"),
        ("svhn", ".*train_32x32.mat and .*test_32x32.mat"),
    ],
)
def test_a_missing_set_says_which_files_to_put_where(
    dataset: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=f"data.download is false; expected {expected}"):
        _load(dataset, tmp_path, download=False)
    assert list(tmp_path.iterdir()) == []

    def unreachable(*_: Any, **options: Any) -> None:
        raise URLError("no route") if options["download"] else RuntimeError("Dataset not found")

    for name in ("MNIST", "FashionMNIST", "CIFAR10", "SVHN"):
        monkeypatch.setattr(f"torchvision.datasets.{name}", unreachable)
    with pytest.raises(DataError, match=f"download failed .*no route.*expected {expected}"):
        _load(dataset, tmp_path)


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist", "cifar10", "svhn", "imagefolder"])
def test_a_set_of_files_needs_a_root(dataset: str) -> None:
    with pytest.raises(DataError, match=r"data\.root: got null"):
        _load(dataset)


def test_mnist_is_read_once_it_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(root: str, *, train: bool, download: bool) -> None:
        if not download:
            raise RuntimeError("Dataset not found")
        _write_mnist(Path(root), compressed=False)

    monkeypatch.setattr("torchvision.datasets.MNIST", fake)
    assert len(_test_part(_load("mnist", tmp_path))) == 8


def test_cifar10_is_what_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, root: str, *, train: bool, download: bool) -> None:
            assert (root, download) == (str(tmp_path), False)
            self.data = _random_images(30 if train else 10, 32, 32, 3)
            self.targets = [index % 10 for index in range(len(self.data))]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    splits = _load("cifar10", tmp_path)
    assert (splits.input_shape, splits.num_classes, len(splits.train)) == ((3, 32, 32), 10, 27)
    assert np.array_equal(_pixels(_test_part(splits)), _random_images(10, 32, 32, 3).transpose(0, 3, 1, 2))
    assert np.array_equal(_test_part(splits).labels, np.arange(10))


def test_svhn_is_what_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, root: str, *, split: str, download: bool) -> None:
            self.data = _random_images(20 if split == "train" else 10, 3, 32, 32)
            self.labels = np.arange(len(self.data)) % 10

    monkeypatch.setattr("torchvision.datasets.SVHN", Fake)
    splits = _load("svhn", tmp_path, image_size=(40, 40))
    assert (splits.input_shape, splits.num_classes, len(splits.train)) == ((3, 40, 40), 10, 18)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(DataError, match=r"read with scipy, .*pip install 'dcq-ray\[all\]'"):
        _load("svhn", tmp_path)


# -- npz ---------------------------------------------------------------------------------------------------------------


def _encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def _joined(files: list[bytes]) -> dict[str, np.ndarray]:
    content = np.frombuffer(b"".join(files), np.uint8)
    return {"jpeg": content, "offsets": np.cumsum([0, *map(len, files)])}


LABELS = np.arange(10) % 3


def test_npz_images_are_read_in_place(tmp_path: Path) -> None:
    images = _random_images(10, 4, 6, 3)
    np.savez(tmp_path / "train.npz", images=images, labels=LABELS, classes=np.array(["cat", None], object))
    np.savez_compressed(tmp_path / "test.npz", images=images, labels=LABELS.astype(np.uint8))
    before = _listing(tmp_path)
    splits = _load("npz", tmp_path, train="train.npz", test="test.npz", held_out_samples=4)
    assert np.array_equal(_pixels(_test_part(splits)), images.transpose(0, 3, 1, 2))
    assert (splits.num_classes, splits.input_shape, len(splits.train)) == (3, (3, 4, 6), 6)
    assert _listing(tmp_path) == before


def test_npz_may_be_grey_and_lack_labels_and_a_test_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=_random_images(10, 4, 6))
    splits = _load("npz", tmp_path, train="train.npz")
    assert (splits.test, splits.num_classes, splits.train.labels, splits.input_shape) == (None, None, None, (1, 4, 6))


def test_joined_files_are_the_images_that_they_encode(tmp_path: Path) -> None:
    images = _random_images(10, 4, 6, 3)
    np.savez(tmp_path / "arrays.npz", images=images, labels=LABELS)
    np.savez(tmp_path / "files.npz", **_joined([_encoded(image) for image in images]), labels=LABELS)
    for spec in ({}, {"image_size": (3, 3)}, {"channels": 1}):
        arrays = _load("npz", tmp_path, train="arrays.npz", **spec)
        files = _load("npz", tmp_path, train="files.npz", **spec)
        assert np.array_equal(_pixels(files.train), _pixels(arrays.train))
        assert files.train.sha256 == arrays.train.sha256


def test_joined_files_of_several_sizes_need_an_image_size(tmp_path: Path) -> None:
    files = [_encoded(_random_images(5 + index, 6, 3)) for index in range(10)]
    np.savez(tmp_path / "train.npz", **_joined(files), labels=LABELS)
    with pytest.raises(DataError, match=r"train\.npz: got \d+x6 pixels after one of \d+x6.*set data.image_size"):
        _load("npz", tmp_path, train="train.npz")
    assert _load("npz", tmp_path, train="train.npz", image_size=(4, 4)).input_shape == (3, 4, 4)


def test_a_broken_file_among_joined_ones_is_named(tmp_path: Path) -> None:
    files = [_encoded(_random_images(4, 4, 3)) for _ in range(10)]
    files[7] = files[7][:40]
    np.savez(tmp_path / "train.npz", **_joined(files), labels=LABELS)
    with pytest.raises(DataError, match=r"image 7 of .*train\.npz: it cannot be decoded"):
        _load("npz", tmp_path, train="train.npz")


GOOD = _random_images(10, 4, 4, 3)
CONTENT = np.frombuffer(_encoded(GOOD[0]), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": GOOD, "labels": LABELS}, "got keys labels, pictures, expected `images`, or `jpeg` and `offsets`"),
        ({"jpeg": CONTENT, "labels": LABELS}, "got keys jpeg, labels, expected"),
        ({"images": GOOD.astype(np.float32)}, "images: got float32, expected uint8"),
        ({"images": GOOD.transpose(0, 3, 1, 2)}, r"images: got uint8 \[10, 3, 4, 4\], expected \[N, H, W, C\]"),
        ({"images": GOOD[0, 0]}, r"images: got uint8 \[4, 3\]"),
        ({"images": GOOD[:0]}, r"images: got uint8 \[0, 4, 4, 3\], expected at least one image"),
        ({"images": GOOD, "labels": LABELS[:9]}, "got 9 labels for 10 images"),
        ({"images": GOOD, "labels": LABELS - 1}, "labels: got -1 at index 0, expected 0 or more"),
        ({"images": GOOD, "labels": LABELS / 2}, r"labels: got float64 \[10\], expected integers \[N\]"),
        ({"images": GOOD, "labels": np.eye(10, dtype=int)}, r"labels: got int64 \[10, 10\]"),
        ({"jpeg": CONTENT.astype(int), "offsets": np.arange(3)}, "jpeg: got int64"),
        ({"jpeg": CONTENT, "offsets": np.arange(3.0)}, "offsets: got float64"),
        ({"jpeg": CONTENT, "offsets": np.array([0])}, "offsets: got 1 of them"),
        ({"jpeg": CONTENT, "offsets": np.array([0, 9, 9])}, "offsets: got 9 before 9 at index 1, expected rising"),
        ({"jpeg": CONTENT, "offsets": np.array([0, 9], np.uint64)[::-1]}, "offsets: got 9 before 0 at index 0"),
        ({"jpeg": CONTENT, "offsets": np.array([0, 10**6])}, "offsets: got 0 to 1000000, expected them within"),
        ({"jpeg": CONTENT, "offsets": np.array([-1, 10])}, "offsets: got -1 to 10"),
        ({"images": np.array([None, 1], object)}, "cannot be read as .npz without pickle"),
    ],
)
def test_a_malformed_npz_says_what_it_got(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", **arrays)
    with pytest.raises(DataError, match=message) as raised:
        _load("npz", tmp_path, train="train.npz")
    assert "train.npz" in str(raised.value)


def test_what_is_no_npz_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("images")
    np.save(tmp_path / "array.npy", GOOD)
    np.savez(tmp_path / "whole.npz", images=GOOD)
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:300])
    for name in ("text.npz", "array.npy", "half.npz", "."):
        with pytest.raises(DataError, match=r"cannot be read as \.npz"):
            _load("npz", tmp_path, train=name)
    with pytest.raises(DataError, match=r"absent\.npz: no such file"):
        _load("npz", tmp_path, train="absent.npz")
    with pytest.raises(DataError, match=r"data\.train: got null"):
        _load("npz", tmp_path)


def test_train_and_test_images_must_have_one_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=GOOD, labels=LABELS)
    np.savez(tmp_path / "test.npz", images=_random_images(10, 5, 5, 3), labels=LABELS)
    with pytest.raises(DataError, match=r"test images: got \[3, 5, 5\] where train images have \[3, 4, 4\]"):
        _load("npz", tmp_path, train="train.npz", test="test.npz")


# -- imagefolder -------------------------------------------------------------------------------------------------------


def _write_folder(root: Path, *, test: str | None = "test", size: tuple[int, int] = (5, 6)) -> None:
    parts = ["train"] if test is None else ["train", test]
    for part in parts:
        for label, name in enumerate(["cat", "dog", "eel"]):
            (root / part / name).mkdir(parents=True)
            for index in range(4):
                image = np.full((*size, 3), 80 * label + index, np.uint8)
                (root / part / name / f"{index}.png").write_bytes(_encoded(image))


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_are_classes_in_order_of_their_names(test: str, tmp_path: Path) -> None:
    _write_folder(tmp_path, test=test)
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    (tmp_path / "train" / "cat" / ".hidden.png").touch()
    before = _listing(tmp_path)
    splits = _load("imagefolder", tmp_path, held_out_samples=3)
    part = _test_part(splits)
    assert (splits.num_classes, splits.input_shape, len(splits.train)) == (3, (3, 5, 6), 9)
    assert part.labels is not None
    assert part.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert _pixels(part)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 80, 81, 82, 83, 160, 161, 162, 163]
    assert _listing(tmp_path) == before


def test_images_in_subfolders_and_in_grey_are_found(tmp_path: Path) -> None:
    _write_folder(tmp_path, test=None)
    (tmp_path / "train" / "cat" / "more").mkdir()
    (tmp_path / "train" / "cat" / "more" / "x.JPG").write_bytes(_encoded(_random_images(5, 6), "JPEG"))
    splits = _load("imagefolder", tmp_path, held_out_samples=1)
    assert (len(splits.train), splits.test, splits.input_shape) == (12, None, (3, 5, 6))


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for index in range(6):
        (tmp_path / "train" / f"{index}.png").write_bytes(_encoded(_random_images(4, 4, 3)))
    splits = _load("imagefolder", tmp_path)
    assert (splits.train.labels, splits.num_classes, len(splits.train)) == (None, None, 5)


def test_folder_images_are_the_same_in_any_batch_and_as_from_npz(tmp_path: Path) -> None:
    images = _random_images(10, 8, 6, 3)
    for label in range(3):
        (tmp_path / "train" / str(label)).mkdir(parents=True)
    for index, image in enumerate(images):
        (tmp_path / "train" / str(LABELS[index]) / f"{index}.png").write_bytes(_encoded(image))
    order = np.argsort(LABELS, kind="stable")  # a folder's order
    np.savez(tmp_path / "train.npz", images=images[order], labels=LABELS[order])
    for spec in ({}, {"image_size": (4, 4)}, {"image_size": (4, 4), "channels": 1}):
        folder, npz = _load("imagefolder", tmp_path, **spec), _load("npz", tmp_path, train="train.npz", **spec)
        together = folder.train.images(np.arange(9))
        assert torch.equal(together, npz.train.images(np.arange(9)))
        for position in range(9):
            assert torch.equal(folder.train.images(np.array([position]))[0], together[position])


def test_identity_of_a_folder_covers_names_sizes_and_times_but_not_its_place(tmp_path: Path) -> None:
    _write_folder(tmp_path / "a")
    for path in (tmp_path / "a").rglob("*.png"):
        os.utime(path, ns=(0, 10**18))
    before = _load("imagefolder", tmp_path / "a").train.sha256
    (tmp_path / "a").rename(tmp_path / "b")
    assert _load("imagefolder", tmp_path / "b").train.sha256 == before
    for path in (tmp_path / "b" / "train").rglob("*.png"):
        os.utime(path, ns=(0, 10**18 + 1))
    assert _load("imagefolder", tmp_path / "b").train.sha256 != before


def test_images_of_several_sizes_need_an_image_size(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    (tmp_path / "test" / "eel" / "2.png").write_bytes(_encoded(_random_images(9, 12, 3)))
    with pytest.raises(DataError, match=r"eel/2\.png: got 9x12 pixels, but test/cat/0\.png has 5x6.*data.image_size"):
        _load("imagefolder", tmp_path)
    part = _test_part(_load("imagefolder", tmp_path, image_size=(4, 4)))
    together = part.images(np.arange(12))
    assert together.shape == (12, 3, 4, 4)
    assert all(torch.equal(part.images(np.array([position]))[0], together[position]) for position in range(12))


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    path = tmp_path / "test" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:50])
    part = _test_part(_load("imagefolder", tmp_path))
    with pytest.raises(DataError, match=r"dog/1\.png: it cannot be decoded"):
        part.images(np.arange(12))


def test_an_image_of_16_bits_is_refused(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    (tmp_path / "test" / "cat" / "0.png").write_bytes(_encoded(np.full((5, 6), 999, np.uint16)))
    with pytest.raises(DataError, match=r"cat/0\.png: got Pillow mode I;16, expected 8 bits"):
        _load("imagefolder", tmp_path)


def test_a_folder_of_the_wrong_layout_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train: no such folder; expected root/train/<class>/<image>"):
        _load("imagefolder", tmp_path)
    _write_folder(tmp_path)
    (tmp_path / "test" / "fox").mkdir()
    with pytest.raises(DataError, match=r"got 1 class folder\(s\) that .*train lacks, such as 'fox'"):
        _load("imagefolder", tmp_path)
    (tmp_path / "train" / "fox").mkdir()
    with pytest.raises(DataError, match="train/fox: no images in it"):
        _load("imagefolder", tmp_path)


# -- functions of the user's own ---------------------------------------------------------------------------------------

OWN = """
import numpy as np
import torch
from PIL import Image

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
LABELS = [index % 3 for index in range(10)]

class Set:
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = IMAGES[index]
        if self.kind == "pillow":
            image = Image.fromarray(image)
        elif self.kind == "uint8 tensor":
            image = torch.from_numpy(image).permute(2, 0, 1)
        elif self.kind == "float tensor":
            image = torch.from_numpy(image).permute(2, 0, 1) / 255
        elif self.kind == "grows":
            image = IMAGES[index, :, : 1 + index % 2]
        elif self.kind == "raises":
            raise OSError("gone")
        return image, LABELS[index]

def dataset(kind):
    return {"train": Set(kind), "test": Set(kind)}

def floats():
    images = IMAGES.transpose(0, 3, 1, 2).astype(np.float32) / 255
    return {"train": (images, LABELS), "test": (torch.from_numpy(images), torch.tensor(LABELS))}

def returns(what):
    values = {"list": [1, 2], "typo": {"training": (IMAGES, LABELS)}, "none": {"train": None},
              "triple": {"train": (IMAGES, LABELS, 3)}, "array": {"train": IMAGES}, "number": {"train": 3},
              "double": {"train": (IMAGES / 255, LABELS)},
              "bright": {"train": (IMAGES.transpose(0, 3, 1, 2).astype(np.float32), LABELS)},
              "nan": {"train": (np.full((10, 1, 4, 4), np.nan, np.float32), LABELS)},
              "alpha": {"train": (np.zeros((10, 4, 4, 4), np.uint8), LABELS)},
              "empty": {"train": []}, "short": {"train": (IMAGES, LABELS[1:])}}
    return values[what]

def raises(size=3):
    raise RuntimeError(f"no server for {size}")
"""


@pytest.fixture(scope="module")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("job")
    (folder / "own_sets.py").write_text(OWN)
    return str(folder)


@pytest.mark.parametrize("kind", ["array", "pillow", "uint8 tensor", "float tensor"])
def test_a_dataset_of_ones_own_is_read_whatever_its_images_are(kind: str, job_folder: str) -> None:
    splits = _load("own_sets:dataset", job_folder=job_folder, args={"kind": kind})
    assert np.array_equal(_pixels(_test_part(splits)), _random_images(10, 4, 6, 3).transpose(0, 3, 1, 2))
    assert np.array_equal(_test_part(splits).labels, LABELS)
    assert (splits.num_classes, splits.input_shape) == (3, (3, 4, 6))


def test_arrays_of_ones_own_may_be_floats(job_folder: str) -> None:
    splits = _load("own_sets:floats", job_folder=job_folder)
    images = _test_part(splits).images(np.arange(10))
    assert np.array_equal(images.numpy(), _random_images(10, 4, 6, 3).transpose(0, 3, 1, 2).astype(np.float32) / 255)
    grey = _load("own_sets:floats", job_folder=job_folder, channels=1, image_size=(3, 3))
    assert grey.input_shape == (1, 3, 3)


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        ("returns", {"what": "list"}, r'it returned a list, expected \{"train"'),
        ("returns", {"what": "typo"}, r"it returned the keys \['training'\], expected"),
        ("returns", {"what": "none"}, 'returned None for "train"'),
        ("returns", {"what": "triple"}, "got a tuple of 3, expected"),
        ("returns", {"what": "array"}, "got a ndarray, expected"),
        ("returns", {"what": "number"}, "got a int, expected"),
        ("returns", {"what": "double"}, r"images: got float64 \[10, 4, 6, 3\], expected uint8 \[N, H, W, C\]"),
        (
            "returns",
            {"what": "bright"},
            r"10 of 10 images .*: image 0 of .*: got float32 from [\d.]+ to [\d.]+, expected \[0, 1\]",
        ),
        ("returns", {"what": "nan"}, "got float32 from nan to nan"),
        ("returns", {"what": "alpha"}, r"got uint8 \[10, 4, 4, 4\], expected \[N, H, W, C\] with 1 or 3 channels"),
        ("returns", {"what": "empty"}, "got a list of 0, expected"),
        ("returns", {"what": "short"}, "got 9 labels for 10 images"),
        ("dataset", {"kind": "grows"}, r"image 1 of .*: got uint8 \[4, 2, 3\] after uint8 \[4, 1, 3\]"),
        ("dataset", {"kind": "raises"}, r"image 0 of .*: .*reading it raised OSError: gone \(.*own_sets\.py, line"),
        ("dataset", {"colour": 1}, "called with data.args {'colour': 1}, it raised TypeError"),
        ("raises", {"size": 7}, r"it raised RuntimeError: no server for 7 \(.*own_sets\.py, line"),
        ("datset", {}, "data.dataset .*did you mean 'dataset'"),
    ],
)
def test_a_function_of_ones_own_is_told_what_it_returned(
    function: str, args: dict[str, Any], message: str, job_folder: str
) -> None:
    with pytest.raises(DataError, match=message):
        _load(f"own_sets:{function}", job_folder=job_folder, args=args)


# -- real data ---------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist"])
def test_the_official_files_are_read(dataset: str, data_root: Path) -> None:
    splits = _load(dataset, data_root, download=False, train_samples=100)
    test = _test_part(splits)
    assert (len(splits.train), len(splits.held_out), len(test)) == (100, 5000, 10_000)
    assert splits.held_out.labels is not None
    assert np.bincount(splits.held_out.labels).tolist() == [500] * 10
    if dataset == "mnist":
        assert test.labels is not None
        assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.data
def test_the_same_pictures_as_jpeg_are_nearly_the_lossless_ones(data_root: Path) -> None:
    lossless = np.load(data_root / "cifar10-lossless4k" / "cifar10_batch1_first4000.npz")
    train = "cifar10_jpeg_train.npz"
    from dcq_ray.data.npz import npz_sources

    source = npz_sources(DataSpec(dataset="npz", root=str(data_root / "cifar10-jpeg"), train=train)).train
    some = np.arange(0, 4000, 97)
    decoded = source.pick(lossless["jpeg_train_index"][some]).read(np.arange(len(some))).transpose(0, 2, 3, 1)
    error = np.sqrt(((decoded.astype(float) - lossless["images"][some]) ** 2).mean((1, 2, 3)))
    assert error.max() < 18  # of 255; the data folder's README says 17.9
    assert source.labels is not None
    assert np.array_equal(source.labels[lossless["jpeg_train_index"]], lossless["labels"])
