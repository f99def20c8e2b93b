"""What a fabric is asked for: a block, what drives it, and the states that it settles to.

A *fabric* is whatever finds the equilibria of a block outside of this program: a chip on a bench, a circuit simulator,
a server. It is any object with two methods,

    program(block, weights)              set the conductances of a block (`FabricBlock`) for these weights
    settle(inputs, nudge) -> states      the equilibria for a batch of inputs, one tensor a layer

and, for contrastive and coupled learning, a third, `hold(inputs, held) -> states`. All tensors are in float64 on the
CPU, batch first. `docs/hardware-in-the-loop.md` writes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ffebm_compiler.errors import FabricError, UnsupportedError
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.energies.circuit import Circuit
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["FabricBlock", "Question", "checked_states", "outside"]


@dataclass(frozen=True)
class FabricBlock:
    """A block as a fabric sees it: what it is made of, and what its amplifiers are set to."""

    name: str
    """Its name in the plan."""
    layers: tuple[str, ...]
    """The module path of each layer, in the order of the states."""
    shapes: tuple[torch.Size, ...]
    """The shape of each state, for one sample."""
    input_shapes: tuple[torch.Size, ...]
    """The shape of each input, for one sample."""
    program: BlockProgram
    """Its drives as data."""
    setting: Setting
    """Its energy, the scales c_l and the gains of its amplifiers."""
    _frame: Frame = field(repr=False, compare=False)

    @cached_property
    def circuit(self) -> Circuit:
        """The conductances, pads, gains and diodes of a resistive block, dense and in float64, its states flat.

        The inputs in it are those of a first sample.

        Raises:
            UnsupportedError: its energy is that of no circuit.
        """
        with torch.no_grad():
            self._frame.feedforward()
            return self.setting.energy.circuit(self._frame, self.setting)


@dataclass(frozen=True)
class Question:
    """One equilibrium of a block for a batch, which a fabric is asked for."""

    frame: Frame
    """The block with its inputs and weights."""
    setting: Setting
    nudge: tuple[Tensor | None, ...] | None = None
    """What is added to the field of each layer, −(β/c_l) δ_l; None in the free phase."""
    held: tuple[Tensor | None, ...] | None = None
    """The states that are held, None for a free one; None if all are free."""

    def check_masks(self) -> None:
        """Refuse random masks.

        Raises:
            UnsupportedError: the block has drawn some, which make another circuit for every sample.
        """
        program = self.frame.program
        if self.frame.masked:
            raise UnsupportedError(
                f"{program.name} draws random masks (dropout inside the block), so that every sample would be another "
                "circuit, and a fabric holds one. Keep the dropout digital (force_digital), or call eval()"
            )

    def block(self, weights: Sequence[Tensor | None]) -> FabricBlock:
        """The block for a fabric."""
        frame, program = self.frame, self.frame.program
        one = frame.narrowed(torch.zeros(1, dtype=torch.long, device="cpu")) if program.resizable else frame
        return FabricBlock(
            name=program.name,
            layers=tuple(layer.name for layer in program.layers),
            shapes=self._sizes([frame.shapes[layer.drive] for layer in program.layers]),
            input_shapes=self._sizes([value.shape for value in frame.inputs]),
            program=program,
            setting=self.setting,
            _frame=Frame(program, [outside(value) for value in one.inputs], weights, dict(one.drawn)),
        )

    def _sizes(self, shapes: Sequence[torch.Size]) -> tuple[torch.Size, ...]:
        """The shapes for one sample; the whole shapes where samples are not independent."""
        return tuple(shape[1:] if self.frame.program.resizable else shape for shape in shapes)


def outside(value: Tensor) -> Tensor:
    """A copy of a value for a fabric: on the CPU, in float64 where it is no integer."""
    value = value.detach()
    return value.to("cpu", torch.float64 if value.is_floating_point() else value.dtype, copy=True)


def checked_states(found: object, question: Question, maker: str) -> list[Tensor]:
    """The states that a fabric answered, copied and checked.

    Args:
        found: what `settle` returned.
        question: what was asked.
        maker: begins the message of an error: the block, the fabric and its method.

    Raises:
        FabricError: the number of states, a shape or a dtype is wrong, or a state is not finite.
    """
    frame, program = question.frame, question.frame.program
    if isinstance(found, Tensor | str | bytes) or not isinstance(found, Sequence):
        raise FabricError(
            f"{maker} returned a {type(found).__name__}; expected a list of {len(program.layers)} tensors, the state "
            "of each layer"
        )
    if len(found) != len(program.layers):
        raise FabricError(
            f"{maker} returned {len(found)} states; expected {len(program.layers)}, one for each of the layers "
            f"{', '.join(layer.name for layer in program.layers)}"
        )
    states = []
    for layer, value in zip(program.layers, found, strict=True):
        shape = frame.shapes[layer.drive]
        try:
            state = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise FabricError(
                f"{maker} returned a {type(value).__name__} as the state of {layer.name}; expected a tensor or an "
                f"array of shape {tuple(shape)}"
            ) from error
        if state.dtype not in (torch.float32, torch.float64):
            raise FabricError(
                f"{maker} returned a state of {layer.name} in {state.dtype}; expected torch.float64, or torch.float32 "
                "where the fabric resolves no more"
            )
        if state.shape != shape:
            raise FabricError(
                f"{maker} returned a state of {layer.name} of shape {tuple(state.shape)}; expected {tuple(shape)}, "
                "batch first"
            )
        finite = torch.isfinite(state)
        if not bool(finite.all()):
            rows = (~finite.flatten(1).all(1)).nonzero().flatten().tolist() if state.dim() else [0]
            raise FabricError(
                f"{maker} returned NaN or infinite values in the state of {layer.name}, for "
                f"{len(rows)} of {len(state) if state.dim() else 1} samples (the first is {rows[0]}): check the range "
                "of its voltages, and that it settles"
            )
        states.append(state.detach().to(torch.float64, copy=True))
    return states
