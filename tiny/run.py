"""What the commands that train tiny worlds share."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from tiny import sizes
from worldline.parallel.ranks import ALONE, Ranks, join, leave
from worldline.text.t5 import T5Encoder
from worldline.train.loop import LoopConfig, Objective, fit

log = logging.getLogger(__name__)

_EMBEDDED_TOGETHER = 1024  # captions


@dataclass(frozen=True, kw_only=True)
class Run:
    """Options of all commands; None is the command's own default."""

    folder: Path
    steps: int | None
    batch: int | None
    clips: int | None
    seconds: float | None
    workers: int
    seed: int
    rate: float | None
    compiled: bool
    graphed: bool
    device: str
    ranks: Ranks = ALONE

    def seeds(self, clips: int) -> range:
        """This process's share of the clips to train on."""
        return range(clips)[self.ranks.rank :: self.ranks.count]

    def held_out(self, most: int, clips: int) -> range:
        """Clips that steer training, at most as many as it has."""
        return range(sizes.HELD_OUT, sizes.HELD_OUT + min(clips, most))

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled for the one shape of all batches if --compile is set."""
        return torch.compile(function, dynamic=False) if self.compiled else function

    def train(self, model: nn.Module, objective: Objective, config: LoopConfig) -> int:
        """Train, leave the averaged weights in the model; the number of steps done."""
        done, average = fit(
            model, objective, config, self.folder, seconds=self.seconds, ranks=self.ranks
        )
        average.swap(model)
        return done

    def report(self, figures: dict[str, Any]) -> None:
        """Write and log the run's result."""
        (self.folder / "result.json").write_text(json.dumps(figures))
        log.info("%s", figures)


@contextmanager
def running(options: dict[str, Any]) -> Iterator[Run]:
    """A run in its group of processes, which it leaves at the end."""
    if options["graphed"] and torch.device(options["device"]).type != "cuda":
        raise click.UsageError(f"--graph needs a GPU, not --device {options['device']}")
    ranks, device = join(options["device"])
    if not ranks.first:  # one logs for all
        logging.getLogger("tiny").setLevel(logging.WARNING)
    yield Run(**{**options, "device": device, "ranks": ranks})
    leave(ranks)


@torch.no_grad()
def embed_captions(text: T5Encoder, captions: Sequence[str]) -> Tensor:
    """Context of captions (N, S, E), many at a time."""
    ids, mask = text.tokenize(captions)
    parts = zip(ids.split(_EMBEDDED_TOGETHER), mask.split(_EMBEDDED_TOGETHER), strict=True)
    return torch.cat([text.embed(*part) for part in parts])


def half_precision(device: str) -> torch.dtype:
    """The bf16 dtype on a GPU, float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def mixed_precision(device: str) -> torch.autocast:
    """Autocast to bf16 on a GPU; without the cache of weights, which a CUDA graph would keep."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)
