"""Train the small worlds that ship with the package, in segments that a kill cannot spoil.

    python -m worldline.train.tiny tokenizer --folder runs/tokenizer --seconds 540
    python -m worldline.train.tiny autoregressive --folder runs/ar --tokenizer runs/tokenizer/export
    torchrun --nproc_per_node=4 -m worldline.train.tiny diffusion --folder … --tokenizer …

    python -m worldline.train.tiny tokenizer --kind continuous --folder runs/latents --seconds 540
    python -m worldline.train.tiny diffusion --folder runs/dit --tokenizer runs/latents/export

Each call goes on where the last one stopped. The networks, losses and file layouts are those of the
released models; only the sizes are small.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn

from worldline.models.predict1_ar.model import (
    ARTransformer,
    ARTransformerConfig,
    Positions,
    make_positions,
)
from worldline.models.predict1_ar.weights import KEYS, write_settings
from worldline.models.predict1_dit.model import DiT, DiTConfig
from worldline.models.predict1_dit.model import Positions as DiTPositions
from worldline.models.predict1_dit.weights import open_dit, released_tensors
from worldline.models.predict1_dit.weights import write_settings as write_dit_settings
from worldline.nn.rope import Rotation, stretched_angles_3d
from worldline.parallel.ranks import ALONE, Ranks, join, leave
from worldline.physics import FPS
from worldline.sampling.edm import SIGMA_DATA, precondition
from worldline.shapes import LatentShape, VideoShape
from worldline.text.t5 import KEYS as T5_KEYS
from worldline.text.t5 import T5Encoder, export_t5, find_t5, new_t5
from worldline.tokenizers.cosmos import weights as tokenizer_weights
from worldline.tokenizers.cosmos.load import load_tokenizer
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.statistics import LatentStatistics, read_statistics
from worldline.train.data import (
    ClipPool,
    as_video,
    captioned_batches,
    encode_captioned,
    encode_pool,
    physics_batches,
    to_device,
)
from worldline.train.loop import LoopConfig, Objective, fit, generator
from worldline.train.losses import (
    FeatureNetwork,
    ReconstructionObjective,
    Schedule,
    denoising_loss,
    log_normal_sigmas,
    next_token_labels,
    next_token_loss,
    noised_latents,
    reconstruction_terms,
    total,
)
from worldline.weights.read import open_checkpoint
from worldline.weights.stream import load_into
from worldline.weights.write import save as save_tensors
from worldline.weights.write import save_module

SHAPE = VideoShape(33, 128, 192)
GRID = LatentShape(5, 8, 12)
TOKENIZER = CosmosTokenizerConfig(
    channels=16,
    level_channels=(32, 64, 80),
    spatial=16,
    latent_channels=6,
    levels=(4, 4, 4, 4, 4, 4),
)
CONTINUOUS = CosmosTokenizerConfig(channels=24, level_channels=(48, 40, 40))
AUTOREGRESSIVE = ARTransformerConfig(
    depth=7,
    width=160,
    num_heads=6,
    num_kv_heads=2,
    head_size=32,
    hidden=448,
    vocabulary=4096,
    embedding_rows=4096,
    grid=GRID,
)
DIFFUSION = DiTConfig(
    depth=6,
    width=160,
    num_heads=5,
    head_size=32,
    hidden=512,
    context_width=64,
    lora_rank=16,
    condition_mask=True,
    max_grid=LatentShape(5, 8, 12),
    rope_ratio=(1.0, 1.0, 1.0),
    base_fps=FPS,
)
TEXT = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 192, "num_layers": 5}
TEXT_LENGTH = 128  # bytes; captions have up to 120
WORLD, TEXT_FOLDER = "Cosmos-Predict1-7B-Video2World", "google-t5/t5-11b"
WORLD_SETTINGS = {
    "num_video_frames": SHAPE.frames,
    "height": SHAPE.height,
    "width": SHAPE.width,
    "fps": int(FPS),
    "guidance": 1.0,
    "num_steps": 20,
    "negative_prompt": "",
    "rotary_precision": "float32",
    "text2world": True,
}
_PERCEPTUAL = 0.1  # weight of the perceptual term in the released recipes
# A continuous tokenizer is variational with one deviation for all latents: its noise sets what is
# worth a latent, so that fine detail does not become hard to predict noise.
_DEVIATION = 0.1
_KL = 3e-4
_SQUARED = 5.0  # of its squared error: few pixels, those of moving objects, have most of it
# Of diffusion. Object places are settled at noise levels of about 1 to 8, which the mean favours.
_SIGMA_MEAN, _SIGMA_DEVIATION = 0.2, 1.4
_KNOWN_SIGMA = 0.001  # noise on known frames, as samplers show them
_MOST_KNOWN = 2  # latent frames: one of an image, two of nine frames
_TEXT_DROPPED = 0.15
_STATISTICS_FRAMES = 16  # columns of released statistics; the last one is repeated
_HELD_OUT = 900_000  # seeds from here to 999,999 steer training; evaluation starts at 1,000,000


@dataclass(frozen=True, kw_only=True)
class Run:
    """What both commands are told; None takes the command's own default."""

    folder: Path
    steps: int | None
    batch: int | None
    clips: int | None
    seconds: float | None
    workers: int
    seed: int
    rate: float | None
    compiled: bool
    device: str
    ranks: Ranks = ALONE

    def share(self, seeds: range) -> range:
        """Return this process's part of the clips."""
        return seeds[self.ranks.rank :: self.ranks.count]


@contextmanager
def _running(options: dict[str, Any]) -> Iterator[Run]:
    """Meet the other processes, where there are any, and part from them at the end."""
    ranks, device = join(options["device"])
    yield Run(**{**options, "device": device, "ranks": ranks})
    leave(ranks)


@click.group()
def main() -> None:
    """Train the small worlds that ship with the package."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cudnn.benchmark = True  # every batch has the same shape


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--folder", type=click.Path(path_type=Path), required=True),
        click.option("--steps", type=int, default=None, help="Of the whole run."),
        click.option("--batch", type=int, default=None),
        click.option("--clips", type=int, default=None, help="How many clips to draw."),
        click.option("--seconds", type=float, default=None, help="Stop and save after this time."),
        click.option("--workers", type=int, default=0),
        click.option("--seed", type=int, default=0),
        click.option("--rate", type=float, default=None, help="Peak of the learning rate."),
        click.option("--compile/--no-compile", "compiled", default=False),
        click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu"),
    ):
        command = option(command)
    return command


@main.command()
@_options
@click.option("--kind", type=click.Choice(["discrete", "continuous"]), default="discrete")
@click.option(
    "--features",
    type=click.Path(path_type=Path, exists=True),
    help="Weights of a VGG16-shaped network: adds the perceptual term with the released weight.",
)
@click.option(
    "--start", type=click.Path(path_type=Path), help="Weights to begin with: an export folder."
)
@click.option("--graph/--no-graph", "graphed", default=False, help="Run a step as one CUDA graph.")
def tokenizer(
    kind: str, features: Path | None, start: Path | None, graphed: bool, **options: Any
) -> None:
    """Train a video tokenizer on generated clips, to token ids or to continuous latents.

    By the colour term alone, or with --features by the perceptual term too.
    """
    with _running(options) as run:
        _train_tokenizer(run, kind, features, start, graphed)


def _train_tokenizer(
    run: Run, kind: str, features: Path | None, start: Path | None, graphed: bool
) -> None:
    batch, clips, device = run.batch or 48, run.clips or 24_000, run.device
    half = _half(device)
    torch.manual_seed(run.seed)
    if start is None:
        model = CosmosTokenizer(TOKENIZER if kind == "discrete" else CONTINUOUS)
        model.reset_parameters()
        model = model.to(device)
    else:
        model = load_tokenizer(start, device=device, dtype=torch.float32).requires_grad_(True)
    seeds = run.share(range(clips))
    batches = physics_batches(seeds, SHAPE, device, workers=run.workers)
    pool = ClipPool(batches, len(seeds), SHAPE)
    network = None
    if features is not None:
        stored = open_checkpoint(features)
        network = FeatureNetwork.from_tensors({name: stored.read(name) for name in stored.tensors})
        network = network.to(device)
    measure: Any = _Reconstruction(model, network, device)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        config = model.config
        grid = SHAPE.latent(config.temporal, config.spatial)
        shape = (batch, config.latent_channels, grid.frames, grid.height, grid.width)
        draws = generator(run.seed, step, device, rank=run.ranks.rank)
        noise = torch.randn(shape, generator=draws, device=device)
        return pool.batch(run.seed, step, batch, rank=run.ranks.rank), noise

    if graphed:
        measure = torch.cuda.make_graphed_callables(measure, draw(0))
    elif run.compiled:
        measure = torch.compile(measure, dynamic=False)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, error = measure(*draw(step))
        return loss, {"psnr": -10 * error.log10()}

    config = LoopConfig(steps=run.steps or 12_000, learning_rate=run.rate or 1.5e-3)
    done = _fit(run, model, loss_of, config)
    if not run.ranks.first:
        return
    export_tokenizer(model, run.folder / "export")
    exported = load_tokenizer(run.folder / "export", device=device, dtype=half)
    if kind == "continuous":
        batches = physics_batches(range(min(clips, 8192)), SHAPE, device, workers=run.workers)
        statistics = latent_statistics(exported, batches, half)
        save_tensors(statistics.tensors(), run.folder / "export" / "mean_std.safetensors")
    aside = range(_HELD_OUT, _HELD_OUT + min(clips, 64))
    held_out = next(physics_batches(aside, SHAPE, device))
    figures = {"steps": done, "psnr": reconstruction_psnr(exported, held_out, half)}
    _tell(run, figures)


def _fit(run: Run, model: nn.Module, objective: Objective, config: LoopConfig) -> int:
    """Train, give the model its averaged weights, and return the number of steps done."""
    done, average = fit(model, objective, config, run.folder, seconds=run.seconds, ranks=run.ranks)
    average.swap(model)
    return done


def _tell(run: Run, figures: dict[str, Any]) -> None:
    """Write and log what came of a run."""
    (run.folder / "result.json").write_text(json.dumps(figures))
    logging.info("%s", figures)


def _half(device: str) -> torch.dtype:
    """Return bf16 where it is fast."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def _mixed_precision(device: str) -> torch.autocast:
    """bf16 where it is fast; no cache of cast weights, which a CUDA graph would keep for ever."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)


class _Reconstruction(nn.Module):
    """The loss of a tokenizer; a module, so that a graph of it knows its parameters."""

    def __init__(
        self, model: CosmosTokenizer, features: FeatureNetwork | None, device: str
    ) -> None:
        super().__init__()
        self.model, self.features, self.device = model, features, device
        self.objective = ReconstructionObjective(
            perceptual=None if features is None else Schedule.constant(_PERCEPTUAL),
            kl=Schedule.constant(_KL),
        )

    def forward(self, clips: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, and the mean squared error in [0, 1].

        Args:
            clips: uint8 (B, T, H, W, 3).
            noise: unit normal, in the shape of the latents; a discrete tokenizer takes none.
        """
        video, posterior = as_video(clips), None
        with _mixed_precision(self.device):
            if self.model.config.levels is None:
                latents = self.model.encode(video)
                posterior = (latents, torch.full_like(latents, 2 * math.log(_DEVIATION)))
                reconstruction = self.model.decode(latents + _DEVIATION * noise.to(latents.dtype))
            else:
                reconstruction = self.model.reconstruct(video)
            # the weights of all terms are constant: any iteration has the same
            terms = reconstruction_terms(
                self.objective,
                video,
                reconstruction,
                0,
                features=self.features,
                posterior=posterior,
            )
            if posterior is not None:
                terms["squared"] = _SQUARED * (reconstruction.float() - video).square()
            error = (reconstruction.detach().float().clamp(-1, 1) - video).square().mean() / 4
        return total(terms), error


@torch.no_grad()
def reconstruction_psnr(
    model: CosmosTokenizer, clips: Tensor, dtype: torch.dtype = torch.float32
) -> float:
    """Return the mean over clips (B, T, H, W, 3) of the PSNR after encoding and decoding."""
    figures = []
    for clip in clips:
        video = as_video(clip[None])
        decoded = model.reconstruct(video.to(dtype)).float().clamp(-1, 1)
        figures.append(-10 * ((decoded - video).square().mean() / 4).log10())
    return float(torch.stack(figures).mean())


@torch.no_grad()
def latent_statistics(
    model: CosmosTokenizer, batches: Iterator[Tensor], dtype: torch.dtype
) -> LatentStatistics:
    """Return mean and deviation of latents; the last latent frame's stand for all behind it.

    Args:
        model: in `dtype`.
        batches: clips, uint8 (B, T, H, W, 3).
        dtype: to encode in.
    """
    moments: dict[str, list[Tensor]] = {"": [], "image_": []}
    counts = dict.fromkeys(moments, 0)
    for clips in batches:
        for part in clips.split(32):
            video = as_video(part).to(dtype)
            pictures = video[:, :, :: model.config.temporal].transpose(1, 2).flatten(0, 1)
            latents = {"": model.encode(video), "image_": model.encode(pictures.unsqueeze(2))}
            for name, z in latents.items():
                z = z.double()  # float64: squares of many values are summed
                pair = torch.stack([z.mean((3, 4)), z.square().mean((3, 4))])  # (2, B, C, t)
                moments[name].append(pair.mean(1) * len(z))
                counts[name] += len(z)
    statistics = {}
    for name, parts in moments.items():
        mean, square = torch.stack(parts).sum(0) / counts[name]
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        for kind, values in (("mean", mean), ("std", deviation)):
            columns = values.float().cpu()
            behind = columns[:, -1:].expand(-1, _STATISTICS_FRAMES - columns.shape[1])
            columns = columns[:, 0] if name else torch.cat([columns, behind], dim=1)
            statistics[name + kind] = columns.contiguous()
    return LatentStatistics(**statistics)


def export_tokenizer(model: CosmosTokenizer, folder: Path) -> None:
    """Write encoder and decoder in bf16 under the names of the released files."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = tokenizer_weights.released_tensors(model)
    for half, tensors in halves.items():
        save_tensors(tensors, folder / f"{half}.safetensors")


@main.command()
@_options
@click.option("--tokenizer", "tokenizer_folder", type=click.Path(path_type=Path), required=True)
@click.option(
    "--start", type=click.Path(path_type=Path), help="Weights to begin with: an export folder."
)
def autoregressive(tokenizer_folder: Path, start: Path | None, **options: Any) -> None:
    """Train the transformer on the tokens of generated clips, next token by next token."""
    with _running(options) as run:
        _train_autoregressive(run, tokenizer_folder, start)


def _train_autoregressive(run: Run, tokenizer_folder: Path, start: Path | None) -> None:
    batch, clips, device, folder = run.batch or 256, run.clips or 150_000, run.device, run.folder
    half = _half(device)
    coder = load_tokenizer(tokenizer_folder, device=device, dtype=half)
    cached = folder / f"tokens-{run.ranks.rank}-of-{run.ranks.count}.pt"
    if cached.exists():
        tokens = torch.load(cached, weights_only=True).to(device)
    else:
        tokens = encode_pool(
            coder,
            physics_batches(run.share(range(clips)), SHAPE, device, workers=run.workers),
            half,
        )
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(tokens.cpu(), cached)
    aside = range(_HELD_OUT, _HELD_OUT + min(clips, 256))
    held_out = encode_pool(coder, physics_batches(aside, SHAPE, device), half)
    del coder
    torch.manual_seed(run.seed)
    if start is None:
        model = ARTransformer(AUTOREGRESSIVE)
        model.reset_parameters()
        model = model.to(device)
    else:
        with torch.device("meta"):
            model = ARTransformer(AUTOREGRESSIVE)
        source = open_checkpoint(start / "model.safetensors")
        load_into(model, source, KEYS, device=device, dtype=torch.float32)
    positions = make_positions(AUTOREGRESSIVE, device, torch.float32)
    measure: Any = _next_token_loss
    if run.compiled:
        measure = torch.compile(_next_token_loss, dynamic=False)

    @torch.no_grad()
    def held_out_loss() -> Tensor:
        with _mixed_precision(device):
            parts = [_next_token_loss(model, rows, positions) for rows in held_out.split(128)]
        return torch.stack(parts).mean()

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        draws = generator(run.seed, step, rank=run.ranks.rank)
        chosen = torch.randint(len(tokens), (batch,), generator=draws)
        with _mixed_precision(device):
            loss = measure(model, tokens[to_device(chosen, device)], positions)
        return loss, {"held_out": held_out_loss()} if step % 500 == 499 else {}

    config = LoopConfig(
        steps=run.steps or 20_000,
        learning_rate=run.rate or 3e-3,
        warmup=500,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        average_decay=0.9995,
    )
    done = _fit(run, model, loss_of, config)
    if not run.ranks.first:
        return
    figures = {"steps": done, "held_out": float(held_out_loss())}
    export_autoregressive(model, folder / "export")
    _tell(run, figures)


def _next_token_loss(model: ARTransformer, tokens: Tensor, positions: Positions) -> Tensor:
    """Return the mean loss of whole sequences (B, L), any integer dtype."""
    tokens = tokens.long()
    labels = next_token_labels(tokens, GRID.tokens_per_frame - 1)  # the first frame is given
    return next_token_loss(model(tokens, positions)[:, :-1], labels).total


def export_autoregressive(model: ARTransformer, folder: Path) -> None:
    """Write weights in bf16 under the released names, and config.json beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_module(model, folder / "model.safetensors", keymap=KEYS, dtype=torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(write_settings(model.config), indent=1) + "\n")


@main.command()
@_options
@click.option("--tokenizer", "tokenizer_folder", type=click.Path(path_type=Path), required=True)
@click.option(
    "--start", type=click.Path(path_type=Path), help="Weights to begin with: an export folder."
)
@click.option(
    "--undescribed",
    multiple=True,
    help="A text that shall say nothing of a clip, as no text at all; a negative prompt.",
)
def diffusion(
    tokenizer_folder: Path, start: Path | None, undescribed: tuple[str, ...], **options: Any
) -> None:
    """Train the diffusion transformer, and the text encoder with it, on captioned clips.

    A clip is given with none, one or two latent frames known and with its caption or none, so
    that one network makes a world of a text, an image or a video.
    """
    with _running(options) as run:
        _train_diffusion(run, tokenizer_folder, start, undescribed)


def _train_diffusion(
    run: Run, tokenizer_folder: Path, start: Path | None, undescribed: tuple[str, ...]
) -> None:
    batch, clips, device, folder = run.batch or 256, run.clips or 80_000, run.device, run.folder
    half = _half(device)
    torch.manual_seed(run.seed)
    model = _Denoising(DiT(DIFFUSION), new_t5(TEXT, max_length=TEXT_LENGTH))
    model.transformer.reset_parameters()
    if start is not None:
        dit, text = (
            open_dit(start / WORLD, write_dit_settings(DIFFUSION)),
            find_t5(start / TEXT_FOLDER),
        )
        load_into(model.transformer, dit.source, dit.keys, device=device, dtype=torch.float32)
        load_into(model.text.network, text.checkpoint, T5_KEYS, device=device, dtype=torch.float32)
        model.requires_grad_(True)
    model = model.to(device)
    coder = load_tokenizer(tokenizer_folder, device=device, dtype=half)
    statistics = read_statistics(tokenizer_folder)
    if statistics is None:
        raise click.UsageError(f"{tokenizer_folder} holds no statistics of latents")

    def encoded(seeds: range, workers: int) -> _Captioned:
        batches = captioned_batches(seeds, SHAPE, device, workers=workers)
        latents, captions = encode_captioned(
            coder, batches, half, lambda z: SIGMA_DATA * statistics.normalise(z)
        )
        return _Captioned(latents, *model.text.tokenize(captions))

    pool = encoded(run.share(range(clips)), run.workers)
    aside = encoded(range(_HELD_OUT, _HELD_OUT + min(clips, 256)), 0)
    # no text, as a sampler may give it: no row at all, or a text about nothing
    silent = model.text.tokenize(["", *undescribed])
    silent[1][0] = 0
    measure: Any = functools.partial(_denoising_in, half, model)
    if run.compiled:
        measure = torch.compile(measure, dynamic=False)

    def loss_of_clips(given: _Captioned, step: int, count: int) -> Tensor:
        small, large = (generator(run.seed, step, d, rank=run.ranks.rank) for d in ("cpu", device))
        chosen = torch.randint(len(given.latents), (count,), generator=small)
        latents = given.latents[to_device(chosen, device)].float()
        ids, mask = given.ids[chosen].clone(), given.mask[chosen].clone()
        dropped = torch.rand(count, generator=small) < _TEXT_DROPPED
        other = torch.randint(len(silent[0]), (count,), generator=small)
        ids[dropped], mask[dropped] = silent[0][other[dropped]], silent[1][other[dropped]]
        known = torch.randint(_MOST_KNOWN + 1, (count,), generator=small)
        normal = torch.randn(count, generator=small)
        sigma = log_normal_sigmas(normal, mean=_SIGMA_MEAN, deviation=_SIGMA_DEVIATION)
        noise = torch.randn(2, *latents.shape, generator=large, device=device)
        on_device = (to_device(values, device) for values in (ids, mask, sigma, known))
        return measure(latents, noise, *on_device).mean()

    def held_out_loss() -> Tensor:
        # as in training, batch for batch: a compiled network then serves both
        parts = [loss_of_clips(aside, step, batch).detach() for step in range(8)]
        return torch.stack(parts).mean()

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = loss_of_clips(pool, step, batch)
        return loss, {"held_out": held_out_loss()} if step % 1000 == 999 else {}

    config = LoopConfig(
        steps=run.steps or 20_000,
        learning_rate=run.rate or 2e-3,
        warmup=500,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        average_decay=0.9995,
    )
    done = _fit(run, model, loss_of, config)
    if not run.ranks.first:
        return
    figures = {"steps": done, "held_out": float(held_out_loss())}
    export_diffusion(model.transformer, model.text, folder / "export")
    _tell(run, figures)


class _Captioned(NamedTuple):
    """Clips as they are trained on; the texts lie on the CPU.

    Attributes:
        latents: (clips, C, t, h, w), bf16, of standard deviation 0.5.
        ids: (clips, S) int64.
        mask: (clips, S), 1 at tokens.
    """

    latents: Tensor
    ids: Tensor
    mask: Tensor


class _Denoising(nn.Module):
    """The diffusion transformer and its text encoder under one loss."""

    cos: Tensor
    sin: Tensor

    def __init__(self, transformer: DiT, text: T5Encoder) -> None:
        super().__init__()
        self.transformer, self.text = transformer, text
        shape = SHAPE.latent(CONTINUOUS.temporal, CONTINUOUS.spatial)
        self.tokens = transformer.config.tokens(shape)
        base = transformer.config.base_fps
        angles = stretched_angles_3d(
            self.tokens,
            transformer.config.head_size,
            ratio=transformer.config.rope_ratio,
            time_scale=(base, base),
            dtype=torch.float32,
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        ids: Tensor,
        mask: Tensor,
        sigma: Tensor,
        known: Tensor,
    ) -> Tensor:
        """Return the loss of every clip, (B,).

        Args:
            latents: (B, C, t, h, w), clean.
            noise: (2, B, C, t, h, w): of all frames, and that of known frames.
            ids: (B, S) of texts.
            mask: (B, S), 1 at tokens; a text of no token is an embedding of zeros.
            sigma: (B,) noise levels.
            known: (B,) latent frames that are known.
        """
        level = torch.full_like(sigma, _KNOWN_SIGMA)
        shown, marked = noised_latents(
            latents, noise[0], sigma, known, known_noise=noise[1], known_sigma=level
        )
        attended = mask.clone()
        attended[:, 0] = 1  # attention over no token at all is not defined
        hidden = self.text.hidden(ids, attended)
        context = torch.where(mask[..., None] != 0, hidden, hidden.new_zeros(()))
        rotation = Rotation(self.cos, self.sin)
        learned = self.transformer.positions
        assert learned is not None
        output = self.transformer(
            shown,
            precondition(sigma).noise.bfloat16().float(),  # as a network in bf16 is told it
            self.transformer.encode_context(context),
            DiTPositions(rotation, learned(self.tokens)),
            condition_mask=marked,
        )
        return denoising_loss(output, latents, noise[0], sigma, marked)


def _denoising_in(dtype: torch.dtype, model: _Denoising, *given: Tensor) -> Tensor:
    """Return the losses with all weights rounded to `dtype`, as a world runs; see `forward`.

    The gradient goes to the weights themselves.
    """
    rounded = {name: weight.to(dtype) for name, weight in model.named_parameters()}
    # not tied by name: the two names of T5's embedding are of one module, which is swapped once
    return torch.func.functional_call(model, rounded, given, tie_weights=False)


def export_diffusion(transformer: DiT, text: T5Encoder, folder: Path) -> None:
    """Write the world and its text encoder in bf16, in the folders of the released ones."""
    world = folder / WORLD
    world.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.bfloat16() for name, t in released_tensors(transformer).items()}
    save_tensors(tensors, world / "model.safetensors")
    settings = {**write_dit_settings(transformer.config), **WORLD_SETTINGS}
    (world / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    export_t5(text, folder / TEXT_FOLDER)


if __name__ == "__main__":
    main()
