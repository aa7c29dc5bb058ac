"""The command `worldline`: one call for a command line, one line for an expected error.

A command's module is imported when the command is named or listed, and imports torch only when it
runs, so that `worldline --help` does not wait.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from worldline.cli.failures import explain

# every option of every command may be written with `_` or with `-`
SETTINGS = {
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}


class LazyGroup(click.Group):
    """Commands that are imported when they are named.

    Attributes:
        places: command name -> "module:attribute".
    """

    places: Mapping[str, str] = {
        "demo": "worldline.cli.demo:demo",
        "generate": "worldline.cli.generate:generate",
        "tokenize": "worldline.cli.tokenize:tokenize",
        "evaluate": "worldline.cli.evaluate:evaluate",
        "models": "worldline.cli.models:models",
        "doctor": "worldline.cli.doctor:doctor",
        "checkpoints": "worldline.cli.checkpoints:checkpoints",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        from worldline.cli.generate import released_roots

        demo, generate, *others = self.places
        return [demo, generate, *released_roots(), *others]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.places:
            from worldline.cli.generate import released_command

            return released_command(cmd_name)
        module, attribute = self.places[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


class Main(LazyGroup):
    """Outermost group, which alone prints errors and chooses exit statuses."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run a command line and exit.

        0 done; 2 wrong usage or input; 3 refused by a guardrail; 130 interrupted; 1 anything else.
        """
        words, debug = _without_debug(list(sys.argv[1:] if args is None else args))
        handler = _LogLines()
        logger = logging.getLogger("worldline")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if debug else logging.INFO)
        try:
            with self.make_context("worldline", words) as context:
                self.invoke(context)
            sys.exit(0)
        except click.exceptions.Exit as done:
            sys.exit(done.exit_code)
        except BaseException as error:
            if isinstance(error, (SystemExit, GeneratorExit)):
                raise
            if isinstance(error, click.exceptions.NoArgsIsHelpError):
                click.echo(error.format_message(), err=True)
                sys.exit(2)
            status, message = explain(error)
            if debug:
                click.echo(traceback.format_exc(), err=True, nl=False)
            if message:
                click.echo(f"worldline: {message}", err=True)
            sys.exit(status)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """The words without --debug, and whether it stood before a lone `--`."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return kept + words[end:], len(kept) < end


class _LogLines(logging.Handler):
    """Log records as lines on the current standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        click.echo(f"worldline: {prefix}{record.getMessage()}", err=True)


main = Main(
    "worldline",
    help="Run and post-train world foundation models: continue a video, an image or a sentence.",
    epilog="Options may be written with _ or with -.",
    context_settings=SETTINGS,
    params=[
        click.Option(["--debug"], is_flag=True, expose_value=False, help="Show traces of errors."),
    ],
)
main = click.version_option(package_name="worldline", message="%(prog)s %(version)s")(main)
