"""Feedforward blocks, and the operations in them that follow the source's training flags."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ffebm_compiler.runtime.feedforward.block_graph import BlockGraph
from ffebm_compiler.runtime.feedforward.synchronised import group_of, synchronised_batch_norm
from ffebm_compiler.runtime.feedforward.zeroth_order import Perturbed, ZerothOrder

__all__ = [
    "Arithmetic",
    "FeedforwardBlock",
    "ReboundAttention",
    "ReboundBatchNorm",
    "ReboundDropout",
    "ReboundInstanceNorm",
    "ReboundOperation",
]


class Arithmetic(Protocol):
    """Another arithmetic than that of the operands' dtype, such as a `Quantiser`."""

    def run(self, part: fx.GraphModule, operands: tuple[Any, ...]) -> Any: ...


class FeedforwardBlock(BlockGraph):
    """A digital part: a graph of ordinary operations, differentiated by autograd or by perturbation.

    Parameters and buffers are operands, not attributes, since the hybrid owns them.
    """

    zeroth_order: ZerothOrder | None = None
    """How its gradient is estimated; None for backpropagation."""
    place: int = 0
    """Which part of its network it is: parts have directions of their own."""
    calls: int = 0
    """How often it was called for a perturbed gradient: every call has directions of its own."""
    arithmetic: Arithmetic | None = None
    """What computes the operations; None for the dtype of the operands."""
    enabled: bool = True
    """Whether `arithmetic` is in use. Without it the part computes what the source computes."""

    def __call__(self, *operands: Any) -> Any:
        """The values of the part."""
        settings = self.zeroth_order
        wanted = any(isinstance(value, Tensor) and value.requires_grad for value in operands)
        if settings is None or not wanted or not torch.is_grad_enabled():
            return self.run(*operands)
        self.calls += 1
        return Perturbed.apply(self, settings, self.calls - 1, *operands)  # type: ignore[no-untyped-call]

    def run(self, *operands: Any) -> Any:
        """The values of the part, by the graph."""
        if self.arithmetic is None or not self.enabled:
            return super().__call__(*operands)
        return self.arithmetic.run(self, operands)

    @contextmanager
    def frozen_statistics(self) -> Iterator[None]:
        """Evaluate without counting batches or updating running statistics."""
        norms = [m for m in self.modules() if isinstance(m, ReboundBatchNorm | ReboundInstanceNorm) and not m.frozen]
        try:
            for norm in norms:
                norm.frozen = True
            yield
        finally:
            for norm in norms:
                norm.frozen = False

    def __deepcopy__(self, memo: dict[int, Any]) -> FeedforwardBlock:
        """With its arithmetic and how its gradient is estimated, which `fx.GraphModule` leaves behind."""
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, FeedforwardBlock)
        twin.zeroth_order, twin.place, twin.calls = self.zeroth_order, self.place, self.calls
        twin.arithmetic = copy.deepcopy(self.arithmetic, memo)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """With its arithmetic and how its gradient is estimated."""
        make, arguments = super().__reduce__()
        return _with_settings, (make, arguments, self.zeroth_order, self.place, self.calls, self.arithmetic)


def _with_settings(
    make: Callable[..., FeedforwardBlock],
    arguments: tuple[Any, ...],
    settings: ZerothOrder | None,
    place: int,
    calls: int,
    arithmetic: Arithmetic | None,
) -> FeedforwardBlock:
    part = make(*arguments)
    part.zeroth_order, part.place, part.calls = settings, place, calls
    part.arithmetic = arithmetic
    return part


class ReboundOperation(nn.Module):
    """An operation that reads its flags from a module that it does not own.

    The reference is no registered submodule, so that the hybrid's `state_dict`
    holds each tensor once, under the source's name. `copy.deepcopy` copies the two together.
    """

    operation: ClassVar[str] = ""
    """Name of the operation in plans and reports."""
    follows: frozenset[str] = frozenset()
    """Attributes of the owner, beside its flag, that are read at every call."""
    _is_impure = True  # fx must not remove it as dead code, since it may draw random numbers or count batches

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.__dict__["_owner"] = owner

    @property
    def owner(self) -> nn.Module:
        """The module of the source whose flags it reads."""
        owner: nn.Module = self.__dict__["_owner"]
        return owner

    @property
    def active(self) -> bool:
        """Whether the owner is in train mode."""
        return self.owner.training

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """If the owner is `old`, read the flags of `new` instead: of the hybrid for the source's, of a successor."""
        if self.__dict__["_owner"] is old:
            self.__dict__["_owner"] = new


class _ReboundNorm(ReboundOperation):
    """A norm with running statistics, with the owner's momentum."""

    frozen = False
    """Whether the running statistics stay as they are: the batch's own are then used without a record."""

    def __init__(self, owner: nn.Module, always: bool, momentum: float, eps: float) -> None:
        super().__init__(owner)
        self.always = always
        """Whether the source normalises by the input's own statistics in eval mode too (no running ones)."""
        self.captured = momentum
        self.eps = eps
        if isinstance(owner, _NORMS) and owner.momentum in (momentum, None):
            self.follows = frozenset({"momentum"})

    @property
    def momentum(self) -> float:
        """The owner's present momentum; the captured one of a functional call, and where the owner has none."""
        value = getattr(self.owner, "momentum", None) if self.follows else None
        return self.captured if value is None else float(value)


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class ReboundBatchNorm(_ReboundNorm):
    """Batch norm, y = γ (x − m)/√(v + ε) + β, with the owner's flag, momentum and counter.

    In train mode m and v are those of the batch, and they update the running statistics, as in
    `torch.nn.modules.batchnorm._BatchNorm.forward`. The batch of a `SyncBatchNorm` is that of all processes.
    """

    operation = "batch_norm"

    def __init__(self, owner: nn.Module, always: bool, momentum: float, eps: float, counts: bool = True) -> None:
        super().__init__(owner, always, momentum, eps)
        self.counts = counts
        """Whether it counts the owner's batches, because the graph has no operation that does."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
    ) -> Tensor:
        """Normalise `x`, and update `mean` and `variance` in place if the owner would."""
        training = self.always or self.active or mean is None
        update = self.active and mean is not None and not self.always and not self.frozen
        momentum = self.momentum
        counter = getattr(self.owner, "num_batches_tracked", None) if self.counts else None
        if update and isinstance(counter, Tensor):
            counter.add_(1)
            if getattr(self.owner, "momentum", momentum) is None:
                momentum = 1.0 / float(counter)
        group = group_of(self.owner) if self.active else None
        if group is not None:
            statistics = (mean, variance) if update and mean is not None and variance is not None else None
            return synchronised_batch_norm(x, weight, bias, statistics, momentum, self.eps, group)
        tracked = update or not training
        return F.batch_norm(
            x,
            mean if tracked else None,
            variance if tracked else None,
            weight,
            bias,
            training,
            momentum,
            self.eps,
        )


class ReboundInstanceNorm(_ReboundNorm):
    """Instance norm with running statistics, with the owner's flag and momentum."""

    operation = "instance_norm"

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
    ) -> Tensor:
        """Normalise `x` by its own statistics in train mode, by the running ones in eval mode."""
        use_input = self.always or self.active
        if use_input and self.frozen:
            mean = variance = None
        return F.instance_norm(x, mean, variance, weight, bias, use_input, self.momentum, self.eps)


class ReboundDropout(ReboundOperation):
    """Dropout, y = x · m/(1 − p) with m ~ Bernoulli(1 − p), in the owner's train mode."""

    operation = "dropout"

    def __init__(self, owner: nn.Module, kind: str, rate: float) -> None:
        super().__init__(owner)
        self.kind = kind
        """Name of the torch function."""
        self.captured = rate
        if isinstance(owner, _DROPOUTS):
            self.follows = frozenset({"p"})

    @property
    def rate(self) -> float:
        """The owner's present rate, or the captured one of a functional call."""
        return float(getattr(self.owner, "p", self.captured) if self.follows else self.captured)

    @property
    def drawing(self) -> bool:
        """Whether anything is dropped in the owner's present mode."""
        return self.active and self.rate > 0

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself in eval mode."""
        if not self.drawing:
            return x
        dropped: Tensor = getattr(torch, self.kind)(x, self.rate, True)
        return dropped

    def mask(self, x: Tensor) -> Tensor | None:
        """The factor that dropout multiplies `x` by, drawn once; None if it does nothing."""
        return self.forward(torch.ones_like(x)) if self.drawing else None


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class ReboundAttention(ReboundOperation):
    """Scaled dot-product attention with the source's dropout rate in the owner's train mode."""

    operation = "scaled_dot_product_attention"

    def __init__(self, owner: nn.Module, rate: float, settings: dict[str, Any], eval_rate: float = 0.0) -> None:
        super().__init__(owner)
        self.rate = rate
        self.eval_rate = eval_rate
        self.settings = settings

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(q kᵀ/√d + mask) v."""
        rate = self.rate if self.active else self.eval_rate
        attended: Tensor = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=rate, **self.settings
        )
        return attended
