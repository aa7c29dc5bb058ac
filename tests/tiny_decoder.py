"""A diffusion decoder and a Video2World model for the small autoregressive world, random weights.

Tokens are 2 x 3 a latent frame, and 4 x 6 latent cells: a window of 8 frames has 48 tokens.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tiny.encoders import export_t5, new_t5
from tiny.export import dit_tensors
from worldline.families.autoregressive.model import ARTransformer, ARTransformerConfig
from worldline.families.autoregressive.weights import KEYS, settings_of
from worldline.families.diffusion.model import DiT
from worldline.weights.checkpoint import save

from .tiny_diffusion import (
    CONTEXT_LENGTH,
    CONTEXT_WIDTH,
    CONTINUOUS,
    TEXT_ENCODER,
    config,
    fill,
    write_tokenizer,
)

DECODER = "Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p"
OLD_DECODER = "Cosmos-1.0-Diffusion-7B-Decoder-DV8x16x16ToCV8x8x8"
VIDEO2WORLD = "Cosmos-Predict1-5B-Video2World"


def write_decoder(folder: Path, vocabulary: int) -> None:
    """Write a decoder of so many ids, and the embedding of its general prompt."""
    sizes = config(condition_mask=False)
    model = DiT(replace(sizes, learned_positions=False, vocabulary=vocabulary, id_width=4))
    fill(model, 0.15)
    folder.mkdir(parents=True)
    tensors = {name: tensor.bfloat16() for name, tensor in dit_tensors(model).items()}
    save(tensors, folder / "model.pt")
    write_aux(folder)


def write_aux(folder: Path, mask: torch.Tensor | None = None) -> None:
    """Write the general prompt's embedding, with a mask of any kind or none."""
    context = torch.randn(1, 12, CONTEXT_WIDTH, generator=torch.Generator().manual_seed(3))
    aux = {"context": context.bfloat16()}
    if mask is not None:
        aux["context_mask"] = mask
    torch.save(aux, folder / "aux_vars.pt")


def video2world(base: ARTransformerConfig, **sizes: Any) -> ARTransformerConfig:
    """The Video2World relative of a base model; its table has more rows than there are tokens."""
    rows = -(-(base.vocabulary + 1) // 64) * 64
    return replace(base, embedding_rows=rows, absolute_positions=True, **sizes)


def write_video2world(folder: Path, base: ARTransformerConfig) -> None:
    """Write the Video2World relative of a base model."""
    sizes = video2world(base, context_width=CONTEXT_WIDTH)
    model = ARTransformer(sizes)
    fill(model, 0.1)
    folder.mkdir(parents=True)
    tensors = {KEYS.released(n): p.detach().bfloat16() for n, p in model.named_parameters()}
    save(tensors, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(settings_of(sizes)))


def add_parts(root: Path, base: ARTransformerConfig) -> None:
    """Add to a checkpoint folder all that a base model needs and a Video2World model is."""
    write_decoder(root / DECODER, base.vocabulary)
    write_tokenizer(root / CONTINUOUS)
    write_video2world(root / VIDEO2WORLD, base)
    torch.manual_seed(0)
    text = {"d_model": CONTEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    export_t5(new_t5(text, max_length=CONTEXT_LENGTH), root / TEXT_ENCODER)
