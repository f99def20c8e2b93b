"""Tracing: the state of torch in which `torch.export` runs the forward, so that it sees what the user's code does.

- Operations that run without gradient are marked, since the exporter forgets `no_grad` inside autocast regions.
- `x.data` is `x.detach()`, and `x.data = y` is a write in place, which the exporter can record.
- Autocast regions around the call of `convert` are off. The hybrid follows those around its own calls.
- Modules stay where and what they are (`traced_modules`).
- What the forward assigns to a buffer is written into it (`assigned_state`).
- A branch on a buffer or a constant is decided by its value (`known_values`).
- A branch on random numbers is refused (`drawn_values`).
- A check that raises for some values of the data is passed (`data_checks`).
- Values are taken for finite (`finite_values`).
- Random numbers come from torch's default generator, which the forward does not seed.
- The forward does not read autograd's graph, and sets no hooks but those of `Tensor.register_hook` (`refused_hooks`).
- Distributions do not check the values of their parameters.
- Attention and encoders take their ordinary path, not the fused one of eval mode.
- Operations note the lines of the forward that made them, without all that called it (`short_stacks`).
- Graphs make their code when they are run (`code_when_run`).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Container, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions import Distribution
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer
from torch.overrides import TorchFunctionMode

from ffebm_compiler.passes.assigned_state import assignments_are_writes, without_the_exporters_own
from ffebm_compiler.passes.code_when_run import code_when_run
from ffebm_compiler.passes.data_checks import DataChecks
from ffebm_compiler.passes.drawn_values import DrawnValues
from ffebm_compiler.passes.explain_capture import NotTraceable
from ffebm_compiler.passes.finite_values import FiniteValues
from ffebm_compiler.passes.known_values import KnownValues
from ffebm_compiler.passes.mode_below import mode_below
from ffebm_compiler.passes.refused_hooks import GRADIENT_FUNCTION, GradientFunction, no_refused_hooks
from ffebm_compiler.passes.short_stacks import short_stacks
from ffebm_compiler.passes.traced_modules import modules_as_they_are
from ffebm_compiler.runtime.feedforward.casts import without_autocast

__all__ = ["WITHOUT_GRADIENT", "UsersCalls", "ordinary_paths", "tracing"]

WITHOUT_GRADIENT = "ffebm_without_gradient"
"""Meta key of an operation that ran without gradient."""

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
_READ_NO_VALUES = frozenset(
    (*(getattr(torch.Tensor, n).__get__ for n in _PROPERTIES), *(getattr(torch.Tensor, n) for n in _METHODS))
)
"""Calls that read no values of a tensor. The exporter makes dozens of them for every operation."""


class UsersCalls(TorchFunctionMode):
    """Sees every call of torch that the forward makes."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.known = KnownValues(source)
        self.drawn = DrawnValues(self.known.knows)
        self.checks = DataChecks()
        self.finite = FiniteValues()
        self.outside: list[torch.Tensor] = []
        """Tensors with `requires_grad` that no module registers. The tracer has no fake tensors for them."""

    def notes(self) -> tuple[str, ...]:
        """One sentence for each decision that was made for the forward while it was traced."""
        return (*self.known.notes(), *self.checks.notes(), *self.finite.notes())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer, refuse or run the call. It is marked if it runs without gradient."""
        kwargs = kwargs or {}
        # Torch traces this method too where it traces on its own (flex attention, torch.cond), and must end here:
        # torch 2.8 cannot trace what comes next.
        if torch.compiler.is_dynamo_compiling() or func in _READ_NO_VALUES:
            return func(*args, **kwargs)
        if func == _DATA:
            func, args = torch.Tensor.detach, args[:1]
        if func == _SET_DATA:
            return _write_data(*args)
        if func == torch.Tensor.random_ and (bounds := _bounds(*args, **kwargs)):
            # The operation for two bounds is named `from`, which the exporter's code cannot say. This draws the same.
            generator = {"generator": kwargs.get("generator")}
            drawn = self.__torch_function__(func, types, (args[0], bounds[1] - bounds[0]), generator)
            return self.__torch_function__(torch.Tensor.add_, types, (drawn, bounds[0]))
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
        args, kwargs = (
            tuple(map(_without_default_generator, args)),
            {key: _without_default_generator(value) for key, value in kwargs.items()},
        )
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
            with traceback.preserve_node_meta():  # which restores the dictionary afterwards
                marks = traceback.get_current_meta()
                marks["custom"] = {**marks.get("custom", {}), WITHOUT_GRADIENT: True}
                result = func(*args, **kwargs)
        self.known.computed(func, args, kwargs, result)
        self.drawn.computed(func, args, kwargs, result)
        self.finite.computed(func, args, result)
        return result


def _write_data(target: torch.Tensor, value: torch.Tensor) -> None:
    """Do `weight.data = value` as a write in place, which the exporter can record."""
    if (target.shape, target.dtype, target.device) != (value.shape, value.dtype, value.device):
        raise NotTraceable(
            f"a tensor's data is replaced here: {value.dtype} of shape {tuple(value.shape)} comes in place of "
            f"{target.dtype} of shape {tuple(target.shape)}; set it before the model is converted"
        )
    target.detach().copy_(value.detach())


def _bounds(target: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any] | None:
    """Both bounds of `x.random_(low, high)`; None if it has one or none."""
    given = dict(zip(("from", "to"), args, strict=False)) | kwargs
    return None if given.get("to") is None or given.get("from") is None else (given["from"], given["to"])


def _without_default_generator(argument: Any) -> Any:
    """The argument, with None for torch's default generator. Any other generator is refused."""
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
            return before[module, name](*args, **kwargs)  # torch saves and restores the state around torch.cond
        raise NotTraceable(
            "torch's random generator is seeded or set here, which a graph does not hold; keep the numbers in a buffer "
            "or draw them without a seed"
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
    """Let encoders run as with gradients. torch's fused path of eval mode would return zeros at padded places."""
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
def _seeing_the_forward(calls: UsersCalls, source: nn.Module, remade: Container[str]) -> Iterator[None]:
    """Let `calls` see the forward and its hooks. Before them the exporter reads dozens of properties a parameter."""
    if isinstance(source, fx.GraphModule):  # the exporter runs its operations itself
        with calls:
            yield
        return
    before = _ModuleStackTracer.call_module

    def call_module(self: Any, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if module is not source:
            return before(self, module, forward, args, kwargs)
        with mode_below(calls), assignments_are_writes(source, remade):
            return before(self, module, forward, args, kwargs)

    _ModuleStackTracer.call_module = call_module  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        _ModuleStackTracer.call_module = before  # type: ignore[method-assign]


@contextlib.contextmanager
def tracing(source: nn.Module, remade: Container[str] = ()) -> Iterator[UsersCalls]:
    """Put torch into the state in which a forward of `source` is traced, and restore it afterwards.

    Args:
        source: the module.
        remade: the names of its buffers that every call makes.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_autocast())
        stack.enter_context(torch.enable_grad())
        for context in (
            ordinary_paths,
            _unchecked_distributions,
            modules_as_they_are,
            _unseeded,
            without_the_exporters_own,
            no_refused_hooks,
            short_stacks,
            code_when_run,
        ):
            stack.enter_context(context())
        calls = UsersCalls(source)
        stack.enter_context(_seeing_the_forward(calls, source, remade))
        yield calls
