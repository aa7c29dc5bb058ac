"""Checks of requests to the denoising families; nothing is read for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from worldline.errors import CheckpointError, InputError
from worldline.nn.dit import DiTSizes
from worldline.pipelines.denoise import Embeddings
from worldline.pipelines.requests import VideoRequest
from worldline.shapes import latent_frames_of, nearest_frames

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RequestType = TypeVar("RequestType", bound=VideoRequest)


def with_defaults(
    kind: type[RequestType], defaults: DataclassInstance, options: Mapping[str, Any]
) -> RequestType:
    """Request of `options`, filled up from `defaults` and those of its class.

    Raises:
        InputError: an option is unknown or out of range.
    """
    known = [field.name for field in fields(kind)]
    if unknown := ", ".join(sorted(options.keys() - set(known))):
        raise InputError(f"unknown option {unknown}; there are: {', '.join(known)}")
    defined = {
        field.name: getattr(defaults, field.name)
        for field in fields(defaults)
        if field.name in known
    }
    return kind(**{"prompt": None, **defined, **options})


def check_size(
    request: VideoRequest,
    config: DiTSizes,
    max_latents: int,
    temporal: int,
    spatial: int,
    *,
    longer: str = "",
) -> None:
    """Refuse a size that a world cannot make, with all that is wrong with it in one line.

    Args:
        request: the video.
        config: the transformer's.
        max_latents: latent frames of the longest video.
        temporal: frames of a latent frame.
        spatial: pixels of a latent cell on each side.
        longer: what makes longer videos, for the message.

    Raises:
        InputError: the nearest size that can be made is another, or no frame remains to make.
    """
    frames, longest = request.num_video_frames, 1 + (max_latents - 1) * temporal
    known = request.num_input_frames
    least = 1 + latent_frames_of(known, temporal) * temporal
    wrong = []
    if (frames - 1) % temporal or frames > longest:
        # one with frames to make, so that what is suggested is not refused next
        nearest = min(longest, max(least, nearest_frames(frames, temporal)))
        ways = f" ({longer})" if longer and frames > longest else ""
        wrong.append(
            f"num_video_frames is {frames}; it must be 1 + {temporal}k and at most {longest}: "
            f"the nearest is {nearest}{ways}"
        )
    elif frames < least:
        wrong.append(
            f"num_video_frames is {frames}, but num_input_frames is {known}: nothing is left to "
            f"make; give {least} frames or more"
        )
    sides = (
        ("height", request.height, config.patch[1], config.max_grid.height),
        ("width", request.width, config.patch[2], config.max_grid.width),
    )
    for name, pixels, cells, tokens in sides:
        step = cells * spatial
        nearest = min(max(round(pixels / step), 1), tokens) * step
        if nearest != pixels:
            wrong.append(
                f"{name} is {pixels}; it must be a multiple of {step} and at most "
                f"{tokens * step}: the nearest is {nearest}"
            )
    if wrong:
        raise InputError("; ".join(wrong))


def check_prompts(
    request: VideoRequest,
    embeddings: Embeddings,
    needed: Mapping[str, str],
    why_no_text: str | None,
) -> None:
    """Refuse a request without a prompt, or with prompts that nothing can encode.

    Args:
        request: the request.
        embeddings: in place of prompts.
        needed: prompts to encode, by name.
        why_no_text: why there is no text encoder; None where there is one.

    Raises:
        InputError: there is no prompt.
        CheckpointError: there is no text encoder, and one is needed.
    """
    if request.prompt is None and embeddings.prompt is None:
        raise InputError("no prompt; give one, or prompt_embeddings")
    if needed and why_no_text is not None:
        raise CheckpointError(
            f"{why_no_text}; text_encoder_dir names another; or give "
            f"{' and '.join(f'{name}_embeddings' for name in needed)} "
            f"(needed for: {', '.join(needed)})"
        )
