"""Clip or image, and perhaps a prompt -> tokens -> continued tokens -> video.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/inference/world_generation_pipeline.py`.
Base models read tokens alone. Video2World models read a begin token before them, and attend to all
rows of the prompt's embedding, those behind its end too, which are zeros: as in the released code,
whose models were trained so.
"""

import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import astuple, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldline.catalog import DECODERS, Entry, find, generation_by_name
from worldline.errors import InputError, NonFiniteError, blame, option
from worldline.families.autoregressive.model import (
    FEED_FORWARD_ROWS,
    PRESETS,
    SHARED,
    ARTransformer,
    ARTransformerConfig,
)
from worldline.families.autoregressive.request import FPS, AROptions, ARRequest
from worldline.families.autoregressive.step import compile_kernels, kernel_batch, make_decoder
from worldline.families.autoregressive.weights import open_network
from worldline.family import Compute, Family, Opened, Part, Parts
from worldline.memory import Stage, coding_bytes
from worldline.nn.pieces import CausalCache
from worldline.parallel.halo import SharedRows, share_rows
from worldline.parallel.mesh import Layout
from worldline.report import Recorder, log_result
from worldline.repositories import model_name
from worldline.sampling.tokens import CHUNK, Sampling, decode, draw_noise
from worldline.shapes import Fit, VideoShape, latent_frames_of, nearest_frames
from worldline.step import Step, numbered
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZER_PRESETS
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.weights import CosmosNetwork, open_tokenizer
from worldline.video.convert import condition_frames, to_uint8
from worldline.video.read import Clip, Frames
from worldline.weights.networks import Network

logger = logging.getLogger(__name__)

OFFLOAD_DECODER, DISABLE_DECODER = "offload_diffusion_decoder", "disable_diffusion_decoder"
DECODER_FIELDS = (OFFLOAD_DECODER, "decoder_seam", "context_parallel")
CARRIED = 2  # latent frames of a window that the next one takes over, by rollout "pixels"
TOKENIZERS = {
    "Predict1": ("Cosmos-Tokenize1-DV8x16x16-720p", "Cosmos-1.0-Tokenizer-DV8x16x16"),
    "1.0": ("Cosmos-1.0-Tokenizer-DV8x16x16", "Cosmos-Tokenize1-DV8x16x16-720p"),
}


@torch.inference_mode()
def generate_together(
    parts: Parts, jobs: Sequence[Any], recorder: Recorder
) -> Iterator[tuple[int, Step]]:
    """Continue clips in one batch; the last step of each holds all its frames.

    Each draws the tokens that it draws alone. The known frames in a result are the reconstruction
    of the input from its tokens, as in the reference. Requests differ in seeds and prompts alone;
    the recorder receives the stages that the clips share, those of the jobs what is a clip's alone.
    """
    opened, request, config = parts.opened, jobs[0].request, parts.config
    contexts = yield from encode_prompts(parts, jobs, recorder)

    yield 0, Step("encode", 0, 1)
    clips = [job.clip for job in jobs]
    ids = encode_clips(parts, clips, request.num_input_frames, recorder, request.fit)
    rows = token_rows(opened, parts.compute)
    videos = [Decoding(video_of(opened, request), ids.shape[1], rows) for _ in jobs]
    size, done = config.grid.tokens_per_frame, 0
    count = size * (latent_frames(opened, request) - ids.shape[1])
    sampling = Sampling(temperature=request.temperature, top_p=request.top_p)
    noise = draw_noise([job.request.seed for job in jobs], config.vocabulary, count, parts.device)
    # frames come while tokens are drawn where both networks are on the device at once
    apart = parts.tokenizer.offload or parts.transformer.offload or parts.decoder
    live = not apart and len(jobs) == 1
    while done < count:
        begun, new = done, (count - done) // size
        if request.rollout == "pixels":
            new = min(new, config.grid.frames - ids.shape[1])
        with parts.transformer.on_device() as transformer:
            decoder = make_decoder(transformer, sampling, contexts, parts.compute.mesh.tp)
            recorder.facts["drawing"] = {
                "decoder": decoder.name,
                "attention": decoder.attention,
                "tokens": count,
                "clips_at_once": len(jobs),  # which share the seconds of all but their decoding
            }
            prompt = F.pad(ids.flatten(1), (config.leading_tokens, 0), value=config.begin_token)
            steps = decode(decoder, prompt, new * size, None if sampling.greedy else noise)
            for frame in range(new + 1):
                with recorder.stage("tokens" if frame else "prefill"):
                    while done < begun + max(1, frame * size):
                        done = begun + next(steps)
                        yield 0, Step("tokens", done, count)
                if live and frame:
                    with recorder.stage("decode"):
                        frames = videos[0].decode(parts.tokenizer.module, decoder.frames)
                    yield 0, Step("tokens", done, count, frames)
            ids = decoder.frames
            del decoder, steps  # their memory is for what decodes
        log_result("tokens", ids)
        for number, (job, video) in enumerate(zip(jobs, videos, strict=True)):
            if not live:
                decoding = decode_clip(parts, video, ids[number, None], job, contexts[number])
                yield from numbered(number, decoding)
            if done == count:
                yield number, Step("done", count, count, video.frames)
                del video.frames  # or those of two clips would be held
        if done < count:
            carried = min(CARRIED, config.grid.frames - 1)
            overlap = 1 + (carried - 1) * opened["tokenizer"].config.temporal
            ends = [video.end(overlap) for video in videos]
            ids = encode_clips(parts, ends, overlap, recorder)
            for video in videos:
                video.begin_window(carried, overlap)


def encode_prompts(
    parts: Parts, jobs: Sequence[Any], recorder: Recorder
) -> Generator[tuple[int, Step], None, list[Tensor | None]]:
    """Embedding (1, S, E) of each job's prompt; None for a base model."""
    contexts = [embeddings_of(parts.opened, job.request).get("prompt") for job in jobs]
    prompts = {n: job.request.prompt for n, job in enumerate(jobs) if contexts[n] is None}
    if prompts and (encoder := parts.text):
        once = parts.compute.mesh.video.once
        yield 0, Step("text", 0, 1)
        with recorder.stage("text"):
            try:
                encoded = once(lambda: encoder.embed([*prompts.values()]))
            except NonFiniteError as error:
                error.index = [*prompts][error.index]
                raise
            for number, prompt in prompts.items():
                contexts[number] = encoded[prompt]
                log_result("text", encoded[prompt])
                truncations = once(partial(encoder.truncations, {"prompt": prompt}))
                jobs[number].recorder.facts["prompt_truncation"] = truncations
    return contexts


def encode_clips(
    parts: Parts, clips: Sequence[Any], num_frames: int, recorder: Recorder, fit: Fit = "crop"
) -> Tensor:
    """Token ids (B, t, h, w), int64, of the last frames of clips; later frames change none."""
    shape, rows = window_shape(parts.opened), token_rows(parts.opened, parts.compute)

    def encode(tokenizer: CosmosTokenizer) -> Iterator[Tensor]:
        # one at a time, so that each gets the ids that it gets alone
        for number, clip in enumerate(clips):
            frames = condition_frames(clip, num_frames, num_frames, shape.height, shape.width, fit)
            video = frames.to(parts.device, parts.compute.dtype)
            with blame(number):
                yield tokenizer.encode_tokens(video, CausalCache(rows, keep=False)).long()

    with recorder.stage("encode"), parts.tokenizer.on_device() as tokenizer:
        ids = rows.computing.once(lambda: torch.cat([*encode(tokenizer)]))
    log_result("encode", ids)
    return ids


def token_rows(opened: Opened, compute: Compute) -> SharedRows:
    """Rows of tokens that this process encodes and decodes."""
    return share_rows(compute.mesh, window_shape(opened), opened["tokenizer"].config.spatial)


class Decoding:
    """Frames of one clip, uint8 (T, H, W, 3), of which `made` are there, in the first process.

    Attributes:
        known: latent frames that the window begins with.
        overlap: their frames, where these are made already.
        latents: latent frames of the window that are decoded.
    """

    def __init__(self, video: VideoShape, known: int, rows: SharedRows) -> None:
        self.made, self.rows = 0, rows
        # all at once: to join pieces would hold a long video twice
        self.frames = np.empty((*astuple(video), 3), np.uint8)
        self.begin_window(known)

    def begin_window(self, known: int, overlap: int = 0) -> None:
        self.known, self.overlap = known, overlap
        self.latents, self.past = 0, CausalCache(self.rows)

    def end(self, count: int) -> Clip:
        """The last frames that are made, in all processes."""
        frames = self.frames[self.made - count : self.made]
        return self.rows.axis.once(partial(Clip, frames, FPS))

    def decode(self, tokenizer: CosmosTokenizer, ids: Tensor) -> Frames:
        """New frames of the ids (1, t, h, w) of the window so far.

        Latent frames are decoded in the same pieces whenever they come: the known ones together,
        then one by one.
        """
        begun = self.made
        while self.latents < ids.shape[1]:
            end = max(self.known, self.latents + 1)
            codes = tokenizer.to_codes(ids[:, self.latents : end])
            self.made += self.rows.computing.once(partial(self._add, tokenizer, codes))
            self.latents = end
        return self.frames[begun : self.made]

    def _add(self, tokenizer: CosmosTokenizer, codes: Tensor) -> int:
        """Number of new frames of the next codes; decoded and written."""
        frames = to_uint8(tokenizer.decode(codes, self.past)[0] * 0.5 + 0.5, join=self.rows.join)
        new = frames if self.latents else frames[self.overlap :]
        if self.rows.axis.first:
            self.frames[self.made : self.made + len(new)] = new
        return len(new)


def decode_clip(
    parts: Parts, video: Decoding, ids: Tensor, job: Any, context: Tensor | None
) -> Generator[Step, None, None]:
    """Decode the ids (1, t, h, w) of one clip's window, by the tokenizer or by diffusion."""
    if parts.decoder is not None:
        yield from parts.opened["decoder"].decode(parts, video, ids, job, context)
        return
    yield Step("decode", video.made, len(video.frames))
    with job.recorder.stage("decode"), parts.tokenizer.on_device() as tokenizer:
        frames = video.decode(tokenizer, ids)
    yield Step("decode", video.made, len(video.frames), frames)


def alternates(opened: Opened, request: ARRequest) -> bool:
    """Whether drawing and decoding take turns; batched clips then hold all their frames at once."""
    beyond = latent_frames(opened, request) > opened.config.grid.frames
    return beyond and request.rollout == "pixels"


def video_of(opened: Opened, request: ARRequest) -> VideoShape:
    """Size of the video, input frames included."""
    window = window_shape(opened)
    return replace(window, frames=request.num_video_frames or window.frames)


def latent_frames(opened: Opened, request: ARRequest) -> int:
    """Latent frames of the video."""
    frames = video_of(opened, request).frames
    return latent_frames_of(frames, opened["tokenizer"].config.temporal)


def window_shape(opened: Opened) -> VideoShape:
    """Size of what the model draws at once."""
    tokenizer = opened["tokenizer"].config
    return opened.config.grid.video(tokenizer.temporal, tokenizer.spatial)


def embeddings_of(opened: Opened, request: ARRequest) -> dict[str, Tensor]:
    """Embeddings in place of prompts, (1, S, E), by their names."""
    if request.prompt_embeddings is None:
        return {}
    from worldline.text.embeddings import read_embeddings

    return read_embeddings(
        request.prompt_embeddings, width=opened.config.context_width, rows=opened.text_length
    )


def check(opened: Opened, request: ARRequest) -> ARRequest:
    """Refuse what the model cannot do; fill in the number of frames."""
    if decoder := opened.get("decoder"):
        decoder.refuse_grid(opened)
    config, temporal = opened.config, opened["tokenizer"].config.temporal
    full = window_shape(opened).frames
    if latent_frames_of(request.num_input_frames, temporal) >= config.grid.frames:
        raise InputError(
            f"num_input_frames is {request.num_input_frames}, the model makes {full} frames; give 1"
        )
    frames = request.num_video_frames or full
    nearest = max(full, nearest_frames(frames, temporal))
    if nearest != frames:
        raise InputError(
            f"num_video_frames is {frames}; it must be 1 + {temporal}k and at least {full}: the "
            f"nearest is {nearest}"
        )
    prompted = request.prompt is not None or request.prompt_embeddings is not None
    if prompted != bool(config.context_width):
        kind = "Video2World model, which needs a prompt; give prompt or prompt_embeddings"
        if prompted:
            kind = "base model, which takes no prompt; use a Video2World model"
        raise InputError(f"{opened.name} is a {kind}")
    if prompted and not embeddings_of(opened, request):
        opened.require("text", "prompt")
    rule = request.step_cache
    if decoder:
        rule = decoder.complete_cache(rule)
    elif rule != "off":
        raise InputError(
            f"{option('step_cache', rule)}: {opened.name} runs without a diffusion decoder, whose "
            "steps alone are cached; leave it out"
        )
    return request.model_copy(update={"num_video_frames": frames, "step_cache": rule})


def unused(opened: Opened, request: ARRequest) -> dict[str, str]:
    """Fields and parts without effect on a request."""
    decoder, window = opened.get("decoder"), opened.config.grid.frames
    reasons = {"offload_prompt_upsampler": "autoregressive models have no prompt upsampler"}
    if not decoder:
        reasons |= dict.fromkeys(DECODER_FIELDS, "no diffusion decoder runs")
    if request.temperature == 0:
        reasons["top_p"] = "temperature 0 draws nothing at random"
        if not decoder:
            reasons["seed"] = reasons["top_p"]
    if request.prompt_embeddings is not None:
        reasons |= opened.encoder_unused
    latents = latent_frames(opened, request)
    if latents <= window:
        reasons["rollout"] = "the video is no longer than the model's own"
    decoded = min(latents, window) if request.rollout == "pixels" else latents
    if decoder and decoded <= decoder.window:
        reasons["decoder_seam"] = "one window of the decoder is enough"
    return reasons


def notes(opened: Opened, request: ARRequest) -> list[str]:
    """What a file of embeddings holds in vain; the published failure rates, where they are high."""
    lines, entry = [], find(model_name(opened.folder))
    if "negative_prompt" in embeddings_of(opened, request):
        lines.append(f"{request.prompt_embeddings}: negative_prompt has no effect on this model")
    one, nine = (entry and not opened.place.bundled and entry.failure_rates) or (0, 0)
    if one >= 5 and request.num_input_frames == 1:
        lines.append(f"published failure rates: {one} % from 1 frame, {nine} % from 9 frames")
    return lines


def report_entries(parts: Parts, request: ARRequest, recorder: Recorder) -> dict[str, Any]:
    """Entries of a video's report."""
    spent = sum(s.seconds for s in recorder.stages if s.name in ("prefill", "tokens"))
    decoder, drawing = parts.opened.get("decoder"), recorder.facts.get("drawing", {})
    drawn = drawing.get("clips_at_once", 0) * drawing.get("tokens", 0)
    return {
        **drawing,
        "diffusion_decoder": decoder and decoder.settings(request, parts),
        "tokens_per_second": round(drawn / spent, 2) if spent else None,
    }


def stages(opened: Opened, request: ARRequest, compute: Compute) -> Iterator[Stage]:
    """Memory beside the weights; `benchmarks/ar_end_to_end.py` compares it."""
    config, tokenizer = opened.config, opened["tokenizer"].config
    size, window = compute.dtype.itemsize, astuple(window_shape(opened))
    if (text := opened.get("text")) and "text" not in unused(opened, request):
        yield Stage("text", "text", text.nbytes(compute) // 20)
    cells = prod(-(-side // tokenizer.patch) for side in window)
    widest = max(tokenizer.level_channels[0], tokenizer.patch_channels)
    # of a window; of a longer clip the keys and values of what was decoded stay besides
    beyond = max(0, latent_frames(opened, request) - config.grid.frames)
    past = 2 * beyond * config.grid.tokens_per_frame * tokenizer.level_channels[-1] * size
    coding = token_rows(opened, compute).largest(coding_bytes(cells, widest, size) + past)
    yield Stage("encode", "tokenizer", coding)
    rows = config.depth * config.length
    if config.context_width:
        rows += config.depth // config.context_every * opened.text_length
    part = opened["transformer"].part(compute).config
    cache = 2 * rows * part.num_kv_heads * config.head_size * size
    cache += 2 * CHUNK * config.vocabulary * torch.float32.itemsize  # noise of the draws
    # the longest prompt: gate, up and product of a part of it; and queries, keys, values
    prompt = longest_prefix(opened)
    prefill = 3 * part.hidden * min(prompt, FEED_FORWARD_ROWS) + 5 * config.width * prompt
    yield Stage("tokens", "transformer", compute.batch_size * cache + prefill * size)
    if decoder := opened.get("decoder"):
        yield from decoder.stages(opened, request, compute)
    else:
        yield Stage("decode", "tokenizer", coding)


def longest_prefix(opened: Opened) -> int:
    """Tokens that a window begins with at most: of an input, or of the window before."""
    config, temporal = opened.config, opened["tokenizer"].config.temporal
    known = latent_frames_of(max(ARRequest.INPUT_FRAMES.values()), temporal)
    latents = min(max(known, CARRIED), config.grid.frames - 1)  # one remains to draw
    return int(config.leading_tokens + latents * config.grid.tokens_per_frame)


def open_transformer(opened: Opened) -> Network[ARTransformerConfig]:
    """The transformer, whole or in tensor-parallel shards; config.json wins over shapes."""
    if not opened.settings:
        logger.info("no config.json in %s: the released grid is assumed", opened.folder)
    return open_network(opened.source, opened.settings)


def open_decoder(opened: Opened) -> Any:
    """The diffusion decoder, of released models unless disabled, of bundled ones if it is there."""
    disabled = opened.options.disable_diffusion_decoder
    if disabled is None and opened.place.bundled:
        disabled = opened.place.below(DECODERS.values()) is None
    if disabled:
        return None
    # only where it runs: its network is of another family
    from worldline.families.autoregressive import decoder

    return decoder.open_network(opened)


def open_encoder(opened: Opened) -> Any:
    """The text encoder T5; None of a base model, which takes no prompt."""
    if (width := opened.config.context_width) is None:
        if opened.options.text_encoder_dir is not None:
            raise InputError(f"text_encoder_dir: {opened.name} is a base model without prompts")
        return None
    from worldline.text.t5 import T5Files  # a base model needs none of it

    return T5Files.find(opened, width)


def presets(entry: Entry) -> dict[str, Any]:
    """Parts of a released model."""
    from worldline.families.autoregressive.decoder import RELEASED
    from worldline.text.encoder import TextPart
    from worldline.text.t5 import NUM_PARAMETERS, NUM_STREAMED

    config = PRESETS[entry.preset]
    return {
        **({"text": TextPart(NUM_PARAMETERS, NUM_STREAMED)} if config.context_width else {}),
        "tokenizer": Network(CosmosTokenizer, TOKENIZER_PRESETS["DV8x16x16"]),
        "decoder": RELEASED,
        "decoder_tokenizer": CosmosNetwork(CosmosTokenizer, TOKENIZER_PRESETS["CV8x8x8"]),
        "transformer": Network(ARTransformer, config),
    }


def layout(opened: Opened, requests: Sequence[ARRequest], count: int) -> Layout:
    """Every process holds its part of the heads, the feed-forward layers and the vocabulary."""
    config = opened.config
    if config.divisor % count:
        undivided = next(name for name in SHARED if getattr(config, name) % count)
        raise InputError(
            f"{opened.name}: {count} processes cannot share {undivided} "
            f"({getattr(config, undivided)}); give a video {', '.join(map(str, config.divisors))}, "
            f"or a batch a multiple with {option('data_parallel')}"
        )
    return Layout(tp=count)


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
            split=False,
        ),
        Part(
            "tokenizer",
            "offload_tokenizer",
            # the discrete one, preferably of the model's generation
            lambda opened: open_tokenizer(
                opened.place.find(TOKENIZERS[generation_by_name(opened.folder)])
            ),
        ),
        Part(
            "decoder_tokenizer",
            OFFLOAD_DECODER,
            lambda opened: (decoder := opened.get("decoder")) and decoder.open_tokenizer(opened),
            disable=DISABLE_DECODER,
        ),
        Part("decoder", OFFLOAD_DECODER, open_decoder, disable=DISABLE_DECODER),
        Part("transformer", "offload_ar_model", open_transformer),
    ),
    agree=(
        ("decoder_tokenizer", "latent_channels", "decoder", "latent_channels"),
        ("tokenizer", "vocabulary", "transformer", "vocabulary"),
        ("decoder_tokenizer", "temporal", "tokenizer", "temporal"),
    ),
    check=check,
    stages=stages,
    generate_together=generate_together,
    # None where no kernels run: several clips in step then save no time
    max_batch_size=lambda opened, compute: kernel_batch(opened.config, compute) or None,
    holds_batch=alternates,
    prepare=compile_kernels,
    presets=presets,
    guardrails=lambda opened: generation_by_name(opened.folder),
    video=video_of,
    unused=unused,
    report=report_entries,
    notes=notes,
    layout=layout,
)
