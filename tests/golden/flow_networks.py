"""The tiny flow transformers of the cases of Predict2.5."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from cases import Case

from worldline.families.predict2_5.model import (
    RELEASED_RATIO,
    TIMESTEP_SCALE,
    FlowDiT,
    FlowDiTConfig,
)
from worldline.families.predict2_5.weights import open_network
from worldline.weights.networks import Network
from worldline.weights.stream import load_into


def settings_of(case: Case) -> dict[str, Any]:
    """Settings of a case's network that no tensor implies."""
    net = case.spec["net"]
    released = zip("thw", RELEASED_RATIO, strict=True)
    ratio = [net.get(f"rope_{axis}_extrapolation_ratio", own) for axis, own in released]
    return {"rope_ratio": ratio, "timestep_scale": net.get("timestep_scale", TIMESTEP_SCALE)}


@cache
def model_of(case: Case) -> FlowDiT:
    """The network of a case, in float32."""
    return load(open_network(case.path / case.spec["checkpoint"], settings_of(case)))


def load(found: Network[FlowDiTConfig]) -> FlowDiT:
    with torch.device("meta"):
        model = FlowDiT(found.config)
    load_into(model, found.source, found.keys, device="cpu", dtype=torch.float32)
    return model.requires_grad_(False).eval()
