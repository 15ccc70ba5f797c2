"""Objects of this process under names that a job can hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcq_ray import given
from dcq_ray.callables import load_callable
from dcq_ray.errors import TeacherError, UsageError


def test_a_given_model_is_copied_as_its_name_is_called() -> None:
    module = nn.Linear(3, 2)
    given.give_model("runs/copied", module)
    function = load_callable(given.MODEL, folder=".", where="teacher.model", error=TeacherError)
    first, second = function(key="runs/copied"), function(key="runs/copied")
    assert len({id(first), id(second), id(module)}) == 3
    assert torch.equal(first.weight, module.weight)


def test_the_last_that_was_given_counts() -> None:
    given.give_images("runs/twice", {"train": 1, "test": None})
    given.give_images("runs/twice", {"train": 2, "test": None})
    function = load_callable(given.IMAGES, folder=".", where="data.dataset", error=TeacherError)
    assert function(key="runs/twice") == {"train": 2, "test": None}


@pytest.mark.parametrize("function", [given.model, given.images])
def test_another_process_is_told_what_to_do(function: object) -> None:
    with pytest.raises(UsageError, match=r"'runs/unknown'.*call dcq_ray.quantize with it again"):
        function("runs/unknown")  # type: ignore[operator]
