"""A run before it begins: settings, model and clips are checked against each other."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from worldline.errors import CheckpointError, InputError, brief, counted, did_you_mean, one_line
from worldline.family import FAMILIES, Compute, Opened
from worldline.files import check_folder, digest
from worldline.locate import locate
from worldline.memory import device_memory
from worldline.opening import choose_device, open_world, recognise
from worldline.parallel import job
from worldline.parallel.mesh import Axis, Layout, Mesh, make_mesh
from worldline.shapes import LatentShape, VideoShape
from worldline.text.embeddings import PROMPT, read_embedding_file
from worldline.train.boards import check_boards
from worldline.train.data.clips import Cache, Clips, Window, open_clips
from worldline.train.data.frames import Transform
from worldline.train.data.texts import Texts
from worldline.train.experiment import Data, Experiment, differences
from worldline.train.files import (
    named_step,
)
from worldline.train.lora import check_adapter, linear_layers
from worldline.train.memory import Sizes, TrainingMemory, choose_checkpointing, plan_memory
from worldline.train.optim import Cosine, Linear
from worldline.train.states import States
from worldline.weights.keymap import LoRARecipe, matches
from worldline.weights.networks import LATEST, Network, adapter_folder, latest_name, shapes_of
from worldline.weights.trainings import steps_of

log = logging.getLogger(__name__)


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
    matrices, targets = (n for n in shapes if len(shapes[n]) == 2), lora_of(training).targets
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
        refuse_other_experiments(training, position["experiment"])
        if position.get("base", []) != identify(training)["base"]:
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


def identify(training: Training) -> dict[str, Any]:
    """What a state is of: an experiment, clips and, of an adapter, weights that no state has."""
    files = training.network.source.files if training.experiment.lora.rank else ()
    base = [digest(path, sampled=True) for path in files]
    experiment, clips = training.experiment.to_json(), training.clips.contents
    return {"experiment": experiment, "base": base, "clips": clips}


def refuse_other_experiments(training: Training, before: Mapping[str, Any]) -> None:
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
    steps, rise, rate = (
        experiment.trainer.max_iter,
        experiment.scheduler.warmup,
        rate_of(experiment),
    )
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


def rate_of(experiment: Experiment) -> Cosine | Linear:
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


def lora_of(training: Training) -> LoRARecipe:
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
    targets = lora_of(training).targets
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
