"""The command line: as a real process, and through typer's runner."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import ffebm_compiler as ffebm
from ffebm_compiler.cli.main import main
from ffebm_compiler.cli.options import Settings
from ffebm_compiler.demo.models import DigitsCNN, digits_mlp

FFEBM = Path(sys.executable).with_name("ffebm")
CNN = ["ffebm_compiler.demo.models:DigitsCNN", "--input", "1x1x8x8"]
MLP = ["ffebm_compiler.demo.models:digits_mlp", "--input", "1x1x8x8"]

MODELS = """
import torch
import typer
from torch import nn

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, tokens, mask):
        return self.second(torch.relu(self.first(self.embedding(tokens)))) * mask.unsqueeze(-1)

class Box:
    @staticmethod
    def build():
        return nn.Linear(4, 2)

made = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
number = 3

def wrong():
    return 3

def fails():
    raise RuntimeError("no luck\\nat all")

def lacking():
    import no_such_package

def leaves():
    raise SystemExit("no data: give --data")

class NoEval(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def train(self, mode=True):
        raise ValueError("no eval for you")

class Leaving(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        raise SystemExit(7)
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test runs in a folder with a module of models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "their_models.py").write_text(MODELS, encoding="utf-8")
    yield
    for name in ("their_models", "broken"):
        sys.modules.pop(name, None)


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="ffebm")


def done(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refused(*args: str) -> str:
    """The one line with which a command is refused."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def process(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(FFEBM), *args], capture_output=True, text=True, check=False, timeout=120)


# -- as a process ----------------------------------------------------------------------------


def test_process_plans_a_model_of_the_working_folder() -> None:
    result = process("plan", "their_models:made", "--input", "1x4", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    plan = ffebm.Plan.from_dict(json.loads(result.stdout))
    assert [block.layers for block in plan.blocks] == [("0", "2")]


def test_process_prints_an_error_in_one_line() -> None:
    result = process("convert", *CNN, "--feedback", "7")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: feedback is 7.0; expected a loop gain")
    assert result.stderr.count("\n") == 1


def test_process_shows_its_version() -> None:
    result = process("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"ffebm-compiler {ffebm.__version__} (torch {torch.__version__})")


# -- the commands ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "plan", "convert", "check", "draw", "export"])
def test_help_teaches(command: str) -> None:
    assert command in done("--help")
    assert "--help" in done(command, "--help")
    if command != "demo":
        assert f"Example: ffebm {command} " in done(command, "--help")


def test_help_without_a_command() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Usage: ffebm" in result.output
    assert "error:" not in result.output


def test_plan_is_a_table() -> None:
    text = done("plan", *CNN)
    assert "DigitsCNN on crossbar-256" in text
    assert "layer1.conv1" in text
    assert done("plan", *CNN, "--fold-batchnorm") != text


def test_plan_json_is_the_plan(tmp_path: Path) -> None:
    text = done("plan", *CNN, "--json", "--fold-batchnorm", "--out", "plan.json")
    expected = ffebm.plan(DigitsCNN().eval(), torch.zeros(1, 1, 8, 8), fold_batchnorm=True)
    assert ffebm.Plan.from_dict(json.loads(text)) == expected
    assert ffebm.Plan.from_json(tmp_path / "plan.json") == expected


def test_plan_explains() -> None:
    text = done("plan", *CNN, "--explain", "layer1.conv1", "--explain", "head.weight")
    assert text.splitlines()[0].startswith("layer1.conv1: analog")
    assert text.splitlines()[1].startswith("head.weight: analog")


def test_plan_options_reach_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "chip.toml").write_text("layers_per_block = 1\n", encoding="utf-8")
    plan = ffebm.Plan.from_dict(json.loads(done("plan", *MLP, "--json", "--hardware", "chip.toml")))
    assert plan.hardware.name == "chip"
    assert all(len(block.layers) == 1 for block in plan.blocks)
    options = ("--force-digital", "1", "--block-ops", "add,max_pool", "--hardware", "ideal")
    plan = ffebm.Plan.from_dict(json.loads(done("plan", *MLP, "--json", *options)))
    assert plan.options.block_ops == ("add", "max_pool")
    assert plan.options.force_digital == ("1",)
    assert list(plan.rejected) == ["1"]


def test_digital_values_may_drive_states() -> None:
    model = ("ffebm_compiler.demo.models:DigitsCNN", "--input", "4x1x8x8")
    assert "driven" in done("plan", *model, "--digital-drive").splitlines()[1]
    assert "driven" not in done("plan", *model)


def test_convert_shows_blocks_and_deviation() -> None:
    text = done("convert", *CNN, "--fold-batchnorm", "--feedback", "0.3")
    assert "equilibria" in text
    assert "deviation from the source" in text
    assert "0.3" in text


def test_convert_saves_and_counts_costs(tmp_path: Path) -> None:
    text = done("convert", *MLP, "--costs", "--out", "saved")
    assert text.endswith("saved to saved\n")
    assert "modelled" in text
    loaded = ffebm.load(tmp_path / "saved", digits_mlp())
    assert [block.name for block in loaded.blocks] == ["block_1"]
    assert "their_models.py" in refused("convert", *MLP, "--out", "their_models.py")


def test_convert_loads_weights(tmp_path: Path) -> None:
    model = DigitsCNN()
    torch.save(model.state_dict(), "weights.pt")
    save_file(model.state_dict(), "weights.safetensors")
    plain = done("convert", *CNN, "--fold-batchnorm")
    first = done("convert", *CNN, "--fold-batchnorm", "--weights", "weights.pt")
    assert first == done("convert", *CNN, "--fold-batchnorm", "--weights", "weights.safetensors")
    assert first != plain


def test_same_seed_same_numbers() -> None:
    assert done("convert", *MLP, "--seed", "3") == done("convert", *MLP, "--seed", "3")
    assert done("convert", *MLP, "--seed", "3") != done("convert", *MLP, "--seed", "4")


def test_check_compares_gradients() -> None:
    text = done("check", *MLP, "--feedback", "0.3", "--min-cosine", "0.999")
    assert "gradients against float64 unrolled" in text
    assert "worst cosine of ep: 1.000000" in text


def test_check_says_when_a_cosine_is_below_the_limit() -> None:
    assert run("check", *MLP, "--min-cosine", "1.1").exit_code == 1


def test_check_takes_arguments_by_name() -> None:
    model = ("their_models:Masked", "--input", "2x5:int64", "--input", "mask=2x5")
    assert "first.weight" in done("check", *model)


@pytest.mark.parametrize("name", ["part.svg", "part.html"])
def test_draw_writes_a_picture(tmp_path: Path, name: str) -> None:
    assert done("draw", *MLP, "--out", name) == f"wrote {name}\n"
    start = {".svg": "<svg", ".html": "<!doctype html"}[Path(name).suffix]
    assert (tmp_path / name).read_text(encoding="utf-8").lstrip().lower().startswith(start)
    assert f"{name} exists already" in refused("draw", *MLP, "--out", name)
    done("draw", *MLP, "--out", name, "--force")


def test_export_writes_the_digital_parts(tmp_path: Path) -> None:
    text = done("export", *MLP, "--out", "parts")
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text(encoding="utf-8"))
    parts = [step for step in manifest["steps"] if step["kind"] == "feedforward"]
    assert f"wrote {len(parts)} digital parts" in text


def test_export_writes_the_whole_hybrid(tmp_path: Path) -> None:
    done("export", *MLP, "--out", "all.onnx")
    assert (tmp_path / "all.onnx").stat().st_size > 1000
    assert "all.onnx exists already" in refused("export", *MLP, "--out", "all.onnx")


def test_model_names() -> None:
    assert "Linear on crossbar-256" in done("plan", "their_models:Box.build", "--input", "1x4")


@pytest.mark.parametrize(
    ("library", "source", "name"),
    [
        ("timm", "def create_model(name, pretrained): return _net(pretrained)", "resnet18"),
        ("torchvision", "class models:\n    get_model = staticmethod(lambda name, weights: _net(weights))", "resnet18"),
    ],
)
def test_library_models_are_built_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, source: str, name: str
) -> None:
    net = (
        "from torch import nn\n"
        "def _net(pretrained):\n"
        "    assert not pretrained\n"
        "    return nn.Sequential(nn.Conv2d(3, 2, 7, 64), nn.Flatten(), nn.LazyLinear(2) if 0 else nn.Linear(32, 2))\n"
    )
    (tmp_path / f"{library}.py").write_text(net + source, encoding="utf-8")
    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert "Sequential on crossbar-256" in done("plan", f"{library}:{name}")
    finally:
        sys.modules.pop(library, None)


def test_wrong_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm cannot be imported" in refused("plan", "timm:resnet18")


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("plan", "resnet"), "expected package.module:callable"),
        (("plan", "their_models:"), "expected package.module:callable"),
        (("plan", "no.such.module:x", "-i", "1x4"), "'no.such.module' cannot be imported (ModuleNotFoundError"),
        (("plan", "their_models.py:x", "-i", "1x4"), "their_models.py has no 'x'"),
        (("plan", "none.py:x", "-i", "1x4"), "there is no file none.py: name one that holds the model's function"),
        (("plan", "package/relative.py:x", "-i", "1x4"), "name it as a module of its package, package.relative:x"),
        (("plan", "package/alone:x", "-i", "1x4"), "cannot be imported (ModuleNotFoundError: No module named 'pack"),
        (("plan", "package/alone:x", "-i", "1x4"), "): name the file, package/alone.py:x"),
        (("plan", "leaving:x", "-i", "1x4"), "the module 'leaving' left the program while it was imported (sys.exit"),
        (("plan", "leaving.py:x", "-i", "1x4"), "the file leaving.py left the program while it was imported (sys.exit"),
        (("plan", "their_models:leaves", "-i", "1x4"), "was called (sys.exit with 'no data: give --data'): put what"),
        (("plan", "their_models:NoEval", "-i", "1x4"), "failed in eval(), in which models are converted (ValueError:"),
        (("plan", "their_models:Leaving", "-i", "1x4"), "the model's code left the program (SystemExit: 7)"),
        (("plan", *MLP, "--seed", "9" * 30), "Invalid value for '--seed'"),
        (("plan", *MLP[:2], "9" * 5000), "... (5002 letters); expected sizes of at least 1 and at most 2^30 values"),
        (("plan", *MLP[:2], "x" * 5000), "... (5002 letters); expected sizes joined by x"),
        (("plan", "transformers:GPT2Config(n_layer='x')"), "(n_layer='x') failed when its model was built ("),
        (("plan", "broken:x", "-i", "1x4"), "'broken' cannot be imported (SyntaxError"),
        (("plan", "their_models:nothing", "-i", "1x4"), "their_models has no 'nothing'"),
        (("plan", "their_models:number", "-i", "1x4"), "is of type int; expected a callable"),
        (("plan", "their_models:wrong", "-i", "1x4"), "returned an object of type int; expected a torch.nn.Module"),
        (("plan", "their_models:fails", "-i", "1x4"), "called without arguments (RuntimeError: no luck)"),
        (("plan", "their_models:lacking", "-i", "1x4"), "needs a package that cannot be imported"),
        (("plan", "their_models:made"), "no input is described"),
        (("plan", "their_models:made", "-i", "4,4"), "--input is '4,4'; expected sizes joined by x"),
        (("plan", "their_models:made", "-i", "1x4:int3"), "--input is '1x4:int3'"),
        (("plan", "their_models:made", "-i", "0x4"), "expected sizes of at least 1"),
        (("plan", "their_models:made", "-i", "1x5"), "rejects the example inputs"),
        (("plan", *MLP, "--hardware", "chip"), "unknown hardware 'chip'"),
        (("plan", *MLP, "--hardware", "chip.toml"), "chip.toml: cannot be read"),
        (("plan", *MLP, "--force-digital", "nope.*"), "nope.*"),
        (("plan", *MLP, "--on-unsupported", "maybe"), "maybe"),
        (("plan", *MLP, "--explain", "nope"), "no module or weight 'nope'"),
        (("plan", *MLP, "--out", "their_models.py"), "their_models.py exists already"),
        (("plan", *MLP, "--weights", "none.pt"), "the weights none.pt cannot be loaded (FileNotFoundError"),
        (("plan", *MLP, "--weights", "cnn.pt"), 'weights cnn.pt cannot be loaded (Missing key(s) in state_dict: "1.w'),
        (("plan", *MLP, "--weights", "parallel.pt"), "its names begin with 'module.', as those of a model inside of"),
        (("plan", *MLP, "--weights", "nested.pt"), "a checkpoint of 'epoch', 'model', and the weights may be in 'mod"),
        (("plan", *MLP, "--weights", "nested.pt"), "save them alone, torch.save(checkpoint['model'], FILE)"),
        (("plan", *MLP, "--weights", "whole.pt"), "it holds an object, torch.nn.modules.linear.Linear, and not tens"),
        (("plan", *MLP, "--weights", "list.pt"), "(it holds an object of type list): expected a state_dict"),
        (("convert", *MLP, "--feedback", "much"), "--feedback is 'much'"),
        (("convert", *MLP, "--feedback", "1"), "feedback is 1.0"),
        (("draw", *MLP, "--out", "picture.bmp"), "ends in .html (an interactive page), .svg"),
        (("draw", *MLP, "--out", "none/picture.svg"), "cannot be written"),
        (("export", *MLP, "--out", "."), "holds files that are not of an earlier export"),
        (("export", *MLP), "Missing option '--out'"),
        (("check", *MLP, "--min-cosine", "nan"), "--min-cosine is nan, which no cosine reaches"),
        (("export", *MLP, "--out", "x.onnx", "--tolerance", "nan"), "Invalid value for '--tolerance'"),
        (("demo", "--out", "."), "not of an earlier demo"),
        (("demo", "--epochs", "0"), "expected at least 1"),
        (("demo", "--epochs", "few"), "Invalid value for '--epochs'"),
        (("nothing",), "No such command 'nothing'"),
        (("--nothing",), "No such option: --nothing"),
        (("plan",), "Missing argument 'MODEL'"),
    ],
)
def test_refusals(tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    (tmp_path / "broken.py").write_text("def (", encoding="utf-8")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit('no GPU')", encoding="utf-8")
    (tmp_path / "package").mkdir()
    for name, source in (("__init__", ""), ("alone", "x = 1"), ("relative", "from .alone import x")):
        (tmp_path / "package" / f"{name}.py").write_text(source, encoding="utf-8")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "cnn.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3, "model": digits_mlp().state_dict()}, tmp_path / "nested.pt")
    torch.save(nn.DataParallel(digits_mlp()).state_dict(), tmp_path / "parallel.pt")
    assert message in refused(*args)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("args", [("plan", *MLP), ("plan", *MLP, "--json"), ("--help",), ("--version",)])
def test_output_that_cannot_be_written_is_an_error_of_one_line(args: tuple[str, ...]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        result = subprocess.run([str(FFEBM), *args], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the output cannot be written (No space left on device)")
    assert result.stderr.count("\n") == 1


def test_a_pipe_that_is_closed_is_no_error() -> None:
    with subprocess.Popen([str(FFEBM), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.close()
        assert command.stderr.read() == b""


def test_a_model_of_a_file(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "neighbour.py").write_text("from torch import nn\n", encoding="utf-8")
    (inner / "json.py").write_text("from neighbour import nn\ndef net(): return nn.Linear(4, 2)\n", encoding="utf-8")
    for name in ("inner/json.py:net", f"{inner}/json.py:net", "their_models.py:Box.build"):
        assert "Linear on crossbar-256" in done("plan", name, "--input", "1x4")


def test_a_gradient_by_name() -> None:
    text = done("check", *MLP, "--gradient", "truncated", "--min-cosine", "0.999")
    assert "worst cosine of truncated: " in text
    assert "coupled" in done("convert", *MLP, "--gradient", "coupled")
    assert "gradient is 'backprop'; expected 'ep', 'implicit'" in refused("convert", *MLP, "--gradient", "backprop")


def test_a_deep_resistive_network_by_name() -> None:
    args = ["ffebm_compiler.demo.models:DigitsCircuit", "--input", "1x1x8x8", "--energy", "drn"]
    assert "deep resistive network of conductances and diodes, γ = 1" in done("convert", *args)
    found = CliRunner().invoke(main, ["convert", *args, "--feedback", "0.2"])
    assert found.exit_code == 2
    assert "has no amplifiers" in found.output
    found = CliRunner().invoke(main, ["convert", *MLP, "--energy", "drn"])
    assert found.exit_code == 2
    assert "holds negative values" in found.output


def test_a_resistive_energy_by_name(tmp_path: Path) -> None:
    options = ("--energy", "resistive", "--feedback", "2")
    assert "resistive energy with amplifiers, γ = 2" in done("convert", *MLP, *options)
    assert "γ = 0.01" in done("convert", *MLP, "--energy", "resistive")
    done("export", *MLP, *options, "--out", str(tmp_path / "mlp.onnx"))  # verified in onnxruntime
    assert "energy is 'drm'" in refused("convert", *MLP, "--energy", "drm")


def test_feedback_weights_by_name(tmp_path: Path) -> None:
    own = ("--feedback-weights", "free")
    assert "vector field without energy, feedback through weights of its own" in done("convert", *MLP, *own)
    done("export", *MLP, *own, "--out", str(tmp_path / "mlp.onnx"))  # verified in onnxruntime
    assert "feedback_weights is 'own'; expected 'tied', 'free'" in refused("convert", *MLP, "--feedback-weights", "own")


def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    import ffebm_compiler.cli.main as cli

    def warn(*_: object) -> float:
        warnings.warn("first\nsecond", ffebm.ConvergenceWarning, stacklevel=1)
        return 0.1

    monkeypatch.setattr("ffebm_compiler.cli.options.feedback_of", warn)
    result = CliRunner().invoke(cli.main, ["convert", *MLP])
    assert result.exit_code == 0
    assert result.stderr == "warning: first second (ConvergenceWarning)\n"


def test_every_command_that_takes_a_model_has_the_options_of_one_dataclass() -> None:
    commands = typer.main.get_group(main).commands
    shared = {
        name: {param.name: (param.opts, param.default, getattr(param, "help", None)) for param in commands[name].params}
        for name in ("plan", "convert", "check", "draw", "export")
    }
    for field in dataclasses.fields(Settings):
        described = {name: options.get(field.name) for name, options in shared.items()}
        if field.name in ("energy", "feedback", "gradient", "feedback_weights"):  # a plan has none of them
            assert described.pop("plan") is None
        if field.name == "model":  # a stored plan may be drawn
            assert ".json file of ffebm plan" in str(described.pop("draw"))
        assert None not in described.values()
        assert len({str(value) for value in described.values()}) == 1, field.name
