"""References to users' functions: what they name, and what is said when they name nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dcq_ray.callables import describe_failure, importable_from, load_callable
from dcq_ray.errors import DataError, TeacherError


@pytest.fixture(autouse=True)
def _own_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_function_beside_the_job_is_found_and_called(tmp_path: Path) -> None:
    (tmp_path / "callables_nets.py").write_text("def make(width=2):\n    return width * 10\n")
    function = load_callable("callables_nets:make", folder=str(tmp_path), where="teacher.model", error=TeacherError)
    assert function(width=3) == 30


def test_a_module_in_a_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "callables_pkg").mkdir()
    (tmp_path / "callables_pkg" / "__init__.py").touch()
    (tmp_path / "callables_pkg" / "nets.py").write_text("class Net:\n    pass\n")
    found = load_callable("callables_pkg.nets:Net", folder=str(tmp_path), where="teacher.model", error=TeacherError)
    assert found.__name__ == "Net"


def test_a_folder_is_put_first_and_once(tmp_path: Path) -> None:
    importable_from(str(tmp_path))
    importable_from(str(tmp_path / "." / "x" / ".."))
    assert sys.path[0] == str(tmp_path.resolve())
    assert sys.path.count(str(tmp_path.resolve())) == 1


def test_a_module_written_after_the_first_import_is_found(tmp_path: Path) -> None:
    importable_from(str(tmp_path))
    with pytest.raises(DataError):
        load_callable("callables_late:f", folder=str(tmp_path), where="data.transform", error=DataError)
    (tmp_path / "callables_late.py").write_text("def f():\n    return 1\n")
    assert load_callable("callables_late:f", folder=str(tmp_path), where="data.transform", error=DataError)() == 1


@pytest.mark.parametrize("reference", ["nets", "nets:", ":make", "nets.make", "nets:make()", "a..b:c", "../nets:make"])
def test_a_malformed_reference_says_what_is_expected(reference: str, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"teacher\.model .*expected `package\.module:function`"):
        load_callable(reference, folder=str(tmp_path), where="teacher.model", error=TeacherError)


def test_a_missing_module_names_near_ones(tmp_path: Path) -> None:
    (tmp_path / "callables_networks.py").touch()
    with pytest.raises(TeacherError, match=r"no module 'callables_netwrks'; did you mean 'callables_networks'\?"):
        load_callable("callables_netwrks:make", folder=str(tmp_path), where="teacher.model", error=TeacherError)


def test_a_missing_module_that_resembles_nothing_lists_the_folder(tmp_path: Path) -> None:
    (tmp_path / "callables_one.py").touch()
    with pytest.raises(TeacherError, match=r"modules in .*: callables_one; put it beside the job file"):
        load_callable("qqq:make", folder=str(tmp_path), where="teacher.model", error=TeacherError)


def test_a_missing_module_inside_a_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "callables_pkg2").mkdir()
    (tmp_path / "callables_pkg2" / "__init__.py").touch()
    with pytest.raises(TeacherError, match=r"there is no module 'callables_pkg2\.nets'"):
        load_callable("callables_pkg2.nets:f", folder=str(tmp_path), where="teacher.model", error=TeacherError)


@pytest.mark.parametrize(
    ("source", "failure"),
    [
        (
            "x = 1\nraise ValueError('no weights here')\n",
            r"ValueError: no weights here \(.*callables_bad0\.py, line 2\)",
        ),
        (
            "import callables_not_installed\n",
            r"ModuleNotFoundError: No module named 'callables_not_installed' .*line 1",
        ),
        ("def f(:\n    pass\n", r"SyntaxError: .*callables_bad2\.py, line 1\)"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 .*line 2"),
    ],
    ids=["raises", "lacks a library", "is no Python", "exits"],
)
def test_a_module_that_raises_shows_the_last_line_of_its_traceback(
    source: str, failure: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = f"callables_bad{['raises', 'lacks a library', 'is no Python', 'exits'].index(request.node.callspec.id)}"
    (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(DataError, match=rf"data\.transform .*importing module '{name}' raised {failure}"):
        load_callable(f"{name}:f", folder=str(tmp_path), where="data.transform", error=DataError)


def test_a_missing_function_names_near_ones(tmp_path: Path) -> None:
    (tmp_path / "callables_three.py").write_text("def resnet():\n    pass\n\ndef vgg():\n    pass\n\n_hidden = print\n")
    with pytest.raises(TeacherError, match=r"has no 'resnt'; did you mean 'resnet'\?"):
        load_callable("callables_three:resnt", folder=str(tmp_path), where="teacher.model", error=TeacherError)
    with pytest.raises(TeacherError, match=r"has no 'qqq'; functions there: resnet, vgg; correct teacher\.model"):
        load_callable("callables_three:qqq", folder=str(tmp_path), where="teacher.model", error=TeacherError)


def test_what_is_no_function_is_refused(tmp_path: Path) -> None:
    (tmp_path / "callables_constant.py").write_text("size = 3\n")
    with pytest.raises(TeacherError, match=r"'size' .*is of type int, expected a function"):
        load_callable("callables_constant:size", folder=str(tmp_path), where="teacher.model", error=TeacherError)


def test_a_failure_without_a_traceback_is_described_too() -> None:
    assert describe_failure(ValueError("x")) == "ValueError: x"
