"""`worldline checkpoints`: released ones from the hub; contents of a file or folder of weights."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from pydantic import Field

from worldline.cli.convert import TOKENIZER, convert, find_model, merge, open_any, shard
from worldline.cli.messages import results
from worldline.cli.options import ManyValues, parameters, parsed
from worldline.cli.run import existing
from worldline.errors import CheckpointError, DownloadError, Error, InputError
from worldline.files import check_folder, check_path, readable_size
from worldline.locate import locate
from worldline.repositories import WEIGHTS, hub_cache, snapshots
from worldline.request import OutputFlags
from worldline.request import Path as Named

if TYPE_CHECKING:
    from worldline.downloads import RemoteFile
    from worldline.weights.checkpoint import Checkpoint
    from worldline.weights.networks import Network

logger = logging.getLogger(__name__)

_COMPLETE = "complete: every tensor fits"
_REFUSALS = ("refused", "other")  # what a run refuses; the second is neither world nor part of one
Lines = Iterator[tuple[str, str]]  # topic and text
Verdict = tuple["Checkpoint", str, str]  # tensors of the network, topic, text


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
    dataset: str | None = Field(None, description="Data set, OWNER/NAME, in place of models.")
    include: tuple[str, ...] = Field(
        (), description="One or more patterns of files of the data set, such as '*.mp4'."
    )
    local_dir: Named | None = Field(
        None, description="Folder of the data set.  [default: datasets/NAME]"
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
    """Fetch checkpoints, look into them, and write them in other layouts."""


for command in (shard, merge, convert):
    checkpoints.add_command(command)


@checkpoints.command(cls=ManyValues, params=parameters(DownloadFlags))
@click.pass_context
def download(context: click.Context, /, **_: object) -> None:
    """Download MODELs and all that they need.

    MODEL is a name that `worldline models` lists, such as Cosmos-Predict1-4B, of either generation;
    a model of Predict2.5, such as 2B/post-trained; or a group: autoregressive, diffusion,
    predict2.5, tokenizers, guardrails. Only files that are read are downloaded, several at once;
    an interrupted download resumes, and each file is verified by its published hash before it
    takes its name. --dataset fetches files of a data set in the same way. HF_ENDPOINT names a
    mirror, HF_TOKEN a login.
    """
    from tqdm import tqdm

    from worldline.downloads import fetch_all, find_dataset

    flags = parsed(context, DownloadFlags)
    folder = Path(flags.checkpoint_dir)
    if flags.dataset:
        if odd := [*flags.models, *flags.model_sizes, *flags.model_types, *flags.tokenizer_types]:
            raise InputError(f"--dataset: {odd[0]} is of models; fetch it by a command of its own")
        folder = Path(flags.local_dir or f"datasets/{flags.dataset.rpartition('/')[2]}")
        plan = {folder / file.name: file for file in find_dataset(flags.dataset, flags.include)}
    elif flags.include or flags.local_dir:
        raise InputError("--include and --local_dir are of a --dataset; name one")
    else:
        plan = planned(flags)
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
            f"{readable_size(free)}; choose another folder"
        )
    tqdm.monitor_interval = 0  # no thread that watches bars
    disable = True if results.quiet else None  # where there is no terminal
    with tqdm(total=nbytes, unit="B", unit_scale=True, disable=disable, leave=False) as bar:
        for count, path in enumerate(fetch_all(plan, bar.update), 1):
            bar.clear()
            logger.info("%d/%d %s: verified", count, len(plan), path)
    results.add(f"{total}, are in {folder}, verified")


def planned(flags: DownloadFlags) -> dict[Path, RemoteFile]:
    """Files of models and of what they need, by their places.

    Raises:
        DownloadError: some cannot be had, for reasons that are all named.
    """
    from worldline.downloads import HubError, find_files, select, sources

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
    return plan


@checkpoints.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--values", is_flag=True, help="Read the tensors too, and look for NaN and Inf.")
@click.option(
    "--checkpoint_dir", default="checkpoints", help="Folder of the models.", show_default=True
)
def inspect(path: Path, values: bool, checkpoint_dir: str) -> None:
    """Name the model in PATH, and what is missing or too much in it.

    PATH is a file, the folder of a model, a folder of such folders, or a name that `worldline
    models` lists. Headers alone are read. The exit status is 1 where a run would refuse the model,
    2 where there is no checkpoint or a file is damaged.
    """
    if not check_path(path).exists():
        path = locate(path, checkpoint_dir).named
    targets = find_targets(path) if path.is_dir() else [path]
    counts: Counter[str] = Counter()
    for target in targets:
        try:
            lines = [*examine(target, values)]
        except CheckpointError as error:
            lines = [("damaged", str(error))]
        click.echo(target)
        for topic, text in lines:
            click.echo(f"  {'verdict' if topic in _REFUSALS else topic:<11} {text}")
        # beside others, what is no world may be a part of a guardrail
        other = "refused" if target == path or len(targets) == 1 else "other"
        counts.update(other if topic == "other" else topic for topic, _ in lines)
    of_all = f"of {len(targets)} checkpoints"
    if num_damaged := counts["damaged"]:
        raise CheckpointError(f"{path}: {num_damaged} {of_all} cannot be read")
    if num_refused := counts["refused"]:
        raise Error(f"{path}: {num_refused} {of_all} would be refused by a run")


def examine(path: Path, values: bool) -> Lines:
    """Contents of a file, or of the weights in a folder; with `values` the tensors are read."""
    from worldline.weights.checkpoint import is_container, open_checkpoint
    from worldline.weights.stream import nonfinite_tensors

    if path.stem in TOKENIZER[:2] and path.is_file():  # one of two: the whole model is examined
        path = path.parent
    source = stored = open_any(path)
    if source.adapters:  # all that the file holds is examined
        source = replace(source, entries={**source.entries, **source.adapters}, adapters={})
    inside = f', inside ["{source.nesting}"]' if source.nesting else ""
    yield "format", f"{source.kind}{inside}"
    if source.beside:
        yield "beside", ", ".join(source.beside)
    infos = source.tensors.values()
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos).most_common()
    size = readable_size(sum(info.nbytes for info in infos))
    kinds = ", ".join(f"{dtype} ({count:,})" for dtype, count in dtypes)
    yield "tensors", f"{len(infos):,}, {size}; values: {kinds}"
    verdict = "refused"
    try:
        source, verdict, text = yield from describe(source, path)
    except CheckpointError as error:
        text = str(error)
    for note in source.notes:
        yield "note", note
    if values:
        started, nbytes = time.perf_counter(), sum(info.nbytes for info in source.tensors.values())
        wrong = nonfinite_tensors(source)
        speed = nbytes / (time.perf_counter() - started)
        for file in filter(is_container, sorted({*source.files} - {*stored.files})):
            wrong |= nonfinite_tensors(open_checkpoint(file))
        read = f"{readable_size(nbytes)} read, {readable_size(speed)} a second"
        yield "values", f"{read}; {len(wrong):,} tensors with NaN or Inf"
        if wrong:
            names = ", ".join(f"{name} ({kind})" for name, kind in [*wrong.items()][:4])
            verdict, text = "refused", f"{text}; not finite: {names}"
    yield verdict, f"{text}{'' if values or verdict != 'verdict' else '; values not read'}"


def find_targets(root: Path) -> list[Path]:
    """Folders of models in a folder; files of a folder where it is not clear which are a model."""
    from worldline.weights.checkpoint import METADATA, is_container
    from worldline.weights.networks import foreign_files, is_state_folder, weights_in

    folders = {
        path.parent
        for path in root.rglob("*")
        if path.suffix in WEIGHTS or path.name == METADATA or is_container(path)
    }
    targets: list[Path] = []
    for folder in sorted(folders):
        # those of a hub cache have links elsewhere
        if folder.name == "blobs" or is_state_folder(folder):
            continue
        try:
            find_model(folder)
            targets.append(folder)
        except CheckpointError:
            targets += weights_in(folder) or [folder]
    if not targets:
        suffixes = ", ".join(WEIGHTS)
        raise CheckpointError(f"{root}: it holds no weights ({suffixes}){foreign_files(root)}")
    return targets


def describe(source: Checkpoint, path: Path) -> Generator[tuple[str, str], None, Verdict]:
    """Family of a model, its sizes, and whether every tensor fits: by the code that runs use."""
    from worldline.family import FAMILIES
    from worldline.locate import Place
    from worldline.opening import find_family, recognise, refuse_other_models
    from worldline.text.reason1 import Reason1Files
    from worldline.text.t5 import T5Files
    from worldline.tokenizers.cosmos import weights as cosmos
    from worldline.tokenizers.cosmos.model import PRESETS
    from worldline.tokenizers.wan.model import WanTokenizerConfig
    from worldline.tokenizers.wan.weights import is_wan, open_wan
    from worldline.tokenizers.wan.weights import network_view as wan_view
    from worldline.weights.checkpoint import set_adapters_apart
    from worldline.weights.known import find_known
    from worldline.weights.names import is_adapter
    from worldline.weights.networks import read_settings

    folder = path if path.is_dir() else path.parent
    if adapters := [name for name in source.tensors if is_adapter(name)]:
        alone = not find_family(source.tensors)
        yield "family" if alone else "beside", "LoRA adapters"
        yield from describe_adapters([(name, source.tensors[name].shape) for name in adapters])
        try:
            refuse_other_models(source if alone else set_adapters_apart(source))
        except CheckpointError as error:
            return source, "other", str(error)
    if (name := find_family(source.tensors)) and not find_known(source.tensors):
        weights, model = (import_module(f"{FAMILIES[name]}.{x}") for x in ("weights", "model"))
        yield "family", f"Cosmos {name} model"
        opened = recognise(Place(path, ()))
        network = weights.open_network(opened.source, opened.settings or None)
        return (yield from _sizes(network, model.PRESETS))
    if is_wan(wan_view(source)):
        yield "family", "Wan video tokenizer"
        return (yield from _sizes(open_wan(source.path), {"2.1": WanTokenizerConfig()}))
    kind = read_settings(folder).get("model_type")
    for encoder in (T5Files, Reason1Files):
        if kind in encoder.model_types:
            yield "family", encoder.name
            files = encoder.open(folder)
            yield "sizes", f"text width {files.width:,}"
            yield "parameters", f"{files.num_parameters:,}"
            unread = files.check()
            beside = f"; {unread:,} more, which are not read" if unread else ""
            return files.checkpoint, "verdict", f"{_COMPLETE}{beside}"
    view = cosmos.network_view(source)
    if view.entries.keys().isdisjoint(cosmos.ANCHORS):
        names = ", ".join(sorted(source.tensors)[:3])
        kind = find_known(source.tensors)
        yield "family", kind or f"unknown (tensors such as {names})"
        return source, "other", "no world that worldline runs" if kind else "not recognised"
    config = cosmos.read_config(view, folder.name)
    yield "family", f"Cosmos {'discrete' if config.levels else 'continuous'} video tokenizer"
    presets = {name: replace(preset, tap=config.tap) for name, preset in PRESETS.items()}
    return (yield from _sizes(cosmos.open_tokenizer(path), presets))


def describe_adapters(tensors: Sequence[tuple[str, Sequence[int]]]) -> Lines:
    """Rank and targets of low-rank adapters, by names and shapes."""
    ranks = {min(shape[:2]) for _, shape in tensors if len(shape) > 1}
    yield "rank", ", ".join(map(str, sorted(ranks)))
    # kohya's names have `_` for dots, and begin with what they adapt
    stems = (
        re.split(r"(?:[._]\d+)?[._]lora[._]", re.sub(r"^lora_\w+?_", "", n))[0] for n, _ in tensors
    )
    targets = {re.sub(r".*[._]\d+_", "", stem.rpartition(".")[2]) for stem in stems}
    yield "targets", ", ".join(sorted(targets))


def _sizes(
    network: Network[Any], presets: Mapping[str, Any]
) -> Generator[tuple[str, str], None, Verdict]:
    """Sizes of a network whose tensors fit, and the released one that it equals."""
    released = [name for name, config in presets.items() if config == network.config]
    yield "released", ", ".join(released) or "no, of other sizes"
    values = vars(network.config).items()
    yield "sizes", ", ".join(f"{name} {n}" for name, n in values if isinstance(n, int) and n)
    yield "parameters", f"{network.num_parameters:,}"
    return replace(network.source, files=tuple(network.files)), "verdict", _COMPLETE
