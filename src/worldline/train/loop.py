"""The training loop, for any objective, on one process or on many.

It knows a module, batches by their numbers and a loss; what is trained, of what, and where its
files go is its caller's. A state holds all that the next step depends on.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from worldline.errors import NonFiniteError
from worldline.parallel.mesh import ALONE, Axis
from worldline.train.files import Checkpoints
from worldline.train.optim import Average, Decay, Rate, Rising, make_optimizer, trainable
from worldline.train.sharding import Sharded, local
from worldline.train.states import States

log = logging.getLogger(__name__)

Figures = dict[str, Tensor]  # of shape ()
Writer = Callable[[int, Mapping[str, float]], None]  # of a step's figures
_WARM_UPS = 3  # passes before a graph is recorded: libraries and compilers set themselves up


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run minimises.

    Attributes:
        draw: number of a batch, from 0 -> its tensors, on the module's device; a graph needs the
            same shapes at every step. What it draws follows from the number and the position.
        loss: (*batch) -> the loss, and figures for the log.
        watch: () -> further figures, of held-out clips, every `watch_every` steps; in the first
            process, or in all where these share the module.
        sample: steps done -> nothing; makes videos with the averaged weights where these are kept,
            every `sample_every` steps and at the end, in the processes of `watch`.
        position: () -> where the data stands, as JSON, beside the number of the next batch.
        restore: a position -> the data stands there.
        named: number of a batch -> words for what it holds.
        speed: steps a second -> further figures, such as clips a second.
    """

    draw: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[..., tuple[Tensor, Figures]]
    watch: Callable[[], Figures] | None = None
    watch_every: int = 1000
    sample: Callable[[int], None] | None = None
    sample_every: int = 1000
    position: Callable[[], dict[str, Any]] = dict
    restore: Callable[[dict[str, Any]], None] = lambda position: None
    named: Callable[[int], str] = lambda number: f"batch {number}"
    speed: Callable[[float], dict[str, float]] = lambda rate: {}


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length, optimizer and log of a run.

    Attributes:
        steps: length of the whole run.
        rate: learning rate by step.
        weight_decay: of matrices and kernels, of all parameters with `decay_all`.
        orthogonal: patterns of the names of matrices that Muon trains in AdamW's place.
        clip: largest norm of the gradient.
        average: decay of the averaged weights; None keeps none.
        accumulate: batches of a step.
        log_every: steps between lines of `log.jsonl`; held-out figures have lines too.
        keep_last: states that are kept, the newest; further ones of every `keep_every` steps.
        graphed: record a step as one CUDA graph. The step of a small model is otherwise bound by
            the launches of its many small kernels.
        bar: draw a progress bar on standard error.
    """

    steps: int
    rate: Rate
    weight_decay: float = 0.01
    decay_all: bool = False
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    orthogonal: tuple[str, ...] = ()
    clip: float = 1.0
    average: Decay | None = field(default_factory=lambda: Rising(0.999))
    accumulate: int = 1
    log_every: int = 50
    save_every: int = 1000
    keep_last: int = 1
    keep_every: int = 0
    graphed: bool = False
    bar: bool = False


def fit(
    module: nn.Module,
    objective: Objective,
    config: LoopConfig,
    folder: Path,
    *,
    seconds: float | None = None,
    ranks: Axis = ALONE.world,
    sharded: Sharded | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[int, Average | None]:
    """Train `module` in place, from the newest state in `folder` if there is one.

    A run cut anywhere and started again gives the same weights as one that was not cut.

    Args:
        module: of weights in the optimizer's precision; the loss depends on its parameters.
        objective: draws its batches.
        config: of the whole run.
        folder: states and `log.jsonl`.
        seconds: stop (and save) after this time, counted from the call; the next call goes on.
        ranks: processes that train together; the first logs. Their modules start equal, their
            objectives draw different batches, and without `sharded` gradients are averaged here.
        sharded: how they share the module.
        stopping: whether to stop (and save) after this step, asked after each.

    Returns:
        The number of steps done, and the averaged weights.

    Raises:
        NonFiniteError: the loss or a gradient is; the batches are named.
        CheckpointError: the state is of another model or optimizer.
    """
    return Run(module, objective, config, folder, ranks, sharded).go(seconds, stopping)


class Run:
    """A module, its optimizer and averages, and the states on disk.

    Attributes:
        parameters: what this process holds of each parameter that is trained, by name.
        step: steps done.
        files: of the model, which are written with each state; None writes none.
        begin: fills the state of a run that has none yet; the steps that it has done.
        with_state: whether states are written.
        writers: of figures, beside the log.
    """

    files: Checkpoints | None
    with_state: bool

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        config: LoopConfig,
        folder: Path,
        ranks: Axis,
        sharded: Sharded | None,
    ) -> None:
        self.module, self.objective, self.config = module, objective, config
        self.folder, self.ranks, self.sharded = folder, ranks, sharded
        self.whole = trainable(module)
        self.parameters = {name: _held(parameter) for name, parameter in self.whole.items()}
        self.optimizer = make_optimizer(
            self.parameters,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            decay_all=config.decay_all,
            orthogonal=config.orthogonal,
        )
        self.average = config.average and Average(self.parameters, config.average)
        self.states = States(folder, ranks, config.keep_last, config.keep_every)
        self.step, self.files, self.with_state = 0, None, True
        self.begin: Callable[[Mapping[str, Tensor]], int] = lambda state: 0
        self.writers: list[Writer] = []
        device = next(iter(self.parameters.values())).device
        # on the device, where a graph finds them: this step, the first one that is not finite
        self.now, self.failed = torch.full((2,), -1, device=device).unbind()

    def state(self) -> dict[str, Tensor]:
        """Tensors that a run changes in place: weights, averages and moments, by kind and name."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.whole.items():
            kinds = self._kinds(name).items()
            state |= {f"{kind}/{name}": _spread(value, parameter) for kind, value in kinds}
        return state

    def restore(self) -> None:
        """Go back to the newest state or, without one, to what the run begins with."""
        steps = self.states.steps()
        if self.files and self.ranks.first:
            self.files.sweep(steps[-1] if steps else None)
        if steps:
            facts = self.states.restore(steps[-1], self.state())
            self.step = steps[-1]
            self.objective.restore(facts["position"])
            if self.ranks.first:
                log.info("%s: going on from step %d", self.states.path(self.step), self.step)
        else:
            self.step = self.begin(self.state())

    def keep(self, files: Checkpoints, with_state: bool) -> None:
        """Write a model's files with each state, or without."""
        self.files, self.with_state = files, with_state
        self.states.written, self.states.removed = files.name, files.remove

    def whole_tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the whole module by name, one at a time, in all processes.

        They are its weights, frozen ones too; or, of what is trained, averages or moments.
        """
        for name, parameter in self.module.named_parameters():
            value = parameter.detach()
            if kind != "weights":
                if name not in self.parameters:
                    continue
                value = _spread(self._kinds(name)[kind], parameter)
            yield name, value.full_tensor() if isinstance(value, DTensor) else value

    def _kinds(self, name: str) -> dict[str, Tensor]:
        """What this process keeps of a parameter that is trained, by kind."""
        parameter = self.parameters[name]
        kinds = {"weights": parameter.detach()}
        if self.average:
            kinds["average"] = self.average.values[name]
        return kinds | self.optimizer.state.get(parameter, {})

    def check_room(self) -> None:
        """Refuse to go on where the disk has no room for a state and the files beside it."""
        beside = 0
        if self.files and self.ranks.first:
            beside = self.files.nbytes({n: p.numel() for n, p in self.module.named_parameters()})
        self.states.check_room(self.state() if self.with_state else {}, beside)

    def _save(self) -> None:
        self.check_room()
        facts = {"position": self.objective.position()}
        write: Callable[[], None] = lambda: None  # noqa: E731
        if self.files:
            writes = self.sharded is None or self.sharded.mesh["dp"].get_local_rank() == 0
            write = self.files.gather(self.step, self.whole_tensors, writes)
        self.states.save(self.step, self.state() if self.with_state else None, facts, write)

    def go(self, seconds: float | None, stopping: Callable[[], bool]) -> tuple[int, Average | None]:
        entered, config, objective = time.monotonic(), self.config, self.objective
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.restore()
        self.module.train()
        first, advance, aside = self.step, self._advance, 0.0  # seconds of videos
        if config.graphed:
            advance = self._recorded(objective.draw(self.step))
        # the first process writes for all
        path = self.folder / "log.jsonl"
        lines: Any = nullcontext(None)
        hidden = not (config.bar and self.ranks.first)
        bar = _Bar(total=config.steps, initial=first, unit="step", leave=False, disable=hidden)
        if self.ranks.first:
            lines = _lines(path, config.steps, self.writers, bar)
        with bar, lines as write, self.states.finished():
            while self.step < config.steps:
                self.now.fill_(self.step)
                self.optimizer.defaults["lr"].fill_(rate := config.rate(self.step))
                if self.average:
                    self.average.set_weight(self.step + 1)
                numbers = range(self.step * config.accumulate, (self.step + 1) * config.accumulate)
                figures = advance(*map(objective.draw, numbers))
                self.step += 1
                bar.update()
                last = self.step == config.steps
                logged = last or self.step % config.log_every == 0
                watch = None if self.step % objective.watch_every else objective.watch
                seconds_done = time.monotonic() - entered
                if logged or watch:
                    self.states.check()
                    self._check_finite()
                    if watch and (self.sharded or self.ranks.first):
                        figures = figures | watch()
                        self._reshard()
                    figures = self._averaged(figures)
                if (logged or watch) and write is not None:
                    speed = (self.step - first) / (seconds_done - aside)
                    facts = {"step": self.step, "rate": rate, "steps_per_second": speed}
                    write({**figures, **facts, **objective.speed(speed)})
                late = stopping() or (seconds is not None and seconds_done > seconds)
                if self.ranks.count > 1:  # all stop at one step, to ask which is to wait for others
                    late = (logged or self.sharded is not None) and self.ranks.any(late)
                if late and write is not None:
                    log.info("stopping at step %d, which is saved", self.step)
                if last or late or self.step % config.save_every == 0:
                    self._check_finite()
                    self._save()
                due = not late and (last or self.step % objective.sample_every == 0)
                if objective.sample and due and (self.sharded or self.ranks.first):
                    self._check_finite()
                    begun = time.monotonic()
                    bar.clear()
                    with self.averaged():
                        objective.sample(self.step)
                    aside += time.monotonic() - begun
                if late:
                    break
        return self.step, self.average

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module computes with the averaged weights, where these are kept; nothing changes."""
        averages = self.average.values if self.average else {}
        newest = {name: self.parameters[name].detach().to("cpu", copy=True) for name in averages}
        try:
            self._fill(averages)
            yield
        finally:  # from copies: averages do not fit into weights of another precision
            self._fill(newest)

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        """Set weights to other ones."""
        for name, value in values.items():
            self.parameters[name].data.copy_(value)
        self._reshard()

    def _reshard(self) -> None:
        """Drop weights that a forward without gradients leaves gathered: others are to be read."""
        if self.sharded:
            self.sharded.module.reshard()  # type: ignore[operator]

    def _advance(self, *batches: tuple[Tensor, ...]) -> Figures:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.whole.values():
            parameter.grad = None
        parts = [self._backward(*batch) for batch in batches]
        return {**_means(parts), **self._update()}

    def _backward(self, *batch: Tensor) -> Figures:
        loss, figures = self.objective.loss(*batch)
        (loss / self.config.accumulate).backward()
        return {**figures, "loss": loss.detach()}

    def _update(self) -> Figures:
        gradients = [p.grad for p in self.whole.values() if p.grad is not None]
        if self.sharded is None:
            self.ranks.average(gradients)
            norm = nn.utils.clip_grad_norm_([*self.whole.values()], self.config.clip)
        else:
            self.sharded.sum_partial_gradients()
            norm = self.sharded.clip(self.config.clip)
        bad = (self.failed < 0) & ~norm.isfinite()
        self.failed.copy_(torch.where(bad, self.now, self.failed))
        for name, parameter in self.parameters.items():
            if parameter is not (whole := self.whole[name]) and whole.grad is not None:
                parameter.grad = local(whole.grad)
        self.optimizer.step()
        if self.average:
            self.average.update()
        return {"norm": norm}

    def _averaged(self, figures: Figures) -> Figures:
        """Figures of all processes that train together, whose batches differ."""
        if self.sharded is None:
            return figures
        values = {name: value.detach().float().clone() for name, value in figures.items()}
        self.ranks.average(values.values())
        return values

    def _check_finite(self) -> None:
        """Stop a run that diverged; waits for the device."""
        if (step := int(self.failed)) < 0:
            return
        count = self.config.accumulate
        numbers = range(step * count, (step + 1) * count)
        every = self.ranks.every([*map(self.objective.named, numbers)])
        batches = ", ".join(name for names in every for name in names)
        self.states.wait()  # for the last one, which is finite
        saved = self.states.steps()
        since = f"the state of step {saved[-1]} is kept" if saved else "no state was saved"
        raise NonFiniteError(
            f"step {step + 1}: a gradient is not finite (NaN or infinity) in {batches}; lower the "
            f"learning rate or remove the clip; {since}"
        )

    def _recorded(self, batch: tuple[Tensor, ...]) -> Callable[..., Figures]:
        """`_advance` as one CUDA graph, recorded with tensors like those of `batch`."""
        inputs = tuple(tensor.clone() for tensor in batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # no weight changes before the first real step
            for _ in range(_WARM_UPS):
                self.optimizer.zero_grad(set_to_none=True)
                self._backward(*inputs)
                self.ranks.average([p.grad for p in self.whole.values() if p.grad is not None])
            self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads of the process, NCCL's among them, may call CUDA while this one records
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            figures = self._advance(inputs)

        def replay(batch: tuple[Tensor, ...]) -> Figures:
            for place, tensor in zip(inputs, batch, strict=True):
                place.copy_(tensor)
            graph.replay()
            return figures

        return replay


class _Bar(tqdm):  # type: ignore[type-arg]
    """Progress bar without a thread that watches bars, which those of a caller keep."""

    monitor_interval = 0


def _held(parameter: nn.Parameter) -> nn.Parameter:
    """What this process holds of a parameter, sharing its memory."""
    return nn.Parameter(local(parameter.detach())) if isinstance(parameter, DTensor) else parameter


def _spread(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A tensor of which processes hold the same shares as of a parameter."""
    if not isinstance(parameter, DTensor) or value.shape != local(parameter).shape:
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _means(parts: list[Figures]) -> Figures:
    """Figures of a step of several batches."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}


@contextmanager
def _lines(
    path: Path, steps: int, writers: Sequence[Writer], bar: _Bar
) -> Iterator[Callable[..., None]]:
    """Writes figures as lines of JSON to a file, to further writers, and in words above a bar."""

    def write(figures: Mapping[str, Any]) -> None:
        line = {
            name: round(float(value), 5) if isinstance(value, Tensor) else value
            for name, value in figures.items()
        }
        print(json.dumps(line), file=file, flush=True)
        for writer in writers:
            writer(int(line["step"]), line)
        bar.clear()
        log.info("%s", in_words(line, steps))
        bar.refresh()

    with path.open("a") as file:
        yield write


def in_words(figures: Mapping[str, float], steps: int) -> str:
    """A line about a step: step 20 of 1,000: loss 1.23, norm 0.5, …; 1.3 s a step, 21 min left."""
    step, speed = int(figures["step"]), figures["steps_per_second"]
    hidden = ("step", "steps_per_second", "clips_per_second")
    parts = ", ".join(f"{n} {value:.4g}" for n, value in figures.items() if n not in hidden)
    left = (steps - step) / speed if speed else math.inf
    rest = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
    return f"step {step:,} of {steps:,}: {parts}; {1 / speed:.3g} s a step, {rest} left"


def generator(
    seed: int, step: int, device: torch.device | str = "cpu", *, rank: int = 0, stream: int = 0
) -> torch.Generator:
    """Random numbers of one step of one process; two streams of a step are independent."""
    # a CPU's generator looks at 32 bits of its seed
    mixed = np.random.SeedSequence((rank, seed, step), spawn_key=(stream,) if stream else ())
    return torch.Generator(device).manual_seed(int(mixed.generate_state(1)[0]))
