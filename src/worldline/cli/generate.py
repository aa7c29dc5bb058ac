"""`worldline generate`, and the released commands of every family."""

import re
from collections.abc import Sequence
from pkgutil import resolve_name

import click

from worldline.cli.options import ManyValues, parameters
from worldline.cli.run import run
from worldline.errors import CheckpointError
from worldline.family import FAMILIES, Command, requests_of


def released_command(family: str) -> click.Command:
    """The released command of a family, or the group of its commands."""
    described = requests_of(family)
    commands = [make_command(family, command) for command in described.COMMANDS]
    if described.COMMANDS[0].name == family:
        return commands[0]
    return click.Group(family, commands, help=described.HELP)


def make_command(family: str, command: Command) -> click.Command:
    """The click command that a family describes."""
    described, reader = requests_of(family), resolve_name(command.reads)

    @click.pass_context
    def callback(context: click.Context, /, **_: object) -> None:
        run(family, command, context)

    text = (
        "Folder of the model below --checkpoint_dir, a path, or tiny-… for a bundled one; "
        f"`worldline models` lists them.  [default: {command.default_model}]"
    )
    params = parameters(reader.flags, negatable=command.negatable)
    if command.model:
        params.insert(0, click.Option([f"--{command.model}"], help=text))
    for fields in (described.REQUEST, described.OPTIONS):
        params += parameters(fields, command.hidden, command.defaults, command.negatable)
    name = command.name.rpartition(" ")[2]
    return ManyValues(name, callback=callback, params=params, help=command.help)


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

    The help of a released model that is not here has those of its family.
    """
    from worldline.catalog import ENTRIES
    from worldline.locate import locate
    from worldline.opening import recognise

    folders = re.findall("(?:^|\0)--checkpoint[-_]dir[=\0]([^\0]+)", "\0".join(words))
    folder = folders[-1] if folders else "checkpoints"  # the last one counts, as of every option
    try:
        opened = recognise(locate(world, folder))  # for its flags; `run` opens the whole model
        family, defaults = opened.family.name, opened.defaults
    except CheckpointError:
        released = (e for e in ENTRIES if world in (*e.folders, *(m.name for m in e.models)))
        family, defaults = next((e.command.split(" ")[0] for e in released), ""), {}
        if family not in FAMILIES or not {"-h", "--help"} & {*words}:
            raise
    text = f"Make a video with {world}: of a prompt, or of what happens next in INPUT."
    reads = "worldline.cli.inputs:ONE"
    command = Command("generate", text, "", world, reads, defaults=defaults)
    return make_command(family, command)
