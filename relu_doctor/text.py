"""Text from files and users, made safe to quote in a message."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence

# Control, format (bidi and zero-width marks), surrogate, private and unassigned characters, line and paragraph breaks.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def clean_text(text: object, limit: int = 200) -> str:
    """One printable line: unprintable characters are shown as escapes, and a long text is cut.

    Args:
        text: what to quote; anything that is not a string is turned into one.
        limit: the most characters to return.

    Returns:
        A string without control characters, line breaks, bidi marks or lone surrogates, at most ``limit`` long.
    """
    try:
        raw = str(text)
    except Exception:  # noqa: BLE001  # __str__ is somebody else's code
        raw = f"<{type(text).__name__}>"
    pieces: list[str] = []
    length = 0
    for character in raw:
        piece = character
        if unicodedata.category(character) in _UNPRINTABLE:
            piece = character.encode("unicode_escape", "surrogatepass").decode("ascii")
        if length + len(piece) > limit:
            kept = "".join(pieces)
            return kept[: max(limit - 1, 0)] + "…"
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces)


def name_some(names: Iterable[object], most: int = 4) -> str:
    """The first few names, quoted, and how many more there are: ``'a', 'b' and 3 more``."""
    everything = list(names)
    listed = ", ".join(f"'{clean_text(name, 100)}'" for name in everything[:most])
    rest = len(everything) - most
    return f"{listed} and {rest} more" if rest > 0 else listed


def closest_name(name: str, choices: Sequence[str]) -> str | None:
    """The choice that is spelled most like ``name``, or ``None`` when nothing comes near."""
    matches = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return matches[0] if matches else None
