"""A world of Predict2.5 small enough to run in a second, in the official layout, random weights.

9 frames of 32 x 48 pixels are 3 x 4 x 6 latent cells, 18 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny.encoders import export_reason1, new_reason1
from tiny.export import dit_tensors, draw_weights, stored_tensors
from worldline.catalog import FLOW_MODELS
from worldline.families.predict2_5.model import FlowDiT, FlowDiTConfig
from worldline.shapes import LatentShape
from worldline.text.reason1 import RELEASED
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig
from worldline.tokenizers.wan.weights import key_map

from .tiny_diffusion import fill

POST, PRE = FLOW_MODELS[0], FLOW_MODELS[1]
TEXT_LENGTH = 72
TEXT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
# what a request asks for in tests
SMALL: dict[str, Any] = {
    "num_video_frames": 9,
    "height": 32,
    "width": 48,
    "guidance": 2.0,
    "num_steps": 2,
}
CONFIG = FlowDiTConfig(
    depth=2,
    width=48,
    num_heads=2,
    head_size=24,
    hidden=96,
    context_width=16,
    lora_rank=8,
    feature_width=TEXT["hidden_size"] * TEXT["num_hidden_layers"],
)
TOKENIZER = WanTokenizerConfig(channels=4, multipliers=(1, 1, 2, 2), num_blocks=1)
GRID = LatentShape(3, 4, 6)


def write_transformer(file: Path, seed: int = 0) -> None:
    """Write a transformer as NVIDIA does."""
    model = FlowDiT(CONFIG)
    fill(model, 0.15, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = dit_tensors(model).items()
    torch.save({name: tensor.bfloat16() for name, tensor in tensors}, file)


def write_tokenizer(file: Path, **changes: Any) -> None:
    """Write a tokenizer as NVIDIA does."""
    torch.manual_seed(0)
    tokenizer = WanTokenizer(WanTokenizerConfig(**{**TOKENIZER.__dict__, **changes}))
    draw_weights(tokenizer)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(stored_tensors(tokenizer, key_map(tokenizer.config)), file)


def make_tiny_predict2_5(folder: Path) -> Path:
    """Write both 2B models, the tokenizer and a text encoder below `folder`."""
    repository = folder / Path(POST.repository).name
    write_transformer(repository / POST.file)
    write_transformer(repository / PRE.file, seed=1)
    write_tokenizer(repository / "tokenizer.pth")
    torch.manual_seed(0)
    encoder = new_reason1(TEXT, max_length=TEXT_LENGTH)
    export_reason1(encoder, folder / RELEASED)
    return folder
