"""The training loop, for any objective."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from worldline.parallel.ranks import ALONE, Ranks
from worldline.train.checkpoint import load_state, save_state
from worldline.train.optim import (
    Average,
    clip_gradients,
    make_optimizer,
    set_learning_rate,
    warmup_cosine,
)

log = logging.getLogger(__name__)

_WARM_UPS = 3  # passes before a graph is recorded: libraries and compilers set themselves up


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run minimises.

    Attributes:
        draw: step -> the tensors of its batch, a function of the step alone; of the same shapes
            and on the module's device at every step.
        loss: (*batch) -> the loss, and figures to log.
        watch: () -> further figures, of clips that are held out; None where there are none.
        watch_every: steps between them.
    """

    draw: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    watch: Callable[[], dict[str, Tensor]] | None = None
    watch_every: int = 1000


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a run goes.

    Attributes:
        steps: of the whole run; the step size falls to its end.
        learning_rate: the peak.
        warmup: steps of linear rise.
        weight_decay: of matrices and kernels.
        betas: of AdamW.
        orthogonal: patterns of the names of matrices that Muon trains in its place.
        clip: largest norm of the gradient.
        average_decay: of the averaged weights.
        log_every: steps between lines of `log.jsonl`; figures of held-out clips have lines too.
        save_every: steps between saved states.
        graphed: record a step as one CUDA graph. A small model's step is otherwise bound by the
            launches of its many small kernels.
    """

    steps: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    orthogonal: tuple[str, ...] = ()
    clip: float = 1.0
    average_decay: float = 0.999
    log_every: int = 50
    save_every: int = 1000
    graphed: bool = False


def fit(
    module: nn.Module,
    objective: Objective,
    config: LoopConfig,
    folder: Path,
    *,
    seconds: float | None = None,
    ranks: Ranks = ALONE,
) -> tuple[int, Average]:
    """Train `module` in place, from the state in `folder` if there is one.

    A run cut anywhere and started again gives the same weights as one that was not cut.
    Returns the number of steps done, and the averaged weights.

    Args:
        module: its parameters are float32; they are what the objective's loss depends on.
        objective: draws its batch from the step number alone.
        config: of the whole run.
        folder: states and `log.jsonl`.
        seconds: stop (and save) after this time, counted from the call; the next call goes on.
        ranks: processes that train together: gradients are averaged over them, the first saves and
            logs. Their modules start equal, their objectives draw different batches.
    """
    entered = time.monotonic()
    optimizer = make_optimizer(
        module,
        betas=config.betas,
        weight_decay=config.weight_decay,
        orthogonal=config.orthogonal,
    )
    average = Average(module, config.average_decay)
    first = step = load_state(folder, module, average, optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    module.train()
    update = _Update(module, objective, config, optimizer, average, ranks)
    advance = update.recorded(objective.draw(step)) if config.graphed else update
    started = time.monotonic()
    with (folder / "log.jsonl").open("a") as lines:
        while step < config.steps:
            rate = warmup_cosine(
                step,
                peak=config.learning_rate,
                warmup=config.warmup,
                total=config.steps,
                final=config.learning_rate / 100,
            )
            set_learning_rate(optimizer, rate)
            average.set_weight(step + 1)
            told = advance(*objective.draw(step))
            step += 1
            logged = step % config.log_every == 0 or step == config.steps
            watched = objective.watch is not None and step % objective.watch_every == 0
            if (logged or watched) and ranks.first:
                figures = dict(told.figures)
                if watched and objective.watch is not None:
                    figures |= objective.watch()
                line = {name: round(float(value), 5) for name, value in figures.items()}
                line |= {"loss": round(told.loss.item(), 5), "norm": round(told.norm.item(), 4)}
                elapsed = time.monotonic() - started
                line |= {"step": step, "rate": rate, "steps_per_second": (step - first) / elapsed}
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                log.info("%s", line)
            out_of_time = seconds is not None and time.monotonic() - entered > seconds
            if ranks.count > 1:  # all stop at one step; asking each step would wait for the device
                out_of_time = logged and ranks.any(out_of_time, told.loss.device)
            saved = step % config.save_every == 0 or step == config.steps or out_of_time
            if saved and ranks.first:
                save_state(folder, step, module, average, optimizer)
            if out_of_time:
                break
    return step, average


class _Told(NamedTuple):
    """What a step says of itself, tensors of shape ()."""

    loss: Tensor
    norm: Tensor
    figures: dict[str, Tensor]


class _Update:
    """One step: the loss of a batch, its gradients over all processes, weights and averages."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        config: LoopConfig,
        optimizer: torch.optim.Optimizer,
        average: Average,
        ranks: Ranks,
    ) -> None:
        self.module, self.objective, self.limit = module, objective, config.clip
        self.optimizer, self.average, self.ranks = optimizer, average, ranks
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def __call__(self, *batch: Tensor) -> _Told:
        loss, figures = self._gradients(*batch)
        norm = clip_gradients(self.parameters, self.limit)
        self.optimizer.step()
        self.average.update(self.module)
        return _Told(loss.detach(), norm, figures)

    def _gradients(self, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = self.objective.loss(*batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.ranks.average(p.grad for p in self.parameters if p.grad is not None)
        return loss, figures

    def recorded(self, batch: tuple[Tensor, ...]) -> Callable[..., _Told]:
        """Return the same step as one CUDA graph, recorded with tensors like those of `batch`."""
        held = tuple(tensor.clone() for tensor in batch)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # no weight changes before the first real step
            for _ in range(_WARM_UPS):
                self._gradients(*held)
            self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # other threads of the process, NCCL's among them, may call CUDA while this one records
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            told = self(*held)

        def replay(*batch: Tensor) -> _Told:
            for place, tensor in zip(held, batch, strict=True):
                place.copy_(tensor)
            graph.replay()
            return told

        return replay


def generator(
    seed: int, step: int, device: torch.device | str = "cpu", *, rank: int = 0, stream: int = 0
) -> torch.Generator:
    """Return the source of randomness of one step of one process; equal arguments draw equally.

    What is drawn from two streams of a step has nothing to do with each other.
    """
    spawned = (stream,) if stream else ()
    # a CPU's generator looks at 32 bits of its seed
    mixed = np.random.SeedSequence((rank, seed, step), spawn_key=spawned).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(mixed))
