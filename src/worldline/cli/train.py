"""`worldline train`: post-training of a released model on a folder of videos."""

from __future__ import annotations

import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from worldline.cli.messages import results
from worldline.cli.options import NumberOrAuto
from worldline.cli.run import processes_to_start
from worldline.errors import InputError, counted
from worldline.family import FAMILIES
from worldline.files import check_path
from worldline.parallel import job
from worldline.request import LoadOptions
from worldline.train import experiment as experiments
from worldline.train.experiment import Experiment

logger = logging.getLogger(__name__)

_KEYS = {  # of the short form's flags
    "videos": "data.dataset_dir",
    "caption": "data.caption",
    "resolution": "data.video_size",
    "num_frames": "data.num_frames",
    "max_steps": "trainer.max_iter",
    "learning_rate": "optimizer.lr",
    "name": "job.name",
}
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("words", nargs=-1, metavar="[MODEL] [-- KEY=VALUE ...]")
@click.option(
    "--config", help="Taken from released commands, without effect: experiments have names here."
)
@click.option("--list", "listed", is_flag=True, help="List the experiments and end.")
@click.option(
    "--videos",
    help="Folder of videos, with captions beside them where a model reads; or a data set, "
    "lerobot:FOLDER#camera=NAME.",
)
@click.option("--caption", help="Caption of all videos.")
@click.option("--max_steps", type=click.IntRange(min=1), help="Steps of the run.  [default: 1000]")
@click.option("--resolution", help="Height and width, such as 384x640.  [default: the model's]")
@click.option(
    "--num_frames", type=click.IntRange(min=1), help="Frames of a clip.  [default: the model's]"
)
@click.option("--learning_rate", type=float, help="Peak of the learning rate.")
@click.option("--lora", is_flag=True, help="Train an adapter beside the weights, not these.")
@click.option("--name", help="Name of the run.  [default: the model's]")
@click.option("--checkpoint_dir", default="checkpoints", show_default=True, help="Models' folder.")
@click.option("--device", help="cuda or cpu.  [default: cuda where there is one]")
@click.option("--num_gpus", type=NumberOrAuto(), help="GPUs to train on, or auto.  [default: 1]")
@click.option("--dry_run", "--dryrun", is_flag=True, help="Check and print all, train nothing.")
@click.option("--cluster", hidden=True)
@click.pass_context
def train(
    context: click.Context,
    /,
    words: tuple[str, ...],
    config: str | None,
    listed: bool,
    checkpoint_dir: str,
    device: str | None,
    num_gpus: int | str | None,
    dry_run: bool,
    cluster: str | None,
    **short: Any,
) -> None:
    """Post-train MODEL on a folder of videos, or run an experiment.

    `worldline train MODEL --videos DIR` has defaults for the rest, all of which are keys that
    `--dry_run` prints and `-- KEY=VALUE` sets. `worldline train -- experiment=NAME KEY=VALUE` runs
    one of the experiments that `--list` shows, or a YAML file like them.
    """
    if listed:
        for name, line in experiments.released().items():
            results.add(f"{name}: {line}")
        return
    given = {n: value for n, value in short.items() if value is not None and value is not False}
    models = Path(check_path(checkpoint_dir))
    experiment = _read(words, given, models)
    job.remedy = "the same command goes on from the last state"
    options = LoadOptions.parse({"device": device, "num_gpus": num_gpus})
    if (count := processes_to_start(options)) > 1:
        words = context.find_root().obj
        context.exit(job.launch(words, count, patience_s=math.inf))  # they save first
    from worldline.train.prepare import prepare
    from worldline.train.training import train as run

    training = prepare(experiment, device, str(models))
    if training.finished and not dry_run:
        steps = counted(training.finished, "step")
        results.add(
            f"{training.folder}: the run is finished, {steps}; a larger "
            "--max_steps (trainer.max_iter) makes it longer, another --name (job.name) begins anew"
        )
        return
    for line in training.describe():
        logger.info("%s", line)
    if dry_run:
        experiment = training.experiment
        experiment.folder.mkdir(parents=True, exist_ok=True)
        (experiment.folder / "config.yaml").write_text(experiment.to_yaml())
        results.add(experiment.to_yaml())
        return
    with _stops() as stopping:
        done = run(training, stopping, bar=sys.stderr.isatty() and not results.quiet)
    results.add(f"{training.folder}: {counted(done, 'step')}")
    if done < experiment.trainer.max_iter:
        raise KeyboardInterrupt


def _read(words: tuple[str, ...], short: dict[str, Any], folder: Path) -> Experiment:
    """The experiment of a command line, and of its short form."""
    if flags := [word for word in words if word.startswith("--")]:
        raise InputError(f"{flags[0]}: flags stand before --, behind it are values KEY=VALUE")
    models = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    names = [word.partition("=")[2] for word in overrides if word.startswith("experiment=")]
    overrides = [word for word in overrides if not word.startswith("experiment=")]
    if len(models) > 1 or (models and names):
        extra = models[-1]
        raise InputError(
            f"{extra}: it is no KEY=VALUE; give one MODEL with --videos, or -- experiment=NAME"
        )
    if len(models) + len(names) != 1:
        raise InputError("give a MODEL with --videos, or -- experiment=NAME; --list shows them")
    stated = _sections(short)
    if names:
        if stated:
            given = ", ".join(f"--{name}" for name in short)
            keys = " ".join(f"{_KEYS.get(name, 'lora.rank')}=VALUE" for name in short)
            raise InputError(
                f"{given}: of an experiment these are keys; write them behind --: {keys}"
            )
        return experiments.read(names[0], overrides)
    typed = {_KEYS[name]: f"--{name}" for name in short if name in _KEYS}
    return _of_model(models[0], stated, typed, overrides, folder)


def _sections(short: dict[str, Any]) -> dict[str, Any]:
    """Values of the short form, by the sections of an experiment."""
    stated: dict[str, Any] = {}
    for name, value in short.items():
        if name == "lora":
            stated |= {"lora": {"rank": 0}}  # the family's own, which _of_model fills in
        else:
            section, _, key = _KEYS[name].partition(".")
            stated.setdefault(section, {})[key] = value
    return stated


def _of_model(
    model: str, stated: dict[str, Any], flags: dict[str, str], overrides: list[str], folder: Path
) -> Experiment:
    """The experiment of a model with the defaults of its family."""
    from worldline.locate import locate
    from worldline.opening import recognise

    family = recognise(locate(model, folder)).family.name
    if "lora" in stated:
        recipe = import_module(f"{FAMILIES[family]}.weights").LORA
        stated["lora"] = {"rank": recipe.rank, "scale": recipe.scale}
        stated.setdefault("optimizer", {}).setdefault("lr", 1e-4)
    job = {"name": Path(model).name, **stated.pop("job", {})}
    stated = {**stated, "job": job, "model": model}
    experiment = experiments.short_form(family, stated, overrides, flags)
    if "lora" in stated and not experiment.lora.rank:
        raise InputError("lora.rank is 0, but --lora asks for an adapter; leave one of them out")
    return experiment


@contextmanager
def _stops() -> Iterator[Callable[[], bool]]:
    """Whether a signal has asked to stop; the step is finished and saved first.

    A second one ends at once. Those that are ignored at the start, as below nohup, stay ignored.
    """
    asked: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _STOPS}

    def ask(number: int, frame: Any) -> None:
        if asked:
            before[number](number, frame)
        asked.append(number)

    for stop in _STOPS:
        if callable(before[stop]):
            signal.signal(stop, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked and callable(before[asked[0]]):
            before[asked[0]](asked[0], None)
