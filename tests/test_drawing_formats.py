"""Every format of a picture, from a plan, a hybrid and the command line; and what cannot be drawn or written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from drawing_cases import chain_plan
from networks import mlp
from typer.testing import CliRunner, Result

import ffebm_compiler as ffebm
from ffebm_compiler import drawing
from ffebm_compiler.cli.main import main
from ffebm_compiler.ir import OperationGraph
from ffebm_compiler.plan import Plan, PlanOptions

STARTS = {".html": b"<!DOCTYPE html>", ".svg": b"<svg", ".png": b"\x89PNG", ".pdf": b"%PDF", ".dot": b"digraph"}


def ffebm_draw(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["draw", *map(str, arguments)])


def empty_plan() -> Plan:
    graph = OperationGraph({"x": 1}, (), ("x",))
    return Plan("Empty", chain_plan(1).hardware, PlanOptions(), (), (), {}, {}, (), ("",), graph)


def test_a_plan_and_its_hybrid_draw_themselves(tmp_path: Path) -> None:
    hybrid = ffebm.convert(*mlp())
    for source, name in ((hybrid, "hybrid"), (hybrid.plan, "plan")):
        source.save_svg(tmp_path / f"{name}.svg")
        source.save_html(tmp_path / f"{name}.html")
        source.save_image(tmp_path / f"{name}.png", dpi=50)
        assert source.to_dot() == drawing.dot_text(hybrid.plan)
        assert "<iframe sandbox" in source._repr_html_()
        for suffix in (".svg", ".html", ".png"):
            assert (tmp_path / f"{name}{suffix}").read_bytes().startswith(STARTS[suffix])
    assert "loop gain" in (tmp_path / "hybrid.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", STARTS)
def test_a_stored_plan_is_drawn_by_the_suffix(tmp_path: Path, suffix: str) -> None:
    stored, out = tmp_path / "plan.json", tmp_path / f"p{suffix.upper()}"
    ffebm.plan(*mlp()).to_json(stored)
    assert ffebm_draw(stored, "--out", out).stdout == f"wrote {out}\n"
    assert out.read_bytes().startswith(STARTS[suffix])
    before = out.read_bytes()
    assert ffebm_draw(stored, "--out", out).exit_code == 2
    assert out.read_bytes() == before
    assert ffebm_draw(stored, "--out", out, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "p.gif"), "'p.gif'; expected a file that ends in .html (an interactive page), .svg"),
        (("--out", "p"), "'p'; expected a file that ends in .html"),
        (("--out", "p.svg", "--input", "1x8"), "--input is given beside a stored plan"),
        (("--out", "p.svg", "--fold-batchnorm"), "--fold-batchnorm is given beside a stored plan"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ffebm.plan(*mlp()).to_json("plan.json")
    result = ffebm_draw("plan.json", *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("suffix", STARTS)
def test_an_existing_file_is_replaced_and_kept_where_nothing_can_be_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    path.write_bytes(b"old" * 100_000)
    with pytest.raises(ffebm.PlanError, match="the plan of Empty has no operation"):
        drawing.save_picture(empty_plan(), path)
    assert path.read_bytes() == b"old" * 100_000
    drawing.save_picture(chain_plan(1), path)
    assert path.read_bytes().startswith(STARTS[suffix])
    assert b"oldold" not in path.read_bytes()


@pytest.mark.parametrize("suffix", STARTS)
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ffebm.ExportError, match=r"missing.p\.\w+: No such file or directory; give a file name"):
        drawing.save_picture(chain_plan(1), tmp_path / "missing" / f"p{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(ffebm.ExportError, match=r"Is a directory|Permission denied"):
        drawing.save_picture(chain_plan(1), tmp_path / f"folder{suffix}")
    with pytest.raises(ffebm.ExportError, match="File name too long"):
        drawing.save_picture(chain_plan(1), tmp_path / f"{'p' * 400}{suffix}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("draw", [drawing.save_svg, drawing.save_html])
def test_a_full_disk_is_named(draw: Callable[[Plan, str], None]) -> None:
    with pytest.raises(ffebm.ExportError, match="cannot be written to /dev/full: No space left on device"):
        draw(chain_plan(1), "/dev/full")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.svg"
    path.write_text("theirs")
    path.chmod(0o444)
    with pytest.raises(ffebm.ExportError, match="Permission denied"):
        chain_plan(1).save_svg(path)
    assert path.read_text() == "theirs"


@pytest.mark.parametrize(
    "prefix", ["层", "é\u0301", "a b", "'quoted'", '"quoted"', "<b>&amp;", "back\\slash", "🙂", "العربية"]
)
def test_any_module_name_is_drawn_in_every_format(tmp_path: Path, prefix: str) -> None:
    plan = chain_plan(2, prefix=prefix, model=prefix)
    for suffix, start in STARTS.items():
        drawing.save_picture(plan, tmp_path / f"{prefix.encode().hex()}{suffix}")
        assert (tmp_path / f"{prefix.encode().hex()}{suffix}").read_bytes().startswith(start)
