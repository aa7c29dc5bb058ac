"""Requests, load options and the command of a toy family; needs no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from worldline.family import Command
from worldline.request import Fps, LoadOptions, Path, Request, Size


class ToyRequest(Request):
    """One clip to continue."""

    num_video_frames: Size = Field(4, description="Frames of the video.")
    strength: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="Share of each change.")
    fps: Fps = 8.0


class ToyOptions(LoadOptions):
    """How a toy model is loaded."""

    codec_dir: Path | None = Field(None, description="Folder of the codec.")
    offload_codec: bool = Field(False, description="Keep the codec in host memory.")
    offload_network: bool = Field(False, description="Keep the network in host memory.")


SIGNATURE = ("toy.change.weight",)
REQUEST, OPTIONS = ToyRequest, ToyOptions
COMMANDS = (
    Command(
        name="toy",
        help="Continue a clip by a toy.",
        model="toy_dir",
        default_model="toy",
        reads="worldline.cli.inputs:MEDIA",
        hidden=frozenset({"prompt_embeddings", "dtype"}),
    ),
)
