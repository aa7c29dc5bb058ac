"""English tokens and noun lemmas, decided as by NLTK 3.9.1, from the data files beside a blocklist.

Sources: Punkt, Kiss and Strunk 2006 (sentences); the tokenizer of the Penn Treebank; WordNet's
morphology. Only three readers and their rules are needed, so there is no dependency: NLTK >= 3.10
refuses the links of a hub cache, and its WordNet takes seconds to load.
"""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from worldline.errors import CheckpointError

_WORDNET = "corpora/wordnet"
_PUNKT = "tokenizers/punkt_tab"

# --- sentences

_NOT_IN_WORD = r"[)\";}\]*:@'({\[?!]"
_RUNS = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"
_WORD = re.compile(
    rf"{_RUNS}"
    rf"|(?=[^(\"`{{\[:;&#*@)}}\]\-,])\S+?(?=\s|$|{_NOT_IN_WORD}|{_RUNS}|,(?=$|\s|{_NOT_IN_WORD}|{_RUNS}))"
    r"|\S"
)
_END = re.compile(rf"[.?!](?=(?P<after>{_NOT_IN_WORD}|\s+(?P<next>\S+)))")
_CLOSING = re.compile(r"[\"')\]}]+?(?:\s+|(?=--)|$)", re.MULTILINE)
_LAST_SPACE = re.compile(r"\s(?=\S*\Z)")
_NUMBER = re.compile(r"-?[.,]?\d[\d,.\-]*\.?")
_INITIAL = re.compile(r"[^\W\d]\.")

# how a word was met in training, at a sentence's start or inside it, upper or lower case
_INSIDE_UPPER = 4
_UPPER = 2 | _INSIDE_UPPER | 8
_START_LOWER = 16
_LOWER = _START_LOWER | 32 | 64


@dataclass
class _Token:
    text: str
    ends: bool = False  # a sentence ends with it
    short: bool = False  # an abbreviation
    dots: bool = False

    @property
    def kind(self) -> str:
        return "##number##" if _NUMBER.fullmatch(self.text) else self.text.lower()

    @property
    def stem(self) -> str:
        kind = self.kind
        return kind[:-1] if len(kind) > 1 and kind.endswith(".") else kind

    @property
    def key(self) -> str:
        return self.stem if self.ends else self.kind


@dataclass(frozen=True)
class Sentences:
    """Where sentences end.

    Attributes:
        abbreviations: lower case, without their period.
        collocations: pairs of words that a period does not part.
        starters: words that often begin a sentence.
        met: how each word was met, as bits.
    """

    abbreviations: frozenset[str] = frozenset()
    collocations: frozenset[tuple[str, str]] = frozenset()
    starters: frozenset[str] = frozenset()
    met: dict[str, int] = field(default_factory=dict)

    def split(self, text: str) -> list[str]:
        found: list[str] = []
        slices = list(self._slices(text))
        carried = 0
        for number, (start, stop) in enumerate(slices):
            start += carried
            carried = 0
            if number + 1 < len(slices):
                following = slice(*slices[number + 1])
                closing = _CLOSING.match(text[following])
                if closing:  # quotes and brackets stay with what they close
                    stop = following.start + len(closing[0].rstrip())
                    carried = closing.end()
            if text[start:stop]:
                found.append(text[start:stop])
        return found

    def _slices(self, text: str) -> Iterator[tuple[int, int]]:
        start = 0
        for end, context in self._candidates(text):
            if self._breaks(context):
                yield start, end.end()
                start = end.start("next") if end["next"] else end.end()
        yield start, len(text.rstrip())

    def _candidates(self, text: str) -> Iterator[tuple[re.Match[str], str]]:
        """Yield each possible end with the words around it; of touching ones the last."""
        before = (0, 0)
        held: re.Match[str] | None = None
        for end in _END.finditer(text):
            space = _LAST_SPACE.search(text, before[1], end.start())
            # A space at the very start counts as none, as in the original.
            word = space.end() if space and space.start() > before[1] else before[0]
            if held is not None and before[1] <= word:
                yield held, text[slice(*before)] + held[0] + held["after"]
            held, before = end, (word, end.start())
        if held is not None:
            yield held, text[slice(*before)] + held[0] + held["after"]

    def _breaks(self, context: str) -> bool:
        tokens = [
            _Token(word) for line in context.split("\n") for word in _WORD.findall(line.strip())
        ]
        for token in tokens:
            self._judge_alone(token)
        for token, following in pairwise(tokens):
            if token.text.endswith("."):
                self._judge_pair(token, following)
        return any(token.ends for token in tokens[:-1])

    def _judge_alone(self, token: _Token) -> None:
        text = token.text
        if text in (".", "?", "!"):
            token.ends = True
        elif text.startswith("..") and set(text) == {"."}:
            token.dots = True
        elif text.endswith(".") and not text.endswith(".."):
            word = text[:-1].lower()
            token.short = not self.abbreviations.isdisjoint({word, word.rpartition("-")[2]})
            token.ends = not token.short

    def _judge_pair(self, token: _Token, following: _Token) -> None:
        if (token.stem, following.key) in self.collocations:
            token.ends, token.short = False, True
            return
        initial = _INITIAL.fullmatch(token.text) is not None
        upper = following.text[0].isupper()
        known = self._starts(following) or (upper and following.key in self.starters)
        if (token.short or token.dots) and not initial and known:
            token.ends = True
            return
        if initial or token.stem == "##number##":
            starts = self._starts(following)
            never_lower = not self.met.get(following.key, 0) & _LOWER
            if starts is False or (starts is None and initial and upper and never_lower):
                token.ends, token.short = False, True

    def _starts(self, token: _Token) -> bool | None:
        """Tell by its case whether a sentence starts with the token; None if that is unknown."""
        if token.text in (";", ":", ",", ".", "!", "?"):
            return False
        met = self.met.get(token.key, 0)
        if token.text[0].isupper() and met & _LOWER and not met & _INSIDE_UPPER:
            return True
        if token.text[0].islower() and (met & _UPPER or not met & _START_LOWER):
            return False
        return None


# --- words

# what a sentence must hold for a rule to matter ("": always tried), the rule, what it writes
_Rule = tuple[str, re.Pattern[str], str]
_OPENING_AND_MARKS: tuple[_Rule, ...] = (
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
)
_ENDING: tuple[_Rule, ...] = (
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


def split_words(sentence: str) -> list[str]:
    """Return the words and marks of one ASCII sentence; `"` becomes two quotes or backquotes."""
    for held, pattern, replacement in _OPENING_AND_MARKS:
        if held in sentence:
            sentence = pattern.sub(replacement, sentence)
    sentence = f" {sentence} "
    for held, pattern, replacement in _ENDING:
        if held in sentence:
            sentence = pattern.sub(replacement, sentence)
    if _ANY_JOINED.search(sentence):
        for pattern in _JOINED:
            sentence = pattern.sub(r" \1 \2 ", sentence)
    return sentence.split()


# --- lemmas

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


@dataclass(frozen=True)
class Nouns:
    """Nouns that WordNet knows, and irregular forms of them."""

    known: frozenset[str] = frozenset()
    irregular: dict[str, list[str]] = field(default_factory=dict)

    def lemma(self, word: str) -> str:
        """Return the shortest known form of `word`; `word` itself if none is known."""
        forms = self.irregular.get(word)
        if forms is None:
            if word[-1:] not in ("s", "n"):  # no suffix rule fits
                return word
            forms = [word.removesuffix(a) + b for a, b in _SUFFIXES if word.endswith(a)]
        known = [form for form in (word, *forms) if form in self.known]
        return min(known, key=len, default=word)


# --- files


class Words:
    """The two together, read from a folder of NLTK data."""

    def __init__(self, folder: Path) -> None:
        """Read `folder`, whose packages may be folders or zip files.

        Raises:
            CheckpointError: a table is absent or unreadable.
        """
        tables = {name: _lines(folder, _PUNKT, f"english/{name}") for name in _PUNKT_TABLES}
        pairs = (tuple(line.split("\t")[:2]) for line in tables["collocations.tab"])
        met: defaultdict[str, int] = defaultdict(int)
        for line in tables["ortho_context.tab"]:
            word, _, bits = line.partition("\t")
            if not bits.strip().isdigit():
                raise CheckpointError(
                    f"{folder / _PUNKT}: ortho_context.tab holds {line!r}, no number"
                )
            met[word] = int(bits)
        self.sentences = Sentences(
            frozenset(tables["abbrev_types.txt"]),
            frozenset((pair[0], pair[1]) for pair in pairs if len(pair) == 2),
            frozenset(tables["sent_starters.txt"]),
            dict(met),
        )
        index = _lines(folder, _WORDNET, "index.noun")
        exceptions = [line.split() for line in _lines(folder, _WORDNET, "noun.exc")]
        self.nouns = Nouns(
            frozenset(line.split(" ", 1)[0] for line in index if not line.startswith(" ")),
            {form[0]: form[1:] for form in exceptions},
        )

    def tokens(self, text: str) -> list[str]:
        return [word for sentence in self.sentences.split(text) for word in split_words(sentence)]

    def lemmas(self, text: str) -> list[str]:
        return [self.nouns.lemma(token) for token in self.tokens(text)]


_PUNKT_TABLES = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")


def _lines(folder: Path, package: str, name: str) -> list[str]:
    """Return the lines of a file of a package, unpacked or zipped; blank ones left out."""
    path = folder / package / name
    try:
        if path.is_file():
            data = path.read_bytes()
        else:
            packed = folder / f"{package}.zip"
            if not packed.is_file():
                raise CheckpointError(f"{path} is missing, and so is {packed}")
            with zipfile.ZipFile(packed) as archive:
                data = archive.read(f"{Path(package).name}/{name}")
        text = data.decode("utf-8")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return [line for line in text.split("\n") if line.strip()]
