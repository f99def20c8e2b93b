"""`HybridModel`: what `convert` returns.

It adds to `HybridCore` the methods that examine, draw and write a hybrid. `HybridCore` runs and trains it, and
`HybridParts` holds its parts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.inference import outside_inference
from ffebm_compiler.module_paths import module_at
from ffebm_compiler.plan import Plan

if TYPE_CHECKING:
    from ffebm_compiler.circuit_power import PowerReport
    from ffebm_compiler.drawing.measurements import GainPoint
    from ffebm_compiler.reports.checks import Comparison, GradientReport
    from ffebm_compiler.reports.costs import CostReport
    from ffebm_compiler.reports.diagnosis import Diagnosis

__all__ = ["HybridModel"]


class HybridModel(HybridCore):
    """A feedforward-tied energy-based model: the source's forward signature and `state_dict`.

    `forward` settles each energy block and runs each feedforward block; `backward` of a loss
    chains the blocks' gradient estimators with autograd (BP-EP chaining, Nest & Ernoult 2024,
    arXiv 2409.03306). Any optimizer, AMP and DistributedDataParallel work on it as on the source.
    """

    @property
    def plan(self) -> Plan:
        """The partition that this model runs."""
        plan = self._plan
        assert isinstance(plan, Plan)
        return plan

    def compare(self, *args: Any, **kwargs: Any) -> Comparison:
        """Deviation from the source network, per block and at the output, for given inputs."""
        from ffebm_compiler.reports.checks import compare

        return compare(self, args, kwargs)

    def diagnose(self, *args: Any, sweeps: int = 12, **kwargs: Any) -> Diagnosis:
        """How each block settles on given inputs: ρ, sweeps, residual and energy at every sweep.

        `sweeps` is the number of sweeps recorded, whatever the tolerance.

        Raises:
            InputError: `sweeps` is no whole number of at least 1.
        """
        from ffebm_compiler.reports.diagnosis import diagnose

        return diagnose(self, args, kwargs, sweeps)

    def summary(self) -> str:
        """The plan, and loop gain, sweeps, solver and estimator of every block, as text."""
        from ffebm_compiler.reports.text import summary_text

        return summary_text(self)

    def cost_report(self) -> CostReport:
        """Modelled energy and latency per sample, with the sweeps that the loop gains predict; `print` it.

        Raises:
            HardwareError: where `costs` of the hardware names a constant that the model does not have.
        """
        from ffebm_compiler.reports.costs import cost_report_of

        return cost_report_of(self)

    @outside_inference()
    def to_digital(self) -> nn.Module:
        """A plain module of the source's class with the present weights.

        Raises:
            UnsupportedError: where the source was an `ExportedProgram`, which has no module class.
        """
        source = self.__dict__["_source"]
        if type(source) is nn.Module:
            raise UnsupportedError(
                "the source was an ExportedProgram, which has no eager module: load hybrid.state_dict() into yours"
            )
        digital: nn.Module = copy.deepcopy(source)
        for name in self.feedback_names:
            path, _, leaf = name.rpartition(".")
            delattr(module_at(digital, path), leaf)
        digital.training = self.training
        return digital

    def save_svg(self, path: str | Path) -> None:
        """Draw the partition as an SVG picture; see `Plan.save_svg`."""
        from ffebm_compiler.drawing import save_svg

        save_svg(self._plan, path, self)

    def save_image(self, path: str | Path, dpi: float = 192.0) -> None:
        """Draw the partition as a PNG or PDF picture, by the path's suffix; see `Plan.save_image`."""
        from ffebm_compiler.drawing import save_image

        save_image(self._plan, path, dpi, self)

    def to_dot(self) -> str:
        """The partition in Graphviz's DOT language; see `Plan.to_dot`."""
        from ffebm_compiler.drawing import dot_text

        return dot_text(self._plan, self)

    def save_html(
        self,
        path: str | Path,
        *,
        comparison: Comparison | None = None,
        gradients: GradientReport | None = None,
        diagnosis: Diagnosis | None = None,
        what_if: bool = False,
        loop_gains: Sequence[GainPoint] = (),
    ) -> None:
        """Draw the partition as one self-contained, interactive HTML page; an existing file is replaced.

        The page can show loop gains on the blocks. `comparison` (from `compare(x)`) adds each block's
        deviation, `gradients` (from `check_gradients`) the agreement of its gradients, and `diagnosis`
        (from `diagnose(x)`) its residual, energy and states at every sweep. `what_if` adds the plan under
        other options, and `loop_gains` (from `drawing.loop_gain_points`) a slider of deviation against loop gain.

        Raises:
            InputError: where a measurement is of another hybrid, or is none.
            ExportError: where the path cannot be written or the layout library is missing.
        """
        from ffebm_compiler.drawing import deviation_overlay, gradient_overlay, save_html

        overlays = [] if comparison is None else [deviation_overlay(self._plan, comparison)]
        if gradients is not None:
            overlays.append(gradient_overlay(self._plan, gradients))
        save_html(self._plan, path, self, overlays, diagnosis, what_if, gradients=gradients, loop_gains=loop_gains)

    def _repr_html_(self) -> str:
        from ffebm_compiler.drawing import notebook_html

        return notebook_html(self._plan, self)

    def export_onnx(self, path: str | Path, parts: str | None = None, *, fuse_batchnorm: bool = False) -> Path:
        """Export the whole hybrid as one ONNX file, or its digital parts into a folder.

        Both are in eval mode, whatever mode the hybrid is in, and leave the batch size free. An `FFEBMWarning` says if
        train mode computes something else. Weights on devices are those that the devices hold at their present age.
        See `docs/onnx.md`.

        Args:
            path: the file; with `parts="digital"` the folder.
            parts: None for the whole hybrid, with each energy block an ONNX function that settles;
                `"digital"` for one file per feedforward part and a manifest.
            fuse_batchnorm: let the exporter fuse batch norm into digital convolutions.

        Raises:
            ExportError: where onnx is not installed, an operation has no ONNX form, the path cannot be written, or
                the weights are on devices with noise of reads or with converters.
            InputError: for another value of `parts`, or a path that is none.
        """
        from ffebm_compiler.device_state import check_exportable_devices
        from ffebm_compiler.onnx import export_digital, export_whole

        check_exportable_devices(self)
        if parts not in (None, "digital"):
            given = repr(parts) if isinstance(parts, str) else f"a {type(parts).__name__}"
            raise InputError(
                f"parts is {given}; expected 'digital', or nothing for the whole hybrid, which knows its inputs"
            )
        export = export_whole if parts is None else export_digital
        return export(self, path, fuse_batchnorm=fuse_batchnorm)

    def export_spice(
        self,
        path: str | Path,
        *,
        block: str,
        inputs: Tensor | Sequence[Tensor],
        emission: float = 1e-3,
        volts: float = 5.0,
        siemens: float = 1e-3,
        currents: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write the circuit of a resistive block as a netlist for ngspice, with the expected voltages as comments.

        A unit of layer m is a node `v_LAYER_i` of voltage V₀ s/A_m, and its amplifier's output `s_LAYER_i` of V₀ s. It
        is the circuit of the first sample, in eval mode. `ngspice -b FILE` prints every node. See `docs/resistive.md`.

        Args:
            path: the file.
            block: name of the block, as `hybrid.blocks` has it.
            inputs: inputs of the network, batch first: a tensor, or one for each.
            emission: emission coefficient n of the diodes: 1 is silicon, 0 would be ideal. Errors are linear in n.
            volts: the largest voltage of a node `v_LAYER_i`, in V. It sets V₀.
            siemens: the conductance of the largest weight, in S.
            currents: by module path of a layer, what is added to the field of its units (dimensionless). A nudge by
                β is −β/c_l times the derivative of the loss.

        Raises:
            InputError: the block is unknown or has one layer, there are no inputs, a number is out of range, or a
                current fits no layer.
            UnsupportedError: the energy is not that of a circuit, an activation has no diodes, or an amplifier's gain
                is below a row sum.
            ExportError: the file cannot be written.
        """
        from ffebm_compiler.spice import export_spice

        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        numbers = {"emission": emission, "volts": volts, "siemens": siemens}
        return export_spice(self, path, block, given, currents=currents, **numbers)

    def power_report(self, inputs: Tensor | Sequence[Tensor], volts: float = 5.0, siemens: float = 1e-3) -> PowerReport:
        """What the circuits of resistive blocks dissipate at equilibrium, P = V₀² g₀ Σ g (Δs)²; `print` it.

        The circuits are those of `export_spice`, with ideal diodes, in eval mode. The report says what resistors, pads
        and leaks dissipate, and what inputs, biases and amplifiers deliver for that, in watts as the mean over samples.
        What amplifiers need beyond what they deliver is not in it.

        Args:
            inputs: inputs of the network, batch first: a tensor, or one for each.
            volts: the largest voltage of a node over all samples, in V. It sets V₀ of each block.
            siemens: the conductance of the largest weight of each block, in S.

        Raises:
            InputError: there are no inputs, a number is not positive, or no block has feedback.
            UnsupportedError: the energy is not that of a circuit.
        """
        from ffebm_compiler.circuit_power import power_report

        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        return power_report(self, given, volts, siemens)

    def save(self, path: str | Path) -> None:
        """Save plan, settings and weights into a folder (JSON and safetensors); `ffebm.load` reads it.

        Raises:
            ExportError: where the path cannot be written, or holds something else.
        """
        from ffebm_compiler.storage import save

        save(self, path)
