"""The text encoder of Cosmos-Predict2.5, Cosmos-Reason1-7B: prompts to context.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/text_encoders/{text_encoder,reason1}.py`; the
network is the language model of transformers' `Qwen2_5_VLForConditionalGeneration`, filled by our
own reader so that of a released folder the eyes and the head, 2.4 GB, are not read.
Axes: B batch, S tokens, D width.

An embedding is what every layer says of every token, normalised: of the released encoder 28 x 3584
numbers a row. Padding is read like any other token, so that all rows count.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from worldline.files import released_folders
from worldline.text.cache import EmbeddingCache, cache_folder
from worldline.text.chat_tokens import (
    FILE,
    PIECES,
    ChatTokenizer,
    byte_chat_tokenizer,
    chat_files,
    chat_text,
    load_chat_tokenizer,
)
from worldline.text.encoder_files import (
    MAX_LENGTH,
    EncoderFamily,
    EncoderFiles,
    check_dtype,
    fill,
    without_transformers,
)
from worldline.weights.keymap import KeyMap
from worldline.weights.write import save

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLTextModel

logger = logging.getLogger(__name__)

RELEASED = "nvidia/Cosmos-Reason1-7B"
# The released worlds were trained with these weights; another revision is another encoder.
REVISION = "3210bec0495fdc7a8d3dbb8d58da5711eab4b423"
CACHED = 40  # embeddings that are kept, 103 MB each of the released encoder in bfloat16

_EPS = 1e-8  # beside the deviation
# of a rotation: the released name, and the one that transformers writes in its place
_ROTATIONS = ("mrope", "default")
_LAYER = "layers.{i}"
_NAMES = (
    "embed_tokens.weight",
    "norm.weight",
    *(f"{_LAYER}.{leaf}_layernorm.weight" for leaf in ("input", "post_attention")),
    *(f"{_LAYER}.self_attn.{leaf}_proj.weight" for leaf in ("q", "k", "v", "o")),
    *(f"{_LAYER}.self_attn.{leaf}_proj.bias" for leaf in ("q", "k", "v")),
    *(f"{_LAYER}.mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")),
)
KEYS = KeyMap(
    rename={name: name for name in _NAMES},
    drop={
        "visual.*": "the eyes, which see no prompt",
        "lm_head.*": "the next word, which is not asked for",
    },
    # the released folder's; that of a folder which transformers has saved since
    prefixes=("model.", "model.language_model."),
)

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_DEFAULTS: dict[str, float] = {"rms_norm_eps": 1e-6, "rope_theta": 1e6}
PRESETS: dict[str, dict[str, int]] = {
    "7B": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
TINY: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Reason1Files(EncoderFiles):
    """A Reason1 encoder on disk, checked by its headers; its weights may hold eyes and head too."""

    @property
    def width(self) -> int:
        """Numbers in a row of an embedding."""
        return _width(settings_of(self.config))

    @property
    def num_parameters(self) -> int:
        """Numbers that `load_reason1` reads."""
        return FAMILY.count_parameters(self.config)

    @cached_property
    def chat_tokenizer(self) -> ChatTokenizer:
        """Words to ids of a chat; read once."""
        return load_chat_tokenizer(self.tokenizer[0])

    @staticmethod
    def tell_cut(prompt: str, tokens: int, length: int) -> None:
        logger.warning(
            "a prompt has %d tokens with the chat around it and is cut after %d: %r ...",
            tokens,
            length,
            prompt[:40],
        )

    def most_tokens(self, prompt: str) -> int:
        # a token is a byte or more
        return len(chat_text(prompt).encode("utf-8", "replace"))

    def count_tokens(self, prompt: str) -> int:
        return len(self.chat_tokenizer.encode(prompt))


class Reason1Encoder(nn.Module):
    """Prompts to rows of numbers, one row a token and as many for padding.

    Attributes:
        network: transformers' language model.
        tokenizer: words to ids of a chat.
        max_length: rows of an embedding unless asked for another number.
    """

    def __init__(
        self, config: Mapping[str, Any], tokenizer: ChatTokenizer, max_length: int = MAX_LENGTH
    ) -> None:
        super().__init__()
        self.config = settings_of(config)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.network = _network(self.config)

    @property
    def width(self) -> int:
        """Numbers in a row of an embedding."""
        return _width(self.config)

    def count_tokens(self, prompt: str) -> int:
        """Return how many tokens the chat of a prompt has, those around the prompt among them."""
        return len(self.tokenizer.encode(prompt))

    def tokenize(self, prompts: Sequence[str], max_length: int | None = None) -> Tensor:
        """Return ids (B, max_length) of prompts, int64, on the CPU, cut or padded to one length.

        Args:
            prompts: any number.
            max_length: absent, the encoder's own.

        Raises:
            ValueError: one string in place of several, or a length below 1.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one string; give a list of prompts")
        length = self.max_length if max_length is None else max_length
        if length < 1:
            raise ValueError(f"max_length is {length}; it must be 1 or more")
        rows = [self.tokenizer.encode(prompt) for prompt in prompts]
        for prompt, tokens in zip(prompts, rows, strict=True):
            if len(tokens) > length:
                Reason1Files.tell_cut(prompt, len(tokens), length)
        return self.fitted(rows, length)

    def fitted(self, rows: Sequence[Sequence[int]], length: int) -> Tensor:
        """Return ids (B, length), int64, of chats: cut, or filled with padding on the right."""
        ids = torch.full((len(rows), length), self.tokenizer.pad, dtype=torch.int64)
        for row, tokens in enumerate(rows):
            kept = torch.tensor(tokens[:length], dtype=torch.int64)
            ids[row, : len(kept)] = kept
        return ids

    def hidden(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the embedded tokens and what each layer makes of them, the last one normed.

        Every token sees all before it, padding too; none is masked.

        Args:
            ids: (B, S) int64, on the weights' device.

        Returns:
            One more than there are layers, each (B, S, D) in the weights' dtype; differentiable.
        """
        found = self.network(input_ids=ids, use_cache=False, output_hidden_states=True)
        return tuple(found.hidden_states)

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings: the layers' outputs side by side, each row of each normalised.

        Args:
            ids: (B, S) int64, on any device, as `tokenize` gives them.

        Returns:
            (B, S, layers x D) on the weights' device, in their dtype; differentiable.
        """
        states = self.hidden(ids.to(self.network.embed_tokens.weight.device))
        # the embedded tokens themselves are left out
        return torch.cat([_standardised(state) for state in states[1:]], dim=-1)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_length: int | None = None) -> Tensor:
        """Return the embeddings of prompts, each encoded alone.

        A prompt that is cut is a warning in the log.

        Args:
            prompts: any number.
            max_length: rows of an embedding; absent, the encoder's own.

        Returns:
            (B, max_length, layers x D) on the weights' device, in their dtype.

        Raises:
            ValueError: one string in place of several, or a length below 1.
        """
        ids = self.tokenize(prompts, max_length)
        if not len(ids):
            return self.network.embed_tokens.weight.new_zeros(*ids.shape, self.width)
        return torch.cat([self.embed(row[None]) for row in ids])


def _standardised(states: Tensor) -> Tensor:
    """Return each row less its mean, over its deviation (of n - 1), in the dtype of `states`."""
    mean, std = states.mean(-1, keepdim=True), states.std(-1, keepdim=True)
    return (states - mean) / (std + _EPS)


def _network(settings: Mapping[str, Any]) -> Qwen2_5_VLTextModel:
    try:
        from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel
    except ImportError as error:
        raise without_transformers(error) from error
    half = settings["hidden_size"] // settings["num_attention_heads"] // 2
    rotary = {
        "rope_type": "default",
        "rope_theta": settings["rope_theta"],
        # A word has the same position on all three axes, so that they may be taken as one.
        "mrope_section": [half, 0, 0],
    }
    sizes = {name: settings[name] for name in (*_SIZES, "rms_norm_eps")}
    # nothing is generated, and a tiny vocabulary lacks the words that begin and end it
    config = Qwen2_5_VLTextConfig(
        **sizes, rope_parameters=rotary, use_cache=False, bos_token_id=None, eos_token_id=None
    )
    network = Qwen2_5_VLTextModel(config)
    with torch.device("cpu"):  # no file holds its frequencies, so they must have values
        network.rotary_emb = type(network.rotary_emb)(config)  # type: ignore[arg-type]
    return network


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a config.json fixes the language model.

    transformers has kept it in three places in turn: among the rest, and in `text_config`; the
    rotation by itself, and in `rope_parameters`.

    Raises:
        ValueError: a size is absent or no number above 0, or the activation or the kind of rotation
            is another.
    """
    nested = config.get("text_config")
    own = {**config, **nested} if isinstance(nested, Mapping) else config
    for entry in ("rope_scaling", "rope_parameters"):
        rotary = own.get(entry)
        if rotary is None:
            continue
        if not isinstance(rotary, Mapping):
            raise ValueError(f"{entry} is {rotary!r}")
        for key in ("rope_type", "type"):
            if rotary.get(key, _ROTATIONS[0]) not in _ROTATIONS:
                raise ValueError(f"{key} of {entry} is {rotary[key]!r}")
    own = {**(own.get("rope_parameters") or {}), **own}
    found: dict[str, Any] = {}
    for name in (*_SIZES, *_DEFAULTS):
        value = own.get(name, _DEFAULTS.get(name))
        whole = isinstance(value, int) and not isinstance(value, bool)
        good = whole or (name in _DEFAULTS and isinstance(value, float))
        if not good or not 0 < value < math.inf:  # type: ignore[operator]
            raise ValueError(f"{name} is {value!r}")
        found[name] = value
    if own.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {own['hidden_act']!r}")
    heads, groups = found["num_attention_heads"], found["num_key_value_heads"]
    if found["hidden_size"] % (2 * heads) or heads % groups:
        raise ValueError(f"num_attention_heads is {heads}")
    return found


def _width(settings: Mapping[str, Any]) -> int:
    return int(settings["num_hidden_layers"] * settings["hidden_size"])


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a language model, by our names.

    Raises:
        ValueError: a size is absent or no number above 0.
    """
    settings = settings_of(config)
    width, inner = settings["hidden_size"], settings["intermediate_size"]
    narrow = width // settings["num_attention_heads"] * settings["num_key_value_heads"]
    rows = {"q": width, "k": narrow, "v": narrow, "o": width}
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (settings["vocab_size"], width),
        "norm.weight": (width,),
    }
    for i in range(settings["num_hidden_layers"]):
        layer = _LAYER.format(i=i)
        for leaf in ("input", "post_attention"):
            shapes[f"{layer}.{leaf}_layernorm.weight"] = (width,)
        for leaf, count in rows.items():
            shapes[f"{layer}.self_attn.{leaf}_proj.weight"] = (count, width)
            if leaf != "o":
                shapes[f"{layer}.self_attn.{leaf}_proj.bias"] = (count,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, width)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
    return shapes


FAMILY = EncoderFamily(
    name="text encoder",
    kinds={"qwen2_5_vl": "a Qwen2.5-VL", "qwen2_5_vl_text": "a Qwen2.5-VL"},
    # Qwen2's own models have the same names: config.json tells which it is
    mark=re.compile(r"model\.(language_model\.)?layers\.\d+\.self_attn\.q_proj\.bias"),
    keys=KEYS,
    settings_of=settings_of,
    tensor_shapes=tensor_shapes,
    tokenizer_files=chat_files,
    tokenizer_names=f"{FILE}, or {' and '.join(PIECES)}",
    presets=PRESETS,
)


def reason1_folders(checkpoint_dir: Path) -> list[Path]:
    """List the folders below `checkpoint_dir` that may hold the encoder; the right revision first.

    They are `nvidia/Cosmos-Reason1-7B`, the snapshots of a hub cache, and `Cosmos-Reason1-7B`.
    """
    return released_folders(checkpoint_dir, RELEASED, REVISION)


def find_reason1(folder: Path) -> Reason1Files:
    """Check the files of a text encoder; see `EncoderFamily.open`.

    Its tokenizer is tokenizer.json, or vocab.json and merges.txt; its weights may hold those of
    eyes and head too.

    Raises:
        CheckpointError: something is missing, damaged, half downloaded, or of another model.
    """
    return Reason1Files(*FAMILY.open(folder))


def load_reason1(
    files: Reason1Files, device: torch.device | str, dtype: torch.dtype
) -> Reason1Encoder:
    """Return the encoder of `files`, for inference.

    Args:
        files: of `find_reason1`.
        device: where it goes.
        dtype: bfloat16, the reference's, or float32.

    Raises:
        InputError: another dtype; float16 overflows in Qwen2.5.
        CheckpointError: the weights or the tokenizer do not fit, or cannot be read.
        Error: a package is not installed.
    """
    check_dtype(dtype)
    tokenizer = files.chat_tokenizer
    with torch.device("meta"):
        encoder = Reason1Encoder(files.config, tokenizer, files.max_length)
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


def embedding_cache() -> EmbeddingCache:
    """Return the cache of this encoder's embeddings: a folder of its own, since they are large."""
    return EmbeddingCache(cache_folder() / "reason1", largest=CACHED)


def new_reason1(
    config: Mapping[str, Any] | None = None, *, max_length: int = 128
) -> Reason1Encoder:
    """Return an encoder of bytes with fresh float32 weights, to be trained.

    Weights are drawn from torch's global generator, as transformers does.

    Args:
        config: what differs from `TINY`, by the names of a config.json.
        max_length: rows of an embedding.

    Raises:
        ValueError: a size is no number above 0, or the vocabulary is too small for bytes.
    """
    given, tokenizer = {**TINY, **(config or {})}, byte_chat_tokenizer()
    if given["vocab_size"] < tokenizer.size:
        raise ValueError(f"vocab_size is {given['vocab_size']}; bytes need {tokenizer.size}")
    return Reason1Encoder(given, tokenizer, max_length)


def export_reason1(
    encoder: Reason1Encoder, folder: Path, *, dtype: torch.dtype | None = torch.bfloat16
) -> None:
    """Write an encoder so that `find_reason1` reads it back, its tensors by the released names.

    Args:
        encoder: any.
        folder: made if absent; gets config.json, model.safetensors and the tokenizer.
        dtype: of the weights; None keeps theirs.

    Raises:
        OSError: the folder cannot be written.
    """
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **encoder.config,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": encoder.max_length}
    for name, settings in (("config", config), ("tokenizer_config", tokens)):
        (folder / f"{name}.json").write_text(json.dumps(settings, indent=1) + "\n")
    encoder.tokenizer.save(folder)
    tensors = {
        KEYS.released(name): tensor.to(dtype or tensor.dtype)
        for name, tensor in encoder.network.named_parameters()
    }
    save(tensors, folder / "model.safetensors", {"format": "pt"})
