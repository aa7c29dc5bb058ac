"""Readings of a text in Latin letters: what a person reads, whatever the characters are.

Sources: Unicode, by Python's `unicodedata`; its Technical Standard 39 (letters of other scripts
that look like Latin ones) and Annex 9 (direction).
"""

import functools
import re
import unicodedata

_WORD = re.compile(r"[^\W_]+")
_OTHER = re.compile(r"[^\x00-\x7f]+")
# a Latin letter, then others of its shape, of Cyrillic, Greek, Armenian, Coptic, Cherokee, Lisu, …
_SHAPES = """
    aаАαΑⲀᎪꓮᗩɑ bвВЬьβΒⲂᏏᏴꓐᗷƅƄ cсСςϲϹⲤⲥᏟꓚᑕ¢ dԁԀժᎠꓓᗪðÐ∂ eеЕєЄҽεΕⲈᎬꓰᗴ℮€ fϜꓝᖴ gցԍԌᏀꓖᘜ
    hһҺнНћΗհⲎᎻꓧᕼ iіІιΙⲒᎥꓲɩƖ jјЈϳͿյנᎫꓙᒍ kкКκΚⲔⲕᏦꓗᛕ lӏӀᏞꓡᒪǀ mмМΜⲘᎷꓟᗰ nпηΝոռⲚꓠᑎŋŊ
    oоОөӨοΟσօՕⲞⲟסꓳ pрРρΡⲢⲣᏢꓑᑭƿ qԛԚզգ rгяЯᎡꓣᖇ sѕЅՏᏚꓢᔕƨƧ tтТτΤⲦⲧᎢꓔ uυμսՍꓴᑌʉɄʊƱ vѵѴνᏙꓦᐯ
    wԝԜѡѠωաᎳꓪᗯ xхХχΧⲬⲭꓫ᙭× yуУүҮγΥⲨᎽꓬ zζΖⲌⲍᏃꓜᘔ
"""  # noqa: RUF001
# small letters of equal shape, of which a whole word may consist; others are near it
_EQUAL = "агеіјкорсухѕһӏԁԛԝѵαγικνορσυχհոսօ"
_LATIN = {ord(other): each[0] for each in _SHAPES.split() for other in each[1:]}
# names of letters that are neither decomposed nor varied: small capitals, in squares, of flags
_NAME = re.compile(r".*\b(?:LATIN|INDICATOR)\b.* (?:LETTER|LIGATURE)(?: .*)? ([A-Z]{1,2})")
_TAGS = {0xE0000 + code: code for code in range(0x20, 0x7F)}
_RIGHT_TO_LEFT, _LEFT_TO_RIGHT = "\u202b\u202e\u2067", "\u202a\u202d\u2066\u2068"
_DEEPEST = 126  # levels of Annex 9
_END_OF_DIRECTION = "\u202c\u2069"


def readings(text: str) -> list[str]:
    """ASCII readings of a text that is not ASCII: symbols left out, or in place of spaces.

    Letters of a word are read as Latin ones where it mixes scripts, or all look the same as Latin
    ones: another word of another script is a space at last. Direction overrides are followed, too,
    and letters of tags are read.
    """
    if text.isascii():
        return []
    orders = dict.fromkeys((text, _displayed(text), text.translate(_TAGS)))
    forms = [
        form
        for order in map(_spelt, orders)
        for form in (_OTHER.sub(_without_symbols, order), order)
    ]
    words = [text, *(_WORD.sub(_read_word, form) for form in dict.fromkeys(forms))]
    # spaces alone make no other reading; the first, of the text as it is, is the released one
    unique: dict[str, str] = {}
    for reading in (_OTHER.sub(" ", form) for form in words):
        unique.setdefault(" ".join(reading.split()), reading)
    return [*unique.values()][1:]


def latin(text: str) -> str:
    """Text with accents and format characters removed, and with look-alikes in Latin words."""
    return _WORD.sub(_read_word, _spelt(text))


def _read_word(match: re.Match[str]) -> str:
    word = match[0]
    if word.isascii():
        return word
    letters = word.translate(_LATIN)
    scripts = {unicodedata.name(c, "").partition(" ")[0] for c in word if c.isalpha()}
    if len(scripts) > 1 or "LATIN" in scripts:
        return _OTHER.sub("", letters)
    equal = all(c in _EQUAL or not c.islower() for c in word)
    return letters if equal and letters.isascii() else word


def _without_symbols(match: re.Match[str]) -> str:
    """Characters without emoji and what has no meaning here."""
    return "".join(c for c in match[0] if unicodedata.category(c)[0] not in "SC")


def _spelt(text: str) -> str:
    return _OTHER.sub(lambda match: "".join(map(_letters, match[0])), text)


@functools.lru_cache(1 << 16)
def _letters(character: str) -> str:
    """A character decomposed, in ASCII where it is a variant of ASCII; "" for marks and formats."""
    if character.isascii():
        return character
    if letter := _LATIN.get(ord(character)):
        return character if character.isalpha() else letter  # else no part of a word
    parts = unicodedata.normalize("NFKD", character)
    if len(parts) > 2 and parts[0] == "(" and parts[-1] == ")":
        parts = parts[1:-1]  # of one character, such as U+249C
    if parts != character:
        return _spelt(parts)
    name, category = unicodedata.name(character, ""), unicodedata.category(character)
    if category[0] == "M" or category == "Cf" or name.endswith("FILLER"):
        return ""
    if character.isspace() or character.casefold().isascii():
        return " " if character.isspace() else character.casefold()
    if " WITH " in name:
        try:
            return _letters(unicodedata.lookup(name.partition(" WITH ")[0]))
        except KeyError:
            pass
    match = _NAME.fullmatch(name)
    return match[1].lower() if match else character


def _displayed(text: str) -> str:
    """Text in the order in which direction marks have it read; what they embed is reversed."""
    if set(text).isdisjoint(_RIGHT_TO_LEFT):
        return text
    levels: list[tuple[bool, list[str]]] = [(False, [])]
    for character in text + _END_OF_DIRECTION[0] * _DEEPEST:
        if character in _RIGHT_TO_LEFT + _LEFT_TO_RIGHT:
            if len(levels) < _DEEPEST:
                levels.append((character in _RIGHT_TO_LEFT, []))
        elif character not in _END_OF_DIRECTION:
            levels[-1][1].append(character)
        elif len(levels) > 1:
            backwards, parts = levels.pop()
            levels[-1][1].append("".join(reversed(parts) if backwards else parts))
    return "".join(levels[0][1])
