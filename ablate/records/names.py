"""What a name is: of a study, a factor, a level, a folder. Names become labels, keys and paths."""

from __future__ import annotations

import re
import unicodedata

LONGEST = 100
"""Characters of a name that a person writes; tables and pictures cut what is longer."""

BASELINE = "baseline"
"""What the unchanged setting is called, in every table."""

STUDY_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""A study's name is its folder's, on every file system."""

_TAKEN = ("mlflow.db", "mlartifacts", "trained")
"""What lies beside the study folders."""

_UNSEEN = {"Cc": "control", "Cf": "invisible", "Zl": "line break", "Zp": "line break"}
_NO_TEXT = {"Cs": "half a", "Cn": "unassigned", "Co": "private"}


_LATIN = {
    **dict(zip("аеорсухіјѕһԁԛԝӏ", "aeopcyxijshdqwl", strict=True)),
    **dict(zip("АВЕКМНОРСТУХІЈЅҮԚԜ", "ABEKMHOPCTYXIJSYQW", strict=True)),
    **dict(zip("οϲϳΑΒΕΖΗΙΚΜΝΟΡΤΥΧϹϺ", "ocjABEZHIKMNOPTYXCM", strict=True)),
    **dict(zip("օսհɑɡ", "ouhag", strict=True)),
}
"""Letters of other alphabets (Cyrillic, Greek, Armenian, phonetic) that print as one of ours: those
of Unicode's confusables (UTS 39) that a font draws alike."""


def find_fault(name: str, *, derived: bool = False) -> str:
    """What is wrong with a factor's or a level's name and what to write; empty if nothing is.

    `derived`: the name is a listed value as text, so it may be as long as that, and is left as it
    is spelt.
    """
    if not name:
        return "a name must not be empty; give it one"
    odd = find_odd(name)
    if odd is not None:
        return f"the name {name!r} holds {odd}; write it without"
    if name != name.strip():
        return f"the name {name!r} begins or ends with a blank; write {name.strip()!r}"
    if alike := find_alike(name):
        return f"the name {name!r} holds {alike}; write {look_of(name)!r}"
    if derived:
        return ""
    composed = unicodedata.normalize("NFC", name)
    if composed != name:
        return (
            f"the name {name!r} ({ascii(name)}) has accents as characters of their own, which look "
            f"like others; write {composed!r} ({ascii(composed)})"
        )
    if len(name) > LONGEST:
        return f"the name has {len(name)} characters; write at most {LONGEST}"
    return ""


def find_odd(text: str) -> str | None:
    """The first character that is not seen, or is no plain blank, in words; None without one."""
    for character in text:
        category = unicodedata.category(character)
        if category in _UNSEEN or category in _NO_TEXT or (category == "Zs" and character != " "):
            kind = _UNSEEN.get(category) or _NO_TEXT.get(category) or "blank"
            called = unicodedata.name(character, f"{kind} character").lower()
            return f"a character that is not seen: {called} (U+{ord(character):04X})"
    return None


def find_alike(text: str) -> str | None:
    """The first letter that looks like one of ours in a word that has ours, too, in words.

    A word of one alphabet is what it is, in whichever it is written.
    """
    for word in re.findall(r"[^\W\d_]+", text):
        ours = any(character.isascii() for character in word)
        for character in word:
            looks = look_of(character)
            if looks != character and (ours or character not in _LATIN):
                called = unicodedata.name(character).lower()
                return (
                    f"{character!r} ({called}, U+{ord(character):04X}), which looks like {looks!r}"
                )
    return None


def look_of(text: str) -> str:
    """The text in our letters as far as it looks like them: equal for two that look alike."""
    return "".join(_LATIN.get(character) or _narrowed(character) for character in text)


def _narrowed(character: str) -> str:
    """Full-width letters and digits, and those in mathematical styles, are drawn as ours."""
    plain = unicodedata.normalize("NFKC", character)
    styled = "\U0001d400" <= character <= "\U0001d7ff" or "\uff00" <= character <= "\uff5a"
    return plain if styled and plain.isascii() and plain.isalnum() else character


def find_study_fault(name: str) -> str:
    """The same for the name of a study, which is the name of its folder."""
    if not re.fullmatch(STUDY_NAME, name):
        return (
            f"{name!r} is no name of a study, which is the name of its folder: use up to 64 "
            f"letters, digits, points, - and _, e.g. name: {near_name(name)}"
        )
    if name.lower() in _TAKEN:
        return f"{name!r} is a file or folder beside the studies; give another name"
    return ""


def near_name(name: str) -> str:
    """A name that would do, made of one that does not."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", plain).strip("-._")[:64]
    return slug or "my-study"
