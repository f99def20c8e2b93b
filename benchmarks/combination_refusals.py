"""The combinations that are refused on purpose, each with what its sentence says, for `combinations.py`.

Any other refusal is a failure, and so is a combination of this list that is not refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ffebm_compiler.runtime.energies.choice import ENERGIES
from ffebm_compiler.runtime.energies.conductive import Conductive

__all__ = ["FORWARD", "REFUSALS", "Refusal", "expected"]

FORWARD = re.compile(
    r"\b(use|call|keep|convert|leave|set|choose|export|give|pass|lower|allow|raise|add|compute|load|take)\b",
    re.IGNORECASE,
)
"""A word that says what to do instead."""


@dataclass(frozen=True, eq=False)
class Refusal:
    """Values of some axes that are refused together."""

    when: Mapping[str, tuple[str, ...]]
    """Axis -> the labels concerned."""
    says: str
    """A part of the sentence, as a regular expression."""

    def holds(self, row: Mapping[str, str]) -> bool:
        """Whether a row has such values."""
        return all(row[axis] in labels for axis, labels in self.when.items())

    def matches(self, text: str) -> bool:
        """Whether a message is this refusal's."""
        return re.search(self.says, text) is not None


def expected(row: Mapping[str, str]) -> list[Refusal]:
    """The refusals that a row has to meet."""
    return [refusal for refusal in REFUSALS if refusal.holds(row)]


_CIRCUITS = tuple(name for name, kind in ENERGIES.items() if issubclass(kind, Conductive))
_OWN = ("own, free", "own, fixed", "own, aligned")
_NOISY = ("dynamic", "preset pcm", "preset reram")
_HELD = ("contrastive", "coupled, positive", "coupled, negative", "coupled, centered")
_COST = ("cost-nudged, positive", "cost-nudged, negative", "cost-nudged, centered")
_BEYOND = ("ep, holomorphic", "implicit", "unrolled", "truncated", "recurrent", *_COST)
_PARTS = ("zeroth-order", "8 bits", "8 bits, quantised")
_ONNX = ("ONNX", "ONNX parts")

REFUSALS: tuple[Refusal, ...] = (
    Refusal({"energy": _CIRCUITS, "feedback weights": _OWN}, "its feedback has weights of its own"),
    Refusal({"energy": _CIRCUITS, "devices": ("mismatched",)}, "its feedback has weights of its own"),
    Refusal({"energy": _CIRCUITS, "activation": ("tanh", "GELU")}, "is not made"),
    Refusal(
        {"energy": _CIRCUITS, "network": ("CNN",), "block_ops": ("all",), "fold_batchnorm": ("yes",)},
        "holds max pooling",
    ),
    Refusal(
        {"network": ("CNN",), "fold_batchnorm": ("yes",), "block_ops": ("all",), "digital parts": _PARTS},
        "the plan has no digital part",
    ),
    Refusal({"estimator": ("ep, holomorphic",), "activation": ("ReLU", "hard tanh")}, "no holomorphic extension"),
    Refusal({"estimator": ("ep, holomorphic",), "devices": _NOISY}, "devices hold real states"),
    Refusal({"estimator": _COST, "devices": _NOISY}, "its states are read from devices"),
    Refusal({"estimator": _HELD, "feedback weights": _OWN}, "has no energy"),
    Refusal({"estimator": _HELD, "devices": ("mismatched",)}, "has no energy"),
    Refusal({"estimator": _BEYOND, "solver": ("Measured",)}, "gradients do not exist"),
    Refusal({"solver": ("Measured",), "devices": _NOISY}, "a fabric measures its equilibria"),
    Refusal({"done": _ONNX, "devices": _NOISY}, "an ONNX file does not hold"),
    Refusal({"done": _ONNX, "network": ("CNN",), "dtype": ("float64",)}, "many operators have no float64"),
    Refusal({"done": ("ONNX",), "activation": ("GELU",), "dtype": ("float64",)}, "many operators have no float64"),
    Refusal({"done": ("SPICE", "power_report"), "energy": ("hopfield",)}, "is not that of a circuit"),
)
