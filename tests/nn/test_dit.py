"""Where each number of a latent grid stands among the features of a token."""

from __future__ import annotations

import pytest
import torch

from worldline.nn.dit import patchify, unpatchify
from worldline.shapes import LatentShape

GRID = LatentShape(3, 4, 10)
PATCH = (1, 2, 5)
CELLS = 10


def test_channels_are_slowest_in_the_input_and_fastest_in_the_output() -> None:
    latents = torch.randn(2, 6, GRID.frames, GRID.height, GRID.width)
    mask = torch.randn(2, 1, GRID.frames, GRID.height, GRID.width)
    tokens = patchify(latents, [mask], None, PATCH)
    assert tokens.shape == (2, 3 * 2 * 2, 8 * CELLS)
    batch, channel, frame, row, column = 1, 4, 2, 3, 6
    token = (frame * 2 + row // 2) * 2 + column // 5
    cell = row % 2 * 5 + column % 5
    here = (batch, frame, row, column)
    assert tokens[batch, token, channel * CELLS + cell] == latents[1, channel][here[1:]]
    assert tokens[batch, token, 6 * CELLS + cell] == mask[1, 0][here[1:]]
    y = torch.randn(2, 12, CELLS * 6)
    assert unpatchify(y, GRID, PATCH)[1, channel][here[1:]] == y[batch, token, cell * 6 + channel]


@pytest.mark.parametrize("size", [(4, 10), (32, 80), (2, 5)])
def test_the_padding_mask_is_the_last_channel_at_the_latents_size(size: tuple[int, int]) -> None:
    latents = torch.zeros(1, 1, GRID.frames, GRID.height, GRID.width)
    padding = torch.zeros(1, 1, *size)
    padding[..., size[1] // 5 * 3 :] = 1  # from column 6 of the latents' 10
    shown = patchify(latents, [], padding, PATCH)[..., CELLS:]
    left, right = torch.zeros(CELLS), torch.tensor([0.0, 1, 1, 1, 1] * 2)
    assert torch.equal(shown, torch.stack([left, right] * 6)[None])
    assert not patchify(latents, [], None, PATCH).any()
