"""Files of samples that Predict2.5 is run with: JSON, JSON lines, YAML; needs no torch.

Source: nvidia-cosmos/cosmos-predict2.5 `cosmos_predict2/config.py` and `examples/inference.py`, of
its releases since 13 October 2025, and of the one a week earlier, with many samples in a file.
"""

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field

from worldline.catalog import FLOW_MODELS
from worldline.documents import MAX_PROBLEMS, listed, read_entries, read_text
from worldline.errors import InputError, strerror
from worldline.families.predict2_5.request import RELEASED_CHUNK, FlowRequest
from worldline.family import Item
from worldline.files import file_name, folded, is_dataset
from worldline.request import BatchFlags, Options, Source, Text, VideoFlags
from worldline.request import Path as PathText
from worldline.yaml_documents import parse_yaml

if TYPE_CHECKING:
    from worldline.video.span import Span

YAML = (".yaml", ".yml")
SUFFIXES = (".json", ".jsonl", *YAML)
_LONGEST_NAME = 200  # bytes; a file name may have 255, with suffixes
InferenceType = Literal["text2world", "image2world", "video2world"]
# frames that are continued, and of what
INPUTS = {
    "text2world": (0, (None,)),
    "image2world": (1, ("image", "video")),
    "video2world": (5, ("video",)),
}
# field of a request -> field of a sample
NAMES = {"num_video_frames": "num_output_frames", "height": "resolution", "width": "resolution"}
# Python that the released command builds its network from, as each file states it
_CONFIG_FILES = (None, "", "cosmos_predict2/_src/predict2/configs/video2world/config.py")
# fields of other releases -> the same here
RENAMED = {
    **dict.fromkeys(("input_image", "input_video", "visual_input"), "input_path"),
    **dict.fromkeys(("output_image", "output_video"), "name"),
}
_MAX_YAML = 500_000  # bytes; its parser takes seconds for as many


def _file_name(name: str) -> str:
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"{name!r:.40} has more than {_LONGEST_NAME} bytes; give a shorter one")
    return file_name(name)


class Overrides(Options):
    """Fields that samples alone have; as flags they win over those of all samples."""

    inference_type: InferenceType | None = Field(
        None,
        description="text2world begins with the prompt, image2world with an image or the last "
        "frame of a video, video2world with the last 5 frames.",
    )
    prompt_path: PathText | None = Field(None, description="Text file of the prompt.")
    input_path: PathText | None = Field(None, description="Image or video to continue.")
    resolution: Annotated[str, Field(pattern=r"^\s*\d+\s*,\s*\d+\s*$|^none$")] | None = Field(
        None, description='Height and width, "H,W"; "none" is the model\'s own.'
    )
    num_output_frames: int | None = Field(
        None, description="Frames; 1 + 4k.  [default: 93, 77 of a long video]"
    )
    enable_autoregressive: bool | None = Field(
        None,
        description="Make a long video, chunk after chunk.",
        json_schema_extra={"optional_value": "true"},
    )


class Sample(Overrides):
    """One sample of a file; fields of any type are checked with the request."""

    name: Annotated[Text, AfterValidator(_file_name)]
    inference_type: InferenceType
    prompt: Any = None
    negative_prompt: Any = None
    seed: Any = None
    guidance: Any = None
    num_steps: Any = None
    chunk_size: Any = None
    chunk_overlap: Any = None


class SampleFlags(Overrides, BatchFlags, VideoFlags):
    """Flags of `predict2.5`."""

    earlier: tuple[str, ...] = Field(
        (), json_schema_extra={"argument": True, "metavar": "[PARAMS_FILE OUTPUT_DIR]"}
    )
    input_files: tuple[Source, ...] = Field(
        (),
        description="Files of samples: .json, .jsonl, .yaml or .yml, or quoted patterns of names; "
        "or episodes of lerobot:FOLDER#camera=NAME.",
        json_schema_extra={"short": "-i", "metavar": "FILE..."},
    )
    output_dir: PathText | None = Field(
        None,
        description="Folder of the videos; made if absent.",
        json_schema_extra={"short": "-o", "metavar": "DIR"},
    )
    checkpoint_path: PathText | None = Field(
        None, description="File or folder of a transformer, in place of the model's."
    )
    experiment: str | None = Field(
        None, description="Released training run of the transformer; decides the schedule."
    )
    config_file: str | None = Field(
        None, description="The released file alone, without effect: weights describe the network."
    )
    keep_going: bool = Field(
        True, description="Go on with the next sample when one fails or is refused."
    )
    profile: bool = Field(
        False, description="Not in this version: reports hold seconds and memory of each stage."
    )


class Samples:
    """Reader of files of samples."""

    flags = SampleFlags

    def read(self, flags: SampleFlags, stated: Mapping[str, Any]) -> tuple[list[Item], list[str]]:
        """Every sample of all files, and what is wrong with others."""
        if flags.profile:
            raise InputError("--profile: not in this version; reports hold seconds of each stage")
        if flags.config_file not in _CONFIG_FILES:
            raise InputError(
                f"--config_file {flags.config_file}: no configuration is run; --schedule chooses "
                "how a model is sampled"
            )
        typed = {**flags.model_dump(exclude_unset=True), **stated}
        if {"prompt", "prompt_path"} <= typed.keys():
            raise InputError("--prompt and --prompt_path exclude each other; give one")
        files, folder = named_files(flags)
        overrides = {name: typed[name] for name in Sample.model_fields if name in typed}
        beside = {name: value for name, value in stated.items() if name not in overrides}
        items: list[Item] = []
        problems: list[str] = []
        places: dict[str, str] = {}
        videos = typed.get("inference_type") != "text2world"
        for file in files:
            if is_dataset(file):
                samples = read_episodes(str(file), problems, videos)
            else:
                samples = ((file, *sample, None) for sample in read_file(file, problems))
            for path, place, fields, span in samples:
                if len(problems) >= MAX_PROBLEMS:
                    break
                with collected(problems):
                    item = make_item(path, place, fields, overrides, folder, span)
                    # some disks ignore case
                    first = places.setdefault(folded(item.label), item.place)
                    if first != item.place:
                        raise InputError(f"{item.place}, name: {first} has the same; give another")
                    items.append(replace(item, stated={**beside, **item.stated}))
        if not items and not problems:
            raise InputError(f"{', '.join(map(str, files))}: no samples")
        return items, problems

    def model(
        self, flags: SampleFlags, model: str, typed: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """Name of the transformer, and how it is sampled.

        A transformer of one's own is sampled as the model or training run named beside it.
        """
        path = flags.checkpoint_path
        if flags.experiment is not None:
            runs = {each.experiment: each.schedule for each in FLOW_MODELS}
            # runs of post-training begin with 2B/pre-trained
            return path or model, {"schedule": runs.get(flags.experiment, "shifted")}
        if path is None or not typed:
            return path or model, {}
        schedules = {each.name: each.schedule for each in FLOW_MODELS}
        if model not in schedules:
            raise InputError(
                f"--model {model} names how --checkpoint_path is sampled; give one of "
                f"{', '.join(schedules)}"
            )
        return path, {"schedule": schedules[model]}


SAMPLES = Samples()


def named_files(flags: SampleFlags) -> tuple[list[Path], Path]:
    """Files of samples, patterns expanded, and the folder of the videos."""
    inputs, output = flags.input_files, flags.output_dir
    if len(flags.earlier) == 2 and not inputs and output is None:
        inputs, output = flags.earlier[:1], flags.earlier[1]
    elif flags.earlier:
        output = None
    if not (inputs and all(inputs) and output):
        words = " ".join(flags.earlier) or "no samples or no output"
        raise InputError(f"{words}: give -i FILE and -o DIR, or PARAMS_FILE OUTPUT_DIR")
    files: list[str] = []
    for name in inputs:
        single = is_dataset(name) or os.path.exists(name)
        matches = [] if single else sorted(glob.glob(name, recursive=True))
        files += matches or [name]
    return [*map(Path, files)], Path(output)


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add the lines of an `InputError` to `problems`, and go on."""
    try:
        yield
    except InputError as error:
        problems += str(error).splitlines()


def make_item(
    file: Path,
    place: str,
    fields: Any,
    overrides: Mapping[str, Any],
    folder: Path,
    span: "Span | None" = None,
) -> Item:
    """The video that a sample describes; relative paths of its own fields start at its file.

    It continues `span` where it names no file.
    """
    from worldline.video.read import media_kind  # imports PyAV, for which --help must not wait

    if not isinstance(fields, dict):
        raise InputError(f"{place}: it is {type(fields).__name__}; give names and values")
    if renamed := [f"{name} is {RENAMED[name]} here" for name in fields if name in RENAMED]:
        raise InputError(f"{place}: {', '.join(renamed)}; rename it")
    if "name" in fields:
        place = f"{place}, sample {fields['name']!r}"
    typed = {name: f"--{name}" for name in overrides}
    names = typed | {ours: typed.get(theirs, theirs) for ours, theirs in NAMES.items()}
    item = Item(place, place, {}, None, None, folder, names)
    if "prompt_path" in overrides:
        fields = {**fields, "prompt": None}
    sample = Sample.parse({**fields, **overrides}, item.field)
    stated = sample.model_dump(exclude_none=True)
    paths = {
        name: Path("" if name in overrides else file.parent, stated[name])
        for name in ("input_path", "prompt_path")
        if name in stated
    }
    count, kinds = INPUTS[sample.inference_type]
    path = paths.get("input_path", span) if count else None
    try:
        kind = None if path is None else media_kind(Path(path))
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    if kind not in kinds:
        raise InputError(
            f"{item.field('input_path')}: it is {path}; {sample.inference_type} continues "
            f"{' or '.join(map(str, kinds))}"
        )
    request = {name: value for name, value in stated.items() if name in FlowRequest.model_fields}
    if sample.enable_autoregressive:
        request = {"num_video_frames": RELEASED_CHUNK, "chunk_size": RELEASED_CHUNK, **request}
    else:
        request = {name: request[name] for name in request if not name.startswith("chunk_")}
    if sample.num_output_frames is not None:
        request["num_video_frames"] = sample.num_output_frames
    if sample.resolution not in (None, "none"):
        request["height"], request["width"] = map(int, sample.resolution.split(","))
    words = paths.get("prompt_path")
    if words is not None and sample.prompt is None:
        try:
            request["prompt"] = read_text(words).strip()
        except (OSError, ValueError) as error:
            where = item.field("prompt_path")
            raise InputError(f"{where}: {words}: it cannot be read: {error}") from error
    return replace(
        item,
        label=sample.name,
        stated={**request, "num_input_frames": count},
        input=path,
        kind=kind,
        output=folder / f"{sample.name}.{'jpg' if sample.num_output_frames == 1 else 'mp4'}",
        sample=stated,
        sources=(file,) if words is None else (file, words),
    )


def read_file(file: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Place and fields of every sample of a file; what cannot be read is added to `problems`."""
    suffix, form = file.suffix.lower(), file.suffix[1:].upper()
    with collected(problems):
        if suffix not in SUFFIXES:
            raise InputError(f"{file}: it is no file of samples; give {', '.join(SUFFIXES)}")
        try:
            entries: Iterable[tuple[str, int, Any]] = read_entries(file)
            if suffix in YAML:
                entries = listed(parse_yaml(read_text(file, _MAX_YAML)))
            for kind, number, value in entries:
                place = f"{file}, {kind} {number}" if kind else str(file)
                if isinstance(value, ValueError):
                    problems.append(f"{place}: it is not valid {form}: {value}")
                elif isinstance(value, list) and kind == "line":
                    yield from ((f"{place}, item {n}", one) for _, n, one in listed(value))
                elif isinstance(value, dict) and isinstance(value.get("samples"), dict):
                    yield from ((place, one) for one in by_name(value))
                else:
                    yield place, value
        except OSError as error:
            raise InputError(f"{file}: it cannot be read: {strerror(error)}") from error
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            deep = isinstance(error, RecursionError)
            reason = "it is nested too deep" if deep else " ".join(str(error).split())
            raise InputError(f"{file}: it is not valid {form}: {reason}") from error


def read_episodes(
    name: str, problems: list[str], videos: bool
) -> "Iterator[tuple[Path, str, Any, Span | None]]":
    """File, place, fields and frames of the samples that episodes of a data set are."""
    from worldline.lerobot.dataset import open_dataset

    with collected(problems):
        dataset = open_dataset(name, videos=videos)
        for index, found in dataset.spans():
            if isinstance(found, InputError):
                problems.append(str(found))
                continue
            episode, span = found
            kind = "text2world" if span is None else "video2world"
            fields = {"name": episode.name, "inference_type": kind, "prompt": episode.task or None}
            yield dataset.sources[0], dataset.place(index), fields, span


def by_name(value: Mapping[str, Any]) -> Iterator[Any]:
    """Samples of the first release's form: by name, beside fields that all have in common."""
    common = {name: field for name, field in value.items() if name != "samples"}
    for name, one in value["samples"].items():
        if isinstance(one, dict):
            one = {**common, "name": name, **one}
            if one.get("prompt_path") is not None:  # wins over a prompt in this form
                one["prompt"] = None
        yield one
