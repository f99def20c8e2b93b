"""The state of a hybrid beside its tensors: feedback, estimator, solver and loop-gain measurement of every block.

It travels in the metadata of a `state_dict`, since torch keeps the attribute `_metadata` through `torch.save` and
`torch.load`. So the keys stay the source's, and the source itself can load a hybrid's state dict. `storage.py` writes
the same into files. The state holds numbers, texts and tensors only, so that `torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ffebm_compiler.device_state import count_of_norms, restore_devices, stored_devices
from ffebm_compiler.errors import InputError
from ffebm_compiler.gradient_choice import assign_digital, restore_gradient, stored_gradient
from ffebm_compiler.runtime.energies.choice import DEFAULT_ENERGY, name_of
from ffebm_compiler.runtime.estimators.base import Estimator
from ffebm_compiler.runtime.estimators.choice import ESTIMATORS as ESTIMATOR_KINDS
from ffebm_compiler.runtime.solvers.anderson import Anderson
from ffebm_compiler.runtime.solvers.base import GaussSeidel, Solver
from ffebm_compiler.runtime.solvers.measured import Measured, Unplugged
from ffebm_compiler.runtime.solvers.newton import NewtonCG
from ffebm_compiler.runtime.weight_digest import digests_of, have_digests

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts

__all__ = [
    "ESTIMATORS",
    "METADATA",
    "SOLVERS",
    "Arrival",
    "fill_arriving",
    "named",
    "own_load_state_dict",
    "own_state_dict",
    "packed_state",
    "restore",
    "settle_arrival",
    "state_of",
    "unpacked_state",
]

METADATA = "ffebm"
"""Key of the state in a module's entry of a state dict's metadata."""

ESTIMATORS: dict[str, type[Estimator]] = {kind.__name__: kind for kind in ESTIMATOR_KINDS}
SOLVERS: dict[str, type[Solver] | type[Unplugged]] = {
    **{kind.__name__: kind for kind in (GaussSeidel, Anderson, NewtonCG)},
    Measured.__name__: Unplugged,
}
"""The solvers that a file can name. Of a measured one it holds the name of the fabric's class, and no fabric."""


def state_of(hybrid: HybridParts) -> dict[str, Any]:
    """The state of a hybrid beside its tensors. Estimators and solvers of the user's classes are left out."""
    blocks = {}
    for name, module in hybrid.energy_blocks.items():
        tensors = hybrid._made_of(name)
        blocks[name] = {
            **module.gain.state(),
            "measured": module.gain.fits(tensors),
            "values": digests_of(tensors),
            "gradient": named(module.estimator),
            "solver": named(module.solver),
        }
    return {
        "recertify_every": hybrid.recertify_every,
        "project_to": hybrid.project_to,
        "blocks": blocks,
        "energy": name_of(hybrid.energy_function),
        **stored_gradient(hybrid),
        "devices": stored_devices(hybrid),
    }


def packed_state(hybrid: HybridParts) -> bytes:
    """`state_of` as one value, in torch's file format."""
    file = io.BytesIO()
    torch.save(state_of(hybrid), file)
    return file.getvalue()


def unpacked_state(packed: object) -> Mapping[str, Any]:
    """The inverse of `packed_state`.

    Raises:
        InputError: the value does not come from `packed_state`.
    """
    if not isinstance(packed, bytes):
        raise InputError(f"the state of the blocks is a {type(packed).__name__}; expected what block_state() returned")
    try:
        state = torch.load(io.BytesIO(packed), weights_only=True)
    except Exception as error:
        raise InputError(
            f"the state of the blocks cannot be read ({type(error).__name__}); expected what block_state() returned"
        ) from error
    if not isinstance(state, Mapping):
        raise InputError(
            f"the state of the blocks holds a {type(state).__name__}; expected what block_state() returned"
        )
    return state


def named(value: Estimator | Solver | None) -> dict[str, Any] | None:
    """An estimator or a solver as numbers and texts. One of a class of the user's is `{"kind": None}`."""
    if value is None:
        return None
    kind = type(value).__name__
    if isinstance(value, Measured):
        return {"kind": kind, "fabric": value.fabric_name}
    known = type(value) in (*ESTIMATORS.values(), *SOLVERS.values())
    return {"kind": kind, **asdict(value)} if known else {"kind": None}  # type: ignore[arg-type]


def _made_from(stored: Mapping[str, Any] | None, kinds: Mapping[str, Any], present: Any) -> Any:
    """The object that `named` described; the present one if its class was unknown, or where equilibria are measured."""
    if stored is None:
        return None
    fields = dict(stored)
    kind = fields.pop("kind")
    if kind is None or (kind == Measured.__name__ and isinstance(present, Measured)):
        return present
    made = kinds[kind](**fields)
    return Measured(made) if isinstance(made, Unplugged) else made


def restore(hybrid: HybridParts, state: Mapping[str, Any]) -> None:
    """Restore the state that `state_of` returned. The weights must be there already.

    Where they are others than those that the state was written for, as an average of state dicts is, the feedback is
    set for them.

    Raises:
        InputError: the state is malformed or of another plan.
    """
    blocks = hybrid.energy_blocks
    try:
        stored = state["blocks"]
        if list(stored) != list(blocks):
            raise InputError(
                f"the stored state is of the blocks {', '.join(stored) or 'none'}, and this hybrid has "
                f"{', '.join(blocks) or 'none'}: convert with the plan of the hybrid that was saved"
            )
        others: list[str] = []
        assign_digital(hybrid, None)
        restore_devices(hybrid, state.get("devices"))
        for name, module in blocks.items():
            estimator = _made_from(stored[name]["gradient"], ESTIMATORS, module.estimator)
            solver = _made_from(stored[name]["solver"], SOLVERS, module.solver)
            module.gain.restore(stored[name])
            module.estimator, module.solver = estimator, solver
            tensors = hybrid._made_of(name)
            if not have_digests(tensors, stored[name].get("values") or [""] * len(tensors)):
                others.append(name)
            elif stored[name]["measured"]:
                module.gain.fitted(tensors)
        restore_gradient(hybrid, state.get("digital"), state.get("quantised"))
        hybrid.recertify_every, hybrid.project_to = state["recertify_every"], state["project_to"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the stored state of the blocks is malformed ({type(error).__name__}, {error}): save the hybrid again"
        ) from error
    if others:
        hybrid._recertify(*others)


@dataclass(frozen=True)
class Arrival:
    """The content of a state dict for the blocks, read before its tensors are copied."""

    state: Mapping[str, Any] | None
    """The state of the blocks; None if it is missing, of another plan, or without some of their weights."""
    changed: tuple[str, ...]
    """Names of the blocks with feedback whose weights the state dict changes."""

    @classmethod
    def of(cls, hybrid: HybridParts, state_dict: Mapping[str, Any], prefix: str, metadata: Any) -> Arrival:
        """Read a state dict while the hybrid still has its former weights."""
        state = metadata.get(METADATA) if isinstance(metadata, Mapping) else None
        whole, changed = True, []
        for name, sources in hybrid._sources.items():
            present = [state_dict.get(prefix + source) for source in sources]
            whole = whole and all(value is not None for value in present)
            pairs = zip(sources, present, strict=True)
            if not all(value is None or _is_equal(hybrid._tensor(source), value) for source, value in pairs):
                changed.append(name)
        if state is None or not whole or not _of_same_blocks(hybrid, state):
            return cls(None, tuple(changed))
        return cls(state, tuple(changed))


def _of_same_blocks(hybrid: HybridParts, state: Any) -> bool:
    """Whether a state belongs to a hybrid with the same blocks, energy and feedback weights, if any."""
    try:
        if state.get("energy", DEFAULT_ENERGY.name) != name_of(hybrid.energy_function):
            return False
        layers = {name: list(block["layers"]) for name, block in state["blocks"].items()}
        # A block with amplifiers has no norms. Where this one has none, `HeldGain.restore` tells that.
        norms = {name: len(block["norms"]) for name, block in state["blocks"].items() if "amplifiers" not in block}
    except (KeyError, TypeError, AttributeError):
        return False
    present = hybrid.energy_blocks
    return layers == {name: [layer.name for layer in block.program.layers] for name, block in present.items()} and all(
        count == count_of_norms(present[name], state) for name, count in norms.items()
    )


def _is_equal(present: Tensor, arriving: object) -> bool:
    if not isinstance(arriving, Tensor) or present.shape != arriving.shape or present.dtype != arriving.dtype:
        return False
    if present.device != arriving.device or present.is_meta:
        return False
    return torch.equal(present, arriving)


def fill_arriving(hybrid: HybridParts, state_dict: dict[str, Any], prefix: str) -> None:
    """Add the present feedback weights to a source's state dict, which has none, or check those of a hybrid's.

    Raises:
        InputError: feedback weights have another shape than the weights that they belong to.
    """
    names = list(hybrid.feedback_names)
    if not any(prefix + name in state_dict for name in names):
        state_dict.update({prefix + name: hybrid._tensor(name).detach() for name in names})
    for name in names:
        present, arriving = hybrid._tensor(name), state_dict.get(prefix + name)
        if isinstance(arriving, Tensor) and arriving.shape != present.shape:
            raise InputError(
                f"the feedback weights {prefix + name!r} in the state dict have the shape {tuple(arriving.shape)}; "
                f"expected {tuple(present.shape)}, that of the forward weights they go with. Store them in that shape: "
                "the block transposes them itself"
            )


def own_state_dict(
    hybrid: HybridParts, source: nn.Module, args: tuple[Any, ...], *, prefix: str, **others: Any
) -> OrderedDict[str, Any]:
    """The result of the source's own `state_dict` method, with the state of the blocks in its metadata."""
    found = source.state_dict(*args, prefix=prefix, **others)
    state = found if isinstance(found, OrderedDict) else OrderedDict(found)
    metadata = getattr(found, "_metadata", {})
    metadata.setdefault(prefix[:-1], {})[METADATA] = state_of(hybrid)
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def own_load_state_dict(
    hybrid: HybridParts, source: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Load with the source's own `load_state_dict` method, which fills the same tensors, then do `settle_arrival`."""
    state = (getattr(state_dict, "_metadata", None) or {}).get("", {}).get(METADATA)
    module: Any = hybrid
    if hybrid.feedback_names:
        state_dict = dict(state_dict)
        fill_arriving(hybrid, state_dict, "")
    result = source.load_state_dict(state_dict, *args, **kwargs)
    if state is not None and _of_same_blocks(hybrid, state):
        restore(hybrid, state)
        return result
    for name in hybrid._sources:
        if not hybrid._energy[name].gain.fits(hybrid._made_of(name)):
            module._recertify(name)
    return result


def settle_arrival(module: nn.Module, incompatible_keys: object) -> None:
    """After a state dict's tensors are copied, restore the state of the blocks, or certify them for the new weights.

    Weights without such a state come from a source, and the feedback is set for them. Weights that are equal to the
    former ones change nothing.
    """
    hybrid: Any = module
    arrival: Arrival | None = hybrid.__dict__.pop("_arriving", None)
    if arrival is None:
        return
    if arrival.state is not None:
        restore(hybrid, arrival.state)
        return
    for name in arrival.changed:
        hybrid._recertify(name)
