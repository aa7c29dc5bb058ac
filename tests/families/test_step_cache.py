"""The step cache in every denoiser: equal bits where all steps run, and those that it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import MODEL
from tests.families import worlds
from tests.families.worlds import CPU, PROMPT
from tests.tiny_diffusion import TEXT2WORLD, VIDEO2WORLD
from tests.tiny_predict2_5 import PRE, SMALL
from worldline.errors import InputError
from worldline.families.autoregressive.family import Decoding
from worldline.families.autoregressive.request import ARRequest
from worldline.families.diffusion.request import DiffusionRequest
from worldline.families.predict2_5.request import FlowRequest
from worldline.family import Parts
from worldline.parallel.halo import SharedRows
from worldline.parallel.mesh import Axis
from worldline.report import Recorder
from worldline.request import Request
from worldline.shapes import VideoShape

Made = tuple[np.ndarray, int, Any]  # frames, calls of the last block, the report's entry
DIFFUSION = {"num_video_frames": 17, "height": 32, "width": 48, "num_steps": 6, "guidance": 2.0}
KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {  # model, evaluations, request
    "text2world": (TEXT2WORLD, 6, {**DIFFUSION, "guidance": 0}),
    "video2world": (VIDEO2WORLD, 7, {**DIFFUSION, "num_input_frames": 9, "sampler": "res_2mid"}),
    "predict2.5": (PRE.name, 6, {**SMALL, "num_steps": 6, "num_input_frames": 5}),
}
Make = Callable[..., Made]


@pytest.fixture(scope="module", params=[*KINDS, "decoder"])
def make(
    request: pytest.FixtureRequest, tiny_diffusion: Path, tiny_predict2_5: Path, whole_world: Path
) -> tuple[int, int, Make]:
    """Evaluations, the network's calls in each, and a maker of videos by one model."""
    if request.param == "decoder":
        parts = worlds.load_named(MODEL, whole_world)
        return 6, 1, lambda **stated: count(parts, "decoder", lambda r: decoded(parts, r, stated))
    model, evaluations, options = KINDS[request.param]
    parts = worlds.load_named(model, tiny_predict2_5 if model == PRE.name else tiny_diffusion)
    clip = worlds.clip() if "num_input_frames" in options else None

    def run(recorder: Recorder, stated: dict[str, Any]) -> Any:
        steps = worlds.run(parts, clip, recorder, prompt=PROMPT, **options, **stated)
        return worlds.frames_of(steps)

    branches = 1 + bool(options["guidance"])
    return (
        evaluations,
        branches,
        lambda **stated: count(parts, "transformer", lambda r: run(r, stated)),
    )


def decoded(parts: Parts, recorder: Recorder, stated: dict[str, Any]) -> Any:
    """Frames of 12 latent frames, which the decoder makes in two windows."""
    network = replace(parts.opened["decoder"], num_steps=6)
    rule = network.complete_cache(ARRequest.parse(stated).step_cache)
    video = Decoding(VideoShape(89, 32, 48), 1, SharedRows(Axis()))
    tokens = torch.arange(12 * 6).view(1, 12, 2, 3) * 5 % 64
    job = SimpleNamespace(request=ARRequest(step_cache=rule), recorder=recorder)
    with torch.inference_mode():
        list(network.decode(parts, video, tokens, job, None))
    return video.frames


def count(parts: Parts, part: str, run: Callable[[Recorder], Any]) -> Made:
    recorder, calls = Recorder(CPU), list[int]()
    block = parts.loaded[part].module.blocks[-1]
    with block.register_forward_hook(lambda *_: calls.append(1)):
        frames = run(recorder)
    return frames, len(calls), recorder.facts.get("step_cache")


def test_which_steps_run(make: tuple[int, int, Make]) -> None:
    evaluations, branches, made = make
    plain, calls, entry = made()
    runs = calls // branches // evaluations  # of the sampler
    assert entry is None
    last = evaluations - 1
    for rule, steps in (
        (0, [*range(evaluations)]),
        (f"steps:0-{last}", [*range(evaluations)]),
        (f"steps:0,2-3,{last}", [0, 2, 3, last]),
        (1e9, [0, last]),
    ):
        frames, ran, entry = made(step_cache=rule)
        assert ran == runs * branches * len(steps)
        assert (entry["steps"], entry["computed"]) == (runs * evaluations, runs * len(steps))
        assert len(entry["patterns"]) == runs
        assert np.array_equal(frames, plain) == (len(steps) == evaluations)
        again, _, _ = made(step_cache=entry["patterns"][0])
        assert np.array_equal(frames, again)


def test_a_threshold_skips_more_the_higher_it_is(make: tuple[int, int, Make]) -> None:
    counts = [make[2](step_cache=threshold)[2]["computed"] for threshold in (0, 0.2, 0.5, 1e9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert make[2](step_cache="auto")[2]["computed"] <= counts[0]


def test_each_chunk_begins_anew(tiny_predict2_5: Path) -> None:
    parts = worlds.load_named(PRE.name, tiny_predict2_5)
    options = {**SMALL, "prompt": PROMPT, "num_steps": 4, "num_video_frames": 14, "chunk_size": 9}
    recorder = Recorder(CPU)
    worlds.run(parts, None, recorder, **options, step_cache="steps:0,3")
    found = {"rule": "steps:0,3", "steps": 8, "computed": 4, "patterns": ["steps:0,3"] * 2}
    assert recorder.facts["step_cache"] == found


@pytest.mark.parametrize("kind", [DiffusionRequest, FlowRequest, ARRequest])
def test_values(kind: type[Request]) -> None:
    for value, expected in (
        ("off", "off"),
        ("auto", "auto"),
        (0, "0.0"),
        ("0.10", "0.1"),
        (np.float32(0.5), "0.5"),
        ("steps:0-3,5", "steps:0-3,5"),
    ):
        assert kind.parse({"step_cache": value}).step_cache == expected
    for wrong in (None, True, "", "on", -0.1, "-1", "nan", "inf", "steps:", "steps:0,-4", "0-4"):
        with pytest.raises(InputError, match="step_cache"):
            kind.parse({"step_cache": wrong})


def test_rules_that_do_not_fit(tiny_diffusion: Path, whole_world: Path) -> None:
    opened = worlds.open_named(TEXT2WORLD, tiny_diffusion)
    with pytest.raises(InputError, match=r"step_cache='steps:0-4'.* 0 to 5"):
        worlds.checked(opened, **DIFFUSION, prompt=PROMPT, step_cache="steps:0-4")
    plain = worlds.open_named(MODEL, whole_world, disable_diffusion_decoder=True)
    with pytest.raises(InputError, match=r"step_cache='auto'.* without a diffusion decoder"):
        worlds.checked(plain, step_cache="auto")
    assert worlds.checked(plain).step_cache == "off"


def test_memory_and_resuming_know_it(tiny_diffusion: Path) -> None:
    opened = worlds.open_named(TEXT2WORLD, tiny_diffusion)
    asked = [
        worlds.checked(opened, **{**DIFFUSION, **options}, prompt=PROMPT)
        for options in (
            {},
            {"step_cache": 0.2},
            {"step_cache": 0.2, "guidance": 0},
            {"guidance": 0},
        )
    ]
    bytes_of = []
    for one in asked:
        stages = opened.family.stages(opened, one, worlds.PLAIN)
        bytes_of += [stage.activations for stage in stages if stage.name == "denoise"]
    stream = 3 * 2 * 3 * opened.config.width * 4  # tokens of 3 x 4 x 6 latent cells, float32
    off, both, one, alone = bytes_of
    assert (both - off, one - alone) == (2 * stream, stream)
    assert asked[0].effective(()) != asked[1].effective(())
