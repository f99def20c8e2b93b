"""The example notebook, executed by a real kernel: what a reader sees there."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "draw_notebook.ipynb"
pytestmark = pytest.mark.slow


class Tags(HTMLParser):
    """The elements of a page, and the attributes of its frames."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.frames: list[dict[str, str | None]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        if tag == "iframe":
            self.frames.append(dict(attrs))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the last expression of each code cell shows."""
    import nbformat

    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
            patch.setenv(name, str(folder / name.lower()))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}})
        client.execute()
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert all(output.output_type in ("execute_result", "display_data") for cell in shown for output in cell), shown
    return [cell[-1].data for cell in shown]


def test_a_hybrid_and_a_plan_show_their_picture_in_a_sandboxed_frame(outputs: list[Any]) -> None:
    page = "<!DOCTYPE html><title>notebook</title><body>" + "".join(f"<div>{o['text/html']}</div>" for o in outputs[:2])
    tags = Tags(page)
    # Nothing of the picture is outside its frame: no script and no style reaches the notebook.
    assert tags.names == ["title", "body", "div", "iframe", "div", "iframe"]
    for frame in tags.frames:
        assert frame["sandbox"] == "allow-scripts allow-downloads"
        inside = Tags(frame["srcdoc"] or "")
        assert inside.names.count("script") == 2
    titles = [re.search(r"<title>(.*?)</title>", frame["srcdoc"] or "") for frame in tags.frames]
    assert [html.unescape(title[1]) for title in titles if title] == [
        "DigitsCNN on crossbar-256",
        "DigitsCNN on crossbar-64",
    ]


def test_where_no_html_is_shown_the_text_is_enough(outputs: list[Any]) -> None:
    assert "DigitsCNN" in outputs[1]["text/plain"]
    assert "block_1" in outputs[1]["text/plain"]


def test_a_plot_is_an_image(outputs: list[Any]) -> None:
    assert outputs[2]["image/png"].startswith("iVBORw0KGgo")
