"""What `combinations.py` does with a hybrid, and the number that each of these has to reach.

Every check raises `Wrong` where a number is off, and lets the refusals of the package through.
"""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from combination_axes import Case, devices_of, made
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ffebm_compiler as ffebm
import ffebm_compiler.onnx
from ffebm_compiler.onnx.execute import session_of
from ffebm_compiler.runtime.feedforward.zeroth_order import ZerothOrder

__all__ = ["ACTIONS", "Wrong", "check_settings"]

Gradients = dict[str, Tensor]

NEAR = {"ep", "implicit", "unrolled", "recurrent"}
"""Estimators of the gradient of the loss."""
COSINE = {"float32": 0.999, "float64": 0.999, "bf16 autocast": 0.97}
VALUE = {"float32": 2e-3, "float64": 2e-3, "bf16 autocast": 6e-2}
"""Largest relative deviation of outputs from those in float64, settled to 1e-10."""
NOISY = ("preset pcm", "preset reram")
"""Devices whose read noise is of the size of error currents, so that the gradient is checked without it."""


class Wrong(Exception):
    """A number that is off, or an option without effect."""


def expect(holds: bool, what: str) -> None:
    """Raise `Wrong` unless it holds."""
    if not holds:
        raise Wrong(what)


# -- steps ---------------------------------------------------------------------------------------


def step(case: Case, called: nn.Module, hybrid: nn.Module, x: Tensor | None = None) -> tuple[Tensor, Gradients]:
    """(output, gradients) of one step with cross-entropy, from one random state."""
    hybrid.zero_grad(set_to_none=True)
    x = case.x if x is None else x
    torch.manual_seed(3)
    with case.autocast:
        output = called(x)
        loss = F.cross_entropy(output.double(), case.target)
    loss.backward()
    found = {name: p.grad.detach() for name, p in hybrid.named_parameters() if p.grad is not None}
    return output.detach(), {name: _whole(gradient).clone() for name, gradient in found.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def quiet(hybrid: ffebm.HybridModel) -> Iterator[None]:
    """Read devices without noise and converters while the context is open."""
    blocks = list(hybrid.energy_blocks.values())
    try:
        for block in blocks:
            block.quiet = True
        yield
    finally:
        for block in blocks:
            block.quiet = False


def reference(case: Case, hybrid: ffebm.HybridModel, estimator: ffebm.EquilibriumPropagation | str | None) -> Any:
    """(output, gradients) in float64, settled to 1e-12, without noise and converters; None keeps the estimator."""
    exact = copy.deepcopy(hybrid).double()
    exact.set_solver(None)
    if estimator is not None:
        exact.set_gradient(estimator, feedforward="backprop")
    else:
        for name, block in hybrid.energy_blocks.items():  # with the nudge that noisy reads get
            exact.energy_blocks[name].estimator = block.active_estimator
    exact.set_solver(ffebm.GaussSeidel(rtol=1e-11, max_sweeps=20000))
    exact_case = Case({**case.row, "dtype": "float64"}, case.model, exact, case.x.double(), case.target)
    with quiet(exact), exact.held_feedback():
        return step(exact_case, exact, exact)


def cosine(found: Tensor, wanted: Tensor) -> float:
    """Of two gradients; 1 where both vanish."""
    a, b = found.double().flatten(), wanted.double().flatten()
    size = float(a.norm() * b.norm())
    if size < 1e-24:
        return 1.0 if float((a - b).norm()) < 1e-12 else 0.0
    return float(a @ b) / size


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖/‖wanted‖."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12))


def same(found: tuple[Tensor, Gradients], wanted: tuple[Tensor, Gradients], what: str, size: float = 0.0) -> None:
    """Outputs and gradients are equal, bit for bit or to a relative size."""
    pairs = {"the output": (found[0], wanted[0])}
    expect(found[1].keys() == wanted[1].keys(), f"{what}: gradients of {sorted(found[1].keys() ^ wanted[1].keys())}")
    pairs |= {f"the gradient of {name}": (gradient, wanted[1][name]) for name, gradient in found[1].items()}
    largest = max((float(g.double().norm()) for g in wanted[1].values()), default=0.0)
    for name, (have, want) in pairs.items():
        if size == 0:
            expect(torch.equal(have, want), f"{what}: {name} differs by {relative(have, want):.1e}")
        else:
            off = float((have.double() - want.double()).norm())
            scale = float(want.double().norm()) + (1e-3 * largest if name != "the output" else 0.0)
            expect(off <= size * scale + 1e-12, f"{what}: {name} differs by {off / (scale or 1.0):.1e}")


def check_settings(case: Case) -> None:
    """Every option of the row is what the hybrid has."""
    row, hybrid = case.row, case.hybrid
    plan = hybrid.plan.options
    expect(hybrid.energy_function.name == row["energy"], "the energy is another one")
    expect(hybrid.devices == devices_of(row), "the devices are others")
    held = [block.module.arrays for block in hybrid.blocks]
    expect(row["devices"] in ("none", "preset ideal") or None not in held, "a block is on no devices")
    expect(plan.digital_drive == (row["digital_drive"] == "yes"), "digital_drive is not in the plan")
    expect(plan.fold_batchnorm == (row["fold_batchnorm"] == "yes"), "fold_batchnorm is not in the plan")
    expect(hybrid.training == (row["mode"] == "train"), "the mode is another one")
    if row["fold_batchnorm"] == "yes":
        left = [name for part in hybrid.plan.digital_parts for name in part.operations if "batch_norm" in name]
        expect(not left, f"batch norm is still digital: {left}")
    if row["network"] == "CNN" and row["digital_drive"] == "yes" and row["fold_batchnorm"] == "no":
        expect(any(block.driven for block in hybrid.plan.blocks), "no block has a driven state")
    for block in case.coupled:
        own = block.module.estimator
        expect(own in (case.estimator, case.estimator.within()), f"{block.name} has the estimator {own}")
        if row["solver"] != "chosen":
            expect(type(block.module.solver).__name__ == row["solver"], f"{block.name} has another solver")
    if case.coupled and case.estimator.output_blocks_only:
        expect(any(block.module.estimator == case.estimator for block in case.coupled), "no block has the estimator")
    if row["feedback weights"] != "tied" and case.coupled:
        expect(bool(hybrid.feedback_names), "there are no feedback weights")
    text = hybrid.summary()
    expect(all(block.name in text for block in case.coupled), "summary() leaves a block out")


def check_step(case: Case) -> None:
    """Outputs are those in float64, gradients those of the estimator in float64 and, where it says so, of the loss."""
    row, hybrid = case.row, case.hybrid
    wanted = reference(case, hybrid, None)
    unrolled = ffebm.Unrolled(through_feedback=case.estimator.through_feedback)
    exact = reference(case, hybrid, unrolled) if case.estimator.name in NEAR else None
    noisy = row["devices"] in NOISY
    if noisy:
        found = _fresh(case)
        wanted = reference(case, _quiet_copy(hybrid), None)
        read = step(case, case.hybrid, case.hybrid)
        expect(all(bool(torch.isfinite(g).all()) for g in read[1].values()), "a gradient is not finite")
        noisy_size, size = (math.hypot(*(float(g.norm()) for g in each.values())) for each in (read[1], found[1]))
        expect(noisy_size < 10 * size, f"with noise the gradient has a size of {noisy_size:.1e}, without {size:.1e}")
        if hybrid.blocks:
            expect(not torch.equal(read[0], found[0]), "read noise changes nothing")
    else:
        found = step(case, hybrid, hybrid)
    dtype = torch.float64 if row["dtype"] == "float64" else torch.float32
    expect(all(g.dtype == dtype for g in found[1].values()), "a gradient has another dtype than its parameter")
    coarse = row["digital parts"].startswith("8 bits")
    deviation = relative(found[0], wanted[0])
    expect(deviation <= (0.1 if coarse else VALUE[row["dtype"]]), f"the output is off by {deviation:.1e}")
    expect(found[1].keys() == wanted[1].keys(), f"gradients of {sorted(found[1].keys() ^ wanted[1].keys())}")
    least = 0.9 if coarse or row["devices"] == "dynamic" else COSINE[row["dtype"]]
    if row["energy"] == "drn":  # gradients of conductances are products of differences of states that are nearly equal
        least = min(least, 0.95)
    _agree(case, found[1], wanted[1], "the same in float64", least)
    local = row["feedback weights"] != "tied" or row["devices"] == "mismatched"
    nudged = case.estimator.name == "ep" and (local or row["devices"] == "dynamic")  # a local rule, or a large nudge
    if exact is not None and not (coarse or nudged):
        _agree(case, found[1], exact[1], "the gradient of the loss", least)


def _quiet_copy(hybrid: ffebm.HybridModel) -> ffebm.HybridModel:
    copied = copy.deepcopy(hybrid)
    for block in copied.energy_blocks.values():
        block.quiet = True
    return copied


def _fresh(case: Case) -> tuple[Tensor, Gradients]:
    """A step of a copy without noise."""
    hybrid = copy.deepcopy(case.hybrid)
    with quiet(hybrid):
        return step(case, hybrid, hybrid)


def _agree(case: Case, found: Gradients, wanted: Gradients, what: str, least: float) -> None:
    """Cosines of all gradients that are no random estimates, where they are not lost among the largest."""
    random = _estimated(case) if case.row["digital parts"] == "zeroth-order" else set()
    few_bits = case.row["digital parts"].startswith("8 bits")
    rounding = 2e-2 if case.autocast_on or few_bits else 1e-5
    if few_bits and (case.autocast_on or case.row["devices"] in ("dynamic", *NOISY)):
        rounding = 0.1  # what is rounded to 8 bits jumps where it was rounded to bfloat16 or read with noise before
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in found.items():
        expect(bool(torch.isfinite(gradient).all()), f"the gradient of {name} is not finite")
        if name in random or float(wanted[name].norm()) < rounding * largest:
            continue
        value = cosine(gradient, wanted[name])
        expect(value >= least, f"the gradient of {name} has a cosine of {value:.5f} to {what}")


def _estimated(case: Case) -> set[str]:
    """Parameters whose gradient changes with the seed of the perturbations."""
    hybrid = copy.deepcopy(case.hybrid)
    found = []
    for seed in (1, 2):
        hybrid.set_gradient(case.estimator, feedforward=ZerothOrder(seed=seed))
        found.append(step(case, hybrid, hybrid)[1])
    return {name for name, gradient in found[0].items() if not torch.equal(gradient, found[1][name])}


def check_training(case: Case) -> None:
    """Two steps of an optimizer change every weight, and the loop gain stays what was asked for."""
    hybrid = case.hybrid
    before = {name: p.detach().clone() for name, p in hybrid.named_parameters()}
    optimizer = torch.optim.SGD(hybrid.parameters(), 1e-2)
    for _ in range(2):
        _, gradients = step(case, hybrid, hybrid)
        optimizer.step()
    for name, p in hybrid.named_parameters():
        moved = not torch.equal(before[name], p)
        pushed = float(gradients[name].abs().max()) if name in gradients else 0.0
        expect(moved or pushed < 1e-5, f"{name} does not move")
        expect(not moved or pushed > 0, f"{name} moves without a gradient")
    if hybrid.training and case.row["energy"] == "hopfield" and case.row["feedback"] == "number":
        for block in case.coupled:
            case.hybrid(case.x)
            expect(abs(block.loop_gain / 0.1 - 1) < 0.06, f"{block.name} has a loop gain of {block.loop_gain:.3f}")


# -- copies and files ----------------------------------------------------------------------------


def check_save(case: Case) -> None:
    """A hybrid that is loaded into another source steps as the saved one, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        case.hybrid.save(Path(folder) / "saved")
        _disturb(other := copy.deepcopy(case.model))
        again = ffebm.load(Path(folder) / "saved", other)
    _is_the_same(case, again, "loaded")


def check_state_dict(case: Case) -> None:
    """The state dict, through a file, into a hybrid of other weights."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case.hybrid.state_dict(), Path(folder) / "state.pt")
        state = torch.load(Path(folder) / "state.pt", weights_only=True)
    again = made(case.row).hybrid
    _disturb(again)
    again.load_state_dict(state)
    again.train(case.hybrid.training)
    _is_the_same(case, again, "with its state dict")


def _disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def _is_the_same(case: Case, again: ffebm.HybridModel, what: str) -> None:
    expect(again.training == case.hybrid.training, f"{what}: the mode is another one")
    expect(again.devices == case.hybrid.devices, f"{what}: the devices are others")
    if case.row["solver"] == "Measured":
        again.set_solver(next((b.module.solver for b in case.coupled), None))
    for name, block in again.energy_blocks.items():
        before = case.hybrid.energy_blocks[name]
        expect(block.estimator == before.estimator, f"{what}: the estimator of {name} is another one")
        expect(block.solver == before.solver, f"{what}: the solver of {name} is another one")
        expect(block.setting == before.setting, f"{what}: the amplifiers of {name} are set otherwise")
    wanted = case.hybrid.state_dict()
    for name, tensor in again.state_dict().items():
        expect(torch.equal(tensor, wanted[name]), f"{what}: {name} differs")
    same(step(case, again, again), step(case, case.hybrid, case.hybrid), what)


def check_deepcopy(case: Case) -> None:
    """A copy steps as the original, and shares nothing that moves."""
    again = copy.deepcopy(case.hybrid)
    wanted = step(case, case.hybrid, case.hybrid)
    shared = {p.data_ptr() for p in case.hybrid.parameters()} & {p.data_ptr() for p in again.parameters()}
    expect(not shared, "the copy shares parameters")
    same(step(case, again, again), wanted, "copied")


def check_pickle(case: Case) -> None:
    """A hybrid through torch.save steps as the original."""
    if case.row["solver"] == "Measured":
        case.hybrid(case.x)  # what the rig was programmed with goes along
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case.hybrid, Path(folder) / "hybrid.pt")
        again = torch.load(Path(folder) / "hybrid.pt", weights_only=False)
    same(step(case, again, again), step(case, case.hybrid, case.hybrid), "unpickled")


def check_to_digital(case: Case) -> None:
    """The digital module computes what the source does, in this mode, and has no feedback weights."""
    digital = case.hybrid.to_digital()
    source = copy.deepcopy(case.model).train(case.hybrid.training)
    with torch.no_grad(), case.autocast:
        expect(digital.training == source.training, "the mode is another one")
        expect(torch.equal(digital(case.x), source(case.x)), "it computes something else than the source")
    expect(list(digital.state_dict()) == list(source.state_dict()), "it has other keys than the source")


# -- exports -------------------------------------------------------------------------------------


def _expected_in_eval(case: Case) -> Tensor:
    hybrid = copy.deepcopy(case.hybrid).eval()
    with torch.no_grad():
        return hybrid(case.x)


@contextmanager
def _train_mode_warned(case: Case) -> Iterator[None]:
    """An export in train mode warns if train mode computes something else, and only then."""
    differs = case.hybrid.training and case.row["network"] == "CNN" and case.row["fold_batchnorm"] == "no"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ffebm.FFEBMWarning)
        yield
    told = [str(w.message) for w in seen if issubclass(w.category, ffebm.FFEBMWarning)]
    expect(any("train mode" in text for text in told) == differs, f"warnings of train mode: {told}")


def check_onnx(case: Case) -> None:
    """onnxruntime gives what the hybrid gives in eval mode, to the accuracy of a settled block."""
    wanted = _expected_in_eval(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hybrid.onnx"
        with _train_mode_warned(case), case.autocast:
            case.hybrid.export_onnx(path)
        session = session_of(path)
        (found,) = session.run(None, {session.get_inputs()[0].name: case.x.numpy()})
    _as_exported(case, torch.from_numpy(found), wanted)


def check_onnx_parts(case: Case) -> None:
    """The digital parts in onnxruntime and the blocks here give what the hybrid gives in eval mode."""
    wanted = _expected_in_eval(case)
    with tempfile.TemporaryDirectory() as folder:
        with _train_mode_warned(case), case.autocast:
            case.hybrid.export_onnx(Path(folder) / "parts", parts="digital")
        (found,) = ffebm_compiler.onnx.run(Path(folder) / "parts", case.x)
    _as_exported(case, found, wanted)


def _as_exported(case: Case, found: Tensor, wanted: Tensor) -> None:
    off = relative(found, wanted)
    coarse = case.row["digital parts"].startswith("8 bits")  # a file holds float32
    expect(off <= (0.1 if coarse else 2e-4), f"the file deviates by {off:.1e}")


def check_page(case: Case) -> None:
    """What the page holds is what the plan says."""
    plan = case.hybrid.plan
    with tempfile.TemporaryDirectory() as folder, case.autocast:
        case.hybrid.save_html(Path(folder) / "page.html", comparison=case.hybrid.compare(case.x))
        text = (Path(folder) / "page.html").read_text(encoding="utf-8")
    found = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', text, re.DOTALL)
    expect(found is not None, "the page has no data")
    (record,) = json.loads(found[1])  # type: ignore[index]
    expect(sum(op["macs"] for op in record["ops"]) == plan.total_macs, "the MACs are others")
    expect(plan.fingerprint in record["provenance"], "the fingerprint is another one")
    totals = dict(reversed(row) for row in record["totals"])
    expect(totals["DAC values"] == f"{sum(b.dac for b in plan.blocks):g}", "the DAC values are others")
    names = [home["title"] if "title" in home else home.get("name") for home in record["homes"]]
    expect(len(names) == len(plan.blocks) + len(plan.digital_parts), "there are other blocks and parts")


def check_spice(case: Case) -> None:
    """Voltages of the netlist in ngspice are those that it expects, and those are the states of the hybrid."""
    if not case.coupled:
        raise ffebm.InputError("no block has feedback, so that there is no circuit that settles: use another network")
    block = case.coupled[-1]
    with tempfile.TemporaryDirectory() as folder, case.autocast:
        path = case.hybrid.export_spice(Path(folder) / "block.cir", block=block.name, inputs=case.x, emission=1e-4)
        text = path.read_text()
        done = subprocess.run(["ngspice", "-b", str(path)], capture_output=True, text=True, timeout=60, check=False)
    wanted = {m[1].lower(): float(m[2]) for m in re.finditer(r"expected v\((\w+)\) = (\S+)", text)}
    found = {m[1]: float(m[2]) for m in re.finditer(r"v\((\w+)\) = ([-+\d.e]+)", done.stdout)}
    expect(found.keys() == wanted.keys(), f"ngspice prints other nodes: {done.stderr[-200:]}")
    largest = max(map(abs, wanted.values()))
    off = max(abs(found[name] - value) for name, value in wanted.items()) / largest
    expect(off < 2e-3, f"ngspice deviates by {off:.1e}")
    exact = copy.deepcopy(case.hybrid).eval().double()
    exact.set_solver(None)
    exact.set_gradient("ep")
    exact.set_solver(ffebm.GaussSeidel(rtol=1e-11, max_sweeps=20000))
    with quiet(exact), torch.no_grad():
        exact(case.x.double())
    last = next(b for b in exact.blocks if b.name == block.name)
    unit = float(re.search(r"a unit of a state is (\S+) V", text)[1])  # type: ignore[index]
    gains = last.module.setting.amplifiers or [1.0] * len(last.states)
    name = last.state_names[-1].lower().replace(".", "_")
    for i, value in enumerate(last.states[-1][0].flatten().tolist()):
        off = abs(wanted[f"v_{name}_{i}"] - unit * value / gains[-1]) / largest
        expect(
            off < (0.05 if case.row["devices"] in ("dynamic", *NOISY) or case.autocast_on else 1e-3),
            f"v_{name}_{i} is off by {off:.1e}",
        )


def check_power(case: Case) -> None:
    """What the circuits dissipate is what their sources deliver."""
    with case.autocast:
        report = case.hybrid.power_report(case.x)
    str(report)
    for block in report.blocks:
        delivered = block.inputs + block.biases + block.amplifiers
        size = 3e-2 if case.autocast_on or case.row["devices"] in ("dynamic", *NOISY) else 1e-3
        expect(
            abs(delivered / block.total - 1) < size,
            f"{block.block} gets {delivered:.3e} W, dissipates {block.total:.3e}",
        )


# -- engines -------------------------------------------------------------------------------------


def check_compile(case: Case) -> None:
    """A compiled step is the eager one."""
    other = copy.deepcopy(case.hybrid)
    wanted = step(case, other, other)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        found = step(case, torch.compile(case.hybrid, backend="aot_eager"), case.hybrid)
    same(found, wanted, "compiled", 2e-2 if case.autocast_on else 1e-3)


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """(rank, number) of the processes: those that torchrun started, or this one alone."""
    own = not dist.is_initialized()
    with tempfile.TemporaryDirectory() as folder:
        if own:
            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(f"{folder}/store", 1))
        try:
            yield dist.get_rank(), dist.get_world_size()
        finally:
            if own:
                dist.destroy_process_group()


def _in_parallel(case: Case, wrap: Callable[[ffebm.HybridModel], nn.Module], what: str) -> None:
    """A step of several processes, each with its share of the batch, is that of one."""
    with processes() as (rank, count):
        alone = copy.deepcopy(case.hybrid)
        whole = step(case, alone, alone)
        x, target = (value.chunk(count)[rank] for value in (case.x, case.target))
        found = step(Case(case.row, case.model, case.hybrid, x, target), wrap(case.hybrid), case.hybrid)
        # A smaller batch may stop a sweep earlier: error currents settle to 3e-3 in train mode.
        size = {"float32": 1e-2, "float64": 1e-2, "bf16 autocast": 5e-2}[case.row["dtype"]]
        if count > 1 and _depends_on_the_batch(case):
            expect(all(bool(torch.isfinite(g).all()) for g in found[1].values()), f"{what}: not finite")
            expect(found[1].keys() == whole[1].keys(), f"{what}: gradients of other parameters")
        else:
            same(found, (whole[0].chunk(count)[rank], whole[1]), what, size)


def _depends_on_the_batch(case: Case) -> bool:
    """Whether a share of the batch has other results than its samples in the whole batch."""
    row = case.row
    statistics = row["network"] == "CNN" and case.hybrid.training
    drawn = row["devices"] in ("dynamic", *NOISY) or row["digital parts"] == "zeroth-order"
    by_size = case.estimator.name in ("contrastive", "cost-nudged")  # a step of a size that the loss says
    return statistics or drawn or by_size or row["digital parts"] == "8 bits, quantised"


def check_ddp(case: Case) -> None:
    """DistributedDataParallel."""
    _in_parallel(case, DistributedDataParallel, "DDP")


def check_fsdp(case: Case) -> None:
    """FSDP2, every child of the source a unit, and the hybrid."""

    def wrap(hybrid: ffebm.HybridModel) -> nn.Module:
        # torch says so of the plain source too.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        for name, _ in case.model.named_children():
            unit = hybrid.get_submodule(name)
            if any(True for _ in unit.parameters()):
                fully_shard(unit)
        fully_shard(hybrid)
        return hybrid

    with warnings.catch_warnings():
        _in_parallel(case, wrap, "FSDP2")


# -- reports -------------------------------------------------------------------------------------


def check_gradients(case: Case) -> None:
    """check_gradients finds implicit gradients exact, and the hybrid's own as near as its estimator is."""
    with case.autocast:
        report = ffebm.check_gradients(case.hybrid, case.x, lambda y: F.cross_entropy(y.double(), case.target))
    str(report)
    row = case.row
    coarse = row["digital parts"] != "backprop"
    expect(report.own.split(",")[0] == case.estimator.name or not case.coupled, f"its own estimator is {report.own}")
    noisy = row["devices"] in NOISY or row["devices"] == "dynamic"
    if row["devices"] in NOISY or (coarse and (noisy or case.autocast_on)):
        return  # gradients at states that noise has moved, or that jump between steps of 8 bits
    for name in ("implicit", "unrolled"):
        # The bias before batch norm has no gradient in train mode, but for what noise and few bits make.
        kept = [p for p in report.agreements if p != "second.0.bias" or not (coarse or noisy)]
        parameter = min(kept, key=lambda each, name=name: report[each][name].cosine)
        agreement = report[parameter][name]
        least = 0.9 if row["devices"] in NOISY or row["digital parts"].startswith("8 bits") else COSINE[row["dtype"]]
        least = min(least, 0.95) if row["energy"] == "drn" else least
        expect(agreement.cosine >= least, f"{name} of {parameter} has a cosine of {agreement.cosine:.5f}")
    local = row["feedback weights"] != "tied" or row["devices"] == "mismatched"
    if case.estimator.name == "ep" and not (local or coarse or noisy):
        parameter, agreement = report.worst("ep")
        expect(
            agreement.cosine >= (0.95 if row["energy"] == "drn" else COSINE[row["dtype"]]),
            f"ep of {parameter} has a cosine of {agreement.cosine:.5f}",
        )


def check_compare(case: Case) -> None:
    """The deviation at the output is that from the source in eval mode. With noise it lies among those of its draws."""
    hybrid = copy.deepcopy(case.hybrid).eval()
    source = copy.deepcopy(case.model).eval()
    noisy = case.row["devices"] in ("dynamic", *NOISY)
    with torch.no_grad(), case.autocast:
        wanted = source(case.x)

        def deviation(seed: int) -> float:
            torch.manual_seed(seed)
            return relative(hybrid(case.x), wanted)

        with nullcontext() if not noisy else quiet(hybrid), nullcontext() if not noisy else quiet(case.hybrid):
            off = deviation(3)
            torch.manual_seed(3)
            report = case.hybrid.compare(case.x)
        str(report)
        size = 2e-2 if case.autocast_on else 1e-4
        expect(abs(report.output - off) <= size + 0.05 * off, f"it says {report.output:.2e}, and it is {off:.2e}")
        if noisy:
            drawn = [deviation(seed) for seed in range(20)]
            told = case.hybrid.compare(case.x).output
            expect(told != report.output, "it says with noise what it says without")
            expect(
                0.5 * min(drawn) <= told <= 2 * max(drawn),
                f"with noise it says {told:.2e}, and 20 draws have {min(drawn):.2e} to {max(drawn):.2e}",
            )
    expect(set(report.blocks) == {block.name for block in case.hybrid.blocks}, "a block is left out")


def check_costs(case: Case) -> None:
    """The figures of blocks and digital parts add up to the totals."""
    report = case.hybrid.cost_report()
    str(report), report.to_dict()
    total = report.digital_parts
    for block in report.blocks:
        total = total + block.inference
    for have, want in ((total.low, report.inference.low), (total.high, report.inference.high)):
        expect(
            have is None or want is None or abs(have - want) <= 1e-9 * abs(want), f"{total} is not {report.inference}"
        )
    expect(
        {block.block for block in report.blocks} == {block.name for block in case.hybrid.plan.blocks}, "blocks differ"
    )


ACTIONS: dict[str, Callable[[Case], None]] = {
    "step": check_step,
    "training": check_training,
    "save and load": check_save,
    "state dict": check_state_dict,
    "deepcopy": check_deepcopy,
    "pickle": check_pickle,
    "to_digital": check_to_digital,
    "ONNX": check_onnx,
    "ONNX parts": check_onnx_parts,
    "page": check_page,
    "SPICE": check_spice,
    "power_report": check_power,
    "compile": check_compile,
    "DDP": check_ddp,
    "FSDP2": check_fsdp,
    "check_gradients": check_gradients,
    "compare": check_compare,
    "cost_report": check_costs,
}
