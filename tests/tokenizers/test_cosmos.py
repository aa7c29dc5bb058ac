"""Invariants of the video tokenizer that hold for any weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.tokenizers.cosmos.model import (
    PRESETS,
    CosmosTokenizer,
    CosmosTokenizerConfig,
)
from worldline.tokenizers.cosmos.weights import open_tokenizer, released_tensors
from worldline.weights.write import save

TINY = {"channels": 4, "level_channels": (8, 8, 8)}
VARIANTS = {
    "DV8x16x16": replace(PRESETS["DV8x16x16"], **TINY),
    "DV4x8x8": replace(PRESETS["DV4x8x8"], **TINY, z_channels=8),
    "CV8x8x8": replace(PRESETS["CV8x8x8"], **TINY),
    "CV4x8x8": replace(PRESETS["CV4x8x8"], **TINY),
}


def build(config: CosmosTokenizerConfig) -> CosmosTokenizer:
    torch.manual_seed(0)
    model = CosmosTokenizer(config)
    model.reset_parameters()
    return model.double().requires_grad_(False).eval()


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> CosmosTokenizer:
    return build(VARIANTS[request.param])


def clip(model: CosmosTokenizer, latent_frames: int = 3) -> Tensor:
    config = model.config
    frames = 1 + (latent_frames - 1) * config.temporal
    shape = (1, 3, frames, 2 * config.spatial, 3 * config.spatial)
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def test_shapes(model: CosmosTokenizer) -> None:
    video = clip(model)
    latents = model.encode(video)
    assert latents.shape == (1, model.config.latent_channels, 3, 2, 3)
    assert model.reconstruct(video).shape == video.shape


def test_encoding_is_causal(model: CosmosTokenizer) -> None:
    """The first 1 + c*k frames alone give the first 1 + k latent frames of the longer clip."""
    video = clip(model)
    whole = model.encode(video)
    for latent_frames in (1, 2):
        part = video[:, :, : 1 + (latent_frames - 1) * model.config.temporal]
        assert torch.allclose(model.encode(part), whole[:, :, :latent_frames], atol=1e-10)


def test_decoding_is_causal(model: CosmosTokenizer) -> None:
    latents = model.encode(clip(model))
    whole = model.decode(latents)
    for latent_frames in (1, 2):
        part = model.decode(latents[:, :, :latent_frames])
        assert torch.allclose(part, whole[:, :, : part.shape[2]], atol=1e-10)


def test_clips_of_a_batch_do_not_mix(model: CosmosTokenizer) -> None:
    first, second = clip(model, 2), -clip(model, 2)
    both = model.encode(torch.cat([first, second]))
    assert torch.allclose(both[:1], model.encode(first), atol=1e-10)
    assert torch.allclose(both[1:], model.encode(second), atol=1e-10)


@pytest.mark.parametrize("name", ["DV8x16x16", "DV4x8x8"])
def test_tokens_decode_to_the_reconstruction(name: str) -> None:
    model = build(VARIANTS[name])
    video = clip(model)
    tokens = model.encode_tokens(video)
    assert tokens.dtype == torch.int32
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < model.config.vocabulary == 64_000
    assert torch.allclose(model.decode_tokens(tokens), model.reconstruct(video), atol=1e-6)


def test_gradients_reach_the_encoder_through_the_quantiser() -> None:
    model = build(VARIANTS["DV8x16x16"]).requires_grad_(True)
    model.reconstruct(clip(model, 2)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert float(model.encoder.conv_in.space.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("change", "word"), [((4, 0, 0), "frames"), ((0, 1, 0), "multiples"), ((0, 0, 8), "multiples")]
)
def test_sizes_that_do_not_fit_are_refused(change: tuple[int, int, int], word: str) -> None:
    model = build(VARIANTS["DV8x16x16"])
    frames, height, width = (a + b for a, b in zip((9, 32, 32), change, strict=True))
    with pytest.raises(ValueError, match=word):
        model.encode(torch.zeros(1, 3, frames, height, width, dtype=torch.float64))


def test_a_continuous_tokenizer_has_no_tokens() -> None:
    model = build(VARIANTS["CV8x8x8"])
    with pytest.raises(ValueError, match="continuous"):
        model.encode_tokens(clip(model, 1))


def test_released_sizes() -> None:
    counts = {
        "CV8x8x8": 105_653_696,
        "DV8x16x16": 110_898_294,
        "CV4x8x8": 110_208_816,
        "DV4x8x8": 112_619_766,
    }
    for name, count in counts.items():
        with torch.device("meta"):
            model = CosmosTokenizer(PRESETS[name])
        assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "latents"), [("CV8x8x8", (1, 16, 16, 88, 160)), ("DV8x16x16", (1, 6, 16, 44, 80))]
)
def test_full_size(name: str, latents: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = CosmosTokenizer(PRESETS[name])
        video = torch.empty(1, 3, 121, 704, 1280)
    assert model.encode(video).shape == latents
    assert model.reconstruct(video).shape == video.shape


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_tokenizer_is_read_back(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp(f"Cosmos-Tokenize1-{name}-720p")
    model = build(VARIANTS[name]).to(torch.bfloat16)
    for half, tensors in released_tensors(model).items():
        save(tensors, folder / f"{half}.safetensors")
    again = open_tokenizer(folder).read("cpu", torch.bfloat16)
    assert replace(again.config, tap=model.config.tap) == model.config
    for (ours, a), (theirs, b) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert ours == theirs
        assert torch.equal(a, b)


def test_half_a_tokenizer_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("Cosmos-Tokenize1-DV8x16x16-720p")
    model = build(VARIANTS["DV8x16x16"])
    save(released_tensors(model)["encoder"], folder / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.safetensors is missing"):
        open_tokenizer(folder)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        open_tokenizer(tmp_path_factory.mktemp("empty"))
