"""What a client states, as fields of a world's requests.

A field is what the world's own schema makes of it: the server has no defaults.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from worldline.errors import brief, did_you_mean
from worldline.family import FAMILIES, requests_of
from worldline.serve.errors import ApiError
from worldline.serve.forms import FormText, parse_json
from worldline.serve.objects import HIDDEN
from worldline.serve.records import Facts
from worldline.serve.settings import MAX_PROMPT
from worldline.serve.values import convert
from worldline.shapes import nearest_frames

ALIASES = {
    "num_frames": "num_video_frames",
    "frames": "num_video_frames",
    "num_inference_steps": "num_steps",
    "steps": "num_steps",
    "guidance_scale": "guidance",
    "extra_body": "extra_params",
}
NO_EFFECT = ("user", "quality")
_FPS = {"type": "number", "minimum": 1, "maximum": 240}
_SIDE = {"type": "integer", "minimum": 1, "maximum": 1 << 20}
# fields of the interface, beside those of the world
OWN: dict[str, Mapping[str, Any]] = {
    "seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
    "size": {"type": "string", "maxLength": 40},
    "width": _SIDE,
    "height": _SIDE,
    "num_video_frames": _SIDE,
    "preview_every": {"type": "integer", "minimum": 0, "maximum": 1000},
    "seed": {"type": "integer", "minimum": 0, "exclusiveMaximum": 1 << 32},
    **{name: {"type": "string"} for name in NO_EFFECT},
}
_STRUCTURED = ("model", "input_reference", "metadata", "extra_params")
_SIZE = re.compile(r"\s*(\d{1,7})\s*[xX*\u00d7]\s*(\d{1,7})\s*", re.ASCII)


@dataclass(frozen=True)
class Wanted:
    """One video that a client wants.

    Attributes:
        stated: fields of the world's request.
        names: of those fields, as they were written.
        reference: the input, as it was written; None without.
    """

    stated: Mapping[str, Any]
    names: Mapping[str, str]
    reference: Any
    metadata: Mapping[str, str] | None


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields, and those in extra_params, which may be an object or its JSON text.

    Raises:
        ApiError: conflicting_parameters, invalid_value, invalid_json.
    """
    fields = {name: value for name, value in values.items() if not _is_extra(name)}
    for name in filter(_is_extra, values):
        extra = values[name]
        if isinstance(extra, str):
            extra = parse_json(str(extra)) if extra.strip() else {}
        if extra is None:
            continue
        if not isinstance(extra, dict):
            raise ApiError("invalid_value", f"{name} is {brief(extra)}; give an object", name)
        for inner, value in extra.items():
            if _is_extra(inner):
                raise ApiError("invalid_value", f"{inner} is inside {name}; write it once", name)
            if inner in fields and str(fields[inner]) != str(value):
                message = f"{brief(inner)} is in {name} and beside it; give it once"
                raise ApiError("conflicting_parameters", message, inner[:80])
            fields[inner] = value
    return {name: value for name, value in fields.items() if value is not None}


def _is_extra(name: str) -> bool:
    return ALIASES.get(name, name) == "extra_params"


def choose_model(model: Any, worlds: Sequence[str]) -> str:
    """The world that a client names; the only one where it names none.

    Raises:
        ApiError: missing_parameter, invalid_value, model_not_found.
    """
    known = ", ".join(worlds)
    if model is None or model == "":
        if len(worlds) == 1:
            return worlds[0]
        raise ApiError("missing_parameter", f"model is missing; give one of {known}", "model")
    if not isinstance(model, str):
        raise ApiError("invalid_value", f"model is {brief(model)}; give one of {known}", "model")
    if model not in worlds:
        close = did_you_mean(model[:80], worlds, 0.6) or f"; there are {known}"
        raise ApiError(
            "model_not_found", f"model {brief(str(model))}: no such world{close}", "model"
        )
    return str(model)


def read_fields(values: Mapping[str, Any], facts: Facts, kept: Collection[str] = ()) -> Wanted:
    """A wanted video from flattened fields.

    Args:
        values: fields.
        facts: about the world.
        kept: names of fields that need not be stated, for they are those of another video.

    Raises:
        ApiError: what is wrong with the first wrong field.
    """
    stated: dict[str, Any] = {}
    names: dict[str, str] = {}  # field -> as it was written
    for written, value in values.items():
        name = ALIASES.get(written, written)
        if name in _STRUCTURED:
            continue
        schema = facts.fields.get(name) if not name.endswith(HIDDEN) else None
        schema = schema or OWN.get(name) or (_FPS if name == "fps" else None)
        if schema is None:
            raise _unknown(written, facts)
        if isinstance(value, FormText) and not value and name != "negative_prompt":
            continue  # a form's empty field
        if name == "seconds" and isinstance(value, str):  # as OpenAI's clients write it
            value = FormText(value)
        converted = convert(written, value, schema)
        if name in OWN:  # a world may state no limit
            convert(written, converted, OWN[name])
        if name in stated and stated[name] != converted:
            message = (
                f"{names[name]} is {brief(stated[name])}, {written} {brief(converted)}; give one"
            )
            raise ApiError("conflicting_parameters", message, written[:80])
        stated[name], names[name] = converted, written
    for name in NO_EFFECT:
        stated.pop(name, None)
    _read_size(stated, names, facts)
    _read_length(stated, names, facts)
    needed = facts.limits.get("prompt") == "required" and "prompt" not in kept
    if needed or "prompt" in stated:
        check_prompt(stated.get("prompt"))
    if "preview_every" not in facts.fields and stated.pop("preview_every", 0):
        raise _unknown("preview_every", facts)
    reference = values.get("input_reference")
    return Wanted(stated, names, reference, read_metadata(values.get("metadata")))


@contextmanager
def as_written(wanted: Wanted, facts: Facts) -> Iterator[None]:
    """Name fields in errors as the client wrote them, and propose a whole size for a size."""
    try:
        yield
    except ApiError as error:
        written = wanted.names.get(error.param or "", error.param)
        if written == "size" and error.param != written:
            error.message = _size_advice(wanted.stated, facts) or f"size: {error.message}"
        elif written and error.param != written:
            error.message = re.sub(rf"\b{error.param}\b", written, error.message)
        error.param = written
        raise


def _size_advice(stated: Mapping[str, Any], facts: Facts) -> str | None:
    """What is wrong with a size, and the nearest one; None where its sides are not why."""
    multiple, nearest = facts.limits.get("size_multiple"), []
    if multiple is None:
        return None
    for name in ("width", "height"):
        most = facts.limits.get(f"max_{name}") or stated[name]
        nearest.append(min(most, max(multiple, round(stated[name] / multiple) * multiple)))
    size, close = f"{stated['width']}x{stated['height']}", "{}x{}".format(*nearest)
    if size == close:
        return None
    bounds = "x".join(str(facts.limits.get(f"max_{name}")) for name in ("width", "height"))
    return (
        f"size is {size}; its sides must be multiples of {multiple}, at most {bounds}: "
        f"the nearest is {close}"
    )


def _unknown(name: str, facts: Facts) -> ApiError:
    """The error of a field that the world does not have."""
    field = "" if name.endswith(HIDDEN) else ALIASES.get(name, name)
    families = [each for each in FAMILIES if field in requests_of(each).REQUEST.model_fields]
    if name == "prompt":
        message = f"prompt: {facts.name} takes none; leave it out"
    elif families:
        others = " and ".join(families)
        message = f"{name}: {facts.name} has no such field; worlds of {others} have it"
    else:
        known = [*facts.fields, *OWN, *ALIASES, *_STRUCTURED]
        known = [each for each in known if not each.endswith(HIDDEN)]
        close = did_you_mean(name.strip().lower().replace("-", "_")[:80], known, 0.6)
        message = f"{brief(name)}: no such field{close or '; leave it out'}"
    return ApiError("unknown_parameter", message, name[:80])


def _read_size(stated: dict[str, Any], names: dict[str, str], facts: Facts) -> None:
    """Replace `size` by `width` and `height`; drop both where the world has one size alone."""
    if (size := stated.pop("size", None)) is not None:
        match = _SIZE.fullmatch(size)
        if match is None:
            message = f"size is {brief(size)}; give WIDTHxHEIGHT, such as 1280x704"
            raise ApiError("invalid_value", message, "size")
        for name, value in zip(("width", "height"), map(int, match.groups()), strict=True):
            if stated.setdefault(name, value) != value:
                message = f"size is {size}, but {name} {stated[name]}; give one"
                raise ApiError("conflicting_parameters", message, name)
            convert("size", value, facts.fields.get(name) or _SIDE)
            names.setdefault(name, "size")
    for name in ("width", "height"):
        if name in stated and name not in facts.fields:
            default = facts.defaults.get(name)
            if stated.pop(name) != default:
                only = f"{facts.defaults.get('width')}x{facts.defaults.get('height')}"
                param = names[name]
                raise ApiError("invalid_value", f"{param}: {facts.name} makes {only} alone", param)


def _read_length(stated: dict[str, Any], names: Mapping[str, str], facts: Facts) -> None:
    """Replace `seconds` by the nearest number of frames that the world makes."""
    if (seconds := stated.pop("seconds", None)) is not None:
        frames = frames_of(seconds * float(stated.get("fps", facts.defaults.get("fps", 1))), facts)
        if stated.setdefault("num_video_frames", frames) != frames:
            written = names["num_video_frames"]
            message = (
                f"seconds {seconds:g} are {frames} frames, but {written} is "
                f"{stated['num_video_frames']}; give one"
            )
            raise ApiError("conflicting_parameters", message, "seconds")
    if "fps" not in facts.fields:
        usual = facts.defaults.get("fps")
        if stated.pop("fps", usual) != usual:
            raise _unknown("fps", facts)


def frames_of(number: float, facts: Facts) -> int:
    """Number of frames nearest to `number` that a world makes."""
    multiple = int(facts.limits.get("frames_multiple") or 1)
    frames = nearest_frames(round(number), multiple)
    if most := facts.limits.get("max_frames"):
        frames = min(frames, 1 + (int(most) - 1) // multiple * multiple)
    return max(frames, int(facts.limits.get("min_frames") or 1))


def check_prompt(prompt: Any) -> str:
    """The prompt itself.

    Raises:
        ApiError: missing_parameter, invalid_value.
    """
    if prompt is None:
        raise ApiError("missing_parameter", "prompt is missing; describe the video", "prompt")
    if not isinstance(prompt, str):
        raise ApiError("invalid_value", f"prompt is {brief(prompt)}; give a text", "prompt")
    if len(prompt) > MAX_PROMPT:
        message = f"prompt has {len(prompt):,} characters; give at most {MAX_PROMPT:,}"
        raise ApiError("invalid_value", message, "prompt")
    if not prompt.strip():
        raise ApiError("invalid_value", "prompt is empty; describe the video", "prompt")
    return str(prompt)


def read_metadata(value: Any) -> dict[str, str] | None:
    """Up to 16 strings of the client."""
    if isinstance(value, FormText):
        value = parse_json(str(value)) if value.strip() else None
    if value is None:
        return None
    texts = isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
    if not texts or len(value) > 16:
        raise ApiError(
            "invalid_value", "metadata must be an object of at most 16 strings", "metadata"
        )
    if any(len(name) > 64 or len(text) > 512 for name, text in value.items()):
        message = "metadata: names have at most 64 characters, strings 512"
        raise ApiError("invalid_value", message, "metadata")
    return {str(name): str(text) for name, text in value.items()}
