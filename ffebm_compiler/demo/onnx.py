"""The demo's ONNX stage: export a hybrid's digital parts and compare onnxruntime with the hybrid."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ffebm_compiler import onnx
from ffebm_compiler.errors import ExportError, UnsupportedError
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.onnx.manifest_file import read_manifest

__all__ = ["Deviations", "onnx_deviations", "require_onnx"]


def require_onnx() -> None:
    """Check that the packages which export and run ONNX files are installed.

    Raises:
        UnsupportedError: a package is missing.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UnsupportedError(f"the demo needs {name}, which is not installed: pip install 'ffebm-compiler[demo]'")


@dataclass(frozen=True)
class Deviations:
    """max |onnx − hybrid| / max |hybrid|."""

    parts: dict[str, float]
    """Deviation of each digital part, on the values that the hybrid feeds it."""
    chained: float
    """Deviation of the output, with the digital parts in onnxruntime and the energy blocks in this package."""
    whole: float
    """Deviation of the output, with the whole hybrid as one file in onnxruntime."""


def onnx_deviations(hybrid: HybridModel, folder: Path, x: Tensor) -> Deviations:
    """Export the digital parts to `folder` and the whole hybrid to `folder`.onnx, and run both for `x`.

    Raises:
        UnsupportedError: where onnx, onnxscript or onnxruntime is not installed.
        ExportError: a file does not accept the values that the hybrid feeds the part.
    """
    require_onnx()
    folder = hybrid.export_onnx(folder, parts="digital")
    record, output = _record_parts(hybrid, x)
    manifest = read_manifest(folder)
    found = {}
    for step in manifest["steps"]:
        if step["kind"] != "feedforward":
            continue
        session = _session(folder / step["file"])
        fed, expected = record[step["name"]]
        if len(fed) != len(step["inputs"]):
            raise ExportError(f"{step['file']} takes {len(step['inputs'])} inputs, the hybrid feeds it {len(fed)}")
        results = session.run(None, {name: value.numpy() for name, value in zip(step["inputs"], fed, strict=True)})
        found[step["name"]] = max(
            _deviation(torch.from_numpy(have), want) for have, want in zip(results, expected, strict=True)
        )
    (chained,) = onnx.run(folder, x, threads=1)
    session = _session(hybrid.export_onnx(folder.with_suffix(".onnx")))
    (whole,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return Deviations(found, _deviation(chained, output), _deviation(torch.from_numpy(whole), output))


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _record_parts(hybrid: HybridModel, x: Tensor) -> tuple[dict[str, tuple[list[Tensor], list[Tensor]]], Tensor]:
    """The values that enter and leave each digital part (without weights), and the output of the hybrid."""
    record: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    own = {id(tensor) for tensor in (*hybrid.parameters(), *hybrid.buffers())}

    def keep(name: str) -> Any:
        def hook(_: object, args: tuple[Any, ...], outputs: Any) -> None:
            fed = {id(t): t for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and id(t) not in own}
            record[name] = (list(fed.values()), pytree.tree_leaves(outputs))

        return hook

    hooks = [part.register_forward_hook(keep(name)) for name, part in hybrid.feedforward_blocks.items()]
    try:
        with torch.no_grad():
            return record, hybrid(x)
    finally:
        for hook in hooks:
            hook.remove()


def _deviation(found: Tensor, expected: Tensor) -> float:
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) / (scale or 1.0)
