"""uint8 clips of any size through a tokenizer and back to their own size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tiny.export import draw_weights
from worldline.shapes import VideoShape
from worldline.tokenizers.cosmos.clips import check_stored, decode_clip, encode_clip
from worldline.tokenizers.cosmos.model import PRESETS, CosmosTokenizer


@pytest.fixture(params=["CV8x8x8", "CV4x8x8", "DV8x16x16"])
def model(request: pytest.FixtureRequest) -> CosmosTokenizer:
    torch.manual_seed(0)
    model = CosmosTokenizer(replace(PRESETS[request.param], channels=4, level_channels=(8, 8, 8)))
    draw_weights(model)
    return model.requires_grad_(False).eval()


def clip(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    values = np.random.RandomState(0).randint(0, 256, (frames, height, width, 3))
    return values.astype(np.uint8)


@pytest.mark.parametrize("size", [(1, 5, 7), (9, 16, 32), (12, 20, 33), (40, 17, 16)])
def test_a_clip_keeps_its_size(model: CosmosTokenizer, size: tuple[int, int, int]) -> None:
    config = model.config
    stored, shape = encode_clip(
        model, np.array_split(clip(*size), 3) if size[0] > 3 else [clip(*size)]
    )
    assert shape == VideoShape(*size)
    grid = (
        1 + -(-(size[0] - 1) // config.temporal),
        -(-size[1] // config.spatial),
        -(-size[2] // config.spatial),
    )
    assert stored.shape == (grid if config.levels else (16, *grid))
    pieces = list(decode_clip(model, stored, shape))
    assert np.concatenate(pieces).shape == (*size, 3)
    assert all(piece.dtype == np.uint8 for piece in pieces)
    whole = np.concatenate(list(decode_clip(model, stored)))
    assert np.array_equal(whole[: size[0], : size[1], : size[2]], np.concatenate(pieces))


def test_padding_repeats_what_is_there(model: CosmosTokenizer) -> None:
    frames = clip(2, 12, 20)
    config = model.config
    sides = ((0, config.temporal - 1), (0, -12 % config.spatial), (0, -20 % config.spatial), (0, 0))
    video = torch.from_numpy(np.pad(frames, sides, mode="edge")).permute(3, 0, 1, 2)[None]
    expected = model.encode(video.float() / 255 * 2 - 1)
    stored, _ = encode_clip(model, [frames])
    if config.levels is None:
        assert torch.allclose(stored, expected[0], atol=1e-5)
    else:
        assert torch.equal(stored, model.to_tokens(expected)[0])


def test_what_is_of_another_tokenizer_is_refused(model: CosmosTokenizer) -> None:
    discrete = model.config.levels is not None
    latents, tokens = torch.zeros(16, 2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int32)
    good = tokens if discrete else latents
    other = latents if discrete else tokens
    for stored, size in (
        (other, None),
        (good[0], None),
        *((good, VideoShape(*size)) for size in ((100, 8, 8), (1, 100, 8), (0, 8, 8))),
    ):
        with pytest.raises(ValueError, match="are needed, not"):
            check_stored(model.config, stored, size)
    if discrete:
        with pytest.raises(ValueError, match="outside 0 to 63,999"):
            decode_clip(model, tokens + 64_000)
    else:
        with pytest.raises(ValueError, match=r"\[16, .* are needed, not .*\[3,"):
            check_stored(model.config, latents[:3], None)
        with pytest.raises(ValueError, match="not finite"):
            decode_clip(model, latents / 0)
