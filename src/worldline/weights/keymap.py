"""Names of released tensors and our own, as data that is read in both directions."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property
from typing import Literal

from torch import Tensor

from worldline.errors import CheckpointError

_MOST_NAMES = 4  # of each kind in one message


def _translate(table: Mapping[str, str], name: str) -> str | None:
    """Name by a table of patterns; None if there is none."""
    if name in table:
        return table[name]
    for pattern, target in table.items():
        if "{" in pattern and (fields := _expression(pattern).fullmatch(name)):
            return target.format_map(fields.groupdict())
    return None


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(pattern)))


@dataclass(frozen=True)
class KeyMap:
    """Map between released names and ours.

    Attributes:
        rename: released pattern -> our pattern; "{i}" stands for an integer, and each field stands
            once on either side.
        drop: pattern (with `*`, as in file names) of other released names that are skipped ->
            reason.
        prefixes: what may stand before a released name; `released` writes the first.
        bare: patterns of released names that never have one; all others have the same.
    """

    rename: Mapping[str, str]
    drop: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("",)
    bare: tuple[str, ...] = ()

    @cached_property
    def _released(self) -> dict[str, str]:
        return {ours: released for released, ours in self.rename.items()}

    @property
    def anchor(self) -> str:
        """A released name without a prefix, by which `take_network` finds a set of weights."""
        return next(iter(self.rename))

    def ours(self, name: str) -> str | None:
        """Our name of a released tensor; None if it is dropped or unknown."""
        for prefix in self.prefixes:
            if name.startswith(prefix) and (
                ours := _translate(self.rename, name.removeprefix(prefix))
            ):
                return ours
        return None

    def released(self, name: str, prefix: str | None = None) -> str:
        """Released name of one of our tensors, which the map must have."""
        released = self.find(name)
        if released is None:
            raise ValueError(f"the key map has no released name for {name!r}")
        return (self.prefixes[0] if prefix is None else prefix) + released

    def find(self, name: str) -> str | None:
        """Released name without a prefix of one of our tensors; None if there is none."""
        return _translate(self._released, name)

    def drops(self, name: str) -> bool:
        """Whether a released name is skipped."""
        return any(matches(name.removeprefix(prefix), self.drop) for prefix in ("", *self.prefixes))


@dataclass(frozen=True)
class LoRARecipe:
    """How a family's own trainer adapts a network, and names what it saves.

    Attributes:
        targets: patterns of our names of matrices.
        rank: of each product.
        scale: its factor; alpha / rank where the trainer has an alpha.
        start: distribution of down before the first step: "normal", of deviation 1 / rank, or
            "uniform", up to columns ** -0.5; up is 0.
        ends: of the names of down and up.
    """

    targets: tuple[str, ...]
    rank: int
    scale: float = 1.0
    start: Literal["normal", "uniform"] = "uniform"
    ends: tuple[str, str] = (".lora_A.default.weight", ".lora_B.default.weight")


def match(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    keymap: KeyMap,
    source: object,
    optional: Collection[str] = (),
    integers: Collection[str] = (),
) -> dict[str, str]:
    """Pair every tensor of a model with one of a file; strict.

    Args:
        tensors: of the file.
        expected: our name -> shape.
        keymap: between the two.
        source: the file, for the message.
        optional: our names, or patterns with `*`, that the file may lack.
        integers: our names of tensors that are not of floating point.

    Returns:
        Our name -> name in the file.

    Raises:
        CheckpointError: tensors are missing, unknown, doubled, of the wrong shape, quantised to
            integers or of several sets; all that is wrong in one message.
    """
    pairs: dict[str, str] = {}
    unknown: list[str] = []
    doubled: list[str] = []
    for name in tensors:
        ours = keymap.ours(name) or ""
        if ours in pairs:
            doubled.append(f"{pairs[ours]} and {name}")
        elif ours in expected:
            pairs[ours] = name
        elif ours or not keymap.drops(name):
            unknown.append(name)
    prefixed = [name for name in pairs.values() if not matches(name, keymap.bare)]
    fronts = [max(filter(name.startswith, keymap.prefixes), key=len) for name in prefixed]
    problems = {
        "of another set": [n for n, f in zip(prefixed, fronts, strict=True) if f != fronts[0]],
        "wrong shape": [
            f"{name} is {list(tensors[name].shape)} in the file, expected {list(expected[ours])}"
            for ours, name in pairs.items()
            if tensors[name].shape != expected[ours]
        ],
        "wrong dtype": [
            f"{name} is {tensors[name].dtype} in the file, expected "
            f"{'integers' if ours in integers else 'floating point (quantised is not read)'}"
            for ours, name in pairs.items()
            if tensors[name].is_floating_point() == (ours in integers)
        ],
        "missing": [
            keymap.released(ours)
            for ours in expected
            if ours not in pairs and not matches(ours, optional)
        ],
        "unknown": unknown,
        "twice": doubled,
    }
    if wrong := [
        f"{len(names):,} {kind}: {', '.join(names[:_MOST_NAMES])}"
        for kind, names in problems.items()
        if names
    ]:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(wrong)}")
    return pairs


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is among names, or patterns with `*`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def renamed_by(rules: Mapping[str, str], name: str) -> str:
    """Name after regular expressions and their replacements, applied in order."""
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name
