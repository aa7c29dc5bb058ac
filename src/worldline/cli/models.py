"""`worldline models`: every known checkpoint, and whether it is here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldline.files import GIGABYTE

if TYPE_CHECKING:
    from worldline.catalog import Entry
    from worldline.family import Compute

_COLUMNS = ("folder", "state", "size", "memory", "runs here", "command", "licence", "files")


@click.command()
@click.option(
    "--checkpoint_dir",
    default="checkpoints",
    show_default=True,
    help="Folder of the model folders.",
)
@click.option("--device", help="cuda, cuda:1, cpu, mps.  [default: the GPU, if there is one]")
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, as JSON.")
def models(checkpoint_dir: str, device: str | None, as_json: bool) -> None:
    """List every known checkpoint.

    The columns are folder, presence, size of its tensors, planned memory of one video on this
    machine's device, the flags with which it fits, command, licence and files. Folders tiny-… ship
    with the package.
    """
    from worldline.opening import choose_compute
    from worldline.request import LoadOptions

    compute = choose_compute(LoadOptions.parse({"device": device}))
    rows = [*bundled_rows(compute), *released_rows(checkpoint_dir, compute)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = [_cells(row) for row in rows]
    widths = [max(len(line[i]) for line in (_COLUMNS, *table)) for i in range(len(_COLUMNS))]
    for line in (_COLUMNS, *table):
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())
    if not Path(checkpoint_dir).is_dir():
        click.echo(f"worldline: no folder {checkpoint_dir} (--checkpoint_dir)", err=True)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    older = row["folder"] not in (row["name"], row["folders"][0])
    return (
        row["folders"][0],
        f"{row['state']} as {row['folder']}" if older else row["state"],
        _size(row["nbytes"]),
        _size(row["memory"]),
        row["runs_here"],
        row["command"] or "-",
        row["licence"],
        ", ".join(file["name"] for file in row["files"]),
    )


def _size(nbytes: int | None) -> str:
    if not nbytes:
        return "-"
    return f"{nbytes / GIGABYTE:.1f} GB" if nbytes >= 5e7 else f"{nbytes / 1e6:.0f} MB"


def bundled_rows(compute: Compute) -> Iterator[dict[str, Any]]:
    """Rows of what ships with the package."""
    from worldline.locate import bundled_names, bundled_tokenizers, locate
    from worldline.memory import device_memory
    from worldline.opening import open_world, plan

    for name in bundled_names():
        opened = open_world(locate(name, ""), {})
        family = opened.family
        fit = plan(opened, [family.request.parse(opened.defaults)], compute).fit(
            compute.device, device_memory(compute.device)
        )
        files = [path for part in opened.parts.values() for path in part.files]
        yield _row(name, family.name, "generate", files) | {
            "memory": fit.need,
            "runs_here": str(fit),
        }
    for name in bundled_tokenizers():
        files = sorted(locate(name, "", tokenizer=True).named.glob("*.safetensors"))
        yield _row(name, "video tokenizer", "tokenize", files)


def _row(name: str, family: str, command: str, files: list[Path]) -> dict[str, Any]:
    weights = [path for path in files if path.suffix == ".safetensors"]
    return {
        "name": name,
        "family": family,
        "folder": name,
        "folders": [name],
        "state": "bundled",
        "files": [{"name": path.name} for path in weights],
        "nbytes": sum(path.stat().st_size for path in weights),
        "memory": None,
        "licence": "Apache License 2.0",
        "command": command,
        "runs_here": "yes",
    }


def released_rows(checkpoint_dir: str, compute: Compute) -> Iterator[dict[str, Any]]:
    """Rows of every released checkpoint."""
    from worldline.catalog import ENTRIES
    from worldline.memory import device_memory
    from worldline.opening import fit_released

    memory = device_memory(compute.device)
    for entry in ENTRIES:
        state, folder = entry.presence(checkpoint_dir)
        fit = fit_released(entry, compute, memory)
        command, verdict = _use(entry)
        yield {
            "name": entry.name,
            "family": entry.family,
            "folder": (
                folder.relative_to(checkpoint_dir).as_posix() if folder else entry.folders[0]
            ),
            "folders": entry.folders,
            "state": state,
            "files": [
                {"name": file.name, "nbytes": file.nbytes or None, "md5": file.md5 or None}
                for file in entry.files
            ],
            "nbytes": entry.nbytes or None,
            "parameters": entry.parameters or None,
            "memory": fit.need if fit else None,
            "licence": entry.licence,
            "needs": entry.needs,
            "command": command,
            "runs_here": str(fit) if fit else verdict,
        }


def _use(entry: Entry) -> tuple[str | None, str]:
    """The command that runs a checkpoint, and whether one that is no model is used here."""
    from worldline.catalog import ENTRIES
    from worldline.tokenizers.cosmos.model import PRESETS

    if entry.family.endswith("tokenizer") and entry.preset in PRESETS:
        return "tokenize", "yes"
    if any(entry.name in other.needs for other in ENTRIES if other.command):
        return entry.command or None, "as a part"
    return entry.command or None, "not in this version"
