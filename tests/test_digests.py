"""Digests see content, not memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcq_ray.digests import file_sha256, json_sha256, library_versions, tensors_sha256


def test_layout_and_order_do_not_matter_and_content_does() -> None:
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    strided = weight.t().contiguous().t()
    assert not strided.is_contiguous()
    one = tensors_sha256({"a": weight, "b": torch.tensor(1)})
    assert tensors_sha256({"b": torch.tensor(1), "a": strided}) == one
    others = [
        {"a": weight + 1, "b": torch.tensor(1)},
        {"a": weight.reshape(3, 2), "b": torch.tensor(1)},
        {"a": weight.double(), "b": torch.tensor(1)},
        {"c": weight, "b": torch.tensor(1)},
        {"a": weight},
    ]
    assert len({one, *(tensors_sha256(other) for other in others)}) == len(others) + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_every_dtype(dtype: torch.dtype) -> None:
    digests = {tensors_sha256({"a": torch.tensor(values).to(dtype)}) for values in ([0, 1], [1, 0], 0, 1)}
    assert len(digests) == 4


def test_empty_tensors_have_digests() -> None:
    assert tensors_sha256({"a": torch.empty(0, 2)}) != tensors_sha256({"a": torch.empty(0, 3)})


def test_json_is_canonical() -> None:
    assert json_sha256({"b": [1, 2.5, None], "a": "ü"}) == json_sha256({"a": "ü", "b": [1, 2.5, None]})
    with pytest.raises(ValueError):
        json_sha256(float("nan"))
    with pytest.raises(TypeError):
        json_sha256(object())


def test_file_by_known_value(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_versions_name_the_libraries_that_make_numbers() -> None:
    assert {"dcq_ray", "python", "torch", "numpy"} <= set(library_versions())
