"""`worldline checkpoints download`: what a model needs, from the hub to the checkpoint folder.

Flags are those of the released `download_{autoregressive,diffusion,tokenizer}_checkpoints.py`
(cosmos-predict1) and `download_{autoregressive,diffusion}.py` (Cosmos 1.0).
"""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from worldline.cli.run import Option, check_folder
from worldline.downloads import (
    AUTOREGRESSIVE_SIZES,
    DIFFUSION_SIZES,
    DIFFUSION_TYPES,
    OPTIONAL,
    SAMPLE_TYPES,
    TOKENIZER_TYPES,
    Source,
    select,
    sources,
    target,
)
from worldline.errors import DownloadError
from worldline.files import GIGABYTE
from worldline.hub import RemoteFile

logger = logging.getLogger(__name__)

_LISTS = ("--model_sizes", "--model_types", "--tokenizer_types")
_SILENCE = 30.0  # seconds between lines on the progress, where there is no bar
_LEFT_OVER = 1_000_000_000  # bytes of the disk that stay free


class Lists(click.Command):
    """A command some of whose options take several words, as argparse has it: `--sizes 4B 5B`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        current = ""
        for word in args:
            if word.startswith("-"):
                name, equals, _ = word.partition("=")
                spelled = name.replace("-", "_").replace("__", "--", 1)
                current = word if spelled in _LISTS and not equals else ""
                if not current:
                    words.append(word)
            elif current:
                words += [current, word]
            else:
                words.append(word)
        return super().parse_args(ctx, words)


def _list_option(name: str, choices: Sequence[str], told: str) -> Option:
    shown = f"[{'|'.join(choices)}]..."  # click would show them with _
    return click.option(name, multiple=True, type=click.Choice(choices), metavar=shown, help=told)


@click.command(cls=Lists)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@_list_option(
    "--model_sizes",
    (*AUTOREGRESSIVE_SIZES, *DIFFUSION_SIZES),
    "One or more; 4B to 13B of the autoregressive models, 7B and 14B of the diffusion models.",
)
@_list_option(
    "--model_types",
    (*DIFFUSION_TYPES, *SAMPLE_TYPES),
    "One or more, of the diffusion models.  [default: Text2World Video2World]",
)
@_list_option("--tokenizer_types", TOKENIZER_TYPES, "One or more tokenizers, alone.")
@click.option(
    "--cosmos_version",
    type=click.Choice(["1.0"]),
    help="Of models that are named by size: that generation.  [default: Predict1]",
)
@click.option(
    "--checkpoint_dir",
    default="checkpoints",
    show_default=True,
    help="Where the folders of the models go.",
)
@click.option("--dry_run", is_flag=True, help="Show files and sizes; fetch nothing.")
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
    """Fetch MODELs and all that they need.

    MODEL is a name that `worldline models` lists, such as Cosmos-Predict1-4B, of either generation,
    a model of Predict2.5, such as 2B/post-trained, or all of: autoregressive, diffusion,
    predict2.5, tokenizers, guardrails. Only files that are read are fetched, several at once; a
    broken download goes on where it was, and every file is verified by its published hash before it
    takes its name.
    HF_ENDPOINT names a mirror, HF_TOKEN a login.
    """
    generation = flags["cosmos_version"]
    kinds = ("models", "model_sizes", "model_types", "tokenizer_types")
    names = select(*(flags[kind] for kind in kinds), generation=generation)
    without = [family for flag, family in OPTIONAL.items() if flags[flag]]
    wanted = sources(names, generation, without)
    folder = Path(flags["checkpoint_dir"])
    plan, problems = _make_plan(wanted, folder)
    if flags["dry_run"] and plan:
        _show(plan)
    if problems:
        count = "nothing was fetched: " if not flags["dry_run"] else ""
        raise DownloadError(count + "\n  ".join(problems))
    if not flags["dry_run"]:
        _fetch(plan, folder)


@dataclass(frozen=True)
class _Planned:
    source: Source
    file: RemoteFile
    path: Path

    @property
    def seems_present(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.file.nbytes


def _make_plan(wanted: Iterable[Source], folder: Path) -> tuple[list[_Planned], list[str]]:
    """Return the files of all sources, and what is wrong with those that cannot be fetched."""
    from worldline.hub import check_access, list_files

    plan: dict[Path, _Planned] = {}  # models that share a repository share its licence
    problems: list[str] = []
    for source in wanted:
        try:
            files = source.choose(list_files(source.repository, source.revision))
            check_access(files[0])
        except DownloadError as error:
            problems.append(str(error))
            continue
        for file in files:
            path = target(source, file, folder)
            plan.setdefault(path, _Planned(source, file, path))
    return [*plan.values()], problems


def _show(plan: Sequence[_Planned]) -> None:
    """Print every file with its size, and the sums."""
    last = None
    for each in plan:
        if each.source is not last:
            last = each.source
            click.echo(f"{last.repository} -> {each.path.parents[each.file.name.count('/')]}")
        state = "  (there)" if each.seems_present else ""
        click.echo(f"  {_size(each.file.nbytes):>9}  {each.file.name}{state}")
    whole = sum(each.file.nbytes for each in plan)
    left = sum(each.file.nbytes for each in plan if not each.seems_present)
    click.echo(f"{len(plan)} files, {_size(whole)}; {_size(left)} to fetch")


def _size(nbytes: int) -> str:
    for unit, name in ((GIGABYTE, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} B"


def _fetch(plan: Sequence[_Planned], folder: Path) -> None:
    from tqdm import tqdm

    from worldline.hub import fetch_all

    check_folder(folder, "--checkpoint_dir")
    _check_room(plan, folder)
    whole = sum(each.file.nbytes for each in plan)
    ready, came, told, lock = 0, 0, time.monotonic(), threading.Lock()
    on_terminal = sys.stderr.isatty()
    fetched = {each.file for each in plan if not each.seems_present}
    with tqdm(total=whole, unit="B", unit_scale=True, disable=not on_terminal, leave=False) as bar:

        def tell(_: RemoteFile, count: int) -> None:
            nonlocal came, told
            with lock:
                came += count
                bar.update(count)
                if not on_terminal and time.monotonic() - told > _SILENCE:
                    told = time.monotonic()
                    logger.info("%s of %s", _size(came), _size(whole))

        def done(file: RemoteFile, path: Path) -> None:
            nonlocal ready
            with lock:
                ready += 1
                bar.clear()
                what = "fetched" if file in fetched else "verified"
                logger.info("%d/%d %s, %s: %s", ready, len(plan), path, _size(file.nbytes), what)

        fetch_all([(each.file, each.path) for each in plan], tell, done)
    click.echo(f"{len(plan)} files, {_size(whole)}, are in {folder}, verified")


def _check_room(plan: Sequence[_Planned], folder: Path) -> None:
    """Refuse what the disk cannot hold.

    Raises:
        DownloadError: it cannot.
    """
    need = sum(each.file.nbytes for each in plan if not each.seems_present)
    need -= sum(
        part.stat().st_size
        for each in plan
        for part in each.path.parent.glob(f"{each.path.name}.{each.file.digest[:8]}.incomplete")
    )
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    with suppress(OSError):
        free = shutil.disk_usage(nearest).free
        if need + _LEFT_OVER > free and need > 0:
            raise DownloadError(
                f"{_size(need)} are to be fetched, but {folder} has room for {_size(free)}; choose "
                "another --checkpoint_dir"
            )
