"""A loaded world, and the videos it makes: the public Python interface."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch

from worldline.catalog import BUNDLED_PREFIX, check_parts
from worldline.errors import InputError
from worldline.loading import (
    AutoregressiveFiles,
    WorldFiles,
    choose_device,
    compute_dtype,
    find_world,
    load_autoregressive,
    load_diffusion,
    refuse_options,
)
from worldline.places import has_decoder
from worldline.report import Recorder
from worldline.shapes import VideoShape
from worldline.world.autoregressive import AutoregressiveWorld
from worldline.world.base import World
from worldline.world.diffusion import DiffusionWorld
from worldline.world.inputs import Input, InputType, kind_of, read_clip
from worldline.world.video import Step, Video

__all__ = [
    "AutoregressiveWorld",
    "DiffusionWorld",
    "Input",
    "InputType",
    "Step",
    "Video",
    "World",
    "kind_of",
    "load",
    "load_files",
    "read_clip",
]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TEXT_DTYPES = (torch.bfloat16, torch.float32)  # T5 overflows in float16


def load(
    name: str | PathLike[str],
    checkpoint_dir: str | PathLike[str] = "checkpoints",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    offload_ar_model: bool = False,
    offload_tokenizer: bool = False,
    offload_diffusion_transformer: bool = False,
    offload_text_encoder_model: bool = False,
    offload_diffusion_decoder: bool = False,
    disable_diffusion_decoder: bool | None = None,
    disable_guardrail: bool | None = None,
    disable_prompt_upsampler: bool | None = None,
    tokenizer_dir: str | PathLike[str] | None = None,
    text_encoder_dir: str | PathLike[str] | None = None,
    text_encoder_dtype: torch.dtype | str | None = None,
    generation: str | None = None,
    video: tuple[int, int, int] | None = None,
) -> World:
    """Load a world of either family.

    Args:
        name: "tiny-…" for a model that ships with the package, the name of a folder below
            `checkpoint_dir`, or a path; the path of a file loads that file.
        checkpoint_dir: holds the released folders.
        device: by default the GPU, if there is one.
        dtype: by default bf16 on a GPU, else float32.
        offload_ar_model: keep the transformer in host memory while it is not used
            (autoregressive).
        offload_tokenizer: keep the tokenizer in host memory while it is not used.
        offload_diffusion_transformer: keep the transformer in host memory while it is not used
            (diffusion).
        offload_text_encoder_model: keep the text encoder in host memory while it is not used, where
            the world has one.
        offload_diffusion_decoder: keep the diffusion decoder in host memory while it is not used
            (autoregressive).
        disable_diffusion_decoder: decode tokens by the tokenizer alone. Released autoregressive
            models use the diffusion decoder unless told otherwise, and so do bundled ones where
            one ships with the package.
        disable_guardrail: do not check the video. Released models check unless told otherwise.
        disable_prompt_upsampler: take prompts as they are. Released diffusion models rewrite them
            unless told otherwise; bundled ones have no upsampler.
        tokenizer_dir: another tokenizer, by a name below `checkpoint_dir` or a path (diffusion).
        text_encoder_dir: another text encoder, likewise, for a world that takes prompts.
        text_encoder_dtype: torch.float32 or torch.bfloat16; by default `dtype` if that is one of
            them, else bf16.
        generation: "1.0" or "Predict1"; by default what the folder's name tells (diffusion).
        video: frames, height and width of the largest video that will be made, which must fit into
            memory; by default what the world makes unless told otherwise (diffusion).

    Raises:
        CheckpointError: files are absent, damaged, or of another model.
        InputError: a part is asked for that this version does not have, an option is of the other
            family, there is no such device, or the dtype is none to compute in.
        InsufficientMemoryError: the device is too small.
    """
    _check_dtype("dtype", dtype)
    decodes = not disable_diffusion_decoder
    if disable_diffusion_decoder is None:
        decodes = has_decoder(str(name))
    files = find_world(
        str(name),
        Path(checkpoint_dir),
        tokenizer_dir=None if tokenizer_dir is None else Path(tokenizer_dir),
        text_encoder_dir=None if text_encoder_dir is None else Path(text_encoder_dir),
        generation=generation,
        diffusion_decoder=decodes,
    )
    if isinstance(files, AutoregressiveFiles):
        strange = {"disable_prompt_upsampler": disable_prompt_upsampler}
        refuse_options(files.folder, "an autoregressive", strange)
        check_parts(files.bundled, disable_guardrail=disable_guardrail)
    else:
        strange = {"disable_diffusion_decoder": disable_diffusion_decoder}
        refuse_options(files.folder, "a diffusion", strange)
        check_parts(
            files.bundled,
            disable_guardrail=disable_guardrail,
            disable_prompt_upsampler=disable_prompt_upsampler,
        )
    return load_files(
        files,
        device=device,
        dtype=dtype,
        offload_ar_model=offload_ar_model,
        offload_tokenizer=offload_tokenizer,
        offload_diffusion_transformer=offload_diffusion_transformer,
        offload_text_encoder_model=offload_text_encoder_model,
        offload_diffusion_decoder=offload_diffusion_decoder,
        text_encoder_dtype=text_encoder_dtype,
        video=video,
    )


def load_files(
    files: WorldFiles,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    offload_ar_model: bool = False,
    offload_tokenizer: bool = False,
    offload_diffusion_transformer: bool = False,
    offload_text_encoder_model: bool = False,
    offload_diffusion_decoder: bool = False,
    text_encoder_dtype: torch.dtype | str | None = None,
    video: tuple[int, int, int] | None = None,
    text: bool = True,
    batch_size: int = 1,
    num_video_frames: int | None = None,
) -> World:
    """Do what `load` does with files that were found and checked before.

    `text` tells whether a world that takes prompts will encode any. Where embeddings are given it
    will not, and needs less memory. An autoregressive world must have room for `batch_size` clips
    of `num_video_frames` frames, None for the model's own.
    """
    if isinstance(text_encoder_dtype, str):
        text_encoder_dtype = getattr(torch, text_encoder_dtype, text_encoder_dtype)
    _check_dtype("text_encoder_dtype", text_encoder_dtype, _TEXT_DTYPES)
    assert not isinstance(text_encoder_dtype, str)  # told by `_check_dtype`
    of_text = {
        "offload_text_encoder_model": offload_text_encoder_model,
        "text_encoder_dtype": text_encoder_dtype,
    }
    if isinstance(files, AutoregressiveFiles):
        strange: dict[str, object] = {
            "offload_diffusion_transformer": offload_diffusion_transformer,
            "video": video,
        }
        refuse_options(files.folder, "an autoregressive", strange)
        if files.config.context_width is None:
            refuse_options(files.folder, "an autoregressive base", of_text)
    else:
        strange = {
            "offload_ar_model": offload_ar_model,
            "offload_diffusion_decoder": offload_diffusion_decoder,
            "num_video_frames": num_video_frames,
        }
        refuse_options(files.folder, "a diffusion", strange)
    chosen = choose_device(device)
    identity = files.identity()
    recorder = Recorder(chosen)
    dtype = dtype or compute_dtype(chosen)
    name = f"{BUNDLED_PREFIX if files.bundled else ''}{files.folder.name}"
    if isinstance(files, AutoregressiveFiles):
        parts = load_autoregressive(
            files,
            chosen,
            dtype,
            recorder,
            offload_ar_model=offload_ar_model,
            offload_tokenizer=offload_tokenizer,
            offload_diffusion_decoder=offload_diffusion_decoder,
            offload_text_encoder_model=offload_text_encoder_model,
            text_encoder_dtype=text_encoder_dtype,
            text=text,
            batch_size=batch_size,
            num_video_frames=num_video_frames,
        )
        return AutoregressiveWorld(name, parts, recorder, identity)
    return DiffusionWorld(
        name,
        load_diffusion(
            files,
            chosen,
            dtype,
            recorder,
            offload_diffusion_transformer=offload_diffusion_transformer,
            offload_tokenizer=offload_tokenizer,
            offload_text_encoder_model=offload_text_encoder_model,
            text_encoder_dtype=text_encoder_dtype,
            video=VideoShape(*video) if video else None,
            text=text,
        ),
        recorder,
        identity,
    )


def _check_dtype(name: str, dtype: object, allowed: Sequence[torch.dtype] = _DTYPES) -> None:
    if dtype not in (None, *allowed):
        known = ", ".join(map(str, allowed))
        raise InputError(f"{name} is {dtype}; it must be one of {known}")
