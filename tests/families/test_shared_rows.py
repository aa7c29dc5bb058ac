"""Videos whose rows two processes encode and decode, or one for both, are those of one process."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import worldline
from worldline.parallel import halo
from worldline.parallel.mesh import Axis
from worldline.shapes import LatentShape

from .. import tiny_predict2_5
from ..conftest import MODEL, SMALL_TRANSFORMER, make_small_world, moving
from ..ranks import Together
from ..tiny_decoder import add_parts
from ..tiny_diffusion import CONTEXT_WIDTH, VIDEO2WORLD

FLOW = Path(tiny_predict2_5.POST.repository).name
# three chunks of 10 latent rows, of which two go on from frames of the video itself
CHUNKS = {"height": 80, "width": 48, "num_video_frames": 21, "num_steps": 2, "preview_every": 2}
CHUNKS |= {"chunk_size": 9, "chunk_overlap": 5, "num_input_frames": 5}
CLIP = {"height": 48, "width": 48, "num_input_frames": 9, "num_steps": 2, "preview_every": 1}
# 5 rows of tokens, 10 of the latents of the diffusion decoder, which takes two windows
TALL = replace(SMALL_TRANSFORMER, grid=LatentShape(5, 5, 3))
DRAWN = {"temperature": 0, "num_input_frames": 9, "num_video_frames": 65}
# load options and a request of a world, and whether it takes a prompt
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "chunks": (FLOW, {}, CHUNKS, tiny_predict2_5.CONFIG.feature_width),
    "clip": (VIDEO2WORLD, {"disable_prompt_upsampler": True}, CLIP, CONTEXT_WIDTH),
    "rollout": (MODEL, {"disable_diffusion_decoder": True}, {**DRAWN, "rollout": "pixels"}, 0),
    "decoder": (MODEL, {}, DRAWN, 0),
    "blended": (MODEL, {}, {**DRAWN, "decoder_seam": "as_released"}, 0),
}


@pytest.fixture(scope="module")
def tall_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_small_world(tmp_path_factory.mktemp("tall"), TALL)
    add_parts(root, TALL)
    return root


def make(
    axis: Axis, least: float, name: str, load: dict[str, Any], options: dict[str, Any]
) -> tuple[NDArray[np.uint8], bool, int]:
    """Frames; whether a process had parts of rows; how many previews came."""
    chosen, halo.LEAST_PIXELS = halo.LEAST_PIXELS, least  # type: ignore[assignment]
    split, previews = [], []
    convolve = halo.SplitRows.convolve

    def watch(rows: halo.SplitRows, *arguments: Any) -> Any:
        split.append(rows.split)
        return convolve(rows, *arguments)

    halo.SplitRows.convolve = watch  # type: ignore[method-assign]
    try:
        world = worldline.load(name, device="cpu", disable_guardrail=True, **load)
        video = world.generate(
            moving(16, 80, 96),
            progress=lambda step: previews.append(step.preview is not None),
            **options,
        )
        return video.frames, any(split), sum(previews)
    finally:
        halo.LEAST_PIXELS, halo.SplitRows.convolve = chosen, convolve  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "least"),
    [
        *((case, 0) for case in CASES),
        *((case, math.inf) for case in ("chunks", "rollout", "decoder")),
    ],
)
def test_frames_are_those_of_one_process(
    two: Together,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    case: str,
    least: float,
) -> None:
    name, load, options, width = CASES[case]
    root = {"chunks": "tiny_predict2_5", "clip": "tiny_diffusion"}.get(case, "tall_world")
    load = {**load, "checkpoint_dir": str(request.getfixturevalue(root))}
    if width:
        embedding = tmp_path / "prompt.pt"
        torch.save(torch.randn(1, 12, width), embedding)
        options = {**options, "prompt_embeddings": str(embedding), "guidance": 0}
    wanted, split, previews = make(Axis(), least, name, load, options)
    assert not split
    found = two(make, least, name, load, options)
    assert found[0][2] == previews
    for frames, split, _ in found:
        assert split == (least == 0)
        assert np.abs(frames.astype(int) - wanted).max() <= 1
    assert wanted.std() > 1
