"""Clip or image, and perhaps a prompt -> tokens -> continued tokens -> video.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/inference/world_generation_pipeline.py`.
Base models read tokens alone. Video2World models read a begin token before them, and attend to all
rows of the prompt's embedding, those behind its end too, which are zeros: as in the released code,
whose models were trained so.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from worldline.choices import CARRIED
from worldline.errors import CheckpointError, InputError
from worldline.loading import AutoregressiveFiles, AutoregressiveParts, DecoderParts, video_shape
from worldline.models.predict1_ar.decoder import make_decoder
from worldline.models.predict1_ar.model import ARTransformerConfig, make_positions
from worldline.nn.pieces import Past
from worldline.pipelines.decoder import DecoderSettings, decode_tokens
from worldline.pipelines.denoise import Embeddings, log_result
from worldline.pipelines.prompts import TRUNCATION
from worldline.pipelines.requests import LARGEST_SIZE, AutoregressiveRequest
from worldline.pipelines.step import Step
from worldline.report import Recorder
from worldline.sampling.edm import SAMPLER_OF
from worldline.sampling.tokens import Sampling, decode, draw_noise
from worldline.shapes import VideoShape, latent_frames_of, nearest_frames
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.video.convert import condition_frames, to_uint8
from worldline.video.read import Clip

FPS = 25.0  # of every autoregressive output, whatever the input's was


@dataclass(frozen=True)
class Job:
    """One clip of a batch.

    Attributes:
        clip: input frames, at least `request.num_input_frames` of them.
        request: how it is continued.
        recorder: receives seconds and memory of the stages that are this clip's alone.
        embedding: in place of the prompt, (1, S, E).
    """

    clip: Clip
    request: AutoregressiveRequest
    recorder: Recorder
    embedding: Tensor | None = None


def generate(
    parts: AutoregressiveParts,
    clip: Clip,
    request: AutoregressiveRequest,
    recorder: Recorder,
    embeddings: Embeddings | None = None,
) -> Iterator[Step]:
    """Continue a clip; see `generate_together`."""
    embedding = None if embeddings is None else embeddings.prompt
    return generate_together(parts, [Job(clip, request, recorder, embedding)], recorder)


@torch.inference_mode()
def generate_together(
    parts: AutoregressiveParts, jobs: Sequence[Job], recorder: Recorder
) -> Iterator[Step]:
    """Continue clips in one batch; the last step of each holds all its frames.

    Each draws the tokens that it draws alone. The known frames in a result are the reconstruction
    of the input from its tokens, as in the reference.

    Args:
        parts: the networks.
        jobs: the clips, that `check_room` and `check_prompt` accept; their requests differ in
            seeds and prompts alone.
        recorder: receives seconds and memory of the stages that the clips share; of one clip it
            may be the clip's own.

    Raises:
        InputError: a clip is too short.
        CheckpointError: the text encoder is needed, and damaged.
    """
    request, config, codec = jobs[0].request, parts.config, parts.tokenizer.module.config
    video = video_of(config, codec, request)
    embeddings: Sequence[Tensor | None] = [None] * len(jobs)
    if config.context_width is not None:
        embeddings = yield from _encode_prompts(parts, jobs, recorder)

    yield Step("encode", 0, 1)
    known = latent_frames_of(request.num_input_frames, codec.temporal)
    ids = _encode(parts, [job.clip for job in jobs], request.num_input_frames, recorder)
    remaining = latent_frames_of(video.frames, codec.temporal) - known
    tokens = _Tokens(parts, jobs, embeddings, remaining * config.grid.tokens_per_frame)
    videos = [_Decoding(known, video) for _ in jobs]
    offloads = parts.tokenizer.offload or parts.transformer.offload
    # frames come while tokens are drawn where both networks are on the device at once
    live = None if len(jobs) > 1 or parts.decoder or offloads else videos[0]
    turns = alternates(config, codec, request)
    overlap = 1 + (CARRIED - 1) * codec.temporal  # frames that a window takes over
    while True:
        new = min(remaining, config.grid.frames - known) if turns else remaining
        ids = yield from tokens.draw(ids, new, recorder, live)
        remaining -= new
        for number, (job, one) in enumerate(zip(jobs, videos, strict=True)):
            if live is None:
                window = ids[number : number + 1]
                for step in _decode(parts, one, window, job, embeddings[number]):
                    yield replace(step, clip=number)
            if not remaining:
                yield Step("done", tokens.count, tokens.count, one.frames, clip=number)
                del one.frames  # or those of two clips would be held
        if not remaining:
            return
        known = CARRIED
        ends = [Clip(one.frames[one.made - overlap : one.made], FPS) for one in videos]
        for one in videos:
            one.begin_window(known, overlap)
        ids = _encode(parts, ends, overlap, recorder)


def _encode_prompts(
    parts: AutoregressiveParts, jobs: Sequence[Job], recorder: Recorder
) -> Generator[Step, None, list[Tensor]]:
    """Embedding (1, S, E) of each job's prompt."""
    # a job without an embedding has a prompt, and there is an encoder: see `check_prompt`
    prompts = [str(job.request.prompt) for job in jobs if job.embedding is None]
    encoded: Mapping[str, Tensor] = {}
    if prompts:
        assert parts.text is not None
        yield Step("text", 0, 1)
        with recorder.stage("text"):
            encoded = parts.text.embed(prompts)
            for job in jobs:
                if job.embedding is None:
                    words = {"prompt": str(job.request.prompt)}
                    job.recorder.facts[TRUNCATION] = parts.text.truncations(words)
    return [
        encoded[str(job.request.prompt)] if job.embedding is None else job.embedding for job in jobs
    ]


def _encode(
    parts: AutoregressiveParts, clips: Sequence[Clip], num_input_frames: int, recorder: Recorder
) -> Tensor:
    """Token ids of the ends of clips, (B, tokens), int64."""
    config, shape = parts.tokenizer.module.config, parts.video
    # the tokenizer is causal: what follows the known frames would not change their tokens
    used = 1 + (latent_frames_of(num_input_frames, config.temporal) - 1) * config.temporal
    batch = []
    with recorder.stage("encode"), parts.tokenizer.on_device() as tokenizer:
        weight = tokenizer.quant_conv.weight
        for clip in clips:  # one at a time, so that each gets the ids that it gets alone
            frames = condition_frames(clip, num_input_frames, used, shape.height, shape.width)
            ids = tokenizer.encode_tokens(frames.to(parts.device, weight.dtype))
            batch.append(ids.flatten(1).long())
        log_result("encode", batch[0])
        return torch.cat(batch)


class _Tokens:
    """Tokens of batched clips.

    Attributes:
        count: tokens to draw for each clip, in all windows.
        done: of these, tokens that are drawn.
    """

    def __init__(
        self,
        parts: AutoregressiveParts,
        jobs: Sequence[Job],
        embeddings: Sequence[Tensor | None],
        count: int,
    ) -> None:
        self.parts, self.count, self.done = parts, count, 0
        request, seeds = jobs[0].request, [job.request.seed for job in jobs]
        self.sampling = Sampling(temperature=request.temperature, top_p=request.top_p)
        self.noise: Iterator[Tensor] | None = None
        if not self.sampling.greedy:
            self.noise = draw_noise(seeds, parts.config.vocabulary, count, parts.device)
        contexts = [one for one in embeddings if one is not None]
        self.context = torch.cat(contexts).to(parts.device) if contexts else None

    def draw(
        self, ids: Tensor, new: int, recorder: Recorder, live: _Decoding | None
    ) -> Generator[Step, None, Tensor]:
        """Draw `new` latent frames behind ids (B, known); all ids (B, t, h, w) of the window.

        Args:
            ids: of the known frames.
            new: latent frames to draw.
            recorder: receives seconds and memory.
            live: decodes the one clip while it is drawn.
        """
        config, grid = self.parts.config, self.parts.config.grid
        size, begun = grid.tokens_per_frame, self.done
        prompt = F.pad(ids, (config.leading_tokens, 0), value=config.begin_token)
        with self.parts.transformer.on_device() as transformer:
            positions = make_positions(config, self.parts.device, transformer.head.weight.dtype)
            decoder = make_decoder(
                transformer, positions, self.sampling, batch=len(ids), context=self.context
            )
            recorder.facts["decoder"] = decoder.name
            steps = decode(decoder, prompt, new * size, self.noise)
            with recorder.stage("prefill"):
                self.done = begun + next(steps)
                yield Step("tokens", self.done, self.count)
            for end in range(size, new * size + 1, size) if live else (new * size,):
                with recorder.stage("tokens"):
                    while self.done < begun + end:
                        self.done = begun + next(steps)
                        if live is None or self.done < begun + end:
                            yield Step("tokens", self.done, self.count)
                if live is not None:
                    with recorder.stage("decode"):
                        drawn = decoder.tokens[:, config.leading_tokens :]
                        drawn = drawn[:, : ids.shape[1] + end]
                        drawn = drawn.unflatten(1, (-1, grid.height, grid.width))
                        frames = live.decode(self.parts.tokenizer.module, drawn)
                    yield Step("tokens", self.done, self.count, frames)
            tokens = decoder.tokens[:, config.leading_tokens :]
            log_result("tokens", tokens)
            del decoder, steps  # the cache, before the next part needs the room
        return tokens.unflatten(1, (-1, grid.height, grid.width))


class _Decoding:
    """Frames of one clip, as they come out of its tokens.

    Attributes:
        known: latent frames that the window begins with.
        frames: of the whole clip, uint8 (T, H, W, 3).
        made: number of frames that are there.
        latents: latent frames of the window that are decoded.
    """

    def __init__(self, known: int, video: VideoShape) -> None:
        self.made = 0
        # all at once: to join pieces would hold a long video twice
        self.frames = np.empty((video.frames, video.height, video.width, 3), np.uint8)
        self.begin_window(known, 0)

    def begin_window(self, known: int, overlap: int) -> None:
        """Begin anew with `known` latent frames; the first `overlap` frames are there already."""
        self.known, self.overlap = known, overlap
        self.latents, self.past = 0, Past()

    def add(self, piece: NDArray[np.uint8]) -> None:
        """Keep the frames of a piece that are new."""
        new = piece[self.overlap :]
        self.overlap = max(0, self.overlap - len(piece))
        self.frames[self.made : self.made + len(new)] = new
        self.made += len(new)

    def decode(self, tokenizer: CosmosTokenizer, tokens: Tensor) -> NDArray[np.uint8] | None:
        """New frames, uint8 (T, H, W, 3), of all ids (1, t, h, w) of the window so far.

        Latent frames are decoded in the same pieces whenever they come, so that a video does not
        depend on it: the known ones together, then one by one.
        """
        codes = tokenizer.to_codes(tokens[:, self.latents :])
        first = [] if self.latents else [self.known]
        begun = self.made
        for piece in codes.split([*first, *[1] * (codes.shape[2] - sum(first))], dim=2):
            self.add(to_uint8(tokenizer.decode(piece, self.past)[0] * 0.5 + 0.5))
        self.latents = tokens.shape[1]
        return self.frames[begun : self.made] if self.made > begun else None


def _decode(
    parts: AutoregressiveParts,
    video: _Decoding,
    tokens: Tensor,
    job: Job,
    embedding: Tensor | None,
) -> Iterator[Step]:
    """Decode the ids (1, t, h, w) of one clip's window, by the tokenizer or by diffusion."""
    if parts.decoder is None:
        yield Step("decode", video.made, len(video.frames))
        with job.recorder.stage("decode"), parts.tokenizer.on_device() as tokenizer:
            frames = video.decode(tokenizer, tokens)
        yield Step("decode", video.made, len(video.frames), frames)
        return
    settings = decoder_settings(parts.decoder, job.request)
    context = parts.decoder.context if embedding is None else embedding
    assert context is not None  # see `open_decoder`
    cells = parts.tokenizer.module.config.spatial // parts.decoder.tokenizer.module.config.spatial
    for step in decode_tokens(parts.decoder, tokens, context, settings, cells, job.recorder):
        if step.kind != "decode":
            yield step
            continue
        begun = video.made
        if step.frames is not None:
            video.add(step.frames)
        new = video.frames[begun : video.made] if video.made > begun else None
        yield Step("decode", video.made, len(video.frames), new)


def decoder_settings(decoder: DecoderParts, request: AutoregressiveRequest) -> DecoderSettings:
    """How the tokens of a request are decoded by diffusion."""
    weights = str(decoder.transformer.module.dtype).removeprefix("torch.")
    return DecoderSettings(
        sampler=SAMPLER_OF[decoder.generation],
        seed=request.seed,
        seam=request.decoder_seam,
        rotary_precision=decoder.rotary_precision or weights,
    )


def check_room(
    config: ARTransformerConfig, tokenizer: CosmosTokenizerConfig, request: AutoregressiveRequest
) -> None:
    """Refuse a length that the model cannot make from the input.

    Raises:
        InputError: there would be no frame to make, or the length does not fit.
    """
    shortest, window = video_shape(config, tokenizer).frames, config.grid.frames
    if latent_frames_of(request.num_input_frames, tokenizer.temporal) >= window:
        raise InputError(
            f"this model makes {shortest} frames, "
            f"but num_input_frames is {request.num_input_frames}; give --num_input_frames 1"
        )
    frames, temporal = video_of(config, tokenizer, request).frames, tokenizer.temporal
    longest = 1 + (LARGEST_SIZE - 1) // temporal * temporal
    nearest = min(max(shortest, nearest_frames(frames, temporal)), longest)
    if nearest != frames:
        raise InputError(
            f"num_video_frames is {frames}; it must be 1 + {temporal}k and at least {shortest}: "
            f"the nearest is {nearest}"
        )
    if frames > shortest and request.rollout == "pixels" and window <= CARRIED:
        raise InputError(
            f"this model makes {window} latent frames at once, of which rollout pixels takes over "
            f"{CARRIED}: nothing is left to make; use rollout tokens"
        )


def check_prompt(
    files: AutoregressiveFiles, request: AutoregressiveRequest, embedding: Tensor | None = None
) -> None:
    """Refuse a prompt that a model has no use for, or the lack of one that it needs.

    Args:
        files: the world's.
        request: the request.
        embedding: in place of a prompt.

    Raises:
        InputError: the model is of the other kind, or there is no prompt.
        CheckpointError: there is no text encoder, and one is needed.
    """
    prompted = embedding is not None or request.prompt is not None
    if files.config.context_width is None:
        if prompted:
            raise InputError(
                f"{files.folder} is a base model, which takes no prompt: use it without, or a "
                "Video2World model (worldline autoregressive video2world)"
            )
        return
    if not prompted:
        raise InputError(
            f"{files.folder} is a Video2World model, which needs a prompt (--prompt of worldline "
            "autoregressive video2world), or prompt_embeddings"
        )
    if embedding is None and files.text is None:
        raise CheckpointError(
            f"{files.why_no_text}; text_encoder_dir names another; or give prompt_embeddings"
        )


def video_of(
    config: ARTransformerConfig, tokenizer: CosmosTokenizerConfig, request: AutoregressiveRequest
) -> VideoShape:
    """Size of what a request makes, the known frames included."""
    default = video_shape(config, tokenizer)
    return replace(default, frames=request.num_video_frames or default.frames)


def alternates(
    config: ARTransformerConfig, tokenizer: CosmosTokenizerConfig, request: AutoregressiveRequest
) -> bool:
    """Whether drawing and decoding take turns, window by window.

    Batched clips then hold all their frames at once. Otherwise all tokens are drawn first, and the
    clips decoded one after another.
    """
    latents = latent_frames_of(video_of(config, tokenizer, request).frames, tokenizer.temporal)
    return request.rollout == "pixels" and latents > config.grid.frames
