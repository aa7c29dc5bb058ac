"""`worldline checkpoints`: contents of a file or folder of weights; released ones from the hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldline.cli.download import download
from worldline.errors import CheckpointError
from worldline.files import GIGABYTE, read_json

if TYPE_CHECKING:
    from worldline.weights.source import Checkpoint

_SUFFIXES = (".pt", ".pth", ".jit", ".safetensors", ".bin", ".ckpt")
_COMPLETE = "complete: every tensor fits"


@click.group()
def checkpoints() -> None:
    """Fetch checkpoints, and look into them."""


checkpoints.add_command(download)


@checkpoints.command()
@click.argument("path", type=click.Path(path_type=Path))
def inspect(path: Path) -> None:
    """Name the model in PATH, and what is missing or too much in it.

    PATH is a file, the folder of a model, or a folder of such folders. Headers alone are read. The
    exit status is 2 where there is no checkpoint or a file is damaged.
    """
    targets = [path]
    if path.is_dir():
        # a repository of Predict2.5 holds its tokenizer, and its transformers two folders below
        around = () if _holds_weights(path) else (*path.iterdir(), *_text_folders(path))
        inside = {*around, *path.glob("base/*"), *path.glob("*/base/*")}
        targets = [folder for folder in (path, *sorted(inside)) if _holds_weights(folder)]
        if not targets:
            raise CheckpointError(f"{path} holds no weights ({', '.join(_SUFFIXES)})")
    num_damaged = 0
    for target in targets:
        try:
            lines = [*examine(target).lines()]
        except CheckpointError as error:
            if len(targets) == 1:
                raise
            num_damaged += 1
            lines = [("damaged", str(error))]
        click.echo(target)
        for topic, text in lines:
            click.echo(f"  {topic:<11} {text}")
    if num_damaged:
        raise CheckpointError(f"{num_damaged} of {len(targets)} checkpoints cannot be read")


@dataclass(frozen=True)
class Finding:
    """Result of looking into a checkpoint.

    Attributes:
        source: all of its tensors.
        family: in words.
        verdict: whether everything fits, and what does not.
        num_parameters: of the network it fits; None where it fits none.
    """

    source: Checkpoint
    family: str
    verdict: str
    num_parameters: int | None = None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Topics and texts, in the order of printing."""
        source = self.source
        inside = f', inside ["{source.nesting}"]' if source.nesting else ""
        yield "format", f"{source.kind}{inside}"
        nbytes = sum(info.nbytes for info in source.tensors.values())
        size = f"{nbytes / GIGABYTE:.2f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.2f} MB"
        numels: Counter[str] = Counter()
        for info in source.tensors.values():
            numels[str(info.dtype).removeprefix("torch.")] += info.numel
        dtypes = ", ".join(f"{dtype} ({count:,})" for dtype, count in numels.most_common())
        yield "tensors", f"{len(source.tensors):,}, {size}; values: {dtypes}"
        if prefix := _common_prefix(source.tensors):
            yield "prefix", prefix
        if self.num_parameters is not None:
            yield "parameters", f"{self.num_parameters:,}"
        if source.beside:
            yield "beside", ", ".join(source.beside)
        yield "family", self.family
        yield "verdict", self.verdict


def _common_prefix(names: Iterable[str]) -> str:
    """Leading parts, up to a dot, that all names share; "" for a lone name."""
    first, last = min(names), max(names)
    shared = ""
    for part in first.split(".")[:-1]:
        if first == last or not last.startswith(f"{shared}{part}."):
            break
        shared += f"{part}."
    return shared


def examine(path: Path) -> Finding:
    """Recognise a file, or the weights in a folder.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or incomplete.
    """
    if path.is_file() and any(path.name in _listed(i) for i in path.parent.glob("*.index.json")):
        path = path.parent  # one of several files; the whole model is examined
    source = _open(path)
    for recognise in (_network, _text_encoder, _cosmos_tokenizer):
        if finding := recognise(source, path):
            return finding
    some = ", ".join(sorted(source.tensors)[:3])
    return Finding(source, f"unknown (tensors such as {some})", "not recognised")


def _listed(index: Path) -> set[str]:
    """Names of the files that an index of Hugging Face lists."""
    places = read_json(index).get("weight_map")
    return set(map(str, places.values())) if isinstance(places, dict) else set()


def _holds_weights(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix in _SUFFIXES for path in folder.iterdir())


def _text_folders(checkpoint_dir: Path) -> list[Path]:
    """Folders where the released worlds keep their text encoders."""
    from worldline.text.reason1 import Reason1Files
    from worldline.text.t5 import T5Files

    return [*T5Files.folders(checkpoint_dir), *Reason1Files.folders(checkpoint_dir)]


def _open(path: Path) -> Checkpoint:
    from worldline.text.encoder import WEIGHTS, find_weights
    from worldline.tokenizers.cosmos.weights import LAYOUTS, open_tokenizer
    from worldline.weights.networks import open_transformer
    from worldline.weights.read import open_checkpoint

    if path.is_dir():
        names = {name for layout in LAYOUTS for name in layout if not name.startswith("model.")}
        if any((path / name).exists() for name in names):
            return open_tokenizer(path).source
        if any((path / name).exists() for name in WEIGHTS if name.startswith("pytorch_")):
            return open_checkpoint(find_weights(path))
        files = [file for file in path.iterdir() if file.suffix in _SUFFIXES]
        if len(files) == 1 and files[0].name != "model.pt":
            return open_checkpoint(files[0])
    return open_transformer(path)


def _network(source: Checkpoint, path: Path) -> Finding | None:
    """Recognise a transformer or a Wan tokenizer, which are opened by their file alone."""
    from importlib import import_module

    from worldline.family import FAMILIES, requests_of
    from worldline.tokenizers.wan.model import WanTokenizerConfig
    from worldline.tokenizers.wan.weights import is_wan, open_wan

    for name, package in FAMILIES.items():
        if requests_of(name).recognise(source.tensors.keys()):
            weights = import_module(f"{package}.weights")
            kind, presets = f"Cosmos {name} model", weights.PRESETS
            break
    else:
        if not is_wan(source):
            return None
        kind, presets, weights = "Wan video tokenizer", {"2.1": WanTokenizerConfig()}, None
    try:
        network = weights.open_network(source) if weights else open_wan(source.path)
    except CheckpointError as error:
        return Finding(source, kind, str(error))
    released = [name for name, config in presets.items() if config == network.config]
    family = f"{kind}, {', '.join(released) or 'no released size'}: {_sizes(network.config)}"
    verdict = _COMPLETE
    if not (source.path.parent / "config.json").exists():
        verdict += "; no config.json: released defaults"
    return Finding(source, family, verdict, network.num_parameters)


def _sizes(config: Any) -> str:
    """Sizes of a network, by the names of its configuration."""
    sizes = ("depth", "width", "num_heads", "vocabulary", "condition_mask", "feature_width")
    sizes += ("context_width", "grid", "temporal", "spatial", "latent_channels")
    return ", ".join(f"{name} {getattr(config, name)}" for name in sizes if hasattr(config, name))


def _text_encoder(source: Checkpoint, path: Path) -> Finding | None:
    """Recognise a text encoder by the config.json of its folder, which is checked as a whole."""
    from worldline.text.reason1 import Reason1Files
    from worldline.text.t5 import T5Files

    folder = path if path.is_dir() else path.parent
    settings = folder / "config.json"
    kind = read_json(settings).get("model_type") if settings.is_file() else None
    for encoder in (T5Files, Reason1Files):
        if kind not in encoder.model_types:
            continue
        name, parameters = encoder.name, None
        try:
            files = encoder.open(folder)
            name, parameters = f"{name}, text width {files.width:,}", files.num_parameters
            unread = files.check()
            verdict = _COMPLETE + (f"; {unread:,} more, which are not read" if unread else "")
        except CheckpointError as error:
            verdict = str(error)
        return Finding(source, name, verdict, parameters)
    return None


def _cosmos_tokenizer(source: Checkpoint, path: Path) -> Finding | None:
    """Recognise a tokenizer, or half of one."""
    from math import prod

    from worldline.tokenizers.cosmos.model import PRESETS, CosmosTokenizer
    from worldline.tokenizers.cosmos.weights import key_map, network_view, read_config
    from worldline.weights.keymap import match
    from worldline.weights.networks import shapes_of

    network = network_view(source)
    try:
        config = read_config(network, name=path.name if path.is_dir() else path.parent.name)
    except CheckpointError:
        return None
    halves = {
        "encoder": ("encoder.", "quant_conv."),
        "decoder": ("decoder.", "post_quant_conv."),
    }
    present = [
        half for half in halves if any(n.startswith(f"{half}.conv_in") for n in network.tensors)
    ]
    prefixes = tuple(prefix for half in present for prefix in halves[half])
    shapes = shapes_of(CosmosTokenizer, config)
    expected = {name: shape for name, shape in shapes.items() if name.startswith(prefixes)}
    released = [
        name
        for name, preset in PRESETS.items()
        if replace(config, tap=preset.tap, channels=preset.channels) == preset
    ]
    family = (
        f"Cosmos {'discrete' if config.levels else 'continuous'} video tokenizer"
        f"{f', {present[0]} alone' if len(present) == 1 else ''}, "
        f"{', '.join(released) or 'no released size'}: {_sizes(config)}"
    )
    if network is not source:
        averaged = any(name.startswith("ema.network-") for name in source.tensors)
        family += f"; a training checkpoint{', with averaged weights too' if averaged else ''}"
    try:
        match(network.tensors, expected, key_map(config), str(source.path))
    except CheckpointError as error:
        return Finding(source, family, str(error))
    return Finding(source, family, _COMPLETE, sum(map(prod, expected.values())))
