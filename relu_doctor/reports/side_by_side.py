"""Several checkpoints in one table: what became of their units, beside whatever else is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from relu_doctor.numerals import percent, upper_percent
from relu_doctor.reports.console import MAX_WIDTH, MIN_WIDTH, SEVERITY_STYLES
from relu_doctor.reports.lines import paragraph, print_lines, table_lines
from relu_doctor.reports.site_table import INAPPLICABLE, LOOKS, UNKNOWN
from relu_doctor.reports.verdict import dead_bound, verdict
from relu_doctor.reports.words import plain_name, shorten
from relu_doctor.terms import Status

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

Row = tuple[str, "Diagnosis", Mapping[str, str]]
# Columns that make room for the label, in this order, and how much of it must else be shown.
_DROPPED = (("step", 28), ("units", 14), ("silent", 12))
_LEAST_LABEL = 12


def render_comparison(rows: Sequence[Row], console: Console) -> None:
    """Print one row per checkpoint.

    Args:
        rows: label, diagnosis, and further columns as heading to text, as ``{"accuracy": "97.8 %"}``.
        console: where; it decides on colour and width.
    """
    print_lines(comparison_lines(rows, console.width), console)


def comparison_lines(rows: Sequence[Row], width: int) -> list[Text]:
    """The lines of :func:`render_comparison`, at most 110 wide; columns give way to fit 80 where there are not many."""
    width = min(max(width, MIN_WIDTH), MAX_WIDTH)
    columns = _columns(rows)
    longest = max((cell_len(plain_name(label)) for label, _, _ in rows), default=0)
    for name, wanted in _DROPPED:
        if _room(columns, width) < min(longest, wanted) and (name != "step" or "epoch" in columns):
            columns.pop(name, None)
    room = max(_room(columns, width), _LEAST_LABEL)
    labels = [Text(shorten(plain_name(label), room), "bold") for label, _, _ in rows]
    lines = table_lines(
        ["checkpoint", *columns],
        [[label, *(cells[index] for cells in columns.values())] for index, label in enumerate(labels)],
        left=[0, 1 + list(columns).index("verdict")],
    )
    for note in _notes([diagnosis for _, diagnosis, _ in rows]):
        lines += paragraph(note, width, style="dim")
    return lines


def _room(columns: Mapping[str, Sequence[Text]], width: int) -> int:
    """Cells that the other columns leave for the label."""
    widths = [max(cell_len(heading), *(cell.cell_len for cell in cells)) for heading, cells in columns.items()]
    return width - sum(widths) - 2 * len(widths)


def _columns(rows: Sequence[Row]) -> dict[str, list[Text]]:
    diagnoses = [diagnosis for _, diagnosis, _ in rows]
    columns: dict[str, list[Text]] = {}
    for word in ("epoch", "step"):
        values = [diagnosis.table.coverage.source.get(word) for diagnosis in diagnoses]
        if any(value is not None for value in values):
            columns[word] = [Text(_number(value)) for value in values]
    columns["units"] = [Text(_number(diagnosis.summary["num_units"] or None)) for diagnosis in diagnoses]
    for status in (Status.DEAD, Status.UNPROVEN, Status.NON_FINITE):
        if status is Status.DEAD or any(diagnosis.summary[status.value] for diagnosis in diagnoses):
            columns[LOOKS[status].heading] = [_count(status, diagnosis) for diagnosis in diagnoses]
    columns["silent"] = [
        Text(percent(diagnosis.summary["silent_fraction"]) if _judged(diagnosis) else _blank(diagnosis))
        for diagnosis in diagnoses
    ]
    said = [verdict(diagnosis) for diagnosis in diagnoses]
    columns["verdict"] = [Text(each.label, SEVERITY_STYLES[each.severity]) for each in said]
    for heading in dict.fromkeys(heading for _, _, extra in rows for heading in extra):
        columns[plain_name(heading)] = [Text(plain_name(extra.get(heading, ""))) for _, _, extra in rows]
    return columns


def _number(value: object) -> str:
    if value is None:
        return INAPPLICABLE
    return f"{value:,}" if isinstance(value, int) else plain_name(value)


def _count(status: Status, diagnosis: Diagnosis) -> Text:
    number = int(diagnosis.summary[status.value])
    if number:
        return Text(f"{number:,}", LOOKS[status].style)
    known = status is Status.NON_FINITE or _judged(diagnosis)
    return Text("0" if known else _blank(diagnosis), "dim")


def _judged(diagnosis: Diagnosis) -> bool:
    """Whether of any unit that can die it is known whether it fired."""
    mortal = {site.site_id for site in diagnosis.table.sites if site.can_die}
    units = diagnosis.units[diagnosis.units["site_id"].isin(mortal)]
    return bool((~units["status"].isin([Status.NON_FINITE.value, Status.UNOBSERVED.value])).any())


def _blank(diagnosis: Diagnosis) -> str:
    return UNKNOWN if diagnosis.summary["num_units"] else INAPPLICABLE


def _notes(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """What the table's words mean: never dead without a rate."""
    notes = ["Often cited for dead units: 20–50 %."]
    bounds = [bound for diagnosis in diagnoses if (bound := dead_bound(diagnosis)) is not None]
    if bounds:
        sure = percent(min(diagnosis.config.confidence for diagnosis in diagnoses))
        notes.append(f"dead: fires on < {upper_percent(max(bounds))} of inputs ({sure} sure)")
    if any(diagnosis.summary["dead"] and diagnosis.table.coverage.exhaustive for diagnosis in diagnoses):
        notes.append("dead: silent on all inputs of a set that is said to be all there will ever be")
    needed = [diagnosis.summary["inputs_needed"] for diagnosis in diagnoses if diagnosis.summary["unproven"]]
    if any(diagnosis.table.coverage.random_inputs for diagnosis in diagnoses):
        notes.append("random inputs: nothing here speaks of real ones")
    elif needed:
        notes.append(f"unproven: silent, but on too few inputs; {max(needed):,} are needed")
    if any(not _judged(diagnosis) and diagnosis.summary["non_finite"] for diagnosis in diagnoses):
        notes.append(f"{UNKNOWN}: cannot be said of units that received NaN or Inf")
    return notes
