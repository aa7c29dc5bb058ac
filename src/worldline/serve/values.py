"""Values of clients by JSON schemas; texts of forms get the types that their fields have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from worldline.errors import brief
from worldline.serve.errors import ApiError
from worldline.serve.forms import FormText

_NUMBER = re.compile(r"[+-]?(\d{1,400}\.?\d{0,400}|\.\d{1,400})([eE][+-]?\d{1,4})?", re.ASCII)


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
    raise ApiError("invalid_value", f"{message}; give {wanted}", name[:80])


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
    if reader := _READERS.get(str(schema.get("type"))):
        return reader(value, schema)
    return str(value) if isinstance(value, FormText) else value


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
    if isinstance(value, FormText):
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
