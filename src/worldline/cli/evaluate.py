"""`worldline evaluate FOLDER`: how many videos of a folder fail, and how true the others are."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldline.errors import Error, InputError

if TYPE_CHECKING:
    from worldline.evaluate.folder import Score
    from worldline.evaluate.tasks import Plan

logger = logging.getLogger(__name__)

_NAMED = "evaluation.json"  # the report, where --output names no other


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
    help="Frames at the start of each video that are given, and so not judged.  "
    "[default: of the JSON report beside the video, else 0]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help=f"The JSON report; a contact sheet of the same name goes beside it.  "
    f"[default: FOLDER/{_NAMED}]",
)
def evaluate(
    folder: Path, reference: Path | None, num_input_frames: int | None, output: Path | None
) -> None:
    """Judge the videos of FOLDER and of the folders in it.

    A video (.mp4, .mov, .mkv, .webm, .gif) fails if a large object appears from nowhere, or if the
    picture collapses to one colour. Still videos and small artifacts are no failures. Also told
    are motion and flicker, in grey levels, and PSNR and SSIM against a reference. Other files are
    passed over, and named where they do not belong to a video.

    The exit status is 0 whether or not videos fail, 1 if some cannot be read, which do not count,
    and 2 if none can be judged.
    """
    from worldline.evaluate.tasks import find_tasks, shortened

    if output is None:
        output = folder / _NAMED
    plan = find_tasks(folder, reference, num_input_frames)
    _check_output(output, plan, chosen=output != folder / _NAMED)
    own = {path.resolve() for path in (output, output.with_suffix(".png"))}
    passed_over = [name for name in plan.passed_over if (folder / name).resolve() not in own]
    if passed_over:
        logger.info("no videos, passed over: %s", shortened(passed_over))
    for note in plan.notes:
        logger.info("%s", note)
    for reason in plan.unreadable.values():
        logger.error("%s", reason)
    from worldline.evaluate.folder import Sheet, score_video

    sheet = Sheet()
    scores: list[Score] = []
    unreadable = dict(plan.unreadable)
    widths = _show_head(plan)
    for task in plan.tasks:
        try:
            strip = score_video(task)
        except InputError as error:
            unreadable[task.name] = str(error)
            logger.error("%s", error)
            logger.debug("%s", traceback.format_exc())
            continue
        sheet.add(strip)
        scores.append(strip.score)
        _show_row(strip.score, widths)
    if not scores:
        raise InputError(f"{folder}: none of {len(unreadable)} videos can be read to the end")
    _save(output, folder, reference, scores, unreadable, passed_over)
    picture = output.with_suffix(".png")
    sheet.save(picture)
    _show_summary(scores)
    click.echo(f"report: {output}\ncontact sheet: {picture}")
    if unreadable:
        total = len(scores) + len(unreadable)
        raise Error(f"{len(unreadable)} of {total} videos could not be read, and do not count")


def _check_output(output: Path, plan: Plan, *, chosen: bool) -> None:
    """Refuse, before any work is done, a report that could not be written or would do harm.

    Raises:
        InputError: there is no such place, or the report of a video has the name.
    """
    from worldline.cli.run import check_folder

    if output.suffix.lower() != ".json":
        raise InputError(f"--output {output} must end in .json")
    picture = output.with_suffix(".png")
    for path in (output, picture):
        if path.is_dir():
            raise InputError(f"--output {output}: {path} is a folder")
    if picture.exists() and not output.exists():  # so it is no contact sheet of ours
        raise InputError(f"{picture} is in the way of the contact sheet; choose another --output")
    for task in plan.tasks:
        if task.path.with_suffix(".json").resolve() == output.resolve():
            raise InputError(f"{output} is the report of {task.path}; choose another --output")
    try:
        check_folder(output.parent, "--output")
    except InputError as error:
        if chosen:
            raise
        raise InputError(f"{output.parent} cannot be written; give --output") from error


def _save(
    output: Path,
    folder: Path,
    reference: Path | None,
    scores: list[Score],
    unreadable: dict[str, str],
    passed_over: list[str],
) -> None:
    from importlib.metadata import version

    from worldline.evaluate.folder import as_json
    from worldline.video.write import write_bytes

    report = {
        "worldline": version("worldline"),
        "folder": str(folder),
        "reference": str(reference) if reference else None,
        "passed_over": passed_over,
        **as_json(scores, unreadable),
    }
    write_bytes(output, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())


def _show_head(plan: Plan) -> list[int]:
    """Print the head of the table and return how wide its columns are."""
    heads = ["video", "frames", "given", "motion", "flicker"]
    if any(task.reference for task in plan.tasks):
        heads += ["PSNR", "SSIM"]
    widths = [max(len(heads[0]), *(len(task.name) for task in plan.tasks))]
    widths += [max(7, len(head)) for head in heads[1:]]
    _show_line([*heads, "verdict"], widths)
    return widths


def _show_row(score: Score, widths: list[int]) -> None:
    words = [
        score.name,
        str(score.frames),
        str(score.num_input_frames),
        f"{score.motion:.2f}",
        f"{score.flicker:.2f}",
    ]
    comparison = score.comparison
    if comparison is not None:
        words += [f"{comparison.psnr:.2f}", f"{comparison.ssim:.4f}"]
    words += [""] * (len(widths) - len(words))
    verdict = score.verdict
    for failure in score.failures:
        verdict += f"; frame {failure.frame}: {failure.detail}"
    _show_line([*words, verdict], widths)


def _show_line(words: list[str], widths: list[int]) -> None:
    cells = [words[0].ljust(widths[0])]
    cells += [word.rjust(width) for word, width in zip(words[1:-1], widths[1:], strict=True)]
    click.echo("  ".join([*cells, words[-1]]))


def _show_summary(scores: list[Score]) -> None:
    from worldline.evaluate.folder import medians, rate

    found = rate(scores)
    kinds = "".join(f", {kind} {count}" for kind, count in sorted(found.kinds.items()))
    click.echo(f"failed: {found.failed}{kinds}")
    worth = ", ".join(f"{name} {value}" for name, value in found.detectors.items())
    click.echo(f"of the detectors themselves, measured: {worth}")
    middle = medians(scores)
    told = f"motion {middle['motion']:.2f}, flicker {middle['flicker']:.2f} grey levels"
    if "psnr" in middle:
        compared = sum(score.comparison is not None for score in scores)
        told += (
            f"; of {compared} compared: PSNR {middle['psnr']:.2f} dB, SSIM {middle['ssim']:.4f}, "
            f"of their references motion {middle['reference_motion']:.2f}, "
            f"flicker {middle['reference_flicker']:.2f}"
        )
    click.echo(f"medians: {told}")
