"""What a world can continue: a file, a picture or frames."""

from __future__ import annotations

from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from worldline.errors import InputError
from worldline.files import stamp
from worldline.video.read import Clip, media_kind, read_image, read_video, to_rgb

InputType = Literal["image", "video"]
# a file, a picture, or frames (T, H, W, 3) uint8
Input = str | PathLike[str] | Image.Image | NDArray[np.uint8] | torch.Tensor


def kind_of(input: Input | None) -> InputType:
    """Return whether an input is an image or a video; of a file by its suffix.

    Raises:
        InputError: it is nothing that can be continued.
    """
    if isinstance(input, Image.Image):
        return "image"
    if isinstance(input, (np.ndarray, torch.Tensor)):
        return "video"
    if isinstance(input, (str, PathLike)):
        kind: InputType = media_kind(Path(input))
        return kind
    what = "no input is given" if input is None else f"the input is a {type(input).__name__}"
    raise InputError(
        f"{what}; it must be a path, a PIL image, or frames "
        "(T, H, W, 3), uint8, as an array or a tensor"
    )


def read_clip(input: Input, kind: InputType, num_input_frames: int) -> Clip:
    """Return the frames of an input, of a video only the last that are needed.

    Raises:
        InputError: it cannot be read, is of another kind, or is too short.
    """
    found = kind_of(input)
    if found != kind and not isinstance(input, (np.ndarray, torch.Tensor)):
        article = "an image" if found == "image" else "a video"
        raise InputError(
            f"{describe(input)} is {article}, but the input type is {kind}: "
            f"use --input_type {found}"
        )
    if isinstance(input, (np.ndarray, torch.Tensor)):
        clip = Clip(_as_frames(input), 0.0)
    elif isinstance(input, Image.Image):
        clip = to_rgb(input, describe(input))
    elif kind == "image":
        clip = read_image(Path(input))
    else:
        clip = read_video(Path(input), last=num_input_frames)
    if len(clip.frames) < num_input_frames:
        raise InputError(
            f"{describe(input)} has {len(clip.frames)} frames, "
            f"but num_input_frames is {num_input_frames}"
        )
    return clip


def _as_frames(given: NDArray[np.uint8] | torch.Tensor) -> NDArray[np.uint8]:
    right = given.ndim == 4 and given.shape[-1] == 3 and given.dtype in (np.uint8, torch.uint8)
    if not right or 0 in given.shape:
        raise InputError(
            "frames must be uint8 (T, H, W, 3) and not empty, "
            f"got {str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
        )
    frames: NDArray[np.uint8]
    frames = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else given
    return frames


def describe(input: Input) -> str:
    """Return a few words that tell an input from others."""
    if isinstance(input, (str, PathLike)):
        return str(input)
    if isinstance(input, Image.Image):
        return f"image {input.width} x {input.height}"
    return f"frames {tuple(input.shape)}"


def stamp_of(input: object) -> dict[str, Any] | None:
    """Return what tells the input's file from another; None for what is no file."""
    if isinstance(input, (str, PathLike)):
        with suppress(OSError, ValueError):  # told when it is read
            return stamp(Path(input))
    return None
