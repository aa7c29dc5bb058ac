"""What a world can continue: a file, a picture or frames; and how it comes to the video's size.

It needs no torch: a client of a server reads inputs, too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from worldline.errors import InputError, option
from worldline.files import check_path
from worldline.shapes import LARGEST_CROP, Fit, VideoShape
from worldline.video.read import (
    MAX_IMAGE,
    Clip,
    Frames,
    MediaInfo,
    check_pixels,
    media_kind,
    probe,
    read_image,
    read_video,
    to_rgb,
)
from worldline.video.span import Span

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

InputType = Literal["image", "video"]
# a file, a picture, or frames uint8 (T, H, W, 3)
Form: TypeAlias = "str | PathLike[str] | Image.Image | Frames | torch.Tensor"
Input: TypeAlias = "Form | Sequence[Image.Image]"


def is_tensor(value: object) -> TypeIs[torch.Tensor]:
    """Whether a value is a tensor; where nobody has imported torch, nothing is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def joined(input: Any) -> Any:
    """A list of pictures as frames, of one as the picture; any other input as it is.

    Raises:
        InputError: one is no PIL image, or of another size.
    """
    if not isinstance(input, list | tuple) or not input:
        return input
    clips: list[Frames] = []
    for number, picture in enumerate(input):
        name = f"input[{number}]"
        if not isinstance(picture, Image.Image):
            raise InputError(f"{name} is {type(picture).__name__}; give PIL images")
        clips.append(to_rgb(picture, name).frames)
        if clips[-1].shape != clips[0].shape:
            here, first = (f"{c.shape[2]} x {c.shape[1]}" for c in (clips[-1], clips[0]))
            raise InputError(f"{name} is {here}, input[0] is {first}; give pictures of one size")
    return np.concatenate(clips) if len(clips) > 1 else input[0]


def kind_of(input: Input | None) -> InputType:
    """Whether an input is an image or a video; a file's by its contents.

    Raises:
        InputError: it is neither.
    """
    if isinstance(input, str | PathLike):
        return media_kind(check_path(input))
    if isinstance(input, Image.Image | np.ndarray) or is_tensor(input):
        return "image" if isinstance(input, Image.Image) else "video"
    raise InputError(
        f"the input is {type(input).__name__}; give a path, a PIL image or a list of "
        "them, or frames uint8 (T, H, W, 3) as an array or a tensor"
    )


def read_clip(input: Form, kind: InputType, num_input_frames: int) -> Clip:
    """Frames of an input; of a video only the last that are needed.

    Raises:
        InputError: it cannot be read, is of another kind, or is too short.
    """
    actual = kind_of(input)
    if is_tensor(input) or isinstance(input, np.ndarray):
        frames = input.detach().cpu().numpy() if is_tensor(input) else np.asarray(input)
        if frames.ndim == 4 and frames.shape[-1] != 3 and frames.shape[1] == 3:  # as of `to_torch`
            frames = np.ascontiguousarray(frames.transpose(0, 2, 3, 1))
        if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size or frames.dtype != np.uint8:
            raise InputError(
                f"frames are {frames.dtype} {frames.shape}; give uint8 (T, H, W, 3), not empty"
            )
        clip = Clip(frames, 0.0)
    elif actual != kind:
        raise InputError(
            f"{describe(input)}: it is of type {actual}; give {option('input_type', actual)}"
        )
    elif isinstance(input, Span):
        clip = input.read(num_input_frames)
    elif isinstance(input, Image.Image):
        clip = to_rgb(input, describe(input))
    elif kind == "image":
        clip = read_image(Path(input))
    else:
        clip = read_video(Path(input), last=num_input_frames)
    check_length(input, len(clip.frames), num_input_frames)
    return clip


def check_length(input: Form, frames: int, num_input_frames: int) -> None:
    """Refuse a clip of too few frames."""
    if frames < num_input_frames:
        raise InputError(
            f"{describe(input)}: it has {frames} frames, num_input_frames is {num_input_frames}; "
            "give a longer clip"
        )


def check_file(
    path: Path | Span, request: Any, video: VideoShape, info: MediaInfo | None = None
) -> None:
    """Refuse, before any model is loaded, a file that cannot become the beginning of a video.

    `info` is what `probe` gives, where it is known.
    """
    if isinstance(path, Span):
        info = path.timeline.info._replace(frames=path.frames)
    elif info is None:
        info = probe(path)
    count = request.num_input_frames
    check_length(path, info.frames, count)
    check_pixels(Path(path), count, info.height, info.width, MAX_IMAGE)
    fit_note(path, info.height, info.width, request.fit, video)


def changes(input: Form, clip: Clip, request: Any, video: VideoShape) -> list[str]:
    """What is done to an input: as it is read, to its aspect, and to its speed."""
    height, width = clip.frames.shape[1:3]
    notes = [*clip.notes, fit_note(input, height, width, request.fit, video)]
    if request.num_input_frames > 1 and clip.fps and abs(clip.fps / request.fps - 1) > 0.01:
        notes.append(f"its {clip.fps:.4g} frames a second play at {request.fps:.4g}")
    return [note for note in notes if note]


def fit_note(input: Form, height: int, width: int, fit: Fit, video: VideoShape) -> str:
    """How a picture comes to the aspect of a video; "" if it has it, within a pixel.

    Raises:
        InputError: next to nothing of it would remain.
    """
    across, down = width * video.height, height * video.width
    if abs(across - down) < max(video.height, video.width):
        return ""
    ratio = max(across, down) / min(across, down)
    if fit == "crop" and ratio > LARGEST_CROP:
        raise InputError(
            f"{describe(input)}: of {width} x {height} pixels a crop to {video.width} x "
            f"{video.height} would keep 1/{ratio:.0f}; crop it, or give {option('fit', 'pad')}"
        )
    done = {"stretch": "stretched", "crop": "cropped", "pad": "padded"}[fit]
    return f"{width} x {height} pixels are {done} to the aspect of {video.width} x {video.height}"


def describe(input: Form) -> str:
    """A few words that identify an input."""
    if isinstance(input, str | PathLike):
        return str(input)
    if isinstance(input, Image.Image):
        return f"image {input.width} x {input.height}"
    return f"frames {tuple(input.shape)}"
