"""The architecture: who may import whom, no circle of files, a reason for long ones, a test file for each pass."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx
import pytest

from ffebm_compiler.ir import Pass
from ffebm_compiler.pipeline import passes_for
from ffebm_compiler.plan_data import PlanOptions

ROOT = Path(__file__).parents[1]
FOLDERS = {"ffebm_compiler": "ffebm_compiler", "passes": "ffebm_compiler.passes", "runtime": "ffebm_compiler.runtime"}

FLOORS: dict[str, str] = {
    "ground": "errors module_paths hidden_files",
    "files": "checked_json whole_files whole_folders tensor_file",
    "data": "hardware hardware_file hardware_layers costs ir plan_data",
    "runtime": "runtime",
    "passes": "passes",
    "calls": "pipeline plan_file signature call_arguments source_view later_hooks written_state stored_containers "
    "example_inputs conversion",
    "hybrid": "hybrid_parts bound_block hybrid_state recast hybrid_core",
    "reports": "text checks costs_report diagnosis mixed_modes verification saved_settings storage",
    "pictures and ONNX": "drawing onnx",
    "what people hold": "plan hybrid",
    "what people call": "convert loading",
    "the package": "ffebm_compiler",
    "commands": "cli cli_errors cli_export cli_models cli_options cli_plan demo demo_models demo_onnx demo_report "
    "demo_settings",
}
"""From the ground up. A file imports from its own floor and from those below; a folder is named as a whole."""

ONLY: dict[str, str] = {"runtime": "ground runtime", "passes": "ground data runtime passes"}
"""Floors that see less than all below them."""

HIDDEN: dict[str, tuple[str, ...]] = {
    "passes": ("runtime.solvers", "runtime.gradients", "runtime.anderson", "runtime.newton"),
}
"""Files that a floor does not know: passes know no solver and no gradient estimator."""

LONG: dict[str, str] = {
    "ffebm_compiler/hybrid_core.py": "one class: forward, state and settings use the same tensors and blocks",
    "ffebm_compiler/ir.py": "the data that every pass reads, and its grammar, in one place",
    "ffebm_compiler/hardware.py": "one dataclass with its checks and presets",
    "ffebm_compiler/onnx/functions.py": "one ONNX function: its phases share a writer",
    "ffebm_compiler/onnx/program_file.py": "one reader: a check for every field of a program",
    "passes/annotate.py": "one decision for each kind of node",
    "passes/merge_modes.py": "one pass: pairs, pieces and switches share the alignment",
    "passes/partition_state.py": "one class: cost, capacity and order are kept up to date together",
    "runtime/activations_piecewise.py": "one small class for each activation",
    "runtime/activations_smooth.py": "one small class for each activation",
    "runtime/block.py": "one class: an energy block and all that is asked of it",
    "runtime/frame.py": "one class: values, tangents and pullbacks share what is cached",
    "runtime/held_gain.py": "one class: what is kept of a loop gain from step to step",
    "runtime/operators.py": "one small class for each operator",
    "runtime/relaxation.py": "one loop for every phase and solver",
}
"""Files of more than 300 lines -> why."""


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports: at its top, inside functions and for its types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert not node.level, f"{path} imports relatively"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "ffebm_compiler"}


GRAPH = networkx.DiGraph((name, other) for name, path in MODULES.items() for other in imports(path))


def room(name: str) -> str:
    """The file or folder below the package that a module is, or is in."""
    return [*name.split("."), "ffebm_compiler"][1]


FLOOR = {name: floor for floor, rooms in FLOORS.items() for name in rooms.split()}
ORDER = list(FLOORS)


def test_every_file_is_on_a_floor() -> None:
    assert {room(name) for name in MODULES} == set(FLOOR)
    assert set(GRAPH) <= set(MODULES), "an import of something that is not there"


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor: str) -> None:
    seen = ONLY[floor].split() if floor in ONLY else ORDER[: ORDER.index(floor) + 1]
    hidden = tuple(f"ffebm_compiler.{name}" for name in HIDDEN.get(floor, ()))
    for name in (name for name in MODULES if FLOOR[room(name)] == floor):
        for other in GRAPH.successors(name) if name in GRAPH else ():
            assert FLOOR[room(other)] in seen, f"{name} imports {other}, which is above it or hidden from it"
            assert not other.startswith(hidden or ("-",)), f"{name} imports {other}, which its floor does not know"


def test_no_files_import_each_other_in_a_circle() -> None:
    assert [sorted(group) for group in networkx.strongly_connected_components(GRAPH) if len(group) > 1] == []
    assert not list(networkx.selfloop_edges(GRAPH))


def test_facades_are_imported_from_outside_only() -> None:
    facades = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    for name, other in GRAPH.edges:
        if other in facades:
            inside = name.startswith(f"{other}.") and FLOOR[room(name)] not in ("commands",)
            assert not inside, f"{name} imports the facade {other} that it is behind"


def test_long_files_have_a_reason() -> None:
    long = {
        str(path.relative_to(ROOT)).replace("\\", "/")
        for path in MODULES.values()
        if len(path.read_text(encoding="utf-8").splitlines()) > 300
    }
    assert long == set(LONG), "split the new ones, or say why not; take out those that are short again"


def test_every_pass_has_a_test_file_of_its_name() -> None:
    made = [step.run if isinstance(step, Pass) else step for step in passes_for(PlanOptions(fold_batchnorm=True))]
    names = {getattr(step, "__wrapped__", step).__name__ for step in made}
    assert len(names) == len(made)
    for name in sorted({*names, "annotate", "split_large", "partition", "lower", "lower_block"}):
        assert (ROOT / "passes" / f"{name}.py").exists(), name
        assert (ROOT / "tests" / f"test_{name}.py").exists(), f"no test file for the pass {name}"
