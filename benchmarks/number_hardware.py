"""The numbers of hardware: resistive networks, analog devices, modelled costs and planning."""

from __future__ import annotations

import statistics
from typing import Any

from number_targets import (
    COUNT,
    FAILED,
    Number,
    Read,
    below,
    cell,
    cells_of,
    chosen,
    largest,
    least,
    most,
    numbers,
    printed,
    tests,
)

RESISTIVE, ANALOG = "Resistive networks", "Analog devices and planning"
STRICT = "Strict circuits have no controlled sources, so that ngspice needs half the time; half of ours is overhead."
SAME = "Where no larger mapping passes the same devices, both orders end at the largest that does: docs/planning.md."
SIZES = (("32-24-10", 150), ("128-64-10", 1500), ("200-256-10", 10_000))


def after_conversion(gamma: float) -> Read:
    """Points that a converted network is below its source, mean over the seeds."""

    def read(found: Any) -> float:
        accuracy = {row["gamma"]: statistics.mean(row["accuracy"]) for row in found["trained"]}
        return accuracy[0.0] - accuracy[gamma]  # γ is 0 for the source

    return read


def convolutions(found: Any) -> float:
    """A resistive step over a Hopfield step."""
    row = chosen(found["step"], source="images")[0]
    return float(row["resistive"] / row["hopfield"])


def linear(found: Any) -> float:
    """The error at an emission of 0.01 over ten times that at 0.001, the worst network with a kink."""
    return max(row["errors"]["0.01"] / row["errors"]["0.001"] / 10 for row in found if row["errors"]["0.001"] > 1e-7)


def energies(network: str) -> Read:
    """Least modelled energy over that of fewest conversions, the worst of fabrics, modes and constants."""
    return lambda found: max(
        ours / theirs
        for row in chosen(found, network=network)
        for ours, theirs in zip(row["least"], row["few"], strict=True)
    )


def behind(found: Any) -> float:
    """On how many networks `plan_for_accuracy` makes no larger share analog than the greedy order, over all devices."""

    def share(network: str, search: str) -> float:
        return sum(row["share"] for row in chosen(found, network=network, search=search))

    names = dict.fromkeys(row["network"] for row in found)
    return sum(share(name, "plan_for_accuracy") <= share(name, "greedy by MACs") for name in names)


def pcm(found: str) -> float:
    """Points that a network trained on `pcm` devices with the default nudge is below one trained without devices."""
    return printed(["none"], 2)(found) - printed(["pcm", "its own"], 2)(found)


NUMBERS: list[Number] = [
    *numbers(RESISTIVE, "resistive-gradients", ("EP against finite differences in float64, 1e-7", FAILED, tests)),
    *numbers(
        RESISTIVE,
        "settling",
        ("1 000 random graphs of each kind: unsettled", COUNT, lambda found: sum(row["unsettled"] for row in found)),
        (
            "zero-mean weights of width ≥ 16: most sweeps to 1e-6",
            most(30, ".0f"),
            lambda found: largest("largest")(chosen(found, kind="zero mean")),
        ),
        ("elsewhere: sweeps / prediction", most(2, ".2f"), lambda found: largest("ratio")(chosen(found, kind="any"))),
    ),
    *numbers(
        RESISTIVE,
        "netlists",
        (
            "states against ngspice at emission 0.001, of the range",
            most(1e-3, ".1e"),
            lambda found: max(row["errors"]["0.001"] for row in found),
        ),
        ("the same: error at 0.01 / ten times that at 0.001 (1 is linear)", most(1.2, ".2f"), linear),
    ),
    *numbers(
        RESISTIVE, "silicon", ("EP with silicon diodes against finite differences of ngspice, 1e-5", FAILED, tests)
    ),
    *numbers(
        RESISTIVE,
        "circuit",
        (
            "32-24-10, ngspice in the loop, 500 steps: test accuracy",
            least(88, ".1f", " %"),
            lambda found: 100 * float(found[-1]["test_accuracy"]),
        ),
        (
            "the same: wall time of a step",
            most(0.5, ".2f", " s"),
            lambda found: statistics.median(float(row["seconds_per_step"]) for row in found),
        ),
    ),
    *numbers(
        RESISTIVE,
        "against-ngspice",
        *(
            (
                f"settling, {kind} {sizes}: ngspice / ours",
                least(limit, ".0f"),
                cell("ratio", network=prefix + sizes),
                why,
            )
            for kind, prefix, why in (("with amplifiers", "", ""), ("strict", "drn ", STRICT))
            for sizes, limit in SIZES
        ),
    ),
    *numbers(
        RESISTIVE,
        "resistive",
        *(
            (f"trained digits MLP converted at γ {gamma:g}: points below", most(limit, ".2f"), after_conversion(gamma))
            for gamma, limit in ((1e-3, 0.5), (1e-2, 1.0))
        ),
        ("step of a block of convolutions / the Hopfield step", most(1.5, ".2f"), convolutions),
    ),
    *numbers(
        RESISTIVE,
        "deep-resistive",
        *(
            (
                f"deep resistive network from scratch, hidden {hidden}: points of EP below unrolled",
                most(0.5, ".2f"),
                below("test", "method", "unrolled", "EP", hidden=hidden),
            )
            for hidden in ("100", "100-100")
        ),
    ),
    *numbers(
        ANALOG,
        "devices",
        (
            "static error of 20 %: worst cosine of EP to the device's own gradient",
            least(0.9999, ".5f"),
            cells_of("static", ("0.2",), slice(1, 4)),
        ),
        ("mismatch of 5 %: first-layer cosine", least(0.98, ".3f"), cells_of("mismatch", ("0.05",), slice(1, 2))),
        (
            "read noise 1e-3, κ 0.3, β 1, 16 reads: first-layer cosine",
            least(0.9, ".3f"),
            cells_of("noise", ("0.001", "0.3", "1.0", "16"), slice(4, 5)),
        ),
        (
            "`devices=None`: what the checks for devices take of a step",
            most(1, ".2f", " %"),
            lambda found: float(found["without"][1][-1].rstrip("%")),
        ),
    ),
    *numbers(ANALOG, "device-statistics", ("statistics of every noise source against its law, 2 %", FAILED, tests)),
    *numbers(ANALOG, "aihwkit", ("quantisers and noise against aihwkit-lightning, 1e-6", FAILED, tests)),
    *numbers(
        ANALOG, "pcm", ("digits from scratch on `pcm`, κ 0.1, the defaults: points below ideal", most(1, ".1f"), pcm)
    ),
    *numbers(
        ANALOG,
        "energy",
        *(
            (f"modelled energy of the energy objective / fewest conversions, {name}", most(1, ".3f"), energies(name))
            for name in ("resnet18", "resnet50", "vit_tiny_patch16_224")
        ),
    ),
    *numbers(ANALOG, "chips", ("chip presets: a full-tile product within 1.3 of the paper's energy", FAILED, tests)),
    *numbers(
        ANALOG,
        "planning",
        (
            "four networks: those where `plan_for_accuracy` has no larger analog share than the greedy order",
            COUNT,
            behind,
            SAME,
        ),
    ),
]
