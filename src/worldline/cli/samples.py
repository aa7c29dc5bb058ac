"""The files of samples that Predict2.5 is run with: JSON, JSON lines, YAML; needs no torch.

Source: nvidia-cosmos/cosmos-predict2.5 `cosmos_predict2/config.py` and `examples/inference.py`, of
its releases since 13 October 2025, and of the one a week earlier, with many samples in a file.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from worldline.choices import MAX_SEED, NEGATIVE_PROMPT
from worldline.errors import InputError, did_you_mean
from worldline.files import folded
from worldline.pipelines.requests import LARGEST_GUIDANCE, LARGEST_STEPS
from worldline.video.read import media_kind, probe

logger = logging.getLogger(__name__)

InferenceType = Literal["text2world", "image2world", "video2world"]
SUFFIXES = (".json", ".jsonl", ".yaml", ".yml")
LARGEST_SIDE = 1920
# the tokenizer merges 8 pixels each way and 4 frames, the transformer 2 of its cells each way
SIDE_STEP, FRAME_STEP = 16, 4
SECONDS_OF_SILENCE = 5
LONGEST_NAME = 200  # bytes; files may have 255, of which what is added to it takes some

_OF_A_REPORT = {"worldline", "request", "run"}
_PATHS = ("prompt_path", "input_path")
_CHUNKS = ("chunk_size", "chunk_overlap")
_NUMBERS = ("seed", "guidance", "num_output_frames", "num_steps", *_CHUNKS)
_FORMS = (
    'samples are {"name": "ball", "inference_type": …, "prompt": …}, one, a list or a line each; '
    'or a whole file is {"samples": {"ball": {"inference_type": …, "prompt": …}}}'
)
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
# a string is kept whole, so that what looks like a comment in it stays
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*')


class _Stated(NamedTuple):
    """A sample as a file states it.

    Attributes:
        place: where.
        fields: names and values, or why there are none.
        common: in the first release's form, names of the fields that stand above its samples; None
            in the other form.
    """

    place: str
    fields: Mapping[str, Any] | InputError
    common: Collection[str] | None = None


class Sample(BaseModel):
    """One video to make, checked as far as its input need not be opened: see `check_media`.

    Attributes:
        name: stem of its files.
        inference_type: what it starts from.
        prompt: what it shows; read from `prompt_path` where it is not given itself.
        prompt_path: text file.
        input_path: image or video to continue.
        negative_prompt: what it does not show.
        seed: of the noise.
        guidance: strength of the prompt.
        resolution: "H,W", or "none" for the world's own.
        num_output_frames: 1 + 4k; None is the world's own, or of a long video 77.
        num_steps: of the sampler.
        enable_autoregressive: makes a long video, chunk after chunk.
        chunk_size: frames of a chunk.
        chunk_overlap: frames of a chunk that the next one begins with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    inference_type: InferenceType
    prompt: str | None = None
    prompt_path: Path | None = None
    input_path: Path | None = None
    negative_prompt: str = NEGATIVE_PROMPT
    seed: int = Field(default=1, ge=0, le=MAX_SEED)
    guidance: float = Field(default=7, ge=0, le=LARGEST_GUIDANCE, allow_inf_nan=False)
    resolution: str = "none"
    num_output_frames: int | None = Field(default=None, gt=0)
    num_steps: int = Field(default=35, gt=0, le=LARGEST_STEPS)
    enable_autoregressive: bool = False
    chunk_size: int = Field(default=77, gt=0)
    chunk_overlap: int = Field(default=1, gt=0)
    _place: str = PrivateAttr("")
    _has_words: bool = PrivateAttr(False)  # that win over its `prompt_path`
    _had_words: bool = PrivateAttr(False)  # that its `prompt_path` won over

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, value: str) -> str:
        if not value.strip() or value in (".", "..") or re.search(r"[/\\\x00-\x1f]", value):
            raise ValueError(f"{value!r} cannot be the name of a file")
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"{value!r} is no valid text: {error}") from None
        if size > LONGEST_NAME:
            raise ValueError(f"{size} bytes are too long for a name; {LONGEST_NAME} may be")
        return value

    @field_validator(*_NUMBERS, mode="before")
    @classmethod
    def _is_number(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic takes for 0 or 1
            raise ValueError(f"{value} is no number")
        return value

    @field_validator("resolution", mode="before")
    @classmethod
    def _is_size(cls, value: Any) -> Any:
        if value == "none":
            return value
        # a list or a number is told the same
        sides = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", value if isinstance(value, str) else "")
        if sides is None:
            raise ValueError(f'{value!r} is neither "none" nor height and width such as "704,1280"')
        for side in map(int, sides.groups()):
            if side % SIDE_STEP or not SIDE_STEP <= side <= LARGEST_SIDE:
                raise ValueError(
                    f"{side} is no multiple of {SIDE_STEP} from {SIDE_STEP} to {LARGEST_SIDE}"
                )
        return value

    @field_validator(*_PATHS, mode="before")
    @classmethod
    def _is_path(cls, value: Any) -> Any:
        if isinstance(value, str) and not _could_be_path(value):
            if value.strip():
                raise ValueError(f"{value}: URLs are not fetched; save the file, and give its path")
            raise ValueError("it is empty")
        return value

    @field_validator(*_PATHS)
    @classmethod
    def _is_file(cls, value: Path | None) -> Path | None:
        if value is not None and not _is_there(value):
            told = f"{value} is a folder" if os.path.isdir(value) else f"there is no file {value}"
            raise ValueError(told)
        return value

    @field_validator("input_path")
    @classmethod
    def _is_media(cls, value: Path | None) -> Path | None:
        if value is not None:
            media_kind(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _read_prompt(cls, data: Any) -> Any:
        path = data.get("prompt_path")
        wanted = data.get("prompt") is None and isinstance(path, str | Path)
        if not wanted or not _is_there(Path(path)):
            return data
        try:
            prompt = Path(path).read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"prompt_path: {path} is no text in UTF-8") from error
        except OSError as error:
            told = error.strerror or error
            raise ValueError(f"prompt_path: {path} cannot be read: {told}") from error
        if not prompt:
            raise ValueError(f"prompt_path: {path} is empty")
        return {**data, "prompt": prompt}

    @model_validator(mode="after")
    def _is_whole(self) -> Sample:
        if self.prompt is None or not self.prompt.strip():
            told = "there is none, and no prompt_path" if self.prompt is None else "it is empty"
            raise ValueError(f"prompt: {told}")
        if self.inference_type == "text2world":
            return self
        if self.input_path is None:
            raise ValueError(f"input_path: {self.inference_type} needs one")
        if self.inference_type == "video2world" and media_kind(self.input_path) == "image":
            raise ValueError(
                f"input_path: {self.input_path} is an image, but video2world continues a video; "
                "image2world continues an image"
            )
        return self

    @property
    def place(self) -> str:
        """Where it is stated, for messages; empty of one that was read from no file."""
        return self._place

    @property
    def without_effect(self) -> dict[str, str]:
        """Fields that are stated and decide nothing, and why."""
        found: dict[str, str] = {}
        if self.prompt_path is not None and self._has_words:
            found["prompt_path"] = "the prompt is given"
        if self._had_words:
            found["prompt"] = 'prompt_path is given, and wins in files with "samples"'
        if self.input_path is not None and self.inference_type == "text2world":
            found["input_path"] = "text2world begins with the prompt alone"
        if "negative_prompt" in self.model_fields_set and self.guidance == 0:
            found["negative_prompt"] = "guidance is 0"
        if not self.enable_autoregressive:
            stated = [name for name in _CHUNKS if name in self.model_fields_set]
            found |= dict.fromkeys(stated, "enable_autoregressive is not true")
        return found

    @property
    def continued(self) -> Path | None:
        """The image or video that it continues; text2world continues none."""
        return self.input_path if self.num_input_frames else None

    @property
    def continues_a_still(self) -> bool:
        """Whether of a video one frame alone is continued."""
        if self.inference_type != "image2world" or self.input_path is None:
            return False
        return media_kind(self.input_path) == "video"

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width; None is the world's own."""
        if self.resolution == "none":
            return None
        height, width = map(int, self.resolution.split(","))
        return height, width

    @property
    def num_input_frames(self) -> int:
        """How many of the input's last frames are continued."""
        given = {"text2world": 0, "image2world": 1, "video2world": 1 + FRAME_STEP}
        return given[self.inference_type]


def read_samples(files: Sequence[Path], overrides: Mapping[str, Any] | None = None) -> list[Sample]:
    """Return the samples of all files, in order; their inputs are there, and not opened yet.

    Args:
        files: `.json` with one sample, a list of them, or the first release's "samples" by name;
            `.jsonl` with one a line; `.yaml` or `.yml` as `.json`. `//` starts a comment in JSON.
            Relative paths in a file start at its folder.
        overrides: fields that win over those of every sample; their relative paths start here.

    Raises:
        InputError: names file, sample and field of everything that is wrong; or the overrides that
            are, as flags.
    """
    overrides = overrides or {}
    if alone := _problems_alone(overrides):
        raise InputError("\n".join(f"--{name}: {told}" for name, told in alone))
    samples: list[Sample] = []
    wrong: list[tuple[str, str]] = []  # a place, and what is wrong there
    checked = 0
    first: dict[str, tuple[str, str]] = {}  # by its folded name, a name and its place
    for file in files:
        found = list(_read_file(file))
        if not found:
            wrong.append((str(file), "no samples in it"))
        for place, stated, common in found:
            if isinstance(stated, InputError):
                wrong.append(("", str(stated)))
                continue
            checked += 1
            data = {**_resolved(stated, file.parent), **overrides}
            had_words = False
            if "prompt" not in overrides:
                if "prompt_path" in overrides:
                    data.pop("prompt", None)
                elif common is not None and data.get("prompt_path") is not None:
                    had_words = data.pop("prompt", None) is not None
            label = f"{place}, sample {data['name']!r}" if "name" in data else place
            try:
                sample = Sample.model_validate(data)
            except ValidationError as error:
                for name, told in _problems(error):
                    above = common is not None and name in common and name not in overrides
                    wrong.append((str(file) if above else label, f"{name}: {told}"))
                continue
            name = folded(sample.name)
            if name in first:
                other, where = first[name]
                same = "the same" if other == sample.name else f"{other!r}: many disks ignore case"
                wrong.append((label, f"name: {where} has {same}"))
            first.setdefault(name, (sample.name, place))
            sample._place = label
            sample._has_words = data.get("prompt") is not None
            sample._had_words = had_words
            samples.append(sample)
    refuse(wrong, checked, overrides)
    return samples


def refuse(wrong: Sequence[tuple[str, str]], checked: int, overrides: Collection[str]) -> None:
    """Tell all that is wrong; of an override that suits no sample once, as the flag's.

    Args:
        wrong: places, "" where the words name it, and what is wrong there; begins with the field.
        checked: how many samples were.
        overrides: names of the fields that are the same for all.

    Raises:
        InputError: there is something.
    """
    times = Counter(told for _, told in wrong)
    lines = []
    for place, told in wrong:
        shared = place and times[told] == checked
        if shared and re.split(r"\W", told, maxsplit=1)[0] in overrides:
            lines.append(f"--{told}")
        else:
            lines.append(f"{place}: {told}" if place else told)
    if lines:
        raise InputError("\n".join(dict.fromkeys(lines)))


def check_media(samples: Sequence[Sample], overrides: Collection[str] = ()) -> None:
    """Look at every image and video that is continued, once each; says how far it is, if slow.

    Args:
        samples: all of them.
        overrides: as of `refuse`.

    Raises:
        InputError: names the samples whose input is no readable media, or too short.
    """
    inputs = {_identity(path) for sample in samples if (path := sample.continued)}
    # frames of the file, or what is wrong with it
    looked_at: dict[tuple[str, str], int | InputError] = {}
    wrong: list[tuple[str, str]] = []
    said = time.monotonic()
    for sample in samples:
        path = sample.continued
        if path is None:
            continue
        identity = _identity(path)
        if identity not in looked_at:
            if time.monotonic() - said >= SECONDS_OF_SILENCE:
                said = time.monotonic()
                logger.info("looked at %d of %d input files", len(looked_at), len(inputs))
            try:
                looked_at[identity] = probe(path).frames
            except InputError as error:
                looked_at[identity] = error
        frames = looked_at[identity]
        if isinstance(frames, InputError):
            wrong.append((sample.place, f"input_path: {frames}"))
        elif frames < sample.num_input_frames:
            told = (
                f"input_path: {path} has {frames} frame{'s' * (frames != 1)}, but "
                f"{sample.inference_type} continues the last {sample.num_input_frames}"
            )
            wrong.append((sample.place, told))
    refuse(wrong, len(samples), overrides)


def _identity(path: Path) -> tuple[str, str]:
    """Return what a file of several spellings is known by, and the kind that this one says."""
    return os.path.realpath(path), media_kind(path)


def without_comments(text: str) -> str:
    """Return JSON without what follows `//` in a line, but for strings; lines stay lines."""
    return _STRING_OR_COMMENT.sub(lambda found: found[0] if found[0].startswith('"') else "", text)


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _read_file(file: Path) -> Iterator[_Stated]:
    """Yield every sample of a file as it is stated, or what is wrong with it, and where."""
    try:
        yield from _samples_in(file)
    except InputError as error:
        yield _Stated(str(file), error)


def _samples_in(file: Path) -> Iterator[_Stated]:
    """Yield as `_read_file` does.

    Raises:
        InputError: the file as a whole is wrong.
    """
    suffix = file.suffix.lower()
    if file.is_dir():
        raise InputError(f"{file} is a folder; name its files, as in '{file / '*.json'}'")
    if suffix not in SUFFIXES:
        raise InputError(f"{file}: {suffix or 'its end'} is none of {' '.join(SUFFIXES)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} cannot be read: it is no text in UTF-8") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    if suffix == ".json" and not text.strip():
        raise InputError(f"{file} is no valid JSON: it is empty")
    if suffix == ".jsonl":
        # not `splitlines`: some of the signs that end its lines may stand in a JSON string
        for number, line in enumerate(text.split("\n"), 1):
            if without_comments(line).strip():
                place = f"{file}, line {number}"
                yield _Stated(place, _attempt(place, line, suffix))
        return
    held = _parsed(str(file), text, suffix)
    if isinstance(held, list):
        for number, one in enumerate(held, 1):
            place = f"{file}, item {number}"
            yield _Stated(place, _attempt(place, one))
        return
    held = _mapping(str(file), held)
    if "samples" not in held:
        yield _Stated(str(file), held)
        return
    if "name" in held:
        told = f'name and "samples" stand beside each other; {_FORMS}'
        yield _Stated(str(file), InputError(f"{file}: {told}"))
    if isinstance(held["samples"], list):
        raise InputError(f'{file}: "samples" holds a list, not names and values; {_FORMS}')
    common = {name: value for name, value in held.items() if name not in ("name", "samples")}
    for name, one in _mapping(f"{file}, samples", held["samples"]).items():
        own = _attempt(f"{file}, sample {name!r}", one)
        if isinstance(own, InputError):
            yield _Stated(str(file), own)
            continue
        if "name" in own:
            told = f'name: its key in "samples", {name!r}, is its name; {_FORMS}'
            yield _Stated(str(file), InputError(f"{file}, sample {name!r}: {told}"))
            continue
        stated = {**common, **own, "name": name}
        yield _Stated(str(file), stated, common.keys() - own.keys())


def _attempt(place: str, held: Any, suffix: str = "") -> Mapping[str, Any] | InputError:
    """Return a sample, or what is wrong with it, so that those behind it are looked at too.

    Args:
        place: where it is stated.
        held: what is there.
        suffix: of the file, where `held` is text that is not parsed yet.
    """
    try:
        found = _mapping(place, _parsed(place, held, suffix) if suffix else held)
    except InputError as error:
        return error
    if "samples" in found:
        return InputError(f'{place}: "samples" within one of several samples; {_FORMS}')
    return found


def _parsed(place: str, text: str, suffix: str) -> Any:
    try:
        if suffix in (".yaml", ".yml"):
            return yaml.load(text, _Yaml)
        return json.loads(without_comments(text), object_pairs_hook=_each_once)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        told = _told_by(error) if isinstance(error, yaml.MarkedYAMLError) else str(error)
        if suffix == ".jsonl" and isinstance(error, json.JSONDecodeError):
            told = f"column {error.colno}: {error.msg}"  # the place has the line
        told = " ".join(told.split())
        raise InputError(f"{place} is no valid {suffix[1:].upper()}: {told}") from error


def _told_by(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong with YAML and where, and of common faults the cure."""
    mark, told = error.problem_mark, error.problem or error.context or ""
    cures = {
        "mapping values": 'text that holds ": " stands in quotes',
        "'\\t'": "lines are indented by spaces",
    }
    cure = "".join(f" ({cure})" for sign, cure in cures.items() if sign in told)
    return f"line {mark.line + 1}, column {mark.column + 1}: {told}{cure}" if mark else told


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of a name that is there twice, one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


class _Yaml(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses names that are there twice, as `_each_once` does."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known: set[str] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode):
                if name.value in known:
                    raise yaml.MarkedYAMLError(
                        problem=f"{name.value!r} is there twice", problem_mark=name.start_mark
                    )
                known.add(name.value)
        return node


def _mapping(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        kind = {"str": "text", "NoneType": "nothing", "list": "a list"}.get(type(value).__name__)
        raise InputError(f"{place}: {kind or repr(value)} where names and values are expected")
    if value.keys() >= _OF_A_REPORT:
        raise InputError(
            f"{place}: this is the report of a video that worldline made, and no sample"
            + ('; what it was made from stands in it as "sample"' if "sample" in value else "")
        )
    return value


def _resolved(stated: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a sample with its paths as seen from here."""
    return {
        name: str(folder / value)
        if name in _PATHS and isinstance(value, str) and _could_be_path(value)
        else value
        for name, value in stated.items()
    }


def _could_be_path(value: str) -> bool:
    """Tell whether this is a path; a URL is none, nor are blanks."""
    return bool(value.strip()) and not _URL.match(value)


def _problems_alone(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is wrong with values whatever stands beside them, as `_problems` does."""
    whole = {"name": "a", "inference_type": "text2world", **fields}
    if whole["inference_type"] in get_args(InferenceType):
        whole["inference_type"] = "text2world"  # which needs no other field but a prompt
    if "prompt_path" not in fields:
        whole.setdefault("prompt", "a")
    try:
        Sample.model_validate(whole)
    except ValidationError as error:
        return list(_problems(error))
    return []


def _problems(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Yield fields, and what is wrong with each."""
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            field, _, message = message.partition(": ")
            yield field, message
            continue
        if problem["type"] == "extra_forbidden":
            message = f"there is no such field{_meant(str(problem['loc'][0]))}"
        elif problem["type"] == "missing":
            message = "it is missing"
        elif problem["type"] == "path_type":
            message = f"{problem['input']!r:.80}: it must be a path"
        elif problem["type"] == "string_type":
            message = f"{problem['input']!r:.80}: it must be text, in quotes"
        elif "value" not in problem["type"]:
            message = f"{problem['input']!r:.80}: {message[:1].lower()}{message[1:]}"
        yield ".".join(map(str, problem["loc"])), message


def _meant(name: str) -> str:
    """Return the end of a message: which field is most likely meant, or all of them."""
    known = list(Sample.model_fields)
    spelling = name.strip().lower().replace("-", "_").replace(" ", "_")
    return did_you_mean(spelling, known, 0.7) or f"; there are: {', '.join(known)}"
