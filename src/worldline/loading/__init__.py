"""From a name or a folder to a world: find the files, check them, plan the memory, read.

Everything that can be wrong is found from file headers, before tensor data are read.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from worldline.catalog import Entry
from worldline.choices import DIFFUSION_OFFLOAD_FLAGS, OFFLOAD_FLAGS
from worldline.errors import InputError
from worldline.loading.autoregressive import (
    AutoregressiveFiles,
    AutoregressiveParts,
    MemoryPlan,
    open_autoregressive,
    plan_autoregressive,
    video_shape,
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
    holds_diffusers,
    is_diffusion,
    open_transformer,
    read_settings,
)
from worldline.loading.memory import DiffusionPlan, Fit, Need, check_memory, fewest_flags
from worldline.loading.parts import TextPart, read_part, text_bytes, text_dtype
from worldline.machine import Memory
from worldline.models.predict1_ar.decoder import compile_ahead
from worldline.models.predict1_ar.model import PRESETS as AUTOREGRESSIVE_PRESETS
from worldline.models.predict1_ar.model import ARTransformer, ARTransformerConfig
from worldline.models.predict1_ar.weights import KEYS
from worldline.models.predict1_dit.model import PRESETS as DIFFUSION_PRESETS
from worldline.models.predict1_dit.model import DiT, DiTConfig
from worldline.nn.modulation import fused
from worldline.parallel.offload import Part
from worldline.places import find_place
from worldline.report import Recorder
from worldline.shapes import VideoShape
from worldline.text.cache import EmbeddingCache
from worldline.text.t5 import load_t5
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZER_PRESETS
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.weights import key_map

__all__ = [
    "DIFFUSION_OFFLOAD_FLAGS",
    "OFFLOAD_FLAGS",
    "AutoregressiveFiles",
    "AutoregressiveParts",
    "DiffusionFiles",
    "DiffusionParts",
    "DiffusionPlan",
    "Fit",
    "MemoryPlan",
    "TextPart",
    "WorldDefaults",
    "WorldFiles",
    "choose_device",
    "compute_dtype",
    "find_autoregressive",
    "find_diffusion",
    "find_world",
    "fit",
    "fit_entry",
    "fit_files",
    "load_autoregressive",
    "load_diffusion",
    "open_transformer",
    "plan_autoregressive",
    "plan_diffusion",
    "read_settings",
    "refuse_options",
    "text_dtype",
    "video_shape",
]

logger = logging.getLogger(__name__)

WorldFiles = AutoregressiveFiles | DiffusionFiles

# T5-11B: 24 layers of four 1024 x 16,384 and two 1024 x 65,536 matrices, and 32,128 words
_RELEASED_TEXT_PARAMETERS = 4_864_791_552


def find_world(
    model: str | Path,
    checkpoint_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    text_encoder_dir: str | Path | None = None,
    generation: str | None = None,
) -> WorldFiles:
    """Find and check the files of a world of either family, by what its folder holds.

    Args:
        model: "tiny-…" for a bundled one, a folder's name below `checkpoint_dir`, or a path; the
            path of a file opens that file.
        checkpoint_dir: holds the folders, those of the other parts too.
        tokenizer_dir: of a diffusion world; see `find_diffusion`.
        text_encoder_dir: likewise.
        generation: likewise.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model.
        InputError: an autoregressive world is given what only diffusion worlds have.
    """
    place = find_place(model, checkpoint_dir)
    special = {
        "tokenizer_dir": tokenizer_dir,
        "text_encoder_dir": text_encoder_dir,
        "generation": generation,
    }
    if holds_diffusers(place.named) or is_diffusion(open_transformer(place.named)):
        return open_diffusion(
            place,
            tokenizer_dir=tokenizer_dir,
            text_encoder_dir=text_encoder_dir,
            generation=generation,
        )
    refuse_options(place.folder, "an autoregressive", special)
    return open_autoregressive(place)


def refuse_options(folder: Path, kind: str, given: dict[str, Any]) -> None:
    """Refuse options that belong to another family of worlds.

    Raises:
        InputError: one of them is given.
    """
    wrong = [name for name, value in given.items() if value not in (None, False)]
    if wrong:
        raise InputError(f"{folder.name} is {kind} world, which has no {', no '.join(wrong)}")


def find_autoregressive(model: str | Path, checkpoint_dir: str | Path) -> AutoregressiveFiles:
    """Find and check the files of an autoregressive world.

    Args:
        model: "tiny-…" for a bundled one, a folder's name below `checkpoint_dir`, or a path; the
            path of a file opens that file.
        checkpoint_dir: holds the folders, the tokenizer's too.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model.
    """
    return open_autoregressive(find_place(model, checkpoint_dir))


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
        find_place(model, checkpoint_dir),
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
) -> AutoregressiveParts:
    """Read the weights of a world.

    Raises:
        InsufficientMemoryError: the device is too small for one clip.
    """
    chosen = {"offload_ar_model": offload_ar_model, "offload_tokenizer": offload_tokenizer}
    _check_memory(files, device, dtype, [flag for flag, given in chosen.items() if given])
    logger.info("reading %s", files.folder)
    compiling = compile_ahead(files.config, device)
    with recorder.stage("load"):
        transformer = read_part(
            ARTransformer, files.config, files.transformer, KEYS, device, dtype, offload_ar_model
        )
        tokenizer = _read_tokenizer(files, device, dtype, offload_tokenizer)
        if compiling is not None:
            compiling.join()
    return AutoregressiveParts(transformer, tokenizer)


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
    _check_memory(files, device, dtype, given, text_encoder_dtype=of_text, video=video, text=text)
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
    encoder = None
    if files.text is not None:
        encoder = TextPart(
            files.text,
            load_t5,
            device,
            of_text,
            offload=offload_text_encoder_model,
            cache=EmbeddingCache(),
        )
    return DiffusionParts(transformer, tokenizer, encoder, files)


def _read_tokenizer(
    files: WorldFiles, device: torch.device, dtype: torch.dtype, offload: bool
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
        config: of the transformer; a diffusion world is taken to have T5-11B and to make the
            released 121 frames of 704 x 1280.
        tokenizer: its configuration.
        device: where the world would run.
        memory: of the device; None where it is not known.
        dtype: of the weights; by default that of the device.
        given: flags that are set already.
    """
    dtype = dtype or compute_dtype(device)
    need = _need(config, tokenizer, device, dtype)
    return fewest_flags(need, _flags(config), device, memory, given)


def fit_files(
    files: WorldFiles,
    device: torch.device,
    memory: Memory | None,
    dtype: torch.dtype | None = None,
    given: Collection[str] = (),
) -> Fit:
    """Do what `fit` does for files that were found: a video of their default size."""
    need = _need_of(files, device, dtype or compute_dtype(device))
    return fewest_flags(need, _flags(files.config), device, memory, given)


def fit_entry(entry: Entry, device: torch.device, memory: Memory | None) -> Fit | None:
    """Do what `fit` does for a released checkpoint; None where this version does not run it."""
    if not entry.command:
        return None
    if entry.preset in DIFFUSION_PRESETS:
        return fit(DIFFUSION_PRESETS[entry.preset], TOKENIZER_PRESETS["CV8x8x8"], device, memory)
    config = AUTOREGRESSIVE_PRESETS[entry.preset]
    return fit(config, TOKENIZER_PRESETS["DV8x16x16"], device, memory)


def _flags(config: ARTransformerConfig | DiTConfig) -> tuple[str, ...]:
    return DIFFUSION_OFFLOAD_FLAGS if isinstance(config, DiTConfig) else OFFLOAD_FLAGS


def _need(
    config: ARTransformerConfig | DiTConfig,
    tokenizer: CosmosTokenizerConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    video: VideoShape | None = None,
    nbytes_of_text: int | None = None,
    context_length: int = RELEASED_CONTEXT,
) -> Need:
    """Return what a world needs by its flags; a released world's where nothing is said of it."""
    if not isinstance(config, DiTConfig):
        return lambda flags: (
            plan_autoregressive(config, tokenizer, dtype=dtype, **dict.fromkeys(flags, True)).peak
        )
    released = WorldDefaults(text2world=True)
    size = video or VideoShape(released.num_video_frames, released.height, released.width)
    if nbytes_of_text is None:
        nbytes_of_text = _RELEASED_TEXT_PARAMETERS * text_dtype(dtype).itemsize
    return lambda flags: (
        plan_diffusion(
            config,
            tokenizer,
            video=size,
            dtype=dtype,
            text_bytes=nbytes_of_text,
            context_length=context_length,
            fused=fused(device),
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
) -> Need:
    """Return what a world needs that was found; `text` tells whether prompts will be encoded."""
    if isinstance(files, AutoregressiveFiles):
        return _need(files.config, files.tokenizer_config, device, dtype)
    defaults = files.defaults
    encoder = files.text if text else None
    return _need(
        files.config,
        files.tokenizer_config,
        device,
        dtype,
        video=video or VideoShape(defaults.num_video_frames, defaults.height, defaults.width),
        nbytes_of_text=text_bytes(encoder, text_encoder_dtype or text_dtype(dtype)),
        context_length=files.context_length,
    )


def _check_memory(
    files: WorldFiles,
    device: torch.device,
    dtype: torch.dtype,
    given: Collection[str],
    **options: Any,
) -> None:
    """Refuse a world that does not fit; `options` are those of `_need_of`."""
    need = _need_of(files, device, dtype, **options)
    check_memory(files.folder.name, need, _flags(files.config), device, given)


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
