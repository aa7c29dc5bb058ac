"""A loaded world, and the videos it makes: the public Python interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch

from worldline.choices import ScheduleName
from worldline.errors import CheckpointError, InputError, InsufficientMemoryError
from worldline.files import GIGABYTE
from worldline.loading import (
    AutoregressiveFiles,
    DiffusionFiles,
    FlowFiles,
    WorldFiles,
    choose_device,
    compute_dtype,
    find_world,
    load_autoregressive,
    load_diffusion,
    load_predict2_5,
    refuse_options,
    world_name,
)
from worldline.locate import has_decoder, locate
from worldline.report import Recorder
from worldline.shapes import VideoShape
from worldline.world.autoregressive import AutoregressiveWorld
from worldline.world.base import World
from worldline.world.diffusion import DiffusionWorld
from worldline.world.flow import FlowWorld
from worldline.world.inputs import Input, InputType, kind_of, read_clip
from worldline.world.safety import Safety, load_safety
from worldline.world.upsampling import Upsampling, find_upsampler, load_upsampling
from worldline.world.video import Step, Video

__all__ = [
    "AutoregressiveWorld",
    "DiffusionWorld",
    "FlowWorld",
    "Input",
    "InputType",
    "Step",
    "Video",
    "World",
    "kind_of",
    "load",
    "load_files",
    "load_guards",
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
    offload_diffusion_model: bool = False,
    offload_text_encoder: bool = False,
    offload_prompt_upsampler: bool = False,
    offload_guardrail_models: bool | None = None,
    disable_diffusion_decoder: bool | None = None,
    disable_guardrail: bool | None = None,
    disable_guardrails: bool | None = None,
    disable_prompt_upsampler: bool | None = None,
    guardrail_dir: str | PathLike[str] | None = None,
    prompt_upsampler_dir: str | PathLike[str] | None = None,
    word_limit_to_skip_upsampler: int = 250,
    tokenizer_dir: str | PathLike[str] | None = None,
    text_encoder_dir: str | PathLike[str] | None = None,
    text_encoder_dtype: torch.dtype | str | None = None,
    generation: str | None = None,
    schedule: ScheduleName | None = None,
    video: tuple[int, int, int] | None = None,
) -> World:
    """Load a world of any family.

    Args:
        name: "tiny-…" for a model that ships with the package, the name of a folder below
            `checkpoint_dir`, or a path; the path of a file loads that file. Models of Predict2.5
            have released names, too, such as "2B/post-trained".
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
        offload_diffusion_model: keep the transformer in host memory while it is not used
            (Predict2.5).
        offload_text_encoder: keep the text encoder in host memory while it is not used
            (Predict2.5).
        disable_diffusion_decoder: decode tokens by the tokenizer alone. Released autoregressive
            models use the diffusion decoder unless told otherwise, and so do bundled ones where
            one ships with the package.
        offload_prompt_upsampler: keep the prompt upsampler in host memory while it is not used
            (diffusion).
        offload_guardrail_models: keep the guardrails in host memory while they do not look; by
            default those of Predict2.5, as released.
        disable_guardrail: check neither prompt nor video. Released models check unless told
            otherwise, and do not load where a guardrail cannot; bundled ones have no guardrails.
        disable_guardrails: the same, by the name that it has for Predict2.5.
        disable_prompt_upsampler: take prompts as they are. Released diffusion models rewrite them
            unless told otherwise; bundled ones have no upsampler.
        guardrail_dir: folder of the guardrails' files, if it is none of the released places.
        prompt_upsampler_dir: another upsampler, by a name below `checkpoint_dir` or a path
            (diffusion).
        word_limit_to_skip_upsampler: prompts of more words stay as they are (Text2World).
        tokenizer_dir: another tokenizer, by a name below `checkpoint_dir` or a path (diffusion,
            Predict2.5).
        text_encoder_dir: another text encoder, likewise, for a world that takes prompts.
        text_encoder_dtype: torch.float32 or torch.bfloat16; by default `dtype` if that is one of
            them, else bf16 (diffusion, autoregressive).
        generation: "1.0" or "Predict1"; by default what the folder's name tells (diffusion).
        schedule: "karras" or "shifted", how the noise levels fall; by default as the model was
            released, or as its config.json says (Predict2.5).
        video: frames, height and width of the largest video that will be made, which must fit into
            memory; by default what the world makes unless told otherwise (diffusion, Predict2.5).

    Raises:
        CheckpointError: files are absent, damaged, or of another model.
        InputError: an option is of the other family, there is no such device, or the dtype is none
            to compute in.
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
        schedule=schedule,
        diffusion_decoder=decodes,
    )
    of_upsampler: dict[str, object] = {
        "disable_prompt_upsampler": disable_prompt_upsampler,
        "prompt_upsampler_dir": prompt_upsampler_dir,
        "offload_prompt_upsampler": offload_prompt_upsampler,
    }
    if isinstance(files, FlowFiles):
        strange = {
            "disable_diffusion_decoder": disable_diffusion_decoder,
            "disable_guardrail": disable_guardrail,
            **of_upsampler,
        }
        refuse_options(files.folder, "a Predict2.5", strange)
    elif isinstance(files, AutoregressiveFiles):
        strange = {"disable_guardrails": disable_guardrails, **of_upsampler}
        refuse_options(files.folder, "an autoregressive", strange)
    else:
        strange = {
            "disable_diffusion_decoder": disable_diffusion_decoder,
            "disable_guardrails": disable_guardrails,
        }
        refuse_options(files.folder, "a diffusion", strange)
    safety, upsampling = load_guards(
        files,
        name,
        checkpoint_dir,
        device=device,
        disable_guardrail=disable_guardrails if isinstance(files, FlowFiles) else disable_guardrail,
        disable_prompt_upsampler=disable_prompt_upsampler,
        guardrail_dir=guardrail_dir,
        prompt_upsampler_dir=prompt_upsampler_dir,
        word_limit_to_skip_upsampler=word_limit_to_skip_upsampler,
        offload_guardrail_models=offload_guardrail_models,
        offload_prompt_upsampler=offload_prompt_upsampler,
    )
    return load_files(
        files,
        safety=safety,
        upsampling=upsampling,
        device=device,
        dtype=dtype,
        offload_ar_model=offload_ar_model,
        offload_tokenizer=offload_tokenizer,
        offload_diffusion_transformer=offload_diffusion_transformer,
        offload_text_encoder_model=offload_text_encoder_model,
        offload_diffusion_decoder=offload_diffusion_decoder,
        offload_diffusion_model=offload_diffusion_model,
        offload_text_encoder=offload_text_encoder,
        text_encoder_dtype=text_encoder_dtype,
        video=video,
    )


def load_guards(
    files: WorldFiles,
    name: str | PathLike[str],
    checkpoint_dir: str | PathLike[str],
    *,
    device: str | torch.device | None = None,
    disable_guardrail: bool | None = None,
    disable_prompt_upsampler: bool | None = None,
    guardrail_dir: str | PathLike[str] | None = None,
    prompt_upsampler_dir: str | PathLike[str] | None = None,
    word_limit_to_skip_upsampler: int = 250,
    offload_guardrail_models: bool | None = None,
    offload_prompt_upsampler: bool = False,
) -> tuple[Safety, Upsampling | None]:
    """Load what stands before and behind a world, its guardrails and its prompt upsampler.

    They are loaded before the world, so that nothing big is read, and nothing made, where one of
    them is missing. The arguments are those of `load`.

    Raises:
        CheckpointError: one of them cannot load.
    """
    recorder = Recorder(choose_device(device))
    folder = None if prompt_upsampler_dir is None else Path(prompt_upsampler_dir)
    offload = offload_guardrail_models
    try:
        safety = load_safety(
            files,
            Path(checkpoint_dir),
            disable_guardrail,
            guardrail_dir=None if guardrail_dir is None else Path(guardrail_dir),
            recorder=recorder,
            offload=isinstance(files, FlowFiles) if offload is None else offload,
        )
    except CheckpointError as error:
        without = files.bundled if disable_prompt_upsampler is None else disable_prompt_upsampler
        if not isinstance(files, DiffusionFiles) or without:
            raise
        try:
            find_upsampler(files, locate(name, checkpoint_dir), folder)
        except CheckpointError as other:  # all that is missing, at once
            raise CheckpointError(f"{error}; and {other}") from error
        raise
    if not isinstance(files, DiffusionFiles):
        return safety, None
    upsampling = load_upsampling(
        files,
        locate(name, checkpoint_dir),
        disable_prompt_upsampler,
        folder=folder,
        word_limit=word_limit_to_skip_upsampler,
        recorder=recorder,
        offload=offload_prompt_upsampler,
    )
    return safety, upsampling


def load_files(
    files: WorldFiles,
    *,
    safety: Safety | None = None,
    upsampling: Upsampling | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    offload_ar_model: bool = False,
    offload_tokenizer: bool = False,
    offload_diffusion_transformer: bool = False,
    offload_text_encoder_model: bool = False,
    offload_diffusion_decoder: bool = False,
    offload_diffusion_model: bool = False,
    offload_text_encoder: bool = False,
    text_encoder_dtype: torch.dtype | str | None = None,
    video: tuple[int, int, int] | None = None,
    text: bool = True,
    batch_size: int = 1,
    num_video_frames: int | None = None,
) -> World:
    """Do what `load` does with files that were found and checked before.

    `safety` and `upsampling` are those of `load_guards`; without them nothing is checked or
    rewritten, and the report says so.
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
    of_decoder = {"offload_diffusion_decoder": offload_diffusion_decoder}
    of_flow = {
        "offload_diffusion_model": offload_diffusion_model,
        "offload_text_encoder": offload_text_encoder,
    }
    if isinstance(files, FlowFiles):
        strange: dict[str, object] = {
            "offload_ar_model": offload_ar_model,
            "offload_diffusion_transformer": offload_diffusion_transformer,
            **of_decoder,
            **of_text,
            "num_video_frames": num_video_frames,
        }
        refuse_options(files.folder, "a Predict2.5", strange)
    elif isinstance(files, AutoregressiveFiles):
        strange = {
            "offload_diffusion_transformer": offload_diffusion_transformer,
            **of_flow,
            "video": video,
        }
        refuse_options(files.folder, "an autoregressive", strange)
        if files.config.context_width is None:
            refuse_options(files.folder, "an autoregressive base", of_text)
    else:
        strange = {
            "offload_ar_model": offload_ar_model,
            **of_decoder,
            **of_flow,
            "num_video_frames": num_video_frames,
        }
        refuse_options(files.folder, "a diffusion", strange)
    chosen = choose_device(device)
    identity = files.identity()
    recorder = Recorder(chosen)
    if safety is not None and safety.loading is not None:
        recorder = safety.loading.followed_by(recorder)
    dtype = dtype or compute_dtype(chosen)
    own = files.name if isinstance(files, FlowFiles) else files.folder.name
    name = world_name(own, bundled=files.bundled)
    size = VideoShape(*video) if video else None
    visitor_bytes = safety.visitor_bytes if safety else 0
    if isinstance(files, FlowFiles):
        with _naming_guards(safety, None):
            flow = load_predict2_5(
                files,
                chosen,
                dtype,
                recorder,
                offload_tokenizer=offload_tokenizer,
                video=size,
                text=text,
                visitor_bytes=visitor_bytes,
                **of_flow,
            )
        return FlowWorld(name, flow, recorder, identity, safety)
    if isinstance(files, AutoregressiveFiles):
        with _naming_guards(safety, None):
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
                visitor_bytes=visitor_bytes,
            )
        return AutoregressiveWorld(name, parts, recorder, identity, safety)
    with _naming_guards(safety, upsampling):
        diffusion = load_diffusion(
            files,
            chosen,
            dtype,
            recorder,
            offload_diffusion_transformer=offload_diffusion_transformer,
            offload_tokenizer=offload_tokenizer,
            offload_text_encoder_model=offload_text_encoder_model,
            text_encoder_dtype=text_encoder_dtype,
            video=size,
            text=text,
            visitor_bytes=visitor_bytes,
        )
    return DiffusionWorld(name, diffusion, recorder, identity, safety, upsampling)


@contextmanager
def _naming_guards(safety: Safety | None, upsampling: Upsampling | None) -> Iterator[None]:
    """Say of a world that finds no room what its guards hold, and the flags that free it."""
    try:
        yield
    except InsufficientMemoryError as error:
        held = {
            "--offload_guardrail_models": safety.nbytes if safety else 0,
            "--offload_prompt_upsampler": upsampling.nbytes if upsampling else 0,
        }
        told = [f"{flag} frees {n / GIGABYTE:.1f} GB" for flag, n in held.items() if n]
        if safety and safety.visitor_bytes:
            told.append(f"a guardrail holds {safety.visitor_bytes / GIGABYTE:.1f} GB as it looks")
        if not told:
            raise
        raise InsufficientMemoryError(f"{error}; {', '.join(told)}") from error


def _check_dtype(name: str, dtype: object, allowed: Sequence[torch.dtype] = _DTYPES) -> None:
    if dtype not in (None, *allowed):
        known = ", ".join(map(str, allowed))
        raise InputError(f"{name} is {dtype}; it must be one of {known}")
