"""The gallery: real networks with random weights, their plans, pictures, pages and figures, as docs/gallery.md.

    .venv/bin/python examples/gallery.py [NAME...] [--out docs]

For each network it writes gallery/NAME.json (its plan on one line, from which `make docs` makes its page), NAME.txt
(the same in words) and NAME.png; when it draws all networks, also gallery.md with all figures. Without names: all.
Needs Chromium, its driver, selenium, torchvision, timm and transformers. Prints the files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ffebm_compiler as ffebm
from ffebm_compiler.cli.models import load_model, random_inputs
from ffebm_compiler.drawing import save_html
from ffebm_compiler.driven import settles
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.hardware.costs import Quantity

ROOT = Path(__file__).resolve().parents[1]
INTRODUCTION = """\
# Gallery

{count} public networks with random weights at their usual input size, as the command line plans them for its
default hardware (`crossbar-256`). Behind each picture is a page on which every box opens.

*Analog* is the share of multiply-accumulates in energy blocks. Attention's products of activations are always
digital. *Settling* blocks have feedback; the others compute exactly what their layers compute. *Conversions* are
DAC and ADC values per sample. The energy of an inference, with crossbars, converters, memory and digital work, is
modelled ([sources](costs.md)). *Digital* is the same network in 45 nm arithmetic, modelled too.

`python examples/gallery.py` writes this page, its plans, pictures and pages.

"""
COLUMNS = ("network", "parameters", "MACs", "analog", "blocks", "settling", "digital parts", "tiles", "conversions",
           "modelled energy", "digital")  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}\n"


@dataclass(frozen=True)
class Network:
    """One network of the gallery."""

    title: str
    model: str
    remark: str
    fold: bool = False
    theme: str = "light"
    window: tuple[int, int] = (1280, 860)

    @property
    def command(self) -> str:
        """What prints its plan."""
        quoted = f"'{self.model}'" if "(" in self.model else self.model
        return f"ffebm plan {quoted}{' --fold-batchnorm' if self.fold else ''}"


NETWORKS = {
    "resnet18": Network(
        "ResNet-18",
        "torchvision:resnet18",
        "With batch norm folded, up to four convolutions and their skips settle together.",
        fold=True,
    ),
    "resnet50": Network(
        "ResNet-50",
        "torchvision:resnet50",
        "Bottlenecks, of three convolutions and a skip, settle together until they are too wide for a core.",
        fold=True,
    ),
    "vgg11-bn": Network(
        "VGG-11",
        "torchvision:vgg11_bn",
        "Its first linear layer has 103 million weights: it is split over many cores.",
        fold=True,
    ),
    "mobilenet-v2": Network(
        "MobileNetV2",
        "torchvision:mobilenet_v2",
        "A depthwise convolution uses few devices of each of its tiles.",
        fold=True,
    ),
    "convnext-atto": Network(
        "ConvNeXt-Atto",
        "timm:convnext_atto",
        "Layer norm is digital; the two linear layers behind it settle with the GELU between them.",
    ),
    "vit-tiny": Network(
        "ViT-Tiny",
        "timm:vit_tiny_patch16_224",
        "The MLP of every layer settles; the softmax of attention is digital.",
        window=(1920, 1080),
    ),
    "swin-t": Network(
        "Swin-T", "torchvision:swin_t", "Attention in shifted windows: moving pixels costs conversions and no weight."
    ),
    "mixer-s16": Network(
        "MLP-Mixer S/16", "timm:mixer_s16_224", "Every MLP settles, over tokens and over channels in turn."
    ),
    "bert": Network(
        "BERT-Base",
        "transformers:bert",
        "A linear layer of an MLP needs 72 tiles, and a core has 64: it is split, and no block settles.",
        theme="dark",
    ),
    "gpt2": Network(
        "GPT-2", "transformers:gpt2", "As wide as BERT-Base. Layers that are alike are drawn once.", theme="dark"
    ),
}
EXTRAS = {
    "resnet18-phone": ("resnet18", "", (390, 844)),
    "resnet18-floor": ("resnet18", "floor", (1280, 860)),
    "resnet18-conversions": ("resnet18", "flows", (1280, 860)),
}
"""More pictures, for docs/drawing.md: name -> network, report that is open, window."""


def planned(network: Network) -> tuple[ffebm.Plan, int]:
    """The plan of a network with random weights, and the number of its parameters."""
    torch.manual_seed(0)
    named = load_model(network.model)
    args, kwargs = random_inputs(named.inputs, 0)
    parameters = sum(parameter.numel() for parameter in named.module.parameters())
    return ffebm.plan(named.module, args, kwargs, fold_batchnorm=network.fold), parameters


def figures(name: str, plan: ffebm.Plan, parameters: int) -> str:
    """The row of a network in the table."""
    costs = plan.cost_report()
    cells = (
        f"[{NETWORKS[name].title}](#{name})",
        short(parameters),
        short(plan.total_macs),
        f"{100 * plan.analog_share:.1f} %",
        str(len(plan.blocks)),
        str(sum(settles(plan.graph, block.operations, block.driven) for block in plan.blocks)),
        str(len(plan.digital_parts)),
        str(sum(block.tiles for block in plan.blocks)),
        short(plan.conversions),
        spoken(costs.inference),
        spoken(costs.digital_inference),
    )
    return f"| {' | '.join(cells)} |\n"


def short(number: int) -> str:
    """Three digits with k, M or G."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def spoken(quantity: Quantity) -> str:
    """A range that stays in one line of a table."""
    return str(quantity).replace(" ", "\N{NO-BREAK SPACE}")


def section(name: str) -> str:
    """What the page says of one network."""
    network = NETWORKS[name]
    return f"""
({name})=

## {network.title}

{network.remark}

```sh
{network.command}
{network.command.replace("plan", "draw", 1)} --out {name}.html
```

![{network.title}: its page as it opens](gallery/{name}.png)

<a href="gallery/{name}.html">Open the page of {network.title}</a>

<details><summary>The plan of {network.title}</summary>

```{{literalinclude}} gallery/{name}.txt
:language: text
```

</details>
"""


def browser() -> Any:
    """A headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def photograph(driver: Any, page: Path, picture: Path, window: tuple[int, int], theme: str, report: str = "") -> None:
    """Write a picture of a page as it opens, or with a report open."""
    width, height = window
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(page.resolve().as_uri())
    if report:
        driver.find_element("css selector", f".tools [name={report}]").click()
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    write_whole(picture, driver.get_screenshot_as_png())
    print(picture, flush=True)


def main() -> None:
    """Write the gallery, or some of its networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NETWORKS, []], metavar="NAME", help=", ".join(NETWORKS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    names = options.names or list(NETWORKS)
    if shutil.which("chromedriver") is None:
        parser.exit(2, f"{parser.prog}: no chromedriver is on the path: install Chromium and its driver\n")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from zoo_models import load_torchvision

    load_torchvision()
    os.environ["COLUMNS"] = "100"
    pictures = options.out / "gallery"
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    folder = tempfile.mkdtemp()
    driver = browser()
    try:
        for name in names:
            network = NETWORKS[name]
            plan, parameters = planned(network)
            compact = json.dumps(plan.to_dict(), separators=(",", ":"))
            write_whole(pictures / f"{name}.json", compact + "\n")
            page = Path(folder) / f"{name}.html"
            save_html(plan, page, what_if=True, source=network.model)
            write_whole(pictures / f"{name}.txt", f"$ {network.command}\n{plan}\n")
            rows.append(figures(name, plan, parameters))
            photograph(driver, page, pictures / f"{name}.png", network.window, network.theme)
            for extra, (of, report, window) in EXTRAS.items():
                if of == name:
                    photograph(driver, page, pictures / f"{extra}.png", window, "light", report)
    finally:
        driver.quit()
        shutil.rmtree(folder)
    if not options.names:
        text = INTRODUCTION.format(count=len(NETWORKS)) + HEAD + "".join(rows) + "".join(map(section, names))
        write_whole(options.out / "gallery.md", text)
        print(options.out / "gallery.md")


if __name__ == "__main__":
    main()
