"""Cosmos-Reason1-7B, the text encoder of Cosmos-Predict2.5.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/text_encoders/{text_encoder,reason1}.py`; the
network is the language model of transformers' `Qwen2_5_VLForConditionalGeneration`. Vision tower
and head, 2.4 GB, are not read. Axes: B batch, S tokens, D width.

An embedding is the normalised output of every layer side by side: 28 x 3584 numbers a row.
Padding is read like any other token, so that all rows count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.text.encoder import (
    MAX_LENGTH,
    EmbeddingCache,
    EncoderFiles,
    FastTokenizer,
    PromptEncoder,
    cache_folder,
    read_tokenizer,
)

if TYPE_CHECKING:
    import tokenizers

RELEASED = "nvidia/Cosmos-Reason1-7B"
# The released worlds were trained with these weights; another revision is another encoder.
REVISION = "3210bec0495fdc7a8d3dbb8d58da5711eab4b423"
NUM_PARAMETERS = 7_070_619_136  # without vision tower and head
CACHED = 40  # embeddings that are kept, 103 MB each of the released encoder in bfloat16

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SYSTEM = "You are a helpful assistant who will provide prompts to an image generator."
_EPS = 1e-8  # beside the deviation

TINY: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def chat_text(prompt: str) -> str:
    """The chat that is encoded: a system line, and the prompt as the user's.

    The prompt goes in as it is: what looks like a special token in it becomes one.
    """
    return f"{START}system\n{SYSTEM}{END}\n{START}user\n{prompt}{END}\n"


@dataclass(frozen=True)
class Reason1Files(EncoderFiles["Reason1Encoder"]):
    """A Reason1 encoder on disk; its weights may hold vision tower and head too.

    Its tokenizer is tokenizer.json, or vocab.json and merges.txt.
    """

    name = "Reason1 encoder (Qwen2.5-VL)"
    released = RELEASED
    revision = REVISION
    model_types = ("qwen2_5_vl", "qwen2_5_vl_text")
    sizes = tuple(TINY)
    prefixes = ("model.", "model.language_model.")  # as released; as transformers saves it since
    unread: ClassVar = {"visual.*": "vision tower", "lm_head.*": "head"}
    most_added = len(chat_text(""))

    @property
    def width(self) -> int:
        return int(self.config["num_hidden_layers"] * self.config["hidden_size"])

    @property
    def num_parameters(self) -> int:
        words, width, inner, depth, heads, groups = (self.config[name] for name in self.sizes)
        narrow = width // heads * groups
        attention = 2 * width * (width + narrow) + width + 2 * narrow  # with biases of q, k, v
        return int((words + 1) * width + depth * (attention + 3 * width * inner + 2 * width))

    @classmethod
    def find_tokenizer(cls, folder: Path, settings: Mapping[str, Any]) -> list[Path] | None:
        for names in (("tokenizer.json",), ("vocab.json", "merges.txt")):
            if all((folder / name).is_file() for name in names):
                return [folder / name for name in names]
        return None

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        path = self.tokenizer_files[0]
        if path.name == "tokenizer.json":
            return ChatTokenizer(read_tokenizer(path), str(path))
        from transformers import Qwen2Tokenizer

        try:
            tokenizer = Qwen2Tokenizer.from_pretrained(path.parent, local_files_only=True)
        except Exception as error:  # the package raises plain Exception for a damaged file
            raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
        return ChatTokenizer(tokenizer.backend_tokenizer, str(path))

    def build(self) -> Reason1Encoder:
        return Reason1Encoder(self.config, self.tokenizer, self.max_length)

    @property
    def cache(self) -> EmbeddingCache:
        """Kept embeddings; in a folder of their own, since they are large."""
        return EmbeddingCache(cache_folder() / "reason1", largest=CACHED)


class Reason1Encoder(PromptEncoder):
    """Prompts to context, one row a token and as many for padding."""

    def __init__(
        self, config: Mapping[str, Any], tokenizer: ChatTokenizer, max_length: int = MAX_LENGTH
    ) -> None:
        from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

        half = config["hidden_size"] // config["num_attention_heads"] // 2
        rotary = {
            **(config.get("rope_scaling") or {}),  # its older name
            **(config.get("rope_parameters") or {}),
            # A word has the same position on all three axes, so that they may be taken as one.
            "mrope_section": [half, 0, 0],
        }
        stated = {name: value for name, value in config.items() if name != "rope_scaling"}
        settings = Qwen2_5_VLTextConfig.from_dict(
            {
                "rms_norm_eps": 1e-6,
                **stated,
                "rope_parameters": rotary,
                "use_cache": False,
                # nothing is generated, and a tiny vocabulary lacks these words
                "bos_token_id": None,
                "eos_token_id": None,
            }
        )
        network = Qwen2_5_VLTextModel(settings)
        with torch.device("cpu"):  # no file holds its frequencies, so they must have values
            network.rotary_emb = type(network.rotary_emb)(settings)  # type: ignore[arg-type]
        super().__init__(network, config, tokenizer, max_length)

    def tokenize(self, prompts: Sequence[str], max_length: int | None = None) -> Tensor:
        """Ids (B, S) int64 of prompts, on the CPU; S is `max_length`, or the encoder's own."""
        rows = [self.tokenizer.encode(prompt) for prompt in prompts]
        return self.fitted(rows, self.max_length if max_length is None else max_length)

    def fitted(self, rows: Sequence[Sequence[int]], length: int) -> Tensor:
        """Ids (B, length) int64 of chats: cut, or filled with padding on the right."""
        pad = self.tokenizer.pad
        return torch.tensor([[*row[:length], *[pad] * (length - len(row))] for row in rows])

    def hidden(self, ids: Tensor) -> tuple[Tensor, ...]:
        """The embedded tokens and the output of each layer, the last one normed.

        Every token sees all before it, padding too; none is masked.

        Args:
            ids: (B, S) int64, on the weights' device.

        Returns:
            One more than there are layers, each (B, S, D) in the weights' dtype; differentiable.
        """
        output = self.network(input_ids=ids, use_cache=False, output_hidden_states=True)
        return tuple(output.hidden_states)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings: the layers' outputs side by side, each row of each standardised.

        Args:
            ids: (B, S) int64, on any device, as `tokenize` makes them.

        Returns:
            (B, S, layers x D) on the weights' device, in their dtype; differentiable.
        """
        states = self.hidden(ids.to(self.network.embed_tokens.weight.device))
        # the embedded tokens themselves are not part of it
        return torch.cat([_standardised(state) for state in states[1:]], dim=-1)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, max_length, layers x D), each encoded alone."""
        return torch.cat([self.embed(self.tokenize([prompt])) for prompt in prompts])


def _standardised(states: Tensor) -> Tensor:
    """Each row less its mean, over its deviation (of n - 1), in the dtype of `states`."""
    mean, std = states.mean(-1, keepdim=True), states.std(-1, keepdim=True)
    return (states - mean) / (std + _EPS)


class ChatTokenizer(FastTokenizer):
    """Prompts to ids of the chat that the released worlds were trained with.

    Attributes:
        pad: id that fills what a chat leaves free.
    """

    add_special_tokens = False  # the chat has them

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: str) -> None:
        super().__init__(tokenizer)
        absent = [token for token in (START, END, PAD) if token not in self.vocabulary]
        if absent:
            raise CheckpointError(f"{source} is not of a Qwen2.5 chat: it has no {absent[0]}")
        self.pad = self.vocabulary[PAD]

    def encode(self, prompt: str) -> list[int]:
        """Ids of the whole chat of a prompt."""
        return super().encode(chat_text(prompt))


def byte_chat_tokenizer() -> ChatTokenizer:
    """A tokenizer of bytes, for encoders that are trained anew.

    The beginning of every chat is two tokens rather than some eighty bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: number for number, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([PAD, START, END])
    tokenizer.add_tokens([f"system\n{SYSTEM}", "user\n"])
    return ChatTokenizer(tokenizer, "a tokenizer of bytes")


def new_reason1(
    config: Mapping[str, Any] | None = None, *, max_length: int = 128
) -> Reason1Encoder:
    """A small encoder of bytes with float32 weights drawn as transformers does, to be trained.

    Args:
        config: settings of a config.json that differ from `TINY`.
        max_length: rows of an embedding.

    Raises:
        ValueError: the vocabulary is too small for bytes.
    """
    settings, tokenizer = {**TINY, **(config or {})}, byte_chat_tokenizer()
    if settings["vocab_size"] < tokenizer.size:
        raise ValueError(f"vocab_size is {settings['vocab_size']}; bytes need {tokenizer.size}")
    return Reason1Encoder(settings, tokenizer, max_length)


def export_reason1(
    encoder: Reason1Encoder, folder: Path, *, dtype: torch.dtype | None = torch.bfloat16
) -> None:
    """Write an encoder by the released names, as `PromptEncoder.export` does, and its tokenizer."""
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rms_norm_eps": 1e-6,
        **encoder.config,
        "tie_word_embeddings": False,
    }
    words = {"tokenizer_class": "Qwen2Tokenizer"}
    encoder.export(folder, config, words, prefix="model.", dtype=dtype)
    encoder.tokenizer.save(folder)
