"""From `package.module:function` in a job to the function itself.

Owns the syntax of such references, the import of users' modules and the wording of what goes wrong in users' code. It
does not know what the functions are for: callers pass the name of the job's key and the class of the error to raise.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dcq_ray.errors import DcqError

_MAX_NAMES = 8


def importable_from(folder: str) -> None:
    """Put a folder first on `sys.path`, unless it is there already.

    Python keeps the modules that it has imported: a module of the same name in a second folder is not seen by a process
    that has imported the first.
    """
    path = str(Path(folder).resolve())
    if path not in sys.path:
        sys.path.insert(0, path)
    # A module written since the last import would otherwise stay unseen: finders remember what folders hold.
    importlib.invalidate_caches()


def load_callable(reference: str, *, folder: str, where: str, error: type[DcqError]) -> Callable[..., Any]:
    """The function that `package.module:function` names, with `folder` importable.

    Raises `error`, with `where` (the job's key, such as "teacher.model") in its message: the reference is malformed,
    there is no such module, the module raises when imported, or it has no such function.
    """
    what = f"{where} ({reference!r})"
    module_name, colon, function_name = reference.partition(":")
    if not (colon and function_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise error(f"{what}: expected `package.module:function`, such as `networks:my_network`")
    importable_from(folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module_name}.".startswith(f"{missing.name}."):
            raise error(_raised(what, module_name, missing)) from missing
        near = _near(module_name.split(".")[0], _modules_in(folder), f"modules in {Path(folder).resolve()}")
        raise error(
            f"{what}: there is no module {missing.name!r}; {near}; put it beside the job file, install it, "
            f"or correct {where}"
        ) from missing
    except (Exception, SystemExit) as raised:
        raise error(_raised(what, module_name, raised)) from raised
    function = getattr(module, function_name, None)
    file = getattr(module, "__file__", None) or "built in"
    if function is None:
        names = (name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        near = _near(function_name, names, "functions there")
        raise error(f"{what}: module {module_name!r} ({file}) has no {function_name!r}; {near}; correct {where}")
    if not callable(function):
        raise error(
            f"{what}: {function_name!r} in module {module_name!r} ({file}) is of type {type(function).__name__}, "
            f"expected a function; correct {where}"
        )
    result: Callable[..., Any] = function
    return result


def describe_failure(raised: BaseException) -> str:
    """The last line of an exception's traceback, with the file and line that raised it."""
    last_line = traceback.format_exception_only(raised)[-1].strip()
    if isinstance(raised, SyntaxError) and raised.filename:
        return f"{last_line} ({raised.filename}, line {raised.lineno})"
    frames = [frame for frame in traceback.extract_tb(raised.__traceback__) if not frame.filename.startswith("<frozen")]
    return f"{last_line} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else last_line


def _raised(what: str, module_name: str, raised: BaseException) -> str:
    failure = describe_failure(raised)
    return f"{what}: importing module {module_name!r} raised {failure}; `python -c 'import {module_name}'` shows all"


def _modules_in(folder: str) -> list[str]:
    path = Path(folder)
    files = [file.stem for file in path.glob("*.py") if file.stem != "__init__"]
    return files + [file.parent.name for file in path.glob("*/__init__.py")]


def _near(name: str, names: Iterable[str], of_what: str) -> str:
    known = sorted(set(names))
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"did you mean {' or '.join(repr(match) for match in near)}?"
    more = f" and {len(known) - _MAX_NAMES} more" if len(known) > _MAX_NAMES else ""
    return f"{of_what}: {', '.join(known[:_MAX_NAMES]) or 'none'}{more}"
