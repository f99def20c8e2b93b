"""Known values: a branch on a buffer or a constant is decided by its value at conversion.

`if self.observer_enabled[0] == 1:` asks for the value of a tensor, which does not exist while the forward is traced.
If the tensor was computed from small buffers alone, the values of the buffers give the answer. The branch is then a
setting of the model, and a note says which side was kept. A buffer that the forward branches
on and also writes (a flag that the first call sets) is no setting and is refused. A tensor that the
forward makes of Python numbers, such as `torch.tensor(sizes)`, has the same value at every call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ffebm_compiler.passes.explain_capture import NotTraceable
from ffebm_compiler.passes.source_line import running_line

__all__ = ["KnownValues"]

_LARGEST = 256
"""How many values a tensor may have to count as a setting."""
_READS = (
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist, torch.equal,
    torch.is_nonzero, torch.allclose,
)  # fmt: skip
_FACTORIES = (
    torch.tensor, torch.as_tensor, torch.arange, torch.zeros, torch.ones, torch.full, torch.linspace, torch.eye,
)  # fmt: skip

_SIZED = frozenset((
    "pad", "view", "reshape", "expand", "repeat", "tile", "zeros", "ones", "full", "empty", "new_zeros", "new_ones",
    "new_full", "new_empty", "interpolate",
))  # fmt: skip
"""Functions that take a list of sizes, in which each size may be a tensor."""


@dataclass(frozen=True)
class _Known:
    tensor: Tensor
    """The traced tensor, kept so that its id stays its own."""
    value: Tensor
    names: frozenset[str]
    """The buffers that it was computed from."""
    version: int = 0
    """The traced tensor's version (its number of writes) when its value was noted."""


class _Draws(Exception):
    """A call draws random numbers."""


class KnownValues:
    """Follows what a traced forward computes from small buffers and Python numbers alone."""

    def __init__(self, source: nn.Module) -> None:
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        self._values: dict[str, Tensor] = {}
        for path, module in source.named_modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and _is_small(buffer) and not buffer.is_meta:
                    name = f"{path}.{leaf}" if path else leaf
                    self._owners[name], self._values[name] = (module, leaf), buffer.detach().clone()
        self._known: dict[int, _Known] = {}
        self._noted_buffer: Tensor | None = None
        self._written: set[str] = set()
        self._rewritten: _Known | None = None
        """The constant that the running call writes to, if it writes only known values."""
        self.reads: dict[str, str] = {}
        """Buffer -> the line that first asked for its value."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Whether a call asks for a known value, and that value. Also notes writes to buffers and constants."""
        self._note_new_buffers()
        known = [self._value_of(tensor) for tensor in _tensors(args, kwargs)]
        if _writes(func, kwargs):
            entry = self._known.get(id(next(_tensors(args, {}), None)))
            if entry is not None and entry.names:
                del self._known[id(entry.tensor)]
                self._written |= entry.names
            constant = all(known) and not any(known_one.names for known_one in known if known_one is not None)
            self._rewritten = entry if constant else None
            return False, None
        if func in _READS and known and all(known):
            self._note_decision(known)
            return True, self._compute(func, args, kwargs)
        return False, None

    def sizes(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a call, with a number for every known tensor in a list of sizes."""
        if getattr(func, "__name__", "") not in _SIZED:
            return args
        own = args[:1] if args and isinstance(args[0], Tensor) else ()
        return (
            *own,
            *(type(a)(map(self._size, a)) if type(a) in (list, tuple) else self._size(a) for a in args[len(own) :]),
        )

    def _size(self, size: Any) -> Any:
        known = self._value_of(size) if isinstance(size, Tensor) else None
        if known is None or known.value.dim() or known.value.is_floating_point():
            return size
        self._note_decision([known])
        return int(known.value)

    def _note_decision(self, known: list[_Known | None]) -> None:
        """Note that the trace depends on these values, and the line that asked for them."""
        line = running_line()
        for name in frozenset().union(*(entry.names for entry in known if entry is not None)):
            self.reads.setdefault(name, line)

    def computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note the value of a result that was computed from known tensors or Python numbers alone."""
        if _writes(func, kwargs):
            self._repeat_write(func, args, kwargs)
            return
        known = [self._value_of(tensor) for tensor in _tensors(args, kwargs)]
        if not all(known) or (not known and func not in _FACTORIES) or _has_symbolic_sizes(args, kwargs):
            return
        try:
            value = self._compute(func, args, kwargs)
        except Exception:  # the call draws random numbers, or not all of its arguments are known
            return
        names = frozenset().union(*(entry.names for entry in known if entry is not None))
        several = isinstance(result, list | tuple) and isinstance(value, list | tuple)
        for traced, real in zip(result, value, strict=True) if several else ((result, value),):
            if isinstance(traced, Tensor) and isinstance(real, Tensor) and _is_small(real):
                self._known[id(traced)] = _Known(traced, real, names, traced._version)
                if not names:
                    _tell_sizes(traced, real)

    def _repeat_write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Repeat the forward's write to a constant on its known value, so that it and its views stay known."""
        target, self._rewritten = self._rewritten, None
        if target is None or _has_symbolic_sizes(args, kwargs):
            return
        with contextlib.suppress(Exception):
            self._compute(func, args, kwargs)
            memory = target.value.untyped_storage().data_ptr()
            for key, known in self._known.items():
                if known.value.untyped_storage().data_ptr() == memory:
                    self._known[key] = replace(known, version=known.tensor._version)

    def knows(self, tensor: Tensor) -> bool:
        """Whether the value of a traced tensor is known."""
        return self._value_of(tensor) is not None

    def check(self) -> None:
        """Refuse a forward that branches on a buffer and writes it.

        Raises:
            NotTraceable: such a buffer was found; names it and the line.
        """
        for name, line in self.reads.items():
            if name in self._written:
                raise NotTraceable(
                    f"the forward branches on buffer {name!r}{line} and writes it, so that which branch runs depends "
                    "on earlier calls; run the model until the buffer stays as it is, and branch on a Python bool"
                )

    def notes(self) -> Iterator[str]:
        """Notes for the plan: one sentence for each buffer that decided a branch."""
        for name, line in self.reads.items():
            yield (
                f"the forward branches on buffer {name!r}{line}: the hybrid keeps the branch for its value at "
                f"conversion, {self._values[name].tolist()}"
            )

    def _note_new_buffers(self) -> None:
        """Note the buffers' values again if the exporter has put other tensors in their place."""
        if not self._owners:
            return
        module, leaf = next(iter(self._owners.values()))
        probe = module._buffers.get(leaf)
        if probe is None or probe is self._noted_buffer:
            return
        self._noted_buffer = probe
        for name, (module, leaf) in self._owners.items():
            buffer = module._buffers.get(leaf)
            if buffer is not None:
                self._known[id(buffer)] = _Known(buffer, self._values[name], frozenset((name,)))

    def _value_of(self, tensor: Tensor) -> _Known | None:
        """The known value of a tensor; None if it has been written since."""
        known = self._known.get(id(tensor))
        if known is None or known.names or tensor._version == known.version:
            return known
        return None

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def real(leaf: Any) -> Any:
            return self._known[id(leaf)].value if isinstance(leaf, Tensor) else leaf

        real_args, real_kwargs = pytree.tree_map(real, (args, kwargs))
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            drawn = torch.get_rng_state()
            value = func(*real_args, **real_kwargs)
            if not torch.equal(torch.get_rng_state(), drawn):
                torch.set_rng_state(drawn)
                raise _Draws
        return value


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= _LARGEST


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from (item for item in argument if isinstance(item, Tensor))


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    special = name == "__setitem__" or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__"))
    return special or "out" in kwargs or (name.endswith("_") and not name.endswith("__"))


def _has_symbolic_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether sizes of the traced inputs are among the arguments."""
    symbols = torch.SymInt | torch.SymFloat | torch.SymBool
    return any(isinstance(leaf, symbols) for leaf in pytree.tree_leaves((args, kwargs)))


def _tell_sizes(traced: Tensor, value: Tensor) -> None:
    """Tell the exporter sizes that a constant's values determine (`nonzero`, `repeat_interleave`)."""
    for size, length in zip(traced.shape, value.shape, strict=True):
        if isinstance(size, torch.SymInt):
            torch._check(size == length)
