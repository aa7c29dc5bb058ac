"""What the denoising families share: colours of previews, and frames as they are decoded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from worldline.families import denoise
from worldline.nn.pieces import fit_colours
from worldline.parallel.halo import SharedRows
from worldline.parallel.mesh import Axis
from worldline.tokenizers.cosmos.model import CosmosTokenizerConfig


class Averaging(nn.Module):
    """A tokenizer whose first channels are colours, scaled, and others for later frames."""

    config = CosmosTokenizerConfig(channels=4, level_channels=(8, 8, 8))

    def __init__(self) -> None:
        super().__init__()
        self.quant_conv = nn.Conv3d(1, 1, 1)

    def encode(self, video: Tensor) -> Tensor:
        cells = nn.functional.avg_pool3d(video[:, :, :9:8], (1, 8, 8))
        latents = torch.zeros(len(video), 16, *cells.shape[2:])
        latents[:, :3, :1] = 2 * cells[:, :, :1] + 0.5
        latents[:, 3:6, 1:] = -3 * cells[:, :, 1:]
        return latents


def test_colours_are_found() -> None:
    tokenizer = Averaging()
    colours = fit_colours(tokenizer)  # type: ignore[arg-type]
    assert torch.equal(colours, fit_colours(tokenizer))  # type: ignore[arg-type]
    red = torch.tensor([0.8, -0.6, -0.6])[None, :, None, None, None].expand(1, 3, 9, 32, 48)
    frames = denoise.preview_frames(tokenizer.encode(red), colours, 8)
    assert frames.shape == (2, 8, 12, 3)
    assert frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - (229, 51, 51)).max() <= 3


def test_size_is_a_quarter_or_more() -> None:
    latents = torch.zeros(1, 16, 3, 4, 6)
    for spatial in (4, 8, 16):
        frames = denoise.preview_frames(latents, torch.zeros(2, 17, 3), spatial)
        assert 4 * frames.shape[1] >= 4 * spatial
        assert frames.shape[0] == 3


def test_a_window_is_cut() -> None:
    pieces = iter(torch.linspace(-1, 1, 20).view(5, 1, 1, 4, 1, 1).expand(5, 1, 3, 4, 1, 1))
    frames = np.zeros((8, 1, 1, 3), np.uint8)
    steps = list(denoise.decode(pieces, frames, 2, 5, 8, SharedRows(Axis())))
    wanted = [int(255 * frame / 19) for frame in range(5, 11)]
    assert frames[:, 0, 0, 0].tolist() == [0, 0, *wanted]
    assert [step.done for step in steps] == [5, 8]
    assert len(list(pieces)) == 2  # those behind are not asked for
