"""The parts of a world that are found and read alike in several families."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.locate import Place
from worldline.parallel.offload import Part
from worldline.shapes import VideoShape
from worldline.text.cache import EmbeddingCache
from worldline.text.encoder_files import EncoderFiles
from worldline.tokenizers.colours import fit_colours
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.wan.model import WanTokenizer
from worldline.weights.dit import Layout
from worldline.weights.keymap import KeyMap
from worldline.weights.read import Checkpoint
from worldline.weights.stream import load_into

logger = logging.getLogger(__name__)


class Measured(Protocol):
    """Files of a text encoder that tell its sizes."""

    @property
    def folder(self) -> Path: ...

    @property
    def width(self) -> int: ...

    @property
    def num_parameters(self) -> int: ...


FilesType = TypeVar("FilesType", bound=EncoderFiles)
MeasuredType = TypeVar("MeasuredType", bound=Measured)


@dataclass(frozen=True)
class EncoderKind(Generic[MeasuredType]):
    """Where a kind of text encoder lies, and how it is checked.

    Attributes:
        name: for people.
        released: name on the hub.
        folders: lists the folders below a folder of models that may hold one.
        find: checks the files of one.
    """

    name: str
    released: str
    folders: Callable[[Path], list[Path]]
    find: Callable[[Path], MeasuredType]


class TextPart(Generic[FilesType]):
    """The text encoder behind its cache: weights are read when a prompt is not in it.

    Attributes:
        files: of the encoder.
        device: where it runs.
        dtype: of its weights.
        offload: whether its home is the host.
    """

    def __init__(
        self,
        files: FilesType,
        load: Callable[[FilesType, torch.device, torch.dtype], nn.Module],
        device: torch.device,
        dtype: torch.dtype,
        *,
        offload: bool,
        cache: EmbeddingCache,
    ) -> None:
        self.files = files
        self.device = device
        self.dtype = dtype
        self.offload = offload and device.type != "cpu"
        self._cache = cache
        self._load = load
        self._part: Part[Any] | None = None
        self._key = json.dumps([files.identity(), str(dtype), files.max_length], sort_keys=True)

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the embedding (1, S, E) of each prompt, on the CPU.

        Raises:
            CheckpointError: the weights cannot be read.
        """
        found: dict[str, Tensor] = {}
        for prompt in prompts:
            cached = self._cache.get(self._key, prompt)
            if cached is not None:
                self.files.tell_if_cut(prompt)  # what the encoder would say
                found[prompt] = cached.view(1, *cached.shape[-2:])
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if not missing:
            return found
        with torch.inference_mode(), self._read().on_device() as encoder:
            for prompt in missing:
                found[prompt] = encoder.encode([prompt], self.files.max_length).cpu()
        for prompt in missing:
            self._cache.put(self._key, prompt, found[prompt])
        return found

    def truncations(self, prompts: Mapping[str, str]) -> dict[str, dict[str, int]]:
        """Return how prompts are cut that are longer than what the encoder reads, for a report.

        Args:
            prompts: by their names.

        Returns:
            By its name, each of those that are: the fields of `Truncation`.

        Raises:
            CheckpointError: the tokenizer cannot be read.
        """
        cuts = {name: self.files.truncation_of(prompt) for name, prompt in prompts.items()}
        return {name: asdict(cut) for name, cut in cuts.items() if cut is not None}

    def _read(self) -> Part[Any]:
        if self._part is None:
            logger.info("reading %s", self.files.folder)
            home = torch.device("cpu") if self.offload else self.device
            encoder = self._load(self.files, home, self.dtype)
            self._part = Part(encoder, self.device, offload=self.offload)
        return self._part


class _Defaults(Protocol):
    @property
    def video(self) -> VideoShape: ...


class _Files(Protocol):
    @property
    def defaults(self) -> _Defaults: ...


NetworkType = TypeVar("NetworkType", bound=nn.Module)
CoderType = TypeVar("CoderType", CosmosTokenizer, WanTokenizer)
WorldFilesType = TypeVar("WorldFilesType", bound=_Files)


@dataclass(frozen=True)
class DenoisingParts(Generic[NetworkType, CoderType, WorldFilesType]):
    """The networks of a world that denoises, each on its device or waiting in host memory.

    Attributes:
        transformer: the denoiser, or what gives the velocity of a flow.
        tokenizer: pixels to latents and back.
        text: prompts to embeddings; None where there is none.
        files: that they were read from.
    """

    transformer: Part[NetworkType]
    tokenizer: Part[CoderType]
    text: TextPart[Any] | None
    files: WorldFilesType

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @cached_property
    def colours(self) -> Tensor:
        """What the latents look like, for previews: of `fit_colours`, once for all requests.

        First to be read while the tokenizer is on its device.
        """
        return fit_colours(self.tokenizer.module)

    @property
    def video(self) -> VideoShape:
        """Size of what this world makes unless asked for another."""
        return self.files.defaults.video


def find_text(
    kind: EncoderKind[MeasuredType],
    place: Place,
    folder: Path,
    layout: Layout,
    asked: str | Path | None,
    width: int,
) -> tuple[MeasuredType | None, str]:
    """Return the text encoder of a world, or why there is none.

    Args:
        kind: of encoder.
        place: of the world.
        folder: of its transformer.
        layout: of its transformer.
        asked: name or path of another text encoder.
        width: of the embeddings that the transformer was trained on.

    Raises:
        CheckpointError: the encoder that was asked for is absent or does not fit.
    """
    text, why_no_text = _find_text(kind, place, folder, layout, asked)
    if text is not None and text.width != width:
        why_no_text = (
            f"{text.folder} gives embeddings of width {text.width}, "
            f"but {folder} was trained on {width}"
        )
        if asked is not None:
            raise CheckpointError(f"{why_no_text}: they do not belong together")
        text = None
    return text, why_no_text


def _find_text(
    kind: EncoderKind[MeasuredType],
    place: Place,
    folder: Path,
    layout: Layout,
    asked: str | Path | None,
) -> tuple[MeasuredType | None, str]:
    if asked is not None:
        return kind.find(place.chosen(asked, "text_encoder_dir")), ""
    present = [path for root in place.roots for path in kind.folders(root)]
    if (folder / "text_encoder").is_dir():
        present.insert(0 if layout == "diffusers" else len(present), folder / "text_encoder")
    if not present:
        return None, f"there is no text encoder: no folder {kind.released} in {place.searched}"
    reasons = []
    for path in present:
        try:
            return kind.find(path), ""
        except CheckpointError as error:
            reasons.append(f"the text encoder is not whole: {error}")
    return None, reasons[0]


def read_part(
    kind: Any,
    config: Any,
    source: Checkpoint,
    keys: KeyMap,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool,
) -> Part[Any]:
    """Build a network of a configuration, fill it, and give it its home.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    with torch.device("meta"):
        module = kind(config)
    home = torch.device("cpu") if offload else device
    load_into(module, source, keys, device=home, dtype=dtype)
    return Part(module.requires_grad_(False).eval(), device, offload=offload)


def text_part(
    files: FilesType | None,
    load: Callable[[FilesType, torch.device, torch.dtype], nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    *,
    offload: bool,
    cache: EmbeddingCache,
) -> TextPart[FilesType] | None:
    """Return the text encoder of a world; None where there is none."""
    if files is None:
        return None
    return TextPart(files, load, device, dtype, offload=offload, cache=cache)


def text_bytes(files: Measured | None, dtype: torch.dtype) -> int:
    """Return the bytes of the text encoder's weights."""
    return 0 if files is None else files.num_parameters * dtype.itemsize


def text_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the text encoder in a world of this one; they overflow in float16."""
    return dtype if dtype == torch.float32 else torch.bfloat16
