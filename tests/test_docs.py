"""The documentation: every public name has an example that runs, every page is listed, tutorials run, it builds."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import ffebm_compiler as ffebm
import ffebm_compiler.onnx

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in (DOCS / "reference").glob("*.md") if path.stem != "index")
TUTORIALS = sorted((DOCS / "tutorials").glob("*.ipynb"))
DIRECTIVE = re.compile(r"^\.\. auto(?:class|data|function|exception):: (\S+)$", re.MULTILINE)
EXAMPLE = re.compile(r"^```python(?: (needs|raises)=(\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HERE = {
    "ngspice": shutil.which("ngspice") is not None,
    "cuda": torch.cuda.is_available(),
    "onnxruntime": True,
}


def public_names() -> set[str]:
    modules = (ffebm, ffebm_compiler.onnx, ffebm.init)
    return {
        f"{module.__name__}.{name}"
        for module in modules
        for name in module.__all__
        if not inspect.ismodule(getattr(module, name))
    }


def test_every_public_name_is_in_the_reference_once_with_an_example() -> None:
    found: list[str] = []
    for page in PAGES:
        parts = DIRECTIVE.split(page.read_text(encoding="utf-8"))
        for name, after in zip(parts[1::2], parts[2::2], strict=True):
            found.append(name)
            assert EXAMPLE.search(after), f"{page.name}: {name} has no example before the next name"
    assert sorted(found) == sorted(public_names()), (
        "a public name needs an autoclass, autofunction or autoexception and an example on a page in docs/reference"
    )


def test_methods_of_a_hybrid_that_the_docs_call_are_in_the_reference() -> None:
    shown = re.search(
        r"autoclass:: ffebm_compiler\.HybridModel\n +:members: (.*)", (DOCS / "reference" / "convert.md").read_text()
    )
    assert shown is not None
    pages = [ROOT / "README.md", *DOCS.glob("*.md"), *TUTORIALS]
    called = {
        name for page in pages for name in re.findall(r"\bhybrid\.([a-z]\w*)\(", page.read_text(encoding="utf-8"))
    }
    assert {name for name in called if not hasattr(torch.nn.Module, name)} <= {*shown[1].split(", "), "generate"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_the_reference_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    known: dict[str, Any] = {"torch": torch, "ffebm": ffebm, "__name__": "example"}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        for word, value, text in EXAMPLE.findall(page.read_text(encoding="utf-8")):
            if word == "needs" and not HERE[value]:
                continue
            code = compile(text, f"{page.name}: {text.splitlines()[0]}", "exec")
            if word == "raises":
                with pytest.raises(getattr(ffebm, value)):
                    exec(code, known)
            else:
                exec(code, known)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_run_and_have_their_outputs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    known: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, path.name, "exec"), known)
        stored = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        if not isinstance(ast.parse(source).body[-1], ast.Expr) or "display(" not in source:
            lines = printed.getvalue().splitlines()
            assert len(lines) == len(stored.splitlines()), "make tutorials writes the outputs again"
            words = [re.sub(r"[-+−]?\d[\d.e+–-]*", "#", line).split() for line in lines]
            assert len(words) == len(stored.splitlines())


def test_every_page_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    import conf

    for name in conf.KINDS:
        assert (DOCS / f"{name}.md").is_file()
    assert conf.MARK in (DOCS / "how-to.md").read_text(encoding="utf-8")
    assert set(conf.unlisted()) <= {path.stem for path in DOCS.glob("*.md")}


def test_the_citation_is_that_of_the_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {ffebm.__version__}\n" in text
    assert f"version = {{{ffebm.__version__}}}" in (DOCS / "citing.md").read_text(encoding="utf-8")


def test_a_page_that_no_list_names_is_among_the_how_tos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    import conf

    for name in conf.KINDS:
        (tmp_path / f"{name}.md").parent.mkdir(exist_ok=True)
        shutil.copy(DOCS / f"{name}.md", tmp_path / f"{name}.md")
    (tmp_path / "unheard-of.md").write_text("# Something new\n", encoding="utf-8")
    monkeypatch.setattr(conf, "DOCS", tmp_path)
    text = [(tmp_path / "how-to.md").read_text(encoding="utf-8")]
    conf._add_unlisted(None, "how-to", text)
    assert text[0].rstrip().endswith("```{toctree}\n:maxdepth: 1\n\nunheard-of\n```")


def test_a_broken_link_is_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("myst_nb")
    (tmp_path / "index.md").write_text("# Start\n\n[nowhere](no-such-page.md)\n", encoding="utf-8")
    command = [sys.executable, "-P", "-m", "sphinx", "-q", "-W", "-c", str(DOCS), str(tmp_path), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode != 0
    assert "no-such-page" in done.stderr
