"""Files of a trained model, in the names and layouts of the released trainers.

By default they hold weights alone: what a run needs to go on is in its states.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from worldline.files import remove, remove_stale, replacing
from worldline.parallel.mesh import Axis
from worldline.train.lora import Halves, save_diffusers, save_peft
from worldline.train.sharding import fill
from worldline.train.states import dcp, quiet
from worldline.weights.keymap import KeyMap
from worldline.weights.lora import ADAPTER_FILES
from worldline.weights.networks import LATEST, latest_name
from worldline.weights.trainings import MOMENTS, StoredState, TrainerState

log = logging.getLogger(__name__)

_SETTINGS = "config.json"
ADAPTER = "iter_{step:09}_adapter"  # folder of an adapter
_STEP = re.compile(r"iter_(\d{9})")
_PART = re.compile(r"_mp_(\d+)\.pt$")  # of processes that share layers

# kind, one of weights, average, exp_avg, exp_avg_sq -> whole tensors by our names, one at a time
Tensors = Callable[[str], Iterator[tuple[str, Tensor]]]
Contents = dict[str, Callable[[Path], object]]  # name of a file or folder -> what writes it


@dataclass(frozen=True)
class Names:
    """Names and parts that tensors of a run have in files.

    Attributes:
        released: our name of a parameter -> that in files.
        tp: processes that hold parts of the layers, each of which writes a shard.
        cut: axis on which they are cut, by our names.
        buffers: further tensors of files, by their names there.
    """

    released: Callable[[str], str]
    tp: Axis
    cut: Mapping[str, int]
    buffers: Mapping[str, Tensor]

    def collect(
        self, named: Iterator[tuple[str, Tensor]], dtype: torch.dtype, writes: bool
    ) -> dict[str, Tensor]:
        """Tensors on the CPU by released names; all processes gather, and some keep none."""
        found = {}
        for name, tensor in named:
            if writes:
                part = self.part(name, tensor).to("cpu", dtype, copy=True)
                found[self.released(name)] = part.contiguous()
        return found

    def beside(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Buffers in the precision of a file; counters as they are."""
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.buffers.items()
        }

    def part(self, name: str, tensor: Tensor) -> Tensor:
        axis = self.cut.get(name)
        return tensor if axis is None else self.tp.part(tensor, axis)


class Form(Protocol):
    """Files that hold a model in one way."""

    def nbytes(self, counts: Mapping[str, int]) -> int:
        """Bytes of a checkpoint, of numbers of numbers by our names."""

    def names(self, step: int) -> list[str]:
        """Files and folders of a checkpoint."""

    def gather(self, step: int, tensors: Tensors, writes: bool) -> Contents:
        """Collect a checkpoint from all processes; what those have to write that write."""


@dataclass(frozen=True)
class ModelFile:
    """One file of weights alone.

    Attributes:
        name: with `{step:09}` in it.
        kind: the weights, their average, or the number of the step alone.
        dtype: of its tensors.
    """

    name: str
    kind: Literal["weights", "average", "iteration"]
    dtype: torch.dtype
    tensors: Names

    def nbytes(self, counts: Mapping[str, int]) -> int:
        return self.dtype.itemsize * sum(counts.values()) if self.kind != "iteration" else 0

    def names(self, step: int) -> list[str]:
        return [self._name(step, rank) for rank in range(self.tensors.tp.count)]

    def gather(self, step: int, tensors: Tensors, writes: bool) -> Contents:
        tp = self.tensors.tp
        if self.kind == "iteration":
            content: dict[str, Any] = {"iteration": step}
            writes &= tp.first
        else:
            content = self.tensors.collect(tensors(self.kind), self.dtype, writes)
            content |= self.tensors.beside(self.dtype)
        return {self._name(step, tp.rank): partial(_pickle, content)} if writes else {}

    def _name(self, step: int, rank: int) -> str:
        name = self.name.format(step=step)
        if self.kind == "iteration" or self.tensors.tp.count == 1:
            return name
        stem, _, suffix = name.rpartition(".")
        return f"{stem}_model_mp_{rank}.{suffix}"


@dataclass(frozen=True)
class AdapterFolder:
    """Folder ADAPTER, from which PEFT, diffusers and we read it.

    Attributes:
        kind: the weights, or their average.
        adapted: name of a matrix -> names of the parameters of its halves.
        scale: of the product.
        keys: released names.
        diffusers: names in diffusers; None of models that it has not.
    """

    kind: Literal["weights", "average"]
    adapted: Mapping[str, tuple[str, str]]
    scale: float
    keys: KeyMap
    diffusers: KeyMap | None

    def nbytes(self, counts: Mapping[str, int]) -> int:
        copies = 1 if self.diffusers is None else 2
        return 4 * copies * sum(counts[name] for pair in self.adapted.values() for name in pair)

    def names(self, step: int) -> list[str]:
        return [ADAPTER.format(step=step)]

    def gather(self, step: int, tensors: Tensors, writes: bool) -> Contents:
        wanted = {name for pair in self.adapted.values() for name in pair}
        found = {
            name: tensor.float().to("cpu", copy=True)
            for name, tensor in tensors(self.kind)
            if name in wanted
        }
        halves = {name: (found[down], found[up]) for name, (down, up) in self.adapted.items()}
        [name] = self.names(step)
        return {name: partial(self._write, halves)} if writes else {}

    def _write(self, halves: Halves, folder: Path) -> None:
        save_peft(halves, self.scale, self.keys, folder)
        if self.diffusers is not None:
            save_diffusers(halves, self.scale, self.diffusers, folder / ADAPTER_FILES[2])


@dataclass(frozen=True)
class ReferenceFiles:
    """Files of the family's released trainer, those of its optimizer among them.

    Attributes:
        files: the family's: a state -> names and contents; a name without a suffix is the folder of
            a distributed checkpoint.
        order: sorts released names as the trainer's optimizer has them.
        dtype: of moments.
        trained: names of what is trained, ours.
        settings: step -> fields of the `TrainerState` that are no tensors.
        average: whether averages are kept.
    """

    files: Callable[[TrainerState], dict[str, Any]]
    order: Callable[[str], Any]
    dtype: torch.dtype
    tensors: Names
    trained: tuple[str, ...]
    settings: Callable[[int], dict[str, Any]]
    average: bool

    def nbytes(self, counts: Mapping[str, int]) -> int:
        """Bytes of what the family writes of tensors of these sizes, which take no memory."""

        def planned(names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
            return {
                self.tensors.released(name): torch.empty(counts[name], dtype=dtype, device="meta")
                for name in names
            }

        average = planned(self.trained, torch.float32) if self.average else {}
        moments = {name: (one, one) for name, one in planned(self.trained, self.dtype).items()}
        weights = planned(counts, torch.bfloat16)
        state = replace(self._state(0), weights=weights, average=average, moments=moments)
        return _nbytes(self.files(state))

    def names(self, step: int) -> list[str]:
        ranks = range(self.tensors.tp.count)
        states = (replace(self._state(step), rank=rank) for rank in ranks)
        return [*dict.fromkeys(name for state in states for name in self.files(state))]

    def gather(self, step: int, tensors: Tensors, writes: bool) -> Contents:
        names, bf16 = self.tensors, torch.bfloat16
        weights = names.collect(tensors("weights"), bf16, writes) | names.beside(bf16)
        average = {}
        if self.average:
            average = names.collect(tensors("average"), torch.float32, writes)
        first, second = (names.collect(tensors(kind), self.dtype, writes) for kind in MOMENTS)
        moments = {name: (first[name], second[name]) for name in sorted(first, key=self.order)}
        state = replace(self._state(step), weights=weights, average=average, moments=moments)
        if not writes:
            return {}
        return {name: partial(_save, name, each) for name, each in self.files(state).items()}

    def _state(self, step: int) -> TrainerState:
        tp = self.tensors.tp
        settings = self.settings(step)
        return TrainerState(step, self.average, **settings, rank=tp.rank, count=tp.count)


def _nbytes(content: Any) -> int:
    """Bytes of all tensors in dicts and lists."""
    if isinstance(content, Mapping):
        return sum(map(_nbytes, content.values()))
    if isinstance(content, list | tuple):
        return sum(map(_nbytes, content))
    return content.nbytes if isinstance(content, Tensor) else 0


def _pickle(content: Any, path: Path) -> None:
    with path.open("wb") as file:  # by whose name torch would hide why it cannot be written
        torch.save(content, file)


def _save(name: str, content: Any, path: Path) -> None:
    """Write what a trainer does: by PyTorch, as JSON, or as a distributed checkpoint."""
    suffix = Path(name).suffix
    if suffix == ".json":
        path.write_text(json.dumps(content))
    elif suffix:
        _pickle(content, path)
    else:
        with quiet():
            dcp.save(content, checkpoint_id=path, no_dist=True)


def named_step(folder: Path) -> int:
    """Step of the newest checkpoint of a run, as LATEST has it; 0 without."""
    named = _STEP.match(latest_name(folder))
    return int(named[1]) if named else 0


@dataclass(frozen=True)
class Checkpoints:
    """Files of a run's checkpoints.

    Attributes:
        folder: of the files.
        forms: of a checkpoint, in the order in which they are written.
        latest: what LATEST holds.
        tensors: their names.
        settings: content of the config.json beside weights, wherever these lie.
    """

    folder: Path
    forms: tuple[Form, ...]
    latest: str
    tensors: Names
    settings: Mapping[str, Any]

    def nbytes(self, counts: Mapping[str, int]) -> int:
        """Bytes of a checkpoint, of numbers of numbers by our names."""
        return sum(form.nbytes(counts) for form in self.forms)

    def gather(self, step: int, tensors: Tensors, writes: bool) -> Callable[[], None]:
        """Collect a checkpoint from all processes; what writes it, in a thread.

        Args:
            step: number of steps done.
            tensors: of the run.
            writes: whether this process writes; all gather.
        """
        contents: Contents = {}
        for form in self.forms:
            contents |= form.gather(step, tensors, writes)
        tp = self.tensors.tp
        if contents and tp.first:
            parents = {Path(name).parent for name in contents}
            contents |= {str(each / _SETTINGS): self._describe for each in parents}

        def write() -> None:
            if contents and tp.first:
                for path in self._parts(step, tp.count if tp.count > 1 else 0):
                    remove(path)
            for name, save in contents.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    save(temporary)
                    if path.is_dir():  # of a run that went back
                        remove(path)

        return write

    def _describe(self, path: Path) -> None:
        path.write_text(json.dumps(self.settings, indent=1) + "\n")

    def name(self, step: int) -> None:
        """Name the newest checkpoint, once all of it and its state are on the disk."""
        with replacing(self.folder / LATEST) as temporary:
            temporary.write_text(f"{self.latest.format(step=step)}\n")

    def remove(self, step: int) -> None:
        """Remove the files of a checkpoint that is not kept, and folders that hold no others."""
        for form in self.forms:
            for name in form.names(step):
                path = self.folder / name
                remove(path)
                own = path.parent
                if own != self.folder and {*own.glob("*")} <= {own / _SETTINGS}:
                    remove(own)
        for path in self._parts(step):
            remove(path)

    def _parts(self, step: int, first: int = 0) -> Iterator[Path]:
        """Files of a step by ranks from the `first` on, of which a run may have had more."""
        for path in self.folder.glob(f"iter_{step:09}_*.pt"):
            if (part := _PART.search(path.name)) and int(part[1]) >= first:
                yield path

    def sweep(self, state: int | None) -> None:
        """Put right what a killed save left: temporaries, files without a state, the newest's name.

        Args:
            state: step of the newest state; None without one, where files may be of anyone.
        """
        for path in [*self.folder.rglob(".*.tmp")]:
            remove_stale(path.with_name(path.name[1:].rsplit(".", 2)[0]))
        if state is None:
            return
        named = named_step(self.folder)
        files = (self.folder / name for form in self.forms for name in form.names(state))
        if state > named and any(map(Path.exists, files)):  # killed behind the state
            self.name(state)
        state = max(state, named)  # of a run that went on without states
        found = {int(match[1]) for name in os.listdir(self.folder) if (match := _STEP.match(name))}
        for step in sorted(step for step in found if step > state):
            log.info("%s: files of step %d, whose save was cut short, go", self.folder, step)
            self.remove(step)

    def restore(self, stored: StoredState, state: Mapping[str, Tensor]) -> int:
        """Fill a run's state, by `kind/name`, with that of a released trainer; its step.

        Raises:
            CheckpointError: it is of another training.
        """
        for key, target in state.items():
            kind, _, name = key.partition("/")
            if kind == "step":
                target.fill_(stored.step)
                continue
            whole = stored.read(kind, self.tensors.released(name))
            fill(target, self.tensors.part(name, whole))
        return stored.step
