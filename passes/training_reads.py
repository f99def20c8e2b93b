"""Training reads: find the modules whose forward may compute something else in train mode.

While the model is traced, every read and write of a module's `training` flag is noted, with the code that reads it. A
read by torch's own dropout or batch norm needs no second capture, since `rebind` follows their flags. A module
whose own `train` sets other attributes, as one that merges adapters does, counts too.

Code of one module may read the flag of another one. The captures, with all modules in one mode, do not show which of
several flags decides. So operations follow the one flag that the code of their module reads, and where it reads
several, these modules must be in one mode.

Promise: if `asks` is empty, the model computes the same in both modes, except for operations
that `rebind` handles. `nn.Module` is left as it was found.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ffebm_compiler.passes.held import own_attributes

__all__ = ["TrainingReads", "is_rebound", "set_by_mode", "training_reads"]

_REBOUND = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    _BatchNorm,
    _InstanceNorm,
)
_NEED_NO_CAPTURE: dict[CodeType, str] = {
    **{kind.forward.__code__: "" for kind in (*_REBOUND, nn.SyncBatchNorm)},
    _InstanceNorm._apply_instance_norm.__code__: "",
    # These read the flag to choose a fused path, which tracing turns off, and to hand it to dropout.
    nn.MultiheadAttention.forward.__code__: "dropout",
    nn.TransformerEncoderLayer.forward.__code__: "",
    nn.TransformerEncoder.forward.__code__: "",
    nn.RNN.forward.__code__: "dropout",
    nn.LSTM.forward.__code__: "dropout",
    nn.GRU.forward.__code__: "dropout",
}
"""Code whose reads need no second capture -> the attribute that must be zero for that, or an empty text."""


def is_rebound(module: nn.Module) -> bool:
    """Whether a module's whole forward is one operation that `rebind` binds to the module's flag."""
    code = getattr(type(module).forward, "__code__", None)
    return any(code is kind.forward.__code__ for kind in (*_REBOUND, nn.SyncBatchNorm))


@dataclass
class TrainingReads:
    """The modules whose flag was read or written."""

    asks: set[nn.Module] = field(default_factory=set)
    """Modules whose flag was read by code that may do anything with it."""

    readers: dict[nn.Module, set[nn.Module]] = field(default_factory=dict)
    """Module -> the modules whose flags its code reads, where the forward does not set them."""
    written: set[nn.Module] = field(default_factory=set)

    def note(self, module: nn.Module, frame: FrameType) -> None:
        """Note that a function reads a module's flag."""
        rate = _NEED_NO_CAPTURE.get(frame.f_code)
        if rate is None or (rate and bool(getattr(module, rate))):
            self.asks.add(module)
            self.readers.setdefault(_running(frame) or module, set()).add(module)

    def others(self) -> dict[nn.Module, set[nn.Module]]:
        """Modules whose code reads the flags of other modules -> all modules whose flags it reads."""
        kept = {reader: read - self.written for reader, read in self.readers.items()}
        return {reader: read for reader, read in kept.items() if read - {reader}}


def _running(frame: FrameType | None) -> nn.Module | None:
    """The module whose method runs."""
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",) and isinstance(frame.f_locals.get("self"), nn.Module):
            running: nn.Module = frame.f_locals["self"]
            return running
        frame = frame.f_back
    return None


@contextmanager
def training_reads() -> Iterator[TrainingReads]:
    """Note every read of a module's `training` while the context is open."""
    reads = TrainingReads()

    def read(module: nn.Module) -> bool:
        flag: bool = module.__dict__["training"]
        reads.note(module, sys._getframe(1))
        return flag

    def write(module: nn.Module, flag: bool) -> None:
        module.__dict__["training"] = flag
        reads.written.add(module)
        reads.asks.add(module)  # a flag that the forward sets itself (`self.teacher.eval()`) is not the caller's

    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield reads
    finally:
        del nn.Module.training


def set_by_mode(source: nn.Module) -> set[nn.Module]:
    """The modules that have other attributes in train mode than in eval mode, in which they are left."""
    source.train()
    training = {module: {**own_attributes(module), **module._modules} for module in source.modules()}
    source.eval()
    found = set()
    for module in source.modules():
        before, now = training.get(module, {}), {**own_attributes(module), **module._modules}
        if before.keys() != now.keys() or not all(_alike(before[name], now[name]) for name in now):
            found.add(module)
    return found


def _alike(one: object, other: object) -> bool:
    plain = (bool, int, float, str)
    return one is other or (isinstance(one, plain) and type(one) is type(other) and one == other)
