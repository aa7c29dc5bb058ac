"""`worldline checkpoints`: what a file or a folder of weights is; released ones from the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldline.cli.download import download
from worldline.errors import CheckpointError
from worldline.files import GIGABYTE

if TYPE_CHECKING:
    from worldline.weights.read import Checkpoint

_SUFFIXES = (".pt", ".pth", ".jit", ".safetensors", ".bin", ".ckpt")
_SHOWN = 3


@click.group()
def checkpoints() -> None:
    """Fetch checkpoints, and look into them."""


checkpoints.add_command(download)


@checkpoints.command()
@click.argument("path", type=click.Path(path_type=Path))
def inspect(path: Path) -> None:
    """Say what PATH is, and what is missing or too much in it.

    PATH is a file, the folder of a model, or a folder of such folders. Headers alone are read. The
    exit status is 2 where there is no checkpoint or a file is damaged.
    """
    targets = [path]
    if path.is_dir() and not _holds_weights(path):
        targets = [folder for folder in sorted(path.iterdir()) if _holds_weights(folder)]
        if not targets:
            raise CheckpointError(f"{path} holds no weights ({', '.join(_SUFFIXES)})")
    damaged: list[str] = []
    for target in targets:
        try:
            finding = examine(target)
        except CheckpointError as error:
            if len(targets) == 1:
                raise
            damaged.append(str(error))
            click.echo(f"{target}\n  damaged     {error}")
            continue
        click.echo(target)
        for topic, text in finding.lines():
            click.echo(f"  {topic:<11} {text}")
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(targets)} checkpoints cannot be read")


@dataclass(frozen=True)
class Finding:
    """What a checkpoint turned out to be.

    Attributes:
        source: its tensors, before anything is left out.
        family: in words.
        parameters: of the network it fits; None where it fits none.
        verdict: whether everything fits, and what does not.
    """

    source: Checkpoint
    family: str
    parameters: int | None
    verdict: str

    def lines(self) -> Iterator[tuple[str, str]]:
        from worldline.weights.inspect import describe

        summary = describe(self.source)
        nesting = f', inside ["{summary.nesting}"]' if summary.nesting else ""
        yield "format", f"{summary.kind}{nesting}"
        size = summary.nbytes
        shown = f"{size / GIGABYTE:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
        dtypes = ", ".join(f"{kind} ({count:,})" for kind, count in summary.elements.items())
        yield "tensors", f"{summary.num_tensors:,}, {shown}; values: {dtypes}"
        if summary.prefix:
            yield "prefix", summary.prefix
        if self.parameters is not None:
            yield "parameters", f"{self.parameters:,}"
        if summary.beside:
            yield "beside", ", ".join(summary.beside)
        yield "family", self.family
        yield "verdict", self.verdict


def examine(path: Path) -> Finding:
    """Recognise a file, or the weights in a folder.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or incomplete.
    """
    source = _open(path)
    names = {name.removeprefix("model.") for name in source.tensors}
    folder = path if path.is_dir() else path.parent
    if "tok_embeddings.weight" in names:
        return _autoregressive(source, folder, whole=path.is_dir())
    tokenizer = _tokenizer(source, path)
    if tokenizer is not None:
        return tokenizer
    some = ", ".join(sorted(source.tensors)[:_SHOWN])
    return Finding(source, f"unknown (tensors such as {some})", None, "not recognised")


def _holds_weights(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix in _SUFFIXES for path in folder.iterdir())


def _open(path: Path) -> Checkpoint:
    from worldline.loading import open_transformer
    from worldline.tokenizers.cosmos.load import LAYOUTS, open_tokenizer
    from worldline.weights.read import open_checkpoint

    if not path.is_dir():
        return open_checkpoint(path)
    names = {name for layout in LAYOUTS for name in layout if not name.startswith("model.")}
    if any((path / name).exists() for name in names):
        return open_tokenizer(path)[0]
    try:
        return open_transformer(path)
    except CheckpointError:
        found = [file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES]
        if len(found) != 1 or found[0].name == "model.pt":
            raise
        return open_checkpoint(found[0])


def _autoregressive(source: Checkpoint, folder: Path, *, whole: bool) -> Finding:
    import torch

    from worldline.loading import read_settings
    from worldline.models.predict1_ar.model import PRESETS, ARTransformer
    from worldline.models.predict1_ar.weights import KEYS, read_config

    config = read_config(source, read_settings(folder))
    with torch.device("meta"):
        expected = {n: tuple(p.shape) for n, p in ARTransformer(config).named_parameters()}
    size = next(
        (
            name
            for name, preset in PRESETS.items()
            if (preset.depth, preset.width, preset.context_width)
            == (config.depth, config.width, config.context_width)
        ),
        "no released size",
    )
    kind = "Video2World" if config.context_width is not None else "base"
    grid = config.grid
    family = (
        f"Cosmos autoregressive {kind} model, {size}: {config.depth} layers, width {config.width}, "
        f"{config.num_heads} heads ({config.num_kv_heads} of keys), vocabulary "
        f"{config.vocabulary:,}, latent {grid.frames} x {grid.height} x {grid.width}"
    )
    verdict = _match(source, expected, KEYS)
    if whole and not (folder / "config.json").exists():
        verdict += "; no config.json: the released defaults are assumed"
    return Finding(source, family, _count(expected), verdict)


def _tokenizer(source: Checkpoint, path: Path) -> Finding | None:
    import torch

    from worldline.tokenizers.cosmos.model import PRESETS, CosmosTokenizer
    from worldline.tokenizers.cosmos.weights import key_map, network_view, read_config

    network = network_view(source)
    name = path.name if path.is_dir() else path.parent.name
    try:
        config = read_config(network, name=name)
    except CheckpointError:
        return None
    with torch.device("meta"):
        model = CosmosTokenizer(config)
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    halves = {
        "encoder": ("encoder.", "quant_conv."),
        "decoder": ("decoder.", "post_quant_conv."),
    }
    present = [
        half
        for half in halves
        if any(tensor.startswith(f"{half}.conv_in") for tensor in network.tensors)
    ]
    prefixes = tuple(prefix for half in present for prefix in halves[half])
    expected = {n: shape for n, shape in expected.items() if n.startswith(prefixes)}
    part = "" if len(present) == 2 else f", {present[0]} alone" if present else ""
    released = next(
        (
            preset
            for preset, known in PRESETS.items()
            if (known.spatial, known.temporal, known.patch, known.level_channels, known.levels)
            == (config.spatial, config.temporal, config.patch, config.level_channels, config.levels)
        ),
        "no released size",
    )
    kind = "discrete" if config.levels else "continuous"
    family = (
        f"Cosmos {kind} video tokenizer{part}, {released}: compression "
        f"{config.temporal}x{config.spatial}x{config.spatial}, "
        + (f"vocabulary {config.vocabulary:,}" if config.levels else "")
        + ("" if config.levels else f"{config.latent_channels} latent channels")
    )
    if network is not source:
        averaged = any(tensor.startswith("ema.network-") for tensor in source.tensors)
        family += f"; a training checkpoint{', with averaged weights too' if averaged else ''}"
    return Finding(source, family, _count(expected), _match(network, expected, key_map(config)))


def _match(source: Checkpoint, expected: Mapping[str, tuple[int, ...]], keys: object) -> str:
    from worldline.weights.keymap import KeyMap, match

    assert isinstance(keys, KeyMap)
    try:
        match(source.tensors, expected, keys, source.path.name)
    except CheckpointError as error:
        return str(error)
    return "complete: every tensor fits"


def _count(expected: Mapping[str, tuple[int, ...]]) -> int:
    from math import prod

    return sum(prod(shape) for shape in expected.values())
