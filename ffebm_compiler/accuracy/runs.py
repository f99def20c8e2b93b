"""Do many measurements: here, or on the workers of an executor, with a progress bar and a file that they go on from."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ffebm_compiler.accuracy.journal import Found, Journal
from ffebm_compiler.errors import FFEBMError, InputError

__all__ = ["check_executor", "run"]

_log = logging.getLogger(__name__)


Work = Callable[[Any], Found]
Answer = tuple[str, Found | FFEBMError]


def check_executor(executor: object) -> None:
    """Refuse what takes no work.

    Raises:
        InputError: it is no executor.
    """
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise InputError(
            f"executor is a {type(executor).__name__}; expected an executor of concurrent.futures, such as a "
            "ProcessPoolExecutor, or None"
        )


def run(work: Work, tasks: Sequence[Any], title: str, journal: Journal, executor: Executor | None = None) -> None:
    """Measure what the journal does not have yet. Its results are then complete.

    The result does not depend on the executor. What a lost worker had to do is done here.

    Args:
        work: takes a task, and returns numbers. With an executor of processes it is pickled.
        tasks: each with a `key`.
        title: of the progress bar, which a terminal shows.
        journal: has the results.
        executor: None measures here.

    Raises:
        FFEBMError: `work` raised it. What was measured before is in the journal's file.
    """
    left = [task for task in tasks if task.key not in journal.results]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    try:
        with bar:
            shown = bar.add_task(title, total=len(tasks), completed=len(tasks) - len(left))
            for key, found in _answers(work, left, title, executor):
                if isinstance(found, FFEBMError):
                    raise found
                journal.put(key, found)
                bar.advance(shown)
    finally:
        journal.write()


def _answers(work: Work, tasks: Sequence[Any], title: str, executor: Executor | None) -> Iterator[Answer]:
    if executor is None or len(tasks) < 2:
        for task in tasks:
            yield from _done(work, [task])
        return
    workers = getattr(executor, "_max_workers", None) or os.cpu_count() or 1
    size = max(1, -(-len(tasks) // (4 * workers)))
    parts = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    with _submitted(executor, work, parts, title) as futures:
        for part in (part for part in parts if part not in futures.values()):
            yield from _done(work, part)
        for future in as_completed(futures):
            yield from _result(future, work, futures[future], title)


@contextmanager
def _submitted(
    executor: Executor, work: Work, parts: Sequence[Sequence[Any]], title: str
) -> Iterator[dict[Future[list[Answer]], Sequence[Any]]]:
    """The futures of all parts. Those that have not begun are cancelled at the end."""
    futures: dict[Future[list[Answer]], Sequence[Any]] = {}
    try:
        for part in parts:
            try:
                futures[executor.submit(_done, work, part)] = part
            except Exception as error:  # it is broken, or was shut down: every executor says so in its own class
                name = type(error).__name__
                _log.warning("%s: the executor takes no work (%s: %s); it is done here", title, name, error)
                break
        yield futures
    finally:
        for future in futures:
            future.cancel()


def _result(future: Future[list[Answer]], work: Work, part: Sequence[Any], title: str) -> list[Answer]:
    """What a worker has found, or this process where the worker is lost."""
    try:
        return future.result()
    except FFEBMError:
        raise
    except Exception as error:
        if any(word in f"{error}" for word in ("pickle", "local object")):
            raise InputError(
                f"the executor cannot send the work of {title} to its workers ({type(error).__name__}: {error}): "
                "define evaluate at the top level of a module that workers can import, or leave the executor out"
            ) from error
        _log.warning(
            "%s: a worker of the executor is lost (%s: %s); its %d measurements are done here",
            title,
            type(error).__name__,
            error,
            len(part),
        )
        return _done(work, part)


def _done(work: Work, tasks: Sequence[Any]) -> list[Answer]:
    """The answer of each task, until one fails. An error is an answer too, since its causes may not be picklable."""
    answers: list[Answer] = []
    for task in tasks:
        try:
            answers.append((task.key, work(task)))
        except FFEBMError as error:
            answers.append((task.key, error))
            break
    return answers
