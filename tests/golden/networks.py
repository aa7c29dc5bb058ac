"""The tiny diffusion transformers of the sampling cases, as `worldline.sampling.edm` calls them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from cases import Case
from torch import Tensor

from worldline.families.diffusion.model import DiT
from worldline.families.diffusion.weights import open_network
from worldline.sampling.edm import Network
from worldline.sampling.solvers import Stepped, Steps
from worldline.shapes import LatentShape
from worldline.weights.stream import load_into


@cache
def load_dit(path: Path, ratio: tuple[float, float, float], base_fps: float) -> DiT:
    found = open_network(path, {"rope_ratio": list(ratio), "base_fps": base_fps})
    with torch.device("meta"):
        model = DiT(found.config)
    load_into(model, found.source, found.keys, device="cpu", dtype=torch.float32)
    return model.requires_grad_(False).eval()


def make_network(
    case: Case,
    checkpoint: str,
    stated: dict[str, Any],
    *,
    prefix: str = "",
    frames: int = 0,
    negative: Tensor | None = None,
) -> Network:
    """The network of a checkpoint with the texts and sizes that the case holds.

    Args:
        case: holds the inputs that do not change from step to step.
        checkpoint: its path inside the case.
        stated: the case's numbers of this model.
        prefix: of the inputs' names.
        frames: latent frames that are given; marked for a model that has the mask.
        negative: text of the branch without the prompt.
    """
    time, rows, columns = (stated[f"rope_{axis}_extrapolation_ratio"] for axis in "thw")
    model = load_dit(case.path / checkpoint, (time, rows, columns), stated["base_fps"])
    prompt = case.tensor(f"{prefix}t5_text_embeddings")
    if negative is None:
        negative = case.tensor(f"{prefix}neg_t5_text_embeddings")
    contexts = {True: model.encode_context(prompt), False: model.encode_context(negative)}
    shape = case.tensor(f"{prefix}condition_latent").shape
    positions = model.make_positions(
        LatentShape(*shape[2:]),
        case.tensor(f"{prefix}fps")[0].item(),
        rotary_dtype=torch.float32,
    )
    padding = case.tensor(f"{prefix}padding_mask")
    mask = None
    if model.config.condition_mask:
        mask = torch.zeros(shape[0], 1, *shape[2:])
        mask[:, :, :frames] = 1

    def network(latents: Tensor, times: Tensor, conditional: bool) -> Tensor:
        return model(
            latents,
            times,
            contexts[conditional],
            positions,
            condition_mask=mask,
            padding_mask=padding,
        )

    return network


def collected(steps: Steps) -> tuple[list[Stepped], Tensor]:
    """All steps of a sampler, and its result."""
    made: list[Stepped] = []
    while True:
        try:
            made.append(next(steps))
        except StopIteration as stop:
            return made, stop.value


def read_unused_inputs(case: Case) -> None:
    """Mark as read what the case itself says no network reads."""
    for name, line in case.spec["tensors"].items():
        if "unused by the network" in line and name in case:
            assert case.tensor(name).isfinite().all()
