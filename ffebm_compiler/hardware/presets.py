"""The fabrics that can be named, each with the source of its numbers."""

from __future__ import annotations

from ffebm_compiler.errors import HardwareError
from ffebm_compiler.hardware.fabric import Hardware

__all__ = ["hardware_presets", "resolve_hardware"]


_CONVERTED_IN_THE_READ = {"adc_ns": 0.0, "dac_ns": 0.0, "converters": 1.0}
"""Times of a chip whose published time of a product includes its conversions."""


def hardware_presets() -> dict[str, Hardware]:
    """The fabrics that can be named, each with the source of its numbers."""
    presets = (
        Hardware(
            tile_rows=None,
            tile_cols=None,
            tiles_per_core=None,
            layers_per_block=None,
            devices_per_weight=1,
            adc_bits=None,
            dac_bits=None,
            name="ideal",
            source="no hardware: no limit on a tile, a core or a block, and no quantisation",
        ),
        Hardware(
            tile_rows=64,
            tile_cols=64,
            name="crossbar-64",
            source=(
                "the size of small academic resistive and phase-change macros, 64×64 devices; "
                "round numbers, not one published chip"
            ),
        ),
        Hardware(
            name="crossbar-256",
            source=(
                "256×256 crossbars, 64 of them, with 8-bit inputs and outputs: the phase-change chip of "
                "Le Gallo et al., Nature Electronics 2023, whose 64 cores are the 64 tiles of one core here; "
                "two columns per weight and four layers per block are choices of this project"
            ),
        ),
        Hardware(
            tile_rows=256,
            tile_cols=512,
            row_sums="digital",
            cores_per_chip=1,
            costs={"chip_op_pj": 0.403, "read_ns": 521.0, **_CONVERTED_IN_THE_READ},
            name="pcm-64",
            source=(
                "the phase-change chip of Le Gallo et al., Nature Electronics 2023 (arXiv 2212.02872): 64 tiles of "
                "256×256 weights with 8-bit inputs and outputs. Its four-phase reads reach 2.48 TOPS/W and 16.1 TOPS "
                "(abstract), which is 403 fJ an operation and 521 ns a product of a full tile, digital activations "
                "and on-chip network included. A weight is counted as two columns here, so that 512 columns are 256 "
                "weights. Four layers a block are a choice of this project"
            ),
        ),
        Hardware(
            tile_rows=256,
            tile_cols=512,
            row_sums="digital",
            cores_per_chip=1,
            costs={"chip_op_pj": 0.102, "read_ns": 133.0, **_CONVERTED_IN_THE_READ},
            name="pcm-64-one-phase",
            source=(
                "the chip of 'pcm-64' in its one-phase reads of lower precision: 9.76 TOPS/W and 63.1 TOPS (abstract), "
                "which is 102 fJ an operation and 133 ns a product of a full tile"
            ),
        ),
        Hardware(
            tile_rows=256,
            tile_cols=256,
            tiles_per_core=48,
            row_sums="digital",
            cores_per_chip=1,
            weight_bits=4,
            dac_bits=4,
            adc_bits=6,
            costs={"chip_op_pj": 0.0627, "read_ns": 4230.0, **_CONVERTED_IN_THE_READ},
            name="neurram",
            source=(
                "NeuRRAM, Wan et al., Nature 608, 504 (2022): 48 tiles of 256×256 devices of ReRAM, two a weight of 4 "
                "bits. 4-bit inputs and 6-bit outputs: 15.95 TOPS/W and 0.744 TOPS for all tiles, which is 62.7 fJ an "
                "operation and 4.23 µs a product of a full tile. The figures are read off the paper's Extended Data "
                "Fig. 12 by CiMLoop (its model wan_nature_2022); digital activations are not in them. With 8-bit "
                "inputs and 10-bit outputs it is 6.44 TOPS/W and 0.264 TOPS there. Four layers a block are a choice "
                "of this project"
            ),
        ),
        Hardware(
            tile_rows=128,
            tile_cols=128,
            tiles_per_core=96,
            devices_per_weight=8,
            row_sums="digital",
            cores_per_chip=168,
            weight_bits=16,
            dac_bits=16,
            adc_bits=8,
            costs={"chip_op_pj": 1.61, "read_ns": 1600.0, "adc_pj": 128 * 1.56, **_CONVERTED_IN_THE_READ},
            name="isaac",
            source=(
                "the design ISAAC-CE, Shafiee et al., ISCA 2016 (simulated, 32 nm, 16 bits): 12 × 8 tiles of 128×128 "
                "2-bit cells a core, eight a weight, 16 128 tiles a chip. 65.8 W, 85.4 mm² and a peak of 479 GOP/s/mm² "
                "are 1.61 pJ an operation; 16 cycles of 100 ns are 1.6 µs a product, in which 8-bit converters of "
                "1.56 pJ (PUMA-sim) convert 8 × 16 times for each output. Four layers a block are a choice of this "
                "project"
            ),
        ),
    )
    return {preset.name: preset for preset in presets}


def resolve_hardware(value: str | Hardware) -> Hardware:
    """The preset of that name, or the `Hardware` itself.

    Raises:
        HardwareError: an unknown name, or neither a name nor a `Hardware`.
    """
    if isinstance(value, Hardware):
        return value
    presets = hardware_presets()
    choices = f"one of {', '.join(map(repr, presets))}, a Hardware(...) or Hardware.from_file(path)"
    if not isinstance(value, str):
        raise HardwareError(f"hardware must be {choices}; got {type(value).__name__}")
    if value not in presets:
        raise HardwareError(f"unknown hardware {value!r}: use {choices}")
    return presets[value]
