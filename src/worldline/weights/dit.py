"""Diffusion transformers on disk: what their files have in common.

Two layouts hold the same weights: NVIDIA's file, and the folder of diffusers'
`CosmosTransformer3DModel`. Families name their tensors; the rest is here.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Self

from pydantic import AliasChoices, Field

from worldline.errors import CheckpointError
from worldline.nn.dit import PATCH, PATCH_CELLS
from worldline.weights.checkpoint import Checkpoint
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import Number, Settings, Shapes, read_settings

# bookkeeping that may lie beside the weights
BOOKKEEPING = {
    "*_extra_state": "FP8 bookkeeping of Transformer Engine",
    "*_extra_state.*": "FP8 bookkeeping of Transformer Engine",
}


class DiTSettings(Settings):
    """What no tensor of a diffusion transformer holds, in NVIDIA's config.json or diffusers'."""

    rope_ratio: tuple[Number, Number, Number] | None = Field(
        None, validation_alias=AliasChoices("rope_ratio", "rope_scale")
    )

    @classmethod
    def read(cls, source: Checkpoint, stated: Mapping[str, Any] | None) -> Self:
        """Checked settings of a transformer: `stated`, or the config.json beside its tensors.

        Raises:
            CheckpointError: a setting has a wrong value, or diffusers' config.json is absent.
        """
        path = source.path.parent / "config.json"
        settings = cls.parse(read_settings(path.parent) if stated is None else stated, path)
        if settings.rope_ratio is None and is_diffusers(source):
            raise CheckpointError(f"{path} is absent, or has no rope_scale")
        return settings


def is_diffusers(source: Checkpoint) -> bool:
    """Whether a transformer's tensors have diffusers' names."""
    theirs = ("patch_embed.", "transformer_blocks.")
    return any(name.startswith(theirs) for name in source.tensors)


def read_sizes(source: Checkpoint, keys: KeyMap) -> tuple[Shapes, dict[str, Any]]:
    """Shapes of a diffusion transformer, and the sizes they imply, by the names of its config.

    Raises:
        CheckpointError: a tensor is absent or of another kind.
    """
    shapes = Shapes(source, keys, "a Cosmos diffusion transformer of this kind")
    block = "blocks.0.attention"
    width, head_size = shapes.size("embed.weight"), shapes.size(f"{block}.body.q_norm")
    return shapes, {
        "latent_channels": shapes.size("head.linear.weight") // PATCH_CELLS,
        "width": width,
        "head_size": head_size,
        "num_heads": shapes.size(f"{block}.body.q.weight") // head_size,
        "lora_rank": shapes.size(f"{block}.modulation.first.weight"),
        "context_width": shapes.size("blocks.0.cross_attention.body.k.weight", 1),
        "hidden": shapes.size("blocks.0.feed_forward.body.up.weight"),
        "depth": shapes.count("blocks"),
    }


def diffusers_settings(config: Any, **more: Any) -> dict[str, Any]:
    """Content of config.json of a `CosmosTransformer3DModel`, which `more` fields complete."""
    (_, rows, columns), grid = PATCH, config.max_grid
    return {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": config.latent_channels + config.condition_mask,
        "out_channels": config.latent_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_size,
        "num_layers": config.depth,
        "mlp_ratio": config.hidden / config.width,
        "text_embed_dim": config.context_width,
        "adaln_lora_dim": config.lora_rank,
        "max_size": [grid.frames, grid.height * rows, grid.width * columns],
        "patch_size": [*PATCH],
        "rope_scale": [*config.rope_ratio],
        "concat_padding_mask": True,
        **more,
    }


def expand(names: Mapping[str, str]) -> dict[str, str]:
    """Names in which `{a,b}` stands for one word after the other, as in a shell, on both sides."""

    def forms(name: str) -> Iterator[str]:
        parts = re.split(r"\{([\w.]+,[\w.,]+)\}", name)
        return map("".join, product(*(part.split(",") for part in parts)))

    return dict(pair for both in names.items() for pair in zip(*map(forms, both), strict=True))


DIFFUSERS = expand(
    {
        "patch_embed.proj.weight": "embed.weight",
        "time_embed.t_embedder.linear_{1,2}.weight": "noise.{first,second}.weight",
        "time_embed.norm.weight": "noise.norm",
        "proj_out.weight": "head.linear.weight",
        "norm_out.linear_{1,2}.weight": "head.modulation.{first,second}.weight",
        "transformer_blocks.{i}.norm{1,2,3}.linear_{1,2}.weight": "blocks.{i}."
        "{attention,cross_attention,feed_forward}.modulation.{first,second}.weight",
        "transformer_blocks.{i}.attn{1,2}.{to_q,to_k,to_v,to_out.0}.weight": "blocks.{i}."
        "{attention,cross_attention}.body.{q,k,v,out}.weight",
        "transformer_blocks.{i}.attn{1,2}.norm_{q,k}.weight": "blocks.{i}."
        "{attention,cross_attention}.body.{q,k}_norm",
        "transformer_blocks.{i}.ff.net.{0.proj,2}.weight": "blocks.{i}."
        "feed_forward.body.{up,down}.weight",
    }
)
