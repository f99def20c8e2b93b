"""Export hybrids to ONNX and measure them in onnxruntime beside torch, with one thread.

    python benchmarks/onnx_inference.py [--only PATTERN ...] [--out benchmarks/results/onnx.json] [--parts]

Per model (the networks of the tests, and those of the zoo that match): seconds of the export, megabytes,
the largest relative deviation of onnxruntime from the torch hybrid at batch 1 and 7 (exported once), and
milliseconds per call at batch 7 of the source, of the hybrid in torch and of the hybrid in onnxruntime.
With --parts the digital parts are exported too, and run by their manifest. Exit status 1 where a model
does not export or deviates by more than 1e-5.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.utils._pytree as pytree
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import networks
from measuring import add_out, keep
from zoo_models import MODELS

import ffebm_compiler as ffebm
import ffebm_compiler.onnx

LIMIT = 1e-5
ZOO = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:vgg11_bn",
    "torchvision:mobilenet_v2",
    "torchvision:densenet121",
    "torchvision:squeezenet1_0",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:regnet_y_400mf",
    "torchvision:efficientnet_b0",
    "torchvision:convnext_tiny",
    "timm:vit_tiny_patch16_224",
    "timm:mixer_s16_224",
    "timm:poolformer_s12",
    "transformers:gpt2",
)


def _reference() -> tuple[Any, Any, Any, dict[str, Any]]:
    options = {
        "hardware": ffebm.Hardware(layers_per_block=5),
        "feedback": "symmetric",
        "block_ops": ("add", "reshape", "avg_pool"),
    }
    return networks.dchn(), (networks.dchn_reference()["x"],), {}, options


def _small(make: Callable[[], Any], **options: Any) -> Callable[[], tuple[Any, Any, Any, dict[str, Any]]]:
    def build() -> tuple[Any, Any, Any, dict[str, Any]]:
        model, x = make()
        return model, (x,), {}, options

    return build


def _zoo(name: str) -> Callable[[], tuple[Any, Any, Any, dict[str, Any]]]:
    def build() -> tuple[Any, Any, Any, dict[str, Any]]:
        model, args, kwargs = MODELS[name]()
        return model.eval(), args, kwargs, {}

    return build


CASES = {
    "digits CNN": _small(networks.digits_cnn),
    "digits CNN, folded": _small(networks.digits_cnn, fold_batchnorm=True),
    "transformer": _small(networks.transformer),
    "reference DCHN": _reference,
    **{name: _zoo(name) for name in ZOO},
    **{f"{name}, folded": (lambda name=name: (*_zoo(name)()[:3], {"fold_batchnorm": True})) for name in ZOO[:2]},
}


def _resized(tree: Any, size: int) -> Any:
    """The same inputs with another batch size."""
    return pytree.tree_map(
        lambda t: t.repeat_interleave(size, 0)[:size] if isinstance(t, Tensor) and t.dim() else t, tree
    )


def _milliseconds(run: Callable[[], object]) -> float:
    run()
    times = []
    while len(times) < 3 or (sum(times) < 1 and len(times) < 50):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def _tensors(tree: Any) -> list[Tensor]:
    return [item for item in pytree.tree_leaves(tree) if isinstance(item, Tensor)]


def _deviation(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative deviation; infinite where anything is NaN."""
    worst = 0.0
    for have, want in zip(found, expected, strict=True):
        if want.is_floating_point():
            deviation = float((have - want).double().norm() / want.double().norm().clamp_min(1e-12))
            worst = max(worst, float("inf") if deviation != deviation else deviation)
    return worst


def measure(name: str, parts: bool) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    model, args, kwargs, options = CASES[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # timm's classifiers start at zero: nothing would be compared
            if not parameter.any():
                parameter.normal_(std=0.02)
    hybrid = ffebm.convert(model, args, kwargs, **options).eval()
    row: dict[str, Any] = {"model": name, "blocks": len(hybrid.blocks), "deviation": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hybrid.onnx"
        start = time.perf_counter()
        hybrid.export_onnx(file)
        row["export_s"] = time.perf_counter() - start
        row["megabytes"] = sum(item.stat().st_size for item in Path(folder).iterdir()) / 1e6
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(file), options)
        names = [item.name for item in session.get_inputs()]
        exported = None
        if parts:
            start = time.perf_counter()
            hybrid.export_onnx(Path(folder) / "parts", parts="digital")
            row["export_parts_s"] = time.perf_counter() - start
            exported = ffebm_compiler.onnx.load(Path(folder) / "parts", threads=1)
        for size in (1, 7):
            few_args, few_kwargs = _resized((args, kwargs), size)
            feed = {key: t.numpy() for key, t in zip(names, _tensors((few_args, few_kwargs)), strict=True)}
            with torch.no_grad():
                expected = _tensors(hybrid(*few_args, **few_kwargs))
            found = [torch.from_numpy(item) for item in session.run(None, feed)]
            row["deviation"] = max(row["deviation"], _deviation(found, expected))
            if exported is not None:
                deviation = _deviation(exported.run(_tensors((few_args, few_kwargs))), expected)
                row["deviation_parts"] = max(row.get("deviation_parts", 0.0), deviation)
        with torch.no_grad():
            row["source_ms"] = _milliseconds(lambda: model(*few_args, **few_kwargs))
            row["hybrid_ms"] = _milliseconds(lambda: hybrid(*few_args, **few_kwargs))
        row["onnxruntime_ms"] = _milliseconds(lambda: session.run(None, feed))
    return row


def main() -> int:
    """Print a row per model; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of model names")
    add_out(parser)
    parser.add_argument("--parts", action="store_true", help="export and run the digital parts too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows, failed = [], False
    for name in CASES:
        if not any(fnmatch.fnmatch(name, pattern) for pattern in given.only):
            continue
        try:
            row = measure(name, given.parts)
        except Exception as error:  # a benchmark goes on to the next model
            row = {"model": name, "error": f"{type(error).__name__}: {error}"}
        failed |= "error" in row or max(row["deviation"], row.get("deviation_parts", 0.0)) > LIMIT
        rows.append(row)
        cells = [f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()]
        print("  ".join(cells), flush=True)
    keep(rows, given.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
