"""From a name or a folder to a world: find the files, check them, plan the memory, read.

Everything that can be wrong is found from file headers, before tensor data are read.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from worldline.catalog import Entry
from worldline.choices import DIFFUSION_OFFLOAD_FLAGS, FLOW_OFFLOAD_FLAGS, ScheduleName
from worldline.errors import InputError, InsufficientMemoryError
from worldline.files import holds_diffusers
from worldline.loading.autoregressive import (
    AutoregressiveFiles,
    AutoregressiveParts,
    MemoryPlan,
    offload_flags,
    open_autoregressive,
    plan_autoregressive,
    video_shape,
)
from worldline.loading.decoder import (
    DecoderFiles,
    DecoderParts,
    plan_decoder,
    read_context,
    window_grid,
)
from worldline.loading.diffusion import (
    RELEASED_CONTEXT,
    DiffusionFiles,
    DiffusionParts,
    WorldDefaults,
    open_diffusion,
    plan_diffusion,
)
from worldline.loading.folders import (
    is_diffusion,
    open_transformer,
    read_settings,
    refuse_options,
    world_name,
)
from worldline.loading.memory import (
    DiffusionPlan,
    Fit,
    Need,
    check_frames,
    check_memory,
    fewest_flags,
)
from worldline.loading.parts import TextPart, read_part, text_bytes, text_dtype, text_part
from worldline.loading.predict2_5 import (
    FlowDefaults,
    FlowFiles,
    FlowParts,
    find_predict2_5,
    holds_flow,
    load_predict2_5,
    need_predict2_5,
    open_predict2_5,
    plan_predict2_5,
)
from worldline.locate import locate
from worldline.machine import Memory, device_memory
from worldline.models.predict1_ar.decoder import MOST_CLIPS, compile_ahead, kernels_fit
from worldline.models.predict1_ar.model import PRESETS as AUTOREGRESSIVE_PRESETS
from worldline.models.predict1_ar.model import ARTransformer, ARTransformerConfig
from worldline.models.predict1_ar.weights import KEYS
from worldline.models.predict1_dit.model import BLOCKS, DiT, DiTConfig
from worldline.models.predict1_dit.model import PRESETS as DIFFUSION_PRESETS
from worldline.models.predict2_5_dit.model import PRESETS as FLOW_PRESETS
from worldline.models.predict2_5_dit.model import FlowDiTConfig
from worldline.nn.modulation import fused
from worldline.parallel.offload import Part, StreamedPart
from worldline.report import Recorder
from worldline.shapes import VideoShape
from worldline.text.cache import EmbeddingCache
from worldline.text.t5 import load_t5
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZER_PRESETS
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.weights import key_map
from worldline.tokenizers.wan.model import WanTokenizerConfig

__all__ = [
    "AutoregressiveFiles",
    "AutoregressiveParts",
    "DecoderFiles",
    "DecoderParts",
    "DiffusionFiles",
    "DiffusionParts",
    "DiffusionPlan",
    "Fit",
    "FlowFiles",
    "FlowParts",
    "MemoryPlan",
    "TextPart",
    "WorldDefaults",
    "WorldFiles",
    "check_frames",
    "choose_device",
    "clips_at_once",
    "compute_dtype",
    "dearest",
    "find_autoregressive",
    "find_diffusion",
    "find_predict2_5",
    "find_world",
    "fit",
    "fit_entry",
    "fit_files",
    "host_need",
    "load_autoregressive",
    "load_diffusion",
    "load_predict2_5",
    "most_in_step",
    "open_autoregressive",
    "open_diffusion",
    "open_predict2_5",
    "open_transformer",
    "plan_autoregressive",
    "plan_decoder",
    "plan_diffusion",
    "plan_predict2_5",
    "read_settings",
    "refuse_options",
    "text_dtype",
    "video_shape",
    "window_grid",
    "world_name",
]

logger = logging.getLogger(__name__)

WorldFiles = AutoregressiveFiles | DiffusionFiles | FlowFiles

# T5-11B: 24 layers of four 1024 x 16,384 and two 1024 x 65,536 matrices, and 32,128 words
_RELEASED_TEXT_PARAMETERS = 4_864_791_552
_REASON1_PARAMETERS = 7_070_619_136  # without eyes and head


def find_world(
    model: str | Path,
    checkpoint_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    text_encoder_dir: str | Path | None = None,
    generation: str | None = None,
    schedule: ScheduleName | None = None,
    diffusion_decoder: bool = False,
) -> WorldFiles:
    """Find and check the files of a world of any family, by what its folder holds.

    Args:
        model: "tiny-…" for a bundled one, a folder's name below `checkpoint_dir`, or a path; the
            path of a file opens that file. Of Predict2.5 the released names, too.
        checkpoint_dir: holds the folders, those of the other parts too.
        tokenizer_dir: of a diffusion world or one of Predict2.5; see `find_diffusion`.
        text_encoder_dir: of a world that takes prompts; likewise.
        generation: of a diffusion world; likewise.
        schedule: of a world of Predict2.5; see `find_predict2_5`.
        diffusion_decoder: of an autoregressive world; see `find_autoregressive`.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model.
        InputError: a world is given what only those of another family have.
    """
    place = locate(model, checkpoint_dir)
    if place.released or holds_flow(place.named):
        refuse_options(place.folder, "a Predict2.5", {"generation": generation})
        return open_predict2_5(
            place,
            tokenizer_dir=tokenizer_dir,
            text_encoder_dir=text_encoder_dir,
            schedule=schedule,
        )
    if schedule is not None:
        refuse_options(place.folder, "no Predict2.5", {"schedule": schedule})
    if holds_diffusers(place.named) or is_diffusion(open_transformer(place.named)):
        return open_diffusion(
            place,
            tokenizer_dir=tokenizer_dir,
            text_encoder_dir=text_encoder_dir,
            generation=generation,
        )
    special = {"tokenizer_dir": tokenizer_dir, "generation": generation}
    refuse_options(place.folder, "an autoregressive", special)
    return open_autoregressive(
        place, text_encoder_dir=text_encoder_dir, diffusion_decoder=diffusion_decoder
    )


def find_autoregressive(
    model: str | Path,
    checkpoint_dir: str | Path,
    *,
    text_encoder_dir: str | Path | None = None,
    diffusion_decoder: bool = False,
) -> AutoregressiveFiles:
    """Find and check the files of an autoregressive world.

    Args:
        model: "tiny-…" for a bundled one, a folder's name below `checkpoint_dir`, or a path; the
            path of a file opens that file.
        checkpoint_dir: holds the folders, the tokenizer's too.
        text_encoder_dir: another text encoder for a Video2World model, by a name below
            `checkpoint_dir` or a path.
        diffusion_decoder: find the diffusion decoder and its tokenizer too.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model. That there is no
            text encoder is no error here: embeddings may be given.
        InputError: a base model is given a text encoder.
    """
    return open_autoregressive(
        locate(model, checkpoint_dir),
        text_encoder_dir=text_encoder_dir,
        diffusion_decoder=diffusion_decoder,
    )


def find_diffusion(
    model: str | Path,
    checkpoint_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    text_encoder_dir: str | Path | None = None,
    generation: str | None = None,
) -> DiffusionFiles:
    """Find and check the files of a diffusion world.

    Args:
        model: "tiny-…" for a bundled one, a folder's name below `checkpoint_dir`, or a path; the
            path of a file opens that file. The folder may be laid out as by NVIDIA or by diffusers.
        checkpoint_dir: holds the folders, those of tokenizer and text encoder too.
        tokenizer_dir: another tokenizer, by a name below `checkpoint_dir` or a path.
        text_encoder_dir: another text encoder, likewise.
        generation: "1.0" or "Predict1", by default what the folder's name says; decides the
            sampler.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model. That there is no
            text encoder is no error here: embeddings may be given.
        InputError: there is no such generation.
    """
    return open_diffusion(
        locate(model, checkpoint_dir),
        tokenizer_dir=tokenizer_dir,
        text_encoder_dir=text_encoder_dir,
        generation=generation,
    )


def load_autoregressive(
    files: AutoregressiveFiles,
    device: torch.device,
    dtype: torch.dtype,
    recorder: Recorder,
    *,
    offload_ar_model: bool = False,
    offload_tokenizer: bool = False,
    offload_diffusion_decoder: bool = False,
    offload_text_encoder_model: bool = False,
    text_encoder_dtype: torch.dtype | None = None,
    text: bool = True,
    batch_size: int = 1,
    num_video_frames: int | None = None,
    visitor_bytes: int = 0,
) -> AutoregressiveParts:
    """Read the weights of a world; those of the text encoder wait for a prompt that needs them.

    Args:
        files: found and checked.
        device: where it runs.
        dtype: of the networks.
        recorder: is told seconds and memory.
        offload_ar_model: keep the transformer in host memory while it is not used.
        offload_tokenizer: likewise.
        offload_diffusion_decoder: likewise, its tokenizer too; the blocks of its transformer come
            to the device one after another.
        offload_text_encoder_model: likewise.
        text_encoder_dtype: by default `dtype` where T5 runs in it.
        text: whether prompts will be encoded, which takes memory; False where embeddings are given.
        batch_size: clips whose tokens are drawn in step.
        num_video_frames: of the longest clip; None is the model's own.
        visitor_bytes: of `plan_autoregressive`.

    Raises:
        InsufficientMemoryError: the device is too small for so many clips.
    """
    chosen = {
        "offload_ar_model": offload_ar_model,
        "offload_tokenizer": offload_tokenizer,
        "offload_diffusion_decoder": offload_diffusion_decoder,
        "offload_text_encoder_model": offload_text_encoder_model,
    }
    given = [flag for flag in files.offload_flags if chosen[flag]]
    if offload_diffusion_decoder and files.decoder is None:
        logger.info("offload_diffusion_decoder has no effect: no diffusion decoder runs")
    of_text = text_encoder_dtype or text_dtype(dtype)
    try:
        _check_memory(
            files,
            device,
            dtype,
            given,
            text_encoder_dtype=of_text,
            text=text,
            batch=batch_size,
            num_video_frames=num_video_frames,
            visitor_bytes=visitor_bytes,
        )
    except InsufficientMemoryError as error:
        if batch_size == 1:
            raise
        raise InsufficientMemoryError(
            f"{batch_size} clips at once: {error}; a smaller --batch_size needs less"
        ) from error
    logger.info("reading %s", files.folder)
    compiling = compile_ahead(files.config, device, dtype, batch_size)
    with recorder.stage("load"):
        try:
            transformer = read_part(
                ARTransformer,
                files.config,
                files.transformer,
                KEYS,
                device,
                dtype,
                offload_ar_model,
            )
            tokenizer = _read_tokenizer(files, device, dtype, offload_tokenizer)
            decoder = None
            if files.decoder is not None:
                decoder = _read_decoder(files.decoder, device, dtype, offload_diffusion_decoder)
        finally:
            if compiling is not None:  # it launches kernels, also beside what follows a failure
                compiling.join()
    encoder = text_part(
        files.text,
        load_t5,
        device,
        of_text,
        offload=offload_text_encoder_model,
        cache=EmbeddingCache(),
    )
    return AutoregressiveParts(transformer, tokenizer, files, encoder, decoder)


def _read_decoder(
    files: DecoderFiles, device: torch.device, dtype: torch.dtype, offload: bool
) -> DecoderParts:
    logger.info("reading %s", files.folder)
    context = read_context(files)
    dit = files.dit
    transformer: Part[DiT]
    if offload and device.type != "cpu":
        home = torch.device("cpu")
        resident = read_part(DiT, dit.config, dit.source, dit.keys, home, dtype, False)
        transformer = StreamedPart(resident.module, device, BLOCKS)
    else:
        transformer = read_part(DiT, dit.config, dit.source, dit.keys, device, dtype, offload)
    tokenizer = _read_tokenizer(files, device, dtype, offload)
    return DecoderParts(
        transformer, tokenizer, context, files.statistics, files.generation, files.rotary_precision
    )


def load_diffusion(
    files: DiffusionFiles,
    device: torch.device,
    dtype: torch.dtype,
    recorder: Recorder,
    *,
    offload_diffusion_transformer: bool = False,
    offload_tokenizer: bool = False,
    offload_text_encoder_model: bool = False,
    text_encoder_dtype: torch.dtype | None = None,
    video: VideoShape | None = None,
    text: bool = True,
    visitor_bytes: int = 0,
) -> DiffusionParts:
    """Read the weights of a world; those of the text encoder wait for a prompt that needs them.

    Args:
        files: found and checked.
        device: where it runs.
        dtype: of transformer and tokenizer.
        recorder: is told seconds and memory.
        offload_diffusion_transformer: keep it in host memory while it is not used.
        offload_tokenizer: likewise.
        offload_text_encoder_model: likewise.
        text_encoder_dtype: by default `dtype` where T5 runs in it.
        video: the largest that will be made; by default of the world's own size.
        text: whether prompts will be encoded, which takes memory; False where embeddings are given.
        visitor_bytes: of `plan_diffusion`.

    Raises:
        InsufficientMemoryError: the device is too small for such a video.
    """
    chosen = {
        "offload_diffusion_transformer": offload_diffusion_transformer,
        "offload_tokenizer": offload_tokenizer,
        "offload_text_encoder_model": offload_text_encoder_model,
    }
    of_text = text_encoder_dtype or text_dtype(dtype)
    given = [flag for flag, given in chosen.items() if given]
    _check_memory(
        files,
        device,
        dtype,
        given,
        text_encoder_dtype=of_text,
        video=video,
        text=text,
        visitor_bytes=visitor_bytes,
    )
    logger.info("reading %s", files.folder)
    with recorder.stage("load"):
        transformer = read_part(
            DiT,
            files.config,
            files.dit.source,
            files.dit.keys,
            device,
            dtype,
            offload_diffusion_transformer,
        )
        tokenizer = _read_tokenizer(files, device, dtype, offload_tokenizer)
    encoder = text_part(
        files.text,
        load_t5,
        device,
        of_text,
        offload=offload_text_encoder_model,
        cache=EmbeddingCache(),
    )
    return DiffusionParts(transformer, tokenizer, encoder, files)


def _read_tokenizer(
    files: AutoregressiveFiles | DiffusionFiles | DecoderFiles,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool,
) -> Part[CosmosTokenizer]:
    keys = key_map(files.tokenizer_config)
    return read_part(
        CosmosTokenizer, files.tokenizer_config, files.tokenizer, keys, device, dtype, offload
    )


def fit(
    config: ARTransformerConfig | DiTConfig,
    tokenizer: CosmosTokenizerConfig,
    device: torch.device,
    memory: Memory | None,
    dtype: torch.dtype | None = None,
    given: Collection[str] = (),
) -> Fit:
    """Find the fewest offload flags with which a world fits.

    Args:
        config: of the transformer; a world that takes prompts is taken to have T5-11B, a diffusion
            world to make the released 121 frames of 704 x 1280, and an autoregressive one to decode
            by its tokenizer alone.
        tokenizer: its configuration.
        device: where the world would run.
        memory: of the device; None where it is not known.
        dtype: of the weights; by default that of the device.
        given: flags that are set already.
    """
    dtype = dtype or compute_dtype(device)
    need = _need(config, tokenizer, device, dtype)
    if isinstance(config, DiTConfig):
        return fewest_flags(need, DIFFUSION_OFFLOAD_FLAGS, device, memory, given)
    flags = offload_flags(text=config.context_width is not None, decoder=False)
    return fewest_flags(need, flags, device, memory, given)


def fit_files(
    files: WorldFiles,
    device: torch.device,
    memory: Memory | None,
    dtype: torch.dtype | None = None,
    given: Collection[str] = (),
) -> Fit:
    """Do what `fit` does for files that were found: a video of their default size."""
    need = _need_of(files, device, dtype or compute_dtype(device))
    return fewest_flags(need, _flags(files), device, memory, given)


def fit_entry(entry: Entry, device: torch.device, memory: Memory | None) -> Fit | None:
    """Do what `fit` does for a released checkpoint; None where this version does not run it.

    An autoregressive one has its diffusion decoder, unless it fits only without; then the flags
    begin with the one that does without.
    """
    if not entry.command:
        return None
    if entry.preset in FLOW_PRESETS:
        need = _need_flow(FLOW_PRESETS[entry.preset], device, compute_dtype(device))
        return fewest_flags(need, FLOW_OFFLOAD_FLAGS, device, memory)
    if entry.preset in DIFFUSION_PRESETS:
        return fit(DIFFUSION_PRESETS[entry.preset], TOKENIZER_PRESETS["CV8x8x8"], device, memory)
    config = AUTOREGRESSIVE_PRESETS[entry.preset]
    discrete, continuous = TOKENIZER_PRESETS["DV8x16x16"], TOKENIZER_PRESETS["CV8x8x8"]
    decoder = (DIFFUSION_PRESETS["7B-Decoder"], continuous)
    dtype = compute_dtype(device)
    need = _need(config, discrete, device, dtype, decoder=decoder)
    text = config.context_width is not None
    found = fewest_flags(need, offload_flags(text=text, decoder=True), device, memory)
    if found.fits is not False:
        return found
    bare = _need(config, discrete, device, dtype)
    without = fewest_flags(bare, offload_flags(text=text, decoder=False), device, memory)
    if not without.fits:
        return found
    return replace(without, flags=("disable_diffusion_decoder", *without.flags))


def _flags(files: WorldFiles) -> tuple[str, ...]:
    if isinstance(files, AutoregressiveFiles):
        return files.offload_flags
    return FLOW_OFFLOAD_FLAGS if isinstance(files, FlowFiles) else DIFFUSION_OFFLOAD_FLAGS


def _need_flow(config: FlowDiTConfig, device: torch.device, dtype: torch.dtype) -> Need:
    """Return what a released world of Predict2.5 needs by its flags."""
    return lambda flags: (
        plan_predict2_5(
            config,
            WanTokenizerConfig(),
            video=FlowDefaults().video,
            dtype=dtype,
            text_bytes=_REASON1_PARAMETERS * text_dtype(dtype).itemsize,
            fused=fused(device),
            **dict.fromkeys(flags, True),
        ).peak
    )


def _need(
    config: ARTransformerConfig | DiTConfig,
    tokenizer: CosmosTokenizerConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    video: VideoShape | None = None,
    nbytes_of_text: int | None = None,
    context_length: int = RELEASED_CONTEXT,
    decoder: tuple[DiTConfig, CosmosTokenizerConfig] | None = None,
    batch: int = 1,
    num_video_frames: int | None = None,
    visitor_bytes: int = 0,
) -> Need:
    """Return what a world needs by its flags; a released world's where nothing is said of it."""
    if nbytes_of_text is None:
        nbytes_of_text = _RELEASED_TEXT_PARAMETERS * text_dtype(dtype).itemsize
    if not isinstance(config, DiTConfig):
        decoding = None
        if decoder is not None:
            grid = window_grid(config, tokenizer, decoder[1])
            decoding = plan_decoder(*decoder, grid, dtype=dtype, fused=fused(device))
        of_text = nbytes_of_text if config.context_width is not None else 0
        return lambda flags: (
            plan_autoregressive(
                config,
                tokenizer,
                dtype=dtype,
                text_bytes=of_text,
                context_length=context_length,
                decoder=decoding,
                batch=batch,
                num_video_frames=num_video_frames,
                visitor_bytes=visitor_bytes,
                **dict.fromkeys(flags, True),
            ).peak
        )
    released = WorldDefaults(text2world=True)
    size = video or VideoShape(released.num_video_frames, released.height, released.width)
    return lambda flags: (
        plan_diffusion(
            config,
            tokenizer,
            video=size,
            dtype=dtype,
            text_bytes=nbytes_of_text,
            context_length=context_length,
            fused=fused(device),
            visitor_bytes=visitor_bytes,
            **dict.fromkeys(flags, True),
        ).peak
    )


def _need_of(
    files: WorldFiles,
    device: torch.device,
    dtype: torch.dtype,
    *,
    text_encoder_dtype: torch.dtype | None = None,
    video: VideoShape | None = None,
    text: bool = True,
    batch: int = 1,
    num_video_frames: int | None = None,
    visitor_bytes: int = 0,
) -> Need:
    """Return what a world needs that was found; `text` tells whether prompts will be encoded."""
    if isinstance(files, FlowFiles):
        return need_predict2_5(
            files, device, dtype, video=video, text=text, visitor_bytes=visitor_bytes
        )
    encoder = files.text if text else None
    if isinstance(files, AutoregressiveFiles):
        decoder = files.decoder
        return _need(
            files.config,
            files.tokenizer_config,
            device,
            dtype,
            nbytes_of_text=text_bytes(encoder, text_encoder_dtype or text_dtype(dtype)),
            context_length=files.context_length,
            decoder=(decoder.dit.config, decoder.tokenizer_config) if decoder else None,
            batch=batch,
            num_video_frames=num_video_frames,
            visitor_bytes=visitor_bytes,
        )
    return _need(
        files.config,
        files.tokenizer_config,
        device,
        dtype,
        video=video or files.defaults.video,
        nbytes_of_text=text_bytes(encoder, text_encoder_dtype or text_dtype(dtype)),
        context_length=files.context_length,
        visitor_bytes=visitor_bytes,
    )


def dearest(
    files: DiffusionFiles | FlowFiles,
    videos: Iterable[VideoShape],
    device: torch.device,
    given: Collection[str],
) -> VideoShape:
    """Return the size of which a world needs most memory.

    A large picture may need more than a clip of more pixels, which is coded in pieces.

    Args:
        files: of the world.
        videos: one or more.
        device: where it will run.
        given: offload flags that are set.
    """
    dtype = compute_dtype(device)
    return max(set(videos), key=lambda video: _need_of(files, device, dtype, video=video)(given))


def host_need(files: WorldFiles, device: torch.device, **options: Any) -> int:
    """Return the bytes of host memory that a world computes in; on a GPU it computes in none.

    Args:
        files: of the world.
        device: where it will run.
        options: those of `_need_of`.
    """
    if device.type != "cpu":
        return 0
    return _need_of(files, device, compute_dtype(device), **options)(())


def _check_memory(
    files: WorldFiles,
    device: torch.device,
    dtype: torch.dtype,
    given: Collection[str],
    **options: Any,
) -> None:
    """Refuse a world that does not fit; `options` are those of `_need_of`."""
    need = _need_of(files, device, dtype, **options)
    name = world_name(files.folder.name, bundled=files.bundled)
    check_memory(name, need, _flags(files), device, given)


def clips_at_once(
    files: AutoregressiveFiles,
    device: torch.device,
    dtype: torch.dtype,
    given: Collection[str],
    most: int,
    **options: Any,
) -> int:
    """Return how many clips are best drawn in step, at most `most`.

    That is as many as fit, and 1 where no kernels run, since several then take as long as one after
    another.

    Args:
        files: of the world.
        device: where it will run.
        dtype: of the networks.
        given: offload flags that are set.
        most: clips there are.
        options: those of `_need_of`.
    """
    memory, limit = device_memory(device), most_in_step(files, device, dtype)
    if memory is None or limit is None:
        return 1
    for count in range(min(most, limit), 1, -1):
        if _need_of(files, device, dtype, batch=count, **options)(given) <= memory.free:
            return count
    return 1


def most_in_step(
    files: AutoregressiveFiles, device: torch.device, dtype: torch.dtype
) -> int | None:
    """Return how many clips the kernels draw in step; None where none run."""
    return MOST_CLIPS if kernels_fit(files.config, device, dtype) else None


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the named device, or the best there is.

    Raises:
        InputError: it does not exist here.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"no device {device} here: {str(error).splitlines()[0]}") from error
    return chosen


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 where it is fast, else float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
