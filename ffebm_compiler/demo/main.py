"""The demo: the whole idea end to end on real data, ending in a table of numbers with their targets.

A convolutional network is trained by backpropagation on scikit-learn's digits, converted with one call (batch
norm kept, and folded), checked, fine-tuned by equilibrium propagation, drawn, and its digital parts run in
onnxruntime. `ffebm demo` runs it; everything is seeded and runs on one thread.
"""

from __future__ import annotations

import copy
import io
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from ffebm_compiler.convert import convert
from ffebm_compiler.demo.models import Digits, DigitsCNN, load_digits
from ffebm_compiler.demo.onnx import Deviations, onnx_deviations, require_onnx
from ffebm_compiler.demo.report import Row, Steps, results_text, write_results
from ffebm_compiler.demo.settings import DemoSettings
from ffebm_compiler.errors import InputError
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.reports.checks import GradientReport, check_gradients
from ffebm_compiler.reports.text import table_text

__all__ = ["DemoSettings", "run_demo"]

FEEDBACK = 0.1
LOOP_GAINS = (0.03, 0.1, 0.3, 0.5)
_BATCH = 64


@dataclass
class _Variant:
    """One way to convert the source, and what was measured on it."""

    name: str
    hybrid: HybridModel
    converted: float
    gradients: GradientReport
    tuned: float = 0.0
    history: list[float] = field(default_factory=list)
    losses: tuple[float, float] = (0.0, 0.0)
    """Loss on the training set, before and after the fine-tuning."""


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers in eval mode, in per cent."""
    training = model.training
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(256), labels.split(256), strict=True)
        )
    model.train(training)
    return 100 * right / len(labels)


def run_demo(settings: DemoSettings, console: Console, quiet: bool = False) -> bool:
    """Run the demo, write its files to `settings.out` and say whether every target was met.

    Args:
        settings: seeds, epochs, folder. The folder must be free or hold an earlier demo's files.
        console: where the report goes.
        quiet: print the final table only.
    """
    threads = torch.get_num_threads()
    # The layers are too small to gain from a second thread, and with one thread the numbers are repeatable.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(settings.seed)
            return _run(settings, console, quiet)
    finally:
        torch.set_num_threads(threads)


def _run(settings: DemoSettings, console: Console, quiet: bool) -> bool:
    started = time.perf_counter()
    steps = Steps(console, quiet)
    out = settings.out
    write_results(out, settings, [], {}, finished=False)
    require_onnx()
    data = load_digits()

    source = DigitsCNN()
    steps.title(f"1. Train {type(source).__name__} by backpropagation on {len(data.y_train)} digits")
    _train(source, data, settings.epochs, 1e-2, 1e-2, steps, "backpropagation")
    source.eval()
    reached = accuracy(source, data.x_test, data.y_test)
    steps.say(f"source: {reached:.2f} % of {len(data.y_test)} test digits")
    weights = io.BytesIO()
    torch.save(source.state_dict(), weights)
    write_whole(out / "source.pt", weights.getvalue(), failure="the weights cannot be written", error=InputError)

    steps.title("2. Convert it with one call, batch norm kept and folded")
    kept = _convert(source, "kept", data, out, steps)
    folded = _convert(source, "folded", data, out, steps)

    steps.title("3. Gradients of EP and implicit differentiation against unrolled, batch norm folded")
    steps.say(str(folded.gradients))
    with steps.working("implicit against unrolled, both in float64"):
        exact = _gradients(copy.deepcopy(folded.hybrid).double(), data)
    exact_error = max(row["implicit"].relative_error for row in exact.agreements.values())
    sweep = _sweep(source, folded.hybrid, data, steps) if settings.sweep else []

    steps.title("4. Fine-tune by equilibrium propagation")
    for variant in (kept, folded):
        what = f"EP, batch norm {variant.name}"
        before = _training_loss(variant.hybrid, data)
        variant.history = _train(variant.hybrid, data, settings.ep_epochs, 1e-4, 0.0, steps, what)
        variant.losses = (before, _training_loss(variant.hybrid, data))
        variant.hybrid.eval()
        variant.tuned = accuracy(variant.hybrid, data.x_test, data.y_test)
        steps.say(
            f"batch norm {variant.name}: accuracy {variant.converted:.2f} % -> {variant.tuned:.2f} %, "
            f"loss on the training set {before:.4f} -> {variant.losses[1]:.4f}"
        )

    steps.title("5. Export to ONNX and run in onnxruntime")
    exported: dict[str, Deviations] = {}
    for variant in (kept, folded):
        folder = out / f"onnx-{variant.name}"
        with steps.working(f"export and run, batch norm {variant.name}"):
            exported[variant.name] = onnx_deviations(variant.hybrid, folder, data.x_test[:32])
        count = len(exported[variant.name].parts)
        parts_of = f"{count} digital part{'' if count == 1 else 's'}"
        steps.say(f"batch norm {variant.name}: {parts_of} in {folder}, the whole hybrid in {folder}.onnx")
    parts = [deviation for found in exported.values() for deviation in found.parts.values()]
    whole = max(found.whole for found in exported.values())

    rows = [
        Row.least("source accuracy, test", reached, 96.0, "%"),
        Row.least("converted, batch norm kept", kept.converted, reached - 1, "%"),
        Row.least("converted, batch norm folded", folded.converted, reached - 1, "%"),
        Row.least("EP gradient, worst cosine, kept", kept.gradients.worst("ep")[1].cosine, 0.999),
        Row.least("EP gradient, worst cosine, folded", folded.gradients.worst("ep")[1].cosine, 0.999),
        Row.least("implicit gradient, worst cosine", folded.gradients.worst("implicit")[1].cosine, 0.999),
        Row.most("implicit, relative error in float64", exact_error, 1e-8),
        Row.least("fine-tuned by EP, batch norm kept", kept.tuned, reached - 0.3, "%"),
        Row.least("fine-tuned by EP, batch norm folded", folded.tuned, reached - 0.3, "%"),
        Row.most(f"{len(parts)} digital parts in onnxruntime, deviation", max(parts), 1e-5),
        Row.most("hybrid as one ONNX file, deviation", whole, 1e-5),
        Row.most("run time", time.perf_counter() - started, 180.0, "s"),
    ]
    more = {
        "history": {variant.name: variant.history for variant in (kept, folded)},
        "losses": {variant.name: variant.losses for variant in (kept, folded)},
        "blocks": {variant.name: [list(b.layers) for b in variant.hybrid.plan.blocks] for variant in (kept, folded)},
        "onnx": {name: asdict(found) for name, found in exported.items()},
        "sweep": sweep,
    }
    write_results(out, settings, rows, more, finished=True)
    steps.title("Results")
    steps.always(results_text(rows))
    steps.always(f"pictures, plans, ONNX files and results.json are in {out}")
    return all(row.met for row in rows)


def _convert(source: nn.Module, name: str, data: Digits, out: Path, steps: Steps) -> _Variant:
    """Convert the source with batch norm kept or folded; write its plan and pictures, measure it."""
    with steps.working(f"convert, batch norm {name}"):
        hybrid = convert(source, data.x_train[:2], feedback=FEEDBACK, fold_batchnorm=name == "folded")
    hybrid.plan.to_json(out / f"plan-{name}.json")
    hybrid.save_svg(out / f"partition-{name}.svg")
    hybrid.save_html(out / f"partition-{name}.html")
    steps.say(f"\nbatch norm {name}:\n{hybrid.plan}")
    converted = accuracy(hybrid, data.x_test, data.y_test)
    steps.say(f"accuracy after conversion, at loop gain {FEEDBACK}: {converted:.2f} %")
    with steps.working("gradients of all parameters, by each estimator"):
        return _Variant(name, hybrid, converted, _gradients(hybrid, data))


def _train(
    model: nn.Module, data: Digits, epochs: int, rate: float, decay: float, steps: Steps, what: str
) -> list[float]:
    """Train with AdamW and one learning-rate cycle; test accuracy after each epoch, in per cent.

    The loop is the same for the source and a hybrid, whose loop gains are certified again after each epoch.
    """
    batches = len(data.y_train) // _BATCH  # a last batch of three would have poor statistics
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    history = []
    with steps.progress(what, epochs * batches) as advance:
        for _ in range(epochs):
            model.train()
            for index in torch.randperm(len(data.y_train), device="cpu").split(_BATCH)[:batches]:
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(data.x_train[index]), data.y_train[index])
                loss.backward()
                optimizer.step()
                schedule.step()
                advance(f"loss {loss.item():.3f}")
            if isinstance(model, HybridModel):
                model.recertify()
            history.append(accuracy(model, data.x_test, data.y_test))
    return history


def _training_loss(model: nn.Module, data: Digits) -> float:
    """Mean cross-entropy on the training set, in eval mode."""
    model.eval()
    with torch.no_grad():
        return float(functional.cross_entropy(model(data.x_train), data.y_train))


def _gradients(hybrid: HybridModel, data: Digits) -> GradientReport:
    images, labels = data.x_train[:32], data.y_train[:32]
    dtype = next(hybrid.parameters()).dtype
    return check_gradients(hybrid, images.to(dtype), lambda scores: functional.cross_entropy(scores, labels))


def _sweep(source: nn.Module, hybrid: HybridModel, data: Digits, steps: Steps) -> list[dict[str, float]]:
    """Accuracy against loop gain, without retraining; the hybrid's feedback is restored."""
    with torch.no_grad():
        expected = source(data.x_test).argmax(1)
    found = []
    with steps.progress("accuracy against loop gain", len(LOOP_GAINS)) as advance:
        for gain in LOOP_GAINS:
            hybrid.set_feedback(gain)
            comparison = hybrid.compare(data.x_test)
            with torch.no_grad():
                answers = hybrid(data.x_test).argmax(1)
            found.append(
                {
                    "loop_gain": gain,
                    "accuracy": accuracy(hybrid, data.x_test, data.y_test),
                    "agreement": 100 * float((answers == expected).float().mean()),
                    "deviation": comparison.output,
                    "sweeps": float(max(comparison.sweeps.values())),
                }
            )
            advance(f"κ = {gain}")
    hybrid.set_feedback(FEEDBACK)
    columns = ("loop gain", "accuracy %", "agreement %", "output deviation", "sweeps")
    rows = [
        (
            f"{r['loop_gain']:g}",
            f"{r['accuracy']:.2f}",
            f"{r['agreement']:.2f}",
            f"{r['deviation']:.3f}",
            f"{r['sweeps']:.0f}",
        )
        for r in found
    ]
    steps.always(table_text("accuracy against loop gain, batch norm folded, no retraining", columns, rows))
    return found
