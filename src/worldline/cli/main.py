"""The command `worldline`: one call for a command line, one line for an expected error.

A command is imported when it is named or listed, torch only when one opens a model or runs.
"""

import gc
import logging
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import click

from worldline.cli.messages import Dropping, Events, Lines, open_standard_streams, results, silence
from worldline.errors import Error, InputError, as_flags, is_out_of_memory, one_line, printable
from worldline.events import report_event
from worldline.family import FAMILIES
from worldline.parallel import job

# every option of every command may be written with `_` or with `-`
SETTINGS = {
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
# beside the released ones, the first word of which is a family's name
COMMANDS = (
    *("demo", "generate", "train", "tokenize", "fleet", "serve", "evaluate", "models", "doctor"),
    "checkpoints",
)
# options of every command, which may stand anywhere before --
COMMON = {
    "debug": "Log traces and stages.",
    "quiet": "Print errors and the last line alone.",
    "log_json": "Append stages, notes, results and errors to FILE, as JSON, one a line.",
}
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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

        0 done; 2 wrong usage or input; 3 refused by a guardrail; 129, 130 and 143 interrupted by
        SIGHUP, SIGINT and SIGTERM; 1 anything else.
        """
        open_standard_streams()
        interrupts, logger = Interrupts(), logging.getLogger("worldline")
        level, streams, status = logger.level, (sys.stdout, sys.stderr), 0
        errors: Any = Dropping(sys.stderr)
        sys.stderr = errors
        handlers: list[logging.Handler] = []
        common: dict[str, str] = {}
        naming = as_flags.set(True)
        try:
            typed = [*(sys.argv[1:] if args is None else args)]
            common, words = _common(typed)
            results.quiet = "quiet" in common
            lowest = logging.ERROR if results.quiet else logging.INFO
            if job.meet(typed, interrupts.interrupt).speaks:
                handlers.append(Lines(logging.DEBUG if "debug" in common else lowest))
                if path := common.get("log_json"):
                    handlers.append(Events(path))
            else:
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - to the end
            for handler in handlers:
                logger.addHandler(handler)
            logger.setLevel(min((one.level for one in handlers), default=logging.CRITICAL))
            if not job.launched():  # else the process that did has begun
                report_event("start", " ".join(["worldline", *words[:1]]))  # others may be a prompt
            splits = {"generate", "train", *FAMILIES} & {*words[:1]}
            if splits or job.alone():
                run = partial(super().main, words, "worldline", obj=typed)
                status = run(standalone_mode=False) or 0
            job.leave()
        except click.exceptions.NoArgsIsHelpError as usage:
            status = usage.exit_code
            click.echo(usage.format_message(), err=True)
            job.leave()
        except (Exception, KeyboardInterrupt, job.Lone) as raised:
            interrupts.ignore()
            error = raised.args[0] if isinstance(raised, job.Lone) else raised
            status, message = explain(error)
            if interrupts.signal:  # a library may have made another error of it
                status, message = 128 + interrupts.signal, "interrupted"
                if interrupts.signal != signal.SIGINT:
                    message += f" by {signal.Signals(interrupts.signal).name}"
            if "debug" in common:
                click.echo(f"{job.label()}{traceback.format_exc()}", errors, nl=False)
            status, message = job.settle(error, status, message)
            if message:
                click.echo(f"worldline: {printable(message)}", errors)
                report_event("error", message)
            if isinstance(error, OSError) and error.filename is None:  # perhaps of the output,
                silence(sys.stdout)  # which would be written again at exit
        finally:
            interrupts.ignore()
            results.finish()
            if not job.launched():
                report_event("end", f"exit status {status}", status=status)
            for handler in handlers:
                logger.removeHandler(handler)
                handler.close()
            logger.setLevel(level)
            sys.stdout, sys.stderr = streams
            as_flags.reset(naming)
            interrupts.restore()
        job.end(status)


def _common(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Values of the `COMMON` options, and the other words."""
    end = words.index("--") if "--" in words else len(words)
    common: dict[str, str] = {}
    rest: list[str] = []
    remaining = iter(words[:end])
    for word in remaining:
        name, equals, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if word in ("--debug", "--quiet"):
            common[name] = word
        elif word.startswith("--") and name == "log_json":
            common[name] = value if equals else next(remaining, "")
        else:
            rest.append(word)
    if common.get("log_json") == "":
        raise InputError("--log_json: it is empty; give a file")
    return common, [*rest, *words[end:]]


class Interrupt(KeyboardInterrupt):
    """Interrupt by a signal; weak references need a class of our own.

    After a plain KeyboardInterrupt that left an `exec`, Python ends itself by SIGINT at its exit.
    """


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP as `Interrupt`; a second one ends the process at once.

    Python drops what a finalizer raises, and so do libraries by a bare `except`: each second it is
    raised again, unless it is on its way. A signal that is ignored at the start, as below nohup,
    stays ignored.

    Attributes:
        signal: number of the first that came; 0 before.
        raised: the exception; None once it is dropped.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.raised: Callable[[], Interrupt | None] = lambda: None
        self.earlier: dict[int, Any] = {}
        self.hook = hook = sys.unraisablehook
        sys.unraisablehook = lambda ignored: ignored.exc_type is Interrupt or hook(ignored)
        if threading.current_thread() is threading.main_thread():
            self.earlier = {number: signal.getsignal(number) for number in INTERRUPTS}
        for number, handler in self.earlier.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            if self.signal:
                os._exit(128 + number)
            self.signal = number
            signal.signal(signal.SIGALRM, self._interrupt)
            signal.setitimer(signal.ITIMER_REAL, 1, 1)
        gc.collect()  # a dropped one and its trace refer to each other
        if not self.raised():
            error = Interrupt()
            self.raised = weakref.ref(error)
            raise error

    def interrupt(self) -> None:
        """Interrupt the main thread, unless it was; from another."""
        if not self.signal:
            os.kill(os.getpid(), signal.SIGTERM)

    def ignore(self) -> None:
        """Let no further signal interrupt the end, in which the processes of a job settle."""
        if self.signal:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number in self.earlier:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Put earlier handlers back; not after a signal, as the process is about to end."""
        for number, handler in self.earlier.items():
            if not self.signal and handler is not None:
                signal.signal(number, handler)
        sys.unraisablehook = self.hook


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and last line of a command that an exception ends."""
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "worldline"
        return 2, f"{error.format_message().rstrip('.')} (see {path} --help)"
    if isinstance(error, click.Abort | KeyboardInterrupt):
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
        click.Option(
            [f"--{name}"],
            is_flag=name != "log_json",
            metavar="FILE" if name == "log_json" else None,
            expose_value=False,
            help=text,
        )
        for name, text in COMMON.items()
    ],
)
main = click.version_option(package_name="worldline", message="%(prog)s %(version)s")(main)
