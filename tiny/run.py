"""What the commands that train small worlds share."""

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

from worldline.parallel.ranks import ALONE, Ranks, join, leave
from worldline.text.t5 import T5Encoder
from worldline.train.loop import LoopConfig, Objective, fit

log = logging.getLogger(__name__)

_EMBEDDED_TOGETHER = 1024  # captions


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all commands are told; None takes the command's own default."""

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

    def share(self, seeds: range) -> range:
        """Return this process's part of the clips."""
        return seeds[self.ranks.rank :: self.ranks.count]

    def compiled_if_asked(self, measure: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of tensors, compiled for the one shape of all batches if asked."""
        return torch.compile(measure, dynamic=False) if self.compiled else measure

    def train(self, model: nn.Module, objective: Objective, config: LoopConfig) -> int:
        """Train, give the model its averaged weights, and return the number of steps done."""
        done, average = fit(
            model, objective, config, self.folder, seconds=self.seconds, ranks=self.ranks
        )
        average.swap(model)
        return done

    def tell(self, figures: dict[str, Any]) -> None:
        """Write and log what came of the run."""
        (self.folder / "result.json").write_text(json.dumps(figures))
        log.info("%s", figures)


@contextmanager
def running(options: dict[str, Any]) -> Iterator[Run]:
    """Meet the other processes, where there are any, and part from them at the end."""
    if options["graphed"] and torch.device(options["device"]).type != "cuda":
        raise click.UsageError(f"--graph needs a GPU, not --device {options['device']}")
    ranks, device = join(options["device"])
    if not ranks.first:  # one tells of its clips for all
        logging.getLogger("tiny").setLevel(logging.WARNING)
    yield Run(**{**options, "device": device, "ranks": ranks})
    leave(ranks)


@torch.no_grad()
def embed_captions(text: T5Encoder, captions: Sequence[str]) -> Tensor:
    """Return the embeddings of captions (N, S, E), many at a time: a request takes one by one."""
    ids, mask = text.tokenize(captions)
    parts = zip(ids.split(_EMBEDDED_TOGETHER), mask.split(_EMBEDDED_TOGETHER), strict=True)
    return torch.cat([text.embed(*part) for part in parts])


def half_precision(device: str) -> torch.dtype:
    """Return bf16 where it is fast."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def mixed_precision(device: str) -> torch.autocast:
    """bf16 where it is fast; no cache of cast weights, which a CUDA graph would keep for ever."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)
