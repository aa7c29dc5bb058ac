"""The blocklist: words and phrases that no prompt may hold, with their spelling tricks.

Decisions are those of the released guardrails, which scan with better-profanity 0.7.0, scan again
after NLTK's lemmas, then look for whole words and for near matches. Two of their faults are not
kept: a prompt with an asterisk is not refused, and one at which they raise IndexError is.

Tokens and lemmas are those of NLTK 3.9.1, read from the data files beside the blocklist (NLTK 3.10
refuses the links of a hub cache). Sources: Punkt, Kiss and Strunk 2006 (sentences); the tokenizer
of the Penn Treebank; WordNet's morphology.
"""

import codecs
import itertools
import re
import string
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from worldline.documents import MAX_TEXT
from worldline.errors import CheckpointError, strerror
from worldline.files import refuse_broken
from worldline.guardrails.base import Verdict
from worldline.guardrails.look_alikes import latin, readings

# characters of a prompt that count as a character of an entry
_STAND_INS = dict(
    zip("aiouvlest", ("@*4", "*l1", "*0@", "*v", "*u", "1", "*3", "$5", "7"), strict=True)
)
# The relation is not transitive (a and o share @ but not each other), so text and entries meet by a
# coarser key, in which all of these are one letter, and are then compared character by character.
_FOLD = str.maketrans("iouve@*4l103$57", "aaaaaaaaaaaasst")
_WORD = re.compile(r"[A-Za-z0-9@$*\"']+")
_MIN_JOINED = 5  # better-profanity's own list, always loaded, has entries of six words
_MARK = "\N{REPLACEMENT CHARACTER}"  # a prompt is ASCII by then


class Censor:
    """The scan for entries that are misspelt or split."""

    def __init__(self, entries: Iterable[str], allowed: Iterable[str]) -> None:
        self.allowed = {word.lower() for word in allowed}
        self.entries: defaultdict[str, list[str]] = defaultdict(list)
        self.joined = _MIN_JOINED  # largest number of further words in one match
        for entry in {entry.lower() for entry in entries} - self.allowed - {""}:
            self.entries[entry.translate(_FOLD)].append(entry)
            self.joined = max(self.joined, len(_WORD.sub("", entry)))
        # most words of a prompt begin no entry, and need no second look
        self.beginnings = {key[:end] for key in self.entries for end in range(len(key) + 1)}

    def refuses(self, text: str) -> bool:
        lower = text.lower()
        spans = self._matches(lower)
        for start, stop in reversed(spans):
            text = f"{text[:start]}{_MARK}{text[stop:]}"
        marked = {number for number, piece in enumerate(text.split()) if _MARK in piece}
        # Allowed words are restored by their number in the prompt, although a match with spaces
        # has fewer pieces: the released rule, which fails where there is no such piece.
        words = (word.strip(string.punctuation) for word in lower.split())
        allowed = {number for number, word in enumerate(words) if word in self.allowed}
        return bool(spans and (marked - allowed or max(allowed, default=0) >= len(text.split())))

    def _matches(self, text: str) -> list[tuple[int, int]]:
        """Start and end of every match in `text`, lower case."""
        words = [match.span() for match in _WORD.finditer(text)]
        if not words or words[0][0] == len(text) - 1:  # ignored, in the released rule
            return []
        spans: list[tuple[int, int]] = []
        for number, (start, end) in enumerate(words):
            begins = text[start:end].translate(_FOLD) in self.beginnings
            if not begins or (spans and start < spans[-1][1]):
                continue
            if stop := self._match_end(text, words[number : number + 1 + self.joined]):
                spans.append((start, stop))
        return spans

    def _match_end(self, text: str, words: list[tuple[int, int]]) -> int:
        """End of the entry that begins with the first of `words`; 0 if there is none."""
        start, end = words[0]
        joined = text[start:end]
        for following, stop in words[1:]:
            if following == len(text) - 1:  # ignored, in the released rule
                break
            joined += text[following:stop]
            if self._contains(joined) or self._contains(text[start:stop]):
                return stop
        return end if self._contains(text[start:end]) else 0

    def _contains(self, text: str) -> bool:
        """Whether each character is that of an entry, or stands in for it."""
        return any(
            all(a == b or a in _STAND_INS.get(b, "") for a, b in zip(text, entry, strict=True))
            for entry in self.entries.get(text.translate(_FOLD), ())
        )


@dataclass(frozen=True)
class Nearness:
    """Near matches of a whole-word entry, which refuse a prompt too."""

    shortest: int  # characters of an entry that has near matches
    insertion: bool  # one inserted character is near; else only equal words are, between spaces


PREDICT = Nearness(shortest=6, insertion=False)  # a ratio of 1 - 0.4 / length means equality
COSMOS1 = Nearness(shortest=4, insertion=True)  # 1 - 0.5 / length also admits one insertion


class WholeWords:
    """Entries that refuse a prompt as whole words, or nearly so."""

    def __init__(self, entries: Iterable[str], near: Nearness) -> None:
        self.entries = {" ".join(entry.lower().split()) for entry in entries} - {""}
        self.near = {entry for entry in self.entries if len(entry) >= near.shortest}
        self.counts = {len(entry.split()) for entry in self.near}
        # length of a window that may have a character too many
        self.longest = 1 + max(map(len, self.near), default=0) if near.insertion else 0

    def check(self, text: str) -> str:
        """Check that refuses: "exact", "partial", or "" if nothing is found."""
        words = text.lower().split()
        text = " ".join(words)
        for entry in self.entries:
            if entry in text and re.search(rf"\b{re.escape(entry)}\b", text):
                return "exact"
        for start, count in itertools.product(range(len(words)), self.counts):
            window = " ".join(words[start : start + count])
            forms = {window}
            if len(window) <= self.longest:  # the number of words stays
                forms |= {window[:i] + window[i + 1 :] for i, c in enumerate(window) if c != " "}
            if not self.near.isdisjoint(forms):
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

# bits: how a word occurred in training, upper or lower case, at a sentence's start or inside it
_INSIDE_UPPER, _UPPER, _START_LOWER, _LOWER = 4, 2 | 4 | 8, 16, 16 | 32 | 64

# one after another; with spaces around them, words and marks are apart
_RULES = {
    r"``?": r" \g<0> ",
    r'^"': " `` ",
    r"([ (\[{<])(?:\"|'')": r"\1 `` ",
    r"(?i)'(?!re|ve|ll|m|t|s|d|n)(\w)\b": r"' \1",
    # possessive: a run of spaces would else be parted in every way, which takes its length squared
    r"(?<=[^.])\.([\])}>\"' ]*+)\s*$": r" . \1 ",
    r"([:,])([^\d]|$)": r" \1 \2",
    r"\.{2,}|[;@#$%&?!]": r" \g<0> ",
    r"([^'])' ": r"\1 ' ",
    r"[*\]\[(){}<>]|--": r" \g<0> ",
    r"\A|\Z": " ",
    r"''|\"": " '' ",
    r"\s+": " ",
    r"([^' ])('[sSmMdD]|') ": r"\1 \2 ",
    r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ": r"\1 \2 ",
    r"(?i)\b(can(?=not\b)|d(?='ye\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)"
    r"|more(?='n\b)|wan(?=na\s))(not|'ye|me|na|ta|'n)": r" \1 \2 ",
    r"(?i) ('t)(is)\b": r" \1 \2 ",
    r"(?i) ('t)(was)\b": r" \1 \2 ",
}
_SUFFIXES = {"s": "", "(?:(?<=[sxz])|(?<=[cs]h))es": "", "ves": "f", "men": "man", "ies": "y"}


def split_words(sentence: str) -> list[str]:
    """Words and marks of one ASCII sentence; `"` becomes two quotes or backquotes."""
    for pattern, replacement in _RULES.items():
        sentence = re.sub(pattern, replacement, sentence)
    return sentence.split()


class Words:
    """Sentences, tokens and noun lemmas of a text, from the tables of a folder of NLTK data."""

    def __init__(self, folder: Path) -> None:
        punkt, wordnet = folder / "tokenizers/punkt_tab", folder / "corpora/wordnet"
        # lower case, without their period
        self.abbreviations = set(_table(punkt, "english/abbrev_types.txt"))
        collocations = _table(punkt, "english/collocations.tab")
        self.collocations = {tuple(line.split("\t")[:2]) for line in collocations}
        self.starters = set(_table(punkt, "english/sent_starters.txt"))
        rows = (line.split("\t") for line in _table(punkt, "english/ortho_context.tab"))
        try:
            self.occurrences = {word: int(bits) for word, bits in rows}
        except ValueError as error:
            raise CheckpointError(f"{punkt}/english/ortho_context.tab: {error}") from error
        index = (line.partition(" ")[0] for line in _table(wordnet, "index.noun"))
        self.nouns = {word for word in index if word}  # its licence begins with spaces
        if not self.nouns:
            raise CheckpointError(f"{wordnet}/index.noun lists no nouns; download it again")
        exceptions = (line.split() for line in _table(wordnet, "noun.exc"))
        self.irregular = {forms[0]: forms[1:] for forms in exceptions}

    def tokens(self, text: str) -> list[str]:
        return [word for sentence in self.sentences(text) for word in split_words(sentence)]

    def lemmas(self, text: str) -> list[str]:
        """Tokens with each known noun in its shortest form."""
        return [self._lemma(token) for token in self.tokens(text)]

    def _lemma(self, word: str) -> str:
        forms = self.irregular.get(word) or [
            re.sub(f"(?:{a})$", b, word) for a, b in _SUFFIXES.items()
        ]
        return min((form for form in (word, *forms) if form in self.nouns), key=len, default=word)

    def sentences(self, text: str) -> list[str]:
        sentences: list[str] = []
        start = 0
        for word, end in self._candidates(text):
            lines = text[word : end.end("after")].split("\n")
            words = [each for line in lines for each in _PUNKT_WORD.findall(line.strip())]
            if any(itertools.starmap(self._ends_sentence, itertools.pairwise(words))):
                stop = end.end()
                following = end.start("next") if end["next"] else stop
                closing = _CLOSING.match(text, following)
                if closing:  # quotes and brackets stay with what they close
                    stop, following = following + len(closing[0].rstrip()), closing.end()
                sentences.append(text[start:stop])
                start = following
        return [sentence for sentence in (*sentences, text[start:].rstrip()) if sentence]

    def _candidates(self, text: str) -> list[tuple[int, re.Match[str]]]:
        """Start of the word before each possible end of a sentence; of touching ones the last."""
        entries: list[tuple[int, re.Match[str]]] = []
        word = stop = 0
        for end in _END.finditer(text):
            space = _LAST_SPACE.search(text, stop, end.start())
            # A space at the very start counts as none, as in the original.
            word = space.end() if space and space.start() > stop else word
            if entries and word < stop:
                entries.pop()
            entries.append((word, end))
            stop = end.start()
        return entries

    def _ends_sentence(self, word: str, following: str) -> bool:
        ends = self._ends_alone(word)
        if not word.endswith("."):
            return ends
        stem = _stem(word)
        key = _stem(following) if self._ends_alone(following) else _kind(following)
        if (stem, key) in self.collocations:
            return False
        initial = re.fullmatch(r"[^\W\d]\.", word)
        inside = word != "." and not ends  # an abbreviation, or an ellipsis
        upper = following[0].isupper()
        starts = self._starts_sentence(following, key)
        if inside and not initial and (starts or (upper and key in self.starters)):
            return True
        if initial or stem == "##number##":
            never_lower = not self.occurrences.get(key, 0) & _LOWER
            if starts is False or (starts is None and initial and upper and never_lower):
                return False
        return ends

    def _ends_alone(self, word: str) -> bool:
        """Whether a word ends a sentence, whatever follows."""
        if re.fullmatch(r".*[^.]\.", word):
            stem = word[:-1].lower()
            return self.abbreviations.isdisjoint({stem, stem.rpartition("-")[2]})
        return word in (".", "?", "!")

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
    return kind.removesuffix(".") or kind


def _table(package: Path, name: str) -> list[str]:
    """Lines of a file of a package, unpacked or zipped, without blank ones; there are some."""
    path = package / name
    if package.is_dir():
        text = _text(path)
    else:
        path = package.with_name(f"{package.name}.zip")
        refuse_broken(path)
        try:
            with zipfile.ZipFile(path) as archive:
                entry = archive.getinfo(f"{package.name}/{name}")
                if entry.file_size > MAX_TEXT:
                    raise ValueError(f"{name} has {entry.file_size:,} bytes")
                text = archive.read(entry).decode()
        except Exception as error:  # zipfile has one for each kind of damage
            raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
    if not (lines := [line for line in text.split("\n") if line.strip()]):
        raise CheckpointError(f"{path} holds no lines of {name}; download it again")
    return lines


def _text(path: Path) -> str:
    """Text of a whole file, in UTF-8 or, behind its mark, in UTF-16."""
    refuse_broken(path)
    try:
        data = path.read_bytes()
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if utf16 else "utf-8")
        if "\0" in text:
            raise ValueError("it holds the character NUL")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no text: {error}; download it again") from error
    return text.replace(codecs.BOM_UTF8.decode(), "")  # of each of the files that were joined


class Blocklist:
    """The text guardrail of a folder `blocklist`: custom, whitelist, exact_match, nltk_data.

    `check` refuses with "empty", "censor", "censor_lemma", "exact" or "partial"; with
    "look-alikes" beside it where a prompt holds a word in characters that are not ASCII.
    """

    name = "blocklist"
    networks = ()

    def __init__(self, folder: Path, near: Nearness = PREDICT) -> None:
        names = ("custom", "whitelist", "exact_match")
        entries = [_entries(folder / name) for name in names]
        for name, lines in zip(names, entries, strict=True):
            if name != "whitelist" and not any(lines):
                raise CheckpointError(f"{folder / name} lists no words; download it again")
        self.words = Words(folder / "nltk_data")
        self.censor, self.whole_words = self.lists = _lists(entries, near)
        # the released lists have entries that no ASCII text holds
        readable = [[*filter(str.isascii, map(latin, lines))] for lines in entries]
        self.readable = self.lists if readable == entries else _lists(readable, near)

    def check(self, text: str) -> Verdict:
        verdict = self.check_as_released(text)
        for reading in readings(text) if verdict.safe else ():
            if check := self._check(reading, *self.readable):
                return Verdict(False, (check, "look-alikes"))
        return verdict

    def check_as_released(self, text: str) -> Verdict:
        """Verdict of the released guardrails, which read other letters than ASCII's as spaces."""
        ascii_text = re.sub(r"[^\x00-\x7f]+", " ", text)
        check = self._check(ascii_text, *self.lists) if text else "empty"
        return Verdict(False, (check,)) if check else Verdict(True)

    def _check(self, text: str, censor: Censor, whole_words: WholeWords) -> str:
        """Check of an ASCII text that refuses; "" if nothing is found."""
        if censor.refuses(text):
            return "censor"
        if censor.refuses(" ".join(self.words.lemmas(text))):
            return "censor_lemma"
        return whole_words.check(text)


def _lists(entries: Sequence[list[str]], near: Nearness) -> tuple[Censor, WholeWords]:
    custom, whitelist, exact = entries
    return Censor(custom, whitelist), WholeWords(exact, near)


def _entries(folder: Path) -> list[str]:
    """Stripped lines of all files of a folder, which holds nothing else."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {strerror(error)}") from error
    return [line.strip() for path in paths for line in _text(path).splitlines()]
