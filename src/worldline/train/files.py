"""Files of a trained model, in the names and layouts of the released trainers.

They hold weights alone: what a run needs to go on is in its states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldline.files import remove, replacing
from worldline.parallel.mesh import Axis
from worldline.train.lora import save_peft
from worldline.weights.keymap import KeyMap

LATEST = "latest_checkpoint.txt"


@dataclass(frozen=True)
class ModelFile:
    """One file of a checkpoint.

    Attributes:
        name: with `{step:09}` in it.
        kind: the weights, their average, or the number of the step alone.
        dtype: of its tensors.
    """

    name: str
    kind: Literal["weights", "average", "iteration"]
    dtype: torch.dtype = torch.bfloat16

    def path(self, folder: Path, step: int) -> Path:
        return folder / self.name.format(step=step)

    def shard(self, rank: int) -> ModelFile:
        """What one tensor-parallel process writes in its place."""
        stem, _, suffix = self.name.rpartition(".")
        return ModelFile(f"{stem}_model_mp_{rank}.{suffix}", self.kind, self.dtype)


@dataclass(frozen=True)
class Checkpoints:
    """Files of a run's checkpoints.

    Attributes:
        folder: of the files.
        files: of a checkpoint, in the order in which they are written.
        latest: what LATEST holds.
        released: our name of a parameter -> that in files.
        buffers: further tensors of files, by their names there.
        tp: processes that hold parts of the layers, each of which writes a shard.
        cut: axis on which they are cut, by our names.
    """

    folder: Path
    files: tuple[ModelFile, ...]
    latest: str
    released: Callable[[str], str]
    buffers: Mapping[str, Tensor]
    tp: Axis
    cut: Mapping[str, int]

    def nbytes(self, counts: Mapping[str, int]) -> int:
        """Bytes of a checkpoint, of numbers of numbers by our names."""
        kinds = [file.dtype.itemsize for file in self.files if file.kind != "iteration"]
        return sum(kinds) * sum(counts.values())

    def gather(
        self, step: int, tensors: Callable[[str], Iterator[tuple[str, Tensor]]], writes: bool
    ) -> Callable[[], None]:
        """Collect a checkpoint from all processes; what writes it, in a thread.

        Args:
            step: number of steps done.
            tensors: kind -> whole tensors by our names, one at a time.
            writes: whether this process writes; all gather.
        """
        contents: list[tuple[ModelFile, dict[str, Any]]] = []
        for file in self.files:
            if file.kind == "iteration":
                content: dict[str, Any] = {"iteration": step}
            else:
                content = {}
                for name, tensor in tensors(file.kind):
                    if writes:
                        part = self._part(name, tensor).to("cpu", file.dtype, copy=True)
                        content[self.released(name)] = part.contiguous()
                content |= self.buffers
                file = file.shard(self.tp.rank) if self.tp.count > 1 else file
            if writes and (file.kind != "iteration" or self.tp.first):
                contents.append((file, content))

        def write() -> None:
            for file, content in contents:
                path = file.path(self.folder, step)
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    torch.save(content, temporary)
            if contents and self.tp.first:
                with replacing(self.folder / LATEST) as temporary:
                    temporary.write_text(f"{self.latest.format(step=step)}\n")

        return write

    def remove(self, step: int) -> None:
        """Remove the files of a checkpoint that is not kept."""
        for file in self.files:
            for one in (file, *(file.shard(rank) for rank in range(self.tp.count))):
                one.path(self.folder, step).unlink(missing_ok=True)

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        axis = self.cut.get(name)
        return tensor if axis is None else self.tp.part(tensor, axis)


@dataclass(frozen=True)
class AdapterCheckpoints:
    """Folders of a run's adapters, `iter_{step}_adapter`, in the form of PEFT.

    Attributes:
        folder: of the folders.
        kind: the weights, or their average.
        adapted: name of a matrix -> names of the parameters of its halves.
        scale: of the product.
        keys: released names.
    """

    folder: Path
    kind: Literal["weights", "average"]
    adapted: Mapping[str, tuple[str, str]]
    scale: float
    keys: KeyMap

    def path(self, step: int) -> Path:
        return self.folder / f"iter_{step:09}_adapter"

    def nbytes(self, counts: Mapping[str, int]) -> int:
        """Bytes of a folder, of numbers of numbers by our names."""
        return 4 * sum(counts[name] for pair in self.adapted.values() for name in pair)

    def gather(
        self, step: int, tensors: Callable[[str], Iterator[tuple[str, Tensor]]], writes: bool
    ) -> Callable[[], None]:
        """As of `Checkpoints`."""
        wanted = {name for pair in self.adapted.values() for name in pair}
        found = {
            name: tensor.float().to("cpu", copy=True)
            for name, tensor in tensors(self.kind)
            if name in wanted
        }
        halves = {name: (found[down], found[up]) for name, (down, up) in self.adapted.items()}

        def write() -> None:
            if not writes:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.path(step)) as temporary:
                save_peft(halves, self.scale, self.keys, temporary)
            with replacing(self.folder / LATEST) as temporary:
                temporary.write_text(f"{self.path(step).name}\n")

        return write

    def remove(self, step: int) -> None:
        """Remove an adapter that is not kept."""
        remove(self.path(step))
