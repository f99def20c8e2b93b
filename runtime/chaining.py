"""BP-EP chaining: one `torch.autograd.Function` for an energy block.

Forward settles the free phase. Backward receives δ = ∂L/∂s at the block's outputs from autograd, and
returns the gradients that the block's estimator computes from it (Nest & Ernoult 2024, arXiv 2409.03306).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from ffebm_compiler.errors import ConvergenceError, GradientError
from ffebm_compiler.runtime.devices.analog import Analog
from ffebm_compiler.runtime.energies.base import Energy, Setting
from ffebm_compiler.runtime.estimators.base import Estimator, aligned
from ffebm_compiler.runtime.estimators.situation import Situation
from ffebm_compiler.runtime.held_gain import HeldGain
from ffebm_compiler.runtime.one_derivative import IN_A_BLOCK, refuse_batched, refuse_forward_mode, without_derivative
from ffebm_compiler.runtime.phases.free_phase import FreePhase
from ffebm_compiler.runtime.phases.undetermined import check_determined
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame
from ffebm_compiler.runtime.program.layout import laid_out
from ffebm_compiler.runtime.program.light import light_pays
from ffebm_compiler.runtime.program.reads import Reads
from ffebm_compiler.runtime.solvers.base import Solver
from ffebm_compiler.runtime.solvers.pace import Paces
from ffebm_compiler.runtime.solvers.relaxation import Settled

__all__ = ["Restoring", "Settle"]


_SETTINGS = 5
"""How many arguments of `Settle` are not operands."""


class Restoring(Protocol):
    """Puts gradients back that a failed backward has added."""

    def restore(self) -> None: ...


class Settling(Protocol):
    """The methods of an `EnergyBlock` that are needed to settle it and to take its gradients."""

    program: BlockProgram
    training: bool
    gain: HeldGain
    energy_function: Energy
    last: Settled | None
    aligned: bool
    kept_gradients: Restoring | None

    @property
    def active_estimator(self) -> Estimator: ...
    @property
    def active_solver(self) -> Solver: ...
    @property
    def contraction(self) -> float | None: ...
    @property
    def setting(self) -> Setting: ...
    @property
    def may_be_light(self) -> bool: ...
    def paces_on(self, device: torch.device) -> Paces | None: ...
    def relax(self, frame: Frame) -> tuple[FreePhase, Settled]: ...
    def remember(self, phase: FreePhase) -> None: ...
    def error_rtol(self, dtype: torch.dtype, training: bool = False) -> float: ...
    def free_rtol(self, dtype: torch.dtype, training: bool = False) -> float: ...
    def analog(self, reads: Reads | None, sweeps: int) -> Analog | None: ...


@dataclass(frozen=True)
class _Known:
    """What a backward needs to know of the block as it was in its forward, whatever is set on the block in between."""

    program: BlockProgram
    gain: HeldGain
    setting: Setting
    feedback: float | str
    loop_gain: float
    contraction: float | None
    solver: Solver
    free_rtol: float
    error_rtol: float
    hint: Callable[[], str]
    estimator: Estimator
    aligned: bool
    analog: Analog | None
    settled: Settled
    kept_gradients: Restoring | None

    @classmethod
    def of(cls, block: Settling, phase: FreePhase, settled: Settled, dtype: torch.dtype) -> _Known:
        """That of a settled block whose states have this dtype."""
        gain, energy, training = block.gain, block.energy_function, phase.frame.training
        dtype = torch.bfloat16 if phase.frame.autocast else dtype
        return cls(
            program=block.program,
            gain=gain,
            setting=phase.setting,
            feedback=gain.feedback,
            loop_gain=gain.loop_gain,
            contraction=block.contraction,
            solver=block.active_solver,
            free_rtol=block.free_rtol(dtype, training),
            error_rtol=block.error_rtol(dtype, training),
            hint=partial(energy.remedy, gain.feedback, gain.loop_gain),
            estimator=block.active_estimator,
            aligned=block.aligned,
            analog=block.analog(phase.frame.reads, settled.sweeps),
            settled=settled,
            kept_gradients=block.kept_gradients,
        )


class Settle(torch.autograd.Function):
    """(inputs, weights) -> settled states of the visible layers. Backward calls the block's estimator.

    Pre-activations are saved. A state is saved only if σ costs more than a pass over memory, or if it is an output and
    so in memory in any case. For example, a hidden state of a clamp is computed again from its pre-activation. Measured
    states are all saved, since they are not exactly σ of anything.

    `scaled` says that the loss may be scaled, as it is under autocast in float16. An error that overflows is then no
    mistake, and all gradients are NaN.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: Settling,
        drawn: dict[int, Any],
        autocast: bool,
        scaled: bool,
        reads: Reads | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        program = block.program
        tensors = laid_out(program, tensors)
        inputs = [value for value in tensors[: program.inputs] if value is not None]
        frame = Frame(program.quick, inputs, tensors[program.inputs :], drawn)
        frame.training, frame.autocast, frame.reads = block.training, autocast, reads
        if block.training:
            frame.paces = block.paces_on(inputs[0].device)
            block.gain.hold(frame.weights)
        frame.light = block.may_be_light and light_pays(frame)
        phase, block.last = block.relax(frame)
        if not block.training and phase.setting is block.setting:  # else it settled once more, as the log says
            block.gain.compare(frame.weights)
        frame = phase.frame
        states, preactivations = phase.settled()
        block.remember(phase)
        ctx.known = _Known.of(block, phase, block.last, states[0].dtype)
        ctx.drawn, ctx.shapes, ctx.training = frame.drawn, frame.shapes, frame.training
        ctx.scaled = scaled
        ctx.paces, ctx.autocast, ctx.light = frame.paces, autocast, frame.light and frame.training
        ctx.set_materialize_grads(False)
        wide = phase.literal if phase.literal and phase.literal[0] is not states[0] else ()
        ctx.measured = bool(phase.literal)
        kept = [
            state if ctx.measured or index in program.visible or layer.activation.smooth else None
            for index, (layer, state) in enumerate(zip(program.layers, states, strict=True))
        ]
        ctx.save_for_backward(*tensors, *kept, *preactivations, *wide)
        return tuple(states[index] for index in program.visible)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        refuse_forward_mode(ctx.known.program.name, IN_A_BLOCK)

    @staticmethod
    def backward(ctx: Any, *visible: Tensor | None) -> tuple[Tensor | None, ...]:
        program = ctx.known.program
        refuse_batched(program.name, IN_A_BLOCK, visible)
        with torch.no_grad():
            found = Settle._restoring(ctx, *(error if error is None else error.detach() for error in visible))
        graph = torch.is_grad_enabled()
        return without_derivative(program.name, IN_A_BLOCK, found, (*ctx.saved_tensors, *visible)) if graph else found

    @staticmethod
    def _restoring(ctx: Any, *visible: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients. If they cannot be found, those that the backward has added are taken back."""
        try:
            return Settle._gradients(ctx, *visible)
        except BaseException as failure:
            if ctx.known.kept_gradients is not None:
                ctx.known.kept_gradients.restore()
            spoilt = any(error is not None and not bool(torch.isfinite(error).all()) for error in visible)
            if not isinstance(failure, ConvergenceError) or not spoilt:
                raise
            if ctx.scaled:
                return Settle._not_finite(ctx)
            raise GradientError(
                f"the gradient of the loss at the outputs of {ctx.known.program.name} holds NaN or infinite values: "
                "look at the loss and at the digital parts after the block (a logarithm of 0, an overflow in half "
                "precision). A torch.amp.GradScaler finds overflows, and skips their steps, under autocast in float16"
            ) from failure

    @staticmethod
    def _not_finite(ctx: Any) -> tuple[Tensor | None, ...]:
        """NaN for every gradient: the step is skipped by whatever scales the loss, and its scale lowered."""
        operands = ctx.saved_tensors[: ctx.known.program.inputs + ctx.known.program.weights]
        found = [
            torch.full_like(value, torch.nan) if value is not None and wanted else None
            for value, wanted in zip(operands, ctx.needs_input_grad[_SETTINGS:], strict=True)
        ]
        return (*(None,) * _SETTINGS, *found)

    @staticmethod
    def _gradients(ctx: Any, *visible: Tensor | None) -> tuple[Tensor | None, ...]:
        known: _Known = ctx.known
        program = known.program
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
        count = program.inputs + program.weights
        if all(error is None for error in visible):
            return (None,) * (count + _SETTINGS)
        layers = len(program.layers)
        inputs = [value for value in saved[: program.inputs] if value is not None]
        frame = Frame(program.quick, inputs, saved[program.inputs : count], ctx.drawn, ctx.shapes, frozen=True)
        frame.training, frame.paces, frame.autocast, frame.light = ctx.training, ctx.paces, ctx.autocast, ctx.light
        preactivations = tuple(value for value in saved[count + layers : count + 2 * layers] if value is not None)
        states = tuple(
            sigma.value(field) if state is None else state
            for sigma, state, field in zip(
                known.setting.activations(frame), saved[count : count + layers], preactivations, strict=True
            )
        )
        wide = tuple(value for value in saved[count + 2 * layers :] if value is not None)
        errors: list[Tensor | None] = [None] * layers
        for index, error in zip(program.visible, laid_out(program, visible), strict=True):
            errors[index] = error
        needed = ctx.needs_input_grad[_SETTINGS:]
        situation = Situation(
            frame=frame,
            setting=known.setting,
            states=states,
            literal=(wide or states) if ctx.measured else (),
            preactivations=preactivations,
            solver=known.solver,
            rtol=known.error_rtol,
            contraction=known.contraction,
            hint=known.hint,
            free_sweeps=known.settled.sweeps,
            free_rtol=known.free_rtol,
            feedback=known.feedback,
            measured=lambda: known.gain.measured(frame.weights),
            inputs_needed=tuple(needed[: program.inputs]),
            weights_needed=tuple(needed[program.inputs :]),
            analog=known.analog,
        )
        check_determined(frame, known.setting, preactivations, known.loop_gain, known.estimator.pushes)
        if known.settled.lost:
            gradients = known.estimator.gradients(*situation.without(known.settled.lost, errors))
            found = situation.spread(gradients.inputs, known.settled.lost)
        else:
            gradients = known.estimator.gradients(situation, errors)
            found = gradients.inputs
        weights = aligned(program, gradients.weights, needed[program.inputs :]) if known.aligned else gradients.weights
        return (*(None,) * _SETTINGS, *found, *weights)
