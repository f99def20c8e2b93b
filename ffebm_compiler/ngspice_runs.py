"""Runs of ngspice: one circuit, whose sources take many values, in this process or split over an executor's workers."""

from __future__ import annotations

import logging
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ffebm_compiler.errors import FabricError, FFEBMError

__all__ = ["Job", "in_parts", "missing"]

_log = logging.getLogger(__name__)

_VECTORS = 128
"""The most node voltages in one command of a netlist."""


@dataclass(frozen=True)
class Job:
    """One run of ngspice. It can be sent to another process."""

    text: str
    sources: tuple[str, ...]
    nodes: tuple[str, ...]
    timeout: float
    command: str
    title: str

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The voltages of the nodes for every row of values of the sources.

        Raises:
            FabricError: ngspice is missing, takes too long, or finds no operating point.
        """
        groups = [self.nodes[start : start + _VECTORS] for start in range(0, len(self.nodes), _VECTORS)]
        with tempfile.TemporaryDirectory(prefix="ffebm-ngspice-") as folder:
            try:
                done = subprocess.run(
                    [self.command, "-n", "-b"],
                    input=self._netlist(values, groups),
                    cwd=folder,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=self.timeout,
                    check=False,
                )
            except FileNotFoundError as error:
                raise missing(self.command) from error
            except subprocess.TimeoutExpired as error:
                raise FabricError(
                    f"{self.title}: ngspice took longer than {self.timeout:g} s for {len(values)} samples of a "
                    f"circuit of {len(self.nodes)} states. Give Ngspice a larger timeout, or an executor"
                ) from error
            found = [self._read(Path(folder, f"voltages{index}"), len(group)) for index, group in enumerate(groups)]
        if any(rows is None or len(rows) != len(values) for rows in found):
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
            raise FabricError(
                f"{self.title}: ngspice found no operating point for one of {len(values)} samples "
                f"({' / '.join(said) or 'it said nothing'}). Scale the inputs or the weights down, or take diodes that "
                "are less ideal (a larger emission)"
            )
        return np.concatenate([rows for rows in found if rows is not None], axis=1)

    def _netlist(self, values: np.ndarray, groups: Sequence[Sequence[str]]) -> str:
        """The circuit, and for each sample the sources that change, an operating point and its voltages."""
        lines = [self.text, ".control", "set numdgt=15", "set wr_singlescale", "set appendwrite"]
        write = [f"wrdata voltages{index} {' '.join(f'v({n})' for n in group)}" for index, group in enumerate(groups)]
        rows = [[None] * len(self.sources), *values.tolist()]
        for before, row in pairwise(rows):
            lines += [
                f"alter {name} dc = {new:.17g}"
                for name, old, new in zip(self.sources, before, row, strict=True)
                if new != old
            ]
            lines += ["op", *write, "destroy all"]
        return "\n".join([*lines, "quit", ".endc", ".end", ""])

    @staticmethod
    def _read(path: Path, count: int) -> np.ndarray | None:
        """A row of voltages for each operating point. Before them stands a scale, which means nothing here."""
        if not path.exists():
            return None
        text = path.read_text(encoding="utf-8").split()
        try:
            rows = np.array(text, dtype=np.float64).reshape(-1, count + 1)
        except ValueError:
            return None
        return rows[:, 1:] if bool(np.isfinite(rows).all()) else None


def in_parts(executor: Executor, job: Job, values: np.ndarray, parts: int) -> np.ndarray:
    """What the job finds, its rows split over the workers of an executor."""
    pieces = [piece for piece in np.array_split(values, parts) if len(piece)]
    futures: list[Future[np.ndarray] | None] = []
    for piece in pieces:
        try:
            futures.append(executor.submit(job, piece))
        except Exception as error:  # it is broken, or was shut down: every executor says so in its own class
            name = type(error).__name__
            _log.warning("%s: the executor takes no work (%s: %s); ngspice runs here", job.title, name, error)
            futures.append(None)
    return np.concatenate([_result(job, piece, future) for piece, future in zip(pieces, futures, strict=True)])


def _result(job: Job, piece: np.ndarray, future: Future[np.ndarray] | None) -> np.ndarray:
    """What a worker has found, or this process where the worker is lost."""
    if future is None:
        return job(piece)
    try:
        return np.asarray(future.result())
    except FFEBMError:
        raise
    except Exception as error:
        _log.warning(
            "%s: a worker of the executor is lost (%s: %s); its %d samples are simulated here",
            job.title,
            type(error).__name__,
            error,
            len(piece),
        )
        return job(piece)


def missing(command: str) -> FabricError:
    """The error of a machine without ngspice."""
    return FabricError(
        f"the program {command!r} is not installed: apt-get install ngspice (Debian, Ubuntu), dnf install ngspice "
        "(Fedora) or brew install ngspice (macOS), or pass its path as Ngspice(command=...)"
    )
