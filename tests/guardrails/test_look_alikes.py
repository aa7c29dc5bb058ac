"""Listed words in letters that only look like ASCII ones."""

# ruff: noqa: RUF001
from __future__ import annotations

import random
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from worldline.guardrails.blocklist import Blocklist
from worldline.guardrails.look_alikes import readings

from .folders import write_blocklist

WORDS = ("glonk", "jorry", "superwidget", "zorbash", "flimquat")
A, TAG, WIDE = ord("a"), 0xE0000, 0xFEE0


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Blocklist:
    folder = tmp_path_factory.mktemp("guard") / "blocklist"
    custom = ("zorbash", "flimquat", "glonk", "jalapeño-bomb", "zaß", "wizzig", "привет")
    return Blocklist(write_blocklist(folder, custom=custom))


def shifted(first: int) -> Callable[[str], str]:
    """Spelling in an alphabet that begins at a code point."""
    return lambda word: "".join(chr(first + ord(c) - A) for c in word)


def between(*marks: str) -> Callable[[str], str]:
    return lambda word: "".join(c + marks[n % len(marks)] for n, c in enumerate(word))


def replaced(letters: str, others: str) -> Callable[[str], str]:
    return lambda word: word.translate(str.maketrans(letters, others))


def named(pattern: str) -> Callable[[str], str]:
    """Spelling in characters of such names, where they exist."""

    def spell(word: str) -> str:
        names = (pattern.format(c.upper()) for c in word)
        return "".join(
            unicodedata.lookup(name) if _exists(name) else c
            for name, c in zip(names, word, strict=True)
        )

    return spell


def _exists(name: str) -> bool:
    try:
        return bool(unicodedata.lookup(name))
    except KeyError:
        return False


SPELLINGS = {
    "fullwidth": shifted(WIDE + A),
    "fullwidth capitals": shifted(WIDE + ord("A")),
    "mathematical bold": shifted(0x1D41A),
    "mathematical fraktur": shifted(0x1D51E),
    "mathematical monospace": shifted(0x1D68A),
    "circled": shifted(0x24D0),
    "negative circled": shifted(0x1F150),
    "squared": shifted(0x1F130),
    "negative squared": shifted(0x1F170),
    "flags": shifted(0x1F1E6),
    "in brackets": shifted(0x249C),
    "small capitals": named("LATIN LETTER SMALL CAPITAL {}"),
    "superscripts": named("MODIFIER LETTER SMALL {}"),
    "strokes": named("LATIN SMALL LETTER {} WITH STROKE"),
    "hooks": named("LATIN SMALL LETTER {} WITH HOOK"),
    "acute": named("LATIN SMALL LETTER {} WITH ACUTE"),
    "combining marks": between("\N{COMBINING LONG SOLIDUS OVERLAY}", "\N{COMBINING DIAERESIS}"),
    "enclosed": between("\N{COMBINING ENCLOSING CIRCLE}"),
    "Cyrillic": replaced("aeopcyxijskmtnbrgw", "аеорсухіјѕкмтпьгԍԝ"),
    "Greek": replaced("aoivztukp", "αοινζτυκρ"),
    "Armenian": replaced("oghjnu", "օցհյոս"),
    "mixed alphabet": replaced("abcdefhijklmnoprstuvwxy", "αв¢∂єƒнιנкℓмησρяѕтυνωχу"),
    "syllabics": replaced("abcdefghjklmnprsuvwxz", "ᗩᗷᑕᗪᗴᖴᘜᕼᒍᛕᒪᗰᑎᑭᖇᔕᑌᐯᗯ᙭ᘔ"),
    "soft hyphens": between("\N{SOFT HYPHEN}"),
    "zero width": between("\N{ZERO WIDTH SPACE}", "\N{ZERO WIDTH JOINER}", "\N{WORD JOINER}"),
    "variation selectors": between("\ufe0f", "\U000e0101"),
    "tags between": between(chr(TAG + A), chr(TAG + A + 5)),
    "tags": shifted(TAG + A),
    "fillers": between("\N{HANGUL FILLER}"),
    "emoji": between("\N{PILE OF POO}", "\N{SNOWMAN}\ufe0f"),
    "new emoji": between("\U0001fadd"),  # unknown to this Python's tables, perhaps
    "reversed": lambda word: f"\u202e{word[::-1]}\u202c",
    "half reversed": lambda word: f"{word[:3]}\u202e{word[:2:-1]}\u202c",
    "reversed, isolated": lambda word: f"\u2066\u202e{word[::-1]}\u2069",
    "reversed twice": lambda word: f"\u202e{word[:1:-1]}\u202d{word[:2]}\u202c\u202c",
    "dotted": replaced("iI", "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}" * 2),
    "reversed and wide": lambda word: f"\u202e{shifted(WIDE + A)(word[::-1])}\u202c",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_listed_words_are_refused(spelling: str, guard: Blocklist) -> None:
    for word in WORDS:
        text = SPELLINGS[spelling](word)
        prompt = f"The camera shows a {text} on a table."
        verdict = guard.check(prompt)
        assert not verdict.safe, ascii(text)
        if guard.check_as_released(prompt).safe:
            assert verdict.reasons[-1] == "look-alikes"


@pytest.mark.parametrize("seed", range(20))
def test_mixed_spellings(seed: int, guard: Blocklist) -> None:
    draw = random.Random(seed)
    letters = [s for n, s in SPELLINGS.items() if "reversed" not in n and n != "tags"]
    word = "".join(draw.choice(letters)(c) for c in draw.choice(WORDS))
    assert not guard.check(f"Ein Bild: {word} – groß").safe, ascii(word)


@pytest.mark.parametrize(
    ("listed", "others"),
    [
        ("jalapeño-bomb", ("jalapeño-bomb", "jalapen\u0303o-bomb", "jalapeno\u0301-bomb")),
        ("zaß", ("zaß", "zaẞ", "za\u017fs", "ｚａｓｓ")),
        ("wizzig", ("wİzzig", "wızzig", "W\u0130ZZIG", "ᴡizzig")),
        ("glonk", ("ɡlonk", "ɢʟonk", "gℓonk", "glоnк", "ɡɭоɳƙ", "the\N{SNOWMAN}glоnk")),
    ],
)
def test_single_letters(listed: str, others: tuple[str, ...], guard: Blocklist) -> None:
    for other in others:
        assert not guard.check(f"a {other} here").safe, ascii(other)
    assert guard.check("a jalapeno-bomb here").safe  # as released


def test_ligatures(guard: Blocklist) -> None:
    for word in ("\ufb02imquat", "\ufb02i\uff4dquat"):
        assert guard.check(f"one {word}!").reasons == ("censor", "look-alikes")


HARMLESS = """
    Ein Mädchen läuft über die Straße, größer als je zuvor.
    Un café près de l'hôtel, où l'été ne finit jamais — déjà vu, cœur léger.
    El niño mañana comerá jalapeños en Año Nuevo. Ærøskøbing; Łódź; İstanbul; Đà Nẵng
    Красный мяч катится по столу. Привет, мир! На столе сор, рис, суп и сок.
    Собака бежит по берегу моря на закате, камера медленно движется вперёд.
    Ένας σκύλος τρέχει στην παραλία. Το νερό είναι κρύο και η θάλασσα ήρεμη.
    桌子上有一个红球。 カメラはゆっくり robot の方へ動く。 빨간 공이 굴러간다.
    كرة حمراء تتدحرج على الطاولة. כדור אדום מתגלגל על השולחן. ลูกบอลสีแดง लाल गेंद
    A cat 🐈 and a dog 🐕 run 🏃🏽‍♀️ — "fast" — at 45° for 5 m², 🇺🇸 vs 🇬🇧, 1️⃣st place… “yes”
    zor🎉bas glon lim quat, flim–quato, jorrys, majorry: naïve façade
"""


@pytest.mark.parametrize("prompt", HARMLESS.strip().split("\n"))
def test_other_languages_are_no_look_alikes(prompt: str, guard: Blocklist) -> None:
    verdict = guard.check(prompt)
    assert verdict == guard.check_as_released(prompt)
    assert verdict.safe


def test_words_of_another_script(tmp_path: Path) -> None:
    """They are read as Latin ones where all their letters look the same, not just alike."""
    listed = ("pot", "bot", "rotor", "cop", "kaka", "tobi")
    guard = Blocklist(write_blocklist(tmp_path / "blocklist", custom=listed))
    for safe in ("открыл рот и вот", "готов пот", "ротор", "το βοτ", "тот том"):
        assert guard.check(safe).safe, safe
    for refused in ("сор", "РОТ", "каkа", "pот", "ΤΟΒΙ", "rоtог", "b\N{COMBINING DIAERESIS}от"):
        assert not guard.check(f"1 {refused} 2").safe, refused


def test_readings() -> None:
    assert readings("plain ASCII, z.o.r.b") == []
    assert readings("café") == ["cafe"]
    assert readings("дом и сор") == ["    cop"]
    assert readings("a☃b") == readings("a\ud800b") == ["ab"]
    assert readings("é☃b") == ["eb", "e b"]
    assert readings("“zug” — 日本") == []
    assert readings("\u202eab\u2066cd\u2069\u202c") == ["abcd", "cdba"]


def test_time(guard: Blocklist) -> None:
    """A prompt with accents takes at most twice the time, and a hostile one is no burden."""
    prompt = "A café by the sea, where the dogs of Dr. Who run. " * 40

    def seconds(check: Callable[[str], object]) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            check(prompt)
            times.append(time.perf_counter() - started)
        return min(times)

    assert seconds(guard.check) < 4 * seconds(guard.check_as_released)
    started = time.monotonic()
    for hostile in (
        "\u202e" * 50_000 + "a" * 50_000,
        "\u202e\u202d" * 20_000,
        "a\u202e☃" * 10_000,
        "оʇ\u0301" * 10_000,
    ):
        guard.check(hostile)
    assert time.monotonic() - started < 20
