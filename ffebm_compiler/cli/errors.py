"""Errors and warnings of the command line, each as one line on stderr."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from ffebm_compiler.cli.completion import whole_words
from ffebm_compiler.errors import FFEBMError

__all__ = ["Commands", "show_warning"]

_USAGE_ERROR: Any = typer.BadParameter.__base__
"""typer's error for a wrong option or argument. Its module differs between versions of typer."""


_WRITING = (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EBADF)
"""Failures of writing to stdout, which has no file name. Files are written by `whole_files`, which names them. A pipe
that its reader closes is none of them: the command ends quietly then."""


class Commands(TyperGroup):
    """The commands. Every error that is raised on purpose becomes one line on stderr and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line, or complete one for a shell."""
        whole_words(os.environ)
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if error.errno not in _WRITING or error.filename is not None:
                raise
            _drop_output()
            _one_line(f"the output cannot be written ({error.strerror}): print to a place with room for it")
            sys.exit(2)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before the command."""
        try:
            return super().parse_args(ctx, args)
        except _USAGE_ERROR as error:
            raise _usage_error(error) from error

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except _USAGE_ERROR as error:
            raise _usage_error(error) from error
        except FFEBMError as error:
            _one_line(str(error))
            raise typer.Exit(2) from error
        except SystemExit as error:  # of the model's own code: the commands raise typer.Exit
            _one_line(
                f"the model's code left the program ({type(error).__name__}: {error.code}): a model that is converted "
                "must return or raise an error"
            )
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error


def _usage_error(error: Any) -> Any:
    """The exception for a wrong use. A call without arguments shows the help page instead of an error."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return error
    path = error.ctx.command_path if error.ctx is not None else "ffebm"
    _one_line(f"{error.format_message()} See {path} --help.")
    return typer.Exit(2)


def _drop_output() -> None:
    """Let go of what stdout still holds. Python would try to write it at the end again."""
    if sys.__stdout__ is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


def _one_line(message: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be as full as stdout: the exit code stays
        typer.echo(f"error: {' '.join(message.split())}", err=True)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, without its line of source."""
    typer.echo(f"warning: {' '.join(str(message).split())} ({category.__name__})", err=True)
