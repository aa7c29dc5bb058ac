"""The training loop, for any objective."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from worldline.parallel.ranks import ALONE, Ranks
from worldline.train.checkpoint import load_state, save_state
from worldline.train.optim import Average, clip_gradients, make_adamw, warmup_cosine

log = logging.getLogger(__name__)

# (step) -> loss to differentiate, and figures to log; the batch is a function of the step alone
Objective = Callable[[int], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a run goes.

    Attributes:
        steps: of the whole run; the step size falls to its end.
        learning_rate: the peak.
        warmup: steps of linear rise.
        weight_decay: of matrices and kernels.
        betas: of AdamW.
        clip: largest norm of the gradient.
        average_decay: of the averaged weights.
        log_every: steps between lines of `log.jsonl`.
        save_every: steps between saved states.
    """

    steps: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    average_decay: float = 0.999
    log_every: int = 50
    save_every: int = 1000


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
        seconds: stop (and save) after this time; the next call goes on.
        ranks: processes that train together: gradients are averaged over them, the first saves and
            logs. Their modules start equal, their objectives draw different batches.
    """
    started = time.monotonic()
    optimizer = make_adamw(module, betas=config.betas, weight_decay=config.weight_decay)
    average = Average(module, config.average_decay)
    first = step = load_state(folder, module, average, optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    module.train()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with (folder / "log.jsonl").open("a") as lines:
        while step < config.steps:
            rate = warmup_cosine(
                step,
                peak=config.learning_rate,
                warmup=config.warmup,
                total=config.steps,
                final=config.learning_rate / 100,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, figures = objective(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            ranks.average(p.grad for p in parameters if p.grad is not None)
            norm = clip_gradients(module.parameters(), config.clip)
            optimizer.step()
            step += 1
            average.update(module, step)
            told = step % config.log_every == 0 or step == config.steps
            if told and ranks.first:
                line = {name: round(float(value), 5) for name, value in figures.items()}
                line |= {"loss": round(loss.item(), 5), "norm": round(norm.item(), 4)}
                elapsed = time.monotonic() - started
                line |= {"step": step, "rate": rate, "steps_per_second": (step - first) / elapsed}
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                log.info("%s", line)
            out_of_time = seconds is not None and time.monotonic() - started > seconds
            if ranks.count > 1:  # all stop at one step; asking each step would wait for the device
                out_of_time = told and ranks.any(out_of_time, parameters[0].device)
            saved = step % config.save_every == 0 or step == config.steps or out_of_time
            if saved and ranks.first:
                save_state(folder, step, module, average, optimizer)
            if out_of_time:
                break
    return step, average


def generator(
    seed: int, step: int, device: torch.device | str = "cpu", *, rank: int = 0
) -> torch.Generator:
    """Return the source of randomness of one step of one process; equal arguments draw equally."""
    # a CPU's generator looks at 32 bits of its seed
    mixed = np.random.SeedSequence((rank, seed, step)).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(mixed))
