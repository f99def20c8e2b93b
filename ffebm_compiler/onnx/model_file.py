"""Write one ONNX file, and a file beside it for large tensors. Both are whole or absent."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ffebm_compiler.errors import ExportError
from ffebm_compiler.files.hidden_files import fresh_folder, remove_leftovers
from ffebm_compiler.files.whole_files import place, saying, write_whole
from ffebm_compiler.onnx.folder import FAILURE
from ffebm_compiler.onnx.packages import package

__all__ = ["write_model"]


def write_model(path: Path, model: Any, tensors_beside: bool) -> None:
    """Check and write an `onnx_ir.Model`. An older one is replaced, or left as it is if writing fails.

    The model names the file of its tensors, `<file>.data`. If an older model uses that name, the new one gets the
    other of two names, `<file>.2.data`. So each model has its own tensors at any moment. The older model's tensors are
    removed last.

    Raises:
        ExportError: the path cannot be written or is a folder, or the model does not pass onnx's checker.
    """
    if os.path.isdir(path):
        raise ExportError(f"{path} is a folder: name a file that ends in .onnx, or pass parts='digital' for a folder")
    ir = package("onnx_ir")
    with saying(path, FAILURE, ExportError):
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        names = (f"{target.name}.data", f"{target.name}.2.data")
        read_by_older = _tensor_files(target) & set(names)
        if not tensors_beside:
            content = ir.to_proto(model).SerializeToString()
            _check(content)
            write_whole(path, content, failure=FAILURE)
        else:
            data = next((name for name in names if name not in read_by_older), names[0])
            remove_leftovers(target.parent)
            with fresh_folder(target.parent) as folder:
                ir.save(model, str(folder / target.name), external_data=data)
                _check(str(folder / target.name))
                with ExitStack() as undo:
                    if (folder / data).exists():
                        place(folder / data, target.with_name(data))
                        undo.callback(target.with_name(data).unlink, missing_ok=True)
                    place(folder / target.name, target)
                    undo.pop_all()
            read_by_older -= {data}
        for name in read_by_older:
            with suppress(OSError):
                target.with_name(name).unlink()


def _check(model: bytes | str) -> None:
    try:
        package("onnx").checker.check_model(model, full_check=True)
    except Exception as error:  # onnx raises several kinds
        raise ExportError(f"the file does not pass onnx.checker ({error}): please report the model") from error


def _tensor_files(path: Path) -> set[str]:
    """The files with the tensors of a model; none if the file is no model."""
    onnx = package("onnx")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # the file is missing, or is no protobuf (the error's class depends on the version)
        return set()
    return {entry.value for item in graph.initializer for entry in item.external_data if entry.key == "location"}
