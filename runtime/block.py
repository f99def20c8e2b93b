"""Energy blocks as modules: settle forward, and one `torch.autograd.Function` for the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ffebm_compiler.errors import ConvergenceError, FFEBMError, InputError
from ffebm_compiler.runtime.energy import hopfield_energy
from ffebm_compiler.runtime.gradients import EquilibriumPropagation, Estimator
from ffebm_compiler.runtime.loop_gain import Certificate, certify, edge_norms
from ffebm_compiler.runtime.phases import FreePhase
from ffebm_compiler.runtime.program import BlockProgram, Frame
from ffebm_compiler.runtime.situation import Situation
from ffebm_compiler.runtime.solvers import GaussSeidel, Settled, Solver, relax

__all__ = ["EnergyBlock", "Equilibrium", "default_rtol"]


def default_rtol(dtype: torch.dtype, certified: bool) -> float:
    """Relative error of a layer at which a phase stops.

    With a certificate the error that is left is bounded by the last change; without one there is
    only the change to look at, and the iteration goes on to what the dtype resolves.
    """
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.float32:
        return 1e-4 if certified else 1e-6
    return 1e-2


@dataclass(frozen=True)
class Equilibrium:
    """The free phase of a block, settled."""

    states: tuple[Tensor, ...]
    """s_l, batch first, in the order of the block's layers."""
    preactivations: tuple[Tensor, ...]
    """h_l with s_l = σ_l(h_l)."""
    sweeps: int
    residual: float
    converged: bool


class EnergyBlock(nn.Module):
    """A cluster of weight-stationary layers that settles to an equilibrium.

    It owns no tensors: inputs and weights are operands of its `forward`, so that tied weights
    stay tied and the hybrid keeps the source's names. `hybrid.blocks[i]` is the same block with
    its present weights filled in.
    """

    def __init__(self, program: BlockProgram, estimator: Estimator | None = None) -> None:
        super().__init__()
        self.program = program
        self.estimator: Estimator = estimator or EquilibriumPropagation()
        self.solver: Solver | None = None
        self.feedback: float | str = 0.1
        self.certificate: Certificate | None = None
        self.enabled = True
        """False runs the block feedforward (γ = 0), as the source does."""
        self.states: tuple[Tensor, ...] = ()
        """States of the last forward, detached."""
        self.last: Settled | None = None
        """How the last forward's free phase ended."""
        self._like: list[Tensor] = []

    @property
    def name(self) -> str:
        """The block's name in the plan."""
        return self.program.name

    @property
    def scales(self) -> tuple[float, ...]:
        """c_l."""
        if self.certificate is None:
            return (1.0,) * len(self.program.layers)
        return self.certificate.scales

    @property
    def loop_gain(self) -> float:
        """κ: 0 for a block without feedback."""
        return self.certificate.loop_gain if self.certificate is not None else 0.0

    @property
    def active_solver(self) -> Solver:
        """The solver given, or the default."""
        return self.solver or GaussSeidel()

    def calibrate(self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]) -> None:
        """Remember these inputs' shapes, measure the operator norms and set the feedback."""
        self._like = [value[:1] if self.program.batched and value.dim() else value for value in inputs]
        generator = torch.Generator().manual_seed(0)
        for index, value in enumerate(self._like):
            drawn = torch.rand(value.shape, generator=generator).to(value.device, value.dtype)
            self._like[index] = drawn if value.is_floating_point() else torch.zeros_like(value)
        self.recertify(weights)

    def recertify(self, weights: Sequence[Tensor | None]) -> None:
        """Measure the operator norms of the present weights and set the feedback again.

        The drives are affine, so that the norms depend on the inputs' shapes only.

        Raises:
            InputError: for a weight with NaN or infinite values.
        """
        if not self.program.coupled or not self._like:
            return
        self._check_weights(weights)
        with torch.no_grad(), torch.autocast(self._like[0].device.type, enabled=False):
            first = next((weight for weight in weights if weight is not None), None)
            like = [
                value.to(first) if first is not None and value.is_floating_point() else value for value in self._like
            ]
            operands = self.laid_out([*like, *weights])
            inputs = [value for value in operands[: len(like)] if value is not None]
            frame = Frame(self.program, inputs, operands[len(like) :])
            states = _complete(FreePhase(frame, (1.0,) * len(self.program.layers)).values)
            # Random masks are left out of the measured norm; `edge_norms` adds their gain as a bound.
            masks = {i.output for layer in self.program.layers for i in layer.instructions if i.operator.draws}
            frame.drawn.update(dict.fromkeys(masks))
            self.certificate = certify(self.program, edge_norms(frame, states), self.feedback)

    def set_feedback(self, feedback: float | str) -> None:
        """Set the loop gain κ (or `"symmetric"`), from the norms measured last."""
        self.feedback = feedback
        if self.certificate is not None:
            self.certificate = certify(self.program, self.certificate.norms, feedback)

    def _hint(self) -> str:
        gain = self.loop_gain
        if isinstance(self.feedback, str):
            return (
                f"its loop gain at symmetric feedback is {gain:.3g} (below 1 is certain to settle): use "
                "feedback=0.1, smaller weights or fewer layers per block"
            )
        return (
            f"its loop gain was set to {self.feedback:.3g} and certified as {gain:.3g}: lower `feedback`, call "
            "recertify() if the weights have changed since, or allow more sweeps: solver=GaussSeidel(max_sweeps=...)"
        )

    def _contraction(self) -> float | None:
        """κ where the block is certified: a Gauss–Seidel sweep contracts by about ρ² (Young 1954)."""
        if isinstance(self.feedback, str) or self.certificate is None or not self.certificate.certified:
            return None
        return self.certificate.loop_gain

    def _rtol(self, dtype: torch.dtype) -> float:
        if self.active_solver.rtol is not None:
            return self.active_solver.rtol
        return default_rtol(dtype, self._contraction() is not None)

    def relax(self, frame: Frame) -> tuple[FreePhase, Settled]:
        """Settle the free phase of a frame.

        Raises:
            ConvergenceError: naming the block, its loop gain, the residual and what to change.
            InputError: where an input or a weight of the block is NaN.
        """
        phase = FreePhase(frame, self.scales)
        if not self.program.coupled or not self.enabled:
            return phase, Settled(0, 0.0, True, "")
        rtol = self._rtol(phase.values[0].dtype if phase.values[0] is not None else torch.float32)
        try:
            settled = relax(
                phase, self.active_solver, rtol, f"free phase of {self.name}", self._hint(), self._contraction()
            )
        except ConvergenceError:
            self._blame(frame)
            raise
        return phase, settled

    def _blame(self, frame: Frame) -> None:
        """Say so where the block diverged because it was fed NaN."""
        for index, value in enumerate(frame.inputs):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise InputError(
                    f"input {index} of {self.name}, of shape {tuple(value.shape)}, holds NaN or infinite values: "
                    "check the data and the digital part before it"
                )
        self._check_weights(frame.weights)

    def _check_weights(self, weights: Sequence[Tensor | None]) -> None:
        for index, weight in enumerate(weights):
            if weight is not None and not bool(torch.isfinite(weight).all()):
                raise InputError(
                    f"weight {index} of {self.name}, of shape {tuple(weight.shape)}, holds NaN or infinite values: "
                    "training may have diverged; lower the learning rate or reload a checkpoint"
                )

    def laid_out(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The tensors in the memory layout in which this block's sweeps are fastest.

        Convolutions on a CPU are up to twice as fast on channels-last tensors, and a settling
        block runs each of its own many times.
        """
        if not self.program.convolutional or any(t is not None and t.device.type != "cpu" for t in tensors):
            return tuple(tensors)
        return tuple(
            t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t for t in tensors
        )

    def settle(self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Equilibrium:
        """The equilibrium for given inputs and weights, without gradients."""
        with torch.no_grad():
            phase, settled = self.relax(Frame(self.program, inputs, weights))
        return Equilibrium(
            _complete(phase.values),
            _complete(phase.preactivations),
            settled.sweeps,
            settled.residual,
            settled.converged,
        )

    def energy(
        self,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        states: Sequence[Tensor],
        preactivations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """E(s; θ, x), summed over the batch; see `runtime.energy`."""
        if len(states) != len(self.program.layers):
            raise InputError(
                f"{self.name} has {len(self.program.layers)} states, got {len(states)}: pass one per layer, as "
                "settle() returns them"
            )
        return hopfield_energy(Frame(self.program, inputs, weights), self.scales, states, preactivations)

    def forward(self, *operands: Tensor | None) -> tuple[Tensor, ...]:
        """Settle and read out: operands are the block's inputs, then its weights."""
        program = self.program
        inputs, weights = operands[: program.inputs], operands[program.inputs :]
        present = [value for value in inputs if value is not None]
        if len(present) != program.inputs or len(weights) != program.weights:
            raise FFEBMError(f"{self.name} takes {program.inputs} inputs and {program.weights} weights")
        kind = present[0].device.type
        if torch.is_autocast_enabled(kind):
            widest = torch.promote_types(
                torch.float32, next((w.dtype for w in weights if w is not None), torch.float32)
            )
            cast = [value.to(widest) if value.is_floating_point() else value for value in present]
            with torch.autocast(kind, enabled=False):
                return self._forward(cast, [None if w is None else w.to(widest) for w in weights])
        return self._forward(present, list(weights))

    def _forward(self, inputs: list[Tensor], weights: list[Tensor | None]) -> tuple[Tensor, ...]:
        program = self.program
        frame = Frame(program, inputs, weights)
        if not program.coupled or not self.enabled:
            # Without feedback the equilibrium is the source's own layers: autograd is exact.
            phase, self.last = FreePhase(frame, self.scales), Settled(0, 0.0, True, "")
            states = _complete(phase.values)
        else:
            states = tuple(_Settle.apply(self, frame.drawn, *inputs, *weights))  # type: ignore[no-untyped-call]
        self.states = tuple(state.detach() for state in states)
        return frame.read({index: states[index] for index in program.visible})


def _complete(values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    assert all(value is not None for value in values)
    return tuple(value for value in values if value is not None)


class _Settle(torch.autograd.Function):
    """(inputs, weights) -> settled states; backward asks the block's estimator."""

    @staticmethod
    def forward(ctx: Any, block: EnergyBlock, drawn: dict[int, Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        tensors = block.laid_out(tensors)
        inputs = [value for value in tensors[: block.program.inputs] if value is not None]
        frame = Frame(block.program, inputs, tensors[block.program.inputs :], drawn)
        phase, block.last = block.relax(frame)
        states, preactivations = _complete(phase.values), _complete(phase.preactivations)
        ctx.block, ctx.sweeps = block, block.last.sweeps
        ctx.drawn, ctx.shapes = frame.drawn, frame.shapes
        ctx.scales, ctx.estimator = block.scales, block.estimator
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *states, *preactivations)
        hidden = [state for index, state in enumerate(states) if index not in block.program.visible]
        ctx.mark_non_differentiable(*hidden)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *errors: Tensor | None) -> tuple[Tensor | None, ...]:
        block: EnergyBlock = ctx.block
        program = block.program
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
        count = program.inputs + program.weights
        layers = len(program.layers)
        inputs = [value for value in saved[: program.inputs] if value is not None]
        frame = Frame(program, inputs, saved[program.inputs : count], ctx.drawn, ctx.shapes, frozen=True)
        states = _complete(saved[count : count + layers])
        needed = ctx.needs_input_grad[2:]
        situation = Situation(
            frame=frame,
            scales=ctx.scales,
            states=states,
            preactivations=_complete(saved[count + layers :]),
            solver=block.active_solver,
            rtol=block._rtol(states[0].dtype),
            contraction=block._contraction(),
            hint=block._hint(),
            free_sweeps=ctx.sweeps,
            inputs_needed=tuple(needed[: program.inputs]),
            weights_needed=tuple(needed[program.inputs :]),
        )
        if all(error is None for error in errors):
            return (None,) * (count + 2)
        gradients = ctx.estimator.gradients(situation, errors)
        return (None, None, *gradients.inputs, *gradients.weights)
