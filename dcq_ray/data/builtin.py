"""Data sets with a name: scikit-learn's digits and torchvision's MNIST, Fashion-MNIST, CIFAR-10 and SVHN.

Owns where their files lie and how they are read. Files that are there are read in place; a folder is written to only
where a set is missing and the job lets torchvision download it.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcq_ray.data.choice import balanced_choice, generator_of
from dcq_ray.data.source import Source, Sources, array_source
from dcq_ray.errors import DataError
from dcq_ray.spec import DataSpec

_NUM_CLASSES = 10
_NUM_DIGITS_TEST = 360


def digits_sources(data: DataSpec) -> Sources:
    """scikit-learn's 1,797 handwritten digits, 8x8: 360 of them, always the same, for the test.

    Raises DataError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "data.dataset: digits comes with scikit-learn, which is not installed; pip install 'dcq-ray[digits]'"
        ) from error
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]  # values are 0 to 16
    labels = bunch.target.astype(np.int64)
    test = np.sort(balanced_choice(labels, len(labels), _NUM_DIGITS_TEST, generator_of(0)))
    train = np.setdiff1d(np.arange(len(labels)), test)

    def part(indices: NDArray[np.int64]) -> Source:
        return array_source(images[indices], labels[indices], data=data, where="scikit-learn's digits")

    return Sources(train=part(train), test=part(test), num_classes=_NUM_CLASSES)


# -- MNIST and Fashion-MNIST -------------------------------------------------------------------------------------------


def mnist_sources(data: DataSpec, class_name: str) -> Sources:
    """`MNIST` or `FashionMNIST` (torchvision's class names), from the IDX files in root/<class name>/raw.

    Each file may be compressed (.gz) or not. Raises DataError.
    """
    folder = _root(data) / class_name / "raw"
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if any(_idx_file(folder, name) is None for name in names):
        expected = f"{', '.join(f'{name}.gz' for name in names)} in {folder}"
        _torchvision_set(class_name, data, expected, train=True)

    def part(name: str) -> Source:
        images = _read_idx(folder, f"{name}-images-idx3-ubyte", num_dimensions=3)
        labels = _read_idx(folder, f"{name}-labels-idx1-ubyte", num_dimensions=1)
        if len(images) != len(labels):
            raise DataError(f"{folder}: got {len(images)} {name} images and {len(labels)} labels; replace the files")
        return array_source(images[:, None], labels.astype(np.int64), data=data, where=f"{folder} ({name})")

    return Sources(train=part("train"), test=part("t10k"), num_classes=_NUM_CLASSES)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, name: str, *, num_dimensions: int) -> NDArray[np.uint8]:
    """An IDX file of bytes: two zeros, the type 8, the number of dimensions, each extent in 4 bytes, and the data."""
    path = _idx_file(folder, name)
    if path is None:
        raise DataError(f"{folder / name}.gz: no such file, even after torchvision's download; put it there")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: it cannot be read ({type(error).__name__}: {error}); replace it") from error
    magic = bytes([0, 0, 8, num_dimensions])
    header_bytes = 4 + 4 * num_dimensions
    if content[:4] != magic or len(content) < header_bytes:
        raise DataError(f"{path}: got a file that begins with {content[:4].hex()}, expected {magic.hex()}; replace it")
    shape = tuple(int(extent) for extent in np.frombuffer(content, ">u4", num_dimensions, 4))
    if len(content) - header_bytes != math.prod(shape):
        raise DataError(
            f"{path}: got {len(content) - header_bytes} bytes of data, expected {math.prod(shape)} for {list(shape)}; "
            "replace it"
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


# -- CIFAR-10 and SVHN -------------------------------------------------------------------------------------------------


def cifar10_sources(data: DataSpec) -> Sources:
    """CIFAR-10 from root/cifar-10-batches-py, checked against its makers' md5 sums; raises DataError."""
    folder = _root(data) / "cifar-10-batches-py"
    expected = f"the folder {folder} with data_batch_1 to data_batch_5, test_batch and batches.meta"

    def part(train: bool) -> Source:
        dataset = _torchvision_set("CIFAR10", data, expected, train=train)
        images = np.asarray(dataset.data).transpose(0, 3, 1, 2)
        where = f"{folder} ({'train' if train else 'test'})"
        return array_source(images, np.array(dataset.targets, np.int64), data=data, where=where)

    return Sources(train=part(True), test=part(False), num_classes=_NUM_CLASSES)


def svhn_sources(data: DataSpec) -> Sources:
    """SVHN's cropped digits from root/train_32x32.mat and root/test_32x32.mat, by md5; raises DataError."""
    root = _root(data)
    if importlib.util.find_spec("scipy") is None:
        raise DataError("data.dataset: svhn is read with scipy, which is not installed; pip install 'dcq-ray[all]'")

    def part(split: str) -> Source:
        dataset = _torchvision_set(
            "SVHN", data, f"{root / 'train_32x32.mat'} and {root / 'test_32x32.mat'}", split=split
        )
        labels = np.asarray(dataset.labels, np.int64)
        return array_source(np.asarray(dataset.data), labels, data=data, where=f"{root} ({split})")

    return Sources(train=part("train"), test=part("test"), num_classes=_NUM_CLASSES)


def _root(data: DataSpec) -> Path:
    if data.root is None:
        raise DataError(f"data.root: got null, expected the folder of {data.dataset}")
    return Path(data.root).expanduser()


def _torchvision_set(class_name: str, data: DataSpec, expected: str, **which: Any) -> Any:
    """A data set of torchvision, downloaded only where it is missing and the job allows."""
    from torchvision import datasets

    make: Callable[..., Any] = getattr(datasets, class_name)
    root = str(_root(data))
    try:
        return make(root, download=False, **which)
    except (RuntimeError, OSError) as missing:
        if not data.download:
            raise DataError(
                f"{data.dataset}: not found or damaged below {root} ({missing}); data.download is false; "
                f"expected {expected}; put them there, or set data.download: true"
            ) from missing
    try:
        return make(root, download=True, **which)
    except Exception as failed:  # networks and archives fail in many ways
        raise DataError(
            f"{data.dataset}: not found below {root}, and torchvision's download failed ({failed}); "
            f"expected {expected}; put them there, and nothing is downloaded"
        ) from failed
