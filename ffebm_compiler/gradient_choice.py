"""Choose the gradient estimator of each block of a hybrid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ffebm_compiler.digital_bits import check_quantised, digital_parts, quantised_backprop, set_quantised_backprop
from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.runtime.estimators.base import Estimator
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch
from ffebm_compiler.runtime.feedforward.quantised_backprop import QuantisedBackprop
from ffebm_compiler.runtime.feedforward.state import WriteState
from ffebm_compiler.runtime.feedforward.zeroth_order import ZerothOrder
from ffebm_compiler.runtime.solvers.measured import Measured

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts
    from ffebm_compiler.runtime.block import EnergyBlock
    from ffebm_compiler.runtime.solvers.base import Solver

__all__ = [
    "assign",
    "assign_digital",
    "check_digital",
    "check_measured",
    "digital_choice",
    "digital_gradient",
    "gradient_lines",
    "output_blocks",
    "own_gradient",
    "restore_gradient",
    "stored_gradient",
]


def output_blocks(hybrid: HybridParts) -> frozenset[str]:
    """The energy blocks whose outputs reach the network's output through no other energy block."""
    blocks = hybrid.energy_blocks
    behind: dict[object, bool] = {}  # node -> whether its value reaches an energy block
    found = set()
    for node in reversed(hybrid.lowered.graph.nodes):
        is_block = node.op == "call_module" and str(node.target) in blocks
        through = any(behind[user] for user in node.users)
        if is_block and not through:
            found.add(str(node.target))
        behind[node] = is_block or through
    return frozenset(found)


def assign(hybrid: HybridParts, estimator: Estimator, names: Sequence[str] | None = None) -> None:
    """Give an estimator to all blocks, or to those with the given names.

    If it is defined only at the network's output, the blocks there get it, and the others get its `within()`.

    Raises:
        InputError: a name is no block's.
        UnsupportedError: it is not defined in a block given by name, or in any block with feedback, or it needs more
            than the equilibria that are measured.
    """
    blocks = hybrid.energy_blocks
    if names is not None:
        unknown = [name for name in names if name not in blocks]
        if isinstance(names, str) or unknown:
            known = ", ".join(blocks) or "which there are none"
            raise InputError(f"blocks is {names!r}; expected a list of names of energy blocks, of {known}")
    chosen = list(blocks if names is None else names)
    for name in chosen:
        check_measured(blocks[name], estimator, blocks[name].solver)
    if not estimator.output_blocks_only:
        for name in chosen:
            blocks[name].estimator = estimator
        return
    ends = output_blocks(hybrid)
    inner = [name for name in chosen if name not in ends]
    if names is not None and inner:
        raise UnsupportedError(
            f"{estimator.title} is not defined in {', '.join(inner)}, whose outputs reach the loss through "
            "another block, since the target of their states is not known. Use 'ep' in these blocks, or call "
            "set_gradient without `blocks`, which does that"
        )
    coupled = [name for name in chosen if blocks[name].program.coupled]
    if coupled and all(name in inner for name in coupled):
        raise UnsupportedError(
            f"{estimator.title} applies to no block of this hybrid: the outputs of "
            f"{', '.join(coupled[:6])}{', ...' if len(coupled) > 6 else ''}, which have feedback, reach the loss "
            f"through another block, and {', '.join(sorted(ends))} has none, so that its gradient is exact by any "
            f"estimator. Use 'ep', or keep the layers of {', '.join(sorted(ends))} digital (force_digital)"
        )
    for name in chosen:
        blocks[name].estimator = estimator if name in ends else estimator.within()


def check_measured(block: EnergyBlock, estimator: Estimator, solver: Solver | None) -> None:
    """Refuse an estimator that needs more than equilibria, in a block whose equilibria a fabric measures.

    Raises:
        UnsupportedError: it is such a one; names the block and the estimator.
    """
    if not isinstance(solver, Measured) or not block.program.coupled or estimator.compares_states:
        return
    name = f"{getattr(estimator, 'variant', '')} {estimator.name}".strip()
    raise UnsupportedError(
        f"the equilibria of {block.name} are measured by {solver.fabric_name}, where {name} gradients do not exist, "
        "since a fabric only settles. Use 'ep', 'contrastive' or 'coupled', which compare equilibria, or compute them "
        "with another solver: hybrid.set_solver(None)"
    )


def digital_choice(feedforward: object) -> ZerothOrder | QuantisedBackprop | None:
    """How digital parts are differentiated, from a name or an object; None for backpropagation.

    Raises:
        InputError: the name or object is unknown.
    """
    if isinstance(feedforward, ZerothOrder | QuantisedBackprop):
        return feedforward
    known = {"backprop": None, "zeroth-order": ZerothOrder(), "quantised": QuantisedBackprop()}
    if not isinstance(feedforward, str) or feedforward not in known:
        raise InputError(
            f"feedforward is {feedforward!r}; expected 'backprop', 'zeroth-order', 'quantised' or an object such as "
            "ZerothOrder(samples=4)"
        )
    return known[feedforward]


def check_digital(hybrid: HybridParts, settings: ZerothOrder | QuantisedBackprop | None) -> None:
    """Refuse perturbed gradients if a digital part writes state of the source, and quantised ones of exact parts.

    Raises:
        InputError: there is no digital part, or gradients are to be quantised, and the digital parts are not.
        UnsupportedError: there is a part that writes state; names the first one.
    """
    if settings is not None and not digital_parts(hybrid):
        raise InputError(
            f"feedforward is {settings.name!r}, and the plan has no digital part, whose gradient it would be: leave "
            "`feedforward` out, or keep a layer digital (force_digital)"
        )
    if isinstance(settings, QuantisedBackprop):
        check_quantised(hybrid)
    if not isinstance(settings, ZerothOrder):
        return
    for name, part in digital_parts(hybrid).items():
        for module in part.modules():
            if isinstance(module, WriteState) or (isinstance(module, ModeSwitch) and module.writes):
                raise UnsupportedError(
                    f"{name} cannot have a zeroth-order gradient: {module.reason}, and a further evaluation would "
                    "write it again and read the new value. Use feedforward='backprop', or give the source "
                    "a module that does not write its state in forward"
                )


def assign_digital(hybrid: HybridParts, settings: ZerothOrder | QuantisedBackprop | None) -> None:
    """Give the digital parts perturbed or quantised gradients, or backpropagation if `settings` is None.

    Raises:
        InputError: there is no digital part, or gradients are to be quantised, and the digital parts are not.
        UnsupportedError: a part writes state of the source, which a second evaluation would read; names the first one.
    """
    check_digital(hybrid, settings)
    perturbed = settings if isinstance(settings, ZerothOrder) else None
    set_quantised_backprop(hybrid, settings if isinstance(settings, QuantisedBackprop) else None)
    for place, part in enumerate(digital_parts(hybrid).values()):
        part.zeroth_order, part.place, part.calls = perturbed, place, 0


def own_gradient(hybrid: HybridParts) -> str:
    """The name of a hybrid's estimator, which is that of the blocks at its output if blocks have different ones."""
    kinds = [block.estimator for block in hybrid.energy_blocks.values() if block.program.coupled]
    name = next((kind.name for kind in kinds if kind.output_blocks_only), kinds[0].name if kinds else "ep")
    special = digital_gradient(hybrid) or quantised_backprop(hybrid)
    return name if special is None else f"{name}, {special.name}"


def digital_gradient(hybrid: HybridParts) -> ZerothOrder | None:
    """How the gradient of digital parts is estimated; None for backpropagation."""
    return next((part.zeroth_order for part in digital_parts(hybrid).values()), None)


def stored_gradient(hybrid: HybridParts) -> dict[str, Any]:
    """How digital parts are differentiated, as numbers, and how often each was called for a perturbed gradient."""
    perturbed, quantised = digital_gradient(hybrid), quantised_backprop(hybrid)
    calls = {name: part.calls for name, part in digital_parts(hybrid).items()}
    return {
        "digital": None if perturbed is None else {**asdict(perturbed), "calls": calls},
        "quantised": None if quantised is None else asdict(quantised),
    }


def restore_gradient(
    hybrid: HybridParts, perturbed: Mapping[str, Any] | None, quantised: Mapping[str, Any] | None
) -> None:
    """Restore the two values of `stored_gradient`. The bits of digital parts must be there already."""
    fields = dict(perturbed or {})
    calls = fields.pop("calls", {})
    backprop = None if quantised is None else QuantisedBackprop(**quantised)
    assign_digital(hybrid, backprop if perturbed is None else ZerothOrder(**fields))
    for name, part in digital_parts(hybrid).items():
        part.calls = int(calls.get(name, 0))


def gradient_lines(hybrid: HybridParts) -> list[str]:
    """Sentences about blocks that use another estimator than the rest, and about the gradient of digital parts."""
    perturbed = digital_gradient(hybrid)
    lines = [] if perturbed is None else [f"digital parts without backpropagation: {perturbed}"]
    quantised = quantised_backprop(hybrid)
    lines += [] if quantised is None else [f"gradients of digital parts are quantised: {quantised}"]
    coupled = {name: block.estimator for name, block in hybrid.energy_blocks.items() if block.program.coupled}
    special = {name: kind for name, kind in coupled.items() if kind.output_blocks_only}
    others = {name: kind for name, kind in coupled.items() if name not in special}
    if not special or not others:
        return lines
    kinds = ", ".join(dict.fromkeys(kind.title for kind in special.values()))
    rest = ", ".join(dict.fromkeys(kind.name for kind in others.values()))
    shown = f"{', '.join(list(others)[:6])}{', ...' if len(others) > 6 else ''}"
    return [
        *lines,
        f"{kinds} in {', '.join(special)}, whose outputs reach the loss through no other block; {shown} "
        f"{'use' if len(others) > 1 else 'uses'} {rest}",
    ]
