"""`worldline checkpoints`: contents of a file or folder of weights; released ones from the hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from importlib import import_module
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldline.cli.download import download
from worldline.errors import CheckpointError
from worldline.files import read_json, readable_size

if TYPE_CHECKING:
    from worldline.weights.checkpoint import Checkpoint
    from worldline.weights.networks import Network

_SUFFIXES = (".pt", ".pth", ".jit", ".safetensors", ".bin", ".ckpt")
_COMPLETE = "complete: every tensor fits"
Lines = Iterator[tuple[str, str]]  # topic and text


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
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    targets = [path]
    if path.is_dir():
        # a repository holds transformers two folders below; text encoders have an owner's folder
        patterns = () if _holds_weights(path) else ("*", "*/*", "models--*/snapshots/*")
        inside = {p for pattern in (*patterns, "base/*", "*/base/*") for p in path.glob(pattern)}
        targets = [folder for folder in (path, *sorted(inside)) if _holds_weights(folder)]
        if not targets:
            raise CheckpointError(f"{path}: it holds no weights ({', '.join(_SUFFIXES)})")
    num_damaged = 0
    for target in targets:
        try:
            lines = [*examine(target)]
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


def _holds_weights(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix in _SUFFIXES for path in folder.iterdir())


def examine(path: Path) -> Lines:
    """Contents of a file, or of the weights in a folder.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or incomplete.
    """
    from worldline.tokenizers.cosmos.weights import LAYOUTS

    if path.is_file():  # one of several files: the whole model is examined
        listed = [read_json(index).get("weight_map") for index in path.parent.glob("*.index.json")]
        sets: list[Iterable[str]] = [each.values() for each in listed if isinstance(each, dict)]
        sets += [layout for layout in LAYOUTS if len(layout) > 1]
        path = path.parent if any(path.name in names for names in sets) else path
    source = open_weights(path)
    inside = f', inside ["{source.nesting}"]' if source.nesting else ""
    yield "format", f"{source.kind}{inside}"
    numels: Counter[str] = Counter()
    for info in source.tensors.values():
        numels[str(info.dtype).removeprefix("torch.")] += info.numel()
    size = readable_size(sum(info.nbytes for info in source.tensors.values()))
    dtypes = ", ".join(f"{dtype} ({count:,})" for dtype, count in numels.most_common())
    yield "tensors", f"{len(source.tensors):,}, {size}; values: {dtypes}"
    shared = commonpath([name.replace(".", "/") for name in source.tensors])
    if shared and len(source.tensors) > 1:
        yield "prefix", f"{shared.replace('/', '.')}."
    if source.beside:
        yield "beside", ", ".join(source.beside)
    yield from describe(source, path)


def open_weights(path: Path) -> Checkpoint:
    """Tensors of a file, or of the model in a folder."""
    from worldline.text.encoder import WEIGHTS, find_weights
    from worldline.tokenizers.cosmos.weights import LAYOUTS, tokenizer_files
    from worldline.weights.checkpoint import joined, open_checkpoint
    from worldline.weights.networks import open_transformer

    if path.is_dir():
        names = {file.name for file in path.iterdir() if file.suffix in _SUFFIXES}
        if names & {name for layout in LAYOUTS for name in layout if name[:6] != "model."}:
            return joined([open_checkpoint(file) for file in tokenizer_files(path)], path)
        if names & {name for name in WEIGHTS if name.startswith("pytorch_")}:
            return open_checkpoint(find_weights(path))
        if len(names) == 1 and names != {"model.pt"}:
            return open_checkpoint(path / names.pop())
    return open_transformer(path)


def describe(source: Checkpoint, path: Path) -> Lines:
    """Family of a model, its sizes, and whether every tensor fits: by the code that runs use."""
    from worldline.family import FAMILIES
    from worldline.opening import find_family
    from worldline.text.reason1 import Reason1Files
    from worldline.text.t5 import T5Files
    from worldline.tokenizers.cosmos import weights as cosmos
    from worldline.tokenizers.cosmos.model import PRESETS
    from worldline.tokenizers.wan.model import WanTokenizerConfig
    from worldline.tokenizers.wan.weights import is_wan, open_wan

    folder = path if path.is_dir() else path.parent
    if name := find_family(source.tensors):
        weights = import_module(f"{FAMILIES[name]}.weights")
        yield "family", f"Cosmos {name} model"
        yield from check(weights.open_network, source, weights.PRESETS)
        return
    if is_wan(source):
        yield "family", "Wan video tokenizer"
        yield from check(open_wan, source.path, {"2.1": WanTokenizerConfig()})
        return
    settings = folder / "config.json"
    kind = read_json(settings).get("model_type") if settings.is_file() else None
    for encoder in (T5Files, Reason1Files):
        if kind in encoder.model_types:
            yield "family", encoder.name
            try:
                files = encoder.open(folder)
                yield "sizes", f"text width {files.width:,}"
                yield "parameters", f"{files.num_parameters:,}"
                unread = files.check()
                beside = f"; {unread:,} more, which are not read" if unread else ""
                yield "verdict", f"{_COMPLETE}{beside}"
            except CheckpointError as error:
                yield "verdict", str(error)
            return
    try:
        config = cosmos.read_config(cosmos.network_view(source), folder.name)
    except CheckpointError:
        some = ", ".join(sorted(source.tensors)[:3])
        yield "family", f"unknown (tensors such as {some})"
        yield "verdict", "not recognised"
        return
    yield "family", f"Cosmos {'discrete' if config.levels else 'continuous'} video tokenizer"
    presets = {name: replace(preset, tap=config.tap) for name, preset in PRESETS.items()}
    yield from check(cosmos.open_tokenizer, path, presets)


def check(
    open_network: Callable[[Any], Network[Any]], place: Any, presets: Mapping[str, Any]
) -> Lines:
    """Sizes of a network, the released one that it equals, and what does not fit."""
    try:
        network = open_network(place)
    except CheckpointError as error:
        yield "verdict", str(error)
        return
    released = [name for name, config in presets.items() if config == network.config]
    yield "released", ", ".join(released) or "no, of other sizes"
    values = ((each.name, getattr(network.config, each.name)) for each in fields(network.config))
    yield "sizes", ", ".join(f"{name} {n}" for name, n in values if isinstance(n, int) and n)
    yield "parameters", f"{network.num_parameters:,}"
    yield "verdict", _COMPLETE
