"""Functions in files that the user names."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from k42.errors import Error


def function(path: Path, name: str) -> Callable[..., object]:
    """Run a file as a module, and return a function of it.

    Raises:
        Error: there is no such file or function, or the file fails.
    """
    if not path.is_file():
        raise Error(f"{path}: there is no such file")
    # A name that is nobody's: the file may be called as a module of the standard library is.
    module_name = f"_k42_sim_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if spec is None or spec.loader is None:
        raise Error(f"{path}: it is not a file of Python; its name ends with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Error(f"{path} fails: {describe(error, path)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        raise Error(f"{path} has no function {name!r}; it has: {', '.join(there) or 'none'}")
    return found  # type: ignore[no-any-return]


def describe(error: Exception, path: Path) -> str:
    """What failed, in one line, and where in the file."""
    there = path.resolve()
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if Path(each.filename) == there]
    where = f" ({path}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"
