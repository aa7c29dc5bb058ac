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

from collections.abc import Generator, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from worldline.catalog import DECODERS, Generation, generation_by_name
from worldline.errors import CheckpointError
from worldline.families.autoregressive.request import ARRequest
from worldline.families.denoise import (
    attention_entries,
    complete_cache,
    decode,
    record_cache,
    report,
    split_work,
    stage,
    start_cache,
)
from worldline.families.diffusion import family as diffusion
from worldline.families.diffusion.model import DECODER_WINDOW, PRESETS, DiT, DiTConfig
from worldline.families.diffusion.request import Precision
from worldline.families.diffusion.weights import open_network as open_dit
from worldline.family import Compute, Opened, Parts
from worldline.memory import Stage, denoise_bytes
from worldline.nn.dit import ALL_TOKENS, Tokens
from worldline.nn.pieces import ALL_ROWS, Rows, decode_stream
from worldline.opening import refuse_unless_equal
from worldline.parallel.halo import share_rows
from worldline.report import log_result
from worldline.sampling.cache import OFF, StepCache
from worldline.sampling.edm import (
    SAMPLER_OF,
    SIGMA_DATA,
    make_sigmas,
    noise_ratios,
    sample,
)
from worldline.sampling.solvers import Steps, standard_noise
from worldline.sampling.tokens import blend_windows, split_windows
from worldline.shapes import LatentShape
from worldline.step import Step
from worldline.text.encoder import MAX_LENGTH
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.weights import CosmosNetwork
from worldline.weights.checkpoint import open_checkpoint
from worldline.weights.networks import Network, read_settings

OVERLAP = 2  # latent frames that a window shares with the one before
SIGMA_MIN = 0.02
STEP_CACHE = 0.3  # auto: the bundled decoder loses under 0.1 dB, see docs/performance.md
FPS = 24.0  # of the motion, for the network, whatever the rate of the file


@dataclass(frozen=True)
class DecoderNetwork(Network[DiTConfig]):
    """The transformer of the diffusion decoder, and how it is run: by default as released.

    Attributes:
        context: embedding of a general prompt, float32 (1, S, E); None where requests have prompts.
        generation: whose sampler it is run with.
        rotary_precision: dtype of the angles of position; None is that of the weights.
        num_steps: evaluations of a window.
        guidance: how far to go from no prompt and no tokens towards both, and beyond.
        window: latent frames that are denoised at once.
    """

    context: Tensor | None = None
    generation: Generation = "Predict1"
    rotary_precision: str | None = None
    num_steps: int = 15
    guidance: float = 1.8
    window: ClassVar[int] = DECODER_WINDOW

    def settings(self, request: ARRequest, parts: Parts) -> dict[str, Any]:
        """How the tokens of a request are decoded, a window at once."""
        dtype = str(parts.compute.dtype).removeprefix("torch.")
        return {
            "sampler": SAMPLER_OF[self.generation],
            "num_steps": self.num_steps,
            "guidance": self.guidance,
            "seed": request.seed,
            "seam": request.decoder_seam,
            "rotary_precision": self.rotary_precision or dtype,
            **attention_entries(parts, self.config, self.grid(parts.opened), guided=False),
        }

    def grid(self, opened: Opened) -> LatentShape:
        """Grid of the latents that are denoised at once."""
        coarse, fine = opened["tokenizer"].config, opened["decoder_tokenizer"].config
        grid, cells = opened.config.grid, coarse.spatial // fine.spatial
        return LatentShape(DECODER_WINDOW, grid.height * cells, grid.width * cells)

    def open_tokenizer(self, opened: Opened) -> CosmosNetwork:
        """The continuous tokenizer that the latents are of."""
        names = diffusion.TOKENIZERS[self.generation]
        tokenizer = diffusion.open_latent_tokenizer(opened.place.find(names))
        assert tokenizer.statistics is not None
        if tokenizer.statistics.frames < DECODER_WINDOW:
            raise CheckpointError(
                f"{tokenizer.path}: its statistics are of {tokenizer.statistics.frames} latent "
                f"frames, the diffusion decoder needs {DECODER_WINDOW}"
            )
        return tokenizer

    def refuse_grid(self, opened: Opened) -> None:
        """Raise `CheckpointError` if the grid is beyond the decoder's positions."""
        try:
            self.config.tokens(self.grid(opened))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    @property
    def ratios(self) -> list[float]:
        """Noise over data in each evaluation of a window's guided network."""
        return noise_ratios(SAMPLER_OF[self.generation], self.num_steps, SIGMA_MIN)

    def complete_cache(self, rule: str) -> str:
        """Rule of the step cache; an `InputError` where it names other steps."""
        return complete_cache(rule, len(self.ratios), STEP_CACHE)

    def stages(self, opened: Opened, request: ARRequest, compute: Compute) -> Iterator[Stage]:
        """Memory of denoising and decoding, beside the weights."""
        continuous, grid = opened["decoder_tokenizer"].config, self.grid(opened)
        _, sharing = split_work(opened, compute, self.config, grid, guided=False)
        denoising = denoise_bytes(
            *(self.config, grid, compute.dtype, MAX_LENGTH),
            fused=compute.fused,
            batch=2,
            sharing=sharing,
            cached=int(request.step_cache != OFF),
        )
        yield Stage("denoise", "decoder", denoising)
        video = grid.video(continuous.temporal, continuous.spatial)
        _, decoding = diffusion.encode_and_decode_bytes(continuous, video, compute)
        rows = share_rows(compute.mesh, video, continuous.spatial)
        yield Stage("decode", "decoder_tokenizer", rows.largest(decoding))

    def decode(
        self, parts: Parts, video: Any, ids: Tensor, job: Any, context: Tensor | None
    ) -> Generator[Step, None, None]:
        """Decode ids (1, T, h, w), T of 1 or more, as `decode_clip` does.

        Without the embedding (1, S, E) of a prompt, the general prompt's is taken.
        """
        coder, grid = parts.opened["decoder_tokenizer"], self.grid(parts.opened)
        context = self.context if context is None else context
        windows, latents = split_windows(ids, DECODER_WINDOW, OVERLAP), list[Tensor]()
        noise = standard_noise(job.request.seed, (1, self.config.latent_channels, *astuple(grid)))
        fine = grid.video(coder.config.temporal, coder.config.spatial)
        rows = share_rows(parts.compute.mesh, fine, coder.config.spatial)
        # both branches of the guidance are one batch
        _, tokens = split_work(parts.opened, parts.compute, self.config, grid, guided=False)
        steps = len(make_sigmas(SAMPLER_OF[self.generation], self.num_steps)) - 1  # of a window
        for number, window in enumerate(windows):
            with stage(job.recorder, "denoise"), parts.loaded["decoder"].on_device() as model:
                cache = start_cache(parts, job.request.step_cache, self.ratios)
                sampling = self.denoise_window(model, window, context, noise, tokens, cache)
                planned, dtype = len(windows) * steps, parts.compute.dtype
                run = report(sampling, job.recorder, dtype, planned, number * steps)
                latents.append((yield from run))
                record_cache(job.recorder, cache)
            log_result("denoise", latents[-1])
            if job.request.decoder_seam == "as_released" and number + 1 < len(windows):
                continue  # it fades into the next
            yield Step("decode", video.made, len(video.frames))
            with (
                stage(job.recorder, "decode"),
                parts.loaded["decoder_tokenizer"].on_device() as tokenizer,
            ):
                statistics = coder.statistics.rounded(parts.compute.dtype)
                pieces = decode_windows(
                    tokenizer,
                    [statistics.denormalise(window / SIGMA_DATA) for window in latents],
                    ids.shape[1],
                    number,
                    rows,
                )
                first = video.overlap
                if len(latents) <= number:  # shared with the window before
                    first = 1 + (OVERLAP - 1) * coder.config.temporal
                video.made = yield from rows.computing.steps_once(
                    decode(pieces, video.frames, video.made, first, len(video.frames), rows)
                )
            latents.clear()

    def denoise_window(
        self,
        model: DiT,
        ids: Tensor,
        context: Any,
        noise: Tensor,
        tokens: Tokens = ALL_TOKENS,
        cache: StepCache | None = None,
    ) -> Steps:
        """Normalised latents of a window, float32 (1, C, 8, H, W), of its ids (1, 8, h, w).

        The noise is unit normal, in the shape of the latents; `tokens` is how processes share them.
        """
        device, precision = model.embed.weight.device, self.rotary_precision
        angles = model.dtype if precision is None else getattr(torch, precision)
        grid = LatentShape(*noise.shape[2:])
        positions = model.make_positions(grid, FPS, rotary_dtype=angles)
        text, ids = context.to(device, model.dtype), ids.to(device)
        encoded = model.encode_context(torch.cat([text, torch.zeros_like(text)]))
        # without the prompt there are no tokens either: all ids 0, which is a token too
        known = model.encode_ids(torch.cat([ids, torch.zeros_like(ids)]), grid)
        ready: list[Tensor] = []

        def network(x: Tensor, times: Tensor, conditional: bool) -> Tensor:
            """Both branches of the guidance at once; that with the prompt is asked for first."""
            if conditional:
                if cache:
                    cache.enter(x)
                x, times = x.repeat(2, 1, 1, 1, 1), times.repeat(2)
                y = model(x, times, encoded, positions, ids=known, tokens=tokens, cache=cache)
                ready[:] = y.split(1)
            return ready.pop(0)

        return sample(
            network,
            noise.to(device),
            sampler=SAMPLER_OF[self.generation],
            num_steps=self.num_steps,
            guidance=self.guidance,
            sigma_min=SIGMA_MIN,
        )


RELEASED = DecoderNetwork(DiT, PRESETS["7B-Decoder"])


def open_network(opened: Opened) -> DecoderNetwork:
    """The diffusion decoder; that of the model's own generation is preferred."""
    default, transformer = DECODERS[generation_by_name(opened.folder)], opened["transformer"]
    folder = opened.place.find(dict.fromkeys((default, *DECODERS.values())))
    settings = read_settings(folder)
    precision = settings.get("rotary_precision")
    if precision not in (None, *get_args(Precision)):
        raise CheckpointError(f"{folder / 'config.json'}: rotary_precision is {precision!r}")
    network = open_dit(folder, settings)
    refuse_unless_equal(network, "vocabulary", transformer, "vocabulary")
    fields = {**vars(network), "rotary_precision": precision}
    config, *contexts = network.beside
    if transformer.config.context_width is None:
        fields["context"] = read_context(contexts, network.config.context_width)
    else:
        refuse_unless_equal(network, "context_width", transformer, "context_width")
        fields["beside"] = (config,)
    return DecoderNetwork(**fields, generation=generation_by_name(folder))


def read_context(paths: Sequence[Path], width: int) -> Tensor:
    """Embedding of the general prompt; its mask is never used, whatever it holds."""
    aux = open_checkpoint(next(filter(Path.exists, paths), paths[0]))
    names = aux.tensors.keys()
    context = aux.read("context").float() if "context" in names else torch.empty(0)
    if context.shape != (1, *context.shape[1:2], width) or names - {"context", "context_mask"}:
        raise CheckpointError(
            f"{aux.path} has {', '.join(sorted(names)[:4])}, context {list(context.shape)}; a "
            f"finite context [1, rows, {width}] is expected"
        )
    return context


def decode_windows(
    tokenizer: CosmosTokenizer,
    latents: list[Tensor],
    frames: int,
    number: int,
    rows: Rows = ALL_ROWS,
) -> Iterator[Tensor]:
    """Pieces of a video of so many latent frames, (1, 3, T, H, W) in about [-1, 1].

    Latents, as the tokenizer gives them, are those of window `number`, or those of all windows,
    which fade into each other as released.
    """
    if len(latents) == 1:
        # what follows changes nothing before it, so what reflection filled in is not decoded
        end = frames - number * (DECODER_WINDOW - OVERLAP)
        yield from decode_stream(tokenizer, latents[0][:, :, :end], rows)
        return
    videos = [torch.cat(list(decode_stream(tokenizer, one, rows)), dim=2) for one in latents]
    # float32: a fade of few levels; clamped before it, as released
    blended = blend_windows([video.float().clamp(-1, 1) for video in videos], OVERLAP)
    yield blended[:, :, : 1 + (frames - 1) * tokenizer.config.temporal]
