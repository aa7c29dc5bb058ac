"""Diffusion transformers as diffusers' `CosmosTransformer3DModel` has them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tiny.export import stored_tensors
from worldline.families.diffusion import weights as predict1
from worldline.families.diffusion.model import DiT, DiTConfig
from worldline.families.predict2_5 import weights as predict2_5
from worldline.families.predict2_5.model import FlowDiT, FlowDiTConfig
from worldline.nn.dit import PATCH


def diffusers_tensors(model: DiT | FlowDiT) -> dict[str, Tensor]:
    """Parameters by diffusers' names."""
    keys = predict2_5.DIFFUSERS_KEYS if isinstance(model, FlowDiT) else predict1.DIFFUSERS_KEYS
    return stored_tensors(model, keys)


def diffusers_config(config: DiTConfig | FlowDiTConfig) -> dict[str, Any]:
    """Content of config.json.

    With Predict2.5's, the class computes with unrounded rotary exponents
    (see `tests/families/test_predict2_5_model.py`), norms heads with 1e-5 below the root in place
    of 1e-6, and takes timesteps that are scaled already.
    """
    grid, (_, rows, columns) = config.max_grid, PATCH
    flow = isinstance(config, FlowDiTConfig)
    settings: dict[str, Any] = {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": config.latent_channels + (flow or config.condition_mask),
        "out_channels": config.latent_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_size,
        "num_layers": config.depth,
        "mlp_ratio": config.hidden / config.width,
        "text_embed_dim": config.context_width,
        "adaln_lora_dim": config.lora_rank,
        "max_size": [grid.frames, grid.height * rows, grid.width * columns],
        "patch_size": list(PATCH),
        "rope_scale": list(config.rope_ratio),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None if flow else "learnable",
    }
    if isinstance(config, FlowDiTConfig):
        settings |= {
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": config.feature_width,
            "encoder_hidden_states_channels": config.context_width,
        }
    return settings
