"""What a module must be before it is traced, and how values and errors are told; `test_architectures.py` has the refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dcq_ray.errors import PartitionError
from dcq_ray.partition.interface import check_interface, first_line, same_values, told


def test_what_maps_images_to_logits_passes_and_a_compiled_module_is_refused() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    check_interface(module, torch.zeros(3, 1, 2, 2))
    module._orig_mod = nn.Identity()
    with pytest.raises(PartitionError, match=r"the teacher is compiled \(torch.compile\); give the module itself"):
        check_interface(module, torch.zeros(3, 1, 2, 2))


@given(st.lists(st.sampled_from([0.0, 1.0, float("nan"), float("inf")]), min_size=1, max_size=6))
def test_values_are_the_same_where_both_are_no_number(values: list[float]) -> None:
    tensor = torch.tensor(values)
    assert same_values(tensor, tensor.clone())
    assert not same_values(tensor, torch.tensor([*values, 0.0]))
    assert not same_values(tensor, tensor.double())
    changed = tensor.clone()
    changed[0] = 2.0
    assert not same_values(tensor, changed)


def test_values_are_told_by_their_shape_type_and_keys() -> None:
    assert told(torch.zeros(2, 3)) == "a tensor of shape (2, 3) and type torch.float32"
    assert told({"out": 1, "aux": 2}) == "a dict (out, aux)"
    assert told([{}, {}]) == "a list of 2 (dict)"
    assert told((torch.zeros(1), 2)) == "a tuple of 2 (Tensor, int)"
    assert told(None) == "a NoneType"


def test_of_a_long_error_the_first_sentence_is_told() -> None:
    assert first_line(ValueError("short. And more\nsecond line")) == "short. And more"
    assert first_line(ValueError("a" * 100 + ". " + "b" * 100)) == "a" * 100
    assert first_line(ValueError()) == "ValueError"
