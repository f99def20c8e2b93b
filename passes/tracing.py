"""Tracing: what must hold while `torch.export` runs the forward, so that it sees what the user's code does.

- an operation that runs without gradient is marked: inside autocast regions the exporter forgets `no_grad`.
- `x.data` is `x.detach()`, and `x.data = y` a write in place, which the exporter can record.
- autocast regions around the call of `convert` are off: the hybrid runs under whatever its caller has on.
- a layer that is moved in the forward to where it is already stays as it is.
- a branch on a buffer or a constant is decided by its value (`known_values`), one on random numbers is refused
  (`drawn_values`).
- a check that raises for some values of the data is passed (`data_checks`), values are finite (`finite_values`).
- random numbers come from torch's default generator, which the forward does not seed.
- autograd's graph is not looked at, and gets no hooks but those of `Tensor.register_hook` (`refused_hooks`).
- distributions do not look at the values of their parameters.
- attention and encoders take their ordinary path, not the fused one of eval mode.
- modules are found by their names, also by those of methods (`type`, `train`).
- a module with two names is itself, not a stand-in that the model's code would not know again.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions import Distribution
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer
from torch.nn.utils._named_member_accessor import NamedMemberAccessor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ffebm_compiler.module_paths import module_at
from ffebm_compiler.passes.data_checks import DataChecks
from ffebm_compiler.passes.drawn_values import DrawnValues
from ffebm_compiler.passes.explain_capture import NotTraceable
from ffebm_compiler.passes.finite_values import FiniteValues
from ffebm_compiler.passes.known_values import KnownValues
from ffebm_compiler.passes.refused_hooks import GRADIENT_FUNCTION, GradientFunction, no_refused_hooks

__all__ = ["WITHOUT_GRADIENT", "UsersCalls", "ordinary_paths", "tracing"]

WITHOUT_GRADIENT = "ffebm_without_gradient"
"""Key under which an operation that ran without gradient is marked."""

_STANDS_IN = "enable_attr_proxy"
"""The exporter's attribute that says whether it makes stand-ins for modules."""
_GRADIENTS = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_sparse", "is_sparse_csr",
    "is_quantized", "is_nested", "is_mkldnn", "is_meta", "is_cpu", "is_cuda", "is_mps", "itemsize", "nbytes",
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "stride", "storage_offset", "untyped_storage", "element_size", "is_contiguous",
    "is_inference", "is_conj", "is_neg", "is_floating_point", "is_complex", "_is_view",
)  # fmt: skip
_ABOUT = frozenset(
    (*(getattr(torch.Tensor, n).__get__ for n in _PROPERTIES), *(getattr(torch.Tensor, n) for n in _METHODS))
)
"""Calls that ask about a tensor and not for its values; the exporter makes dozens of them for every operation."""


class UsersCalls(TorchFunctionMode):
    """Sees every call of torch that the forward makes."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.known = KnownValues(source)
        self.drawn = DrawnValues(self.known.knows)
        self.checks = DataChecks()
        self.finite = FiniteValues()
        self.outside: list[torch.Tensor] = []
        """Tensors with `requires_grad` that no module registers: the tracer sees them as they are."""

    def notes(self) -> tuple[str, ...]:
        """What was decided for the forward while it was traced: a sentence for each place."""
        return (*self.known.notes(), *self.checks.notes(), *self.finite.notes())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call, marked where no gradient is recorded."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            return func(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():  # torch traces itself: flex attention, torch.cond
            return func(*args, **kwargs)
        if func == _DATA:
            func, args = torch.Tensor.detach, args[:1]
        if func == _SET_DATA:
            return _data_is_set(*args)
        if func == GRADIENT_FUNCTION:
            node = func(*args)
            return None if node is None else GradientFunction(node)
        if func in _GRADIENTS:
            raise NotTraceable(
                f"a gradient is taken inside the forward ({func.__name__}), which a graph does not hold; convert the "
                "submodules whose gradient it takes, and take it outside"
            )
        self.outside += [
            leaf
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor) and leaf.requires_grad
        ]
        args, kwargs = tuple(map(_default, args)), {key: _default(value) for key, value in kwargs.items()}
        known, value = self.known.call(func, args, kwargs)
        if known:
            return value
        answer = self.checks.call(func)
        answer = self.finite.call(func, args) if answer is None else answer
        if answer is not None:
            return answer
        self.drawn.call(func, args)
        args = self.known.sizes(func, args)
        if torch.is_grad_enabled():
            result = func(*args, **kwargs)
        else:
            with traceback.preserve_node_meta(), traceback.annotate({WITHOUT_GRADIENT: True}):
                result = func(*args, **kwargs)
        self.known.computed(func, args, kwargs, result)
        self.drawn.computed(func, args, kwargs, result)
        self.finite.computed(func, args, result)
        return result


def _data_is_set(target: torch.Tensor, value: torch.Tensor) -> None:
    """`weight.data = value` as a write in place, which the exporter can record."""
    if (target.shape, target.dtype, target.device) != (value.shape, value.dtype, value.device):
        raise NotTraceable(
            f"a tensor's data is set here to another one, of shape {tuple(value.shape)} and {value.dtype} in place of "
            f"{tuple(target.shape)} and {target.dtype}; set it before the model is converted"
        )
    target.detach().copy_(value.detach())


def _default(argument: Any) -> Any:
    """An argument of a call; nothing in the place of torch's default generator, and no other one."""
    if not isinstance(argument, torch.Generator):
        return argument
    if argument is torch.default_generator:
        return None
    raise NotTraceable(
        "random numbers are drawn here from a torch.Generator, whose state a graph does not hold; draw them from "
        "torch's default generator, or outside of forward and hand them in as an input"
    )


@contextlib.contextmanager
def _unseeded() -> Iterator[None]:
    """Refuse a forward that seeds torch's generator or sets its state."""
    places = [(module, name) for module in (torch, torch.random) for name in ("manual_seed", "seed", "set_rng_state")]
    before = {(module, name): getattr(module, name) for module, name in places}

    def refused(module: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if str(sys._getframe(1).f_globals.get("__name__", "")).startswith("torch._dynamo."):
            return before[module, name](*args, **kwargs)  # it keeps the state while it traces torch.cond's branches
        raise NotTraceable(
            "torch's random generator is seeded or set here, which a graph does not hold: every forward would draw on "
            "where the last one stopped; keep the numbers in a buffer, or draw them without a seed"
        )

    try:
        for module, name in places:
            setattr(module, name, functools.partial(refused, module, name))
        yield
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


@contextlib.contextmanager
def ordinary_paths() -> Iterator[None]:
    """Let encoders run as with gradients, not on torch's fused path, which returns zeros at padded places."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _unchecked_distributions() -> Iterator[None]:
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextlib.contextmanager
def _modules_stay() -> Iterator[None]:
    """`layer.to(x.device)` in a forward: nothing where the layer is there already."""
    before = nn.Module._apply

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                moved = fn(probe)
            if (moved.dtype, moved.device) != (probe.dtype, probe.device):
                raise NotTraceable(
                    f"the forward moves {name!r} of a {type(self).__name__} to {moved.dtype} on {moved.device} while "
                    "it runs; move the model before it is converted"
                )
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


@contextlib.contextmanager
def _modules_are_themselves() -> Iterator[None]:
    """Without the exporter's stand-ins for modules, which it makes where one module has two names, to tell them apart.

    They are other objects: `layer is self.layers[-1]` would be false, and a read of `training` would be nobody's.
    """
    setattr(_ModuleStackTracer, _STANDS_IN, property(lambda _: False, lambda _, __: None))
    try:
        yield
    finally:
        delattr(_ModuleStackTracer, _STANDS_IN)


@contextlib.contextmanager
def _modules_by_name() -> Iterator[None]:
    """The exporter looks for a module named as a method of its parent among the attributes, and finds the method."""
    before = NamedMemberAccessor.get_submodule
    NamedMemberAccessor.get_submodule = lambda self, name: module_at(self.module, name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        NamedMemberAccessor.get_submodule = before  # type: ignore[method-assign]


@contextlib.contextmanager
def tracing(source: nn.Module) -> Iterator[UsersCalls]:
    """The state of torch in which a forward of `source` is traced; what was before is restored."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.enable_grad())
        for context in (
            ordinary_paths,
            _unchecked_distributions,
            _modules_stay,
            _modules_are_themselves,
            _modules_by_name,
            _unseeded,
            no_refused_hooks,
        ):
            stack.enter_context(context())
        yield stack.enter_context(UsersCalls(source))
