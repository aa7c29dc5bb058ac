"""`worldline checkpoints`: what a file or a folder of weights is; released ones from the hub."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldline.cli.download import download
from worldline.errors import CheckpointError
from worldline.files import GIGABYTE

if TYPE_CHECKING:
    from worldline.text.encoder_files import EncoderFamily
    from worldline.weights.read import Checkpoint

_SUFFIXES = (".pt", ".pth", ".jit", ".safetensors", ".bin", ".ckpt")
_SHOWN = 3
_COMPLETE = "complete: every tensor fits"
_NO_RELEASED_SIZE = "no released size"


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
    if path.is_dir():
        # a repository of Predict2.5 holds its tokenizer, and its transformers two folders below
        around = () if _holds_weights(path) else (*path.iterdir(), *_text_folders(path))
        inside = {*around, *path.glob("base/*"), *path.glob("*/base/*")}
        targets = [*targets, *sorted(inside)]
        targets = [folder for folder in targets if _holds_weights(folder)]
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
    for recognise in (_denoiser, _wan_tokenizer):
        found = recognise(source)
        if found is not None:
            return found
    for recognise_encoder in (_t5, _reason1):
        found = recognise_encoder(source, path)
        if found is not None:
            return found
    tokenizer = _tokenizer(source, path)
    if tokenizer is not None:
        return tokenizer
    some = ", ".join(sorted(source.tensors)[:_SHOWN])
    return Finding(source, f"unknown (tensors such as {some})", None, "not recognised")


def _holds_weights(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix in _SUFFIXES for path in folder.iterdir())


def _text_folders(checkpoint_dir: Path) -> list[Path]:
    """List the folders where the released worlds keep their text encoders."""
    from worldline.text.reason1 import reason1_folders
    from worldline.text.t5 import t5_folders

    return [*t5_folders(checkpoint_dir), *reason1_folders(checkpoint_dir)]


def _model_type(folder: Path) -> str | None:
    """Return what the config.json in a folder says of the kind of model; None for nothing."""
    from worldline.loading import read_settings

    with suppress(CheckpointError):  # told by those who need what it says
        kind = read_settings(folder).get("model_type")
        return kind if isinstance(kind, str) else None
    return None


def _open(path: Path) -> Checkpoint:
    from worldline.loading import open_transformer
    from worldline.models.predict2_5_dit.weights import FILE_NAMES
    from worldline.text.encoder_files import open_weights
    from worldline.text.reason1 import FAMILY as REASON1
    from worldline.text.t5 import FAMILY as T5
    from worldline.tokenizers.cosmos.weights import LAYOUTS, tokenizer_files
    from worldline.weights.dit import find_dit
    from worldline.weights.read import open_checkpoint
    from worldline.weights.views import joined

    if not path.is_dir():
        return open_checkpoint(path)
    names = {name for layout in LAYOUTS for name in layout if not name.startswith("model.")}
    if any((path / name).exists() for name in names):
        return joined([open_checkpoint(file) for file in tokenizer_files(path)], path)
    if _model_type(path) in (*T5.kinds, *REASON1.kinds):
        return open_weights(path)
    try:
        return open_transformer(path)
    except CheckpointError:
        with suppress(CheckpointError):
            return open_checkpoint(find_dit(path, FILE_NAMES)[0])
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
    size = _released_size(PRESETS, config, ("depth", "width", "context_width"))
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


def _denoiser(source: Checkpoint) -> Finding | None:
    """Recognise a transformer that denoises latents, of Predict1 or of Predict2.5."""
    from worldline.loading.folders import is_diffusion
    from worldline.models.predict2_5_dit.weights import is_flow_dit

    in_diffusers = any(name.startswith("patch_embed.") for name in source.tensors)
    if not in_diffusers and not is_diffusion(source):
        return None
    describe = _flow if is_flow_dit(source) else _diffusion
    try:
        return describe(source, in_diffusers=in_diffusers)
    except ValueError as error:  # CheckpointError is one
        return Finding(source, "Cosmos diffusion transformer", None, str(error))


def _diffusion(source: Checkpoint, *, in_diffusers: bool) -> Finding:
    import torch

    from worldline.loading import read_settings
    from worldline.models.predict1_dit.model import PRESETS, DiT
    from worldline.models.predict1_dit.weights import DIFFUSERS_KEYS, KEYS, read_config
    from worldline.weights.dit import diffusers_settings

    folder = source.path.parent
    settings = diffusers_settings(folder, "learnable") if in_diffusers else read_settings(folder)
    keys = DIFFUSERS_KEYS if in_diffusers else KEYS
    config = read_config(source, keys, settings)
    with torch.device("meta"):
        expected = {n: tuple(p.shape) for n, p in DiT(config).named_parameters()}
    kind = "Video2World model" if config.condition_mask else "Text2World model"
    if config.vocabulary:
        kind = f"decoder of the autoregressive models, vocabulary {config.vocabulary:,}"
    size = _released_size(PRESETS, config, ("depth", "width", "condition_mask", "vocabulary"))
    family = (
        f"Cosmos diffusion {kind}, {size}: {config.depth} layers, width {config.width}, "
        f"{config.num_heads} heads"
    )
    return Finding(source, family, _count(expected), _match(source, expected, keys))


def _flow(source: Checkpoint, *, in_diffusers: bool) -> Finding:
    import torch

    from worldline.loading import read_settings
    from worldline.models.predict2_5_dit.model import PRESETS, FlowDiT
    from worldline.models.predict2_5_dit.weights import (
        DIFFUSERS_KEYS,
        KEYS,
        network_view,
        read_config,
    )
    from worldline.weights.dit import diffusers_settings

    folder = source.path.parent
    settings = diffusers_settings(folder, None) if in_diffusers else read_settings(folder)
    keys = DIFFUSERS_KEYS if in_diffusers else KEYS
    network = network_view(source)
    config = read_config(network, keys, settings)
    with torch.device("meta"):
        expected = {n: tuple(p.shape) for n, p in FlowDiT(config).named_parameters()}
    size = _released_size(PRESETS, config, ("depth", "width"))
    family = (
        f"Cosmos-Predict2.5 model, {size}: {config.depth} layers, width {config.width}, "
        f"{config.num_heads} heads, text features {config.feature_width:,}"
    )
    return Finding(source, family, _count(expected), _match(network, expected, keys))


def _wan_tokenizer(source: Checkpoint) -> Finding | None:
    import torch

    from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig
    from worldline.tokenizers.wan.weights import find_layout, open_wan

    if find_layout(source) is None:
        return None
    try:
        config = open_wan(source.path).config
    except CheckpointError as error:
        return Finding(source, "Wan video tokenizer", None, str(error))
    with torch.device("meta"):
        expected = {n: tuple(p.shape) for n, p in WanTokenizer(config).named_parameters()}
    names = ("channels", "multipliers", "num_blocks", "temporal_steps", "latent_channels")
    size = _released_size({"2.1": WanTokenizerConfig()}, config, names)
    family = (
        f"Wan video tokenizer, {size}: compression {config.temporal}x{config.spatial}x"
        f"{config.spatial}, {config.latent_channels} latent channels"
    )
    return Finding(source, family, _count(expected), _COMPLETE)


def _t5(source: Checkpoint, path: Path) -> Finding | None:
    from worldline.text.t5 import FAMILY

    if not FAMILY.marks(source.tensors) and not _is_part(path, FAMILY.kinds):
        return None

    def sizes(settings: Mapping[str, Any]) -> str:
        return (
            f"{settings['num_layers']} layers, width {settings['d_model']:,}, "
            f"{settings['num_heads']} heads, vocabulary {settings['vocab_size']:,}"
        )

    return _text_encoder(source, path, FAMILY, "T5 text encoder", sizes)


def _reason1(source: Checkpoint, path: Path) -> Finding | None:
    from worldline.text.reason1 import FAMILY

    kind = _model_type(path if path.is_dir() else path.parent)
    if kind is not None and kind not in FAMILY.kinds:  # Qwen2's own models have the same names
        return None
    if not FAMILY.marks(source.tensors) and not _is_part(path, FAMILY.kinds):
        return None

    def sizes(settings: Mapping[str, Any]) -> str:
        layers, width = settings["num_hidden_layers"], settings["hidden_size"]
        return (
            f"{layers} layers, width {width:,}, {settings['num_attention_heads']} heads "
            f"({settings['num_key_value_heads']} of keys), vocabulary {settings['vocab_size']:,}, "
            f"text features {layers * width:,}"
        )

    return _text_encoder(source, path, FAMILY, "Reason1 text encoder (Qwen2.5-VL)", sizes)


def _is_part(path: Path, kinds: Collection[str]) -> bool:
    """Tell whether a file is listed with others as one of a model of these kinds."""
    from worldline.text.encoder_files import files_together

    return path.is_file() and _model_type(path.parent) in kinds and len(files_together(path)) > 1


def _released_encoder(presets: Mapping[str, Mapping[str, int]], settings: Mapping[str, Any]) -> str:
    """Return which of the released sizes a text encoder has."""
    for preset, known in presets.items():
        if known.items() <= settings.items():
            return preset
    return _NO_RELEASED_SIZE


def _text_encoder(
    source: Checkpoint,
    path: Path,
    family: EncoderFamily,
    name: str,
    sizes: Callable[[Mapping[str, Any]], str],
) -> Finding:
    """Say what a text encoder is.

    Args:
        source: its tensors.
        path: its folder, of which the tokenizer is looked at too; or a file.
        family: of encoders.
        name: of the family, in words.
        sizes: says them in words, of what fixes an encoder.
    """
    from worldline.text.encoder_files import files_together, read_config

    parameters = None
    verdict = _COMPLETE
    try:
        config = read_config(path if path.is_dir() else path.parent, family.kinds)
        settings = family.settings_of(config)
        name = f"{name}, {_released_encoder(family.presets, settings)}: {sizes(settings)}"
        parameters = family.count_parameters(config)
        if path.is_dir():
            family.open(path)
        else:
            together = files_together(path)
            family.fit(source.tensors, config, path.name, part=len(together) > 1)
            if len(together) > 1:
                verdict = f"every tensor fits; one of {len(together)} files"
        if unread := sum(family.keys.ours(tensor) is None for tensor in source.tensors):
            verdict += f"; {unread:,} more, which are not read"
    except ValueError as error:  # CheckpointError is one
        verdict = str(error)
    return Finding(source, name, parameters, verdict)


def _released_size(presets: Mapping[str, object], config: object, names: Sequence[str]) -> str:
    """Return which of the released sizes a model has, by the fields that tell."""
    for preset, known in presets.items():
        if all(getattr(known, name) == getattr(config, name) for name in names):
            return preset
    return _NO_RELEASED_SIZE


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
    sizes = ("spatial", "temporal", "patch", "level_channels", "levels")
    released = _released_size(PRESETS, config, sizes)
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
    return _COMPLETE


def _count(expected: Mapping[str, tuple[int, ...]]) -> int:
    from math import prod

    return sum(prod(shape) for shape in expected.values())
