"""The encoder of T5: prompts to context.

Source: arXiv 1910.10683; the network is transformers' `T5EncoderModel`, filled by our own reader
so that of a released file, 45 GB with its decoder, only the encoder's 19 GB are read, straight to
their place. Axes: B batch, S tokens, D width.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.files import released_folders
from worldline.text.encoder_files import (
    EncoderFamily,
    EncoderFiles,
    check_dtype,
    fill,
    without_transformers,
)
from worldline.text.prompt_tokens import (
    BYTES,
    END,
    PAD,
    ByteTokenizer,
    PromptTokenizer,
    load_tokenizer,
    tokenizer_files,
)
from worldline.weights.keymap import KeyMap
from worldline.weights.write import save

if TYPE_CHECKING:
    from transformers import T5EncoderModel

logger = logging.getLogger(__name__)

RELEASED = "google-t5/t5-11b"

_ATTENTION = "encoder.block.{i}.layer.0.SelfAttention"
_FEED_FORWARD = "encoder.block.{i}.layer.1.DenseReluDense"
_SHARED = ("shared.weight", "encoder.embed_tokens.weight")  # the same matrix
_NAMES = (
    *_SHARED,
    "encoder.final_layer_norm.weight",
    "encoder.block.{i}.layer.{j}.layer_norm.weight",
    *(f"{_ATTENTION}.{leaf}.weight" for leaf in ("q", "k", "v", "o", "relative_attention_bias")),
    *(f"{_FEED_FORWARD}.{leaf}.weight" for leaf in ("wi", "wi_0", "wi_1", "wo")),
)
KEYS = KeyMap(
    rename={name: name for name in _NAMES},
    drop={"decoder.*": "the other half of T5", "lm_head.*": "the other half of T5"},
)

# What fixes a shape or a value; the rest of a config.json is about the decoder and training.
_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
_DEFAULTS: dict[str, Any] = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
PRESETS: dict[str, dict[str, int]] = {
    "11B": {
        "vocab_size": 32128,
        "d_model": 1024,
        "d_kv": 128,
        "d_ff": 65536,
        "num_layers": 24,
        "num_heads": 128,
    },
}
TINY: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
}


@dataclass(frozen=True)
class T5Files(EncoderFiles):
    """A T5 encoder on disk, checked by its headers; its weights may hold the decoder's too."""

    @property
    def width(self) -> int:
        """Numbers in a row of an embedding."""
        return int(self.config["d_model"])

    @property
    def num_parameters(self) -> int:
        """Numbers that `load_t5` reads."""
        return FAMILY.count_parameters(self.config)

    @cached_property
    def prompt_tokenizer(self) -> PromptTokenizer:
        """Words to ids; read once."""
        return load_tokenizer(self.tokenizer[0])

    @staticmethod
    def tell_cut(prompt: str, tokens: int, length: int) -> None:
        logger.warning(
            "a prompt has %d tokens and is cut after %d: %r ...",
            tokens - 1,
            length - 1,
            prompt[:40],
        )

    def most_tokens(self, prompt: str) -> int:
        # a token is a byte or more; `</s>` and a leading space come on top
        return len(prompt.encode()) + 2

    def count_tokens(self, prompt: str) -> int:
        return len(self.prompt_tokenizer.encode(prompt))


class T5Encoder(nn.Module):
    """Prompts to rows of numbers, one row a token.

    Attributes:
        network: transformers' encoder.
        tokenizer: words to ids.
        max_length: rows of an embedding unless asked for another number.
    """

    def __init__(
        self, config: Mapping[str, Any], tokenizer: PromptTokenizer, max_length: int
    ) -> None:
        super().__init__()
        self.config = settings_of(config)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.network = _network(self.config)

    @property
    def width(self) -> int:
        """Numbers in a row of an embedding."""
        return int(self.config["d_model"])

    def count_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has, `</s>` among them."""
        return len(self.tokenizer.encode(prompt))

    def tokenize(
        self, prompts: Sequence[str], max_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ids and mask of prompts, cut and padded to one length.

        Args:
            prompts: any number.
            max_length: absent, the encoder's own.

        Returns:
            Ids and mask, each (B, max_length), int64, on the CPU. The mask is 1 at tokens; a
            prompt that was cut still ends with `</s>`.

        Raises:
            ValueError: one string in place of several, or a length below 1.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one string; give a list of prompts")
        length = self.max_length if max_length is None else max_length
        if length < 1:
            raise ValueError(f"max_length is {length}; it must be 1 or more")
        ids = torch.full((len(prompts), length), PAD, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = self.tokenizer.encode(prompt)
            if len(tokens) > length:
                T5Files.tell_cut(prompt, len(tokens), length)
                tokens = [*tokens[: length - 1], END]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the last hidden state of every position, padding too.

        Args:
            ids: (B, S) int64, on the weights' device.
            mask: (B, S), 1 at tokens, 0 at padding, which is not attended to.

        Returns:
            (B, S, D), in the weights' dtype; differentiable.
        """
        return self.network(input_ids=ids, attention_mask=mask).last_hidden_state

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the embedding: the last hidden state with rows of padding exactly 0.

        Columns that are padding in every prompt are not computed.

        Args:
            ids: (B, S) int64, on any device.
            mask: (B, S), as `tokenize` gives it: a run of ones, then zeros.

        Returns:
            (B, S, D) on the weights' device, in their dtype; differentiable.
        """
        device = self.network.shared.weight.device
        longest = int(mask.sum(1).max()) if mask.numel() else 0
        if not longest:
            return self.network.shared.weight.new_zeros(*ids.shape, self.width)
        ids, short = ids[:, :longest].to(device), mask[:, :longest].to(device)
        hidden = self.hidden(ids, short)
        # Chosen, not multiplied: 0 x inf would be NaN.
        hidden = torch.where(short[..., None] != 0, hidden, hidden.new_zeros(()))
        return F.pad(hidden, (0, 0, 0, mask.shape[1] - longest))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_length: int | None = None) -> Tensor:
        """Return the embeddings of prompts, each encoded alone.

        A prompt's embedding then does not depend on what it is asked for together with, and none
        is computed at the length of the longest. A prompt that is cut is a warning in the log.

        Args:
            prompts: any number; an empty one has the one token `</s>`.
            max_length: rows of an embedding; absent, the encoder's own.

        Returns:
            (B, max_length, D) on the weights' device, in their dtype; rows past a prompt's length
            are exactly 0.

        Raises:
            ValueError: one string in place of several, or a length below 1.
        """
        ids, mask = self.tokenize(prompts, max_length)
        if not len(ids):
            return self.embed(ids, mask)
        return torch.cat([self.embed(ids[row, None], mask[row, None]) for row in range(len(ids))])


def _network(settings: Mapping[str, Any]) -> T5EncoderModel:
    try:
        from transformers import T5Config, T5EncoderModel
    except ImportError as error:
        raise without_transformers(error) from error
    # No dropout: the released weights are only read, and a tiny encoder trains without it.
    network = T5EncoderModel(T5Config(**settings, dropout_rate=0.0, use_cache=False))
    network.set_input_embeddings(network.shared)  # one matrix under its two names
    return network


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a config.json fixes the encoder.

    Raises:
        ValueError: a size is absent or no number above 0.
    """
    found: dict[str, Any] = {}
    for name in (*_SIZES, *_DEFAULTS):
        value = config.get(name, _DEFAULTS.get(name))
        if name == "feed_forward_proj":
            good = isinstance(value, str)
        else:
            whole = isinstance(value, int) and not isinstance(value, bool)
            good = (whole or name == "layer_norm_epsilon") and isinstance(value, int | float)
            good = good and value > 0
        if not good:
            raise ValueError(f"{name} is {value!r}")
        found[name] = value
    return found


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of an encoder; the shared matrix under both names.

    Raises:
        ValueError: a size is absent or no number above 0.
    """
    settings = settings_of(config)
    width, hidden = settings["d_model"], settings["d_ff"]
    inner = settings["num_heads"] * settings["d_kv"]
    gated = settings["feed_forward_proj"].startswith("gated-")
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(_SHARED, (settings["vocab_size"], width)),
        "encoder.final_layer_norm.weight": (width,),
    }
    for i in range(settings["num_layers"]):
        attention, feed_forward = _ATTENTION.format(i=i), _FEED_FORWARD.format(i=i)
        for leaf in ("q", "k", "v"):
            shapes[f"{attention}.{leaf}.weight"] = (inner, width)
        shapes[f"{attention}.o.weight"] = (width, inner)
        for leaf in ("wi_0", "wi_1") if gated else ("wi",):
            shapes[f"{feed_forward}.{leaf}.weight"] = (hidden, width)
        shapes[f"{feed_forward}.wo.weight"] = (width, hidden)
        for j in (0, 1):
            shapes[f"encoder.block.{i}.layer.{j}.layer_norm.weight"] = (width,)
    # The first block's biases by distance serve all of them.
    buckets = settings["relative_attention_num_buckets"]
    bias = f"{_ATTENTION.format(i=0)}.relative_attention_bias.weight"
    shapes[bias] = (buckets, settings["num_heads"])
    return shapes


FAMILY = EncoderFamily(
    name="T5 encoder",
    kinds={"t5": "a T5 encoder"},
    mark=re.compile(r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.q\.weight"),
    keys=KEYS,
    settings_of=settings_of,
    tensor_shapes=tensor_shapes,
    tokenizer_files=tokenizer_files,
    tokenizer_names="tokenizer.json or spiece.model",
    presets=PRESETS,
    twins=_SHARED,
)


def t5_folders(checkpoint_dir: Path) -> list[Path]:
    """List the folders below `checkpoint_dir` where the released worlds keep T5-11B.

    Cosmos-Predict1 has `google-t5/t5-11b`, Cosmos 1.0 a hub cache of the same name.
    """
    return released_folders(checkpoint_dir, RELEASED)


def find_t5(folder: Path) -> T5Files:
    """Check the files of a text encoder; see `EncoderFamily.open`.

    Its tokenizer is tokenizer.json, spiece.model, or a tokenizer_config.json of class
    ByT5Tokenizer; its weights may hold the decoder's too.

    Raises:
        CheckpointError: something is missing, damaged, half downloaded, or of another model.
    """
    return T5Files(*FAMILY.open(folder))


def load_t5(files: T5Files, device: torch.device | str, dtype: torch.dtype) -> T5Encoder:
    """Return the encoder of `files`, for inference.

    All weights take `dtype`. (transformers keeps `wo` in float32, but only for float16.)

    Args:
        files: of `find_t5`.
        device: where it goes.
        dtype: float32, the reference's, or bfloat16.

    Raises:
        InputError: another dtype; float16 overflows in T5-11B.
        CheckpointError: the weights or the tokenizer do not fit, or cannot be read.
        Error: a package is not installed.
    """
    check_dtype(dtype)
    tokenizer = files.prompt_tokenizer
    with torch.device("meta"):
        encoder = T5Encoder(files.config, tokenizer, files.max_length)
    rows = encoder.config["vocab_size"]
    fill(
        encoder.network,
        files,
        KEYS,
        tokens=tokenizer.size,
        vocabulary=rows,
        device=device,
        dtype=dtype,
    )
    return encoder.requires_grad_(False).eval()


def new_t5(config: Mapping[str, Any] | None = None, *, max_length: int = 128) -> T5Encoder:
    """Return an encoder of bytes with fresh float32 weights, to be trained.

    Weights are drawn from torch's global generator, as T5's authors do.

    Args:
        config: what differs from `TINY`, by the names of a T5's config.json.
        max_length: rows of an embedding.

    Raises:
        ValueError: a size is no number above 0, or the vocabulary is too small for bytes.
    """
    given = {**TINY, **(config or {})}
    if given["vocab_size"] < ByteTokenizer.size:
        raise ValueError(f"vocab_size is {given['vocab_size']}; bytes need {ByteTokenizer.size}")
    return T5Encoder(given, ByteTokenizer(), max_length)


def export_t5(
    encoder: T5Encoder, folder: Path, *, dtype: torch.dtype | None = torch.bfloat16
) -> None:
    """Write an encoder of bytes so that `find_t5`, and transformers, read it back.

    Args:
        encoder: of `new_t5`.
        folder: made if absent; gets config.json, model.safetensors, tokenizer_config.json.
        dtype: of the weights; None keeps theirs.

    Raises:
        ValueError: its tokenizer has a vocabulary of its own.
        OSError: the folder cannot be written.
    """
    if not isinstance(encoder.tokenizer, ByteTokenizer):
        raise ValueError("only an encoder of bytes is exported; this one has a vocabulary file")
    config = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **encoder.config,
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "pad_token_id": PAD,
        "eos_token_id": END,
    }
    tokens = {
        "tokenizer_class": BYTES,
        "model_max_length": encoder.max_length,
        "extra_ids": encoder.config["vocab_size"] - ByteTokenizer.size,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, settings in (("config", config), ("tokenizer_config", tokens)):
        (folder / f"{name}.json").write_text(json.dumps(settings, indent=1) + "\n")
    tensors = {
        name: tensor.to(dtype or tensor.dtype)
        for name, tensor in encoder.network.named_parameters()  # each shared tensor once
    }
    save(tensors, folder / "model.safetensors", {"format": "pt"})
