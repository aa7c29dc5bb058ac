"""Where each number of a latent grid stands among the features of a token."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from worldline.nn.dit import PATCH_CELLS, Block, DiTSizes, NoiseLevel, patchify, unpatchify
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
    sizes = DiTSizes(
        depth=3,
        width=24,
        num_heads=2,
        head_size=12,
        hidden=40,
        context_width=8,
        lora_rank=4,
        max_grid=GRID,
        rope_ratio=(1.0, 1.0, 1.0),
    )
    torch.manual_seed(0)
    blocks = [Block(sizes) for _ in range(sizes.depth)]
    for block in blocks:
        for parameter in block.to(dtype).parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    stream, angles = torch.randn(1, 5, 24, dtype=dtype), torch.rand(5, 12)
    noise = NoiseLevel(torch.randn(1, 24, dtype=dtype), torch.randn(1, 72, dtype=dtype))
    rotation = Rotation(angles.cos(), angles.sin())
    context = tuple(torch.randn(1, 2, 7, 12, dtype=dtype) for _ in range(2))

    def gradients(closed: bool) -> list[torch.Tensor]:
        residual = Residual(stream)
        for block in blocks:
            again = partial(checkpoint, block.closed, use_reentrant=False)
            residual = (again if closed else block)(residual, noise, rotation, context)
            assert (residual.update is None) == closed, "what is kept between blocks"
        # the text is encoded before
        named = [pair for block in blocks for pair in block.named_parameters()]
        used = [p for name, p in named if not name.startswith("cross_attention.body.k")]
        used = [p for p in used if p.shape != (24, 8)]
        return [*torch.autograd.grad(residual.total().square().sum(), used)]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)
