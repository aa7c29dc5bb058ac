"""Guardrails and prompt upsampler around a request."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldline import memory
from worldline.catalog import ENTRIES
from worldline.errors import CheckpointError, InsufficientMemoryError, option
from worldline.family import Compute, Opened
from worldline.files import GIGABYTE
from worldline.memory import Weights
from worldline.parallel.offload import BlockPlan, Offloadable
from worldline.report import Recorder
from worldline.repositories import model_name
from worldline.request import Request
from worldline.step import Step
from worldline.video.read import Clip, Frames
from worldline.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from worldline.guardrails.base import Guardrails
    from worldline.text.upsampler import Upsampler

logger = logging.getLogger(__name__)

_LICENCE = (
    "the guardrails are off: by the NVIDIA Open Model License, the rights to the released weights "
    "end where a guardrail is bypassed without a similar one that fits the use"
)


@dataclass(frozen=True)
class Guards:
    """What runs around the requests of one model."""

    opened: Opened
    loading: Recorder
    guardrails: Guardrails | None = None
    guardrail_off: str | None = None  # why none run
    upsampler: Upsampler | None = None  # None where prompts are used as they are

    @property
    def checks_videos(self) -> bool:
        """Whether frames must not leave before the whole video was checked."""
        return self.guardrails is not None and bool(self.guardrails.video)

    @property
    def parts(self) -> dict[str, list[Offloadable[Any]]]:
        """Networks by the name that their flag has behind `--offload_`."""
        parts: dict[str, list[Offloadable[Any]]] = {}
        if self.guardrails is not None:
            parts["guardrail_models"] = [*self.guardrails.parts.values()]
        if self.upsampler is not None:
            parts["prompt_upsampler"] = [self.upsampler.part]
        return parts

    @property
    def guardrail_bytes(self) -> int:
        """Bytes that the largest offloaded guardrail has on the device when it is used."""
        parts = self.parts.get("guardrail_models", ())
        return max((part.visiting_nbytes for part in parts if part.offload), default=0)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the networks that stay on the device."""
        parts = chain.from_iterable(self.parts.values())
        return sum(p.nbytes for p in parts if not p.offload and p.device.type != "cpu")

    @property
    def advice(self) -> str:
        """End of a message about exhausted memory: which flags free how much."""
        advice = ""
        for name, parts in self.parts.items():
            resident = (p.nbytes for p in parts if not p.offload and p.device.type != "cpu")
            if nbytes := sum(resident):
                advice += f"; {option(f'offload_{name}', True)} frees {nbytes / GIGABYTE:.1f} GB"
        return advice

    @property
    def offloaded(self) -> dict[str, bool]:
        """What runs around the model, and whether it waits in host memory."""
        return {name: any(part.offload for part in parts) for name, parts in self.parts.items()}

    @property
    def streamed(self) -> list[str]:
        """What of it comes to the device block by block."""
        return [name for name, parts in self.parts.items() if any(p.streamed for p in parts)]


@dataclass
class Checks:
    """The guards of one request."""

    guards: Guards
    recorder: Recorder
    upsampled: bool = False
    entries: list[dict[str, str]] = field(default_factory=list)

    def before(self, request: Request, clip: Clip | None) -> Generator[Step, None, Request]:
        """Check the prompt, rewrite it, check it again (GuardrailRefusal); the request to make."""
        if self.guards.guardrails is not None and request.prompt_embeddings is not None:
            logger.warning("no guardrail checks the prompt: its embedding is given")
        if request.prompt is not None:
            yield from self._check_prompt(request.prompt, "prompt")
        upsampler = self.guards.upsampler
        if upsampler is None or not rewrites(self.guards.opened, request):
            return request
        yield Step("upsample", 0, 1)
        with self.recorder.stage("upsample"):
            frame = None if clip is None else clip.frames[-1]
            prompt = upsampler.write(request.prompt, frame, request.seed)
        self.upsampled = True
        yield from self._check_prompt(prompt, "upsampled prompt")
        return request.model_copy(update={"prompt": prompt})

    def _check_prompt(self, prompt: str, subject: str) -> Generator[Step, None, None]:
        guardrails = self.guards.guardrails
        if guardrails is not None and guardrails.text:
            yield Step("guardrail", 0, 1)
            with self.recorder.stage("guardrail"):
                self.entries += guardrails.check_prompt(prompt, subject)

    def after(self, frames: Frames) -> Generator[Step, None, Frames]:
        """Check a video (GuardrailRefusal); the same with faces blurred."""
        if self.guards.guardrails is not None:
            yield Step("guardrail", 0, 1)
            with self.recorder.stage("guardrail"):
                frames, entries = self.guards.guardrails.check_video(frames)
            self.entries += entries
        return frames

    def report(self) -> dict[str, Any]:
        guards = self.guards
        return {
            "guardrail": release_of(guards.opened),
            "guardrail_off": guards.guardrail_off,
            "guardrail_checks": self.entries,
            "prompt_upsampler": guards.upsampler and guards.upsampler.name,
            "prompt_upsampler_ran": self.upsampled,
        }


def release_of(opened: Opened) -> str | None:
    """Name of the set of guardrails that a model runs with; None if there is none."""
    return None if _off(opened, "disable_guardrail") else opened.family.guardrails(opened)


def check_frames(
    opened: Opened, request: Any, clips: int = 1, beside: int = 0, held: int = 0
) -> None:
    """Refuse a request whose frames do not fit into host memory, which holds all of them at last.

    Args:
        opened: the model.
        request: a parsed one.
        clips: videos made in step.
        beside: bytes of host memory that the networks need.
        held: bytes of it that this process holds now.

    Raises:
        InsufficientMemoryError: too little is free.
    """
    host, video = memory.host_memory().after(held), opened.family.video(opened, request)
    if not opened.family.holds_batch(opened, request):
        clips = 1
    copies = clips + (release_of(opened) is not None)  # guardrails copy one video
    need = copies * 3 * video.frames * video.height * video.width
    if need + beside > host.free:
        raise InsufficientMemoryError(
            f"num_video_frames is {video.frames}: the frames of {clips} video(s) of {video.height} "
            f"x {video.width} pixels need {need / GIGABYTE:.1f} GB of host memory"
            f"{f' beside {beside / GIGABYTE:.1f} GB of networks' if beside else ''}, {host}; lower "
            f"num_video_frames{', ' + option('batch_size') if clips > 1 else ''} or the size"
        )


def upsamples(opened: Opened) -> bool:
    """Whether a prompt upsampler belongs to a model and is not disabled."""
    return opened.family.upsampler is not None and not _off(opened, "disable_prompt_upsampler")


def _off(opened: Opened, option: str) -> bool:
    """Whether something is disabled, as it is for bundled models unless insisted on."""
    disabled: bool | None = getattr(opened.options, option)
    return opened.place.bundled if disabled is None else disabled


def rewrites(opened: Opened, request: Any) -> bool:
    """Whether the prompt upsampler writes the prompt of a request."""
    upsampler = opened.family.upsampler
    if upsampler is None or not upsamples(opened) or request.prompt_embeddings is not None:
        return False
    describes, _ = upsampler(opened)
    if describes:  # a prompt beside a clip is used, which the released code ignores
        return request.prompt is None and request.num_input_frames > 0
    limit = opened.options.word_limit_to_skip_upsampler
    return request.prompt is not None and len(request.prompt.split()) <= limit


def load_guards(opened: Opened, compute: Compute, *, upsample: bool = True) -> Guards:
    """Load guardrails and, to `upsample`, the prompt upsampler; no model runs before they are.

    The first of the processes that make a video together has them.

    Raises:
        CheckpointError: one is absent or damaged; all that are, and the flags to run without.
    """
    recorder, options = Recorder(compute.device), opened.options
    if not compute.mesh.video.first:
        return Guards(opened, recorder)
    problems: list[str] = []

    @contextmanager
    def loading(name: str, download: str, disable: str) -> Iterator[None]:
        try:
            with recorder.stage(f"load {name}"):
                yield
        except (OSError, ImportError, ValueError) as error:  # CheckpointError is a ValueError
            problems.append(
                f"{name} cannot load: {error}; `worldline checkpoints download {download}` fetches "
                f"what is missing, {option(disable, True)} runs without"
            )

    guardrails = upsampler = off = None
    if (release := release_of(opened)) is None:
        disabled = options.disable_guardrail
        off = "disabled by the user" if disabled else "bundled models have none"
        bypassed = disabled and not opened.place.bundled
        logger.info("%s", _LICENCE if bypassed else f"no guardrail: {off}")
    else:
        from worldline import guardrails as sets  # imported only where guardrails run

        flag = options.flags()["disable_guardrail"]
        where = _guardrail_options(opened)
        with loading("guardrails", sets.RELEASES[release].download, flag):
            refuse_altered(sets.files(release, opened.place.roots, **where))
            guardrails = sets.load(
                release,
                opened.place.roots,
                device=compute.device,
                offload=options.offload_guardrail_models,
                **where,
            )
            logger.info("guardrails: %s", ", ".join(guardrails.parts))
    if upsample and upsamples(opened):
        with loading("prompt upsampler", model_name(opened.folder), "disable_prompt_upsampler"):
            upsampler = _load_upsampler(opened, compute)
    if problems:
        raise CheckpointError("; and ".join(problems))
    return Guards(opened, recorder, guardrails, off, upsampler)


def _load_upsampler(opened: Opened, compute: Compute) -> Upsampler:
    from worldline.text.upsampler import Upsampler

    folder, describes = _upsampler_folder(opened)
    logger.info("reading %s", folder)
    offload = opened.options.offload_prompt_upsampler
    return Upsampler(folder, opened.place.roots, describes, compute.device, offload=offload)


def _upsampler_folder(opened: Opened) -> tuple[Path, bool]:
    """Folder of a model's prompt upsampler, and whether it describes clips."""
    assert opened.family.upsampler is not None
    place, (describes, names) = opened.place, opened.family.upsampler(opened)
    chosen = opened.options.prompt_upsampler_dir
    return place.chosen(chosen, "prompt_upsampler_dir") if chosen else place.find(names), describes


def planned_weights(opened: Opened, requests: Sequence[Any]) -> dict[str, Weights]:
    """Guardrails and prompt upsampler by their stages, as large as their files.

    Raises:
        CheckpointError: a folder is absent.
    """
    weights: dict[str, Weights] = {}
    if (release := release_of(opened)) is not None:
        from worldline import guardrails as sets  # imported only where guardrails run

        files = sets.files(release, opened.place.roots, **_guardrail_options(opened))
        if sizes := _network_sizes(files):
            # they come to the device one by one
            largest = max(map(_streamed_bytes, sizes))
            total = sum(sum(each.values()) for each in sizes)
            weights["guardrail"] = Weights(total, "offload_guardrail_models", largest)
    if any(rewrites(opened, request) for request in requests):
        sizes = _network_sizes([*_upsampler_folder(opened)[0].iterdir()])
        total = sum(sum(each.values()) for each in sizes)
        streamed = sum(map(_streamed_bytes, sizes))
        weights["upsample"] = Weights(total, "offload_prompt_upsampler", streamed)
    return weights


def _network_sizes(files: Sequence[Path]) -> list[dict[Path, int]]:
    """Files of the weights in each folder and their bytes, in one format; `original` is a copy."""
    sizes = []
    for folder in {path.parent for path in files if path.parent.name != "original"}:
        inside = [path for path in files if path.parent == folder]
        formats = (
            {path: path.stat().st_size for path in inside if path.suffix == suffix}
            for suffix in (".safetensors", ".bin", ".pt", ".pth")
        )
        sizes.append(next(filter(None, formats), {}))
    return [*filter(None, sizes)]


def _streamed_bytes(sizes: Mapping[Path, int]) -> int:
    """Bytes on the device at most, of a network that is streamed if it is a language model."""
    tensors: dict[str, int] = {}
    for path in sizes:
        if path.suffix not in (".safetensors", ".pt"):
            return sum(sizes.values())
        for name, tensor in open_checkpoint(path).tensors.items():
            # names differ by release, but for those of vision towers
            inner = name.replace("language_model.", "").removeprefix("model.")
            tensors[f"model.{inner}"] = tensor.nbytes
    return BlockPlan("model.layers").count(tensors)


def files_of(opened: Opened, request: Any) -> list[Path]:
    """Files of the guardrails and of the upsampler that run around a request, unopened.

    Without a folder that is absent, and that `load_guards` refuses.
    """
    files: list[Path] = []
    with suppress(CheckpointError):
        if (release := release_of(opened)) is not None:
            from worldline import guardrails as sets  # imported only where guardrails run

            files += sets.files(release, opened.place.roots, **_guardrail_options(opened))
    with suppress(CheckpointError):
        if rewrites(opened, request):
            files += filter(Path.is_file, sorted(_upsampler_folder(opened)[0].iterdir()))
    return files


def refuse_altered(paths: Iterable[Path]) -> None:
    """Refuse files of a released name and size with another hash (CheckpointError)."""
    known = {file.name: file for entry in ENTRIES for file in entry.files if file.md5}
    for path in paths:
        file = known.get("/".join(path.parts[-2:]))
        if file is not None and path.stat().st_size == file.nbytes:
            md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            if md5 != file.md5:
                raise CheckpointError(f"{path} has md5 {md5}, not {file.md5}; download it again")


def _guardrail_options(opened: Opened) -> dict[str, Any]:
    text = "text" in opened.parts or "text" in opened.missing
    return {"folder": opened.options.guardrail_dir, "text": text}
