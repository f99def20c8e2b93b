"""`HeldGain`: the feedback of one block. γ is a setting, and the loop gain is a measurement.

γ_{l,m} = c_m/c_l is the setting of an amplifier. It changes only at conversion, by `set_feedback`, by
`recertify`, and in training if `feedback` is held. The loop gain follows from γ and the present weights,
and changes with them. A training forward that finds the weights changed measures first, and sets the amplifiers again
if the feedback needs it. The energy decides what is measured and set (`Gauge` in `runtime/energies/base.py`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.errors import FFEBMWarning, InputError
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.energies.base import Change, Energy, Gauge, Setting, Uncertified
from ffebm_compiler.runtime.energies.followed_norm import Launched
from ffebm_compiler.runtime.finite import check_weights
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame
from ffebm_compiler.runtime.program.layout import laid_out
from ffebm_compiler.runtime.weight_stamp import WeightStamp

__all__ = ["HeldGain", "recertify_each"]

_TOGETHER = 1 << 24
"""How many values of weights are measured together."""

_FAR = 2.0
"""Factor by which amplifiers may be off in evaluation without a warning. One step in training is seldom so much."""


class HeldGain:
    """The feedback and certificate of a block, and the values kept between two measurements of its loop gain."""

    def __init__(self, program: BlockProgram, energy: Energy) -> None:
        self.program = program
        self.energy = energy
        self.feedback: float | str = energy.default_feedback
        """The feedback to hold: a number whose meaning depends on the energy, or `"symmetric"` (γ = 1)."""
        self.certificate: Certificate | None = None
        """The certificate of the last measurement; None for a block without feedback."""
        self.gauge = energy.gauge(program)
        self.locked = False
        """Whether the amplifiers stay as they are even if the weights change."""
        self.slack: float | None = None
        """Relative distance from the feedback at which amplifiers are set again; None: the energy's own."""
        self.changes = 0
        """Number of changes of the weights that training forwards have seen."""
        self.stamp: WeightStamp | None = None
        """Stamp of the weights that the certificate belongs to."""
        self._changed_stamp: WeightStamp | None = None
        """Stamp of changed weights, until they are measured."""
        self._converge_every: int | None = None
        self._measured_stamp: tuple[WeightStamp, Certificate] | None = None
        self._evaluated_stamp: WeightStamp | None = None
        """Stamp of other weights that an evaluation has compared with those that the feedback was set for."""
        self._unlike_stamp: WeightStamp | None = None
        """Stamp of such weights, until they are compared."""
        self._aged = False
        self._warned = False
        self._warned_in_evaluation = False
        self._cached_setting: (
            tuple[Certificate | None, float | str, tuple[Setting, float | None, Tensor | None]] | None
        ) = None
        self._examples: list[Tensor] = []
        self._shapes: dict[int, torch.Size] = {}

    def moved(self, program: BlockProgram) -> HeldGain:
        """The same feedback for another program of the block, to be measured."""
        fresh = HeldGain(program, self.energy)
        fresh.feedback, fresh.locked, fresh.changes = self.feedback, self.locked, self.changes
        fresh._examples = self._examples
        return fresh

    def forget(self) -> None:
        """Note that the weights have changed by themselves, as devices age."""
        self.stamp = self._changed_stamp = self._measured_stamp = self._evaluated_stamp = None
        self._aged = True

    def __getstate__(self) -> dict[str, Any]:
        """Everything without the stamps, which identify tensor objects. The hybrid stamps its copy's weights.

        A copy is outside of the context that holds the feedback (`HybridCore.held_feedback`).
        """
        kept = {name: None if name.endswith("stamp") else value for name, value in self.__dict__.items()}
        return {**kept, "locked": False}

    @property
    def scales(self) -> tuple[float, ...]:
        """c_l."""
        return (1.0,) * len(self.program.layers) if self.certificate is None else self.certificate.scales

    @property
    def setting(self) -> Setting:
        """The energy and the settings of its amplifiers."""
        return self._derived()[0]

    @property
    def loop_gain(self) -> float:
        """κ of the last measurement; 0 for a block without feedback."""
        return 0.0 if self.certificate is None else self.certificate.loop_gain

    @property
    def contraction(self) -> float | None:
        """Factor by which a sweep contracts; None without a certificate."""
        return self._derived()[1]

    @property
    def error_shares(self) -> Tensor | None:
        """W of `Energy.error_shares`; None without a certificate."""
        return self._derived()[2]

    def _derived(self) -> tuple[Setting, float | None, Tensor | None]:
        """(setting, contraction, error shares), computed once for each certificate and feedback."""
        certificate, kept = self.certificate, self._cached_setting
        if kept is None or kept[0] is not certificate or kept[1] != self.feedback:
            amplifiers: tuple[float, ...] = ()
            contraction = None
            coherent = self.energy.coherent
            if certificate is not None:
                amplifiers = certificate.amplifiers
                coherent = coherent or (certificate.coherent and self.program.symmetric)
                contraction = self.energy.contraction(self.program, certificate, self.feedback)
            shares = None
            if certificate is not None and contraction is not None:
                found = self.energy.error_shares(self.program, certificate)
                shares = None if found is None else torch.from_numpy(found)
            setting = Setting(self.energy, self.scales, amplifiers, coherent)
            kept = certificate, self.feedback, (setting, contraction, shares)
            self._cached_setting = kept
        return kept[2]

    def remember(self, inputs: Sequence[Tensor]) -> None:
        """Remember these inputs' shapes, for which `recertify` measures."""
        generator = torch.Generator().manual_seed(0)
        self._examples, self._shapes = [], {}
        for value in (v[:1] if self.program.batched and v.dim() else v for v in inputs):
            drawn = torch.rand(value.shape, generator=generator, device="cpu").to(value.device, value.dtype)
            self._examples.append(drawn if value.is_floating_point() else torch.zeros_like(value))

    def recertify(self, weights: Sequence[Tensor | None]) -> None:
        """Measure these weights to convergence and set the amplifiers for them.

        Raises:
            InputError: for a weight with NaN or infinite values.
        """
        recertify_each([(self, weights)])

    def _measurable(self, weights: Sequence[Tensor | None]) -> bool:
        """Whether there is feedback to measure. Weights with NaN or infinite values are refused."""
        if not self.program.coupled or not self._examples:
            return False
        check_weights(self.program.name, weights)
        return True

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        """Turn gradients and autocast off while the context is open."""
        with torch.no_grad(), torch.autocast(self._examples[0].device.type, enabled=False):
            yield

    def fits(self, sources: Sequence[Tensor]) -> bool:
        """Whether the certificate belongs to the present values of these tensors."""
        return self.stamp is not None and self.stamp.fits(sources)

    def fitted(self, sources: Sequence[Tensor]) -> None:
        """Note that the certificate belongs to the present values of these tensors."""
        self.stamp, self._changed_stamp = WeightStamp.of(sources), None
        self._aged = self._warned_in_evaluation = False

    def at(self, weights: Sequence[Tensor | None], sources: Sequence[Tensor]) -> Certificate | None:
        """The certificate of these weights (computed from `sources`) at the present setting. Nothing is changed.

        It is measured once for each value of the weights. The drives are affine, so that of the inputs only the shapes
        matter.

        Raises:
            InputError: a weight holds NaN or infinite values.
        """
        if self.certificate is None:
            return None
        found: Certificate | None = None
        if self._measured_stamp is not None and self._measured_stamp[0].fits(sources):
            found = self._measured_stamp[1]
            if found.scales != self.scales or found.amplifiers != self.certificate.amplifiers:
                return self.gauge.with_setting(found, self.certificate) or self._measured(weights, sources)
        return found or self._measured(weights, sources)

    def _measured(self, weights: Sequence[Tensor | None], sources: Sequence[Tensor]) -> Certificate | None:
        assert self.certificate is not None
        if not self._measurable(weights):
            return None
        with self._without_gradients():
            found = self.gauge.at(*self._evaluated(weights), self.certificate)
        self._measured_stamp = WeightStamp.of(sources), found
        return found

    def set_feedback(self, feedback: float | str) -> bool:
        """Set the feedback from the last measurement. If it returns False, `recertify` must be called."""
        self.feedback = feedback
        if self.certificate is None:
            return True
        found = self.gauge.with_feedback(self.certificate, feedback)
        if found is None:
            return False
        self.certificate = found
        return True

    def look(self, sources: Sequence[Tensor], every: int | None) -> bool:
        """Note before a training forward whether the tensors have changed that the weights are computed from.

        Args:
            sources: those tensors.
            every: number of changes after which the measurement always converges; None only after jumps.
        """
        self._converge_every = every or None
        self._changed_stamp = self._unlike_stamp = None
        if not self.locked:
            present = WeightStamp.of(sources)
            if self.stamp is None or not self.stamp.equals(present):
                self._changed_stamp = present
        return self._changed_stamp is not None

    @property
    def changed(self) -> bool:
        """Whether `look` found weights that have not been measured since."""
        return self._changed_stamp is not None

    def launch(self, weights: Sequence[Tensor | None]) -> Launched | None:
        """Launch the kernels of the next `hold`, which a CUDA graph may capture; None if that cannot be done apart."""
        if self.certificate is None or not self._shapes or self.program.selects:
            return None
        with self._without_gradients():
            return self.gauge.launch(self._frame(weights))

    def hold(self, weights: Sequence[Tensor | None], read: tuple[Launched, np.ndarray] | None = None) -> None:
        """Measure weights that `look` found changed, and set the amplifiers if the feedback needs it.

        Args:
            weights: the block's weights.
            read: what `launch` returned, and its inner products as they were read; None: everything is measured here.

        Raises:
            InputError: a weight holds NaN or infinite values.
        """
        if self._changed_stamp is None:
            return
        before = self.loop_gain
        self.changes += 1
        converge = self._converge_every is not None and self.changes % self._converge_every == 0
        self.certificate = self._followed(weights, converge, read)
        self.stamp, self._changed_stamp = self._changed_stamp, None
        if isinstance(self.feedback, str) and before <= 1 < self.loop_gain and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.program.name}: its loop gain at symmetric feedback has grown to {self.loop_gain:.3g}, and "
                "above 1 it is not certain to settle. Call hybrid.set_feedback(0.1), or keep the weights small with "
                "hybrid.project_to = 0.9",
                FFEBMWarning,
                stacklevel=2,
            )

    def glance(self, sources: Sequence[Tensor]) -> None:
        """Note before a forward in evaluation whether its weights are others than those that the feedback was set for.

        Devices that have aged are left out, since their amplifiers are meant to stay as they are.

        Args:
            sources: the tensors that the weights are computed from.
        """
        self._unlike_stamp = None
        if self.locked or self.certificate is None or (self.stamp is None and self._aged):
            return
        present = WeightStamp.of(sources)
        if not any(known is not None and known.equals(present) for known in (self.stamp, self._evaluated_stamp)):
            self._unlike_stamp = present

    def compare(self, weights: Sequence[Tensor | None]) -> None:
        """Warn once if weights that `glance` noted need other amplifiers than there are. Nothing is changed.

        Raises:
            InputError: a weight holds NaN or infinite values.
        """
        if self._unlike_stamp is None:
            return
        self._evaluated_stamp, self._unlike_stamp = self._unlike_stamp, None
        strength = self._strength(weights)
        if not self._warned_in_evaluation and (strength > _FAR or (strength * _FAR < 1 and self.loop_gain > 0)):
            self._warned_in_evaluation = True
            warnings.warn(
                f"{self.program.name}: its feedback was set for other weights, and evaluation leaves it as it is: at "
                f"{strength:.3g} times what feedback={self.feedback!r} needs at these weights. Call recertify() on the "
                "hybrid before it is evaluated (for averaged weights on the copy that has them, averaged.module)",
                FFEBMWarning,
                stacklevel=2,
            )

    def _strength(self, weights: Sequence[Tensor | None]) -> float:
        """The setting of the amplifiers in units of what the feedback needs at these weights, where it is worst."""
        present, kept = self.certificate, self.gauge.state()
        if present is None or not self._examples:
            return 1.0
        if not kept:  # no vectors from training, which make a measurement cheap
            needed = self.needed(weights)
            return 1.0 if needed is None else _strength(self.program, present, needed)
        try:
            return _strength(self.program, present, self._followed(weights, False, None))
        finally:
            self.gauge.restore(kept)

    def needed(self, weights: Sequence[Tensor | None]) -> Certificate | None:
        """A new certificate, measured to convergence, if the feedback needs other amplifiers at these weights.

        None if the amplifiers are right, or if they must not change (`locked`). Nothing is changed.

        Raises:
            InputError: a weight holds NaN or infinite values.
        """
        if self.locked or self.certificate is None or not self._examples:
            return None

        def evaluated() -> tuple[Frame, list[Tensor]]:
            check_weights(self.program.name, weights)
            return self._evaluated(weights)

        with self._without_gradients():
            return self.gauge.needed(evaluated, self.certificate, self.feedback)

    def _followed(
        self, weights: Sequence[Tensor | None], converge: bool, read: tuple[Launched, np.ndarray] | None
    ) -> Certificate:
        """The certificate after a change of the weights, with the amplifiers that the feedback needs then."""
        assert self.certificate is not None
        with self._without_gradients():
            found = self.gauge.follow(
                Change(
                    self._frame(weights),
                    lambda: self._evaluated(weights),
                    self.certificate,
                    self.feedback,
                    converge,
                    self.slack,
                    read,
                )
            )
        if not math.isfinite(found.radius):
            check_weights(self.program.name, weights)
        return found

    def measured(self, weights: Sequence[Tensor | None]) -> Frame | None:
        """The block as it is measured at these weights, for one sample, without random masks; None without feedback."""
        if not self.program.coupled or not self._examples:
            return None
        with self._without_gradients():
            return self._frame(weights)

    def _frame(self, weights: Sequence[Tensor | None]) -> Frame:
        """The block at these weights for one sample, with the shapes of all registers, without its random masks."""
        if not self._shapes or self.program.selects:  # the winners of max pooling depend on the weights
            return self._evaluated(weights)[0]
        operands = laid_out(self.program, _in_full_precision(weights))
        return Frame(self.program, (), operands, dict.fromkeys(self.program.masks), dict(self._shapes), frozen=True)

    def _evaluated(self, weights: Sequence[Tensor | None]) -> tuple[Frame, list[Tensor]]:
        """The frame of `_frame`, evaluated once without feedback, and its states.

        Random masks are left out, so that a measurement draws nothing. Their gain is added as a bound to the norms.
        """
        wide = _in_full_precision(weights)
        first = next((weight for weight in wide if weight is not None), None)
        examples = [
            value.to(first) if first is not None and value.is_floating_point() else value for value in self._examples
        ]
        operands = laid_out(self.program, [*examples, *wide])
        inputs = [value for value in operands[: len(examples)] if value is not None]
        frame = Frame(self.program, inputs, operands[len(examples) :], dict.fromkeys(self.program.masks))
        states = frame.feedforward()
        shapes = {layer.state: state.shape for layer, state in zip(self.program.layers, states, strict=True)}
        self._shapes = {**frame.shapes, **shapes}
        frame.frozen = True
        return frame, states

    def state(self) -> dict[str, Any]:
        """The numbers, texts and tensors with which a copy of this block behaves in the same way."""
        certificate = self.certificate
        return {
            "layers": [layer.name for layer in self.program.layers],
            "feedback": self.feedback,
            "changes": self.changes,
            "norms": [] if certificate is None else [[k, m, _or_none(norm)] for k, m, norm in certificate.norms],
            "scales": list(self.scales),
            "radius": None if certificate is None else _or_none(certificate.radius),
            "contraction": None if certificate is None else _or_none(certificate.contraction),
            "coherent": certificate is not None and certificate.coherent,
            "tracks": self.gauge.state(),
            **(
                {}
                if certificate is None or not certificate.amplifiers
                else {"amplifiers": list(certificate.amplifiers)}
            ),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state` of the same block.

        Raises:
            InputError: the state belongs to another block.
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
                f"the stored feedback of {self.program.name} is of other layers ({', '.join(state['layers'])}), and it "
                f"holds {', '.join(layers)} here: convert with the plan of the saved hybrid"
            )
        self.feedback = state["feedback"] if isinstance(state["feedback"], str) else float(state["feedback"])
        self.changes = int(state["changes"])
        if self.certificate is not None:
            scales = tuple(float(scale) for scale in state["scales"])
            self.certificate = Certificate(
                tuple(norms),
                scales,
                _number(state["radius"]),
                _number(state["contraction"]),
                amplifiers,
                bool(state.get("coherent", False)),
            )
        self.gauge.restore(state["tracks"])


def recertify_each(blocks: Iterable[tuple[HeldGain, Sequence[Tensor | None]]]) -> None:
    """`HeldGain.recertify` for several blocks and their weights. Blocks that are alike are measured together.

    Raises:
        InputError: for a weight with NaN or infinite values.
    """
    found: dict[type[Gauge], list[tuple[HeldGain, Uncertified]]] = {}
    size = 0
    for gain, weights in blocks:
        if gain._measurable(weights):
            with gain._without_gradients():
                block = Uncertified(gain.gauge, *gain._evaluated(weights), gain.feedback)
            found.setdefault(type(gain.gauge), []).append((gain, block))
            size += sum(weight.numel() for weight in weights if weight is not None)
        if size > _TOGETHER:  # the evaluated blocks are held until they are measured
            _certify(found)
            size = 0
    _certify(found)


def _certify(found: dict[type[Gauge], list[tuple[HeldGain, Uncertified]]]) -> None:
    while found:
        kind, several = found.popitem()
        with several[0][0]._without_gradients():
            certificates = kind.certify_each([block for _, block in several])
        for (gain, _), certificate in zip(several, certificates, strict=True):
            gain.certificate = certificate


def _strength(program: BlockProgram, present: Certificate, needed: Certificate) -> float:
    """The settings of the amplifiers in units of those that are needed: of γ from layer to layer, and of A."""
    edges = [(k, m) for m, above in enumerate(program.upstream) for k in above if program.depths[k] < program.depths[m]]
    ratios = [have / need for have, need in zip(present.amplifiers, needed.amplifiers, strict=True) if need]
    for k, m in edges:
        if all(c.scales[k] > 0 and c.scales[m] > 0 for c in (present, needed)):
            have, need = (c.scales[m] / c.scales[k] for c in (present, needed))
            ratios.append((have / need) ** (1 / (program.depths[m] - program.depths[k])))
    return max(ratios, key=lambda ratio: abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf, default=1.0)


def _in_full_precision(weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Weights in at least float32, since norms are not measured in half precision."""
    half = (torch.float16, torch.bfloat16)
    return [w if w is None or w.dtype not in half else w.float() for w in weights]


def _or_none(value: float) -> float | None:
    """The number, or None for an infinite one, which JSON does not have."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.inf if value is None else float(value)
