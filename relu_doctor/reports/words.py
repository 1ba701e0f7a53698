"""Numbers and names as every report prints them: pure functions from values to text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from rich.cells import cell_len

from relu_doctor.text import clean_text

_NAME_LIMIT = 2000  # characters of a name that are looked at before it is shortened to its place
GLUE = "\u00a0"  # keeps a number and its sign or unit on one line; printed as a plain space


def listed(items: Sequence[str], most: int = 3) -> str:
    """``a``, ``a and b``, ``a, b, c and 4 more``."""
    shown = list(items[:most])
    rest = len(items) - len(shown)
    if rest:
        return f"{', '.join(shown)} and {rest:,} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def ranges(numbers: Iterable[int], most: int = 10) -> str:
    """Ascending whole numbers with their runs closed up.

    >>> ranges([0, 1, 2, 3, 7, 9, 10])
    '0–3, 7, 9, 10'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    pieces: list[tuple[str, int]] = []
    for run in runs:
        if len(run) > 2:
            pieces.append((f"{run[0]}–{run[-1]}", len(run)))
        else:
            pieces += [(str(number), 1) for number in run]
    rest = sum(size for _, size in pieces[most:])
    shown = ", ".join(text for text, _ in pieces[:most])
    return f"{shown} and {rest:,} more" if rest else shown


def plain_name(name: object) -> str:
    """A name from a model or a file as one printable line, whole so far as any report shows it."""
    return clean_text(name, _NAME_LIMIT)


def shorten(text: str, width: int) -> str:
    """A text of at most ``width`` terminal cells, its middle left out: both ends of a dotted path tell the most.

    >>> shorten("model.encoder.layers.11.mlp.act", 16)
    'model.e….mlp.act'
    """
    if cell_len(text) <= width:
        return text
    if width < 2:
        return "…"[:width]
    tail_width = width // 2
    head, tail = "", ""
    for character in text:
        if cell_len(head + character) > width - 1 - tail_width:
            break
        head += character
    for character in reversed(text):
        if cell_len(head + "…" + character + tail) > width:
            break
        tail = character + tail
    return f"{head}…{tail}"


def wrap(text: str, width: int, *, first: str = "", indent: str = "") -> list[str]:
    """Lines of at most ``width`` characters that never part a number from its percent sign or comparison.

    Args:
        text: one paragraph.
        width: of a line with its indent.
        first: what the first line begins with.
        indent: what the others begin with.
    """
    glued = re.sub(r"(?<=\d) (?=%)|(?<=[<>≤≥]) (?=\d)", GLUE, text)
    lines = textwrap.wrap(
        glued,
        max(width, len(indent) + 10),
        initial_indent=first,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    return [line.replace(GLUE, " ") for line in lines]
