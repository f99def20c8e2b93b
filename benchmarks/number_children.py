"""Commands that end when their starter does, however it ends.

A guard beside the starter holds the other end of a pipe. When the pipe closes, because the starter is done, was stopped
or was killed, the guard ends the commands that it was told of, and all that these have started, in other sessions too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PATIENCE = 10.0
"""Seconds that a process has between SIGTERM and SIGKILL."""


class Children:
    """Commands that are running, as a context: at its end none is. SIGTERM and SIGHUP end it as Control-C does."""

    def __init__(self) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        self._running: list[subprocess.Popen[bytes]] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def start(self, arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own."""
        process = subprocess.Popen(arguments, start_new_session=True, **options)
        self._running.append(process)
        self._tell(f"+{process.pid}")
        return process

    def ended(self, process: subprocess.Popen[bytes]) -> int | None:
        """The exit status of a command; None while it runs."""
        code = process.poll()
        if code is not None and process in self._running:
            self._running.remove(process)
            self._tell(f"-{process.pid}")
        return code

    def _tell(self, line: str) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{line}\n")
        self._guard.stdin.flush()

    def __enter__(self) -> Self:
        for how in filter(None, (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))):
            if signal.getsignal(how) is not signal.SIG_IGN:  # as nohup makes it
                self._handlers[how] = signal.signal(how, signal.default_int_handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()
        for process in self._running:
            process.wait()
        for how, handler in self._handlers.items():
            signal.signal(how, handler)


def processes() -> dict[int, tuple[int, int]]:
    """Process -> its parent and its group, of all that run; where there is neither /proc nor ps, nothing."""
    found = {}
    if Path("/proc/self/stat").exists():
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ended
                pid, _, rest = path.read_text(encoding="utf-8", errors="replace").partition(" (")
                state, parent, group = rest.rpartition(") ")[2].split()[:3]
                if state not in "ZX":
                    found[int(pid)] = int(parent), int(group)
        return found
    with suppress(OSError):
        told = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,pgid=,stat="], capture_output=True, text=True, check=False)
        for pid, parent, group, state in (line.split() for line in told.stdout.splitlines()):
            if not state.startswith("Z"):
                found[int(pid)] = int(parent), int(group)
    return found


def family(of: Iterable[int], running: Mapping[int, tuple[int, int]]) -> set[int]:
    """The processes and all that run which descend from them or are in their groups."""
    found: set[int] = set()
    more = set(of)
    while more:
        found |= more
        more = {pid for pid, (parent, group) in running.items() if parent in found or group in found} - found
    return found


def end(leaders: Iterable[int]) -> None:
    """End processes and what they started."""
    known = family(leaders, processes())
    for how in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        for pid in known:
            with suppress(OSError):
                os.kill(pid, how)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            running = processes()
            known = family(known, running) & set(running)
            if not known:
                return
            time.sleep(0.05)


def guard() -> None:
    """Wait for the end of the pipe."""
    for how in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, how):
            signal.signal(getattr(signal, how), signal.SIG_IGN)
    leaders: set[int] = set()
    for line in sys.stdin:
        (leaders.add if line[0] == "+" else leaders.discard)(int(line[1:]))
    end(leaders)


if __name__ == "__main__":
    guard()
