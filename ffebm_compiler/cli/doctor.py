"""`ffebm doctor`: versions, the processor's kernels, devices, optional packages, and a small network as a test."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import typer
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.cli.named_model import first_line
from ffebm_compiler.cli.printing import Json, say, say_json
from ffebm_compiler.reports.text import table_text

__all__ = ["Finding", "doctor", "findings"]

_OPTIONAL = (
    ("matplotlib", "plots", "pictures of measurements"),
    ("onnx", "onnx", "ffebm export"),
    ("onnxscript", "onnx", "ffebm export"),
    ("onnxruntime", "onnx", "running what was exported"),
    ("sklearn", "demo", "the digits of ffebm demo"),
    ("timm", "zoo", "models named timm:NAME"),
    ("torchvision", "zoo", "models named torchvision:NAME"),
    ("transformers", "zoo", "models named transformers:NAME"),
)
"""Package, the extra that brings it, what it is for."""
_DISTRIBUTION = {"sklearn": "scikit-learn"}
_PROGRAMS = (
    ("ngspice", "ffebm.Ngspice, running netlists"),
    ("c++", "torch.compile on a CPU"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    found: str
    """Its version or value; or `missing`, or `broken`."""
    remark: str = ""
    """What it is for, or what to do."""


def doctor(as_json: Json = False) -> None:
    """Say what is installed here and what is missing: versions, kernels, devices, optional packages, a small test.

    Exit code 1 if the test fails. Include the output in a report of a fault.
    """
    groups = findings()
    test = _test()
    if as_json:
        say_json({**{name: [asdict(each) for each in group] for name, group in groups.items()}, "test": asdict(test)})
    else:
        for name, group in groups.items():
            say(table_text(name, ("what", "found", "remark"), [(each.what, each.found, each.remark) for each in group]))
            say("")
        say(f"test: {test.found}. {test.remark}")
    if test.found != "passed":
        raise typer.Exit(1)


def findings() -> dict[str, list[Finding]]:
    """What is installed, by group."""
    return {
        "versions": [
            Finding("ffebm-compiler", ffebm.__version__),
            Finding("Python", platform.python_version(), platform.platform(terse=True)),
            Finding("torch", torch.__version__),
            *(Finding(name, importlib.metadata.version(name)) for name in ("numpy", "networkx", "safetensors")),
        ],
        "processor and devices": [*_processor(), *_devices()],
        "optional packages": [*(_package(*row) for row in _OPTIONAL), *(_program(*row) for row in _PROGRAMS)],
    }


def _processor() -> Sequence[Finding]:
    onednn = "available" if torch.backends.mkldnn.is_available() else "missing"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    return (
        Finding(
            "instructions", torch.backends.cpu.get_cpu_capability(), "that torch's kernels use (ATEN_CPU_CAPABILITY)"
        ),
        Finding("oneDNN", onednn, f"ONEDNN_MAX_CPU_ISA={limit}" if limit else "convolutions on a CPU"),
        Finding("threads", str(torch.get_num_threads()), f"of {os.cpu_count()} processors (OMP_NUM_THREADS)"),
    )


def _devices() -> Sequence[Finding]:
    found = []
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found.append(Finding(f"cuda:{index}", torch.cuda.get_device_name(index), f"{memory:.0f} GiB"))
    if torch.backends.mps.is_available():
        found.append(Finding("mps", "available"))
    return found or [Finding("accelerator", "none", "everything runs on the CPU")]


def _package(name: str, extra: str, purpose: str) -> Finding:
    try:
        version = importlib.metadata.version(_DISTRIBUTION.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", f"{purpose}: pip install 'ffebm-compiler[{extra}]'")
    try:
        importlib.import_module(name)
    except Exception as error:  # a build for another torch raises RuntimeError
        return Finding(
            name, "broken", f"{version}: {first_line(error)}. Install a build that fits torch {torch.__version__}"
        )
    return Finding(name, version, purpose)


def _program(name: str, purpose: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, path or "missing", purpose)


def _test() -> Finding:
    """Convert a small network, settle it, and compare its EP gradients with unrolled ones."""
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            x = torch.randn(4, 8, device="cpu")
            hybrid = ffebm.convert(model, x)
            report = ffebm.check_gradients(hybrid, x, lambda output: output.square().mean())
        cosine = report.worst("ep")[1].cosine
    except Exception as error:  # whatever is wrong with this installation
        return Finding("a small network", "failed", first_line(error))
    found = "passed" if cosine > 0.999 else "failed"
    return Finding(
        "a small network", found, f"A small network converts, settles and trains: EP's worst cosine is {cosine:.6f}"
    )
