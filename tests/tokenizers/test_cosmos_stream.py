"""A clip in pieces is the clip as a whole, whatever the pieces and the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from worldline.nn.pieces import CausalCache, decode_stream, encode_stream
from worldline.tokenizers.cosmos.model import PRESETS, CosmosTokenizer, FrameNorm

LATENT_FRAMES = 7


@pytest.fixture(params=["CV8x8x8", "CV4x8x8", "DV8x16x16", "DV4x8x8"])
def model(request: pytest.FixtureRequest) -> CosmosTokenizer:
    torch.manual_seed(0)
    model = CosmosTokenizer(replace(PRESETS[request.param], channels=4, level_channels=(8, 8, 8)))
    model.reset_parameters()
    return model.double().requires_grad_(False).eval()


def clip(model: CosmosTokenizer, frames: int | None = None) -> Tensor:
    config = model.config
    frames = frames or 1 + (LATENT_FRAMES - 1) * config.temporal
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, frames, config.spatial, 2 * config.spatial)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("length", [1, 6, 20, 1000])
def test_encoding_in_pieces(model: CosmosTokenizer, chunk: int, length: int) -> None:
    video = clip(model)
    pieces = list(encode_stream(model, video.split(length, dim=2), chunk=chunk))
    assert all(piece.shape[2] <= chunk for piece in pieces)
    assert torch.allclose(torch.cat(pieces, dim=2), model.encode(video), atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_decoding_in_pieces(model: CosmosTokenizer, chunk: int) -> None:
    latents = model.encode(clip(model))
    pieces = list(decode_stream(model, latents, chunk=chunk))
    assert pieces[0].shape[2] == 1 + (min(chunk, LATENT_FRAMES) - 1) * model.config.temporal
    assert torch.allclose(torch.cat(pieces, dim=2), model.decode(latents), atol=1e-10)


def test_pieces_come_as_soon_as_their_frames_are_there(model: CosmosTokenizer) -> None:
    """Nothing waits for later frames, since nothing depends on them."""
    temporal = model.config.temporal
    video = clip(model)
    taken = 0

    def camera() -> Iterator[Tensor]:
        nonlocal taken
        for frame in video.split(1, dim=2):
            taken += 1
            yield frame

    stream = encode_stream(model, camera(), chunk=1)
    next(stream)
    assert taken == 1
    next(stream)
    assert taken == 1 + temporal


def test_memory_of_the_past_is_bounded_by_what_layers_reach(model: CosmosTokenizer) -> None:
    """Only the temporal attention keeps more as the clip goes on."""
    cache, sizes = CausalCache(), []
    video = clip(model)
    temporal = model.config.temporal
    for number in range(4):
        first = 0 if number == 0 else 1 + (number - 1) * temporal
        model.encode(video[:, :, first : 1 + number * temporal], cache)
        kept = [one for key, one in cache.state.items() if not isinstance(key, tuple)]
        sizes.append(sum(one.untyped_storage().nbytes() for one in kept))
    assert len(set(sizes)) == 1


def test_a_clip_of_a_wrong_length_is_refused(model: CosmosTokenizer) -> None:
    temporal = model.config.temporal
    video = clip(model, 2 + 2 * temporal)
    with pytest.raises(ValueError, match=rf"1 \+ {temporal}k frames"):
        list(encode_stream(model, video.split(5, dim=2)))
    cache = CausalCache()
    model.encode(video[:, :, :1], cache)
    with pytest.raises(ValueError, match="frames"):
        model.encode(video[:, :, 1:2], cache)
    with pytest.raises(ValueError, match="chunk is 0"):
        list(encode_stream(model, [video], chunk=0))
    with pytest.raises(ValueError, match="chunk is 0"):
        list(decode_stream(model, video, chunk=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_normalise_agree(dtype: torch.dtype) -> None:
    """The one for training and CPUs, and the one that a GPU runs without gradient."""
    torch.manual_seed(0)
    norm = FrameNorm(8).requires_grad_(False)
    norm.weight.uniform_(0.5, 2)
    norm.bias.uniform_()
    x = torch.randn(2, 8, 3, 4, 6) * 3 + 5
    frames = x.transpose(1, 2).flatten(0, 1)
    expected = torch.nn.functional.group_norm(frames, 1, norm.weight, norm.bias, eps=1e-6)
    expected = expected.unflatten(0, (2, 3)).transpose(1, 2)
    x = x.to(dtype, memory_format=torch.channels_last_3d)
    tolerance = 1e-5 if dtype == torch.float32 else 0.04
    for y in (norm._fused(x), norm._by_sums(x)):
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        assert torch.allclose(y.float(), expected, atol=tolerance)
