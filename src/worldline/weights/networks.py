"""Networks on disk: opened by header and checked, or read; strict, and nothing is executed."""

import functools
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from worldline.documents import read_json
from worldline.errors import CheckpointError, one_line
from worldline.files import UNFINISHED, refuse_broken
from worldline.parallel.mesh import Axis
from worldline.parallel.offload import BlockPlan, Offloadable, ShardedModule
from worldline.repositories import TRANSFORMER_FILES, WEIGHTS, unfinished
from worldline.weights.checkpoint import (
    METADATA,
    PART,
    SHARD,
    Checkpoint,
    MergedTensor,
    cut,
    find_shards,
    holds_tensors,
    indexed_files,
    is_container,
    missing_parts,
    open_checkpoint,
    open_set,
    read_head,
    refuse_nonfinite,
    set_adapters_apart,
    take_network,
)
from worldline.weights.keymap import KeyMap, match, matches
from worldline.weights.known import BESIDE_WEIGHTS, foreign
from worldline.weights.stream import load_into

if TYPE_CHECKING:
    from worldline.parallel.tensor import ShardPlan
    from worldline.weights.lora import Adapter

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=Hashable)
Anchors = tuple[str, ...] | Callable[[], tuple[str, ...]]

DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
VAE_LAYOUTS = [f"{folder}{name}" for folder in ("", "vae/") for name in DIFFUSERS_FILES]
# released transformers whose file names start with a hash, and what their training writes
_HASHED = "*_ema_bf16.pt"
_TRAINING = re.compile(r"iter_(\d+)(?:_((?:ema_|reg_)?model|model_mp_0))?\.pt")
_KINDS = ("", "model_mp_0", "model", "reg_model", "ema_model")  # of one iteration, the best last
_MOST_FOLDERS = 100_000  # of a level that are looked at; below / there are more
ADAPTERS = ("iter_*_adapter", "checkpoints/iter_*_adapter")  # of a run, in its folders
LATEST = "latest_checkpoint.txt"
TRAINING_STATE = ("optim", "optimizer", "scheduler", "trainer", "dataloader")  # folders

_PROMPT = "a prompt to be checked"  # is in no conversation
_BRACKETS = re.compile(r"<[^<>\n]{1,80}>|\[[^\[\]\n]{1,80}\]")
# kinds of files in a folder of transformers
_FILES = (".json", ".jinja", ".model", ".txt", ".safetensors")

Count = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
Number = Annotated[float, Field(strict=True, gt=0, lt=1e12)]
Flag = Annotated[bool, Field(strict=True)]


@functools.cache
def shapes_of(kind: Callable[[Any], nn.Module], config: Hashable) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter of a network, which is not built."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in kind(config).named_parameters()}


@dataclass(frozen=True)
class Network(Generic[Config]):
    """A network on disk, of which headers are read; or one that is only planned for.

    Attributes:
        kind: its class, built of the config.
        config: its configuration.
        source: its tensors; none where it is only planned for.
        keys: from their names to ours.
        beside: files beside the tensors that decide what it computes.
        layouts: every naming of its tensors in files, by which adapters are matched.
        adapters: LoRA adapters that are merged when it is read.
    """

    kind: Callable[[Config], nn.Module]
    config: Config
    source: Checkpoint = Checkpoint(Path(), "", {})  # noqa: RUF009 - frozen
    keys: KeyMap = KeyMap({})  # noqa: RUF009
    beside: tuple[Path, ...] = ()
    layouts: tuple[KeyMap, ...] = ()
    adapters: tuple["Adapter", ...] = ()

    def check(self) -> Self:
        """Itself, with an adapter beside its weights; every parameter is there, and nothing else.

        Raises:
            CheckpointError: `match` fails, or there is no network of this config.
        """
        try:
            shapes = shapes_of(self.kind, self.config)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: no such network: {error}") from error
        match(self.source.tensors, shapes, self.keys, self.source)
        return self.adapted(self.match_adapter(self.source)) if self.source.adapters else self

    def match_adapter(self, source: Checkpoint, scale: float = 1.0) -> "Adapter":
        """A LoRA adapter in an opened file, beside weights or alone; see `lora.read_adapter`."""
        from worldline.weights.lora import read_adapter

        shapes = shapes_of(self.kind, self.config)
        kind = "the weights beside it" if source.adapters else str(self.path)
        return read_adapter(source, self.layouts, shapes, kind=kind, scale=scale)

    def adapted(self, adapter: "Adapter") -> Self:
        """The same network with one more adapter; a scale of 0 changes no bit."""
        entries = dict(self.source.entries)
        for name, base in self.source.entries.items():
            update = adapter.updates.get(self.keys.ours(name) or "")
            if update is not None and update.scale:
                before = base.updates if isinstance(base, MergedTensor) else ()
                base = base.base if isinstance(base, MergedTensor) else base
                entries[name] = MergedTensor(base, (*before, update))
        source = replace(self.source, entries=entries)
        return replace(self, source=source, adapters=(*self.adapters, adapter))

    def bare(self) -> Self:
        """The same network without its adapters."""
        entries = {
            name: entry.base if isinstance(entry, MergedTensor) else entry
            for name, entry in self.source.entries.items()
        }
        return replace(self, source=replace(self.source, entries=entries), adapters=())

    @property
    def path(self) -> Path:
        return self.source.path

    def by_names(self, keys: KeyMap) -> Checkpoint:
        """Its tensors by the names of a map; of its own one, with what is stored but not read."""
        shapes, entries = shapes_of(self.kind, self.config), {}
        prefix = keys.prefixes[0]
        bare = not any(name.startswith(prefix) for name in self.source.entries)
        for name, entry in self.source.entries.items():
            ours = self.keys.ours(name) or ""
            if ours in shapes:
                entries[keys.released(ours)] = entry
            elif keys == self.keys:
                entries[f"{prefix}{name}" if bare else name] = entry
        return replace(self.source, entries=entries)

    def require(self, **values: Any) -> None:
        """Refuse a configuration that a layout has no place for (CheckpointError)."""
        for name, value in values.items():
            if (own := getattr(self.config, name)) != value:
                raise CheckpointError(
                    f"{self.path}: {name} is {own!s:.60}, which that layout cannot hold (it has "
                    f"{value!s:.60})"
                )

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the names and values of its tensors."""
        return *self.source.notes, *map(str, self.adapters)

    @property
    def files(self) -> list[Path]:
        """Every file that decides what it computes."""
        adapters = (file for adapter in self.adapters for file in adapter.files)
        beside = filter(Path.exists, self.beside)
        return [*dict.fromkeys((*self.source.files, *beside, *adapters))]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights by name."""
        shapes = shapes_of(self.kind, self.config)
        return {name: math.prod(shape) for name, shape in shapes.items()}

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes.values())

    @property
    def shards(self) -> "ShardPlan | None":
        """How tensor-parallel processes share it; None where each holds all of it."""
        return getattr(self.kind, "SHARDS", None)

    @property
    def blocks(self) -> BlockPlan | None:
        """How blocks come to the device one after another; None where it moves whole."""
        return getattr(self.kind, "BLOCKS", None)

    def part(self, compute: Any) -> Self:
        """What one process holds of it, as a network of its own, of tensors that are whole yet."""
        if self.shards is None:
            return self
        return replace(self, config=self.shards.part(self.config, compute.mesh.layout.tp))

    def nbytes(self, compute: Any) -> int:
        if plan := self.sharding(compute):
            with torch.device("meta"):
                count = plan.count_shared(self.kind(self.config), compute.mesh.layout.video)
            return count * int(compute.dtype.itemsize)
        return self.part(compute).num_parameters * int(compute.dtype.itemsize)

    def sharding(self, compute: Any) -> BlockPlan | None:
        """Plan of its blocks, where processes hold rows of them."""
        return self.blocks if compute.sharded and compute.mesh.layout.video > 1 else None

    def streamed_nbytes(self, compute: Any) -> int | None:
        if self.blocks is None or self.sharding(compute):
            return None
        return self.blocks.count(self.sizes) * int(compute.dtype.itemsize)

    def read(self, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The network with its weights, for inference."""
        with torch.device("meta"):
            module = self.kind(self.config)
        load_into(module, self.source, self.keys, device=device, dtype=dtype)
        return module.requires_grad_(False).eval()

    def read_rows(
        self, plan: BlockPlan, axis: Axis, device: torch.device, dtype: torch.dtype
    ) -> tuple[nn.Module, dict[str, tuple[int, range]]]:
        """The network with one process's rows of its blocks, which alone are read; these rows."""
        with torch.device("meta"):
            module = self.kind(self.config)
        entries, held = dict(self.source.entries), plan.cut(module, axis)
        for name, entry in entries.items():
            if ours := held.get(self.keys.ours(name) or ""):
                entries[name] = entry.cut(0, ours[1].start, len(ours[1]))
        part = replace(self, kind=lambda _: module, source=replace(self.source, entries=entries))
        return part.read(device, dtype), held

    def load(self, compute: Any, *, offload: bool) -> Offloadable[Any]:
        """The network on its device, or waiting in host memory."""
        home = torch.device("cpu") if offload else compute.device
        if plan := self.sharding(compute):
            axis = compute.mesh.video
            module, held = self.read_rows(plan, axis, home, compute.dtype)
            return ShardedModule(module, compute.device, held, axis, offload=offload)
        if self.shards is None:
            module = self.read(home, compute.dtype)
        else:
            axis = compute.mesh.tp
            part = replace(self.part(compute), source=cut(self.source, axis))
            module = part.read(home, compute.dtype)
            self.shards.join(module, axis)
        return Offloadable(module, compute.device, offload=offload, blocks=self.blocks)


class Settings(BaseModel):
    """Fields of config.json that no tensor implies; others in the file are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    @classmethod
    def parse(cls, settings: Mapping[str, Any], path: Path) -> Self:
        """Checked settings of a file; null is not stated."""
        try:
            return cls.model_validate({k: v for k, v in settings.items() if v is not None})
        except ValidationError as error:
            wrong = error.errors()[0]
            field = str(wrong["loc"][0])
            value = settings.get(field)
            raise CheckpointError(f"{path}: {field} is {value!r:.80}; {wrong['msg']}") from None


class Shapes:
    """Shapes of a network's tensors in a file, by our names; `match` reports unknown ones."""

    def __init__(self, source: Checkpoint, keys: KeyMap, kind: str) -> None:
        """`kind` is the network in words."""
        self.source, self.keys, self.kind = str(source), keys, kind
        self.shapes = {keys.ours(name) or "": info.shape for name, info in source.tensors.items()}

    def size(self, name: str, axis: int = 0) -> int:
        """Length of an axis that must be there."""
        shape = self.shapes.get(name, ())
        if axis >= len(shape) or not shape[axis]:
            state = f"is {list(shape)}" if name in self.shapes else "is absent"
            released = self.keys.released(name)
            raise CheckpointError(f"{self.source}: not {self.kind} (tensor {released} {state})")
        return shape[axis]

    def count(self, blocks: str) -> int:
        """Number of blocks, by the names of their tensors."""
        return 1 + max(int(n.split(".")[1]) for n in self.shapes if n.startswith(f"{blocks}."))


def weights_file(
    path: Path, anchors: Anchors = (), preferred: Sequence[str] = (), kind: str = "model.pt"
) -> Path:
    """File of a transformer: of NVIDIA's layout or, where there is none, of diffusers'.

    Args:
        path: a released folder, a diffusers folder (the `transformer` folder or the one around it),
            a folder of a training, or a file, which is taken whatever lies beside it.
        anchors: as for `find_files`.
        preferred: names that come before those of transformers.
        kind: as for `find_files`.

    Returns:
        The file; of tensor-parallel shards the first, of several training checkpoints the newest.
    """
    if path.is_file():
        named = _TRAINING.fullmatch(path.name)
        if named is None or holds_tensors(path):
            return path
        return path.with_name(training_files(path.parent, int(named[1]))[0])
    hashed = sorted(path.glob(_HASHED))
    if any(map(os.path.lexists, (path / name for name in preferred))):
        hashed = []
    if len(hashed) > 1:
        names = ", ".join(file.name for file in hashed)
        raise CheckpointError(f"{path} holds several transformers ({names}); name one of them")

    def ranked() -> Iterator[str]:
        yield from preferred
        for pattern in ADAPTERS:
            for name in newest_first(path, pattern):
                yield from (f"{name}/{file}" for file in preferred)
        yield from (file.name for file in hashed)
        yield from TRANSFORMER_FILES
        yield from training_files(path)
        yield from (f"checkpoints/{name}" for name in training_files(path / "checkpoints"))
        yield from (file.name for file in find_shards(path)[:1])
        yield from (f"transformer/{name}" for name in DIFFUSERS_FILES)
        yield from DIFFUSERS_FILES
        yield from distributed_files(path)
        yield from whole_files(path)

    return find_files(path, ranked(), kind, anchors)[0]


def newest_first(folder: Path, pattern: str) -> list[str]:
    """Names below a folder that match a pattern, of later steps first."""
    return sorted((str(path.relative_to(folder)) for path in folder.glob(pattern)), reverse=True)


def adapter_folder(folder: Path) -> Path | None:
    """Folder of an adapter without weights: itself, or the newest of a run of adapters alone."""
    from worldline.weights.lora import ADAPTER_FILES

    if (folder / ADAPTER_FILES[0]).is_file():
        return folder
    names = [name for pattern in ADAPTERS for name in newest_first(folder, pattern)]
    if not names or training_files(folder) or training_files(folder / "checkpoints"):
        return None
    return None if distributed_files(folder) else folder / names[0]


def last_resorts(folder: Path) -> Iterator[str]:
    """Names of what trainings write to a folder, which are looked for in this order."""
    yield from training_files(folder)
    yield from distributed_files(folder)


def training_files(folder: Path, iteration: int | None = None) -> list[str]:
    """Names of the files `iter_*.pt` with weights of a training run, the newest first.

    Trainers put weights, averaged weights and training state into files of their own, and parts
    of tensor-parallel processes, of which the first stands for all.

    Args:
        folder: of the files.
        iteration: whose files they are; by default that in `latest_checkpoint.txt`, for a newer one
            may not be whole, and without that file any.

    Raises:
        CheckpointError: there are files, but none of that iteration.
    """
    files = (_TRAINING.fullmatch(file.name) for file in folder.glob("iter_*.pt"))
    ranked = {m[0]: (int(m[1]), _KINDS.index(m[2] or "")) for m in files if m}
    chosen = _latest(folder) if iteration is None else iteration
    names = [name for name, (number, _) in ranked.items() if chosen in (None, number)]
    if ranked and not names:
        raise _missing(folder, chosen)
    return sorted(names, key=ranked.__getitem__, reverse=True)


def latest_name(folder: Path) -> str:
    """What a training run names as its last whole checkpoint; empty without, or if unreadable."""
    with suppress(OSError, ValueError):
        return (folder / LATEST).read_text()
    return ""


def _latest(folder: Path) -> int | None:
    """Iteration that a training run names as its last whole one."""
    with suppress(ValueError):  # of thousands of digits
        if match := re.match(r"iter_(\d+)(\.pt)?\s*$", latest_name(folder)):
            return int(match[1])
    return None


def _missing(folder: Path, number: int | None) -> CheckpointError:
    return CheckpointError(
        f"{folder / LATEST} names iteration {number}, of which there are no weights; name a file"
    )


def distributed_files(folder: Path) -> list[str]:
    """Distributed checkpoints in a folder or up to three levels below, the newest alone.

    There is none where the newest iteration has whole files in its place.

    Raises:
        CheckpointError: there are those of several runs, or none of the newest iteration.
    """
    levels = (islice(folder.glob("*/" * level), _MOST_FOLDERS) for level in (1, 2, 3))
    paths = filter(Path.is_file, (path / METADATA for path in chain([folder], *levels)))
    names = [path.relative_to(folder) for path in paths if not is_state_folder(path.parent)]
    runs = sorted({re.sub(r"\d+", "*", str(name.parent)) for name in names})
    if len(runs) > 1:
        raise CheckpointError(
            f"{folder} holds distributed checkpoints of several runs ({', '.join(runs):.200}); "
            "name one of them"
        )
    latest = _latest(folder) or _latest(folder / "checkpoints")
    if names and latest is not None:
        names = [name for name in names if re.search(rf"\biter_0*{latest}\b", str(name))]
        if not names and not whole_files(folder):
            raise _missing(folder, latest)
    names.sort(key=lambda name: [*map(int, re.findall(r"\d+", str(name)))])
    return [str(name) for name in names[-1:]]


def whole_files(folder: Path) -> list[str]:
    """Files that stand for the newest distributed checkpoint of a training, averages first."""
    return [
        str(path.relative_to(folder))
        for place in (folder, folder / "checkpoints")
        for name in ("model_ema_bf16.pt", "model.pt")
        if (path := place / f"iter_{_latest(place) or 0:09}" / name).is_file()
    ]


def is_state_folder(folder: Path) -> bool:
    """Whether a folder is of a training's state: a trainer's, or one of ours."""
    return folder.name in TRAINING_STATE or folder.suffix == ".state"


def find_files(
    folder: Path, layouts: Iterable[Sequence[str]], kind: str, anchors: Anchors = ()
) -> list[Path]:
    """Files of the first layout, one name or several, that is there; else the only weights.

    Args:
        folder: where they are looked for; the only weights, beside the names of `layouts`, too.
        layouts: in order of preference.
        kind: what is missing, for the message.
        anchors: ends of names of tensors, or what lists them when they are needed; one of them is
            in weights of this kind. They decide about files whose names do not.

    Raises:
        CheckpointError: there is none, or half of one, or several of unknown names.
    """
    tried: list[str] = []
    half = ""
    for layout in layouts:
        names = (layout,) if isinstance(layout, str) else layout
        # a link whose file is missing is there: it is an error by its name
        absent = [name for name in names if not os.path.lexists(folder / name)]
        if not absent:
            return [folder / name for name in names]
        if len(absent) < len(names):
            half = f"; it is half downloaded: {absent[0]} is missing"
        tried += names
    others: list[str] = []
    ends = anchors() if callable(anchors) else anchors
    for place in dict.fromkeys((folder / name).parent for name in tried if not half):
        present = weights_in(place)
        files = [file for file in present if not ends or _holds(file, ends)]
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise CheckpointError(f"{place} holds several files ({names:.200}); name one of them")
        if files:
            return files
        others += [file.name for file in present]
    half = half or unfinished(folder) or foreign_files(folder)
    if others and not half:
        half = f"; not of this kind: {', '.join(others):.200}"
    raise CheckpointError(f"{folder} holds no {kind} (looked for {', '.join(tried)}){half}")


def _holds(path: Path, ends: tuple[str, ...]) -> bool:
    """Whether weights hold one of some tensors, or are damaged, which is to be reported."""
    try:
        return any(name.endswith(ends) for name in open_set(path).entries)
    except CheckpointError:
        return True


def weights_in(folder: Path) -> list[Path]:
    """Files of weights in a folder, by suffix or content; one for each set of shards or parts."""
    if not folder.is_dir():
        return []
    files = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.suffix in WEIGHTS or is_container(path)
    }
    for index in sorted(folder.glob("*.index*.json")):
        listed = {path.name for path in indexed_files(index)}
        if files.keys() & listed:
            files = {name: path for name, path in files.items() if name not in listed}
            files[index.name] = index
    firsts: dict[object, Path] = {}
    for name, path in files.items():
        shard, part = SHARD.fullmatch(name), PART.fullmatch(name)
        if part is None or not missing_parts(path):
            key = (shard or part or {"stem": name})["stem"]
            firsts.setdefault((bool(shard), bool(part), key), path)
    return [*firsts.values()]


def foreign_files(folder: Path) -> str:
    """End of a message about a folder without weights that others may have made; "" else."""
    marks = ("weights/metadata.json", "weights/common.pt", "model_config.yaml", "*.nemo")
    if any(any(folder.glob(mark)) for mark in marks):
        return "; it is of NeMo (Megatron), which Worldline does not read: export its state_dict()"
    for pattern in (*ADAPTERS, "adapter_model.*", "pytorch_lora_weights.*"):
        for name in newest_first(folder, pattern)[:1]:
            return f"; {name} is a LoRA adapter, which is given beside its model (--lora)"
    with suppress(CheckpointError):  # of a file that cannot be read
        for path in sorted(filter(Path.is_file, folder.glob("*"))):
            if (kind := foreign(read_head(path))) and kind not in BESIDE_WEIGHTS:
                return f"; {path.name} is {kind}, which Worldline does not read"
    return ""


def open_weights(path: Path | Checkpoint, anchors: Anchors = ()) -> Checkpoint:
    """Open the transformer that `weights_file` finds, all files of a set as one, adapters apart.

    A checkpoint that is open already is returned.

    Raises:
        CheckpointError: there is none, or it is incomplete or damaged.
    """
    if isinstance(path, Checkpoint):
        return path
    return set_adapters_apart(open_set(weights_file(path, anchors)))


def open_adapter(path: Path) -> Checkpoint:
    """Open a LoRA adapter: a file, or a folder of PEFT, diffusers or a training; see `lora`.

    Raises:
        CheckpointError: as `open_weights`.
    """
    from worldline.weights.lora import ADAPTER_FILES, SIGNATURE

    kind = "LoRA adapter, neither PEFT's nor diffusers' nor that of a run, iter_N_adapter/"
    return open_set(weights_file(path, SIGNATURE, ADAPTER_FILES, kind))


def read_settings(folder: Path) -> dict[str, Any]:
    """Content of `config.json` in a folder; {} where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / "config.json"
    return read_json(path) if path.exists() else {}


def require_settings(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a config.json of diffusers.

    Raises:
        CheckpointError: it cannot be read, or states another value than one of `expected`.
    """
    settings = read_json(path)
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} is {settings[name]!r}; it must be {value!r}")
    return settings


def read_network(
    kind: Callable[[], nn.Module],
    path: Path,
    key_map: Callable[[nn.Module], KeyMap],
    device: torch.device | str = "cpu",
) -> Any:
    """A network with the weights of a file, in float32, for inference."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing{unfinished(path.parent)}")
    with torch.device("meta"):
        network = kind()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            # counted in training alone, and absent from files of old torch
            module.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    keys, counts = key_map(network), ("*.num_batches_tracked",)
    source = take_network(open_checkpoint(path), (keys.anchor,), keys.prefixes)
    for note in source.notes if not keys.prefixes[0] else ():  # else it was released so
        logger.info("%s: %s", path, note)
    load_into(network, source, keys, device=device, dtype=torch.float32, optional=counts)
    return network.requires_grad_(False).eval()


def pretrained(kind: Any, folder: Path, dtype: torch.dtype, unused: Collection[str] = ()) -> Any:
    """A network of transformers for inference, on the CPU.

    `unused` are patterns of tensors in the file that it has no place for.

    Raises:
        CheckpointError: the folder is absent or incomplete, or its tensors are not the network's
            or not finite.
    """
    from transformers.utils import logging

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json{unfinished(folder)}")
    refuse_broken_files(folder)
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would warn of is an error below
    try:
        network, report = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,  # a pickle is never opened
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named; none is accepted
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}{unfinished(folder)}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    # transformers would draw such weights at random
    wrong = {*report["missing_keys"], *map(str, report["mismatched_keys"])}
    wrong |= {name for name in report["unexpected_keys"] if not matches(name, unused)}
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit {kind.__name__}: missing, unknown or of another shape are "
            f"{', '.join(sorted(wrong)[:3])}"
        )
    for name, tensor in network.state_dict().items():
        # a sum takes one pass, and is finite but for numbers that are not, or huge
        if not tensor.sum(dtype=torch.float32).isfinite():
            refuse_nonfinite(folder, name, tensor)
    return network.requires_grad_(False).eval()


def refuse_broken_files(folder: Path) -> None:
    """Refuse a folder of transformers in which a file is not whole (CheckpointError)."""
    paths = sorted(folder.iterdir())
    names = tuple(path.name for path in paths if path.suffix in _FILES)
    for path in paths:
        lost = path.suffix in UNFINISHED and not path.name.startswith(names)
        if path.suffix in _FILES or lost:
            refuse_broken(path)
        if path.match("model*.safetensors") or path.name == "model.safetensors.index.json":
            open_checkpoint(path)
        elif path.suffix == ".json" and path.name != "tokenizer.json":  # which is read at once
            read_json(path)


def pretrained_tokenizer(folder: Path, *, chat: bool = True) -> Any:
    """A tokenizer of transformers; for a `chat` it must know how a conversation is written.

    Raises:
        CheckpointError: a file is absent or damaged, or there is no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the packages raise plain Exception for a damaged file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]  # of a page of advice
        raise CheckpointError(
            f"{folder} holds no tokenizer ({reason}){unfinished(folder)}"
        ) from error
    if chat and not tokenizer.chat_template:
        raise CheckpointError(f"{folder} holds no chat template (chat_template.jinja)")
    return tokenizer


def mark_breaker(
    tokenizer: Any, question: Callable[[str], str], folder: Path
) -> Callable[[str], str]:
    """Function that makes words of what would end a prompt's turn in a conversation.

    That is the tokenizer's own marks, brackets of the conversation's text, such as "[/INST]" or
    "<END CONVERSATION>", and, where the text names who speaks, a line that begins with a speaker.
    `question` makes the text of a prompt.

    Raises:
        CheckpointError: the chat template of the folder is damaged.
    """
    where = f"{folder}: its chat template (chat_template.jinja)"
    try:
        before, prompt, after = question(_PROMPT).partition(_PROMPT)
    except Exception as error:  # a template may raise anything
        raise CheckpointError(f"{where} fails: {one_line(error)}") from error
    if not prompt:
        raise CheckpointError(f"{where} leaves the prompt out")
    marks = {*tokenizer.get_added_vocab(), *_BRACKETS.findall(f"{before}\n{after}")}
    words = (re.findall(r"\w+|[^\w\s]", mark) for mark in sorted(marks, key=len, reverse=True))
    patterns = [r"\s*".join(map(re.escape, each)) for each in words if len("".join(each)) > 1]
    if speaker := re.search(r"(\w+):\s*$", before):
        patterns.append(rf"(?<=[\n\r])\s*(?:{speaker[1]}|user|agent|assistant)\s*:")
    pattern = re.compile("|".join(patterns) or "(?!)", re.IGNORECASE)

    def broken(match: re.Match[str]) -> str:
        mark = match[0].lstrip()
        return f"({mark[1:-1]})" if mark[0] in "<[" else f"{mark[0]} {mark[1:]}"

    return functools.partial(pattern.sub, broken)
