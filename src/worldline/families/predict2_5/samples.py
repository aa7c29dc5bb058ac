"""Files of samples that Predict2.5 is run with: JSON, JSON lines, YAML; needs no torch.

Source: nvidia-cosmos/cosmos-predict2.5 `cosmos_predict2/config.py` and `examples/inference.py`, of
its releases since 13 October 2025, and of the one a week earlier, with many samples in a file.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field

from worldline.catalog import FLOW_MODELS, find_flow_model
from worldline.errors import InputError
from worldline.family import Item
from worldline.files import folded
from worldline.request import Options, Text
from worldline.video.read import media_kind

SUFFIXES = (".json", ".jsonl", ".yaml", ".yml")
LONGEST_NAME = 200  # bytes; a file name may have 255, of which suffixes take some
LONG_VIDEO = 77  # frames, and frames of a chunk
CHUNKS = ("chunk_size", "chunk_overlap")
INPUT_FRAMES = {"text2world": 0, "image2world": 1, "video2world": 5}
# field of a request -> field of a sample
NAMES = {
    "num_video_frames": "num_output_frames",
    "num_input_frames": "inference_type",
    "height": "resolution",
    "width": "resolution",
}
# Python that the released command builds its network from; these state what every file says itself
_CONFIG_FILES = ("", "cosmos_predict2/_src/predict2/configs/video2world/config.py")
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
# a string is kept whole, so that what looks like a comment in it stays
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*')


def _file_name(name: str) -> str:
    if not name.strip() or name in (".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        raise ValueError(f"{name!r} is not the name of a file")
    if len(name.encode("utf-8", "replace")) > LONGEST_NAME:
        raise ValueError(f"it has more than {LONGEST_NAME} bytes")
    return name


def _local_path(path: str) -> str:
    if not path.strip():
        raise ValueError("it is empty")
    if _URL.match(path):
        raise ValueError(f"{path} is a URL; save the file, and give its path")
    return path


def _resolution(text: Any) -> Any:
    if text != "none" and not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*", text):
        raise ValueError(f'{text!r} is not height and width such as "704,1280", or "none"')
    return text


class Overrides(Options):
    """Fields of samples; as flags they win over those of all samples."""

    inference_type: Literal["text2world", "image2world", "video2world"] | None = Field(
        None,
        description="text2world begins with the prompt, image2world with an image or the last frame "
        "of a video, video2world with the last 5 frames.",
    )
    prompt: Text | None = Field(None, description="What the video shows, in a paragraph.")
    prompt_path: Annotated[str, AfterValidator(_local_path)] | None = Field(
        None, description="Text file of the prompt."
    )
    negative_prompt: Text | None = Field(None, description="What the video must not show.")
    input_path: Annotated[str, AfterValidator(_local_path)] | None = Field(
        None, description="Image or video to continue."
    )
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

    name: Annotated[str, AfterValidator(_file_name)]


class SampleFlags(Overrides):
    """Flags of `predict2.5`."""

    earlier: tuple[str, ...] = Field(
        (), json_schema_extra={"argument": True, "metavar": "[PARAMS_FILE OUTPUT_DIR]"}
    )
    input_files: tuple[str, ...] = Field(
        (),
        description="Samples: .json, .jsonl, .yaml or .yml, one or more, or quoted patterns of names.",
        json_schema_extra={"short": "-i", "metavar": "FILE..."},
    )
    output_dir: str | None = Field(
        None,
        description="Folder of the videos; made if absent.",
        json_schema_extra={"short": "-o", "metavar": "DIR"},
    )
    checkpoint_path: str | None = Field(
        None, description="File or folder of a transformer, in place of the model's."
    )
    experiment: str | None = Field(
        None,
        description="Name of the released training run that the transformer comes from; decides the "
        "schedule.",
    )
    config_file: str | None = Field(
        None, description="Has no effect: the file of weights describes the network."
    )
    resume: bool = Field(False, description="Keep videos that an earlier run made in the same way.")
    keep_going: bool = Field(
        True, description="Go on with the next sample when one fails or is refused; on by default."
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
        overrides = {
            name: value
            for name, value in flags
            if name in Overrides.model_fields and name in flags.model_fields_set
        }
        items: list[Item] = []
        problems: list[str] = []
        places: dict[str, str] = {}
        for file in files:
            for place, found in read_file(file):
                try:
                    if isinstance(found, InputError):
                        raise found
                    item = make_item(file, place, found, overrides, folder, stated)
                except InputError as error:
                    problems += str(error).splitlines()
                    continue
                key = folded(item.output.stem)
                if key in places:
                    problems.append(f"{item.place}, name: {places[key]} has the same")
                places.setdefault(key, item.place)
                items.append(item)
        return items, problems

    def model(
        self, flags: SampleFlags, model: str, typed: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """Name of the transformer, and how it is sampled.

        A transformer of one's own is sampled as the model or training run named beside it.
        """
        schedules = {each.experiment: each.schedule for each in FLOW_MODELS}
        options: dict[str, Any] = {}
        if flags.experiment is not None:
            # runs of post-training begin with 2B/pre-trained
            options["schedule"] = schedules.get(flags.experiment, "shifted")
        elif flags.checkpoint_path is not None and typed:
            released = find_flow_model(model)
            if released is None:
                names = ", ".join(each.name for each in FLOW_MODELS)
                raise InputError(
                    f"--model {model} says how --checkpoint_path is sampled; give one of {names}"
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
    files: list[Path] = []
    for name in inputs:
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
        if not found and glob.has_magic(name) and not Path(name).exists():
            raise InputError(f"-i {name}: no file has such a name")
        files += map(Path, found or [name])
    return files, Path(output)


def make_item(
    file: Path,
    place: str,
    found: Mapping[str, Any],
    overrides: Mapping[str, Any],
    folder: Path,
    stated: Mapping[str, Any],
) -> Item:
    """The video that a sample describes.

    Args:
        file: of the sample; its relative paths start at the file's folder.
        place: of the sample, for messages.
        found: its fields.
        overrides: fields that win over them; their relative paths start here.
        folder: of the videos.
        stated: further fields of the request.

    Raises:
        InputError: one line for each problem.
    """
    fields = {n: _beside(n, value, file) for n, value in found.items()} | dict(overrides)
    if "name" in found:
        place = f"{place}, sample {found['name']!r}"
    names = {n: f"--{n}" for n in overrides}
    names |= {ours: names.get(theirs, theirs) for ours, theirs in NAMES.items()}
    item = Item(place, place, {}, None, None, folder, names)
    sample = Sample.parse(fields, item.field)
    kind = sample.inference_type
    if kind is None:
        raise InputError(
            f"{item.field('inference_type')}: it is missing; give {', '.join(INPUT_FRAMES)}"
        )
    path = None if kind == "text2world" else sample.input_path
    if kind != "text2world" and path is None:
        raise InputError(f"{item.field('input_path')}: it is missing; {kind} needs one")
    media = None
    if path is not None:
        if not Path(path).is_file():
            raise InputError(f"{item.field('input_path')}: no such file {path}")
        media = media_kind(Path(path))
        if kind == "video2world" and media == "image":
            raise InputError(
                f"{item.field('input_path')}: {path} is an image, video2world continues a video; "
                "use image2world"
            )
    request = {
        **stated,
        **{
            n: v
            for n, v in sample
            if n in ("negative_prompt", "seed", "guidance", "num_steps") and v is not None
        },
        "prompt": _prompt(sample, item, overrides),
        "num_input_frames": INPUT_FRAMES[kind],
    }
    if sample.resolution not in (None, "none"):
        request["height"], request["width"] = map(int, sample.resolution.split(","))
    if sample.num_output_frames is not None:
        request["num_video_frames"] = sample.num_output_frames
    if sample.enable_autoregressive:
        request["chunk_size"] = LONG_VIDEO if sample.chunk_size is None else sample.chunk_size
        request["chunk_overlap"] = 1 if sample.chunk_overlap is None else sample.chunk_overlap
        request.setdefault("num_video_frames", LONG_VIDEO)
    suffix = "jpg" if sample.num_output_frames == 1 else "mp4"
    return Item(
        sample.name,
        place,
        request,
        None if path is None else Path(path),
        media,
        folder / f"{sample.name}.{suffix}",
        names,
        sample.model_dump(exclude_none=True),
    )


def _prompt(sample: Sample, item: Item, overrides: Mapping[str, Any]) -> str:
    """The prompt of a sample: its own, else the text of its `prompt_path`."""
    own = None if "prompt_path" in overrides else sample.prompt
    if own is None and sample.prompt_path is not None:
        path = Path(sample.prompt_path)
        try:
            own = path.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{item.field('prompt_path')}: {path} cannot be read: {error}"
            ) from error
    if own is None or not own.strip():
        raise InputError(f"{item.field('prompt')}: there is none; give prompt or prompt_path")
    return own


def _beside(name: str, value: Any, file: Path) -> Any:
    """A path of a sample as seen from here."""
    is_path = name in ("prompt_path", "input_path") and isinstance(value, str)
    return (
        str(file.parent / value) if is_path and value.strip() and not _URL.match(value) else value
    )


def read_file(file: Path) -> Iterator[tuple[str, Mapping[str, Any] | InputError]]:
    """Place and fields of every sample of a file, or what is wrong there."""
    try:
        yield from _samples(file)
    except InputError as error:
        yield str(file), error


def _samples(file: Path) -> Iterator[tuple[str, Mapping[str, Any] | InputError]]:
    suffix = file.suffix.lower()
    if file.is_dir() or suffix not in SUFFIXES:
        raise InputError(f"{file}: it is not a file of samples; give {', '.join(SUFFIXES)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: it cannot be read: {error}") from error
    if suffix == ".jsonl":
        # not `splitlines`: some of the signs that end its lines may stand in a JSON string
        for number, line in enumerate(text.split("\n"), 1):
            if without_comments(line).strip():
                yield _one(f"{file}, line {number}", lambda line=line: parse(line, suffix))
        return
    try:
        found = parse(text, suffix)
    except ValueError as error:
        raise InputError(f"{file}: it is not valid {suffix[1:].upper()}: {error}") from None
    if isinstance(found, list):
        for number, one in enumerate(found, 1):
            yield _one(f"{file}, item {number}", lambda one=one: one)
    elif isinstance(found, dict) and "samples" in found:
        yield from _by_name(file, found)
    else:
        yield _one(str(file), lambda: found)


def _by_name(
    file: Path, found: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any] | InputError]]:
    """Samples of the first release's form: by name, below fields that all have in common."""
    common = {name: value for name, value in found.items() if name != "samples"}
    if "name" in common or not isinstance(found["samples"], dict):
        raise InputError(
            f'{file}: "samples" must hold samples by name; give {{"samples": {{"a": …}}}}'
        )
    for name, one in found["samples"].items():
        place, fields = _one(str(file), lambda one=one: one)
        if isinstance(fields, dict) and "name" in fields:
            fields = InputError(f'{file}, sample {name!r}, name: its key in "samples" is its name')
        if isinstance(fields, dict):
            fields = {**common, **fields, "name": name}
            if fields.get("prompt_path") is not None:  # wins over a prompt in this form
                fields.pop("prompt", None)
        yield place, fields


def _one(place: str, read: Any) -> tuple[str, Mapping[str, Any] | InputError]:
    """Fields of a sample, or what is wrong with it, so that those behind it are read, too."""
    try:
        found = read()
    except ValueError as error:
        return place, InputError(f"{place}: it is not valid: {error}")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        return place, InputError(f"{place}: it holds {type(found).__name__}; give names and values")
    if found.keys() >= {"worldline", "request", "run"}:
        return place, InputError(f'{place}: it is the report of a video; its "sample" is a sample')
    return place, found


def without_comments(text: str) -> str:
    """JSON without what follows `//` in a line, except in strings; lines stay lines."""
    return _STRING_OR_COMMENT.sub(lambda found: found[0] if found[0].startswith('"') else "", text)


def parse(text: str, suffix: str) -> Any:
    """The value of a JSON or YAML text.

    Raises:
        ValueError: it is not valid, or a name stands in a mapping twice.
    """
    if suffix not in (".yaml", ".yml"):
        try:
            return json.loads(without_comments(text), object_pairs_hook=_each_once)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
    try:
        return yaml.load(text, _Yaml)
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
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        _each_once([(str(name), None) for name in names])
        return super().construct_mapping(node, deep)
