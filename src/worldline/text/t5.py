"""The encoder of T5, text encoder of Cosmos 1.0 and Predict1.

Source: arXiv 1910.10683; the network is transformers' `T5EncoderModel`. The released file, 45 GB
with its decoder, is a pickle, of which our own reader takes the encoder's 19 GB straight to their
device. Axes: B batch, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.text.encoder import (
    EncoderFiles,
    FastTokenizer,
    PromptEncoder,
    PromptTokenizer,
    read_tokenizer,
)

RELEASED = "google-t5/t5-11b"
NUM_PARAMETERS = 4_864_791_552  # of its encoder
PAD, END = 0, 1  # <pad>, </s>
BYTES = "ByT5Tokenizer"  # a tokenizer_config.json of this class needs no vocabulary
_FIRST_BYTE = 3  # behind <pad>, </s>, <unk>

TINY: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
}


@dataclass(frozen=True)
class T5Files(EncoderFiles["T5Encoder"]):
    """A T5 encoder on disk; its weights may hold the decoder's too.

    Its tokenizer is tokenizer.json, or a tokenizer_config.json of ByT5.
    """

    name = "T5 encoder"
    released = RELEASED
    model_types = ("t5",)
    sizes = tuple(TINY)
    unread: ClassVar = {"decoder.*": "decoder", "lm_head.*": "decoder's head"}
    most_added = 2  # </s>, and a space in front
    tied = ("shared.weight", "encoder.embed_tokens.weight")

    @property
    def width(self) -> int:
        return int(self.config["d_model"])

    @property
    def num_parameters(self) -> int:
        words, width, inner, hidden, depth, heads = (self.config[name] for name in self.sizes)
        gated = str(self.config.get("feed_forward_proj", "relu")).startswith("gated-")
        block = 4 * width * inner * heads + (3 if gated else 2) * width * hidden + 2 * width
        buckets = self.config.get("relative_attention_num_buckets", 32)
        return int((words + 1) * width + depth * block + buckets * heads)

    @classmethod
    def find_tokenizer(cls, folder: Path, settings: Mapping[str, Any]) -> list[Path] | None:
        if settings.get("tokenizer_class") == BYTES:
            return []
        path = folder / "tokenizer.json"
        return [path] if path.is_file() else None

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        path = self.tokenizer_files[0]
        if path.name == "tokenizer_config.json":
            return ByteTokenizer()
        tokenizer = FastTokenizer(read_tokenizer(path))
        if tokenizer.encode("") != [END]:
            raise CheckpointError(f"{path} is not of a T5: no token {END}, </s>, ends a prompt")
        return tokenizer

    def build(self) -> T5Encoder:
        return T5Encoder(self.config, self.tokenizer, self.max_length)


class T5Encoder(PromptEncoder):
    """Prompts to context, one row a token."""

    def __init__(
        self, config: Mapping[str, Any], tokenizer: PromptTokenizer, max_length: int
    ) -> None:
        from transformers import T5Config, T5EncoderModel

        # No dropout: released weights are only read, and a tiny encoder trains without it.
        settings = T5Config.from_dict({**config, "dropout_rate": 0.0, "use_cache": False})
        network = T5EncoderModel(settings)
        network.set_input_embeddings(network.shared)  # one matrix under its two names
        super().__init__(network, config, tokenizer, max_length)

    def tokenize(
        self, prompts: Sequence[str], max_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask of prompts, cut and padded to one length.

        Args:
            prompts: B of them.
            max_length: S; by default the encoder's own.

        Returns:
            Two (B, S) int64 on the CPU; the mask is 1 at tokens. A prompt that was cut still ends
            with `</s>`.
        """
        length = self.max_length if max_length is None else max_length
        rows = [self.tokenizer.encode(prompt) for prompt in prompts]
        rows = [row if len(row) <= length else [*row[: length - 1], END] for row in rows]
        ids = [row + [PAD] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden state of every position, padding too.

        Args:
            ids: (B, S) int64, on the weights' device.
            mask: (B, S), 1 at tokens, 0 at padding, which is not attended to.

        Returns:
            (B, S, D), in the weights' dtype; differentiable.
        """
        hidden: Tensor = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The last hidden state with rows of padding exactly 0.

        Columns that are padding in every prompt are not computed.

        Args:
            ids: (B, S) int64, on any device.
            mask: (B, S), as `tokenize` makes it: a run of ones, then zeros.

        Returns:
            (B, S, D) on the weights' device, in their dtype; differentiable.
        """
        device = self.network.shared.weight.device
        longest = int(mask.sum(1).max())
        ids, short = ids[:, :longest].to(device), mask[:, :longest].to(device)
        hidden = self.hidden(ids, short)
        # Chosen, not multiplied: 0 x inf would be NaN.
        hidden = torch.where(short[..., None] != 0, hidden, hidden.new_zeros(()))
        return F.pad(hidden, (0, 0, 0, mask.shape[1] - longest))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, max_length, D), each encoded alone; rows past a prompt's end are 0."""
        # alone, so that an embedding does not depend on which others are asked for
        return torch.cat([self.embed(*self.tokenize([prompt])) for prompt in prompts])


class ByteTokenizer:
    """UTF-8 bytes as tokens (ByT5, arXiv 2105.13626)."""

    size = _FIRST_BYTE + 256

    def encode(self, prompt: str) -> list[int]:
        return [byte + _FIRST_BYTE for byte in prompt.encode("utf-8", "replace")] + [END]


def new_t5(config: Mapping[str, Any] | None = None, *, max_length: int = 128) -> T5Encoder:
    """A small encoder of bytes with float32 weights drawn as T5's authors do, to be trained.

    Args:
        config: settings of a T5's config.json that differ from `TINY`.
        max_length: rows of an embedding.

    Raises:
        ValueError: the vocabulary is too small for bytes.
    """
    settings = {**TINY, **(config or {})}
    if settings["vocab_size"] < ByteTokenizer.size:
        raise ValueError(f"vocab_size is {settings['vocab_size']}; bytes need {ByteTokenizer.size}")
    return T5Encoder(settings, ByteTokenizer(), max_length)


def export_t5(
    encoder: T5Encoder, folder: Path, *, dtype: torch.dtype | None = torch.bfloat16
) -> None:
    """Write an encoder of `new_t5`, as `PromptEncoder.export` does."""
    config = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **encoder.config,
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "pad_token_id": PAD,
        "eos_token_id": END,
    }
    words = {
        "tokenizer_class": BYTES,
        "extra_ids": encoder.config["vocab_size"] - ByteTokenizer.size,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    encoder.export(folder, config, words, dtype=dtype)
