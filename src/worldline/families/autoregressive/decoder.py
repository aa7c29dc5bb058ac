"""Tokens -> latents by diffusion -> video: the diffusion decoder of the autoregressive worlds.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/diffusion_decoder/{inference,model,utils}.py`;
NVIDIA/Cosmos, the same below `cosmos1/models/autoregressive/diffusion_decoder/`.
Axes: B batch, C channels, T/H/W latent grid, h/w rows and columns of tokens, S rows of a text.

A clip is decoded window by window, 8 latent frames (57 frames) at once, of which 2 are shared with
the window before. Each window starts from the same noise, that of the seed, as in Cosmos 1.0
(Predict1 goes on with one global generator, which cannot be repeated), so that a window depends on
its tokens alone.

The seam: latent frame 0 of a window decodes to one frame and each other one to eight, so two shared
latent frames are the last frames of the earlier window and the first nine of the later one. These
nine are dropped, and time runs on evenly. The released code blends two frames in their place, so
that time jumps back by seven frames at every seam; that is `seam="as_released"`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, get_args

import torch
from torch import Tensor

from worldline.catalog import DECODERS, Generation, generation_by_name
from worldline.errors import CheckpointError
from worldline.families.autoregressive.request import ARRequest, Seam
from worldline.families.denoise import report, stage
from worldline.families.diffusion.family import (
    TOKENIZERS,
    encode_and_decode_bytes,
    open_latent_tokenizer,
)
from worldline.families.diffusion.model import (
    BLOCKS,
    DECODER_WINDOW,
    PRESETS,
    DiT,
    DiTConfig,
    Positions,
)
from worldline.families.diffusion.request import Precision
from worldline.families.diffusion.weights import open_network as open_dit
from worldline.family import Compute, Opened, Parts
from worldline.memory import Stage, denoise_bytes
from worldline.nn.dit import Context
from worldline.nn.pieces import decode_stream
from worldline.report import Recorder, log_result
from worldline.sampling.edm import SAMPLER_OF, SIGMA_DATA, make_sigmas, sample
from worldline.sampling.edm import Network as Denoiser
from worldline.sampling.solvers import Stepped, standard_noise
from worldline.sampling.tokens import blend_windows, split_windows
from worldline.shapes import LatentShape
from worldline.step import Step
from worldline.text.encoder import MAX_LENGTH
from worldline.tokenizers.cosmos.model import (
    CosmosTokenizer,
    CosmosTokenizerConfig,
    LatentStatistics,
)
from worldline.tokenizers.cosmos.weights import CosmosNetwork
from worldline.video.convert import signed_to_uint8
from worldline.weights.checkpoint import Checkpoint, open_checkpoint
from worldline.weights.networks import Network, read_settings

OVERLAP = 2  # latent frames that a window shares with the one before
GUIDANCE = 1.8
NUM_STEPS = 15
SIGMA_MIN = 0.02
FPS = 24.0  # of the motion, for the network, whatever the rate of the file


@dataclass(frozen=True)
class DecoderNetwork(Network[DiTConfig]):
    """The transformer of the diffusion decoder.

    Attributes:
        aux: holds the embedding of a general prompt; None where every request brings its own.
        generation: whose sampler it is run with.
        rotary_precision: of the rotary angles; None is that of the weights, as released.
    """

    aux: Checkpoint | None = None
    generation: Generation = "Predict1"
    rotary_precision: str | None = None
    window: ClassVar[int] = DECODER_WINDOW  # latent frames that are denoised at once

    @property
    def files(self) -> list[Path]:
        return [*super().files, *(self.aux.files if self.aux else ())]

    @cached_property
    def context(self) -> Tensor | None:
        """Embedding of the general prompt, float32 (1, S, E); None where there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        if self.aux is None:
            return None
        context = self.aux.read("context").float()
        if not context.isfinite().all():
            raise CheckpointError(f"{self.aux.path}: context is not finite; download it again")
        return context


RELEASED = DecoderNetwork(DiT, PRESETS["7B-Decoder"], blocks=BLOCKS)


def open_network(opened: Opened) -> DecoderNetwork:
    """The diffusion decoder; that of the model's own generation is preferred."""
    place, config = opened.place, opened["transformer"].config
    own = generation_by_name(opened.folder)
    order = sorted(DECODERS, key=lambda generation: generation != own)
    with without_decoder():
        folder = place.below(DECODERS[generation] for generation in order)
        if folder is None:
            names = " nor ".join(DECODERS[generation] for generation in order)
            raise CheckpointError(f"no diffusion decoder: neither {names} is in {place.searched}")
        settings = read_settings(folder)
        precision = settings.get("rotary_precision")
        if precision not in (None, *get_args(Precision)):
            raise CheckpointError(f"{folder / 'config.json'}: rotary_precision is {precision!r}")
        network = open_dit(folder, settings)
        if not network.config.vocabulary:
            raise CheckpointError(f"{folder} is a diffusion model, which reads no token ids")
        if network.config.vocabulary != config.vocabulary:
            raise CheckpointError(
                f"{folder} reads {network.config.vocabulary} token ids, {opened.folder} draws "
                f"{config.vocabulary}: they do not belong together"
            )
        aux = None
        if config.context_width is None:
            aux = open_aux(folder, network.config.context_width)
        elif config.context_width != network.config.context_width:
            raise CheckpointError(
                f"{folder} reads text of width {network.config.context_width}, {opened.folder} of "
                f"{config.context_width}: they do not belong together"
            )
    return DecoderNetwork(
        **{**vars(network), "blocks": BLOCKS},
        aux=aux,
        generation=generation_by_name(folder),
        rotary_precision=precision,
    )


@contextmanager
def without_decoder() -> Iterator[None]:
    """Add to an error which flag runs without the decoder."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --disable_diffusion_decoder runs without") from error


def open_aux(folder: Path, width: int) -> Checkpoint:
    """The file of the general prompt; its mask is never used, whatever it holds.

    Raises:
        CheckpointError: it is absent, damaged, or of another width.
    """
    paths = [folder / name for name in ("aux_vars.pt", "aux_vars.safetensors")]
    aux = open_checkpoint(next(filter(Path.exists, paths), paths[0]))
    info = aux.tensors.get("context")
    known = aux.tensors.keys() <= {"context", "context_mask"}
    if info is None or not known or not info.dtype.is_floating_point:
        raise CheckpointError(f"{aux.path} has {', '.join(sorted(aux.tensors)[:4])}; give context")
    if len(info.shape) != 3 or info.shape[0] != 1 or not info.shape[1] or info.shape[2] != width:
        raise CheckpointError(
            f"{aux.path}: context is {list(info.shape)}, [1, rows, {width}] is expected"
        )
    return aux


def open_tokenizer(opened: Opened) -> CosmosNetwork:
    """The continuous tokenizer that the diffusion decoder's latents are of."""
    names = TOKENIZERS[opened["decoder"].generation]
    with without_decoder():
        found = opened.place.below(names)
        if found is None:
            raise CheckpointError(
                f"no continuous tokenizer for the diffusion decoder: neither {names[0]} nor "
                f"{names[1]} is in {opened.place.searched}"
            )
        return open_latent_tokenizer(found)


def refuse_grids(opened: Opened, discrete: CosmosTokenizerConfig) -> None:
    """Raise `CheckpointError` unless the cells of both tokenizers and the decoder fit."""
    tokenizer = opened["decoder_tokenizer"]
    continuous = tokenizer.config
    with without_decoder():
        if continuous.temporal != discrete.temporal or discrete.spatial % continuous.spatial:
            raise CheckpointError(
                f"{tokenizer.path} compresses {continuous.temporal} x {continuous.spatial}, the "
                f"discrete tokenizer {discrete.temporal} x {discrete.spatial}: they do not belong "
                "together"
            )
        if tokenizer.statistics.frames < DECODER_WINDOW:
            raise CheckpointError(
                f"{tokenizer.path}: its statistics are of {tokenizer.statistics.frames} latent "
                f"frames, the diffusion decoder needs {DECODER_WINDOW}"
            )
        try:
            opened["decoder"].config.tokens(decoder_grid(opened, discrete))
        except ValueError as error:
            raise CheckpointError(f"{opened['decoder'].path}: {error}") from error


def decoder_grid(opened: Opened, discrete: CosmosTokenizerConfig) -> LatentShape:
    """Grid of the latents that the diffusion decoder denoises at once."""
    finer = discrete.spatial // opened["decoder_tokenizer"].config.spatial
    grid = opened["transformer"].config.grid
    return LatentShape(DECODER_WINDOW, grid.height * finer, grid.width * finer)


def stages(opened: Opened, compute: Compute) -> Iterator[Stage]:
    """Memory of denoising and decoding, beside the weights."""
    config, continuous = opened["decoder"].config, opened["decoder_tokenizer"].config
    grid = decoder_grid(opened, opened["tokenizer"].config)
    denoising = denoise_bytes(config, grid, compute.dtype, MAX_LENGTH, fused=compute.fused, batch=2)
    yield Stage("denoise", "decoder", denoising)
    video = grid.video(continuous.temporal, continuous.spatial)
    _, decoding = encode_and_decode_bytes(continuous, video, compute)
    yield Stage("decode", "decoder_tokenizer", decoding)


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """How tokens are decoded; the defaults are those of the released pipelines.

    Attributes:
        sampler: see `worldline.sampling.edm.sample`.
        num_steps: evaluations of a window.
        guidance: how far to go from no prompt and no tokens towards both, and beyond.
        seed: of the noise.
        seam: how windows are joined; "as_released" repeats a fault of the released code.
        rotary_precision: dtype of the angles of position; None is that of the weights, as in the
            released pipelines: bf16 on a GPU.
    """

    sampler: str
    num_steps: int = NUM_STEPS
    guidance: float = GUIDANCE
    seed: int = 0
    seam: Seam = "corrected"
    rotary_precision: str | None = None

    def count_steps(self, windows: int) -> int:
        """Steps of `denoise_windows`."""
        return windows * (len(make_sigmas(self.sampler, self.num_steps)) - 1)


def settings_of(parts: Parts, request: ARRequest) -> DecoderSettings:
    """How the tokens of a request are decoded by diffusion."""
    network = parts.opened["decoder"]
    return DecoderSettings(
        sampler=SAMPLER_OF[network.generation],
        seed=request.seed,
        seam=request.decoder_seam,
        rotary_precision=network.rotary_precision
        or str(parts.compute.dtype).removeprefix("torch."),
    )


def decode_tokens(
    parts: Parts,
    tokens: Tensor,
    context: Tensor,
    settings: DecoderSettings,
    token_cells: int,
    recorder: Recorder,
) -> Iterator[Step]:
    """Video of ids (1, T, h, w), window after window; steps of "decode" hold its pieces.

    Args:
        parts: the decoder's networks.
        tokens: any integer dtype, any T of 1 or more.
        context: embedding of the prompt (1, S, E).
        settings: how.
        token_cells: latent cells that a token is wide and high.
        recorder: receives seconds and memory.
    """
    opened, coder = parts.opened["decoder_tokenizer"], parts.loaded["decoder_tokenizer"]
    windows = cut_windows(tokens)
    total, denoised = settings.count_steps(len(windows)), 0
    # a window depends on its tokens alone, but the released seam fades from one into the next
    for number, group in enumerate(windows if settings.seam == "corrected" else [tokens]):
        with stage(recorder, "denoise"), parts.loaded["decoder"].on_device() as model:
            steps = denoise_windows(model, group, context, settings, token_cells=token_cells)
            latents = yield from report(steps, recorder, total, before=denoised)
        denoised += settings.count_steps(len(latents))
        log_result("denoise", latents[-1])
        yield Step("decode", 0, 0)
        with stage(recorder, "decode"), coder.on_device() as tokenizer:
            statistics = opened.statistics.rounded(tokenizer.quant_conv.weight.dtype)
            for piece in decode_windows(
                tokenizer, statistics, latents, tokens.shape[1], settings.seam, first=number
            ):
                yield Step("decode", 0, 0, signed_to_uint8(piece[0]))


def cut_windows(tokens: Tensor) -> list[Tensor]:
    """Windows (1, 8, h, w) of ids (1, T, h, w); the last is filled by reflection."""
    return split_windows(tokens, DECODER_WINDOW, OVERLAP)


@torch.inference_mode()
def denoise_windows(
    model: DiT,
    tokens: Tensor,
    context: Tensor,
    settings: DecoderSettings,
    *,
    token_cells: int = 2,
    noise: list[Tensor] | None = None,
) -> Generator[Stepped, None, list[Tensor]]:
    """Latents of every window, float32 (1, C, 8, H, W), normalised.

    Args:
        model: on its device.
        tokens: ids (1, T, h, w), any integer dtype, any T of 1 or more.
        context: embedding of the prompt (1, S, E).
        settings: how.
        token_cells: latent cells that a token is wide and high.
        noise: unit normal, one for each window; None draws it from the seed.
    """
    _, _, height, width = tokens.shape
    grid = LatentShape(DECODER_WINDOW, height * token_cells, width * token_cells)
    device = model.embed.weight.device
    shape = (1, model.config.latent_channels, grid.frames, grid.height, grid.width)
    precision = settings.rotary_precision
    angles = model.dtype if precision is None else getattr(torch, precision)
    positions = model.make_positions(grid, FPS, rotary_dtype=angles)
    text = context.to(device, model.dtype)
    encoded = model.encode_context(torch.cat([text, torch.zeros_like(text)]))
    latents = []
    for number, window in enumerate(cut_windows(tokens.to(device))):
        # without the prompt there are no tokens either: all ids 0, which is a token too
        ids = model.encode_ids(torch.cat([window, torch.zeros_like(window)]), grid)
        start = standard_noise(settings.seed, shape) if noise is None else noise[number]
        steps = sample(
            _paired(model, encoded, ids, positions),
            start.to(device),
            sampler=settings.sampler,
            num_steps=settings.num_steps,
            guidance=settings.guidance,
            sigma_min=SIGMA_MIN,
        )
        latents.append((yield from steps))
    return latents


def _paired(model: DiT, context: Context, ids: Tensor, positions: Positions) -> Denoiser:
    """Network that computes both branches of the guidance in one batch.

    The sampler asks for the branch with the prompt (row 0 of context and ids), then for the other
    with the same latents: the second answer is ready by then.
    """
    ready: list[Tensor] = []

    def network(x: Tensor, times: Tensor, conditional: bool) -> Tensor:
        if not conditional:
            return ready.pop()
        y = model(x.repeat(2, 1, 1, 1, 1), times.repeat(2), context, positions, ids=ids)
        with_prompt, ready[:] = y[:1], [y[1:]]
        return with_prompt

    return network


def decode_windows(
    tokenizer: CosmosTokenizer,
    statistics: LatentStatistics,
    latents: list[Tensor],
    frames: int,
    seam: Seam = "corrected",
    *,
    first: int = 0,
) -> Iterator[Tensor]:
    """Video of `denoise_windows`, (1, 3, T, H, W) in about [-1, 1], piece by piece.

    Args:
        tokenizer: on its device.
        statistics: those of its latents.
        latents: those of all windows, or of successive ones, whose part of the video this is then.
        frames: latent frames of the clip.
        seam: how windows are joined; "as_released" needs all of them.
        first: index of the first of these windows.
    """
    temporal = tokenizer.config.temporal
    whole = 1 + (frames - 1) * temporal
    restored = (statistics.denormalise(window / SIGMA_DATA) for window in latents)
    if seam == "as_released" and len(latents) > 1:
        pieces = [torch.cat(list(decode_stream(tokenizer, one)), dim=2) for one in restored]
        # float32: a fade of few levels; clamped before it, as released
        blended = blend_windows([piece.float().clamp(-1, 1) for piece in pieces], OVERLAP)
        yield blended[:, :, :whole]
        return
    for number, window in enumerate(restored, start=first):
        begun = number * (DECODER_WINDOW - OVERLAP)
        skip = 1 + (OVERLAP - 1) * temporal if number else 0  # frames of the window before
        # what follows changes nothing before it, so what reflection filled in is not decoded
        for piece in decode_stream(tokenizer, window[:, :, : frames - begun]):
            new = piece[:, :, skip:]
            skip = max(0, skip - piece.shape[2])
            if new.shape[2]:
                yield new
