"""The command `ffebm`, before anything large is imported.

Importing torch takes seconds. This file stands outside the package so that Ctrl-C ends the command in that time too,
with exit code 130 and without a traceback.
"""

from __future__ import annotations

import signal
from types import FrameType


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Leave at once: some of torch's imports turn a KeyboardInterrupt into other errors."""
    raise SystemExit(130)


def main() -> None:
    """Run the command line."""
    before = signal.signal(signal.SIGINT, _interrupted)
    from ffebm_compiler.cli.main import main as commands

    signal.signal(signal.SIGINT, before)
    commands()


if __name__ == "__main__":
    main()
