"""Lines of styled text: tables of cells, wrapped paragraphs, and printing them where not every character exists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from relu_doctor.reports.words import wrap

# One cell each, so that columns stay aligned where the output's encoding has no such characters.
STAND_INS = str.maketrans(
    {"█": "#", "▒": "%", "·": ".", "–": "-", "—": "-", "…": "~", "→": ">", "─": "-", "×": "x", "≤": "<", "≥": ">"}
    | {"▁": "_", "▂": "_", "▃": "-", "▄": "-", "▅": "=", "▆": "=", "▇": "*"}
    | {"‘": "'", "’": "'", "“": '"', "”": '"', "β": "b", "γ": "g", "τ": "t", "−": "-"}
)


def paragraph(text: str, width: int, *, style: str = "", first: str = "", indent: str = "") -> list[Text]:
    """A wrapped paragraph in one style; see :func:`~relu_doctor.reports.words.wrap`."""
    return [Text(line, style) for line in wrap(text, width, first=first, indent=indent)]


def table_lines(headings: Sequence[str], rows: Iterable[Sequence[Text]], *, left: Iterable[int] = (0,)) -> list[Text]:
    """Cells in columns that are as wide as they need to be, two spaces apart, under underlined headings.

    Args:
        headings: one per column.
        rows: of as many cells.
        left: columns set flush left; the others are flush right.
    """
    everything = [[Text(heading, "dim") for heading in headings], *(list(row) for row in rows)]
    widths = [max(row[column].cell_len for row in everything) for column in range(len(headings))]
    flush_left = set(left)
    lines = []
    for row in everything:
        line = Text()
        for column, cell in enumerate(row):
            pad = " " * (widths[column] - cell.cell_len)
            line.append("  " if column else "")
            line.append("" if column in flush_left else pad)
            line.append_text(cell)
            line.append(pad if column in flush_left else "")
        line.rstrip()
        lines.append(line)
    lines.insert(1, Text("─" * (sum(widths) + 2 * (len(widths) - 1)), "dim"))
    return lines


def print_lines(lines: Iterable[Text], console: Console) -> None:
    """Print lines as they are: neither wrapped, cut nor highlighted, with stand-ins for what cannot be encoded."""
    for line in lines:
        console.print(encodable(line, console.encoding), soft_wrap=True, highlight=False)


def encodable(line: Text, encoding: str) -> Text:
    """A line with stand-ins for what an encoding has no characters for."""
    if encoding.lower().startswith("utf"):
        return line
    line = line.copy()
    line.plain = line.plain.translate(STAND_INS).encode(encoding, "replace").decode(encoding)
    return line


def plain_text(lines: Iterable[Text]) -> str:
    """Lines as text without colour, each ended by a line break."""
    return "".join(line.plain.rstrip() + "\n" for line in lines)
