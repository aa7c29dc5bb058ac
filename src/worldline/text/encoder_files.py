"""What the files of all text encoders have in common: a folder as Hugging Face lays it out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from re import Pattern
from typing import Any, NamedTuple

import torch
from torch import nn

from worldline.errors import CheckpointError, Error, InputError
from worldline.files import read_json, stamp, unfinished
from worldline.text.prompt_tokens import read_tokenizer_settings
from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import Checkpoint, open_checkpoint
from worldline.weights.source import TensorInfo
from worldline.weights.stream import load_into

MAX_LENGTH = 512  # rows that the released worlds were trained on

# in order of preference: what a folder may hold
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Truncation:
    """How a prompt is cut that is longer than what its encoder reads.

    Attributes:
        max_length: tokens that are read, those that the encoder adds among them.
        num_truncated_tokens: that are not read.
    """

    max_length: int
    num_truncated_tokens: int


@dataclass(frozen=True)
class EncoderFiles(ABC):
    """A text encoder on disk, checked by its headers.

    Attributes:
        folder: that holds it.
        checkpoint: its weights, not read yet, perhaps with more than is needed.
        config: its config.json.
        max_length: rows of an embedding; longer prompts are cut.
        tokenizer: files of its tokenizer, the deciding one first.
    """

    folder: Path
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    max_length: int
    tokenizer: tuple[Path, ...]

    def identity(self) -> list[dict[str, Any]]:
        """Return name, size and time of every file that decides an embedding.

        Raises:
            CheckpointError: a file has vanished.
        """
        paths = [*self.checkpoint.files, self.folder / "config.json", *self.tokenizer]
        try:
            return [stamp(path) for path in paths]
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read any more: {error}") from error

    def truncation_of(self, prompt: str) -> Truncation | None:
        """Return how encoding cuts a prompt; None for one that is read whole. Reads no weights.

        Raises:
            CheckpointError: the tokenizer cannot be read.
            Error: a package is not installed.
        """
        if self.most_tokens(prompt) <= self.max_length:
            return None
        left_out = self.count_tokens(prompt) - self.max_length
        return Truncation(self.max_length, left_out) if left_out > 0 else None

    def tell_if_cut(self, prompt: str) -> None:
        """Warn that a prompt is too long, as encoding it would.

        Raises:
            CheckpointError: the tokenizer cannot be read.
            Error: a package is not installed.
        """
        if self.truncation_of(prompt) is not None:
            self.tell_cut(prompt, self.count_tokens(prompt), self.max_length)

    @staticmethod
    @abstractmethod
    def tell_cut(prompt: str, tokens: int, length: int) -> None:
        """Warn that of a prompt's tokens, those that the encoder adds among them, some are cut."""

    @abstractmethod
    def most_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has at most, without reading the tokenizer."""

    @abstractmethod
    def count_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has, those that the encoder adds among them."""


class Opened(NamedTuple):
    """The files of an encoder, as `EncoderFiles` has them."""

    folder: Path
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    max_length: int
    tokenizer: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """A kind of encoder: how its files are known, and what must be in them.

    Attributes:
        name: in words.
        kinds: model types of config.json -> what such a model is, in words.
        mark: matches the name of a tensor that other families lack.
        keys: of its tensors.
        settings_of: config.json -> what of it fixes the encoder; ValueError where it makes none.
        tensor_shapes: config.json -> name and shape of every tensor; ValueError likewise.
        tokenizer_files: folder -> files of a tokenizer, the deciding one first.
        tokenizer_names: of such files, in words.
        presets: the released sizes, by the settings that tell them.
        twins: names of one tensor, of which a file may hold either, or both.
    """

    name: str
    kinds: Mapping[str, str]
    mark: Pattern[str]
    keys: KeyMap
    settings_of: Callable[[Mapping[str, Any]], dict[str, Any]]
    tensor_shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]
    tokenizer_files: Callable[[Path], Sequence[Path]]
    tokenizer_names: str
    presets: Mapping[str, Mapping[str, int]]
    twins: tuple[str, ...] = ()

    def marks(self, names: Iterable[str]) -> bool:
        """Tell by the names of tensors whether some are of such an encoder."""
        return any(self.mark.fullmatch(name) for name in names)

    def count_parameters(self, config: Mapping[str, Any]) -> int:
        """Return how many numbers are read.

        Raises:
            ValueError: of `tensor_shapes`.
        """
        shapes = self.tensor_shapes(config)
        again = self.twins[1:]
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in again)

    def fit(
        self,
        tensors: Mapping[str, TensorInfo],
        config: Mapping[str, Any],
        called: str,
        *,
        part: bool = False,
    ) -> None:
        """Check that tensors are those of an encoder.

        Args:
            tensors: of a file.
            config: of the encoder.
            called: name of the file, for the message.
            part: some may be absent, as they are from one file of several.

        Raises:
            CheckpointError: some are missing, unknown or of another shape.
            ValueError: of `tensor_shapes`.
        """
        absent = ("*",) if part else self.twins
        pairs = match(tensors, self.tensor_shapes(config), self.keys, called, absent)
        if self.twins and not part and not any(name in pairs for name in self.twins):
            raise CheckpointError(f"{called} does not fit the model: 1 missing: {self.twins[0]}")

    def open(self, folder: str | Path) -> Opened:
        """Check the files of an encoder; headers only, and without transformers.

        Args:
            folder: with config.json, the weights (safetensors or `pytorch_model.bin`, whole or in
                shards, perhaps with more than the encoder's) and the tokenizer, which may also lie
                in the folder `tokenizer` beside, as diffusers saves it.

        Raises:
            CheckpointError: something is missing, damaged, half downloaded, or of another model.
        """
        folder = Path(folder)
        config = read_config(folder, self.kinds)
        try:
            self.settings_of(config)
        except ValueError as error:
            path = folder / "config.json"
            raise CheckpointError(f"{path}: {error}, so no {self.name} can be built") from error
        checkpoint = open_weights(folder)
        self.fit(checkpoint.tensors, config, str(checkpoint.path))
        for holder in (folder, folder.parent / "tokenizer"):
            if tokenizer := self.tokenizer_files(holder):
                length = read_max_length(holder)
                return Opened(folder, checkpoint, config, length, tuple(tokenizer))
        raise CheckpointError(
            f"{folder} holds no tokenizer ({self.tokenizer_names}){unfinished(folder)}"
        )


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that text encoders do not run in.

    Raises:
        InputError: it is neither bfloat16 nor float32; float16 overflows in the released ones.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"the text encoder runs in bfloat16 or float32, not in {name}")


def fill(
    network: nn.Module,
    files: EncoderFiles,
    keys: KeyMap,
    *,
    tokens: int,
    vocabulary: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Read the weights of an encoder.

    Args:
        network: gets them.
        files: of the encoder.
        keys: of its tensors.
        tokens: that its tokenizer knows.
        vocabulary: rows of its table.
        device: where the weights go.
        dtype: that they take.

    Raises:
        CheckpointError: they do not fit, or cannot be read; or the tokenizer is another's.
    """
    if tokens > vocabulary:
        raise CheckpointError(
            f"{files.tokenizer[0]} has {tokens:,} tokens and the encoder of "
            f"{files.folder} only {vocabulary:,}: they do not belong together"
        )
    load_into(network, files.checkpoint, keys, device=device, dtype=dtype)


def read_config(folder: Path, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Return the config.json of an encoder.

    Args:
        folder: that holds it.
        kinds: the model types that will do -> what such a model is.

    Raises:
        CheckpointError: there is none, it is damaged, or of another model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no text encoder folder {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json{unfinished(folder)}")
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in kinds:
        wanted = next(iter(kinds.values()))
        raise CheckpointError(f"{path} is of a model of type {kind!r}, not of {wanted}")
    return config


def open_weights(folder: Path) -> Checkpoint:
    """Open the weights of an encoder, whole or in shards.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return open_checkpoint(folder / name)
    left = unfinished(folder)
    others = sorted(path.name for path in folder.glob("*_model.*"))
    only = f"; {', '.join(others)} cannot be read" if others and not left else ""
    raise CheckpointError(f"{folder} holds no weights ({' or '.join(WEIGHTS[::2])}){left or only}")


def files_together(path: Path) -> set[str]:
    """Return the names of the files that hold an encoder together with this one.

    That is its own name alone, unless an index beside it lists others.

    Raises:
        CheckpointError: the index is damaged.
    """
    for name in WEIGHTS[1::2]:
        if (path.parent / name).is_file():
            listed = read_json(path.parent / name).get("weight_map")
            if isinstance(listed, Mapping) and path.name in listed.values():
                return {str(file) for file in listed.values()}
    return {path.name}


def read_max_length(holder: Path) -> int:
    """Return how many rows an embedding has, by the tokenizer in `holder`; 512 at most.

    Raises:
        CheckpointError: its tokenizer_config.json is damaged.
    """
    given = read_tokenizer_settings(holder).get("model_max_length")
    # A tokenizer without a limit of its own says 1e30, or the model's context.
    if isinstance(given, int) and 0 < given <= MAX_LENGTH:
        return int(given)
    return MAX_LENGTH


def without_transformers(error: ImportError) -> Error:
    """Return what to raise when transformers, or a part of it, cannot be imported."""
    reason = str(error).partition("\n")[0]  # it may advise at length
    return Error(
        f"the text encoder needs the package transformers ({reason}); pip install 'transformers>=5'"
    )
