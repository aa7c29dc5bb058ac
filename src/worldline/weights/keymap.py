"""Names of released tensors and our own, as data that is read in both directions."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from worldline.errors import CheckpointError
from worldline.weights.source import TensorInfo

_FIELD = re.compile(r"\{(\w+)\}")
_SHOWN = 4  # names of each kind in one message


def _expression(pattern: str) -> re.Pattern[str]:
    """Regular expression of a pattern; a field met twice must hold the same number."""
    parts: list[str] = []
    seen: set[str] = set()
    end = 0
    for found in _FIELD.finditer(pattern):
        parts.append(re.escape(pattern[end : found.start()]))
        parts.append(f"(?P={found[1]})" if found[1] in seen else rf"(?P<{found[1]}>\d+)")
        seen.add(found[1])
        end = found.end()
    parts.append(re.escape(pattern[end:]))
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
            found = expression.fullmatch(name)
            if found:
                return target.format_map(found.groupdict())
        return None


@dataclass(frozen=True)
class KeyMap:
    """Released names on the left, ours on the right.

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

    def __post_init__(self) -> None:
        if not self.prefixes:
            raise ValueError('prefixes is empty; use ("",) for none')
        for released, ours in self.rename.items():
            if set(_FIELD.findall(released)) != set(_FIELD.findall(ours)):
                raise ValueError(f"{released!r} and {ours!r} have different fields")
        if len(set(self.rename.values())) != len(self.rename):
            twice = [name for name, n in Counter(self.rename.values()).items() if n > 1]
            raise ValueError(f"two released names lead to {twice[0]!r}")

    @cached_property
    def _to_ours(self) -> _Table:
        return _Table(self.rename.items())

    @cached_property
    def _to_released(self) -> _Table:
        return _Table((ours, released) for released, ours in self.rename.items())

    def split(self, name: str) -> tuple[str, str] | None:
        """The prefix of a released name and our name for it; None if it is dropped.

        Raises:
            CheckpointError: the name is neither renamed nor dropped.
        """
        found = self.find(name)
        if found is not None or self.drops(name):
            return found
        near = difflib.get_close_matches(name, self._patterns, n=3, cutoff=0.0)
        raise CheckpointError(f"unknown tensor {name}; nearest known: {', '.join(near)}")

    def find(self, name: str) -> tuple[str, str] | None:
        """Do what `split` does; None also for a name that is not known."""
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
            CheckpointError: the name is neither; the three nearest known names are listed.
        """
        found = self.split(name)
        return None if found is None else found[1]

    def released(self, name: str, prefix: str | None = None) -> str:
        """The released name of one of our tensors.

        Raises:
            ValueError: the map has no such tensor.
        """
        found = self._to_released.get(name)
        if found is None:
            raise ValueError(f"the key map has no released name for {name!r}")
        return (self.prefixes[0] if prefix is None else prefix) + found

    def drops(self, name: str) -> bool:
        """Tell whether a released name is skipped."""
        forms = {name} | {name[len(p) :] for p in self.prefixes if name.startswith(p)}
        return any(fnmatchcase(form, pattern) for pattern in self.drop for form in forms)

    @cached_property
    def _patterns(self) -> list[str]:
        return [self.prefixes[0] + released for released in self.rename]


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def match(
    released_infos: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    keymap: KeyMap,
    source: str,
    optional: Collection[str] = (),
) -> dict[str, str]:
    """Pair every tensor of the model with one of the file; strict.

    Args:
        released_infos: what the file holds.
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
    for name in released_infos:
        found = keymap.find(name)
        if found is None:
            if not keymap.drops(name):
                unknown.append(name)
            continue
        prefix, ours = found
        if ours not in expected:
            unknown.append(name)
        elif ours in pairs:
            doubled.append(f"{pairs[ours]} and {name}")
        else:
            pairs[ours] = name
            prefixes[prefix] += 1
    if not pairs and expected and unknown:
        held = _some(sorted(released_infos))
        raise CheckpointError(
            f"{source} is of another model: none of its {len(released_infos):,} tensors "
            f"is known ({held})"
        )
    used = prefixes.most_common(1)[0][0] if prefixes else None
    missing = [
        keymap.released(name, used)
        for name in expected
        if name not in pairs and not any(fnmatchcase(name, pattern) for pattern in optional)
    ]
    wrong = [
        f"{name} is {list(released_infos[name].shape)} in the file, expected {list(expected[ours])}"
        for ours, name in pairs.items()
        if released_infos[name].shape != tuple(expected[ours])
    ]
    problems = []
    if wrong:
        problems.append(f"wrong shape: {_some(wrong)}")
    if missing:
        problems.append(f"{len(missing):,} missing: {_some(missing)}")
    if unknown:
        known = [keymap.released(name, used) for name in expected]
        near = {
            name: difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            for name in unknown[:_SHOWN]
        }
        shown = [f"{n} (nearest: {', '.join(near[n])})" if near.get(n) else n for n in unknown]
        problems.append(f"{len(unknown):,} unknown: {_some(shown)}")
    if doubled:
        problems.append(f"{len(doubled):,} twice: {_some(doubled)}")
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems)}")
    return pairs
