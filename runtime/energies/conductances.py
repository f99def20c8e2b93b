"""The conductances, pads and gains of a resistive block, read off its program: a `Circuit`."""

from __future__ import annotations

import torch
from torch import Tensor

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.energies.circuit import Circuit, Coupling, Stage
from ffebm_compiler.runtime.energies.loads import magnitudes_of
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["circuit_of"]


def circuit_of(frame: Frame, setting: Setting) -> Circuit:
    """The circuit of an evaluated block, for its first sample (for all of them where samples are not independent).

    Raises:
        UnsupportedError: the gain of an amplifier is below a row sum, or 0.
    """
    program = frame.program
    if program.resizable:
        frame = frame.narrowed(torch.zeros(1, dtype=torch.long, device="cpu"))
    magnitudes = magnitudes_of(frame)
    still = Frame(program, [torch.zeros_like(x) for x in frame.inputs], frame.weights, frame.drawn, frozen=True)
    rest = [frame.inputs[0].new_zeros(frame.shapes[layer.drive]) for layer in program.layers]
    layer_of = {layer.state: index for index, layer in enumerate(program.layers)}
    stages = []
    for index, layer in enumerate(program.layers):
        gain = setting.amplifiers[index] if setting.amplifiers else 1.0
        signed, sizes = _rows(frame, index), _rows(magnitudes, index)
        couplings = []
        for register, size in sizes.items():
            source = layer_of.get(register, -1 - register)
            reflection = gain * setting.scales[index] / setting.scales[source] if source >= 0 else 0.0
            value = signed.get(register, torch.zeros_like(size))
            couplings.append(Coupling(source, (size + value) / 2, (size - value) / 2, reflection))
        rows = torch.stack([size.sum(1) for size in sizes.values()]).sum(0)
        pads = gain - rows if setting.amplifiers else torch.zeros_like(rows)
        if not gain > 0 or float(pads.min()) < -1e-5 * gain:
            raise UnsupportedError(
                f"{program.name}: the amplifier of layer {layer.name!r} has a gain of {gain:.4g}, and the "
                f"conductances of one of its units sum to {float(rows.max()):.4g}. A resistor to ground makes up the "
                "difference, and would be negative. Call hybrid.recertify() if the weights have changed since the "
                "gains were measured. A layer whose weights are all 0 has no circuit"
            )
        bias = still.drive(index, rest).flatten()
        shape = frame.shapes[layer.drive]
        stages.append(
            Stage(layer.name, frame.activations[index], shape, gain, bias, tuple(couplings), pads.clamp_min(0))
        )
    return Circuit(tuple(value.flatten() for value in frame.inputs), tuple(stages))


def _rows(frame: Frame, index: int) -> dict[int, Tensor]:
    """Register of each state or input that a drive reads -> its matrix (units of the layer, units of the source)."""
    shape = frame.shapes[frame.program.layers[index].drive]
    like = next(weight for weight in frame.weights if weight is not None)
    eye = torch.eye(shape.numel(), dtype=like.dtype, device=like.device)
    if frame.program.resizable:
        found = [frame.repeated(len(eye)).pullback(index, eye.reshape(len(eye), *shape[1:]), states=True, inputs=True)]
    else:
        found = [frame.pullback(index, row.reshape(shape), states=True, inputs=True) for row in eye]
    registers = found[0]
    return {r: torch.cat([part[r].reshape(len(eye) // len(found), -1) for part in found]) for r in registers}
