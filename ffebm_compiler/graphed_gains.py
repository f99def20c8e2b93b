"""`GraphedGains`: the loop gains of all blocks, measured by one CUDA graph and one transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ffebm_compiler.block_operands import direct_weights
from ffebm_compiler.cuda_capture import capturing
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.runtime.energies.followed_norm import Launched

__all__ = ["GraphedGains"]


class GraphedGains:
    """Measures and holds the loop gains of a hybrid on a CUDA device, as its training forwards do.

    A measurement is some thirty short kernels a block, and a few numbers that the host reads. Here the kernels of all
    blocks are replayed as one graph, and their numbers arrive in one transfer. Blocks whose weights are computed from
    parameters (a folded batch norm, a parametrisation) or whose energy measures otherwise are measured one by one.
    """

    def __init__(self, hybrid: HybridModel, stream: torch.cuda.Stream) -> None:
        self.hybrid = hybrid
        self._stream = stream
        self._direct = direct_weights(hybrid.lowered, hybrid.energy_blocks)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._launched: dict[str, Launched] = {}
        self._places: dict[str, tuple[int, ...]] = {}
        self._flat: Tensor | None = None

    def hold(self) -> None:
        """Measure blocks whose weights have changed, and set amplifiers that are too far off."""
        changed = self.hybrid.changed_gains()
        if not changed:
            return
        weights = self._weights_of(changed)
        together = self._graph is not None and self._again(weights)
        if together:
            assert self._graph is not None
            assert self._flat is not None
            self._graph.replay()
            values = self._flat.cpu().numpy()
        for name in changed:
            gain = self.hybrid.energy_blocks[name].gain
            launched = self._launched.get(name) if together else None
            if launched is None:
                gain.hold(weights[name])
                continue
            size = launched.size
            gain.hold(weights[name], (launched, values[:size]))
            values = values[size:]
        if not together:
            self._capture(weights)

    def _weights_of(self, names: Sequence[str]) -> dict[str, Sequence[Tensor | None]]:
        """The weights of blocks: parameters by their names, and what is computed from some by the graph."""
        tensors = {name: self._direct[name] for name in names if name in self._direct}
        found: dict[str, Sequence[Tensor | None]] = {
            name: [None if weight is None else self.hybrid._tensor(weight) for weight in weights]
            for name, weights in tensors.items()
        }
        others = self.hybrid.operands_of_each([name for name in names if name not in found])
        return {**found, **{name: weights for name, (_, weights) in others.items()}}

    def _again(self, weights: Mapping[str, Sequence[Tensor | None]]) -> bool:
        """Whether the graph is of these tensors. Copies the kept vectors to where it reads them."""
        if any(name not in weights or _places(weights[name]) != where for name, where in self._places.items()):
            return False
        blocks = self.hybrid.energy_blocks
        return all(blocks[name].gain.gauge.relaunch(launched) for name, launched in self._launched.items())

    def _capture(self, weights: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Capture the kernels of the blocks whose weights are parameters."""
        self._graph, self._launched, self._places, self._flat = None, {}, {}, None
        own = {tensor.data_ptr() for tensor in (*self.hybrid.parameters(), *self.hybrid.buffers())}
        plain = {n: w for n, w in weights.items() if all(t is None or t.data_ptr() in own for t in w)}
        blocks = self.hybrid.energy_blocks
        for name in list(plain):  # once without a graph, so that every kernel is loaded and every algorithm chosen
            blocks[name].gain.gauge.own()
            if blocks[name].gain.launch(plain[name]) is None:
                del plain[name]
        graph, rows = torch.cuda.CUDAGraph(), []
        with capturing(graph, self._stream):
            for name, tensors in plain.items():
                launched = blocks[name].gain.launch(tensors)
                if launched is not None:
                    self._launched[name] = launched
                    rows += [launched.inner_products] if launched.size else []
            if rows:
                self._flat = torch.cat(rows)
        if rows:
            self._graph = graph
            self._places = {name: _places(weights[name]) for name in self._launched}


def _places(weights: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Where the tensors are in memory."""
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in weights)
