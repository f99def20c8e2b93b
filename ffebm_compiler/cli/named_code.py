"""Import the code that builds a model: `package.module:callable`, or `folder/file.py:callable`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ffebm_compiler.cli.named_model import first_line, left_the_program
from ffebm_compiler.errors import InputError

__all__ = ["named_object"]


def named_object(module_name: str, attribute: str) -> Any:
    """What a module, or a file that ends in .py, calls by this name.

    Raises:
        InputError: it cannot be imported, or has nothing of that name.
    """
    what = f"the file {module_name}" if module_name.endswith(".py") else f"the module {module_name!r}"
    try:
        found: Any = _module_of_file(Path(module_name)) if module_name.endswith(".py") else _module(module_name)
    except InputError:
        raise
    except SystemExit as error:
        raise InputError(left_the_program(what, "while it was imported", error)) from error
    except Exception as error:  # the module runs its own code
        hint = _as_file(module_name, attribute)
        raise InputError(f"{what} cannot be imported ({first_line(error)}){hint}") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise InputError(
                f"{module_name} has no {attribute!r}: name a function or class that returns the model when it is "
                "called without arguments"
            ) from error
        except (Exception, SystemExit) as error:  # a module or class may compute its attributes
            raise InputError(f"{attribute!r} of {what} cannot be read ({first_line(error)})") from error
    return found


def _module(name: str) -> ModuleType:
    _put_first(os.getcwd())  # as `python -m` does
    return importlib.import_module(name)


def _module_of_file(path: Path) -> ModuleType:
    """The module in a file. The file's folder and the working folder are on the path."""
    if not path.is_file():
        raise InputError(f"there is no file {path}: name one that holds the model's function or class, or its module")
    _put_first(os.getcwd())
    _put_first(str(path.resolve().parent))  # as `python folder/file.py` does
    free = path.stem.isidentifier() and path.stem not in sys.modules
    name = path.stem if free else f"model_file_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _put_first(folder: str) -> None:
    if folder not in sys.path and (folder != os.getcwd() or "" not in sys.path):
        sys.path.insert(0, folder)


def _as_file(module_name: str, attribute: str) -> str:
    """A hint for the path of a file without its ending, and for a file that a relative import ties to its package."""
    if module_name.endswith(".py"):
        dotted = ".".join(Path(module_name).with_suffix("").parts)
        inside = (Path(module_name).parent / "__init__.py").is_file() and not Path(module_name).is_absolute()
        return f": name it as a module of its package, {dotted}:{attribute}" if inside else ""
    return f": name the file, {module_name}.py:{attribute}" if Path(f"{module_name}.py").is_file() else ""
