"""`HybridModel`: what `convert` returns.

It owns the source's parameters and buffers under the source's names (they are registered on it
exactly as on the source) and runs the lowered graph of energy and feedforward blocks on them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ffebm_compiler.bound_block import BoundBlock
from ffebm_compiler.conversion import Conversion
from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.hybrid_state import METADATA, Arrival, settle_arrival, state_of
from ffebm_compiler.later_hooks import LaterHooks
from ffebm_compiler.module_paths import module_at
from ffebm_compiler.passes.exported_program import place_of
from ffebm_compiler.passes.held import plain_tensors
from ffebm_compiler.passes.unchanged import generators_unchanged, tensors_unchanged
from ffebm_compiler.plan import Plan
from ffebm_compiler.recast import Casts, dtype_of, keep_wide, move
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.energies.base import Energy
from ffebm_compiler.runtime.energies.choice import DEFAULT_ENERGY
from ffebm_compiler.runtime.feedforward import FeedforwardBlock, ReboundOperation
from ffebm_compiler.runtime.gradients import Estimator, estimator_of
from ffebm_compiler.runtime.solvers import Solver
from ffebm_compiler.signature import CallForm
from ffebm_compiler.source_view import (
    attribute_of_source,
    bind_forward,
    free_name,
    separate_tied,
    signature_of,
    without_bound_forward,
)
from ffebm_compiler.written_state import names_of_written_state

if TYPE_CHECKING:
    from ffebm_compiler.checks import Comparison, GradientReport
    from ffebm_compiler.costs_report import CostReport
    from ffebm_compiler.diagnosis import Diagnosis
    from ffebm_compiler.ir import Program
    from ffebm_compiler.passes.lower import Lowered

__all__ = ["HybridModel"]

_RUN = "_ffebm"
"""Name under which the lowered graph is registered, with more underscores where the source has one of that name."""


_OWN = frozenset(
    (
        "_asks",
        "_call_form",
        "_casts",
        "_differs_in_training",
        "_draws_in_order",
        "_energy",
        "_feedforward",
        "_folded",
        "_later_hooks",
        "_lifted",
        "_plan",
        "_run",
        "_shared",
        "_sources",
        "_source",
        "conversion",
        "energy_function",
        "project_to",
        "recertify_every",
        "training",
    )
)
"""Attributes of the hybrid itself. A source may have modules, parameters and buffers of these names."""


class HybridModel(nn.Module):
    """A feedforward-tied energy-based model: the source's forward signature and `state_dict`.

    `forward` settles each energy block and runs each feedforward block; `backward` of a loss
    chains the blocks' gradient estimators with autograd (BP-EP chaining, Nest & Ernoult 2024,
    arXiv 2409.03306). Any optimizer, AMP and DistributedDataParallel work on it as on the source.
    """

    def __init__(self, program: Program, plan: Plan, lowered: Lowered, casts: Casts) -> None:
        super().__init__()
        source = program.source
        # The same dictionaries: what `.to()` or an optimizer changes here, changes in the source copy.
        self.__dict__["_parameters"] = source._parameters
        self.__dict__["_buffers"] = source._buffers
        self.__dict__["_non_persistent_buffers_set"] = source._non_persistent_buffers_set
        self._modules.update(source._modules)
        self._run = free_name(_RUN, source)
        self._modules[self._run] = lowered.graph_module
        self._source = source
        self._plan = plan
        self._energy = dict(lowered.energy)
        self._feedforward = dict(lowered.feedforward)
        self._call_form = CallForm.of(program)
        self._lifted = tuple(program.lifted.values())
        self._casts = casts
        self._differs_in_training = bool(program.asks) and not program.refused_in_training
        self._asks = tuple(sorted(program.asks or ()))
        self._draws_in_order = lowered.draws_in_order
        self._folded = frozenset(program.folded)
        self.energy_function: Energy = DEFAULT_ENERGY
        """What the blocks minimise, as `convert` was asked for it."""
        self.conversion: Conversion | None = None
        """What `convert` was called with; `save` stores it."""
        self.recertify_every: int | None = 100
        """Loop gains are measured after every change of the weights, and to convergence at least every so many; None:
        to convergence only where the estimate jumps."""
        self.project_to: float | None = None
        """Loop gain to which symmetric blocks are then projected, see `project`; None: not by itself."""
        self._sources = self._sources_of_blocks()
        """Names of the parameters and buffers that the weights of each block with feedback are made of."""
        self.training = source.training
        for module in lowered.graph_module.modules():
            if isinstance(module, ReboundOperation):
                module.follow(source, self)
        for energy_block in lowered.energy.values():
            block_program = energy_block.program
            drives = [instruction for layer in block_program.layers for instruction in layer.instructions]
            for instruction in (*drives, *block_program.readout):
                rebound = getattr(instruction.operator, "source", None)
                if isinstance(rebound, ReboundOperation):
                    rebound.follow(source, self)
        self._state_dict_hooks.update(source._state_dict_hooks)
        self._state_dict_pre_hooks.update(source._state_dict_pre_hooks)
        self._load_state_dict_post_hooks.update(source._load_state_dict_post_hooks)
        self.register_load_state_dict_post_hook(settle_arrival)  # type: ignore[no-untyped-call]
        self._later_hooks = LaterHooks(source)
        self._shared = _shared(source, lowered.graph_module)
        """Constants of the graph that are tensors in attributes of the source, which may change there."""
        self.__signature__ = signature_of(source)
        bind_forward(self, self.__signature__)

    # -- attributes --------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        """The hybrid's own attributes never go where the source's modules and parameters of the same name are."""
        if name in _OWN:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """A submodule, parameter or buffer; then what the source has under this name (`config`, `device`, `dtype`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            source = self.__dict__.get("_source")
            if source is None:
                raise
            return attribute_of_source(self, source, name)

    @property
    def lowered(self) -> fx.GraphModule:
        """The graph of energy blocks and digital parts; it holds no tensor of the state."""
        run = self._modules[self.__dict__["_run"]]
        assert isinstance(run, fx.GraphModule)
        return run

    # -- state -------------------------------------------------------------------------------

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **others: Any) -> Any:
        """Tensors under the source's keys; see `separate_tied` for those of transformers."""
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **others)
        if not keep_vars:
            separate_tied(self._source, state, prefix)
        return state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Tensors under the source's keys, and beside them (in the dictionary's metadata) the state of the blocks."""
        self._source._save_to_state_dict(destination, prefix, keep_vars)  # with its extra state
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})[METADATA] = state_of(self)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any) -> None:
        self.__dict__["_arriving"] = Arrival.of(self, state_dict, prefix, local_metadata)
        self._source._load_from_state_dict(state_dict, prefix, local_metadata, *others)  # with its hooks

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: with the blocks whose loop gain is that of the present weights."""
        return {**without_bound_forward(self.__dict__), "_current": self._measured()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The inverse of `__getstate__`."""
        current = state.pop("_current")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, tensor in self._shared.items():  # a copy of a parameter has memory of its own
            constant = self.lowered._buffers[name]
            if constant is not None and constant.dtype is tensor.dtype and constant.device == tensor.device:
                self.lowered._buffers[name] = tensor.detach()
        if "forward" not in self.__dict__:
            bind_forward(self, self.__signature__)
        self._fit(current)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Another device or dtype is no change of the weights: the feedback stays."""
        current, before = self._measured(), dtype_of(self)
        constants = dict(self.lowered._buffers)
        there = next((parameter.device for parameter in self.parameters()), None)
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = dtype_of(self)
        if before is not None and after is not None and before is not after:
            keep_wide(self.lowered, constants)
            self._casts.follow(self, before, after)
        here = next((parameter.device for parameter in self.parameters()), None)
        if here is not None and there is not None and here != there:
            move(self, there, here)
        self._fit(current)
        return result

    def _measured(self) -> tuple[str, ...]:
        """The blocks with feedback whose loop gain is that of the present weights."""
        return tuple(name for name in self._sources if self._energy[name].gain.fits(self._made_of(name)))

    def _fit(self, names: Iterable[str]) -> None:
        """Note that the loop gain of these blocks is that of the present weights."""
        for name in names:
            self._energy[name].gain.fitted(self._made_of(name))

    # -- structure ---------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The partition that this model runs."""
        return self._plan

    @property
    def blocks(self) -> tuple[BoundBlock, ...]:
        """The energy blocks, in the plan's order."""
        return tuple(BoundBlock(self, self._energy[block.name], block) for block in self._plan.blocks)

    @property
    def feedforward_blocks(self) -> Mapping[str, nn.Module]:
        """The digital parts by name."""
        return self._feedforward

    def get_submodule(self, target: str) -> nn.Module:
        """A submodule by the source's path, also where the path starts with `blocks` or `plan`."""
        return module_at(self, target)

    # -- running -----------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The source's forward, with energy blocks at equilibrium.

        Raises:
            InputError: for inputs that do not have the captured structure, rank, fixed sizes or
                kind of dtype, or that hold NaN.
            ConvergenceError: where a block does not settle.
        """
        outputs = self.lowered(*self._operands(args, kwargs))
        return self._call_form.result(outputs, self.training)

    # The checks read values and stamps change with every step: `torch.compile` would compile anew for each.
    @torch.compiler.disable(reason="inputs are checked and loop gains measured eagerly")  # type: ignore[untyped-decorator]
    def _operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """What the lowered graph takes: the present tensors and the checked inputs.

        In training it looks for blocks whose weights have changed; they measure their loop gain before they settle.
        """
        if self._call_form.refused_in_training:
            self._refuse_train_mode()
        self._later_hooks.look()
        leaves = self._call_form.leaves(args, kwargs)
        if self.training:
            changed = False
            for name in self._sources:
                changed |= self._energy[name].gain.look(self._made_of(name), self.recertify_every)
            if changed and self.project_to is not None:
                self.project(self.project_to)
        return [*self._tensors(), *leaves]

    def _refuse_train_mode(self) -> None:
        """Refuse a call with a module in train mode whose code asks for it, where there is no capture of that."""
        asking = [path for path in self._asks if self.get_submodule(path).training]
        if asking:
            named = ", ".join(repr(path) if path else "the model" for path in asking[:3]) + ", ..." * (len(asking) > 3)
            raise UnsupportedError(
                f"the hybrid cannot run in train mode, since the source could not be captured in it: "
                f"{self._call_form.refused_in_training}; call eval() to run it, on the whole or on what asks for its "
                f"mode ({named})"
            )

    def _sources_of_blocks(self) -> dict[str, tuple[str, ...]]:
        """For each block with feedback, names of the parameters and buffers that its weights are made of."""
        nodes: Any = self.lowered.graph.nodes
        names = dict(zip((node for node in nodes if node.op == "placeholder"), self._lifted, strict=False))
        found = {}
        for call in nodes:
            block = self._energy.get(str(call.target)) if call.op == "call_module" else None
            if block is None or not block.program.coupled:
                continue
            pending = [node for node in call.args[block.program.inputs :] if isinstance(node, fx.Node)]
            seen: dict[fx.Node, None] = {}
            while pending:
                node = pending.pop()
                if node not in seen:
                    seen[node] = None
                    pending += node.all_input_nodes
            found[str(call.target)] = tuple(sorted({names[node] for node in seen if node in names}))
        return found

    def _call_of(self, name: str) -> Any:
        """The node of the lowered graph that calls a block."""
        nodes: Any = self.lowered.graph.nodes
        return next(node for node in nodes if node.op == "call_module" and node.target == name)

    def _tensor(self, name: str) -> Tensor:
        """The parameter or buffer of this name."""
        path, _, leaf = name.rpartition(".")
        module = self.get_submodule(path)
        parameter = module._parameters.get(leaf)
        found: Tensor | None = parameter if parameter is not None else module._buffers.get(leaf)
        if found is None:
            raise UnsupportedError(
                f"the hybrid has no {name!r} any more (module {path!r} is a {type(module).__name__}): a hybrid takes "
                "new tensors of the same names and shapes only; change the source and convert it again"
            )
        return found

    def _made_of(self, name: str) -> list[Tensor]:
        """The parameters and buffers that the weights of a block with feedback are made of."""
        return [self._tensor(source) for source in self._sources.get(name, ())]

    def certificate_of(self, name: str) -> Certificate | None:
        """What is certified of a block at its present weights and feedback; measured where they have changed."""
        gain, sources = self._energy[name].gain, self._made_of(name)
        if gain.certificate is None or gain.fits(sources):
            return gain.certificate
        return gain.at(self.operands_of(name)[1], sources)

    def _tensors(self) -> list[Tensor]:
        """The source's parameters and buffers that the graph reads, in its order."""
        return [self._tensor(name) for name in self._lifted]

    def operands_of(self, name: str) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """(inputs, weights) of an energy block; an input that depends on the network's is None."""
        run = self.lowered
        call = self._call_of(name)
        known: dict[fx.Node, Tensor | None] = {}
        placeholders = [node for node in run.graph.nodes if node.op == "placeholder"]
        known.update(zip(placeholders, self._tensors(), strict=False))
        count = self._energy[name].program.inputs
        with generators_unchanged(), tensors_unchanged(self.written_state()):
            values = tuple(_static_value(run, node, known) for node in call.args)
        return values[:count], values[count:]

    def configure(
        self, *, feedback: float | str, estimator: Estimator, solver: Solver | None, energy: Energy | None = None
    ) -> None:
        """Set feedback, estimator, solver and (where one is given) energy of every block, without measuring anything.

        Raises:
            UnsupportedError: where a block with feedback holds what the energy does not admit.
        """
        if energy is not None:
            self.energy_function = energy
        for block in self._energy.values():
            if energy is not None:
                block.set_energy(energy)
            block.gain.feedback = feedback
            block.estimator = estimator
            block.solver = solver

    @contextmanager
    def feedforward_mode(self) -> Iterator[None]:
        """Run every block without feedback: the source's own function."""
        before = {name: block.enabled for name, block in self._energy.items()}
        try:
            for block in self._energy.values():
                block.enabled = False
            yield
        finally:
            for name, enabled in before.items():
                self._energy[name].enabled = enabled

    def train(self, mode: bool = True) -> HybridModel:
        """Set the mode of all modules, as the source's own `train` does it (a model may freeze parts of itself)."""
        super().train(mode)
        source = self.__dict__["_source"]
        if type(source).train is not nn.Module.train:
            source.train(mode)
            self.training = source.training
        return self

    @contextmanager
    def held_feedback(self) -> Iterator[None]:
        """Leave the feedback γ as it is, also in training forwards at changed weights: finite differences need it."""
        before = {name: self._energy[name].gain.locked for name in self._sources}
        try:
            for name in self._sources:
                self._energy[name].gain.locked = True
            yield
        finally:
            for name, locked in before.items():
                self._energy[name].gain.locked = locked

    @contextmanager
    def in_mode(self, training: bool) -> Iterator[None]:
        """Run in a mode, without gradients; flags, written state and random generators stay as they are."""
        source = self.__dict__["_source"]
        flags = {module: module.training for module in (*self.modules(), source)}
        try:
            self.train(training)
            source.training = self.training
            with torch.no_grad(), generators_unchanged(), tensors_unchanged(self.written_state()):
                yield
        finally:
            for module, flag in flags.items():
                module.training = flag

    def _evaluating(self) -> AbstractContextManager[None]:
        return self.in_mode(False)

    def written_state(self) -> list[Tensor]:
        """The parameters and buffers that a forward writes, statistics that follow a module's flag aside."""
        run = self.lowered
        known = dict(zip(self._lifted, self._tensors(), strict=True)) | dict(run.named_buffers())
        return [known[name] for name in sorted(names_of_written_state(run, self._lifted))]

    @contextmanager
    def recording(self) -> Iterator[dict[str, tuple[tuple[Any, ...], tuple[Tensor, ...]]]]:
        """Record (operands, outputs) of every energy block while the context is open."""
        record: dict[str, tuple[tuple[Any, ...], tuple[Tensor, ...]]] = {}

        def keep(module: nn.Module, operands: tuple[Any, ...], outputs: Any) -> None:
            assert isinstance(module, EnergyBlock)
            record[module.name] = (operands, outputs)

        hooks = [block.register_forward_hook(keep) for block in self._energy.values()]
        try:
            yield record
        finally:
            for hook in hooks:
                hook.remove()

    def calibrate(self, *args: Any, **kwargs: Any) -> None:
        """Measure the loop gain of every block at these inputs' shapes."""
        with self._evaluating(), self.feedforward_mode(), self.recording() as record:
            self(*args, **kwargs)
        for name, (operands, _) in record.items():
            block = self._energy[name]
            block.gain.calibrate(operands[: block.program.inputs], operands[block.program.inputs :])
            block.gain.fitted(self._made_of(name))

    def recertify(self) -> None:
        """Measure the loop gains of the present weights to convergence and set the feedback for them.

        Training forwards hold the loop gain by themselves, and `load_state_dict` of a source's weights does this; call
        it where you have changed weights and go on in eval mode, which leaves the feedback as it is.
        """
        for name in self._energy:
            self._recertify(name)

    def _recertify(self, name: str) -> None:
        gain = self._energy[name].gain
        gain.recertify(self.operands_of(name)[1])
        gain.fitted(self._made_of(name))

    def project(self, limit: float = 0.9) -> dict[str, float]:
        """Scale weights down so that every block is certified to settle: a projection, for use after `step()`.

        Where a block's loop gain exceeds `limit`, the operator norms of its coupling weights are capped at the one
        value τ for which its loop gain is `limit`: a weight of norm above τ is multiplied by τ/‖J‖, the others stay.
        It is for `feedback="symmetric"`: where the loop gain is given as a number, `recertify` sets the feedback to it
        whatever the weights are. `project_to` does it by itself.

        Args:
            limit: the largest loop gain κ = ρ² that is left, in (0, 1).

        Returns:
            Block name -> loop gain before, for the blocks that were changed.

        Raises:
            InputError: for another limit, or where a block's coupling has no weight to scale.
        """
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < 1:
            raise InputError(f"limit is {limit!r}; expected a loop gain strictly between 0 and 1, such as 0.9")
        changed = {}
        for name, block in self._energy.items():
            if not isinstance(block.feedback, str):
                continue
            self._recertify(name)
            before = block.loop_gain
            for index, factor in block.projection(limit).items():
                with torch.no_grad():
                    self._parameter_behind(name, index).mul_(factor)
                changed[name] = before
            if name in changed:
                self._recertify(name)
        return changed

    def _parameter_behind(self, name: str, index: int) -> Tensor:
        """The parameter that a weight of a block is, or is a view or a multiple (by a folded batch norm) of."""
        run = self.lowered
        placeholders = [node for node in run.graph.nodes if node.op == "placeholder"]
        tensors = dict(zip(placeholders, self._tensors(), strict=False))
        call = self._call_of(name)
        node = call.args[self._energy[name].program.inputs + index]
        while node not in tensors:
            # The first operand is the weight: what it is transposed, reshaped or multiplied by comes after it.
            node = node.all_input_nodes[0]
        return tensors[node]

    def verify_feedforward(self, model: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check that with feedback off the hybrid computes what the source computes.

        Raises:
            FFEBMError: where it does not, which is a defect of the compiler.
        """
        from ffebm_compiler.mixed_modes import allow_mixed_modes
        from ffebm_compiler.verification import same_outputs, verify_feedforward

        source = self.__dict__["_source"]
        if type(source) is nn.Module or (self._call_form.random and not self._draws_in_order):
            return
        modes = (False, True) if self._differs_in_training else (False,)
        verify_feedforward(self, source, args, kwargs, modes, self._folded)
        allow_mixed_modes(self, source, lambda: same_outputs(self, source, args, kwargs))

    # -- settings ----------------------------------------------------------------------------

    def set_gradient(self, gradient: str | Estimator) -> None:
        """Choose the gradient estimator: `"ep"`, `"implicit"`, `"unrolled"` or an object."""
        estimator = estimator_of(gradient)
        for block in self._energy.values():
            block.estimator = estimator

    def set_solver(self, solver: Solver | None) -> None:
        """Choose how every block settles; None lets each block have the solver that is fastest for it.

        Raises:
            InputError: for anything but a solver.
        """
        if solver is not None and not isinstance(solver, Solver):
            raise InputError(f"solver is a {type(solver).__name__}; expected a Solver such as GaussSeidel(), or None")
        for block in self._energy.values():
            block.solver = solver

    def set_feedback(self, feedback: float | str) -> None:
        """Set the feedback of every block: the loop gain κ in (0, 1) (of a resistive energy the gain γ > 0 itself).

        `"symmetric"` is γ = 1.

        Raises:
            InputError: for what is no feedback of the blocks' energy.
        """
        value = self.energy_function.check_feedback(feedback)
        for name, block in self._energy.items():
            enough = block.set_feedback(value)
            if not enough or not block.gain.fits(self._made_of(name)):
                self._recertify(name)

    # -- reports -----------------------------------------------------------------------------

    def compare(self, *args: Any, **kwargs: Any) -> Comparison:
        """Deviation from the source network, per block and at the output, for given inputs."""
        from ffebm_compiler.checks import compare

        return compare(self, args, kwargs)

    def diagnose(self, *args: Any, sweeps: int = 12, **kwargs: Any) -> Diagnosis:
        """How each block settles on given inputs: ρ, sweeps, residual and energy at every sweep.

        `sweeps` is the number of sweeps recorded, whatever the tolerance.
        """
        from ffebm_compiler.diagnosis import diagnose

        return diagnose(self, args, kwargs, sweeps)

    def summary(self) -> str:
        """The plan, and loop gain, sweeps, solver and estimator of every block, as text."""
        from ffebm_compiler.text import summary_text

        return summary_text(self)

    def cost_report(self) -> CostReport:
        """Modelled energy and latency per sample, with the sweeps that the loop gains predict; `print` it.

        Raises:
            HardwareError: where `costs` of the hardware names a constant that the model does not have.
        """
        from ffebm_compiler.costs_report import cost_report_of

        return cost_report_of(self)

    def to_digital(self) -> nn.Module:
        """A plain module of the source's class with the present weights.

        Raises:
            UnsupportedError: where the source was an `ExportedProgram`, which has no module class.
        """
        source = self.__dict__["_source"]
        if type(source) is nn.Module:
            raise UnsupportedError(
                "the source was an ExportedProgram, which has no eager module: load hybrid.state_dict() into yours"
            )
        digital: nn.Module = copy.deepcopy(source)
        digital.training = self.training
        return digital

    def save_svg(self, path: str | Path) -> None:
        """Draw the partition as an SVG picture; see `Plan.save_svg`."""
        self._plan.save_svg(path)

    def save_image(self, path: str | Path, dpi: float = 192.0) -> None:
        """Draw the partition as a PNG or PDF picture, by the path's suffix; see `Plan.save_image`."""
        self._plan.save_image(path, dpi)

    def to_dot(self) -> str:
        """The partition in Graphviz's DOT language; see `Plan.to_dot`."""
        return self._plan.to_dot()

    def save_html(
        self,
        path: str | Path,
        *,
        comparison: Comparison | None = None,
        gradients: GradientReport | None = None,
        diagnosis: Diagnosis | None = None,
    ) -> None:
        """Draw the partition as one self-contained, interactive HTML page; an existing file is replaced.

        Loop gains can be shown on the blocks; `comparison` (from `compare(x)`) adds each block's
        deviation, `gradients` (from `check_gradients`) the agreement of its gradients, `diagnosis`
        (from `diagnose(x)`) its residual and energy at every sweep.

        Raises:
            InputError: where a measurement is of another hybrid.
            ExportError: where the path cannot be written or the layout library is missing.
        """
        from ffebm_compiler.drawing import deviation_overlay, gradient_overlay, save_html

        overlays = [] if comparison is None else [deviation_overlay(self._plan, comparison)]
        if gradients is not None:
            overlays.append(gradient_overlay(self._plan, gradients))
        save_html(self._plan, path, self, overlays, diagnosis)

    def _repr_html_(self) -> str:
        from ffebm_compiler.drawing import notebook_html

        return notebook_html(self._plan, self)

    def export_onnx(self, path: str | Path, parts: str | None = None, *, fuse_batchnorm: bool = False) -> Path:
        """Export the whole hybrid as one ONNX file, or its digital parts into a folder.

        Both are in eval mode, whatever mode the hybrid is in (with an `FFEBMWarning` where train mode computes
        something else), and leave the batch size free; see `docs/onnx.md`.

        Args:
            path: the file; with `parts="digital"` the folder.
            parts: None for the whole hybrid, with each energy block an ONNX function that settles;
                `"digital"` for one file per feedforward part and a manifest.
            fuse_batchnorm: let the exporter fuse batch norm into digital convolutions.

        Raises:
            ExportError: where onnx is not installed, an operation has no ONNX form or the path cannot be written.
            InputError: for another value of `parts`.
        """
        from ffebm_compiler.onnx import export_digital, export_whole

        if parts not in (None, "digital"):
            raise InputError(f"parts is {parts!r}; expected 'digital', or nothing for the whole hybrid")
        export = export_whole if parts is None else export_digital
        return export(self, Path(path), fuse_batchnorm=fuse_batchnorm)

    def save(self, path: str | Path) -> None:
        """Save plan, settings and weights into a folder (JSON and safetensors); `ffebm.load` reads it.

        Raises:
            ExportError: where the path cannot be written, or holds something else.
        """
        from ffebm_compiler.storage import save

        save(self, path)


def _shared(source: nn.Module, lowered: fx.GraphModule) -> dict[str, Tensor]:
    """Name of a constant -> the tensor among the source's attributes that it shares its memory with."""
    places = {place_of(tensor): tensor for tensor in plain_tensors(source)} if lowered._buffers else {}
    constants = ((name, places.get(place_of(value))) for name, value in lowered._buffers.items() if value is not None)
    return {name: tensor for name, tensor in constants if tensor is not None}


def _static_value(run: fx.GraphModule, node: Any, known: dict[fx.Node, Tensor | None]) -> Tensor | None:
    """Value of a node that depends on parameters alone; None for one that depends on the inputs."""
    if not isinstance(node, fx.Node):
        return None
    if node in known:
        return known[node]
    value: Tensor | None = None
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(run)
    elif node.op != "placeholder":
        module = run.get_submodule(str(node.target)) if node.op == "call_module" else None
        operands = {operand: _static_value(run, operand, known) for operand in node.all_input_nodes}
        known_alone = all(operand is not None for operand in operands.values())
        if known_alone and not isinstance(module, EnergyBlock | FeedforwardBlock):
            args, kwargs = fx.map_arg((node.args, node.kwargs), operands.__getitem__)
            value = (module or node.target)(*args, **kwargs)  # type: ignore[operator]
    known[node] = value
    return value
