"""`HybridParts`: the parts of a hybrid, namely its source's parameters and buffers, its plan, its blocks and its graph.

The source's tensors are registered on it under the source's names, exactly as on the source. `HybridCore` runs,
trains and stores them, and `HybridModel` adds the other methods that people call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from ffebm_compiler.block_operands import (
    Operands,
    calls_of,
    constants,
    direct_weights,
    fetched,
    names_behind,
    operands_of_each,
    shared_constants,
)
from ffebm_compiler.conversion import Conversion
from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.feedback_weights import FeedbackWeights, register_feedback_weights
from ffebm_compiler.later_hooks import LaterHooks
from ffebm_compiler.later_modules import LaterModules, rebound_operations
from ffebm_compiler.module_paths import module_at, state_of_module
from ffebm_compiler.plan_data import PlanData
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.devices.devices import Devices
from ffebm_compiler.runtime.energies.base import Energy
from ffebm_compiler.runtime.energies.choice import DEFAULT_ENERGY
from ffebm_compiler.runtime.feedforward.fetch import Fetch
from ffebm_compiler.runtime.held_gain import recertify_each
from ffebm_compiler.sharded import gathered
from ffebm_compiler.signature import CallForm
from ffebm_compiler.source_view import attribute_of_source, free_name, signature_of, warn_of_captured
from ffebm_compiler.static_values import static_value
from ffebm_compiler.written_state import names_of_written_state

if TYPE_CHECKING:
    from ffebm_compiler.ir import Program
    from ffebm_compiler.passes.lower import FeedbackPlace, Lowered

__all__ = ["HybridParts"]

_RUN = "_ffebm"
"""Name of the submodule that is the lowered graph. It gets more underscores if the source has a module of that name."""


_OWN = frozenset(
    (
        "_asks",
        "_call_form",
        "_captured",
        "_casts",
        "_differs_in_training",
        "_direct",
        "_draws_in_order",
        "_energy",
        "_feedforward",
        "_folded",
        "_later_hooks",
        "_later_modules",
        "_plan",
        "_run",
        "_shared",
        "_shared_by",
        "_sources",
        "_source",
        "_written",
        "conversion",
        "devices",
        "energy_function",
        "feedback_names",
        "feedback_weights",
        "project_to",
        "recertify_every",
        "training",
    )
)
"""Attributes of the hybrid itself. A source may have modules, parameters and buffers with the same names."""


class HybridParts(nn.Module):
    """The tensors, the plan, the blocks and the lowered graph of a hybrid, and the measurements of its blocks."""

    def __init__(
        self, program: Program, plan: PlanData, lowered: Lowered, feedback_weights: FeedbackWeights | None = None
    ) -> None:
        super().__init__()
        source = program.source
        # These dictionaries are shared, so that a change by `.to()` or an optimizer also changes the private copy.
        self.__dict__["_parameters"] = source._parameters
        self.__dict__["_buffers"] = source._buffers
        self.__dict__["_non_persistent_buffers_set"] = source._non_persistent_buffers_set
        self._modules.update(source._modules)
        self._run = free_name(_RUN, source)
        self._modules[self._run] = lowered.graph_module
        self._written = tuple(sorted(names_of_written_state(lowered.graph_module)))
        """Names of the parameters, buffers and constants that a forward writes."""
        self._source = source
        self._plan = plan
        self._energy = dict(lowered.energy)
        self._feedforward = dict(lowered.feedforward)
        self._call_form = CallForm.of(program)
        self._differs_in_training = bool(program.asks) and not program.refused_in_training
        self._asks = tuple(sorted(program.asks or ()))
        self._draws_in_order = lowered.draws_in_order
        self._folded = frozenset(program.folded)
        self.energy_function: Energy = DEFAULT_ENERGY
        """The energy that `convert` was asked for, which the blocks minimise."""
        self.devices: Devices | None = None
        """The devices that hold the blocks' weights; None for exact arithmetic. `set_devices` changes them."""
        self.conversion: Conversion | None = None
        """The arguments of `convert`, which `save` stores."""
        self.recertify_every: int | None = 100
        """After at most so many changes of the weights, loop gains are measured to convergence.

        Every change of the weights is followed by an estimate. If it jumps, the measurement converges at once. With
        None it converges only then.
        """
        self.project_to: float | None = None
        """Limit of the loop gain to which symmetric blocks are projected after each change (see `project`), or None."""
        self.feedback_weights = feedback_weights
        """How feedback weights of their own are trained; None if the feedback is tied."""
        self.feedback_names: Mapping[str, FeedbackPlace] = {place.name: place for place in lowered.feedback}
        """Names of the parameters that are feedback weights; empty if the feedback is tied."""
        self._sources = self._sources_of_blocks(fetched(self.lowered))
        """Block with feedback -> names of the parameters and buffers that its weights are computed from."""
        self._direct = {k: v for k, v in direct_weights(self.lowered, self._energy).items() if k in self._sources}
        """Those of them whose weights are parameters and buffers themselves -> the names of these."""
        self.training = source.training
        self._later_modules = LaterModules(source, self._modules, rebound_operations(lowered), self._folded)
        self._later_modules.follow(source, self)
        for module in lowered.graph_module.modules():
            if isinstance(module, Fetch):
                module.follow(self)
        if feedback_weights is not None:
            weights = {name: self.weight_at(place) for name, place in self.feedback_names.items()}
            register_feedback_weights(self, weights, feedback_weights)
        self._captured = {name: (tuple(t.shape), t.dtype) for name, t in state_of_module(self, self._run)}
        """Name of each parameter and persistent buffer at conversion -> its shape and dtype then."""
        for energy_block in lowered.energy.values():
            energy_block.training = self.training
            energy_block.aligned = feedback_weights is not None and feedback_weights.update == "aligned"
        self._state_dict_hooks.update(source._state_dict_hooks)
        self._state_dict_pre_hooks.update(source._state_dict_pre_hooks)
        self._load_state_dict_post_hooks.update(source._load_state_dict_post_hooks)
        self._later_hooks = LaterHooks(source)
        self._shared = shared_constants(source, self.lowered)
        """Constants of the graph that share their memory with tensors in attributes of the source."""
        shared = {node: name for node, name in constants(self.lowered).items() if name in self._shared}
        self._shared_by = self._sources_of_blocks(shared)
        """Block with feedback -> names of those of them that its weights are computed from."""
        self.__signature__ = signature_of(source)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. The hybrid's own never replace the source's modules and parameters of the same name."""
        if name in _OWN:
            self.__dict__[name] = value
            return
        warn_of_captured(self.__dict__.get("_source"), name, value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """A submodule, parameter or buffer, else the source's attribute of this name (`config`, `device`, `dtype`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            source = self.__dict__.get("_source")
            if source is None:
                raise
            return attribute_of_source(self, source, name)

    @property
    def lowered(self) -> fx.GraphModule:
        """The graph of energy blocks and digital parts. It holds no tensor of the state."""
        run = self._modules[self.__dict__["_run"]]
        assert isinstance(run, fx.GraphModule)
        return run

    @property
    def plan(self) -> PlanData:
        """The partition that this model runs."""
        return self._plan

    @property
    def energy_blocks(self) -> Mapping[str, EnergyBlock]:
        """The energy blocks by name, in the plan's order. The hybrid's `blocks` fills in the present weights."""
        return {block.name: self._energy[block.name] for block in self._plan.blocks}

    @property
    def feedforward_blocks(self) -> Mapping[str, nn.Module]:
        """The digital parts by name."""
        return self._feedforward

    def get_submodule(self, target: str) -> nn.Module:
        """A submodule by the source's path, even if the path starts with `blocks` or `plan`."""
        return module_at(self, target)

    def _sources_of_blocks(self, names: Mapping[fx.Node, str]) -> dict[str, tuple[str, ...]]:
        """Block with feedback -> those of the names that its weights are computed from."""
        found = {}
        for name, call in calls_of(self.lowered).items():
            block = self._energy.get(name)
            if block is not None and block.program.coupled:
                weights = [node for node in call.args[block.program.inputs :] if isinstance(node, fx.Node)]
                found[name] = names_behind(weights, names)
        return found

    def _call_of(self, name: str) -> Any:
        """The node of the lowered graph that calls a block."""
        return calls_of(self.lowered)[name]

    def _tensor(self, name: str) -> Tensor:
        """The parameter or buffer of this name."""
        path, _, leaf = name.rpartition(".")
        module = self.get_submodule(path)
        parameter = module._parameters.get(leaf)
        found: Tensor | None = parameter if parameter is not None else module._buffers.get(leaf)
        if found is None:
            raise UnsupportedError(
                f"the hybrid has no {name!r} any more (module {path!r} is a {type(module).__name__}), and it takes "
                "new tensors of the same names and shapes only: change the source and convert it again"
            )
        return found

    def _made_of(self, name: str) -> list[Tensor]:
        """The tensors of the source that the weights of a block with feedback are computed from."""
        plain = [self._shared[constant] for constant in self._shared_by.get(name, ())]
        return [*(self._tensor(source) for source in self._sources.get(name, ())), *plain]

    def operands_of(self, name: str) -> Operands:
        """(inputs, weights as devices hold them) of a block. An input that depends on the network's inputs is None."""
        return self.operands_of_each([name])[name]

    def operands_of_each(self, names: Sequence[str]) -> dict[str, Operands]:
        """`operands_of` each block, by its name, in one pass over the graph."""
        return dict(self._operands_of(names))

    def _operands_of(self, names: Sequence[str]) -> Iterator[tuple[str, Operands]]:
        if not names:
            return iter(())
        return operands_of_each(self.lowered, self._energy, names, self.written_state(), self._gathering())

    def _gathering(self) -> Callable[[Sequence[str]], AbstractContextManager[None]] | None:
        """What holds whole tensors of some names while it is open; None if no tensor is sharded."""
        self._later_hooks.look()
        units = self._later_hooks.units
        return partial(gathered, self, units) if units or hasattr(self, "unshard") else None

    def _whole(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Hold the whole tensors of these names, where they are sharded, while the context is open."""
        gathering = self._gathering()
        return nullcontext() if gathering is None else gathering(names)

    def weight_at(self, place: FeedbackPlace) -> Tensor:
        """The forward weight that feedback weights belong to, computed from the present parameters."""
        node = self._call_of(place.block).args[self._energy[place.block].program.inputs + place.weight]
        value = static_value(self.lowered, node, {})
        assert value is not None
        return value

    def written_state(self) -> list[Tensor]:
        """The parameters and buffers that a forward writes, without statistics that follow a module's flag."""
        constants = dict(self.lowered.named_buffers()) if self._written else {}
        return [constants[name] if name in constants else self._tensor(name) for name in self._written]

    def certificate_of(self, name: str) -> Certificate | None:
        """The certificate of a block at its present weights and feedback, measured now if the weights have changed."""
        gain, sources = self._energy[name].gain, self._made_of(name)
        if gain.certificate is None or gain.fits(sources):
            return gain.certificate
        return gain.at(self.operands_of(name)[1], sources)

    def recertify(self) -> None:
        """Measure the loop gains of the present weights to convergence and set the feedback for them.

        Training forwards hold the loop gain by themselves, and loading a source's weights with `load_state_dict` calls
        this. Eval mode leaves the feedback as it is. So call it if you have changed weights and go on in eval mode.
        """
        self._recertify(*self._sources)

    def _recertify(self, *names: str, together: bool = True) -> None:
        """Measured together, blocks that are alike save time; apart, none depends on which others there are."""
        gains = {name: self._energy[name].gain for name in names}
        found = ((gains[name], weights) for name, (_, weights) in self._operands_of(names))
        for some in [found] if together else ([each] for each in found):
            recertify_each(some)
        for name, gain in gains.items():
            gain.fitted(self._made_of(name))
