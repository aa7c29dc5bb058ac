"""What the files of all text encoders have in common: a folder as Hugging Face lays it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldline.errors import CheckpointError, Error
from worldline.files import read_json, stamp, unfinished
from worldline.text.prompt_tokens import read_tokenizer_settings
from worldline.weights.read import Checkpoint, open_checkpoint

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


def tokenizer_holders(folder: Path) -> tuple[Path, Path]:
    """Return where a tokenizer may lie: with the encoder, or beside it as diffusers saves it."""
    return folder, folder.parent / "tokenizer"


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
