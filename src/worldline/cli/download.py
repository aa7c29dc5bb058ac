"""`worldline checkpoints download`: what a model needs, from the hub to the checkpoint folder."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from pydantic import Field

from worldline.cli.batch import check_folder
from worldline.cli.options import ManyValues, options, parsed
from worldline.errors import DownloadError
from worldline.files import readable_size
from worldline.request import Options
from worldline.request import Path as Named

if TYPE_CHECKING:
    from worldline.downloads import RemoteFile

logger = logging.getLogger(__name__)

_RESERVE = 1_000_000_000  # bytes of the disk that stay free
# flags, as of the commands that run a model -> family of the part that they leave out
_WITHOUT = {
    "disable_guardrail": "guardrail",
    "disable_prompt_upsampler": "prompt upsampler",
    "disable_diffusion_decoder": "diffusion decoder",
}


class DownloadFlags(Options):
    """Flags of the released `download_{autoregressive,diffusion,tokenizer}_checkpoints.py`."""

    models: tuple[str, ...] = Field(
        (), json_schema_extra={"argument": True, "metavar": "[MODEL]..."}
    )
    model_sizes: tuple[Literal["4B", "5B", "12B", "13B", "7B", "14B"], ...] = Field(
        (), description="One or more; 4B to 13B are autoregressive models, 7B and 14B diffusion."
    )
    model_types: tuple[
        Literal[
            "Text2World",
            "Video2World",
            "Text2World-Sample-AV-Multiview",
            "Video2World-Sample-AV-Multiview",
            "SingleToMultiView-Sample-AV",
        ],
        ...,
    ] = Field(
        (),
        description="One or more types of diffusion models.  [default: Text2World Video2World]",
    )
    tokenizer_types: tuple[
        Literal[
            "CV8x8x8-720p",
            "DV8x16x16-720p",
            "CV4x8x8-360p",
            "DV4x8x8-360p",
            "CI8x8-360p",
            "CI16x16-360p",
            "DI8x8-360p",
            "DI16x16-360p",
        ],
        ...,
    ] = Field((), description="One or more tokenizers, alone.")
    cosmos_version: Literal["1.0"] | None = Field(
        None, description="Generation of models that are named by size.  [default: Predict1]"
    )
    checkpoint_dir: Named = Field("checkpoints", description="Folder of the model folders.")
    dry_run: bool = Field(False, description="List files and sizes; fetch nothing.")
    disable_guardrail: bool = Field(
        False,
        description="Leave out the guardrails.",
        json_schema_extra={"short": "--disable_guardrails"},
    )
    disable_prompt_upsampler: bool = Field(False, description="Leave out the prompt upsampler.")
    disable_diffusion_decoder: bool = Field(False, description="Leave out the diffusion decoder.")


@click.command(cls=ManyValues)
@options(DownloadFlags)
@click.pass_context
def download(context: click.Context, /, **_: object) -> None:
    """Download MODELs and all that they need.

    MODEL is a name that `worldline models` lists, such as Cosmos-Predict1-4B, of either generation;
    a model of Predict2.5, such as 2B/post-trained; or a group: autoregressive, diffusion,
    predict2.5, tokenizers, guardrails. Only files that are read are downloaded, several at once;
    an interrupted download resumes, and each file is verified by its published hash before it
    takes its name. HF_ENDPOINT names a mirror, HF_TOKEN a login.
    """
    from worldline.downloads import find_files, select, sources

    flags = parsed(context, DownloadFlags)
    generation, folder = flags.cosmos_version, Path(flags.checkpoint_dir)
    kinds = (flags.model_sizes, flags.model_types, flags.tokenizer_types)
    names = select(flags.models, *kinds, generation)
    without = [family for flag, family in _WITHOUT.items() if getattr(flags, flag)]
    plan: dict[Path, RemoteFile] = {}  # models that share a repository share its licence
    problems: list[str] = []
    for source in sources(names, generation, without):
        try:
            files = find_files(source)
        except DownloadError as error:
            problems.append(str(error))
            continue
        for file in files:
            plan.setdefault(folder / source.destination / file.name, file)
    if flags.dry_run and plan:
        _list(plan)
    if problems:
        prefix = "" if flags.dry_run else "nothing was fetched: "
        raise DownloadError(prefix + "\n  ".join(problems))
    if not flags.dry_run:
        _fetch(plan, folder)


download.many = ("--model_sizes", "--model_types", "--tokenizer_types")


def _list(plan: Mapping[Path, RemoteFile]) -> None:
    """Print every file with its size, and the sums."""
    last, missing = None, 0
    for path, file in plan.items():
        folder = path.parents[file.name.count("/")]
        if folder != last:
            last = folder
            click.echo(f"{file.repository} -> {folder}")
        present = file.may_be_at(path)
        missing += 0 if present else file.nbytes
        click.echo(
            f"  {readable_size(file.nbytes):>9}  {file.name}{'  (present)' if present else ''}"
        )
    total = sum(file.nbytes for file in plan.values())
    click.echo(f"{len(plan)} files, {readable_size(total)}; {readable_size(missing)} to fetch")


def _fetch(plan: Mapping[Path, RemoteFile], folder: Path) -> None:
    """Download, verify and report.

    Raises:
        DownloadError: a file cannot be fetched, or the disk cannot hold all of them.
    """
    from tqdm import tqdm

    from worldline.downloads import fetch_all

    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = {path: file for path, file in plan.items() if not file.may_be_at(path)}
    parts = [file.part(path) for path, file in missing.items()]
    size = sum(file.nbytes for file in missing.values())
    size -= sum(part.stat().st_size for part in parts if part.is_file())
    free = shutil.disk_usage(folder).free
    if size > 0 and size + _RESERVE > free:
        raise DownloadError(
            f"{readable_size(size)} are to be fetched, but {folder} has room for "
            f"{readable_size(free)}; choose another --checkpoint_dir"
        )
    total = sum(file.nbytes for file in plan.values())
    # a bar on a terminal, else a line now and then
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, unit="B", unit_scale=True, mininterval=seconds, leave=False) as bar:
        for count, path in enumerate(fetch_all(plan, bar.update), 1):
            bar.clear()
            verb = "fetched" if path in missing else "verified"
            size_of_file = readable_size(plan[path].nbytes)
            logger.info("%d/%d %s, %s: %s", count, len(plan), path, size_of_file, verb)
    click.echo(f"{len(plan)} files, {readable_size(total)}, are in {folder}, verified")
