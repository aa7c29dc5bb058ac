"""The diffusion decoder of the autoregressive models against the reference."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cases import Case, cases
from networks import collected
from torch import Tensor

from tiny.export import draw_weights
from worldline.families.autoregressive import decoder
from worldline.families.autoregressive.decoder import DecoderNetwork, decode_windows
from worldline.families.autoregressive.request import Seam
from worldline.families.diffusion.model import DiT
from worldline.families.diffusion.weights import open_network
from worldline.sampling.edm import SIGMA_DATA, SIGMA_MAX, make_sigmas, precondition, sample
from worldline.sampling.solvers import finish
from worldline.sampling.tokens import blend_windows, split_windows
from worldline.shapes import LatentShape, latent_frames_of
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.weights import key_map, read_statistics
from worldline.weights.checkpoint import open_checkpoint
from worldline.weights.stream import load_into

CASES = cases("ar_diffusion_decoder_tiny")


@cache
def network(case: Case) -> DiT:
    stated = case.spec["network"]
    ratio = [stated[f"rope_{axis}_extrapolation_ratio"] for axis in "thw"]
    found = open_network(case.path / case.spec["folder"], {"rope_ratio": ratio})
    assert not found.config.learned_positions
    assert found.config.vocabulary == stated["diffusion_decoder_token_condition_voc_size"]
    with torch.device("meta"):
        model = DiT(found.config)
    load_into(model, found.source, found.keys, device="cpu", dtype=torch.float32)
    return model.requires_grad_(False).eval()


@cache
def tokenizer(case: Case) -> CosmosTokenizer:
    """The half that decodes; the case holds no other."""
    source = open_checkpoint(pixels_folder(case) / "decoder.jit")
    stated = case.spec["cv_tokenizer"]["config"]
    config = CosmosTokenizerConfig(
        channels=stated["channels"],
        level_channels=tuple(stated["channels"] * n for n in stated["channels_mult"]),
        num_blocks=stated["num_res_blocks"],
        patch=stated["patch_size"],
        spatial=stated["spatial_compression"],
        temporal=stated["temporal_compression"],
        z_channels=stated["z_channels"],
        latent_channels=stated["latent_channels"],
        tap=float(source.read("decoder.unpatcher3d.wavelets")[0]),
    )
    model = CosmosTokenizer(config)
    draw_weights(model)
    halves = ["encoder.*", "quant_conv.*"]
    load_into(model, source, key_map(config), device="cpu", dtype=None, optional=halves)
    return model.float().requires_grad_(False).eval()


def pixels_folder(case: Case) -> Path:
    return case.path / case.spec["cv_tokenizer"]["folder"]


def window_frames(case: Case) -> int:
    return latent_frames_of(case.spec["sampling"]["window_frames"], tokenizer(case).config.temporal)


class Run:
    """The network as samplers call it; keeps what it saw and gave."""

    def __init__(self, case: Case, ids: Tensor, grid: LatentShape) -> None:
        self.model = network(case)
        aux = open_checkpoint(case.path / case.spec["folder"] / "aux_vars.pt")
        text = aux.read("context").float()
        self.positions = self.model.make_positions(grid, case.spec["sampling"]["fps"])
        # without the prompt there is neither text nor a token: all rows zero, all ids 0
        self.branches = {
            conditional: (
                self.model.encode_context(text * conditional),
                self.model.encode_ids(ids * conditional, grid),
            )
            for conditional in (True, False)
        }
        self.calls: list[tuple[Tensor, Tensor, bool, Tensor]] = []

    def __call__(self, x: Tensor, times: Tensor, conditional: bool) -> Tensor:
        context, ids = self.branches[conditional]
        y = self.model(x, times, context, self.positions, ids=ids)
        self.calls.append((x, times, conditional, y))
        return y


def sampled(case: Case, run: Run, start: Tensor, sampler: str, steps: int) -> dict[str, Any]:
    settings = case.spec["sampling"]
    largest = settings["sigma_max"]
    # what the case holds is scaled already
    scale = (largest**2 + 1) ** 0.5 if sampler == "edm_euler" else largest
    sampling = sample(
        run,
        start / scale,
        sampler=sampler,
        num_steps=steps,
        guidance=settings["guidance"],
        sigma_min=settings["sigma_min"],
        sigma_max=largest,
    )
    made, latent = collected(sampling)
    states = torch.cat([step.x for step in made])
    return {"latent": latent, "states": states, "estimates": [step.denoised for step in made]}


def decoded(case: Case, latents: Tensor) -> Tensor:
    model = tokenizer(case)
    statistics = read_statistics(pixels_folder(case), model.config.latent_channels)
    assert statistics is not None
    scaled = latents / case.spec["sampling"]["sigma_data"]
    return model.decode(statistics.denormalise(scaled))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_predict1(case: Case) -> None:
    settings = case.spec["sampling"]
    tokens = case.tensor("tokens")[None]
    [ids] = split_windows(tokens, window_frames(case), settings["overlap"])
    case.compare("predict1.token_chunk", ids[None])
    sigmas = make_sigmas("edm_euler", settings["num_steps"], sigma_min=settings["sigma_min"])
    case.compare("predict1.sigmas", sigmas)
    times = torch.tensor([precondition(float(sigma)).noise for sigma in sigmas[:-1]])
    case.compare("predict1.timesteps", times)
    start = case.tensor("predict1.x_T")
    run = Run(case, ids, LatentShape(*start.shape[2:]))
    result = sampled(case, run, start, "edm_euler", settings["num_steps"])
    for name, call in (("cond", run.calls[0]), ("uncond", run.calls[1])):
        x, level, conditional, y = call
        assert conditional == (name == "cond")
        case.compare(f"predict1.step0.net_out_{name}", y)
        inputs = torch.cat([x, run.branches[conditional][1], torch.zeros_like(x[:, :1])], dim=1)
        case.compare(f"predict1.step0.x_embedder_in_{name}", inputs)
    case.compare("predict1.step0.net_in", run.calls[0][0])
    case.compare("predict1.step0.c_noise", level)
    case.compare("predict1.step0.x0", result["estimates"][0])
    last = [call for call in run.calls if call[2]][-1]
    case.compare("predict1.last.net_out_cond", last[3])
    case.compare("predict1.x_steps", result["states"])
    case.compare("predict1.latent", result["latent"])
    frames = decoded(case, result["latent"]).clamp(-1, 1)
    wanted = 1 + (tokens.shape[1] - 1) * tokenizer(case).config.temporal
    case.compare("predict1.video", (1 + frames[0, :, :wanted]) / 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cosmos_1(case: Case) -> None:
    settings = case.spec["sampling"]
    [ids] = split_windows(case.tensor("tokens")[None], window_frames(case), settings["overlap"])
    sampler, steps = f"res_{settings['v1_solver']}", settings["num_steps"]
    sigmas = make_sigmas(sampler, steps, sigma_min=settings["sigma_min"])
    case.compare("v1.sigmas", sigmas)
    start = case.tensor("v1.x_T")
    run = Run(case, ids, LatentShape(*start.shape[2:]))
    result = sampled(case, run, start, sampler, steps)
    case.compare("v1.x_steps", result["states"])
    case.compare("v1.latent", result["latent"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_long_clips_as_shipped(case: Case) -> None:
    """Two windows, blended over pixel frames although they overlap by latent frames."""
    if not case.names("long.*"):
        return
    settings = case.spec["sampling"]
    tokens, overlap = case.tensor("long.tokens")[None], settings["overlap"]
    windows = split_windows(tokens, window_frames(case), overlap)
    case.compare("long.token_chunks", torch.stack(windows))
    starts = case.tensor("long.x_T")
    latents = []
    for ids, start in zip(windows, starts.split(1), strict=True):
        run = Run(case, ids, LatentShape(*start.shape[2:]))
        steps = settings["long_num_steps"]
        latents.append(sampled(case, run, start, "edm_euler", steps)["latent"])
    case.compare("long.latents", torch.cat(latents))
    pixels = [decoded(case, latent) for latent in latents]
    tail = case.tensor("long.chunk0_tail").shape[1]
    head = case.tensor("long.chunk1_head").shape[1]
    case.compare("long.chunk0_tail", pixels[0][0, :, -tail:])
    case.compare("long.chunk1_head", pixels[1][0, :, :head])
    blended = blend_windows([part.clamp(-1, 1) for part in pixels], overlap)
    wanted = 1 + (tokens.shape[1] - 1) * tokenizer(case).config.temporal
    video = (1 + blended[0, :, :wanted]) / 2
    case.compare("long.frame_means", video.mean((2, 3)))
    around, size = case.tensor("long.video_around_seam").shape[1] // 2, settings["window_frames"]
    case.compare("long.video_around_seam", video[:, size - around : size + around])


def skip_unless_released(case: Case) -> None:
    """The pipeline has the released numbers as constants."""
    stated = case.spec["sampling"]
    window = latent_frames_of(stated["window_frames"], tokenizer(case).config.temporal)
    found = (window, stated["overlap"], stated["fps"], stated["sigma_min"])
    ours = (decoder.DECODER_WINDOW, decoder.OVERLAP, decoder.FPS, decoder.SIGMA_MIN)
    if found != ours or stated["sigma_max"] != SIGMA_MAX:
        pytest.skip(f"window, overlap, fps and sigma_min are {found}, not {ours}")


def pipeline_latents(
    case: Case, tokens: Tensor, starts: Tensor, sampler: str, steps: int
) -> list[Tensor]:
    stated = case.spec["sampling"]
    scale = (SIGMA_MAX**2 + 1) ** 0.5 if sampler == "edm_euler" else SIGMA_MAX
    aux = open_checkpoint(case.path / case.spec["folder"] / "aux_vars.pt")
    model, context = network(case), aux.read("context")
    run = DecoderNetwork(DiT, model.config, num_steps=steps, guidance=stated["guidance"])
    windows = split_windows(tokens, decoder.DECODER_WINDOW, decoder.OVERLAP)
    run = replace(run, generation="Predict1" if sampler == "edm_euler" else "1.0")
    return [
        finish(run.denoise_window(model, ids, context, start / scale))
        for ids, start in zip(windows, starts.split(1), strict=True)
    ]


def pipeline_video(case: Case, latents: list[Tensor], frames: int, seam: Seam) -> Tensor:
    model = tokenizer(case)
    statistics = read_statistics(pixels_folder(case), model.config.latent_channels)
    assert statistics is not None
    latents = [statistics.denormalise(window / SIGMA_DATA) for window in latents]
    groups = [latents] if seam == "as_released" else [[window] for window in latents]
    pieces = []
    for number, group in enumerate(groups):
        video = torch.cat(list(decode_windows(model, group, frames, number)), dim=2)
        pieces.append(video[:, :, 9 if number else 0 :])  # without those of the window before
    return (1 + torch.cat(pieces, dim=2)[0].clamp(-1, 1)) / 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_to_video_through_the_pipeline(case: Case) -> None:
    """Both branches in one batch, and no more than the wanted frames decoded."""
    skip_unless_released(case)
    tokens, stated = case.tensor("tokens")[None], case.spec["sampling"]
    start = case.tensor("predict1.x_T")
    latents = pipeline_latents(case, tokens, start, "edm_euler", stated["num_steps"])
    case.compare("predict1.latent", latents[0])
    for seam in get_args(Seam):
        case.compare("predict1.video", pipeline_video(case, latents, tokens.shape[1], seam))
    sampler = f"res_{stated['v1_solver']}"
    start = case.tensor("v1.x_T")
    latents = pipeline_latents(case, tokens, start, sampler, stated["num_steps"])
    case.compare("v1.latent", latents[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_long_clips_through_the_pipeline(case: Case) -> None:
    if not case.names("long.*"):
        return
    skip_unless_released(case)
    tokens, stated = case.tensor("long.tokens")[None], case.spec["sampling"]
    starts = case.tensor("long.x_T")
    latents = pipeline_latents(case, tokens, starts, "edm_euler", stated["long_num_steps"])
    case.compare("long.latents", torch.cat(latents))
    video = pipeline_video(case, latents, tokens.shape[1], "as_released")
    case.compare("long.frame_means", video.mean((2, 3)))
    around, size = case.tensor("long.video_around_seam").shape[1] // 2, stated["window_frames"]
    case.compare("long.video_around_seam", video[:, size - around : size + around])
    # corrected, the frames before the seam are the same, and those behind it another window's
    corrected = pipeline_video(case, latents, tokens.shape[1], "corrected")
    assert corrected.shape == video.shape
    torch.testing.assert_close(corrected[:, : size - 1], video[:, : size - 1])
    temporal = tokenizer(case).config.temporal
    shared = 1 + (stated["overlap"] - 1) * temporal
    jump = shared - stated["overlap"]  # frames that come twice
    # as far as the second window alone goes: the clip may end there, or fade into a third
    count = min(corrected.shape[1] - size - jump, size - shared - 1)
    torch.testing.assert_close(
        corrected[:, size : size + count], video[:, size + jump : size + jump + count]
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cutting_and_blending(case: Case) -> None:
    for name in case.names("split*.w*_o*"):
        stem, numbers = name.split(".")
        size, overlap = (int(part[1:]) for part in numbers.split("_"))
        frames = case.tensor(f"{stem}.in")  # (B, 1, T, h, w)
        windows = split_windows(frames[:, 0], size, overlap)
        case.compare(name, torch.stack([window[:, None] for window in windows]))
    for name in case.names("blend.D*"):
        windows = list(case.tensor("blend.in"))
        case.compare(name, blend_windows(windows, int(name.removeprefix("blend.D"))))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
