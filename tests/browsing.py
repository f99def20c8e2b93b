"""A real browser for the tests of pages: Chromium without a window, with the network off, and what tests ask of it.

Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver). A test file imports `browser` and
`no_console_errors`, which are fixtures, names them in its `__all__`, and has `pytestmark = NEEDS_BROWSER`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NEEDS_BROWSER = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")
SIZES = {"desktop": (1280, 860), "phone": (390, 844), "wide": (1920, 1080)}

OVERLAPS = (
    "const nodes = [...document.querySelectorAll('g.node')];"
    "const box = new Map(nodes.map((n) => [n, n.querySelector('.box').getBoundingClientRect()]));"
    "let found = [];"
    "for (const a of nodes) for (const b of nodes) {"
    "  if (a === b || a.parentElement !== b.parentElement) continue;"
    "  const [p, q] = [box.get(a), box.get(b)];"
    "  if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)"
    "    found.push(a.dataset.id + ' ' + b.dataset.id);"
    "} return found;"
)
"""Nodes that lie on a sibling."""


class Browser:
    """A window with what the tests ask of it."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver = driver
        self.downloads = downloads

    def open(self, path: Path, size: str = "desktop") -> None:
        width, height = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(path.as_uri())
        assert self.js("return document.documentElement.dataset.ready") is not None

    def js(self, code: str, *arguments: object) -> Any:
        return self.driver.execute_script(code, *arguments)

    def click(self, name: str) -> None:
        """Click the head of a node by its title, as a pointer does: whatever lies there on the screen."""
        found = self.js(
            "const titles = [...document.querySelectorAll('g.node > .title')];"
            "const title = titles.find((t) => t.textContent.includes(arguments[0]));"
            "if (!title) return 'no node';"
            "title.scrollIntoView({block: 'center', inline: 'center'});"
            "const box = title.getBoundingClientRect();"
            "const at = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);"
            "if (at.closest('g.node') !== title.parentElement) return 'covered by ' + at.outerHTML.slice(0, 80);"
            "at.dispatchEvent(new MouseEvent('click', {bubbles: true}));",
            name,
        )
        assert found is None, f"{name}: {found}"

    def titles(self) -> list[str]:
        return self.js("return [...document.querySelectorAll('g.node > .title')].map((t) => t.textContent)")

    def panel(self) -> str:
        return self.js("const p = document.querySelector('.panel'); return p.hidden ? '' : p.innerText")

    def press(self, keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(keys)

    def button(self, name: str) -> None:
        self.driver.find_element("css selector", f".tools [name={name}]").click()

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=http://127.0.0.1:9",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    downloads = tmp_path_factory.mktemp("downloads")
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    try:
        yield Browser(driver, downloads)
    finally:
        driver.quit()


@pytest.fixture(autouse=True)
def no_console_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test that opens the browser leaves its console empty."""
    window = request.getfixturevalue("browser") if "browser" in request.fixturenames else None
    if window is not None:
        window.errors()
    yield
    assert window is None or window.errors() == []
