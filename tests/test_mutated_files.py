"""Files that are read, mutated: every one ends in success or in an `FFEBMError` that names the file.

`make mutate` tries 10 000 mutations of each kind of file (`FFEBM_MUTATIONS`), the tests of every day fewer.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from many_examples import in_slices, often
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import storage

MUTATIONS = int(os.environ.get("FFEBM_MUTATIONS", "0"))
ODD = (
    None, True, False, 0, -1, 1, 3, 0.5, 1e308, -1e308, float("nan"), float("inf"), 10**18, 10**30, 10**400,
    "", "x", "inf", "a\0b", "\ud800", "../../etc/passwd", "é" * 300,
    [], {}, [None], [[]], {"": None}, {"kind": "os.system"}, [10**12], [1, 2, 3],
    "builtins.eval", '[1, {"type": "builtins.dict", "context": "[[]]", "children_spec": []}]', [[[[[[[[[[1]]]]]]]]]],
)  # fmt: skip
"""Values that somebody could write."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    in_slices(metafunc, MUTATIONS)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def mutated_json(draw: st.DrawFn, original: Any) -> Any:
    """A JSON value with one to three changes: another value, something missing, doubled, renamed or moved."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        odd = copy.deepcopy(
            draw(st.sampled_from(ODD) | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5))
        )
        if not path:
            if draw(st.integers(0, 20)) == 0:
                value = odd
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["odd", "odd", "odd", "remove", "other", "rename", "double", "nudge"]))
        there = holder[path[-1]]
        if how == "remove":
            del holder[path[-1]]
        elif how == "other":  # a value from elsewhere in the file
            found = value
            for key in draw(st.sampled_from(list(places(value)))):
                found = found[key]
            holder[path[-1]] = copy.deepcopy(found)
        elif how == "rename" and isinstance(holder, dict):
            name = draw(st.text(max_size=4) | st.sampled_from(sorted(map(str, holder))))
            holder[name] = holder.pop(path[-1])
        elif how == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(there))
        elif how == "nudge" and isinstance(there, int | float):
            by = draw(st.sampled_from([-2, -1, 1, 0.5, 2**31, 10**12]))
            holder[path[-1]] = there + by if isinstance(there, float) else there + int(by)
        elif how == "nudge" and isinstance(there, str):
            holder[path[-1]] = there[: draw(st.integers(0, len(there)))] + draw(st.text(max_size=3))
        else:
            holder[path[-1]] = odd
    return value


@st.composite
def mutated_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes cut off, changed, put in, taken out or repeated."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["cut", "set", "insert", "remove", "repeat", "deep"]))
        if how == "cut":
            del data[at:]
        elif how == "set" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif how == "remove":
            del data[at : at + draw(st.integers(1, 40))]
        elif how == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 200))]
        elif how == "deep":
            data[at:at] = draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([3, 250, 20_000]))
        else:
            odd = st.sampled_from([b"NaN", b"1e999", b'"', b"-", b"\xff", b"9" * 5000])
            data[at:at] = draw(st.binary(max_size=6) | odd)
    return bytes(data)


@st.composite
def mutated_tensors(draw: st.DrawFn, original: bytes) -> bytes:
    """A safetensors file whose header or bytes lie."""
    if draw(st.booleans()):
        return draw(mutated_bytes(original))
    size = struct.unpack("<Q", original[:8])[0]
    header = json.loads(original[8 : 8 + size])
    text = json.dumps(draw(mutated_json(header))).encode("utf-8", "surrogatepass")
    claimed = draw(st.sampled_from([len(text)] * 8 + [0, 1, 2**31, 2**62, 2**64 - 1]))
    return struct.pack("<Q", claimed) + text + original[8 + size :]


def text_of(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def ends_well(read: Callable[[], Any], *names: str, use: Callable[[Any], Any] = lambda found: None) -> bool:
    """Whether it was read; if not, the error is ours, short, and names one of the files. What is read can be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read()
        except ffebm.FFEBMError as error:
            said = str(error)
        else:
            with suppress(ffebm.FFEBMError):  # which is about its use, and names no file
                use(found)
            return True
    assert any(name in said for name in names), f"names no file: {said}"
    assert len(said) < 4000, f"a message of {len(said)} letters"
    assert said.encode()
    return False


# -- plans and hardware --------------------------------------------------------------------------------------------


def a_plan() -> ffebm.Plan:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4))
    return ffebm.plan(
        model, torch.randn(2, 8), hardware=ffebm.Hardware(overrides={"5": {"tile_rows": 64}}, costs={"adc_pj": 1.0})
    )


PLAN = json.loads(json.dumps(a_plan().to_dict()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


@often(300, MUTATIONS)
@given(data=mutated_json(PLAN))
def test_plans(folder: Path, data: Any) -> None:
    (folder / "plan.json").write_bytes(text_of(data))
    ends_well(lambda: ffebm.Plan.from_json(folder / "plan.json"), "plan.json", use=print_all)


def print_all(plan: ffebm.Plan) -> str:
    """What is read must be good for what people do with it."""
    return f"{plan}{[plan.explain(path) for path in plan.modules]}{plan.to_dict()}"


@often(100, MUTATIONS)
@given(data=mutated_bytes(text_of(PLAN)))
def test_plans_of_other_bytes(folder: Path, data: bytes) -> None:
    (folder / "plan.json").write_bytes(data)
    ends_well(lambda: ffebm.Plan.from_json(folder / "plan.json"), "plan.json")


@often(100, MUTATIONS)
@given(data=mutated_json(PLAN["hardware"]), suffix=st.sampled_from([".json", ".JSON"]))
def test_hardware(folder: Path, data: Any, suffix: str) -> None:
    path = folder / f"chip{suffix}"
    path.write_bytes(text_of(data))
    ends_well(lambda: ffebm.Hardware.from_file(path), path.name, use=lambda chip: hash(chip.tiles(3, 4)))


TOML = b"""tile_rows = 64
cores = "none"
noise = 0.1
name = "chip"
[costs]
adc_pj = 1.5
[overrides."layer.*"]
tile_cols = 12
"""


@often(100, MUTATIONS)
@given(data=mutated_bytes(TOML))
def test_hardware_in_toml(folder: Path, data: bytes) -> None:
    (folder / "chip.toml").write_bytes(data)
    ends_well(lambda: ffebm.Hardware.from_file(folder / "chip.toml"), "chip.toml", use=lambda chip: chip.tiles(3, 4))


# -- saved hybrids -------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two layers that settle, a norm, a tied weight, a keyword and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4)
        self.last = nn.Linear(4, 6, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor, *, shift: dict[str, Any], double: bool = False) -> Tensor:
        h = torch.tanh(self.second(torch.relu(self.first(x) + shift["by"])))
        h = self.last(self.norm(h))
        return 2 * h if double else h


NAMES = ("hybrid.json", "plan.json", "weights.safetensors", "loop_gain.safetensors", "saved")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    torch.manual_seed(0)
    inputs = {"shift": {"by": torch.randn(6)}, "double": True}
    hybrid = ffebm.convert(Small(), torch.randn(3, 4), inputs, feedback=0.3, solver=ffebm.Anderson()).train()
    descent = torch.optim.SGD(hybrid.parameters(), 0.1)
    for _ in range(2):
        hybrid(torch.randn(3, 4), **inputs).square().mean().backward()
        descent.step()
    path = tmp_path_factory.mktemp("mutated") / "saved"
    hybrid.save(path)
    assert json.loads((path / "hybrid.json").read_text())["state"]["blocks"]["block_1"]["tracks"]
    return path, {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def remembered() -> Iterator[None]:
    """`convert` once for every example and plan: capturing is another test's matter."""
    known: dict[str, Any] = {}
    module = sys.modules["ffebm_compiler.convert"]
    original = module.convert

    def convert(model: nn.Module, args: Any, kwargs: Any, **options: Any) -> Any:
        plan, rest = options["plan"], {key: value for key, value in options.items() if key != "plan"}
        described = repr(torch.utils._pytree.tree_map(storage.described, (args, kwargs)))
        key = f"{described}{rest}{json.dumps(plan.to_dict())}"
        if key not in known:
            try:
                known[key] = original(model, args, kwargs, **options)
            except ffebm.FFEBMError as error:
                known[key] = error
        if isinstance(known[key], ffebm.FFEBMError):
            raise known[key]
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "convert", convert)
        yield


def load_with(saved: tuple[Path, dict[str, bytes]], name: str, data: bytes) -> bool:
    path, files = saved
    for file, content in files.items():
        (path / file).write_bytes(data if file == name else content)
    return ends_well(lambda: ffebm.load(path, Small()), *NAMES)


@often(150, MUTATIONS)
@given(data=st.data())
def test_settings_of_saved_hybrids(saved: Any, remembered: None, data: st.DataObject) -> None:
    load_with(saved, "hybrid.json", text_of(data.draw(mutated_json(json.loads(saved[1]["hybrid.json"])))))


@often(100, MUTATIONS)
@given(data=st.data())
def test_settings_of_other_bytes(saved: Any, remembered: None, data: st.DataObject) -> None:
    load_with(saved, "hybrid.json", data.draw(mutated_bytes(saved[1]["hybrid.json"])))


@often(100, MUTATIONS)
@given(data=st.data(), name=st.sampled_from(["weights.safetensors", "loop_gain.safetensors"]))
def test_tensors_of_saved_hybrids(saved: Any, remembered: None, data: st.DataObject, name: str) -> None:
    load_with(saved, name, data.draw(mutated_tensors(saved[1][name])))


# -- measurements that a call goes on from ----------------------------------------------------------------------------


def judged(net: Any) -> float:
    x = torch.linspace(-1, 1, 32).view(4, 8)
    return float(net(x).square().mean().double())


@pytest.fixture(scope="module")
def measuring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Callable[[], Any]]]]:
    """Kind of a file -> the file, and the call that wrote it. Every network is captured once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4)).eval()
    x, path, devices = torch.randn(2, 8), tmp_path_factory.mktemp("measured"), ffebm.Devices(programming=0.1)
    modules = [sys.modules[f"ffebm_compiler.accuracy.{name}"] for name in ("planner", "explore")]
    known: dict[str, Any] = {}

    def once(of: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **options: Any) -> Any:
            key = f"{of.__name__} {options}"
            if key not in known:
                known[key] = of(*args, **options)
            return copy.deepcopy(known[key])

        return made

    hybrid = ffebm.convert(model, x)
    common: dict[str, Any] = {"draws": 1}
    calls: dict[str, Callable[[Path], Any]] = {
        "sensitivity": lambda file: ffebm.sensitivity(hybrid, judged, devices, file=file, **common),
        "plan": lambda file: ffebm.plan_for_accuracy(
            model, x, judged, devices=devices, max_drop=1e-4, file=file, **common
        ),
        "exploration": lambda file: ffebm.explore(
            model, x, judged, hardware=["pcm-64"], devices=[None, devices], file=file, **common
        ),
    }
    with pytest.MonkeyPatch.context() as patched:
        for module in modules:
            patched.setattr(module, "convert", once(module.convert))
        patched.setattr(modules[0], "make_plan", once(modules[0].make_plan))
        for kind, call in calls.items():
            with suppress(ffebm.PlanError):
                call(path / f"{kind}.json")
        yield {kind: (path / f"{kind}.json", partial(call, path / f"{kind}.json")) for kind, call in calls.items()}


@pytest.fixture(scope="module")
def measured(measuring: Any) -> dict[str, bytes]:
    return {kind: file.read_bytes() for kind, (file, _) in measuring.items()}


@often(90, MUTATIONS)
@given(data=st.data(), kind=st.sampled_from(["sensitivity", "plan", "exploration"]))
def test_files_of_measurements(measuring: Any, measured: dict[str, bytes], data: st.DataObject, kind: str) -> None:
    file, call = measuring[kind]
    content = json.loads(measured[kind])
    mutated = mutated_json(content) if data.draw(st.booleans()) else mutated_json(content["results"])
    found = data.draw(mutated)
    file.write_bytes(text_of(found if isinstance(found, dict) and "schema" in found else {**content, "results": found}))
    # A number that is another one can make the budget unreachable.
    ends_well(call, file.name, "is not reachable", use=str)


@often(40, MUTATIONS)
@given(data=st.data(), kind=st.sampled_from(["sensitivity", "exploration"]))
def test_files_of_measurements_of_other_bytes(
    measuring: Any, measured: dict[str, bytes], data: st.DataObject, kind: str
) -> None:
    file, call = measuring[kind]
    file.write_bytes(data.draw(mutated_bytes(measured[kind])))
    ends_well(call, file.name, use=str)


# -- exports -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Tensor]:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.clamp(self.second(torch.relu(self.first(x))), 0, 1)
            return self.head(torch.softmax(h.flatten(2), 2).amax(2))

    x = torch.randn(2, 1, 5, 5)
    path = tmp_path_factory.mktemp("mutated") / "export"
    ffebm.convert(Net().eval(), x).export_onnx(path, parts="digital")
    return path, json.loads((path / "manifest.json").read_text()), x


@often(150, MUTATIONS)
@given(data=st.data(), sealed=st.booleans())
def test_manifests(export: Any, data: st.DataObject, sealed: bool) -> None:
    """A seal finds what changed by accident; what is sealed again must be checked for itself."""
    from ffebm_compiler.onnx.manifest import seal

    path, original, x = export
    manifest = data.draw(mutated_json(original))
    if sealed and isinstance(manifest, dict):
        manifest["sha256"] = seal(manifest)
    (path / "manifest.json").write_bytes(text_of(manifest))
    ends_well(lambda: ffebm.onnx.load(path, threads=1), "manifest", "export", use=lambda exported: exported.run(x))


@often(100, MUTATIONS)
@given(data=st.data())
def test_manifests_of_other_bytes(export: Any, data: st.DataObject) -> None:
    path, original, _ = export
    (path / "manifest.json").write_bytes(data.draw(mutated_bytes(text_of(original))))
    ends_well(lambda: ffebm.onnx.load(path, threads=1), "manifest.json", "export")
