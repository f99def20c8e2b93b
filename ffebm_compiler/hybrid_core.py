"""`HybridCore`: the part of a hybrid that runs, trains and stores its state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ffebm_compiler.block_operands import fetched
from ffebm_compiler.bound_block import BoundBlock
from ffebm_compiler.conductances import KEPT, check_conductances, clamp_after_steps, clamp_conductances
from ffebm_compiler.device_state import age_of, aged, observed_ranges, program_devices, put_on_devices
from ffebm_compiler.digital_bits import calls_of, digital_parts, observed_values, quantisers
from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.failed_calls import explained_failure, explained_measurement, refuse_transforms
from ffebm_compiler.feedback_weights import FeedbackWeights
from ffebm_compiler.gradient_choice import (
    assign,
    assign_digital,
    check_digital,
    check_measured,
    digital_choice,
    digital_gradient,
)
from ffebm_compiler.hybrid_parts import HybridParts
from ffebm_compiler.hybrid_state import (
    METADATA,
    Arrival,
    fill_arriving,
    own_load_state_dict,
    own_state_dict,
    packed_state,
    restore,
    settle_arrival,
    state_of,
    unpacked_state,
)
from ffebm_compiler.kept_gradients import keeping_gradients, measured_blocks
from ffebm_compiler.own_outputs import own_outputs
from ffebm_compiler.passes.unchanged import generators_unchanged, tensors_unchanged
from ffebm_compiler.plain_numbers import plain
from ffebm_compiler.plan_data import PlanData
from ffebm_compiler.recast import Casts, dtype_of, keep_wide, move
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.devices.devices import Devices, devices_of
from ffebm_compiler.runtime.energies.base import Energy
from ffebm_compiler.runtime.estimators.choice import Estimator, estimator_of
from ffebm_compiler.runtime.feedforward.blocks import FeedforwardBlock
from ffebm_compiler.runtime.feedforward.modes import other_modes
from ffebm_compiler.runtime.feedforward.quantised_backprop import QuantisedBackprop
from ffebm_compiler.runtime.feedforward.state import WriteInput
from ffebm_compiler.runtime.feedforward.zeroth_order import ZerothOrder
from ffebm_compiler.runtime.held_gain import recertify_each
from ffebm_compiler.runtime.solvers.base import Solver, checked_solver
from ffebm_compiler.sharded import ShardedRun
from ffebm_compiler.source_view import bind_forward, separate_tied, without_bound_forward
from ffebm_compiler.weight_origins import origin_of

if TYPE_CHECKING:
    from ffebm_compiler.ir import Program
    from ffebm_compiler.passes.lower import Lowered

__all__ = ["HybridCore"]


class HybridCore(HybridParts):
    """A hybrid with `forward`, state, feedback, estimators and solvers, but without reports, pictures and exports."""

    def __init__(
        self,
        program: Program,
        plan: PlanData,
        lowered: Lowered,
        casts: Casts,
        feedback_weights: FeedbackWeights | None = None,
    ) -> None:
        super().__init__(program, plan, lowered, feedback_weights)
        self._casts = casts
        self.register_load_state_dict_post_hook(settle_arrival)  # type: ignore[no-untyped-call]
        bind_forward(self, self.__signature__)

    # -- state -------------------------------------------------------------------------------

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **others: Any) -> Any:
        """Tensors under the source's keys, as the source's own `state_dict` returns them."""
        if type(self._source).state_dict is nn.Module.state_dict:
            return self.plain_state_dict(*args, prefix=prefix, keep_vars=keep_vars, **others)
        return own_state_dict(self, self._source, args, prefix=prefix, keep_vars=keep_vars, **others)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Copy tensors under the source's keys into the hybrid, as the source's own `load_state_dict` does."""
        if type(self._source).load_state_dict is nn.Module.load_state_dict:
            return self.plain_load_state_dict(state_dict, *args, **kwargs)
        return own_load_state_dict(self, self._source, state_dict, *args, **kwargs)

    def plain_state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **others: Any) -> Any:
        """Tensors under their names. Tied tensors of transformers models are copied, see `separate_tied`."""
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **others)
        if not keep_vars:
            separate_tied(self._source, state, prefix)
        return state

    def plain_load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Copy tensors under their names into the hybrid."""
        return super().load_state_dict(state_dict, *args, **kwargs)

    def block_state(self) -> bytes:
        """The state of the blocks beside the tensors: feedback, estimator, solver and loop-gain measurement.

        `state_dict()` has it as metadata, and `save` writes it. This method returns it as one value, for checkpoints
        that keep only tensors and values, such as those of `torch.distributed.checkpoint`.
        """
        return packed_state(self)

    def load_block_state(self, state: bytes) -> None:
        """Restore the result of `block_state`. The tensors that it belongs to must be loaded first.

        Raises:
            InputError: for a state that is malformed or of another plan.
        """
        restore(self, unpacked_state(state))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Tensors under the source's keys, and the state of the blocks in the dictionary's metadata."""
        self._source._save_to_state_dict(destination, prefix, keep_vars)  # with its extra state
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})[METADATA] = state_of(self)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        *others: Any,
    ) -> None:
        self.__dict__["_arriving"] = Arrival.of(self, state_dict, prefix, local_metadata)
        fill_arriving(self, state_dict, prefix)
        known = len(unexpected)
        self._source._load_from_state_dict(  # with its hooks
            state_dict, prefix, local_metadata, strict, missing, unexpected, *others
        )
        own = self._modules.keys() - self._source._modules.keys()  # what the source lacks checks its keys itself
        unexpected[known:] = [n for n in unexpected[known:] if n.removeprefix(prefix).split(".")[0] not in own]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the attributes, and which blocks are measured at the present weights."""
        own = {"_sharded", *KEPT}
        kept = {name: value for name, value in without_bound_forward(self.__dict__).items() if name not in own}
        return {**kept, "_current": self._measured()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The inverse of `__getstate__`."""
        current = state.pop("_current")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, tensor in self._shared.items():  # the copies have separate memory, so share it again
            constant = self.lowered._buffers[name]
            if constant is not None and constant.dtype is tensor.dtype and constant.device == tensor.device:
                self.lowered._buffers[name] = tensor.detach()
        if "forward" not in self.__dict__:
            bind_forward(self, self.__signature__)
        self._fit(current)
        clamp_after_steps(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move to another device or dtype. That is no change of the weights, so that the feedback stays."""
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
        """Names of the blocks with feedback whose loop gain was measured at the present weights."""
        return tuple(name for name in self._sources if self._energy[name].gain.fits(self._made_of(name)))

    def _fit(self, names: Iterable[str]) -> None:
        """Note that the loop gain of these blocks was measured at the present weights."""
        for name in names:
            self._energy[name].gain.fitted(self._made_of(name))

    # -- running -----------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[BoundBlock, ...]:
        """The energy blocks, in the plan's order."""
        return tuple(BoundBlock(self, self._energy[block.name], block) for block in self._plan.blocks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` with its hooks. Weights are looked at before an engine that shards them gathers them."""
        try:
            self._look_at_weights()
        except RuntimeError as error:
            raise explained_measurement(self, error) from error
        self.__dict__["_looked"] = True
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The source's forward, with energy blocks at equilibrium.

        Raises:
            InputError: the inputs do not have the captured structure, rank, fixed sizes or kind of dtype, or hold
                NaN.
            ConvergenceError: a block does not settle.
            FabricError: a fabric that measures a block fails; names the block.
        """
        eager = digital_gradient(self) or quantisers(self) or measured_blocks(self)
        return self._run_eager(args, kwargs) if eager else self._run_once(args, kwargs)

    # `torch.compile` would look through a digital part to its operations.
    @torch.compiler.disable(reason="perturbed or quantised digital parts and measured blocks run eagerly")  # type: ignore[untyped-decorator]
    def _run_eager(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self._run_once(args, kwargs)

    def _run_once(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        leaves = self._checked(args, kwargs)
        units = self._later_hooks.units
        try:
            with keeping_gradients(self) as kept:
                outputs = self._sharded_run(units)(leaves) if units else self.lowered(*leaves)
        except RuntimeError as error:
            raise explained_failure(self, self._call_form.names, leaves, error) from error
        if not torch.compiler.is_compiling() or self._sources:
            outputs = self._own(outputs)
        if kept is not None:
            kept.watch(outputs)
        return self._call_form.result(outputs, self.training)

    @torch.compiler.disable(reason="the memory of outputs is looked at eagerly")  # type: ignore[untyped-decorator]
    def _own(self, outputs: Sequence[Any]) -> list[Any]:
        """The outputs, in memory that no block needs."""
        return own_outputs(outputs, self._energy.values())

    def _sharded_run(self, units: Mapping[str, nn.Module]) -> ShardedRun:
        """The graph with its weights gathered part by part, made once for these units."""
        made: ShardedRun | None = self.__dict__.get("_sharded")
        if made is None or made.units is not units:
            made = self.__dict__["_sharded"] = ShardedRun(self.lowered, units)
        return made

    # The checks read values, and stamps change with every step, so that `torch.compile` would compile again for each.
    @torch.compiler.disable(reason="inputs are checked eagerly")  # type: ignore[untyped-decorator]
    def _checked(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The inputs of the lowered graph, checked."""
        if not self.__dict__.pop("_looked", False):
            self._look_at_weights()
        if self._call_form.refused_in_training:
            self._refuse_train_mode()
        if self._call_form.in_one_mode:
            self._refuse_mixed_modes()
        return self._call_form.leaves(args, kwargs, self.training)

    @torch.compiler.disable(reason="loop gains are measured eagerly")  # type: ignore[untyped-decorator]
    def _look_at_weights(self) -> None:
        """Find the blocks whose weights have changed. In training, they measure their loop gain before they settle.

        In evaluation they only compare what their weights need with what their amplifiers are set to.
        """
        refuse_transforms()  # which may stand for the weights too
        self._later_modules.look()
        self._later_hooks.look()
        check_conductances(self)
        clamp_after_steps(self)
        if not self.training:
            for name in self._sources:
                self._energy[name].gain.glance(self._made_of(name))
            return
        changed = False
        for name in self._sources:
            changed |= self._energy[name].gain.look(self._made_of(name), self.recertify_every)
        if changed and self.project_to is not None:
            self.project(self.project_to)
        if changed:
            self._hold_together()

    def _hold_together(self) -> None:
        """Measure the changed blocks whose weights are parameters on a CPU, one after another.

        Other blocks measure just before they settle. That takes 1.5 times as long on a CPU, since sweeps of large
        products in between leave nothing of a measurement's code and small tensors in its caches.
        """
        for name, names in self._direct.items():
            block = self._energy[name]
            if not (block.gain.changed and block.training and block.enabled and block.arrays is None):
                continue
            weights = [None if weight is None else self._tensor(weight) for weight in names]
            plain = (weight is None or type(weight) in (Tensor, nn.Parameter) for weight in weights)
            if all(plain) and all(weight is None or weight.device.type == "cpu" for weight in weights):
                block.program.check_weights(weights)
                block.gain.hold(weights)

    def changed_gains(self) -> list[str]:
        """Names of the blocks whose weights have changed since their loop gain was last measured (in train mode)."""
        self._look_at_weights()
        return [name for name in self._sources if self._energy[name].gain.changed]

    def _refuse_train_mode(self) -> None:
        """Refuse train mode if the source could not be captured in it and a module in train mode reads its flag."""
        asking = [path for path in self._asks if self.get_submodule(path).training]
        if asking:
            named = ", ".join(repr(path) if path else "the model" for path in asking[:3]) + ", ..." * (len(asking) > 3)
            raise UnsupportedError(
                f"the hybrid cannot run in train mode, since the source could not be captured in it: "
                f"{self._call_form.refused_in_training}. Call eval() on the hybrid, or on the modules that read their "
                f"mode ({named})"
            )

    def _refuse_mixed_modes(self) -> None:
        """Refuse modes of modules that were not captured, where one module's code reads the flags of several."""
        for paths in self._call_form.in_one_mode:
            active = self.get_submodule(paths[0]).training
            for path in paths[1:]:
                if self.get_submodule(path).training != active:
                    raise UnsupportedError(other_modes(paths[0], active, path))

    @contextmanager
    def feedforward_mode(self) -> Iterator[None]:
        """Run every block without feedback and without devices, which is the source's own function."""
        switched: list[EnergyBlock | FeedforwardBlock] = [*self._energy.values(), *digital_parts(self).values()]
        before = [part.enabled for part in switched]
        try:
            for part in switched:
                part.enabled = False
            yield
        finally:
            for part, enabled in zip(switched, before, strict=True):
                part.enabled = enabled

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules as the source's own `train` does, since a model may freeze parts of itself."""
        self._later_modules.look_at_settings()
        super().train(mode)
        source = self.__dict__["_source"]
        if type(source).train is not nn.Module.train:
            source.train(mode)
            self.training = source.training
            for block in self._energy.values():
                block.training = self.training
        self._later_modules.note_settings()  # `train` of the source's modules may set some; both modes were captured
        return self

    @contextmanager
    def held_feedback(self) -> Iterator[None]:
        """Hold the feedback γ, also in training forwards at changed weights, as finite differences need it."""
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
        """Run in a mode, without gradients and without writes to the inputs.

        Flags, written state and random generators are restored.
        """
        source = self.__dict__["_source"]
        writes = {module: module.enabled for module in self.lowered.modules() if isinstance(module, WriteInput)}
        flags = {module: module.training for module in (*self.modules(), source)}
        try:
            self.train(training)
            source.training = self.training
            for write in writes:
                write.enabled = False
            with torch.no_grad(), generators_unchanged(), tensors_unchanged(self.written_state()):
                yield
        finally:
            for module, flag in flags.items():
                module.training = flag
            for write, enabled in writes.items():
                write.enabled = enabled
            self._later_modules.note_settings()

    def _evaluating(self) -> AbstractContextManager[None]:
        return self.in_mode(False)

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

    # -- settings ----------------------------------------------------------------------------

    def configure(
        self, *, feedback: float | str, estimator: Estimator, solver: Solver | None, energy: Energy | None = None
    ) -> None:
        """Set feedback, estimator, solver and, if given, the energy of every block, without measuring anything.

        Raises:
            UnsupportedError: a block with feedback holds a layer that the energy does not admit, or the estimator is
                defined in no block.
        """
        if energy is not None:
            self.energy_function = energy
        for block in self._energy.values():
            if energy is not None:
                block.set_energy(energy)
            block.gain.feedback = feedback
            block.solver = solver
        assign(self, estimator)

    def calibrate(self, *args: Any, **kwargs: Any) -> None:
        """Measure the loop gain of every block at these inputs' shapes."""
        with self._evaluating(), self.feedforward_mode(), self.recording() as record:
            self(*args, **kwargs)
        measured = []
        for name, (operands, _) in record.items():
            block = self._energy[name]
            block.gain.remember(operands[: block.program.inputs])
            measured.append((block.gain, block.held(operands[block.program.inputs :])))
        recertify_each(measured)
        for name in record:
            self._energy[name].gain.fitted(self._made_of(name))

    def _recertify(self, *names: str, together: bool = True) -> None:
        check_conductances(self)
        super()._recertify(*names, together=together)

    def project(self, limit: float = 0.9) -> dict[str, float]:
        """Scale weights down so that every block is certified to settle. Use this projection after `step()`.

        If a block's loop gain exceeds `limit`, the operator norms of its coupling weights are capped at one value τ: a
        weight of norm ‖J‖ > τ is multiplied by τ/‖J‖, the others stay. τ is the value for which the loop gain is
        `limit`. This is for `feedback="symmetric"`. If the loop gain is given as a number, `recertify` sets feedback
        to it for any weights. With `project_to` the projection runs by itself.

        Args:
            limit: the largest loop gain κ = ρ² that is left, in (0, 1).

        Returns:
            Block name -> loop gain before, for the blocks that were changed.

        Raises:
            InputError: the limit is out of range, or a block's coupling has no weight to scale.
        """
        limit = plain(limit)
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < 1:
            raise InputError(f"limit is {limit!r}; expected a loop gain strictly between 0 and 1, such as 0.9")
        changed = {}
        for name, block in self._energy.items():
            if not isinstance(block.feedback, str):
                continue
            self._recertify(name)
            before = block.loop_gain
            origins = {} if block.arrays is None else block.arrays.origins
            factors: dict[int, float] = {}
            for index, factor in block.projection(limit).items():
                origin = origins.get(index, index)
                factors[origin] = min(factor, factors.get(origin, 1.0))
            for index, factor in factors.items():
                with torch.no_grad():
                    self._parameter_behind(name, index).mul_(factor)
                changed[name] = before
            if name in changed:
                self._recertify(name)
        return changed

    def clamp_conductances(self) -> tuple[str, ...]:
        """Set negative weights of a deep resistive network (`energy="drn"`) to 0, since they are conductances.

        Steps of torch's optimizers are followed by it, so that it is needed only where weights are changed otherwise.

        Returns:
            Names of the tensors that held negative values. Other energies have no such tensors.
        """
        return clamp_conductances(self)

    def _parameter_behind(self, name: str, index: int) -> Tensor:
        """The parameter behind a block's weight, which may be a view or a multiple of it (by a folded batch norm)."""
        node = self._call_of(name).args[self._energy[name].program.inputs + index]
        parameters = dict(self.named_parameters(remove_duplicate=False))
        origin = origin_of(node, fetched(self.lowered), parameters.keys())
        if origin is None:
            raise UnsupportedError(
                f"weight {index} of {name} is no parameter, nor a view or a multiple of one, so that it cannot be "
                "scaled: keep its loop gain with `feedback` as a number, or compute it from a parameter by a factor"
            )
        return self._tensor(origin.name)

    def set_gradient(
        self,
        gradient: str | Estimator,
        *,
        blocks: Sequence[str] | None = None,
        feedforward: str | ZerothOrder | QuantisedBackprop | None = None,
    ) -> None:
        """Choose the gradient estimator of every block, or of some blocks. `docs/training.md` compares them.

        Args:
            gradient: `"ep"`, `"implicit"`, `"unrolled"`, `"contrastive"`, `"coupled"`, `"cost-nudged"`, `"truncated"`,
                `"recurrent"`, or an estimator object. Contrastive and coupled learning and the nudge by a cost are
                defined only in blocks whose outputs reach the loss through no other block. The others then use
                equilibrium propagation, and `summary()` says so.
            blocks: names of the blocks to set. None sets all.
            feedforward: how the digital parts between the blocks are differentiated: `"backprop"`, `"zeroth-order"` or
                a `ZerothOrder`, which perturbs their inputs and parameters, `"quantised"` or a `QuantisedBackprop`,
                which quantises errors and gradients. None means backpropagation, but leaves the digital parts as they
                are if `blocks` is given.

        Raises:
            InputError: an estimator's name or object is unknown, a name is no block's, `feedforward` is given where
                there is no digital part, or gradients are to be quantised where digital parts are not.
            UnsupportedError: the estimator is not defined in a block given by name, or in any block with feedback, or a
                digital part writes state and so has no zeroth-order gradient.
        """
        estimator = estimator_of(gradient)
        digital = None if feedforward is None else digital_choice(feedforward)
        check_digital(self, digital)
        assign(self, estimator, blocks)
        if feedforward is not None or blocks is None:
            assign_digital(self, digital)

    def set_solver(self, solver: Solver | None) -> None:
        """Choose the solver of every block. With None each block has the solver that is fastest for it.

        Raises:
            InputError: `solver` is no solver.
            UnsupportedError: it is `Measured`, and a block's gradient estimator needs more than equilibria.
        """
        checked_solver(solver)
        for block in self._energy.values():
            check_measured(block, block.estimator, solver)
        for block in self._energy.values():
            block.solver = solver

    @property
    def device_age(self) -> float:
        """Seconds since the devices were programmed; 0 without devices."""
        return age_of(self)

    def set_devices(self, devices: str | Devices | None) -> None:
        """Program the weights of all blocks into devices. None goes back to exact arithmetic.

        The source's weights stay as they are, and gradients and optimizers work on them. What the devices hold follows
        from the present weights, the devices' seed and their age, and the feedback is set for it. See `docs/analog.md`.

        Args:
            devices: a preset's name (`ffebm.device_presets()`), a `Devices`, or None.

        Raises:
            InputError: the name is unknown, or the plan has no analog block.
            UnsupportedError: a layer's mapping or the energy does not admit these devices.
        """
        put_on_devices(self, devices_of(devices))

    def program_devices(self, seed: int | None = None) -> None:
        """Program the devices again: their static errors are drawn anew, and their age is zero.

        Args:
            seed: seed of the errors. None takes the next integer.

        Raises:
            InputError: there are no devices, or the seed is no integer of at least 0.
        """
        program_devices(self, seed)

    def age(self, seconds: float) -> None:
        """Set the time since the devices were programmed, so that they have drifted. Amplifiers stay as they are.

        Args:
            seconds: the whole time since programming, not what is added to it.

        Raises:
            InputError: there are no devices, or the time is negative.
        """
        aged(self, seconds)

    def calibrate_converters(self, *args: Any, **kwargs: Any) -> None:
        """Set the range of every DAC and ADC to the largest values that these inputs bring, in eval mode.

        Without this call the first forward sets the ranges of a block's inputs and outputs, and the first gradient
        those of the states that it reads.

        Raises:
            InputError: there are no devices.
        """
        with observed_ranges(self), self.in_mode(False):
            self(*args, **kwargs)

    def calibrate_digital(self, batches: Iterable[Any]) -> None:
        """Set the range of every value in the digital parts, which `Devices(digital_bits=...)` quantises.

        A value's range is [min(0, lowest), max(0, highest)] of what it is in floating point on these inputs, in the
        present mode (train or eval). Statistics of batch norm, random generators and converters stay as they are.
        Values that hold ±∞ or exceed 1e30 (masks), and those that only integers are made of (indices), are not
        quantised. `save`, `state_dict` and copies keep the ranges.

        Args:
            batches: representative inputs, an iterable of batches: tensors, tuples of positional arguments or
                dictionaries of arguments.

        Raises:
            InputError: the digital parts are not quantised, or there is no batch.
        """
        with observed_values(self), self.in_mode(self.training):
            for args, kwargs in calls_of(batches):
                self(*args, **kwargs)

    def set_feedback(self, feedback: float | str) -> None:
        """Set the feedback of every block.

        For a Hopfield energy a number is the loop gain κ in (0, 1), for a resistive one the gain γ > 0 itself.
        `"symmetric"` is γ = 1.

        Raises:
            InputError: the blocks' energy has no such feedback.
        """
        value = self.energy_function.check_feedback(feedback)
        for name, block in self._energy.items():
            enough = block.set_feedback(value)
            if not enough or not block.gain.fits(self._made_of(name)):
                self._recertify(name)
