"""Photograph the pages of real networks, with random weights, into docs/gallery/.

    .venv/bin/python examples/gallery.py [NAME...] [--out docs/gallery]

Needs Chromium, its driver, selenium, torchvision, timm and transformers. Without names: all. Prints the pictures.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import ffebm_compiler as ffebm
from ffebm_compiler.cli.models import load_model, random_inputs
from ffebm_compiler.drawing import save_html
from ffebm_compiler.files.whole_files import write_whole

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "docs" / "gallery"
SHOTS: dict[str, tuple[str, bool, tuple[int, int], str]] = {
    "resnet18": ("torchvision:resnet18", True, (1280, 860), "light"),
    "vit-tiny": ("timm:vit_tiny_patch16_224", False, (1920, 1080), "light"),
    "gpt2": ("transformers:gpt2", False, (1280, 860), "dark"),
    "resnet18-phone": ("torchvision:resnet18", True, (390, 844), "light"),
}
"""Name -> model, whether batch norm is folded, window, theme."""
REPORTS = {"resnet18-floor": ("resnet18", "floor"), "resnet18-conversions": ("resnet18", "flows")}
"""Name -> one of the above, and the report that is open."""


def page(model: str, fold: bool, path: Path) -> None:
    """Write the page of a model with random weights, and its plan under other options."""
    torch.manual_seed(0)
    named = load_model(model)
    args, kwargs = random_inputs(named.inputs, 0)
    plan = ffebm.plan(named.module, args, kwargs, fold_batchnorm=fold)
    save_html(plan, path, what_if=True, source=model)


def browser() -> Any:
    """A headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", choices=[*SHOTS, *REPORTS, []], metavar="NAME", help=", ".join([*SHOTS, *REPORTS])
    )
    parser.add_argument("--out", type=Path, default=GALLERY)
    options = parser.parse_args()
    names = options.names or [*SHOTS, *REPORTS]
    if shutil.which("chromedriver") is None:
        parser.exit(2, f"{parser.prog}: no chromedriver is on the path: install Chromium and its driver\n")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from zoo_models import load_torchvision

    load_torchvision()
    options.out.mkdir(parents=True, exist_ok=True)
    driver = browser()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                shot, report = REPORTS.get(name, (name, ""))
                model, fold, (width, height), theme = SHOTS[shot]
                page(model, fold, Path(folder) / "page.html")
                window = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
                features = [{"name": "prefers-color-scheme", "value": theme}]
                driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
                driver.get((Path(folder) / "page.html").as_uri())
                if report:
                    driver.find_element("css selector", f".tools [name={report}]").click()
                frames = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
                driver.execute_async_script(frames)
                write_whole(options.out / f"{name}.png", driver.get_screenshot_as_png())
                print(options.out / f"{name}.png", flush=True)
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
