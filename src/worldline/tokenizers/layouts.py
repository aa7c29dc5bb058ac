"""Layouts of tokenizers on disk, to convert one to another."""

from typing import Any

from worldline.tokenizers.cosmos import weights as cosmos
from worldline.tokenizers.cosmos.model import CosmosTokenizerConfig, LatentStatistics
from worldline.tokenizers.wan import weights as wan
from worldline.tokenizers.wan.model import MEAN, STD, WanTokenizerConfig
from worldline.weights.keymap import KeyMap


def cosmos_layout(network: cosmos.CosmosNetwork, diffusers: bool) -> tuple[KeyMap, dict[str, Any]]:
    """Names of tensors, and files beside them, in NVIDIA's or diffusers' layout, if it has any."""
    config, statistics = network.config, network.statistics
    keys = cosmos.key_map(config, diffusers)
    if diffusers:
        network.require(levels=None, z_channels=config.latent_channels)
        return keys, {cosmos.CONFIG: cosmos_settings(config, statistics)}
    pairs = statistics.tensors() if statistics else {}
    return keys, {
        f"{kind}mean_std.pt": (pairs[f"{kind}mean"].flatten(), pairs[f"{kind}std"].flatten())
        for kind in ("", "image_")
        if f"{kind}mean" in pairs
    }


def cosmos_settings(
    config: CosmosTokenizerConfig, statistics: LatentStatistics | None = None
) -> dict[str, Any]:
    """Content of diffusers' config.json, of a continuous tokenizer, whose taps are exact."""
    return {
        "_class_name": "AutoencoderKLCosmos",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "encoder_block_out_channels": [config.channels, *config.level_channels],
        "decode_block_out_channels": [*config.level_channels, config.level_channels[-1]],
        "num_layers": config.num_blocks,
        "patch_size": config.patch,
        "patch_type": "haar",
        "spatial_compression_ratio": config.spatial,
        "temporal_compression_ratio": config.temporal,
        "latents_mean": None if statistics is None else statistics.mean.flatten().tolist(),
        "latents_std": None if statistics is None else statistics.std.flatten().tolist(),
    }


def wan_layout(network: wan.WanNetwork, diffusers: bool) -> tuple[KeyMap, dict[str, Any]]:
    """Names of tensors, and files beside them, in NVIDIA's or diffusers' layout, if it has any."""
    keys = wan.key_map(network.config, diffusers)
    if diffusers:
        return keys, {"config.json": wan_settings(network.config)}
    network.require(mean=MEAN, std=STD)
    return keys, {}


def wan_settings(config: WanTokenizerConfig) -> dict[str, Any]:
    """Content of diffusers' config.json."""
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": config.channels,
        "decoder_base_dim": None,
        "dim_mult": list(config.multipliers),
        "dropout": 0.0,
        "in_channels": 3,
        "is_residual": False,
        "latents_mean": list(config.mean),
        "latents_std": list(config.std),
        "num_res_blocks": config.num_blocks,
        "out_channels": 3,
        "patch_size": None,
        "scale_factor_spatial": config.spatial,
        "scale_factor_temporal": config.temporal,
        "temperal_downsample": list(config.temporal_steps),
        "z_dim": config.latent_channels,
    }
