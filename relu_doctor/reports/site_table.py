"""The table of sites: one row each, with a small bar of its units' statuses, fitted to a width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rich.cells import cell_len
from rich.text import Text

from relu_doctor.numerals import plural
from relu_doctor.reports.lines import table_lines
from relu_doctor.reports.verdict import dead_rate
from relu_doctor.reports.words import listed, plain_name, shorten
from relu_doctor.terms import Status

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

R = TypeVar("R", bound=Mapping[str, Any])
MAX_SITES = 40


@dataclass(frozen=True, slots=True)
class Look:
    """How a status looks: its mark tells it without colour.

    Attributes:
        mark: one cell of the bar.
        style: its colour, for terminals that have any.
        heading: of its column.
        meaning: for the legend.
    """

    mark: str
    style: str
    heading: str
    meaning: str


LOOKS: Mapping[Status, Look] = {  # in the order of the bar, the gravest first
    Status.NON_FINITE: Look("!", "magenta", "NaN/Inf", "NaN or Inf"),
    Status.DEAD: Look("█", "red", "dead", "dead"),
    Status.UNPROVEN: Look("▒", "yellow", "unproven", "silent, unproven"),
    Status.SATURATED: Look("^", "dark_orange", "saturated", "saturated"),
    Status.UNOBSERVED: Look("?", "cyan", "unobserved", "unobserved"),
    Status.RARE: Look("-", "blue", "rare", "rare"),
    Status.DORMANT: Look("~", "blue", "dormant", "dormant"),
    Status.ACTIVE: Look("·", "green", "active", "active"),
}
UNKNOWN = "?"  # a count that cannot be given: the site was not observed, or received NaN
INAPPLICABLE = "–"  # a count that cannot be other than none: these units cannot die
_ALWAYS = (Status.DEAD,)
_MINOR = (Status.RARE, Status.DORMANT, Status.SATURATED)  # shown by the bar where there is no room for a column
_WIDE = 100  # from this width on the producers have a column
_LEAST_NAME = 20


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which columns there are, and how wide the bar is."""

    producer: bool
    rectifier: bool
    statuses: tuple[Status, ...]
    bar: int
    name: int = 0

    @property
    def headings(self) -> list[str]:
        middle = [LOOKS[status].heading for status in self.statuses]
        return [
            "site",
            *(["producer"] if self.producer else []),
            *(["rectifier"] if self.rectifier else []),
            "units",
            *middle,
            "",
        ]


def site_lines(diagnosis: Diagnosis, width: int, *, most: int = MAX_SITES) -> list[Text]:
    """The table, the note on what it leaves out, and the legend of the marks that occur.

    Args:
        diagnosis: to tell of.
        width: in terminal cells.
        most: sites shown; of more, the worst.
    """
    rows = [{str(key): value for key, value in row.items()} for row in diagnosis.sites.to_dict("records")]
    mortal = {site.site_id for site in diagnosis.table.sites if site.can_die}
    shown, folded = worst_sites(rows, most)
    layout = _fit(shown, width)
    lines = table_lines(
        layout.headings,
        [_cells(row, layout, can_die=row["site_id"] in mortal) for row in shown],
        left=[0, len(layout.headings) - 1, *(range(1, 1 + layout.producer + layout.rectifier))],
    )
    if folded:
        lines.append(Text(folded_note(folded), "dim"))
    return [
        *lines,
        *_legend(diagnosis, [row for row in shown if row["site_id"] in mortal or not _all_well(_counts(row))], width),
    ]


def bar(counts: Mapping[Status, int], cells: int) -> list[tuple[Status, int]]:
    """Statuses with their cells of a bar, in the order of ``LOOKS``; what occurs has at least one.

    >>> bar({Status.DEAD: 1, Status.ACTIVE: 999}, 10)
    [(<Status.DEAD: 'dead'>, 1), (<Status.ACTIVE: 'active'>, 9)]
    """
    present = [(status, counts[status]) for status in LOOKS if counts.get(status)]
    total = sum(number for _, number in present)
    exact = [cells * number / total for _, number in present]
    given = [max(1, int(share)) for share in exact]
    while sum(given) > cells:  # taken where most was given over its due
        index = max(range(len(given)), key=lambda i: (given[i] > 1, given[i] - exact[i]))
        given[index] -= 1
    while sum(given) < cells:
        index = max(range(len(given)), key=lambda i: exact[i] - given[i])
        given[index] += 1
    return [(status, size) for (status, _), size in zip(present, given, strict=True) if size]


def _counts(row: Mapping[str, Any]) -> dict[Status, int]:
    return {status: int(row[status.value]) for status in LOOKS}


def _gravity(row: Mapping[str, Any]) -> tuple[float, ...]:
    units = max(int(row["num_units"]), 1)
    grave = (row["non_finite"], row["silent"], row["dead"], row["saturated"], row["unobserved"], row["rare"])
    return (*(number / units for number in grave), float(int(row["num_units"]) == 0))


def worst_sites(rows: Sequence[R], most: int) -> tuple[list[R], list[R]]:
    """The rows of the sites that are worst off, and those of the others; both in forward order."""
    ranked = sorted(range(len(rows)), key=lambda index: (*(-part for part in _gravity(rows[index])), index))
    kept = set(ranked[:most])
    return (
        [row for index, row in enumerate(rows) if index in kept],
        [row for index, row in enumerate(rows) if index not in kept],
    )


def _fit(rows: Sequence[Mapping[str, Any]], width: int) -> _Layout:
    present = [status for status in LOOKS if status is not Status.ACTIVE]
    present = [status for status in present if status in _ALWAYS or any(row[status.value] for row in rows)]
    major = [status for status in present if status not in _MINOR]
    longest = max((cell_len(plain_name(row["site"])) for row in rows), default=4)
    candidates = [
        _Layout(producer, rectifier, tuple(statuses), cells)
        for producer, rectifier, statuses, cells in (
            *(((True, True, present, 20),) if width >= _WIDE else ()),
            (False, True, present, 20),
            (False, True, present, 16),
            (False, True, present, 12),
            (False, False, present, 12),
            (False, True, major, 12),
            (False, False, major, 12),
            (False, False, major, 8),
        )
    ]
    for layout in candidates:
        room = width - _taken(layout, rows)
        if room >= min(longest, _LEAST_NAME):
            break
    return _Layout(layout.producer, layout.rectifier, layout.statuses, layout.bar, max(room, 8))


def _taken(layout: _Layout, rows: Sequence[Mapping[str, Any]]) -> int:
    """Cells that all columns but the name take, with the gaps."""
    widths = [layout.bar]
    for heading, key in (
        ("units", "num_units"),
        *((LOOKS[status].heading, status.value) for status in layout.statuses),
        *((("rectifier", "rectifier"),) if layout.rectifier else ()),
        *((("producer", "producer"),) if layout.producer else ()),
    ):
        widths.append(max([cell_len(heading), *(cell_len(_value(row[key])) for row in rows)]))
    return sum(widths) + 2 * len(widths)


def _value(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else shorten(plain_name(value), 24)


def _cells(row: Mapping[str, Any], layout: _Layout, *, can_die: bool) -> list[Text]:
    counts, units = _counts(row), int(row["num_units"])
    cells = [Text(shorten(plain_name(row["site"]), layout.name), "bold" if row["silent"] else "")]
    if layout.producer:
        cells.append(Text(_value(row["producer"]), "dim"))
    if layout.rectifier:
        cells.append(Text(_value(row["rectifier"])))
    cells.append(Text(f"{units:,}" if units else UNKNOWN))
    cells += [_count_cell(status, counts, units, can_die=can_die) for status in layout.statuses]
    return [*cells, _bar_cell(counts, layout.bar, can_die=can_die)]


def _count_cell(status: Status, counts: Mapping[Status, int], units: int, *, can_die: bool) -> Text:
    if counts[status]:
        return Text(f"{counts[status]:,}", LOOKS[status].style)
    if not units:
        return Text(UNKNOWN, "dim")
    if status in (Status.NON_FINITE, Status.UNOBSERVED):
        return Text("0", "dim")
    if not can_die:
        return Text(INAPPLICABLE, "dim")
    judged = units - counts[Status.UNOBSERVED] - counts[Status.NON_FINITE]
    return Text("0" if judged else UNKNOWN, "dim")


def _bar_cell(counts: Mapping[Status, int], cells: int, *, can_die: bool) -> Text:
    if not sum(counts.values()):
        return Text("not observed", LOOKS[Status.UNOBSERVED].style)
    if not can_die and _all_well(counts):
        return Text("cannot die", "dim")
    return Text.assemble(*((LOOKS[status].mark * size, LOOKS[status].style) for status, size in bar(counts, cells)))


def _all_well(counts: Mapping[Status, int]) -> bool:
    return counts[Status.ACTIVE] + counts[Status.DORMANT] == sum(counts.values())


def folded_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is told of the sites that a table leaves out: ``and 20 more sites, all of them sound``."""
    told = (Status.DEAD, Status.UNPROVEN, Status.NON_FINITE, Status.SATURATED, Status.UNOBSERVED)
    totals = {status: sum(int(row[status.value]) for row in rows) for status in told}
    others = [f"{totals[status]:,} {LOOKS[status].meaning}" for status in told if totals[status]]
    them = f"{listed(others, len(others))} units among them" if others else "all of them sound"
    return f"and {plural(len(rows), 'more site')}, {them}"


def _legend(diagnosis: Diagnosis, rows: Sequence[Mapping[str, Any]], width: int) -> list[Text]:
    """The marks that occur, as many to a line as fit."""
    rate = dead_rate(diagnosis)
    lines = [Text()]
    for status, look in LOOKS.items():
        if not any(row[status.value] for row in rows):
            continue
        meaning = f"dead: {rate}" if status is Status.DEAD and rate else look.meaning
        item = Text.assemble((look.mark, look.style), f" {meaning}")
        if lines[-1].cell_len and lines[-1].cell_len + 3 + item.cell_len > width:
            lines.append(Text())
        lines[-1].append("   " if lines[-1].cell_len else "")
        lines[-1].append_text(item)
    return lines if lines[0].cell_len else []
