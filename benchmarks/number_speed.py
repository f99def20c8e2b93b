"""The numbers of time and size: a step, the loop gain, compiling and partitioning, ONNX, the page."""

from __future__ import annotations

from typing import Any

from number_targets import COUNT, FAILED, Number, Read, cell, chosen, largest, least, most, numbers, table, tests

STEP, GAIN, COMPILING = "Time and memory of a step", "The loop gain", "Compiling and partitioning"
ONNX, PAGE = "ONNX", "The page, the documentation, the tests"
CNN, MLP = "residual CNN", "transformer MLP stack"
PLACES = (("CNN of 32 channels", CNN), ("MLPs", MLP))

SWEEPS = (
    "A step of the CNN at κ 0.1 is about 100 convolutions beside the source's 38, which take 1.84 times as long. "
    "Passes over memory and launching, a seventh of backprop's step, are two fifths of this one on a Xeon of 2.5 GHz. "
    "At κ 0.5 and 0.9 the sweeps alone take more than the target: docs/performance.md."
)
PRODUCTS = (
    "At κ 0.1 the arithmetic alone is 2.17 times backprop's, and 1.78 in the transformer. It takes less time than that "
    "only where oneDNN multiplies much faster than the library of the source. Passes over memory and launching come on "
    "top: docs/performance.md."
)
BLOCK = "The bookkeeping of a block, which small layers do not hide."
FORWARD = "A forward is the source's own pass, two sweeps or more and the check that they suffice."
MEMORY = "The states of both phases beside the activations that autograd keeps."
SCHEDULE = "Our step has 0.114 of the schedule's arithmetic. The rest depends on the processor: 0.090 on another one."
EXPORTS = (
    "Torch exports the network twice, in eval and in train mode: five sixths of the time of the 8 B. Where Python runs "
    "faster it takes half as long: docs/partitioning.md."
)
PAINT = "The first picture has all of its 2 005 nodes: 0.81 s on another machine (docs/drawing.md)."
POOLING = "With max pooling the network settles in more sweeps."
CALLS = "The products that measure the gain are small calls, whose overhead does not shrink with the network."
NORMS = "What is left are the norms of the blocks and their lowering."
PIP = "Most of the wait is pip's, for torch and its packages: docs/faq.md."
ROOM = "What the digital operations alone force leaves no more room: the table by family in docs/partitioning.md."


def share(network: str) -> Read:
    """Percent of a step that holding the gain takes."""
    return lambda found: 100 * (cell("ratio", network=network)(found["cost"]) - 1)


def equal(found: Any) -> float:
    """Percent of the graphs whose conversions are the optimum's."""
    return 100 * sum(row["found"] == row["optimum"] for row in found) / len(found)


def fewer(found: Any) -> float:
    """Percent fewer conversions than the naive greedy's, summed over the networks."""
    return 100 * (1 - sum(row["conversions"] for row in found) / sum(row["greedy"] for row in found))


NUMBERS: list[Number] = [
    *numbers(
        STEP,
        "step",
        *(
            (
                f"{step}, {name} / backprop of the source",
                most(limit, ".2f"),
                table(title, row),
                BLOCK if row.startswith("single") else reason,
            )
            for step, row, limit in (
                ("EP κ 0.1", "ep, default", 2.2),
                ("implicit κ 0.1", "implicit, default", 2.0),
                ("EP κ 0.5", "ep, feedback 0.5", 2.8),
                ("EP κ 0.9", "ep, feedback 0.9", 3.5),
                ("single-layer blocks", "single-layer blocks, ep", 1.05),
            )
            for (name, title), reason in zip(PLACES, (SWEEPS, PRODUCTS), strict=True)
        ),
    ),
    *numbers(
        STEP,
        "step-64",
        ("EP κ 0.1, CNN of 64 channels / backprop of the source", most(2.2, ".2f"), table(CNN, "ep, default"), SWEEPS),
    ),
    *numbers(
        STEP,
        "step-transformer",
        (
            "EP κ 0.1, transformer / backprop of the source",
            most(1.6, ".2f"),
            table("transformer", "ep, default"),
            PRODUCTS,
        ),
    ),
    *numbers(
        STEP,
        "evaluation",
        *(
            (
                f"evaluation κ 0.1, {name} / forward of the source",
                most(3.0, ".2f"),
                table(f"{title}, evaluation", "forward, default"),
                FORWARD,
            )
            for name, title in (*PLACES, ("transformer", "transformer"))
        ),
    ),
    *numbers(
        STEP,
        "memory",
        *(
            (
                f"peak memory, {name}, 64 channels / backprop's",
                most(1.6, ".2f"),
                table(CNN, row, "memory_ratio"),
                MEMORY,
            )
            for name, row in (("EP", "ep, default"), ("implicit", "implicit, default"))
        ),
    ),
    *numbers(
        STEP,
        "equilibrium",
        *(
            (
                f"DCHN, {pool} pooling: our step / the public EP code's schedule",
                most(0.1, ".3f"),
                table(f"DCHN at 0.25 width, {pool}", "plain EP"),
                reason,
            )
            for pool, reason in (("avg", SCHEDULE), ("max", POOLING))
        ),
    ),
    *numbers(
        STEP, "torchdeq", ("a block: our step / torchdeq's", most(0.5, ".2f"), table("a residual block", "torchdeq"))
    ),
    *numbers(
        GAIN,
        "loop-gain",
        *(
            (f"holding the gain, {name}: share of a step", most(5, ".1f", " %"), share(title), CALLS)
            for name, title in (*PLACES, ("transformer", "transformer"))
        ),
        (
            "true / told gain of a weight that grows along its 41st direction",
            most(1.05, ".3f"),
            lambda found: largest("true_over_told")(found["growth"]),
        ),
    ),
    *numbers(
        GAIN,
        "loop-gain-64",
        ("holding the gain, CNN of 64 channels: share of a step", most(5, ".1f", " %"), share(CNN), CALLS),
    ),
    *numbers(GAIN, "held", ("told within 5 % of true after each of 500 steps of six optimizers", FAILED, tests)),
    *numbers(
        COMPILING,
        "compile-time",
        *(
            (
                f"`convert` / `torch.export` with a free batch, {layers} layers",
                most(1.25, ".2f"),
                table("compile time", f"{layers} layers"),
                NORMS,
            )
            for layers in (300, 3000)
        ),
    ),
    *numbers(
        COMPILING,
        "growth",
        (
            "10 000 layers partitioned, the slowest fabric",
            most(5, ".2f", " s"),
            lambda found: largest("seconds")(chosen(found, layers=10_000)),
        ),
    ),
    *numbers(
        COMPILING,
        "exact",
        ("random graphs of 12 operations: equal to the exact optimum", least(95, ".1f", " %"), equal),
        (
            "the same: the worst conversions / optimum",
            most(1.2, ".3f"),
            lambda found: max(row["found"] / max(1, row["optimum"]) for row in found),
        ),
    ),
    *numbers(
        COMPILING,
        "greedy",
        ("fewer conversions than the naive greedy, zoo folded", least(20, ".1f", " %"), fewer, ROOM),
    ),
    *numbers(COMPILING, "random-graphs", ("partitions are sound, and replayed equal their source", FAILED, tests)),
    *numbers(
        COMPILING,
        "large",
        *(
            (f"plan on meta, {network}", most(limit, ".1f", " s"), cell("seconds", network=network), EXPORTS)
            for network, limit in (("Llama-like, 8 B", 15), ("mixture of experts, 47 B", 15), ("Llama-like, 405 B", 60))
        ),
        ("the largest peak memory of these", most(4, ".2f", " GiB"), largest("gib")),
    ),
    *numbers(COMPILING, "engines", ("FSDP2, DDP, pipelines: processes equal one process, 1e-6", FAILED, tests)),
    *numbers(
        ONNX,
        "onnx",
        (
            "whole hybrid in onnxruntime, batch 1 and 7, the worst of 20 networks",
            most(1e-5, ".1e"),
            largest("deviation"),
        ),
        ("digital parts by their manifest, the worst", most(1e-5, ".1e"), largest("deviation_parts")),
        ("networks that do not export", COUNT, lambda found: sum("error" in row for row in found)),
        ("export of ResNet-50", most(60, ".1f", " s"), cell("export_s", model="torchvision:resnet50")),
    ),
    *numbers(
        PAGE,
        "page",
        ("ResNet-50 opens", most(2, ".2f", " s"), cell("opens_s", network="ResNet-50")),
        ("a transformer of 12 layers opens", most(2, ".2f", " s"), cell("opens_s", network="transformer, 12 layers")),
        (
            "first paint of 1 000 blocks, all different",
            most(1, ".2f", " s"),
            cell("paint_s", network="1000 blocks, all different"),
            PAINT,
        ),
        ("file of ResNet-50", most(2000, ".0f", " kB"), cell("kb", network="ResNet-50")),
    ),
    *numbers(PAGE, "facts", ("every fact on the pages of ten real networks is the plan's", FAILED, tests)),
    *numbers(PAGE, "controls", ("no console error, contrast ≥ 4.5, every control named", FAILED, tests)),
    *numbers(
        PAGE,
        "suite",
        ("the whole test suite on two cores", FAILED, tests),
        ("the same: how long", most(25, ".1f", " min"), lambda found: found["seconds"] / 60),
    ),
    *numbers(PAGE, "docs", ("public names with an example that runs; tutorials; no broken link", FAILED, tests)),
    *numbers(
        PAGE,
        "first-picture",
        (
            "from a clone to the picture of one's own model: reading and typing",
            most(5, ".1f", " min"),
            lambda found: found["own_min"],
        ),
        ("the same with all waits", most(5, ".1f", " min"), lambda found: found["whole_min"], PIP),
    ),
]
