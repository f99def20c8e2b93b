"""What a change has done to the time of a training step: two commits against each other.

    python benchmarks/compare_commits.py BASE [HEAD] [--steps 9] [--network "residual*"] [--feedback 0.1 0.5 0.9]
    python benchmarks/compare_commits.py main          # the present commit against main

Each commit's package is unpacked into a folder of its own and runs in a process of its own, on the networks of the
present `training_step.py`. The two processes take turns, step by step, and each also takes a backprop step of the
source at every turn, so that a machine that is busy for a while slows all of them. The weights are marked as changed
before every step: the loop gain is measured as in training. Figures are medians over the turns of CPU seconds of one
thread: steps in backprop steps of the source, and the head's time over the base's.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(__file__).resolve().parent
PACKAGE = "ffebm_compiler"
INSIDE = ("passes", "runtime")
"""Folders beside the package's that are imported as parts of it."""


def unpack(commit: str, folder: Path) -> None:
    """The package of a commit, as it is imported, in a folder."""
    done = subprocess.run(
        ["git", "archive", "--format=tar", commit, PACKAGE, *INSIDE],
        cwd=FOLDER.parent,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"compare_commits: {commit} could not be read: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    for name in INSIDE:
        (folder / name).rename(folder / PACKAGE / name)


class Worker:
    """One commit's process: it is sent a step to take, one a line, and answers with its CPU seconds."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        sizes = json.dumps({key: getattr(options, key) for key in ("batch", "width", "depth", "side")})
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        )
        where = self.ask({})
        if not Path(where["package"]).is_relative_to(folder):
            raise SystemExit(f"compare_commits: {where['package']} was imported, not the package in {folder}")

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a question and wait for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("compare_commits: a process ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(sizes: dict[str, int | None]) -> None:
    """What a worker does: take the steps that it is asked for."""
    import torch

    sys.path.insert(0, str(FOLDER))
    import training_step
    from measuring import seconds

    import ffebm_compiler

    torch.set_num_threads(1)
    options = SimpleNamespace(held=False, **{k: sizes[k] or value for k, value in training_step.SIZES["cpu"].items()})
    made: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any] = {"package": ffebm_compiler.__file__}
        if question:
            key = json.dumps(question)
            if key not in made:
                settings = question["settings"]
                name = training_step.SOURCE if settings is None else key
                training_step.VARIANTS[name] = settings
                made[key] = training_step.contestant(question["network"], name, options, torch.device("cpu"))
                made[key].run()
            training_step.touch(made[key].module)
            answer["seconds"] = seconds(partial(made[key].run), torch.device("cpu"))
            answer["sweeps"] = made[key].sweeps()
        print(json.dumps(answer), flush=True)


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit, branch or tag")
    parser.add_argument("head", nargs="?", default="HEAD", help="another one; left out: the present commit")
    parser.add_argument("--steps", type=int, default=9, help="turns")
    parser.add_argument("--network", default="*", help="glob pattern")
    parser.add_argument("--feedback", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--gradient", nargs="+", default=["ep", "implicit"])
    for size in ("batch", "width", "depth", "side"):
        parser.add_argument(f"--{size}", type=int, help="as in training_step.py")
    options = parser.parse_args()
    networks = [name for name in ("residual CNN", "transformer MLP stack") if fnmatch.fnmatch(name, options.network)]
    with tempfile.TemporaryDirectory() as place:
        workers = []
        for index, commit in enumerate((options.base, options.head)):
            folder = Path(place).resolve() / str(index)
            unpack(commit, folder)
            workers.append(Worker(folder, options))
        print(f"{'':40}{'base':>9}{'sweeps':>8}{'head':>9}{'sweeps':>8}   head/base")
        for network in networks:
            for feedback in options.feedback:
                for gradient in options.gradient:
                    compare(workers, network, {"feedback": feedback, "gradient": gradient}, options.steps)
        for worker in workers:
            worker.close()


def compare(workers: list[Worker], network: str, settings: dict[str, Any], steps: int) -> None:
    """Print one row: a step of each commit in backprop steps of the source, and one over the other."""
    times: list[list[float]] = [[], []]
    ratios: list[list[float]] = [[], []]
    sweeps: list[Any] = [None, None]
    for turn in range(steps):
        for index in (0, 1) if turn % 2 else (1, 0):
            source = workers[index].ask({"network": network, "settings": None})["seconds"]
            answer = workers[index].ask({"network": network, "settings": settings})
            times[index].append(answer["seconds"])
            ratios[index].append(answer["seconds"] / source)
            sweeps[index] = answer["sweeps"]
    name = f"{network}, {settings['gradient']}, κ {settings['feedback']:g}"
    columns = "".join(f"{statistics.median(ratios[i]):9.2f}{sweeps[i] or 0:8g}" for i in (0, 1))
    change = statistics.median(b / a for a, b in zip(*times, strict=True))
    print(f"{name:40}{columns}{change:12.3f}", flush=True)


if __name__ == "__main__":
    main()
