"""Networks on disk: opened by header and checked, or read; strict, and nothing is executed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from worldline.errors import CheckpointError
from worldline.files import TRANSFORMER_FILES, read_json, unfinished
from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import find_shards, open_checkpoint, open_shards, shard_stem
from worldline.weights.source import Checkpoint
from worldline.weights.stream import load_into

Config = TypeVar("Config")
Layout = Literal["nvidia", "diffusers"]

DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
# released transformers whose file names start with a hash, and what their training writes
_HASHED = "*_ema_bf16.pt"


@dataclass(frozen=True)
class NetworkFiles(Generic[Config]):
    """A network on disk, checked but not read.

    Attributes:
        source: its tensors.
        keys: from their names to ours.
        config: the architecture that they imply.
        num_parameters: of the network.
        layout: whose names its tensors have.
    """

    source: Checkpoint
    keys: KeyMap
    config: Config
    num_parameters: int
    layout: Layout


def check_network(
    source: Checkpoint,
    keys: KeyMap,
    config: Config,
    network: type[nn.Module],
    layout: Layout = "nvidia",
) -> NetworkFiles[Config]:
    """Check that a file holds every parameter of a network, and nothing else.

    Args:
        source: opened.
        keys: from its names to those of the network.
        config: of the network.
        network: built of `config`, on the meta device.
        layout: whose names the tensors have.

    Raises:
        CheckpointError: it does not (all that is wrong is named), or there is no such network.
    """
    try:
        with torch.device("meta"):
            module = network(config)
    except ValueError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    match(source.tensors, expected, keys, str(source.path))
    return NetworkFiles(source, keys, config, sum(map(math.prod, expected.values())), layout)


def read_shapes(
    source: Checkpoint, keys: KeyMap, decisive: Mapping[str, int], kind: str
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that `keys` knows, by our name.

    Args:
        source: its tensors.
        keys: from their names to ours.
        decisive: our name of a tensor that there must be -> number of axes.
        kind: network in words, for the message.

    Raises:
        CheckpointError: such a tensor is absent or has other axes.
    """
    shapes = {
        pair[1]: info.shape
        for name, info in source.tensors.items()
        if (pair := keys.find(name))  # `match` reports the others
    }
    for name, axes in decisive.items():
        if len(shapes.get(name, ())) != axes or 0 in shapes[name]:
            state = f"is {list(shapes[name])}" if name in shapes else "is absent"
            raise CheckpointError(
                f"{source.path}: not {kind} (tensor {keys.released(name)} {state})"
            )
    return shapes


def count_blocks(names: Iterable[str], blocks: str) -> int:
    """Number of blocks of a network, by the names of its tensors."""
    return 1 + max(int(name.split(".")[1]) for name in names if name.startswith(f"{blocks}."))


def released_size(presets: Mapping[str, object], config: object, *fields: str) -> str:
    """Name of the preset that has the same `fields` as a config, for people to read."""
    for name, preset in presets.items():
        if all(getattr(preset, field) == getattr(config, field) for field in fields):
            return name
    return "no released size"


def find_transformer(path: Path) -> Path:
    """File of a transformer: of NVIDIA's layout or, where there is none, of diffusers'.

    Args:
        path: a released folder, a diffusers folder (the `transformer` folder or the one around it),
            or a file, which is taken whatever lies beside it.

    Returns:
        The file; of tensor-parallel shards the first, of several `iter_*.pt` the newest.

    Raises:
        CheckpointError: there is none, a set is incomplete, or several are as good.
    """
    if path.is_file():
        return path
    hashed = sorted(path.glob(_HASHED))
    if len(hashed) > 1:
        names = ", ".join(file.name for file in hashed)
        raise CheckpointError(f"{path} holds several transformers ({names}); name one of them")
    candidates = [*hashed, *(path / name for name in TRANSFORMER_FILES)]
    if file := next((file for file in candidates if file.is_file()), None):
        return file
    if shards := find_shards(path):
        return shards[0]
    if saved := sorted(path.glob("iter_*.pt")):
        return saved[-1]
    for folder in (path / "transformer", path):
        for name in DIFFUSERS_FILES:
            if (folder / name).is_file():
                return folder / name
        if parts := sorted(folder.glob("diffusion_pytorch_model-*.safetensors")):
            raise CheckpointError(
                f"{folder} is incomplete: it has {parts[0].name}, but not {DIFFUSERS_FILES[1]}"
            )
    raise CheckpointError(
        f"{path} holds no model.pt (nor model.safetensors, model_model_mp_*.pt, iter_*.pt, "
        f"transformer/{DIFFUSERS_FILES[0]}){unfinished(path)}"
    )


def open_transformer(path: Path | Checkpoint) -> Checkpoint:
    """Open the transformer that `find_transformer` finds, all shards of a set as one.

    Args:
        path: as for `find_transformer`; or a checkpoint opened already, which is returned.

    Raises:
        CheckpointError: there is none, or it is incomplete or damaged.
    """
    if isinstance(path, Checkpoint):
        return path
    file = find_transformer(path)
    stem = shard_stem(file)
    return open_shards(find_shards(file.parent, stem)) if stem else open_checkpoint(file)


def read_settings(folder: Path) -> dict[str, Any]:
    """Content of `config.json` in a folder; {} where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / "config.json"
    return read_json(path) if path.exists() else {}


def require_number(value: Any, where: str) -> float:
    """A setting as a number above 0.

    Raises:
        CheckpointError: it is something else; `where` names it.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise CheckpointError(f"{where} is {value!r}; it must be a number above 0")
    return float(value)


def fill(network: nn.Module, path: Path, keys: KeyMap, device: torch.device | str) -> None:
    """Give a network of our own the weights of a file, in float32, for inference.

    Args:
        network: built under `torch.device("meta")`.
        path: the file.
        keys: from its names to ours.
        device: where the weights go.

    Raises:
        CheckpointError: it is absent, damaged or of another network.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing{unfinished(path.parent)}")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            # counted in training alone, and absent from files of old torch
            module.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    counts = ("*.num_batches_tracked",)
    checkpoint = open_checkpoint(path)
    load_into(network, checkpoint, keys, device=device, dtype=torch.float32, optional=counts)
    network.requires_grad_(False).eval()


def pretrained(kind: Any, folder: Path, dtype: torch.dtype, unused: Collection[str] = ()) -> Any:
    """A network of transformers for inference, on the CPU.

    Args:
        kind: a class with `from_pretrained`.
        folder: config.json and safetensors.
        dtype: of the weights.
        unused: patterns of tensors in the file that this network has no place for.

    Raises:
        CheckpointError: the folder is absent or incomplete, or its tensors are not the network's.
    """
    from transformers.utils import logging

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json{unfinished(folder)}")
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would warn of is an error below
    try:
        network, report = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,  # a pickle is never opened
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named; none is accepted
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}{unfinished(folder)}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    # transformers would draw such weights at random
    wrong = {
        "missing": sorted(report["missing_keys"]),
        "of another shape": sorted(map(str, report["mismatched_keys"])),
        "unknown": sorted(
            name
            for name in report["unexpected_keys"]
            if not any(fnmatchcase(name, pattern) for pattern in unused)
        ),
    }
    if problems := [f"{what}: {', '.join(names[:3])}" for what, names in wrong.items() if names]:
        raise CheckpointError(f"{folder} does not fit {kind.__name__}: {'; '.join(problems)}")
    return network.requires_grad_(False).eval()


def pretrained_tokenizer(folder: Path, *, chat: bool = True) -> Any:
    """A tokenizer of transformers.

    Args:
        folder: its files.
        chat: whether it must know how a conversation is written.

    Raises:
        CheckpointError: a file is absent or damaged, or there is no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the packages raise plain Exception for a damaged file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]  # of a page of advice
        raise CheckpointError(
            f"{folder} holds no tokenizer ({reason}){unfinished(folder)}"
        ) from error
    if chat and not tokenizer.chat_template:
        raise CheckpointError(f"{folder} holds no chat template (chat_template.jinja)")
    return tokenizer
