"""From a name or a folder to a world: find the files, check them, plan the memory, read.

Everything that can be wrong is found from file headers, before tensor data are read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldline.catalog import BUNDLED_PREFIX, TRANSFORMER_FILES, is_bundled
from worldline.errors import CheckpointError, InputError, InsufficientMemoryError
from worldline.files import GIGABYTE, stamp
from worldline.machine import Memory, device_memory
from worldline.models.predict1_ar.decoder import compile_ahead
from worldline.models.predict1_ar.model import RELEASED_GRID, ARTransformer, ARTransformerConfig
from worldline.models.predict1_ar.weights import KEYS, SHARDS, read_config
from worldline.parallel.offload import Part
from worldline.report import Recorder
from worldline.shapes import VideoShape
from worldline.tokenizers.cosmos.load import open_tokenizer
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.tokenizers.cosmos.weights import key_map
from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import Checkpoint, open_checkpoint
from worldline.weights.shards import find_shards, open_shards, shard_stem
from worldline.weights.stream import load_into

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).parent / "bundled"
OFFLOAD_FLAGS = ("offload_tokenizer", "offload_ar_model")
_UNFINISHED = ("*.incomplete", "*.part", "*.crdownload")
# of both generations; the one that belongs to the transformer's own generation is tried first
_TOKENIZERS = ("Cosmos-Tokenize1-DV8x16x16-720p", "Cosmos-1.0-Tokenizer-DV8x16x16")


@dataclass(frozen=True)
class AutoregressiveFiles:
    """An autoregressive world on disk, checked but not read.

    Attributes:
        folder: of the transformer.
        bundled: whether it ships with the package.
        transformer: its tensors.
        config: what they imply.
        tokenizer: the tensors of the discrete tokenizer.
        tokenizer_config: what they imply.
    """

    folder: Path
    bundled: bool
    transformer: Checkpoint
    config: ARTransformerConfig
    tokenizer: Checkpoint
    tokenizer_config: CosmosTokenizerConfig

    def identity(self) -> dict[str, Any]:
        """Return name, size and time of every file that decides what this world makes.

        Raises:
            CheckpointError: a file has vanished.
        """
        settings = self.folder / "config.json"
        parts = {
            "transformer": [*self.transformer.files, *([settings] if settings.exists() else [])],
            "tokenizer": self.tokenizer.files,
        }
        try:
            return {part: [stamp(path) for path in paths] for part, paths in parts.items()}
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read any more: {error}") from error


@dataclass(frozen=True)
class AutoregressiveParts:
    """A world's networks, each on its device or waiting in host memory."""

    transformer: Part[ARTransformer]
    tokenizer: Part[CosmosTokenizer]

    @property
    def config(self) -> ARTransformerConfig:
        return self.transformer.module.config

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def video(self) -> VideoShape:
        """Size of what this world makes."""
        return video_shape(self.config, self.tokenizer.module.config)


def video_shape(config: ARTransformerConfig, tokenizer: CosmosTokenizerConfig) -> VideoShape:
    """Return the size of the clips that a transformer and a tokenizer make together."""
    return config.grid.video(tokenizer.temporal, tokenizer.spatial)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a request will hold on its device, stage by stage.

    Attributes:
        encode: while the input is turned into tokens.
        tokens: while tokens are read and drawn.
        decode: while tokens are turned into pixels.
    """

    encode: int
    tokens: int
    decode: int

    @property
    def peak(self) -> int:
        return max(self.encode, self.tokens, self.decode)


def find_autoregressive(model: str | Path, checkpoint_dir: str | Path) -> AutoregressiveFiles:
    """Find and check the files of an autoregressive world.

    Args:
        model: "tiny-…" for a bundled one, a folder's name below `checkpoint_dir`, or a path; the
            path of a file opens that file.
        checkpoint_dir: holds the folders, the tokenizer's too.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model.
    """
    bundled = is_bundled(str(model))
    if bundled:
        folder = named = BUNDLED / str(model).removeprefix(BUNDLED_PREFIX)
        if not folder.is_dir():
            have = ", ".join(bundled_names()) or "none"
            raise CheckpointError(f"there is no bundled model {model}; there are: {have}")
        roots = [BUNDLED]
    else:
        named = _find_model(Path(model), Path(checkpoint_dir))
        folder = named.parent if named.is_file() else named
        roots = list(dict.fromkeys((Path(checkpoint_dir), folder.parent)))
    source = open_transformer(named)
    try:
        config = _check_transformer(source, folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_doubt(source)}") from error
    if config.context_width is not None:
        raise CheckpointError(
            f"{folder} is a Video2World model, which continues a clip by a prompt; "
            "this version runs base models (4B, 12B)"
        )

    tokenizer_folder = _tokenizer_folder(folder, roots)
    try:
        tokenizer, tokenizer_config = open_tokenizer(tokenizer_folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_unfinished(tokenizer_folder)}") from error
    with torch.device("meta"):
        network = CosmosTokenizer(tokenizer_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    match(tokenizer.tensors, shapes, key_map(tokenizer_config), str(tokenizer.path))
    if tokenizer_config.vocabulary != config.vocabulary:
        raise CheckpointError(
            f"{tokenizer_folder} has {tokenizer_config.vocabulary} token ids, but {folder} "
            f"was trained on {config.vocabulary}: they do not belong together{_doubt(source)}"
        )
    return AutoregressiveFiles(folder, bundled, source, config, tokenizer, tokenizer_config)


def _check_transformer(source: Checkpoint, folder: Path) -> ARTransformerConfig:
    """Return the architecture of a transformer, checked against every tensor."""
    settings = read_settings(folder)
    if not (folder / "config.json").exists():
        sides = " x ".join(map(str, astuple(RELEASED_GRID)))
        logger.info("no config.json in %s: released grid %s assumed", folder, sides)
    config = read_config(source, settings)
    expected = _shapes(config)
    try:
        match(source.tensors, expected, KEYS, str(source.path))
    except CheckpointError as error:
        if settings and expected != _shapes(read_config(source, {})):
            raise CheckpointError(f"{error} (expected by config.json)") from error
        raise
    return config


def _shapes(config: ARTransformerConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        module = ARTransformer(config)
    return {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}


def _doubt(source: Checkpoint) -> str:
    """The end of a message about sizes: a set that lacks its last ranks looks like a whole one."""
    return " (is a shard missing?)" if source.kind == "tensor-parallel shards" else ""


def bundled_names() -> list[str]:
    """Return the names of the worlds that ship with the package."""
    if not BUNDLED.is_dir():
        return []
    folders = sorted(path.parent for path in BUNDLED.glob("*/config.json"))
    return [BUNDLED_PREFIX + folder.name for folder in folders]


def plan_autoregressive(
    config: ARTransformerConfig,
    tokenizer: CosmosTokenizerConfig,
    *,
    dtype: torch.dtype,
    offload_ar_model: bool = False,
    offload_tokenizer: bool = False,
) -> MemoryPlan:
    """Estimate the memory of one clip; `benchmarks/ar_end_to_end.py` compares it with the truth."""
    size = dtype.itemsize
    with torch.device("meta"):
        transformer_bytes = _count(ARTransformer(config)) * size
        tokenizer_bytes = _count(CosmosTokenizer(tokenizer)) * size
    shape = video_shape(config, tokenizer)
    cells = (
        (1 + (shape.frames - 1) // tokenizer.patch)
        * (shape.height // tokenizer.patch)
        * (shape.width // tokenizer.patch)
    )
    # the widest activation, held about six times by a residual block of the finest level
    activations = 6 * cells * max(tokenizer.level_channels[0], tokenizer.patch_channels) * size
    heads = config.num_kv_heads * config.head_size
    cache = 2 * config.depth * config.length * heads * size
    # feed-forward of the longest prompt: gate, up, product; and queries, keys, values
    prefill = config.length // 2 * (3 * config.hidden + 4 * config.width) * size
    context = 1_200_000_000 if dtype != torch.float32 else 0  # libraries' workspaces
    resident = (0 if offload_ar_model else transformer_bytes) + (
        0 if offload_tokenizer else tokenizer_bytes
    )
    waiting_tokenizer = tokenizer_bytes if offload_tokenizer else 0
    waiting_transformer = transformer_bytes if offload_ar_model else 0
    coding = resident + waiting_tokenizer + activations + context
    return MemoryPlan(
        encode=coding,
        tokens=resident + waiting_transformer + cache + prefill + context,
        decode=coding,
    )


def load_autoregressive(
    files: AutoregressiveFiles,
    device: torch.device,
    dtype: torch.dtype,
    recorder: Recorder,
    *,
    offload_ar_model: bool = False,
    offload_tokenizer: bool = False,
) -> AutoregressiveParts:
    """Read the weights of a world.

    Raises:
        InsufficientMemoryError: the device is too small for one clip.
    """
    chosen = {"offload_ar_model": offload_ar_model, "offload_tokenizer": offload_tokenizer}
    _check_memory(files, device, dtype, [flag for flag, given in chosen.items() if given])
    logger.info("reading %s", files.folder)
    compiling = compile_ahead(files.config, device)
    with recorder.stage("load"):
        transformer = _read(
            ARTransformer, files.config, files.transformer, KEYS, device, dtype, offload_ar_model
        )
        tokenizer = _read(
            CosmosTokenizer,
            files.tokenizer_config,
            files.tokenizer,
            key_map(files.tokenizer_config),
            device,
            dtype,
            offload_tokenizer,
        )
        if compiling is not None:
            compiling.join()
    return AutoregressiveParts(transformer, tokenizer)


def _read(
    kind: Any,
    config: Any,
    source: Checkpoint,
    keys: KeyMap,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool,
) -> Part[Any]:
    with torch.device("meta"):
        module = kind(config)
    home = torch.device("cpu") if offload else device
    load_into(module, source, keys, device=home, dtype=dtype)
    return Part(module.requires_grad_(False).eval(), device, offload=offload)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Fit:
    """How a world fits.

    Attributes:
        need: bytes of the plan with `flags`, or of the smallest plan where nothing fits.
        flags: offload flags of that plan.
        fits: whether the need is met; None where the memory is not known.
    """

    need: int
    flags: tuple[str, ...]
    fits: bool | None


def fit(
    config: ARTransformerConfig,
    tokenizer: CosmosTokenizerConfig,
    device: torch.device,
    memory: Memory | None,
    dtype: torch.dtype | None = None,
    given: Collection[str] = (),
) -> Fit:
    """Find the fewest offload flags with which a world fits.

    Args:
        config: of the transformer.
        tokenizer: its configuration.
        device: where the world would run.
        memory: of the device; None where it is not known.
        dtype: of the weights; by default that of the device.
        given: flags that are set already.
    """
    choices: tuple[tuple[str, ...], ...] = ((),)
    if device.type == "cuda":  # elsewhere the parts have one home anyway
        choices = ((), *((flag,) for flag in OFFLOAD_FLAGS), OFFLOAD_FLAGS)
    plans = []
    for choice in choices:
        if device.type == "cuda" and not set(given) <= set(choice):
            continue
        chosen = dict.fromkeys(choice, True)
        plan = plan_autoregressive(
            config, tokenizer, dtype=dtype or compute_dtype(device), **chosen
        )
        plans.append(Fit(plan.peak, choice, None if memory is None else plan.peak <= memory.free))
        if plans[-1].fits is not False:
            return plans[-1]
    return min(plans, key=lambda plan: plan.need)


def _check_memory(
    files: AutoregressiveFiles, device: torch.device, dtype: torch.dtype, given: Collection[str]
) -> None:
    memory = device_memory(device)
    if memory is None:
        return
    found = fit(files.config, files.tokenizer_config, device, memory, dtype, given)
    more = [flag for flag in found.flags if flag not in given]
    if found.fits and not more:
        return
    chosen = dict.fromkeys(given if device.type == "cuda" else (), True)
    need = plan_autoregressive(files.config, files.tokenizer_config, dtype=dtype, **chosen).peak
    kind = "GPU" if device.type == "cuda" else "host"
    message = (
        f"{files.folder.name} needs about {need / GIGABYTE:.1f} GB of {kind} memory, "
        f"{memory.free / GIGABYTE:.1f} of {memory.total / GIGABYTE:.1f} GB are free"
    )
    least = f"{found.need / GIGABYTE:.1f} GB"
    if found.fits:
        message += f"; with {' '.join(f'--{flag}' for flag in more)} it needs {least}, which fits"
    elif device.type == "cuda":
        message += f"; no offload flag is enough (at least {least} are needed)"
    raise InsufficientMemoryError(message)


def _find_model(model: Path, checkpoint_dir: Path) -> Path:
    """Return the folder, or the file, that `model` names."""
    below = checkpoint_dir / model
    for path in (below, model):
        if path.is_dir() or path.is_file():
            return path
    if not checkpoint_dir.is_dir():
        raise CheckpointError(
            f"no checkpoint folder {checkpoint_dir} (--checkpoint_dir), so no {model} in it"
        )
    have = sorted(path.name for path in checkpoint_dir.iterdir() if path.is_dir())
    raise CheckpointError(
        f"no folder {below}; {checkpoint_dir} holds: {', '.join(have) or 'no folder'}"
    )


def open_transformer(path: Path) -> Checkpoint:
    """Open the transformer of a folder, in whatever form it was saved; headers only.

    Args:
        path: the folder; or a file, which is opened whatever lies beside it (of a tensor-parallel
            shard, the set that it belongs to).

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if path.is_file():
        stem = shard_stem(path)
        if stem is None:
            return open_checkpoint(path)
        return open_shards(find_shards(path.parent, stem), SHARDS)
    for name in TRANSFORMER_FILES:
        if (path / name).exists():
            return open_checkpoint(path / name)
    shards = find_shards(path)
    if shards:
        return open_shards(shards, SHARDS)
    saved = sorted(path.glob("iter_*.pt"))
    if saved:
        return open_checkpoint(saved[-1])
    raise CheckpointError(
        f"{path} holds no model.pt (nor model.safetensors, model_model_mp_*.pt, iter_*.pt)"
        f"{_unfinished(path)}"
    )


def _unfinished(folder: Path) -> str:
    """The end of a message about absent files: what a broken download left."""
    left = sorted(path.name for pattern in _UNFINISHED for path in folder.rglob(pattern))
    if not left:
        return ""
    return f"; a download was not finished ({', '.join(left[:3])}): download it again"


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what config.json in `folder` says; nothing where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings, but a {type(settings).__name__}")
    return settings


def _tokenizer_folder(folder: Path, roots: list[Path]) -> Path:
    names = _TOKENIZERS[::-1] if "1.0" in folder.name else _TOKENIZERS
    for root in roots:
        for name in names:
            if (root / name).is_dir():
                return root / name
    searched = " or ".join(map(str, roots))
    raise CheckpointError(
        f"no discrete tokenizer: neither {names[0]} nor {names[1]} is in {searched}"
    )


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the named device, or the best there is.

    Raises:
        InputError: it does not exist here.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"no device {device} here: {str(error).splitlines()[0]}") from error
    return chosen


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 where it is fast, else float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
