"""The blocklist: words and phrases that no prompt may hold, with their spelling tricks.

Decisions are those of the released guardrails, which scan with better-profanity 0.7.0, scan again
after NLTK's lemmas, then look for whole words and for near matches. Two of their faults are not
kept: a prompt with an asterisk is no refusal, and where they raise IndexError this one refuses.
"""

from __future__ import annotations

import logging
import re
import string
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from worldline.errors import CheckpointError
from worldline.guardrails.base import Verdict
from worldline.guardrails.words import Words

logger = logging.getLogger(__name__)

# what may stand in a prompt for a character of an entry
_STAND_INS = {
    "a": "a@*4",
    "i": "i*l1",
    "o": "o*0@",
    "u": "u*v",
    "v": "v*u",
    "l": "l1",
    "e": "e*3",
    "s": "s$5",
    "t": "t7",
}
# Standing in is not transitive (a and o share @ but not each other), so text and entries meet by a
# coarser key, in which all of these are one letter, and are then compared character by character.
_FOLD = str.maketrans("iouve@*4l103$57", "aaaaaaaaaaaasst")
_WORD = re.compile(r"[A-Za-z0-9@$*\"']+")
_FEWEST_JOINED = 5  # better-profanity's own list, always loaded, has entries of six words
_MARK = "\N{REPLACEMENT CHARACTER}"  # a prompt is ASCII by then
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_FIRST_RUN = re.compile(r"\w+")


def _stands_for(text: str, entry: str) -> bool:
    """Tell whether every character of `text`, lower case, may stand for that of `entry`."""
    return len(text) == len(entry) and all(
        given in _STAND_INS.get(wanted, wanted) for given, wanted in zip(text, entry, strict=True)
    )


class Censor:
    """The scan for entries that are misspelt or split."""

    def __init__(self, entries: Iterable[str], allowed: Iterable[str]) -> None:
        self.allowed = {word.lower() for word in allowed}
        self.entries: defaultdict[str, list[str]] = defaultdict(list)
        self.joined = _FEWEST_JOINED  # how many words further one match may reach
        for entry in {entry.lower() for entry in entries} - self.allowed - {""}:
            self.entries[entry.translate(_FOLD)].append(entry)
            self.joined = max(self.joined, len(_WORD.sub("", entry)))
        self.beginnings = {key[:end] for key in self.entries for end in range(1, len(key) + 1)}

    def refuses(self, text: str) -> bool:
        lower = text.lower()
        spans = self._matches(lower)
        if not spans:
            return False
        words = [word.strip(string.punctuation) for word in lower.split()]
        if self.allowed.isdisjoint(words):
            return True
        pieces: list[str] = []
        end = 0
        for start, stop in spans:
            pieces += (text[end:start], _MARK)
            end = stop
        marked = [_MARK in piece for piece in "".join((*pieces, text[end:])).split()]
        # Allowed words are given back by their number in the prompt, although a match that held
        # spaces has fewer pieces: the released rule, on which decisions depend.
        for number, word in enumerate(words):
            if word in self.allowed:
                if number >= len(marked):
                    return True
                marked[number] = False
        return any(marked)

    def _matches(self, text: str) -> list[tuple[int, int]]:
        """Return start and end of every match in `text`, lower case."""
        keys = text.translate(_FOLD)
        if self.beginnings.isdisjoint(_WORD.findall(keys)):
            return []
        words = [found.span() for found in _WORD.finditer(text)]
        last = len(text) - 1
        if words[0][0] == last:
            return []
        spans: list[tuple[int, int]] = []
        for number, (start, end) in enumerate(words):
            if keys[start:end] not in self.beginnings or (spans and start < spans[-1][1]):
                continue
            spliced, key = text[start:end], keys[start:end]
            raw = True  # the slice with its separators may still grow to an entry
            for following, stop in words[number + 1 : number + 1 + self.joined]:
                if following == last:  # not seen, in the released rule
                    break
                spliced += text[following:stop]
                key += keys[following:stop]
                raw = raw and keys[start:stop] in self.beginnings
                if not raw and key not in self.beginnings:
                    break
                if self._listed(spliced, key) or (
                    raw and self._listed(text[start:stop], keys[start:stop])
                ):
                    spans.append((start, stop))
                    break
            if not (spans and spans[-1][0] == start) and self._listed(
                text[start:end], keys[start:end]
            ):
                spans.append((start, end))
        return spans

    def _listed(self, text: str, key: str) -> bool:
        if key not in self.entries:  # most often
            return False
        return any(_stands_for(text, entry) for entry in self.entries[key])


@dataclass(frozen=True)
class Nearness:
    """How unlike a whole-word entry a text may be.

    Attributes:
        shortest: characters of an entry for which near matches count.
        insertion: one inserted character is near; else only equal words are, without the rule that
            a word ends where its letters end.
    """

    shortest: int
    insertion: bool


PREDICT = Nearness(shortest=6, insertion=False)  # a ratio of 1 - 0.4 / length means equality
COSMOS1 = Nearness(shortest=4, insertion=True)  # 1 - 0.5 / length also admits one insertion


class Listed:
    """Entries that refuse a prompt as whole words, or nearly so."""

    def __init__(self, entries: Iterable[str], near: Nearness) -> None:
        self.near = near
        self.by_start: defaultdict[str, list[str]] = defaultdict(list)
        self.others: list[str] = []
        self.windows: defaultdict[int, set[str]] = defaultdict(set)  # by number of words
        for entry in {" ".join(entry.lower().split()) for entry in entries}:
            start = _FIRST_RUN.match(entry)
            if start:
                self.by_start[start[0]].append(entry)
            elif entry:
                self.others.append(entry)
            if len(entry) >= near.shortest:
                self.windows[len(entry.split())].add(entry)
        self.lengths = {len(entry) for held in self.windows.values() for entry in held}

    def check(self, text: str) -> str:
        """Return "exact", "partial", or "" if nothing is found."""
        words = text.lower().split()
        text = " ".join(words)
        for found in _FIRST_RUN.finditer(text):
            for entry in self.by_start.get(found[0], ()):
                if text.startswith(entry, found.start()) and _bounded(text, found.start(), entry):
                    return "exact"
        for entry in self.others:
            if entry in text and re.search(rf"\b{re.escape(entry)}\b", text):
                return "exact"
        for count, entries in self.windows.items():
            for start in range(len(words) - count + 1):
                window = " ".join(words[start : start + count])
                if window in entries:
                    return "partial"
                if (
                    self.near.insertion
                    and len(window) - 1 in self.lengths
                    and not entries.isdisjoint(_without(window))
                ):
                    return "partial"
        return ""


def _bounded(text: str, start: int, entry: str) -> bool:
    """Tell whether `entry`, found at `start` where letters begin, ends where letters end."""
    end = start + len(entry)
    last, after = entry[-1], text[end : end + 1]
    return bool(_FIRST_RUN.match(last)) != bool(_FIRST_RUN.match(after))


def _without(text: str) -> list[str]:
    return [text[:i] + text[i + 1 :] for i in range(len(text))]


class Blocklist:
    """The text guard of the folder `blocklist`.

    `check` refuses with "empty", "censor", "censor_lemma", "exact" or "partial".
    """

    name = "blocklist"
    networks = ()

    def __init__(self, folder: Path, near: Nearness = PREDICT) -> None:
        """Read the lists and the language data of `folder`.

        Args:
            folder: holds custom, whitelist, exact_match and nltk_data.
            near: `PREDICT`, or `COSMOS1` for Cosmos 1.0.

        Raises:
            CheckpointError: one is absent or unreadable, or no entry is listed.
        """
        custom, exact = _entries(folder / "custom"), _entries(folder / "exact_match")
        if not any(custom) and not any(exact):
            raise CheckpointError(f"{folder} lists no words")
        if "" in exact:
            logger.warning("%s has blank lines; they are left out", folder / "exact_match")
        self.words = Words(folder / "nltk_data")
        self.censor = Censor(custom, _entries(folder / "whitelist"))
        self.listed = Listed(exact, near)

    def check(self, text: str) -> Verdict:
        if not text:
            return Verdict(False, "empty")
        text = _NOT_ASCII.sub(" ", text)
        if self.censor.refuses(text):
            return Verdict(False, "censor")
        if self.censor.refuses(" ".join(self.words.lemmas(text))):
            return Verdict(False, "censor_lemma")
        found = self.listed.check(text)
        return Verdict(not found, found)


def _entries(folder: Path) -> list[str]:
    """Return the lines of all files of a folder, stripped."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        text = [path.read_text(encoding="utf-8") for path in files]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return [line.strip() for each in text for line in each.splitlines()]
