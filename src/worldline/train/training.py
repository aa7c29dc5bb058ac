"""A run of an experiment: the model is read, and the loop begins."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

from worldline.errors import InputError
from worldline.family import Compute, Parts
from worldline.nn.modulation import fused
from worldline.train.boards import Boards, open_boards
from worldline.train.data.loader import Loader
from worldline.train.experiment import Experiment
from worldline.train.files import (
    ADAPTER,
    AdapterFolder,
    Checkpoints,
    Form,
    ModelFile,
    Names,
    ReferenceFiles,
)
from worldline.train.loop import LoopConfig, Objective, Run, generator
from worldline.train.lora import adapted_name, add_adapters, restore
from worldline.train.optim import Power, trainable
from worldline.train.prepare import Training, identify, lora_of, rate_of, refuse_other_experiments
from worldline.train.samples import Samples
from worldline.train.sharding import Sharded, share
from worldline.weights.checkpoint import cut
from worldline.weights.networks import shapes_of
from worldline.weights.trainings import open_state

log = logging.getLogger(__name__)

_CONFIG = "config.yaml"
_HELD_OUT = 8  # clips of each process whose loss is measured


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A folder that no other process claims meanwhile, where the file system has locks.

    Raises:
        InputError: one has.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{folder}: another run writes there; wait for its end") from None
        yield
    finally:
        os.close(descriptor)


def train(
    training: Training, stopping: Callable[[], bool] = lambda: False, *, bar: bool = False
) -> int:
    """Train to the end, or until it is to stop, with a progress bar; the number of steps done.

    Raises:
        InputError: another run writes to its folder.
    """
    world, experiment = training.mesh.world, training.experiment
    folder = experiment.folder
    with ExitStack() as stack:

        def claim() -> None:
            if world.first:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(claimed(folder))
                (folder / _CONFIG).write_text(experiment.to_yaml())

        world.together(claim)
        return _train(training, stopping, bar)


def _train(training: Training, stopping: Callable[[], bool], bar: bool) -> int:
    experiment, mesh = training.experiment, training.mesh
    folder, world = experiment.folder, mesh.world
    if experiment.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    board = Boards(world.together(lambda: [*open_boards(experiment)] if world.first else []))
    step, sharded, files = _module(training)
    identity = world.together(lambda: identify(training) if world.first else {})
    data = _Batches(training, step)
    watch, every = data.watch, experiment.trainer.validation_iter
    samples = Samples(
        clips=training.held_out or training.clips,
        folder=folder / "samples",
        step=step,
        parts=data.parts,
        encode=data.encode,
        to_tokenizer=training.module.to_tokenizer,
        mesh=mesh,
        board=board,
    )
    objective = Objective(
        draw=data.draw,
        loss=step,
        watch=watch if data.held_out is not None and every else None,
        watch_every=every or 1,
        sample=samples.make if experiment.trainer.sample_iter else None,
        sample_every=experiment.trainer.sample_iter or 1,
        position=lambda: {"data": data.loader.state(), **identity},
        restore=partial(_restore, training, data.loader),
        named=data.named,
        speed=partial(_speed, training),
    )
    config = replace(_loop(experiment), bar=bar)
    run = Run(step, objective, config, training.folder, mesh.world, sharded)
    run.keep(files, experiment.checkpoint.save_state)
    if experiment.checkpoint.load_training_state:
        run.begin = partial(_begin, training, files, [*run.parameters])
    run.check_room()
    run.writers.append(board.figures)
    with closing(data):
        done, _ = run.go(None, stopping)
    return done


def _begin(
    training: Training, files: Checkpoints, trained: Sequence[str], state: Mapping[str, Tensor]
) -> int:
    """Fill a run's state with that of the training whose weights it begins with; its step.

    Raises:
        CheckpointError: it is another model's, or lacks files.
    """
    names = sorted(map(files.tensors.released, trained), key=order_of(training.part("trainer")))
    stored = open_state(training.network.source.files[0], names)
    step = files.restore(stored, state)
    if training.mesh.world.first:
        log.info("%s: going on from step %d; its clips begin anew", stored.path, step)
    return step


def order_of(trainer: Any) -> Callable[[str], Any]:
    """Key that sorts released names as a trainer numbers them: the network's order by default."""
    key: Callable[[str], Any] = getattr(trainer, "order", lambda name: ())
    return key


def _speed(training: Training, steps: float) -> dict[str, float]:
    """Clips a second of all processes, and arithmetic of each, in TFLOP/s."""
    experiment, layout = training.experiment, training.mesh.layout
    clips = steps * experiment.trainer.grad_accum_iter * experiment.data.batch_size * layout.dp
    flops = 3 * training.opened.config.flops(training.grid)  # two thirds are of the way back
    figures = {"clips_per_second": clips, "tflops": clips * flops / layout.count / 1e12}
    if training.device.type == "cuda":
        figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {name: round(value, 4) for name, value in figures.items()}


def _restore(training: Training, loader: Loader, position: dict[str, Any]) -> None:
    """Put the data where a state has it.

    Raises:
        InputError: the state is of another experiment; the keys that differ are named.
    """
    refuse_other_experiments(training, position["experiment"])
    loader.restore(position["data"])


def _loop(experiment: Experiment) -> LoopConfig:
    trainer, optimizer, files = experiment.trainer, experiment.optimizer, experiment.checkpoint
    return LoopConfig(
        steps=trainer.max_iter,
        rate=rate_of(experiment),
        weight_decay=optimizer.weight_decay,
        decay_all=True,
        betas=optimizer.betas,
        eps=optimizer.eps,
        clip=trainer.clip_norm,
        average=Power(experiment.average.rate) if experiment.average.enabled else None,
        accumulate=trainer.grad_accum_iter,
        log_every=trainer.logging_iter,
        save_every=files.save_iter,
        keep_last=files.keep_last,
        keep_every=files.keep_every,
    )


def _module(training: Training) -> tuple[Any, Sharded, Checkpoints]:
    """The step's module with its weights, how it is shared, and the files of its checkpoints."""
    network, mesh, lora = training.network, training.mesh, training.experiment.lora
    whole = shapes_of(network.kind, network.config)
    compute = Compute(training.device, torch.float32, torch.float32, False, mesh=mesh)
    inside = network.adapters if lora.rank else ()  # of weights that hold one, which goes on
    part = network = network.bare() if inside else network
    if mesh.layout.tp > 1:
        part = replace(network.part(compute), source=cut(network.source, mesh.tp))
    model = part.read(training.device, training.dtype if lora.rank else training.state)
    adapted = {}
    if lora.rank:
        draws = generator(training.experiment.trainer.seed, 0, stream=2)
        adapted = add_adapters(model, lora_of(training), draws)
        for adapter in inside:
            restore(adapted, adapter)
    else:
        model.requires_grad_(True)
    step = training.module.make_step(model, training.recipe, training.grid, network)
    step.to(training.device)
    if lora.rank:
        for name, parameter in step.named_parameters():
            parameter.requires_grad_(name.endswith((".down", ".up")))
    for parameter in trainable(step).values():
        parameter.data = parameter.data.to(training.state)
    blocks, compiled = step.BLOCKS, training.compiled
    for block in model.get_submodule(blocks).children():
        if training.checkpointed and hasattr(block, "closed"):
            block.forward = block.closed
        if compiled:
            block.forward = _compiled(block.forward)
        if training.checkpointed:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    sharded = share(
        step,
        "network",
        _device_mesh(training),
        blocks=blocks,
        compute=training.dtype,
        whole=whole,
        plan=network.shards,
    )
    return step, sharded, _checkpoints(training, step, sharded.cut, adapted)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward, compiled where gradients are wanted; kernels do the work elsewhere."""
    fast = torch.compile(forward, dynamic=False)
    return lambda *inputs: (fast if torch.is_grad_enabled() else forward)(*inputs)


def _device_mesh(training: Training) -> DeviceMesh:
    """The mesh as torch has it; a process alone makes a group of itself."""
    layout, kind = training.mesh.layout, training.device.type
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return init_device_mesh(kind, (layout.dp, layout.tp), mesh_dim_names=("dp", "tp"))


class _Batches:
    """Batches by their numbers: read, encoded, with the step's random numbers."""

    def __init__(self, training: Training, step: Any) -> None:
        self.training, self.step, self.mesh = training, step, training.mesh
        data, trainer = training.experiment.data, training.experiment.trainer
        self.loader = Loader(
            training.clips,
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            pin_memory=training.device.type == "cuda",
            seed=trainer.seed,
            repeated=data.same_order,
            ranks=self.mesh.dp,
            together=self.mesh.tp,
        )
        self.seed, self.held_out = trainer.seed, training.held_out
        self.held: list[tuple[Tensor, ...]] = []
        self.names: dict[int, Sequence[str]] = {}
        # of which one is to be named where a gradient is not finite, as lines of the log find it
        self.most_named = trainer.grad_accum_iter * (trainer.logging_iter + 1)
        self.batches: Generator[Any, None, None] | None = None
        dtype = training.dtype
        text = dtype if dtype == torch.float32 else torch.bfloat16
        compute = Compute(training.device, dtype, text, fused(training.device))
        loaded = {"tokenizer": training.opened["tokenizer"].load(compute, offload=False)}
        if training.clips.texts is not None and "text" in training.opened.parts:
            loaded["text"] = training.opened["text"].load(compute, offload=True)
        self.parts = Parts(training.opened, compute, loaded)

    def draw(self, number: int) -> tuple[Tensor, ...]:
        self.batches = self.batches or self.loader.__iter__()
        item = next(self.batches)
        self.names[number] = item["name"]
        if len(self.names) > self.most_named:
            del self.names[next(iter(self.names))]
        draws = generator(self.seed, number, rank=self.mesh.dp.rank)
        return tuple(self.step.draw(self.encode(item)[1], draws))

    @torch.no_grad()
    def watch(self) -> dict[str, Tensor]:
        """Mean loss of held-out clips, the same at each call, with the same random numbers."""
        if not self.held and self.held_out is not None:
            own = range(self.mesh.dp.rank, len(self.held_out), self.mesh.dp.count)
            count = min(_HELD_OUT, len(self.held_out) // self.mesh.dp.count) or 1
            chosen = [own[place * len(own) // count] if len(own) else 0 for place in range(count)]
            items = [default_collate([self.held_out[index]]) for index in chosen]
            self.held = [self.encode(item)[1] for item in items]
        losses = []
        for number, encoded in enumerate(self.held):
            draws = generator(self.seed, number, rank=self.mesh.dp.rank, stream=1)
            losses.append(self.step(*self.step.draw(encoded, draws))[0])
        return {"held_out": torch.stack(losses).mean()}

    def encode(self, item: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Latents or tokens of a batch of clips, and what the step reads.

        Processes that share its layers read the same.
        """
        device, training, cache = self.training.device, self.training, self.training.clips.cache
        if (encoded := item.get("encoded")) is None:
            video = item["video"].to(device, self.parts.compute.dtype) / 127.5 - 1
            encoded = training.module.encode_clips(self.parts, video)
            if cache is not None and self.mesh.tp.first:
                for key, one in zip(item["key"], encoded.cpu(), strict=True):
                    cache.put(key, one)
        config, fps = training.opened.config, item["fps"].tolist()
        batch = training.module.make_batch(config, encoded.to(device), self._text(item), fps)
        return encoded, tuple(self.mesh.tp.share(each.to(device).contiguous()) for each in batch)

    def close(self) -> None:
        """End what reads ahead."""
        if self.batches:
            self.batches.close()

    def named(self, number: int) -> str:
        return "; ".join(self.names.get(number, ())) or f"batch {number}"

    def _text(self, item: Any) -> Tensor | None:
        if "t5_text_embeddings" in item:
            given: Tensor = item["t5_text_embeddings"].to(self.training.device)
            return given
        if "ai_caption" not in item or self.parts.text is None:
            return None
        captions = item["ai_caption"]
        embedded = self.mesh.tp.once(lambda: self.parts.text.embed(captions))  # type: ignore[union-attr]
        return torch.cat([embedded[caption] for caption in captions])


def _checkpoints(
    training: Training, step: Any, axes: Mapping[str, int], adapted: Collection[str] = ()
) -> Checkpoints:
    """Files of checkpoints, and how tensors are named in them.

    Args:
        training: the run.
        step: its module.
        axes: as of `Sharded.cut`.
        adapted: names of the matrices with adapters; none where all weights are trained.
    """
    network, files, experiment = training.network, training.module, training.experiment
    weights, trainer = training.part("weights"), training.part("trainer")
    keys = network.layouts[0] if network.layouts else network.keys  # whatever those of the source

    def released(name: str) -> str:
        inner = name.removeprefix("network.")
        if inner == name:
            return str(files.released_name(keys, name))
        return adapted_name(keys, weights.LORA.ends, inner)

    buffers = {released(name): tensor.cpu() for name, tensor in step.named_buffers()}
    if network.keys is keys:  # what decides a model beside its weights
        for name in network.source.tensors:
            if fnmatchcase(bare := name.removeprefix(keys.prefixes[0]), files.BESIDE):
                buffers[f"{keys.prefixes[0]}{bare}"] = network.source.read(name)
    names = Names(released, training.mesh.tp, axes, buffers)
    latest, average = files.NEWEST, experiment.average.enabled
    # the files of a family that has none in ours have none in those of its trainer
    averaged = average and any(kind == "average" for _, kind, _ in files.MODEL_FILES)
    if average and not averaged and not adapted:
        log.warning("average.enabled: files of %s hold weights alone", training.opened.name)
    chosen: list[Form] = []
    if adapted:
        stems = {name: f"network.{name.removesuffix('.weight')}" for name in adapted}
        halves = {name: (f"{stem}.down", f"{stem}.up") for name, stem in stems.items()}
        diffusers = getattr(weights, "DIFFUSERS_KEYS", None)
        chosen = [
            AdapterFolder(
                "average" if average else "weights", halves, experiment.lora.scale, keys, diffusers
            )
        ]
    if experiment.checkpoint.format == "reference":
        trained = tuple(name for name, each in step.named_parameters() if each.requires_grad)
        settings = partial(_settings, experiment, bool(adapted))
        form = trainer.files, order_of(trainer), trainer.MOMENTS_DTYPE
        chosen.append(ReferenceFiles(*form, names, trained, settings, averaged))
    elif adapted:
        latest = ADAPTER
    else:
        listed = [ModelFile(*each, names) for each in files.MODEL_FILES]  # type: ignore[call-arg]
        listed = [each for each in listed if averaged or each.kind != "average"]
        if training.mesh.layout.tp > 1:  # the name of the whole is that of the step's number
            listed += [replace(each, kind="iteration") for each in listed]
        chosen = [*listed]
    settings = files.settings(step.network.config, training.opened)
    return Checkpoints(training.folder, tuple(chosen), latest, names, settings)


def _settings(experiment: Experiment, adapter: bool, step: int) -> dict[str, Any]:
    """What released trainers note of a step beside tensors."""
    optimizer, rate = experiment.optimizer, rate_of(experiment)
    facts = {"lr": rate(step), "initial_lr": optimizer.lr, "betas": optimizer.betas}
    facts |= {"eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
    return {"optimizer": facts, "schedule": rate.released, "adapter": adapter}
