"""Runs a writer again and again, interrupted at every step that it takes on the disk; prints what was found as JSON.

    python tests/interrupted_writers.py FOLDER POINTS WRITER...

Each attempt is a child of its own (a fork), which is killed, or whose step fails, or whose files may not be large.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.demo.main import DemoSettings
from ffebm_compiler.demo.report import Row, write_results
from ffebm_compiler.drawing import save_side_by_side
from ffebm_compiler.drawing.formats import save_picture
from ffebm_compiler.onnx import quantise

FAILS = {"open", "os.mkdir", "os.link", "os.rename", "write", "fsync", "ctypes.dlsym"}
"""Steps that a full disk can fail; removing something is none of them."""
STEPS = FAILS | {"os.remove", "os.rmdir"}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.LayerNorm((12, 6, 6))
        self.second, self.last = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.second(torch.relu(self.norm(self.first(x)))))
        return self.last(h.mean((2, 3)))


def hybrid(seed: int) -> ffebm.HybridModel:
    torch.manual_seed(seed)
    return ffebm.convert(Convolutions().eval(), torch.randn(2, 1, 6, 6), force_digital="second" if seed else ())


def hybrids() -> list[ffebm.HybridModel]:
    return [hybrid(0), hybrid(1)]


def plans() -> list[ffebm.Plan]:
    return [ffebm.plan(Convolutions(), torch.randn(2, 1, 6, 6), force_digital=names) for names in ((), "second")]


def pictures(suffix: str) -> tuple[str, Callable[[], list[Any]], Callable[[Any, Path], None]]:
    return f"picture{suffix}", plans, save_picture


def quantised(parts: Any, path: Path) -> None:
    quantise(parts, torch.linspace(-1, 1, 4 * 36).reshape(4, 1, 6, 6), into=path)


def exports() -> list[Path]:
    made = []
    for index, one in enumerate(hybrids()):
        made.append(Path(sys.argv[1]) / f"source{index}")
        one.export_onnx(made[-1], parts="digital")
    return made


def demo_results(seed: int, path: Path) -> None:
    rows = [Row.most(f"row {index}", 0.5, 1.0) for index in range(40 + seed)]
    write_results(path, DemoSettings(Path("demo")), rows, {}, finished=True)


def large(one: ffebm.HybridModel, path: Path, parts: str | None = None) -> None:
    ffebm.onnx.whole._LARGE = ffebm.onnx.digital._LARGE = 100
    one.export_onnx(path, parts=parts)


WRITERS: dict[str, tuple[str, Callable[[], list[Any]], Callable[[Any, Path], Any]]] = {
    "plan": ("plan.json", plans, lambda plan, path: plan.to_json(path)),
    "html": pictures(".html"),
    "svg": pictures(".svg"),
    "png": pictures(".png"),
    "pdf": pictures(".pdf"),
    "dot": pictures(".dot"),
    "measured page": ("page.html", hybrids, lambda one, path: one.save_html(path)),
    "two plans": ("two.html", plans, lambda plan, path: save_side_by_side(plan, plan, path)),
    "demo": ("demo", lambda: [0, 1], demo_results),
    "save": ("saved", hybrids, lambda one, path: one.save(path)),
    "onnx": ("whole.onnx", hybrids, lambda one, path: one.export_onnx(path)),
    "large onnx": ("whole.onnx", hybrids, large),
    "digital": ("parts", hybrids, lambda one, path: one.export_onnx(path, parts="digital")),
    "large digital": ("parts", hybrids, lambda one, path: large(one, path, "digital")),
    "quantised": ("int8", exports, quantised),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def everything(folder: Path) -> set[str]:
    return {str(item.relative_to(folder)) for item in folder.rglob("*")}


def attempt(
    work: Callable[[], Any], folder: Path, stop_at: int, how: str, limit: int | None = None
) -> tuple[int, str, int]:
    """Run `work` in a fork; returns its status, what it said, and the steps that it took."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        taken = 0

        def step(event: str, half: Callable[[], Any] = lambda: None) -> None:
            nonlocal taken
            if event not in (FAILS if how == "fail" else STEPS):
                return
            taken += 1
            if taken == stop_at and how == "kill":
                half()
                os.kill(os.getpid(), signal.SIGKILL)
            if taken == stop_at and how == "fail":
                half()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            where = arguments[0] if arguments else ""
            ours = isinstance(where, str | os.PathLike) and str(where).startswith((str(folder), "/proc/self/fd"))
            if event == "open" and how == "fail" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return  # a full disk can be read
            if event == "ctypes.dlsym" or ours:
                step(event)

        write, fsync = os.write, os.fsync

        def stepping_write(descriptor: int, data: Any) -> int:
            step("write", lambda: write(descriptor, bytes(data[: len(data) // 2])))
            return write(descriptor, data)

        def stepping_fsync(descriptor: int) -> None:
            step("fsync")
            fsync(descriptor)

        said = ""
        try:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            else:
                os.write, os.fsync = stepping_write, stepping_fsync
                sys.addaudithook(audit)
            work()
        except BaseException as error:
            said = f"{'ours' if isinstance(error, ffebm.FFEBMError) else 'raw'} {type(error).__name__}: {error}"
        stop_at = -1
        write(writing, json.dumps([said, taken]).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    said, taken = json.loads(text or '["", 0]')
    return status, said, taken


def interrupted(name: str, folder: Path, points: int) -> dict[str, Any]:
    """Interrupt a writer at about `points` steps; returns the problems, and how often a kill left something hidden."""
    target, things, write = WRITERS[name]
    older_thing, newer_thing = things()
    trees = {}
    for key, thing in (("older", older_thing), ("newer", newer_thing)):
        (folder / key).mkdir()
        write(thing, folder / key / target)
        trees[key] = contents(folder / key)
    assert trees["older"] != trees["newer"]
    # What the newer one is, over the older one: a large model's tensors get another name.
    shutil.copytree(folder / "older", folder / "over")
    write(newer_thing, folder / "over" / target)
    trees["over"] = contents(folder / "over")
    names, problems = everything(folder / "over"), []
    largest = max(map(len, trees["newer"].values()))
    place = folder / "place"
    status, said, steps = attempt(lambda: write(newer_thing, place / target), folder, 0, "fail")
    hidden = tried = 0

    def start(with_older: bool) -> None:
        shutil.rmtree(place, ignore_errors=True)
        if with_older:
            shutil.copytree(folder / "older", place)
        else:
            place.mkdir()

    def check(what: str, said: str, expected: list[str], clean: bool) -> None:
        nonlocal hidden
        found = {key: value for key, value in contents(place).items() if ".ffebm-" not in key}
        if what.startswith("kill") and name == "large onnx":
            # Tensors that no model reads, which the next write replaces.
            model = found.get(target, b"")
            found = {key: value for key, value in found.items() if key == target or key.encode() in model}
        left = [item for item in everything(place) if ".ffebm-" in item]
        hidden += bool(left)
        if found not in [trees[key] if key else {} for key in expected]:
            problems.append(f"{what}: half of it is there: { ({key: len(value) for key, value in found.items()}) }")
        if clean and left:
            problems.append(f"{what}: left behind {left}")
        if said.startswith("raw"):
            problems.append(f"{what}: {said[:200]}")

    def write_newer() -> None:
        write(newer_thing, place / target)

    for with_older in (True, False) if points > 2 else (True,):
        before, after = ("older", "over") if with_older else ("", "newer")
        for how in ("kill", "fail"):
            start(with_older)
            _, said, steps = attempt(write_newer, folder, 0, how)
            check(f"{how} 0", said, [after], True)
            chosen = range(1, steps + 1)
            if steps > points:  # the last ones are where names change hands
                chosen = sorted({*range(1, steps + 1, steps // (points // 2)), *range(steps - points // 2, steps + 1)})
            for point in chosen:
                tried += 1
                start(with_older)
                status, said, _ = attempt(write_newer, folder, point, how)
                what = f"{how} at step {point} of {steps}, {'over an older one' if with_older else 'new'}"
                if how == "kill" and not os.WIFSIGNALED(status):
                    problems.append(f"{what}: was not killed")
                expected = [before, after] if how == "kill" else [before if said else after, after]
                check(what, said, expected, clean=how == "fail")
                if how == "kill" and point % 5 == 0:
                    attempt(write_newer, folder, 0, how)
                    left = [item for item in everything(place) if ".ffebm-" in item]
                    if left:
                        problems.append(f"{what}: the next write leaves {left}")
        start(with_older)
        _, said, _ = attempt(write_newer, folder, 0, "limit", limit=largest // 2)
        check(f"limit, {said[:60]}", said, [before], True)
        if not said.startswith("ours") or "File too large" not in said or target not in said:
            problems.append(f"limit: says {said!r}")
    return {"problems": problems, "tried": tried, "hidden after a kill": hidden, "names": sorted(names)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # matplotlib writes the date into a PDF
    found = {}
    for name in sys.argv[3:]:
        work = Path(sys.argv[1]).resolve() / name.replace(" ", "-")
        work.mkdir()
        found[name] = interrupted(name, work, int(sys.argv[2]))
    sys.stdout.write(json.dumps(found))
