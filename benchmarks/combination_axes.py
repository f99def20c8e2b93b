"""The axes of `combinations.py`: every feature that can be chosen, as it stands in the code, and three small networks.

Energies, estimators with their variants, solvers, devices, wiring and rules for feedback weights are read from the
package's own tables, so that a new one is tried without being listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import FabricError
from ffebm_compiler.passes.dialect import WIRING_KINDS
from ffebm_compiler.runtime.energies.choice import ENERGIES
from ffebm_compiler.runtime.estimators.base import Estimator
from ffebm_compiler.runtime.estimators.choice import ESTIMATORS
from ffebm_compiler.runtime.program.frame import Frame
from ffebm_compiler.runtime.solvers.base import Solver

__all__ = ["ACTIVATIONS", "DEFAULTS", "Case", "Row", "axes", "devices_of", "made"]

Row = Mapping[str, str]
"""Axis -> the label of a value."""
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "hard tanh": nn.Hardtanh,
    "tanh": nn.Tanh,
    "GELU": nn.GELU,
}
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16 autocast": torch.float32}


# -- networks ------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two pairs of linear layers, with a layer norm between them."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 10), activation(), nn.Linear(10, 8), activation())
        self.norm = nn.LayerNorm(8)
        self.second = nn.Sequential(nn.Linear(8, 9), activation(), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


class CNN(nn.Module):
    """Convolutions with batch norm, average and maximum pooling, and two linear layers."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), activation())
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), activation(), nn.AvgPool2d(3))
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 6), activation(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


class Transformer(nn.Module):
    """One layer: attention of two heads and two linear layers, each with a layer norm and a shortcut."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.inputs, self.output = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), activation(), nn.Linear(12, 8))
        self.head = nn.Sequential(nn.Linear(8, 6), activation(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inputs(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts.unbind())
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "MLP": (MLP, (6,)),
    "CNN": (CNN, (2, 8, 8)),
    "transformer": (Transformer, (5, 8)),
}


def network(row: Row) -> tuple[nn.Module, Tensor]:
    """A source with fixed random weights, and a batch of four inputs."""
    build, shape = NETWORKS[row["network"]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(ACTIVATIONS[row["activation"]])
        x = torch.randn(4, *shape)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.6, 1.4)
                nn.init.uniform_(module.bias, -0.2, 0.2)
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.6, 1.4)
            if isinstance(module, nn.Conv2d):
                with torch.no_grad():
                    module.weight.mul_(0.7)  # so that its block settles at symmetric feedback, digitally driven
    if ENERGIES[row["energy"]].nonnegative:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.abs_()
    dtype = _DTYPES[row["dtype"]]
    return model.to(dtype), x.to(dtype)


# -- a fabric ------------------------------------------------------------------------------------


class Rig:
    """A fabric for blocks of any energy: sweeps of its own over literal states in float64, until nothing changes."""

    def __init__(self) -> None:
        self.asked = 0

    def program(self, block: Any, weights: Sequence[Tensor | None]) -> None:
        """Note the block and its weights."""
        self.block, self.weights = block, list(weights)

    def settle(self, inputs: Sequence[Tensor], nudge: Sequence[Tensor | None] | None) -> list[Tensor]:
        """The equilibrium, under a nudge if there is one."""
        return self._settled(inputs, nudge, None)

    def hold(self, inputs: Sequence[Tensor], held: Sequence[Tensor | None]) -> list[Tensor]:
        """The equilibrium with some states held."""
        return self._settled(inputs, None, held)

    def _settled(self, inputs: Any, nudge: Any, held: Any) -> list[Tensor]:
        self.asked += 1
        frame = Frame(self.block.program, list(inputs), self.weights)
        states = frame.feedforward()
        scales = self.block.setting.scales
        for sweep in range(3000):
            frame.frozen = sweep > 30  # max pooling holds its winners, which could change for ever near a tie
            before = [state.clone() for state in states]
            for index, layer in enumerate(frame.program.layers):
                if held is not None and held[index] is not None:
                    states[index] = held[index]
                    continue
                field = frame.drive(index, states)
                for later in frame.program.downstream[index]:
                    part = frame.back.pullback(later, states[later], states=True).get(layer.state)
                    if part is not None:
                        field = field + scales[later] / scales[index] * part
                if nudge is not None and nudge[index] is not None:
                    field = field + nudge[index]
                states[index] = self.block.setting.activations(frame)[index].value(field)
            if all((a - b).norm() <= 1e-13 * (1 + a.norm()) for a, b in zip(states, before, strict=True)):
                return states
        raise FabricError("the rig does not settle")


# -- axes ----------------------------------------------------------------------------------------


def _estimators() -> dict[str, Estimator]:
    """Every estimator in every variant that its type names."""
    found: dict[str, Estimator] = {}
    for kind in ESTIMATORS:
        variants = get_args(get_type_hints(kind).get("variant"))
        for variant in variants:
            found[f"{kind.name}, {variant}"] = kind(variant=variant)  # type: ignore[call-arg]
        if not variants:
            found[kind.name] = kind()
    return found


def _solvers() -> dict[str, Callable[[], Solver | None]]:
    """Every solver of the public interface, and the choice that is made without one."""
    found: dict[str, Callable[[], Solver | None]] = {"chosen": lambda: None}
    for name in ffebm.__all__:
        kind = getattr(ffebm, name)
        if isinstance(kind, type) and issubclass(kind, Solver):
            takes_fabric = any(field.name == "fabric" for field in fields(kind)) or name == "Measured"
            found[name] = (lambda k: lambda: k(Rig()))(kind) if takes_fabric else kind
    return found


def _devices() -> dict[str, ffebm.Devices | None]:
    """None, static errors, errors that differ by direction, dynamic errors that are small, and every preset."""
    return {
        "none": None,
        "static": ffebm.Devices(programming=0.02, weight_bits=7, stuck_off=0.01, seed=1),
        "mismatched": ffebm.Devices(mismatch=0.02, seed=1),
        "dynamic": ffebm.Devices(programming=0.02, read_noise=1e-7, dac_bits=22, adc_bits=22, seed=1),
        **{f"preset {name}": devices for name, devices in ffebm.device_presets().items()},
    }


def _feedback_weights() -> dict[str, str | ffebm.FeedbackWeights]:
    updates = get_args(get_type_hints(ffebm.FeedbackWeights)["update"])
    return {"tied": "tied", **{f"own, {update}": ffebm.FeedbackWeights(update=update) for update in updates}}


_CHOICES: dict[str, Mapping[str, Any]] = {
    "network": NETWORKS,
    "activation": ACTIVATIONS,
    "energy": ENERGIES,
    "estimator": _estimators(),
    "gain in gradient": {"held": False, "followed": True},
    "solver": _solvers(),
    "feedback": {"number": None, "symmetric": "symmetric"},
    "feedback weights": _feedback_weights(),
    "devices": _devices(),
    "digital parts": {"backprop": None, "zeroth-order": None, "8 bits": 8, "8 bits, quantised": 8},
    "digital_drive": {"no": False, "yes": True},
    "fold_batchnorm": {"no": False, "yes": True},
    "block_ops": {"default": ("add", "reshape"), "all": WIRING_KINDS},
    "dtype": _DTYPES,
    "mode": {"train": True, "eval": False},
}
DEFAULTS: dict[str, str] = {axis: next(iter(values)) for axis, values in _CHOICES.items()}


def axes(actions: Sequence[str]) -> dict[str, list[str]]:
    """Axis -> labels of its values, the default first; `actions` is what is done with a hybrid."""
    return {**{axis: list(values) for axis, values in _CHOICES.items()}, "done": list(actions)}


# -- a row ---------------------------------------------------------------------------------------


@dataclass
class Case:
    """A hybrid of one row, and what its checks need."""

    row: Row
    model: nn.Module
    hybrid: ffebm.HybridModel
    x: Tensor
    target: Tensor

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which it runs."""
        return torch.autocast("cpu", torch.bfloat16) if self.row["dtype"] == "bf16 autocast" else nullcontext()

    @property
    def autocast_on(self) -> bool:
        """Whether that is bfloat16."""
        return self.row["dtype"] == "bf16 autocast"

    @property
    def estimator(self) -> Estimator:
        """The estimator of the row."""
        return _estimator(self.row)

    @property
    def coupled(self) -> list[Any]:
        """The blocks with feedback."""
        return [block for block in self.hybrid.blocks if block.module.program.coupled]


def _estimator(row: Row) -> Estimator:
    chosen: Estimator = _CHOICES["estimator"][row["estimator"]]
    through = _CHOICES["gain in gradient"][row["gain in gradient"]]
    return replace(chosen, through_feedback=True) if through else chosen  # type: ignore[type-var]


def devices_of(row: Row) -> ffebm.Devices | None:
    """The devices of a row, with the bits of its digital parts."""
    devices: ffebm.Devices | None = _CHOICES["devices"][row["devices"]]
    bits = _CHOICES["digital parts"][row["digital parts"]]
    return devices if bits is None else replace(devices or ffebm.Devices(), digital_bits=bits)


def made(row: Row) -> Case:
    """Convert as the row says.

    Raises:
        FFEBMError: the combination is refused.
    """
    model, x = network(row)
    given = {axis: _CHOICES[axis][label] for axis, label in row.items() if axis in _CHOICES}
    energy = ENERGIES[row["energy"]]
    feedback = given["feedback"] or energy.default_feedback
    estimator = _estimator(row)
    hybrid = ffebm.convert(
        model,
        x,
        energy=row["energy"],
        feedback=feedback,
        gradient=estimator,
        solver=given["solver"](),
        feedback_weights=given["feedback weights"],
        devices=devices_of(row),
        digital_drive=given["digital_drive"],
        fold_batchnorm=given["fold_batchnorm"],
        block_ops=given["block_ops"],
    )
    hybrid.train(given["mode"])
    if row["digital parts"].startswith("8 bits"):
        hybrid.calibrate_digital([x])
    digital = {"zeroth-order": "zeroth-order", "8 bits, quantised": "quantised"}.get(row["digital parts"], "backprop")
    hybrid.set_gradient(estimator, feedforward=digital)
    return Case(row, model, hybrid, x, torch.arange(len(x)) % 4)
