"""A toy: the last frame's colours, changed step by step by a linear map of a linear code."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from worldline.errors import InputError
from worldline.family import Compute, Family, Opened, Part, Parts
from worldline.memory import Stage
from worldline.report import Recorder
from worldline.shapes import VideoShape
from worldline.step import Step
from worldline.video.read import Clip
from worldline.weights.checkpoint import open_checkpoint
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import Network

from .request import ToyOptions, ToyRequest

HEIGHT, WIDTH = 32, 48


@dataclass(frozen=True)
class ToyConfig:
    channels: int


class Codec(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.encode = nn.Linear(3, config.channels, bias=False)
        self.decode = nn.Linear(config.channels, 3, bias=False)


def make_network(config: ToyConfig) -> nn.Module:
    return nn.Linear(config.channels, config.channels, bias=False)


def open_network(opened: Opened) -> Network[ToyConfig]:
    channels = opened.source.tensors["toy.change.weight"].shape[0]
    keys = KeyMap({"toy.change.weight": "weight"})
    return Network(make_network, ToyConfig(channels), opened.source, keys).check()


def open_codec(opened: Opened) -> Network[ToyConfig]:
    folder = opened.folder
    if opened.options.codec_dir is not None:
        folder = opened.place.chosen(opened.options.codec_dir, "codec_dir")
    source = open_checkpoint(folder / "codec.safetensors")
    keys = KeyMap({f"{half}.weight": f"{half}.weight" for half in ("encode", "decode")})
    return Network(Codec, ToyConfig(source.tensors["encode.weight"].shape[0]), source, keys).check()


def check(opened: Opened, request: ToyRequest) -> ToyRequest:
    if not request.num_input_frames:
        raise InputError(f"{opened.name} continues a clip; give one")
    return request


def stages(opened: Opened, request: ToyRequest, compute: Compute) -> Iterator[Stage]:
    frame = HEIGHT * WIDTH * opened["transformer"].config.channels * compute.dtype.itemsize
    yield Stage("denoise", "transformer", frame * request.num_video_frames)
    yield Stage("decode", "codec", frame * request.num_video_frames)


@torch.inference_mode()
def generate(
    parts: Parts, clip: Clip | None, request: ToyRequest, recorder: Recorder
) -> Generator[Step, None, None]:
    assert clip is not None
    count, codec_part = request.num_video_frames, parts.loaded["codec"]
    with recorder.stage("encode"), codec_part.on_device() as codec:
        pixels = torch.from_numpy(clip.frames[-1, :HEIGHT, :WIDTH].copy()).to(parts.device)
        latents = [codec.encode(pixels.to(parts.compute.dtype) / 255)]
    with recorder.stage("denoise"), parts.transformer.on_device() as network:
        for number in range(1, count):
            changed = network(latents[-1]) - latents[-1]
            latents.append(latents[-1] + request.strength * changed)
            yield Step("denoise", number, count - 1)
    with recorder.stage("decode"), codec_part.on_device() as codec:
        decoded = codec.decode(torch.stack(latents)).clamp(0, 1) * 255
    yield Step("done", count, count, decoded.cpu().float().numpy().astype(np.uint8))


FAMILY = Family(
    name="toy",
    request=ToyRequest,
    options=ToyOptions,
    parts=(
        Part("codec", "offload_codec", open_codec, option="codec_dir"),
        Part("transformer", "offload_network", open_network),
    ),
    agree=(("codec", "channels", "transformer", "channels"),),
    check=check,
    stages=stages,
    generate=generate,
    guardrails=lambda opened: "Predict1",
    video=lambda opened, request: VideoShape(request.num_video_frames, HEIGHT, WIDTH),
)
