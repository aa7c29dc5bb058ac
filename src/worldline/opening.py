"""From a name to loaded parts, for every family: open headers, agree, plan, read, offload.

Everything that can be wrong is found from file headers, before tensor data are read.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product
from math import isfinite, prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from worldline.catalog import BUNDLED_PREFIX, Entry
from worldline.errors import CheckpointError, InputError, InsufficientMemoryError, option
from worldline.family import FAMILIES, Compute, Opened, Parts, load_family, requests_of
from worldline.guards import planned_weights
from worldline.locate import Place
from worldline.memory import WORKSPACE, Fit, Memory, Plan, Stage, Weights, device_memory
from worldline.nn.modulation import fused
from worldline.parallel import job
from worldline.parallel.mesh import Axis, make_mesh, plan_mesh
from worldline.report import Recorder
from worldline.repositories import holds_diffusers, model_name, unfinished
from worldline.request import LoadOptions, Request
from worldline.weights.checkpoint import Checkpoint
from worldline.weights.known import find_known
from worldline.weights.names import is_adapter
from worldline.weights.networks import Network, open_adapter, open_weights, read_settings

logger = logging.getLogger(__name__)


def open_model_weights(path: Path) -> Checkpoint:
    """Tensors of a model's transformer; its header is read here alone.

    Args:
        path: a file, of a tensor-parallel set one of its shards; or a folder: NVIDIA's, of a whole
            repository of Predict2.5, of a training run, or of diffusers.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if path.is_dir() and not holds_diffusers(path):
        inside = [path / "base" / kind for kind in ("post-trained", "pre-trained")]
        present = [folder for folder in inside if folder.is_dir()]
        if len(present) > 1:
            logger.info("%s holds several models: %s is taken", path, present[0].name)
        path = present[0] if present else path
    source = open_weights(path, signatures)
    refuse_other_models(source)
    return source


def refuse_other_models(source: Checkpoint) -> None:
    """Raise `CheckpointError` for adapters, and for models that are known not to be worlds."""
    if adapters := [*filter(is_adapter, source.tensors)]:
        raise CheckpointError(
            f"{source.path}: it holds {len(adapters):,} tensors of LoRA adapters, such as "
            f"{adapters[0]}, and no model; give the model, and this by {option('lora')}"
        )
    if kind := find_known(source.tensors):
        raise CheckpointError(f"{source.path}: it is {kind}, not a world that worldline runs")


def signatures() -> tuple[str, ...]:
    """Ends of tensor names by which a family's transformer is known."""
    return tuple(end for name in FAMILIES for end in requests_of(name).SIGNATURE)


def find_family(tensors: Iterable[str]) -> str:
    """Name of the family whose transformer has these tensors; "" for none."""
    for name, tensor in product(FAMILIES, tensors):
        if tensor.endswith(requests_of(name).SIGNATURE):
            return name
    return ""


def recognise(place: Place) -> Opened:
    """A model's transformer: its family, its config.json and the defaults in it.

    Raises:
        CheckpointError: there is no transformer of a known family.
    """
    source = open_model_weights(place.named)
    folder, name = source.path.parent, find_family(source.tensors)
    if not name:
        names = ", ".join(sorted(source.tensors)[:3])
        raise CheckpointError(
            f"{source.path}: no model family has such a transformer (tensors {names}); "
            "`worldline checkpoints inspect` describes the file"
        )
    family = load_family(name)
    settings = {}
    if not holds_diffusers(source.path):  # whose config.json has no settings of ours
        settings = (family.read_settings or read_settings)(folder)
    defaults = {name: settings[name] for name in family.request.model_fields if name in settings}
    try:
        family.request.parse(defaults, str)
    except InputError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    place = replace(place, named=folder.parent if folder.name == "transformer" else folder)
    name = place.released.name if place.released else model_name(place.named)
    name = f"{BUNDLED_PREFIX if place.bundled else ''}{name}"
    return Opened(family, name, place, None, source, settings, defaults)


def open_world(place: Place, stated: Mapping[str, Any], expected: str = "") -> Opened:
    """Every part of a model; they belong together, headers alone are read.

    Args:
        place: where it lies.
        stated: load options by name.
        expected: family that the model must be of; "" for any.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model.
        InputError: a load option is unknown or wrong.
    """
    opened = recognise(place)
    family = opened.family
    if expected not in ("", family.name):
        raise CheckpointError(
            f"{opened.source.path}: it is a model of family {family.name}, not {expected}; "
            "`worldline generate` runs any"
        )
    opened = replace(opened, options=family.options.parse(stated))
    for part in reversed(family.parts):
        try:
            if (part_on_disk := part.open(opened)) is not None:
                opened = opened.with_part(part.name, part_on_disk)
                for first, a, second, b in family.agree:
                    if part.name in (first, second) and {first, second} <= opened.parts.keys():
                        refuse_unless_equal(opened[first], a, opened[second], b)
        except CheckpointError as error:
            if not part.optional or getattr(opened.options, part.option):
                advice = f"; {option(part.disable, True)} runs without" if part.disable else ""
                advice += unfinished(opened.folder)
                raise CheckpointError(f"{error}{advice}") from error
            parts = {name: other for name, other in opened.parts.items() if name != part.name}
            opened = replace(opened, parts=parts, missing={**opened.missing, part.name: str(error)})
    for text in opened.options.lora:
        opened = opened.with_part("transformer", add_adapter(opened, *split_scale(text)))
    return opened


def split_scale(stated: str) -> tuple[str, float]:
    """Name and scale of an adapter, "FILE:0.5" or "FILE": a number behind the last colon counts.

    Raises:
        InputError: the scale is not finite.
    """
    name, _, end = stated.rpartition(":")
    try:
        scale = float(end)
    except ValueError:
        return stated, 1.0
    if not name or (Path(stated).exists() and not Path(name).exists()):
        return stated, 1.0
    if not isfinite(scale):
        raise InputError(f"{option('lora', stated)}: {end} is not finite; give a number")
    return name, scale


def add_adapter(opened: Opened, name: str, scale: float) -> Network[Any]:
    """The transformer of a model with one more LoRA adapter.

    Args:
        opened: the model.
        name: a file or a folder; or a name below the folders of its parts.
        scale: factor of the adapter's own.

    Raises:
        CheckpointError: there is no such adapter, or it does not fit the whole.
    """
    network, called = opened["transformer"], option("lora", name)
    if not isinstance(network, Network) or not network.layouts:
        raise InputError(f"{called}: {opened.name} takes no adapter")
    path = Path(name)
    if not path.exists():
        stem, _, end = name.rpartition(":")
        if Path(stem).is_file():
            raise InputError(f"{called}: {end!r} behind the colon is no number; give FILE:NUMBER")
        path = opened.place.chosen(name, "lora", "file or folder")
    source = open_adapter(path)
    if any(source.path.samefile(other.path) for other in network.adapters):
        raise InputError(f"{called}: {source.path} is merged already; give it once, with one scale")
    try:
        return network.adapted(network.match_adapter(source, scale))
    except CheckpointError as error:
        other = family_of_adapter(source)
        if other in ("", opened.family.name):
            raise
        raise CheckpointError(f"{error}; it is for models of family {other}") from error


def family_of_adapter(source: Checkpoint) -> str:
    """Name of the family that has the layers of a LoRA adapter, by their names; "" for none."""
    from worldline.weights.lora import layer_of

    layers = {*map(layer_of, source.entries)} - {""}
    inner = [layer.split(".", count)[-1] for layer in layers for count in range(layer.count("."))]
    for family in FAMILIES:
        with suppress(ModuleNotFoundError):  # of a family whose files need no names
            layouts = import_module(f"{FAMILIES[family]}.weights").LAYOUTS
            names = product(layouts, inner, (".weight", ".0.weight"))
            if any(keys.ours(f"{name}{end}") for keys, name, end in names):
                return family
    return ""


def refuse_unless_equal(first: Any, a: str, second: Any, b: str) -> None:
    """Raise `CheckpointError` unless two opened parts agree."""
    left, right = getattr(first.config, a), getattr(second.config, b)
    if left != right:
        raise CheckpointError(
            f"{first.path} has {left} {a.replace('_', ' ')}, {second.path} expects {right}: they "
            "do not belong together"
        )


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device; by default the GPU, if there is one.

    Raises:
        InputError: it does not exist here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count() if cuda else 0))]
    names += ["mps"] if mps else []
    with suppress(RuntimeError, AssertionError, TypeError):
        chosen = torch.device(device or ("cuda" if cuda else "cpu"))
        if chosen.type in {name.partition(":")[0] for name in names}:  # not meta, which has no data
            return torch.empty(0, device=chosen).device  # with the number of a GPU
    raise InputError(f"no device {device} here (this torch has {', '.join(names)})")


def choose_compute(options: LoadOptions) -> Compute:
    """Device and precision: bfloat16 on a GPU, else float32, unless chosen.

    Raises:
        InputError: the device does not exist here.
    """
    device = choose_device(job.own_device(options.device))
    job.join(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.dtype is not None:
        dtype = getattr(torch, options.dtype)
    chosen = getattr(options, "text_encoder_dtype", None)
    text = dtype if dtype == torch.float32 else torch.bfloat16  # T5 overflows in float16
    return Compute(device, dtype, getattr(torch, chosen) if chosen else text, fused(device))


def arrange(opened: Opened, requests: Sequence[Request], compute: Compute) -> Compute:
    """Compute with the processes of the job arranged, as the load options choose.

    Raises:
        InputError: so many processes cannot share the work; the numbers that can are named.
    """
    world, options = job.join(compute.device), opened.options
    groups, size = options.data_parallel, getattr(options, "context_parallel_size", None)
    has = f"the job has {world.count} process{'es' if world.count > 1 else ''}"
    if (count := options.num_gpus) not in (None, "auto", world.count):
        raise InputError(
            f"{option('num_gpus', count)}: {has}; start with torchrun --nproc_per_node={count}, "
            "or leave it out"
        )
    typed = {"data_parallel": 0 if groups in (1, "auto") else groups, "context_parallel_size": size}
    ways: dict[str, int] = {name: number for name, number in typed.items() if number}
    whole, least = len(ways) == len(typed), prod(ways.values())
    if world.count % least or (whole and world.count > least):
        called = " and ".join(option(name, number) for name, number in ways.items())
        raise InputError(
            f"{called}: {has}, not {'' if whole else 'a multiple of '}{least}; start {least} "
            f"(torchrun --nproc_per_node={least}), or give a divisor"
        )
    if size:
        groups = world.count // size
    elif groups == "auto":
        groups = most_groups(opened, requests, compute, world)
    if world.count == 1:
        return compute
    layout = replace(opened.family.layout(opened, requests, world.count // groups), dp=groups)
    logger.info("%d processes: %s", world.count, layout)
    return replace(compute, mesh=make_mesh(layout, world))


def most_groups(opened: Opened, requests: Sequence[Request], compute: Compute, world: Axis) -> int:
    """Number of groups of processes, the most whose memory suffices; 1 for one request."""
    around = planned_weights(opened, requests)

    def refuse_unless_fits(there: Compute) -> None:
        needed = plan(opened, requests, there, around=around)
        needed.refuse_unless_fits(there.device, opened.options.offloaded)

    for groups in range(min(world.count, len(requests)), 1, -1):
        if world.count % groups:
            continue
        with suppress(InputError):
            layout = opened.family.layout(opened, requests, world.count // groups)
            there = replace(compute, mesh=plan_mesh(replace(layout, dp=groups)))
            choose_sharding(opened, there, refuse_unless_fits, world)
            return groups
    return 1


def choose_sharding(
    opened: Opened, compute: Compute, refuse: Callable[[Compute], None], world: Axis
) -> Compute:
    """Compute with weights that are whole in each process or, if these do not fit, are shared.

    Args:
        opened: the model, whose options may choose.
        compute: device and layout of processes.
        refuse: raises where this process has too little memory.
        world: processes that choose alike.

    Raises:
        InsufficientMemoryError: neither fits.
    """
    shared, whole = (replace(compute, sharded=sharded) for sharded in (True, False))
    parts = opened.parts.values()
    if not any(part.sharding(shared) for part in parts if isinstance(part, Network)):
        choices = [whole]
    else:
        choices = {"on": [shared], "off": [whole], "auto": [whole, shared]}[opened.options.fsdp]
    for choice in choices[:-1]:
        with suppress(InsufficientMemoryError):
            world.together(partial(refuse, choice))
            return choice
    world.together(partial(refuse, choices[-1]))
    return choices[-1]


def plan(
    opened: Opened,
    requests: Iterable[Request],
    compute: Compute,
    guardrail_bytes: int = 0,
    around: Mapping[str, Weights] = MappingProxyType({}),
) -> Plan:
    """Memory of checked requests that run one after another; unused optional parts are not read.

    It is that of this process, of those that make a video together.

    Args:
        opened: the model.
        requests: checked ones.
        compute: device, precision and processes.
        guardrail_bytes: of the largest guardrail that comes to the device when it is used.
        around: guardrails and prompt upsampler that are not loaded, by their stages.
    """
    family, first = opened.family, compute.mesh.video.first
    parts = [part for part in family.parts if part.name in opened.parts and (first or part.split)]
    stages = [stage for request in requests for stage in family.stages(opened, request, compute)]
    if first:
        stages += [Stage(name, name, 0) for name in around]
    else:
        alone = {part.name for part in family.parts if not part.split}
        stages = [stage for stage in stages if stage.uses not in alone]
    if guardrail_bytes:
        stages.append(Stage("guardrail", "", guardrail_bytes))
    used = {stage.uses for stage in stages}
    weights = {name: each for name, each in around.items() if first} | {
        part.name: Weights(
            opened[part.name].nbytes(compute),
            part.flag,
            opened[part.name].streamed_nbytes(compute),
        )
        for part in parts
        if part.name in used or not part.optional
    }
    workspace = WORKSPACE if compute.dtype != torch.float32 else 0
    flags = tuple(dict.fromkeys(each.flag for each in weights.values()))
    return Plan(opened.name, weights, tuple(dict.fromkeys(stages)), flags, workspace)


def describe_plan(
    opened: Opened, compute: Compute, needed: Callable[[Compute], Plan]
) -> Iterator[str]:
    """Lines about the memory that each process of a group needs, and has."""
    memory, count = device_memory(compute.device), compute.mesh.video.count
    cuda = compute.device.type == "cuda"  # elsewhere offloading moves nothing
    names = [f"memory of the first of {count} processes", "memory of each other"]
    for name, mesh in zip(names if count > 1 else ["memory"], compute.mesh.roles(), strict=True):
        plan = needed(replace(compute, mesh=mesh))
        stages = plan.describe(opened.options.offloaded if cuda else ())
        yield f"{name} on {compute.device.type}: {stages}; {memory}"


def load_parts(opened: Opened, compute: Compute, recorder: Recorder) -> Parts:
    """Read the weights of an opened model; a text encoder's wait for the first prompt.

    The plan was checked before, see `Plan.refuse_unless_fits`.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    logger.info("reading %s", opened.folder)
    for name, part in opened.parts.items():
        for note in part.notes:
            logger.info("%s: %s", name, note)
    with recorder.stage("load"), opened.family.prepare(opened, compute):
        loaded = {
            part.name: opened[part.name].load(
                compute, offload=part.flag in opened.options.offloaded
            )
            for part in opened.family.parts
            if part.name in opened.parts
        }
    return Parts(opened, compute, loaded)


def fit_released(entry: Entry, compute: Compute, memory: Memory) -> Fit | None:
    """How a released model fits, with the fewest flags; None where no command runs it.

    Parts are left out, by the flags that disable them, where it fits only so.
    """
    name = entry.command.partition(" ")[0]
    if name not in FAMILIES:
        return None
    family = load_family(name)
    options, nowhere = family.options.parse({}), Place(Path(entry.name), ())
    opened = Opened(family, entry.name, nowhere, options, parts=family.presets(entry))
    request = family.request.parse({})
    fit = plan(opened, [request], compute).fit(compute.device, memory)
    disabled = {part.name: part.disable for part in family.parts if part.disable}
    if disabled and not fit.fits:
        parts = {name: part for name, part in opened.parts.items() if name not in disabled}
        bare = plan(replace(opened, parts=parts), [request], compute).fit(compute.device, memory)
        if bare.fits:
            return replace(bare, flags=(*dict.fromkeys(disabled.values()), *bare.flags))
    return fit
