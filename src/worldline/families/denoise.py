"""Parts of a request that all denoising families share: prompts, known frames, steps, decoding.

Axes: B batch, C channels, T/H/W latent grid, S rows of a text embedding, E its width.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from worldline.errors import InputError, option
from worldline.family import Compute, Opened, Parts
from worldline.finite import check_finite, total
from worldline.guards import rewrites
from worldline.memory import Stage, denoise_bytes
from worldline.nn.attention import backend_name
from worldline.nn.dit import PATCH, DiTSizes, Tokens
from worldline.nn.pieces import Rows, decode_stream
from worldline.parallel.context import split_tokens
from worldline.parallel.halo import SharedRows, share_rows
from worldline.parallel.mesh import Axis, Layout
from worldline.report import Recorder, log_result
from worldline.request import VideoRequest
from worldline.sampling.cache import AUTO, OFF, PATTERN, StepCache, format_steps, parse_steps
from worldline.sampling.solvers import Stepped, Steps, standard_noise
from worldline.shapes import LatentShape, VideoShape, latent_frames_of
from worldline.step import Step
from worldline.video.convert import signed_to_uint8
from worldline.video.read import Clip, Frames

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Prompts = tuple[Tensor, Tensor | None]  # embeddings (1, S, E) of prompt and negative prompt


def read_prompts(opened: Opened, request: VideoRequest) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Embeddings, float32 (1, S, E), and texts to encode, by "prompt" and "negative_prompt".

    Without guidance the negative prompt is in neither.
    """
    config = opened.config
    embeddings: dict[str, Tensor] = {}
    negative = request.negative_prompt_embeddings if request.guidance else None
    sources = (request.prompt_embeddings, negative)
    if any(source is not None for source in sources):
        from worldline.text.embeddings import read_embeddings

        rows = opened.text_length if config.zero_padded else None
        embeddings = read_embeddings(*sources, width=config.text_width, rows=rows)
    texts = {} if request.prompt is None else {"prompt": request.prompt}
    if not request.guidance:
        embeddings.pop("negative_prompt", None)
    elif request.negative_prompt or not config.zero_padded:
        # where zeros were never learnt, an absent prompt is an empty one
        texts["negative_prompt"] = request.negative_prompt or ""
    return embeddings, {name: texts[name] for name in texts if name not in embeddings}


def check_prompts(opened: Opened, request: VideoRequest) -> None:
    """Refuse a request that has no prompt, or needs a text encoder that is missing."""
    embeddings, texts = read_prompts(opened, request)
    if "prompt" not in embeddings | texts and not rewrites(opened, request):
        raise InputError("there is no prompt; give prompt or prompt_embeddings")
    if texts or "prompt" not in embeddings:  # which is going to be written
        opened.require("text", " and ".join(texts) or "prompt")


def unused(opened: Opened, request: VideoRequest) -> dict[str, str]:
    """Fields and parts without effect on a request."""
    reasons = request.unused()
    if not request.guidance:
        reasons["guidance_parallel"] = "guidance is 0, all processes split the tokens"
    if request.prompt_embeddings is not None and not read_prompts(opened, request)[1]:
        reasons |= opened.encoder_unused
    return reasons


def check_size(
    opened: Opened, video: VideoShape, num_input_frames: int, longest: int | None = None
) -> None:
    """Refuse a size that cannot be denoised at once, with the nearest that can.

    `longest` counts latent frames; None is as many as the transformer has positions for.
    """
    most, tokenizer = opened.config.max_grid, opened["tokenizer"].config
    temporal, cell = tokenizer.temporal, PATCH[1] * tokenizer.spatial
    # with frames to make, so that what is suggested is not refused next
    least = 1 + latent_frames_of(num_input_frames, temporal) * temporal
    sides = f"a multiple of {cell}"
    wrong = []
    for name, value, first, step, low, high, form in (
        (
            "num_video_frames",
            video.frames,
            1,
            temporal,
            least,
            1 + ((longest or most.frames) - 1) * temporal,
            f"1 + {temporal}k above num_input_frames ({num_input_frames})",
        ),
        ("height", video.height, 0, cell, cell, most.height * cell, sides),
        ("width", video.width, 0, cell, cell, most.width * cell, sides),
    ):
        nearest = min(high, max(low, first + round((value - first) / step) * step))
        if value != nearest:
            wrong.append(
                f"{name} is {value}; it must be {form}, at most {high}: the nearest is {nearest}"
            )
    if wrong:
        raise InputError("\n".join(wrong))


def complete_cache(rule: str, count: int, threshold: float) -> str:
    """Rule of a step cache for so many steps, in which "auto" is a threshold.

    Raises:
        InputError: it names other steps.
    """
    if rule.startswith(PATTERN):
        try:
            parse_steps(rule, count)
        except ValueError as error:
            raise InputError(f"{option('step_cache', rule)}: {error}") from error
    return str(threshold) if rule == AUTO else rule


def start_cache(parts: Parts, rule: str, ratios: Sequence[float]) -> StepCache | None:
    """Step cache of a sampler's run, see `StepCache`; None where it is off."""
    return None if rule == OFF else StepCache(rule, ratios, parts.compute.mesh.video.share)


def record_cache(recorder: Recorder, cache: StepCache | None) -> None:
    """Add a run's computed steps to the report, and to the log."""
    if cache:
        steps, ran = format_steps(cache.computed), len(cache.computed)
        logger.info(
            "step cache %s: %d of %d steps computed, %s", cache.rule, ran, len(cache.ratios), steps
        )
        new = {"rule": cache.rule, "steps": 0, "computed": 0, "patterns": []}
        entry = recorder.facts.setdefault("step_cache", new)
        entry["steps"] += len(cache.ratios)
        entry["computed"] += ran
        entry["patterns"].append(steps)


def grid_of(opened: Opened, video: VideoShape) -> LatentShape:
    tokenizer = opened["tokenizer"].config
    return video.latent(tokenizer.temporal, tokenizer.spatial)


def stages(
    opened: Opened,
    request: VideoRequest,
    compute: Compute,
    video: VideoShape,
    coding: tuple[int, int],
    features: int = 0,
) -> Iterator[Stage]:
    """Memory beside the weights, for a video denoised at once.

    `coding` is bytes that the tokenizer needs to encode the known frames, and to decode; `features`
    is bytes of the prompts' embeddings.
    """
    if (text := opened.get("text")) and "text" not in unused(opened, request):
        yield Stage("text", "text", text.nbytes(compute) // 20 + features)
    config, grid = opened.config, grid_of(opened, video)
    rows = share_rows(compute.mesh, video, opened["tokenizer"].config.spatial)
    yield Stage("encode", "tokenizer", rows.largest(coding[0]))
    guided, off = bool(request.guidance), request.step_cache == OFF
    halves, sharing = split_work(opened, compute, config, grid, guided)
    denoising = denoise_bytes(
        *(config, grid, compute.dtype, opened.text_length),
        fused=compute.fused,
        sharing=sharing,
        cached=0 if off else 1 + (guided and halves.count == 1),
    )
    yield Stage("denoise", "transformer", features + denoising)
    yield Stage("decode", "tokenizer", rows.largest(coding[1]))


def layout(opened: Opened, requests: Sequence[VideoRequest], count: int) -> Layout:
    """Guidance branches on two halves of the processes, which split the tokens of their branch.

    A step then exchanges one output, a network split over all exchanges in every block.

    Raises:
        InputError: so many processes cannot share the smallest of the videos.
    """
    options, heads = opened.options, opened.config.num_heads
    cell = PATCH[1] * opened["tokenizer"].config.spatial
    cells = max(1, min((r.height // cell) * (r.width // cell) for r in requests))
    guided = [bool(request.guidance) for request in requests]

    def split(count: int) -> tuple[Layout, str]:
        """A layout, and what forbids it."""
        halves = {"on": any(guided), "off": False, "auto": all(guided) and count % 2 == 0}
        cfg = 1 + (count > 1 and halves[options.guidance_parallel])
        sharing = count // cfg if all(guided) else count  # those of a branch, or of the only one
        problem = ""
        if count % cfg:
            problem = f"{option('guidance_parallel', 'on')}: {count} processes are an odd number; "
        elif sharing > cells:
            problem = f"{sharing} processes cannot share {cells} tokens of a latent frame; "
        elif options.context_parallel == "ulysses" and heads % sharing:
            called, other = (option("context_parallel", way) for way in ("ulysses", "ring"))
            problem = f"{called}: {sharing} processes cannot share {heads} heads; give {other}, or "
        return Layout(cfg=cfg, cp=count // cfg), problem

    found, problem = split(count)
    if problem:
        possible = (n for n in range(1, 2 * count) if not split(n)[1])
        nearest = sorted(possible, key=lambda n: abs(n - count))[:6]
        raise InputError(f"{problem}give a video {', '.join(map(str, sorted(nearest)))}")
    return found


def split_work(
    opened: Opened, compute: Compute, config: DiTSizes, grid: LatentShape, guided: bool
) -> tuple[Axis, Tokens]:
    """Processes that compute a branch of guidance each, and tokens as those of a branch share them.

    Without two branches that are computed apart, all processes share the tokens.
    """
    mesh, way = compute.mesh, opened.options.context_parallel
    halves, axis = (mesh.cfg, mesh.cp) if guided and mesh.cfg.count > 1 else (Axis(), mesh.video)
    return halves, split_tokens(axis, config.tokens(grid), config.num_heads, way)


def attention_entries(
    parts: Parts, config: DiTSizes, grid: LatentShape, guided: bool
) -> dict[str, Any]:
    """Report entries of a transformer's tokens and attention, for what is denoised at once."""
    halves, tokens = split_work(parts.opened, parts.compute, config, grid, guided)
    count = config.tokens(grid).tokens
    backend = backend_name(parts.device, parts.compute.dtype, tokens.num_queries(count))
    ways = (backend, str(tokens), "guidance halves" if halves.count > 1 else "")
    return {"tokens": count, "attention": ", ".join(filter(None, ways))}


@contextmanager
def stage(recorder: Recorder, name: str) -> Iterator[None]:
    """Record a stage, whose peak does not count unused memory that earlier stages cached."""
    if recorder.device.type == "cuda":
        torch.cuda.empty_cache()
    with recorder.stage(name):
        yield


@torch.inference_mode()
def generate(
    parts: Parts,
    clip: Clip | None,
    request: VideoRequest,
    recorder: Recorder,
    *,
    encode_frames: Callable[[Parts, Any, Any, Rows], Tensor],
    sample: Callable[..., tuple[int, Steps]],
    ratios: Callable[[Opened, Any], Sequence[float]],
    windows: Callable[[Opened, Any], list[tuple[Any, int]]] = (
        lambda opened, request: [(request, request.num_video_frames)]
    ),
    restore: Callable[[Parts, Tensor], Tensor] = lambda parts, latents: latents,
) -> Generator[Step, None, None]:
    """Prompt, image or clip -> video; the last step holds all its frames.

    The known frames in the result are the tokenizer's reconstruction of the input, as in the
    references. What families add:

    Args:
        parts: of the model.
        clip: input; windows behind the first continue the video itself.
        request: a checked one.
        recorder: of the stages.
        encode_frames: (parts, clip, window, rows of this process) -> latents (1, C, t, H, W) of the
            known frames, with the tokenizer on its device.
        sample: (parts, window, transformer, noise, known latents, prompts, step cache) -> number of
            steps, and the steps.
        ratios: (opened, request) -> noise over data in each evaluation of a guided network.
        windows: (opened, request) -> what is denoised at once, each with the number of frames that
            are made then.
        restore: (parts, latents) -> latents as the tokenizer gives them.
    """
    prompts = yield from encode_prompts(parts, request, recorder)
    recorder.facts["negative_prompt"] = prompts[1] is not None
    # all at once, as long as they are: to join pieces would hold a long video twice
    frames = np.empty((*astuple(request.video), 3), np.uint8)
    made = planned = 0

    def preview(done: int, denoised: Tensor) -> Frames | None:
        if not request.preview_every or done % request.preview_every:
            return None
        return preview_frames(restore(parts, denoised.float()), parts.colours, spatial)

    spatial = parts.opened["tokenizer"].config.spatial
    rows = share_rows(parts.compute.mesh, request.video, spatial)
    todo = windows(parts.opened, request)
    for number, (window, end) in enumerate(todo):
        if made:
            last = frames[made - window.num_input_frames : made]
            clip = rows.axis.once(partial(Clip, last, request.fps))
        known = None
        if window.num_input_frames or request.preview_every:
            yield Step("encode", 0, 1)
            with stage(recorder, "encode"), parts.tokenizer.on_device():
                if window.num_input_frames:
                    known = rows.computing.once(partial(encode_frames, parts, clip, window, rows))
                    check_finite(total(known), "encode: latents", parts.compute.dtype)
                    log_result("encode", known)
                if request.preview_every:
                    parts.colours  # noqa: B018 - fitted while the tokenizer is there

        grid = grid_of(parts.opened, window.video)
        tokens = parts.config.tokens(grid).tokens // parts.compute.mesh.video.count
        with stage(recorder, "denoise"), parts.transformer.on_device(tokens) as model:
            shape = (1, parts.config.latent_channels, *astuple(grid))
            noise = standard_noise(window.seed, shape)
            cache = start_cache(parts, window.step_cache, ratios(parts.opened, window))
            inputs = window, model, noise.to(parts.device), known, prompts, cache
            count, steps = sample(parts, *inputs)
            planned = count * len(todo)
            dtype, before = parts.compute.dtype, number * count
            latents = yield from report(steps, recorder, dtype, planned, before, preview)
            record_cache(recorder, cache)
            log_result("denoise", latents)

        yield Step("decode", made, len(frames))
        with stage(recorder, "decode"), parts.tokenizer.on_device() as tokenizer:
            pieces = decode_stream(tokenizer, restore(parts, latents), rows)
            first = min(made, window.num_input_frames)
            decoding = decode(pieces, frames, made, first, end, rows)
            made = yield from rows.computing.steps_once(decoding)
    yield Step("done", planned, planned, frames)


def encode_prompts(
    parts: Parts, request: VideoRequest, recorder: Recorder
) -> Generator[Step, None, Prompts]:
    """Embeddings of the prompts; None for an absent negative one."""
    yield Step("text", 0, 1)
    with stage(recorder, "text"):
        embeddings, texts = read_prompts(parts.opened, request)
        if texts:
            encoder, once = parts.loaded["text"], parts.compute.mesh.video.once
            encoded = once(lambda: encoder.embed([*texts.values()]))
            embeddings |= {name: encoded[text] for name, text in texts.items()}
            recorder.facts["prompt_truncation"] = once(lambda: encoder.truncations(texts))
        log_result("text", embeddings["prompt"])
        return embeddings["prompt"], embeddings.get("negative_prompt")


def conditioned(
    parts: Parts,
    model: Any,
    noise: Tensor,
    known: Tensor | None,
    prompts: Prompts,
    positions: Any,
    cache: StepCache | None = None,
) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """Network as samplers call it: (latents, times, branch with the prompt?) -> output.

    The text is encoded once for all steps: it does not change, and is by far the widest input.
    Where two halves of the processes compute a branch each, both have both outputs, once that with
    the prompt is asked for.
    """
    grid, guided = LatentShape(*noise.shape[2:]), prompts[1] is not None
    halves, tokens = split_work(parts.opened, parts.compute, model.config, grid, guided)
    contexts = [x if x is None else model.encode_context(x) for x in halves.deal(prompts)]
    outputs: list[Tensor] = []
    given = 0 if known is None else known.shape[2]
    mask = None
    if model.config.condition_mask:
        mask = torch.zeros_like(noise[:1, :1])
        mask[:, :, :given] = 1

    def network(x: Tensor, times: Tensor, conditional: bool) -> Tensor:
        if conditional or halves.count == 1:
            if cache:
                cache.enter(x[:, :, given:], conditional)
            inputs = x, times, contexts[not conditional], positions
            y = model(*inputs, condition_mask=mask, tokens=tokens, cache=cache)
            outputs[:] = halves.parts(y)
        return outputs.pop(0)

    return network


def report(
    steps: Generator[Stepped, None, Result],
    recorder: Recorder,
    dtype: torch.dtype,
    planned: int,
    before: int,
    preview: Callable[[int, Tensor], Frames | None] = lambda done, denoised: None,
) -> Generator[Step, None, Result]:
    """Result of a sampler, with a `Step` before the first and after each of its steps.

    `dtype` is the network's, `planned` is steps of the whole request, `before` those of earlier
    samplers; previews are of the steps done and their denoised latents. The recorder receives the
    seconds of each step. Raises `NonFiniteError` behind the step whose latents are not finite.
    """
    seconds = recorder.facts.setdefault("seconds_of_steps", [])
    done = 0
    yield Step("denoise", before, planned)
    while True:
        started = time.perf_counter()
        try:
            x, denoised = next(steps)
        except StopIteration as stop:
            return stop.value
        # travels while the device is waited for
        totals = total(x).to("cpu", non_blocking=x.is_cuda)
        if recorder.device.type == "cuda":
            torch.cuda.synchronize(recorder.device)
        seconds.append(round(time.perf_counter() - started, 4))
        done += 1
        check_finite(totals, f"step {before + done} of {planned}: latents", dtype)
        yield Step("denoise", before + done, planned, preview=preview(done, denoised))


def preview_frames(latents: Tensor, colours: Tensor, spatial: int) -> Frames:
    """Rough colours of latents, uint8 (T, h, w, 3), at a quarter of the video's size or more.

    The latents (1, C, T, H, W) are as the tokenizer gives them, `colours` of `fit_colours`.
    """
    # those of the first latent frame, then of all others: (T, C + 1, 3)
    maps = colours.to(latents.device)[[0, *[1] * (latents.shape[2] - 1)]]
    cells = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)[0].float()
    pictures = torch.einsum("cthw,tcd->dthw", cells, maps)
    times = -(-spatial // 4)
    return signed_to_uint8(pictures).repeat(times, axis=1).repeat(times, axis=2)


def decode(
    pieces: Iterator[Tensor], frames: Frames, made: int, first: int, end: int, rows: SharedRows
) -> Generator[Step, None, int]:
    """Write a video into `frames`, from frame `made` on, as it is decoded; the number made then.

    Args:
        pieces: of the video, (1, 3, T, H, W) in about [-1, 1]; asked for no further than needed.
        frames: all frames of the request; written in the first process.
        made: number of frames that are there.
        first: first frame of the pieces that is kept.
        end: number of frames that are there at the end.
        rows: which the pieces have.
    """
    for piece in pieces:
        new = signed_to_uint8(piece[0], rows.join)[first : first + end - made]
        first = max(0, first - piece.shape[2])
        if len(new):
            if rows.axis.first:
                frames[made : made + len(new)] = new
            made += len(new)
            yield Step("decode", made, len(frames), new)
        if made == end:
            break
    return made
