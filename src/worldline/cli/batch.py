"""Things that are done one after another, of which one may fail: the loop of every command."""

from __future__ import annotations

import errno
import gc
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import click

from worldline.errors import Error, GuardrailRefusal

logger = logging.getLogger(__name__)

Task = TypeVar("Task")


def run_each(
    tasks: Sequence[Task],
    run: Callable[[Task, str], str],
    name: Callable[[Task], object],
    *,
    batch: bool,
) -> tuple[int, Counter[str]]:
    """Do the tasks one after another, and say what came of each.

    A full disk ends a batch, too.

    Args:
        tasks: what to do.
        run: does a task, of which it is given the label, too, and returns the line to print.
        name: of a task, for its label.
        batch: whether to go on after a task that fails.

    Returns:
        How many of a batch failed, and how many others a guardrail refused at each stage.
    """
    failed = 0
    refused: Counter[str] = Counter()
    for position, task in enumerate(tasks):
        label = f"{position + 1}/{len(tasks)} {name(task)}" if batch else str(name(task))
        try:
            told = run(task, label)
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
        else:
            click.echo(told)
            continue
        free_memory()  # what the failed one held would be missing to the next
    return failed, refused


def tell_all(made: int, before: int, total: int, folder: Path, things: str = "videos") -> None:
    """Say how many of all the things that were asked for are there.

    Args:
        made: in this run.
        before: were there when it began.
        total: that were asked for.
        folder: that holds them.
        things: what they are.
    """
    since = f": {made} made now, {before} there before" if before else ""
    click.echo(f"{made + before} of {total} {things} are in {folder}{since}")


def tell_nothing_left(total: int, folder: Path, things: str = "videos") -> None:
    """Say that all the things that were asked for were there before."""
    click.echo(f"nothing left to do in {folder}: {total} of {total} {things} were there before")


def free_memory() -> None:
    """Give back what nothing refers to, on the device too."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def is_disk_full(error: BaseException) -> bool:
    """Tell whether going on would waste the time of every further task."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def one_line(error: BaseException) -> str:
    """Return what an error says, in a line."""
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    return first if isinstance(error, Error) else f"{type(error).__name__}: {first}"
