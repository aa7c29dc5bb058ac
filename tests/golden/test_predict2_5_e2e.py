"""Predict2.5 from an image or a clip to pixels: text, image and video to world."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cases import Case, cases
from flow_networks import settings_of
from torch import Tensor

from worldline.errors import InputError
from worldline.families.predict2_5 import family
from worldline.families.predict2_5.request import FlowRequest
from worldline.families.predict2_5.weights import open_network
from worldline.family import Compute, Opened, Parts
from worldline.locate import locate
from worldline.opening import load_parts, open_world
from worldline.report import Recorder
from worldline.sampling import flow
from worldline.sampling.solvers import Steps, standard_noise
from worldline.shapes import latent_frames_of
from worldline.video.convert import covering_frames
from worldline.video.read import Clip, read_image, read_video

CASES = cases("p25_e2e_tiny")
CPU = torch.device("cpu")


def scenarios() -> list[Any]:
    """List (case, scenario) of every scenario that the cases hold."""
    found = []
    for case in CASES:
        if not isinstance(case, Case):  # what stands for a case that is not here
            found.append(pytest.param(None, "", marks=case.marks, id=str(case.id)))
            continue
        found += [pytest.param(case, name, id=f"{case}-{name}") for name in case.spec["scenarios"]]
    return found


@cache
def opened_of(case: Case) -> Opened:
    """Opened files of a case, with the settings of the network that none of its tensors implies."""
    file = case.path / case.spec["checkpoint"]
    tokenizer = case.path / case.spec["vae_checkpoint"]
    opened = open_world(locate(file, case.path), {"tokenizer_dir": tokenizer})
    network = family.FlowNetwork(**vars(open_network(file, settings_of(case))))
    return opened.with_part("transformer", network)


@cache
def parts_of(case: Case) -> Parts:
    plain = Compute(CPU, torch.float32, torch.float32, fused=False)
    return load_parts(opened_of(case), plain, Recorder(CPU))


def parts_for(case: Case, scenario: str) -> Parts:
    """Parts of a case with the schedule of one of its scenarios."""
    parts, stated = parts_of(case), case.spec["scenarios"][scenario]
    timestep = stated["conditional_frame_timestep"]
    network = replace(
        parts.opened["transformer"],
        schedule="karras" if stated["karras"] else "shifted",
        known_timestep=None if timestep < 0 else timestep,
    )
    return replace(parts, opened=parts.opened.with_part("transformer", network))


def request_for(case: Case, scenario: str) -> FlowRequest:
    stated = case.spec["scenarios"][scenario]
    height, width = case.spec["resolution"]
    latents = stated["num_conditional_frames"]
    temporal = opened_of(case)["tokenizer"].config.temporal
    negative = "negative_prompt_embeds"  # none where no scenario is guided
    return FlowRequest(
        prompt_embeddings=case.tensor("prompt_embeds"),
        negative_prompt_embeddings=case.tensor(negative) if negative in case else None,
        num_steps=stated["num_steps"],
        guidance=stated["guidance"],
        num_video_frames=case.spec["num_frames"],
        height=height,
        width=width,
        seed=stated["seed"],
        num_input_frames=1 + (latents - 1) * temporal if latents else 0,
    )


def clip_for(case: Case, scenario: str) -> Clip | None:
    """The input as the reference's reader gives it."""
    name = case.spec["scenarios"][scenario]["input"]
    if name is None:
        return None
    if name.endswith(".mp4"):
        return Clip(case.tensor("mp4_frames").numpy(), 0.0)
    return read_image(case.path / name)


def whole_input(case: Case, scenario: str) -> Tensor:
    """The input as the reference fills it: behind an image black, else the last frame."""
    request, clip = request_for(case, scenario), clip_for(case, scenario)
    video = torch.zeros(
        (1, 3, request.num_video_frames, request.height, request.width), dtype=torch.uint8
    )
    if clip is None:
        return video
    given = covering_frames(clip, request.num_input_frames, request.height, request.width)
    video[:, :, : request.num_input_frames] = given
    if len(clip.frames) > 1:
        video[:, :, request.num_input_frames :] = given[:, :, -1:]
    return video


@contextmanager
def watched() -> Iterator[dict[str, Tensor]]:
    """Keep the noise, the first velocity and the latents of what is sampled meanwhile."""
    seen: dict[str, Tensor] = {}
    unipc = flow.unipc

    def solve(velocity: flow.Velocity, x: Tensor, sigmas: Tensor) -> Steps:
        def first(state: Tensor, index: int) -> Tensor:
            found = velocity(state, index)
            seen.setdefault("first_velocity", found)
            return found

        seen["noise"] = x
        seen["latents"] = yield from unipc(first, x, sigmas)
        return seen["latents"]

    with mock.patch.object(family, "unipc", solve):
        yield seen


@pytest.mark.parametrize(("case", "scenario"), scenarios())
def test_request(case: Case, scenario: str) -> None:
    parts, request = parts_for(case, scenario), request_for(case, scenario)
    clip, recorder = clip_for(case, scenario), Recorder(CPU)
    if request.num_input_frames == request.num_video_frames:  # the reference makes even this
        with pytest.raises(InputError, match="more than num_input_frames"):
            family.check(parts.opened, request)
    with watched() as seen:
        steps = list(family.generate(parts, clip, request, recorder))
    frames = steps[-1].frames
    assert frames is not None
    pieces = [step.frames for step in steps if step.kind == "decode" and step.frames is not None]
    assert np.array_equal(np.concatenate(pieces), frames)
    seen["video_u8"] = torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
    for name, found in seen.items():
        if f"{scenario}.{name}" in case:
            case.compare(f"{scenario}.{name}", found)
    if f"{scenario}.video" in case:
        video = parts.tokenizer.module.decode(case.tensor(f"{scenario}.latents"))
        case.compare(f"{scenario}.video", video)


@pytest.mark.parametrize(("case", "scenario"), scenarios())
def test_input(case: Case, scenario: str) -> None:
    """What the reference encodes, and that the given frames alone give the same latents."""
    video = whole_input(case, scenario)
    tokenizer = parts_of(case).tokenizer.module
    latents = tokenizer.encode(video.float() / 127.5 - 1)
    for name, ours in (("vid_input", video), ("gt_latents", latents)):
        if f"{scenario}.{name}" in case:
            case.compare(f"{scenario}.{name}", ours)
    request, clip = request_for(case, scenario), clip_for(case, scenario)
    if clip is not None:
        given = family.encode_frames(parts_of(case), clip, request)
        count = latent_frames_of(request.num_input_frames, tokenizer.config.temporal)
        assert given.shape[2] == count
        assert torch.allclose(given, latents[:, :, :count], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_noise_is_drawn_from_the_seed(case: Case) -> None:
    for name in case.names("*.noise"):
        stated = case.spec["scenarios"][name.removesuffix(".noise")]
        case.compare(name, standard_noise(stated["seed"], case.tensor(name).shape))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_clips_are_read_as_by_the_reference(case: Case) -> None:
    """Another FFmpeg may differ by two levels."""
    stored = case.tensor("mp4_frames")
    names = {stated["input"] for stated in case.spec["scenarios"].values()}
    for name in sorted(name for name in names if name and name.endswith(".mp4")):
        ours = torch.from_numpy(read_video(case.path / name).frames)
        assert ours.shape == stored.shape
        assert (ours.int() - stored.int()).abs().max() <= 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
