"""`PulsedUpdate` and `TikiTaka`: an optimizer's step as the pulses that devices can take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ffebm_compiler.errors import InputError
from ffebm_compiler.plain_numbers import plain
from ffebm_compiler.runtime.devices.devices import Devices, devices_of
from ffebm_compiler.runtime.devices.laws import checked_number
from ffebm_compiler.runtime.devices.pulses import PulsedWeights, PulseResponse

__all__ = ["PulsedUpdate", "TikiTaka"]


class PulsedUpdate(Optimizer):
    """Any torch optimizer, with steps that devices make by pulses.

    The optimizer computes the step δ that it wants. Each weight then gets ⌊δ/Δ + u⌋ pulses, u ~ U(0, 1), and answers
    them by its device's law (`PulseResponse`): in steps, asymmetrically, with soft bounds and noise. Momentum and
    second moments stay digital and exact. Random numbers are torch's own.

    Schedulers, `zero_grad`, `add_param_group`, gradient scalers and copies see an ordinary optimizer. Its `state_dict`
    has the wrapped one's state and the devices' bounds.

    Args:
        optimizer: the optimizer to wrap. It must not be stepped itself any more.
        devices: a preset's name or `Devices` with `update`, a `PulseResponse`.
        parameters: the parameters on devices. None takes all of the optimizer's with two dimensions or more; biases and
            norms are digital. Those of a plan's blocks alone are
            `[hybrid.get_parameter(n) for n, place in hybrid.plan.weights.items() if place.block]`.

    Raises:
        InputError: the devices have no law for pulses, a parameter is not the optimizer's, or there are none.
    """

    _ARRAYS: ClassVar[int] = 1
    """Arrays of devices for each parameter."""

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
        self._share()
        self.response, self.seed = response, chosen.seed
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.takes_matrices = parameters is None
        wanted = [p for p in own if p.dim() > 1] if parameters is None else list(parameters)
        known = {id(parameter) for parameter in own}
        if not wanted or any(id(parameter) not in known for parameter in wanted):
            why = "`parameters` holds a tensor that the optimizer does not step"
            if not wanted:
                why = "`parameters` is empty"
            if parameters is None:
                why = "the optimizer has no parameter of two dimensions or more"
            raise InputError(f"{why}: pass those of its parameters that are on devices")
        self.pulsed: list[Tensor] = []
        self.weights: list[PulsedWeights] = []
        self.steps = 0
        self._put_on_devices(wanted)

    def _share(self) -> None:
        """Have the wrapped optimizer's groups and state, so that what is changed in one is changed in both."""
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def _put_on_devices(self, parameters: list[Tensor]) -> None:
        """Draw devices for parameters beside those that are on devices already."""
        first = self._ARRAYS * len(self.pulsed)
        self.pulsed += parameters
        self.weights += [PulsedWeights(self.response, p, self.seed, first + i) for i, p in enumerate(parameters)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Step the parameters of another group too.

        If `parameters` was None at construction, those with two dimensions or more get devices, whose bounds follow
        from their present values. Otherwise the new ones are digital.
        """
        if "optimizer" not in self.__dict__:  # torch's constructor adds the groups that the wrapped optimizer has
            super().add_param_group(param_group)
            return
        self.optimizer.add_param_group(param_group)
        if self.takes_matrices:
            self._put_on_devices([p for p in self.optimizer.param_groups[-1]["params"] if p.dim() > 1])

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks and what a scheduler put around `step`, as torch's optimizers are copied and pickled."""
        own = {name: value for name, value in self.__dict__.items() if name != "step" and not name.startswith("_")}
        return {**super().__getstate__(), **own}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as pulses. Returns the closure's loss."""
        return self._stepped(closure)

    def _stepped(self, closure: Callable[[], Any] | None) -> Any:
        """`step` without hooks, which torch puts around the `step` of every class."""
        self.steps += 1
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
        """The wrapped optimizer's state, and the bounds of the devices and the numbers that they were drawn by."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "bounds": [each.mean_bound for each in self.weights],
            "draws": [each.index for each in self.weights],
        }

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
        self._share()
        self.weights = self._drawn_again(state_dict.get("draws", range(len(self.pulsed))), bounds)

    def _drawn_again(self, draws: Iterable[int], bounds: Iterable[float]) -> list[PulsedWeights]:
        """The devices of all parameters, by the numbers that they were drawn by."""
        return [
            PulsedWeights(self.response, p, self.seed, number, bound)
            for p, number, bound in zip(self.pulsed, draws, bounds, strict=True)
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

    _ARRAYS = 2

    def __init__(
        self,
        optimizer: Optimizer,
        devices: str | Devices,
        parameters: Iterable[Tensor] | None = None,
        *,
        every: int = 1,
        rate: float = 0.1,
    ) -> None:
        self.fast: list[PulsedWeights] = []
        self.auxiliary: list[Tensor] = []
        self.buffers: list[Tensor] = []
        super().__init__(optimizer, devices, parameters)
        every = plain(every)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every is {every!r}; expected a number of steps of at least 1")
        self.every, self.rate = every, checked_number("rate", rate, above=True)

    def _put_on_devices(self, parameters: list[Tensor]) -> None:
        super()._put_on_devices(parameters)
        new = list(zip(parameters, self.weights[len(self.fast) :], strict=True))
        fast = [PulsedWeights(self.response, p, self.seed, w.index + len(new), w.mean_bound) for p, w in new]
        self.fast += fast
        self.auxiliary += [each.symmetry_points.clone() for each in fast]
        self.buffers += [torch.zeros_like(p) for p in parameters]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step to the auxiliary arrays, and a transfer if it is time for one."""
        return self._stepped(closure)

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
        return {
            **super().state_dict(),
            "steps": self.steps,
            "auxiliary": list(self.auxiliary),
            "auxiliary_draws": [each.index for each in self.fast],
            "buffers": list(self.buffers),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            InputError: it is that of another optimizer.
        """
        if "bounds" in state_dict and "auxiliary" not in state_dict:
            raise InputError(
                "the state of a TikiTaka is expected, and this is that of a PulsedUpdate: load it into a PulsedUpdate"
            )
        super().load_state_dict(state_dict)
        count = len(self.pulsed)
        draws = state_dict.get("auxiliary_draws", range(count, 2 * count))
        self.fast = self._drawn_again(draws, [each.mean_bound for each in self.weights])
        self.steps = int(state_dict["steps"])
        self.auxiliary = [value.to(p, copy=True) for value, p in zip(state_dict["auxiliary"], self.pulsed, strict=True)]
        self.buffers = [value.to(p, copy=True) for value, p in zip(state_dict["buffers"], self.pulsed, strict=True)]
