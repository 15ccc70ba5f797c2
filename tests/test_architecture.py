"""Rules that hold for the repository as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "dcq_ray").rglob("*.py")
    if path.stem not in ("__main__",)
)


def test_core_imports_neither_ray_nor_plots_nor_torchvision() -> None:
    core = [name for name in MODULES if not name.startswith("dcq_ray.remote")]
    lines = [f"import {name}" for name in core]
    # torchvision brings torch._dynamo along, which takes longer to import than all else together.
    check = (
        "import sys; print(sorted({'ray', 'matplotlib', 'onnx', 'torchvision', 'torch._dynamo'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, check])], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_command_line_imports_no_torch_before_a_command_runs() -> None:
    check = "import sys, dcq_ray.cli; print(sorted({'ray', 'torch', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_owns(name: str) -> None:
    path = ROOT / Path(*name.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    assert source.startswith('"""')


def test_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    top = {path.name for path in (ROOT / "dcq_ray").iterdir() if path.suffix == ".py" or path.is_dir()}
    top -= {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    assert {name for name in top if name not in readme} == set()


def test_every_test_module_mirrors_a_module() -> None:
    names = {name.removeprefix("dcq_ray.").replace(".", "_") for name in MODULES} | {
        "architecture",
        "packaging",
        "jobs",
        "paper_jobs",
        "cluster_files",
        "dockerfile",
        "kuberay",
        *(path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py")),
    }
    names.discard("__init__")
    strays = {
        path.stem
        for path in (ROOT / "tests").glob("test_*.py")
        if not any(path.stem.removeprefix("test_").startswith(name) for name in names)
    }
    assert strays == set()
