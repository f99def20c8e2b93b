"""`EnergyBlock`: an energy-based part of a hybrid, as a module."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffebm_compiler.errors import FFEBMError, InputError, UnsupportedError
from ffebm_compiler.runtime.activations.table import Activation
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.chaining import Restoring, Settle
from ffebm_compiler.runtime.devices.analog import Analog
from ffebm_compiler.runtime.devices.arrays import Arrays
from ffebm_compiler.runtime.energies.base import Energy, Setting
from ffebm_compiler.runtime.energies.choice import DEFAULT_ENERGY
from ffebm_compiler.runtime.estimators.choice import EquilibriumPropagation, Estimator
from ffebm_compiler.runtime.estimators.equilibrium_propagation import for_reads
from ffebm_compiler.runtime.finite import check_feedback, check_inputs, check_range, check_weights
from ffebm_compiler.runtime.freed_memory import keep_freed_memory
from ffebm_compiler.runtime.held_gain import HeldGain
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase
from ffebm_compiler.runtime.phases.free_phase import HOLD, FreePhase
from ffebm_compiler.runtime.phases.read_phase import ReadPhase
from ffebm_compiler.runtime.phases.tolerances import error_rtol, free_rtol
from ffebm_compiler.runtime.phases.undetermined import check_currents, check_determined
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame
from ffebm_compiler.runtime.program.light import ROUNDING, full_sweeps
from ffebm_compiler.runtime.program.reads import Reads
from ffebm_compiler.runtime.solvers.base import Solver
from ffebm_compiler.runtime.solvers.choice import Choice, choose
from ffebm_compiler.runtime.solvers.fixed_point import expected_contraction
from ffebm_compiler.runtime.solvers.measured import Measured
from ffebm_compiler.runtime.solvers.pace import Paces
from ffebm_compiler.runtime.solvers.relaxation import Settled, concluded, run

__all__ = ["EnergyBlock", "Equilibrium"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Equilibrium:
    """A settled free phase of a block."""

    states: tuple[Tensor, ...]
    """s_l, batch first, in the order of the block's layers."""
    preactivations: tuple[Tensor, ...]
    """h_l with s_l = σ_l(h_l)."""
    sweeps: int
    residual: float
    converged: bool
    unsettled: tuple[int, ...] = ()
    """Indices of the samples that did not settle."""


class EnergyBlock(nn.Module):
    """A cluster of weight-stationary layers that settles to an equilibrium.

    It owns no tensors: inputs and weights are operands of its `forward`, so that tied weights
    stay tied and the hybrid keeps the source's names. `hybrid.blocks[i]` is the same block with
    its present weights filled in.
    """

    def __init__(self, program: BlockProgram, estimator: Estimator | None = None) -> None:
        super().__init__()
        keep_freed_memory()
        self.program = program
        """What the block runs. With devices whose feedback differs it has weights for that (`Arrays.program`)."""
        self.arrays: Arrays | None = None
        """The devices that hold the weights; None for exact arithmetic. `set_arrays` changes them."""
        self.quiet = False
        """Whether reads are exact and converters are out, so that only the static errors of devices are left."""
        self.estimator: Estimator = estimator or EquilibriumPropagation()
        self.solver: Solver | None = None
        self.energy_function: Energy = DEFAULT_ENERGY
        """The energy that the block minimises. `set_energy` changes it."""
        self.gain = HeldGain(program, self.energy_function)
        """The settings of the amplifiers, their loop gain, and how it is held while the weights change."""
        self.aligned = False
        """Whether feedback weights, and the forward weights that they belong to, get the sum of both gradients."""
        self.enabled = True
        """If False, the block runs feedforward (γ = 0) like the source."""
        self.kept_gradients: Restoring | None = None
        """What a failed backward of the present forward restores; None unless equilibria are measured."""
        self.paces = Paces()
        """The number of sweeps of each phase, where a training step does not wait for its results."""
        self.last: Settled | None = None
        """How the last forward's free phase ended."""
        self._warned_of_held_winners = False
        self._chosen: tuple[tuple[BlockProgram, float | None, Solver | None, bool], Choice] | None = None
        self._coupled = program.coupled  # a copy of the flag, since torch.compile would guard on the whole program
        self._states: tuple[Tensor, ...] = ()
        self._preactivations: tuple[Tensor, ...] = ()
        self._activations: tuple[Activation, ...] = ()
        self._shapes: dict[int, torch.Size] = {}
        self._drawn: dict[int, Tensor | None] = {}
        self._settled_memory: frozenset[int] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which are outside of the context that turns feedback off (`feedforward_mode`)."""
        return {**self.__dict__, "enabled": True}

    @property
    def active_estimator(self) -> Estimator:
        """The estimator that was given. Where states are read inexactly, EP of the default β has a large nudge."""
        return for_reads(self.estimator) if self._reads_states else self.estimator

    @property
    def _reads_states(self) -> bool:
        """Whether states are read with noise or through converters."""
        return self.arrays is not None and not self.quiet and self.arrays.reads_states

    def analog(self, reads: Reads | None, sweeps: int) -> Analog | None:
        """How the states of a gradient are read, after a free phase of so many sweeps."""
        if not self._reads_states:
            return None
        assert self.arrays is not None
        errors = Reads({}, self.arrays.between if self.arrays.converts else None) if reads is None else reads
        return Analog(reads, errors, self.arrays.converters, sweeps)

    def set_arrays(self, arrays: Arrays | None) -> None:
        """Put the weights on devices, or back. The feedback must be measured and set afterwards.

        Raises:
            UnsupportedError: the energy does not admit feedback that differs from the forward weights.
        """
        before = self.program if self.arrays is None else self.arrays.source
        program = before if arrays is None else arrays.program
        if program is not self.program:
            if program.coupled:
                self.energy_function.check_program(program)
            self.program, self.gain = program, self.gain.moved(program)
        self.arrays = arrays

    def held(self, weights: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The weights that the block's program multiplies by, for these weights of the source."""
        return weights if self.arrays is None else self.arrays.held(weights)

    @property
    def name(self) -> str:
        """The block's name in the plan."""
        return self.program.name

    @property
    def feedback(self) -> float | str:
        """The feedback that is held: a number whose meaning depends on the energy (Hopfield: κ), or `"symmetric"`."""
        return self.gain.feedback

    @property
    def setting(self) -> Setting:
        """The energy and the settings of its amplifiers."""
        return self.gain.setting

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of the last measurement; None for a block without feedback."""
        return self.gain.certificate

    @property
    def scales(self) -> tuple[float, ...]:
        """c_l."""
        return self.gain.scales

    @property
    def loop_gain(self) -> float:
        """κ of the last measurement; 0 without feedback. `hybrid.blocks[i].loop_gain` is κ at the present weights."""
        return self.gain.loop_gain

    @property
    def states(self) -> tuple[Tensor, ...]:
        """States of the last forward, detached; empty before the first."""
        if not self._preactivations:
            return self._states
        return tuple(sigma.value(field) for sigma, field in zip(self._activations, self._preactivations, strict=True))

    @property
    def memory_of_outputs(self) -> frozenset[int]:
        """Addresses of the memory of the states that the last forward returned, which the block still needs."""
        return self._settled_memory if self._preactivations else _memory_of(self._states)

    def remember(self, phase: FreePhase) -> None:
        """Keep the pre-activations of this forward, from which `states` follow, or the measured states."""
        states, preactivations = phase.settled()
        self._settled_memory = _memory_of([states[index] for index in self.program.visible])
        if phase.literal:
            self._states, self._preactivations = tuple(state.detach() for state in states), ()
            return
        self._preactivations = tuple(field.detach() for field in preactivations)
        self._activations = tuple(activation.kept() for activation in phase.activations)
        self._shapes = dict(phase.frame.shapes)
        self._drawn = {} if self.program.symmetric else dict(phase.frame.drawn)

    def response(self, weights: Sequence[Tensor | None]) -> AdjointPhase | None:
        """The linear response at the computed states of the last forward, for these weights; None before the first."""
        if not self._preactivations:
            return None
        frame = Frame(self.program, (), weights, self._drawn, dict(self._shapes), frozen=True)
        slopes = [sigma.derivative(h) for sigma, h in zip(self._activations, self._preactivations, strict=True)]
        nothing: list[Tensor | None] = [None] * len(slopes)
        return AdjointPhase(frame, self.setting, self._preactivations, nothing, slopes, transposed=False)

    def set_energy(self, energy: Energy) -> None:
        """Choose the energy. The feedback must be measured and set afterwards.

        Raises:
            UnsupportedError: the block has feedback and holds a layer that the energy does not admit.
        """
        if self.program.coupled:
            energy.check_program(self.program)
        self.energy_function, self.gain = energy, HeldGain(self.program, energy)

    def _recall_shapes(self, frame: Frame) -> None:
        """Give a frame the shapes of the last forward, if its inputs have them too and nothing in it is drawn."""
        program = self.program
        if program.masks or program.selects or not self.energy_function.starts_loaded:
            return
        if self._preactivations and all(self._shapes.get(i) == value.shape for i, value in enumerate(frame.inputs)):
            frame.shapes.update(self._shapes)

    def _warm_start(self, frame: Frame) -> tuple[Tensor, ...] | None:
        """The last states for a warm start; None if they belong to inputs of other shapes."""
        if self.active_solver.start == "feedforward" or not self._preactivations:
            return None
        like = frame.inputs[0]
        known = all(self._shapes.get(index) == value.shape for index, value in enumerate(frame.inputs))
        same = self._preactivations[0].dtype == like.dtype and self._preactivations[0].device == like.device
        if not (known and same) or self.program.masks:
            return None
        frame.shapes.update(self._shapes)
        return self.states

    @property
    def chosen(self) -> Choice:
        """The solver of this block, and why it was chosen."""
        coherent = self.gain.setting.coherent
        found, known = (self.program, self.contraction, self.solver, coherent), self._chosen
        if known is None or any(a is not b for a, b in zip(found, known[0], strict=True)):
            self._chosen = known = found, choose(*found)
        return known[1]

    @property
    def active_solver(self) -> Solver:
        """The solver that was given, or the one chosen for this block."""
        return self.chosen.solver

    def solver_at(self, contraction: float | None) -> Solver:
        """The solver that was given, or the one for a block that contracts by this factor."""
        return choose(self.program, contraction, self.solver, self.gain.setting.coherent).solver

    def paces_on(self, device: torch.device) -> Paces | None:
        """Where a training step on this device keeps its numbers of sweeps; None: it waits for every result."""
        late = self.active_solver.late
        return self.paces if late or (late is None and device.type == "cuda") else None

    def projection(self, limit: float) -> dict[int, float]:
        """Weight index -> factor that caps the coupling for a loop gain of at most `limit`; empty if it is less.

        A block whose loop gain is set by its feedback is left as it is.

        Raises:
            InputError: an edge between two states holds no weight that could be scaled.
        """
        if self.certificate is None or not isinstance(self.feedback, str):
            return {}
        return self.energy_function.projection(self.program, self.certificate, limit)

    def set_feedback(self, feedback: float | str) -> bool:
        """Set the feedback from the last measurement. Returns False if a new measurement is needed."""
        return self.gain.set_feedback(feedback)

    def hint(self) -> str:
        """What to change if the block does not settle, as the end of a sentence."""
        return self.energy_function.remedy(self.feedback, self.loop_gain)

    @property
    def contraction(self) -> float | None:
        """Factor by which a Gauss–Seidel sweep contracts, about κ (Young 1954); None without a certificate.

        A mask that cuts conductances changes every load of a circuit, so that what was measured without masks says
        nothing.
        """
        if not self.energy_function.bounds_masks and self.program.drawing:
            return None
        return self.gain.contraction

    @property
    def may_be_light(self) -> bool:
        """Whether the solver leaves the precision of products open, and a certificate says what changes add."""
        solver = self.active_solver
        return self.contraction is not None and solver.precision == "auto" and solver.steady

    def free_rtol(self, dtype: torch.dtype, training: bool = False) -> float:
        """Relative error at which the free phase stops."""
        return self.active_solver.rtol or free_rtol(dtype, self.contraction is not None, training, self.program.smooth)

    def error_rtol(self, dtype: torch.dtype, training: bool = False) -> float:
        """Relative error at which nudged phases and adjoint systems stop."""
        coherent = self.gain.setting.coherent
        return self.active_solver.rtol or error_rtol(dtype, self.contraction is not None, training, coherent)

    def relax(self, frame: Frame) -> tuple[FreePhase, Settled]:
        """Settle the free phase of a frame.

        Raises:
            ConvergenceError: the block does not settle; names it, its loop gain, the residual and what to change.
            InputError: an input or a weight of the block is NaN.
        """
        if not self.program.coupled or not self.enabled:
            return FreePhase(frame, self.setting, source=True), Settled(0, 0.0, True, "")
        check_feedback(self.name, self.scales, frame.inputs[0].dtype)
        phase, settled = self._settled(frame)
        needed = None if settled.converged else self.gain.needed(frame.weights)
        if needed is not None:
            phase, settled = self._settled_anew(frame, needed)
        check, fields = check_currents if settled.converged else check_determined, phase.settled()[1]
        if len(settled.lost) == (phase.samples or 1):  # no states are left to judge by: as where all diodes conduct
            fields = tuple(torch.full_like(field, torch.finfo(field.dtype).eps) for field in fields)
        check(phase.frame, phase.setting, fields, self.loop_gain)
        settled = concluded(
            settled,
            phase,
            self.active_solver,
            self._rtol(phase),
            f"free phase of {self.name}",
            self.hint,
            check_operands=lambda: self._check_operands(phase.frame),
        )
        if phase.held and not self._warned_of_held_winners:
            self._warn_of_held_winners(phase.frame, phase.settled()[0])
        return phase, settled

    def _settled(self, frame: Frame) -> tuple[FreePhase, Settled]:
        solver, contraction = self.active_solver, self.contraction
        if frame.reads is not None:
            return self._read(frame)
        frame.coarse = solver.precision == "bfloat16" and contraction is not None
        self._recall_shapes(frame)
        phase = FreePhase(frame, self.setting, self._warm_start(frame))
        phase.shares = self.gain.error_shares
        rtol, rate = self._rtol(phase), contraction or 1.0
        if frame.light and not frame.training:  # the error has to be bounded, with that of roundings
            phase.full_sweeps, phase.rounding = full_sweeps((1 - rate) * rtol, rate), ROUNDING
        else:
            phase.full_sweeps = full_sweeps(rtol, expected_contraction(rate, self.gain.setting.typical))
        return phase, run(phase, solver, rtol, contraction)

    def _read(self, frame: Frame) -> tuple[FreePhase, Settled]:
        """Run the predicted sweeps of a free phase that is read with noise, or through converters.

        Without a certificate, it runs as many as settle in exact arithmetic. The first phase is run once before, for
        the ranges of the converters.
        """
        assert frame.reads is not None
        assert self.arrays is not None
        if isinstance(self.active_solver, Measured):
            raise UnsupportedError(
                f"{self.name}: a fabric measures its equilibria, and has noise and converters of its own. Use "
                "devices without read_noise and Hardware(row_sums='analog'), or call hybrid.set_solver(None)"
            )
        certificate, rtol = self.certificate, self.free_rtol(frame.inputs[0].dtype, frame.training)
        sweeps = None if certificate is None or self.contraction is None else certificate.sweeps(rtol)
        if sweeps is None:
            exact = Frame(self.program, frame.inputs, frame.weights, dict(frame.drawn))
            exact.training = frame.training
            sweeps = self._settled(exact)[1].sweeps
        if not frame.reads.seen:
            unseen = Frame(self.program, frame.inputs, frame.weights, dict(frame.drawn))
            unseen.reads = frame.reads
            with self.arrays.converters.observed():
                ReadPhase(unseen, self.setting).run(sweeps, self.active_solver)
        phase = ReadPhase(frame, self.setting)
        phase.run(sweeps, self.active_solver)
        return phase, Settled(sweeps, 0.0, True, "")

    def _settled_anew(self, frame: Frame, needed: Certificate) -> tuple[FreePhase, Settled]:
        """Settle once more with the γ that the present weights need, since their loop gain has changed.

        Training keeps that γ. Evaluation changes no setting, so that it uses that γ only here, and logs it.
        """
        for register in frame.drawn.keys() - self.program.masks:
            del frame.drawn[register]
        before, self.gain.certificate = self.gain.certificate, needed
        try:
            anew = Frame(self.program, frame.inputs, frame.weights, frame.drawn)
            anew.training, anew.autocast, anew.light = frame.training, frame.autocast, frame.light
            return self._settled(anew)
        finally:
            if not self.training:
                self.gain.certificate = before
                _log.warning(
                    "%s did not settle in evaluation: its weights have changed since its feedback was set. It was "
                    "settled once more with the feedback that they need now. Call hybrid.recertify() to keep that",
                    self.name,
                )

    def _rtol(self, phase: FreePhase) -> float:
        first = phase.values[0]
        dtype = phase.frame.inputs[0].dtype if first is None else first.dtype
        return self.free_rtol(torch.bfloat16 if phase.frame.autocast else dtype, phase.training)

    def _warn_of_held_winners(self, frame: Frame, states: Sequence[Tensor]) -> None:
        """Log once if the states are no equilibrium when the held winners of max pooling are chosen anew."""
        drawn = {register: value for register, value in frame.drawn.items() if register in self.program.masks}
        residual = self._residual(Frame(self.program, frame.inputs, frame.weights, drawn), states)
        if residual > 1e-4:
            self._warned_of_held_winners = True
            _log.warning(
                "%s settled with the winners of its max pooling held after %d sweeps (relative residual %.1e with "
                "winners chosen anew). So this is no exact equilibrium: two values of a window are almost equal, and "
                "the feedback of the larger one makes it the smaller. Leave 'max_pool' out of block_ops, or pool "
                "averages",
                self.name,
                HOLD,
                residual,
            )

    def _check_operands(self, frame: Frame) -> None:
        """Raise an error if the block diverged because its inputs or weights are not finite."""
        check_inputs(self.name, frame.inputs)
        check_weights(self.name, frame.weights)
        with torch.no_grad():
            unloaded = Frame(self.program, frame.inputs, frame.weights)
            states, diagonals = unloaded.feedforward(), self.energy_function.diagonals(unloaded, self.setting)
        check_range(self.name, states, diagonals, [layer.name for layer in self.program.layers])

    def settle(self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Equilibrium:
        """The equilibrium for given inputs and weights, without gradients."""
        with torch.no_grad():
            phase, settled = self.relax(Frame(self.program, inputs, weights))
        return Equilibrium(*phase.settled(), settled.sweeps, settled.residual, settled.converged, settled.unsettled)

    def residual(
        self,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        states: Sequence[Tensor],
    ) -> float:
        """max_l ‖σ_l(h_l(s)) − s_l‖/‖s_l‖: how far states are from satisfying the equilibrium equation.

        Raises:
            InputError: the number of states is wrong.
        """
        self._check_states(states)
        return self._residual(Frame(self.program, inputs, weights), states)

    def _residual(self, frame: Frame, states: Sequence[Tensor]) -> float:
        with torch.no_grad():
            phase = FreePhase(frame, self.setting, states)
            worst = 0.0
            for index, state in enumerate(states):
                size = float(torch.linalg.vector_norm(state))
                distance = float(torch.linalg.vector_norm(phase.update(index) - state))
                worst = max(worst, distance / size if size else distance)
        return worst

    def _check_states(self, states: Sequence[Tensor]) -> None:
        if len(states) != len(self.program.layers):
            raise InputError(
                f"{self.name} has {len(self.program.layers)} states, got {len(states)}: pass one per layer, as "
                "settle() returns them"
            )

    def energy(
        self,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        states: Sequence[Tensor],
        preactivations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """E(s; θ, x), summed over the batch. See `runtime.energies`."""
        self._check_states(states)
        frame = Frame(self.program, inputs, weights)
        return self.energy_function.value(frame, self.setting, states, preactivations)

    def forward(self, *operands: Tensor | None) -> tuple[Tensor, ...]:
        """Settle and return the outputs. The operands are the block's inputs, then its weights."""
        eager = self._coupled or self.arrays is not None  # what devices hold is kept by the host
        return self._run_eagerly(*operands) if eager else self._run(*operands)

    # The data decide how many sweeps of products and convolutions are needed. `torch.compile` would trace again for
    # every number of sweeps, and find little to fuse. It compiles everything else, also blocks without feedback.
    @torch.compiler.disable(reason="an energy block settles eagerly")  # type: ignore[untyped-decorator]
    def _run_eagerly(self, *operands: Tensor | None) -> tuple[Tensor, ...]:
        return self._run(*operands)

    def _run(self, *operands: Tensor | None) -> tuple[Tensor, ...]:
        program = self.program if self.enabled or self.arrays is None else self.arrays.source
        inputs = operands[: program.inputs]
        weights: Sequence[Tensor | None] = operands[program.inputs :]
        present = [value for value in inputs if value is not None]
        reads: Reads | None = None
        if self.arrays is not None and self.enabled:
            present, weights, reads = self._on_devices(present, weights)
        if len(present) != program.inputs or len(weights) != program.weights:
            raise FFEBMError(f"{self.name} takes {program.inputs} inputs and {program.weights} weights")
        program.check_weights(weights)
        kind = present[0].device.type
        if torch.is_autocast_enabled(kind):
            widest = torch.promote_types(
                torch.float32, next((w.dtype for w in weights if w is not None), torch.float32)
            )
            cast = [value.to(widest) if value.is_floating_point() else value for value in present]
            # As in the source, autocast leaves products in float64 as they are.
            rounded = torch.get_autocast_dtype(kind) == torch.bfloat16 and widest is not torch.float64
            scaled = torch.get_autocast_dtype(kind) == torch.float16
            with torch.autocast(kind, enabled=False):
                wide = [None if w is None else w.to(widest) for w in weights]
                return self._forward(cast, wide, rounded, scaled, reads)
        return self._forward(present, list(weights), False, False, reads)

    def _on_devices(
        self, inputs: list[Tensor], weights: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], Sequence[Tensor | None], Reads | None]:
        """Inputs after the DACs, weights as the devices hold them, and the noise of their reads."""
        assert self.arrays is not None
        if self.quiet:
            return inputs, self.arrays.held(weights), None
        held, reads = self.arrays.enter(weights)
        return [self.arrays.converters.enter(index, value) for index, value in enumerate(inputs)], held, reads

    def _leave(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs after the ADCs."""
        if self.arrays is None or not self.enabled or self.quiet:
            return outputs
        return tuple(self.arrays.converters.leave(index, value) for index, value in enumerate(outputs))

    def _forward(
        self, inputs: list[Tensor], weights: list[Tensor | None], autocast: bool, scaled: bool, reads: Reads | None
    ) -> tuple[Tensor, ...]:
        program = self.program if self.enabled or self.arrays is None else self.arrays.source
        settles = program.coupled and self.enabled
        reads = None if settles and reads is not None and not reads.inside else reads
        autocast = autocast and reads is None  # arrays are read in full precision, and with their noise
        frame = Frame(program, inputs, weights)
        frame.autocast, frame.reads = autocast, reads
        if not settles:
            # Without feedback the block computes the source's own layers, so that autograd is exact.
            phase, self.last = FreePhase(frame, self.setting, source=True), Settled(0, 0.0, True, "")
            states, _ = phase.settled()
            self._states, self._preactivations = tuple(state.detach() for state in states), ()
            return self._leave(frame.read({index: states[index] for index in program.visible}))
        visible = Settle.apply(self, frame.drawn, autocast, scaled, reads, *inputs, *weights)  # type: ignore[no-untyped-call]
        return self._leave(frame.read(dict(zip(program.visible, visible, strict=True))))


def _memory_of(tensors: Sequence[Tensor]) -> frozenset[int]:
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors if type(tensor) is Tensor)
