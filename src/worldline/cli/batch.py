"""Loop of every command: tasks one after another, of which one may fail."""

from __future__ import annotations

import errno
import gc
import logging
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click

from worldline.cli.failures import explain, is_out_of_memory
from worldline.errors import Error, GuardrailRefusal, InputError

logger = logging.getLogger(__name__)

Task = TypeVar("Task")


def run_each(
    tasks: Sequence[Task], run: Callable[[Task, str], str], *, batch: bool
) -> tuple[int, Counter[str]]:
    """Run tasks and print one line for each; a full disk ends a batch.

    Args:
        tasks: named by `str`.
        run: runs a task with its label, and returns the line to print.
        batch: whether to go on after a task that fails.

    Returns:
        Number of failed tasks, and number of refused ones by the stage that refused.
    """
    failed = 0
    refused: Counter[str] = Counter()
    for position, task in enumerate(tasks):
        label = f"{position + 1}/{len(tasks)} {task}" if batch else str(task)
        try:
            click.echo(run(task, label))
            continue
        except Exception as error:
            if not batch or is_disk_full(error):
                raise
            if isinstance(error, GuardrailRefusal):
                refused[error.stage] += 1
                label = f"{position + 1}/{len(tasks)}"  # a name may be words of the prompt
            else:
                failed += 1
            logger.error("%s: %s", label, one_line(error))
            logger.debug("%s", traceback.format_exc())
        free_memory()  # what the failed one held would be missing to the next
    return failed, refused


def report_done(made: int, before: int, total: int, folder: Path, things: str = "videos") -> None:
    """Print how many of all things that were asked for are there."""
    since = f": {made} made now, {before} there before" if before else ""
    click.echo(f"{made + before} of {total} {things} are in {folder}{since}")


def free_memory() -> None:
    """Free unreferenced memory, on the device too."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def is_disk_full(error: BaseException) -> bool:
    """Whether an error is a full disk, which every further task would meet, too."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def one_line(error: BaseException) -> str:
    """First line of an error."""
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    return first if isinstance(error, Error) else f"{type(error).__name__}: {first}"


def check_folder(folder: Path) -> None:
    """Try whether a folder can be written, or made; nothing stays behind.

    Raises:
        InputError: it cannot.
    """
    nearest = folder.absolute()
    try:
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{folder}: it cannot be written: {error.strerror or error}") from error


@contextmanager
def memory_advice(flags: Sequence[str] = ()) -> Iterator[None]:
    """Turn an exhausted device into an error that names flags which help."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # on the host, offloading would need more
        helpful = [] if isinstance(error, MemoryError) else [f"--{name}" for name in flags]
        advice = f"; add {' '.join(helpful)}" if helpful else ""
        raise Error(f"{explain(error)[1]}{advice}") from error
