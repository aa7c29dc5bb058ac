"""A loaded world, and the videos it makes: the public Python interface."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from worldline.catalog import BUNDLED_PREFIX, check_parts
from worldline.errors import InputError
from worldline.files import stamp
from worldline.loading import (
    AutoregressiveFiles,
    AutoregressiveParts,
    choose_device,
    compute_dtype,
    find_autoregressive,
    load_autoregressive,
)
from worldline.models.predict1_ar.decoder import PlainDecoder
from worldline.pipelines.autoregressive import (
    FPS,
    AutoregressiveRequest,
    check_room,
    continue_clip,
)
from worldline.report import Recorder, environment
from worldline.video.read import Clip, media_kind, read_image, read_video, to_rgb
from worldline.video.write import check_destination, write_bytes, write_video

logger = logging.getLogger(__name__)

InputType = Literal["image", "video"]
# a file, a picture, or frames (T, H, W, 3) uint8
Input = str | PathLike[str] | Image.Image | NDArray[np.uint8] | torch.Tensor
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Video:
    """A finished video.

    Attributes:
        frames: uint8 (T, H, W, 3).
        fps: frames a second.
        report: model, seed, versions, seconds and memory of each stage.
    """

    frames: NDArray[np.uint8]
    fps: float
    report: dict[str, Any] = field(default_factory=dict, repr=False)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the video (by suffix: .mp4, .mov, .mkv, .webm, .gif) and its report beside it.

        The report has the same name and the suffix .json. Each file appears whole or not at all,
        and of two programs that save under one name the last leaves both files.

        Raises:
            InputError: the name or the folder cannot be written.
            Error: the disk is full; what was there before stays.
        """
        target = Path(path)
        check_destination(target)
        text = json.dumps(self.report, indent=1) + "\n"
        with _alone_in(target.parent):
            write_video(self.frames, target, self.fps)
            write_bytes(target.with_suffix(".json"), text.encode())
        return target


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other programs from saving into `folder`; file systems without locks do without."""
    opened = None
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
        fcntl.flock(opened, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if opened is not None:
            os.close(opened)


@dataclass(frozen=True)
class Step:
    """Progress of a request.

    Attributes:
        kind: what is being done: "encode", "tokens", "decode" or "done".
        done: how much of it.
        total: of how much.
        frames: pixels that are final, uint8 (T, H, W, 3), where there are new ones.
        preview: a cheap early look, where there is one.
        video: the result; of the last step alone.
    """

    kind: str
    done: int
    total: int
    frames: NDArray[np.uint8] | None = None
    preview: NDArray[np.uint8] | None = None
    video: Video | None = None


class World:
    """A world model, ready to continue clips. Made by `worldline.load`."""

    def __init__(
        self,
        name: str,
        parts: AutoregressiveParts,
        loading: Recorder,
        identity: dict[str, Any],
    ) -> None:
        self.name = name
        self.parts = parts
        self.loading = loading
        self.identity = identity

    @property
    def parameters(self) -> int:
        """Number of trained weights of the transformer."""
        return sum(weight.numel() for weight in self.parts.transformer.module.parameters())

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def generate(self, input: Input, **options: Any) -> Video:
        """Continue a clip or an image into a video; the options are those of `stream`."""
        for step in self.stream(input, **options):
            if step.video is not None:
                return step.video
        raise AssertionError("a stream ends with its video")

    def stream(
        self, input: Input, *, input_type: InputType | None = None, **options: Any
    ) -> Iterator[Step]:
        """Do what `generate` does, and yield a `Step` now and then; the last carries the video.

        Args:
            input: a file; a PIL image; or frames (T, H, W, 3) uint8, array or tensor.
            input_type: "image" or "video"; by default what the input is.
            options: fields of `AutoregressiveRequest`: num_input_frames (9; 1 for an image),
                temperature, top_p, seed.

        Raises:
            InputError: the input or an option is wrong; raised before anything runs.
        """
        if input_type not in ("image", "video", None):
            raise InputError(f'input_type is {input_type!r}; it must be "image" or "video"')
        found = kind_of(input)
        kind = input_type or found
        known = AutoregressiveRequest.__dataclass_fields__
        if unknown := ", ".join(sorted(options.keys() - known.keys())):
            raise InputError(f"unknown option {unknown}; there are: input_type, {', '.join(known)}")
        if kind == "image":
            if options.get("num_input_frames", 1) != 1:
                logger.info("num_input_frames has no effect: an image has 1 frame")
            options["num_input_frames"] = 1
        request = AutoregressiveRequest(**options)
        check_room(self.parts.config, self.parts.tokenizer.module.config, request.num_input_frames)
        recorder = Recorder(self.device)
        source = {"input": _describe(input), "files": {**self.identity, "input": _stamp(input)}}
        with recorder.stage("read"):
            clip = read_clip(input, kind, request.num_input_frames)
        return self._run(clip, request, recorder, source)

    def _run(
        self,
        clip: Clip,
        request: AutoregressiveRequest,
        recorder: Recorder,
        source: dict[str, Any],
    ) -> Iterator[Step]:
        for progress in continue_clip(self.parts, clip, request, recorder):
            if progress.frames is None:
                yield Step(progress.kind, progress.done, progress.total)
                continue
            report = self._report(request, recorder, source, progress.total)
            video = Video(progress.frames, FPS, report)
            yield Step("done", progress.total, progress.total, progress.frames, video=video)

    def _report(
        self,
        request: AutoregressiveRequest,
        recorder: Recorder,
        source: dict[str, Any],
        drawn: int,
    ) -> dict[str, Any]:
        transformer = self.parts.transformer
        spent = sum(s.seconds for s in recorder.stages if s.name in ("prefill", "tokens"))
        decoder = recorder.facts["decoder"]
        # a prompt has many queries; see `worldline.nn.attention` for the one query of a step
        steps = "matrix products" if decoder == PlainDecoder.name else "Triton, split keys"
        return {
            "model": self.name,
            "parameters": self.parameters,
            **source,
            "request": request.__dict__,
            "decoder": decoder,
            "attention": f"torch SDPA (prompt), {steps} (decoding)",
            "dtype": str(transformer.module.head.weight.dtype).removeprefix("torch."),
            "offload": {
                "ar_model": transformer.offload,
                "tokenizer": self.parts.tokenizer.offload,
            },
            "tokens": drawn,
            "tokens_per_second": round(drawn / spent, 2) if spent else None,
            **environment(self.device),
            "load": self.loading.as_dict(),
            "run": recorder.as_dict(),
        }


def load(
    name: str | PathLike[str],
    checkpoint_dir: str | PathLike[str] = "checkpoints",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    offload_ar_model: bool = False,
    offload_tokenizer: bool = False,
    disable_diffusion_decoder: bool | None = None,
    disable_guardrail: bool | None = None,
) -> World:
    """Load a world.

    Args:
        name: "tiny-…" for a model that ships with the package, the name of a folder below
            `checkpoint_dir`, or a path; the path of a file loads that file.
        checkpoint_dir: holds the released folders.
        device: by default the GPU, if there is one.
        dtype: by default bf16 on a GPU, else float32.
        offload_ar_model: keep the transformer in host memory while it is not used.
        offload_tokenizer: keep the tokenizer in host memory while it is not used.
        disable_diffusion_decoder: decode tokens by the tokenizer alone. Released models use the
            diffusion decoder unless told otherwise; bundled ones have none.
        disable_guardrail: do not check the video. Released models check unless told otherwise.

    Raises:
        CheckpointError: files are absent, damaged, or of another model.
        InputError: a part is asked for that this version does not have, there is no such device, or
            the dtype is none to compute in.
        InsufficientMemoryError: the device is too small.
    """
    if dtype not in (None, *_DTYPES):
        known = ", ".join(map(str, _DTYPES))
        raise InputError(f"dtype is {dtype}; it must be one of {known}")
    files = find_autoregressive(str(name), Path(checkpoint_dir))
    check_parts(files.bundled, disable_diffusion_decoder, disable_guardrail)
    return load_files(
        files,
        device=device,
        dtype=dtype,
        offload_ar_model=offload_ar_model,
        offload_tokenizer=offload_tokenizer,
    )


def load_files(
    files: AutoregressiveFiles,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    offload_ar_model: bool = False,
    offload_tokenizer: bool = False,
) -> World:
    """Do what `load` does with files that were found and checked before."""
    chosen = choose_device(device)
    identity = files.identity()
    recorder = Recorder(chosen)
    parts = load_autoregressive(
        files,
        chosen,
        dtype or compute_dtype(chosen),
        recorder,
        offload_ar_model=offload_ar_model,
        offload_tokenizer=offload_tokenizer,
    )
    name = f"{BUNDLED_PREFIX if files.bundled else ''}{files.folder.name}"
    return World(name, parts, recorder, identity)


def kind_of(input: Input) -> InputType:
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
    raise InputError(
        f"the input is a {type(input).__name__}; it must be a path, a PIL image, or frames "
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
            f"{_describe(input)} is {article}, but the input type is {kind}: "
            f"use --input_type {found}"
        )
    if isinstance(input, (np.ndarray, torch.Tensor)):
        clip = Clip(_as_frames(input), 0.0)
    elif isinstance(input, Image.Image):
        clip = to_rgb(input, _describe(input))
    elif kind == "image":
        clip = read_image(Path(input))
    else:
        clip = read_video(Path(input), last=num_input_frames)
    if len(clip.frames) < num_input_frames:
        raise InputError(
            f"{_describe(input)} has {len(clip.frames)} frames, "
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


def _describe(input: Input) -> str:
    if isinstance(input, (str, PathLike)):
        return str(input)
    if isinstance(input, Image.Image):
        return f"image {input.width} x {input.height}"
    return f"frames {tuple(input.shape)}"


def _stamp(input: Input) -> dict[str, Any] | None:
    """Return what tells the input's file from another; None for what is no file."""
    if isinstance(input, (str, PathLike)):
        with suppress(OSError, ValueError):  # told when it is read
            return stamp(Path(input))
    return None
