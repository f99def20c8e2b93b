"""`Quantiser`: runs one digital part with quantised weights and values.

A value x is held as an integer q of b bits, x̂ = s (q − z), and a weight with one step for each channel:

    s = (high − low)/(2^b − 1) ,  z = round(−2^(b−1) − low/s) ,  q = clip(round(x/s) + z, −2^(b−1), 2^(b−1) − 1)
    s_c = max|W_c|/(2^(b−1) − 1) ,  q = round(W_c/s_c)

These are the int8 of onnxruntime's static quantisation for b = 8, and torch's own fake-quantise operators compute them.
`arithmetic.kind_of` says which operations read and write quantised values. Accumulators are wide: the result of a
product or a sum that only an activation such as ReLU or softmax reads is quantised behind the activation. Range
[low, high] of a value, which always holds 0, comes from data (`observing`). Steps of weights come from the weights.

A derivative is 1 inside the range and 0 outside of it (straight-through estimator; Bengio et al. 2013, arXiv
1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.feedforward.arithmetic import Kind, Product, kind_of, product_of
from ffebm_compiler.runtime.feedforward.quantised_backprop import (
    QuantisedBackprop,
    largest_step,
    quantised_error,
    quantised_weight_gradient,
    rescaled_gradient,
    symmetric,
)

__all__ = ["Quantiser", "Range"]

Range = tuple[float, float]
_MASK = 1e30
"""A larger value is no number that a part computes with, but the −∞ of a mask."""


class Quantiser:
    """The quantised arithmetic of one digital part.

    Args:
        name: of the part, for messages.
        bits: of weights and values.
        weights: names of the part's operands that depend on no input of the network.
    """

    def __init__(self, name: str, bits: int, weights: frozenset[str]) -> None:
        self.name, self.bits, self.weights = name, bits, weights
        self.ranges: dict[str, Range | None] = {}
        """Name of a value -> its range; None for a mask or an index, which stays as it is."""
        self.observing = False
        """Whether ranges grow with the data, which then come through unchanged."""
        self.backprop: QuantisedBackprop | None = None
        """How errors and weight gradients are quantised; None leaves them as they are."""

    def run(self, part: fx.GraphModule, operands: tuple[Any, ...]) -> Any:
        """The outputs of the part.

        Raises:
            InputError: the range of a value is not known.
        """
        return _Run(part, self).run(*operands)

    def value(self, name: str, value: Tensor) -> Tensor:
        """A value in `bits` bits.

        Raises:
            InputError: its range is not known.
        """
        if not value.numel():
            return value
        if self.observing:
            self._observe(name, value)
            return value
        if name not in self.ranges:
            what = (
                "it has never been calibrated"
                if not self.ranges
                else f"no data of that calibration came to its operation {name!r}"
            )
            raise InputError(
                f"{self.name} computes with {self.bits} bits, and {what}: call hybrid.calibrate_digital(batches) with "
                "representative inputs"
            )
        limits = self.ranges[name]
        if limits is None:
            return value
        step, zero = self.levels(limits)
        half = 2 ** (self.bits - 1)
        found = torch.fake_quantize_per_tensor_affine(value, step, zero, -half, half - 1)
        return found if self.backprop is None or not found.requires_grad else quantised_error(found, self.backprop)

    def levels(self, limits: Range) -> tuple[float, int]:
        """(step, integer of the value 0) for a range. The step of a value that is always 0 is 1."""
        low, high = limits
        step = (high - low) / (2**self.bits - 1)
        if step < torch.finfo(torch.float32).tiny:
            return 1.0, 0
        return step, round(-(2 ** (self.bits - 1)) - low / step)

    def _observe(self, name: str, value: Tensor) -> None:
        low, high = (float(end) for end in value.detach().aminmax())
        if not -_MASK < low <= high < _MASK:
            self.ranges[name] = None
            return
        known = self.ranges.get(name, (0.0, 0.0))
        if known is not None:
            self.ranges[name] = min(known[0], low), max(known[1], high)


class _Run(fx.Interpreter):
    """One evaluation of a part."""

    def __init__(self, part: fx.GraphModule, quantiser: Quantiser) -> None:
        super().__init__(part)
        self.extra_traceback = False
        self.part, self.quantiser = part, quantiser
        self.kinds: dict[fx.Node, Kind] = {node: kind_of(part, node) for node in part.graph.nodes}
        self.held: set[fx.Node] = set()
        """Nodes whose values are quantised."""
        self.read: dict[fx.Node, Tensor] = {}
        """Node whose value is wide -> the quantised value that operations read."""
        self.whole: set[fx.Node] = set()
        """Nodes whose values are integers or booleans."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the part."""
        found = super().run(*args, **kwargs)
        if self.quantiser.observing:
            self._exempt_indices()
        return found

    def _exempt_indices(self) -> None:
        """Leave values as they are that only integers are made of, such as positions counted in floating point."""
        indices = set(self.whole)
        for node in reversed(self.part.graph.nodes):
            if node not in indices and node.users and all(user in indices for user in node.users):
                indices.add(node)
        for node in indices:
            if node.name in self.quantiser.ranges:
                self.quantiser.ranges[node.name] = None

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, quantised if its kind says so."""
        found = self._run_node(n)
        if isinstance(found, Tensor) and not found.is_floating_point():
            self.whole.add(n)
        return found

    def _run_node(self, n: fx.Node) -> Any:
        kind = self.kinds[n]
        if n.op not in ("call_function", "call_module") or kind == "wide":
            return super().run_node(n)
        if kind == "move":
            sources = [each for each in n.all_input_nodes if self._moving(each)]
            if sources and all(each in self.held for each in sources):
                self.held.add(n)
            return super().run_node(n)
        operands = {each: self.env[each] for each in n.all_input_nodes}
        if kind != "function":
            operands.update({each: self._quantised(each) for each in operands if self._moving(each)})
        product = product_of(n)
        if product is not None:
            self._with_weights(n, product, operands)
        args, kwargs = fx.map_arg((n.args, n.kwargs), operands.__getitem__)
        run: Callable[..., Any] = getattr(self, n.op)
        found = run(n.target, args, kwargs)
        readers = list(n.users)
        joined = kind != "function" and len(readers) == 1 and self.kinds[readers[0]] == "function"
        if joined or not isinstance(found, Tensor) or not found.is_floating_point() or self._is_lookup(product):
            return found
        self.held.add(n)
        return self.quantiser.value(n.name, found)

    def _is_lookup(self, product: Product | None) -> bool:
        """Whether the result is rows of a table, each with a step of its own."""
        return product is not None and product.first is None

    def _is_weight(self, node: fx.Node) -> bool:
        return node.op == "get_attr" or (node.op == "placeholder" and node.name in self.quantiser.weights)

    def _moving(self, node: fx.Node) -> bool:
        """Whether a node is a floating-point value that depends on the inputs."""
        value = self.env.get(node)
        return isinstance(value, Tensor) and value.is_floating_point() and not self._is_weight(node)

    def _quantised(self, node: fx.Node) -> Tensor:
        value = self.env[node]
        assert isinstance(value, Tensor)
        if node in self.held:
            return value
        if node not in self.read:
            self.read[node] = self.quantiser.value(node.name, value)
        return self.read[node]

    def _with_weights(self, node: fx.Node, product: Product, operands: dict[fx.Node, Any]) -> None:
        """Put quantised weights in the place of those that a product reads."""
        places = ((product.first, product.first_axis), (product.second, product.second_axis))
        steps: list[Tensor] = []
        values: list[fx.Node] = []
        for place, axis in places:
            operand = None if place is None else _argument(node, place)
            if operand is None:
                continue
            if not self._is_weight(operand):
                values.append(operand)
                continue
            weight = self.env[operand]
            if not isinstance(weight, Tensor) or not weight.is_floating_point() or not weight.numel():
                continue
            operands[operand], step = self._weight(weight, axis if weight.dim() > 1 else None)
            steps.append(step)
        bias = None if product.bias is None else _argument(node, product.bias, "bias")
        if bias is not None and self._is_weight(bias) and len(steps) == 1 and len(values) == 1:
            operands[bias] = self._bias(bias, steps[0], values[0])

    def _weight(self, weight: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
        """A weight in `bits` bits, and its steps."""
        quantiser = self.quantiser
        if quantiser.observing:
            return weight, torch.ones((), device="cpu")
        step = largest_step(weight, quantiser.bits, axis)
        if quantiser.backprop is not None and weight.requires_grad:
            weight = quantised_weight_gradient(weight, step, axis, quantiser.backprop)
        return symmetric(weight, step, quantiser.bits, axis), step

    def _bias(self, bias: fx.Node, step: Tensor, value: fx.Node) -> Any:
        """The bias of a product, with the gradient of an integer of the product's step where it is not scaled."""
        found, settings = self.env[bias], self.quantiser.backprop
        limits = self.quantiser.ranges.get(self._origin(value))
        if settings is None or settings.scaling or self.quantiser.observing or limits is None:
            return found
        if not isinstance(found, Tensor) or not found.requires_grad or step.numel() not in (1, found.numel()):
            return found
        factor = (step * self.quantiser.levels(limits)[0]) ** 2
        return rescaled_gradient(found, factor.reshape(found.shape) if factor.numel() > 1 else factor)

    def _origin(self, node: fx.Node) -> str:
        """Name of the value whose range a value has: that from which it was moved."""
        while self.kinds[node] == "move" and node.name not in self.quantiser.ranges and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node.name


def _argument(node: fx.Node, place: int, name: str = "") -> fx.Node | None:
    found = node.args[place] if len(node.args) > place else node.kwargs.get(name)
    return found if isinstance(found, fx.Node) else None
