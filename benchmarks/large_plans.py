"""Plans of networks that fit no machine: time and memory of `ffebm.plan` on the meta device.

    python benchmarks/large_plans.py [--only NAME ...] [--table FILE]

Each network is built on the meta device by transformers, without weights, and planned in a process of its own. The time
is CPU time of `ffebm.plan` alone on one thread, the memory the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ffebm_compiler as ffebm
from ffebm_compiler.files.whole_files import write_whole

sys.path.insert(0, str(Path(__file__).parent))
from measuring import add_out, keep
from zoo_models import load_torchvision

NETWORKS: dict[str, tuple[str, dict[str, int]]] = {
    "Llama-like, 8 B": ("Llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                  "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}),
    "mixture of experts, 47 B": ("Mixtral", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}),
    "Llama-like, 405 B": ("Llama", {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
                                    "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}),
}  # fmt: skip
HARDWARE = ffebm.Hardware(tile_rows=4096, tile_cols=4096, tiles_per_core=512)


def measure(name: str) -> dict[str, float]:
    """Plan one network in this process."""
    load_torchvision()
    import transformers

    family, sizes = NETWORKS[name]
    settings = getattr(transformers, f"{family}Config")(**sizes, use_cache=False)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    tokens = torch.zeros(1, 128, dtype=torch.long)
    start = time.process_time()
    plan = ffebm.plan(model, tokens, hardware=HARDWARE)
    seconds = time.process_time() - start
    start = time.process_time()
    str(plan.cost_report())
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "costs": time.process_time() - start,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "blocks": len(plan.blocks),
        "tiles": sum(block.tiles for block in plan.blocks),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--one", choices=list(NETWORKS), help="plan this one in the present process")
    parser.add_argument("--table", type=Path, help="write the table here too")
    add_out(parser)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    rows = ["| network | parameters | plan, CPU s | cost report, CPU s | peak, GiB | blocks | tiles of 4096² |",
            "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    kept: list[dict[str, Any]] = []
    for name in options.only:
        command = [sys.executable, "-P", __file__, "--one", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        kept.append({"network": name, **found})
        keep(kept, options.out)
        rows.append(
            f"| {name} | {found['parameters'] / 1e9:.1f} B | {found['seconds']:.1f} | {found['costs']:.1f} | "
            f"{found['gib']:.2f} | {found['blocks']:.0f} | {found['tiles']:.0f} |"
        )
        print(rows[-1], flush=True)
    if options.table:
        write_whole(options.table, "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
