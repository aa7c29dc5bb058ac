"""Invariants of the causal video tokenizers, for any weights; a clip in pieces is the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tiny.export import draw_weights
from worldline.nn.pieces import CausalCache, CausalTokenizer, decode_stream, encode_stream
from worldline.tokenizers.cosmos.model import PRESETS, CosmosTokenizer
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig

LATENT_FRAMES = 6
CONFIGS = {
    **{
        name: replace(PRESETS[name], channels=4, level_channels=(8, 8, 8), z_channels=z)
        for name, z in (("CV8x8x8", 16), ("CV4x8x8", 16), ("DV8x16x16", 16), ("DV4x8x8", 8))
    },
    "Wan": WanTokenizerConfig(channels=4),
    "Wan, wide and shallow": WanTokenizerConfig(
        channels=10, multipliers=(1, 3), num_blocks=1, temporal_steps=(True,)
    ),
    "Wan, images": WanTokenizerConfig(channels=8, multipliers=(1, 2), temporal_steps=(False,)),
    "Wan, other latents": WanTokenizerConfig(
        channels=4,
        multipliers=(1, 1, 2),
        temporal_steps=(True, False),
        latent_channels=3,
        mean=(1.0, -2.0, 0.5),
        std=(0.5, 2.0, 1.0),
    ),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> CausalTokenizer:
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    kind = WanTokenizer if isinstance(config, WanTokenizerConfig) else CosmosTokenizer
    model = kind(config)  # type: ignore[arg-type]
    draw_weights(model)
    return model.double().requires_grad_(False).eval()


def clip(model: CausalTokenizer, latent_frames: int = LATENT_FRAMES) -> Tensor:
    config = model.config
    frames = 1 + (latent_frames - 1) * config.temporal
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, frames, config.spatial, 2 * config.spatial)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def test_shapes(model: CausalTokenizer) -> None:
    video = clip(model)
    assert model.encode(video).shape == (2, model.config.latent_channels, LATENT_FRAMES, 1, 2)
    assert model.reconstruct(video).shape == video.shape


def test_causal_both_ways(model: CausalTokenizer) -> None:
    """The first 1 + c*k frames alone give the first 1 + k latent frames of the longer clip."""
    video = clip(model)
    latents = model.encode(video)
    frames = model.decode(latents)
    for count in (1, 2, 4):
        part = video[:, :, : 1 + (count - 1) * model.config.temporal]
        assert torch.allclose(model.encode(part), latents[:, :, :count], atol=1e-10)
        decoded = model.decode(latents[:, :, :count])
        assert torch.allclose(decoded, frames[:, :, : part.shape[2]], atol=1e-10)


def test_clips_of_a_batch_do_not_mix(model: CausalTokenizer) -> None:
    video = clip(model, 3)
    for one in (model.encode, model.reconstruct):
        apart = torch.cat([one(video[:1]), one(video[1:])])
        assert torch.allclose(one(video), apart, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("length", [1, 6, 20, 1000])
def test_encoding_in_pieces(model: CausalTokenizer, chunk: int, length: int) -> None:
    video = clip(model)
    model.chunk = chunk
    pieces = list(encode_stream(model, video.split(length, dim=2)))
    assert all(piece.shape[2] <= chunk for piece in pieces)
    assert torch.allclose(torch.cat(pieces, dim=2), model.encode(video), atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_decoding_in_pieces(model: CausalTokenizer, chunk: int) -> None:
    latents = model.encode(clip(model))
    model.chunk = chunk
    pieces = list(decode_stream(model, latents))
    assert pieces[0].shape[2] == 1 + (min(chunk, LATENT_FRAMES) - 1) * model.config.temporal
    assert torch.allclose(torch.cat(pieces, dim=2), model.decode(latents), atol=1e-10)


def test_pieces_come_as_soon_as_their_frames_are_there(model: CausalTokenizer) -> None:
    """Nothing waits for later frames, since nothing depends on them."""
    temporal, video, taken = model.config.temporal, clip(model), 0

    def camera() -> Iterator[Tensor]:
        nonlocal taken
        for frame in video.split(1, dim=2):
            taken += 1
            yield frame

    model.chunk = 1
    stream = encode_stream(model, camera())
    for number in range(3):
        next(stream)
        assert taken == 1 + temporal * number


def test_memory_of_the_cache_is_bounded_by_what_layers_reach(model: CausalTokenizer) -> None:
    """Only the temporal attention of Cosmos keeps more as the clip goes on."""
    cache, sizes = CausalCache(), []
    for piece in model.encode(clip(model)).split(1, dim=2):
        model.decode(piece, cache)
        frames = [one for key, one in cache.state.items() if not isinstance(key, tuple)]
        sizes.append(sum(one.untyped_storage().nbytes() for one in frames))
    assert len(set(sizes)) == 1


def test_a_clip_of_a_wrong_length_is_refused(model: CausalTokenizer) -> None:
    temporal = model.config.temporal
    video = clip(model, 3)
    if temporal == 1:
        return
    with pytest.raises(ValueError, match=rf"1 \+ {temporal}k frames"):
        list(encode_stream(model, video[:, :, :-1].split(5, dim=2)))
    cache = CausalCache()
    model.encode(video[:, :, :1], cache)
    with pytest.raises(ValueError, match="frames"):
        model.encode(video[:, :, 1:2], cache)


@pytest.mark.parametrize(
    ("change", "word"), [((1, 0, 0), "frames"), ((0, 1, 0), "multiples"), ((0, 0, 1), "multiples")]
)
def test_sizes_that_do_not_fit_are_refused(
    model: CausalTokenizer, change: tuple[int, int, int], word: str
) -> None:
    if change[0] and model.config.temporal == 1:
        return
    frames, height, width = (a + b for a, b in zip((9, 16, 16), change, strict=True))
    with pytest.raises(ValueError, match=word):
        model.encode(torch.zeros(1, 3, frames, height, width, dtype=torch.float64))
