"""A diffusion world small enough to run in a second, in the official layout, with random weights.

17 frames of 32 x 48 pixels are 3 x 4 x 6 latent cells, 18 tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tiny.encoders import export_t5, new_t5
from tiny.export import cosmos_tensors, dit_settings, dit_tensors
from worldline.families.diffusion.model import DiT, DiTConfig
from worldline.shapes import LatentShape
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.weights.checkpoint import save

TEXT2WORLD = "Cosmos-Predict1-7B-Text2World"
VIDEO2WORLD = "Cosmos-Predict1-7B-Video2World"
CONTINUOUS = "Cosmos-Tokenize1-CV8x8x8-720p"
TEXT_ENCODER = "google-t5/t5-11b"

CONTEXT_WIDTH, CONTEXT_LENGTH = 24, 40
# defaults of requests, in config.json
DEFAULTS: dict[str, Any] = {
    "num_video_frames": 17,
    "height": 32,
    "width": 48,
    "fps": 24,
    "guidance": 2.0,
    "num_steps": 3,
}
TOKENIZER = CosmosTokenizerConfig(channels=4, level_channels=(8, 8, 8), num_blocks=1)
_TEXT = {"d_model": CONTEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def config(*, condition_mask: bool) -> DiTConfig:
    """Sizes of the transformer; up to 48 frames of 96 x 128."""
    return DiTConfig(
        depth=2,
        width=48,
        num_heads=2,
        head_size=24,
        hidden=96,
        context_width=CONTEXT_WIDTH,
        lora_rank=8,
        condition_mask=condition_mask,
        max_grid=LatentShape(6, 6, 8),
        rope_ratio=(2.0, 1.0, 1.0),
    )


def fill(module: torch.nn.Module, deviation: float, seed: int = 0) -> None:
    """Draw weights, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, deviation, generator=generator)


def write_transformer(folder: Path, *, condition_mask: bool, **settings: Any) -> None:
    """Write a transformer in NVIDIA's layout; `settings` go into its config.json."""
    model = DiT(config(condition_mask=condition_mask))
    fill(model, 0.15)
    folder.mkdir(parents=True)
    tensors = {name: tensor.bfloat16() for name, tensor in dit_tensors(model).items()}
    save(tensors, folder / "model.pt")
    stated = {**dit_settings(model.config), **DEFAULTS, **settings}
    (folder / "config.json").write_text(json.dumps(stated))


def write_tokenizer(folder: Path, **changes: Any) -> None:
    """Write a continuous tokenizer with the statistics of its latents."""
    tokenizer = CosmosTokenizer(CosmosTokenizerConfig(**{**TOKENIZER.__dict__, **changes}))
    fill(tokenizer, 0.15)
    with torch.no_grad():  # else most pixels would be black or white
        for parameter in tokenizer.decoder.conv_out.parameters():
            parameter *= 0.1
    folder.mkdir(parents=True)
    for half, tensors in cosmos_tensors(tokenizer).items():
        save(tensors, folder / f"{half}.safetensors")
    channels, frames = tokenizer.config.latent_channels, 16
    spread = torch.linspace(-0.3, 0.3, channels * frames)
    torch.save((spread, 0.5 + spread.abs()), folder / "mean_std.pt")


def make_tiny_diffusion(folder: Path) -> Path:
    """Write a Text2World and a Video2World model, a tokenizer and a text encoder below `folder`."""
    write_transformer(folder / TEXT2WORLD, condition_mask=False)
    write_transformer(folder / VIDEO2WORLD, condition_mask=True)
    write_tokenizer(folder / CONTINUOUS)
    torch.manual_seed(0)
    export_t5(new_t5(_TEXT, max_length=CONTEXT_LENGTH), folder / TEXT_ENCODER)
    return folder
