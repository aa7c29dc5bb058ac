"""Invariants of the video tokenizer that hold for any weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tiny.export import cosmos_tensors, draw_weights
from worldline.errors import CheckpointError
from worldline.tokenizers.cosmos.model import (
    PRESETS,
    CosmosTokenizer,
    CosmosTokenizerConfig,
    FrameNorm,
)
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.weights.checkpoint import save

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
    draw_weights(model)
    return model.double().requires_grad_(False).eval()


def clip(model: CosmosTokenizer, latent_frames: int = 3) -> Tensor:
    config = model.config
    frames = 1 + (latent_frames - 1) * config.temporal
    shape = (1, 3, frames, 2 * config.spatial, 3 * config.spatial)
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("name", ["DV8x16x16", "DV4x8x8"])
def test_tokens_decode_to_the_reconstruction(name: str) -> None:
    model = build(VARIANTS[name])
    video = clip(model)
    tokens = model.encode_tokens(video)
    assert tokens.dtype == torch.int32
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < model.config.vocabulary == 64_000
    assert torch.allclose(model.decode(model.to_codes(tokens)), model.reconstruct(video), atol=1e-6)


def test_gradients_reach_the_encoder_through_the_quantiser() -> None:
    model = build(VARIANTS["DV8x16x16"]).requires_grad_(True)
    model.reconstruct(clip(model, 2)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert float(model.encoder.conv_in.space.weight.grad.abs().sum()) > 0


def test_training_waits_for_no_number() -> None:
    """A step can be recorded as a CUDA graph: numbers of fake tensors cannot be asked for."""
    model = build(VARIANTS["DV8x16x16"]).requires_grad_(True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        video = mode.from_tensor(clip(model, 2))
        model.reconstruct(video).square().mean().backward()
        with torch.no_grad(), pytest.raises(DataDependentOutputException):
            model.reconstruct(video)


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
    for half, tensors in cosmos_tensors(model).items():
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
    save(cosmos_tensors(model)["encoder"], folder / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.safetensors is missing"):
        open_tokenizer(folder)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        open_tokenizer(tmp_path_factory.mktemp("empty"))


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
    expected = expected.unflatten(0, (2, 3)).movedim(2, -1)
    x = x.movedim(1, -1).contiguous().to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.04
    for y in (norm._fused(x), norm._by_sums(x)):
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert torch.allclose(y.float(), expected, atol=tolerance)
