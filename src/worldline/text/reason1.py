"""Cosmos-Reason1-7B, the text encoder of Cosmos-Predict2.5.

Source: nvidia-cosmos/cosmos-predict2.5 `_src/predict2/text_encoders/{text_encoder,reason1}.py`; the
network is the language model of transformers' `Qwen2_5_VLForConditionalGeneration`. Vision tower
and head, 2.4 GB, are not read. Axes: B batch, S tokens, D width.

An embedding is the normalised output of every layer side by side: 28 x 3584 numbers a row.
Padding is read like any other token, so that all rows count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.parallel.offload import BlockPlan
from worldline.text.encoder import EncoderFiles, FastTokenizer, PromptEncoder, read_tokenizer
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import pretrained_tokenizer

RELEASED = "nvidia/Cosmos-Reason1-7B"
NUM_PARAMETERS = 7_070_619_136  # without vision tower and head
NUM_STREAMED = 1_011_116_544  # of those, beside all blocks but two
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SYSTEM = "You are a helpful assistant who will provide prompts to an image generator."
_EPS = 1e-8  # beside the deviation


def chat_text(prompt: str) -> str:
    """The chat that is encoded; what looks like a special token in the prompt becomes one."""
    return f"{START}system\n{SYSTEM}{END}\n{START}user\n{prompt}{END}\n"


class ChatTokenizer(FastTokenizer):
    """Prompts to ids of the chat that the released worlds were trained with."""

    special_tokens = False  # the chat has them

    def __init__(self, backend: Any, source: object) -> None:
        super().__init__(backend)
        for token in (START, END, PAD):
            if token not in self.vocabulary:
                raise CheckpointError(f"{source} is not of a Qwen2.5 chat: it has no {token}")
        self.pad = self.vocabulary[PAD]

    def encode(self, prompt: str) -> list[int]:
        return super().encode(chat_text(prompt))


class Reason1Encoder(PromptEncoder):
    """Prompts to context, one row a token and as many for padding."""

    def make_network(self, config: Mapping[str, Any]) -> nn.Module:
        from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

        half = config["hidden_size"] // config["num_attention_heads"] // 2
        rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}  # its older name
        settings = Qwen2_5_VLTextConfig.from_dict(
            {
                "rms_norm_eps": 1e-6,
                **config,
                "rope_scaling": None,
                # A word has the same position on all three axes, so that they may be taken as one.
                "rope_parameters": {**rotary, "mrope_section": [half, 0, 0]},
                "use_cache": False,
                # nothing is generated, and a tiny vocabulary lacks these words
                "bos_token_id": None,
                "eos_token_id": None,
            }
        )
        network = Qwen2_5_VLTextModel(settings)
        with torch.device("cpu"):  # no file holds its frequencies, so they must have values
            network.rotary_emb = type(network.rotary_emb)(settings)  # type: ignore[arg-type]
        return network

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return (self.fit([self.tokenizer.encode(prompt) for prompt in prompts]),)

    def fit(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Ids (B, max_length) int64 of chats: cut, or filled with padding on the right."""
        length, pad = self.max_length, self.tokenizer.pad
        return torch.tensor([[*row[:length], *[pad] * (length - len(row))] for row in rows])

    def hidden(self, ids: Tensor) -> tuple[Tensor, ...]:
        """The embedded tokens and the output of each layer, each (B, S, D), the last one normed.

        Every token sees all before it, padding too.
        """
        return self.network(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (B, S, layers x D): the rows of each layer, standardised one by one."""
        states = self.hidden(ids.to(self.network.embed_tokens.weight.device))[1:]  # no embedded ids
        rows = [(x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + _EPS) for x in states]
        return torch.cat(rows, dim=-1)


class Reason1Files(EncoderFiles):
    """A Reason1 encoder on disk; its weights may hold vision tower and head too."""

    name = "Reason1 encoder (Qwen2.5-VL)"
    released = RELEASED
    # the released worlds were trained with these weights; another revision is another encoder
    revision = "3210bec0495fdc7a8d3dbb8d58da5711eab4b423"
    model_types = ("qwen2_5_vl", "qwen2_5_vl_text")
    encoder = Reason1Encoder
    sizes = ("num_hidden_layers", "hidden_size")
    keys = KeyMap(
        {},
        {"visual.*": "vision tower", "lm_head.*": "head"},
        ("model.", "model.language_model."),  # as released; as transformers saves it since
    )
    blocks = BlockPlan("layers")
    anchor = "embed_tokens.weight"
    cached = ("reason1", 40)  # apart from T5's: 103 MB each of the released encoder in bfloat16

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        path = self.vocabulary
        if path.name == "vocab.json":
            backend = pretrained_tokenizer(path.parent, chat=False).backend_tokenizer
            return ChatTokenizer(backend, path)
        return ChatTokenizer(read_tokenizer(path), path)
