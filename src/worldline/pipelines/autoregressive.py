"""Clip or image -> tokens -> continued tokens -> video.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/inference/world_generation_pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from worldline.errors import InputError
from worldline.loading import AutoregressiveParts, video_shape
from worldline.models.predict1_ar.decoder import make_decoder
from worldline.models.predict1_ar.model import ARTransformerConfig, make_positions
from worldline.pipelines.requests import AutoregressiveRequest
from worldline.report import Recorder
from worldline.sampling.decode import decode, draw_noise
from worldline.sampling.logits import Sampling
from worldline.shapes import latent_frames_of
from worldline.tokenizers.cosmos.model import CosmosTokenizerConfig
from worldline.video.convert import condition_frames, to_uint8
from worldline.video.read import Clip

FPS = 25.0  # of every autoregressive output, whatever the input's was


@dataclass(frozen=True)
class Progress:
    """Where a request stands; the last one carries the frames, uint8 (T, H, W, 3)."""

    kind: str
    done: int
    total: int
    frames: NDArray[np.uint8] | None = None


def check_room(
    config: ARTransformerConfig, tokenizer: CosmosTokenizerConfig, num_input_frames: int
) -> None:
    """Refuse to continue a clip that is as long as what the model makes.

    Raises:
        InputError: no frame would be left to make.
    """
    if latent_frames_of(num_input_frames, tokenizer.temporal) >= config.grid.frames:
        raise InputError(
            f"this model makes {video_shape(config, tokenizer).frames} frames, "
            f"but num_input_frames is {num_input_frames}; give --num_input_frames 1"
        )


def continue_clip(
    parts: AutoregressiveParts,
    clip: Clip,
    request: AutoregressiveRequest,
    recorder: Recorder,
) -> Iterator[Progress]:
    """Continue `clip`; yield progress, at last with all frames of the result.

    The given frames in the result are the tokenizer's reconstruction of the input, as in the
    reference.

    Args:
        parts: the networks.
        clip: input frames, at least `request.num_input_frames` of them.
        request: how.
        recorder: is told seconds and memory of each stage.

    Raises:
        InputError: the clip is too short.
    """
    config, shape, device = parts.config, parts.video, parts.device
    tokenizer_config = parts.tokenizer.module.config
    # the tokenizer is causal: what follows the given frames would not change their tokens
    given = latent_frames_of(request.num_input_frames, tokenizer_config.temporal)
    used = 1 + (given - 1) * tokenizer_config.temporal
    total = config.grid.tokens

    yield Progress("encode", 0, 1)
    with recorder.stage("encode"), torch.inference_mode(), parts.tokenizer.on_device() as tokenizer:
        frames = condition_frames(clip, request.num_input_frames, used, shape.height, shape.width)
        weight = tokenizer.quant_conv.weight
        prompt = tokenizer.encode_tokens(frames.to(device, weight.dtype)).flatten(1).long()

    count = total - prompt.shape[1]
    sampling = Sampling(temperature=request.temperature, top_p=request.top_p)
    noise = None
    if not sampling.greedy:
        noise = draw_noise([request.seed], config.vocabulary, count, device)
    with parts.transformer.on_device() as transformer:
        positions = make_positions(config, device, transformer.head.weight.dtype)
        decoder = make_decoder(transformer, positions, sampling)
        recorder.facts["decoder"] = decoder.name
        steps = decode(decoder, prompt, count, noise)
        with recorder.stage("prefill"):
            yield Progress("tokens", next(steps), count)
        with recorder.stage("tokens"):
            for done in steps:
                yield Progress("tokens", done, count)
        tokens = decoder.tokens.clone()
        del decoder, steps

    yield Progress("decode", 0, 1)
    with recorder.stage("decode"), torch.inference_mode(), parts.tokenizer.on_device() as tokenizer:
        grid = config.grid
        ids = tokens.view(1, grid.frames, grid.height, grid.width)
        video = tokenizer.decode_tokens(ids)[0]
        pixels = to_uint8(video * 0.5 + 0.5)
    yield Progress("done", count, count, pixels)
