"""Clip or image, and perhaps a prompt -> tokens -> continued tokens -> video.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/inference/world_generation_pipeline.py`.
Base models read tokens alone. Video2World models read a begin token before them, and attend to all
rows of the prompt's embedding, those behind its end too, which are zeros: as in the released code,
whose models were trained so.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
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
from worldline.nn.pieces import CausalCache
from worldline.pipelines.background import in_background
from worldline.pipelines.decoder import (
    DecoderSettings,
    cut_windows,
    decode_frames,
    denoise_windows,
)
from worldline.pipelines.diffusion import SAMPLER_OF
from worldline.pipelines.exchange import stage
from worldline.pipelines.prompts import TRUNCATION
from worldline.pipelines.requests import LARGEST_SIZE, AutoregressiveRequest
from worldline.report import Recorder
from worldline.sampling.decode import decode, draw_noise
from worldline.sampling.logits import Sampling
from worldline.shapes import VideoShape, latent_frames_of, nearest_frames
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.video.convert import condition_frames, to_uint8
from worldline.video.read import Clip

FPS = 25.0  # of every autoregressive output, whatever the input's was


@dataclass(frozen=True)
class Progress:
    """Where a request stands.

    Attributes:
        kind: "text", "encode", "tokens", "denoise", "decode" or "done".
        done: how much of it.
        total: of how much.
        frames: pixels that are final, uint8 (T, H, W, 3): new ones, of "done" all.
        clip: which one, where there are several.
    """

    kind: str
    done: int
    total: int
    frames: NDArray[np.uint8] | None = None
    clip: int = 0


@dataclass(frozen=True)
class Job:
    """A clip that is continued in step with others.

    Attributes:
        clip: input frames, at least `request.num_input_frames` of them.
        request: how.
        recorder: is told seconds and memory of the stages that are this clip's alone.
        embedding: in place of the prompt, (1, S, E).
    """

    clip: Clip
    request: AutoregressiveRequest
    recorder: Recorder
    embedding: Tensor | None = None


def check_room(
    config: ARTransformerConfig, tokenizer: CosmosTokenizerConfig, request: AutoregressiveRequest
) -> None:
    """Refuse a length that the model cannot make, of what it is given.

    Raises:
        InputError: no frame would be left to make, or the length does not fit.
    """
    own, window = video_shape(config, tokenizer).frames, config.grid.frames
    if latent_frames_of(request.num_input_frames, tokenizer.temporal) >= window:
        raise InputError(
            f"this model makes {own} frames, "
            f"but num_input_frames is {request.num_input_frames}; give --num_input_frames 1"
        )
    frames, temporal = video_of(config, tokenizer, request).frames, tokenizer.temporal
    most = 1 + (LARGEST_SIZE - 1) // temporal * temporal
    nearest = min(max(own, nearest_frames(frames, temporal)), most)
    if nearest != frames:
        raise InputError(
            f"num_video_frames is {frames}; it must be 1 + {temporal}k and at least {own}: the "
            f"nearest is {nearest}"
        )
    if frames > own and request.rollout == "pixels" and window <= CARRIED:
        raise InputError(
            f"this model makes {window} latent frames at once, of which rollout pixels takes over "
            f"{CARRIED}: nothing is left to make; use rollout tokens"
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


def video_of(
    config: ARTransformerConfig, tokenizer: CosmosTokenizerConfig, request: AutoregressiveRequest
) -> VideoShape:
    """Return the size of what a request makes, the given frames included."""
    own = video_shape(config, tokenizer)
    return replace(own, frames=request.num_video_frames or own.frames)


def alternates(
    config: ARTransformerConfig, tokenizer: CosmosTokenizerConfig, request: AutoregressiveRequest
) -> bool:
    """Tell whether drawing and decoding take turns, window by window.

    Clips in step then hold all their frames at once. Otherwise all tokens are drawn first, and the
    clips decoded one after another.
    """
    latents = latent_frames_of(video_of(config, tokenizer, request).frames, tokenizer.temporal)
    return request.rollout == "pixels" and latents > config.grid.frames


def continue_clips(
    parts: AutoregressiveParts, jobs: Sequence[Job], recorder: Recorder
) -> Iterator[Progress]:
    """Continue clips in step; yield progress, and of each clip at last all its frames.

    Each draws the tokens that it draws alone. The given frames in a result are the reconstruction
    of the input from its tokens, as in the reference.

    Args:
        parts: the networks.
        jobs: the clips; their requests differ in seeds and prompts alone.
        recorder: is told seconds and memory of the stages that the clips share; of one clip it may
            be the clip's own.

    Raises:
        InputError: a clip is too short, or the model and a prompt do not go together.
        CheckpointError: the text encoder is needed, and absent or damaged.
    """
    for job in jobs:
        check_prompt(parts.files, job.request, job.embedding)
    request = jobs[0].request
    embeddings: Sequence[Tensor | None] = [None] * len(jobs)
    if parts.config.context_width is not None:
        embeddings = yield from _embed(parts, jobs, recorder)

    config, tokenizer = parts.config, parts.tokenizer.module.config
    temporal = tokenizer.temporal
    given = latent_frames_of(request.num_input_frames, temporal)
    video = video_of(config, tokenizer, request)
    window, latents = config.grid.frames, latent_frames_of(video.frames, temporal)
    yield Progress("encode", 0, 1)
    clips = [job.clip for job in jobs]
    cells = _encode(parts, clips, request.num_input_frames, recorder)
    count = (latents - given) * config.grid.tokens_per_frame
    drawing = _Drawing(parts, request, [job.request.seed for job in jobs], embeddings, count)
    if not alternates(config, tokenizer, request):
        live = drawing.begin_live(given, video)
        cells = yield from drawing.run(cells, latents - given, recorder, live)
        for number, job in enumerate(jobs):
            one = live or _Decoding(number, given, video)
            if live is None:
                yield from _decode(parts, one, cells[number : number + 1], job, embeddings[number])
            yield Progress("done", count, count, one.frames, number)
        return

    made = [_Decoding(number, given, video) for number in range(len(jobs))]
    taken = 1 + (CARRIED - 1) * temporal  # frames that a window takes over
    left = latents - given
    while True:
        new = min(left, window - made[0].given)
        cells = yield from drawing.run(cells, new, recorder)
        for one, job in zip(made, jobs, strict=True):
            own = cells[one.number : one.number + 1]
            yield from _decode(parts, one, own, job, embeddings[one.number])
        left -= new
        if not left:
            break
        for one in made:
            one.begin_window(CARRIED, taken)
        ends = [Clip(one.frames[one.made - taken : one.made], FPS) for one in made]
        cells = _encode(parts, ends, taken, recorder)
    for one in made:
        yield Progress("done", count, count, one.frames, one.number)


def _embed(
    parts: AutoregressiveParts, jobs: Sequence[Job], recorder: Recorder
) -> Generator[Progress, None, list[Tensor]]:
    """Return the embedding of every prompt, (1, S, E)."""
    # a job without an embedding has a prompt: `check_prompt` has seen to it
    prompts = [str(job.request.prompt) for job in jobs if job.embedding is None]
    found: Mapping[str, Tensor] = {}
    if prompts:
        assert parts.text is not None  # likewise
        yield Progress("text", 0, 1)
        with recorder.stage("text"):
            found = parts.text.embed(prompts)
            for job in jobs:
                if job.embedding is None:
                    words = {"prompt": str(job.request.prompt)}
                    job.recorder.facts[TRUNCATION] = parts.text.truncations(words)
    return [
        found[str(job.request.prompt)] if job.embedding is None else job.embedding for job in jobs
    ]


def _encode(
    parts: AutoregressiveParts, clips: Sequence[Clip], num_input_frames: int, recorder: Recorder
) -> Tensor:
    """Return the token ids of the ends of clips, (B, tokens), int64."""
    config, shape = parts.tokenizer.module.config, parts.video
    # the tokenizer is causal: what follows the given frames would not change their tokens
    used = 1 + (latent_frames_of(num_input_frames, config.temporal) - 1) * config.temporal
    found = []
    with recorder.stage("encode"), torch.inference_mode(), parts.tokenizer.on_device() as tokenizer:
        weight = tokenizer.quant_conv.weight
        for clip in clips:  # one at a time, so that each gets the ids that it gets alone
            frames = condition_frames(clip, num_input_frames, used, shape.height, shape.width)
            ids = tokenizer.encode_tokens(frames.to(parts.device, weight.dtype))
            found.append(ids.flatten(1).long())
        return torch.cat(found)


class _Decoding:
    """The frames of one clip, as they come out of its tokens.

    Attributes:
        number: of the clip.
        given: latent frames that the window begins with.
        frames: of the whole clip, uint8 (T, H, W, 3).
        made: how many of them there are so far.
        latents: latent frames of the window that were decoded.
    """

    def __init__(self, number: int, given: int, video: VideoShape) -> None:
        self.number, self.made = number, 0
        # all at once: to join pieces would hold a long video twice
        self.frames = np.empty((video.frames, video.height, video.width, 3), np.uint8)
        self.begin_window(given, 0)

    def begin_window(self, given: int, again: int) -> None:
        """Begin anew with `given` latent frames; the first `again` frames are there already."""
        self.given, self.skip = given, again
        self.latents, self.cache = 0, CausalCache()

    @property
    def progress(self) -> Progress:
        return Progress("decode", self.made, len(self.frames), clip=self.number)

    def add(self, piece: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """Keep and return the frames of a piece that are new."""
        fresh = piece[self.skip :]
        self.skip = max(0, self.skip - len(piece))
        begun, self.made = self.made, self.made + len(fresh)
        self.frames[begun : self.made] = fresh
        return self._since(begun)

    @torch.inference_mode()
    def decode(self, tokenizer: CosmosTokenizer, tokens: Tensor) -> NDArray[np.uint8] | None:
        """Return the new frames, uint8 (T, H, W, 3), of all ids (1, t, h, w) of the window so far.

        Latent frames are decoded in the same pieces whenever they come, so that a video does not
        depend on it: those that are given together, then one by one.
        """
        codes = tokenizer.to_codes(tokens[:, self.latents :])
        first = [] if self.latents else [self.given]
        begun = self.made
        for piece in codes.split([*first, *[1] * (codes.shape[2] - sum(first))], dim=2):
            video = tokenizer.decode(piece, self.cache)[0]
            self.add(to_uint8(video * 0.5 + 0.5))
        self.latents = tokens.shape[1]
        return self._since(begun)

    def _since(self, begun: int) -> NDArray[np.uint8] | None:
        return self.frames[begun : self.made] if self.made > begun else None


class _Drawing:
    """The tokens of clips in step.

    Attributes:
        done: tokens drawn for each clip.
        count: that will have been drawn at last.
    """

    def __init__(
        self,
        parts: AutoregressiveParts,
        request: AutoregressiveRequest,
        seeds: Sequence[int],
        embeddings: Sequence[Tensor | None],
        count: int,
    ) -> None:
        self.parts, self.clips = parts, len(seeds)
        self.done, self.count = 0, count
        self.sampling = Sampling(temperature=request.temperature, top_p=request.top_p)
        self.noise: Iterator[Tensor] | None = None
        if not self.sampling.greedy:
            self.noise = draw_noise(seeds, parts.config.vocabulary, count, parts.device)
        self.context: Tensor | None = None
        if given := [one for one in embeddings if one is not None]:
            self.context = torch.cat(given).to(parts.device)

    def begin_live(self, given: int, video: VideoShape) -> _Decoding | None:
        """Return what decodes a clip while it is drawn; None where frames wait for all tokens.

        They do not where both networks are on the device at once.
        """
        parts = self.parts
        moves = parts.tokenizer.offload or parts.transformer.offload
        return None if moves or parts.decoder or self.clips > 1 else _Decoding(0, given, video)

    def run(
        self, cells: Tensor, new: int, recorder: Recorder, live: _Decoding | None = None
    ) -> Generator[Progress, None, Tensor]:
        """Draw `new` latent frames behind ids (B, given); return all ids (B, t, h, w)."""
        config, grid = self.parts.config, self.parts.config.grid
        size, begun = grid.tokens_per_frame, self.done
        prompt = F.pad(cells, (config.leading_tokens, 0), value=config.begin_token)
        with self.parts.transformer.on_device() as transformer:
            positions = make_positions(config, self.parts.device, transformer.head.weight.dtype)
            decoder = make_decoder(
                transformer, positions, self.sampling, batch=len(cells), context=self.context
            )
            recorder.facts["decoder"] = decoder.name
            steps = decode(decoder, prompt, new * size, self.noise)

            def told(frames: NDArray[np.uint8] | None = None) -> Progress:
                return Progress("tokens", self.done, self.count, frames)

            with recorder.stage("prefill"):
                self.done = begun + next(steps)
                yield told()
            for frame in range(1, new + 1) if live else (new,):
                with recorder.stage("tokens"):
                    while self.done < begun + frame * size:
                        self.done = begun + next(steps)
                        if live is None or self.done < begun + frame * size:
                            yield told()
                if live is not None:
                    with recorder.stage("decode"):
                        known = decoder.tokens[:, config.leading_tokens :]
                        known = known[:, : cells.shape[1] + frame * size]
                        ids = known.unflatten(1, (-1, grid.height, grid.width))
                        frames = live.decode(self.parts.tokenizer.module, ids)
                    yield told(frames)
            tokens = decoder.tokens[:, config.leading_tokens :]
            del decoder, steps  # the cache, before the next part needs the room
        return tokens.unflatten(1, (-1, grid.height, grid.width))


def _decode(
    parts: AutoregressiveParts, one: _Decoding, tokens: Tensor, job: Job, embedding: Tensor | None
) -> Iterator[Progress]:
    """Decode the ids (1, t, h, w) of one clip's window; yield progress with new frames."""
    if parts.decoder is not None:
        coarse, fine = parts.tokenizer.module.config, parts.decoder.tokenizer.module.config
        finer = coarse.spatial // fine.spatial
        yield from _decode_by_diffusion(parts.decoder, one, tokens, finer, job, embedding)
        return
    yield one.progress
    with job.recorder.stage("decode"), parts.tokenizer.on_device() as tokenizer:
        frames = one.decode(tokenizer, tokens)
    yield replace(one.progress, frames=frames)


def decoder_settings(decoder: DecoderParts, request: AutoregressiveRequest) -> DecoderSettings:
    """Return how the tokens of a request are decoded by diffusion."""
    weights = str(decoder.transformer.module.dtype).removeprefix("torch.")
    return DecoderSettings(
        sampler=SAMPLER_OF[decoder.generation],
        seed=request.seed,
        seam=request.decoder_seam,
        rotary_precision=decoder.rotary_precision or weights,
    )


def _decode_by_diffusion(
    parts: DecoderParts,
    one: _Decoding,
    tokens: Tensor,
    finer: int,
    job: Job,
    embedding: Tensor | None,
) -> Iterator[Progress]:
    """Do so by diffusion, window after window; a token is `finer` latent cells wide and high."""
    context = parts.context if embedding is None else embedding
    assert context is not None  # told when the files were opened
    settings = decoder_settings(parts, job.request)
    windows = cut_windows(tokens)
    # a window depends on its tokens alone, but the released seam fades from one into the next
    groups = windows if settings.seam == "corrected" else [tokens]
    progress = Progress("denoise", 0, settings.count_steps(len(windows)), clip=one.number)
    for number, group in enumerate(groups):
        with stage(job.recorder, "denoise"):
            yield progress
            latents = yield from _denoise(parts, group, context, settings, finer, progress)
        progress = replace(progress, done=progress.done + settings.count_steps(len(latents)))
        yield one.progress
        with stage(job.recorder, "decode"):
            frames = tokens.shape[1]
            for piece in decode_frames(parts, latents, frames, settings.seam, first=number):
                fresh = one.add(piece)
                yield replace(one.progress, frames=fresh)


def _denoise(
    parts: DecoderParts,
    tokens: Tensor,
    context: Tensor,
    settings: DecoderSettings,
    finer: int,
    begun: Progress,
) -> Generator[Progress, None, list[Tensor]]:
    """Return the latents of the windows of some ids; yield progress from `begun` on."""
    device = parts.transformer.device
    # a thread begins on the first GPU, whatever this one is on
    gpu = torch.cuda.current_device() if device.type == "cuda" else None
    if device.index is not None:
        gpu = device.index

    def work(tell: Callable[[Progress], None]) -> list[Tensor]:
        chosen = torch.cuda.device(gpu) if device.type == "cuda" else nullcontext()
        with chosen, parts.transformer.on_device() as transformer:
            return denoise_windows(
                transformer,
                tokens,
                context,
                settings,
                finer=finer,
                on_step=lambda done: tell(replace(begun, done=begun.done + done)),
            )

    return (yield from in_background(work))
