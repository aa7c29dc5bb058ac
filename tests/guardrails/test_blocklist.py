"""What the blocklist catches of misspelt words, what it misses, and whom it wrongs."""

from __future__ import annotations

import hashlib
import os
import re
import time
import zipfile
from pathlib import Path

import pytest

from worldline.errors import CheckpointError
from worldline.guardrails.blocklist import (
    COSMOS1,
    PREDICT,
    Blocklist,
    Censor,
    WholeWords,
    Words,
    split_words,
)

from .folders import EXACT, write_blocklist


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Blocklist:
    return Blocklist(write_blocklist(tmp_path_factory.mktemp("guard") / "blocklist"))


CAUGHT = """
    zorbash zorbashes ZORBASH ZoRbAsH z0rbash zorb@sh zorb4sh z0rb4sh zorba$h z*rbash zorb*sh
    zorba5h z@rbash z0rb@$h zorbash's "zorbash" (zorbash) zorbash! zorbash. #zorbash -zorbash-
    zor-bash zor.bash zor_bash zorb/ash z-o-r-bash z0rb@sh, fl1mquat fliMquat flimqu4t flimqu@7
    flimquat? flimquats fl*mquat flimqvat fl-im-quat f.l.i.m.quat gl0nk gl*nk gl@nk gl0nk! g.lonk
    glonkim jorry JORRY jorry's superwidget superwidget; moon-free-zorbash p1ovus plouus lOl
"""
MISSED = ("zorrbash", "zrbash", "zorbas", "hsabroz", "z0rb45hh", "snackattack", "'zorbash'")
PHRASES = {
    "zor bash": True,
    "z o r bash": True,
    "wibble wobble": True,
    "Wibble  wobble": True,  # by its lemmas, which are joined by one space
    "w1bbl3 w0bbl3": True,
    "snack-attack": True,
    "snack attack": False,  # an entry with a separator needs that very one
    "wobble wibble": False,
    "moon   cheese": True,
    "moon cheesy": False,
    "z o r b a s h": False,  # its last letter is not seen at a text's end
}

LOOK_ALIKES = """
    sorbet horizon orbash zorba bashful bash zorbas flim quat quato kumquat squat film flimsy
    wibble wobble wobbles snack attack snacks attacks glow lonk link clonk gloss honk monk
    trellix Trellix trellis plover plus plows jorrys story sorry lorry majorry joyride moon
    cheese mooncheese super widget superwidgets widgets louvre pillow evolve t7 5s @ * 1l 100%
"""
# False positives, as in the released guardrail: harmless words in a row that spell an entry, and
# a number that can be read as one.
WRONGED = ("zor bash", "flim quat", "plo vus", "101")


def in_sentence(word: str) -> str:
    return f"The camera shows {word} on a wooden table."


def test_fifty_adversarial_spellings(guard: Blocklist) -> None:
    assert len(set(CAUGHT.split())) >= 50
    assert [word for word in CAUGHT.split() if guard.check(in_sentence(word)).safe] == []
    # known to pass, as in the released guardrail: letters added or dropped
    assert [word for word in MISSED if not guard.check(in_sentence(word)).safe] == []


def test_phrases(guard: Blocklist) -> None:
    for phrase, refused in PHRASES.items():
        assert guard.check(phrase).safe != refused, phrase


def test_fifty_harmless_look_alikes(guard: Blocklist) -> None:
    """None of them is refused alone; the false positives are harmless words in a row."""
    assert len(set(LOOK_ALIKES.split())) >= 50
    assert [word for word in LOOK_ALIKES.split() if not guard.check(in_sentence(word)).safe] == []
    assert [row for row in WRONGED if guard.check(in_sentence(row)).safe] == []


def test_an_asterisk_is_no_refusal(guard: Blocklist) -> None:
    assert guard.check("a * b ** c").safe


def test_empty_prompt(guard: Blocklist) -> None:
    assert guard.check("").reasons == ("empty",)
    assert guard.check(" ").safe


def test_stages(guard: Blocklist) -> None:
    assert guard.check("a zorbash here").reasons == ("censor",)
    assert guard.check("many glonkim here").reasons == ("censor_lemma",)
    assert guard.check("some moon cheese here").reasons == ("exact",)


def test_whitelist() -> None:
    """An allowed word takes back the mark at its own place in the text."""
    censor = Censor(["peacock parade", "zorbash", "stilts"], ["Peacock", "stilts"])
    assert censor.refuses("a zorbash")
    assert not censor.refuses("on stilts")
    assert not censor.refuses("peacock parade")
    assert censor.refuses("a zorbash, a peacock")
    # the mark swallowed a space, so that the allowed word points behind the text's end
    assert censor.refuses("peacock parade of a zorbash peacock")


def test_whole_words() -> None:
    words = WholeWords(["jorry", "(beep)", "c++", "go team!"], PREDICT)
    assert words.check("A Jorry!") == "exact"
    assert words.check("majorry jorrys") == ""
    assert words.check("a (beep) here") == "partial"
    assert words.check("x(beep)y") == "exact"
    assert words.check("go  team! now") == "partial"
    assert words.check("c++ is short") == ""


def test_cosmos1_also_refuses_one_letter_more() -> None:
    assert WholeWords(EXACT, COSMOS1).check("the superwidgets") == "partial"
    assert WholeWords(EXACT, COSMOS1).check("the superwidge") == ""
    assert WholeWords(EXACT, PREDICT).check("the superwidgets") == ""


def test_blank_lines_refuse_nothing(tmp_path: Path) -> None:
    folder = write_blocklist(tmp_path / "b", exact=("jorry", "", "  "), custom=("", "glonk"))
    assert Blocklist(folder).check("a harmless prompt").safe


@pytest.mark.parametrize(
    "lost",
    [
        "custom",
        "whitelist",
        "exact_match",
        "nltk_data/corpora/wordnet.zip",
        "nltk_data/tokenizers/punkt_tab/english/abbrev_types.txt",
    ],
)
def test_what_is_absent_is_named(lost: str, tmp_path: Path) -> None:
    folder = write_blocklist(tmp_path / "blocklist")
    (folder / lost).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=Path(lost).name.split(".")[0]):
        Blocklist(folder)


def test_damaged_data(tmp_path: Path) -> None:
    folder = write_blocklist(tmp_path / "blocklist")
    (folder / "nltk_data/corpora/wordnet.zip").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="wordnet"):
        Blocklist(folder)
    empty = write_blocklist(tmp_path / "empty", custom=(), exact=())
    with pytest.raises(CheckpointError, match="no words"):
        Blocklist(empty)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
WORDS = "flimquat\nglonk\n"
BROKEN = {
    "empty": b"",
    "zeros": bytes(40),
    "lfs": LFS,
    "page": b"\n<html><body>Sign in</body></html>",
    "refusal": b"Access to model nvidia/Cosmos-Guardrail1 is restricted.",
    "error": b'{"error":"Repository not found"}',
    "latin-1": "caf\xe9\n".encode("latin-1"),
    "utf-16 without mark": WORDS.encode("utf-16-le"),
}


@pytest.mark.parametrize(
    "file",
    [
        *("custom/words", "exact_match/more", "whitelist/words"),
        "nltk_data/tokenizers/punkt_tab/english/collocations.tab",
    ],
)
@pytest.mark.parametrize("kind", [*BROKEN, "dangling", "loop", "folder", "fifo"])
def test_a_file_that_is_not_whole_is_named(kind: str, file: str, tmp_path: Path) -> None:
    path = write_blocklist(tmp_path / "blocklist") / file
    path.unlink(missing_ok=True)
    if kind in BROKEN:
        path.write_bytes(BROKEN[kind])
    elif kind in ("dangling", "loop"):
        path.symlink_to(path if kind == "loop" else "../../blobs/12ab")
    else:
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        Blocklist(tmp_path / "blocklist")


@pytest.mark.parametrize("name", ["second.12ab34cd.incomplete", "words.part", ".words.7-ab.tmp"])
@pytest.mark.parametrize("folder", ["custom", "exact_match", "whitelist"])
def test_an_unfinished_download_is_named(folder: str, name: str, tmp_path: Path) -> None:
    path = write_blocklist(tmp_path / "blocklist") / folder / name
    path.write_text("a\n")
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        Blocklist(tmp_path / "blocklist")


@pytest.mark.parametrize("digest", ["sha256", "git"])
def test_a_file_of_a_hub_cache_has_the_hash_of_its_name(digest: str, tmp_path: Path) -> None:
    folder, data = write_blocklist(tmp_path / "snapshots" / "0123" / "blocklist"), WORDS.encode()
    git = hashlib.sha1(b"blob %d\0" % len(data) + data)
    name = hashlib.sha256(data).hexdigest() if digest == "sha256" else git.hexdigest()
    blob = tmp_path / "blobs" / name
    blob.parent.mkdir()
    blob.write_bytes(data)
    path = folder / "custom" / "words"
    path.unlink()
    path.symlink_to(blob)
    assert not Blocklist(folder).check("a flimquat").safe
    blob.write_bytes(data[:-6])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        Blocklist(folder)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_and_ends_of_lines(encoding: str, end: str, tmp_path: Path) -> None:
    folder = write_blocklist(tmp_path / "blocklist")
    for name, words in (("custom", "plovus"), ("exact_match", "jorry")):
        data = end.join((words, "tail")).encode(encoding)
        (folder / name / "words").write_bytes(data)
    guard = Blocklist(folder)
    assert [guard.check(f"a {word} here").safe for word in ("plovus", "jorry", "tail", "x")] == [
        *(False, False, False, True)
    ]
    (folder / "custom" / "words").write_bytes(b"\xef\xbb\xbfabba\n\xef\xbb\xbfplovus\n")
    assert not Blocklist(folder).check("a plovus").safe  # of two files that were joined


@pytest.mark.parametrize("folder", ["custom", "exact_match"])
def test_a_list_without_words(folder: str, tmp_path: Path) -> None:
    path = write_blocklist(tmp_path / "blocklist") / folder
    for content in ("\n \n", None):
        (path / "words").write_text(content) if content else (path / "words").unlink()
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}.* no words"):
            Blocklist(tmp_path / "blocklist")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"index.noun": "  1 a licence\n", "noun.exc": "geese goose\n"}, "index.noun"),
        ({"index.noun": "", "noun.exc": "geese goose\n"}, "index.noun"),
        ({"index.noun": "goose n 1\n", "noun.exc": "\n"}, "noun.exc"),
        ({"index.noun": "goose n 1\n"}, "noun.exc"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_word_nets_without_words(
    zipped: bool, content: dict[str, str], name: str, tmp_path: Path
) -> None:
    corpora = write_blocklist(tmp_path / "blocklist") / "nltk_data" / "corpora"
    with zipfile.ZipFile(corpora / "wordnet.zip", "w") as archive:
        for entry, text in content.items():
            archive.writestr(f"wordnet/{entry}", text)
    if not zipped:
        zipfile.ZipFile(corpora / "wordnet.zip").extractall(corpora)
    with pytest.raises(CheckpointError, match=name):
        Blocklist(tmp_path / "blocklist")


def test_damaged_tables(tmp_path: Path) -> None:
    data = write_blocklist(tmp_path / "blocklist") / "nltk_data"
    archive = data / "corpora" / "wordnet.zip"
    whole = archive.read_bytes()
    for damaged in (b"", whole[:-9], whole.replace(b"glonk", b"plonk", 1), LFS):
        archive.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"wordnet\.zip"):
            Blocklist(tmp_path / "blocklist")
    archive.write_bytes(whole)
    table = data / "tokenizers" / "punkt_tab" / "english" / "ortho_context.tab"
    for damaged in (b"the\t46\nmeet", b"the\tx"):
        table.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="ortho_context"):
            Blocklist(tmp_path / "blocklist")


def test_sentences_and_words(tmp_path: Path) -> None:
    words = Words(write_blocklist(tmp_path / "blocklist") / "nltk_data")
    assert words.sentences('He met Dr. Who. "Hi." The end.') == [
        "He met Dr. Who.",
        '"Hi."',
        "The end.",
    ]
    assert words.tokens('I can\'t say "no"... cannot') == [
        *("I", "ca", "n't", "say", "``", "no", "''", "...", "can", "not"),
    ]
    assert words.lemmas("wolves boxes Boxes cities men glonkim geese glass") == [
        *("wolf", "box", "Boxes", "city", "man", "glonk", "geese", "glass"),
    ]


def test_many_spaces_are_no_burden(guard: Blocklist) -> None:
    """They took the square of their number: minutes here."""
    started = time.monotonic()
    assert guard.check(f"A dog of Mr.{' ' * 80_000}x runs.").safe
    assert time.monotonic() - started < 10
    assert split_words("Mr.  )'  ") == ["Mr", ".", ")", "'"]
    assert split_words("Mr.  )' x") == ["Mr.", ")", "'", "x"]
