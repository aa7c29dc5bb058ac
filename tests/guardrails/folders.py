"""Small guardrail folders in the released layouts, made at test time from made-up words."""

from __future__ import annotations

import zipfile
from pathlib import Path

CUSTOM = (
    "Zorbash",
    "flimquat",
    "wibble wobble",
    "snack-attack",
    "glonk",
    "trellix",
    "plovus",
    "lol",
)
WHITELIST = ("Trellix",)
EXACT = ("moon cheese", "jorry", "superwidget")
NOUNS = ("zorbash", "flimquat", "glonk", "moon", "cheese", "box", "city", "wolf", "man")
IRREGULAR = {"glonkim": "glonk", "geese": "goose"}


def write_blocklist(
    folder: Path,
    custom: tuple[str, ...] = CUSTOM,
    whitelist: tuple[str, ...] = WHITELIST,
    exact: tuple[str, ...] = EXACT,
) -> Path:
    """Write a folder `blocklist` as released; return it."""
    for name, lines in (("custom", custom), ("whitelist", whitelist), ("exact_match", exact)):
        (folder / name).mkdir(parents=True)
        (folder / name / "words").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpora = folder / "nltk_data" / "corpora"
    corpora.mkdir(parents=True)
    with zipfile.ZipFile(corpora / "wordnet.zip", "w") as archive:
        index = "  1 a licence\n" + "".join(f"{noun} n 1 0 1 0 00000001\n" for noun in NOUNS)
        archive.writestr("wordnet/index.noun", index)
        irregular = "".join(f"{form} {noun}\n" for form, noun in IRREGULAR.items())
        archive.writestr("wordnet/noun.exc", irregular)
    tables = folder / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    tables.mkdir(parents=True)
    (tables / "abbrev_types.txt").write_text("dr\ne.g")
    (tables / "collocations.tab").write_text("st\tlouis")
    (tables / "sent_starters.txt").write_text("however")
    (tables / "ortho_context.tab").write_text("the\t46\nmeet\t42")
    return folder
