"""Fresh weights of networks, and their tensors and settings as released files have them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldline.families.autoregressive.model import ARTransformer
from worldline.families.diffusion.model import DiT, DiTConfig
from worldline.families.diffusion.weights import KEYS as DIT_KEYS
from worldline.families.predict2_5.model import FlowDiT, FlowDiTConfig, released_exponents
from worldline.families.predict2_5.weights import KEYS as FLOW_KEYS
from worldline.tokenizers.cosmos.model import (
    CosmosTokenizer,
)
from worldline.tokenizers.cosmos.weights import key_map
from worldline.tokenizers.wan.model import WanTokenizer
from worldline.weights.checkpoint import save
from worldline.weights.keymap import KeyMap

_DRAWN = ("embed", "ids", "positions", "project", "noise", "blocks", "head")


def draw_weights(model: nn.Module) -> None:
    """Fresh weights: norms at one, convolutions as torch draws them, transformers by fan-in."""
    tokenizer = isinstance(model, CosmosTokenizer | WanTokenizer)
    bound = 0.0
    parameters = list(model.named_parameters())
    if isinstance(model, DiT | FlowDiT):  # a seed is the same weights whatever the modules' order
        parameters.sort(key=lambda named: _DRAWN.index(named[0].partition(".")[0]))
    for name, parameter in parameters:
        leaf = name.rpartition(".")[2]
        if ("norm" in name and leaf != "bias") or leaf == "gamma":
            nn.init.ones_(parameter)
        elif tokenizer and leaf == "weight":
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            bound = 1 / math.sqrt(parameter[0].numel())
        elif tokenizer and "norm" not in name:
            nn.init.uniform_(parameter, -bound, bound)
        elif leaf == "bias" or name == "head.linear.weight" or "modulation.second" in name:
            nn.init.zeros_(parameter)
        elif isinstance(model, ARTransformer):
            deep = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * model.config.depth) ** 0.5 if deep else 0.02)
        elif name.startswith(("positions.", "ids.")):
            nn.init.normal_(parameter, std=1 if name == "ids.weight" else 0.02)
        elif name != "noise.second.weight" or isinstance(model, FlowDiT):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    if isinstance(model, DiT | FlowDiT):
        # a gate at zero would block the first update: the noise level opens all of them a little
        nn.init.normal_(model.get_parameter("noise.second.weight"), std=0.02)


def export_network(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    folder: Path,
    file: str = "model.safetensors",
) -> None:
    """Write tensors in bf16 under their released names, and config.json beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    save({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / file)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")


def stored_tensors(model: nn.Module, keys: KeyMap) -> dict[str, Tensor]:
    """Tensors of a network by their names in a file, in their own dtype."""
    return {
        keys.released(name): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
    }


def dit_tensors(model: DiT | FlowDiT) -> dict[str, Tensor]:
    """Tensors of NVIDIA's file: the parameters, and Predict2.5's exponents of positions."""
    if isinstance(model, DiT):
        return stored_tensors(model, DIT_KEYS)
    exponents = model.config.exponents or released_exponents(model.config.head_size)
    positions = {
        f"net.pos_embedder.dim_{axis}_range": torch.tensor(values).bfloat16()
        for axis, values in zip(("temporal", "spatial"), exponents, strict=True)
    }
    return positions | stored_tensors(model, FLOW_KEYS)


def dit_settings(config: DiTConfig | FlowDiTConfig) -> dict[str, Any]:
    """Content of config.json."""
    own = "timestep_scale" if isinstance(config, FlowDiTConfig) else "base_fps"
    return {"rope_ratio": list(config.rope_ratio), own: getattr(config, own)}


def cosmos_tensors(model: CosmosTokenizer) -> dict[str, dict[str, Tensor]]:
    """Tensors of the files "encoder" and "decoder", bf16, by their released names.

    The taps, and for a discrete tokenizer its levels, go into both files, as in released ones.
    """
    config = model.config
    taps = torch.full((2,), config.tap).bfloat16()
    halves = {
        "encoder": {"encoder.patcher3d.wavelets": taps},
        "decoder": {"decoder.unpatcher3d.wavelets": taps.clone()},
    }
    for name, tensor in stored_tensors(model, key_map(config)).items():
        half = "encoder" if name.startswith(("encoder.", "quant_conv.")) else "decoder"
        halves[half][name] = tensor.bfloat16().cpu()
    if config.levels is not None:
        levels = torch.tensor(config.levels, dtype=torch.int32)
        halves["encoder"]["quantizer._levels"] = levels
        halves["decoder"]["inv_quant.quantizer._levels"] = levels.clone()
    return halves
