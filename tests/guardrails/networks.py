"""Networks of guardrails with weights drawn from a seed, in the released layouts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import SiglipConfig, SiglipModel

from worldline.guardrails import faces, frames

WIDTH = 1152


def drawn(network: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a state dict with small weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensors[name] = torch.ones_like(tensor)
        elif tensor.is_floating_point():
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.02
        else:
            tensors[name] = torch.zeros_like(tensor)
    return tensors


def write_retinaface(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    network = faces.RetinaFace()
    tensors, keys = drawn(network), faces.key_map(network)
    torch.save({keys.released(name): t for name, t in tensors.items()}, path)
    return path


def write_classifier(path: Path, answer: int = 0) -> Path:
    """Write a classifier that gives every frame the class `answer`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    network = frames.frame_classifier()
    tensors = drawn(network)
    tensors["6.bias"] = torch.eye(7)[answer] * 1e3
    keys = frames.key_map(network)
    state = {keys.released(name): t for name, t in tensors.items()}
    torch.save({"model": state}, path)
    return path


def write_siglip(folder: Path, width: int = WIDTH) -> Path:
    """Write a SigLIP of one layer, text half included."""
    half = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config={**half, "hidden_size": width, "image_size": 28, "patch_size": 14},
        text_config={**half, "hidden_size": 8, "projection_size": 8, "vocab_size": 16},
    )
    torch.manual_seed(0)
    SiglipModel(config).save_pretrained(folder)
    settings = {
        "size": {"height": 28, "width": 28},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
