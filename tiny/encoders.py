"""Small text encoders that read bytes: made anew, and written by the released names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.text.encoder import BYTES, PromptEncoder
from worldline.text.reason1 import END, PAD, START, SYSTEM, ChatTokenizer, Reason1Encoder
from worldline.text.t5 import ByteTokenizer, T5Encoder
from worldline.weights.checkpoint import save

_EMBEDDED_TOGETHER = 1024  # captions
T5: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
}
REASON1: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def new_t5(config: Mapping[str, Any] | None = None, *, max_length: int = 128) -> T5Encoder:
    """A T5 with float32 weights drawn as its authors do; `config` differs from `T5`."""
    return T5Encoder({**T5, **(config or {})}, ByteTokenizer(), max_length)


def new_reason1(
    config: Mapping[str, Any] | None = None, *, max_length: int = 128
) -> Reason1Encoder:
    """A Reason1 with float32 weights; `config` differs from `REASON1`."""
    return Reason1Encoder({**REASON1, **(config or {})}, byte_chat_tokenizer(), max_length)


def byte_chat_tokenizer() -> ChatTokenizer:
    """A chat tokenizer of bytes; the beginning of every chat is two tokens, not eighty bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: number for number, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([PAD, START, END])
    tokenizer.add_tokens([f"system\n{SYSTEM}", "user\n"])
    return ChatTokenizer(tokenizer, "a tokenizer of bytes")


@torch.no_grad()
def embed_captions(text: T5Encoder, captions: Sequence[str]) -> Tensor:
    """Context of captions (N, S, E), many at a time."""
    ids, mask = text.tokenize(captions)
    parts = zip(ids.split(_EMBEDDED_TOGETHER), mask.split(_EMBEDDED_TOGETHER), strict=True)
    return torch.cat([text.embed(*part) for part in parts])


def export_t5(
    encoder: T5Encoder, folder: Path, *, dtype: torch.dtype | None = torch.bfloat16
) -> None:
    """Write config.json, tokenizer_config.json and model.safetensors; None keeps the dtype."""
    config = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **encoder.config,
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
    }
    words = {
        "tokenizer_class": BYTES,
        "extra_ids": encoder.config["vocab_size"] - ByteTokenizer.size,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    _export(encoder, folder, config, words, "", dtype)


def export_reason1(
    encoder: Reason1Encoder, folder: Path, *, dtype: torch.dtype | None = torch.bfloat16
) -> None:
    """The same for a Reason1, with its tokenizer.json."""
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rms_norm_eps": 1e-6,
        **encoder.config,
    }
    _export(encoder, folder, config, {"tokenizer_class": "Qwen2Tokenizer"}, "model.", dtype)
    encoder.tokenizer.backend.save(str(folder / "tokenizer.json"))


def _export(
    encoder: PromptEncoder,
    folder: Path,
    config: Mapping[str, Any],
    words: Mapping[str, Any],
    prefix: str,
    dtype: torch.dtype | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    words = {**words, "model_max_length": encoder.max_length}
    for name, settings in (("config", config), ("tokenizer_config", words)):
        (folder / f"{name}.json").write_text(json.dumps(settings, indent=1) + "\n")
    tensors = {
        prefix + name: tensor.to(dtype or tensor.dtype)
        for name, tensor in encoder.network.named_parameters()  # each shared tensor once
    }
    save(tensors, folder / "model.safetensors", {"format": "pt"})
