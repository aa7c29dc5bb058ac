"""`worldline models`: every checkpoint that is known, and whether it is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldline.catalog import APACHE_LICENCE
from worldline.cli.run import DEVICE_HELP
from worldline.files import GIGABYTE

if TYPE_CHECKING:
    from worldline.catalog import Entry
    from worldline.loading import Fit, WorldFiles
    from worldline.weights.read import Checkpoint

_PARTS = ("text encoder", "diffusion decoder", "guardrail", "prompt upsampler")
_COLUMNS = ("folder", "state", "size", "memory", "runs here", "command", "licence", "files")


@click.command()
@click.option(
    "--checkpoint_dir", default="checkpoints", show_default=True, help="Holds the model folders."
)
@click.option("--device", help=DEVICE_HELP)
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, as JSON.")
def models(checkpoint_dir: str, device: str | None, as_json: bool) -> None:
    """List every known checkpoint.

    Of each its folder, whether it is present, licence and files. Size is that of the tensors;
    memory is the plan for one clip on this machine's device; command is that of `worldline` which
    uses it. Folders tiny-… ship with the package.
    """
    rows = [*_bundled_rows(device), *_released_rows(checkpoint_dir, device)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = [_cells(row) for row in rows]
    widths = [max(len(line[i]) for line in (_COLUMNS, *table)) for i in range(len(_COLUMNS))]
    for line in (_COLUMNS, *table):
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())
    if not Path(checkpoint_dir).is_dir():
        click.echo(
            f"worldline: no folder {checkpoint_dir} yet (--checkpoint_dir): only bundled models",
            err=True,
        )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    older = row["folder"] not in (row["name"], row["folders"][0])
    return (
        row["folders"][0],
        f"{row['state']} as {row['folder']}" if older else row["state"],
        _gigabytes(row["nbytes"]),
        _gigabytes(row["memory"]),
        row["runs_here"],
        row["command"] or "-",
        row["licence"],
        ", ".join(file["name"] for file in row["files"]),
    )


def _gigabytes(nbytes: int | None) -> str:
    if not nbytes:
        return "-"
    return f"{nbytes / GIGABYTE:.1f} GB" if nbytes >= 5e7 else f"{nbytes / 1e6:.0f} MB"


def _bundled_rows(device: str | None) -> list[dict[str, Any]]:
    from worldline.loading import choose_device, find_world, fit_files
    from worldline.locate import bundled_names, bundled_tokenizers, has_decoder, locate
    from worldline.machine import device_memory
    from worldline.tokenizers.cosmos.load import open_tokenizer

    chosen = choose_device(device)
    rows = []
    for name in bundled_names():
        files = find_world(name, "", diffusion_decoder=has_decoder(name))
        sources, family, command = _parts(files)
        found = fit_files(files, chosen, device_memory(chosen))
        rows.append(_bundled_row(name, sources, family, command, found.need, _verdict(found)))
    for name in bundled_tokenizers():
        source, config = open_tokenizer(locate(name, "", tokenizer=True).named)
        family = f"{'continuous' if config.levels is None else 'discrete'} video tokenizer"
        rows.append(_bundled_row(name, [source], family, "tokenize", None, "yes"))
    return rows


def _bundled_row(
    name: str,
    sources: list[Checkpoint],
    family: str,
    command: str,
    memory: int | None,
    runs_here: str,
) -> dict[str, Any]:
    return {
        "name": name,
        "family": family,
        "folder": name,
        "folders": [name],
        "state": "bundled",
        "files": [{"name": path.name} for source in sources for path in source.files],
        "nbytes": sum(info.nbytes for source in sources for info in source.tensors.values()),
        "memory": memory,
        "licence": APACHE_LICENCE,
        "command": command,
        "runs_here": runs_here,
    }


def _parts(files: WorldFiles) -> tuple[list[Checkpoint], str, str]:
    """Return the checkpoints of a world, its family, and the command that runs it."""
    from worldline.loading import AutoregressiveFiles, FlowFiles

    if isinstance(files, FlowFiles):
        sources = [files.dit.source, files.tokenizer.source]
        if files.text is not None:
            sources.append(files.text.checkpoint)
        return sources, "flow", "predict2.5"
    if isinstance(files, AutoregressiveFiles):
        sources = [files.transformer, files.tokenizer]
        if files.text is not None:
            sources.append(files.text.checkpoint)
        if files.decoder is not None:
            sources += [files.decoder.dit.source, files.decoder.tokenizer]
        kind = "base" if files.config.context_width is None else "video2world"
        return sources, f"autoregressive {kind}", f"autoregressive {kind}"
    sources = [files.dit.source, files.tokenizer]
    if files.text is not None:
        sources.append(files.text.checkpoint)
    kind = "video2world" if files.config.condition_mask else "text2world"
    return sources, f"diffusion {kind}", f"diffusion {kind}"


def _released_rows(checkpoint_dir: str, device: str | None) -> list[dict[str, Any]]:
    from worldline.catalog import ENTRIES
    from worldline.loading import choose_device, fit_entry
    from worldline.machine import device_memory

    chosen = choose_device(device)
    memory = device_memory(chosen)
    rows = []
    for entry in ENTRIES:
        state, folder = entry.presence(checkpoint_dir)
        found = fit_entry(entry, chosen, memory)
        command, verdict = _use(entry)
        rows.append(
            {
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
                "memory": found.need if found else None,
                "licence": entry.licence,
                "needs": entry.needs,
                "command": command,
                "runs_here": _verdict(found) if found else verdict,
            }
        )
    return rows


def _use(entry: Entry) -> tuple[str | None, str]:
    """Return the command that runs a checkpoint, and what to say of one that is no world."""
    from worldline.tokenizers.cosmos.model import PRESETS

    if entry.family.endswith("tokenizer") and entry.preset in PRESETS:
        return "tokenize", "yes"
    if entry.family in _PARTS and any(entry.name in e.needs for e in _runnable()):
        return None, "as a part"
    return entry.command or None, "not in this version"


def _runnable() -> list[Entry]:
    from worldline.catalog import ENTRIES

    return [entry for entry in ENTRIES if entry.command]


def _verdict(found: Fit) -> str:
    if found.fits is None:
        return "yes, if the memory suffices"
    if not found.fits:
        return "no, too little memory"
    return " ".join(("yes", *(f"--{flag}" for flag in found.flags)))
