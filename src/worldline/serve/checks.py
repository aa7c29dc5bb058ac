"""Requests of clients against a loaded world, and the world's facts for forms."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from worldline.errors import InputError, InsufficientMemoryError, brief, did_you_mean, printable
from worldline.family import FAMILIES, requests_of
from worldline.files import check_path
from worldline.inputs import InputType, check_file
from worldline.request import Request
from worldline.serve.errors import ApiError
from worldline.serve.records import INPUT, Checked, Facts
from worldline.video.read import MediaInfo
from worldline.world import World

LOSSLESS = "lossless"  # field by which a client asks for frames bit for bit; of no world's request
KINDS: tuple[InputType | None, ...] = (None, "image", "video")
_MARK = "\0"  # around the names of fields in messages; values are escaped there
_OWN = ("seed", "prompt")  # fields in which the requests of a batch may differ
_SIZE = ("width", "height")
_LONGEST = 1 << 16  # frames up to which the longest video is sought


def fields_of(request: type[Request]) -> dict[str, FieldInfo]:
    """Fields that a client may state: those that name no files."""
    return {name: field for name, field in request.model_fields.items() if not _names_file(field)}


def _names_file(field: FieldInfo) -> bool:
    return any(isinstance(m, AfterValidator) and m.func is check_path for m in field.metadata)


def check(
    world: World, stated: Mapping[str, Any], kind: InputType | None, input: Path | None, info: Any
) -> Checked:
    """The request that a client states, with every field resolved.

    Args:
        world: loaded.
        stated: fields by name.
        kind: of the input.
        input: its file.
        info: measurements of the file, as of `MediaInfo`; None without.

    Raises:
        ApiError: a field is unknown or wrong, the input does not fit, or memory is too small.
    """
    family, fields = world.opened.family, dict(stated)
    lossless = fields.pop(LOSSLESS, False)
    if not isinstance(lossless, bool):
        message = f"{LOSSLESS} is {brief(lossless)}; give true or false"
        raise ApiError("invalid_value", message, LOSSLESS)
    fixed = {name: fields.pop(name) for name in (*_SIZE, "fps") if not _has(world, name, fields)}
    for name in fields:
        if name not in fields_of(family.request):
            raise _unknown(world, name)
    fields.setdefault("seed", secrets.randbelow(1 << 32))
    try:
        request = world.check(fields, kind, lambda name: f"{_MARK}{name}{_MARK}")
        if input is not None and info is not None:
            measured = MediaInfo(**{**info, "notes": tuple(info.get("notes", ()))})
            check_file(input, request, family.video(world.opened, request), measured)
    except InputError as error:
        raise refusal(world, error, stated, kind, input) from None
    shape = shape_of(world, request)
    _refuse_other(world, fixed, shape)
    values = as_json(request)
    key = batch_key(world, values, kind)
    return Checked({**values, **({LOSSLESS: True} if lossless else {})}, shape, key)


def _has(world: World, name: str, fields: Mapping[str, Any]) -> bool:
    """Whether a field is absent, or one of the world's requests."""
    return name not in fields or name in world.opened.family.request.model_fields


def _unknown(world: World, name: str) -> ApiError:
    """The error of a field that the world's requests do not have."""
    known = fields_of(world.opened.family.request)
    others = [family for family in FAMILIES if name in fields_of(requests_of(family).REQUEST)]
    label = brief(name, 40)
    if others:
        message = (
            f"{label}: {world.name} has no such field, worlds of family {' and '.join(others)} "
            "have it; leave it out"
        )
    else:
        close = did_you_mean(name.strip().lower().replace("-", "_"), [*known], 0.7)
        message = f"{label}: no such field{close or '; there are: ' + ', '.join(known)}"
    return ApiError("unknown_parameter", printable(message), printable(name, 64))


def _refuse_other(world: World, fixed: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    """Refuse a size or a frame rate other than the only one of a world."""
    for name, value in fixed.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value != shape[name]:
            words = f"fps is {brief(value)}; {world.name} makes {shape['fps']:g} frames a second"
            if name in _SIZE:
                size = f"{shape['width']}x{shape['height']}"
                words = f"{name} is {brief(value)}; {world.name} makes {size}"
            raise ApiError("invalid_value", f"{words}; leave it out", name)


def refusal(
    world: World,
    error: InputError,
    stated: Mapping[str, Any],
    kind: InputType | None,
    input: Path | None,
) -> ApiError:
    """The answer to a wrong request: its field by the message, which loses paths."""
    message, param = str(error), None
    about_file = input is not None and message.startswith(str(input))
    known = fields_of(world.opened.family.request)
    if about_file:
        param = INPUT
    elif marked := re.search(f"{_MARK}([^{_MARK}]*){_MARK}", message):
        param = marked[1]
    elif found := re.search(rf"\b({'|'.join(known)})\b", message):
        param = found[1]
    elif re.search(r"\b(inputs?|image|video)\b", message):
        param = INPUT
    elif isinstance(error, InsufficientMemoryError):
        param = "num_video_frames"
    message = re.sub(r" or \w+_embeddings\b", "", message.replace(_MARK, ""))
    missing = (param == "prompt" and stated.get("prompt") is None) or (
        param == INPUT and kind is None
    )
    code = "missing_parameter" if missing else "invalid_value"
    return ApiError(code, scrub(world, message, input), param)


def scrub(world: World, message: str, input: Path | str | None = None) -> str:
    """A message without paths of the server."""
    if input is not None:
        message = message.replace(str(input), INPUT)
    place = world.opened.place
    for path in (place.folder, *place.roots):
        for form in {str(path.absolute()), str(path)} - {".", "/", ""}:
            message = re.sub(rf"(?<![\w-]){re.escape(form)}(/[^\s:;,'\"]*)?", "…", message)
    return printable(re.sub(r"(?<![\w:/.])~?/[\w.+-]+(/[^\s:;,'\"]*)+", "…", message))


def as_json(request: Request) -> dict[str, Any]:
    """Values of a request that a client may state."""
    values = request.model_dump(mode="json", include={*fields_of(type(request))})
    return dict(values)


def shape_of(world: World, request: Any) -> dict[str, Any]:
    """Frames, size and frame rate of the video of a checked request."""
    video = world.opened.family.video(world.opened, request)
    size = {"num_frames": video.frames, "height": video.height, "width": video.width}
    return {**size, "fps": request.fps}


def batch_key(world: World, values: Mapping[str, Any], kind: InputType | None) -> str | None:
    """Hash that the requests of one batch share; None where none is made together."""
    if world.opened.family.generate_together is None or world.parts.compute.batch_size < 2:
        return None
    same = {name: value for name, value in values.items() if name not in _OWN}
    text = json.dumps([world.name, kind, same], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def facts(world: World, seconds: float) -> Facts:
    """Facts of a world that took so many seconds to load."""
    family = world.opened.family
    accepted = {
        (kind, prompt is not None): request
        for kind in KINDS
        for prompt in (None, "a ball rolls")
        if (request := _tried(world, {"prompt": prompt}, kind)) is not None
    }
    inputs = [
        kind or "none" for kind in KINDS if (kind, True) in accepted or (kind, False) in accepted
    ]
    if not accepted:
        raise InputError(f"{world.name} makes no video: a part that every request needs is missing")
    prompts = {prompted for _, prompted in accepted}
    [(kind, prompted), request] = next(iter(accepted.items()))
    base = {"prompt": "a ball rolls"} if prompted else {}
    values, shape = as_json(request), shape_of(world, request)
    schema = family.request.model_json_schema()["properties"]
    fields = {}
    for name in fields_of(family.request):
        if name == "prompt" and True not in prompts:
            continue
        if name == "step_cache" and _tried(world, {**base, name: "0.5"}, kind) is None:
            continue
        entry = {key: value for key, value in schema[name].items() if key != "title"}
        if name in values and name not in (*_OWN, "num_input_frames"):
            entry["default"] = values[name]
        elif name in (*_OWN, "num_input_frames"):
            entry.pop("default", None)
        fields[name] = entry
    fields[LOSSLESS] = {
        "type": "boolean",
        "default": False,
        "description": "Keep the frames bit for bit, too: content?variant=lossless.",
    }
    limits = dict(_limits(world, base, kind, shape))
    limits["prompt"] = (
        "none" if True not in prompts else "optional" if False in prompts else "required"
    )
    chosen = {name: value for name, value in values.items() if name not in _OWN}
    return Facts(
        name=world.name,
        family=family.name,
        inputs=inputs,
        fields=fields,
        limits=limits,
        defaults={**chosen, **shape},
        guardrails=world.guards.guardrails is not None,
        previews=not world.guards.checks_videos,
        max_batch_size=world.parts.compute.batch_size if family.generate_together else 1,
        load_seconds=round(seconds, 3),
    )


def _tried(world: World, options: Mapping[str, Any], kind: InputType | None) -> Any:
    """A checked request, whatever its memory; None where it is refused."""
    stated = {name: value for name, value in options.items() if value is not None}
    opened, family = world.opened, world.opened.family
    with suppress(InputError):
        return family.check(opened, family.request.make(stated, opened.defaults, kind))
    return None


def _limits(
    world: World, base: Mapping[str, Any], kind: InputType | None, shape: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Numbers that bound requests, found by trial."""
    temporal = world.opened["tokenizer"].config.temporal
    usual = shape["num_frames"]

    def possible(**fields: int) -> bool:
        if _tried(world, {**base, **fields}, kind) is None:
            return False
        with suppress(InputError):
            world.check({**base, **fields}, kind)
            return True
        return False

    counts = range(1 + (usual - 1) % temporal, usual + 1, temporal)
    yield "frames_multiple", temporal
    yield "min_frames", next((n for n in counts if possible(num_video_frames=n)), usual)
    low, high = 0, max(1, (_LONGEST - usual) // temporal)
    while low < high:
        middle = (low + high + 1) // 2
        if possible(num_video_frames=usual + middle * temporal):
            low = middle
        else:
            high = middle - 1
    yield "max_frames", usual + low * temporal
    sizes = [n for n in (8, 16, 32, 64) if "height" in world.opened.family.request.model_fields]
    steps = (n for n in sizes if any(possible(height=shape["height"] + s * n) for s in (-1, 1)))
    if (multiple := next(steps, None)) is None:
        yield "sizes", [[shape["width"], shape["height"]]]
        yield "max_pixels", shape["width"] * shape["height"]
        return
    yield "size_multiple", multiple
    longest = {}
    for side in _SIZE:
        low, high = 0, 1 << 10
        while low < high:
            middle = (low + high + 1) // 2
            wide = possible(**{side: shape[side] + middle * multiple})
            low, high = (middle, high) if wide else (low, middle - 1)
        longest[side] = shape[side] + low * multiple
        yield f"max_{side}", longest[side]
    yield "max_pixels", longest["width"] * longest["height"]
