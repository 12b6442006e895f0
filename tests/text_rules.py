"""The rules of normalisation and word splitting, written with `unicodedata` and `re`."""

import re
import unicodedata

# Unicode's White_Space, but for the line feed.
SPACE = "\t\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
DASHES, QUOTES, DOUBLE_QUOTES = "\u2014\u2013\u2015", "\u00b4\u2018\u2019", "\u201c\u201d"


def normal(raw: str) -> str:
    """NFC, standard punctuation, lower case, no invisible characters, single spaces and breaks."""
    out = unicodedata.normalize("NFC", raw).replace("\u2026", "...")
    out = re.sub(f"[{DASHES}]", "-", out)
    out = re.sub(f"[{QUOTES}]", "'", out)
    out = re.sub(f"[{DOUBLE_QUOTES}]", '"', out)
    out = "".join(character.lower() for character in out)
    out = "".join(
        character
        for character in out
        if character in SPACE + "\n" or unicodedata.category(character) not in ("Cc", "Cf")
    )
    out = re.sub(f"[{SPACE}]*\n[{SPACE}\n]*", "\n", out)
    return re.sub(f"[{SPACE}]+", " ", out)


def is_punctuation(character: str) -> bool:
    ascii_symbol = character.isascii() and character.isprintable() and not character.isalnum()
    return ascii_symbol or unicodedata.category(character).startswith("P")


def words(normalised: str) -> list[str]:
    """Line breaks and punctuation are words of their own; white space separates the others."""
    spaced = "".join(
        f" {c} " if c != " " and (c == "\n" or is_punctuation(c)) else c for c in normalised
    )
    return [word for word in spaced.split(" ") if word]
