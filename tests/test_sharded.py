"""Hybrids under torch's own engines for networks that fit no machine: FSDP2, distributed checkpoints, pipelines.

Each test starts real processes with torchrun, which compare themselves with the same hybrid in one process.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import torchrun
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.sharded import ShardedRun, engine_hooks, unit_of

TESTS = Path(__file__).parent


def launch(processes: int, script: str, *arguments: str) -> None:
    torchrun(processes, TESTS / script, *arguments, timeout=280)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_modules_train_measure_save_and_resume_as_one_process(processes: int, tmp_path: Path) -> None:
    launch(processes, "sharded_worker.py", str(tmp_path / "checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_stages_of_a_pipeline_are_hybrids(processes: int) -> None:
    launch(processes, "pipelined_worker.py")


@pytest.mark.slow
def test_synchronised_batch_norm_takes_the_batch_of_all_processes() -> None:
    launch(2, "synchronised_worker.py")


def hybrid_of(model: nn.Module, x: torch.Tensor) -> ffebm.HybridModel:
    return ffebm.convert(model, x, feedback=0.3)


def test_a_graph_run_part_by_part_is_the_graph() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    hybrid = hybrid_of(model, x)
    called: list[str] = []

    def before(module: nn.Module, inputs: tuple[object, ...]) -> None:
        called.append(f"before {module.in_features}")

    def after(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        called.append(f"after {module.in_features}")

    before.__module__ = after.__module__ = "torch.distributed.fsdp.as_if"
    units = {path: hybrid.get_submodule(path) for path in ("0", "5")}
    for unit in units.values():
        unit.register_forward_pre_hook(before)
        unit.register_forward_hook(after)
    assert len(engine_hooks(units["0"]._forward_hooks)) == 1
    (found, *_) = ShardedRun(hybrid.lowered, units)([x])
    torch.testing.assert_close(found, hybrid(x), rtol=0, atol=0)
    assert called[:4] == ["before 6", "after 6", "before 8", "after 8"]


def test_a_tensor_is_of_the_nearest_unit() -> None:
    units = {"layers": nn.Module(), "layers.0": nn.Module()}
    assert unit_of("layers.0.up.weight", units) == "layers.0"
    assert unit_of("layers.10.weight", units) == "layers"
    assert unit_of("head.weight", units) is None
    assert unit_of("mix", units) is None


def test_the_state_of_the_blocks_is_one_value() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh()), torch.randn(4, 6)
    hybrid, other = hybrid_of(model, x), ffebm.convert(model, x, feedback=0.1)
    other.load_block_state(hybrid.block_state())
    assert other.blocks[0].module.scales == hybrid.blocks[0].module.scales
    with pytest.raises(ffebm.InputError, match="is a dict; expected what block_state"):
        other.load_block_state({})  # type: ignore[arg-type]
    with pytest.raises(ffebm.InputError, match="cannot be read"):
        other.load_block_state(b"something else")
