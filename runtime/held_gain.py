"""`HeldGain`: the feedback of one block. γ is a setting, the loop gain a measurement.

γ_{l,m} = c_m/c_l is what an amplifier is set to. It changes only when it is set: at conversion, by `set_feedback`, by
`recertify`, and in training, where `feedback` is to be held. The loop gain is what γ amounts to at the present weights,
and moves with them. A training forward that finds the weights changed measures first and sets the amplifiers anew where
the feedback asks for it. What is measured and set is the energy's own matter (`Gauge` in `runtime/energies/base.py`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.errors import FFEBMWarning, InputError
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.energies.base import Energy, Setting
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame
from ffebm_compiler.runtime.program.layout import laid_out
from ffebm_compiler.runtime.weight_stamp import WeightStamp

__all__ = ["HeldGain"]


class HeldGain:
    """Feedback, certificate and what is kept between two measurements of a block's loop gain."""

    def __init__(self, program: BlockProgram, energy: Energy) -> None:
        self.program = program
        self.energy = energy
        self.feedback: float | str = energy.default_feedback
        """What is to be held, as the energy understands it; or `"symmetric"` (γ = 1)."""
        self.certificate: Certificate | None = None
        """Of the weights measured last; None for a block without feedback."""
        self.gauge = energy.gauge(program)
        self.locked = False
        """Whether the amplifiers stay as they are whatever the weights are."""
        self.changes = 0
        """Changes of the weights that training forwards have seen."""
        self.stamp: WeightStamp | None = None
        """Of the weights that the certificate is of."""
        self._arriving: WeightStamp | None = None
        """Of changed weights, until they are measured."""
        self._every: int | None = None
        self._seen: tuple[WeightStamp, Certificate] | None = None
        self._warned = False
        self._kept: tuple[Certificate | None, float | str, tuple[Setting, float | None]] | None = None
        self._examples: list[Tensor] = []
        self._shapes: dict[int, torch.Size] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the stamps, which are of tensor objects; the hybrid stamps its copy's weights."""
        return {**self.__dict__, "stamp": None, "_arriving": None, "_seen": None}

    @property
    def scales(self) -> tuple[float, ...]:
        """c_l."""
        return (1.0,) * len(self.program.layers) if self.certificate is None else self.certificate.scales

    @property
    def setting(self) -> Setting:
        """The energy and what its amplifiers are set to."""
        return self._derived()[0]

    @property
    def loop_gain(self) -> float:
        """κ as measured last; 0 for a block without feedback."""
        return 0.0 if self.certificate is None else self.certificate.loop_gain

    @property
    def contraction(self) -> float | None:
        """Factor by which a sweep contracts, where it is certified to."""
        return self._derived()[1]

    def _derived(self) -> tuple[Setting, float | None]:
        """(setting, contraction), made once for a certificate and a feedback."""
        certificate, kept = self.certificate, self._kept
        if kept is None or kept[0] is not certificate or kept[1] != self.feedback:
            amplifiers: tuple[float, ...] = ()
            contraction = None
            if certificate is not None:
                amplifiers = certificate.amplifiers
                contraction = self.energy.contraction(self.program, certificate, self.feedback)
            kept = certificate, self.feedback, (Setting(self.energy, self.scales, amplifiers), contraction)
            self._kept = kept
        return kept[2]

    def calibrate(self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]) -> None:
        """Remember these inputs' shapes, measure the operator norms and set the feedback."""
        generator = torch.Generator().manual_seed(0)
        self._examples, self._shapes = [], {}
        for value in (v[:1] if self.program.batched and v.dim() else v for v in inputs):
            drawn = torch.rand(value.shape, generator=generator).to(value.device, value.dtype)
            self._examples.append(drawn if value.is_floating_point() else torch.zeros_like(value))
        self.recertify(weights)

    def recertify(self, weights: Sequence[Tensor | None]) -> None:
        """Measure these weights to convergence and set the amplifiers for them.

        Raises:
            InputError: for a weight with NaN or infinite values.
        """
        if self._measurable(weights):
            with self._quietly():
                self.certificate = self.gauge.certify(*self._evaluated(weights), self.feedback)

    def _measurable(self, weights: Sequence[Tensor | None]) -> bool:
        """Whether there is feedback to measure; refuses weights with NaN or infinite values."""
        if not self.program.coupled or not self._examples:
            return False
        check_weights(self.program.name, weights)
        return True

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Without gradients and without autocast."""
        with torch.no_grad(), torch.autocast(self._examples[0].device.type, enabled=False):
            yield

    def fits(self, sources: Sequence[Tensor]) -> bool:
        """Whether the certificate is of these tensors as they are now."""
        return self.stamp is not None and self.stamp.fits(sources)

    def fitted(self, sources: Sequence[Tensor]) -> None:
        """Note that the certificate is of these tensors as they are now."""
        self.stamp, self._arriving = WeightStamp.of(sources), None

    def at(self, weights: Sequence[Tensor | None], sources: Sequence[Tensor]) -> Certificate | None:
        """The certificate of these weights (made of `sources`) at the present setting, measured once. Changes nothing.

        The drives are affine, so that it depends on the inputs' shapes only.

        Raises:
            InputError: for a weight with NaN or infinite values.
        """
        if self.certificate is None:
            return None
        found: Certificate | None = None
        if self._seen is not None and self._seen[0].fits(sources):
            found = self._seen[1]
            if found.scales != self.scales or found.amplifiers != self.certificate.amplifiers:
                return self.gauge.with_setting(found, self.certificate) or self._measured(weights, sources)
        return found or self._measured(weights, sources)

    def _measured(self, weights: Sequence[Tensor | None], sources: Sequence[Tensor]) -> Certificate | None:
        assert self.certificate is not None
        if not self._measurable(weights):
            return None
        with self._quietly():
            found = self.gauge.at(*self._evaluated(weights), self.certificate)
        self._seen = WeightStamp.of(sources), found
        return found

    def set_feedback(self, feedback: float | str) -> bool:
        """Set the feedback from what was measured last; whether that was enough (else call `recertify`)."""
        self.feedback = feedback
        if self.certificate is None:
            return True
        found = self.gauge.with_feedback(self.certificate, feedback)
        if found is None:
            return False
        self.certificate = found
        return True

    def look(self, sources: Sequence[Tensor], every: int | None) -> bool:
        """Note before a training forward whether the tensors that the weights are made of have changed.

        Args:
            sources: those tensors.
            every: changes after which is measured to convergence, whatever the estimate says.
        """
        self._every = every or None
        self._arriving = None
        if not self.locked:
            present = WeightStamp.of(sources)
            if self.stamp is None or not self.stamp.equals(present):
                self._arriving = present
        return self._arriving is not None

    def hold(self, weights: Sequence[Tensor | None]) -> None:
        """Measure weights that `look` found changed, and set the amplifiers where the feedback asks for it.

        Raises:
            InputError: for a weight with NaN or infinite values.
        """
        if self._arriving is None:
            return
        before = self.loop_gain
        self.changes += 1
        self._measure(weights, converge=self._every is not None and self.changes % self._every == 0)
        self.stamp, self._arriving = self._arriving, None
        if isinstance(self.feedback, str) and before <= 1 < self.loop_gain and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.program.name}: its loop gain at symmetric feedback has grown to {self.loop_gain:.3g}; above 1 "
                "nothing certifies that it settles: give `feedback` as a number such as 0.1, or keep the weights "
                "small with hybrid.project_to = 0.9",
                FFEBMWarning,
                stacklevel=2,
            )

    def needed(self, weights: Sequence[Tensor | None]) -> Certificate | None:
        """The certificate that holds the feedback at these weights, measured to convergence, where it is another now.

        None where the amplifiers are right, and where they are held (`locked`). Changes nothing.

        Raises:
            InputError: for a weight with NaN or infinite values.
        """
        if self.locked or self.certificate is None or not self._examples:
            return None

        def evaluated() -> tuple[Frame, list[Tensor]]:
            check_weights(self.program.name, weights)
            return self._evaluated(weights)

        with self._quietly():
            return self.gauge.needed(evaluated, self.certificate, self.feedback)

    def _measure(self, weights: Sequence[Tensor | None], converge: bool) -> None:
        assert self.certificate is not None
        with self._quietly():
            found = self.gauge.follow(
                self._frame(weights), lambda: self._evaluated(weights), self.certificate, self.feedback, converge
            )
        if not math.isfinite(found.radius):
            check_weights(self.program.name, weights)
        self.certificate = found

    def measured(self, weights: Sequence[Tensor | None]) -> Frame | None:
        """The block as it is measured at these weights: one sample, without random masks; None where nothing is."""
        if not self.program.coupled or not self._examples:
            return None
        with self._quietly():
            return self._frame(weights)

    def _frame(self, weights: Sequence[Tensor | None]) -> Frame:
        """The block at these weights for one sample, with the shapes of all registers, without its random masks."""
        if not self._shapes or self.program.selects:  # the winners of max pooling are those at these weights
            return self._evaluated(weights)[0]
        operands = laid_out(self.program, _wide(weights))
        return Frame(self.program, (), operands, dict.fromkeys(self.program.masks), dict(self._shapes), frozen=True)

    def _evaluated(self, weights: Sequence[Tensor | None]) -> tuple[Frame, list[Tensor]]:
        """The same, evaluated once without feedback, and its states."""
        wide = _wide(weights)
        first = next((weight for weight in wide if weight is not None), None)
        examples = [
            value.to(first) if first is not None and value.is_floating_point() else value for value in self._examples
        ]
        operands = laid_out(self.program, [*examples, *wide])
        inputs = [value for value in operands[: len(examples)] if value is not None]
        frame = Frame(self.program, inputs, operands[len(examples) :])
        states = frame.feedforward()
        shapes = {layer.state: state.shape for layer, state in zip(self.program.layers, states, strict=True)}
        self._shapes = {**frame.shapes, **shapes}
        # Random masks are left out of the measured norm; their gain is added as a bound.
        frame.drawn.update(dict.fromkeys(self.program.masks))
        frame.frozen = True
        return frame, states

    def state(self) -> dict[str, Any]:
        """What makes a copy of this block behave as it does: numbers, texts and tensors only."""
        certificate = self.certificate
        return {
            "layers": [layer.name for layer in self.program.layers],
            "feedback": self.feedback,
            "changes": self.changes,
            "norms": [] if certificate is None else [[k, m, _finite(norm)] for k, m, norm in certificate.norms],
            "scales": list(self.scales),
            "radius": None if certificate is None else _finite(certificate.radius),
            "contraction": None if certificate is None else _finite(certificate.contraction),
            "tracks": self.gauge.state(),
            **(
                {}
                if certificate is None or not certificate.amplifiers
                else {"amplifiers": list(certificate.amplifiers)}
            ),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` of the same block returned.

        Raises:
            InputError: for the state of another block.
        """
        layers = [layer.name for layer in self.program.layers]
        edges = [] if self.certificate is None else [(k, m) for k, m, _ in self.certificate.norms]
        norms = [(int(k), int(m), _number(norm)) for k, m, norm in state["norms"]]
        amplifiers = tuple(float(gain) for gain in state.get("amplifiers", ()))
        if len(amplifiers) != len(self.setting.amplifiers):
            raise InputError(
                f"the stored feedback of {self.program.name} is of another energy: convert with the energy of the "
                "saved hybrid"
            )
        if list(state["layers"]) != layers or [(k, m) for k, m, _ in norms] != edges:
            raise InputError(
                f"the stored feedback of {self.program.name} is of other layers ({', '.join(state['layers'])}): it "
                f"holds {', '.join(layers)} here; convert with the plan of the saved hybrid"
            )
        self.feedback = state["feedback"] if isinstance(state["feedback"], str) else float(state["feedback"])
        self.changes = int(state["changes"])
        if self.certificate is not None:
            scales = tuple(float(scale) for scale in state["scales"])
            self.certificate = Certificate(
                tuple(norms), scales, _number(state["radius"]), _number(state["contraction"]), amplifiers
            )
        self.gauge.restore(state["tracks"])


def check_weights(name: str, weights: Sequence[Tensor | None]) -> None:
    """Refuse weights with NaN or infinite values."""
    for index, weight in enumerate(weights):
        if weight is not None and not bool(torch.isfinite(weight).all()):
            raise InputError(
                f"weight {index} of {name}, of shape {tuple(weight.shape)}, holds NaN or infinite values: "
                "training may have diverged; lower the learning rate or reload a checkpoint"
            )


def _wide(weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Weights in at least float32: norms are not measured in half precision."""
    half = (torch.float16, torch.bfloat16)
    return [w if w is None or w.dtype not in half else w.float() for w in weights]


def _finite(value: float) -> float | None:
    """The number, or None for an infinite one, which JSON does not have."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.inf if value is None else float(value)
