"""Measure the partition: against the exact optimum, against a naive greedy on real networks, and its growth.

    python benchmarks/partition.py small [--count 500] [--operations 12] [--digital-drive]
    python benchmarks/partition.py scale
    python benchmarks/partition.py zoo [--only 'timm:resnet*' ...] [--share]

The exact optimum is a mixed-integer program solved by HiGHS (scipy). The naive greedy takes the
operations in the order of the captured graph and fills a block until the next layer does not fit
or would make a cycle. "No limit" is the partition of the same graph without capacities: what the digital
operations alone force. `--share` lets the groups of a convolution share tiles. Each section takes `--out FILE.json`.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import add_out, keep

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from exact_partition import optimum
from partition_cases import chain, random_graph, random_hardware

from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import ALWAYS_JOIN, OperationGraph, Role
from ffebm_compiler.passes.partition.decide import conversions, partition, tiles_of, too_large

KINDS = ("add", "reshape", "concat", "avg_pool")


FAMILIES = {
    "depthwise CNNs": "*mobilenet* *efficientnet* *mnasnet* *ghostnet* *rexnet* *xception* *shufflenet*",
    "ConvNeXt, mixers without attention": "*convnext* *mixer* *mlp* *poolformer* *fastvit*",
    "ResNets and other CNNs with batch norm": "*res*net* *resnext* *regnet* *vgg*_bn *densenet* *dla* *hrnet* "
    "*darknet* *repvgg* *selecsls* *dpn* *inception* *googlenet*",
    "CNNs without batch norm": "*vgg* *alexnet* *squeezenet* *nfnet* *resnetv2_50x1_bit",
}
"""Family -> patterns of names; the rest are transformers."""


def family(name: str) -> str:
    """The family of a network of the zoo."""
    if "_bit" in name:
        return "CNNs without batch norm"
    found = (f for f, patterns in FAMILIES.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns.split()))
    return next(found, "transformers, with attention")


def naive_greedy(graph: OperationGraph, hardware: Hardware, kinds: Collection[str]) -> list[list[str]]:
    """Fill one block after the other, in the order of the graph; acyclic and within capacity."""
    joins = {*kinds, *ALWAYS_JOIN}
    blocks: list[list[str]] = []
    inside: set[str] = set()
    carrying: set[str] = set()
    after: set[str] = set()
    users, outputs = graph.users(), set(graph.outputs)
    used = [0, 0, 0]
    limits = (hardware.layers_per_block, hardware.tiles_per_core, hardware.neurons_per_block)
    for op in graph.operations:
        late = any(source in after for source in op.inputs)
        if op.role is Role.WEIGHT and not too_large(op, hardware):
            load = [1, tiles_of(op, hardware), op.values]
            fits = all(limit is None or u + w <= limit for u, w, limit in zip(used, load, limits, strict=True))
            if not blocks or late or not fits:
                blocks.append([])
                inside, carrying, after, used = set(), set(), set(), [0, 0, 0]
            blocks[-1].append(op.name)
            inside.add(op.name)
            if len(users[op.name]) == 1 and op.name not in outputs:
                carrying.add(op.name)
            used = [u + w for u, w in zip(used, load, strict=True)]
            continue
        fed = any(source in inside for source in op.inputs)
        owning = any(source in carrying for source in op.inputs)
        may = owning if op.role is Role.ACTIVATION else fed and op.role is Role.WIRING and op.kind in joins
        if may and not late:
            blocks[-1].append(op.name)
            inside.add(op.name)
            if owning and op.role is Role.WIRING and len(users[op.name]) == 1 and op.name not in outputs:
                carrying.add(op.name)
        elif fed or late:
            after.add(op.name)
    return blocks


def total(graph: OperationGraph, blocks: list[list[str]]) -> int:
    """Conversions per sample of all blocks."""
    users = graph.users()
    return sum(sum(conversions(graph, block, users)) for block in blocks)


def small(count: int, operations: int, digital_drive: bool = False) -> list[dict[str, Any]]:
    """Random graphs against their optimum."""
    rows = []
    for seed in range(count):
        graph, hardware = random_graph(seed, operations), random_hardware(seed + 1000)
        best = optimum(graph, hardware, KINDS, digital_drive=digital_drive)
        if best is None:
            continue
        found = partition(graph, hardware, KINDS, digital_drive=digital_drive).blocks
        greedy = naive_greedy(graph, hardware, KINDS)
        rows.append(
            {
                "seed": seed,
                "optimum": best[0],
                "optimum_blocks": best[1],
                "found": total(graph, found),
                "found_blocks": len(found),
                "greedy": total(graph, greedy),
            }
        )
    sums = {key: sum(row[key] for row in rows) for key in ("optimum", "found", "greedy")}
    equal = sum(row["found"] == row["optimum"] for row in rows)
    both = sum((row["found"], row["found_blocks"]) == (row["optimum"], row["optimum_blocks"]) for row in rows)
    worst = max(row["found"] / max(1, row["optimum"]) for row in rows)
    print(f"{len(rows)} graphs of {operations} operations solved exactly")
    print(f"  equal to the optimum: {100 * equal / len(rows):.1f} %, with equal blocks {100 * both / len(rows):.1f} %")
    found_ratio, greedy_ratio = sums["found"] / sums["optimum"], sums["greedy"] / sums["optimum"]
    print(f"  worst {worst:.3f}, sum {found_ratio:.4f}, naive greedy {greedy_ratio:.3f}")
    return rows


def scale() -> list[dict[str, Any]]:
    """Deep networks of 100 to 10 000 layers under three fabrics."""
    fabrics = {
        "4 layers, 64 tiles": Hardware(),
        "unlimited": Hardware(tiles_per_core=None, layers_per_block=None),
        "2000 tiles": Hardware(tiles_per_core=2000, layers_per_block=None),
    }
    rows = []
    print(f"{'network':24} {'fabric':20} {'layers':>7} {'blocks':>7} {'CPU s':>8}")
    for shape, branch_every in (("chain", 0), ("residual, with pooling", 2)):
        for fabric, hardware in fabrics.items():
            for layers in (100, 1_000, 10_000):
                graph = chain(layers, branch_every)
                start = time.process_time()
                result = partition(graph, hardware)
                seconds = time.process_time() - start
                rows.append({"network": shape, "fabric": fabric, "layers": layers, "seconds": seconds})
                print(f"{shape:24} {fabric:20} {layers:7} {len(result.blocks):7} {seconds:8.2f}", flush=True)
    return rows


def zoo(patterns: list[str], share: bool = False) -> list[dict[str, Any]]:
    """Real networks with folded batch norm against the naive greedy."""
    from zoo_models import MODELS, load_torchvision

    import ffebm_compiler as ffebm

    load_torchvision()
    unlimited = Hardware(tiles_per_core=None, layers_per_block=None)
    rows: list[dict[str, Any]] = []
    print(
        f"{'network':34} {'layers':>6} {'blocks':>6} {'greedy':>6} {'conversions':>12} {'greedy':>12} {'saved':>6} "
        f"{'no limit':>12}    s"
    )
    fabric = Hardware(groups_share_tiles=share, name="crossbar-256")
    for name in MODELS:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        model, args, kwargs = MODELS[name]()
        plan = ffebm.plan(model.eval(), args, kwargs, fold_batchnorm=True, hardware=fabric)
        start = time.process_time()
        found = partition(plan.graph, plan.hardware).blocks
        seconds = time.process_time() - start
        greedy = naive_greedy(plan.graph, plan.hardware, plan.options.block_ops)
        row = {
            "network": name,
            "layers": sum(op.role is Role.WEIGHT for op in plan.graph.operations),
            "blocks": len(found),
            "greedy_blocks": len(greedy),
            "conversions": total(plan.graph, found),
            "greedy": total(plan.graph, greedy),
            "no_limit": total(plan.graph, partition(plan.graph, unlimited).blocks),
            "seconds": seconds,
        }
        rows.append(row)
        print(
            f"{name:34} {row['layers']:6} {row['blocks']:6} {row['greedy_blocks']:6} {row['conversions']:12} "
            f"{row['greedy']:12} {saving(row['conversions'], row['greedy'])} {row['no_limit']:12} {seconds:5.2f}",
            flush=True,
        )
    print(f"\n{'family':40} {'networks':>8} {'conversions':>12} {'greedy':>12} {'saved':>6} {'no limit':>12}")
    for name in (*dict.fromkeys(family(row["network"]) for row in rows), "all"):
        chosen = [row for row in rows if name in ("all", family(row["network"]))]
        ours, theirs, floor = (sum(row[key] for row in chosen) for key in ("conversions", "greedy", "no_limit"))
        print(f"{name:40} {len(chosen):8} {ours:12} {theirs:12} {saving(ours, theirs)} {floor:12}")
    return rows


def saving(ours: int, theirs: int) -> str:
    """How much fewer, in percent."""
    return f"{100 * (1 - ours / theirs):5.1f}%"


def main() -> None:
    """Run one section."""
    parser = argparse.ArgumentParser(description="Measure the partition.")
    parser.add_argument("section", choices=("small", "scale", "zoo"))
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--operations", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=["*"])
    parser.add_argument("--share", action="store_true", help="groups of a convolution share tiles")
    parser.add_argument("--digital-drive", action="store_true", help="small: digital values may drive states")
    add_out(parser)
    options = parser.parse_args()
    if options.section == "small":
        rows = small(options.count, options.operations, options.digital_drive)
    elif options.section == "scale":
        rows = scale()
    else:
        rows = zoo(options.only, options.share)
    keep(rows, options.out)


if __name__ == "__main__":
    main()
