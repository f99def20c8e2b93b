"""JSON values beside annotations: what fits, and where the two part."""

from __future__ import annotations

import enum
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.files.checked_json import AtLeast, Malformed, Number, parse_json, read_json, typed


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    count: Annotated[int, AtLeast(0)]
    name: str = "x"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    rows: tuple[tuple[int, float | None], ...]
    kind: Literal["a", "b"]
    colour: Colour = Colour.RED
    more: Mapping[str, Inner] | None = None
    loose: Number | None = None
    share: float | Literal["all"] = 0.5


GOOD: dict[str, Any] = {"inner": {"count": 3}, "rows": [[1, 2.5], [2, None]], "kind": "a"}


def test_what_fits() -> None:
    found = typed(
        Outer, {**GOOD, "colour": "red", "more": {"é": {"count": 1, "name": "ü"}}, "loose": math.inf, "share": "all"}
    )
    assert found == Outer(
        Inner(3), ((1, 2.5), (2, None)), "a", Colour.RED, {"é": Inner(1, "ü")}, math.inf, "all"
    )  # fmt: skip
    assert typed(float, 3) == 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": 3}, "inner: expected an object, got 3"),
        ({"inner": {}}, "inner has no 'count'"),
        ({"inner": {"count": True}}, "inner.count: expected a whole number of at most 64 bits, got True"),
        ({"inner": {"count": 3.0}}, "inner.count: expected a whole number"),
        ({"inner": {"count": 10**30}}, "inner.count: expected a whole number of at most 64 bits"),
        ({"inner": {"count": -1}}, "inner.count: expected a number of at least 0, got -1"),
        ({"inner": {"count": 1, "nme": "x"}}, "inner has 'nme', which is not known: did you mean 'name'"),
        ({"inner": {"count": 1, "name": "\ud800"}}, r"inner.name: expected a text without lone surrogates .*ud800"),
        ({"rows": {}}, "rows: expected a list, got an object of 0"),
        ({"rows": [[1]]}, r"rows\[0\]: expected a list of 2, got a list of 1"),
        ({"rows": [[1, None], [2, math.nan]]}, r"rows\[1\]\[1\]: expected a finite number, got nan"),
        ({"rows": [[1, 10**400]]}, r"rows\[0\]\[1\]: expected a finite number, got 1000.*letters"),
        ({"kind": "c"}, "kind: expected 'a' or 'b', got 'c'"),
        ({"kind": ["a"]}, "kind: expected 'a' or 'b', got a list of 1"),
        ({"colour": "blue"}, "colour: expected 'red', got 'blue'"),
        ({"more": {"a b": {"count": "x"}}}, r"more\['a b'\].count: expected a whole number"),
        ({"more": {"\ud800": {"count": 1}}}, "a name in more: expected a text without lone surrogates"),
        ({"share": "none"}, "share: expected a finite number, got 'none'; or share: expected 'all'"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        typed(Outer, {**GOOD, **change})


def test_files_that_are_no_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    for content, message in (
        (b"", "plan.json is not JSON .*line 1"),
        (b"\xff\xfe", r"plan.json is not UTF-8 \(byte 0"),
        (b'{"a": 1, "a": 2}', "an object has 'a' twice"),
    ):
        path.write_bytes(content)
        with pytest.raises(ffebm.PlanError, match=message):
            ffebm.Plan.from_json(path)
    monkeypatch.setattr("ffebm_compiler.files.checked_json._MOST_BYTES", 1 << 20)
    with pytest.raises(ffebm.PlanError, match="/dev/zero is larger than 1 MiB"):
        read_json("/dev/zero", "the plan", ffebm.PlanError, "make it again")
    for text, message in (
        ("[" * 100_000, "nested too deeply"),
        ("[" * 500 + "]" * 500, "nested more than 200 deep"),
        ("9" * 5000, "a number is too long"),
    ):
        with pytest.raises(Malformed, match=message):
            parse_json(text)


# -- saved hybrids -----------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers that settle together; the second input is nested."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, shift: dict[str, Tensor]) -> Tensor:
        return torch.tanh(self.second(torch.relu(self.first(x) + shift["by"])))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    hybrid = ffebm.convert(Two(), (torch.randn(3, 4), {"by": torch.randn(6)}), feedback=0.3).train()
    descent = torch.optim.SGD(hybrid.parameters(), 0.1)
    for _ in range(2):
        hybrid(torch.randn(3, 4), {"by": torch.randn(6)}).square().mean().backward()
        descent.step()
    folder = tmp_path_factory.mktemp("original") / "saved"
    hybrid.save(folder)
    ffebm.load(folder, Two())
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "saved")
    return tmp_path / "saved"


def _leaf(**change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["conversion"]["leaves"].__setitem__(0, change)


def _structure(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        assert old in data["conversion"]["structure"]
        data["conversion"]["structure"] = data["conversion"]["structure"].replace(old, new, 1)

    return edit


def _state(**change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["state"]["blocks"]["block_1"].update(change)


POPEN = {"class": ["subprocess", "Popen"], "names": [0], "parts": [None], "form": "sequence"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_leaf(shape=[10**6, 10**6], dtype="float32"), r"leaves\[0\].shape: expected at most 2\^28 values"),
        (_leaf(shape=[2, -4], dtype="float32"), r"leaves\[0\].shape\[1\]: expected a number of at least 0"),
        (_leaf(shape=[2, 4], dtype="nn"), r"leaves\[0\].dtype: expected one of float16, .*got 'nn'"),
        (_leaf(shape=[2, 4]), r"leaves\[0\]: expected shape and dtype, or value, got 'shape'"),
        (_leaf(value=[1]), r"leaves\[0\].value: expected a number, a text, true, false or null, got a list"),
        (_structure("builtins.tuple", "os.system"), "names the container 'os.system', which is not registered"),
        (_structure("builtins.dict", "collections.defaultdict"), "names a class to import"),
        (_structure('"context"', '"contexts"'), r"structure: .*has no 'context'|not known"),
        (_structure("[1, ", "[7, "), "is no nesting of inputs .*Unknown protocol"),
        (lambda d: d["conversion"].update(structure="[" * 5000), "structure: .*nested too deeply"),
        (lambda d: d["conversion"]["leaves"].append({"value": 1}), r"structure is of 2 inputs, and .* has 3"),
        (lambda d: d["conversion"].update(containers=POPEN), r"'subprocess.Popen' is no container of the form 'seq"),
        (lambda d: d["conversion"].update(containers={**POPEN, "form": "call"}), "containers.form: expected"),
        (_state(feedback=True), "feedback: expected a finite number, got True; or .*expected 'symmetric'"),
        (_state(feedback=1.5), "feedback: .*expected a loop gain strictly between 0 and 1"),
        (_state(scales=[1.0]), "block_1.scales: expected 2 numbers"),
        (_state(scales=[1.0, 0.0]), r"scales\[1\]: expected a number above 0"),
        (_state(radius=1e308), "radius: expected a number of at least 0 and at most 1e.100"),
        (_state(gradient={"kind": "os.system"}), "gradient.kind: expected EquilibriumPropagation or"),
        (_state(gradient={"kind": "EquilibriumPropagation", "beta": "x"}), "gradient.beta: expected a finite number"),
        (_state(gradient={"kind": "EquilibriumPropagation", "beta": -1.0}), "block_1.gradient: beta"),
        (_state(solver={"kind": "Anderson", "memori": 2}), "solver has 'memori', .*did you mean 'memory'"),
        (_state(tracks={"0-7": {"norm": 1.0}}), "'0-7' is no edge of the block, which has 0-1"),
        (_state(layers=["first", "first"]), r"state.blocks: 'block_1' is not as the plan has it"),
        (lambda d: d.update(other_mode=["ghost"]), "other_mode: the model has no 'ghost'"),
        (lambda d: d.update(frozen=["ghost"]), "frozen: the model has no 'ghost'"),
    ],
)
def test_settings_that_are_refused(saved: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    path = saved / "hybrid.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ffebm.InputError, match=rf"hybrid.json.*({message})|saved is malformed .*({message})"):
        ffebm.load(saved, Two())


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (
            "weights",
            lambda t: t.update({"first.weight": torch.zeros(4, 6)}),
            r"'first.weight' in .* \(4, 6\), and .* \(6, 4\)",
        ),
        ("weights", lambda t: t.update({"first.bias": torch.zeros(6, dtype=torch.int32)}), "'first.bias' in .*int32"),
        ("weights", lambda t: t.pop("second.bias"), "'second.bias' of the model is missing"),
        ("weights", lambda t: t.update(ghost=torch.zeros(1)), "'ghost' is no tensor of the model"),
        ("loop_gain", lambda t: t.pop("block_1/0-1/image"), "'block_1/0-1/image' is missing"),
        ("loop_gain", lambda t: t.update(ghost=torch.zeros(1)), "'ghost' is no vector of a loop gain"),
        (
            "loop_gain",
            lambda t: t.update({"block_1/0-1/image": torch.zeros(2, 3)}),
            r"image' is .*\(2, 3\) and .*a row and rows of one dtype",
        ),
    ],
)
def test_tensors_that_are_refused(
    saved: Path, file: str, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    path = saved / f"{file}.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)
    with pytest.raises(ffebm.InputError, match=message):
        ffebm.load(saved, Two())


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = ffebm.convert(Two(), (torch.randn(3, 4), {"by": torch.randn(6)}))
    monkeypatch.setattr("ffebm_compiler.example_inputs.MOST_VALUES", 10)
    with pytest.raises(ffebm.ExportError, match=r"the example inputs cannot be stored .*leaves\[0\].shape"):
        hybrid.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
