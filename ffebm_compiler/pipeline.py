"""The list of passes from a captured model to the operations that are partitioned.

Each step takes a program and returns it changed. `ir.verify` checks the grammar after each step.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import OperationGraph, Pass, Program, Promise, verify
from ffebm_compiler.passes.annotate import annotate
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.contractions import contractions
from ffebm_compiler.passes.custom_functions import custom_functions
from ffebm_compiler.passes.dead_code import dead_code
from ffebm_compiler.passes.expand_vmap import expand_vmap
from ffebm_compiler.passes.explicit_casts import explicit_casts
from ffebm_compiler.passes.explicit_padding import explicit_padding
from ffebm_compiler.passes.fold_batchnorm import fold_batchnorm
from ffebm_compiler.passes.free_shapes import free_shapes
from ffebm_compiler.passes.functionalize import functionalize
from ffebm_compiler.passes.inline_regions import inline_regions
from ffebm_compiler.passes.merge_modes import merge_modes
from ffebm_compiler.passes.order_of_state import order_of_state
from ffebm_compiler.passes.outside_parameters import outside_parameters
from ffebm_compiler.passes.rebind import rebind
from ffebm_compiler.passes.recognise_activations import recognise_activations
from ffebm_compiler.passes.recurrent import recurrent
from ffebm_compiler.passes.sloped_clamps import sloped_clamps
from ffebm_compiler.passes.split_large import split_large
from ffebm_compiler.passes.split_relus import split_relus
from ffebm_compiler.plan_data import PlanOptions

__all__ = ["annotated_program", "passes_for"]


def in_each_mode(step: Pass) -> Pass:
    """Let a pass run on the capture in eval mode and, if there is one, on the capture in train mode."""

    @functools.wraps(step.run)
    def both(program: Program) -> Program:
        if program.training is not None:
            program.training = step(program.training)
            verify(program.training, step.promises)
        return step(program)

    return Pass(both, step.promises)


def annotated(options: PlanOptions, hardware: Hardware) -> Pass:
    """The last step, which assigns roles and splits layers that are larger than a core."""

    @functools.wraps(split_large)
    def step(program: Program) -> Program:
        program.operations = annotate(program)
        if split_large(program, program.operations, hardware, options.force_digital):
            program.operations = annotate(program)
        return program

    return Pass(step)


def passes_for(options: PlanOptions, hardware: Hardware) -> list[Pass]:
    """All passes between capture and partition, in order."""
    return [
        in_each_mode(inline_regions),
        in_each_mode(expand_vmap),
        in_each_mode(custom_functions),
        in_each_mode(explicit_casts),
        in_each_mode(functionalize),
        in_each_mode(outside_parameters),
        in_each_mode(free_shapes),
        in_each_mode(recurrent),
        merge_modes,
        explicit_padding,
        rebind,
        dead_code,
        contractions,
        recognise_activations,
        split_relus,
        *([sloped_clamps] if options.digital_drive else []),
        *([fold_batchnorm] if options.fold_batchnorm else []),
        order_of_state,
        annotated(options, hardware),
    ]


def annotated_program(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: PlanOptions,
    shapes: Any,
    hardware: Hardware,
) -> tuple[Program, OperationGraph]:
    """The program that a plan is made of, and its operations."""
    program = capture(model, args, kwargs, shapes)
    verify(program)
    promises: list[Promise] = []
    for step in passes_for(options, hardware):
        program = step(program)
        promises += step.promises
        verify(program, promises)
    assert program.operations is not None
    return program, program.operations
