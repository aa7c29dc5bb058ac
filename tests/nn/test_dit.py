"""Where each number of a latent grid stands among the features of a token."""

from __future__ import annotations

import pytest
import torch

from worldline.nn.dit import PATCH_CELLS, patchify, unpatchify
from worldline.shapes import LatentShape

GRID = LatentShape(3, 4, 10)


def test_channels_are_slowest_in_the_input_and_fastest_in_the_output() -> None:
    latents = torch.randn(2, 6, GRID.frames, GRID.height, GRID.width)
    mask = torch.randn(2, 1, GRID.frames, GRID.height, GRID.width)
    tokens = patchify(latents, [mask], None)
    assert tokens.shape == (2, 3 * 2 * 5, 8 * PATCH_CELLS)
    batch, channel, frame, row, column = 1, 4, 2, 3, 6
    token = (frame * 2 + row // 2) * 5 + column // 2
    cell = row % 2 * 2 + column % 2
    here = (batch, frame, row, column)
    assert tokens[batch, token, channel * PATCH_CELLS + cell] == latents[1, channel][here[1:]]
    assert tokens[batch, token, 6 * PATCH_CELLS + cell] == mask[1, 0][here[1:]]
    y = torch.randn(2, 30, PATCH_CELLS * 6)
    assert unpatchify(y, GRID)[1, channel][here[1:]] == y[batch, token, cell * 6 + channel]


@pytest.mark.parametrize("size", [(4, 10), (32, 80), (2, 5)])
def test_the_padding_mask_is_the_last_channel_at_the_latents_size(size: tuple[int, int]) -> None:
    latents = torch.zeros(1, 1, GRID.frames, GRID.height, GRID.width)
    padding = torch.zeros(1, 1, *size)
    padding[..., size[1] // 5 * 3 :] = 1  # from column 6 of the latents' 10
    mask = patchify(latents, [], padding)[..., PATCH_CELLS:]
    row = torch.tensor([0.0, 0, 0, 1, 1])  # tokens, of two columns each
    assert torch.equal(mask, row.repeat(6)[None, :, None].expand(1, 30, PATCH_CELLS))
    assert not patchify(latents, [], None).any()
