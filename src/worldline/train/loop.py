"""The training loop, for any objective."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.parallel.mesh import ALONE, Axis
from worldline.train.optim import Average, make_optimizer, warmup_cosine
from worldline.weights.checkpoint import open_checkpoint, save

log = logging.getLogger(__name__)

Figures = dict[str, Tensor]  # of shape ()
STATE = "state.safetensors"  # all that a killed run needs to go on bit for bit
_WARM_UPS = 3  # passes before a graph is recorded: libraries and compilers set themselves up


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run minimises.

    Attributes:
        draw: step -> tensors of its batch, a function of the step alone; of the same shapes and on
            the module's device at every step.
        loss: (*batch) -> the loss, and figures for the log.
        watch: () -> further figures, of held-out clips, every `watch_every` steps.
    """

    draw: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[..., tuple[Tensor, Figures]]
    watch: Callable[[], Figures] | None = None
    watch_every: int = 1000


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length, optimizer and log of a run.

    Attributes:
        orthogonal: patterns of the names of matrices that Muon trains in AdamW's place.
        log_every: steps between lines of `log.jsonl`; held-out figures have lines too.
        graphed: record a step as one CUDA graph. The step of a small model is otherwise bound by
            the launches of its many small kernels.
    """

    steps: int  # length of the whole run; the learning rate falls to its end
    learning_rate: float  # its peak
    warmup: int = 200  # steps of linear rise
    weight_decay: float = 0.01  # of matrices and kernels
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW's
    orthogonal: tuple[str, ...] = ()
    clip: float = 1.0  # largest norm of the gradient
    average_decay: float = 0.999  # of the averaged weights
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
    ranks: Axis = ALONE.world,
) -> tuple[int, Average]:
    """Train `module` in place, from the state in `folder` if there is one.

    A run cut anywhere and started again gives the same weights as one that was not cut.

    Args:
        module: float32; the objective's loss depends on its parameters.
        objective: draws its batch from the step number alone.
        config: of the whole run.
        folder: states and `log.jsonl`.
        seconds: stop (and save) after this time, counted from the call; the next call goes on.
        ranks: processes that train together: gradients are averaged over them, the first saves and
            logs. Their modules start equal, their objectives draw different batches.

    Returns:
        The number of steps done, and the averaged weights.
    """
    entered = time.monotonic()
    optimizer = make_optimizer(
        module, betas=config.betas, weight_decay=config.weight_decay, orthogonal=config.orthogonal
    )
    average = Average(module, config.average_decay)
    state = _state(module, average, optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    first = step = _restore(state, folder / STATE)
    module.train()
    parameters = [*average.parameters.values()]

    def backward(*batch: Tensor) -> Figures:
        loss, figures = objective.loss(*batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        ranks.average(p.grad for p in parameters if p.grad is not None)
        return {**figures, "loss": loss.detach()}

    def update(*batch: Tensor) -> Figures:
        figures = backward(*batch)
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        average.update()
        return {**figures, "norm": norm}

    advance = update
    if config.graphed:
        advance = _recorded(backward, update, optimizer, objective.draw(step))
    with (folder / "log.jsonl").open("a") as lines:
        while step < config.steps:
            rate = warmup_cosine(
                step, peak=config.learning_rate, warmup=config.warmup, total=config.steps
            )
            optimizer.defaults["lr"].fill_(rate)
            average.set_weight(step + 1)
            figures = advance(*objective.draw(step))
            step += 1
            last = step == config.steps
            logged = last or step % config.log_every == 0
            watch = None if step % objective.watch_every else objective.watch
            seconds_done = time.monotonic() - entered
            if (logged or watch) and ranks.first:
                figures = figures | (watch() if watch else {})
                line = {name: round(float(value), 5) for name, value in figures.items()}
                speed = (step - first) / seconds_done
                line |= {"step": step, "rate": rate, "steps_per_second": speed}
                print(json.dumps(line), file=lines, flush=True)
                log.info("%s", line)
            late = seconds is not None and seconds_done > seconds
            if ranks.count > 1:  # all stop at one step; asking each step would wait for the device
                late = logged and ranks.any(late)
            if ranks.first and (last or late or step % config.save_every == 0):
                save(state, folder / STATE, {"step": step})
            if late:
                break
    return step, average


def _state(
    module: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Tensors that a run changes in place: weights, averages and moments, by kind and parameter."""
    state = {f"average/{name}": value for name, value in average.values.items()}
    for name, parameter in module.named_parameters():
        state[f"weights/{name}"] = parameter.detach()
        moments = optimizer.state.get(parameter, {})
        state |= {f"{kind}/{name}": moment for kind, moment in moments.items()}
    return state


def _restore(state: dict[str, Tensor], path: Path) -> int:
    """Read the state that a run has saved; the number of steps done, 0 in a new folder."""
    if not path.exists():
        return 0
    stored = open_checkpoint(path)
    shapes = {name: (*info.shape,) for name, info in stored.tensors.items()}
    if {name: (*tensor.shape,) for name, tensor in state.items()} != shapes:
        raise CheckpointError(
            f"{path} is the state of another model or optimizer; choose another folder"
        )
    for name, tensor in state.items():
        tensor.copy_(stored.read(name))
    return int(stored.metadata["step"])


def _recorded(
    backward: Callable[..., Figures],
    update: Callable[..., Figures],
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, ...],
) -> Callable[..., Figures]:
    """`update` as one CUDA graph, recorded with tensors like those of `batch`."""
    inputs = tuple(tensor.clone() for tensor in batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # no weight changes before the first real step
        for _ in range(_WARM_UPS):
            backward(*inputs)
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads of the process, NCCL's among them, may call CUDA while this one records
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        figures = update(*inputs)

    def replay(*batch: Tensor) -> Figures:
        for place, tensor in zip(inputs, batch, strict=True):
            place.copy_(tensor)
        graph.replay()
        return figures

    return replay


def generator(
    seed: int, step: int, device: torch.device | str = "cpu", *, rank: int = 0, stream: int = 0
) -> torch.Generator:
    """Random numbers of one step of one process; two streams of a step are independent."""
    # a CPU's generator looks at 32 bits of its seed
    mixed = np.random.SeedSequence((rank, seed, step), spawn_key=(stream,) if stream else ())
    return torch.Generator(device).manual_seed(int(mixed.generate_state(1)[0]))
