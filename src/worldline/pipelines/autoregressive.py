"""Clip or image, and perhaps a prompt -> tokens -> continued tokens -> video.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/inference/world_generation_pipeline.py`.
Base models read tokens alone. Video2World models read a begin token before them, and attend to all
rows of the prompt's embedding, those behind its end too, which are zeros: as in the released code,
whose models were trained so.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from worldline.errors import CheckpointError, InputError
from worldline.loading import AutoregressiveFiles, AutoregressiveParts, DecoderParts, video_shape
from worldline.models.predict1_ar.decoder import make_decoder
from worldline.models.predict1_ar.model import ARTransformerConfig, make_positions
from worldline.pipelines.background import in_background
from worldline.pipelines.decoder import (
    SEAMS,
    DecoderSettings,
    Seam,
    cut_windows,
    decode_frames,
    denoise_windows,
)
from worldline.pipelines.diffusion import SAMPLER_OF
from worldline.pipelines.numbers import real_number, whole_number
from worldline.pipelines.prompts import check_words
from worldline.report import Recorder
from worldline.sampling.decode import decode, draw_noise
from worldline.sampling.logits import Sampling
from worldline.sampling.noise import MAX_SEED
from worldline.shapes import latent_frames_of
from worldline.tokenizers.cosmos.model import CosmosTokenizerConfig
from worldline.video.convert import condition_frames, to_uint8
from worldline.video.read import Clip

FPS = 25.0  # of every autoregressive output, whatever the input's was


@dataclass(frozen=True, kw_only=True)
class AutoregressiveRequest:
    """One clip to continue.

    Attributes:
        num_input_frames: how many of the input's last frames are given to the model, 9 or 1.
        temperature: divides the logits; 0 takes the most likely token every time.
        top_p: mass of the likely tokens that may be drawn, in (0, 1].
        seed: of the draws, and of the diffusion decoder's noise, 0 to 2^32 - 1.
        prompt: what the video shows; Video2World models alone, None where its embedding is given.
        decoder_seam: how the diffusion decoder joins the windows of a clip of more than 57 frames;
            "as_released" repeats a fault of the released code, see `worldline.pipelines.decoder`.
    """

    num_input_frames: int = 9
    temperature: float = 1.0
    top_p: float = 0.8
    seed: int = 0
    prompt: str | None = None
    decoder_seam: Seam = "corrected"

    def __post_init__(self) -> None:
        for name in ("num_input_frames", "seed"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, real_number(name, getattr(self, name)))
        if self.num_input_frames not in (1, 9):
            raise InputError(f"num_input_frames is {self.num_input_frames}; it must be 1 or 9")
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise InputError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"seed is {self.seed}; it must be 0 to {MAX_SEED}")
        check_words(self.prompt)
        if self.prompt is not None and not self.prompt.strip():
            raise InputError("the prompt is empty")
        if self.decoder_seam not in SEAMS:
            raise InputError(
                f"decoder_seam is {self.decoder_seam!r}; it must be one of {', '.join(SEAMS)}"
            )


@dataclass(frozen=True)
class Progress:
    """Where a request stands.

    Attributes:
        kind: "text", "encode", "tokens", "denoise", "decode" or "done".
        done: how much of it.
        total: of how much.
        frames: pixels that are final, uint8 (T, H, W, 3); of "decode" the new ones, of "done" all.
    """

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


def check_prompt(
    files: AutoregressiveFiles, request: AutoregressiveRequest, embedding: Tensor | None = None
) -> None:
    """Refuse a prompt that a model has no use for, or the lack of one that it needs.

    Args:
        files: of the world.
        request: what is wanted.
        embedding: given in place of a prompt.

    Raises:
        InputError: the model is of the other kind, or there is no prompt.
        CheckpointError: there is no text encoder, and one is needed.
    """
    given = embedding is not None or request.prompt is not None
    if files.config.context_width is None:
        if given:
            raise InputError(
                f"{files.folder} is a base model, which takes no prompt: use it without, or a "
                "Video2World model (worldline autoregressive video2world)"
            )
        return
    if not given:
        raise InputError(
            f"{files.folder} is a Video2World model, which needs a prompt (--prompt of worldline "
            "autoregressive video2world), or prompt_embeddings"
        )
    if embedding is None and files.text is None:
        raise CheckpointError(
            f"{files.why_no_text}; text_encoder_dir names another; or give prompt_embeddings"
        )


def continue_clip(
    parts: AutoregressiveParts,
    clip: Clip,
    request: AutoregressiveRequest,
    recorder: Recorder,
    embedding: Tensor | None = None,
) -> Iterator[Progress]:
    """Continue `clip`; yield progress, at last with all frames of the result.

    The given frames in the result are the reconstruction of the input from its tokens, as in the
    reference.

    Args:
        parts: the networks.
        clip: input frames, at least `request.num_input_frames` of them.
        request: how.
        recorder: is told seconds and memory of each stage.
        embedding: in place of the prompt, (1, S, E).

    Raises:
        InputError: the clip is too short, or the model and the prompt do not go together.
        CheckpointError: the text encoder is needed, and absent or damaged.
    """
    check_prompt(parts.files, request, embedding)
    config, shape, device = parts.config, parts.video, parts.device
    if parts.config.context_width is not None and embedding is None:
        yield Progress("text", 0, 1)
        with recorder.stage("text"):
            embedding = _embed(parts, request)

    tokenizer_config = parts.tokenizer.module.config
    # the tokenizer is causal: what follows the given frames would not change their tokens
    given = latent_frames_of(request.num_input_frames, tokenizer_config.temporal)
    used = 1 + (given - 1) * tokenizer_config.temporal

    yield Progress("encode", 0, 1)
    with recorder.stage("encode"), torch.inference_mode(), parts.tokenizer.on_device() as tokenizer:
        frames = condition_frames(clip, request.num_input_frames, used, shape.height, shape.width)
        weight = tokenizer.quant_conv.weight
        ids = tokenizer.encode_tokens(frames.to(device, weight.dtype)).flatten(1).long()

    prompt = F.pad(ids, (config.leading_tokens, 0), value=config.begin_token)
    count = config.length - prompt.shape[1]
    sampling = Sampling(temperature=request.temperature, top_p=request.top_p)
    noise = None
    if not sampling.greedy:
        noise = draw_noise([request.seed], config.vocabulary, count, device)
    with parts.transformer.on_device() as transformer:
        positions = make_positions(config, device, transformer.head.weight.dtype)
        context = None if embedding is None else embedding.to(device)
        decoder = make_decoder(transformer, positions, sampling, context=context)
        recorder.facts["decoder"] = decoder.name
        steps = decode(decoder, prompt, count, noise)
        with recorder.stage("prefill"):
            yield Progress("tokens", next(steps), count)
        with recorder.stage("tokens"):
            for done in steps:
                yield Progress("tokens", done, count)
        tokens = decoder.tokens[:, config.leading_tokens :].clone()
        del decoder, steps

    grid = config.grid
    tokens = tokens.view(1, grid.frames, grid.height, grid.width)
    if parts.decoder is None:
        yield Progress("decode", 0, shape.frames)
        stage, inference = recorder.stage("decode"), torch.inference_mode()
        with stage, inference, parts.tokenizer.on_device() as tokenizer:
            video = tokenizer.decode_tokens(tokens)[0]
            pixels = to_uint8(video * 0.5 + 0.5)
    else:
        finer = tokenizer_config.spatial // parts.decoder.tokenizer.module.config.spatial
        pixels = yield from _decode_by_diffusion(
            parts.decoder, tokens, finer, request, recorder, shape.frames, embedding
        )
    yield Progress("done", count, count, pixels)


def _embed(parts: AutoregressiveParts, request: AutoregressiveRequest) -> Tensor:
    """Return the embedding of the prompt, (1, S, E)."""
    assert parts.text is not None  # else told by `check_prompt`
    assert request.prompt is not None
    return parts.text.embed([request.prompt])[request.prompt]


def decoder_settings(decoder: DecoderParts, request: AutoregressiveRequest) -> DecoderSettings:
    """Return how the tokens of a request are decoded by diffusion."""
    return DecoderSettings(
        sampler=SAMPLER_OF[decoder.generation], seed=request.seed, seam=request.decoder_seam
    )


def _decode_by_diffusion(
    parts: DecoderParts,
    tokens: Tensor,
    finer: int,
    request: AutoregressiveRequest,
    recorder: Recorder,
    total: int,
    embedding: Tensor | None,
) -> Generator[Progress, None, NDArray[np.uint8]]:
    """Decode tokens (1, T, h, w); yield progress, with frames as they are done; return them all."""
    context = parts.context if embedding is None else embedding
    assert context is not None  # told when the files were opened
    settings = decoder_settings(parts, request)
    device = parts.transformer.device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # a stage's peak is not to count what an earlier one has left
    count = settings.count_steps(len(cut_windows(tokens)))
    with recorder.stage("denoise"):
        yield Progress("denoise", 0, count)

        # a thread begins on the first GPU, whatever this one is on
        gpu = torch.cuda.current_device() if device.type == "cuda" else None
        if device.index is not None:
            gpu = device.index

        def denoise(tell: Callable[[Progress], None]) -> list[Tensor]:
            chosen = torch.cuda.device(gpu) if device.type == "cuda" else nullcontext()
            with chosen, parts.transformer.on_device() as transformer:
                return denoise_windows(
                    transformer,
                    tokens,
                    context,
                    settings,
                    finer=finer,
                    on_step=lambda done: tell(Progress("denoise", done, count)),
                )

        latents = yield from in_background(denoise)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    frames: list[NDArray[np.uint8]] = []
    yield Progress("decode", 0, total)
    with recorder.stage("decode"):
        for piece in decode_frames(parts, latents, tokens.shape[1], settings.seam):
            frames.append(piece)
            yield Progress("decode", sum(map(len, frames)), total, piece)
    return np.concatenate(frames)
