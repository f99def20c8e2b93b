"""Error currents at a settled state: equation (2) of `runtime/phases/base.py`, and its limit β → 0."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.runtime.activations.base import Activation
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.phases.base import Phase, narrow
from ffebm_compiler.runtime.program.frame import Frame, take_rows
from ffebm_compiler.runtime.solvers.conjugate import newton_step
from ffebm_compiler.runtime.solvers.delay import delay_of_errors
from ffebm_compiler.runtime.solvers.fabric import Question
from ffebm_compiler.runtime.solvers.fixed_point import FixedPoint

__all__ = ["AdjointPhase", "NudgedPhase"]


class _ErrorPhase(Phase):
    """Error currents u at a settled state, driven by −δ. The adjoint phase is linear, so that δ drives −u."""

    loose = True
    direct = True

    def __init__(
        self,
        frame: Frame,
        setting: Setting,
        preactivations: Sequence[Tensor],
        drives: Sequence[Tensor | None],
    ) -> None:
        super().__init__(frame, setting, [None] * len(preactivations))
        self._shares: tuple[float, Tensor | None] | None = None
        self.preactivations = tuple(preactivations)
        self._drive = tuple(drives)
        self._arrived: dict[int, tuple[list[Tensor | None], Tensor | None]] = {}
        """For each layer, the values that light products have carried to it so far, and their sum."""

    @property
    def shares(self) -> Tensor | None:
        """The bound of a backward sweep in two layers, by the change of the first one, which it updates last.

        With u and e in the norms ‖u_l‖/√(c_l Lip σ_l), in which both directions of the edge have √κ, the errors that
        it leaves are at most κ/(1 − κ) and √κ/(1 − κ) of that change.
        """
        if self.relaxation != 1 or not self.contraction:
            return None
        if self._shares is None or self._shares[0] != self.contraction:
            self._shares = self.contraction, self._backward_shares(self.contraction)
        return self._shares[1]

    @shares.setter
    def shares(self, shares: Tensor | None) -> None:
        """The bound of free states says nothing here."""

    def _backward_shares(self, rate: float) -> Tensor | None:
        layers = self.frame.program.layers
        simple = len(layers) == 2 and self.frame.program.symmetric and self.setting.energy.by_loop_gain
        if not simple or any(layer.parameters for layer in layers):
            return None
        first, second = (scale * layer.activation.lipschitz for scale, layer in zip(self.scales, layers, strict=True))
        return torch.tensor([[1.0, 0.0], [math.sqrt(second / first / rate), 0.0]], dtype=torch.float64, device="cpu")

    def order(self) -> list[int]:
        """Backward, so that the nudge reaches the first layer in one sweep."""
        return list(reversed(range(len(self.values))))

    @property
    def sources(self) -> tuple[int, ...]:
        """The layers at which errors arrive from outside."""
        return tuple(index for index, drive in enumerate(self._drive) if drive is not None)

    def delay(self, order: Sequence[int], by_sample: bool = False) -> int:
        """0 in the backward order, if the errors are those of layers that all others lead to."""
        program, sources = self.frame.program, self.sources
        alone = [delay_of_errors(program.upstream, program.depths, (one,), tuple(order)) for one in sources]
        longest = max(alone, default=0)
        if not longest or by_sample:
            return longest
        if len(sources) > 1:  # an error of zero brings nothing
            drives = ((index, self._drive[index]) for index in sources)
            sources = tuple(index for index, drive in drives if drive is None or bool(drive.any()))
        return delay_of_errors(program.upstream, program.depths, sources, tuple(order))

    def carried(self) -> list[int]:
        """The layers that feed later ones. A backward sweep starts from their values alone."""
        return [index for index, below in enumerate(self.frame.program.downstream) if below]

    def give_up(self, rows: Tensor) -> None:
        """Set the error currents of samples to zero, so that they give no gradient."""
        for index, value in enumerate(self.values):
            self.store(index, None if value is None else value.index_fill(0, rows.to(value.device), 0))

    def advance(self, index: int) -> Tensor | None:
        """u_l, over-relaxed."""
        new, before = self.update(index), self.values[index]
        if self.relaxation == 1 or new is None or before is None:
            return new
        return torch.lerp(before, new, self.relaxation)

    @abstractmethod
    def response(self) -> AdjointPhase:
        """The linear response of the block at its settled state."""

    def correction(self, rtol: float) -> list[Tensor] | None:
        """Newton's step for u = f(u), by conjugate gradients."""
        if not (self.frame.program.monotone and self.frame.program.symmetric):
            return None
        residuals = []
        for index, value in enumerate(self.values):
            new = self.update(index)
            if new is None or value is None:
                return None
            residuals.append(new - value)
        return newton_step(self.response(), residuals, [1.0] * len(residuals), rtol)

    @property
    def _arriving_frame(self) -> Frame:
        """The frame through which earlier layers reach a layer."""
        return self.frame

    def force(self, index: int) -> Tensor | None:
        """K_l; None as long as nothing acts on the layer."""
        total = self._drive[index]
        for _, pulled in self.pulled(index):
            total = pulled if total is None else total + pulled
        ratio, deviations = self.frame.deviations(index, self.values, self.scales)
        part = self._arriving(index, deviations) if self.light else self._arriving_frame.tangent(index, deviations)
        if part is None:
            return total
        return part * ratio if total is None else torch.add(total, part, alpha=ratio)

    def _arriving(self, index: int, deviations: list[Tensor | None]) -> Tensor | None:
        """J_l v by a light product of what has changed in v. It adds to −δ about as much as the loop gain says."""
        before, total = self._arrived.get(index, ([None] * len(deviations), None))
        moved = [
            value if value is None or known is None else self.moved(known, value)
            for value, known in zip(deviations, before, strict=True)
        ]
        with self.frame.lightly():
            part = self._arriving_frame.tangent(index, moved)
        if total is not None and part is not None:
            part = total + part
        self._arrived[index] = deviations, part
        return part


class AdjointPhase(_ErrorPhase):
    """u_l = σ_l'(h_l) K_l, with the transpose of the block's linear response. It gives the exact gradient.

    With `transposed=False` it is the linear response itself, the limit β → 0 of the nudged phase. The two differ only
    if the feedback has weights of its own.
    """

    def __init__(
        self,
        frame: Frame,
        setting: Setting,
        preactivations: Sequence[Tensor],
        drives: Sequence[Tensor | None],
        slopes: Sequence[Tensor] | None = None,
        transposed: bool = True,
    ) -> None:
        super().__init__(frame, setting, preactivations, drives)
        self.pace = frame.pace(f"adjoint {self.sources}")
        self.transposed = transposed and not frame.program.symmetric
        self._slopes = None if slopes is None else list(slopes)
        self._tangents: dict[int, Callable[[Tensor], Tensor]] = {}

    @property
    def slopes(self) -> list[Tensor]:
        """σ_l'(h_l)."""
        if self._slopes is None:
            activations = self.setting.activations(self.frame)
            self._slopes = [sigma.derivative(h) for sigma, h in zip(activations, self.preactivations, strict=True)]
        return self._slopes

    @slopes.setter
    def slopes(self, slopes: Sequence[Tensor]) -> None:
        self._slopes = list(slopes)

    def responded(self, index: int, force: Tensor) -> Tensor:
        """σ_l'(h_l) K_l."""
        if self._slopes is not None:
            return self._slopes[index] * force
        if index not in self._tangents:
            sigma = self.setting.activations(self.frame)[index]
            self._tangents[index] = sigma.tangent(self.preactivations[index])
        return self._tangents[index](force)

    @property
    def _arriving_frame(self) -> Frame:
        return self.frame.back if self.transposed else self.frame

    def _pull_back(self, later: int, value: Tensor) -> dict[int, Tensor]:
        frame = self.frame if self.transposed else self.frame.back
        return frame.pullback(later, value, states=True)

    def update(self, index: int) -> Tensor | None:
        """u_l from the derivative of σ_l."""
        force = self.force(index)
        return None if force is None else self.responded(index, force)

    def sweep(self) -> None:
        """One sweep over all layers, without over-relaxation."""
        for index in self.order():
            self.store(index, self.update(index))

    def response(self) -> AdjointPhase:
        """The same system without its drive."""
        nothing: list[Tensor | None] = [None] * len(self.values)
        return AdjointPhase(self.frame, self.setting, self.preactivations, nothing, self.slopes, self.transposed)

    def narrowed(self, rows: Tensor) -> AdjointPhase:
        """The phase of some of the samples, at their present error currents."""
        fields = [take_rows(value, rows) for value in self.preactivations]
        slopes = None if self._slopes is None else [take_rows(slope, rows) for slope in self._slopes]
        drives = narrow(self._drive, rows)
        phase = AdjointPhase(self.frame.narrowed(rows), self.setting, fields, drives, slopes, self.transposed)
        phase.values = narrow(self.values, rows)
        return phase


class NudgedPhase(_ErrorPhase):
    """Equation (2) for one nudging strength β, or for several at once in one batch, one after another.

    A complex β (holomorphic equilibrium propagation) takes two places in the batch, for the real and the
    imaginary parts of its error currents. The coupling is real, so that only the activations mix them.
    """

    def __init__(
        self,
        frame: Frame,
        setting: Setting,
        preactivations: Sequence[Tensor],
        drives: Sequence[Tensor | None],
        betas: Sequence[complex],
    ) -> None:
        self.betas = tuple(betas)
        self.parts = sum(2 if isinstance(beta, complex) else 1 for beta in betas)
        self._single, self._given = frame, tuple(drives)
        self._activations = setting.activations(frame)
        super().__init__(frame.repeated(self.parts), setting, preactivations, self._drives_by_place(drives))
        self.samples = frame.samples
        self.rest: tuple[Tensor, ...] = ()
        """The free states as they were measured, in float64; empty where they are computed."""
        self.pace = frame.pace(f"nudged {self.betas} {self.sources}")
        self._steppers = [
            [_stepper(sigma, h, beta / scale) for beta in betas]
            for sigma, h, scale in zip(self._activations, preactivations, self.scales, strict=True)
        ]

    def _drives_by_place(self, drives: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The drive of every place. −δ is real, so that imaginary places have none."""
        if self.parts == 1:
            return list(drives)
        result: list[Tensor | None] = []
        for drive in drives:
            places: list[Tensor] = []
            for beta in self.betas if drive is not None else ():
                assert drive is not None
                places += [drive, torch.zeros_like(drive)] if isinstance(beta, complex) else [drive]
            result.append(torch.cat(places) if places else None)
        return result

    def update(self, index: int) -> Tensor | None:
        """u_l from the finite difference of σ_l."""
        force = self.force(index)
        if force is None:
            return None
        steppers = self._steppers[index]
        if self.parts == 1:
            return steppers[0](force)
        places = iter(force.chunk(self.parts))
        found: list[Tensor] = []
        for beta, stepper in zip(self.betas, steppers, strict=True):
            if isinstance(beta, complex):
                moved = stepper(torch.complex(next(places), next(places)))
                found += [moved.real, moved.imag]
            else:
                found.append(stepper(next(places)))
        return torch.cat(found)

    def questions(self) -> list[Question]:
        """The equilibrium under the currents of each β.

        Raises:
            UnsupportedError: for a complex β.
        """
        return [self._question(place, beta) for place, beta in enumerate(self.betas)]

    def _question(self, place: int, beta: complex) -> Question:
        """What adds (β/c_l) times its drive to the field of each layer."""
        strength = _measurable(beta, self.frame.program.name)
        nudge = tuple(
            None if drive is None else drive.double() * (strength / scale)
            for drive, scale in zip(self._given, self.scales, strict=True)
        )
        return Question(self._single, self.setting, nudge)

    def answered(self, answers: Sequence[Sequence[Tensor]]) -> None:
        """u_l = c_l (s^β − s*)/β, from literal states in float64."""
        for index, (free, scale) in enumerate(zip(self.rest, self.scales, strict=True)):
            moved = [
                (states[index] - free) * (scale / beta.real) for states, beta in zip(answers, self.betas, strict=True)
            ]
            self.store(index, torch.cat(moved).to(self.preactivations[index]))

    def currents(self) -> list[list[Tensor | None]]:
        """For each β, the error currents u_l. They are complex for a complex β."""
        chunks = [[None] * self.parts if value is None else value.chunk(self.parts) for value in self.values]
        result: list[list[Tensor | None]] = []
        place = 0
        for beta in self.betas:
            wide = 2 if isinstance(beta, complex) else 1
            result.append([_joined(pieces[place : place + wide]) for pieces in chunks])
            place += wide
        return result

    def _rows_at_every_place(self, rows: Tensor) -> Tensor:
        """The rows of these samples at every place."""
        if self.parts == 1:
            return rows
        assert self.samples is not None
        return torch.cat([rows + place * self.samples for place in range(self.parts)])

    def narrowed(self, rows: Tensor) -> NudgedPhase:
        """The phase of some of the samples, at their present error currents."""
        phase = self._of(rows)
        phase.values = narrow(self.values, self._rows_at_every_place(rows))
        return phase

    def _of(self, rows: Tensor) -> NudgedPhase:
        """A phase of some of the samples, at its start."""
        fields = [take_rows(value, rows) for value in self.preactivations]
        return NudgedPhase(self._single.narrowed(rows), self.setting, fields, narrow(self._given, rows), self.betas)

    def adopt(self, other: FixedPoint, rows: Tensor) -> None:
        """Take over the error currents of a narrowed phase."""
        super().adopt(other, self._rows_at_every_place(rows))

    def give_up(self, rows: Tensor) -> None:
        """Set the error currents of samples to zero, so that they give no gradient."""
        super().give_up(self._rows_at_every_place(rows))

    def response(self) -> AdjointPhase:
        """The linear response with σ' at the settled state. It is exact unless the nudge crosses a kink."""
        layers = self.frame.program.layers
        slopes = [sigma.derivative(h) for sigma, h in zip(self._activations, self.preactivations, strict=True)]
        if self.parts > 1:
            slopes = [slope.repeat(self.parts, *[1] * (slope.dim() - 1)) for slope in slopes]
        nothing: list[Tensor | None] = [None] * len(layers)
        return AdjointPhase(self.frame, self.setting, self.preactivations, nothing, slopes, transposed=False)


def _stepper(activation: Activation, h: Tensor, t: complex) -> Callable[[Tensor], Tensor]:
    if isinstance(t, complex):
        return lambda k: activation.complex_quotient(h, k, t)
    return activation.stepper(h, t)


def _measurable(beta: complex, name: str) -> float:
    """β as a number that a fabric can be nudged by.

    Raises:
        UnsupportedError: it is complex.
    """
    if isinstance(beta, complex):
        raise UnsupportedError(
            f"{name}: holomorphic equilibrium propagation nudges by complex currents, which no fabric injects. Use "
            "variant='centered'"
        )
    return beta


def _joined(pieces: Sequence[Tensor | None]) -> Tensor | None:
    if pieces[0] is None or len(pieces) == 1:
        return pieces[0]
    assert pieces[1] is not None
    return torch.complex(pieces[0], pieces[1])
