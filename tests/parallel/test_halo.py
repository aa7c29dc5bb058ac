"""Tokenizers whose rows processes share give what one process gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ranks import Together
from tests.tokenizers.test_causal import CONFIGS
from tiny.export import draw_weights
from worldline.errors import NonFiniteError
from worldline.nn.pieces import CausalCache, CausalTokenizer, decode_stream, encode_stream
from worldline.parallel import halo
from worldline.parallel.halo import SharedRows, SplitRows, share_rows
from worldline.parallel.mesh import Axis, Layout, Mesh, plan_mesh
from worldline.shapes import VideoShape
from worldline.tokenizers.cosmos.model import CosmosTokenizer, FrameNorm
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig
from worldline.video.convert import signed_to_uint8

NEAR = {"atol": 3e-5, "rtol": 1e-4}


def build(name: str) -> CausalTokenizer:
    torch.manual_seed(5)
    config: Any = CONFIGS[name]
    model = (WanTokenizer if isinstance(config, WanTokenizerConfig) else CosmosTokenizer)(config)
    draw_weights(model)
    return model.requires_grad_(False).eval()


def picture(model: CausalTokenizer, rows: int, latent_frames: int, batch: int = 1) -> Tensor:
    config = model.config
    sides = 1 + (latent_frames - 1) * config.temporal, rows * config.spatial, 3 * config.spatial
    return torch.rand(batch, 3, *sides, generator=torch.Generator().manual_seed(6)) * 2 - 1


def shared(axis: Axis, rows: int) -> SharedRows:
    """Rows of a picture that is split though it is small."""
    chosen, halo.LEAST_PIXELS = halo.LEAST_PIXELS, 0
    try:
        return share_rows(mesh(axis), VideoShape(1, rows, 1), 1)
    finally:
        halo.LEAST_PIXELS = chosen


def mesh(axis: Axis) -> Mesh:
    return Mesh(Layout(cp=axis.count), video=axis)


@torch.inference_mode()
def code(axis: Axis, model: CausalTokenizer, video: Tensor, chunk: int) -> dict[str, Any]:
    """Latents and video in pieces and at once, of the rows of this process."""
    rows = shared(axis, video.shape[3] // model.config.spatial)
    model.chunk = chunk
    latents = torch.cat(list(encode_stream(model, video.split(5, dim=2), rows)), dim=2)
    whole = model.encode(video, CausalCache(rows, keep=False))
    codes = torch.nn.functional.normalize(latents, dim=1)
    pieces = list(decode_stream(model, codes, rows))
    frames = [signed_to_uint8(piece[0], rows.join) for piece in pieces]
    return {
        "latents": latents,
        "at once": whole,
        "video": rows.gather(torch.cat(pieces, dim=2), 3),
        "frames": torch.from_numpy(np.concatenate(frames)),
        "heights": getattr(rows, "heights", ()),
    }


def compare(found: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    for rank, result in enumerate(found):
        assert len(result["heights"]) == len(found)
        for name in ("latents", "at once", "video"):
            assert torch.allclose(result[name], wanted[name], **NEAR), f"{name} in rank {rank}"
    frames = found[0]["frames"].int() - wanted["frames"].int()
    assert frames.abs().max() <= 1
    assert not any(result["frames"].any() for result in found[1:])


CASES = [
    ("Wan", 5, 3, 1),
    ("Wan", 2, 2, 1),  # one row each
    ("Wan, wide and shallow", 7, 5, 3),
    ("CV8x8x8", 5, 3, 2),
    ("CV4x8x8", 4, 1, 4),
    ("DV8x16x16", 5, 2, 1),
    ("DV4x8x8", 7, 3, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows", "frames", "chunk"), CASES)
def test_two_processes_give_what_one_gives(
    two: Together, name: str, rows: int, frames: int, chunk: int
) -> None:
    model = build(name)
    video = picture(model, rows, frames)
    compare(two(code, model, video, chunk), code(Axis(), model, video, chunk))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("Wan, other latents", 8), ("CV8x8x8", 3)])
def test_three_processes_give_what_one_gives(three: Together, name: str, rows: int) -> None:
    """The one between has two neighbours; clips of a batch do not mix."""
    model = build(name)
    video = picture(model, rows, 3, batch=2)
    found = three(code, model, video, 2)
    assert found[1]["heights"] == ((3, 3, 2) if rows == 8 else (1, 1, 1))
    compare(found, code(Axis(), model, video, 2))


@torch.inference_mode()
def encode(axis: Axis, model: CausalTokenizer, video: Tensor) -> Tensor:
    """Latents, or token ids."""
    cache = CausalCache(shared(axis, video.shape[3] // model.config.spatial), keep=False)
    assert cache.rows.split == (axis.count > 1)
    if isinstance(model, CosmosTokenizer) and model.config.levels:
        return model.encode_tokens(video, cache)
    return model.encode(video, cache)


@torch.inference_mode()
def decode(axis: Axis, model: CausalTokenizer, stored: Tensor) -> Tensor:
    """Video of latents, or of token ids."""
    rows = shared(axis, stored.shape[-2])
    if isinstance(model, CosmosTokenizer) and model.config.levels:
        stored = model.to_codes(stored)
    return rows.gather(model.decode(stored, CausalCache(rows, keep=False)), 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DV8x16x16", "DV4x8x8"])
def test_token_ids_are_equal(two: Together, name: str) -> None:
    model: Any = build(name)
    video = picture(model, 5, 3)
    for found in two(encode, model, video):
        assert torch.equal(found, encode(Axis(), model, video))


def norm(axis: Axis, x: Tensor) -> Tensor:
    rows = shared(axis, x.shape[2])
    layer = FrameNorm(x.shape[-1]).requires_grad_(False)
    layer.weight.fill_(1)
    layer.bias.fill_(0)
    return rows.gather(layer(rows.part(x, 2), rows), 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_a_frame_far_from_zero(two: Together, dtype: torch.dtype) -> None:
    """Deviations a thousandth of the mean, and rows that differ from process to process."""
    x = 1000 + torch.randn(1, 2, 5, 3, 8) + torch.arange(5.0).view(5, 1, 1)
    x = (x if dtype == torch.float32 else x - 999).to(dtype)
    wanted = norm(Axis(), x.float())
    near = 2e-3 if dtype == torch.float32 else 2e-2
    for found in two(norm, x):
        assert found.dtype == dtype
        assert torch.allclose(found.float(), wanted, atol=near)


def fail(axis: Axis, video: Tensor) -> str:
    rows = shared(axis, video.shape[2])
    with pytest.raises(NonFiniteError) as raised:
        signed_to_uint8(rows.part(video, 2), rows.join)
    return str(raised.value)


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_is_refused_in_all(two: Together) -> None:
    video = torch.zeros(3, 1, 4, 2)
    video[0, 0, 3, 1] = torch.inf
    first, second = two(fail, video)
    assert first == second


def counted(axis: Axis) -> tuple[int, list[int], int]:
    """Calls that one process makes of what all ask for; what it yields; the result."""
    calls, rows = [], share_rows(mesh(axis), VideoShape(9, 192, 320), 8)

    def steps() -> Any:
        calls.append(1)
        yield 7
        return axis.rank

    def drain() -> Any:
        result = yield from rows.computing.steps_once(steps())
        calls.append(result)

    yielded = list(drain())
    result = rows.computing.once(lambda: calls.append(1) or len(calls))  # type: ignore[func-returns-value]
    return len(calls), yielded, result


@pytest.mark.slow
def test_few_rows_are_computed_once(two: Together) -> None:
    assert two(counted) == [(3, [7], 3), (1, [], 3)]


@pytest.mark.parametrize(
    ("count", "size", "cell", "heights"),
    [
        (1, (704, 1280), 8, None),
        (2, (720, 1280), 16, (23, 22)),
        (8, (704, 1280), 8, (11,) * 8),
        (8, (640, 1024), 16, (5,) * 8),
        (8, (112, 4096), 16, None),  # one would have no row
        (2, (128, 192), 8, None),  # too few pixels to gain by it
    ],
)
def test_rows_of_each_process(
    count: int, size: tuple[int, int], cell: int, heights: tuple[int, ...] | None
) -> None:
    """A plan for processes that have not met counts as they do once they have."""
    video = VideoShape(9, *size)
    rows = share_rows(plan_mesh(Layout(dp=3, cp=count)), video, cell)
    assert rows == share_rows(mesh(Axis(count=count)), video, cell)
    assert rows.split == (heights is not None)
    if isinstance(rows, SplitRows):
        assert rows.heights == heights
        assert rows.largest(sum(heights)) == max(heights)
        x = torch.arange(2 * sum(heights))
        parts = [replace(rows, axis=Axis(rank, count)).part(x, 0) for rank in range(count)]
        assert torch.equal(torch.cat(parts), x)
    else:
        assert rows.largest(12_345) == 12_345
