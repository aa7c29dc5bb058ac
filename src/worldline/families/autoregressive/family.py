"""Clip or image, and perhaps a prompt -> tokens -> continued tokens -> video.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/inference/world_generation_pipeline.py`.
Base models read tokens alone. Video2World models read a begin token before them, and attend to all
rows of the prompt's embedding, those behind its end too, which are zeros: as in the released code,
whose models were trained so.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from worldline.catalog import Entry, find, generation_by_name
from worldline.errors import InputError
from worldline.families.autoregressive.model import (
    FEED_FORWARD_ROWS,
    PRESETS,
    ARTransformer,
    make_positions,
)
from worldline.families.autoregressive.parts import (
    open_decoder,
    open_decoder_tokenizer,
    open_encoder,
    open_tokenizer,
    open_transformer,
)
from worldline.families.autoregressive.request import FPS, AROptions, ARRequest
from worldline.families.autoregressive.step import (
    MAX_BATCH_SIZE,
    PlainDecoder,
    compile_ahead,
    kernels_fit,
    make_decoder,
)
from worldline.family import Compute, Family, Opened, Part, Parts
from worldline.memory import Stage, coding_bytes
from worldline.nn.pieces import CausalCache
from worldline.report import Recorder, log_result
from worldline.request import LARGEST_SIZE
from worldline.sampling.tokens import CHUNK, Sampling, decode, draw_noise
from worldline.shapes import VideoShape, latent_frames_of, nearest_frames
from worldline.step import Step, numbered
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZER_PRESETS
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.weights import CosmosNetwork
from worldline.video.convert import condition_frames, to_uint8
from worldline.video.read import Clip
from worldline.weights.networks import Network

logger = logging.getLogger(__name__)

CARRIED = 2  # latent frames of a window that the next one takes over, by rollout "pixels"
INPUT_FRAMES = (1, 9)


@dataclass(frozen=True)
class Job:
    """One clip of a batch.

    Attributes:
        clip: input frames.
        request: how it is continued.
        recorder: receives seconds and memory of the stages that are this clip's alone.
    """

    clip: Clip | None
    request: ARRequest
    recorder: Recorder


def generate(
    parts: Parts, clip: Clip | None, request: ARRequest, recorder: Recorder
) -> Iterator[Step]:
    """Continue a clip; see `generate_together`."""
    jobs = [Job(clip, request, recorder)]
    return (step for _, step in generate_together(parts, jobs, recorder))


@torch.inference_mode()
def generate_together(
    parts: Parts, jobs: Sequence[Any], recorder: Recorder
) -> Iterator[tuple[int, Step]]:
    """Continue clips in one batch; the last step of each holds all its frames.

    Each draws the tokens that it draws alone. The known frames in a result are the reconstruction
    of the input from its tokens, as in the reference.

    Args:
        parts: the networks.
        jobs: the clips; their checked requests differ in seeds and prompts alone.
        recorder: receives seconds and memory of the stages that the clips share; of one clip it
            may be the clip's own.

    Raises:
        InputError: a clip is too short.
        CheckpointError: the text encoder is needed, and damaged.
    """
    request, config, codec = jobs[0].request, parts.config, parts.tokenizer.module.config
    video = video_of(parts.opened, request)
    embeddings: Sequence[Tensor | None] = [None] * len(jobs)
    if config.context_width is not None:
        embeddings = yield from numbered(0, encode_prompts(parts, jobs, recorder))

    yield 0, Step("encode", 0, 1)
    known = latent_frames_of(request.num_input_frames, codec.temporal)
    ids = encode_clips(parts, [job.clip for job in jobs], request.num_input_frames, recorder)
    remaining = latent_frames_of(video.frames, codec.temporal) - known
    tokens = Tokens(parts, jobs, embeddings, remaining * config.grid.tokens_per_frame)
    videos = [Decoding(known, video) for _ in jobs]
    offloads = parts.tokenizer.offload or parts.transformer.offload
    # frames come while tokens are drawn where both networks are on the device at once
    live = None if len(jobs) > 1 or parts.decoder or offloads else videos[0]
    turns = alternates(parts.opened, request)
    overlap = 1 + (CARRIED - 1) * codec.temporal  # frames that a window takes over
    while True:
        new = min(remaining, config.grid.frames - known) if turns else remaining
        ids = yield from numbered(0, tokens.draw(ids, new, recorder, live))
        remaining -= new
        for number, (job, one) in enumerate(zip(jobs, videos, strict=True)):
            if live is None:
                window = ids[number : number + 1]
                for step in decode_clip(parts, one, window, job, embeddings[number]):
                    yield number, step
            if not remaining:
                yield number, Step("done", tokens.count, tokens.count, one.frames)
                del one.frames  # or those of two clips would be held
        if not remaining:
            return
        known = CARRIED
        ends = [Clip(one.frames[one.made - overlap : one.made], FPS) for one in videos]
        for one in videos:
            one.begin_window(known, overlap)
        ids = encode_clips(parts, ends, overlap, recorder)


def encode_prompts(
    parts: Parts, jobs: Sequence[Any], recorder: Recorder
) -> Generator[Step, None, list[Tensor]]:
    """Embedding (1, S, E) of each job's prompt."""
    given = [embedding_of(parts.opened, job.request) for job in jobs]
    # a job without an embedding has a prompt, and there is an encoder: see `check`
    prompts = [str(j.request.prompt) for j, one in zip(jobs, given, strict=True) if one is None]
    encoded: Mapping[str, Tensor] = {}
    if prompts:
        assert parts.text is not None
        yield Step("text", 0, 1)
        with recorder.stage("text"):
            encoded = parts.text.embed(prompts)
            for job, one in zip(jobs, given, strict=True):
                words = {} if one is not None else {"prompt": str(job.request.prompt)}
                job.recorder.facts["prompt_truncation"] = parts.text.truncations(words)
    return [
        encoded[str(job.request.prompt)] if one is None else one
        for job, one in zip(jobs, given, strict=True)
    ]


def encode_clips(
    parts: Parts, clips: Sequence[Clip | None], num_input_frames: int, recorder: Recorder
) -> Tensor:
    """Token ids of the ends of clips, (B, tokens), int64."""
    config, shape = parts.tokenizer.module.config, window_shape(parts.opened)
    # the tokenizer is causal: what follows the known frames would not change their tokens
    used = 1 + (latent_frames_of(num_input_frames, config.temporal) - 1) * config.temporal
    batch = []
    with recorder.stage("encode"), parts.tokenizer.on_device() as tokenizer:
        weight = tokenizer.quant_conv.weight
        for clip in clips:  # one at a time, so that each gets the ids that it gets alone
            assert clip is not None
            frames = condition_frames(clip, num_input_frames, used, shape.height, shape.width)
            ids = tokenizer.encode_tokens(frames.to(parts.device, weight.dtype))
            batch.append(ids.flatten(1).long())
        log_result("encode", batch[0])
        return torch.cat(batch)


class Tokens:
    """Tokens of batched clips.

    Attributes:
        count: tokens to draw for each clip, in all windows.
        done: of these, tokens that are drawn.
    """

    def __init__(
        self,
        parts: Parts,
        jobs: Sequence[Any],
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
        self, ids: Tensor, new: int, recorder: Recorder, live: Decoding | None
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
            recorder.facts |= {
                "decoder": decoder.name,
                "tokens": self.count,
                "clips_at_once": len(ids),
            }
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


class Decoding:
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
        self.latents, self.past = 0, CausalCache()

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


def decode_clip(
    parts: Parts,
    video: Decoding,
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
    from worldline.families.autoregressive import decoder

    opened = parts.opened
    settings = decoder.settings_of(parts, job.request)
    context = opened["decoder"].context if embedding is None else embedding
    assert context is not None  # see `decoder.open_network`
    cells = opened["tokenizer"].config.spatial // opened["decoder_tokenizer"].config.spatial
    for step in decoder.decode_tokens(parts, tokens, context, settings, cells, job.recorder):
        if step.kind != "decode":
            yield step
            continue
        begun = video.made
        if step.frames is not None:
            video.add(step.frames)
        new = video.frames[begun : video.made] if video.made > begun else None
        yield Step("decode", video.made, len(video.frames), new)


def alternates(opened: Opened, request: ARRequest) -> bool:
    """Whether drawing and decoding take turns, window by window.

    Batched clips then hold all their frames at once. Otherwise all tokens are drawn first, and the
    clips decoded one after another.
    """
    temporal = opened["tokenizer"].config.temporal
    latents = latent_frames_of(video_of(opened, request).frames, temporal)
    return request.rollout == "pixels" and latents > opened["transformer"].config.grid.frames


def video_of(opened: Opened, request: ARRequest) -> VideoShape:
    """Size of the video, input frames included."""
    own = window_shape(opened)
    return replace(own, frames=request.num_video_frames or own.frames)


def window_shape(opened: Opened) -> VideoShape:
    """Size of what the model draws at once."""
    tokenizer = opened["tokenizer"].config
    return opened["transformer"].config.grid.video(tokenizer.temporal, tokenizer.spatial)


def embedding_of(opened: Opened, request: ARRequest) -> Tensor | None:
    """Embedding in place of a request's prompt, (1, S, E)."""
    width = opened["transformer"].config.context_width
    if width is None:
        return None
    from worldline.text.embeddings import read_embeddings

    found = read_embeddings(request.prompt_embeddings, width=width, rows=opened.text_length)
    return found.get("prompt")


def check(opened: Opened, request: ARRequest) -> ARRequest:
    """Refuse what the model cannot do; fill in the number of frames.

    Raises:
        InputError: it cannot do this, or there is no prompt where one is needed.
        CheckpointError: the text encoder is needed, and missing.
    """
    config, temporal = opened["transformer"].config, opened["tokenizer"].config.temporal
    own, window = window_shape(opened).frames, config.grid.frames
    if latent_frames_of(request.num_input_frames, temporal) >= window:
        raise InputError(
            f"num_input_frames is {request.num_input_frames}, the model makes {own} frames; give 1"
        )
    frames = own if request.num_video_frames is None else request.num_video_frames
    longest = 1 + (LARGEST_SIZE - 1) // temporal * temporal
    nearest = min(max(own, nearest_frames(frames, temporal)), longest)
    if nearest != frames:
        raise InputError(
            f"num_video_frames is {frames}; it must be 1 + {temporal}k and at least {own}: the "
            f"nearest is {nearest}"
        )
    if frames > own and request.rollout == "pixels" and window <= CARRIED:
        raise InputError(
            f"rollout pixels carries {CARRIED} of the model's {window} latent frames; use rollout "
            "tokens"
        )
    embedding = embedding_of(opened, request)
    if config.context_width is None:
        if request.prompt is not None or request.prompt_embeddings is not None:
            raise InputError(
                f"{opened.name} is a base model, which takes no prompt; use a Video2World model"
            )
    elif embedding is None and request.prompt is None:
        raise InputError(
            f"{opened.name} is a Video2World model, which needs a prompt; give prompt or "
            "prompt_embeddings"
        )
    elif embedding is None:
        opened.require("text", "prompt")
    return request.model_copy(update={"num_video_frames": frames})


def unused(opened: Opened, request: ARRequest) -> dict[str, str]:
    """Fields and parts without effect on a request."""
    decoder = "decoder" in opened.parts
    found = {"offload_prompt_upsampler": "autoregressive models have no prompt upsampler"}
    if not decoder:
        names = ("offload_diffusion_decoder", "decoder_seam")
        found |= dict.fromkeys(names, "no diffusion decoder runs")
    if request.temperature == 0:
        draws = ("top_p",) if decoder else ("top_p", "seed")
        found |= dict.fromkeys(draws, "temperature 0 draws nothing at random")
    if request.prompt_embeddings is not None:
        found |= opened.encoder_unused
    window = opened["transformer"].config.grid.frames
    frames = request.num_video_frames or window_shape(opened).frames
    latents = latent_frames_of(frames, opened["tokenizer"].config.temporal)
    if latents <= window:
        found["rollout"] = "the video is no longer than the model's own"
    decoded = min(latents, window) if request.rollout == "pixels" else latents
    if decoder and decoded <= opened["decoder"].window:
        found["decoder_seam"] = "one window of the decoder is enough"
    return found


def notes(opened: Opened, request: ARRequest) -> list[str]:
    """Published failure rate of the model from a single frame."""
    entry = find(opened.folder.name)
    if entry is None or not entry.failure_rates or request.num_input_frames > 1:
        return []
    one, nine = entry.failure_rates
    if one < 5:
        return []
    return [f"from 1 frame about {one} % of the videos fail, from 9 frames {nine} % (published)"]


def report_entries(parts: Parts, request: ARRequest, recorder: Recorder) -> dict[str, Any]:
    """Entries of a video's report."""
    spent = sum(s.seconds for s in recorder.stages if s.name in ("prefill", "tokens"))
    decoder, drawn = recorder.facts["decoder"], recorder.facts["tokens"]
    clips = recorder.facts["clips_at_once"]
    # a prompt has many queries; see `worldline.nn.attention` for the one query of a step
    steps = "matrix products" if decoder == PlainDecoder.name else "Triton, split keys"
    diffusion = None
    if parts.decoder:
        from worldline.families.autoregressive.decoder import settings_of

        diffusion = asdict(settings_of(parts, request))
    return {
        "decoder": decoder,
        "diffusion_decoder": diffusion,
        "attention": f"torch SDPA (prompt), {steps} (decoding)",
        "tokens": drawn,
        "clips_at_once": clips,  # that share the seconds of all stages but their decoding
        "tokens_per_second": round(clips * drawn / spent, 2) if spent else None,
    }


def stages(opened: Opened, request: ARRequest, compute: Compute) -> Iterator[Stage]:
    """Memory beside the weights; `benchmarks/ar_end_to_end.py` compares it."""
    config, tokenizer = opened["transformer"].config, opened["tokenizer"].config
    size, shape = compute.dtype.itemsize, window_shape(opened)
    if (text := opened.get("text")) and "text" not in unused(opened, request):
        yield Stage("text", "text", text.nbytes(compute) // 20)
    cells = (
        (1 + (shape.frames - 1) // tokenizer.patch)
        * (shape.height // tokenizer.patch)
        * (shape.width // tokenizer.patch)
    )
    widest = max(tokenizer.level_channels[0], tokenizer.patch_channels)
    # of a window; of a longer clip the keys and values of what was decoded stay besides
    latents = latent_frames_of(request.num_video_frames or shape.frames, tokenizer.temporal)
    beyond = max(0, latents - config.grid.frames) * config.grid.tokens_per_frame
    past = 2 * beyond * tokenizer.level_channels[-1] * size
    coding = coding_bytes(cells, widest, size) + past
    yield Stage("encode", "tokenizer", coding)
    heads = config.num_kv_heads * config.head_size
    cache = 2 * config.depth * config.length * heads * size
    if config.context_width is not None:
        cache += 2 * (config.depth // config.context_every) * opened.text_length * heads * size
    cache += 2 * CHUNK * config.vocabulary * torch.float32.itemsize  # noise of the draws
    # the longest prompt: gate, up and product of a part of it; and queries, keys, values
    prompt = longest_prefix(opened)
    hidden = 3 * config.hidden * min(prompt, FEED_FORWARD_ROWS)
    prefill = (hidden + 5 * config.width * prompt) * size
    yield Stage("tokens", "transformer", compute.batch_size * cache + prefill)
    if "decoder" not in opened.parts:
        yield Stage("decode", "tokenizer", coding)
        return
    from worldline.families.autoregressive import decoder

    yield from decoder.stages(opened, compute)


def longest_prefix(opened: Opened) -> int:
    """Tokens that a window begins with at most: of an input, or of the window before."""
    config, temporal = opened["transformer"].config, opened["tokenizer"].config.temporal
    latents = max(latent_frames_of(max(INPUT_FRAMES), temporal), CARRIED)
    latents = min(latents, config.grid.frames - 1)  # at least one latent frame remains to draw
    return config.leading_tokens + latents * config.grid.tokens_per_frame


def max_batch_size(opened: Opened, compute: Compute) -> int | None:
    """Clips that kernels draw in step; None where none run: several then save no time."""
    config = opened["transformer"].config
    return MAX_BATCH_SIZE if kernels_fit(config, compute.device, compute.dtype) else None


@contextmanager
def compile_kernels(opened: Opened, compute: Compute) -> Iterator[None]:
    """Compile the decoding kernels beside the reading of weights."""
    thread = compile_ahead(
        opened["transformer"].config, compute.device, compute.dtype, compute.batch_size
    )
    try:
        yield
    finally:
        if thread is not None:  # it launches kernels, also beside what follows a failure
            thread.join()


def presets(entry: Entry) -> dict[str, Any]:
    """Parts of a released model."""
    from worldline.families.autoregressive.decoder import RELEASED
    from worldline.text.encoder import TextPart
    from worldline.text.t5 import NUM_PARAMETERS

    config = PRESETS[entry.preset]
    text = {"text": TextPart(NUM_PARAMETERS)} if config.context_width is not None else {}
    return {
        **text,
        "tokenizer": Network(CosmosTokenizer, TOKENIZER_PRESETS["DV8x16x16"]),
        "decoder": RELEASED,
        "decoder_tokenizer": CosmosNetwork(CosmosTokenizer, TOKENIZER_PRESETS["CV8x8x8"]),
        "transformer": Network(ARTransformer, config),
    }


FAMILY = Family(
    name="autoregressive",
    request=ARRequest,
    options=AROptions,
    parts=(
        Part(
            "text",
            "offload_text_encoder_model",
            open_encoder,
            option="text_encoder_dir",
            optional=True,
        ),
        Part("tokenizer", "offload_tokenizer", open_tokenizer),
        Part(
            "decoder_tokenizer",
            "offload_diffusion_decoder",
            open_decoder_tokenizer,
            disable="disable_diffusion_decoder",
        ),
        Part(
            "decoder",
            "offload_diffusion_decoder",
            open_decoder,
            disable="disable_diffusion_decoder",
        ),
        Part("transformer", "offload_ar_model", open_transformer),
    ),
    agree=(("decoder_tokenizer", "latent_channels", "decoder", "latent_channels"),),
    check=check,
    stages=stages,
    generate=generate,
    generate_together=generate_together,
    max_batch_size=max_batch_size,
    holds_batch=alternates,
    prepare=compile_kernels,
    presets=presets,
    guardrails=lambda opened: generation_by_name(opened.folder),
    video=video_of,
    unused=unused,
    report=report_entries,
    notes=notes,
)
