"""Read a manifest, and check every value before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from ffebm_compiler.errors import ExportError
from ffebm_compiler.files.checked_json import AtLeast, Malformed, read_json, short, typed
from ffebm_compiler.onnx.folder import FORMAT
from ffebm_compiler.onnx.manifest import MANIFEST, SCHEMA, seal

__all__ = ["read_manifest"]

_Count = Annotated[int, AtLeast(0)]
_Positive = Annotated[float, AtLeast(0, above=True, most=1e100)]


@dataclass(frozen=True)
class _Operand:
    value: str | None = None
    tensor: str | None = None


@dataclass(frozen=True)
class _Value:
    dtype: Literal["float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]
    shape: tuple[_Count | str, ...]


@dataclass(frozen=True)
class _Edge:
    start: _Count
    end: _Count
    norm: Annotated[float, AtLeast(0)]


@dataclass(frozen=True)
class _Settling:
    rtol: Annotated[float, AtLeast(0, above=True, most=1)]
    contraction: Annotated[float, AtLeast(0)] | None
    largest_change: Annotated[float, AtLeast(0)]
    min_sweeps: Annotated[int, AtLeast(1)]
    max_sweeps: Annotated[int, AtLeast(1)]
    schedule: Literal["auto", "forward", "backward", "even_odd"]
    on_failure: Literal["isolate", "error", "warn"]
    relaxation: Annotated[float, AtLeast(1, most=2)] = 1.0
    relaxed_sweeps: Literal[1] | None = None
    coherent: bool = False
    norms: tuple[_Edge, ...] = ()


@dataclass(frozen=True)
class _Energy:
    kind: str
    name: str
    inputs: tuple[_Operand | None, ...]
    weights: tuple[_Operand | None, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]
    parameters: tuple[str, ...]
    tiles: _Count
    dac: _Count
    adc: _Count
    neurons: _Count
    macs: _Count
    coupled: bool
    feedback: float | Literal["symmetric"]
    loop_gain: float | None
    spectral_radius: Annotated[float, AtLeast(0, most=1e100)] | None
    scales: tuple[_Positive, ...]
    settling: _Settling
    program: Mapping[str, Any]
    energy: Literal["hopfield", "resistive", "unamplified", "drn"] = "hopfield"
    amplifiers: tuple[Annotated[float, AtLeast(0, most=1e100)], ...] = ()


@dataclass(frozen=True)
class _Operation:
    name: str
    operation: str
    module: str


@dataclass(frozen=True)
class _QuantisedPart:
    operations: _Count
    deviation: float
    reason: str


@dataclass(frozen=True)
class _Feedforward:
    kind: str
    name: str
    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operations: tuple[_Operation, ...]
    int8: _QuantisedPart | None = None


@dataclass(frozen=True)
class _Quantised:
    deviation: float


@dataclass(frozen=True)
class _Manifest:
    format: str
    schema: int
    opset: int
    model: str
    mode: str
    fingerprint: str
    hardware: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[_Operand | None, ...]
    values: Mapping[str, _Value]
    steps: tuple[Mapping[str, Any], ...]
    files: Mapping[str, str]
    sha256: str
    int8: _Quantised | None = None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export.

    Raises:
        ExportError: it cannot be read, is malformed (names the place), of another schema, or was changed.
    """
    path = folder / MANIFEST
    remedy = "name a folder that hybrid.export_onnx(folder, parts='digital') wrote"
    try:
        path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"{path} cannot be read ({reason}): {remedy}") from error
    manifest = read_json(path, "the manifest", ExportError, remedy)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExportError(f"{path} is no manifest of ffebm-compiler: export with parts='digital'")
    schema = manifest.get("schema")
    if isinstance(schema, bool) or schema != SCHEMA:
        raise ExportError(f"{path} has schema {short(schema)}, this version reads {SCHEMA}: export again")
    files = manifest.get("files")
    for name in files if isinstance(files, dict) else ():
        if PurePosixPath(name).name != name or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise ExportError(f"{path} names the file {name!r}, which is outside of its folder: refused")
    try:
        found, steps = _typed(manifest)
        if found.sha256 != seal(manifest):
            raise ExportError(f"{path} was changed after the export (its SHA-256 differs): export again")
        _check_names(found, steps)
    except Malformed as error:
        raise ExportError(f"{path} is malformed ({error}): export again") from error
    return manifest


def _typed(manifest: Mapping[str, Any]) -> tuple[_Manifest, list[_Energy | _Feedforward]]:
    found: _Manifest = typed(_Manifest, manifest)
    kinds = {"energy": _Energy, "feedforward": _Feedforward}
    steps = []
    for index, item in enumerate(found.steps):
        kind = item.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            raise Malformed(f"steps[{index}].kind: expected {' or '.join(map(repr, kinds))}, got {short(kind)}")
        steps.append(typed(kinds[kind], item, f"steps[{index}]"))
    return found, steps


def _check_names(found: _Manifest, steps: list[_Energy | _Feedforward]) -> None:
    """Check that every value exists before it is read, and that no two steps have the same name."""
    known = set(found.inputs)
    _check_described(found, found.inputs, "inputs")
    names: set[str] = set()
    for index, step in enumerate(steps):
        place = f"steps[{index}]"
        if step.name in names:
            raise Malformed(f"{place}.name: another step is named {short(step.name)}")
        names.add(step.name)
        if isinstance(step, _Energy):
            for field in ("inputs", "weights"):
                _check_operands(getattr(step, field), known, f"{place}.{field}")
        for name in step.inputs if isinstance(step, _Feedforward) else ():
            if name not in known:
                raise Malformed(f"{place}.inputs: it reads {short(name)}, which no step computes")
        _check_described(found, step.outputs, f"{place}.outputs")
        known.update(step.outputs)
    _check_operands(found.outputs, known, "outputs")


def _check_described(manifest: _Manifest, names: tuple[str, ...], place: str) -> None:
    for name in names:
        if name not in manifest.values:
            raise Malformed(f"{place}: values does not describe {short(name)}")


def _check_operands(operands: tuple[_Operand | None, ...], known: set[str], place: str) -> None:
    for index, operand in enumerate(operands):
        if operand is None:
            continue
        if (operand.value is None) == (operand.tensor is None):
            raise Malformed(f"{place}[{index}]: expected a value or a tensor")
        if operand.value is not None and operand.value not in known:
            raise Malformed(f"{place}[{index}]: it reads {operand.value!r}, which no step computes")
