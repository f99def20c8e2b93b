"""Write the interactive picture of a small CNN and of a transformer, with what was measured on them.

    .venv/bin/python examples/draw_page.py [FOLDER] [--screenshots]

Writes cnn.html, transformer.html and two-chips.html, to be opened in any browser, and two plots into FOLDER (default:
out/pictures). With --screenshots also docs/pictures/page-*.png and plot-*.png, which needs Chromium, its driver and
selenium.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler import drawing
from ffebm_compiler.demo.models import DigitsCNN
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.passes.partition.compare import sweep

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"


def write_pages(folder: Path) -> None:
    """Write the three pages and the two plots."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images = torch.rand(8, 1, 8, 8)
    cnn = ffebm.convert(DigitsCNN().eval(), images, fold_batchnorm=True)
    gradients = ffebm.check_gradients(cnn, images, lambda scores: scores.logsumexp(1).mean())
    diagnosis = cnn.diagnose(images)
    cnn.save_html(folder / "cnn.html", comparison=cnn.compare(images), gradients=gradients, diagnosis=diagnosis)
    write_plot(drawing.plot_relaxation(diagnosis), folder / "plot-relaxation.png")
    rows = sweep(cnn.plan, {"tile_rows": [64, 128, 256], "layers_per_block": [1, 2, 4]})
    write_plot(drawing.plot_hardware(rows), folder / "plot-hardware.png")
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    tokens = torch.randn(2, 10, 64)
    ffebm.convert(encoder, tokens).save_html(folder / "transformer.html")
    plans = [ffebm.plan(encoder, tokens, hardware=name) for name in ("crossbar-64", "crossbar-256")]
    drawing.save_side_by_side(plans[0], plans[1], folder / "two-chips.html")


def write_plot(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(path, image.getvalue())


def screenshots(folder: Path) -> None:
    """Photograph the pages in light and dark, with a block open."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    )
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 1280, "height": 860, "deviceScaleFactor": 1, "mobile": False}
    )
    click = (
        "const titles = [...document.querySelectorAll('g.node > .title')];"
        "const title = titles.find((one) => one.textContent.includes(arguments[0]));"
        "title.dispatchEvent(new MouseEvent('click', {bubbles: true}));"
    )
    try:
        for name, theme, block in (("cnn", "light", "block_2 "), ("transformer", "dark", "block_1 ")):
            features = [{"name": "prefers-color-scheme", "value": theme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            driver.get((folder / f"{name}.html").resolve().as_uri())
            driver.execute_script(click, block)
            driver.execute_script("document.querySelector('.curve')?.closest('section').scrollIntoView()")
            write_whole(PICTURES / f"page-{name}.png", driver.get_screenshot_as_png())
    finally:
        driver.quit()
    for plot in folder.glob("plot-*.png"):
        write_whole(PICTURES / plot.name, plot.read_bytes())


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/pictures"))
    parser.add_argument("--screenshots", action="store_true")
    chosen = parser.parse_args()
    write_pages(chosen.folder)
    print(f"wrote {', '.join(str(path) for path in sorted(chosen.folder.iterdir()) if path.is_file())}")
    if chosen.screenshots:
        PICTURES.mkdir(parents=True, exist_ok=True)
        screenshots(chosen.folder)


if __name__ == "__main__":
    main()
