"""The numbers of what is computed: conversion, gradients, training, state and files."""

from __future__ import annotations

import statistics
from typing import Any

from number_targets import (
    COUNT,
    FAILED,
    Number,
    Read,
    below,
    chosen,
    demo,
    largest,
    least,
    mean,
    most,
    numbers,
    tests,
    tuned,
    verdicts,
)

CONVERSION, GRADIENTS, TRAINING, STATE = "Conversion", "Gradients", "Training", "State and files"
KINK = "At κ 0.9 a kink lies within β of a state: the finite nudge crosses it."
RATE = "A high gain wants a smaller rate: docs/reproducing.md."
SIX = "One block of six has one batch norm in all, and its source gets no more by backprop: docs/reproducing.md."
TWO = "The loop gain of one block grows with its depth in the papers' model; a held one does not: docs/reproducing.md."
PICTURES = "Few views of six pictures. On a GPU, 9 600 larger ones bring back 553 of 555: docs/reproducing.md."


def zoo(key: str) -> Read:
    """A figure over all networks of the zoo."""
    sums = {
        "raised": lambda found: sum("error" in row for row in found),
        "unaccounted": lambda found: sum(len(row["unaccounted"]) for row in found if "error" not in row),
        "gradients": lambda found: sum(len(row["without_gradient"]) for row in found if "error" not in row),
        "unsettled": lambda found: sum(
            not b["converged"] for row in found if "error" not in row for b in row["settling"]["default"]["blocks"]
        ),
    }
    return sums.get(key, largest(key))


def converted(found: Any) -> float:
    """Points that the demo's hybrids are below their source, the worse of the two."""
    kept, folded = (demo(f"converted, batch norm {how}")(found) for how in ("kept", "folded"))
    return demo("source accuracy")(found) - min(kept, folded)


def first_layer(asymmetry: float) -> Read:
    """The worst cosine of the first layer over the loop gains."""
    return lambda found: min(row["cosines"]["0.weight"] for row in chosen(found["angles"], asymmetry=asymmetry))


def bits(found: Any) -> float:
    """How many percent more bits than backprop the worst method needs."""
    base = mean("bits", method="backprop")(found)
    return 100 * max(float(row["bits"]) / base - 1 for row in found if row["method"] != "backprop")


def splits(found: Any) -> float:
    """Points between the best and the worst split, each at its best rate."""
    blocks, rates = (list(dict.fromkeys(row[key] for row in found)) for key in ("block", "rate"))
    best = [max(mean("test", block=block, rate=rate)(found) for rate in rates) for block in blocks]
    return max(best) - min(best)


def epochs(found: Any) -> float:
    """An epoch of one block of six over an epoch of blocks of two."""
    whole, two = (statistics.median(float(row["seconds"]) for row in chosen(found, block=block)) for block in (6, 2))
    return whole / two


def at_best_rates(gain: str) -> Read:
    """Points that a loop gain at its best rate is below backprop at its best, means over the seeds."""

    def best(found: Any, feedback: str) -> float:
        rates = dict.fromkeys(row["rate"] for row in found)
        return max(mean("test", feedback=feedback, rate=rate)(found) for rate in rates)

    return lambda found: best(found, "backprop") - best(found, gain)


def fine_tuned(network: str) -> Read:
    """Points below the source after fine-tuning at κ 0.3."""
    asked = {"network": network, "feedback": "0.3"}
    return lambda found: mean("source", **asked)(found) - mean("test", **asked)(found)


NUMBERS: list[Number] = [
    *numbers(
        CONVERSION,
        "demo",
        ("demo: source accuracy", least(96, ".2f", " %"), demo("source accuracy")),
        ("demo: converted at the default loop gain, points below the source", most(1, ".2f"), converted),
        ("demo: fine-tuned by EP, points below the source", most(0.3, ".2f"), tuned),
    ),
    *numbers(
        CONVERSION,
        "zoo",
        ("zoo of timm, torchvision, transformers: exceptions", COUNT, zoo("raised")),
        ("zoo: matrices neither placed nor refused with a reason", COUNT, zoo("unaccounted")),
        ("zoo: blocks of one layer against the source, float32, relative", most(1e-5, ".1e"), zoo("deviation_single")),
        ("zoo: blocks that do not settle at the default loop gain", COUNT, zoo("unsettled")),
        ("zoo: trained parameters without a finite gradient by EP", COUNT, zoo("gradients")),
        ("zoo: the slowest `convert`", most(60, ".1f", " s"), zoo("seconds")),
    ),
    *numbers(CONVERSION, "resnet50", ("ResNet-50 planned and converted", most(10, ".1f", " s"), zoo("seconds"))),
    *numbers(
        CONVERSION,
        "families",
        ("smallest models of timm's families, torchvision, transformers: wrong", COUNT, verdicts("wrong")),
        ("the same: raw errors", COUNT, verdicts("raw")),
        ("the same: refused, where none was", COUNT, verdicts("refused")),
    ),
    *numbers(
        CONVERSION,
        "wild",
        ("vit-pytorch, x-transformers, diffusers, monai, segmentation-models: wrong", COUNT, verdicts("wrong")),
        ("these five packages: raw errors", COUNT, verdicts("raw")),
        ("these five packages: refused, where four were", most(4, ".0f"), verdicts("refused")),
    ),
    *numbers(CONVERSION, "survey", ("all of torch.nn and torch.nn.functional, eval and train", FAILED, tests)),
    *numbers(CONVERSION, "one-layer", ("blocks of one layer are their layer, on random graphs", FAILED, tests)),
    *numbers(
        CONVERSION,
        "combinations",
        (
            "all pairs of features on three networks: wrong or raw",
            COUNT,
            lambda found: sum(row["verdict"] in ("wrong", "raw") for row in found),
        ),
    ),
    *numbers(CONVERSION, "drawn", ("10 000 networks that hypothesis draws: convert, step, save, load", FAILED, tests)),
    *numbers(CONVERSION, "drawn-one-layer", ("10 000 others: blocks of one layer are their layer", FAILED, tests)),
    *numbers(GRADIENTS, "drawn-gradients", ("10 000 others: gradients are those of unrolled sweeps", FAILED, tests)),
    *numbers(
        CONVERSION,
        "trained",
        (
            "trained networks out of packages, measured before and after",
            least(6, ".0f"),
            lambda found: len({row["network"] for row in found}),
        ),
    ),
    *numbers(GRADIENTS, "reference", ("reference DCHN: states within 1e-5, gradients ≥ 0.9999", FAILED, tests)),
    *numbers(GRADIENTS, "gradients", ("implicit is unrolled in float64; EP's error falls as β²", FAILED, tests)),
    *numbers(GRADIENTS, "demo", ("demo: implicit in float64", most(1e-8, ".1e"), demo("implicit, relative error"))),
    *numbers(GRADIENTS, "algorithms", ("every algorithm against its own equations in float64, 1e-6", FAILED, tests)),
    *numbers(GRADIENTS, "six-layers", ("six-layer split: states and gradients in float64, 1e-10", FAILED, tests)),
    *numbers(
        GRADIENTS,
        "gradient-accuracy",
        (
            "15 layers in 6 blocks, κ 0.01 to 0.5: worst cosine of EP",
            least(0.999, ".6f"),
            lambda found: min(row["ep"]["cosine"] for row in chosen(found, nudge="default")),
            "One ReLU lies within 4e-5 of its kink at κ = 0.1, closer than states are settled in training, so that its "
            "slope is the wrong one. With `rtol=1e-6` every parameter has 0.9999999 (docs/performance.md).",
        ),
    ),
    *numbers(
        GRADIENTS,
        "tolerance",
        (
            "14 kinds of block × 14 activations, κ 0.03 to 0.9: worst cosine in training",
            least(0.9999, ".6f"),
            largest("cosine", -1),
            KINK,
        ),
        (
            "the same without κ 0.9",
            least(0.9999, ".6f"),
            lambda found: largest("cosine", -1)([row for row in found if row["feedback"] < 0.9]),
        ),
    ),
    *numbers(
        GRADIENTS,
        "vector-fields",
        *(
            (f"vector field, asymmetry {apart:g}: first-layer cosine", least(limit, ".4f"), first_layer(apart))
            for apart, limit in ((0.0, 0.9999), (0.1, 0.990), (0.3, 0.91))
        ),
    ),
    *(
        number
        for command, what in (("from-scratch", "identity convolutions"), ("digital-drive", "`digital_drive`"))
        for kappa in ("0.1", "0.5", "0.9")
        for number in numbers(
            TRAINING,
            command,
            (
                f"digits from scratch, {what}, κ {kappa}: points below backprop",
                most(0.5, ".2f"),
                below("accuracy", "feedback", "backprop", kappa),
            ),
        )
    ),
    *(
        number
        for start in ("torch", "goe")
        for number in numbers(
            TRAINING,
            f"experiment-1-{start}",
            *(
                (
                    f"experiment 1, {start} initialisation, κ {kappa}: points below backprop",
                    most(0.5, ".2f"),
                    below("test", "feedback", "backprop", kappa),
                    RATE,
                )
                for kappa in ("0.1", "0.5", "0.9")
            ),
        )
    ),
    *numbers(
        TRAINING,
        "experiment-2",
        ("one depth in blocks of 6, 3, 2, each at its best rate: best to worst, points", most(1, ".2f"), splits, SIX),
    ),
    *numbers(
        TRAINING,
        "experiment-2-time",
        ("one block of 6 / blocks of 2, symmetric, to 1e-6: time of an epoch", least(2, ".2f"), epochs, TWO),
    ),
    *numbers(TRAINING, "experiment-5", ("character transformer: bits above backprop's", most(1, ".2f", " %"), bits)),
    *(
        number
        for name, command, reason in (
            ("digits", "experiment-6", ""),
            ("digit-recognizer", "experiment-6-pypi", ""),
            ("efficientnet-lite0", "experiment-6-lite", PICTURES),
        )
        for number in numbers(
            TRAINING,
            command,
            (f"{name} fine-tuned at κ 0.3: points below the source", most(0.3, ".2f"), fine_tuned(name), reason),
        )
    ),
    *numbers(
        TRAINING,
        "experiment-7",
        *(
            (f"17 layers, κ {kappa}, each at its best rate: points below", most(0.5, ".2f"), at_best_rates(kappa))
            for kappa in ("0.1", "0.5", "0.9")
        ),
    ),
    *numbers(STATE, "state", ("save, load, copies, state dicts, resumed training: bit for bit", FAILED, tests)),
    *numbers(STATE, "files", ("every file whole or absent, whenever its writer is killed", FAILED, tests)),
    *numbers(STATE, "mutations", ("10 000 mutations of each kind of file: no raw exception", FAILED, tests)),
    *numbers(STATE, "onednn", ("processors without AVX-512", FAILED, tests)),
]
