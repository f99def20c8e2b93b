"""A dozen real architectures of `benchmarks/zoo.py`, with an independent count of their weights."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.solvers.base import GaussSeidel

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import zoo
from zoo_models import load_torchvision

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)

DOZEN = [
    "timm:resnet18",
    "timm:mobilenetv3_small_050",
    "timm:resnetv2_50x1_bit",  # standardised weights: the weight itself is computed
    "timm:vit_tiny_patch16_224",
    "timm:ghostnet_050",
    "torchvision:swin_t",  # writes through views
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_0",
    "transformers:bert",
    "transformers:gpt2",  # Conv1D, a tied head and a hand-written GELU
    "transformers:albert",  # one layer used twice
    "transformers:llama",  # a no_grad region
    "transformers:t5_encoder",
]


def _two_layers() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU()).eval(), torch.randn(3, 6)


def test_the_residual_column_is_that_of_the_equilibrium_equation() -> None:
    model, x = _two_layers()
    hybrid = ffebm.convert(model, x, feedback=0.9, solver=GaussSeidel(max_sweeps=1, on_failure="warn"))
    found = zoo.settling(hybrid, (x,), {})
    (block,) = hybrid.blocks
    # The equations of two layers, written down once more.
    (first, second), (c1, c2) = block.states, block.module.scales
    with torch.no_grad():
        updated = (
            torch.relu(model[0](x) + (c2 / c1) * second @ model[2].weight),
            torch.relu(model[2](first)),
        )
    expected = max(float((new - old).norm() / old.norm()) for new, old in zip(updated, (first, second), strict=True))
    (row,) = found["blocks"]
    assert expected > zoo.RESIDUAL
    assert row["residual"] == pytest.approx(expected, rel=1e-4)
    assert (row["sweeps"], row["converged"], row["max_pool"]) == (1, False, False)
    assert len(found["warnings"]) == 1
    assert zoo._silent(found) == []
    assert zoo._silent({**found, "warnings": []}) == [row]
    assert zoo._silent({**found, "warnings": [f"free phase of {row['block']}0 did not settle"]}) == [row]


def test_default_settings_reach_the_residual_and_the_table_says_so() -> None:
    model, x = _two_layers()
    found = {
        name: zoo.settling(ffebm.convert(model, x, **settings), (x,), {}) for name, settings in zoo.SETTINGS.items()
    }
    for settled in found.values():
        assert settled["warnings"] == []
        (block,) = settled["blocks"]
        assert 0 < block["residual"] <= zoo.RESIDUAL
        assert block["sweeps"] > 1
    row = {
        **dict.fromkeys(("matrices", "placed", "macs", "macs_placed", "blocks", "multi_layer_blocks"), 2),
        **dict.fromkeys(("seconds", "deviation_single", "deviation"), 0.0),
        **{"model": "two", "unaccounted": [], "without_gradient": [], "settling": found},
    }
    text = zoo.markdown([row, {"model": "none", "error": "CaptureError: no"}])
    assert "With default settings, 1 blocks settle in 1 of 1 networks and 0 networks warned; of the 1 " in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    worst = found["folded"]["blocks"][0]
    assert table[2].endswith(f"| 1 | {worst['sweeps']} | {worst['residual']:.0e} |")
    found["default"]["blocks"][0]["residual"] = float("nan")
    assert zoo.failures(row) == ["residual nan in block_1 and no warning"]
    found["folded"]["blocks"][0]["residual"] = 2e-3
    assert "- two: block_1 2.0e-03" in zoo.markdown([row])


@pytest.mark.slow
def test_the_slowest_convert_is_timed_again_until_it_is_a_figure_of_a_quiet_process() -> None:
    rows = [
        {"model": "torchvision:squeezenet1_0", "seconds": 1e6},
        {"model": "torchvision:shufflenet_v2_x0_5", "seconds": 1e5},
        {"model": "timm:resnet18", "seconds": 1e-6},
        {"model": "none", "error": "CaptureError: no"},
    ]
    load_torchvision()
    zoo.time_the_slowest_again(rows)
    assert all(0 < row["seconds"] < 1e4 for row in rows[:2])
    assert rows[2]["seconds"] == 1e-6
    zoo.time_the_slowest_again(rows[3:])


@pytest.mark.slow
def test_two_workers_measure_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for workers in ("1", "2"):
        out = tmp_path / f"{workers}.json"
        names = ["timm:resnet18", "torchvision:squeezenet1_0"]
        monkeypatch.setattr(sys, "argv", ["zoo.py", "--workers", workers, "--out", str(out), "--only", *names])
        assert zoo.main() == 0
        found.append([{**row, "seconds": row["seconds"] > 0} for row in json.loads(out.read_text(encoding="utf-8"))])
    assert len(found[0]) == 2
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", DOZEN)
def test_every_weight_is_accounted_for_and_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load_torchvision()
    converted, kept = zoo._converted, []

    def keeping(*called: Any) -> Any:
        hybrid, seconds = converted(*called)
        kept.append((*called, hybrid.plan))
        return hybrid, seconds

    monkeypatch.setattr(zoo, "_converted", keeping)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party model code
        row = zoo.measure(name)
    ((model, args, kwargs, plan),) = kept
    assert zoo.failures(row) == []
    assert row["placed"] + row["refused"] == row["matrices"]
    assert len(row["settling"]["default"]["blocks"]) <= row["multi_layer_blocks"]
    # Independently of the compiler's own counting: the layers whose forward runs, by a hook.
    ran: set[str] = set()
    names = {module: path for path, module in model.named_modules()}
    hooks = [
        module.register_forward_hook(lambda module, *_: ran.add(names[module]))
        for module in model.modules()
        if isinstance(module, LAYERS)
    ]
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    parameters = {id(p): n for n, p in model.named_parameters()}
    assert ran
    for path in ran:
        layer = model.get_submodule(path)
        placement = plan.weights[parameters[id(layer.weight)]]
        assert placement.block is not None or placement.reason, path
        if placement.block is None:
            assert path in plan.rejected, f"{path} stayed digital and is not listed as rejected"
