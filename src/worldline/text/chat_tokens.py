"""Prompts to the token ids of a Qwen2.5 chat, by the vocabulary that lies beside the encoder.

Read with the package `tokenizers`, which applies `tokenizer.json` as it stands; a folder with
`vocab.json` and `merges.txt` alone goes through transformers, which knows what belongs to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from worldline.errors import CheckpointError, Error
from worldline.text.encoder_files import without_transformers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SYSTEM = "You are a helpful assistant who will provide prompts to an image generator."
FILE, PIECES = "tokenizer.json", ("vocab.json", "merges.txt")


def chat_text(prompt: str) -> str:
    """Return the chat that is encoded: a system line, and the prompt as the user's.

    The prompt goes in as it is: what looks like a special token in it becomes one.
    """
    return f"{START}system\n{SYSTEM}{END}\n{START}user\n{prompt}{END}\n"


class ChatTokenizer:
    """Words to ids, in the chat that the released worlds were trained with.

    Attributes:
        pad: id that fills what a chat leaves free.
        size: one more than the largest id that it gives.
    """

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        absent = [token for token in (START, END, PAD) if token not in vocabulary]
        if absent:
            raise CheckpointError(f"{source} is not of a Qwen2.5 chat: it has no {absent[0]}")
        self.pad: int = vocabulary[PAD]
        self.size: int = max(vocabulary.values()) + 1

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of the whole chat of a prompt."""
        # A lone surrogate cannot cross into the package.
        text = chat_text(prompt).encode("utf-8", "replace").decode("utf-8")
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        self._tokenizer.save(str(folder / FILE))


def chat_files(folder: Path) -> list[Path]:
    """Return the files of the tokenizer in `folder`, the deciding one first; none if it has none.

    Where there is no `tokenizer.json`, `vocab.json` and `merges.txt` must both be there.
    """
    settings = [path for path in [folder / "tokenizer_config.json"] if path.is_file()]
    if (folder / FILE).is_file():
        return [folder / FILE, *settings]
    pieces = [folder / name for name in PIECES]
    return [*pieces, *settings] if all(path.is_file() for path in pieces) else []


def load_chat_tokenizer(path: Path) -> ChatTokenizer:
    """Return the tokenizer that a file decides; see `chat_files`.

    Raises:
        CheckpointError: the file is damaged, or of another model.
        Error: a package that it needs is not installed.
    """
    try:
        from transformers import Qwen2Tokenizer

        from tokenizers import Tokenizer
    except ImportError as error:
        raise without_transformers(error) from error
    try:
        if path.name == FILE:
            tokenizer = Tokenizer.from_file(str(path))
        else:
            tokenizer = Qwen2Tokenizer.from_pretrained(path.parent).backend_tokenizer
    except Exception as error:  # the packages raise plain Exception for a damaged file
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
    return ChatTokenizer(tokenizer, str(path))


def byte_chat_tokenizer() -> ChatTokenizer:
    """Return a tokenizer of bytes, for encoders that are trained anew.

    What every chat begins with is two tokens rather than some eighty bytes.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ImportError as error:
        raise Error(f"a tokenizer needs the package tokenizers ({error})") from error
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: number for number, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([PAD, START, END])
    tokenizer.add_tokens([f"system\n{SYSTEM}", "user\n"])
    return ChatTokenizer(tokenizer, "a tokenizer of bytes")
