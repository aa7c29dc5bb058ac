"""`worldline checkpoints shard`, `merge` and `convert`: the same weights in other files."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from pydantic import Field

from worldline.cli.messages import results
from worldline.cli.options import parameters, parsed
from worldline.cli.run import existing, log_replaced
from worldline.errors import CheckpointError, InputError
from worldline.files import readable_size
from worldline.locate import locate
from worldline.repositories import WEIGHTS
from worldline.request import OutputFlags
from worldline.request import Path as Named

if TYPE_CHECKING:
    from worldline.weights.checkpoint import Checkpoint
    from worldline.weights.networks import Network

logger = logging.getLogger(__name__)

TOKENIZER = ("encoder", "decoder", "autoencoder")  # names of files
# form -> suffixes of its files
_SUFFIXES = {"nvidia": (".pt", ".pth"), "safetensors": (".safetensors",)}
# form -> name of the weights in a folder; diffusers has its own
_NAMES = {"nvidia": "model.pt", "safetensors": "model.safetensors", "dcp": "model"}
Outputs = dict[Path, "Checkpoint | bytes"]


class _PartFlags(OutputFlags):
    """Flags that `shard` and `merge` share."""

    checkpoint_path: Named = Field(
        description="File of the model; `merge` makes the names of the parts of it.",
        json_schema_extra={"short": "-c"},
    )
    tensor_parallel_size: int = Field(
        ge=1, le=1 << 10, description="Number of parts.", json_schema_extra={"short": "-t"}
    )
    model_size: str | None = Field(
        None,
        description="Size that the model must have, such as 4b.  [default: that of its tensors]",
        json_schema_extra={"short": "-s"},
    )
    model_family: str = Field(
        "cosmos",
        pattern="^cosmos$",
        description="Family of the model.",
        json_schema_extra={"short": "-f"},
    )


class ShardFlags(_PartFlags):
    """Flags of the released `shard_autoregressive_base_checkpoints.py`."""

    target_backend: str = Field(
        "pytorch",
        pattern="^(pytorch|transformer_engine)$",
        description="Names of the tensors: pytorch, or transformer_engine.",
        json_schema_extra={"short": "-b"},
    )


class MergeFlags(_PartFlags):
    """Flags of the released `merge_autoregressive_tp_checkpoints.py`."""

    output_path: Named = Field(
        description="File of the whole model, .pt or .safetensors.",
        json_schema_extra={"short": "-o"},
    )


class ConvertFlags(OutputFlags):
    """Flags of `convert`."""

    source: Named = Field(json_schema_extra={"argument": True, "metavar": "SOURCE"})
    target: Named = Field(json_schema_extra={"argument": True, "metavar": "TARGET"})
    to: Literal["nvidia", "diffusers", "safetensors", "dcp"] | None = Field(
        None, description="Layout of TARGET.  [default: by its suffix]"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Precision of the numbers.  [default: that of SOURCE]"
    )
    no_ema: bool = Field(
        False, description="Write no averaged weights of a distributed checkpoint."
    )
    checkpoint_dir: Named = Field(
        "checkpoints", description="Folder of the models, where SOURCE is a name."
    )


@click.command(params=parameters(ShardFlags))
@click.pass_context
def shard(context: click.Context, /, **_: object) -> None:
    """Cut a model into parts for tensor-parallel processes.

    They are written beside it, as NAME_model_mp_0.pt and so on. The model is a file of any format,
    also of a training (its optimizer is left out) or with the names of Transformer Engine.
    """
    from worldline.parallel.mesh import Axis
    from worldline.weights.checkpoint import ShardedTensor, cut
    from worldline.weights.engine import to_engine
    from worldline.weights.networks import open_weights

    flags = parsed(context, ShardFlags)
    path, count = Path(flags.checkpoint_path), flags.tensor_parallel_size
    if not path.is_file():
        raise InputError(f"--checkpoint_path {path}: there is no such file; give one of a model")
    network = network_of(open_weights(path), path)[0]
    check_size(network, flags.model_size)
    config = network.config
    if network.shards is None:
        raise InputError(f"{path}: no tensor-parallel processes share such a model")
    if config.divisor % count:
        raise InputError(
            f"--tensor_parallel_size {count}: {path} cannot be cut into {count} equal parts; give "
            f"{', '.join(map(str, config.divisors))}"
        )
    whole = network.by_names(network.keys)
    own = {name: entry for name, entry in whole.entries.items() if network.keys.ours(name)}
    whole = replace(whole, entries=own)
    outputs: Outputs = {}
    for rank in range(count):
        part = cut(whole, Axis(rank, count))
        if flags.target_backend != "pytorch":
            entries = to_engine(part.entries, lambda name, pair: ShardedTensor(name, pair, 0))
            part = replace(part, entries=entries)
        outputs[part_of(path, rank)] = part
    write(outputs, flags.no_overwrite)


@click.command(params=parameters(MergeFlags))
@click.pass_context
def merge(context: click.Context, /, **_: object) -> None:
    """Join the parts of tensor-parallel processes into a model.

    The parts of …/iter_000001000.pt, which need not exist itself, are iter_000001000_model_mp_0.pt
    and so on beside it.
    """
    from worldline.weights.checkpoint import open_shards

    flags = parsed(context, MergeFlags)
    path, count = Path(flags.checkpoint_path), flags.tensor_parallel_size
    target = Path(flags.output_path)
    if target.suffix not in (*_SUFFIXES["nvidia"], *_SUFFIXES["safetensors"]):
        raise InputError(f"--output_path {target}: give a file .pt or .safetensors")
    paths = [part_of(path, rank) for rank in range(count + 1)]
    if missing := [each.name for each in paths[:-1] if not each.is_file()]:
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of {count} parts: {', '.join(missing[:4])}"
        )
    if paths[-1].is_file():
        raise InputError(
            f"--tensor_parallel_size {count}: {paths[-1]} is a part, too; give the number of all"
        )
    network = network_of(open_shards(paths[:-1]), path)[0]
    check_size(network, flags.model_size)
    outputs: Outputs = {target: network.by_names(network.keys)}
    write(outputs | beside(target.parent, network), flags.no_overwrite)


@click.command(params=parameters(ConvertFlags))
@click.pass_context
def convert(context: click.Context, /, **_: object) -> None:
    """Write the transformer or tokenizer in SOURCE in another layout.

    SOURCE is a file, a folder (of a model, of diffusers, of a training), or a name that `worldline
    models` lists; of several sets of weights the averaged one is taken, as a run does. TARGET is a
    file .pt (nvidia) or .safetensors with NVIDIA's names of tensors; or a folder: of diffusers (its
    `transformer` or `vae`), of a distributed checkpoint (dcp, in TARGET/model), or of the other
    files. A distributed checkpoint of a training becomes model.pt, with all of its tensors,
    model_ema_fp32.pt and model_ema_bf16.pt in a folder TARGET (nvidia, its default).
    """
    import torch

    from worldline.weights.networks import DIFFUSERS_FILES
    from worldline.weights.write import cast

    flags = parsed(context, ConvertFlags)
    path, target = Path(flags.source), Path(flags.target)
    if not path.exists():
        path = locate(path, flags.checkpoint_dir).named
    if path.stem in TOKENIZER[:2] and path.is_file():  # one of two
        path = path.parent
    source = open_any(path)
    form: str = flags.to or next((f for f, ends in _SUFFIXES.items() if target.suffix in ends), "")
    if not form and source.kind == "distributed checkpoint":
        form = "nvidia"  # as the released script
    if not form:
        raise InputError(f"{target}: its layout is not known; name it by --to")
    if (is_file := target.suffix in WEIGHTS) and target.suffix not in _SUFFIXES.get(form, ()):
        advice = " or a file ".join(["a folder", *_SUFFIXES.get(form, ())[:1]])
        raise InputError(f"{target}: no such file is of the layout {form}; give {advice}")
    dtype = getattr(torch, flags.dtype) if flags.dtype else None
    alone = form != "nvidia" or is_file or dtype
    if outputs := {} if alone else training_files(source, target, flags.no_ema):
        write(outputs, flags.no_overwrite)
        return
    if flags.no_ema:
        raise InputError("--no_ema: it is of a distributed checkpoint, for a folder --to nvidia")
    network, layout = network_of(source, path)
    keys, around = layout(network, form == "diffusers")
    file = target if is_file else target / _NAMES.get(form, DIFFUSERS_FILES[0])
    outputs = {file: cast(network.by_names(keys), dtype)}
    others = beside(file.parent, network, around if keys != network.keys else None)
    write(outputs | others, flags.no_overwrite)


def part_of(path: Path, rank: int) -> Path:
    """File of a tensor-parallel process, by that of the whole model or of another process."""
    from worldline.weights.checkpoint import SHARD

    stem = part["stem"] if (part := SHARD.fullmatch(path.name)) else path.stem
    return path.with_name(f"{stem}_model_mp_{rank}.pt")


def find_model(folder: Path) -> list[Path]:
    """Files of the model in a folder, as the commands find them that run it."""
    from worldline.opening import signatures
    from worldline.tokenizers.cosmos.weights import STATISTICS, tokenizer_files
    from worldline.weights.networks import weights_file, weights_in

    files = [file for file in weights_in(folder) if file.name not in STATISTICS]
    if any(file.stem in TOKENIZER for file in files):
        return tokenizer_files(folder)
    return files if len(files) == 1 else [weights_file(folder, signatures)]


def open_any(path: Path) -> Checkpoint:
    """Tensors of a file and its set, or of the model in a folder."""
    from worldline.weights.checkpoint import joined, open_set
    from worldline.weights.networks import open_weights

    if path.is_file():
        return open_weights(path)
    first, *others = map(open_set, find_model(path))
    return joined([first, *others], path) if others else first


def network_of(source: Checkpoint, path: Path) -> tuple[Network[Any], Callable[..., Any]]:
    """The transformer or tokenizer that tensors are of, and its layouts.

    Raises:
        CheckpointError: it is neither, or a tensor does not fit.
    """
    from worldline.family import FAMILIES
    from worldline.opening import find_family, refuse_other_models
    from worldline.tokenizers.cosmos import weights as cosmos
    from worldline.tokenizers.layouts import cosmos_layout, wan_layout
    from worldline.tokenizers.wan import weights as wan

    if name := find_family(source.tensors):
        refuse_other_models(source)
        module = import_module(f"{FAMILIES[name]}.weights")
        return module.open_network(source), module.layout
    if wan.is_wan(wan.network_view(source)):
        return wan.open_wan(source.path), wan_layout
    if cosmos.network_view(source).entries.keys().isdisjoint(cosmos.ANCHORS):
        names = ", ".join(sorted(source.tensors)[:3])
        raise CheckpointError(f"{path}: no transformer or tokenizer has such tensors ({names})")
    return cosmos.open_tokenizer(path), cosmos_layout


def check_size(network: Network[Any], stated: str | None) -> None:
    """Refuse a network of another released size than the stated one; others have no name."""
    from worldline.weights.networks import shapes_of

    if stated is None:
        return
    kind, config = network.kind, network.config
    presets = vars(import_module(kind.__module__)).get("PRESETS", {}).items()
    sizes = {name.partition("-")[0].lower(): preset for name, preset in presets}
    if stated.lower() not in sizes:
        raise InputError(
            f"--model_size {stated:.40}: give one of {', '.join(sizes)}, or leave it out"
        )
    found = [s for s, preset in sizes.items() if shapes_of(kind, preset) == shapes_of(kind, config)]
    if stated.lower() not in found and config.width in {each.width for each in sizes.values()}:
        is_of = f"of {found[0]}" if found else "of no released size"
        raise CheckpointError(f"--model_size {stated}: {network.path} is {is_of}")
    if not found:
        logger.info("%s is of no released size; --model_size has no effect", network.path)


def training_files(source: Checkpoint, folder: Path, no_ema: bool) -> Outputs:
    """What the released `convert_distcp_to_pt.py` makes of a training's distributed checkpoint.

    It is empty for another source, and without averaged weights, unless none are wanted.
    """
    import torch

    from worldline.family import FAMILIES
    from worldline.opening import find_family
    from worldline.weights.checkpoint import take_network
    from worldline.weights.names import is_averaged
    from worldline.weights.write import cast

    averaged, name = [*map(is_averaged, source.tensors)], find_family(source.tensors)
    distributed = source.kind == "distributed checkpoint" and not all(averaged)
    if not distributed or not (no_ema or (any(averaged) and name)):
        return {}
    outputs: Outputs = {folder / "model.pt": source}
    if not no_ema:
        keys = import_module(f"{FAMILIES[name]}.weights").KEYS
        taken = take_network(source, (keys.anchor,), keys.prefixes)
        named = {f"{keys.prefixes[0]}{name}": entry for name, entry in taken.entries.items()}
        average = replace(taken, entries=named)
        outputs[folder / "model_ema_fp32.pt"] = average
        outputs[folder / "model_ema_bf16.pt"] = cast(average, torch.bfloat16, torch.float32)
    return outputs


def beside(
    folder: Path, network: Network[Any], contents: Mapping[str, Any] | None = None
) -> Outputs:
    """Files beside weights: dicts as JSON, others by PyTorch; by default, those of the source.

    Raises:
        InputError: those of another model are there.
    """
    import torch

    present = filter(Path.is_file, network.beside if contents is None else ())
    files: Outputs = {folder / path.name: path.read_bytes() for path in present}
    for name, content in (contents or {}).items():
        if isinstance(content, dict):
            files[folder / name] = f"{json.dumps(content, indent=2)}\n".encode()
        else:
            torch.save(content, data := io.BytesIO())
            files[folder / name] = data.getvalue()
    for path, content in files.items():
        if path.is_file() and path.read_bytes() != content:
            raise InputError(f"{path} is of another model; choose another folder, or remove it")
    return {path: content for path, content in files.items() if not path.is_file()}


def write(outputs: Outputs, no_overwrite: bool) -> None:
    """Write files, and print a line for each."""
    from tqdm import tqdm

    from worldline.weights.checkpoint import Checkpoint
    from worldline.weights.write import check_outputs, write_files

    replaced = existing(outputs, no_overwrite)
    tensors = {path: each for path, each in outputs.items() if isinstance(each, Checkpoint)}
    sizes = {p: sum(t.nbytes for t in each.tensors.values()) for p, each in tensors.items()}
    check_outputs(outputs)
    for source in dict.fromkeys(map(str, tensors.values())):
        logger.info("reading %s", source)
    tqdm.monitor_interval = 0  # no thread that watches bars
    disable = True if results.quiet else None  # where there is no terminal
    total = sum(sizes.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=disable, leave=False) as bar:
        write_files(outputs, bar.update)
    log_replaced(replaced)
    for path in outputs:
        size = f": {readable_size(sizes[path])}" if path in sizes else ""
        results.add(f"{path}{size}")
