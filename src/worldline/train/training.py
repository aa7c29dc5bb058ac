"""A run of an experiment: everything is checked, then the model is read and the loop begins."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

from worldline.errors import CheckpointError, InputError, brief, counted, did_you_mean, one_line
from worldline.family import FAMILIES, Compute, Opened, Parts
from worldline.files import check_folder, digest
from worldline.locate import locate
from worldline.memory import device_memory
from worldline.nn.modulation import fused
from worldline.opening import choose_device, open_world, recognise
from worldline.parallel import job
from worldline.parallel.mesh import Axis, Layout, Mesh, make_mesh
from worldline.shapes import LatentShape, VideoShape
from worldline.text.embeddings import PROMPT, read_embedding_file
from worldline.train.boards import Boards, check_boards, open_boards
from worldline.train.data.clips import Cache, Clips, Window, open_clips
from worldline.train.data.frames import Transform
from worldline.train.data.loader import Loader
from worldline.train.data.texts import Texts
from worldline.train.experiment import Data, Experiment, differences
from worldline.train.files import (
    ADAPTER,
    AdapterFolder,
    Checkpoints,
    Form,
    ModelFile,
    Names,
    ReferenceFiles,
    named_step,
)
from worldline.train.loop import LoopConfig, Objective, Run, generator
from worldline.train.lora import adapted_name, add_adapters, check_adapter, linear_layers, restore
from worldline.train.memory import Sizes, TrainingMemory, choose_checkpointing, plan_memory
from worldline.train.optim import Cosine, Linear, Power, trainable
from worldline.train.samples import Samples
from worldline.train.sharding import Sharded, share
from worldline.train.states import States
from worldline.weights.checkpoint import cut
from worldline.weights.keymap import LoRARecipe, matches
from worldline.weights.networks import LATEST, Network, adapter_folder, latest_name, shapes_of
from worldline.weights.trainings import open_state, steps_of

log = logging.getLogger(__name__)

_CONFIG = "config.yaml"
_HELD_OUT = 8  # clips of each process whose loss is measured


@dataclass(frozen=True)
class Training:
    """A run whose settings, model and clips fit one another; nothing large is read yet.

    Attributes:
        experiment: as it was asked for.
        opened: the model.
        clips: to train on.
        held_out: clips of which the loss is measured; None without.
        recipe: of the family's step.
        mesh: processes: `tp` share layers, `dp` batches and weights.
        device: of this process.
    """

    experiment: Experiment
    opened: Opened
    clips: Clips
    held_out: Clips | None
    recipe: Any
    mesh: Mesh
    device: torch.device

    @cached_property
    def module(self) -> Any:
        """The family's `objective`."""
        return self.part("objective")

    def part(self, name: str) -> Any:
        """A module of the family, such as its `weights`."""
        return _part(self.opened, name)

    @property
    def network(self) -> Network[Any]:
        network: Network[Any] = self.opened["transformer"]
        return network

    @property
    def folder(self) -> Path:
        """Where files of checkpoints go."""
        return self.experiment.folder / "checkpoints"

    @cached_property
    def finished(self) -> int:
        """Number of steps, where all are done and the last checkpoint is named; else 0."""

        def look() -> int:
            done = max(States(self.folder).steps(), default=0)
            whole = done == named_step(self.folder) and done >= self.experiment.trainer.max_iter
            return done if whole else 0

        return self.mesh.world.once(look)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.experiment.trainer.precision)
        return dtype

    @property
    def state(self) -> torch.dtype:
        """Precision of weights and moments."""
        kept: torch.dtype = self.part("trainer").STATE
        return kept if self.experiment.trainer.reference_state else torch.float32

    @cached_property
    def num_trained(self) -> int:
        """Numbers of all parameters that are trained."""
        return sum(_trained(self, shapes_of(self.network.kind, self.network.config)).values())

    @cached_property
    def checkpointed(self) -> bool:
        """Whether blocks compute their activations again on the way back.

        Raises:
            InsufficientMemoryError: the run does not fit.
        """
        plans, name = memory_of(self), self.opened.name
        chosen = self.experiment.trainer.activation_checkpointing
        memory = device_memory(self.device)
        decide = partial(choose_checkpointing, plans, chosen, memory, f"training {name}")
        return self.mesh.world.any(self.mesh.world.together(decide))

    @cached_property
    def compiled(self) -> bool:
        """Whether blocks are compiled: as chosen, or where all processes can."""
        chosen, world = self.experiment.trainer.compile, self.mesh.world
        if chosen != "auto":
            return chosen == "on"
        if self.device.type != "cuda" or self.mesh.layout.tp > 1:
            return False
        if self.experiment.trainer.deterministic:  # where a run goes on, torch may not compile
            return False
        reasons = [*filter(None, world.every(_no_compiler(self.device)))]
        if reasons and world.first:
            log.warning(
                "blocks are not compiled, so that steps are slower: torch cannot here (%s); "
                "install what is missing, or give trainer.compile=off",
                reasons[0],
            )
        return not reasons

    @cached_property
    def video(self) -> VideoShape:
        """Size of a clip."""
        return _video(self.experiment, self.opened)

    @property
    def grid(self) -> LatentShape:
        return _grid(self.opened, self.video)

    def describe(self) -> Iterator[str]:
        """Lines about the run."""
        experiment, layout = self.experiment, self.mesh.layout
        millions, lora = self.network.num_parameters / 1e6, experiment.lora
        name = self.network.path if experiment.checkpoint.load_path else self.opened.name
        yield f"{name}: {millions:,.1f} million parameters"
        if lora.rank:
            trained = self.num_trained / 1e6
            yield f"an adapter of rank {lora.rank} is trained, {trained:,.1f} million parameters"
        does = "is trained further" if lora.rank else "is merged into the weights that are trained"
        for adapter in self.network.adapters:
            yield f"{adapter.path}: its adapter {does}"
        yield f"{experiment.data.dataset_dir}: {self.clips}"
        if self.held_out is not None:
            yield f"{experiment.data.validation_dir}: {self.held_out}, held out"
        batch = experiment.data.batch_size * layout.dp * experiment.trainer.grad_accum_iter
        clips, steps = counted(batch, "clip"), counted(experiment.trainer.max_iter, "step")
        yield f"{clips} of {_words(self.video)} a step, {steps}"
        if layout.count > 1:
            yield f"{layout.count} processes: {layout}"
        again = self.checkpointed
        how = "computed again on the way back" if again else "kept"
        each = "each process needs" if layout.count > 1 else "it needs"
        yield f"{each} about {memory_of(self)[again]}; activations are {how}"


def prepare(experiment: Experiment, device: str | None, checkpoint_dir: str) -> Training:
    """Check everything that can be wrong, from headers of files alone.

    Args:
        experiment: what to train.
        device: by default a GPU where there is one.
        checkpoint_dir: folder of released models.

    Raises:
        InputError: settings that do not fit one another, or clips that cannot be used.
        CheckpointError: no model, or another one.
    """
    place = choose_device(job.own_device(device))
    world = job.join(place)
    for name in ("project", "group", "name"):
        if not getattr(experiment.job, name):
            raise InputError(f"job.{name} is empty; give a name")
    check_folder(experiment.folder)
    check_boards(experiment)
    opened = _open(experiment, checkpoint_dir)
    recipe = _recipe(experiment, opened)
    experiment = experiment.model_copy(update={"objective": asdict(recipe)})  # every field of it
    tp = experiment.parallel.tensor_model_parallel_size
    _check_parallel(opened, tp, world.count, experiment.lora.rank > 0)
    video = _video(experiment, opened)
    _check_grid(opened, video, recipe)
    mesh = make_mesh(Layout(dp=world.count // tp, tp=tp), world)
    data = experiment.data
    if data.dataset_dir is None:
        raise InputError("data.dataset_dir (--videos): it is missing; give a folder of videos")
    precision = experiment.trainer.precision
    clips = _clips(data, data.dataset_dir, opened, video, precision, world)
    held_out = None
    if data.validation_dir and experiment.trainer.run_validation:
        held_out = _clips(data, data.validation_dir, opened, video, precision, world)
    training = Training(experiment, opened, clips, held_out, recipe, mesh, place)
    _check_adapters(training)
    world.once(partial(_check_state, training))
    for each in filter(None, (clips, held_out)):
        world.once(partial(_check_captions, opened, each))
    _check_rate(experiment)
    if experiment.trainer.compile == "on":
        world.together(partial(_check_compiler, place))
    return training


def _open(experiment: Experiment, checkpoint_dir: str) -> Opened:
    """The model of an experiment with the weights, or the adapter, that a run begins with.

    Raises:
        InputError: no model, or one of another family than these weights.
        CheckpointError: a file is missing, or damaged.
    """
    model, begin = experiment.model, experiment.checkpoint.load_path
    options: dict[str, Any] = {"checkpoint_dir": checkpoint_dir}
    if begin and model and (adapter := adapter_folder(Path(begin))):
        if not experiment.lora.rank:
            raise InputError(f"checkpoint.load_path: {begin} is an adapter; add --lora to train it")
        options["lora"], begin = [str(adapter)], None
    if not (name := begin or model):
        raise InputError("model: it is missing; give a released name or a folder")
    found = locate(name, checkpoint_dir)
    family = recognise(found).family
    if begin and model:
        with suppress(CheckpointError):  # weights with all parts beside need no model
            whole = locate(model, checkpoint_dir)
            found = replace(found, roots=tuple(dict.fromkeys((*found.roots, *whole.roots))))
            if (other := recognise(whole).family) is not family:
                raise InputError(
                    f"checkpoint.load_path: {begin} is of {family.name}, but {model} is of "
                    f"{other.name}; give weights of that family, or their model"
                )
    # what a model can leave out (the decoder of its tokens), training never reads
    options |= {part.disable: True for part in family.parts if part.disable}
    return open_world(found, options)


def _trained(training: Training, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Names of parameters -> numbers that are trained: all, or those of adapters."""
    rank = training.experiment.lora.rank
    if not rank:
        return {name: math.prod(shape) for name, shape in shapes.items()}
    matrices, targets = (n for n in shapes if len(shapes[n]) == 2), _lora(training).targets
    return {name: rank * sum(shapes[name]) for name in matrices if matches(name, targets)}


def memory_of(training: Training) -> dict[bool, TrainingMemory]:
    """Memory of each process, without and with activations computed again."""
    experiment, opened, layout = training.experiment, training.opened, training.mesh.layout
    network, itemsize, rank = training.network, training.dtype.itemsize, experiment.lora.rank
    tokenizer, grid, config = opened["tokenizer"], training.grid, opened.config
    # of this process's layers
    part = network.shards.part(config, layout.tp) if network.shards else config
    shapes = shapes_of(network.kind, part)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    trained = _trained(training, shapes)
    first = f"{training.module.TrainingStep.BLOCKS}.0."
    names = {name.removeprefix(first).removesuffix(".weight") for name in trained}
    adapters = rank * sum(name.startswith(first) for name in trained)
    clips, wide = experiment.data.batch_size, 4 // itemsize
    tokens = clips * (config.tokens(grid) if hasattr(config, "tokens") else grid).tokens
    text = 0
    if width := getattr(config, "text_width", config.context_width):  # read, dropped, rounded
        numbers = part.text_numbers(names, wide) + 3 * wide * width
        text = opened.text_length * clips * numbers * itemsize
    compute = Compute(training.device, training.dtype, training.dtype, False)
    sizes = Sizes(
        parameters=sum(counts.values()),
        trained=sum(trained.values()),
        blocks=config.depth,
        block=sum(count for name, count in counts.items() if name.startswith(first)),
        tokens=tokens,
        stream=part.stream_numbers * itemsize,
        inside=(part.saved_numbers(names, wide, training.compiled) + adapters) * itemsize,
        gradients=part.gradient_numbers(names) * itemsize,
        shared=tokens * part.shared_numbers(names, wide) * itemsize + text,
        loss=training.module.loss_bytes(config, tokens, itemsize),
        tokenizer=tokenizer.nbytes(compute),
        coding=coding_bytes_of(training, compute),
        accumulated=experiment.trainer.grad_accum_iter > 1,
        state=training.state.itemsize,
    )
    average = experiment.average.enabled
    return {
        again: plan_memory(sizes, layout.dp, training.dtype, average=average, checkpointed=again)
        for again in (False, True)
    }


def coding_bytes_of(training: Training, compute: Compute) -> int:
    """Bytes in which the tokenizer encodes a batch, clip by clip, and decodes the video of one."""
    opened, video = training.opened, training.video
    family, clips = opened.family, training.experiment.data.batch_size
    nbytes = 24 * clips * video.frames * video.height * video.width
    sizes = dict(zip(("num_video_frames", "height", "width"), astuple(video), strict=True))
    if sizes.keys() <= family.request.model_fields.keys():  # of others a model has one size
        request = family.request.parse({**opened.defaults, **sizes})
        stages = family.stages(opened, request, compute)
        nbytes += max(stage.activations for stage in stages if stage.uses == "tokenizer")
    return nbytes


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
    identity = world.together(lambda: _identity(training) if world.first else {})
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
    _same(training, position["experiment"])
    loader.restore(position["data"])


def _check_state(training: Training) -> None:
    """Refuse another experiment than that of the newest state, before anything is read or written.

    Raises:
        CheckpointError: a run is to go on from files of no training.
        InputError: the keys that differ are named, or the clips do; or such a training is as long
            as the run.
    """
    states = States(training.folder)
    if not states.steps() and (training.folder / LATEST).exists():
        alone = "adapter" in latest_name(training.folder)
        kind = "an adapter" if alone else "weights"
        start = f", and checkpoint.load_path={training.folder} to begin with them"
        raise InputError(
            f"{training.folder} holds {kind} of a run and no state to go on from; give "
            f"job.name=OTHER{'' if alone else start}"
        )
    if not states.steps() and training.experiment.checkpoint.load_training_state:
        file, most = training.network.source.files[0], training.experiment.trainer.max_iter
        if (done := steps_of(file)) >= most:
            raise InputError(
                f"{file}: its training has done {done:,} steps, and trainer.max_iter is {most:,}; "
                "give more"
            )
    if steps := states.steps():
        position = states.facts(steps[-1])["position"]
        _same(training, position["experiment"])
        if position.get("base", []) != _identity(training)["base"]:
            raise InputError(
                f"{training.folder} holds states of an adapter of other weights than those of "
                f"{training.network.path}; set checkpoint.load_path back, or give job.name=OTHER"
            )
        clips = training.clips
        changes = clips.changes(position.get("clips", clips.contents))
        if changes or position["data"]["data"] != clips.fingerprint:
            more = [f"and {len(changes) - 3:,} more"] if len(changes) > 3 else []
            named = f" ({', '.join([*changes[:3], *more])})" if changes else ""
            raise InputError(
                f"{training.folder} holds states of a run on other clips than those of "
                f"{training.experiment.data.dataset_dir}{named}; give these back, or job.name=OTHER"
            )


def _identity(training: Training) -> dict[str, Any]:
    """What a state is of: an experiment, clips and, of an adapter, weights that no state has."""
    files = training.network.source.files if training.experiment.lora.rank else ()
    base = [digest(path, sampled=True) for path in files]
    experiment, clips = training.experiment.to_json(), training.clips.contents
    return {"experiment": experiment, "base": base, "clips": clips}


def _same(training: Training, before: Mapping[str, Any]) -> None:
    defaults = Experiment(objective=asdict(training.module.TrainingStep.RECIPE()))
    if lines := differences(before, training.experiment, defaults):
        raise InputError(
            f"{training.folder} holds states of another run: {'; '.join(lines)}; set them back, or "
            "give job.name=OTHER"
        )


def _part(opened: Opened, name: str) -> Any:
    """A module of a model's family."""
    return import_module(f"{FAMILIES[opened.family.name]}.{name}")


def _recipe(experiment: Experiment, opened: Opened) -> Any:
    """The family's recipe with the experiment's fields.

    Raises:
        InputError: a field is unknown, or wrong.
    """
    objective = _part(opened, "objective")
    kind = objective.TrainingStep.RECIPE
    own: dict[str, Any] = getattr(objective, "recipe_of", lambda config: {})(opened.config)
    known = [field.name for field in fields(kind)]
    for name in experiment.objective:
        if name not in known:
            advice = did_you_mean(name, known, 0.6) or f"; there are: {', '.join(known)}"
            raise InputError(f"objective.{name}: {opened.name} has no such field{advice}")
    try:
        return TypeAdapter(kind).validate_python({**own, **experiment.objective})
    except ValidationError as error:
        lines = (
            f"objective.{each['loc'][0]} is {brief(each['input'])}; "
            f"{each['msg'].replace('Input should', 'it must').removeprefix('Value error, ')}"
            for each in error.errors()
        )
        raise InputError("\n".join(lines)) from None


def _no_compiler(device: torch.device) -> str:
    """Why torch cannot compile: a CPU needs a C++ compiler, a GPU Triton; empty where it can."""

    def double(x: Tensor) -> Tensor:
        return 2 * x.sin()

    try:
        torch.compile(double)(torch.ones(2, device=device))
    except Exception as error:  # of many classes
        return one_line(error)
    return ""


def _check_compiler(device: torch.device) -> None:
    """Refuse to compile where torch cannot.

    Raises:
        InputError: it fails for the smallest function.
    """
    if reason := _no_compiler(device):
        raise InputError(
            f"trainer.compile is on, but torch cannot compile here ({reason}); leave it out"
        )


def _check_parallel(opened: Opened, tp: int, count: int, lora: bool) -> None:
    if count % tp:
        raise InputError(
            f"parallel.tensor_model_parallel_size is {tp}, but the job has {count} "
            f"process{'es' if count > 1 else ''}; start a multiple (torchrun --nproc_per_node={tp})"
        )
    if tp == 1:
        return
    if lora:
        raise InputError(
            f"parallel.tensor_model_parallel_size is {tp}; adapters (lora.rank) are trained with 1"
        )
    config = opened.config
    if opened["transformer"].shards is None:
        raise InputError(
            f"parallel.tensor_model_parallel_size is {tp}; layers of {opened.name} are not shared: "
            "give 1, and processes share its weights"
        )
    if config.divisor % tp:
        raise InputError(
            f"parallel.tensor_model_parallel_size is {tp}; {opened.name} can be shared by "
            f"{', '.join(map(str, config.divisors))}"
        )


def _video(experiment: Experiment, opened: Opened) -> VideoShape:
    """Size of a clip, in what is not stated the model's own."""
    data, family = experiment.data, opened.family
    own = family.video(opened, family.request.parse(opened.defaults))
    height, width = data.video_size or (own.height, own.width)
    return VideoShape(data.num_frames or own.frames, height, width)


def _words(video: VideoShape) -> str:
    return f"{video.frames} x {video.height} x {video.width}"


def _grid(opened: Opened, video: VideoShape) -> LatentShape:
    tokenizer = opened["tokenizer"].config
    grid: LatentShape = video.latent(tokenizer.temporal, tokenizer.spatial)
    return grid


def _check_grid(opened: Opened, video: VideoShape, recipe: Any) -> None:
    """Raise `InputError` for a size that the tokenizer, the network or the step does not take."""
    try:
        grid = _grid(opened, video)
        if hasattr(opened.config, "tokens"):
            opened.config.tokens(grid)
        getattr(_part(opened, "objective"), "check_grid", lambda recipe, grid: None)(recipe, grid)
    except ValueError as error:
        raise InputError(
            f"data.num_frames and data.video_size make {_words(video)}: {error}"
        ) from None


def _clips(
    data: Data, place: str, opened: Opened, video: VideoShape, precision: str, world: Axis
) -> Clips:
    folder = Path(place)
    window = Window(
        num_frames=video.frames,
        interval=data.sequence_interval,
        start_interval=data.start_frame_interval,
        random_start=data.one_per_video,
    )
    transform = Transform(video.height, video.width, fit=data.fit)
    if data.fit == "stretch":
        transform = replace(transform, resample="bilinear")
    width = getattr(opened.config, "text_width", opened.config.context_width)
    texts = None
    if not width and data.caption is not None:
        raise InputError(f"data.caption: {opened.name} reads no text; leave it out")
    if width:
        root = folder.parent if folder.name == "videos" else folder
        embedded = next((root / "t5_xxl").glob("*.pickle"), None)
        # folders of Predict2 have those of T5 beside the captions that Predict2.5 reads
        fits = embedded and read_embedding_file(embedded)[PROMPT].shape[-1] == width
        texts = Texts(
            source="embeddings" if fits else "auto",
            caption=data.caption,
            prompt_type=data.prompt_type,
            width=width,
            rows=opened.text_length,
        )
    cache = None
    if data.cache_dir:
        files = [digest(path, sampled=True) for path in opened["tokenizer"].files]
        cache = Cache(Path(data.cache_dir), json.dumps([opened.family.name, precision, *files]))
    return open_clips(folder, window, transform, texts=texts, cache=cache, ranks=world)


def _check_captions(opened: Opened, clips: Clips) -> None:
    """Note the captions of which the text encoder does not read the end.

    Raises:
        CheckpointError: there is no encoder, or its tokenizer cannot be read.
    """
    captions = {v.path.name: clips.text.get(v.path) for v in clips.videos}
    texts = {text for text in captions.values() if isinstance(text, str)}
    if not texts:
        return
    if "text" not in opened.parts:
        reason = opened.missing.get("text", f"{opened.name} has no text encoder")
        raise CheckpointError(f"{reason}; captions need it: download it")
    encoder = opened["text"]
    long = {text for text in texts if len(encoder.tokenizer.encode(text)) > encoder.max_length}
    if names := [name for name, text in captions.items() if text in long]:
        log.warning(
            "%d of %d captions have more than %d tokens, such as that of %s, and their ends are "
            "not read; shorten them",
            *(len(names), len(captions), encoder.max_length, names[0]),
        )


def _check_rate(experiment: Experiment) -> None:
    """Warn of a learning rate that does not reach its peak, or that is 0 in all steps."""
    steps, rise, rate = experiment.trainer.max_iter, experiment.scheduler.warmup, _rate(experiment)
    if not any(map(rate, (0, min(rise, steps - 1), steps - 1))):  # between zeros it is 0
        log.warning(
            "the learning rate of all steps is 0 with scheduler.warmup=%d and trainer.max_iter=%d, "
            "so nothing is learnt; change one of them, or scheduler.start and scheduler.top",
            *(rise, steps),
        )
    elif rise > steps:
        log.warning(
            "scheduler.warmup is %d, more than the run's %d steps: the learning rate never reaches "
            "%g",
            *(rise, steps, experiment.optimizer.lr),
        )


def _rate(experiment: Experiment) -> Cosine | Linear:
    settings, peak = experiment.scheduler, experiment.optimizer.lr
    if settings.kind == "cosine":
        decay = settings.decay or experiment.trainer.max_iter
        return Cosine(peak=peak, warmup=settings.warmup, decay=decay, floor=peak * settings.last)
    return Linear(
        peak=peak,
        warmup=settings.warmup,
        cycle=settings.cycle,
        start=settings.start,
        top=settings.top,
        end=settings.last,
    )


def _loop(experiment: Experiment) -> LoopConfig:
    trainer, optimizer, files = experiment.trainer, experiment.optimizer, experiment.checkpoint
    return LoopConfig(
        steps=trainer.max_iter,
        rate=_rate(experiment),
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
        adapted = add_adapters(model, _lora(training), draws)
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


def _lora(training: Training) -> LoRARecipe:
    """The family's recipe with the experiment's rank, scale and targets.

    Raises:
        InputError: a target names no layer.
    """
    settings, network = training.experiment.lora, training.network
    recipe: LoRARecipe = training.part("weights").LORA
    chosen = replace(recipe, rank=settings.rank, scale=settings.scale)
    if not settings.targets:
        return chosen
    with torch.device("meta"):
        layers = linear_layers(network.kind(network.config))
    released = {name: f".{network.keys.released(name).removesuffix('.weight')}." for name in layers}
    matched: dict[str, list[str]] = {
        target: [name for name, theirs in released.items() if f".{target}." in theirs]
        for target in settings.targets
    }
    for target, names in matched.items():
        if not names:
            known = sorted({theirs.split(".")[-2] for theirs in released.values()})
            raise InputError(
                f"lora.targets: no linear layer of {training.opened.name} is {target}; they end "
                f"with {', '.join(known[:20])}"
            )
    return replace(chosen, targets=tuple(name for names in matched.values() for name in names))


def _check_adapters(training: Training) -> None:
    """Refuse to train the adapter beside the weights further with other settings than its own.

    Raises:
        InputError: its matrices, rank or scale differ.
    """
    network, settings = training.network, training.experiment.lora
    if not settings.rank or not network.adapters:
        return
    targets = _lora(training).targets
    shapes = {
        name: (settings.rank, shape[1])
        for name, shape in shapes_of(network.kind, network.config).items()
        if len(shape) == 2 and matches(name, targets)
    }
    for adapter in network.adapters:
        try:
            check_adapter(shapes, adapter)
        except ValueError as error:
            raise InputError(f"{error}; give its lora.rank and lora.targets") from None
        if adapter.has_scale and adapter.factors != [settings.scale]:
            scales = "/".join(f"{factor:g}" for factor in adapter.factors[:3])
            raise InputError(
                f"{adapter.path} has the scale {scales}, and lora.scale is {settings.scale:g}; "
                "give its own"
            )


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
    optimizer, rate = experiment.optimizer, _rate(experiment)
    facts = {"lr": rate(step), "initial_lr": optimizer.lr, "betas": optimizer.betas}
    facts |= {"eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
    return {"optimizer": facts, "schedule": rate.released, "adapter": adapter}
