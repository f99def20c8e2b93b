"""`GraphedStep`: forward, loss and backward of a training step as one CUDA graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ffebm_compiler.cuda_capture import capturing
from ffebm_compiler.errors import ConvergenceWarning, FFEBMError, InputError, UnsupportedError
from ffebm_compiler.gradient_choice import digital_gradient
from ffebm_compiler.graphed_gains import GraphedGains
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.plain_numbers import plain
from ffebm_compiler.runtime.solvers.relaxation import LOST, may_be_late

__all__ = ["GraphedStep"]

_log = logging.getLogger(__name__)

_EAGER = 2
"""Number of steps with the same shapes before a graph is captured. They find the numbers of sweeps."""


class GraphedStep:
    """Forward, loss and backward of a hybrid's training step, captured as a CUDA graph and replayed.

        step = ffebm.GraphedStep(hybrid, torch.nn.functional.cross_entropy)
        for images, labels in batches:
            loss = step(images, labels)      # the gradients are in p.grad, as after loss.backward()
            optimizer.step()

    A settling block launches many short kernels, and on a fast GPU the host cannot launch them as quickly as they run.
    A captured graph launches them all at once. What a graph cannot hold stays outside and is done in every call: the
    loop gain is measured at the present weights. If a block's amplifiers must be set again, or if a phase needs another
    number of sweeps, the step is captured again. So results are those of a step without a graph, but for `slack`.

    The gradients of a call replace those of the call before, and are not added to them. A batch of another shape than
    the last two runs without a graph.

    Args:
        hybrid: in train mode, on a CUDA device, with feedback given as a number.
        loss: `loss(output, *targets)`, a scalar tensor. It must not make the host wait for the device.
        slack: relative distance from κ up to which the feedback is left as it is. A smaller one captures more often.
            (Without a graph it is 1 %.)

    Raises:
        InputError: the hybrid is in evaluation mode or not on a CUDA device, `slack` is not between 0 and 1, or the
            loss is no scalar.
        UnsupportedError: a block waits for its residual in every step, as it must without a certificate; or digital
            gradients are estimated by perturbation; or the weights are on devices.
    """

    def __init__(self, hybrid: HybridModel, loss: Callable[..., Tensor], *, slack: float = 0.1) -> None:
        if not isinstance(hybrid, HybridModel):
            raise InputError(f"GraphedStep takes a hybrid, got a {type(hybrid).__name__}: pass what `convert` returned")
        slack = plain(slack)
        if isinstance(slack, bool) or not isinstance(slack, int | float) or not 0 < slack < 1:
            raise InputError(f"slack is {slack!r}; expected a relative distance between 0 and 1")
        self.hybrid = hybrid
        self.loss = loss
        self.slack = float(slack)
        self.captures = 0
        """How often a graph was captured."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._key: Any = None
        self._seen = 0
        self._sweeps: list[int | None] = []
        self._captured: Any = None
        self._tensors: list[Tensor] = []
        self._result: Tensor | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        self._ran: torch.cuda.Event | None = None
        self._check()
        self._check_blocks()
        self._stream = torch.cuda.Stream()
        self._gains = GraphedGains(hybrid, self._stream)

    def __call__(self, inputs: Any, *targets: Tensor) -> Tensor:
        """The loss of a batch, detached. `inputs` is the hybrid's input, or a tuple of its inputs."""
        self._check()
        given = (*inputs, *targets) if isinstance(inputs, tuple) else (inputs, *targets)
        count = len(given) - len(targets)
        self._see(given)
        self._read_paces()
        self._hold()
        self._check_blocks()
        sweeps = [pace.sweeps for pace in self._paces()]
        known = sweeps == self._sweeps and None not in sweeps
        self._sweeps = sweeps
        if self._seen <= _EAGER or not known:  # kernels of another sweep are loaded before they are captured
            return self._eager(given, count)
        state = self._state(), sweeps
        if self._graph is None or self._captured != state:
            self._capture(given, count, state)
        return self._replay(given)

    def _check(self) -> None:
        hybrid = self.hybrid
        if not hybrid.training:
            raise InputError("GraphedStep is a training step, and the hybrid is in evaluation mode: call train() on it")
        if hybrid.devices is not None:
            raise UnsupportedError(
                "what devices hold is computed by the host when weights or age have changed, which a graph would not "
                "notice: call hybrid.set_devices(None), or train without GraphedStep"
            )
        if digital_gradient(hybrid) is not None:
            raise UnsupportedError(
                "the gradients of the digital parts are estimated by perturbation, which a CUDA graph cannot "
                "capture: call hybrid.set_gradient(..., feedforward='backprop') with the gradient of the blocks, "
                "such as 'ep'"
            )
        device = next((p.device for p in hybrid.parameters()), torch.device("cpu"))
        if device.type != "cuda":
            raise InputError(f"a CUDA graph needs a CUDA device, and the hybrid is on {device}: call .cuda() on it")

    def _check_blocks(self) -> None:
        for block in self.hybrid.energy_blocks.values():
            if block.program.coupled and block.contraction is None and block.gain.contraction is not None:
                raise UnsupportedError(
                    f"{block.name} waits for its residual in every step, because dropout cuts conductances of its "
                    "circuit, which then contracts by another factor each time, and a graph cannot wait: set the "
                    "dropout's p to 0, or train without GraphedStep"
                )
            if block.program.coupled and (block.contraction is None or not may_be_late(block.active_solver)):
                why = "nothing certifies that it settles" if block.contraction is None else "of its solver's settings"
                raise UnsupportedError(
                    f"{block.name} waits for its residual in every step, because {why}, and a graph cannot wait: give "
                    "`feedback` as a number such as 0.1, and leave `solver` at its default"
                )

    def _see(self, given: tuple[Any, ...]) -> None:
        """Count the calls with the same shapes, modes and precision. Another one drops the graph."""
        tensors = [value for value in given if isinstance(value, Tensor)]
        if len(tensors) != len(given):
            kinds = ", ".join(type(value).__name__ for value in given)
            raise InputError(f"a graphed step takes tensors, got ({kinds}): pass other arguments in the loss function")
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        modes = tuple(module.training for module in self.hybrid.modules())
        key = [(tuple(t.shape), t.dtype, t.device, t.requires_grad) for t in tensors], autocast, modes
        if key == self._key:
            self._seen += 1
            return
        self._key, self._seen, self._graph = key, 1, None

    def _paces(self) -> list[Any]:
        return [pace for block in self.hybrid.energy_blocks.values() for pace in block.paces.all()]

    def _read_paces(self) -> None:
        if self._ran is None:
            return
        self._ran.synchronize()
        self._ran = None
        finite = [pace.read() for pace in self._paces()]  # each is read
        if not all(finite):
            warnings.warn(LOST, ConvergenceWarning, stacklevel=3)

    def _hold(self) -> None:
        """Measure the loop gains of changed weights, and set amplifiers that are too far off."""
        blocks = self.hybrid.energy_blocks
        for block in blocks.values():
            block.gain.slack = self.slack
        try:
            self._gains.hold()
        finally:
            for block in blocks.values():
                block.gain.slack = None

    def _state(self) -> Any:
        """What a graph has built in beside the numbers of sweeps: the settings of the amplifiers, and the methods."""
        blocks = self.hybrid.energy_blocks.values()
        return [(block.setting, block.estimator, block.active_solver, block.aligned) for block in blocks]

    def _forward_and_backward(self, given: tuple[Any, ...], count: int) -> Tensor:
        for parameter in self.hybrid.parameters():
            parameter.grad = None
        with self.hybrid.held_feedback():
            loss = self.loss(self.hybrid(*given[:count]), *given[count:])
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise InputError(f"the loss is no scalar tensor (got {shape}): reduce it by mean() or sum()")
            loss.backward()
        return loss.detach()

    def _eager(self, given: tuple[Any, ...], count: int) -> Tensor:
        """A step without a graph, on the stream that captures, as torch asks for."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            loss = self._forward_and_backward(given, count)
        here.wait_stream(self._stream)
        return loss

    def _capture(self, given: tuple[Any, ...], count: int, state: Any) -> None:
        self._graph, self._result, self._gradients = None, None, []  # the memory of the old graph is free again
        self._tensors = [value.detach().clone().requires_grad_(value.requires_grad) for value in given]
        paces, graph = self._paces(), torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()
        for pace in paces:
            pace.capturing = True
        try:
            with capturing(graph, self._stream):
                self._result = self._forward_and_backward(tuple(self._tensors), count)
        except FFEBMError:
            raise
        except RuntimeError as error:
            raise UnsupportedError(
                f"the step could not be captured as a CUDA graph ({str(error).splitlines()[0]}): something in it waits "
                "for the device, such as `.item()` in a digital part, in a hook or in the loss. Train without "
                "GraphedStep, or take that out"
            ) from error
        finally:
            for pace in paces:
                pace.capturing = False
            torch.clear_autocast_cache()
        self._gradients = [(p, p.grad) for p in self.hybrid.parameters()]
        self._graph, self._captured = graph, state
        self.captures += 1
        _log.debug("captured a training step (number %d)", self.captures)

    def _replay(self, given: tuple[Any, ...]) -> Tensor:
        assert self._graph is not None
        assert self._result is not None
        with torch.no_grad():
            for mine, value in zip(self._tensors, given, strict=True):
                mine.copy_(value, non_blocking=True)
        self._graph.replay()
        self._ran = torch.cuda.Event()
        self._ran.record()
        for pace in self._paces():
            pace.replayed()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._result.clone()
