"""Contractions: every product of an activation with a weight gets one form, however it was written.

The spellings are `einsum`, `bmm`, `baddbmm`, batched `matmul`, `tensordot`, `bilinear`, `mv`, `addmv`, `inner`,
`multi_dot`, a scaled `addmm`, and a `linear` with weight and input exchanged. If one operand depends
on no input of the network, it is a weight, and the product becomes a *contraction*
(`runtime/program/contraction.py`), or a plain `linear` where that says the same. Several weights in one operation
are applied one after the other, each as a layer of its own. A product of activations that remains
is one `einsum`. Layers that `dialect` knows already are left as they are, and so are products of
activations alone or parameters alone.

Promise: the graph computes what it computed, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from ffebm_compiler.ir import Pass, Program
from ffebm_compiler.passes.dead_code import erase_dead
from ffebm_compiler.passes.dialect import all_arguments
from ffebm_compiler.passes.products import Products, Term, shape_of

__all__ = ["contractions"]

aten = torch.ops.aten


@Pass
def contractions(program: Program) -> Program:
    """Rewrite every product of an activation with a weight that `dialect` does not know as a layer."""
    products = Products(program)
    for node in list(program.graph.nodes):
        rewrite = _SPELLINGS.get(node.target)
        if rewrite is None or not node.meta["val"].is_floating_point():
            continue
        with program.graph.inserting_before(node):
            products.like = node
            result = rewrite(products, node, *all_arguments(node))
        if result is not None:
            node.replace_all_uses_with(result)
            program.graph.erase_node(node)
    erase_dead(program)  # copies and reshapes that only a rewritten product read
    return program


def _name_dimensions(node: fx.Node, names: Sequence[object]) -> tuple[object, ...]:
    """Names for all dimensions of a node: the given ones for the last, numbers from the right for those before."""
    before = len(shape_of(node)) - len(names)
    return (*(-1 - k for k in reversed(range(before))), *names)


def _einsum(at: Products, node: fx.Node, equation: object, operands: object, path: object = None) -> fx.Node | None:
    assert isinstance(operands, list | tuple)
    if not at.mixed(*operands):
        return None
    left, _, right = str(equation).replace(" ", "").partition("->")
    subscripts = left.split(",")
    terms: list[Term] = []
    for operand, text in zip(operands, subscripts, strict=True):
        before, dots, after = text.partition("...")
        extra = len(shape_of(operand)) - len(before) - len(after) if dots else 0
        terms.append((operand, (*before, *(-1 - k for k in reversed(range(extra))), *after)))
    numbered = sorted({name for _, names in terms for name in names if isinstance(name, int)})
    if "->" in str(equation):
        before, dots, after = right.partition("...")
        result: tuple[object, ...] = (*before, *(numbered if dots else ()), *after)
    else:
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        result = (*numbered, *once)
    return at.product(terms, result)


def _matmul(at: Products, node: fx.Node, first: fx.Node, second: fx.Node) -> fx.Node | None:
    if not at.mixed(first, second):
        return None
    if second in at.static and len(shape_of(second)) == 2 and len(shape_of(first)) > 1:
        return None  # a layer as it is
    a = _name_dimensions(first, ("k",) if len(shape_of(first)) == 1 else ("m", "k"))
    b = _name_dimensions(second, ("k",) if len(shape_of(second)) == 1 else ("k", "n"))
    numbered = sorted({name for name in (*a, *b) if isinstance(name, int)})
    return at.product([(first, a), (second, b)], (*numbered, *(name for name in "mn" if name in (*a, *b))))


def _add_scaled(at: Products, product: fx.Node, addend: object, factor: object = 1) -> fx.Node:
    """The product plus factor · addend, or the product alone without an addend."""
    if not isinstance(addend, fx.Node) or factor == 0:
        return product
    scaled = addend if factor == 1 else at.emit(aten.mul.Tensor, addend, factor)
    return at.emit(aten.add.Tensor, product, scaled)


def _addmm(
    at: Products, node: fx.Node, addend: fx.Node, first: fx.Node, second: fx.Node, beta: object = 1, alpha: object = 1
) -> fx.Node | None:
    """beta·addend + alpha·(first @ second), for matrices, batches of matrices, or a matrix and a vector."""
    if not at.mixed(first, second):
        return None
    if node.target is aten.addmm.default and second in at.static and (beta, alpha) == (1, 1) and addend in at.static:
        return None  # a layer as it is
    if alpha != 1:
        if second in at.static:
            second = at.emit(aten.mul.Tensor, second, alpha)
        else:
            first = at.emit(aten.mul.Tensor, first, alpha)
    product = _matmul(at, node, first, second)
    if product is None:
        product = at.emit(aten.mm.default, first, second)
    return _add_scaled(at, product, addend, beta)


def _addbmm(
    at: Products, node: fx.Node, addend: fx.Node, first: fx.Node, second: fx.Node, beta: object = 1, alpha: object = 1
) -> fx.Node | None:
    if not at.mixed(first, second) or alpha != 1:
        return None
    product = at.product([(first, tuple("bmk")), (second, tuple("bkn"))], tuple("mn"))
    return None if product is None else _add_scaled(at, product, addend, beta)


def _linear(at: Products, node: fx.Node, value: fx.Node, weight: fx.Node, bias: object = None) -> fx.Node | None:
    moving = isinstance(bias, fx.Node) and bias not in at.static
    flat = len(shape_of(weight)) == 1
    if not at.mixed(value, weight):
        return None
    if weight in at.static and not flat:
        return _add_scaled(at, at.emit(aten.linear.default, value, weight), bias) if moving else None
    names = _name_dimensions(value, "k")
    product = at.product(
        [(value, names), (weight, ("k",) if flat else ("n", "k"))], names[:-1] + (() if flat else ("n",))
    )
    return None if product is None else _add_scaled(at, product, bias)


def _inner(at: Products, node: fx.Node, first: fx.Node, second: fx.Node) -> fx.Node | None:
    if not at.mixed(first, second) or not shape_of(first) or not shape_of(second):
        return None
    a = tuple(("a", k) for k in range(len(shape_of(first)) - 1))
    b = tuple(("b", k) for k in range(len(shape_of(second)) - 1))
    return at.product([(first, (*a, "k")), (second, (*b, "k"))], (*a, *b))


def _vecdot(at: Products, node: fx.Node, first: fx.Node, second: fx.Node, dim: int = -1) -> fx.Node | None:
    """Σ over one dimension of the elementwise product, broadcast."""
    if not at.mixed(first, second):
        return None
    a, b = _name_dimensions(first, ()), _name_dimensions(second, ())
    along = dim if dim < 0 else dim - max(len(a), len(b))
    numbered = sorted({*a, *b})  # type: ignore[type-var]
    return at.product([(first, a), (second, b)], [name for name in numbered if name != along])


def _tensordot(
    at: Products, node: fx.Node, first: fx.Node, second: fx.Node, dims: Sequence[int], others: Sequence[int]
) -> fx.Node | None:
    if not at.mixed(first, second):
        return None
    a: list[object] = [("a", k) for k in range(len(shape_of(first)))]
    b: list[object] = [("b", k) for k in range(len(shape_of(second)))]
    result = [a[k] for k in range(len(a)) if k not in [d % len(a) for d in dims]]
    result += [b[k] for k in range(len(b)) if k not in [d % len(b) for d in others]]
    for left, right in zip(dims, others, strict=True):
        b[right] = a[left]
    return at.product([(first, tuple(a)), (second, tuple(b))], result)


def _bilinear(
    at: Products, node: fx.Node, first: fx.Node, second: fx.Node, weight: fx.Node, bias: object = None
) -> fx.Node | None:
    a, b = _name_dimensions(first, "i"), _name_dimensions(second, "j")
    product = at.product([(first, a), (second, b), (weight, tuple("oij"))], (*a[:-1], "o"))
    return None if product is None else _add_scaled(at, product, bias)


def _chain(at: Products, node: fx.Node, operands: Sequence[fx.Node]) -> fx.Node | None:
    if not at.mixed(*operands):
        return None
    names: list[tuple[object, ...]] = [(k, k + 1) for k in range(len(operands))]
    if len(shape_of(operands[0])) == 1:
        names[0] = (1,)
    if len(shape_of(operands[-1])) == 1:
        names[-1] = names[-1][:1]
    ends = [k for k in (0, len(operands)) if any(k in n for n in names)]
    return at.product(list(zip(operands, names, strict=True)), ends)


_CONVOLUTIONS = {
    (1, False): aten.conv1d.default,
    (2, False): aten.conv2d.default,
    (3, False): aten.conv3d.default,
    (1, True): aten.conv_transpose1d.default,
    (2, True): aten.conv_transpose2d.input,
    (3, True): aten.conv_transpose3d.input,
}


def _convolution(at: Products, node: fx.Node, *args: object) -> fx.Node | None:
    """Replace `aten.convolution` by the convolution of its dimension."""
    value, weight, bias, stride, padding, dilation, transposed, extra, groups = args
    assert isinstance(weight, fx.Node)
    target = _CONVOLUTIONS.get((len(shape_of(weight)) - 2, bool(transposed)))
    if target is None:
        return None
    rest = (extra, groups, dilation) if transposed else (dilation, groups)
    return at.emit(target, value, weight, bias, stride, padding, *rest)


def _conv(
    at: Products, node: fx.Node, value: fx.Node, weight: fx.Node, bias: object = None, *rest: object
) -> fx.Node | None:
    """Take a bias that depends on the input out of a convolution and add it afterwards."""
    if not isinstance(bias, fx.Node) or bias in at.static or weight not in at.static:
        return None
    assert callable(node.target)
    shaped = at.emit(aten.reshape.default, bias, [-1] + [1] * (len(shape_of(weight)) - 2))
    return _add_scaled(at, at.emit(node.target, value, weight, None, *rest), shaped)


_SPELLINGS: dict[object, Callable[..., fx.Node | None]] = {
    aten.einsum.default: _einsum,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul),
    **dict.fromkeys((aten.mv.default, aten.dot.default), _matmul),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten.addmv.default), _addmm),
    aten.addbmm.default: _addbmm,
    aten.linear.default: _linear,
    aten.inner.default: _inner,
    aten.linalg_vecdot.default: _vecdot,
    aten.tensordot.default: _tensordot,
    aten.bilinear.default: _bilinear,
    **dict.fromkeys((aten.linalg_multi_dot.default, aten.chain_matmul.default), _chain),
    aten.convolution.default: _convolution,
    **dict.fromkeys(_CONVOLUTIONS.values(), _conv),
}
