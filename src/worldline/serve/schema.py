"""What a client states, as fields of a world's requests; and worlds and jobs, as clients see them.

A field is what the world's own schema makes of it: the server has no defaults.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from worldline.errors import brief, did_you_mean
from worldline.family import FAMILIES, requests_of
from worldline.serve.errors import ApiError
from worldline.serve.forms import FormText, parse_json
from worldline.serve.records import Facts, Job
from worldline.serve.settings import MAX_PROMPT, AppSettings
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
_HIDDEN = "_embeddings"  # end of names of fields that name a file of the server
_SIZE = re.compile(r"\s*(\d{1,7})\s*[xX*\u00d7]\s*(\d{1,7})\s*", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,400}\.?\d{0,400}|\.\d{1,400})([eE][+-]?\d{1,4})?", re.ASCII)


@dataclass(frozen=True)
class Wanted:
    """One video that a client wants.

    Attributes:
        stated: fields of the world's request.
        names: of those fields, as they were written.
        reference: the input, as it was written; None without.
    """

    model: str
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
                raise ApiError("conflicting_parameters", message, _label(inner))
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
        close = did_you_mean(model, worlds, 0.6) or f"; there are {known}"
        raise ApiError(
            "model_not_found", f"model {brief(str(model))}: no such world{close}", "model"
        )
    return str(model)


def read_fields(values: Mapping[str, Any], model: str, facts: Facts) -> Wanted:
    """A wanted video from flattened fields.

    Raises:
        ApiError: what is wrong with the first wrong field.
    """
    stated: dict[str, Any] = {}
    names: dict[str, str] = {}  # field -> as it was written
    for written, value in values.items():
        name = ALIASES.get(written, written)
        if name in _STRUCTURED:
            continue
        schema = facts.fields.get(name) if not name.endswith(_HIDDEN) else None
        schema = schema or OWN.get(name) or (_FPS if name == "fps" else None)
        if schema is None:
            raise _unknown(written, facts)
        if isinstance(value, FormText) and not value and name != "negative_prompt":
            continue  # a form's empty field
        converted = convert(written, value, schema)
        if name in OWN:  # a world may state no limit
            convert(written, converted, OWN[name])
        if name in stated and stated[name] != converted:
            message = (
                f"{names[name]} is {brief(stated[name])}, {written} {brief(converted)}; give one"
            )
            raise ApiError("conflicting_parameters", message, _label(written))
        stated[name], names[name] = converted, written
    for name in NO_EFFECT:
        stated.pop(name, None)
    _read_size(stated, names, facts)
    _read_length(stated, names, facts)
    _read_prompt(stated, facts)
    if "preview_every" not in facts.fields and stated.pop("preview_every", 0):
        raise _unknown("preview_every", facts)
    reference = values.get("input_reference")
    return Wanted(model, stated, names, reference, read_metadata(values.get("metadata")))


@contextmanager
def as_written(wanted: Wanted, facts: Facts) -> Iterator[None]:
    """Name fields in errors as the client wrote them, and propose a whole size for a size."""
    try:
        yield
    except ApiError as error:
        written = wanted.names.get(error.param or "", error.param)
        if written == "size" and error.param != written:
            error.message = _size_advice(wanted.stated, facts) or f"size: {error.message}"
        elif written and error.param:
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
    families = () if name.endswith(_HIDDEN) else families_with(ALIASES.get(name, name))
    if name == "prompt":
        message = f"prompt: {facts.name} takes none; leave it out"
    elif families:
        others = " and ".join(families)
        message = f"{name}: {facts.name} has no such field; worlds of {others} have it"
    else:
        known = [*facts.fields, *OWN, *ALIASES, *_STRUCTURED]
        known = [each for each in known if not each.endswith(_HIDDEN)]
        close = did_you_mean(name.strip().lower().replace("-", "_")[:80], known, 0.6)
        message = f"{brief(name)}: no such field{close or '; leave it out'}"
    return ApiError("unknown_parameter", message, _label(name))


@cache
def families_with(field: str) -> tuple[str, ...]:
    """Families whose requests have a field."""
    return tuple(name for name in FAMILIES if field in requests_of(name).REQUEST.model_fields)


def _label(name: str) -> str:
    return name[:80]


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


def _read_prompt(stated: Mapping[str, Any], facts: Facts) -> None:
    prompt = stated.get("prompt")
    if prompt is None:
        if facts.limits.get("prompt") == "required":
            message = "prompt is missing; describe the video"
            raise ApiError("missing_parameter", message, "prompt")
        return
    if len(prompt) > MAX_PROMPT:
        message = f"prompt has {len(prompt):,} characters; give at most {MAX_PROMPT:,}"
        raise ApiError("invalid_value", message, "prompt")
    if not prompt.strip():
        raise ApiError("invalid_value", "prompt is empty; describe the video", "prompt")


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


# values and schemas


def convert(name: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """A value as its schema wants it; texts of forms are parsed.

    Raises:
        ApiError: invalid_value.
    """
    advice: list[str] = []
    for choice in _choices(schema):
        try:
            return _convert(value, choice)
        except ValueError as error:
            advice.append(str(error))
    wanted = " or ".join(dict.fromkeys(filter(None, advice))) or "another value"
    message = f"{name} is {brief(value if not isinstance(value, FormText) else str(value))}"
    raise ApiError("invalid_value", f"{message}; give {wanted}", _label(name))


def _choices(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in ("anyOf", "oneOf"):
        if key in schema:
            for choice in schema[key]:
                yield from _choices(choice)
            return
    if "allOf" in schema and len(schema["allOf"]) == 1:
        yield from _choices(schema["allOf"][0])
        return
    yield schema


def _convert(value: Any, schema: Mapping[str, Any]) -> Any:
    """Raise `ValueError`, whose message is what to give."""
    if values := schema.get("enum", [schema["const"]] if "const" in schema else None):
        for each in values:
            same = isinstance(each, bool) == isinstance(value, bool) and value == each
            if same or (isinstance(value, FormText) and str(value).strip() == str(each)):
                return each
        raise ValueError(" or ".join(map(str, values)))
    kind = schema.get("type")
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    return (
        str(value)
        if isinstance(value, FormText) and not reader
        else (reader(value, schema) if reader else value)
    )


def _integer(value: Any, schema: Mapping[str, Any]) -> int:
    wanted = f"a whole number{_range(schema)}"
    if isinstance(value, FormText):
        if not re.fullmatch(r"\s*[+-]?\d{1,30}(\.0{1,9})?\s*", value, re.ASCII):
            raise ValueError(wanted)
        value = int(value.partition(".")[0])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not _within(value, schema):
        raise ValueError(wanted)
    return value


def _number(value: Any, schema: Mapping[str, Any]) -> float:
    wanted = f"a number{_range(schema)}"
    if isinstance(value, str) and (isinstance(value, FormText) or schema is OWN["seconds"]):
        if not _NUMBER.fullmatch(value.strip()):
            raise ValueError(wanted)
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(wanted)
    if not _within(value, schema) or abs(value) > 1e300 or not math.isfinite(value):
        raise ValueError(wanted)
    return value


def _string(value: Any, schema: Mapping[str, Any]) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    if len(value) > schema.get("maxLength", math.inf):
        raise ValueError(f"at most {schema['maxLength']:,} characters")
    if len(value) < schema.get("minLength", 0):
        raise ValueError("a text that is not empty")
    return str(value)


def _boolean(value: Any, schema: Mapping[str, Any]) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, FormText) and value.strip().lower() in words:
        return words[value.strip().lower()]
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _null(value: Any, schema: Mapping[str, Any]) -> None:
    if value is not None:
        raise ValueError("")


def _array(value: Any, schema: Mapping[str, Any]) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("an array")
    items = schema.get("items", {})
    return [convert("item", each, items) for each in value]


_READERS: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "integer": _integer,
    "number": _number,
    "string": _string,
    "boolean": _boolean,
    "null": _null,
    "array": _array,
}


def _within(value: float, schema: Mapping[str, Any]) -> bool:
    return (
        schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
        and schema.get("exclusiveMinimum", -math.inf) < value
        and value < schema.get("exclusiveMaximum", math.inf)
    )


def _range(schema: Mapping[str, Any]) -> str:
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    parts = [f"{word} {schema[key]:,}" for key, word in words.items() if key in schema]
    return f" {' and '.join(parts)}" if parts else ""


# what clients see


def video_object(job: Job, position: int | None = None, eta: float | None = None) -> dict[str, Any]:
    """A job as clients see it: OpenAI's fields, and ours."""
    shape, result, error = job.shape, job.result, None
    if job.error_code is not None:
        message = job.error_message or "The video failed."
        error = {"code": job.error_code, "message": message, "param": job.error_param}
    frames, fps = shape.get("num_frames", 0), shape.get("fps") or 0
    step = {"kind": job.step_kind, "done": job.step_done, "total": job.step_total}
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": _whole(job.completed_at),
        "expires_at": _whole(job.expires_at),
        "error": error,
        "prompt": job.request.get("prompt"),
        "seconds": f"{frames / fps:.2f}".rstrip("0").rstrip(".") if fps else "0",
        "size": f"{shape.get('width', 0)}x{shape.get('height', 0)}",
        "remixed_from_video_id": job.parent_id,
        "seed": job.request.get("seed"),
        "num_frames": frames,
        "fps": fps,
        "width": shape.get("width"),
        "height": shape.get("height"),
        "started_at": _whole(job.started_at),
        "queue_position": position if job.status == "queued" else None,
        "step": step if job.step_kind else None,
        "eta_s": None if eta is None else round(eta, 1),
        "attempts": job.attempts,
        "inference_time_s": result.get("inference_time_s"),
        "stage_durations": result.get("stage_durations"),
        "peak_memory_mb": result.get("peak_memory_mb"),
        "request": request_of(job),
        "media_type": result.get("media_type", "video/mp4"),
        "metadata": job.metadata,
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def request_of(job: Job) -> dict[str, Any]:
    """Fields that, posted again, make the same video."""
    fields = {name: v for name, v in job.request.items() if v is not None}
    request = {"model": job.model, **{n: v for n, v in fields.items() if not n.endswith(_HIDDEN)}}
    if job.input_kind is not None:
        request["input_reference"] = {"input_of": job.id}
    return request


def model_object(
    name: str, facts: Facts | None, created: float, settings: AppSettings
) -> dict[str, Any]:
    """A world as clients see it; what it takes is known once it is loaded."""
    world: dict[str, Any] = {"state": "loading"}
    if facts is not None:
        limits = dict(facts.limits)
        for limit, value in (
            ("max_frames", settings.max_frames),
            ("max_pixels", settings.max_pixels),
        ):
            if value is not None:
                limits[limit] = min(value, limits.get(limit) or value)
        defaults = facts.defaults
        size = defaults.get("width"), defaults.get("height")
        world = {
            "state": "ready",
            "family": facts.family,
            "inputs": list(facts.inputs),
            "sizes": [f"{w}x{h}" for w, h in limits.get("sizes") or [size]],
            "size": {
                "default": f"{size[0]}x{size[1]}",
                "multiple": limits.get("size_multiple"),  # None: one of `sizes` alone
                "max_width": limits.get("max_width", size[0]),
                "max_height": limits.get("max_height", size[1]),
            },
            "frames": {
                "default": defaults.get("num_frames", defaults.get("num_video_frames")),
                "multiple": limits.get("frames_multiple", 1),
                "maximum": limits.get("max_frames"),
            },
            "fps": defaults.get("fps"),
            "fields": {n: s for n, s in facts.fields.items() if not n.endswith(_HIDDEN)},
            "defaults": dict(defaults),
            "limits": limits,
            "guardrails": facts.guardrails,
            "previews": facts.previews,
            "max_batch_size": facts.max_batch_size,
        }
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "worldline",
        "worldline": world,
    }
