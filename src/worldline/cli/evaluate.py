"""`worldline evaluate FOLDER`: failure rate of the videos of a folder, and their fidelity."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldline.cli.batch import check_folder
from worldline.errors import Error, InputError

if TYPE_CHECKING:
    from worldline.evaluate.folder import Score, Task

logger = logging.getLogger(__name__)

_REPORT = "evaluation.json"
_MOST_ROWS = 60  # of the contact sheet, failed videos first
_HEADS = ("frames", "input", "motion", "flicker", "PSNR", "SSIM")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Folder of true videos; those of the same name, of any suffix, are compared.",
)
@click.option(
    "--num_input_frames",
    type=click.IntRange(min=0),
    help="Number of input frames at the start of each video, which are not judged.  "
    "[default: that of the JSON report beside the video, else 0]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help=f"JSON report; a contact sheet of the same name goes beside it.  "
    f"[default: FOLDER/{_REPORT}]",
)
def evaluate(
    folder: Path, reference: Path | None, num_input_frames: int | None, output: Path | None
) -> None:
    """Judge the videos of FOLDER and of the folders in it.

    A video (.mp4, .mov, .mkv, .webm, .gif) fails if a large object appears from nowhere, or if the
    picture collapses to one colour. Still videos and small artifacts are no failures. Motion and
    flicker are in grey levels; PSNR and SSIM compare with a reference.

    The exit status is 0 whether or not videos fail, 1 if some cannot be judged, which do not count,
    and 2 if none can be judged.
    """
    from worldline.evaluate.folder import as_json, find_tasks, score_video
    from worldline.video.sheet import contact_sheet
    from worldline.video.write import write_bytes

    output = output or folder / _REPORT
    picture = output.with_suffix(".png")
    tasks = find_tasks(folder, reference, num_input_frames)
    _check_output(output, picture, tasks)
    unreadable: dict[str, str] = {}
    scores: list[Score] = []
    rows = []
    width = max(len(task.name) for task in tasks)
    for task in tasks:
        try:
            score, pictures = score_video(task)
        except InputError as error:
            unreadable[task.name] = str(error)
            logger.error("%s", error)
            continue
        if not scores:
            click.echo(_line("video".ljust(width), _HEADS, "verdict"))
        scores.append(score)
        rows.append((score, pictures))
        rows = sorted(rows, key=lambda row: not row[0].failures)[:_MOST_ROWS]
        cells = (
            str(score.frames),
            str(score.num_input_frames),
            f"{score.motion:.2f}",
            f"{score.flicker:.2f}",
            "" if score.psnr is None else f"{score.psnr:.2f}",
            "" if score.ssim is None else f"{score.ssim:.4f}",
        )
        click.echo(_line(score.name.ljust(width), cells, _verdict(score)))
    if not scores:
        raise InputError(f"{folder}: none of {len(unreadable)} videos can be judged")
    report = {
        "worldline": version("worldline"),
        "folder": str(folder),
        "reference": str(reference) if reference else None,
        **as_json(scores, unreadable),
    }
    write_bytes(output, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    contact_sheet(
        [pictures for _, pictures in rows],
        picture,
        [f"{score.name}: {_verdict(score)}" for score, _ in rows],
        [{failure.frame for failure in score.failures} for score, _ in rows],
    )
    click.echo(f"{_summary(scores)}\nreport: {output}\ncontact sheet: {picture}")
    if unreadable:
        total = len(scores) + len(unreadable)
        raise Error(f"{len(unreadable)} of {total} videos could not be judged, and do not count")


def _check_output(output: Path, picture: Path, tasks: Sequence[Task]) -> None:
    """Refuse, before any work, a report that cannot be written or would replace another file."""
    if output.suffix.lower() != ".json":
        raise InputError(f"--output {output}: must end in .json")
    if output.is_dir() or picture.is_dir():
        raise InputError(f"--output {output}: a folder has the name of the report or its picture")
    if picture.exists() and not output.exists():  # so it is no contact sheet of ours
        raise InputError(f"--output {output}: the contact sheet would replace {picture}")
    for task in tasks:
        if task.path.with_suffix(".json").resolve() == output.resolve():
            raise InputError(f"--output {output}: is the report of {task.path}")
    check_folder(output.parent)


def _line(name: str, cells: Sequence[str], verdict: str) -> str:
    return "  ".join([name, *(cell.rjust(7) for cell in cells), verdict])


def _verdict(score: Score) -> str:
    failures = (f"frame {failure.frame}: {failure.detail}" for failure in score.failures)
    return "; ".join([score.verdict, *failures])


def _summary(scores: list[Score]) -> str:
    from worldline.evaluate.failures import DETECTORS, failure_rate
    from worldline.evaluate.folder import medians

    rate = failure_rate([score.failures for score in scores])
    kinds = "".join(f", {kind} {count}" for kind, count in sorted(rate.kinds.items()))
    detectors = ", ".join(f"{name} {value}" for name, value in DETECTORS.items())
    middle = ", ".join(f"{name} {value:.4g}" for name, value in medians(scores).items())
    return f"failed: {rate.failed}{kinds}\ndetectors, measured: {detectors}\nmedians: {middle}"
