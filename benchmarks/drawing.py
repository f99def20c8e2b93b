"""How long the interactive page takes to write, to open and to unfold, in a headless Chromium.

    python benchmarks/drawing.py

Networks of the size of ResNet-50 and of a 12-layer transformer, a chain of 3000 operations (1000 blocks), and one whose
stages all differ, so that none is folded.
"opens" is from navigation to the finished picture, "first paint" is the browser's own figure (first contentful paint).
"a click" opens one block in place. Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver) and
selenium.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from selenium import webdriver
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep

import ffebm_compiler as ffebm
from ffebm_compiler import drawing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from drawing_cases import chain_plan


class Bottleneck(nn.Module):
    """The residual block of ResNet-50 (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            conv = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = torch.relu(y) if index < 2 else y
        return torch.relu(y + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50's graph with a quarter of its channels: the picture has the same nodes."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks, inputs = [], 16
        for stage, count in enumerate((3, 4, 6, 3)):
            for index in range(count):
                width = 16 * 2**stage
                blocks.append(Bottleneck(inputs, width, 2 if stage and not index else 1))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def plans() -> dict[str, ffebm.Plan]:
    """The networks that are drawn."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    return {
        "ResNet-50": ffebm.plan(ResNet50().eval(), torch.randn(2, 3, 64, 64)),
        "transformer, 12 layers": ffebm.plan(encoder.eval(), torch.randn(2, 16, 64)),
        "chain of 3000": chain_plan(1000),
        "1000 blocks, all different": different(chain_plan(1000)),
    }


def different(plan: ffebm.Plan) -> ffebm.Plan:
    """The plan with layers of different heights, so that the page folds no stages."""
    operations = tuple(
        dataclasses.replace(op, rows=op.rows + index) if op.weights else op
        for index, op in enumerate(plan.graph.operations)
    )
    return dataclasses.replace(plan, graph=dataclasses.replace(plan.graph, operations=operations))


def browser() -> webdriver.Chrome:
    """A headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1280,860"):
        options.add_argument(argument)
    return webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    )


OPEN = """
const title = [...document.querySelectorAll('g.node > .title')].find((t) => t.textContent.includes('block_2 '));
const before = performance.now();
title.dispatchEvent(new MouseEvent('click', {bubbles: true}));
document.body.getBoundingClientRect();
return performance.now() - before;
"""


PAINT = """
const done = arguments[0];
new PerformanceObserver((list) =>
  list.getEntriesByName('first-contentful-paint').forEach((entry) => done(entry.startTime))
).observe({type: 'paint', buffered: true});
"""


def middle(times: list[float]) -> str:
    """The median of times, in seconds."""
    return f"{statistics.median(times):.2f} s"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    add_out(parser)
    options = parser.parse_args()
    repeat = options.repeat
    rows: list[dict[str, Any]] = []
    driver = browser()
    print(f"| {'network':24} | operations | nodes | file | written in | opens in | first paint | a click |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in plans().items():
            path = Path(folder) / "page.html"
            start = time.perf_counter()
            drawing.save_html(plan, path)
            wrote = time.perf_counter() - start
            opened, painted, clicked = [], [], []
            for _ in range(repeat):
                start = time.perf_counter()
                driver.get(path.as_uri())
                assert driver.execute_script("return document.documentElement.dataset.ready")
                opened.append(time.perf_counter() - start)
                painted.append(driver.execute_async_script(PAINT) / 1000)
                clicked.append(driver.execute_script(OPEN) / 1000)
            nodes = driver.execute_script("return document.querySelectorAll('g.node').length")
            size = path.stat().st_size / 1000
            figures = {"opens_s": opened, "paint_s": painted, "click_s": clicked}
            medians = {key: statistics.median(times) for key, times in figures.items()}
            rows.append({"network": name, "operations": len(plan.graph.operations), "kb": size, **medians})
            keep(rows, options.out)
            print(
                f"| {name:24} | {len(plan.graph.operations)} | {nodes} | {size:.0f} kB | {wrote:.2f} s "
                f"| {middle(opened)} | {middle(painted)} | {middle(clicked)} |"
            )
    driver.quit()


if __name__ == "__main__":
    main()
