"""The encoder of T5, text encoder of Cosmos 1.0 and Predict1.

Source: arXiv 1910.10683; the network is transformers' `T5EncoderModel`. The released file, 45 GB
with its decoder, is a pickle, of which our own reader takes the encoder's 19 GB straight to their
device. Axes: B batch, S tokens, D width.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.parallel.offload import BlockPlan
from worldline.text.encoder import EncoderFiles, FastTokenizer, PromptEncoder, read_tokenizer
from worldline.weights.keymap import KeyMap

NUM_PARAMETERS = 4_864_791_552  # of the released encoder
NUM_STREAMED = 435_561_472  # of those, beside all blocks but two
PAD, END = 0, 1  # <pad>, </s>
_FIRST_BYTE = 3  # behind <pad>, </s>, <unk>


class ByteTokenizer:
    """UTF-8 bytes as tokens (ByT5, arXiv 2105.13626)."""

    size = _FIRST_BYTE + 256

    def encode(self, prompt: str) -> list[int]:
        return [byte + _FIRST_BYTE for byte in prompt.encode("utf-8", "replace")] + [END]


class T5Encoder(PromptEncoder):
    """Prompts to context, one row a token."""

    def make_network(self, config: Mapping[str, Any]) -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        # No dropout: released weights are only read, and a tiny encoder trains without it.
        settings = T5Config.from_dict({**config, "dropout_rate": 0.0, "use_cache": False})
        network = T5EncoderModel(settings)
        network.set_input_embeddings(network.shared)  # one matrix under its two names
        return network

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, both (B, max_length) int64 on the CPU; a cut prompt keeps its `</s>`."""
        length = self.max_length
        rows = [[*self.tokenizer.encode(each)[:-1][: length - 1], END] for each in prompts]
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
        ends = torch.tensor([[len(row)] for row in rows])
        return ids, (torch.arange(length) < ends).long()

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden state (B, S, D) of every position, padding too, which is not attended to."""
        return self.network(input_ids=ids, attention_mask=mask).last_hidden_state

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (B, S, D) with rows of padding exactly 0.

        Columns that are padding in every prompt are not computed.
        """
        device = self.network.shared.weight.device
        longest = int(mask.sum(1).max())
        ids, short = ids[:, :longest].to(device), mask[:, :longest].to(device)
        # filled, not multiplied: 0 x inf would be NaN
        hidden = self.hidden(ids, short).masked_fill(short[..., None] == 0, 0)
        return F.pad(hidden, (0, 0, 0, mask.shape[1] - longest))


class T5Files(EncoderFiles):
    """A T5 encoder on disk; its weights may hold the decoder's too.

    Its tokenizer is tokenizer.json, or a tokenizer_config.json of ByT5.
    """

    name = "T5 encoder"
    released = "google-t5/t5-11b"
    model_types = ("t5",)
    encoder = T5Encoder
    sizes = ("d_model",)
    keys = KeyMap({}, {"decoder.*": "decoder", "lm_head.*": "decoder's head"})
    # the first block has a table that the others lack
    blocks = BlockPlan("encoder.block", kept=("relative_attention_bias.weight",))
    anchor = "encoder.final_layer_norm.weight"
    tied = ("shared.weight", "encoder.embed_tokens.weight")

    @cached_property
    def tokenizer(self) -> ByteTokenizer | FastTokenizer:
        path = self.vocabulary
        if path.name == "tokenizer_config.json":
            return ByteTokenizer()
        tokenizer = FastTokenizer(read_tokenizer(path))
        if tokenizer.encode("") != [END]:
            raise CheckpointError(f"{path} is not of a T5: no token {END}, </s>, ends a prompt")
        return tokenizer
