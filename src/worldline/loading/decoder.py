"""The files, the parts and the memory of the diffusion decoder, which turns tokens into video."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.catalog import DECODERS
from worldline.choices import GENERATIONS, ROTARY_PRECISIONS, Generation
from worldline.errors import CheckpointError
from worldline.files import unfinished
from worldline.loading.diffusion import (
    CONTINUOUS_TOKENIZERS,
    STATISTICS,
    check_continuous,
    generation_of,
    plan_diffusion,
)
from worldline.loading.folders import read_settings, stamps
from worldline.loading.memory import count_parameters, workspace
from worldline.locate import Place
from worldline.models.predict1_ar.model import ARTransformerConfig
from worldline.models.predict1_dit.model import BLOCKS, DECODER_WINDOW, DiT, DiTConfig
from worldline.models.predict1_dit.weights import open_dit
from worldline.parallel.offload import Part
from worldline.shapes import LatentShape
from worldline.tokenizers.cosmos.load import open_tokenizer
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.statistics import LatentStatistics, read_statistics
from worldline.weights.dit import DiTFiles
from worldline.weights.read import Checkpoint, open_checkpoint

logger = logging.getLogger(__name__)

_DOES_WITHOUT = "--disable_diffusion_decoder does without"
_AUX = ("aux_vars.pt", "aux_vars.safetensors")


@dataclass(frozen=True)
class DecoderFiles:
    """A diffusion decoder on disk, checked but not read.

    Attributes:
        folder: of the transformer.
        dit: the transformer.
        aux: holds the embedding of a general prompt; None where every request brings its own.
        tokenizer: the tensors of the continuous tokenizer.
        tokenizer_config: what they imply.
        statistics: of the tokenizer's latents.
        generation: whose sampler is used.
        rotary_precision: of the angles of position; None is that of the weights, as released.
    """

    folder: Path
    dit: DiTFiles[DiTConfig]
    aux: Checkpoint | None
    tokenizer: Checkpoint
    tokenizer_config: CosmosTokenizerConfig
    statistics: LatentStatistics
    generation: Generation
    rotary_precision: str | None = None

    def identity(self) -> dict[str, Any]:
        """Return name, size and time of every file that decides what is decoded.

        Raises:
            CheckpointError: a file has vanished.
        """
        source, tokenizer = self.dit.source, self.tokenizer
        settings = dict.fromkeys(path.parent / "config.json" for path in source.files)
        folder = tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent
        scales = [folder / name for name in STATISTICS]
        return stamps(
            {
                "diffusion_decoder": [
                    *source.files,
                    *(self.aux.files if self.aux else ()),
                    *filter(Path.exists, settings),
                ],
                "diffusion_decoder_tokenizer": [*tokenizer.files, *filter(Path.exists, scales)],
            }
        )


@dataclass(frozen=True)
class DecoderParts:
    """The decoder's networks, each on its device or waiting in host memory.

    Attributes:
        transformer: the denoiser.
        tokenizer: latents to pixels.
        context: embedding (1, S, E) of a general prompt, on the CPU; None where there is none.
        statistics: of the tokenizer's latents.
        generation: whose sampler is used.
        rotary_precision: of the angles of position, as in `DecoderFiles`.
    """

    transformer: Part[DiT]
    tokenizer: Part[CosmosTokenizer]
    context: Tensor | None
    statistics: LatentStatistics
    generation: Generation
    rotary_precision: str | None = None


def open_decoder(
    place: Place, config: ARTransformerConfig, tokenizer: CosmosTokenizerConfig
) -> DecoderFiles:
    """Check the files of the diffusion decoder of an autoregressive world.

    Args:
        place: of the world; the decoder of its own generation is preferred.
        config: of its transformer.
        tokenizer: of its discrete tokenizer.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model.
    """
    own = generation_of(place.folder, None)
    order = (own, *(other for other in GENERATIONS if other != own))
    folder = place.below(DECODERS[generation] for generation in order)
    if folder is None:
        raise CheckpointError(
            f"no diffusion decoder: neither {DECODERS[order[0]]} nor {DECODERS[order[1]]} is in "
            f"{place.searched}; {_DOES_WITHOUT}"
        )
    try:
        settings = read_settings(folder)
        dit = open_dit(folder, settings)
        precision = _read_precision(folder, settings)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{unfinished(folder)}; {_DOES_WITHOUT}") from error
    _check_ids(dit, folder, config, tokenizer)
    aux = None
    if config.context_width is None:
        aux = _open_aux(folder, dit.config)
    elif config.context_width != dit.config.context_width:
        raise CheckpointError(
            f"{folder} reads texts of width {dit.config.context_width}, but {place.folder} of "
            f"{config.context_width}: they do not belong together; {_DOES_WITHOUT}"
        )

    generation = generation_of(folder, None)
    names = CONTINUOUS_TOKENIZERS[generation]
    found = place.below(names)
    if found is None:
        raise CheckpointError(
            f"no continuous tokenizer for the diffusion decoder: neither {names[0]} nor {names[1]} "
            f"is in {place.searched}; {_DOES_WITHOUT}"
        )
    try:
        continuous, continuous_config = open_tokenizer(found)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{unfinished(found)}; {_DOES_WITHOUT}") from error
    check_continuous(continuous, continuous_config, dit)
    statistics = read_statistics(found, continuous_config.latent_channels)
    if statistics is None:
        raise CheckpointError(
            f"{found} holds no mean_std.pt, the statistics of its latents, without which the "
            f"diffusion decoder cannot use it{unfinished(found)}; {_DOES_WITHOUT}"
        )
    _check_grids(dit.config, statistics, found, config, tokenizer, continuous_config)
    return DecoderFiles(
        folder, dit, aux, continuous, continuous_config, statistics, generation, precision
    )


def _read_precision(folder: Path, settings: dict[str, Any]) -> str | None:
    precision = settings.get("rotary_precision")
    if precision not in (None, *ROTARY_PRECISIONS):
        raise CheckpointError(f"{folder / 'config.json'}: rotary_precision is {precision!r}")
    return precision


def _check_ids(
    dit: DiTFiles[DiTConfig],
    folder: Path,
    config: ARTransformerConfig,
    tokenizer: CosmosTokenizerConfig,
) -> None:
    if not dit.config.vocabulary:
        raise CheckpointError(
            f"{folder} is a diffusion world, not a diffusion decoder: it reads no token ids; "
            f"{_DOES_WITHOUT}"
        )
    if dit.config.vocabulary != config.vocabulary:
        raise CheckpointError(
            f"{folder} reads {dit.config.vocabulary} token ids, but the world draws "
            f"{config.vocabulary}: they do not belong together; {_DOES_WITHOUT}"
        )


def _open_aux(folder: Path, config: DiTConfig) -> Checkpoint:
    """Check the file of the general prompt; its mask is never used, whatever it holds."""
    paths = [folder / name for name in _AUX]
    try:
        aux = open_checkpoint(next(filter(Path.exists, paths), paths[0]))
    except CheckpointError as error:
        raise CheckpointError(f"{error}{unfinished(folder)}; {_DOES_WITHOUT}") from error
    strange = sorted(aux.tensors.keys() - {"context", "context_mask"})
    if "context" not in aux.tensors or strange:
        held = ", ".join(sorted(aux.tensors)[:4])
        raise CheckpointError(
            f"{aux.path} holds {held}; expected context and perhaps context_mask; {_DOES_WITHOUT}"
        )
    info = aux.tensors["context"]
    rows = info.shape
    if len(rows) != 3 or rows[0] != 1 or not rows[1] or rows[2] != config.context_width:
        raise CheckpointError(
            f"{aux.path}: context is {list(rows)}; expected [1, rows, {config.context_width}]; "
            f"{_DOES_WITHOUT}"
        )
    if not info.dtype.is_floating_point:
        raise CheckpointError(f"{aux.path}: context is {info.dtype}; {_DOES_WITHOUT}")
    return aux


def _check_grids(
    dit: DiTConfig,
    statistics: LatentStatistics,
    folder: Path,
    config: ARTransformerConfig,
    discrete: CosmosTokenizerConfig,
    continuous: CosmosTokenizerConfig,
) -> None:
    if continuous.temporal != discrete.temporal or discrete.spatial % continuous.spatial:
        raise CheckpointError(
            f"{folder} compresses by {continuous.temporal} x {continuous.spatial}, which does not "
            f"divide the {discrete.temporal} x {discrete.spatial} of the discrete tokenizer: they "
            f"do not belong together; {_DOES_WITHOUT}"
        )
    if statistics.frames < DECODER_WINDOW:
        raise CheckpointError(
            f"{folder}: its statistics are of {statistics.frames} latent frames; the diffusion "
            f"decoder needs {DECODER_WINDOW}; {_DOES_WITHOUT}"
        )
    try:
        dit.tokens(window_grid(config, discrete, continuous))
    except ValueError as error:
        raise CheckpointError(f"the diffusion decoder: {error}; {_DOES_WITHOUT}") from error


def window_grid(
    config: ARTransformerConfig,
    discrete: CosmosTokenizerConfig,
    continuous: CosmosTokenizerConfig,
) -> LatentShape:
    """Return the grid of continuous latents that are decoded at once."""
    finer = discrete.spatial // continuous.spatial
    return LatentShape(DECODER_WINDOW, config.grid.height * finer, config.grid.width * finer)


def read_context(files: DecoderFiles) -> Tensor | None:
    """Return the embedding of the general prompt, float32 (1, S, E); None where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if files.aux is None:
        return None
    context = files.aux.read("context").float().clone()
    if not context.isfinite().all():
        raise CheckpointError(f"{files.aux.path}: context has numbers that are not finite")
    return context


@dataclass(frozen=True)
class DecoderNeed:
    """Bytes that the decoder holds on its device.

    Attributes:
        transformer: its weights.
        streamed: those of them that are there at most while blocks come one after another.
        tokenizer: its weights.
        denoise: beside them, while the sampler runs.
        decode: beside them, while latents become pixels.
    """

    transformer: int
    streamed: int
    tokenizer: int
    denoise: int
    decode: int


def plan_decoder(
    config: DiTConfig,
    tokenizer: CosmosTokenizerConfig,
    grid: LatentShape,
    *,
    dtype: torch.dtype,
    fused: bool = True,
) -> DecoderNeed:
    """Estimate the memory of one window, both branches of the guidance at once.

    Args:
        config: of the transformer.
        tokenizer: the continuous one.
        grid: of `window_grid`.
        dtype: of the weights.
        fused: kernels do the work between the layers, see `worldline.nn.modulation`.
    """
    with torch.device("meta"):
        network = DiT(config)
    transformer = sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
    pixels = count_parameters(CosmosTokenizer, tokenizer) * dtype.itemsize
    plan = plan_diffusion(
        config,
        tokenizer,
        video=grid.video(tokenizer.temporal, tokenizer.spatial),
        dtype=dtype,
        fused=fused,
        batch=2,
        offload_diffusion_transformer=True,
        offload_tokenizer=True,
    )
    return DecoderNeed(
        transformer=transformer,
        streamed=BLOCKS.count(network) * dtype.itemsize,
        tokenizer=pixels,
        denoise=plan.denoise - transformer - workspace(dtype),
        decode=plan.decode - pixels - workspace(dtype),
    )
