"""What is written is whole or absent: every writer, killed, failing or limited at every step."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.files import whole_folders
from ffebm_compiler.files.hidden_files import fresh_folder, remove_leftovers
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.files.whole_folders import recover_folder, whole_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and signals")
RUNNER = Path(__file__).with_name("interrupted_writers.py")
LIGHT = ("plan", "measured page", "demo", "save")
EXPORTS = (("onnx", "large onnx"), ("digital", "large digital", "quantised"))
PICTURES = ("html", "svg", "png", "pdf", "dot", "two plans")


def interrupted(folder: Path, points: int, *writers: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-W", "ignore", str(RUNNER), str(folder), str(points), *writers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_writer_interrupted_at_every_step(tmp_path: Path) -> None:
    found = interrupted(tmp_path, 12, *LIGHT)
    assert {name: writer["problems"] for name, writer in found.items()} == {name: [] for name in LIGHT}
    for name, writer in found.items():
        assert writer["tried"] >= 20, name
        # Where files have no name until they are whole, only a kill between two names leaves something.
        if hasattr(os, "O_TMPFILE") and name != "save":
            assert writer["hidden after a kill"] <= 3, name


@pytest.mark.slow
def test_pictures_interrupted(tmp_path: Path) -> None:
    found = interrupted(tmp_path, 2, *PICTURES)
    assert {name: writer["problems"] for name, writer in found.items()} == {name: [] for name in PICTURES}


@pytest.mark.slow
@pytest.mark.parametrize("writers", EXPORTS, ids=" and ".join)
def test_exports_interrupted(tmp_path: Path, writers: tuple[str, ...]) -> None:
    pytest.importorskip("onnxruntime")
    found = interrupted(tmp_path, 2, *writers)
    assert {name: writer["problems"] for name, writer in found.items()} == {name: [] for name in writers}
    assert all(writer["tried"] >= 6 for writer in found.values())


@pytest.fixture(params=["nameless", "named", "no /proc"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways in which a file comes to its name."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    if request.param == "no /proc":
        if not hasattr(os, "O_TMPFILE"):
            pytest.skip("no nameless files")
        monkeypatch.setattr(os, "link", _refuse)
    return str(request.param)


def _refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))


def test_a_file_is_as_any_other(tmp_path: Path, way: str) -> None:
    mask = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", "ä\n")
        (tmp_path / "ordinary").write_text("")
    finally:
        os.umask(mask)
    assert (tmp_path / "new").read_bytes() == "ä\n".encode()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    (tmp_path / "new").chmod(0o604)
    (tmp_path / "link").symlink_to("new")
    write_whole(tmp_path / "link", b"other")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").read_bytes() == b"other"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    (tmp_path / "dangling").symlink_to("made")
    write_whole(tmp_path / "dangling", b"x")
    assert (tmp_path / "made").read_bytes() == b"x"
    write_whole(tmp_path / ("n" * 255), b"x")  # no room for a longer name beside it
    write_whole(tmp_path / ("n" * 255), b"y")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "dangling", "link", "made", "new", "n" * 255, "ordinary"
    ]  # fmt: skip


def test_an_error_leaves_the_older_file(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("older")

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(ffebm.ExportError, match=r"written to .*file: No space left on device; free some space"):
            write_whole(tmp_path / "file", "newer")
    with pytest.raises(ffebm.ExportError, match="surrogates not allowed"):
        write_whole(tmp_path / "file", "\ud800")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / "file", "newer")
    assert (tmp_path / "file").read_text() == "older"
    assert os.listdir(tmp_path) == ["file"]


def _interrupt(_: int) -> None:
    raise KeyboardInterrupt


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ffebm.ExportError, match=r"to .*folder: Is a directory; it is a folder; name a file"):
        write_whole(tmp_path / "folder", "x")
    with pytest.raises(ffebm.PlanError, match=r"the plan cannot be written to .*null byte"):
        write_whole("a\0b", "x", failure="the plan cannot be written", error=ffebm.PlanError)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ffebm.ExportError, match="symbolic links"):
        write_whole(tmp_path / "loop", "x")
    if Path("/dev/full").exists():
        with pytest.raises(ffebm.ExportError, match="/dev/full: No space left"):
            write_whole("/dev/full", "x")
    write_whole(os.devnull, "x")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_whole(tmp_path / "pipe", "x")
    reader.join()
    assert read == [b"x"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_protected_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("older")
    (tmp_path / "file").chmod(0o444)
    with pytest.raises(ffebm.ExportError, match="Permission denied"):
        write_whole(tmp_path / "file", "newer")
    assert (tmp_path / "file").read_text() == "older"


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead = tmp_path / ".ffebm-0123456789abcdef.part"
    dead.write_text("half")
    dead_folder = tmp_path / ".ffebm-0123456789abcdee.part"
    dead_folder.mkdir()
    (dead_folder / "half").write_text("half")
    others = {".ffebm-mine", ".hidden", ".ffebm-0123456789abcdef.parts"}
    for name in others:
        (tmp_path / name).write_text("")
    outside = tmp_path / "outside"
    outside.write_text("")
    (tmp_path / ".ffebm-0123456789abcded.part").symlink_to(outside)
    with fresh_folder(tmp_path) as living:
        remove_leftovers(tmp_path)
        assert living.is_dir()
        assert not dead.exists()
        assert not dead_folder.exists()
    assert outside.exists()
    (tmp_path / ".ffebm-0123456789abcded.part").unlink()
    assert {file.name for file in tmp_path.iterdir()} == others | {"outside"}


def test_writers_at_the_same_time(tmp_path: Path, way: str) -> None:
    """The last one to finish wins, and each file is one writer's."""
    errors: list[BaseException] = []

    def write(letter: str) -> None:
        try:
            for _ in range(15):
                write_whole(tmp_path / "file", letter * 5000)
                with whole_folder(tmp_path / "folder") as fresh:
                    fresh.write("a", letter)
                    fresh.write("b", letter)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set((tmp_path / "file").read_text()) in ({"x"}, {"y"}, {"z"})
    assert (tmp_path / "folder" / "a").read_text() == (tmp_path / "folder" / "b").read_text()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(
    tmp_path: Path, way: str, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(whole_folders, "_exchange", lambda *_: False)
    target = tmp_path / "above" / "folder"
    with whole_folder(target) as fresh:
        fresh.write("first", "1")
    target.chmod(0o750)
    (tmp_path / "link").symlink_to(target)
    monkeypatch.setattr(whole_folders, "_MOST_OPEN", 2)
    with whole_folder(tmp_path / "link") as fresh:
        for name in "cab":
            fresh.write(name, name)
            if name == "a":
                assert list(fresh.digests()) == ["a", "c"]
        (fresh.path / "d").write_text("d")
        assert list(fresh.digests()) == list("abcd")
    assert (tmp_path / "link").is_symlink()
    assert {file.name: file.read_text() for file in target.iterdir()} == {name: name for name in "abcd"}
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    for path in (target, tmp_path / "new" / "below"):
        with pytest.raises(TypeError), whole_folder(path) as fresh:
            fresh.write("half", None)  # type: ignore[arg-type]
    assert sorted(os.listdir(target)) == list("abcd")
    assert sorted(os.listdir(tmp_path)) == ["above", "link"]
    assert os.listdir(tmp_path / "above") == ["folder"]


def test_an_older_folder_comes_back_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot exchange names: killed after the older folder was set aside."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(2, 3)
    hybrid = ffebm.convert(model, x)
    target = tmp_path / "saved"
    hybrid.save(target)
    aside = whole_folders._path_aside(target)
    target.rename(aside)
    again = ffebm.load(target, model)
    assert torch.equal(again.eval()(x), hybrid.eval()(x))
    assert os.listdir(tmp_path) == ["saved"]
    target.rename(aside)
    hybrid.save(target)
    assert os.listdir(tmp_path) == ["saved"]
    aside.mkdir()
    hybrid.save(target)  # what was set aside and is not needed any more
    assert os.listdir(tmp_path) == ["saved"]
    recover_folder("a\0b")


def test_a_failed_exchange_puts_the_older_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_folders, "_exchange", lambda *_: False)
    with whole_folder(tmp_path / "folder") as fresh:
        fresh.write("a", "older")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ffebm.ExportError, match="Input/output error"), whole_folder(tmp_path / "folder") as fresh:
        fresh.write("a", "newer")
    assert (tmp_path / "folder" / "a").read_text() == "older"
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs a small file system")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.mount(b"tmpfs", os.fsencode(tmp_path), b"tmpfs", 0, b"size=64k") != 0:
        pytest.skip("may not mount")
    try:
        hybrid = ffebm.convert(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8))
        hybrid.save(tmp_path / "saved")
        hybrid.plan.to_json(tmp_path / "plan")
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        room = os.statvfs(tmp_path)
        (tmp_path / "filling").write_bytes(bytes(room.f_bavail * room.f_frsize))
        for write in (hybrid.plan.to_json, hybrid.save_html, hybrid.save_svg):
            with pytest.raises(ffebm.FFEBMError, match="No space left on device; free some space"):
                write(tmp_path / "plan")
        with pytest.raises(ffebm.ExportError, match=r"saved to .*No space left on device"):
            hybrid.save(tmp_path / "saved")
        (tmp_path / "filling").unlink()
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
        assert sorted(os.listdir(tmp_path)) == ["plan", "saved"]
    finally:
        assert library.umount(os.fsencode(tmp_path)) == 0


def test_no_writer_goes_around_it() -> None:
    """In the package, in benchmarks and in examples, nothing but `whole_files` opens a file to write to it."""
    root = Path(__file__).parents[1]
    words = ("write_text(", "write_bytes(", "save_file(", ".savefig(", "shutil.copy(", "save_screenshot(")
    allowed = {
        ("ffebm_compiler/drawing/raster.py", ".savefig("),  # into memory
        ("ffebm_compiler/drawing/plots.py", ".savefig("),  # its docstring
        ("examples/draw_page.py", ".savefig("),  # into memory
        ("examples/circuit_in_the_loop.py", ".savefig("),  # into memory
        ("examples/experiment.py", ".savefig("),  # into memory
        ("benchmarks/from_scratch.py", ".savefig("),  # into memory
        ("benchmarks/measuring.py", "write_text("),  # a switch of the kernel's
    }
    found = {
        (str(file.relative_to(root)), word)
        for folder in ("ffebm_compiler", "passes", "runtime", "benchmarks", "examples")
        for file in (root / folder).rglob("*.py")
        for word in words
        if word in file.read_text(encoding="utf-8")
    }
    assert found == allowed


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/below"])
def test_paths_that_no_system_takes(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("older")
    path = tmp_path / name
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    hybrid = ffebm.convert(model, torch.randn(2, 3))
    for write in (hybrid.save, hybrid.save_html, hybrid.save_svg, hybrid.plan.to_json, hybrid.export_onnx):
        with pytest.raises(ffebm.FFEBMError, match=r"to .*(x|a|below)"):
            write(path)
    with pytest.raises(ffebm.ExportError, match=r"to .*(x|a|below)"):
        hybrid.export_onnx(path, parts="digital")
    for read in (ffebm.Plan.from_json, lambda path: ffebm.load(path, model), ffebm.onnx.load):
        with pytest.raises(ffebm.FFEBMError, match=r"(x|a|below)"):
            read(path)
    for suffix in (".toml", ".json"):
        with pytest.raises(ffebm.HardwareError, match="cannot be read"):
            ffebm.Hardware.from_file(f"{path}{suffix}")
    assert (tmp_path / "file").read_text() == "older"
    assert os.listdir(tmp_path) == ["file"]


def test_folders_in_the_place_of_files(tmp_path: Path) -> None:
    for name in ("plan.json", "chip.toml", "chip.json", "manifest.json", "hybrid.json"):
        (tmp_path / name).mkdir()
    with pytest.raises(ffebm.PlanError, match="Is a directory"):
        ffebm.Plan.from_json(tmp_path / "plan.json")
    for name in ("chip.toml", "chip.json"):
        with pytest.raises(ffebm.HardwareError, match="Is a directory"):
            ffebm.Hardware.from_file(tmp_path / name)
    with pytest.raises(ffebm.ExportError, match="Is a directory"):
        ffebm.onnx.load(tmp_path)
    with pytest.raises(ffebm.InputError, match=r"hybrid.json, .* are missing"):
        ffebm.load(tmp_path, nn.Linear(2, 2))
