"""Documents: texts and JSON, whole or by lines, of bounded size and depth; needs no torch."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from worldline.errors import CheckpointError, brief, strerror
from worldline.files import readable_size

MAX_TEXT = 1 << 26  # bytes of a text that is read whole
MAX_ENTRIES = 100_000  # of a batch
MAX_PROBLEMS = 1000  # of a batch, behind which the others are not looked for
_DEEPEST = 100  # levels of nested values
# a string is kept whole, so that what looks like a comment in it stays
_STRING_OR_COMMENT = re.compile(r'"(?:[^"\\\n]|\\.)*+"|//[^\n]*')


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Text of a regular file, in UTF-8 or, as Windows writes it, in UTF-16.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger than `limit` bytes, not text, or no regular file.
    """
    if path.exists() and not path.is_file():  # a FIFO would wait for a writer
        raise ValueError("it is a folder" if path.is_dir() else "it is not a regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {readable_size(limit)}")
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start:,})") from None


def parse_json(text: str) -> Any:
    """Value of a JSON text; comments, from `//` to the end of a line, are left out.

    Raises:
        ValueError: it is no JSON, an object has a name twice, values are nested more than 100
            deep, or a number has thousands of digits.
    """
    try:
        value = json.loads(without_comments(text), object_pairs_hook=each_once)
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} deep") from None
    level = [value]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict | list):
                inner += each.values() if isinstance(each, dict) else each
        if not inner:
            return value
        level = inner
    raise ValueError(f"it is nested more than {_DEEPEST} deep")


def without_comments(text: str) -> str:
    """JSON without what follows `//` in a line, except in strings; lines stay lines."""
    if "//" not in text:
        return text
    return _STRING_OR_COMMENT.sub(lambda match: match[0] if match[0].startswith('"') else "", text)


def each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Fields of an object, in which no name may stand twice."""
    fields: dict[str, Any] = dict(pairs)
    if len(fields) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{brief(twice)} stands there twice")
    return fields


def read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file, such as a config.json.

    Raises:
        CheckpointError: the file cannot be read, or holds no object.
    """
    try:
        settings = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {strerror(error)}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings, but a {type(settings).__name__}")
    return settings


def listed(document: Any) -> Iterator[tuple[str, int, Any]]:
    """Entries of a document: "item", its number from 1 and its value; "", 1 and all of no list."""
    kind, values = ("item", document) if isinstance(document, list) else ("", [document])
    yield from ((kind, number, value) for number, value in enumerate(values, 1))


def read_entries(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Entries of a batch, a JSON document or JSON lines; contents decide, not the suffix.

    Each is "line", its number from 1 and its value, or a ValueError in place of one that cannot be
    read; of a document they are as of `listed`.

    Raises:
        OSError, ValueError: the file cannot be read, is empty, or is a damaged document.
    """

    def parse(piece: str) -> Any:
        try:
            value = parse_json(piece)
        except ValueError as error:
            return error
        return many if isinstance(value, list | dict) and len(value) > MAX_ENTRIES else value

    many = ValueError(f"it has more than {MAX_ENTRIES:,} entries")
    text = read_text(path)
    # not `splitlines`: some of the signs that end its lines may stand in a JSON string
    pieces = enumerate(text.split("\n"), 1)
    lines = ((number, line) for number, line in pieces if without_comments(line).strip())
    head, lined = [*islice(lines, 2)], path.suffix.lower() == ".jsonl"
    if not head:
        raise ValueError("it has no input")
    if not isinstance(parse(head[0][1]), dict) or (len(head) == 1 and not lined):
        document = parse(text)
        if not isinstance(document, ValueError):
            yield from listed(document)
            return
        if not lined or document is many:
            raise document
    for count, (number, line) in enumerate(chain(head, lines), 1):
        if count > MAX_ENTRIES:
            raise many
        yield "line", number, parse(line)
