"""What the files of all diffusion transformers have in common.

Two layouts hold the same weights: NVIDIA's file, and the folder of diffusers'
`CosmosTransformer3DModel`. A family says what its tensors are called; the rest is here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar

from torch import nn

from worldline.errors import CheckpointError
from worldline.files import TRANSFORMER_FILES
from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import Checkpoint, open_checkpoint
from worldline.weights.shards import shard_stem

Layout = Literal["nvidia", "diffusers"]
Config = TypeVar("Config")
Ratio = tuple[float, float, float]

PATCH = (1, 2, 2)  # of every released model; no tensor tells it
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
# bookkeeping that may lie beside the weights
BOOKKEEPING = {
    "*_extra_state": "FP8 bookkeeping of Transformer Engine",
    "*_extra_state.*": "FP8 bookkeeping of Transformer Engine",
}
# the sub-blocks of a block, in their order
SUB_BLOCKS = ("attention", "cross_attention", "feed_forward")
# tensors that tell the architecture -> number of axes; our names
_TELLING = {
    "embed.weight": 2,
    "head.linear.weight": 2,
    "blocks.0.attention.modulation.first.weight": 2,
    "blocks.0.attention.body.q.weight": 2,
    "blocks.0.attention.body.q_norm": 1,
    "blocks.0.cross_attention.body.k.weight": 2,
    "blocks.0.feed_forward.body.up.weight": 2,
}
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class DiTFiles(Generic[Config]):
    """A diffusion transformer on disk, checked but not read.

    Attributes:
        source: its tensors.
        keys: from their names to ours.
        config: what they imply.
        layout: whose names they are.
    """

    source: Checkpoint
    keys: KeyMap
    config: Config
    layout: Layout


class Sizes(TypedDict):
    """What every diffusion transformer's shapes tell, by the names of its config."""

    depth: int
    width: int
    num_heads: int
    head_size: int
    hidden: int
    context_width: int
    lora_rank: int


def find_dit(path: Path, also: str = "") -> tuple[Path, Layout]:
    """Return the file that holds a diffusion transformer, and whose layout it has.

    Where a folder has both, NVIDIA's is preferred; of several `iter_*.pt`, which training saves,
    the newest.

    Args:
        path: a released folder, a diffusers folder (the `transformer` folder or the one around it),
            or the file itself.
        also: pattern of a further name that NVIDIA's file may have, preferred to all others.

    Raises:
        CheckpointError: there is none, a set is incomplete, or several files match `also`.
    """
    if path.is_file():
        return path, "diffusers" if path.name.startswith("diffusion_pytorch_model") else "nvidia"
    named = sorted(path.glob(also)) if also else []
    if len(named) > 1:
        raise CheckpointError(
            f"{path} holds several transformers, name one: {', '.join(f.name for f in named)}"
        )
    if named:
        return named[0], "nvidia"
    for name in TRANSFORMER_FILES:
        if (path / name).is_file():
            return path / name, "nvidia"
    saved = [file for file in sorted(path.glob("iter_*.pt")) if shard_stem(file) is None]
    if saved:
        return saved[-1], "nvidia"
    for folder in (path / "transformer", path):
        for name in DIFFUSERS_FILES:
            if (folder / name).is_file():
                return folder / name, "diffusers"
        parts = sorted(folder.glob("diffusion_pytorch_model-*.safetensors"))
        if parts:
            raise CheckpointError(
                f"{folder} is incomplete: it has {parts[0].name}, but not {DIFFUSERS_FILES[1]}"
            )
    others = ", ".join(f"nor {name}" for name in (also, "model.safetensors") if name)
    raise CheckpointError(
        f"{path} holds no model.pt ({others}, nor transformer/{DIFFUSERS_FILES[0]})"
    )


def open_file(file: Path) -> Checkpoint:
    """Open the file of a diffusion transformer; headers only.

    Raises:
        CheckpointError: it is damaged, or holds adapters.
    """
    source = open_checkpoint(file)
    if adapters := [name for name in source.tensors if "lora_" in name.lower()]:
        raise CheckpointError(
            f"{source.path} holds LoRA adapters ({len(adapters):,} tensors, such as "
            f"{adapters[0]}), which this version does not merge: merge them into the weights first"
        )
    return source


def check(source: Checkpoint, model: nn.Module, keys: KeyMap) -> None:
    """Check that a file holds every parameter of a model, and nothing else.

    Raises:
        CheckpointError: it does not; all that is wrong is named.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    match(source.tensors, expected, keys, str(source.path))


def read_shapes(source: Checkpoint, keys: KeyMap) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that `keys` knows, by our name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, info in source.tensors.items():
        if found := keys.find(name):  # else a stranger, which `match` reports
            shapes[found[1]] = info.shape
    return shapes


def read_sizes(
    source: Checkpoint,
    keys: KeyMap,
    shapes: Mapping[str, tuple[int, ...]],
    telling: Mapping[str, int],
) -> Sizes:
    """Return the sizes that the shapes of a diffusion transformer tell.

    Args:
        source: named in the message.
        keys: likewise.
        shapes: what `read_shapes` gave.
        telling: further tensors that there must be, and their number of axes.

    Raises:
        CheckpointError: a tensor is absent or of another kind.
    """
    for needed, axes in {**_TELLING, **telling}.items():
        if len(shapes.get(needed, ())) != axes or 0 in shapes[needed]:
            state = f"is {list(shapes[needed])}" if needed in shapes else "is absent"
            raise CheckpointError(
                f"{source.path}: not a Cosmos diffusion transformer of this kind "
                f"(tensor {keys.released(needed)} {state})"
            )
    [head_size] = shapes["blocks.0.attention.body.q_norm"]
    return Sizes(
        depth=1 + max(int(found[1]) for name in shapes if (found := _BLOCK.match(name))),
        width=shapes["embed.weight"][0],
        num_heads=shapes["blocks.0.attention.body.q.weight"][0] // head_size,
        head_size=head_size,
        hidden=shapes["blocks.0.feed_forward.body.up.weight"][0],
        context_width=shapes["blocks.0.cross_attention.body.k.weight"][1],
        lora_rank=shapes["blocks.0.attention.modulation.first.weight"][0],
    )


def read_ratio(source: Checkpoint, given: Any) -> Ratio:
    """Return the rotary stretching in time, rows and columns that settings give.

    Raises:
        CheckpointError: it is none.
    """
    good = isinstance(given, list | tuple) and len(given) == 3
    if not good or not all(isinstance(n, int | float) and n > 0 for n in given):
        raise CheckpointError(
            f"{source.path}: rope_ratio is {given!r}; it must be three numbers above 0"
        )
    time, rows, columns = (float(number) for number in given)
    return time, rows, columns


def diffusers_settings(folder: Path, positions: str | None) -> dict[str, Any]:
    """Return our settings from the config.json of a diffusers transformer.

    Args:
        folder: with the file.
        positions: what it must say of extra positions.

    Raises:
        CheckpointError: it cannot be read, or is of another kind of model.
    """
    path = folder / "config.json"
    try:
        given = json.loads(path.read_text())
        ratio = given["rope_scale"]
        stated = given.get("extra_pos_embed_type", "learnable")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read, or has no rope_scale: {error!r}") from error
    if stated != positions:
        raise CheckpointError(
            f"{path}: extra_pos_embed_type is {stated!r}; models of this kind have {positions!r}"
        )
    return {"rope_ratio": ratio}


def diffusers_names(more: Mapping[str, str]) -> dict[str, str]:
    """Return diffusers' names -> ours; `more` holds ours -> diffusers' of a family alone."""
    layout = {
        **more,
        "embed.weight": "patch_embed.proj.weight",
        "noise.first.weight": "time_embed.t_embedder.linear_1.weight",
        "noise.second.weight": "time_embed.t_embedder.linear_2.weight",
        "noise.norm": "time_embed.norm.weight",
        "head.linear.weight": "proj_out.weight",
        "head.modulation.first.weight": "norm_out.linear_1.weight",
        "head.modulation.second.weight": "norm_out.linear_2.weight",
    }
    for number, ours in enumerate(SUB_BLOCKS, start=1):
        stem = f"blocks.{{i}}.{ours}"
        layout[f"{stem}.modulation.first.weight"] = f"norm{number}.linear_1.weight"
        layout[f"{stem}.modulation.second.weight"] = f"norm{number}.linear_2.weight"
        if ours == "feed_forward":
            layout[f"{stem}.body.up.weight"] = "ff.net.0.proj.weight"
            layout[f"{stem}.body.down.weight"] = "ff.net.2.weight"
            continue
        for leaf in ("q", "k", "v"):
            layout[f"{stem}.body.{leaf}.weight"] = f"attn{number}.to_{leaf}.weight"
        layout[f"{stem}.body.out.weight"] = f"attn{number}.to_out.0.weight"
        for leaf in ("q", "k"):
            layout[f"{stem}.body.{leaf}_norm"] = f"attn{number}.norm_{leaf}.weight"
    return released_names(layout, "transformer_blocks.{i}.")


def released_names(layout: Mapping[str, str], block: str) -> dict[str, str]:
    """Return released names -> ours.

    Args:
        layout: our name -> released one; of what is in a block, the end behind `block`.
        block: released name of a block.
    """
    named = {}
    for ours, theirs in layout.items():
        inside = ours.startswith("blocks.{i}.")
        named[f"{block}{theirs}" if inside else theirs] = ours
    return named
