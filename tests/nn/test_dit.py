"""Where each number of a latent grid stands among the features of a token."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.tiny_diffusion import config, fill
from worldline.nn.dit import PATCH_CELLS, TEXT_WEIGHTS, Block, NoiseLevel, patchify, unpatchify
from worldline.nn.modulation import Residual
from worldline.nn.rope import Rotation
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_blocks_that_are_computed_again_give_the_same_bits(dtype: torch.dtype) -> None:
    sizes = config(condition_mask=True)
    width, heads, size = sizes.width, sizes.num_heads, sizes.head_size
    blocks = [Block(sizes).to(dtype) for _ in range(3)]
    for number, block in enumerate(blocks):
        fill(block, 0.3, seed=number)
    torch.manual_seed(0)
    stream, angles = torch.randn(1, 5, width, dtype=dtype), torch.rand(5, size)
    noise = NoiseLevel(torch.randn(1, width, dtype=dtype), torch.randn(1, 3 * width, dtype=dtype))
    rotation = Rotation(angles.cos(), angles.sin())
    context = tuple(torch.randn(1, heads, 7, size, dtype=dtype) for _ in range(2))

    def gradients(closed: bool) -> list[torch.Tensor]:
        residual = Residual(stream)
        for block in blocks:
            again = partial(checkpoint, block.closed, use_reentrant=False)
            residual = (again if closed else block)(residual, noise, rotation, context)
            assert (residual.update is None) == closed, "what is kept between blocks"
        # the text is encoded before
        named = [pair for block in blocks for pair in block.named_parameters()]
        used = [parameter for name, parameter in named if not name.endswith(TEXT_WEIGHTS)]
        return [*torch.autograd.grad(residual.total().square().sum(), used)]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)
