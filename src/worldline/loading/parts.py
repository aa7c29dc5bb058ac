"""The parts of a world that are found and read alike in several families."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.parallel.offload import Part
from worldline.places import Place
from worldline.shapes import VideoShape
from worldline.text.encoder import EncoderFiles, TextEncoder
from worldline.tokenizers.colours import fit_colours
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.wan.model import WanTokenizer
from worldline.weights.dit import Layout
from worldline.weights.keymap import KeyMap
from worldline.weights.read import Checkpoint
from worldline.weights.stream import load_into

FilesType = TypeVar("FilesType", bound=EncoderFiles[Any])


class _Defaults(Protocol):
    @property
    def video(self) -> VideoShape: ...


class _Files(Protocol):
    @property
    def defaults(self) -> _Defaults: ...


NetworkType = TypeVar("NetworkType", bound=nn.Module)
CoderType = TypeVar("CoderType", CosmosTokenizer, WanTokenizer)
WorldFilesType = TypeVar("WorldFilesType", bound=_Files)


@dataclass(frozen=True)
class DenoisingParts(Generic[NetworkType, CoderType, WorldFilesType]):
    """The networks of a world that denoises, each on its device or waiting in host memory.

    Attributes:
        transformer: the denoiser, or what gives the velocity of a flow.
        tokenizer: pixels to latents and back.
        text: prompts to embeddings; None where there is none.
        files: that they were read from.
    """

    transformer: Part[NetworkType]
    tokenizer: Part[CoderType]
    text: TextEncoder[Any] | None
    files: WorldFilesType

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @cached_property
    def colours(self) -> Tensor:
        """What the latents look like, for previews: of `fit_colours`, once for all requests.

        First to be read while the tokenizer is on its device.
        """
        return fit_colours(self.tokenizer.module)

    @property
    def video(self) -> VideoShape:
        """Size of what this world makes unless asked for another."""
        return self.files.defaults.video


def find_text(
    kind: type[FilesType],
    place: Place,
    folder: Path,
    layout: Layout,
    asked: str | Path | None,
    width: int,
) -> tuple[FilesType | None, str]:
    """Text encoder of a world, or why there is none.

    Args:
        kind: of encoder.
        place: of the world.
        folder: of its transformer.
        layout: of its transformer.
        asked: name or path of another text encoder.
        width: of the embeddings that the transformer was trained on.

    Raises:
        CheckpointError: the encoder that was asked for is absent or does not fit.
    """
    if asked is not None:
        return kind.open_first([place.chosen(asked, "text_encoder_dir")], width), ""
    present = [path for root in place.roots for path in kind.folders(root)]
    if (folder / "text_encoder").is_dir():
        present.insert(0 if layout == "diffusers" else len(present), folder / "text_encoder")
    if not present:
        return None, f"there is no text encoder: no folder {kind.released} in {place.searched}"
    try:
        return kind.open_first(present, width), ""
    except CheckpointError as error:
        return None, str(error)


def read_part(
    kind: Any,
    config: Any,
    source: Checkpoint,
    keys: KeyMap,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool,
) -> Part[Any]:
    """Build a network of a configuration, fill it, and give it its home.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    with torch.device("meta"):
        module = kind(config)
    home = torch.device("cpu") if offload else device
    load_into(module, source, keys, device=home, dtype=dtype)
    return Part(module.requires_grad_(False).eval(), device, offload=offload)
