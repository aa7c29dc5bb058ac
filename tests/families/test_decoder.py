"""Windows, guidance in one batch, and seams of the diffusion decoder, on random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worldline.families.autoregressive.decoder import SIGMA_MIN, decode_windows
from worldline.families.autoregressive.family import Decoding
from worldline.families.autoregressive.request import ARRequest
from worldline.families.diffusion.model import DiT
from worldline.family import Parts
from worldline.parallel.halo import SharedRows
from worldline.parallel.mesh import Axis
from worldline.report import Recorder
from worldline.sampling.edm import SAMPLER_OF, SIGMA_DATA, sample
from worldline.sampling.solvers import finish, standard_noise
from worldline.sampling.tokens import split_windows
from worldline.shapes import LatentShape, VideoShape
from worldline.step import Step
from worldline.tokenizers.cosmos.model import LatentStatistics
from worldline.video.convert import signed_to_uint8

from ..conftest import MODEL
from ..offloading import streamed
from .worlds import CPU, load_named


@pytest.fixture(scope="module")
def parts(whole_world: Path) -> Parts:
    return load_named(MODEL, whole_world)


GRID = LatentShape(8, 4, 6)


def ids(frames: int) -> Tensor:
    return torch.randint(0, 64, (1, frames, 2, 3), generator=torch.Generator().manual_seed(1))


def changed(parts: Parts, **changes: Any) -> Any:
    """The decoder, of 2 steps unless stated."""
    return replace(parts.opened["decoder"], **{"num_steps": 2, **changes})


def noise_of(parts: Parts, seed: int) -> Tensor:
    return standard_noise(seed, (1, parts.opened["decoder"].config.latent_channels, 8, 4, 6))


def run(parts: Parts, tokens: Tensor, seed: int = 0, **changes: Any) -> list[Tensor]:
    decoder = changed(parts, **changes)
    with parts.loaded["decoder"].on_device() as model:
        return [
            finish(decoder.denoise_window(model, window, decoder.context, noise_of(parts, seed)))
            for window in split_windows(tokens, 8, 2)
        ]


def decoded(parts: Parts, tokens: Tensor, seam: str = "corrected", **changes: Any) -> list[Step]:
    video = Decoding(VideoShape(1 + 8 * (tokens.shape[1] - 1), 32, 48), 1, SharedRows(Axis()))
    request = ARRequest.parse({"decoder_seam": seam})
    job = SimpleNamespace(request=request, recorder=Recorder(CPU))
    with torch.inference_mode():
        return list(changed(parts, **changes).decode(parts, video, tokens, job, None))


@pytest.mark.parametrize("generation", ["Predict1", "1.0"])
def test_one_batch_is_two_branches(parts: Parts, generation: str) -> None:
    """What is sampled with both branches at once is what each alone gives."""
    tokens = ids(5)
    [found] = run(parts, tokens, generation=generation)
    model, context = parts.loaded["decoder"].module, parts.opened["decoder"].context
    [window] = split_windows(tokens, 8, 2)
    assert window[0, :, 0, 0].tolist() == tokens[0, [0, 1, 2, 3, 4, 3, 2, 1], 0, 0].tolist()
    positions = model.make_positions(GRID, 24.0)
    calls = []

    def network(x: Tensor, times: Tensor, conditional: bool) -> Tensor:
        calls.append(conditional)
        encoded = model.encode_context(context * conditional)
        known = model.encode_ids(window * conditional, GRID)
        return model(x, times, encoded, positions, ids=known)

    with torch.inference_mode():
        steps = sample(
            network,
            noise_of(parts, 0),
            sampler=SAMPLER_OF[generation],
            num_steps=2,
            guidance=1.8,
            sigma_min=SIGMA_MIN,
        )
        expected = finish(steps)
    assert calls[:2] == [True, False]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_the_network_runs_once_an_evaluation(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    model = parts.loaded["decoder"].module
    real = model.forward

    def forward(x: Tensor, *args: object, **options: object) -> Tensor:
        batches.append(len(x))
        return real(x, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", forward)
    run(parts, ids(5), num_steps=15)
    assert batches == [2] * 15


def test_streamed_blocks_change_nothing(parts: Parts) -> None:
    """As `--offload_diffusion_decoder` has it on a GPU: two blocks are there at a time."""
    tokens = ids(12)
    expected = run(parts, tokens)
    part = streamed(parts.loaded["decoder"].module, DiT.BLOCKS)
    offloaded = replace(parts, loaded={**parts.loaded, "decoder": part})
    for found, wanted in zip(run(offloaded, tokens), expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(run(parts, tokens)[0], expected[0])


def test_steps(parts: Parts) -> None:
    for seam in ("corrected", "as_released"):
        steps = decoded(parts, ids(12), seam)
        denoised = [(step.done, step.total) for step in steps if step.kind == "denoise"]
        assert denoised == [(done, 4) for done in (0, 1, 2, 2, 3, 4)]


def test_the_seed_is_the_noise_of_every_window(parts: Parts) -> None:
    """Windows of equal tokens are equal, and another seed gives others."""
    tokens = ids(1).expand(1, 14, 2, 3)
    first, second = run(parts, tokens)
    torch.testing.assert_close(first, second)
    other = run(parts, tokens, seed=1)[0]
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("frames", [1, 2, 5, 8, 9, 14, 15])
def test_any_length(parts: Parts, frames: int) -> None:
    for seam in ("corrected", "as_released"):
        video = frames_of(decoded(parts, ids(frames), seam, num_steps=1))
        assert video.shape == (1 + 8 * (frames - 1), 32, 48, 3)
        assert video.dtype == np.uint8


def frames_of(steps: list[Step]) -> np.ndarray[Any, Any]:
    return np.concatenate([step.frames for step in steps if step.frames is not None])


def restored(parts: Parts, window: Tensor) -> Tensor:
    statistics: LatentStatistics = parts.opened["decoder_tokenizer"].statistics
    return statistics.denormalise(window / SIGMA_DATA)


def whole(parts: Parts, window: Tensor) -> Any:
    with torch.inference_mode():
        return parts.loaded["decoder_tokenizer"].module.decode(restored(parts, window))


def test_the_corrected_seam_keeps_time(parts: Parts) -> None:
    """The later window begins where the earlier one ends: 9 of its frames are of 2 latents."""
    first, second = (whole(parts, window) for window in run(parts, ids(12)))
    joined = frames_of(decoded(parts, ids(12)))
    expected = signed_to_uint8(torch.cat([first, second[:, :, 9:]], dim=2)[0, :, : 1 + 8 * 11])
    assert np.abs(joined.astype(int) - expected.astype(int)).max() <= 1


def test_the_released_seam_jumps(parts: Parts) -> None:
    latents = run(parts, ids(12))
    tokenizer = parts.loaded["decoder_tokenizer"].module
    pieces = decode_windows(tokenizer, [restored(parts, window) for window in latents], 12, 1)
    joined = torch.cat(list(pieces), dim=2)
    first, second = (whole(parts, window).clamp(-1, 1) for window in latents)
    expected = torch.cat([first[:, :, :56], second[:, :, 1:]], dim=2)[:, :, : 1 + 8 * 11]
    torch.testing.assert_close(joined, expected, atol=1e-5, rtol=1e-5)


def test_one_window_has_no_seam_and_streams(parts: Parts) -> None:
    [latents] = run(parts, ids(5))
    steps = decoded(parts, ids(5))
    assert [len(step.frames) for step in steps if step.frames is not None] == [25, 8]
    expected = signed_to_uint8(whole(parts, latents)[0, :, :33])
    assert np.abs(frames_of(steps).astype(int) - expected.astype(int)).max() <= 1
    released = decoded(parts, ids(5), "as_released")
    assert np.array_equal(frames_of(released), frames_of(steps))
