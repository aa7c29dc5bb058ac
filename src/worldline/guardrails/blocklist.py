"""The blocklist: words and phrases that no prompt may hold, with their spelling tricks.

Decisions are those of the released guardrails, which scan with better-profanity 0.7.0, scan again
after NLTK's lemmas, then look for whole words and for near matches. Two of their faults are not
kept: a prompt with an asterisk is not refused, and one at which they raise IndexError is.

Tokens and lemmas are those of NLTK 3.9.1, read from the data files beside the blocklist (NLTK 3.10
refuses the links of a hub cache). Sources: Punkt, Kiss and Strunk 2006 (sentences); the tokenizer
of the Penn Treebank; WordNet's morphology.
"""

from __future__ import annotations

import re
import string
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from worldline.errors import CheckpointError
from worldline.guardrails.base import Verdict

# characters of a prompt that count as a character of an entry
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
# The relation is not transitive (a and o share @ but not each other), so text and entries meet by a
# coarser key, in which all of these are one letter, and are then compared character by character.
_FOLD = str.maketrans("iouve@*4l103$57", "aaaaaaaaaaaasst")
_WORD = re.compile(r"[A-Za-z0-9@$*\"']+")
_MIN_JOINED = 5  # better-profanity's own list, always loaded, has entries of six words
_MARK = "\N{REPLACEMENT CHARACTER}"  # a prompt is ASCII by then
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_LETTERS = re.compile(r"\w+")


def _spells(text: str, entry: str) -> bool:
    """Whether every character of `text`, lower case, is that of `entry` or a stand-in for it."""
    return len(text) == len(entry) and all(
        a in _STAND_INS.get(b, b) for a, b in zip(text, entry, strict=True)
    )


class Censor:
    """The scan for entries that are misspelt or split."""

    def __init__(self, entries: Iterable[str], allowed: Iterable[str]) -> None:
        self.allowed = {word.lower() for word in allowed}
        self.entries: defaultdict[str, list[str]] = defaultdict(list)
        self.joined = _MIN_JOINED  # largest number of further words in one match
        for entry in {entry.lower() for entry in entries} - self.allowed - {""}:
            self.entries[entry.translate(_FOLD)].append(entry)
            self.joined = max(self.joined, len(_WORD.sub("", entry)))
        self.beginnings = {key[:end] for key in self.entries for end in range(1, len(key) + 1)}

    def refuses(self, text: str) -> bool:
        lower = text.lower()
        spans = self._matches(lower)
        words = [word.strip(string.punctuation) for word in lower.split()]
        if not spans or self.allowed.isdisjoint(words):
            return bool(spans)
        for start, stop in reversed(spans):
            text = f"{text[:start]}{_MARK}{text[stop:]}"
        marked = [_MARK in piece for piece in text.split()]
        # Allowed words are restored by their number in the prompt, although a match with spaces
        # has fewer pieces: the released rule, on which decisions depend.
        for number, word in enumerate(words):
            if word in self.allowed:
                if number >= len(marked):
                    return True
                marked[number] = False
        return any(marked)

    def _matches(self, text: str) -> list[tuple[int, int]]:
        """Start and end of every match in `text`, lower case."""
        keys = text.translate(_FOLD)
        if self.beginnings.isdisjoint(_WORD.findall(keys)):
            return []
        words = [match.span() for match in _WORD.finditer(text)]
        if words[0][0] == len(text) - 1:  # ignored, in the released rule
            return []
        spans: list[tuple[int, int]] = []
        for number, (start, end) in enumerate(words):
            if keys[start:end] in self.beginnings and (not spans or start >= spans[-1][1]):
                stop = self._match_end(text, words[number : number + 1 + self.joined])
                if stop:
                    spans.append((start, stop))
        return spans

    def _match_end(self, text: str, words: list[tuple[int, int]]) -> int:
        """End of the entry that begins with the first of `words`; 0 if there is none."""
        start, end = words[0]
        joined = text[start:end]
        separated = True  # whether the slice with its separators may still grow to an entry
        for following, stop in words[1:]:
            if following == len(text) - 1:  # ignored, in the released rule
                break
            joined += text[following:stop]
            separated = separated and self._begins(text[start:stop])
            if not separated and not self._begins(joined):
                break
            if self._contains(joined) or self._contains(text[start:stop]):
                return stop
        return end if self._contains(text[start:end]) else 0

    def _begins(self, text: str) -> bool:
        return text.translate(_FOLD) in self.beginnings

    def _contains(self, text: str) -> bool:
        entries = self.entries.get(text.translate(_FOLD))
        return entries is not None and any(_spells(text, entry) for entry in entries)


@dataclass(frozen=True)
class Nearness:
    """Near matches of a whole-word entry, which refuse a prompt too.

    Attributes:
        shortest: smallest number of characters of an entry that has near matches.
        insertion: one inserted character is near; else only equal words are, between spaces.
    """

    shortest: int
    insertion: bool


PREDICT = Nearness(shortest=6, insertion=False)  # a ratio of 1 - 0.4 / length means equality
COSMOS1 = Nearness(shortest=4, insertion=True)  # 1 - 0.5 / length also admits one insertion


class WholeWords:
    """Entries that refuse a prompt as whole words, or nearly so."""

    def __init__(self, entries: Iterable[str], near: Nearness) -> None:
        self.near = near
        self.entries: defaultdict[str, list[str]] = defaultdict(list)  # by their first word
        self.windows: defaultdict[int, set[str]] = defaultdict(set)  # by number of words
        for entry in {" ".join(entry.lower().split()) for entry in entries} - {""}:
            self.entries["".join(_LETTERS.findall(entry)[:1])].append(entry)
            if len(entry) >= near.shortest:
                self.windows[len(entry.split())].add(entry)
        self.lengths = {len(entry) for window in self.windows.values() for entry in window}

    def check(self, text: str) -> str:
        """Check that refuses: "exact", "partial", or "" if nothing is found."""
        words = text.lower().split()
        text = " ".join(words)
        for first in ("", *_LETTERS.findall(text)):
            for entry in self.entries.get(first, ()):
                if entry in text and re.search(rf"\b{re.escape(entry)}\b", text):
                    return "exact"
        for count, entries in self.windows.items():
            for start in range(len(words) - count + 1):
                window = " ".join(words[start : start + count])
                if window in entries:
                    return "partial"
                if self.near.insertion and len(window) - 1 in self.lengths:
                    shorter = (window[:i] + window[i + 1 :] for i in range(len(window)))
                    if not entries.isdisjoint(shorter):
                        return "partial"
        return ""


# --- sentences, words and lemmas

_NOT_IN_WORD = r"[)\";}\]*:@'({\[?!]"
_RUNS = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"
_PUNKT_WORD = re.compile(
    rf"{_RUNS}"
    rf"|(?=[^(\"`{{\[:;&#*@)}}\]\-,])\S+?(?=\s|$|{_NOT_IN_WORD}|{_RUNS}|,(?=$|\s|{_NOT_IN_WORD}|{_RUNS}))"
    r"|\S"
)
_END = re.compile(rf"[.?!](?=(?P<after>{_NOT_IN_WORD}|\s+(?P<next>\S+)))")
_CLOSING = re.compile(r"[\"')\]}]+?(?:\s+|(?=--)|$)", re.MULTILINE)
_LAST_SPACE = re.compile(r"\s(?=\S*\Z)")
_NUMBER = re.compile(r"-?[.,]?\d[\d,.\-]*\.?")
_INITIAL = re.compile(r"[^\W\d]\.")

# how a word occurred in training, at a sentence's start or inside it, upper or lower case
_INSIDE_UPPER = 4
_UPPER = 2 | _INSIDE_UPPER | 8
_START_LOWER = 16
_LOWER = _START_LOWER | 32 | 64

# text without which the rule cannot match, the rule, its replacement
_RULES = (
    ("`", re.compile(r"(`+)"), r" \1 "),
    ('"', re.compile(r'^"'), "``"),
    ("``", re.compile(r"(``)"), r" \1 "),
    ("", re.compile(r"([ (\[{<])(?:\"|'')"), r"\1 `` "),
    ("'", re.compile(r"(?i)'(?!re|ve|ll|m|t|s|d|n)(\w)\b"), r"' \1"),
    # possessive: a run of spaces would else be parted in every way, which takes its length squared
    (".", re.compile(r"([^.])(\.)([\])}>\"' ]*+)\s*$"), r"\1 \2 \3 "),
    ("", re.compile(r"([:,])([^\d])"), r" \1 \2"),
    ("", re.compile(r"([:,])$"), r" \1 "),
    ("..", re.compile(r"\.{2,}"), r" \g<0> "),
    ("", re.compile(r"[;@#$%&]"), r" \g<0> "),
    (".", re.compile(r"([^.])(\.)([\])}>\"']*)\s*$"), r"\1 \2\3 "),
    ("", re.compile(r"[?!]"), r" \g<0> "),
    ("' ", re.compile(r"([^'])' "), r"\1 ' "),
    ("*", re.compile(r"[*]"), r" \g<0> "),
    ("", re.compile(r"[\]\[(){}<>]"), r" \g<0> "),
    ("--", re.compile(r"--"), r" -- "),
    ("", re.compile(r"\A|\Z"), " "),
    ("''", re.compile(r"''"), " '' "),
    ('"', re.compile(r'"'), " '' "),
    ("", re.compile(r"\s+"), " "),
    ("'", re.compile(r"([^' ])('[sSmMdD]|') "), r"\1 \2 "),
    ("'", re.compile(r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) "), r"\1 \2 "),
)
_JOINED = tuple(
    re.compile(rf"(?i){words}")
    for words in (
        r"\b(can)(not)\b",
        r"\b(d)('ye)\b",
        r"\b(gim)(me)\b",
        r"\b(gon)(na)\b",
        r"\b(got)(ta)\b",
        r"\b(lem)(me)\b",
        r"\b(more)('n)\b",
        r"\b(wan)(na)(?=\s)",
        r" ('t)(is)\b",
        r" ('t)(was)\b",
    )
)
_ANY_JOINED = re.compile("|".join(pattern.pattern[4:] for pattern in _JOINED), re.IGNORECASE)

_SUFFIXES = (
    ("s", ""),
    ("ses", "s"),
    ("ves", "f"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
)


def split_words(sentence: str) -> list[str]:
    """Words and marks of one ASCII sentence; `"` becomes two quotes or backquotes."""
    for text, pattern, replacement in _RULES:
        if text in sentence:
            sentence = pattern.sub(replacement, sentence)
    if _ANY_JOINED.search(sentence):
        for pattern in _JOINED:
            sentence = pattern.sub(r" \1 \2 ", sentence)
    return sentence.split()


class Words:
    """Sentences, tokens and noun lemmas of a text, from the tables of a folder of NLTK data.

    Attributes:
        abbreviations: lower case, without their period.
        collocations: pairs of words that a period does not part.
        starters: words that often begin a sentence.
        occurrences: ways in which each word occurred in training, as bits.
        nouns: known to WordNet.
        irregular: noun form -> nouns.
    """

    def __init__(self, folder: Path) -> None:
        punkt, wordnet = folder / "tokenizers" / "punkt_tab", folder / "corpora" / "wordnet"
        self.abbreviations = set(_table(punkt, "english/abbrev_types.txt"))
        pairs = (line.split("\t") for line in _table(punkt, "english/collocations.tab"))
        self.collocations = {tuple(pair[:2]) for pair in pairs}
        self.starters = set(_table(punkt, "english/sent_starters.txt"))
        self.occurrences: defaultdict[str, int] = defaultdict(int)
        for line in _table(punkt, "english/ortho_context.tab"):
            word, _, bits = line.partition("\t")
            if not bits.strip().isdigit():
                raise CheckpointError(f"{punkt}/english/ortho_context.tab: no number in {line!r}")
            self.occurrences[word] = int(bits)
        index = _table(wordnet, "index.noun")
        self.nouns = {line.split(" ", 1)[0] for line in index if not line.startswith(" ")}
        exceptions = (line.split() for line in _table(wordnet, "noun.exc"))
        self.irregular = {forms[0]: forms[1:] for forms in exceptions}

    def tokens(self, text: str) -> list[str]:
        return [word for sentence in self.sentences(text) for word in split_words(sentence)]

    def lemmas(self, text: str) -> list[str]:
        """Tokens with each known noun in its shortest form."""
        return [self._lemma(token) for token in self.tokens(text)]

    def _lemma(self, word: str) -> str:
        forms = self.irregular.get(word)
        if forms is None:
            if word[-1:] not in ("s", "n"):  # no suffix rule fits
                return word
            forms = [word.removesuffix(a) + b for a, b in _SUFFIXES if word.endswith(a)]
        forms = [form for form in (word, *forms) if form in self.nouns]
        return min(forms, key=len, default=word)

    def sentences(self, text: str) -> list[str]:
        sentences: list[str] = []
        slices = list(self._slices(text))
        shift = 0
        for (start, stop), (following, end) in pairwise([*slices, (len(text), len(text))]):
            start += shift
            shift = 0
            closing = _CLOSING.match(text[following:end])
            if closing:  # quotes and brackets stay with what they close
                stop = following + len(closing[0].rstrip())
                shift = closing.end()
            if text[start:stop]:
                sentences.append(text[start:stop])
        return sentences

    def _slices(self, text: str) -> Iterator[tuple[int, int]]:
        start = 0
        for end, context in self._candidates(text):
            words = [w for line in context.split("\n") for w in _PUNKT_WORD.findall(line.strip())]
            if any(self._ends_sentence(word, following) for word, following in pairwise(words)):
                yield start, end.end()
                start = end.start("next") if end["next"] else end.end()
        yield start, len(text.rstrip())

    def _candidates(self, text: str) -> Iterator[tuple[re.Match[str], str]]:
        """Each possible end of a sentence with the words around it; of touching ones the last."""
        before = (0, 0)
        previous: re.Match[str] | None = None
        for end in _END.finditer(text):
            space = _LAST_SPACE.search(text, before[1], end.start())
            # A space at the very start counts as none, as in the original.
            word = space.end() if space and space.start() > before[1] else before[0]
            if previous is not None and before[1] <= word:
                yield previous, text[slice(*before)] + previous[0] + previous["after"]
            previous, before = end, (word, end.start())
        if previous is not None:
            yield previous, text[slice(*before)] + previous[0] + previous["after"]

    def _ends_sentence(self, word: str, following: str) -> bool:
        dots = word.startswith("..") and set(word) == {"."}
        abbreviation = self._is_abbreviation(word)
        ends = self._ends_alone(word)
        if not word.endswith("."):
            return ends
        stem, key = _stem(word), self._key(following)
        if (stem, key) in self.collocations:
            return False
        initial = _INITIAL.fullmatch(word) is not None
        upper = following[0].isupper()
        starts = self._starts_sentence(following, key)
        if (abbreviation or dots) and not initial and (starts or (upper and key in self.starters)):
            return True
        if initial or stem == "##number##":
            never_lower = not self.occurrences.get(key, 0) & _LOWER
            if starts is False or (starts is None and initial and upper and never_lower):
                return False
        return ends

    def _is_abbreviation(self, word: str) -> bool:
        if len(word) < 2 or not word.endswith(".") or word.endswith(".."):
            return False
        word = word[:-1].lower()
        return not self.abbreviations.isdisjoint({word, word.rpartition("-")[2]})

    def _ends_alone(self, word: str) -> bool:
        """Whether a word ends a sentence, whatever follows."""
        if word in (".", "?", "!"):
            return True
        return word.endswith(".") and not word.endswith("..") and not self._is_abbreviation(word)

    def _key(self, word: str) -> str:
        return _stem(word) if self._ends_alone(word) else _kind(word)

    def _starts_sentence(self, word: str, key: str) -> bool | None:
        """Whether a sentence starts with the word, by its case; None if that is unknown."""
        if word in (";", ":", ",", ".", "!", "?"):
            return False
        occurrences = self.occurrences.get(key, 0)
        if word[0].isupper() and occurrences & _LOWER and not occurrences & _INSIDE_UPPER:
            return True
        if word[0].islower() and (occurrences & _UPPER or not occurrences & _START_LOWER):
            return False
        return None


def _kind(word: str) -> str:
    return "##number##" if _NUMBER.fullmatch(word) else word.lower()


def _stem(word: str) -> str:
    kind = _kind(word)
    return kind[:-1] if len(kind) > 1 and kind.endswith(".") else kind


def _table(package: Path, name: str) -> list[str]:
    """Lines of a file of a package, unpacked or zipped, without blank ones."""
    path = package / name
    try:
        if path.is_file():
            data = path.read_bytes()
        else:
            with zipfile.ZipFile(package.with_name(f"{package.name}.zip")) as archive:
                data = archive.read(f"{package.name}/{name}")
        return [line for line in data.decode("utf-8").split("\n") if line.strip()]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


class Blocklist:
    """The text guardrail of a folder `blocklist`: custom, whitelist, exact_match, nltk_data.

    `check` refuses with "empty", "censor", "censor_lemma", "exact" or "partial".
    """

    name = "blocklist"
    networks = ()

    def __init__(self, folder: Path, near: Nearness = PREDICT) -> None:
        custom, exact = _entries(folder / "custom"), _entries(folder / "exact_match")
        if not any(custom) and not any(exact):
            raise CheckpointError(f"{folder} lists no words")
        self.words = Words(folder / "nltk_data")
        self.censor = Censor(custom, _entries(folder / "whitelist"))
        self.whole_words = WholeWords(exact, near)

    def check(self, text: str) -> Verdict:
        if not text:
            return Verdict(False, "empty")
        text = _NOT_ASCII.sub(" ", text)
        if self.censor.refuses(text):
            return Verdict(False, "censor")
        if self.censor.refuses(" ".join(self.words.lemmas(text))):
            return Verdict(False, "censor_lemma")
        check = self.whole_words.check(text)
        return Verdict(not check, check)


def _entries(folder: Path) -> list[str]:
    """Stripped lines of all files of a folder."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        text = [path.read_text(encoding="utf-8") for path in files]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return [line.strip() for each in text for line in each.splitlines()]
