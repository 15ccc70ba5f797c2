"""Loading teachers: every form of weights, and every way in which they do not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from dcq_ray.errors import TeacherError
from dcq_ray.spec import TeacherSpec
from dcq_ray.teacher import frozen_teacher, load_state, load_teacher, read_state, state_bytes, state_from_bytes


def lenet_state() -> dict[str, Tensor]:
    from dcq_ray.networks import lenet

    torch.manual_seed(0)
    return lenet().state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_torch_files_in_every_wrapping(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    state = lenet_state()
    stored: Any = {prefix + name: value for name, value in state.items()}
    torch.save({wrapper: stored, "epoch": 3} if wrapper else stored, tmp_path / "net.pt")
    assert equal(read_state(str(tmp_path / "net.pt")), state)
    spec = TeacherSpec(model="dcq_ray:lenet", weights=str(tmp_path / "net.pt"))
    assert equal(dict(load_teacher(spec, job_folder=".").module.state_dict()), state)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    state = lenet_state()
    (tmp_path / "net.safetensors").write_bytes(state_bytes(state, {"model": "lenet"}))
    assert equal(read_state(str(tmp_path / "net.safetensors")), state)
    assert equal(safetensors.torch.load_file(tmp_path / "net.safetensors"), state)


def test_the_callers_module_is_never_changed(tiny_teacher: nn.Module) -> None:
    tiny_teacher.train().requires_grad_(True)
    before = copy.deepcopy(tiny_teacher.state_dict())
    teacher = frozen_teacher(tiny_teacher, "tiny")
    assert tiny_teacher.training
    assert all(parameter.requires_grad for parameter in tiny_teacher.parameters())
    assert not teacher.module.training
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    teacher.module.fc1.weight.zero_()
    assert equal(before, dict(tiny_teacher.state_dict()))
    assert teacher.num_bytes == sum(value.numel() * value.element_size() for value in before.values())


def test_a_mismatch_names_missing_unexpected_and_misshapen_keys() -> None:
    from dcq_ray.networks import lenet

    state = lenet_state()
    del state["fc2.bias"]
    state["extra"] = torch.ones(1)
    state["conv1.weight"] = torch.ones(2, 2)
    with pytest.raises(
        TeacherError, match=r"missing 1: fc2.bias; unexpected 1: extra; of another shape 1: conv1.weight \(\(2, 2\)"
    ):
        load_state(lenet(), state, source="net.pt")


def test_num_batches_tracked_may_be_absent(tiny_teacher: nn.Module) -> None:
    state = {name: value for name, value in tiny_teacher.state_dict().items() if "num_batches" not in name}
    load_state(tiny_teacher, state, source="net.pt")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint at all")
    (tmp_path / "noise.safetensors").write_bytes(b"no checkpoint at all")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "folder.pt").mkdir()
    told = {
        "evil.pt": "would run code",
        "noise.pt": "holds more than tensors|neither",
        "noise.safetensors": "not a whole safetensors file",
        "list.pt": "expected a state_dict",
        "folder.pt": "folder.pt",
        "missing.pt": "missing.pt",
    }
    for name, message in told.items():
        with pytest.raises(TeacherError, match=message):
            read_state(str(tmp_path / name))
    assert "code ran" not in capsys.readouterr().out


def test_weights_that_are_not_finite_are_named() -> None:
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    with pytest.raises(TeacherError, match="weight holds values that are not finite"):
        frozen_teacher(module, "broken")


@pytest.mark.parametrize(
    ("model", "args", "weights", "told"),
    [
        ("dcq_ray:lenett", {}, None, "did you mean lenet"),
        ("torchvision:resnet19", {}, None, "did you mean resnet18"),
        ("torchvision:resnet18", {"depth": 3}, None, "put its arguments under teacher.args"),
        ("torchvision:resnet18", {}, "IMAGENET1K_V9", "it has IMAGENET1K_V1"),
    ],
)
def test_wrong_names_name_near_ones(model: str, args: dict[str, Any], weights: str | None, told: str) -> None:
    with pytest.raises(TeacherError, match=told):
        load_teacher(TeacherSpec(model=model, args=args, weights=weights), job_folder=".")


def test_tied_weights_survive(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    state = state_from_bytes(state_bytes(module.state_dict(), {}), source="memory")
    assert torch.equal(state["1.weight"], module[0].weight)


def test_a_compiled_script_is_refused_since_it_has_no_layers(tmp_path: Path) -> None:
    (tmp_path / "scripted_nets.py").write_text(
        "import torch\n\n\ndef net():\n    return torch.jit.script(torch.nn.Linear(2, 2))\n"
    )
    with pytest.raises(TeacherError, match=r"returned a compiled torch\.jit\.ScriptModule"):
        load_teacher(TeacherSpec(model="scripted_nets:net"), job_folder=str(tmp_path))


def test_classes_that_look_up_their_version_in_the_states_metadata_load(tmp_path: Path) -> None:
    # MNASNet widens its first layers where the metadata says version 1 or nothing.
    spec = TeacherSpec(model="torchvision:mnasnet0_5", args={"num_classes": 3})
    first = load_teacher(spec, job_folder=".")
    safetensors.torch.save_file(first.module.state_dict(), tmp_path / "w.safetensors")
    again = load_teacher(spec.model_copy(update={"weights": str(tmp_path / "w.safetensors")}), job_folder=".")
    assert again.sha256 == first.sha256
