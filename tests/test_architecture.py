"""The architecture: who may import whom, no circle of files, a reason for long ones, a test file for each pass."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import networkx
import pytest

from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.pipeline import passes_for
from ffebm_compiler.plan_data import PlanOptions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
from architecture_picture import FLOORS, MODULES, PICTURE, floor_of, imports, picture, room  # noqa: E402

ONLY: dict[str, str] = {"runtime": "ground runtime", "passes": "ground data runtime passes"}
"""Floors that see less than all below them."""

HIDDEN: dict[str, tuple[str, ...]] = {"passes": ("runtime.solvers", "runtime.estimators")}
"""Files that a floor does not know: passes know no solver and no gradient estimator."""

LONG: dict[str, str] = {
    "ffebm_compiler/hybrid_core.py": "one class: forward, state and settings use the same tensors and blocks",
    "ffebm_compiler/ir.py": "the data that every pass reads, and its grammar, in one place",
    "ffebm_compiler/onnx/functions.py": "one ONNX function: its phases share a writer",
    "passes/annotate.py": "one decision for each kind of node",
    "passes/merge_modes.py": "one pass: pairs, pieces and switches share the alignment",
    "passes/partition/state.py": "one class: cost, capacity and order are kept up to date together",
    "runtime/activations/piecewise.py": "one small class for each activation",
    "runtime/activations/smooth.py": "one small class for each activation",
    "runtime/block.py": "one class: an energy block and all that is asked of it",
    "runtime/phases/error_phases.py": "one equation and its limit: the nudged and the adjoint phase share their forces",
    "runtime/program/frame.py": "one class: values, tangents and pullbacks share what is cached",
    "runtime/energies/base.py": "one interface: what an energy is, how a block's is set, how it is measured",
    "runtime/held_gain.py": "one class: what is kept of a loop gain from step to step",
    "runtime/program/operators.py": "one small class for each operator",
    "runtime/solvers/relaxation.py": "one loop for every phase and solver",
}
"""Files of more than 300 lines -> why."""


GRAPH = networkx.DiGraph((name, other) for name, path in MODULES.items() for other in imports(path))


FLOOR = floor_of()
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


def names_of_passes() -> list[str]:
    made = [step.run for step in passes_for(PlanOptions(fold_batchnorm=True, digital_drive=True), Hardware())]
    return [getattr(step, "__wrapped__", step).__name__ for step in made]


def test_every_pass_has_a_test_file_of_its_name() -> None:
    names = names_of_passes()
    assert len(set(names)) == len(names)
    for name in sorted({*names, "annotate", "partition", "lower", "lower_block"}):
        assert (ROOT / "passes" / f"{name}.py").exists() or (ROOT / "passes" / name).is_dir(), name
        assert (ROOT / "tests" / f"test_{name}.py").exists(), f"no test file for the pass {name}"


MAKERS = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "sparse_coo_tensor", "tensor", "tril_indices", "triu_indices",
    "zeros",
}  # fmt: skip
NAMED_ONLY = {"ffebm_compiler.passes.known_values"}
"""Files that compare with these functions and do not call them."""


def test_every_new_tensor_names_its_device() -> None:
    """The default is the user's: after `torch.set_default_device("cuda")` it is not the CPU."""
    unnamed = []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {
            id(call.func)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and {k.arg for k in call.keywords} & {"device", None}
        }
        unnamed += [
            f"{name}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr in MAKERS
            and ast.unparse(node.value) == "torch"
            and id(node) not in named
        ]
    assert [place for place in unnamed if place.split(":")[0] not in NAMED_ONLY] == []


def test_no_file_imports_relatively() -> None:
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} imports relatively"


def test_the_picture_is_of_the_present_imports() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "make architecture"


PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_page_names_files_and_things_that_are_there() -> None:
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    files = [
        path for folder in ("ffebm_compiler", "passes", "runtime", "docs") for path in (ROOT / folder).rglob("*.py")
    ]
    files += [ROOT / "ffebm_command.py", ROOT / "tests" / "networks.py", ROOT / "Makefile"]
    folders = [
        ROOT / name for name in ("ffebm_compiler", "passes", "runtime", "tests", "docs", "benchmarks", "examples")
    ]
    listed = [*ROOT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*.*"))]
    known = {path.relative_to(ROOT).as_posix() for path in listed}
    words = set(re.findall(r"\w+", " ".join(path.read_text(encoding="utf-8") for path in files)))
    for mark in sorted(set(re.findall(r"`([^`\n]+)`", prose))):
        if re.fullmatch(r"[\w./-]+\.(py|md|toml)", mark):
            assert any(path == mark or path.endswith(f"/{mark}") for path in known), f"there is no file {mark}"
        elif re.fullmatch(r"[\w./-]+/", mark):
            assert any((ROOT / top / mark).is_dir() for top in ("", "ffebm_compiler", "passes", "runtime")), mark
        else:
            stems = [word for word in re.findall(r"[A-Za-z_]\w+", mark) if not mark.endswith(f"{word}*")]
            assert not [word for word in stems if word not in words], f"nothing is called {mark}"


def test_the_page_has_the_passes_in_their_order() -> None:
    rows = re.findall(r"^\| `(\w+)`(?: \([^|]*\))? \|", PAGE, re.MULTILINE)
    named = [name for name in names_of_passes() if name != "split_large"]  # of step 3
    assert [name for name in rows if name in named] == named


def test_the_page_is_of_the_present_code() -> None:
    """Every file and name in docs/architecture.md exists, and its table of passes is the compiler's list."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts}
    words = {word for text in code.values() for word in re.findall(r"\w+", text)} | {path.stem for path in code}
    named = {name for name in re.findall(r"`([\w./]+)(?:\(\))?`", page) if not (ROOT / name).exists()}
    files = {name for name in named if name.endswith(".py")}
    assert [name for name in sorted(files) if not any(path.as_posix().endswith("/" + name) for path in code)] == []
    assert [name for name in sorted(named - files) if name.rstrip("/").split("/")[-1].split(".")[-1] not in words] == []
    table = page.split("| pass | after it |")[1].split("\n\n")[0]
    source = (ROOT / "ffebm_compiler" / "pipeline.py").read_text(encoding="utf-8").split("def passes_for")[1]
    order = source.split("annotated(options")[0].split("return [")[1]
    passes = {path.stem for path in (ROOT / "passes").glob("*.py")}
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [
        name for name in dict.fromkeys(re.findall(r"\w+", order)) if name in passes
    ]
