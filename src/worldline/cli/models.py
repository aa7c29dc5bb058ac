"""`worldline models`: every known checkpoint, and whether it is here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from worldline.cli.options import parameters, parsed
from worldline.files import readable_size
from worldline.request import LoadOptions

_COLUMNS = (
    *("folder", "state", "size", "memory", "runs here", "command", "licence", "other names"),
    "files",
)


@click.command(
    params=parameters(LoadOptions, LoadOptions.model_fields.keys() - {"checkpoint_dir", "device"})
)
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, as JSON.")
@click.pass_context
def models(context: click.Context, /, as_json: bool, **_: object) -> None:
    """List every known checkpoint.

    The columns are folder, presence, size of its tensors, planned memory of one video on this
    machine's device, the flags with which it fits, command, licence, names in Cosmos 1.0 or of
    single models, by which it is fetched too, and files. Folders tiny-… ship with the package.
    """
    flags = parsed(context, LoadOptions)
    rows = [*describe_all(flags)]
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
    return (
        row["folder"],
        row["state"],
        *(readable_size(nbytes) if nbytes else "-" for nbytes in (row["nbytes"], row["memory"])),
        row["runs_here"],
        row["command"] or "-",
        row["licence"],
        ", ".join(row["names"]) or "-",
        ", ".join(file["name"] for file in row["files"]),
    )


def describe_all(flags: LoadOptions) -> Iterator[dict[str, Any]]:
    """Rows of what ships with the package, then of every released checkpoint."""
    from worldline.catalog import ENTRIES
    from worldline.locate import bundled_names, bundled_tokenizers, locate
    from worldline.memory import device_memory
    from worldline.opening import choose_compute, fit_released, open_world, plan

    compute = choose_compute(flags)
    memory = device_memory(compute.device)
    for name in bundled_names():
        opened = open_world(locate(name, ""), {})
        request = opened.family.request.parse(opened.defaults)
        fit = plan(opened, [request], compute).fit(compute.device, memory)
        files = [path for part in opened.parts.values() for path in part.files]
        yield _bundled(
            name,
            files,
            family=opened.family.name,
            command="generate",
            memory=fit.need,
            runs_here=str(fit),
        )
    for name in bundled_tokenizers():
        files = sorted(locate(name, "", tokenizer=True).named.iterdir())
        yield _bundled(
            name, files, family="video tokenizer", command="tokenize", memory=None, runs_here="yes"
        )
    parts = {name for entry in ENTRIES if entry.command for name in entry.needs}
    fields = {"name", "family", "folders", "files", "parameters", "licence", "needs", "command"}
    for entry in ENTRIES:
        state, folder = entry.presence(flags.checkpoint_dir)
        first = entry.first_generation
        released = fit_released(entry, compute, memory)
        use = "as a part" if entry.name in parts else "not in this version"
        place = folder or entry.folders[0]
        if folder and folder.is_relative_to(flags.checkpoint_dir):
            place = folder.relative_to(flags.checkpoint_dir)
        yield {
            **entry.model_dump(include=fields),
            "folder": str(place),
            "names": [model.name for model in entry.models]
            + ([first.destination] if first else []),
            "state": state,
            "nbytes": entry.nbytes,
            "memory": released.need if released else None,
            "runs_here": str(released) if released else "yes" if entry.command else use,
        }


def _bundled(name: str, files: list[Path], **facts: Any) -> dict[str, Any]:
    weights = [path for path in files if path.suffix in (".safetensors", ".pt")]
    return facts | {
        "name": name,
        "folder": name,
        "folders": [name],
        "names": [],
        "state": "bundled",
        "files": [{"name": path.name} for path in weights],
        "nbytes": sum(path.stat().st_size for path in weights),
        "licence": "Apache-2.0",
    }
