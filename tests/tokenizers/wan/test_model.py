"""Invariants of the Wan2.1 tokenizer that hold for any weights; a clip in pieces is the whole."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tiny.export import draw_weights
from worldline.nn.pieces import CausalCache, decode_stream, encode_stream
from worldline.tokenizers.wan.model import (
    ResidualBlock,
    WanTokenizer,
    WanTokenizerConfig,
    _statistics,
    attend_in_blocks,
    convolve_flat,
    enlarge,
    norm_silu,
    side_by_side,
)

from ..test_causal import CONFIGS, clip

NEAR = 0.1  # of bf16: norms of a few channels make much of its roundings


def build(config: WanTokenizerConfig) -> WanTokenizer:
    torch.manual_seed(0)
    model = WanTokenizer(config)
    draw_weights(model)
    return model.double().requires_grad_(False).eval()


@pytest.fixture
def released() -> WanTokenizer:
    return build(CONFIGS["Wan"])  # type: ignore[arg-type]


def test_the_first_frame_is_not_doubled_and_not_seen_by_the_step_in_time(
    released: WanTokenizer,
) -> None:
    """What the convolution over time makes of the second latent frame is of that frame alone."""
    step = next(layer for layer in released.decoder.layers if getattr(layer, "time", None))
    width = step.time.weight.shape[1]
    cells = torch.randn(1, 2, 3, 4, width, dtype=torch.float64)
    frames = step(cells, CausalCache(keep=False))
    assert frames.shape[1] == 3
    moved = torch.cat([cells[:, :1] + 1, cells[:, 1:]], dim=1)
    other = step(moved, CausalCache(keep=False))
    assert torch.equal(other[:, 1:], frames[:, 1:])
    assert not torch.equal(other[:, :1], frames[:, :1])
    # first the even frame: with the odd one's weights at zero, only the bias is left of it
    step.time.weight[width:] = 0
    step.time.bias[width:] = 0
    assert (step(cells, CausalCache(keep=False))[:, 2] == step.space.bias).all()


def test_latents_are_normalised(released: WanTokenizer) -> None:
    config = released.config
    plain = build(replace(config, mean=(0.0,) * 16, std=(1.0,) * 16))
    video = clip(released, 2)
    mean, std = (
        torch.tensor(numbers, dtype=torch.float64).view(1, -1, 1, 1, 1)
        for numbers in (config.mean, config.std)
    )
    assert torch.allclose(released.encode(video), (plain.encode(video) - mean) / std)
    latents = released.encode(video)
    assert torch.allclose(released.decode(latents), plain.decode(latents * std + mean))


def test_statistics_are_rounded_as_the_weights_are(released: WanTokenizer) -> None:
    """The reference keeps mean and 1/deviation in bfloat16."""
    mean, scale = _statistics(released.config, torch.bfloat16, torch.device("cpu"))
    assert mean.dtype == scale.dtype == torch.bfloat16
    std = torch.tensor(released.config.std).bfloat16()
    assert torch.equal(scale, (1 / std.float()).bfloat16())


def test_bfloat16_is_near_float32(released: WanTokenizer) -> None:
    video = clip(released, 3).float()
    exact = released.float()
    latents = exact.encode(video)
    frames = exact.decode(latents)
    rough = released.bfloat16()
    for ours, wanted in (
        (rough.encode(video.bfloat16()), latents),
        (rough.decode(latents.bfloat16()), frames),
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - wanted).norm() < NEAR * wanted.norm()


def test_the_norm_is_the_reference_s_for_any_cell() -> None:
    """Zeros, and cells of numbers as small as dark features are, included."""
    gamma = torch.rand(6, dtype=torch.float64) + 0.5
    cells = torch.randn(1, 3, 2, 4, 6, dtype=torch.float64)
    cells[0, 0, 0, 0] = 0
    cells[0, 0, 0, 1] *= 1e-6
    wanted = F.silu(F.normalize(cells, dim=-1, eps=1e-12) * 6**0.5 * gamma)
    room = norm_silu(cells, gamma, None)
    assert not room[:, :2].any()
    assert torch.allclose(room[:, 2:], wanted, atol=1e-9)
    before = torch.randn(1, 2, 2, 4, 6, dtype=torch.float64)
    assert torch.equal(norm_silu(cells, gamma, before)[:, :2], before)


def test_a_flat_convolution_is_the_one_in_three_axes() -> None:
    generator = torch.Generator().manual_seed(3)
    room = torch.randn(2, 6, 4, 5, 3, generator=generator)
    weight, bias = torch.randn(7, 3, 3, 3, 3, generator=generator), torch.randn(7)
    wanted = F.conv3d(room.permute(0, 4, 1, 2, 3), weight, bias, padding=(0, 1, 1))
    found = convolve_flat(side_by_side(room), weight, bias)
    assert torch.allclose(found, wanted.permute(0, 2, 3, 4, 1), atol=1e-5)


def test_a_bias_is_added_before_the_norm() -> None:
    cells, gamma, bias = torch.randn(1, 2, 3, 4, 6), torch.rand(6) + 0.5, torch.randn(6)
    found = norm_silu(cells, gamma, None, bias=bias)
    assert torch.equal(found, norm_silu(cells + bias, gamma, None))


def test_cells_are_repeated_in_squares() -> None:
    cells = torch.randn(2, 3, 4, 5, 6)
    wanted = F.interpolate(cells.permute(0, 4, 1, 2, 3), scale_factor=(1, 2, 2), mode="nearest")
    assert torch.equal(enlarge(cells), wanted.permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize("rows", [1, 3, 10, 1000])
def test_attention_in_blocks(rows: int) -> None:
    q, k, v = torch.randn(2, 10, 3 * 24, generator=torch.Generator().manual_seed(2)).chunk(3, -1)
    wanted = F.scaled_dot_product_attention(q, k, v)
    found = attend_in_blocks(q, k, v, block_bytes=rows * 4 * 2 * 10)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert found.is_contiguous()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("Wan")])
def test_gradients_reach_every_weight(name: str) -> None:
    model = build(CONFIGS[name]).requires_grad_(True)  # type: ignore[arg-type]
    model.reconstruct(clip(model, 3)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_layouts_of_memory_change_nothing(released: WanTokenizer) -> None:
    video = clip(released, 3)
    latents, frames = released.encode(video), released.reconstruct(video)
    turned = released.channels_last()
    assert turned.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    cells = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert torch.allclose(turned.encode(cells), latents, atol=1e-12)
    assert torch.allclose(turned.decode(latents.contiguous()), frames, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mean": (0.0,)}, "do not fit 16"),
        ({"std": (0.0,) * 16}, "above 0"),
        ({"mean": (float("nan"),) * 16}, "finite"),
    ],
)
def test_configurations_that_make_no_sense(change: dict[str, tuple[float]], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        WanTokenizerConfig(**change)


def test_released_size() -> None:
    with torch.device("meta"):
        model = WanTokenizer(WanTokenizerConfig())
        video = torch.empty(1, 3, 93, 704, 1280)
    assert sum(parameter.numel() for parameter in model.parameters()) == 126_892_531
    assert (model.config.temporal, model.config.spatial) == (4, 8)
    assert model.encode(video).shape == (1, 16, 24, 88, 160)
    assert model.reconstruct(video).shape == video.shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("channels", [3, 96, 192, 384])
def test_kernel(channels: int, flat: bool, frames: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(2, frames, 5, 7, channels, generator=generator)
    cells[0, 0, 0, 0] = 0
    gamma, before = torch.rand(channels) + 0.5, torch.randn(2, 2, 5, 7, channels)
    bias = torch.randn(channels, generator=generator)
    for given, added in ((None, None), (before, None), (None, bias), (before, bias)):
        rounded = [None if x is None else x.to(dtype) for x in (cells, gamma, given, added)]
        x, scale, last, more = (None if each is None else each.double() for each in rounded)
        wanted = norm_silu(x, scale, last, bias=more, flat=flat)
        x, scale, last, more = (None if each is None else each.cuda() for each in rounded)
        with torch.no_grad():
            ours = norm_silu(x, scale, last, bias=more, flat=flat)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.cpu().double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (96, 96), (192, 96)])
def test_a_block_on_a_gpu(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Biases are added in passing there; a second piece goes on from the first."""
    generator = torch.Generator().manual_seed(4)
    block = ResidualBlock(inputs, outputs).requires_grad_(False)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    cells = torch.randn(2, 5, 6, 7, inputs, generator=generator).to(dtype)
    block = block.to(dtype)
    wanted = copy.deepcopy(block).double()(cells.double(), CausalCache(keep=False))
    block, cache, found = block.cuda(), CausalCache(), []
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        for piece in cells.cuda().split(3, dim=1):
            found.append(block(piece, cache).cpu().double())
            cache.started = True
    gap = (torch.cat(found, dim=1) - wanted).norm() / wanted.norm()
    assert gap < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.gpu
def test_attention_of_a_wide_head() -> None:
    qkv = torch.randn(2, 700, 3 * 384, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = F.scaled_dot_product_attention(*qkv.double().chunk(3, -1))
    with torch.no_grad():
        found = attend_in_blocks(*qkv.cuda().chunk(3, -1), block_bytes=1 << 20)
    assert (found.cpu().double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [1, 2])
def test_on_a_gpu(released: WanTokenizer, chunk: int) -> None:
    video = clip(released).float()
    exact = released.float()
    latents = exact.encode(video)
    frames = exact.decode(latents)
    model = released.cuda().bfloat16().channels_last()
    model.chunk = chunk
    pieces = list(encode_stream(model, [video.cuda().bfloat16()]))
    ours = torch.cat(pieces, dim=2).cpu().float()
    assert (ours - latents).norm() < NEAR * latents.norm()
    decoded = torch.cat(list(decode_stream(model, latents)), dim=2).cpu().float()
    assert (decoded - frames).norm() < NEAR * frames.norm()
