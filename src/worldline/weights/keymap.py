"""Names of released tensors and our own, as data that is read in both directions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from worldline.errors import CheckpointError
from worldline.weights.source import TensorInfo

_FIELD = re.compile(r"\{(\w+)\}")
_MOST_NAMES = 4  # of each kind in one message


def _expression(pattern: str) -> re.Pattern[str]:
    """Regular expression of a pattern; a field that stands twice must hold the same number."""
    parts: list[str] = []
    for index, part in enumerate(_FIELD.split(pattern)):
        if index % 2 == 0:
            parts.append(re.escape(part))
        else:
            group = rf"(?P<{part}>\d+)"
            parts.append(f"(?P={part})" if group in parts else group)
    return re.compile("".join(parts))


class _Table:
    """Patterns of one side to patterns of the other."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self.literal: dict[str, str] = {}
        self.patterns: list[tuple[re.Pattern[str], str]] = []
        for pattern, target in pairs:
            if _FIELD.search(pattern):
                self.patterns.append((_expression(pattern), target))
            else:
                self.literal[pattern] = target

    def get(self, name: str) -> str | None:
        if name in self.literal:
            return self.literal[name]
        for expression, target in self.patterns:
            if fields := expression.fullmatch(name):
                return target.format_map(fields.groupdict())
        return None


@dataclass(frozen=True)
class KeyMap:
    """Map between released names and ours.

    Attributes:
        rename: released pattern -> our pattern; "{i}" stands for an integer, and each field of one
            side must be on the other.
        drop: pattern (with `*`, as in file names) of released names that are skipped -> reason;
            it wins over `rename`.
        prefixes: what may stand before a released name; `released` writes the first.
    """

    rename: Mapping[str, str]
    drop: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("",)

    @cached_property
    def _to_ours(self) -> _Table:
        return _Table(self.rename.items())

    @cached_property
    def _to_released(self) -> _Table:
        return _Table((ours, released) for released, ours in self.rename.items())

    def find(self, name: str) -> tuple[str, str] | None:
        """Prefix of a released name, and our name for it; None if it is dropped or unknown."""
        if self.drops(name):
            return None
        for prefix in self.prefixes:
            if name.startswith(prefix):
                ours = self._to_ours.get(name[len(prefix) :])
                if ours is not None:
                    return prefix, ours
        return None

    def ours(self, name: str) -> str | None:
        """Our name of a released tensor; None if it is dropped.

        Raises:
            CheckpointError: the name is neither renamed nor dropped.
        """
        pair = self.find(name)
        if pair is None and not self.drops(name):
            raise CheckpointError(f"unknown tensor {name}")
        return pair[1] if pair else None

    def released(self, name: str, prefix: str | None = None) -> str:
        """Released name of one of our tensors.

        Raises:
            ValueError: the map has no such tensor.
        """
        released = self._to_released.get(name)
        if released is None:
            raise ValueError(f"the key map has no released name for {name!r}")
        return (self.prefixes[0] if prefix is None else prefix) + released

    def drops(self, name: str) -> bool:
        """Whether a released name is skipped."""
        forms = {name} | {name[len(p) :] for p in self.prefixes if name.startswith(p)}
        return any(fnmatchcase(form, pattern) for pattern in self.drop for form in forms)


def match(
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    keymap: KeyMap,
    source: str,
    optional: Collection[str] = (),
) -> dict[str, str]:
    """Pair every tensor of the model with one of the file; strict.

    Args:
        tensors: of the file.
        expected: our name -> shape.
        keymap: between the two.
        source: name of the file, for the message.
        optional: our names, or patterns with `*`, that the file may lack.

    Returns:
        Our name -> name in the file.

    Raises:
        CheckpointError: tensors are missing, unknown, doubled or of the wrong shape; all that is
            wrong in one message.
        ValueError: the key map does not know a tensor of the model.
    """
    for name in expected:
        keymap.released(name)  # a hole in the map is our mistake, whatever the file holds
    pairs: dict[str, str] = {}
    prefixes: Counter[str] = Counter()
    unknown: list[str] = []
    doubled: list[str] = []
    for name in tensors:
        prefix, ours = keymap.find(name) or ("", "")
        if ours in pairs:
            doubled.append(f"{pairs[ours]} and {name}")
        elif ours in expected:
            pairs[ours] = name
            prefixes[prefix] += 1
        elif ours or not keymap.drops(name):
            unknown.append(name)
    prefix = prefixes.most_common(1)[0][0] if prefixes else keymap.prefixes[0]
    problems = {
        "wrong shape": [
            f"{name} is {list(tensors[name].shape)} in the file, expected {list(expected[ours])}"
            for ours, name in pairs.items()
            if tensors[name].shape != tuple(expected[ours])
        ],
        "missing": [
            keymap.released(name, prefix)
            for name in expected
            if name not in pairs and not any(fnmatchcase(name, pattern) for pattern in optional)
        ],
        "unknown": unknown,
        "twice": doubled,
    }
    if wrong := [
        f"{len(names):,} {kind}: {_some(names)}" for kind, names in problems.items() if names
    ]:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(wrong)}")
    return pairs


def renamed_by(rules: Iterable[tuple[str, str]], name: str) -> str:
    """Name after regular expressions and their replacements, applied in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
