"""Prompts to token ids, by the vocabulary that lies beside a text encoder.

Read with the package `tokenizers` rather than by `AutoTokenizer`: transformers rebuilds a fast T5
tokenizer from its vocabulary, while this applies `tokenizer.json` as it stands, and starts in
milliseconds. Token 0 pads and token 1, `</s>`, ends a prompt.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from worldline.errors import CheckpointError, Error
from worldline.files import read_json

PAD, END = 0, 1
FILES = ("tokenizer.json", "spiece.model")
BYTES = "ByT5Tokenizer"  # a tokenizer_config.json of this class needs no vocabulary file
_FIRST_BYTE = 3  # after <pad>, </s>, <unk>


class PromptTokenizer(ABC):
    """Words to ids.

    Attributes:
        size: one more than the largest id that it gives.
    """

    size: int

    @abstractmethod
    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, whole, ended by END."""


class ByteTokenizer(PromptTokenizer):
    """UTF-8 bytes as tokens (ByT5, arXiv 2105.13626)."""

    size = _FIRST_BYTE + 256

    def encode(self, prompt: str) -> list[int]:
        # A lone surrogate, as from a broken command line, has no UTF-8: it becomes "?".
        return [byte + _FIRST_BYTE for byte in prompt.encode("utf-8", "replace")] + [END]


class FastTokenizer(PromptTokenizer):
    """What `tokenizer.json` says."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise Error(
                f"{path} needs the package tokenizers, which transformers brings; "
                "pip install 'transformers>=5'"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception for a damaged file
            raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=0) + 1
        if self._tokenizer.encode("").ids != [END]:
            raise CheckpointError(
                f"{path} is not of a T5: it does not end a prompt with token {END}, </s>"
            )

    def encode(self, prompt: str) -> list[int]:
        # A lone surrogate cannot cross into the package.
        text = prompt.encode("utf-8", "replace").decode("utf-8")
        return list(self._tokenizer.encode(text).ids)


class PieceTokenizer(PromptTokenizer):
    """`spiece.model`, for a folder without `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("sentencepiece") is None:
            raise Error(
                f"{path} needs the package sentencepiece, which is not installed; "
                "pip install sentencepiece, or download tokenizer.json to the same folder"
            )
        sentencepiece: Any = importlib.import_module("sentencepiece")  # it has no types
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
        self.size = int(self._pieces.get_piece_size())
        if self._pieces.eos_id() != END:
            raise CheckpointError(f"{path} is not of a T5: its </s> is {self._pieces.eos_id()}")

    def encode(self, prompt: str) -> list[int]:
        text = prompt.encode("utf-8", "replace").decode("utf-8")
        return [*self._pieces.encode(text), END]


def read_tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return what tokenizer_config.json says; nothing where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of the tokenizer in `folder`, the deciding one first; none if it has none.

    Raises:
        CheckpointError: tokenizer_config.json is damaged.
    """
    settings = folder / "tokenizer_config.json"
    beside = [settings] if settings.is_file() else []
    if read_tokenizer_settings(folder).get("tokenizer_class") == BYTES:
        return beside
    for name in FILES:
        if (folder / name).is_file():
            return [folder / name, *beside]
    return []


def load_tokenizer(path: Path) -> PromptTokenizer:
    """Return the tokenizer that a file decides; see `tokenizer_files`.

    Raises:
        CheckpointError: the file is damaged, or of another model.
        Error: a package that it needs is not installed.
    """
    if path.name == "tokenizer_config.json":
        return ByteTokenizer()
    return FastTokenizer(path) if path.suffix == ".json" else PieceTokenizer(path)
