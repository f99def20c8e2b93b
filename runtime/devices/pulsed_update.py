"""`PulsedUpdate` and `TikiTaka`: an optimizer's step as the pulses that devices can take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.devices.devices import Devices, devices_of
from ffebm_compiler.runtime.devices.laws import checked_number
from ffebm_compiler.runtime.devices.pulses import PulsedWeights, PulseResponse

__all__ = ["PulsedUpdate", "TikiTaka"]


class PulsedUpdate(Optimizer):
    """Any torch optimizer, with steps that devices make by pulses.

    The optimizer computes the step δ that it wants. Each weight then gets ⌊δ/Δ + u⌋ pulses, u ~ U(0, 1), and answers
    them by its device's law (`PulseResponse`): in steps, asymmetrically, with soft bounds and noise. Momentum and
    second moments stay digital and exact. Random numbers are torch's own.

    Schedulers, `zero_grad` and gradient scalers see an ordinary optimizer. Its `state_dict` has the wrapped one's state
    and the devices' bounds.

    Args:
        optimizer: the optimizer to wrap. It must not be stepped itself any more.
        devices: a preset's name or `Devices` with `update`, a `PulseResponse`.
        parameters: the parameters on devices. None takes all of the optimizer's with two dimensions or more; biases and
            norms are digital. Those of a plan's blocks alone are
            `[hybrid.get_parameter(n) for n, place in hybrid.plan.weights.items() if place.block]`.

    Raises:
        InputError: the devices have no law for pulses, a parameter is not the optimizer's, or there are none.
    """

    def __init__(
        self, optimizer: Optimizer, devices: str | Devices, parameters: Iterable[Tensor] | None = None
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise InputError(
                f"optimizer is a {type(optimizer).__name__}; expected one of torch's, such as torch.optim.SGD"
            )
        chosen = devices_of(devices)
        response = None if chosen is None else chosen.update
        if chosen is None or not isinstance(response, PulseResponse):
            raise InputError(
                f"devices are {devices if chosen is None else chosen.name!r}, which do not say how a pulse changes "
                "them (`update`): give 'reram' or ffebm.Devices(update=ffebm.PulseResponse(...)), or use the "
                "optimizer itself, whose steps are exact"
            )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self.state = optimizer.state
        self.response, self.seed = response, chosen.seed
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        wanted = [p for p in own if p.dim() > 1] if parameters is None else list(parameters)
        known = {id(parameter) for parameter in own}
        if not wanted or any(id(parameter) not in known for parameter in wanted):
            why = "`parameters` holds a tensor that the optimizer does not step"
            if not wanted:
                why = "`parameters` is empty"
            if parameters is None:
                why = "the optimizer has no parameter of two dimensions or more"
            raise InputError(f"{why}: pass those of its parameters that are on devices")
        self.pulsed = wanted
        self.weights = [PulsedWeights(response, p, self.seed, index) for index, p in enumerate(wanted)]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as pulses. Returns the closure's loss."""
        before = [parameter.detach().clone() for parameter in self.pulsed]
        result = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        with torch.no_grad():
            for index, (parameter, old) in enumerate(zip(self.pulsed, before, strict=True)):
                parameter.copy_(self._moved(index, old, parameter.detach() - old))
        return result

    def _moved(self, index: int, old: Tensor, change: Tensor) -> Tensor:
        """The weights of a parameter after pulses for a change."""
        weights = self.weights[index]
        return weights.pulsed(old, weights.pulses_for(change))

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and the bounds of the devices."""
        return {"optimizer": self.optimizer.state_dict(), "bounds": [each.mean_bound for each in self.weights]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            InputError: it is that of another optimizer.
        """
        bounds = state_dict.get("bounds")
        if bounds is None or len(bounds) != len(self.pulsed):
            raise InputError(
                f"the state of a pulsed update for {len(self.pulsed)} parameters is expected, and this one has "
                f"{'none' if bounds is None else len(bounds)}: load what its own state_dict() returned"
            )
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self.weights = [
            PulsedWeights(self.response, p, self.seed, index, bound)
            for index, (p, bound) in enumerate(zip(self.pulsed, bounds, strict=True))
        ]


class TikiTaka(PulsedUpdate):
    """Tiki-Taka: steps go to a second array around its symmetry point, from which the weights are updated slowly.

    An asymmetric device that gets up and down pulses in equal numbers moves to its symmetry point, and not to the
    minimum of the loss. So the optimizer's steps δ go by pulses to an auxiliary array A of devices of the same law,
    read relative to its symmetry points A₀, to which noise pulls it. Every `every` steps one row of it (in turn) is
    added to a digital buffer H, and what H has gathered goes to the weights W in whole pulses:

        A ← A + pulses(δ),    H_i ← H_i + rate (A_i − A₀_i),
        n = trunc(H_i/Δ),     W_i ← W_i + n pulses,    H_i ← H_i − n Δ .

    The arguments are those of `PulsedUpdate`, and:

    Args:
        every: steps between two transfers.
        rate: factor on A − A₀ at a transfer.

    Raises:
        InputError: as `PulsedUpdate`, or `every` or `rate` is out of range.

    Sources: Gokmen & Haensch 2020 (Frontiers in Neuroscience 14, 103); with the digital buffer, Gokmen 2021 (Frontiers
    in Artificial Intelligence 4, 699148).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        devices: str | Devices,
        parameters: Iterable[Tensor] | None = None,
        *,
        every: int = 1,
        rate: float = 0.1,
    ) -> None:
        super().__init__(optimizer, devices, parameters)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every is {every!r}; expected a number of steps of at least 1")
        self.every, self.rate = every, checked_number("rate", rate, above=True)
        self.fast = [
            PulsedWeights(self.response, p, self.seed, len(self.pulsed) + index, weights.mean_bound)
            for index, (p, weights) in enumerate(zip(self.pulsed, self.weights, strict=True))
        ]
        self.auxiliary = [each.symmetry_points.clone() for each in self.fast]
        self.buffers = [torch.zeros_like(p) for p in self.pulsed]
        self.steps = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step to the auxiliary arrays, and a transfer if it is time for one."""
        self.steps += 1
        return super().step(closure)

    def _moved(self, index: int, old: Tensor, change: Tensor) -> Tensor:
        fast, weights, buffer = self.fast[index], self.weights[index], self.buffers[index]
        auxiliary = self.auxiliary[index] = fast.pulsed(self.auxiliary[index], fast.pulses_for(change))
        if self.steps % self.every:
            return old
        row = self.steps // self.every % len(old)
        buffer[row] += self.rate * (auxiliary[row] - fast.symmetry_points[row])
        pulses = torch.zeros_like(old)
        pulses[row] = torch.trunc(buffer[row] / weights.step)
        buffer[row] -= pulses[row] * weights.step
        return weights.pulsed(old, pulses)

    def state_dict(self) -> dict[str, Any]:
        """The state of `PulsedUpdate`, the auxiliary arrays and the buffers."""
        return {**super().state_dict(), "steps": self.steps, "auxiliary": self.auxiliary, "buffers": self.buffers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            InputError: it is that of another optimizer.
        """
        super().load_state_dict(state_dict)
        if "auxiliary" not in state_dict:
            raise InputError(
                "the state of a TikiTaka is expected, and this is that of a PulsedUpdate: load it into a PulsedUpdate"
            )
        self.fast = [
            PulsedWeights(self.response, p, self.seed, len(self.pulsed) + index, weights.mean_bound)
            for index, (p, weights) in enumerate(zip(self.pulsed, self.weights, strict=True))
        ]
        self.steps = int(state_dict["steps"])
        self.auxiliary = [value.to(p) for value, p in zip(state_dict["auxiliary"], self.pulsed, strict=True)]
        self.buffers = [value.to(p) for value, p in zip(state_dict["buffers"], self.pulsed, strict=True)]
