"""What the recipes of tiny worlds share: options, the run, weights to begin with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from tiny import sizes
from tiny.export import draw_weights
from worldline.parallel import job
from worldline.parallel.mesh import ALONE, Axis
from worldline.train.loop import LoopConfig, Objective, fit
from worldline.train.optim import Cosine, trainable
from worldline.weights.networks import Network

log = logging.getLogger(__name__)

Option = Callable[[Any], Any]  # a decorator of click

EXISTING = click.Path(path_type=Path, exists=True)
TOKENIZER = click.option(
    "--tokenizer", type=EXISTING, required=True, help="Export folder of a tokenizer."
)
NEGATIVE_PROMPT = click.option(
    "--negative_prompt", multiple=True, help="A text to train like no text at all."
)
_COMMON = (
    click.option(
        "--folder",
        type=click.Path(path_type=Path),
        required=True,
        help="States, log.jsonl, and in the end export/ and result.json.",
    ),
    click.option("--steps", type=int, help="Length of the whole run."),
    click.option("--batch", type=int, help="Clips of each process in a step."),
    click.option("--clips", type=int, help="Number of clips to draw."),
    click.option("--seconds", type=float, help="Stop and save after this time."),
    click.option("--workers", type=int, default=0, help="Processes that draw clips."),
    click.option("--seed", type=int, default=0, help="Random seed of weights, batches and noise."),
    click.option("--rate", type=float, help="Peak of the learning rate."),
    click.option("--weights", "start", type=EXISTING, help="Export folder to begin with."),
    click.option("--compile", "compiled", is_flag=True, help="Compile the network."),
    click.option("--graph", "graphed", is_flag=True, help="One CUDA graph a step; needs a GPU."),
    click.option(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        show_default=True,
        help="cuda, cuda:1, cpu, …",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Options of all recipes; None is the recipe's own default."""

    folder: Path
    steps: int | None = None
    batch: int | None = None
    clips: int | None = None
    seconds: float | None = None
    workers: int = 0
    seed: int = 0
    rate: float | None = None
    start: Path | None = None
    compiled: bool = False
    graphed: bool = False
    device: str = "cpu"
    ranks: Axis = ALONE.world

    @property
    def half(self) -> torch.dtype:
        """The bf16 dtype on a GPU, float32 elsewhere."""
        return torch.bfloat16 if torch.device(self.device).type == "cuda" else torch.float32

    def mixed_precision(self) -> torch.autocast:
        """Autocast to bf16 on a GPU, without its cache of weights: a CUDA graph would keep it."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)

    def seeds(self, clips: int) -> range:
        """This process's share of the clips to train on."""
        return range(clips)[self.ranks.rank :: self.ranks.count]

    def held_out(self, most: int, clips: int) -> range:
        """Clips that steer training, at most as many as it has."""
        return range(sizes.HELD_OUT, sizes.HELD_OUT + min(clips, most))

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled for the one shape of all batches if --compile is set."""
        return torch.compile(function, dynamic=False) if self.compiled else function

    def network(
        self, kind: Callable[[Any], nn.Module], config: Hashable, stored: Network[Any] | None
    ) -> Any:
        """Float32 network to train, with fresh weights or those of a file."""
        if stored is not None:
            return stored.read(self.device, torch.float32).requires_grad_(True)
        model = kind(config)
        draw_weights(model)
        return model.to(self.device)

    def loop(self, steps: int, rate: float, *, warmup: int = 200, **options: Any) -> LoopConfig:
        """Length, optimizer and log of a run, by default of so many steps at this peak rate."""
        steps, peak = self.steps or steps, self.rate or rate
        decay = Cosine(peak=peak, warmup=warmup, decay=steps, floor=peak / 100, early=True)
        return LoopConfig(steps=steps, rate=decay, graphed=self.graphed, **options)

    def train(self, model: nn.Module, objective: Objective, config: LoopConfig) -> int:
        """Train, leave the averaged weights in the model; the number of steps done."""
        done, average = fit(
            model, objective, config, self.folder, seconds=self.seconds, ranks=self.ranks
        )
        if average:
            for name, parameter in trainable(model).items():
                parameter.data.copy_(average.values[name])
        return done

    def report(self, figures: dict[str, Any]) -> None:
        """Write and log the run's result."""
        (self.folder / "result.json").write_text(json.dumps(figures))
        log.info("%s", figures)


def recipe(*options: Option) -> Callable[[Callable[..., None]], click.Command]:
    """Command of a recipe: called with a `Run` of the common options, and its own options."""

    def command(function: Callable[..., None]) -> click.Command:
        def start(**values: Any) -> None:
            common = {f.name: values.pop(f.name) for f in fields(Run) if f.name in values}
            if common["graphed"] and torch.device(common["device"]).type != "cuda":
                raise click.UsageError(f"--graph needs a GPU, not --device {common['device']}")
            ranks = job.join(torch.device(common["device"]))
            common |= {"ranks": ranks, "device": str(ranks.device)}
            if ranks.device.index is not None:
                torch.cuda.set_device(ranks.device)  # a graph is recorded on the current device
            if not ranks.first:  # one logs for all
                logging.getLogger("tiny").setLevel(logging.WARNING)
            function(Run(**common), **values)
            job.leave()

        for option in reversed((*_COMMON, *options)):  # the last one added is listed first
            start = option(start)
        return click.command(function.__name__, help=function.__doc__)(start)

    return command
