"""`worldline generate`, and the released commands of every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from pydantic import Field

from worldline.cli import run
from worldline.cli.inputs import kind_of, label_of
from worldline.cli.options import ManyValues, options
from worldline.family import FAMILIES, Command, Item, requests_of
from worldline.request import Options


def released_roots() -> dict[str, str]:
    """First word of each released command -> its family."""
    return {
        command.name.partition(" ")[0]: family
        for family in FAMILIES
        for command in requests_of(family).COMMANDS
    }


def released_command(root: str) -> click.Command | None:
    """The released command, or the group of commands, that begins with a word."""
    family = released_roots().get(root)
    if family is None:
        return None
    described = requests_of(family)
    found = {
        command.name.partition(" ")[2]: make_command(family, command)
        for command in described.COMMANDS
        if command.name.partition(" ")[0] == root
    }
    return found[""] if "" in found else click.Group(root, commands=found, help=described.HELP)


def make_command(family: str, command: Command) -> click.Command:
    """The click command that a family describes."""
    described, reader = requests_of(family), run.load_reader(command.reads)

    @click.pass_context
    def callback(context: click.Context, /, **_: object) -> None:
        run.run(family, command, context)

    model = click.option(
        f"--{command.model}",
        help="Folder of the model below --checkpoint_dir, a path, or tiny-… for a bundled one; "
        f"`worldline models` lists them.  [default: {command.default_model}]",
    )

    def flags(fields: type[Options]) -> Any:
        return options(
            fields,
            hidden=command.hidden,
            defaults=command.defaults,
            negatable=command.negatable,
        )

    for decorate in (
        flags(described.OPTIONS),
        flags(described.REQUEST),
        options(reader.flags, negatable=command.negatable),
        model,
    ):
        callback = decorate(callback)
    name = command.name.rpartition(" ")[2]
    if not hasattr(reader, "many_values"):
        return click.command(name, help=command.help)(callback)
    built = click.command(name, cls=ManyValues, help=command.help)(callback)
    built.many = reader.many_values
    return built


class GenerateFlags(Options):
    """Flags of `worldline generate`."""

    output: str = Field(
        "output.mp4",
        description="File of the video: .mp4, .mov, .mkv, .webm or .gif.",
        json_schema_extra={"short": "-o"},
    )
    resume: bool = Field(
        False, description="Keep a video that an earlier run made in the same way."
    )


class One:
    """Reader of a single input.

    Attributes:
        input: image or video to continue; None if there is none.
    """

    flags = GenerateFlags

    def __init__(self, input: str | None) -> None:
        self.input = input

    def read(self, flags: GenerateFlags, stated: Mapping[str, Any]) -> tuple[list[Item], list[str]]:
        path = None if self.input is None else Path(self.input)
        label = str(path) if path else label_of(str(stated.get("prompt", "embeddings")))
        return [Item(label, "", stated, path, kind_of(path, None), Path(flags.output))], []


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("world")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[INPUT] [OPTIONS]...")
@click.pass_context
def generate(context: click.Context, /, world: str, words: tuple[str, ...]) -> None:
    """Make a video with any world model.

    WORLD is a bundled model (tiny-…), a folder below --checkpoint_dir or a path; `worldline models`
    lists them. INPUT is an image or a video to continue; without it --prompt starts the video.
    `worldline generate WORLD --help` lists the options of that model, with its own defaults.
    """
    command = command_of(world, words)
    with command.make_context(f"{context.info_name} {world}", list(words), context.parent) as inner:
        command.invoke(inner)


def command_of(world: str, words: Sequence[str]) -> click.Command:
    """The command for one model: its family's options with its own defaults.

    Raises:
        CheckpointError: there is no such model.
    """
    from worldline.locate import locate
    from worldline.opening import recognise

    roots = ["checkpoints"]  # the last one counts, as of every option
    for word, following in pairwise((*words, "")):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == "__checkpoint_dir":
            roots.append(value if equals else following)
    opened = recognise(locate(world, roots[-1]))
    family, defaults = opened.family, opened.defaults

    @click.pass_context
    def callback(context: click.Context, /, input: str | None, **_: object) -> None:
        released = Command("generate", "", "world", world, reads="")
        run.run(family.name, released, context, reader=One(input))

    for decorate in (
        options(family.options),
        options(family.request, defaults=defaults),
        options(GenerateFlags),
        click.argument("input", required=False),
    ):
        callback = decorate(callback)
    text = f"Make a video with {world}: of a prompt, or of what happens next in INPUT."
    return click.command("generate", help=text)(callback)
