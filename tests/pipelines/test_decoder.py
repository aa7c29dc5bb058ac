"""Windows, guidance in one batch, and seams of the diffusion decoder, on random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worldline import loading
from worldline.loading import DecoderParts
from worldline.families.diffusion.model import BLOCKS
from worldline.parallel.offload import StreamedPart
from worldline.pipelines.decoder import (
    GUIDANCE,
    NUM_STEPS,
    SIGMA_MIN,
    DecoderSettings,
    cut_windows,
    decode_tokens,
    decode_windows,
    denoise_windows,
)
from worldline.pipelines.step import Step
from worldline.report import Recorder
from worldline.sampling.edm import SIGMA_DATA, sample
from worldline.sampling.schedules import standard_noise
from worldline.sampling.solvers import finish
from worldline.shapes import LatentShape
from worldline.video.convert import signed_to_uint8

from ..conftest import MODEL

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(whole_world: Path) -> DecoderParts:
    files = loading.find_autoregressive(MODEL, whole_world, diffusion_decoder=True)
    loaded = loading.load_autoregressive(files, CPU, torch.float32, Recorder(CPU))
    assert loaded.decoder is not None
    return loaded.decoder


def ids(frames: int) -> Tensor:
    return torch.randint(0, 64, (1, frames, 2, 3), generator=torch.Generator().manual_seed(1))


def settings(sampler: str = "edm_euler", **changes: object) -> DecoderSettings:
    return DecoderSettings(sampler=sampler, **{"num_steps": 2, **changes})  # type: ignore[arg-type]


def run(parts: DecoderParts, tokens: Tensor, chosen: DecoderSettings) -> list[Tensor]:
    assert parts.context is not None
    with parts.transformer.on_device() as model:
        return finish(denoise_windows(model, tokens, parts.context, chosen))


def decoded(parts: DecoderParts, tokens: Tensor, chosen: DecoderSettings) -> list[Step]:
    assert parts.context is not None
    with torch.inference_mode():
        return list(decode_tokens(parts, tokens, parts.context, chosen, 2, Recorder(CPU)))


@pytest.mark.parametrize("sampler", ["edm_euler", "res_2ab"])
def test_one_batch_is_two_branches(parts: DecoderParts, sampler: str) -> None:
    """What is sampled with both branches at once is what each alone gives."""
    tokens, chosen = ids(5), settings(sampler)
    [found] = run(parts, tokens, chosen)
    model, context = parts.transformer.module, parts.context
    assert context is not None
    grid = LatentShape(8, 4, 6)
    [window] = cut_windows(tokens)
    assert window[0, :, 0, 0].tolist() == tokens[0, [0, 1, 2, 3, 4, 3, 2, 1], 0, 0].tolist()
    positions = model.make_positions(grid, 24.0)
    calls = []

    def network(x: Tensor, times: Tensor, conditional: bool) -> Tensor:
        calls.append(conditional)
        encoded = model.encode_context(context * conditional)
        shown = model.encode_ids(window * conditional, grid)
        return model(x, times, encoded, positions, ids=shown)

    noise = standard_noise(chosen.seed, (1, model.config.latent_channels, 8, 4, 6))
    with torch.inference_mode():
        steps = sample(
            network,
            noise,
            sampler=sampler,
            num_steps=2,
            guidance=GUIDANCE,
            sigma_min=SIGMA_MIN,
        )
        expected = finish(steps)
    assert calls[:2] == [True, False]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_the_network_runs_once_an_evaluation(
    parts: DecoderParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    model = parts.transformer.module
    real = model.forward

    def forward(x: Tensor, *args: object, **options: object) -> Tensor:
        batches.append(len(x))
        return real(x, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", forward)
    run(parts, ids(5), DecoderSettings(sampler="edm_euler"))
    assert batches == [2] * NUM_STEPS


def test_streamed_blocks_change_nothing(parts: DecoderParts) -> None:
    """As `--offload_diffusion_decoder` has it on a GPU: two blocks are there at a time."""
    tokens = ids(12)
    expected = run(parts, tokens, settings())
    streamed = replace(parts, transformer=StreamedPart(parts.transformer.module, CPU, BLOCKS))
    for found, wanted in zip(run(streamed, tokens, settings()), expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(run(parts, tokens, settings())[0], expected[0])


def test_steps(parts: DecoderParts) -> None:
    for seam, starts in (("corrected", (0, 2)), ("as_released", (0,))):
        chosen = settings(seam=seam)
        steps = decoded(parts, ids(12), chosen)
        denoised = [(step.done, step.total) for step in steps if step.kind == "denoise"]
        per_window = chosen.count_steps(2) // len(starts)
        expected = [(at + n, 4) for at in starts for n in range(per_window + 1)]
        assert denoised == expected


def test_the_seed_is_the_noise_of_every_window(parts: DecoderParts) -> None:
    """Windows of equal tokens are equal, and another seed gives others."""
    tokens = ids(1).expand(1, 14, 2, 3)
    first, second = run(parts, tokens, settings())
    torch.testing.assert_close(first, second)
    other = run(parts, tokens, settings(seed=1))[0]
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("frames", [1, 2, 5, 8, 9, 14, 15])
def test_any_length(parts: DecoderParts, frames: int) -> None:
    for seam in ("corrected", "as_released"):
        video = frames_of(decoded(parts, ids(frames), settings(num_steps=1, seam=seam)))
        assert video.shape == (1 + 8 * (frames - 1), 32, 48, 3)
        assert video.dtype == np.uint8


def frames_of(steps: list[Step]) -> np.ndarray[Any, Any]:
    return np.concatenate([step.frames for step in steps if step.frames is not None])


def whole(parts: DecoderParts, window: Tensor) -> Tensor:
    tokenizer = parts.tokenizer.module
    with torch.inference_mode():
        return tokenizer.decode(parts.statistics.denormalise(window / SIGMA_DATA))


def test_the_corrected_seam_keeps_time(parts: DecoderParts) -> None:
    """The later window begins where the earlier one ends: 9 of its frames are of 2 latents."""
    latents = run(parts, ids(12), settings())
    tokenizer = parts.tokenizer.module
    joined = torch.cat(list(decode_windows(tokenizer, parts.statistics, latents, 12)), dim=2)
    first, second = (whole(parts, window) for window in latents)
    expected = torch.cat([first, second[:, :, 9:]], dim=2)[:, :, : 1 + 8 * 11]
    torch.testing.assert_close(joined, expected, atol=1e-5, rtol=1e-5)


def test_the_released_seam_jumps(parts: DecoderParts) -> None:
    latents = run(parts, ids(12), settings())
    tokenizer = parts.tokenizer.module
    pieces = decode_windows(tokenizer, parts.statistics, latents, 12, "as_released")
    joined = torch.cat(list(pieces), dim=2)
    first, second = (whole(parts, window).clamp(-1, 1) for window in latents)
    expected = torch.cat([first[:, :, :56], second[:, :, 1:]], dim=2)[:, :, : 1 + 8 * 11]
    torch.testing.assert_close(joined, expected, atol=1e-5, rtol=1e-5)


def test_one_window_has_no_seam_and_streams(parts: DecoderParts) -> None:
    [latents] = run(parts, ids(5), settings())
    steps = decoded(parts, ids(5), settings())
    assert [len(step.frames) for step in steps if step.frames is not None] == [25, 8]
    expected = signed_to_uint8(whole(parts, latents)[0, :, :33])
    assert np.abs(frames_of(steps).astype(int) - expected.astype(int)).max() <= 1
    released = decoded(parts, ids(5), settings(seam="as_released"))
    assert np.array_equal(frames_of(released), frames_of(steps))


def test_wrong_seam() -> None:
    with pytest.raises(ValueError, match="seam is 'x'; it must be one of corrected, as_released"):
        settings(seam="x")
