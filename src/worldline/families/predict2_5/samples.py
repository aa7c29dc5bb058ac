"""Files of samples that Predict2.5 is run with: JSON, JSON lines, YAML; needs no torch.

Source: nvidia-cosmos/cosmos-predict2.5 `cosmos_predict2/config.py` and `examples/inference.py`, of
its releases since 13 October 2025, and of the one a week earlier, with many samples in a file.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field

from worldline.catalog import FLOW_MODELS, find_flow_model
from worldline.errors import InputError
from worldline.families.predict2_5.request import RELEASED_CHUNK, FlowRequest
from worldline.family import Item
from worldline.files import folded
from worldline.request import Options, Text
from worldline.request import Path as PathText

SUFFIXES = (".json", ".jsonl", ".yaml", ".yml")
LONGEST_NAME = 200  # bytes; a file name may have 255, of which suffixes take some
INPUT_FRAMES = {"text2world": 0, "image2world": 1, "video2world": 5}
# fields of the request of a long video, which others leave out
LONG = {"chunk_size": RELEASED_CHUNK, "chunk_overlap": 1}
# field of a request -> field of a sample
NAMES = {
    "num_video_frames": "num_output_frames",
    "height": "resolution",
    "width": "resolution",
}
# Python that the released command builds its network from; these state what each file states
_CONFIG_FILES = ("", "cosmos_predict2/_src/predict2/configs/video2world/config.py")
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
# a string is kept whole, so that what looks like a comment in it stays
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*')


def _file_name(name: str) -> str:
    if not name.strip() or name in (".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        raise ValueError(f"{name!r} is not the name of a file")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"it has more than {LONGEST_NAME} bytes")
    return name


def _local(path: str) -> str:
    if _URL.match(path):
        raise ValueError(f"{path} is a URL; save the file, and give its path")
    return path


def _resolution(text: str) -> str:
    if text != "none" and not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*", text):
        raise ValueError(f'{text!r} is not height and width such as "704,1280", or "none"')
    return text


LocalPath = Annotated[PathText, AfterValidator(_local)]


class Overrides(Options):
    """Fields of samples; as flags they win over those of all samples."""

    inference_type: Literal["text2world", "image2world", "video2world"] | None = Field(
        None,
        description="text2world begins with the prompt, image2world with an image or the last "
        "frame of a video, video2world with the last 5 frames.",
    )
    prompt: Text | None = Field(None, description="What the video shows, in a paragraph.")
    prompt_path: LocalPath | None = Field(None, description="Text file of the prompt.")
    negative_prompt: Text | None = Field(None, description="What the video must not show.")
    input_path: LocalPath | None = Field(None, description="Image or video to continue.")
    seed: int | None = Field(None, description="Random seed.  [default: 1]")
    guidance: float | None = Field(
        None, description="Classifier-free guidance scale; 0 turns it off.  [default: 7]"
    )
    resolution: Annotated[str, AfterValidator(_resolution)] | None = Field(
        None, description='Height and width, "H,W"; "none" is the model\'s own.'
    )
    num_output_frames: int | None = Field(
        None, description="Frames; 1 + 4k.  [default: 93, 77 of a long video]"
    )
    num_steps: int | None = Field(None, description="Denoising steps.  [default: 35]")
    enable_autoregressive: bool | None = Field(
        None,
        description="Make a long video, chunk after chunk.",
        json_schema_extra={"optional_value": "true"},
    )
    chunk_size: int | None = Field(
        None, description="Frames of a chunk of a long video.  [default: 77]"
    )
    chunk_overlap: int | None = Field(
        None, description="Frames of a chunk that the next one continues; 1 + 4k.  [default: 1]"
    )


class Sample(Overrides):
    """One sample of a file."""

    name: Annotated[Text, AfterValidator(_file_name)]
    inference_type: Literal["text2world", "image2world", "video2world"]


class SampleFlags(Overrides):
    """Flags of `predict2.5`."""

    earlier: tuple[str, ...] = Field(
        (), json_schema_extra={"argument": True, "metavar": "[PARAMS_FILE OUTPUT_DIR]"}
    )
    input_files: tuple[str, ...] = Field(
        (),
        description="Files of samples: .json, .jsonl, .yaml or .yml, or quoted patterns of names.",
        json_schema_extra={"short": "-i", "metavar": "FILE..."},
    )
    output_dir: str | None = Field(
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
    resume: bool = Field(False, description="Keep videos that an earlier run made in the same way.")
    keep_going: bool = Field(
        True, description="Go on with the next sample when one fails or is refused."
    )
    profile: bool = Field(
        False, description="Not in this version: reports hold seconds and memory of each stage."
    )


class Samples:
    """Reader of files of samples."""

    flags = SampleFlags
    many_values = ("-i", "--input_files")

    def read(self, flags: SampleFlags, stated: Mapping[str, Any]) -> tuple[list[Item], list[str]]:
        """Every sample of all files, and what is wrong with others."""
        if flags.profile:
            raise InputError("--profile: not in this version; reports hold seconds of each stage")
        if flags.config_file not in (None, *_CONFIG_FILES):
            raise InputError(
                f"--config_file {flags.config_file}: no configuration is run; --schedule chooses "
                "how a model is sampled"
            )
        if flags.prompt is not None and flags.prompt_path is not None:
            raise InputError("--prompt and --prompt_path exclude each other; give one")
        files, folder = named_files(flags)
        typed = flags.model_fields_set & Overrides.model_fields.keys()
        overrides = {name: value for name, value in flags if name in typed}
        items: list[Item] = []
        problems: list[str] = []
        places: dict[str, str] = {}
        for file in files:
            for place, fields in read_file(file, problems):
                try:
                    item = make_item(file, place, fields, overrides, folder, stated)
                except InputError as error:
                    problems += str(error).splitlines()
                    continue
                # some disks ignore case
                first = places.setdefault(folded(item.label), item.place)
                if first != item.place:
                    problems.append(f"{item.place}, name: {first} has the same; give another")
                items.append(item)
        if not items and not problems:
            raise InputError(f"{', '.join(map(str, files))}: no samples")
        return items, problems

    def model(
        self, flags: SampleFlags, model: str, typed: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """Name of the transformer, and how it is sampled.

        A transformer of one's own is sampled as the model or training run named beside it.
        """
        options: dict[str, Any] = {}
        if flags.experiment is not None:
            schedules = {each.experiment: each.schedule for each in FLOW_MODELS}
            # runs of post-training begin with 2B/pre-trained
            options["schedule"] = schedules.get(flags.experiment, "shifted")
        elif flags.checkpoint_path is not None and typed:
            released = find_flow_model(model)
            if released is None:
                names = ", ".join(each.name for each in FLOW_MODELS)
                raise InputError(
                    f"--model {model} names how --checkpoint_path is sampled; give one of {names}"
                )
            options["schedule"] = released.schedule
        return flags.checkpoint_path or model, options


SAMPLES = Samples()


def named_files(flags: SampleFlags) -> tuple[list[Path], Path]:
    """Files of samples, patterns expanded, and the folder of the videos.

    Raises:
        InputError: one of them is not named.
    """
    inputs, output = flags.input_files, flags.output_dir
    if flags.earlier:
        if inputs or output is not None or len(flags.earlier) != 2:
            raise InputError(
                f"{' '.join(flags.earlier)}: give PARAMS_FILE OUTPUT_DIR, or -i FILE and -o DIR"
            )
        inputs, output = flags.earlier[:1], flags.earlier[1]
    if not inputs or not all(inputs):
        raise InputError("no samples; give -i FILE")
    if not output:
        raise InputError("no output folder; give -o DIR")
    files: list[str] = []
    for name in inputs:
        matches = [] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        files += matches or [name]
    return [*map(Path, files)], Path(output)


def make_item(
    file: Path,
    place: str,
    fields: Any,
    overrides: Mapping[str, Any],
    folder: Path,
    stated: Mapping[str, Any],
) -> Item:
    """The video that a sample describes.

    Args:
        file: of the sample; its relative paths start at the file's folder.
        place: of the sample, for messages.
        fields: of the sample.
        overrides: fields that win over them; their relative paths start here.
        folder: of the videos.
        stated: further fields of the request.

    Raises:
        InputError: one line for each problem.
    """
    if not isinstance(fields, dict):
        raise InputError(f"{place}: it is {type(fields).__name__}; give names and values")
    if {"worldline", "sample"} <= fields.keys():
        raise InputError(f'{place}: it is the report of a video; its "sample" is a sample')
    if "name" in fields:
        place = f"{place}, sample {fields['name']!r}"
    names = {name: f"--{name}" for name in overrides}
    names |= {ours: names.get(theirs, theirs) for ours, theirs in NAMES.items()}
    item = Item(place, place, {}, None, None, folder, names)
    fields = {name: _beside(name, value, file) for name, value in fields.items()}
    if "prompt_path" in overrides:
        fields.pop("prompt", None)
    sample = Sample.parse({**fields, **overrides}, item.field)
    request = {n: v for n, v in sample if n in FlowRequest.model_fields and v is not None}
    long = {name: request.pop(name, default) for name, default in LONG.items()}
    if sample.enable_autoregressive:
        request |= {"num_video_frames": LONG["chunk_size"], **long}
    if sample.num_output_frames is not None:
        request["num_video_frames"] = sample.num_output_frames
    if sample.resolution not in (None, "none"):
        request["height"], request["width"] = map(int, sample.resolution.split(","))
    path, kind = _input(sample, item)
    return replace(
        item,
        label=sample.name,
        stated={
            **stated,
            **request,
            "prompt": _prompt(sample, item),
            "num_input_frames": INPUT_FRAMES[sample.inference_type],
        },
        input=path,
        kind=kind,
        output=folder / f"{sample.name}.{'jpg' if sample.num_output_frames == 1 else 'mp4'}",
        sample=sample.model_dump(exclude_none=True),
        sources=(file, *(Path(p) for p in [sample.prompt_path] if p is not None)),
    )


def _beside(name: str, value: Any, file: Path) -> Any:
    """A path of a sample as seen from here."""
    is_path = name in ("prompt_path", "input_path") and isinstance(value, str)
    if not is_path or not value.strip() or _URL.match(value):
        return value
    return str(file.parent / value)


def _input(
    sample: Sample, item: Item
) -> tuple[Path, Literal["image", "video"]] | tuple[None, None]:
    """The file that a sample continues, and its kind."""
    from worldline.video.read import media_kind  # imports PyAV, for which --help must not wait

    kind, field = sample.inference_type, item.field("input_path")
    if kind == "text2world":
        return None, None
    if sample.input_path is None:
        raise InputError(f"{field}: it is missing; {kind} needs one")
    path = Path(sample.input_path)
    media = media_kind(path)
    if kind == "video2world" and media == "image":
        raise InputError(f"{field}: {path} is an image, not a video; image2world continues it")
    return path, media


def _prompt(sample: Sample, item: Item) -> str:
    """The prompt of a sample: its own, else the text of its `prompt_path`."""
    if sample.prompt is not None:
        return sample.prompt
    if sample.prompt_path is None:
        raise InputError(f"{item.field('prompt')}: it is missing; give prompt or prompt_path")
    try:
        return Path(sample.prompt_path).read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        field = item.field("prompt_path")
        raise InputError(f"{field}: {sample.prompt_path} cannot be read: {error}") from error


def read_file(file: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Place and fields of every sample of a file; what cannot be read is added to `problems`."""
    suffix = file.suffix.lower()
    if file.is_dir() or suffix not in SUFFIXES:
        problems.append(f"{file}: it is not a file of samples; give {', '.join(SUFFIXES)}")
        return
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        problems.append(f"{file}: it cannot be read: {reason}")
        return
    pieces = [(str(file), text)]
    if suffix == ".jsonl":
        # not `splitlines`: some of the signs that end its lines may stand in a JSON string
        lines = enumerate(text.split("\n"), 1)
        pieces = [
            (f"{file}, line {n}", line) for n, line in lines if without_comments(line).strip()
        ]
    for place, piece in pieces:
        try:
            value = parse(piece, suffix)
        except ValueError as error:
            problems.append(f"{place}: it is not valid {suffix[1:].upper()}: {error}")
            continue
        if isinstance(value, list):
            yield from ((f"{place}, item {n}", one) for n, one in enumerate(value, 1))
        elif isinstance(value, dict) and isinstance(value.get("samples"), dict):
            yield from _by_name(place, value)
        else:
            yield place, value


def _by_name(place: str, value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Samples of the first release's form: by name, below fields that all have in common."""
    common = {name: field for name, field in value.items() if name != "samples"}
    for name, one in value["samples"].items():
        if not isinstance(one, dict):
            yield f"{place}, sample {name!r}", one
            continue
        fields = {**common, "name": name, **one}
        if fields.get("prompt_path") is not None:  # wins over a prompt in this form
            fields.pop("prompt", None)
        yield place, fields


def without_comments(text: str) -> str:
    """JSON without what follows `//` in a line, except in strings; lines stay lines."""
    return _STRING_OR_COMMENT.sub(lambda found: found[0] if found[0].startswith('"') else "", text)


def parse(text: str, suffix: str) -> Any:
    """The value of a JSON or YAML text.

    Raises:
        ValueError: it is not valid, or a name stands in a mapping twice.
    """
    try:
        if suffix in (".yaml", ".yml"):
            return yaml.load(text, _Yaml)
        return json.loads(without_comments(text), object_pairs_hook=_each_once)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


class _Yaml(yaml.SafeLoader):  # type: ignore[misc]
    """Safe loader that refuses names which stand in a mapping twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _each_once([(key.value, key) for key, _ in node.value if isinstance(key.value, str)])
        return super().construct_mapping(node, deep)
