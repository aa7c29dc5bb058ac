"""The command `worldline`: one call for a command line, one line for an expected error.

A command is imported when it is named or listed, torch only when one opens a model or runs.
"""

import logging
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from worldline.errors import Error, as_flags, is_out_of_memory, one_line, printable
from worldline.family import FAMILIES

# every option of every command may be written with `_` or with `-`
SETTINGS = {
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
# beside the released ones, the first word of which is a family's name
COMMANDS = ("demo", "generate", "tokenize", "evaluate", "models", "doctor", "checkpoints")


class Main(click.Group):
    """Outermost group, which alone imports commands, prints errors and chooses exit statuses."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS[:2], *FAMILIES, *COMMANDS[2:]]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command: click.Command | None = None
        if cmd_name in FAMILIES:
            command = import_module("worldline.cli.generate").released_command(cmd_name)
        elif cmd_name in COMMANDS:
            command = getattr(import_module(f"worldline.cli.{cmd_name}"), cmd_name)
        return command

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run a command line and exit.

        0 done; 2 wrong usage or input; 3 refused by a guardrail; 130 interrupted; 1 anything else.
        """
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        debug = "--debug" in words[:end]
        words = [word for word in words[:end] if word != "--debug"] + words[end:]
        handler, logger = _LogLines(), logging.getLogger("worldline")
        level, status, naming = logger.level, 0, as_flags.set(True)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if debug else logging.INFO)
        try:
            status = super().main(words, "worldline", standalone_mode=False) or 0
        except click.exceptions.NoArgsIsHelpError as error:
            status = error.exit_code
            click.echo(error.format_message(), err=True)
        except Exception as error:
            status, message = explain(error)
            if debug:
                click.echo(traceback.format_exc(), err=True, nl=False)
            click.echo(f"worldline: {printable(message)}", err=True)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            as_flags.reset(naming)
        sys.exit(status)


class _LogLines(logging.Handler):
    """Log records as lines on the current standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        click.echo(f"worldline: {prefix}{printable(record.getMessage())}", err=True)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and last line of a command that an exception ends."""
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "worldline"
        return 2, f"{error.format_message().rstrip('.')} (see {path} --help)"
    if isinstance(error, click.Abort):  # of Ctrl-C
        return 130, "interrupted"
    if isinstance(error, Error):
        return error.exit_code, str(error)
    if isinstance(error, OSError) or is_out_of_memory(error):
        return 1, one_line(error)
    return 1, f"unexpected {one_line(error)} (--debug shows the trace)"


main = Main(
    "worldline",
    help="Run and post-train world foundation models: continue a video, an image or a sentence.",
    epilog="Options may be written with _ or with -.",
    context_settings=SETTINGS,
    params=[
        click.Option(["--debug"], is_flag=True, expose_value=False, help="Log traces and stages."),
    ],
)
main = click.version_option(package_name="worldline", message="%(prog)s %(version)s")(main)
