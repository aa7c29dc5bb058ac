"""`worldline evaluate FOLDER`: failure rate of the videos of a folder, and their fidelity."""

import json
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import click

from worldline.cli.messages import results
from worldline.cli.run import check_outputs, existing, log_replaced
from worldline.errors import Error, InputError
from worldline.files import check_path

logger = logging.getLogger(__name__)

_PATH = click.Path(path_type=Path)
_REPORT = "evaluation.json"
_MOST_ROWS = 60  # of the contact sheet, failed videos first


@click.command()
@click.argument("folder", type=_PATH)
@click.option(
    "--reference",
    type=_PATH,
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
    type=_PATH,
    help=f"JSON report; a contact sheet of the same name goes beside it.  "
    f"[default: FOLDER/{_REPORT}]",
)
@click.option("--no_overwrite", is_flag=True, help="Refuse to replace an earlier report.")
def evaluate(
    folder: Path,
    reference: Path | None,
    num_input_frames: int | None,
    output: Path | None,
    no_overwrite: bool,
) -> None:
    """Judge the videos of FOLDER and of the folders in it.

    A video, of any format, fails if a large object appears from nowhere, or if the
    picture collapses to one colour. Still videos and small artifacts are no failures. Motion and
    flicker are in grey levels; PSNR and SSIM compare with a reference.

    The exit status is 0 whether or not videos fail, 1 if some cannot be judged, which do not count,
    and 2 if none can be judged.
    """
    from worldline.evaluate.failures import DETECTORS, failure_rate
    from worldline.evaluate.folder import as_json, find_tasks, medians, score_video
    from worldline.video.sheet import contact_sheet
    from worldline.video.write import write_bytes

    for path in (folder, reference, output):
        check_path(path)
    output = output or folder / _REPORT
    picture = output.with_suffix(".png")
    tasks = find_tasks(folder, reference, num_input_frames)
    if output.suffix.lower() != ".json":
        raise InputError(f"--output {output}: must end in .json")
    if picture.exists() and not output.exists():  # so it is no contact sheet of ours
        raise InputError(f"--output {output}: the contact sheet would replace {picture}")
    check_outputs([output, picture], [task.path.with_suffix(".json") for task in tasks])
    present = existing((output, picture), no_overwrite)
    unreadable: dict[str, str] = {}
    scores, rows = [], []
    for task in tasks:
        try:
            score, pictures = score_video(task)
        except InputError as error:
            unreadable[task.name] = str(error)
            logger.error("%s", error)
            continue
        failures = (f"frame {failure.frame}: {failure.detail}" for failure in score.failures)
        title = f"{score.name}: {'; '.join([score.verdict, *failures])}"
        results.add(f"{title}; {score.frames} frames, {in_words(medians([score]))}")
        scores.append(score)
        rows.append((pictures, title, {failure.frame for failure in score.failures}))
        rows = sorted(rows, key=lambda row: not row[2])[:_MOST_ROWS]
    if not scores:
        raise InputError(f"{folder}: none of {len(unreadable)} videos can be judged")
    report = {
        "worldline": version("worldline"),
        "folder": str(folder),
        "reference": reference and str(reference),
        **as_json(scores, unreadable),
    }
    write_bytes(output, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    sheets, titles, marked = zip(*rows, strict=True)
    contact_sheet(sheets, picture, titles, marked)
    log_replaced(present)
    rate = failure_rate([score.failures for score in scores])
    kinds = "".join(f", {kind} {count}" for kind, count in sorted(rate.kinds.items()))
    detectors = ", ".join(f"{name} {value}" for name, value in DETECTORS.items())
    results.add(
        f"failed: {rate.failed}{kinds}\ndetectors, measured: {detectors}\nmedians: "
        f"{in_words(medians(scores))}\nreport: {output}\ncontact sheet: {picture}"
    )
    if unreadable:
        count = f"{len(unreadable)} of {len(tasks)} videos"
        raise Error(f"{count} could not be judged, and do not count")


def in_words(measures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
