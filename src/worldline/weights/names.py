"""Names of tensors as trainers leave them: wrappers, sets of weights, averaged ones, scales.

No network is known here: wrappers are taken off the names of any file, and 8-bit floats are joined
with their scales.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from worldline.errors import CheckpointError

Source = Any  # of `weights.checkpoint`, which imports this module
# parts of a dotted name that DDP, FSDP, torch.compile and activation checkpointing add
_WRAPPER = re.compile(r"_?module|_\w+_mod(ule)?")
# names of sets of averaged weights, and of what training keeps beside weights
_AVERAGED = re.compile(r"(.*_)?(ema\d*|swa|avg|averaged?|shadow)(_.*)?", re.IGNORECASE)
_STATE = re.compile(
    r"(?i)(.*\.)?((\w+_)?(optim(izers?)?|schedulers?|scaler|callbacks?|loops|rng|exp_avg|momentum)"
    r"(_\w+)?(\..*)?|n_averaged|(\w+_)?(decay|epochs?|initted|iterations?|steps?|updates))"
)
_ADAPTER = re.compile(r"(^|[._])(lora|dora|loha|hada|lokr)([._]|$)", re.IGNORECASE)
# what lies beside weights of 8-bit floats and their scales, and is not needed
_BESIDE_SCALES = re.compile(r"(.*\.)?(scaled_fp8|comfy_quant|input_scale|scale_input)")
ENGINE = "self_attention.layernorm_qkv."  # in names that Transformer Engine gives, see `engine`
_BLOCK = 128  # of DeepSeek's and Wan's files


@dataclass(frozen=True, eq=False)
class ScaledTensor:
    """A tensor of 8-bit floats, and the scales by which it is multiplied.

    Attributes:
        tensor: the quotients.
        scale: one for all, one for each row, or one for each block.
        blocks: elements that share a scale, along each axis.
        skipped: along each axis, elements of the first block that the tensor does not have.
    """

    tensor: Source
    scale: Source
    blocks: tuple[int, ...]
    skipped: Mapping[int, int] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.tensor.path

    @property
    def meta(self) -> Tensor:
        return self.tensor.meta

    def cut(self, dim: int, start: int, length: int) -> "ScaledTensor":
        """Its part along an axis."""
        tensor, scale = self.tensor.cut(dim, start, length), self.scale
        if scale.meta.numel() == 1 or dim >= scale.meta.dim():
            return replace(self, tensor=tensor)
        block, begin = self.blocks[dim], start + self.skipped.get(dim, 0)
        first, end = begin // block, -(-(begin + length) // block)
        skipped = {**self.skipped, dim: begin % block}
        return replace(
            self, tensor=tensor, scale=scale.cut(dim, first, end - first), skipped=skipped
        )

    def read(self) -> Tensor:
        """The product on the CPU, float32."""
        return self.multiply(self.tensor.read(), self.scale.read())

    def multiply(self, tensor: Tensor, scale: Tensor) -> Tensor:
        """The product of read values, float32: rounded once, to the dtype that computes."""
        if scale.numel() == 1:
            return tensor.float() * scale.float().view(())
        factor = scale.float().view(*scale.shape, *[1] * (tensor.dim() - scale.dim()))
        for axis, size in enumerate(self.blocks):
            factor = factor.repeat_interleave(size, axis)
            factor = factor.narrow(axis, self.skipped.get(axis, 0), tensor.shape[axis])
        return tensor.float() * factor


def normalise(path: object, stored: Mapping[str, Source]) -> tuple[dict[str, Source], list[str]]:
    """Tensors of a file by names without wrappers, 8-bit floats with their scales; notes on both.

    Raises:
        CheckpointError: two tensors have one name then, or a scale is absent or of another form.
    """
    entries: dict[str, Source] = {}
    origins: dict[str, str] = {}
    wrappers: dict[str, None] = {}  # in order of appearance
    for name, entry in stored.items():
        *words, last = name.split(".")
        found = [word for word in words if _WRAPPER.fullmatch(word)]
        plain = ".".join([*(word for word in words if word not in found), last])
        if plain in entries:
            raise CheckpointError(
                f"{path}: {origins[plain]} and {name} are one tensor without what wrappers add to "
                "names; keep one of them"
            )
        entries[plain], origins[plain] = entry, name
        wrappers |= dict.fromkeys(found)
    notes = [f"stripped from names: {', '.join(wrappers)}"] if wrappers else []
    if count := _join_scales(path, entries):
        notes.append(f"{count:,} fp8 weights times their scales")
    return entries, notes


def _join_scales(path: object, entries: dict[str, Source]) -> int:
    """Replace 8-bit floats and their scales among entries by what they make; how many there are."""
    eights = [n for n, e in entries.items() if e.meta.is_floating_point() and e.meta.itemsize == 1]
    scales = {
        name: scale
        for name in eights
        for scale in (
            f"{name.removesuffix('weight')}scale_weight",
            f"{name}_scale",
            f"{name}_scale_inv",  # no inverse, for all its name
        )
        if scale in entries
    }
    beside = [name for name in entries if _BESIDE_SCALES.fullmatch(name)] if eights else []
    if not scales and not beside:
        return 0
    if lacking := [name for name in eights if name not in scales and name not in beside]:
        raise CheckpointError(
            f"{path}: fp8 with scales, but {len(lacking):,} tensors have none, such as {lacking[0]}"
        )
    for name in beside:
        del entries[name]
    for name, scale in scales.items():
        value, factor = entries[name], entries.pop(scale)
        size, grid = value.meta.shape, factor.meta.shape
        blocks = [_block(n, count) for n, count in zip(size, grid, strict=False)]
        fits = factor.meta.numel() == 1 or (len(grid) in (1, len(size)) and all(blocks))
        if not fits or not factor.meta.is_floating_point():
            raise CheckpointError(
                f"{path}: fp8 with scales {list(grid)} of {name} {list(size)} is not read; save it "
                "in bfloat16"
            )
        entries[name] = ScaledTensor(value, factor, tuple(blocks))
    return len(scales)


def _block(size: int, count: int) -> int:
    """Elements of an axis that share one of so many scales; 0 where that is unknown."""
    if count == -(-size // _BLOCK):
        return _BLOCK
    return size // count if count and size % count == 0 else 0


def is_adapter(name: str) -> bool:
    """Whether a tensor is of a low-rank adapter: of PEFT, diffusers, kohya or NVIDIA."""
    return bool(_ADAPTER.search(name))


def with_dots(name: str) -> str:
    """Name in which Predict1's trainer wrote `-` for `.`, as it was; other names as they are."""
    return name if "." in name.partition(".")[2] else name.replace("-", ".")


def is_averaged(name: str) -> bool:
    """Whether a dotted name, or a prefix, has a part that stands for averaged weights."""
    return any(map(_AVERAGED.fullmatch, name.split(".")))


def is_state(name: str) -> bool:
    """Whether a dotted name is of the state of a training."""
    return bool(_STATE.fullmatch(name))
