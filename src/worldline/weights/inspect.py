"""What a file of weights holds, for a reader who wonders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from worldline.weights.read import Checkpoint, TensorInfo, open_checkpoint


@dataclass(frozen=True)
class Summary:
    """A file of weights in numbers; made from its header.

    Attributes:
        path: the file.
        kind: "safetensors", "pt", "jit" or "tensor-parallel shards".
        nesting: dotted path of the dict that holds the tensors, "" for the outermost.
        num_tensors: how many.
        elements: of all tensors together, by dtype name ("bfloat16"), most first.
        nbytes: of all tensors together.
        prefix: leading string that all names share, up to a dot; "" for none.
        groups: first part of the names below the prefix -> number of tensors.
        strays: names beside the tensors that hold something else.
        beside: other parts of the file, such as "optimizer".
        metadata: text that the file carries.
        tensors: every tensor, to recognise the model by.
    """

    path: Path
    kind: str
    nesting: str
    num_tensors: int
    elements: Mapping[str, int]
    nbytes: int
    prefix: str
    groups: Mapping[str, int]
    strays: tuple[str, ...]
    beside: tuple[str, ...]
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


def describe(source: Path | Checkpoint) -> Summary:
    """Summarise a file, or a checkpoint already opened.

    Raises:
        CheckpointError: the file cannot be opened (see `open_checkpoint`).
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    tensors = checkpoint.tensors
    elements: Counter[str] = Counter()
    for info in tensors.values():
        elements[str(info.dtype).removeprefix("torch.")] += info.numel
    prefix = _common_prefix(list(tensors))
    return Summary(
        path=checkpoint.path,
        kind=checkpoint.kind,
        nesting=checkpoint.nesting,
        num_tensors=len(tensors),
        elements=dict(elements.most_common()),
        nbytes=sum(info.nbytes for info in tensors.values()),
        prefix=prefix,
        groups=dict(Counter(name[len(prefix) :].split(".")[0] for name in tensors)),
        strays=checkpoint.strays,
        beside=checkpoint.beside,
        metadata=checkpoint.metadata,
        tensors=tensors,
    )


def _common_prefix(names: list[str]) -> str:
    """The leading whole parts that all names share; a lone name has none."""
    if len(names) < 2:
        return ""
    low, high = min(names).split("."), max(names).split(".")
    shared = []
    for left, right in zip(low[:-1], high[:-1], strict=False):
        if left != right:
            break
        shared.append(f"{left}.")
    return "".join(shared)
