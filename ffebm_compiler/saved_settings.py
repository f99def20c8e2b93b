"""The content of a saved hybrid's files, checked before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.feedback_weights import FeedbackWeights
from ffebm_compiler.files.checked_json import AtLeast, Malformed, Number, read_json, short, typed
from ffebm_compiler.hybrid_state import ESTIMATORS, SOLVERS
from ffebm_compiler.runtime.devices.devices import Devices
from ffebm_compiler.runtime.energies.choice import energy_of

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore

__all__ = ["REMEDY", "Settings", "check_state", "check_tracks", "check_weights", "read_settings"]

REMEDY = "save the hybrid again"
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Count = Annotated[int, AtLeast(0)]
_Positive = Annotated[float, AtLeast(0, above=True, most=1e100)]
_Magnitude = Annotated[float, AtLeast(0, most=1e100)]


@dataclass(frozen=True)
class _Conversion:
    structure: str
    leaves: tuple[Mapping[str, Any], ...]
    dynamic_shapes: Literal["batch"] | None
    containers: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Track:
    norm: Number


@dataclass(frozen=True)
class _BlockState:
    layers: tuple[str, ...]
    feedback: _Positive | Literal["symmetric"]
    changes: _Count
    norms: tuple[tuple[_Count, _Count, _Magnitude | None], ...]
    scales: tuple[_Positive, ...]
    radius: _Magnitude | None
    contraction: _Magnitude | None
    tracks: Mapping[str, _Track]
    measured: bool
    gradient: Mapping[str, Any]
    solver: Mapping[str, Any] | None
    amplifiers: tuple[_Magnitude, ...] = ()
    coherent: bool = False
    values: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Digital:
    samples: Annotated[int, AtLeast(1)]
    sigma: _Positive
    seed: Annotated[int, AtLeast(0, most=2**31 - 1)]
    calls: Mapping[str, _Count]


@dataclass(frozen=True)
class _Devices:
    settings: Mapping[str, Any]
    age: _Magnitude
    ranges: Mapping[str, Mapping[str, tuple[float, float]]]
    digital: Mapping[str, Mapping[str, tuple[float, float] | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Quantised:
    bits: Annotated[int, AtLeast(2, most=16)]
    scaling: bool


@dataclass(frozen=True)
class _State:
    recertify_every: _Count | None
    project_to: _Positive | None
    blocks: Mapping[str, _BlockState]
    digital: _Digital | None = None
    devices: _Devices | None = None
    quantised: _Quantised | None = None


@dataclass(frozen=True)
class Settings:
    """`hybrid.json`."""

    schema: int
    model: str
    training: bool
    other_mode: tuple[str, ...]
    frozen: tuple[str, ...]
    energy: Literal["hopfield", "resistive", "unamplified", "drn"]
    conversion: _Conversion
    state: _State
    feedback_weights: FeedbackWeights | None = None


def read_settings(path: Path, schema: int) -> tuple[Settings, dict[str, Any]]:
    """The settings in `hybrid.json`, checked, and its JSON values.

    Raises:
        InputError: something is missing or malformed (names the place), or the schema is another one.
    """
    found = read_json(path, "the settings", InputError, f"it is malformed; {REMEDY}")
    present = found.get("schema") if isinstance(found, Mapping) else None
    if isinstance(present, int) and not isinstance(present, bool) and present != schema:
        raise InputError(f"{path.parent} has schema {short(present)}, this version reads {schema}: save it again")
    try:
        settings = typed(Settings, found)
        for name, block in settings.state.blocks.items():
            place = f"state.blocks.{name}"
            _check_kind(block.gradient, ESTIMATORS, f"{place}.gradient")
            if block.solver is not None:
                _check_kind(block.solver, SOLVERS, f"{place}.solver")
            _check_feedback(settings.energy, block.feedback, f"{place}.feedback")
            if len(block.amplifiers) not in (0, len(block.layers)):
                raise Malformed(f"{place}.amplifiers: expected {len(block.layers)} numbers, one a layer")
            if len(block.scales) != len(block.layers):
                raise Malformed(f"{place}.scales: expected {len(block.layers)} numbers, one a layer")
        _check_devices(settings.state)
    except Malformed as error:
        raise InputError(f"{path} is malformed ({error}): {REMEDY}") from error
    return settings, found


def _check_devices(state: _State) -> None:
    """Check the settings of devices, and that their converters are those of blocks."""
    if state.devices is None:
        if state.quantised is not None:
            raise Malformed("state.quantised: there are no devices whose digital parts are quantised")
        return
    try:
        devices = Devices.from_dict(state.devices.settings)
    except InputError as error:
        raise Malformed(f"state.devices.settings: {error}") from error
    for name, ranges in state.devices.ranges.items():
        if name not in state.blocks:
            raise Malformed(f"state.devices.ranges: {short(name)} is no block")
        for place, (low, high) in ranges.items():
            if not (low == 0 or low == -high) or high < 0:
                raise Malformed(f"state.devices.ranges.{name}.{short(place)}: expected [0, m] or [-m, m]")
    if devices.digital_bits is None and (state.quantised is not None or state.devices.digital):
        raise Malformed("state.devices.settings.digital_bits: missing, and there are ranges or gradients that need it")
    for name, found in state.devices.digital.items():
        for place, limits in found.items():
            if limits is not None and not limits[0] <= 0 <= limits[1]:
                raise Malformed(f"state.devices.digital.{short(name)}.{short(place)}: expected a range that holds 0")


def _check_feedback(energy: str, feedback: float | str, place: str) -> None:
    """Check that the energy allows a feedback."""
    try:
        energy_of(energy).check_feedback(feedback)
    except InputError as error:
        raise Malformed(f"{place}: {error}") from error


def _check_kind(stored: Mapping[str, Any], kinds: Mapping[str, type], place: str) -> None:
    """Check that an estimator or a solver can be made from its stored fields."""
    fields = dict(stored)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise Malformed(f"{place}.kind: expected {' or '.join(kinds)}, got {short(kind)}")
    typed(kinds[kind], fields, place)


def check_weights(path: Path, tensors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    """Check that tensors fit a state dict in names, shapes and kinds of numbers.

    Args:
        path: their file.
        tensors: the tensors in it. A tensor with several names is there under one of them.
        present: the state dict of the hybrid.

    Raises:
        InputError: a tensor is missing, unknown or different; names the first one.
    """
    aliases: dict[int, list[str]] = {}
    for name, tensor in present.items():
        aliases.setdefault(id(tensor), []).append(name)
    for name in tensors:
        if name not in present:
            raise InputError(f"{path} is malformed ({short(name)} is no tensor of the model): {REMEDY}")
    for name, tensor in present.items():
        held = [alias for alias in aliases[id(tensor)] if alias in tensors]
        if not held:
            raise InputError(f"{path} is malformed ({name!r} of the model is missing): {REMEDY}")
        found = tensors[held[0]]
        alike = found.dtype == tensor.dtype or (found.dtype in _FLOATING and tensor.dtype in _FLOATING)
        if found.shape != tensor.shape or not alike:
            raise InputError(
                f"the saved weights do not fit the model, since {held[0]!r} in {path} is {found.dtype} of shape "
                f"{tuple(found.shape)}, and the model has {tensor.dtype} of shape {tuple(tensor.shape)}: load it "
                "with a model of the saved one's sizes"
            )


def check_state(path: Path, settings: Settings, hybrid: HybridCore) -> None:
    """Check that the hybrid has all names in the settings.

    Raises:
        InputError: it lacks a module, parameter or block; names the first one.
    """
    layers = {block.name: tuple(layer.name for layer in block.module.program.layers) for block in hybrid.blocks}
    stored = {name: block.layers for name, block in settings.state.blocks.items()}
    if stored != layers:
        wrong = next((n for n in (*stored, *layers) if stored.get(n) != layers.get(n)), "the order")
        raise InputError(f"{path} is malformed (state.blocks: {short(wrong)} is not as the plan has it): {REMEDY}")
    for place, names, known in (
        ("other_mode", settings.other_mode, dict(hybrid.named_modules())),
        ("frozen", settings.frozen, dict(hybrid.named_parameters())),
    ):
        for name in names:
            if name not in known:
                raise InputError(f"{path} is malformed ({place}: the model has no {short(name)}): {REMEDY}")


def check_tracks(path: Path, tensors: Mapping[str, Tensor], settings: Settings, hybrid: HybridCore) -> None:
    """Check that the stored vectors of each block's loop gain belong to its edges and fit each other in size.

    Raises:
        InputError: a tensor is missing, unknown or different; names the first one.
    """
    expected: set[str] = set()
    for block in hybrid.blocks:
        upstream = block.module.program.upstream
        pairs = [(earlier, later) for later, leaves in enumerate(upstream) for earlier in leaves]
        if not block.module.program.symmetric:  # feedback of its own is followed too
            pairs += [(later, earlier) for earlier, later in pairs]
        edges = [f"{start}-{end}" for start, end in pairs]
        for edge in settings.state.blocks[block.name].tracks:
            if edge not in edges:
                raise InputError(
                    f"{path.parent} is malformed (state.blocks.{block.name}.tracks: {short(edge)} is no edge of the "
                    f"block, which has {', '.join(edges) or 'none'}): {REMEDY}"
                )
            both = (f"{block.name}/{edge}/image", f"{block.name}/{edge}/vectors")
            expected.update(both)
            image, vectors = (tensors.get(name) for name in both)
            if image is None or vectors is None:
                continue
            fit = image.dim() == vectors.dim() == 2 and len(image) == 1
            if not fit or image.dtype not in _FLOATING or vectors.dtype != image.dtype:
                raise InputError(
                    f"{path} is malformed ({both[0]!r} is {image.dtype} of shape {tuple(image.shape)} and {both[1]!r} "
                    f"{vectors.dtype} of shape {tuple(vectors.shape)}, expected a row and rows of one dtype): {REMEDY}"
                )
    for name in sorted({*tensors} ^ expected):
        what = "is no vector of a loop gain" if name in tensors else "is missing"
        raise InputError(f"{path} is malformed ({short(name)} {what}): {REMEDY}")
