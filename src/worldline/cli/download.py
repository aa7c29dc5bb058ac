"""`worldline checkpoints download`: what a model needs, from the hub to the checkpoint folder.

Flags are those of the released `download_{autoregressive,diffusion,tokenizer}_checkpoints.py`
(cosmos-predict1) and `download_{autoregressive,diffusion}.py` (Cosmos 1.0).
"""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from worldline.catalog import Entry
from worldline.cli.batch import check_folder
from worldline.cli.options import Decorator, ManyValues
from worldline.downloads import (
    AUTOREGRESSIVE_SIZES,
    DIFFUSION_SIZES,
    DIFFUSION_TYPES,
    OPTIONAL,
    SAMPLE_TYPES,
    TOKENIZER_TYPES,
    choose,
    select,
    sources,
)
from worldline.errors import DownloadError
from worldline.files import GIGABYTE
from worldline.hub import RemoteFile

logger = logging.getLogger(__name__)

_RESERVE = 1_000_000_000  # bytes of the disk that stay free


class _Lists(ManyValues):
    """A command some of whose options take several words, as argparse has it: `--sizes 4B 5B`."""

    many = ("--model_sizes", "--model_types", "--tokenizer_types")


def _list_option(name: str, choices: Sequence[str], text: str) -> Decorator:
    metavar = f"[{'|'.join(choices)}]..."  # click would print them with _
    return click.option(name, multiple=True, type=click.Choice(choices), metavar=metavar, help=text)


@click.command(cls=_Lists)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@_list_option(
    "--model_sizes",
    (*AUTOREGRESSIVE_SIZES, *DIFFUSION_SIZES),
    "One or more; 4B to 13B are autoregressive models, 7B and 14B diffusion models.",
)
@_list_option(
    "--model_types",
    (*DIFFUSION_TYPES, *SAMPLE_TYPES),
    "One or more types of diffusion models.  [default: Text2World Video2World]",
)
@_list_option("--tokenizer_types", TOKENIZER_TYPES, "One or more tokenizers, alone.")
@click.option(
    "--cosmos_version",
    type=click.Choice(["1.0"]),
    help="Generation of models that are named by size.  [default: Predict1]",
)
@click.option(
    "--checkpoint_dir",
    default="checkpoints",
    show_default=True,
    help="Folder of the models.",
)
@click.option("--dry_run", is_flag=True, help="List files and sizes; fetch nothing.")
@click.option(
    "--disable_guardrail",
    "--disable_guardrails",
    "disable_guardrail",
    is_flag=True,
    help="Leave out the guardrails.",
)
@click.option("--disable_prompt_upsampler", is_flag=True, help="Leave out the prompt upsampler.")
@click.option("--disable_diffusion_decoder", is_flag=True, help="Leave out the diffusion decoder.")
def download(**flags: Any) -> None:
    """Download MODELs and all that they need.

    MODEL is a name that `worldline models` lists, such as Cosmos-Predict1-4B, of either generation;
    a model of Predict2.5, such as 2B/post-trained; or a group: autoregressive, diffusion,
    predict2.5, tokenizers, guardrails. Only files that are read are downloaded, several at once;
    an interrupted download resumes, and each file is verified by its published hash before it
    takes its name. HF_ENDPOINT names a mirror, HF_TOKEN a login.
    """
    generation = flags["cosmos_version"]
    kinds = ("models", "model_sizes", "model_types", "tokenizer_types")
    names = select(*(flags[kind] for kind in kinds), generation=generation)
    without = [family for flag, family in OPTIONAL.items() if flags[flag]]
    folder = Path(flags["checkpoint_dir"])
    plan, problems = _plan(sources(names, generation, without), folder)
    if flags["dry_run"] and plan:
        _show(plan)
    if problems:
        prefix = "" if flags["dry_run"] else "nothing was fetched: "
        raise DownloadError(prefix + "\n  ".join(problems))
    if not flags["dry_run"]:
        _fetch(plan, folder)


def _plan(wanted: Iterable[Entry], folder: Path) -> tuple[dict[Path, RemoteFile], list[str]]:
    """Files of all sources by their places, and problems of sources that cannot be fetched."""
    from worldline.hub import check_access, list_files

    plan: dict[Path, RemoteFile] = {}  # models that share a repository share its licence
    problems: list[str] = []
    for source in wanted:
        try:
            files = choose(source, list_files(source.repository, source.revision))
            check_access(files[0])
        except DownloadError as error:
            problems.append(str(error))
            continue
        for file in files:
            plan.setdefault(folder / source.destination / file.name, file)
    return plan, problems


def _is_present(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.nbytes


def _show(plan: Mapping[Path, RemoteFile]) -> None:
    """Print every file with its size, and the sums."""
    last = None
    for path, file in plan.items():
        folder = path.parents[file.name.count("/")]
        if folder != last:
            last = folder
            click.echo(f"{file.repository} -> {folder}")
        state = "  (there)" if _is_present(path, file) else ""
        click.echo(f"  {_size(file.nbytes):>9}  {file.name}{state}")
    total = sum(file.nbytes for file in plan.values())
    missing = sum(file.nbytes for path, file in plan.items() if not _is_present(path, file))
    click.echo(f"{len(plan)} files, {_size(total)}; {_size(missing)} to fetch")


def _size(nbytes: int) -> str:
    for unit, name in ((GIGABYTE, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} B"


def _fetch(plan: Mapping[Path, RemoteFile], folder: Path) -> None:
    from tqdm import tqdm

    from worldline.hub import fetch_all

    check_folder(folder)
    _check_room(plan, folder)
    total = sum(file.nbytes for file in plan.values())
    fetched = {path for path, file in plan.items() if not _is_present(path, file)}
    num_done, lock = 0, threading.Lock()
    # A bar on a terminal, else a line now and then.
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, unit="B", unit_scale=True, mininterval=seconds, leave=False) as bar:

        def report(count: int) -> None:
            with lock:
                bar.update(count)

        def done(file: RemoteFile, path: Path) -> None:
            nonlocal num_done
            with lock:
                num_done += 1
                bar.clear()
                verb = "fetched" if path in fetched else "verified"
                logger.info("%d/%d %s, %s: %s", num_done, len(plan), path, _size(file.nbytes), verb)

        fetch_all([(file, path) for path, file in plan.items()], report, done)
    click.echo(f"{len(plan)} files, {_size(total)}, are in {folder}, verified")


def _check_room(plan: Mapping[Path, RemoteFile], folder: Path) -> None:
    """Refuse what the disk cannot hold.

    Raises:
        DownloadError: it cannot.
    """
    missing = 0
    for path, file in plan.items():
        if not _is_present(path, file):
            part = file.part(path)
            missing += file.nbytes - (part.stat().st_size if part.is_file() else 0)
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    if missing > 0 and missing + _RESERVE > free:
        raise DownloadError(
            f"{_size(missing)} are to be fetched, but {folder} has room for {_size(free)}; choose "
            "another --checkpoint_dir"
        )
