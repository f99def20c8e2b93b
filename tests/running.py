"""Run a captured program as it is after any pass, or a script in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from ffebm_compiler.ir import Program


def run(program: Program, *inputs: Tensor) -> Any:
    """The value of a program's graph, with the tensors of its source."""
    state = {**dict(program.source.named_parameters()), **dict(program.source.named_buffers())}
    given_inputs = dict(zip(program.inputs, inputs, strict=True))
    operands = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = node.name
            operands.append(
                state[program.lifted[name]]
                if name in program.lifted
                else program.constants.get(name, given_inputs.get(name))
            )
    program.graph_module.recompile()
    return program.graph_module(*operands)[0]


def targets(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op in ("call_function", "call_module")]


def torchrun(processes: int, script: str | Path, *arguments: str, timeout: float, cwd: Path | None = None) -> str:
    """What a script prints in several processes of one thread each; it succeeds."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(script), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    return printed
