"""`worldline models`: every known checkpoint, and whether it is here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldline.cli.options import options, parsed
from worldline.files import readable_size
from worldline.request import LoadOptions

if TYPE_CHECKING:
    from worldline.family import Compute
    from worldline.memory import Memory

_COLUMNS = ("folder", "state", "size", "memory", "runs here", "command", "licence", "files")


@click.command()
@options(LoadOptions, hidden=LoadOptions.model_fields.keys() - {"checkpoint_dir", "device"})
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, as JSON.")
@click.pass_context
def models(context: click.Context, /, as_json: bool, **_: object) -> None:
    """List every known checkpoint.

    The columns are folder, presence, size of its tensors, planned memory of one video on this
    machine's device, the flags with which it fits, command, licence and files. Folders tiny-… ship
    with the package.
    """
    from worldline.memory import device_memory
    from worldline.opening import choose_compute

    flags = parsed(context, LoadOptions)
    compute = choose_compute(flags)
    memory = device_memory(compute.device)
    rows = [*bundled_rows(compute, memory), *released_rows(flags.checkpoint_dir, compute, memory)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = [_COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        click.echo("  ".join(map(str.ljust, line, widths)).rstrip())
    if not Path(flags.checkpoint_dir).is_dir():
        click.echo(f"worldline: no folder {flags.checkpoint_dir} (--checkpoint_dir)", err=True)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    older = row["folder"] not in (row["name"], row["folders"][0])
    return (
        row["folders"][0],
        f"{row['state']} as {row['folder']}" if older else row["state"],
        *(readable_size(nbytes) if nbytes else "-" for nbytes in (row["nbytes"], row["memory"])),
        row["runs_here"],
        row["command"] or "-",
        row["licence"],
        ", ".join(file["name"] for file in row["files"]),
    )


def bundled_rows(compute: Compute, memory: Memory | None) -> Iterator[dict[str, Any]]:
    """Rows of what ships with the package."""
    from worldline.locate import bundled_names, bundled_tokenizers, locate
    from worldline.opening import open_world, plan

    for name in bundled_names():
        opened = open_world(locate(name, ""), {})
        request = opened.family.request.parse(opened.defaults)
        fit = plan(opened, [request], compute).fit(compute.device, memory)
        files = [path for part in opened.parts.values() for path in part.files]
        row = _bundled_row(name, opened.family.name, "generate", files)
        yield row | {"memory": fit.need, "runs_here": str(fit)}
    for name in bundled_tokenizers():
        files = sorted(locate(name, "", tokenizer=True).named.iterdir())
        yield _bundled_row(name, "video tokenizer", "tokenize", files)


def _bundled_row(name: str, family: str, command: str, files: Iterable[Path]) -> dict[str, Any]:
    weights = [path for path in files if path.suffix in (".safetensors", ".pt")]
    return {
        "name": name,
        "family": family,
        "folder": name,
        "folders": [name],
        "state": "bundled",
        "files": [{"name": path.name} for path in weights],
        "nbytes": sum(path.stat().st_size for path in weights),
        "memory": None,
        "licence": "Apache-2.0",
        "command": command,
        "runs_here": "yes",
    }


def released_rows(
    checkpoint_dir: str, compute: Compute, memory: Memory | None
) -> Iterator[dict[str, Any]]:
    """Rows of every released checkpoint."""
    from worldline.catalog import ENTRIES
    from worldline.opening import fit_released

    parts = {name for entry in ENTRIES if entry.command for name in entry.needs}
    for entry in ENTRIES:
        state, folder = entry.presence(checkpoint_dir)
        fit = fit_released(entry, compute, memory)
        use = "as a part" if entry.name in parts else "not in this version"
        found = entry.folders[0] if folder is None else str(folder.relative_to(checkpoint_dir))
        fields = {"name", "family", "folders", "files", "parameters", "licence", "needs", "command"}
        yield {
            **entry.model_dump(include=fields),
            "folder": found,
            "state": state,
            "nbytes": entry.nbytes,
            "memory": fit.need if fit else None,
            "runs_here": str(fit) if fit else "yes" if entry.command else use,
        }
