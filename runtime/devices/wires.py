"""Wires of a tile: the weights that a crossbar has between its terminals where its lines have resistance.

A tile has N rows and M columns of devices g (relative to g_max). Row i is driven at its left end by V_i, column j is
sensed at its lower end at 0 V, and each segment of a line, from cell to cell and from the terminal to the first cell,
has the resistance r, as r g_max. The network is linear, so that the sensed currents are I = Vᵀ M with an effective
matrix M. It is reciprocal: driving the columns and sensing the rows at the same terminals gives Mᵀ, so that the
feedback stays tied.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exact_weights", "fast_weights"]


def exact_weights(g: Tensor, resistance: float) -> Tensor:
    """M by an exact solution of all node voltages, in float64.

    A column j with the row voltages u_j at its cells draws S_j u_j from the rows, S_j = G_j − G_j (K + G_j)⁻¹ G_j, with
    K the conductances of its wire. Seen from the left, the columns from j on are an admittance P_j between the rows,

        P_j = S_j + y − y (y + P_{j+1})⁻¹ y ,    y = 1/r,

    so that the columns are eliminated one by one, with two dense solutions of N unknowns each.

    Args:
        g: conductances, (..., N, M).
        resistance: r g_max, above 0.
    """
    wide = g.double()
    rows, cols = wide.shape[-2:]
    y = 1 / resistance
    eye = torch.eye(rows, dtype=wide.dtype, device=wide.device)
    beside = eye.new_ones(rows - 1)
    wire = y * (2 * eye - torch.diag(beside, 1) - torch.diag(beside, -1))
    wire[0, 0] -= y  # the upper end is open
    taken: list[Tensor] = []  # sensed current of each column for its row voltages
    drawn: list[Tensor] = []
    for col in range(cols):
        own = torch.diag_embed(wide[..., col])
        inside = torch.linalg.solve(wire + own, own)  # column voltages for the row voltages
        taken.append(y * inside[..., -1, :])
        drawn.append(own - own @ inside)
    passing: list[Tensor] = [eye] * cols  # row voltages at a column, for those at the column before it
    admittance = torch.zeros_like(drawn[0])
    for col in range(cols - 1, -1, -1):
        admittance = drawn[col] + admittance
        passing[col] = y * torch.linalg.inv(y * eye + admittance)
        admittance = y * eye - y * passing[col]
    result = torch.empty_like(wide)
    voltages = eye.expand(*wide.shape[:-2], rows, rows)  # for each driven row
    for col in range(cols):
        voltages = passing[col] @ voltages
        result[..., col] = (taken[col].unsqueeze(-2) @ voltages).squeeze(-2)
    return result.to(g.dtype)


def fast_weights(g: Tensor, resistance: float) -> Tensor:
    """M to first order in the coupling of lines: g ∘ u ∘ v.

    u is the voltage along a driven row if all columns were at 0 V, and v the same along a column driven at its sensing
    end. Each is the exact solution of a ladder. `docs/analog.md` has the error against `exact_weights`.

    Args:
        g: conductances, (..., N, M).
        resistance: r g_max, at least 0.
    """
    along = _ladder(g, resistance)
    up = _ladder(g.flip(-2).transpose(-1, -2), resistance).transpose(-1, -2).flip(-2)
    return g * along * up


def _ladder(g: Tensor, resistance: float) -> Tensor:
    """Voltages along each row, driven with 1 at its left end, with a conductance to 0 V at every cell."""
    count = g.shape[-1]
    shares: list[Tensor] = [g] * count
    load = torch.zeros_like(g[..., 0])
    for index in range(count - 1, -1, -1):
        load = load + g[..., index]
        shares[index] = 1 / (1 + resistance * load)
        load = load * shares[index]
    return torch.stack(shares, -1).cumprod(-1)
