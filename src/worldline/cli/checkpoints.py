"""`worldline checkpoints`: released ones from the hub; contents of a file or folder of weights."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from pydantic import Field

from worldline.cli.messages import results
from worldline.cli.options import ManyValues, parameters, parsed
from worldline.cli.run import existing
from worldline.errors import CheckpointError, DownloadError
from worldline.files import check_folder, check_path, hub_cache, readable_size, snapshots
from worldline.request import OutputFlags
from worldline.request import Path as Named

if TYPE_CHECKING:
    from worldline.downloads import RemoteFile
    from worldline.weights.checkpoint import Checkpoint
    from worldline.weights.networks import Network

logger = logging.getLogger(__name__)

_SUFFIXES = (".pt", ".pth", ".jit", ".safetensors", ".bin", ".ckpt")
_TOKENIZER = ("encoder", "decoder", "autoencoder")  # names of files
_COMPLETE = "complete: every tensor fits"
Lines = Iterator[tuple[str, str]]  # topic and text


class DownloadFlags(OutputFlags):
    """Flags of the released `download_{autoregressive,diffusion,tokenizer}_checkpoints.py`."""

    models: tuple[str, ...] = Field(
        (), json_schema_extra={"argument": True, "metavar": "[MODEL]..."}
    )
    model_sizes: tuple[Literal["4B", "5B", "12B", "13B", "7B", "14B"], ...] = Field(
        (), description="One or more; 4B to 13B are autoregressive models, 7B and 14B diffusion."
    )
    model_types: tuple[
        Literal[
            "Text2World",
            "Video2World",
            "Text2World-Sample-AV-Multiview",
            "Video2World-Sample-AV-Multiview",
            "SingleToMultiView-Sample-AV",
        ],
        ...,
    ] = Field((), description="One or more, of diffusion.  [default: Text2World Video2World]")
    tokenizer_types: tuple[
        Literal[
            "CV8x8x8-720p",
            "DV8x16x16-720p",
            "CV4x8x8-360p",
            "DV4x8x8-360p",
            "CI8x8-360p",
            "CI16x16-360p",
            "DI8x8-360p",
            "DI16x16-360p",
        ],
        ...,
    ] = Field((), description="One or more tokenizers, alone.")
    cosmos_version: Literal["1.0"] | None = Field(
        None, description="Generation of models that are named by size.  [default: Predict1]"
    )
    checkpoint_dir: Named = Field("checkpoints", description="Folder of the model folders.")
    dry_run: bool = Field(False, description="List files and sizes; fetch nothing.")
    disable_guardrail: bool = Field(
        False,
        description="Leave out the guardrails.",
        json_schema_extra={"short": "--disable_guardrails"},
    )
    disable_prompt_upsampler: bool = Field(False, description="Leave out the prompt upsampler.")
    disable_diffusion_decoder: bool = Field(False, description="Leave out the diffusion decoder.")


@click.group()
def checkpoints() -> None:
    """Fetch checkpoints, and look into them."""


@checkpoints.command(cls=ManyValues, params=parameters(DownloadFlags))
@click.pass_context
def download(context: click.Context, /, **_: object) -> None:
    """Download MODELs and all that they need.

    MODEL is a name that `worldline models` lists, such as Cosmos-Predict1-4B, of either generation;
    a model of Predict2.5, such as 2B/post-trained; or a group: autoregressive, diffusion,
    predict2.5, tokenizers, guardrails. Only files that are read are downloaded, several at once;
    an interrupted download resumes, and each file is verified by its published hash before it
    takes its name. HF_ENDPOINT names a mirror, HF_TOKEN a login.
    """
    from tqdm import tqdm

    from worldline.downloads import HubError, fetch_all, find_files, select, sources

    flags = parsed(context, DownloadFlags)
    generation, folder = flags.cosmos_version, Path(flags.checkpoint_dir)
    names = select(
        flags.models, flags.model_sizes, flags.model_types, flags.tokenizer_types, generation
    )
    # a flag that leaves out a part has the name of the part's family
    without = [name[8:].replace("_", " ") for name, on in flags if name[:8] == "disable_" and on]
    plan: dict[Path, RemoteFile] = {}  # models that share a repository share its licence
    problems: list[str] = []
    for source in sources(names, generation, without):
        try:
            files, place = find_files(source), folder / source.destination
            for path in snapshots(hub_cache(), source.repository) if not place.exists() else ():
                whole = all(file.may_be_at(path / file.name) for file in files)
                if path.name == files[0].commit and whole:
                    logger.info("%s is in the hub's cache: %s", source.name, path)
                    place = path
            for file in files:
                plan.setdefault(place / file.name, file)
        except HubError:
            raise  # so would every other
        except DownloadError as error:
            problems.append(str(error))
    if problems:
        raise DownloadError("nothing was fetched: " + "\n  ".join(problems))
    missing = {path: file for path, file in plan.items() if not file.may_be_at(path)}
    nbytes, wanted = (sum(file.nbytes for file in each.values()) for each in (plan, missing))
    total = f"{len(plan)} files, {readable_size(nbytes)}"
    if flags.dry_run:
        for path, file in plan.items():
            present = "" if path in missing else "  (present)"
            click.echo(f"{readable_size(file.nbytes):>9}  {path}{present}")
        click.echo(f"{total}; {readable_size(wanted)} to fetch")
        return
    existing(missing, flags.no_overwrite)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [file.part(path) for path, file in missing.items()]
    wanted -= sum(part.stat().st_size for part in parts if part.is_file())
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise DownloadError(
            f"{readable_size(wanted)} are to be fetched, but {folder} has room for "
            f"{readable_size(free)}; choose another --checkpoint_dir"
        )
    tqdm.monitor_interval = 0  # no thread that watches bars
    disable = True if results.quiet else None  # where there is no terminal
    with tqdm(total=nbytes, unit="B", unit_scale=True, disable=disable, leave=False) as bar:
        for count, path in enumerate(fetch_all(plan, bar.update), 1):
            bar.clear()
            logger.info("%d/%d %s: verified", count, len(plan), path)
    results.add(f"{total}, are in {folder}, verified")


@checkpoints.command()
@click.argument("path", type=click.Path(path_type=Path))
def inspect(path: Path) -> None:
    """Name the model in PATH, and what is missing or too much in it.

    PATH is a file, the folder of a model, or a folder of such folders. Headers alone are read. The
    exit status is 2 where there is no checkpoint or a file is damaged.
    """
    if not check_path(path).exists():
        raise CheckpointError(f"{path}: no such file or folder")
    targets = [path]
    if path.is_dir():
        targets = sorted({file.parent for file in path.rglob("*") if file.suffix in _SUFFIXES})
        if not targets:
            raise CheckpointError(f"{path}: it holds no weights ({', '.join(_SUFFIXES)})")
    num_damaged = 0
    for target in targets:
        try:
            lines = [*examine(target)]
        except CheckpointError as error:
            num_damaged += 1
            lines = [("damaged", str(error))]
        click.echo(target)
        for topic, text in lines:
            click.echo(f"  {topic:<11} {text}")
    if num_damaged:
        count = f"{num_damaged} of {len(targets)} checkpoints"
        raise CheckpointError(f"{path}: {count} cannot be read")


def examine(path: Path) -> Lines:
    """Contents of a file, or of the weights in a folder."""
    # one of several files: the whole model is examined
    if path.stem in _TOKENIZER[:2] or any(path.parent.glob("*.index.json")):
        path = path if path.is_dir() else path.parent
    source = open_any(path)
    inside = f', inside ["{source.nesting}"]' if source.nesting else ""
    yield "format", f"{source.kind}{inside}"
    if source.beside:
        yield "beside", ", ".join(source.beside)
    infos = source.tensors.values()
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos).most_common()
    size = readable_size(sum(info.nbytes for info in infos))
    values = ", ".join(f"{dtype} ({count:,})" for dtype, count in dtypes)
    yield "tensors", f"{len(infos):,}, {size}; values: {values}"
    try:
        yield from describe(source, path)
    except CheckpointError as error:
        yield "verdict", str(error)


def open_any(path: Path) -> Checkpoint:
    """Tensors of a file, or of the model in a folder."""
    from worldline.tokenizers.cosmos.weights import tokenizer_files
    from worldline.weights.checkpoint import joined, open_checkpoint
    from worldline.weights.networks import open_weights

    files = [file for file in path.glob("*") if file.suffix in _SUFFIXES]
    if any(file.stem in _TOKENIZER for file in files):
        return joined([open_checkpoint(file) for file in tokenizer_files(path)], path)
    for index in path.glob("pytorch_*.index.json"):
        return open_checkpoint(index)
    return open_checkpoint(files[0]) if len(files) == 1 else open_weights(path)


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
    from worldline.weights.networks import read_settings

    folder = path if path.is_dir() else path.parent
    if name := find_family(source.tensors):
        weights, model = (import_module(f"{FAMILIES[name]}.{x}") for x in ("weights", "model"))
        yield "family", f"Cosmos {name} model"
        yield from _sizes(weights.open_network(source), model.PRESETS)
        return
    if is_wan(source):
        yield "family", "Wan video tokenizer"
        yield from _sizes(open_wan(source.path), {"2.1": WanTokenizerConfig()})
        return
    kind = read_settings(folder).get("model_type")
    for encoder in (T5Files, Reason1Files):
        if kind in encoder.model_types:
            yield "family", encoder.name
            files = encoder.open(folder)
            yield "sizes", f"text width {files.width:,}"
            yield "parameters", f"{files.num_parameters:,}"
            unread = files.check()
            beside = f"; {unread:,} more, which are not read" if unread else ""
            yield "verdict", f"{_COMPLETE}{beside}"
            return
    try:
        config = cosmos.read_config(cosmos.network_view(source), folder.name)
    except CheckpointError:
        yield "family", f"unknown (tensors such as {', '.join(sorted(source.tensors)[:3])})"
        yield "verdict", "not recognised"
        return
    yield "family", f"Cosmos {'discrete' if config.levels else 'continuous'} video tokenizer"
    presets = {name: replace(preset, tap=config.tap) for name, preset in PRESETS.items()}
    yield from _sizes(cosmos.open_tokenizer(path), presets)


def _sizes(network: Network[Any], presets: Mapping[str, Any]) -> Lines:
    """Sizes of a network whose tensors fit, and the released one that it equals."""
    released = [name for name, config in presets.items() if config == network.config]
    yield "released", ", ".join(released) or "no, of other sizes"
    values = vars(network.config).items()
    yield "sizes", ", ".join(f"{name} {n}" for name, n in values if isinstance(n, int) and n)
    yield "parameters", f"{network.num_parameters:,}"
    yield "verdict", _COMPLETE
