"""ffebm-compiler: from PyTorch networks to feedforward-tied energy-based models.

import ffebm_compiler as ffebm

hybrid = ffebm.convert(model, example_inputs)
loss_fn(hybrid(x), y).backward()
"""

import importlib
from typing import TYPE_CHECKING, Any

from ffebm_compiler import errors, init
from ffebm_compiler.accuracy.accuracy_plan import AccuracyPlan, AccuracyReport
from ffebm_compiler.accuracy.exploration import Exploration
from ffebm_compiler.accuracy.explore import explore
from ffebm_compiler.accuracy.plan_for_accuracy import plan_for_accuracy
from ffebm_compiler.accuracy.sensitivity import sensitivity
from ffebm_compiler.accuracy.sensitivity_report import Sensitivity
from ffebm_compiler.convert import convert, plan
from ffebm_compiler.deprecation import Deprecated, deprecated_attribute
from ffebm_compiler.errors import (
    CaptureError,
    ConvergenceError,
    ConvergenceWarning,
    ExportError,
    FabricError,
    FFEBMDeprecationWarning,
    FFEBMError,
    FFEBMWarning,
    GradientError,
    HardwareError,
    InputError,
    PlanError,
    UnsupportedError,
)
from ffebm_compiler.feedback_weights import FeedbackWeights
from ffebm_compiler.field_penalties import alignment_penalty, jacobian_homeostasis
from ffebm_compiler.graphed_step import GraphedStep
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.presets import hardware_presets
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.loading import load
from ffebm_compiler.ngspice import Ngspice
from ffebm_compiler.plan import Plan
from ffebm_compiler.reports.checks import Comparison, GradientReport, check_gradients
from ffebm_compiler.runtime.devices.devices import Devices, device_presets
from ffebm_compiler.runtime.devices.laws import Drift, FlickerNoise, LogLaw, Relaxation
from ffebm_compiler.runtime.devices.pulsed_update import PulsedUpdate, TikiTaka
from ffebm_compiler.runtime.devices.pulses import PulseResponse
from ffebm_compiler.runtime.estimators.choice import (
    ContrastiveLearning,
    CostNudge,
    CoupledLearning,
    EquilibriumPropagation,
    Implicit,
    ImplicitDifferentiation,
    RecurrentBackprop,
    TruncatedBackprop,
    Unrolled,
)
from ffebm_compiler.runtime.feedforward.quantised_backprop import QuantisedBackprop
from ffebm_compiler.runtime.feedforward.zeroth_order import ZerothOrder
from ffebm_compiler.runtime.solvers.anderson import Anderson
from ffebm_compiler.runtime.solvers.base import GaussSeidel
from ffebm_compiler.runtime.solvers.measured import Measured
from ffebm_compiler.runtime.solvers.newton import NewtonCG

__version__ = "1.0.0"

__all__ = [
    "AccuracyPlan",
    "AccuracyReport",
    "Anderson",
    "CaptureError",
    "Comparison",
    "ContrastiveLearning",
    "ConvergenceError",
    "ConvergenceWarning",
    "CostNudge",
    "CoupledLearning",
    "Devices",
    "Drift",
    "EquilibriumPropagation",
    "Exploration",
    "ExportError",
    "FFEBMDeprecationWarning",
    "FFEBMError",
    "FFEBMWarning",
    "FabricError",
    "FeedbackWeights",
    "FlickerNoise",
    "GaussSeidel",
    "GradientError",
    "GradientReport",
    "GraphedStep",
    "Hardware",
    "HardwareError",
    "HybridModel",
    "Implicit",
    "ImplicitDifferentiation",
    "InputError",
    "LogLaw",
    "Measured",
    "NewtonCG",
    "Ngspice",
    "Plan",
    "PlanError",
    "PulseResponse",
    "PulsedUpdate",
    "QuantisedBackprop",
    "RecurrentBackprop",
    "Relaxation",
    "Sensitivity",
    "TikiTaka",
    "TruncatedBackprop",
    "Unrolled",
    "UnsupportedError",
    "ZerothOrder",
    "alignment_penalty",
    "check_gradients",
    "convert",
    "device_presets",
    "explore",
    "hardware_presets",
    "init",
    "jacobian_homeostasis",
    "load",
    "plan",
    "plan_for_accuracy",
    "sensitivity",
]

if not TYPE_CHECKING:  # type checkers would take any name of a module with `__getattr__` for one that it has
    _DEPRECATED = {
        "NotYetError": Deprecated(
            errors.NotYetError,
            "1.0",
            "2.0",
            "nothing raises it, since all that was announced is built. Catch FFEBMError, or NotImplementedError.",
        )
    }

    def __getattr__(name: str) -> Any:
        if name in ("drawing", "onnx"):  # imported when they are asked for, since they are slow or need a package
            return importlib.import_module(f"{__name__}.{name}")
        return deprecated_attribute(__name__, name, _DEPRECATED)
