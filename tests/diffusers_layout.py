"""Diffusion transformers as diffusers' `CosmosTransformer3DModel` has them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tiny.export import stored_tensors
from worldline.families.diffusion import weights as predict1
from worldline.families.diffusion.model import DiT, DiTConfig
from worldline.families.predict2_5 import weights as predict2_5
from worldline.families.predict2_5.model import FlowDiT, FlowDiTConfig


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
    family = predict2_5 if isinstance(config, FlowDiTConfig) else predict1
    return family.diffusers_settings(config)  # type: ignore[arg-type]
